"""Random access to samples, as a plain map-style `torch` data set."""

import functools
import logging
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from saev_torch.batch import ActivationBatch, make_batch
from saev_torch.config import IndexedConfig
from saev_torch.errors import ConfigError
from saev_torch.format.metadata import Described
from saev_torch.order.selection import IndexMap, Selection
from saev_torch.order.steps import slot_nbytes
from saev_torch.processes.counters import log_to_stderr
from saev_torch.processes.leaving import come_by
from saev_torch.reading.crew import Task, run_tasks
from saev_torch.reading.extents import Extents, make_sample_extents
from saev_torch.reading.labels import Labels
from saev_torch.reading.reader import CallReader, Pace, Reader
from saev_torch.reading.ring import RingReader
from saev_torch.reading.slots import OpenBatch, Slot, SlotPool, can_share
from saev_torch.reading.source import Source
from saev_torch.reading.store import ShardStore

_log = logging.getLogger("saev_torch")

_N_THREADS = 4
_N_SLOTS = 4
_MIN_PARALLEL = 512
# What a copy in another process makes for itself.
_OF_PROCESS = ("_labels", "_source", "_pace", "_pool")


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
            if key != "act":
                sample[key] = int(column[i])
        return sample


def _collate_samples(samples: Any, *, collate_fn_map: Any = None) -> Any:
    if isinstance(samples, _Samples):
        return samples.batch
    # torch takes the keys of the first sample: the others would lose theirs.
    keys = [set(sample) for sample in samples]
    partial = set().union(*keys) - keys[0].intersection(*keys)
    if partial:
        raise ConfigError(
            f"IndexedDataset: expected samples with the same keys, got {sorted(partial)} only in some; join data sets "
            "of one kind, or give a collate_fn that says what to do"
        )
    return torch.utils.data.default_collate([dict(sample) for sample in samples])


default_collate_fn_map[_Sample] = _collate_samples


def _read_to(slot: Slot, extents: Extents, start: int, stop: int, reader: Reader) -> None:
    """Read a range of extents to places in a slot, which is named so that it lives as long as the task."""
    reader.read(extents, start, stop)


class IndexedDataset(Described, Dataset[dict[str, Any]]):
    """Random access to samples by number, in the order of the bytes on disk.

    `ds[i]` is a dict of `act` (`[d_model] float32`), `example_idx`, `token_idx`, and where a batch has such a
    column `token_label` (-1 for a special token) and `layer`. `DataLoader(ds, batch_size=16384, shuffle=True)` reads a
    whole batch at once through `__getitems__`.

    Args:
        cfg: What to read.

    Attributes:
        cfg: The config.
        metadata: Metadata of the shards.
        index_map: Numbers of samples, and where they are.

    Errors are those of `OrderedActivations`.
    """

    def __init__(self, cfg: IndexedConfig) -> None:
        self.cfg = cfg
        self._store = ShardStore(cfg.shards)
        self.metadata = self._store.metadata
        self._selection = Selection(self.metadata, cfg.tokens, cfg.layer)
        self.index_map = IndexMap(self.metadata, cfg.tokens, cfg.layer)
        self._begin()
        if cfg.debug:
            log_to_stderr()
            _log.debug("%s: %d samples", cfg.shards, len(self))

    def _begin(self) -> None:
        self._labels, self._source, self._pace = Labels(self._store), Source(self._store), Pace(1)
        self._pool: SlotPool | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OF_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

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
        come_by()
        n, selection = len(samples), self._selection
        wrong = (samples < 0) | (samples >= len(self))
        if wrong.any():
            raise IndexError(f"sample {int(samples[wrong][0])} is out of range: there are {len(self)}, from 0.")
        slot = self._acquire(n)
        try:
            order = np.argsort(samples)
            cells = selection.cells(samples[order])
            places = slot.address + order * selection.sample_nbytes
            self._read_extents(make_sample_extents(selection, cells, places), slot)
            back = np.empty_like(order)
            back[order] = np.arange(n)
            labels = self._labels.of_cells(selection, cells)[back] if self._store.has_labels else None
        except BaseException:
            # Threads that were not waited for may still read to it: the memory lives as long as their tasks.
            if self._pool is not None:
                self._pool.forget(slot)
            raise
        batch = make_batch(OpenBatch(slot, n, cells[back], labels), selection, n, label_key="token_label")
        return _Samples(batch)

    def _read_extents(self, parts: list[Extents], slot: Slot) -> None:
        n_extents = max(len(extents.nbytes) for extents in parts)
        # For each call anew: a ring takes 50 us, and nothing is left to be closed.
        reader = self._source.open_reader(self._pace) if n_extents >= _MIN_PARALLEL else CallReader(self._store)
        has_ring = isinstance(reader, RingReader) and not self._store.answers_short
        if n_extents < _MIN_PARALLEL or has_ring or not self._pace.is_slow:
            for extents in parts:
                reader.read(extents, 0, len(extents.nbytes))
            return
        # Threads help where a disk is waited for; else such short reads only make them wait for each other.
        tasks = (
            Task(functools.partial(_read_to, slot, extents, start, stop))
            for extents in parts
            for start, stop in extents.cut(max(1, int(extents.nbytes.sum()) // _N_THREADS + 1))
        )
        run_tasks("saev_torch indexed", _N_THREADS, self._pace, self._source.open_reader, tasks)

    def _acquire(self, n: int) -> Slot:
        nbytes = slot_nbytes(n, self._selection.sample_nbytes)
        if n < _MIN_PARALLEL:
            return Slot(nbytes, shared=False)
        if self._pool is None or self._pool.nbytes < nbytes:
            self._pool = SlotPool(nbytes, shared=get_worker_info() is not None and can_share())
        return self._pool.acquire(_N_SLOTS)
