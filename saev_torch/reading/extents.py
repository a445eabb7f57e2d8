"""Scattered reads: rows of a file straight to their final places in memory.

One `preadv` reads consecutive rows of a shard into as many separate places. That is one pass over each byte: there is
no buffer in between and nothing to gather afterwards. numpy makes the arguments, and hundreds of reads are one system
call where there is a `Ring`; else each is one through ctypes, which releases the GIL. No Python per sample.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ReadError
from saev_torch.order.runs import MAX_GAP_NBYTES, MAX_READ_NBYTES, MAX_READ_ROWS
from saev_torch.order.selection import Selection
from saev_torch.reading.ring import Ring
from saev_torch.reading.store import ShardStore

__all__ = [
    "Extents",
    "Note",
    "announce_extents",
    "make_extents",
    "make_sample_extents",
    "opened_shards",
    "read_cell_labels",
    "read_extents",
    "split_extents",
    "unnoted",
]

_Int64s = NDArray[np.int64]
Note = Callable[[Callable[[], tuple[int, int]]], None]
"""Takes a function that tells, also another thread, the shard and byte offset of what is read from now on."""

_libc = ctypes.CDLL(None, use_errno=True)
_preadv = _libc.preadv
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_preadv.restype = ctypes.c_ssize_t

# Fewer reads than this are not worth the arguments of a ring.
_MIN_ON_RING = 8
# More files than this are not held open for one call.
_MAX_SHARDS = 16


@dataclasses.dataclass(frozen=True)
class Extents:
    """Consecutive rows of shards, and where each row goes.

    Attributes:
        vectors: `[n_vectors, 2] int64`, address and size of the place of each row, or of several rows whose places
            follow each other: the kernel's `struct iovec`.
        trash: `[row_nbytes] uint8`, where the rows of small gaps go.
        shards: `[n] int64`, shard of each extent.
        firsts: `[n] int64`, number of its first vector.
        counts: `[n] int64`, its number of vectors.
        offsets: `[n] int64`, byte offset in the shard.
        nbytes: `[n] int64`, size in bytes.
    """

    vectors: _Int64s
    trash: NDArray[np.uint8]
    shards: _Int64s
    firsts: _Int64s
    counts: _Int64s
    offsets: _Int64s
    nbytes: _Int64s

    def vectors_of(self, start: int, stop: int) -> _Int64s:
        """`[n, 2] int64`, the vectors of a range of extents."""
        return self.vectors[self.firsts[start] : self.firsts[stop - 1] + self.counts[stop - 1]]

    def where(self, i: int) -> tuple[int, int]:
        """Shard and byte offset of an extent."""
        return int(self.shards[i]), int(self.offsets[i])

    def where_on_ring(self, first: int, last: int, ring: Ring) -> tuple[int, int]:
        """Shard and byte offset of the first of some extents that a ring has not read yet."""
        return self.where(first + ring.first_pending(last - first))

    def cut(self, task_nbytes: int) -> list[tuple[int, int]]:
        """Divide the extents into ranges of about `task_nbytes` bytes each."""
        ends = np.cumsum(self.nbytes)
        if not len(ends):
            return []
        marks = np.arange(task_nbytes, int(ends[-1]) + task_nbytes, task_nbytes)
        stops = np.unique(np.minimum(np.searchsorted(ends, marks) + 1, len(ends))).tolist()
        return list(zip([0, *stops[:-1]], stops, strict=True))


def make_extents(shards: _Int64s, rows: _Int64s, places: _Int64s, row_nbytes: int) -> Extents:
    """Join rows that are near each other on disk to extents.

    Args:
        shards: `[n] int64`, shard of each row; rows of a shard that ascend are joined.
        rows: `[n] int64`, row in the shard.
        places: `[n] int64`, address that the row is read to.
        row_nbytes: Size of a row in bytes.

    Returns:
        The extents, in the order of their first rows.
    """
    n = len(rows)
    trash = np.empty(row_nbytes, dtype=np.uint8)
    gap = np.diff(rows)
    breaks = (gap <= 0) | (gap > 1 + MAX_GAP_NBYTES // row_nbytes)
    breaks |= np.diff(shards) != 0
    most = max(1, min(MAX_READ_ROWS, MAX_READ_NBYTES // row_nbytes))
    firsts = np.concatenate(([0], np.flatnonzero(breaks) + 1)) if n else np.zeros(0, dtype=np.int64)
    spans = rows[np.append(firsts[1:], n) - 1] - rows[firsts] + 1 if n else firsts
    if n and int(spans.max()) > most:
        since = (rows - np.repeat(rows[firsts], np.diff(np.append(firsts, n)))) // most
        breaks |= np.diff(since) != 0
        firsts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        spans = rows[np.append(firsts[1:], n) - 1] - rows[firsts] + 1
    ends = np.cumsum(spans)
    begins = ends - spans
    total = int(ends[-1]) if n else 0
    if total != n:
        wanted = places
        places = np.full(total, trash.ctypes.data, dtype=np.int64)
        places[rows + np.repeat(begins - rows[firsts], np.diff(np.append(firsts, n)))] = wanted
    vectors, heads = _join_places(places, begins, row_nbytes)
    return Extents(
        vectors=vectors,
        trash=trash,
        shards=shards[firsts],
        firsts=heads,
        counts=np.diff(np.append(heads, len(vectors))),
        offsets=rows[firsts] * row_nbytes,
        nbytes=spans * row_nbytes,
    )


def _join_places(places: _Int64s, begins: _Int64s, row_nbytes: int) -> tuple[_Int64s, _Int64s]:
    """Make vectors of rows, one for all rows whose places follow each other.

    Returns:
        `[n_vectors, 2] int64`, and the number of each extent's first vector.
    """
    is_head = np.ones(len(places), dtype=bool)
    np.not_equal(np.diff(places), row_nbytes, out=is_head[1:])
    is_head[begins] = True
    heads = np.flatnonzero(is_head)
    vectors = np.empty((len(heads), 2), dtype=np.int64)
    vectors[:, 0] = places[heads]
    vectors[:, 1] = np.diff(np.append(heads, len(places))) * row_nbytes
    return vectors, np.searchsorted(heads, begins)


def make_sample_extents(selection: Selection, cells: _Int64s, places: _Int64s) -> list[Extents]:
    """Work out the reads for samples: one list of extents for each of the layers that a sample holds.

    Args:
        selection: What the cells mean.
        cells: `[n] int64`, in the order of the disk.
        places: `[n] int64`, address that the sample is read to.

    Returns:
        `selection.n_parts` extents, which may be read in any order.
    """
    row_nbytes = selection.md.row_nbytes
    shards, rows = selection.disk_rows(cells)
    extents = []
    for part in range(selection.n_parts):
        shift = (selection.layer_idxs[part] - selection.layer_idxs[0]) * selection.md.tokens_per_example
        extents.append(make_extents(shards, rows + shift, places + part * row_nbytes, row_nbytes))
    return extents


def read_cell_labels(store: ShardStore, selection: Selection, cells: _Int64s) -> NDArray[np.uint8]:
    """Read the labels of cells.

    Args:
        store: Where to read from.
        selection: What the cells mean.
        cells: `[n] int64`, fastest in the order of the disk.

    Returns:
        `[n] uint8`; 0 for a special token, which has none.

    Raises:
        ReadError: Reading failed, or labels.bin became shorter.
    """
    examples, _, tokens = selection.split(cells)
    tokens = tokens - selection.n_special
    content = tokens >= 0
    indices = (examples * selection.md.content_tokens_per_example + tokens)[content]
    starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
    labels = np.zeros(len(cells), dtype=np.uint8)
    labels[content] = store.read_label_runs(indices[starts], np.diff(np.append(starts, len(indices))))
    return labels


def read_extents(
    store: ShardStore, extents: Extents, start: int, stop: int, note: Note, ring: Ring | None = None
) -> None:
    """Read a range of extents to their places.

    Args:
        store: Where to read from.
        extents: What to read.
        start: First extent.
        stop: One past the last extent.
        note: Called before reading with a function that tells, also another thread, the shard and byte offset of what
            is read, so that a stall can be named.
        ring: For many reads in one call.

    Raises:
        ReadError: A read failed for good, or a shard became shorter.
        ShardsNotFoundError: A shard is gone.
        FormatError: A shard is no longer a regular file of the right size.
    """
    if ring is None or stop - start < _MIN_ON_RING:
        for first, last in _groups(extents, start, stop):
            part = slice(first, last)
            note(functools.partial(extents.where, first))
            with store.opened(int(extents.shards[first])) as fd:
                addresses = (extents.vectors.ctypes.data + 16 * extents.firsts[part]).tolist()
                offsets = extents.offsets[part].tolist()
                got = list(map(_preadv, itertools.repeat(fd), addresses, extents.counts[part].tolist(), offsets))
            # The last error of this thread: the one of the reads that failed, or of one of them.
            _read_rests(store, extents, first, np.array(got, dtype=np.int64), ctypes.get_errno(), note)
        return
    for first, last in split_extents(extents, start, stop, ring.n_entries):
        part = slice(first, last)
        with opened_shards(store, extents, first, last, note) as fds:
            note(functools.partial(extents.where_on_ring, first, last, ring))
            done = ring.read(fds, extents.vectors, extents.firsts[part], extents.counts[part], extents.offsets[part])
        _read_rests(store, extents, first, done, 0, note)


@contextlib.contextmanager
def opened_shards(
    store: ShardStore, extents: Extents, start: int, stop: int, note: Note, direct: bool = False
) -> Iterator[_Int64s]:
    """Hold open what a range of extents is read from; see `read_extents`, and `ShardStore.opened` for `direct`.

    Returns:
        `[stop - start] int64`, the file descriptor of each extent.
    """
    with contextlib.ExitStack() as stack:
        fds = np.empty(stop - start, dtype=np.int64)
        for first, last in _groups(extents, start, stop):
            note(functools.partial(extents.where, first))
            shard = int(extents.shards[first])
            fds[first - start : last - start] = stack.enter_context(store.opened(shard, direct))
        yield fds


def _groups(extents: Extents, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Divide a range of extents by shard."""
    bounds = [start, *(np.flatnonzero(np.diff(extents.shards[start:stop])) + start + 1).tolist(), stop]
    return itertools.pairwise(bounds) if start < stop else iter(())


