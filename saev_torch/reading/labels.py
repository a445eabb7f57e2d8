"""Labels of content tokens, and whether they still select what they selected."""

import os

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import LabelsNotFoundError
from saev_torch.format.shards import identify
from saev_torch.format.sidecars import LABELS
from saev_torch.order.kept import labels_changed
from saev_torch.order.selection import Selection
from saev_torch.reading.columns import Column
from saev_torch.reading.reader import Spot
from saev_torch.reading.store import LABELS_IDX, ShardStore

_Int64s = NDArray[np.int64]
_Labels = NDArray[np.uint8]


class Labels(Column):
    """The labels.bin of a store, by which a selection was made, if one is given. Threads may share it.

    Each method raises `ReadError` where reading failed, or the file became shorter, and `FormatError` where the file
    was written since, so that it selects something else.
    """

    def __init__(self, store: ShardStore, selection: Selection | None = None) -> None:
        super().__init__(store, LABELS)
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
                f"{self.store.shards_dir / LABELS.name}: expected labels, because labels are asked for, got no such "
                "file; leave ignore_labels empty, or use shards with labels."
            )
        return super().of_examples(examples)

    def _read(self, starts: _Int64s, lengths: _Int64s, spot: Spot | None) -> _Labels:
        labels = super()._read(starts, lengths, spot)
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
            raise labels_changed(self.store.shards_dir / LABELS.name)
        self._identity = identity
