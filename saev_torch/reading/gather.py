"""Single rows from all over files that the page cache holds: copied from mapped files, a thousand or more at a time.

To read a row of 3 KB costs the kernel more than to copy it: it finds the pages of each anew. Where files are mapped,
the processor finds them. Machine code copies, see `rowcopy`, where there is some and a `Watch` is on. Else the kernel
does, in one system call for many rows: `process_vm_writev`, from this process to this process. Of rows all over 10 GB,
a core gathers 10 to 14 GB/s the first way and 5 to 7 the second; it was 5.2 by `pwritev` to the file of a slot, and 2.8
by a ring.

A mapping is address space and no memory of ours: the page cache counts as resident in each process that maps it, and
the system takes it back when it likes. Rows that are not in the page cache are read as ever: in uniform order by a
ring, which asks a disk for many of them at a time, else by way of a buffer. So are those of directories with more
shards than may be kept open.
"""

import ctypes
import functools
import os
import resource
import sys
import time
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.order.joint import AnySelection, divide
from saev_torch.order.runs import MAX_READ_ROWS
from saev_torch.order.selection import Selection
from saev_torch.reading.mapping import Mapping, is_in_memory
from saev_torch.reading.reader import Reader, Spot
from saev_torch.reading.rowcopy import find_row_copy
from saev_torch.reading.scattered import ScatteredRows, find_sources
from saev_torch.reading.source import Source
from saev_torch.reading.watch import find_watch

_Int64s = NDArray[np.int64]
_Bytes = NDArray[np.uint8]

# Rows of a batch that are looked at; a single one that is not in the page cache takes longer than a hundred that are.
_N_PROBES = 8
# Files of which each is looked at.
_N_FEW = 32
# What is copied here until it is seen whether a disk was waited for, of rows as many as this at most.
_PIECE_NBYTES, _MOST_ROWS = 8 << 20, 2 * MAX_READ_ROWS
# What is converted is gathered to memory that stays in the cache of the core.
_STAGE_NBYTES = 256 << 10
# Where more rows than one of so many have to be waited for, a ring is better.
_ROWS_PER_WAIT = 64

_libc: Any = ctypes.CDLL(None, use_errno=True)
_has_call = sys.platform.startswith("linux") and hasattr(_libc, "process_vm_writev")
if _has_call:
    _write = _libc.process_vm_writev
    _write.restype = ctypes.c_ssize_t
    _write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]


def _copy_in_kernel(sources: _Int64s, place: int, nbytes: int, stride: int) -> int:
    """Copy rows of `nbytes` bytes at addresses `[n] int64` to a place; how many of the first ones are there.

    From one to the next it is `stride` bytes there.
    """
    n = len(sources)
    vectors, targets = np.full((n, 2), nbytes), np.full((n if stride > nbytes else 1, 2), nbytes)
    vectors[:, 0] = sources
    if stride > nbytes:
        targets[:, 0] = place + stride * np.arange(n)
    else:
        targets[:] = place, n * nbytes
    got = _write(os.getpid(), vectors.ctypes.data, n, targets.ctypes.data, len(targets), 0)
    return max(0, int(got)) // nbytes


@functools.cache
def _can_gather() -> bool:
    """Whether this system has the call, and allows it: containers may forbid it."""
    if not _has_call:
        return False
    values = np.array([1, 0], dtype=np.uint8)
    return _copy_in_kernel(np.array([values.ctypes.data]), values.ctypes.data + 1, 1, 1) == 1 and bool(values[1])


class AnyStore(Protocol):
    """What has the files of shards, by number: a store, or several as one."""

    @property
    def answers_short(self) -> bool:
        """As of a store."""

    def mapped(self, shard_idx: int) -> Mapping | None:
        """As of a store."""


Found: TypeAlias = "tuple[Gather, ScatteredRows]"
"""Rows, and what gathers them."""

FoundBatch: TypeAlias = tuple[_Int64s, list[Found]]
"""The cells of a batch, `[n] int64`, and its rows, without a place."""


def copies_here() -> bool:
    """Whether rows in the page cache are copied by machine code."""
    watch = find_watch()
    return watch is not None and watch.is_on


