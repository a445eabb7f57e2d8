"""One pass over stored vectors: threads that read, and measure what they read while it is still in their cache."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from saev_torch.reading import Extents, read_extents, unnoted
from saev_torch.selection import Selection
from saev_torch.stats.moments import Moments, NormHistogram, Piece, Scratch, measure
from saev_torch.store import ShardStore

__all__ = ["Pass"]

_Int64s = NDArray[np.int64]

# What is read at once and measured while it is still in the cache of the core that read it.
_READ_NBYTES = 2 << 20
# What one thread plans at once, so that planning is a small part of the work.
_TASK_NBYTES = 8 << 20


@dataclasses.dataclass
class _Part:
    """What a thread measured of one group, in one read."""

    group: int
    piece: Piece
    norms: NDArray[np.float64]


class Pass:
    """One pass over samples, by threads. Their pieces are merged in the order of the samples, so sums do not vary.

    Args:
        store: Where to read from.
        selection: Which samples there are.
        samples: Numbers of the samples to measure, ascending; None for all.
        progress: Called with the samples measured and the samples in all.
    """

    def __init__(
        self,
        store: ShardStore,
        selection: Selection,
        samples: _Int64s | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._store, self._selection, self._samples, self._progress = store, selection, samples, progress
        self._n = selection.n_samples if samples is None else len(samples)
        self._row_nbytes = selection.md.d_model * 4
        self._per_read = max(1, _READ_NBYTES // (self._row_nbytes * selection.n_parts))
        self._per_task = self._per_read * max(1, _TASK_NBYTES // _READ_NBYTES)
        self._lock = threading.Lock()
        self._next_task = self._next_merged = 0
        self._stopped = False
        self._done: dict[int, list[_Part]] = {}
        n_groups = 2 * len(selection.layer_idxs)
        self._pieces = [Piece.empty(selection.md.d_model) for _ in range(n_groups)]
        self._histograms: list[NormHistogram | None] = [None] * n_groups

    def run(self, n_threads: int) -> tuple[Moments, dict[tuple[int, str], Moments]]:
        """Measure.

        Returns:
            Moments of all vectors, and those by (recorded layer, "special" or "content").
        """
        with ThreadPoolExecutor(n_threads, thread_name_prefix="saev_torch statistics") as threads:
            for done in [threads.submit(self._work) for _ in range(n_threads)]:
                try:
                    done.result()
                except BaseException:
                    self._stopped = True
                    raise
        total, counts = Piece.empty(self._selection.md.d_model), NormHistogram()
        groups = {}
        for i, (piece, histogram) in enumerate(zip(self._pieces, self._histograms, strict=True)):
            if histogram is not None:
                layer = self._selection.md.layers[self._selection.layer_idxs[i // 2]]
                groups[layer, "content" if i % 2 else "special"] = piece.moments(histogram)
                total.merge(piece)
                counts.counts += histogram.counts
        return total.moments(counts), groups

    def _work(self) -> None:
        scratch = Scratch(self._selection.md.d_model)
        buffer = np.empty((self._per_read * self._selection.n_parts, self._selection.md.d_model), dtype="<f4")
        while True:
            with self._lock:
                task, start = self._next_task, self._next_task * self._per_task
                if start >= self._n or self._stopped:
                    return
                self._next_task += 1
            try:
                parts = list(self._measure(start, min(self._n, start + self._per_task), buffer, scratch))
            except BaseException:
                self._stopped = True
                raise
            self._merge(task, parts)

    def _measure(self, start: int, stop: int, buffer: NDArray[np.float32], scratch: Scratch) -> Iterator[_Part]:
        samples = np.arange(start, stop, dtype=np.int64) if self._samples is None else self._samples[start:stop]
        reads = _Reads.plan(self._selection, samples, self._per_read, buffer.ctypes.data)
        for first, last, groups in reads.reads:
            if self._stopped:
                return
            read_extents(self._store, reads.extents, first, last, unnoted)
            for group, row, row_stop in groups:
                yield _Part(group, *measure(buffer[row:row_stop], scratch))

    def _merge(self, task: int, parts: list[_Part]) -> None:
        with self._lock:
            self._done[task] = parts
            while self._next_merged in self._done:
                for part in self._done.pop(self._next_merged):
                    histogram = self._histograms[part.group]
                    if histogram is None:
                        histogram = self._histograms[part.group] = NormHistogram()
                    histogram.add(part.norms)
                    self._pieces[part.group].merge(part.piece)
                self._next_merged += 1
            if self._progress is not None and not self._stopped:
                self._progress(min(self._n, self._next_merged * self._per_task), self._n)


@dataclasses.dataclass(frozen=True)
class _Reads:
    """Reads of rows to the start of a buffer, one after the other, each with the rows of a group side by side.

    Attributes:
        extents: Runs of consecutive rows of one group, each to one place.
        reads: First extent, one past the last, and the groups in the buffer then as (group, first row, stop).
    """

    extents: Extents
    reads: list[tuple[int, int, list[tuple[int, int, int]]]]

    @classmethod
    def plan(cls, selection: Selection, samples: _Int64s, per_read: int, address: int) -> "_Reads":
        md = selection.md
        cells = selection.cells(samples)
        _, layers, tokens = selection.split(cells)
        shards, rows = selection.disk_rows(cells)
        read = np.arange(len(samples), dtype=np.int64) // per_read
        group = 2 * layers + (tokens >= selection.n_special)
        if selection.n_parts > 1:
            parts = np.arange(selection.n_parts, dtype=np.int64)[:, None]
            shift = (np.array(selection.layer_idxs) - selection.layer_idxs[0])[:, None] * md.tokens_per_example
            rows, group = (rows + shift).ravel(), (group + 2 * parts).ravel()
            read, shards = np.tile(read, selection.n_parts), np.tile(shards, selection.n_parts)
        breaks = (np.diff(rows) != 1) | (np.diff(shards) != 0) | (np.diff(read) != 0) | (np.diff(group) != 0)
        firsts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
        lengths = np.diff(np.append(firsts, len(rows)))
        order = np.lexsort((rows[firsts], shards[firsts], group[firsts], read[firsts]))
        firsts, lengths = firsts[order], lengths[order]
        ends = np.cumsum(lengths)
        read, group = read[firsts], group[firsts]
        # Rows are numbered from the start of their read.
        read_starts = np.flatnonzero(np.diff(read, prepend=-1))
        base = np.repeat((ends - lengths)[read_starts], np.diff(np.append(read_starts, len(read))))
        places = ends - lengths - base
        row_nbytes = md.d_model * 4
        vectors = np.stack((address + places * row_nbytes, lengths * row_nbytes), axis=1)
        extents = Extents(
            vectors=vectors,
            trash=np.empty(0, dtype=np.uint8),
            shards=shards[firsts],
            firsts=np.arange(len(vectors)),
            counts=np.ones(len(vectors), dtype=np.int64),
            offsets=rows[firsts] * row_nbytes,
            nbytes=lengths * row_nbytes,
        )
        reads = []
        for first, last in zip(read_starts.tolist(), [*read_starts[1:].tolist(), len(read)], strict=True):
            group_starts = first + np.flatnonzero(np.diff(group[first:last], prepend=-1))
            row = places[group_starts].tolist()
            stop = int(places[last - 1] + lengths[last - 1])
            reads.append((first, last, list(zip(group[group_starts].tolist(), row, [*row[1:], stop], strict=True))))
        return cls(extents, reads)
