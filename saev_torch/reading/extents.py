"""What to read, and where each row goes: from the order of a plan to that of the disk, thousands of rows at once."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.joint import AnySelection, divide
from saev_torch.order.runs import MAX_GAP_NBYTES, MAX_READ_NBYTES, MAX_READ_ROWS, expand_runs
from saev_torch.order.steps import Step
from saev_torch.reading.slots import OpenBatch

_Int64s = NDArray[np.int64]
_Target = tuple[OpenBatch, _Int64s | slice, _Int64s | slice]

# More files than this are not held open for one call.
_MAX_SHARDS = 16


@dataclasses.dataclass(frozen=True)
class Extents:
    """Consecutive rows of shards, and where each row goes.

    Attributes:
        vectors: `[n_vectors, 2] int64`, address and size of the place of each row, or of several rows whose places
            follow each other: the kernel's `struct iovec`.
        trash: `[row_nbytes] uint8`, where the rows of small gaps go.

    Of each extent, `[n] int64`: its shard, the number of its first vector, how many vectors it has, its byte offset in
    the shard, and its size in bytes.
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
        vectors = np.stack((memory.ctypes.data + np.cumsum(nbytes) - nbytes, nbytes), axis=1)
        firsts, counts = np.arange(len(nbytes)), np.ones(len(nbytes), dtype=np.int64)
        return cls(vectors, memory[:0], shards, firsts, counts, offsets, nbytes)

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
    """Join rows of a shard that ascend and are near each other to extents.

    Of each row, `[n] int64`: its shard, its row in the shard, and the place, an address, that it is read to.
    """
    n = len(rows)
    trash = np.empty(row_nbytes, dtype=np.uint8)
    if not n:
        return Extents.in_a_row(trash, shards, rows, rows)
    gap = rows[1:] - rows[:-1]
    breaks = (gap <= 0) | (gap > 1 + MAX_GAP_NBYTES // row_nbytes) | (shards[1:] != shards[:-1])
    most = max(1, min(MAX_READ_ROWS, MAX_READ_NBYTES // row_nbytes))
    firsts, lengths, spans = _divide_rows(rows, breaks)
    if int(spans.max()) > most:
        since = (rows - np.repeat(rows[firsts], lengths)) // most
        firsts, lengths, spans = _divide_rows(rows, breaks | (np.diff(since) != 0))
    ends = np.cumsum(spans)
    begins = ends - spans
    if ends[-1] != n:
        wanted = places
        places = np.full(int(ends[-1]), trash.ctypes.data, dtype=np.int64)
        places[rows + np.repeat(begins - rows[firsts], lengths)] = wanted
    vectors, heads = _join_places(places, begins, row_nbytes)
    counts = np.append(heads[1:], len(vectors)) - heads
    return Extents(vectors, trash, shards[firsts], heads, counts, rows[firsts] * row_nbytes, spans * row_nbytes)


def _divide_rows(rows: _Int64s, breaks: NDArray[np.bool_]) -> tuple[_Int64s, _Int64s, _Int64s]:
    """Divide rows at breaks: of each part its first index, its length, and the rows from its first to its last."""
    stops = np.append(np.flatnonzero(breaks) + 1, len(rows))
    firsts = np.zeros_like(stops)
    firsts[1:] = stops[:-1]
    return firsts, stops - firsts, rows[stops - 1] - rows[firsts] + 1


def _join_places(places: _Int64s, begins: _Int64s, row_nbytes: int) -> tuple[_Int64s, _Int64s]:
    """Make vectors, one for all rows whose places follow each other; also the number of each extent's first vector."""
    is_head = np.ones(len(places), dtype=bool)
    np.not_equal(places[1:] - places[:-1], row_nbytes, out=is_head[1:])
    is_head[begins] = True
    heads = np.flatnonzero(is_head)
    vectors = np.empty((len(heads), 2), dtype=np.int64)
    vectors[:, 0] = places[heads]
    vectors[:-1, 1] = (heads[1:] - heads[:-1]) * row_nbytes
    vectors[-1, 1] = (len(places) - heads[-1]) * row_nbytes
    return vectors, np.searchsorted(heads, begins)


def make_sample_extents(selection: AnySelection, cells: _Int64s, places: _Int64s) -> list[Extents]:
    """Work out the reads for samples: extents for each of the layers that a sample holds, in any order.

    `cells`, `[n] int64`, are in the order of the disk; `places` are the addresses that the samples go to. Rows that
    become wider in memory are read to the back of their place, see `converting`.
    """
    extents, act_nbytes = [], selection.act_nbytes // selection.n_parts
    for one in divide(selection, cells):
        own, md = one.selection, one.selection.md
        backs = places[one.at] + (act_nbytes - md.row_nbytes)
        shards, rows = own.disk_rows(one.cells)
        for part in range(own.n_parts):
            shift = (own.layer_idxs[part] - own.layer_idxs[0]) * md.tokens_per_example
            backs_of_part = backs + part * act_nbytes
            extents.append(make_extents(shards + one.first_shard, rows + shift, backs_of_part, md.row_nbytes))
    return extents


@dataclasses.dataclass(frozen=True)
class Placed:
    """The samples of a step that are wanted, in the order in which they are read.

    Attributes:
        cells: `[n] int64`, the cell of each; see `Selection`.
        addresses: `[n] int64`, where the activations of each go; or of the first and the last alone, of a batch in its
            own order.
        positions: `[n] int64`, position of each in the step, or a slice of it.
        n_positions: Samples of the step, wanted or not.
        targets: For each batch and load: the batch, positions in the step, and the rows that they go to; or slices.
    """

    cells: _Int64s
    addresses: _Int64s
    positions: _Int64s | slice
    n_positions: int
    targets: list[_Target]

    @classmethod
    def in_own_order(cls, opened: OpenBatch, act_nbytes: int) -> "Placed":
        """A batch that is read row by row, whose cells are known."""
        everything, last = slice(None), opened.slot.address + (opened.size - 1) * act_nbytes
        addresses = np.array([opened.slot.address, last])
        return cls(opened.cells, addresses, everything, opened.size, [(opened, everything, everything)])

    def deal_labels(self, labels: NDArray[np.uint8]) -> None:
        """Give the labels `[n] uint8` to the batches."""
        self._deal(labels, operator.attrgetter("labels"))

    def deal_token_ids(self, token_ids: NDArray[np.int32]) -> None:
        """Give the token ids `[n] int32` to the batches."""
        self._deal(token_ids, operator.attrgetter("token_ids"))

    def _deal(self, values: NDArray[Any], column: Callable[[OpenBatch], NDArray[Any] | None]) -> None:
        dealt = np.empty(self.n_positions, dtype=values.dtype)
        dealt[self.positions] = values
        for opened, positions, rows in self.targets:
            into = column(opened)
            if into is not None:
                into[rows] = dealt[positions]


def place(step: Step, opened: Mapping[int, OpenBatch], selection: AnySelection) -> Placed:
    """Work out where every row of a step with loads goes, and tell each open batch which cells it holds."""
    starts = np.concatenate([load.chunk.starts for load in step.loads])
    lengths = np.concatenate([load.chunk.lengths for load in step.loads])
    order = np.argsort(starts, kind="stable")
    on_disk = expand_runs((np.cumsum(lengths) - lengths)[order], lengths[order])
    cells = selection.cells(expand_runs(starts[order], lengths[order]))

    dealt = np.empty_like(cells)
    dealt[on_disk] = cells
    addresses = np.zeros_like(cells)
    targets: list[_Target] = []
    offset = 0
    for load in step.loads:
        chunk = load.chunk
        for number, d in load.targets:
            part = slice(chunk.bounds[d], chunk.bounds[d + 1])
            batch, positions, rows = opened[number], chunk.dealt[part] + offset, chunk.rows[part]
            batch.cells[rows] = dealt[positions]
            addresses[positions] = rows * selection.act_nbytes + batch.slot.address
            targets.append((batch, positions, rows))
        offset += len(chunk.dealt)
    addresses = addresses[on_disk]
    if not addresses.all():
        wanted = np.flatnonzero(addresses)
        on_disk, cells, addresses = on_disk[wanted], cells[wanted], addresses[wanted]
    return Placed(cells, addresses, on_disk, len(dealt), targets)
