"""Values of content tokens that stand beside the shards: by example, by runs of tokens, and by cells."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.format.sidecars import Sidecar, sidecar_idx
from saev_torch.order.runs import expand_runs, find_runs
from saev_torch.order.selection import Selection
from saev_torch.processes.locks import renewed
from saev_torch.reading.extents import Extents
from saev_torch.reading.reader import CallReader, Spot
from saev_torch.reading.store import ShardStore

_Int64s = NDArray[np.int64]
_Values = NDArray[Any]

# A file up to this size is kept in memory once read: a block's few values cost a read as dear as its activations.
_MAX_KEPT_NBYTES = 32 << 20


class Column:
    """The values of one sidecar of a store, which must be there when they are read. Threads may share it.

    Each method raises `ReadError` where reading failed, or the file became shorter.
    """

    def __init__(self, store: ShardStore, sidecar: Sidecar) -> None:
        self.store, self._idx = store, sidecar_idx(sidecar)
        self._dtype = np.dtype(sidecar.storage)
        self._start, self._nbytes = sidecar.offset(store.metadata, 0), sidecar.nbytes(store.metadata)
        self._width = store.metadata.content_tokens_per_example
        self._lock = renewed(threading.Lock())
        self._kept: _Values | None = None

    def of_examples(self, examples: _Int64s) -> _Values:
        """Read the values of examples, `[m, content_tokens_per_example]`; fastest where examples ascend."""
        kept = self._whole(None)
        if kept is not None:
            return kept.reshape(-1, self._width)[examples]
        starts, lengths = find_runs(examples)
        return self.of_runs(starts * self._width, lengths * self._width).reshape(len(examples), self._width)

    def of_runs(self, starts: _Int64s, lengths: _Int64s, spot: Spot | None = None) -> _Values:
        """Read runs of tokens, one after the other, and tell `spot` what is read."""
        kept = self._whole(spot)
        return self._read(starts, lengths, spot) if kept is None else kept[expand_runs(starts, lengths)]

    def of_cells(self, selection: Selection, cells: _Int64s, spot: Spot | None = None) -> _Values:
        """Read the values of cells, `[n]`, 0 for a special token."""
        kept = self._whole(spot)
        if not selection.n_special and selection.n_grid_layers == 1:
            return self._at(cells, kept, spot)
        examples, _, tokens = selection.split(cells)
        at = examples * self._width + tokens - selection.n_special
        content = tokens >= selection.n_special
        if content.all():
            return self._at(at, kept, spot)
        values = np.zeros(len(cells), dtype=self._dtype)
        values[content] = self._at(at[content], kept, spot)
        return values

    def _at(self, at: _Int64s, kept: _Values | None, spot: Spot | None) -> _Values:
        if kept is not None:
            return kept[at]
        if (at[1:] < at[:-1]).any():
            # Each is read once, in the order of the disk.
            at, where = np.unique(at, return_inverse=True)
            return self._at(at, kept, spot)[where]
        return self._read(*find_runs(at), spot)

    def of_one(self, example: int, token: int) -> int:
        """Read the value of a content token; -1 for a special one, whose number is -1."""
        if token < 0:
            return -1
        at, kept = example * self._width + token, self._whole(None)
        return int(self._read(np.array([at]), np.array([1]), None)[0] if kept is None else kept[at])

    def _whole(self, spot: Spot | None) -> _Values | None:
        """All values, read the first time; None where they are too many to be kept."""
        if self._nbytes > _MAX_KEPT_NBYTES:
            return None
        with self._lock:
            if self._kept is None:
                n = self.store.metadata.n_examples * self._width
                self._kept = self._read(np.zeros(1, dtype=np.int64), np.array([n]), spot)
            return self._kept

    def _read(self, starts: _Int64s, lengths: _Int64s, spot: Spot | None) -> _Values:
        values, width = np.empty(int(lengths.sum()), dtype=self._dtype), self._dtype.itemsize
        memory, shards = values.view(np.uint8), np.full(len(starts), self._idx)
        extents = Extents.in_a_row(memory, shards, self._start + starts * width, lengths * width)
        CallReader(self.store, spot=spot).read(extents, 0, len(starts))
        return values
