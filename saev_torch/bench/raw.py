"""The limits that a loader is held against: reading files, gathering rows, and nothing else."""

import contextlib
import errno
import fcntl
import functools
import itertools
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.benchmark import Timer

from saev_torch.bench.machine import opened_shards
from saev_torch.bench.measuring import Measured
from saev_torch.errors import ReadError
from saev_torch.format.dtypes import DTYPES
from saev_torch.order.selection import resolve_layers
from saev_torch.reading.direct import DirectReader
from saev_torch.reading.extents import Extents
from saev_torch.reading.ring import Ring, RingReader
from saev_torch.reading.store import ShardStore, advise

_BUFFER_NBYTES = 4 << 20
_N_INDEX_SETS = 8
_TASK_NBYTES = 8 << 20

WINDOW_NBYTES = 400_000_000
"""What rows are gathered from, far larger than the caches of a processor."""

Piece = tuple[int, int, int]
"""A part of a data set: number of the file, byte offset, bytes."""

_Task = TypeVar("_Task")


def layer_pieces(store: ShardStore, layer: int, nbytes: int = _BUFFER_NBYTES) -> list[Piece]:
    """The bytes of one layer in the order of the disk, in pieces of at most so many bytes, 4 MB if not said.

    With several recorded layers these are runs of an example's tokens each, with gaps between them.
    """
    md = store.metadata
    if md.n_layers == 1:
        return grid_pieces(store, nbytes)
    (layer_idx,) = resolve_layers(md, layer)
    run_nbytes = md.tokens_per_example * md.row_nbytes
    first = layer_idx * run_nbytes
    runs = [(i, e * md.example_nbytes + first) for i, shard in enumerate(store.shards) for e in range(shard.n_examples)]
    return [piece for i, offset in runs for piece in _cut(i, offset, run_nbytes, nbytes)]


def grid_pieces(store: ShardStore, block_nbytes: int) -> list[Piece]:
    """All bytes of the shards in blocks of one size."""
    sizes = [shard.n_examples * store.metadata.example_nbytes for shard in store.shards]
    return [piece for i, nbytes in enumerate(sizes) for piece in _cut(i, 0, nbytes, block_nbytes)]


def _cut(file: int, offset: int, total: int, nbytes: int) -> list[Piece]:
    return [(file, offset + start, min(nbytes, total - start)) for start in range(0, total, nbytes)]


