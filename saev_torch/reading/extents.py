"""What to read, and where each row goes: extents, worked out by numpy for thousands of rows at once."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.runs import MAX_GAP_NBYTES, MAX_READ_NBYTES, MAX_READ_ROWS
from saev_torch.order.selection import Selection

_Int64s = NDArray[np.int64]

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

    @classmethod
    def in_a_row(cls, memory: NDArray[np.uint8], shards: _Int64s, offsets: _Int64s, nbytes: _Int64s) -> "Extents":
        """Extents that go to memory one behind the other; see the attributes."""
        return cls(
            vectors=np.stack((memory.ctypes.data + np.cumsum(nbytes) - nbytes, nbytes), axis=1),
            trash=memory[:0],
            shards=shards,
            firsts=np.arange(len(nbytes)),
            counts=np.ones(len(nbytes), dtype=np.int64),
            offsets=offsets,
            nbytes=nbytes,
        )

    def vectors_of(self, start: int, stop: int) -> _Int64s:
        """`[n, 2] int64`, the vectors of a range of extents."""
        return self.vectors[self.firsts[start] : self.firsts[stop - 1] + self.counts[stop - 1]]

    def where(self, i: int) -> tuple[int, int]:
        """Shard and byte offset of an extent."""
        return int(self.shards[i]), int(self.offsets[i])

    def by_shard(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Divide a range of extents by shard."""
        if stop - start < 2:
            return [(start, stop)] if start < stop else []
        bounds = [start, *(np.flatnonzero(np.diff(self.shards[start:stop])) + start + 1).tolist(), stop]
        return list(itertools.pairwise(bounds))

    def split(self, start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
        """Divide a range of extents by what is read in one call: at most `most`, and of not too many files."""
        while start < stop:
            end = min(stop, start + most)
            others = np.flatnonzero(np.diff(self.shards[start:end]))
            if len(others) >= _MAX_SHARDS:
                end = start + int(others[_MAX_SHARDS - 1]) + 1
            yield start, end
            start = end

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
