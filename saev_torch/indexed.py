"""Random access to samples, as a plain map-style `torch` data set."""

import functools
import logging
import operator
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from saev_torch.batch import ActivationBatch, make_batch
from saev_torch.config import IndexedConfig
from saev_torch.format.metadata import Described
from saev_torch.order.selection import IndexMap, Selection
from saev_torch.order.steps import slot_nbytes
from saev_torch.processes.counters import log_to_stderr
from saev_torch.reading.extents import make_sample_extents, read_cell_labels, read_extents, unnoted
from saev_torch.reading.placing import OpenBatch
from saev_torch.reading.ring import Ring
from saev_torch.reading.slots import Slot, SlotPool, can_share
from saev_torch.reading.store import ShardStore

__all__ = ["IndexedDataset"]

_log = logging.getLogger("saev_torch")

_INDEXED_THREADS = 4
_INDEXED_SLOTS = 4
_SLOW_S_PER_ROW = 20e-6
_MIN_PARALLEL = 512


class _Sample(dict[str, Any]):
    """One sample of `IndexedDataset`; lists of them are collated at once."""


class _Samples(Sequence[_Sample]):
    """The samples of one call, made when they are looked at; `DataLoader` collates them without looking."""

    def __init__(self, batch: ActivationBatch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["act"])

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        sample = _Sample(act=self.batch["act"][i])
        for key, column in self.batch.items():
            if key != "act" and not (key == "token_label" and self.batch["token_idx"][i] < 0):
                sample[key] = int(column[i])
        return sample


def _collate_samples(samples: Any, *, collate_fn_map: Any = None) -> Any:
    if isinstance(samples, _Samples):
        return samples.batch
    return torch.utils.data.default_collate([dict(sample) for sample in samples])


default_collate_fn_map[_Sample] = _collate_samples


class IndexedDataset(Described, Dataset[dict[str, Any]]):
    """Random access to samples by number, in the order of the bytes on disk.

    `ds[i]` is a dict of `act` (`[d_model] float32`), `example_idx`, `token_idx`, and where they exist `token_label` and
    `layer`. `DataLoader(ds, batch_size=16384, shuffle=True)` reads a whole batch at once through `__getitems__`.

    Args:
        cfg: What to read.

    Attributes:
        cfg: The config.
        metadata: Metadata of the shards.
        index_map: Numbers of samples, and where they are.

    Raises:
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
        ConfigError: The config asks for what these shards do not hold.
    """

    def __init__(self, cfg: IndexedConfig) -> None:
        self.cfg = cfg
        self._store = ShardStore(cfg.shards)
        self.metadata = self._store.metadata
        self._selection = Selection(self.metadata, cfg.tokens, cfg.layer)
        self.index_map = IndexMap(self.metadata, cfg.tokens, cfg.layer)
        self._pool: SlotPool | None = None
        self._is_slow = False
        if cfg.debug:
            log_to_stderr()
            _log.debug("%s: %d samples", cfg.shards, len(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def __len__(self) -> int:
        return self._selection.n_samples

    def __getitem__(self, i: int) -> dict[str, Any]:
        sample: dict[str, Any] = self._read(np.array([operator.index(i)], dtype=np.int64))[0]
        return sample

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Read many samples at once.

        Args:
            indices: Numbers of samples.

        Returns:
            The samples, in that order.

        Raises:
            IndexError: A number is negative or not below `len(self)`.
            TypeError: A number is no integer.
            ReadError: Reading failed.
        """
        numbers = np.asarray(indices)
        if numbers.dtype.kind not in "iu" and len(numbers):
            raise TypeError(f"indices: expected integers, got {numbers.dtype}; number samples from 0.")
        return self._read(numbers.astype(np.int64))

    def _read(self, samples: np.ndarray[Any, np.dtype[np.int64]]) -> _Samples:
        n, store, selection = len(samples), self._store, self._selection
        wrong = (samples < 0) | (samples >= len(self))
        if wrong.any():
            raise IndexError(f"sample {int(samples[wrong][0])} is out of range: there are {len(self)}, from 0.")
        slot = self._acquire(n)
        try:
            order = np.argsort(samples)
            cells = selection.cells(samples[order])
            places = slot.address + order * selection.sample_nbytes
            # For each call anew: that takes 50 us, and nothing is left to be closed.
            ring = Ring.open() if n >= _MIN_PARALLEL else None
            jobs = [
                functools.partial(read_extents, store, extents, start, stop, unnoted, ring)
                for extents in make_sample_extents(selection, cells, places)
                for start, stop in extents.cut(max(1, int(extents.nbytes.sum()) // _INDEXED_THREADS + 1))
            ]
            began = time.monotonic()
            if n < _MIN_PARALLEL or ring is not None or not self._is_slow:
                for job in jobs:
                    job()
            else:
                with ThreadPoolExecutor(_INDEXED_THREADS) as threads:
                    for done in [threads.submit(job) for job in jobs]:
                        done.result()
            # Threads help where a disk is waited for; else such short reads only make them wait for each other.
            self._is_slow = n * _SLOW_S_PER_ROW < time.monotonic() - began
            back = np.empty_like(order)
            back[order] = np.arange(n)
            labels = read_cell_labels(store, selection, cells)[back] if store.has_labels else None
        except BaseException:
            slot.release()
            raise
        batch = make_batch(OpenBatch(slot, n, cells[back], labels), selection, n, label_key="token_label")
        return _Samples(batch)

    def _acquire(self, n: int) -> Slot:
        nbytes = slot_nbytes(n, self._selection.sample_nbytes)
        if n < _MIN_PARALLEL:
            return Slot(nbytes, shared=False)
        if self._pool is None or self._pool.nbytes < nbytes:
            self._pool = SlotPool(nbytes, shared=get_worker_info() is not None and can_share())
        return self._pool.acquire(_INDEXED_SLOTS)
