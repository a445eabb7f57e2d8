"""Samples by their numbers, many at once: from the page cache by all cores, else by a ring, or by several threads."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.order.selection import Selection
from saev_torch.processes.world import count_own_cores
from saev_torch.reading.crew import Task, run_tasks
from saev_torch.reading.extents import Extents, make_sample_extents
from saev_torch.reading.gather import Gather
from saev_torch.reading.reader import CallReader, Pace, Reader, Spot
from saev_torch.reading.scattered import ScatteredRows
from saev_torch.reading.slots import Slot
from saev_torch.reading.source import Source

_Int64s = NDArray[np.int64]

# Fewer reads than this are not worth more than single calls.
_MIN_MANY = 512
_N_THREADS = 4
# To start a thread takes as long as to gather a quarter of this.
_MIN_NBYTES_PER_THREAD = 4 << 20
_NAME = "saev_torch indexed"

Finish = Callable[[torch.Tensor], None]
"""What is left to do with the activations."""


def are_many(n: int) -> bool:
    """Whether so many reads are worth more than single calls, and memory that is used again."""
    return n >= _MIN_MANY


def _read_to(slot: Slot, extents: Extents, start: int, stop: int, reader: Reader) -> None:
    """Read a range of extents to places in a slot, which is named so that it lives as long as the task."""
    reader.read(extents, start, stop)


def _gather_to(slot: Slot, gather: Gather, rows: ScatteredRows, reader: Reader) -> None:
    """As `_read_to`, from the page cache."""
    gather.read(rows, reader)


def _done(act: torch.Tensor) -> None:
    """Nothing is left to do."""


class ManyReader:
    """Reads samples of a source to a slot."""

    def __init__(self, source: Source, selection: Selection) -> None:
        self._source, self._selection = source, selection
        self._gather = Gather.open(source)
        self._pace = Pace(1)

    def read(self, cells: _Int64s, rows: _Int64s, slot: Slot) -> Finish:
        """Read samples, each to its row of a slot; what is left to do with the activations is returned.

        `cells` are `[n] int64`, in the order of the disk, and `rows` likewise.
        """
        if self._gather is not None and are_many(len(cells)):
            found = self._gather.find(self._selection, cells, Spot(), rows)
            if found is not None:
                gather, found_rows = found[0]
                return self._gather_rows(gather, found_rows.at(slot.address), slot)
        places = slot.address + rows * self._selection.act_nbytes
        return self._read_extents(make_sample_extents(self._selection, cells, places), slot)

    def _gather_rows(self, gather: Gather, rows: ScatteredRows, slot: Slot) -> Finish:
        n_threads = min(count_own_cores(), max(1, len(rows) * rows.row_nbytes // _MIN_NBYTES_PER_THREAD))
        most = -(-len(rows) // n_threads)
        parts = [rows.part(start, min(len(rows), start + most)) for start in range(0, len(rows), most)]
        tasks = [Task(functools.partial(_gather_to, slot, gather, part)) for part in parts]
        if n_threads == 1:
            tasks[0].run(self._source.open_reader(Pace(1)))
        else:
            run_tasks(_NAME, n_threads, Pace(n_threads), self._source.open_reader, iter(tasks))
        return _done

    def _read_extents(self, parts: list[Extents], slot: Slot) -> Finish:
        n_extents = max(len(extents.nbytes) for extents in parts)
        source, store = self._source, self._source.store
        # For each call anew: a ring takes 50 us, and nothing is left to be closed.
        reader = source.open_reader(self._pace) if n_extents >= _MIN_MANY else CallReader(store)
        has_ring = reader.has_ring and not store.answers_short
        if n_extents < _MIN_MANY or has_ring or not self._pace.is_slow:
            for extents in parts:
                reader.read(extents, 0, len(extents.nbytes))
            return source.convert if n_extents < _MIN_MANY else source.finish
        # Threads help where a disk is waited for; else such short reads only make them wait for each other.
        tasks = (
            Task(functools.partial(_read_to, slot, extents, start, stop))
            for extents in parts
            for start, stop in extents.cut(max(1, int(extents.nbytes.sum()) // _N_THREADS + 1))
        )
        run_tasks(_NAME, _N_THREADS, self._pace, source.open_reader, tasks)
        return source.finish