def split_extents(extents: Extents, start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Divide a range of extents by what is read in one call: at most `most` of them, and of not too many files."""
    while start < stop:
        end = min(stop, start + most)
        others = np.flatnonzero(np.diff(extents.shards[start:end]))
        if len(others) >= _MAX_SHARDS:
            end = start + int(others[_MAX_SHARDS - 1]) + 1
        yield start, end
        start = end


def unnoted(where: Callable[[], tuple[int, int]]) -> None:
    """For `read_extents` where nobody waits for a single read, so that nobody asks where it stands."""


def announce_extents(store: ShardStore, extents: Extents, start: int, stop: int) -> None:
    """Ask the kernel to begin reading a range of extents, so that a disk has many reads to work on at a time."""
    for first, last in _groups(extents, start, stop):
        part = slice(first, last)
        with store.opened(int(extents.shards[first])) as fd:
            advice = itertools.repeat(os.POSIX_FADV_WILLNEED)
            offsets, nbytes = extents.offsets[part].tolist(), extents.nbytes[part].tolist()
            collections.deque(map(os.posix_fadvise, itertools.repeat(fd), offsets, nbytes, advice), 0)


def _read_rests(
    store: ShardStore, extents: Extents, first: int, got: NDArray[np.int64] | NDArray[np.int32], code: int, note: Note
) -> None:
    """Finish the extents from `first` on that are not complete; `code` is the error where a result has none."""
    for i in np.flatnonzero(got != extents.nbytes[first : first + len(got)]).tolist():
        note(functools.partial(extents.where, first + i))
        n = int(got[i])
        _read_rest(store, extents, first + i, n, code or -n)


def _read_rest(store: ShardStore, extents: Extents, i: int, n: int, code: int) -> None:
    """Finish an extent whose first read returned `n` and not all bytes, trying again where that may help."""
    shard, offset, nbytes = int(extents.shards[i]), int(extents.offsets[i]), int(extents.nbytes[i])
    path = store.path(shard)
    vectors = extents.vectors[extents.firsts[i] :][: extents.counts[i]]
    ends = np.cumsum(vectors[:, 1])
    done = tries = 0
    while True:
        if n > 0:
            done += n
        elif n == 0:
            raise ReadError(
                f"{path}: expected {nbytes} bytes at offset {offset}, got {done}: the file became shorter while it was "
                "in use; copy it again and start again."
            )
        elif store.retries.again(path, offset, code, tries):
            tries += 1
            store.drop(shard)
        else:
            raise ReadError(
                f"{path}: reading {nbytes} bytes at offset {offset} failed after {tries + 1} tries: "
                f"{os.strerror(code)}; check the file system."
            )
        if done == nbytes:
            return
        skipped = int(np.searchsorted(ends, done, side="right"))
        rest = vectors[skipped:].copy()
        inside = done - int(ends[skipped] - vectors[skipped, 1])
        rest[0] += (inside, -inside)
        with store.opened(shard) as fd:
            n = _preadv(fd, rest.ctypes.data, len(rest), offset + done)
            code = ctypes.get_errno()