class Gather:
    """Gathers rows of a source, and converts them as its readers do. Threads may share it; see `open`.

    Attributes:
        is_refused: Whether the system has refused to map a file.
    """

    def __init__(self, source: Source, store: AnyStore | None = None, first_shard: int = 0) -> None:
        self._source, self._store, self._first_shard = source, source.store if store is None else store, first_shard
        self._convert_run = source.convert_run
        self._row_copy, self._plain_copy = source.find_row_copy(), find_row_copy()
        self.is_refused = False

    @classmethod
    def open(cls, source: Source, store: AnyStore | None = None, first_shard: int = 0) -> "Gather | None":
        """Make one; None where the source is to be read otherwise.

        Of one that is read with others, `store` has the shards of all, and its own are numbered from `first_shard` on.
        """
        # Address space that is limited is needed for batches.
        is_free = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
        is_few = len(source.store.shards) <= source.store.most_open
        may = is_free and is_few and not source.past_cache and _can_gather()
        return cls(source, store, first_shard) if may else None

    @property
    def copies_anywhere(self) -> bool:
        """Whether rows need not go to memory one behind the other."""
        return self._row_copy is not None and self.is_fast

    @property
    def is_fast(self) -> bool:
        """Whether rows are copied here, which is faster than to read them to a buffer."""
        return copies_here()

    def find(
        self, selection: AnySelection, cells: _Int64s, spot: Spot, numbers: _Int64s | None = None
    ) -> list[Found] | None:
        """Find the rows of samples, which go to a place one behind the other; None where some are not in memory.

        `cells` are `[n] int64`, in the order in which the samples go there. Else `numbers`, likewise, say which one
        there each becomes: where neighbours on disk follow each other, they are faster to copy. Errors are those of
        `ShardStore.opened`.
        """
        if numbers is not None and not self.copies_anywhere:
            in_order = np.empty_like(cells)
            in_order[numbers] = cells
            cells, numbers = in_order, None
        (own,) = divide(selection, cells)
        rows = self.find_some(own.selection, own.cells, spot, numbers)
        return None if rows is None else [(self, rows)]

    def find_some(
        self, selection: Selection, cells: _Int64s, spot: Spot, numbers: _Int64s | None
    ) -> ScatteredRows | None:
        """As `find`, of samples that become rows of these numbers `[n] int64` in memory; else one behind the other."""
        row_nbytes, n_parts = selection.md.row_nbytes, selection.n_parts
        shards, rows = selection.disk_rows(cells)
        shards += self._first_shard
        if n_parts > 1:
            shifts = (np.array(selection.layer_idxs) - selection.layer_idxs[0]) * selection.md.tokens_per_example
            shards, rows = np.repeat(shards, n_parts), (rows[:, None] + shifts).reshape(-1)
            if numbers is not None:
                numbers = (numbers[:, None] * n_parts + np.arange(n_parts)).reshape(-1)
        mappings = self._map(_numbers_in(shards), spot)
        if mappings is None:
            return None
        stride = selection.act_nbytes // n_parts
        sources = find_sources(mappings, shards, rows * row_nbytes)
        found = ScatteredRows(shards, sources, row_nbytes, stride, mappings, numbers)
        # An odd step, so that not all are of one layer.
        probed = found.sources[:: len(found) // _N_PROBES | 1].tolist()
        return found if all(map(is_in_memory, probed)) else None

    def _map(self, wanted: list[int], spot: Spot) -> dict[int, Mapping] | None:
        """Shards that are wanted, mapped, by number; None where the system refuses."""
        found = {}
        for number in wanted if not self.is_refused else ():
            spot.set(functools.partial(tuple[int, int], (number, 0)))
            mapping = self._store.mapped(number)
            # Where answers may be short, only single calls tell.
            self.is_refused = mapping is None or self._store.answers_short
            if mapping is None or self.is_refused:
                break
            found[number] = mapping
        spot.clear()
        return None if self.is_refused else found

    def read(self, rows: ScatteredRows, reader: Reader) -> None:
        """Gather rows, or read them with a reader: while a disk is waited for, and what fails. Errors are its own."""
        done, pace = 0, reader.pace
        if pace is None or not pace.is_slow:
            began, n_before = time.monotonic(), _n_waits()
            reader.spot.set(functools.partial(rows.where, 0))
            done = self._gather(rows, n_before + len(rows) // _ROWS_PER_WAIT)
            reader.spot.clear()
            if pace is not None:
                # On a machine that is busy, time alone would say the same of rows that are in memory.
                is_slow = _n_waits() - n_before > len(rows) // _ROWS_PER_WAIT
                pace.note(done * rows.row_nbytes, 0, time.monotonic() - began if is_slow else 0.0)
                pace.is_slow = is_slow
        if done < len(rows):
            left = rows.part(done, len(rows))
            left.read(reader)
            self._finish(left, left.place, len(left), left.numbers)

    def _gather(self, rows: ScatteredRows, most_waits: int) -> int:
        """Gather rows until this thread has waited so often; how many of the first ones are where they belong."""
        is_here = self.is_fast and all(map(_is_watched, rows.mappings.values()))
        stage, n_at_once = None, MAX_READ_ROWS
        if rows.numbers is not None and not is_here:
            # What came since keeps us from copying: only that puts each row where it belongs.
            return 0
        if is_here and self._row_copy is not None:
            n_at_once = min(_MOST_ROWS, max(1, _PIECE_NBYTES // rows.row_nbytes))
        elif self._convert_run is not None:
            n_at_once = min(n_at_once, max(1, _STAGE_NBYTES // rows.row_nbytes))
            stage = np.empty(n_at_once * rows.row_nbytes, dtype=np.uint8)
        done = 0
        while done < len(rows):
            n = min(n_at_once, len(rows) - done)
            whole = self._copy(rows, done, n, stage, is_here)
            done += whole
            if whole < n or _n_waits() > most_waits:
                break
        # Of many files, to look which ones these rows are in is the shorter way.
        shards = rows.mappings if len(rows.mappings) < _N_FEW else _numbers_in(rows.shards)
        return done if all(rows.mappings[shard].is_whole for shard in shards) else 0

    def _copy(self, rows: ScatteredRows, start: int, n: int, stage: _Bytes | None, is_here: bool) -> int:
        """Copy `n` rows from one on to where they go, and convert them; how many of the first ones are there."""
        sources, nbytes, stride = rows.sources[start : start + n], rows.row_nbytes, rows.stride
        if rows.numbers is not None and self._row_copy is not None:
            self._row_copy(sources, rows.place, nbytes, stride, numbers=rows.numbers[start : start + n])
            return n
        place = rows.place + start * stride
        if is_here and self._row_copy is not None:
            self._row_copy(sources, place, nbytes, stride)
            return n
        if stage is not None and self._convert_run is not None:
            n = self._copy_plain(sources, stage.ctypes.data, nbytes, nbytes, is_here)
            self._convert_run(stage.ctypes.data, place, n * nbytes)
            return n
        # What becomes wider goes to the back of its place.
        n = self._copy_plain(sources, place + stride - nbytes, nbytes, stride, is_here)
        self._finish(rows, place, n)
        return n

    def _copy_plain(self, sources: _Int64s, place: int, nbytes: int, stride: int, is_here: bool) -> int:
        if not is_here or self._plain_copy is None:
            return _copy_in_kernel(sources, place, nbytes, stride)
        # What is converted is soon read again.
        self._plain_copy(sources, place, nbytes, stride, is_past_caches=False)
        return len(sources)

    def _finish(self, rows: ScatteredRows, place: int, n: int, numbers: _Int64s | None = None) -> None:
        """Convert `n` rows at a place, or those of these numbers from there on, that were read by what does not."""
        if self._source.is_unfinished and n:
            most = n if numbers is None else int(numbers.max()) + 1
            memory = np.ctypeslib.as_array((ctypes.c_ubyte * (most * rows.stride)).from_address(place))
            loaded = self._source.loaded_type
            act = torch.from_numpy(memory.view(loaded.storage)).view(getattr(torch, loaded.name)).view(most, -1)
            if numbers is None:
                self._source.convert(act)
            else:
                some = act[torch.from_numpy(numbers)]
                self._source.convert(some)
                act[torch.from_numpy(numbers)] = some


def _is_watched(mapping: Mapping) -> bool:
    return mapping.pages.is_watched


def _n_waits() -> int:
    """How often this thread has waited for a page of a mapping to come from a disk."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def _numbers_in(shards: _Int64s) -> list[int]:
    numbers: list[int] = np.flatnonzero(np.bincount(shards)).tolist()
    return numbers
