"""Scattered reads: rows of a file straight to their final places in memory.

One `preadv` call reads consecutive rows of a shard into as many separate places. That is one pass over each byte:
there is no buffer in between and nothing to gather afterwards. The calls are made through ctypes, which releases the
GIL, with arrays of arguments that numpy made: no Python per sample, and none per block but the call itself.
"""

import collections
import ctypes
import dataclasses
import itertools
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ReadError
from saev_torch.selection import Selection
from saev_torch.store import ShardStore

__all__ = ["Extents", "announce_extents", "make_extents", "make_sample_extents", "read_cell_labels", "read_extents"]

_Int64s = NDArray[np.int64]

_libc = ctypes.CDLL(None, use_errno=True)
_preadv = _libc.preadv
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_preadv.restype = ctypes.c_ssize_t

_MAX_ROWS = 1024  # IOV_MAX of Linux
_MAX_NBYTES = 2 << 20
# Reading over a gap is cheaper than another call up to about this size.
_MAX_GAP_NBYTES = 16 << 10


@dataclasses.dataclass(frozen=True)
class Extents:
    """Consecutive rows of shards, and where each row goes.

    Attributes:
        vectors: `[n_rows, 2] int64`, address and size of the place of each row: the kernel's `struct iovec`.
        trash: `[row_nbytes] uint8`, where the rows of small gaps go.
        shards: Shard of each extent.
        addresses: Address of each extent's first vector.
        counts: Rows of each extent.
        offsets: Byte offset of each extent in its shard.
        nbytes: Size of each extent in bytes.
    """

    vectors: _Int64s
    trash: NDArray[np.uint8]
    shards: list[int]
    addresses: list[int]
    counts: list[int]
    offsets: list[int]
    nbytes: list[int]

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
    breaks = (gap <= 0) | (gap > 1 + _MAX_GAP_NBYTES // row_nbytes)
    breaks |= np.diff(shards) != 0
    most = max(1, min(_MAX_ROWS, _MAX_NBYTES // row_nbytes))
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
    vectors = np.empty((total, 2), dtype=np.int64)
    vectors[:, 1] = row_nbytes
    if total == n:
        vectors[:, 0] = places
    else:
        vectors[:, 0] = trash.ctypes.data
        vectors[rows + np.repeat(begins - rows[firsts], np.diff(np.append(firsts, n))), 0] = places
    return Extents(
        vectors=vectors,
        trash=trash,
        shards=shards[firsts].tolist(),
        addresses=(vectors.ctypes.data + 16 * begins).tolist(),
        counts=spans.tolist(),
        offsets=(rows[firsts] * row_nbytes).tolist(),
        nbytes=(spans * row_nbytes).tolist(),
    )


def make_sample_extents(selection: Selection, cells: _Int64s, places: _Int64s) -> list[Extents]:
    """Work out the reads for samples: one list of extents for each of the layers that a sample holds.

    Args:
        selection: What the cells mean.
        cells: `[n] int64`, in the order of the disk.
        places: `[n] int64`, address that the sample is read to.

    Returns:
        `selection.n_parts` extents, which may be read in any order.
    """
    row_nbytes = selection.md.d_model * 4
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


def read_extents(store: ShardStore, extents: Extents, start: int, stop: int, note: Callable[[int, int], None]) -> None:
    """Read a range of extents to their places.

    Args:
        store: Where to read from.
        extents: What to read.
        start: First extent.
        stop: One past the last extent.
        note: Called with shard and byte offset before reading from a shard, so that a stall can be named.

    Raises:
        ReadError: A read failed for good, or a shard became shorter.
        ShardsNotFoundError: A shard is gone.
        FormatError: A shard is no longer a regular file of the right size.
    """
    for shard, group in itertools.groupby(range(start, stop), key=extents.shards.__getitem__):
        members = list(group)
        part = slice(members[0], members[-1] + 1)
        note(shard, extents.offsets[members[0]])
        with store.opened(shard) as fd:
            got = list(
                map(_preadv, itertools.repeat(fd), extents.addresses[part], extents.counts[part], extents.offsets[part])
            )
        if got != extents.nbytes[part]:
            # The last error of this thread: the one of the reads that failed, or of one of them.
            code = ctypes.get_errno()
            for i, n in zip(members, got, strict=True):
                if n != extents.nbytes[i]:
                    _read_rest(store, extents, i, n, code)


def announce_extents(store: ShardStore, extents: Extents, start: int, stop: int) -> None:
    """Ask the kernel to begin reading a range of extents, so that a disk has many reads to work on at a time."""
    for shard, group in itertools.groupby(range(start, stop), key=extents.shards.__getitem__):
        members = list(group)
        part = slice(members[0], members[-1] + 1)
        with store.opened(shard) as fd:
            advice = itertools.repeat(os.POSIX_FADV_WILLNEED)
            collections.deque(
                map(os.posix_fadvise, itertools.repeat(fd), extents.offsets[part], extents.nbytes[part], advice), 0
            )


def _read_rest(store: ShardStore, extents: Extents, i: int, n: int, code: int) -> None:
    """Finish an extent whose first read returned `n` and not all bytes, trying again where that may help."""
    shard, offset, nbytes = extents.shards[i], extents.offsets[i], extents.nbytes[i]
    path = store.path(shard)
    first = (extents.addresses[i] - extents.vectors.ctypes.data) // 16
    vectors = extents.vectors[first : first + extents.counts[i]]
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
        skipped, inside = divmod(done, int(vectors[0, 1]))
        rest = vectors[skipped:].copy()
        rest[0] += (inside, -inside)
        with store.opened(shard) as fd:
            n = _preadv(fd, rest.ctypes.data, len(rest), offset + done)
            code = ctypes.get_errno()
