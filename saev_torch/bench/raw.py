"""The limits that a loader is held against: reading files, gathering rows, and nothing else."""

import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.bench.machine import opened_shards
from saev_torch.bench.measured import Measured
from saev_torch.errors import ReadError
from saev_torch.order.selection import resolve_layers
from saev_torch.reading.direct import DirectReader
from saev_torch.reading.extents import Extents
from saev_torch.reading.ring import Ring, RingReader
from saev_torch.reading.store import ShardStore

_BUFFER_NBYTES = 4 << 20
_N_INDEX_SETS = 8
_TASK_NBYTES = 8 << 20

WINDOW_NBYTES = 400_000_000
"""What rows are gathered from, far larger than the caches of a processor."""

Piece = tuple[int, int, int]
"""A part of a data set: number of the file, byte offset, bytes."""


def layer_pieces(store: ShardStore, layer: int) -> list[Piece]:
    """The bytes of one layer in the order of the disk, in pieces of at most 4 MB.

    With several recorded layers these are runs of an example's tokens each, with gaps between them.
    """
    md = store.metadata
    run_nbytes = md.tokens_per_example * md.row_nbytes
    (layer_idx,) = resolve_layers(md, layer)
    runs = []
    for i, shard in enumerate(shard for shard in store.shards if shard.n_examples):
        if md.n_layers == 1:
            runs.append((i, 0, shard.n_examples * run_nbytes))
        else:
            runs += [(i, (e * md.n_layers + layer_idx) * run_nbytes, run_nbytes) for e in range(shard.n_examples)]
    return [piece for run in runs for piece in _cut(run, _BUFFER_NBYTES)]


def grid_pieces(store: ShardStore, block_nbytes: int) -> list[Piece]:
    """All bytes of the shards in blocks of one size."""
    sizes = [shard.n_examples * store.metadata.example_nbytes for shard in store.shards if shard.n_examples]
    return [piece for i, nbytes in enumerate(sizes) for piece in _cut((i, 0, nbytes), block_nbytes)]


def _cut(run: Piece, nbytes: int) -> list[Piece]:
    i, offset, total = run
    return [(i, offset + start, min(nbytes, total - start)) for start in range(0, total, nbytes)]


def read_rate(
    store: ShardStore,
    pieces: Sequence[Piece],
    *,
    n_threads: int = 1,
    seconds: float = 0.0,
    repeat: bool = True,
    reads_ahead: bool = True,
) -> Measured:
    """Read pieces of the shards with `preadv` into one reused buffer for each thread.

    Args:
        store: The shards.
        pieces: What to read; the threads take them in turn.
        n_threads: Threads.
        seconds: Stop after so long, and a piece at least.
        repeat: Begin again until the time is up; else stop after all pieces, too.
        reads_ahead: Let the system read on behind each piece, which the loader does not.

    Raises:
        ReadError: A read failed, or a file became shorter.
    """
    turns = itertools.count()
    longest = max(nbytes for _, _, nbytes in pieces)
    # Ones, so that every page is there: fresh memory costs more than reading into it.
    buffers = [np.ones(longest, dtype=np.uint8) for _ in range(n_threads)]

    def read(array: NDArray[np.uint8]) -> int:
        done = 0
        for turn in turns:
            if turn >= len(pieces) and not repeat:
                break
            file, offset, nbytes = pieces[turn % len(pieces)]
            n = os.preadv(fds[file], [array.data[:nbytes]], offset)
            if n == 0:
                raise OSError(f"shard {file} became shorter")
            done += n
            if time.perf_counter() > deadline:
                break
        return done

    with opened_shards(store) as fds, ThreadPoolExecutor(n_threads) as threads:
        if not reads_ahead:
            for fd in fds:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        began = time.perf_counter()
        deadline = began + seconds if seconds else float("inf")
        try:
            nbytes = sum(threads.map(read, buffers))
        except OSError as err:
            raise ReadError(f"{store.shards_dir}: expected to read it, got: {err}; check the file system.") from err
        return _measured(store, nbytes, time.perf_counter() - began)


def staged_rate(store: ShardStore, pieces: Sequence[Piece], *, n_threads: int, seconds: float) -> Measured | None:
    """Read pieces of the shards past the page cache, some megabytes of them at a time, as the loader does.

    Args:
        store: The shards.
        pieces: What to read; the threads take some of them in turn, and read those in the order of the disk.
        n_threads: Threads.
        seconds: Stop after so long, and a turn of each thread at least, or after all pieces.

    Returns:
        The rate; None where the system has not the means, and the loader reads through the page cache, too.

    Raises:
        SaevTorchError: A read failed, or a file became shorter.
    """
    rings = [ring for ring in (Ring.open() for _ in range(n_threads)) if ring is not None]
    if len(rings) < n_threads:
        return None
    largest = max(nbytes for _, _, nbytes in pieces)
    at_once = max(1, _TASK_NBYTES // largest)
    tasks = iter([sorted(pieces[start : start + at_once]) for start in range(0, len(pieces), at_once)])
    # Memory that has been used before, as that of a loader that has run for a while.
    buffers = [np.ones(at_once * largest, dtype=np.uint8) for _ in rings]

    def read(reader: DirectReader, buffer: NDArray[np.uint8]) -> int:
        done = 0
        for task in tasks:
            extents = _to_extents(store, task, buffer)
            reader.read(extents, 0, len(task))
            done += int(extents.nbytes.sum())
            if time.perf_counter() > deadline:
                break
        return done

    with contextlib.closing(store.clone()) as opened, ThreadPoolExecutor(n_threads) as threads:
        readers = [DirectReader(RingReader(ring, opened)) for ring in rings]
        began = time.perf_counter()
        deadline = began + seconds
        nbytes = sum(threads.map(read, readers, buffers))
        return _measured(store, nbytes, time.perf_counter() - began)


def _measured(store: ShardStore, nbytes: int, seconds: float) -> Measured:
    return Measured(nbytes // store.metadata.row_nbytes, nbytes, seconds)


def _to_extents(store: ShardStore, pieces: Sequence[Piece], buffer: NDArray[np.uint8]) -> Extents:
    """Pieces as one extent each, one behind the other in a buffer."""
    files, offsets, nbytes = np.array(pieces, dtype=np.int64).T.copy()
    shards = np.array([i for i, shard in enumerate(store.shards) if shard.n_examples], dtype=np.int64)
    return Extents.in_a_row(buffer, shards[files], offsets, nbytes)


def gather_rate(d_model: int, n_rows: int, window_nbytes: int, seconds: float) -> Measured:
    """Gather random rows of a window into a reused output with one thread, as `torch.index_select` does.

    Args:
        d_model: Width of a row, float32.
        n_rows: Rows gathered at a time.
        window_nbytes: Size of the window.
        seconds: Stop after so long.
    """
    n_window = max(1, window_nbytes // (d_model * 4))
    window, out = torch.ones(n_window, d_model), torch.ones(n_rows, d_model)
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randint(n_window, (n_rows,), generator=generator) for _ in range(_N_INDEX_SETS)]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.index_select(window, 0, indices[0], out=out)
        n_done, took, began = 0, 0.0, time.perf_counter()
        while n_done == 0 or took < seconds:
            n_done += 1
            torch.index_select(window, 0, indices[n_done % _N_INDEX_SETS], out=out)
            took = time.perf_counter() - began
    finally:
        torch.set_num_threads(n_threads)
    return Measured(n_done * n_rows, n_done * out.nbytes, took)
