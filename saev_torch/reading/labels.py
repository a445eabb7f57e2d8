"""Labels of content tokens, by example, by runs of bytes, and by cells."""

import os
import threading
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import LabelsNotFoundError
from saev_torch.format.shards import LABELS_NAME, identify
from saev_torch.order.kept import labels_changed
from saev_torch.order.runs import expand_runs, find_runs
from saev_torch.order.selection import Selection
from saev_torch.processes.locks import renewed
from saev_torch.reading.extents import Extents
from saev_torch.reading.reader import CallReader, Spot
from saev_torch.reading.store import LABELS_IDX, ShardStore

_Int64s = NDArray[np.int64]
_Labels = NDArray[np.uint8]

# A labels.bin up to this size is kept in memory once read: a block's few labels cost a read as dear as its activations.
_MAX_KEPT_NBYTES = 32 << 20


class Labels:
    """The labels.bin of a store, by which a selection was made, if one is given. Threads may share it.

    Each method raises `ReadError` where reading failed, or the file became shorter, and `FormatError` where the file
    was written since, so that it selects something else.
    """

    def __init__(self, store: ShardStore, selection: Selection | None = None) -> None:
        self.store = store
        self._width = store.metadata.content_tokens_per_example
        self._nbytes = store.metadata.n_examples * self._width
        self._lock = renewed(threading.Lock())
        self._kept: _Labels | None = None
        self._selection: Selection | None = None
        self._identity = None if store.identities is None else tuple(store.identities[LABELS_IDX].tolist())
        if selection is not None:
            self.expect(selection)

    def expect(self, selection: Selection) -> None:
        """Refuse labels, from now on, that select something else."""
        self._selection = None if selection.kept_digest is None else selection

    def of_examples(self, examples: _Int64s) -> _Labels:
        """Read the labels of examples, `[m, content_tokens_per_example] uint8`; fastest where examples ascend.

        Raises `LabelsNotFoundError` where there is no labels.bin.
        """
        if not self.store.has_labels:
            raise LabelsNotFoundError(
                f"{self.store.shards_dir / LABELS_NAME}: expected labels, because labels are asked for, got no such "
                "file; leave ignore_labels empty, or use shards with labels."
            )
        kept = self._whole(None)
        if kept is not None:
            return kept.reshape(-1, self._width)[examples]
        starts, lengths = find_runs(examples)
        return self.of_runs(starts * self._width, lengths * self._width).reshape(len(examples), self._width)

    def of_runs(self, starts: _Int64s, lengths: _Int64s, spot: Spot | None = None) -> _Labels:
        """Read runs of bytes, one after the other, and tell `spot` what is read."""
        kept = self._whole(spot)
        return self._read(starts, lengths, spot) if kept is None else kept[expand_runs(starts, lengths)]

    def of_cells(self, selection: Selection, cells: _Int64s, spot: Spot | None = None) -> _Labels:
        """Read the labels of cells, `[n] uint8`, 0 for a special token; fastest in the order of the disk."""
        examples, _, tokens = selection.split(cells)
        tokens = tokens - selection.n_special
        content = tokens >= 0
        labels = np.zeros(len(cells), dtype=np.uint8)
        labels[content] = self.of_runs(*find_runs((examples * self._width + tokens)[content]), spot)
        return labels

    def of_one(self, columns: Mapping[str, int]) -> int:
        """Read the label of a sample of which a batch says `example_idx` and `token_idx`; -1 for a special token."""
        example, token = columns["example_idx"], columns["token_idx"]
        if token < 0:
            return -1
        at, kept = example * self._width + token, self._whole(None)
        return int(self._read(np.array([at]), np.array([1]), None)[0] if kept is None else kept[at])

    def _whole(self, spot: Spot | None) -> _Labels | None:
        """The whole file, read the first time; None where it is too large to be kept."""
        if self._nbytes > _MAX_KEPT_NBYTES:
            return None
        with self._lock:
            if self._kept is None:
                self._kept = self._read(np.zeros(1, dtype=np.int64), np.array([self._nbytes]), spot)
            return self._kept

    def _read(self, starts: _Int64s, lengths: _Int64s, spot: Spot | None) -> _Labels:
        labels = np.empty(int(lengths.sum()), dtype=np.uint8)
        extents = Extents.in_a_row(labels, np.full(len(starts), LABELS_IDX), starts, lengths)
        CallReader(self.store, spot=spot).read(extents, 0, len(starts))
        if self._selection is not None:
            self._check_identity()
        return labels

    def _check_identity(self) -> None:
        """Count again where the file was written, or is another one, since it was last looked at."""
        with self.store.opened(LABELS_IDX) as fd:
            identity = identify(os.fstat(fd))
        if identity == self._identity:
            return
        # Not with this one's own method: it keeps what was read, and comes here again.
        fresh = Labels(self.store)
        if (
            self._selection is not None
            and self._selection.digest_kept(fresh.of_examples) != self._selection.kept_digest
        ):
            raise labels_changed(self.store.shards_dir / LABELS_NAME)
        self._identity = identity