def read_rate(
    store: ShardStore,
    pieces: Sequence[Piece],
    *,
    n_threads: int = 1,
    seconds: float = math.inf,
    repeat: bool = True,
    reads_ahead: bool = True,
    memory_nbytes: int = 0,
) -> Measured:
    """Read pieces of the shards with `preadv` into one reused buffer for each thread; the threads take them in turn.

    The buffer holds a piece; or those of all threads have `memory_nbytes`, and pieces go there one behind the other.

    It stops after so many seconds, and a piece at least; where it does not `repeat`, after all pieces, too. Without
    `reads_ahead` the system does not read on behind each piece, as the loader tells it. Raises ReadError.
    """
    longest = max(nbytes for _, _, nbytes in pieces)
    # Ones, so that every page is there: fresh memory costs more than reading into it.
    n_places = max(1, memory_nbytes // n_threads // longest)
    buffers = [np.ones((n_places, longest), dtype=np.uint8) for _ in range(n_threads)]

    def read(places: Iterator[NDArray[np.uint8]], piece: Piece) -> int:
        file, offset, nbytes = piece
        n = os.preadv(fds[file], [next(places)[:nbytes].data], offset)
        if n == 0:
            raise OSError(f"shard {file} became shorter")
        return n

    with opened_shards(store) as fds:
        if not reads_ahead:
            for fd in fds:
                advise(fd, "RANDOM")
        reads = [functools.partial(read, itertools.cycle(buffer)) for buffer in buffers]
        try:
            return _rate(store, itertools.cycle(pieces) if repeat else iter(pieces), reads, seconds)
        except OSError as err:
            raise ReadError(f"{store.shards_dir}: expected to read it, got: {err}; check the file system.") from err


def direct_rate(store: ShardStore, pieces: Sequence[Piece], *, n_threads: int) -> Measured | None:
    """Read pieces past the page cache with `preadv`, as `read_rate`; None where the file system refuses."""
    longest = max(nbytes for _, _, nbytes in pieces) + 2 * mmap.PAGESIZE
    buffers = [mmap.mmap(-1, longest, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(n_threads)]

    def read(buffer: memoryview, piece: Piece) -> int:
        file, offset, nbytes = piece
        # Whole pages, to the end of the file at most.
        first = offset % mmap.PAGESIZE
        wanted = -(-(first + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if os.preadv(fds[file], [buffer[:wanted]], offset - first) < first + nbytes:
            raise OSError(f"shard {file} became shorter")
        return nbytes

    for buffer in buffers:
        # So that every page is there.
        np.frombuffer(buffer, dtype=np.uint8)[:] = 1
    with opened_shards(store) as fds:
        try:
            for fd in fds:
                fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
            reads = [functools.partial(read, memoryview(buffer)) for buffer in buffers]
            return _rate(store, iter(pieces), reads, math.inf)
        except OSError as err:
            if err.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return None
            raise ReadError(f"{store.shards_dir}: expected to read it, got: {err}; check the file system.") from err


def staged_rate(store: ShardStore, pieces: Sequence[Piece], *, n_threads: int, seconds: float) -> Measured | None:
    """Read pieces of the shards past the page cache, some megabytes of them at a time, as the loader does.

    The threads take some pieces in turn, read those in the order of the disk, and stop after so many seconds, a turn of
    each at least, or after all pieces. None where the system has not the means, and the loader reads through the page
    cache, too. Raises SaevTorchError.
    """
    rings = [ring for ring in (Ring.open() for _ in range(n_threads)) if ring is not None]
    if len(rings) < n_threads:
        return None
    largest = max(nbytes for _, _, nbytes in pieces)
    at_once = max(1, _TASK_NBYTES // largest)
    tasks = iter([sorted(pieces[start : start + at_once]) for start in range(0, len(pieces), at_once)])

    def read(reader: DirectReader, buffer: NDArray[np.uint8], task: list[Piece]) -> int:
        files, offsets, nbytes = np.array(task, dtype=np.int64).T.copy()
        reader.read(Extents.in_a_row(buffer, files, offsets, nbytes), 0, len(task))
        return int(nbytes.sum())

    with contextlib.closing(store.clone()) as opened:
        readers = [DirectReader(RingReader(ring, opened)) for ring in rings]
        # Memory that has been used before, as that of a loader that has run for a while.
        buffers = [np.ones(at_once * largest, dtype=np.uint8) for _ in rings]
        reads = [functools.partial(read, *one) for one in zip(readers, buffers, strict=True)]
        return _rate(store, tasks, reads, seconds)


def _rate(
    store: ShardStore, tasks: Iterator[_Task], reads: Sequence[Callable[[_Task], int]], seconds: float
) -> Measured:
    """Have one thread for each of `reads` take tasks, and read them, until the time is up or none is left."""

    def run(read: Callable[[_Task], int]) -> int:
        done = 0
        for task in tasks:
            done += read(task)
            if time.perf_counter() > deadline:
                break
        return done

    with ThreadPoolExecutor(len(reads)) as threads:
        began = time.perf_counter()
        deadline = began + seconds
        nbytes = sum(threads.map(run, reads))
        return Measured(nbytes // store.metadata.row_nbytes, nbytes, time.perf_counter() - began)


def gather_rate(d_model: int, n_rows: int, window_nbytes: int, seconds: float) -> Measured:
    """Gather random float32 rows of a window, `n_rows` at a time, into a reused output with one thread."""
    n_window = max(1, window_nbytes // (d_model * DTYPES["float32"].nbytes))
    window, out = torch.ones(n_window, d_model), torch.ones(n_rows, d_model)
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randint(n_window, (n_rows,), generator=generator) for _ in range(_N_INDEX_SETS)]
    names = {"window": window, "out": out, "indices": itertools.cycle(indices)}
    timer = Timer("torch.index_select(window, 0, next(indices), out=out)", globals=names, num_threads=1)
    found = timer.blocked_autorange(min_run_time=seconds)
    n_done = len(found.raw_times) * found.number_per_run
    return Measured(n_done * n_rows, n_done * out.nbytes, sum(found.raw_times))
