"""One pass over stored vectors: threads that read, and measure what they read while it is still in their cache."""

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.selection import Selection
from saev_torch.processes.world import count_cores
from saev_torch.reading.compiled import find_sum_kernel
from saev_torch.reading.direct import Stage, reads_past_cache
from saev_torch.reading.extents import Extents, make_extents, read_extents, unnoted
from saev_torch.reading.ring import Ring
from saev_torch.reading.store import ShardStore
from saev_torch.stats.moments import Moments, NormHistogram, Piece, Scratch, measure

__all__ = ["Pass"]

_Int64s = NDArray[np.int64]

# What is planned, read and measured at once: large enough that Python's part does not count, less than caches hold.
_TASK_NBYTES = 8 << 20
# To compile takes some tenths of a second, as measuring a few of these does without it. A fixed size, so that the same
# data give the same sums, to the last bit, whatever else the process did before.
_MIN_COMPILED_NBYTES = 1 << 30
# Threads beyond the number of cores work while so much of the cores is idle, which is looked at this often.
_IDLE_SHARE, _LOOK_S = 0.4, 0.02


@dataclasses.dataclass
class _Part:
    """What a thread measured of one group, in one task."""

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
        is_only: Whether the data may not be read again.
    """

    def __init__(
        self,
        store: ShardStore,
        selection: Selection,
        samples: _Int64s | None,
        progress: Callable[[int, int], None] | None,
        is_only: bool,
    ) -> None:
        self._store, self._selection, self._samples, self._progress = store, selection, samples, progress
        self._n = selection.n_samples if samples is None else len(samples)
        sample_nbytes = selection.sample_nbytes
        self._per_task = max(1, _TASK_NBYTES // sample_nbytes)
        self._sum_vectors = find_sum_kernel() if self._n * sample_nbytes >= _MIN_COMPILED_NBYTES else None
        self._past_cache = reads_past_cache(store, selection, is_only, unnoted)
        self._lock = threading.Lock()
        self._may_take = threading.Condition(self._lock)
        self._next_task = self._next_merged = 0
        self._stopped = False
        # All of them: where there are several ranks, the others wait for the result.
        self._n_cores, self._are_idle = count_cores(), False
        self._looked: tuple[float, float] | None = None
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
            try:
                list(threads.map(self._work, range(n_threads)))
            except BaseException:
                self._stop()
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

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._may_take.notify_all()

    def _work(self, number: int) -> None:
        try:
            task = self._take(number)
            if task is not None:
                self._measure(task, number)
        except BaseException as err:
            self._stop()
            # Who keeps the error does not keep what this thread read with.
            traceback.clear_frames(err.__traceback__)
            raise

    def _measure(self, task: int | None, number: int) -> None:
        """Measure a task, and others as long as there are any."""
        md = self._selection.md
        ring, scratch = Ring.open(), Scratch(md.d_model, self._sum_vectors)
        stage = Stage(ring) if ring is not None and self._past_cache else None
        buffer = np.empty((self._per_task * self._selection.n_parts, md.d_model), dtype=md.value_type.storage)
        while task is not None:
            extents, groups = _plan(self._selection, self._samples_of(task), buffer.ctypes.data)
            n = len(extents.nbytes)
            if stage is None:
                read_extents(self._store, extents, 0, n, unnoted, ring)
            else:
                stage.read(self._store, extents, 0, n, unnoted)
            self._merge(task, [_Part(g, *measure(buffer[start:stop], scratch)) for g, start, stop in groups])
            task = self._take(number)

    def _take(self, number: int) -> int | None:
        """Take the next task: None where there is none. More threads than cores help only where cores are idle."""
        with self._lock:
            while not (self._stopped or self._is_all_taken()) and number >= self._n_cores and not self._are_idle:
                self._may_take.wait()
            if self._stopped or self._is_all_taken():
                return None
            self._next_task += 1
            if self._is_all_taken():
                self._may_take.notify_all()
            return self._next_task - 1

    def _is_all_taken(self) -> bool:
        return self._next_task * self._per_task >= self._n

    def _look(self) -> None:
        """See whether this process leaves cores idle."""
        now = time.monotonic(), time.process_time()
        since, cpu_s = self._looked = self._looked or now
        if now[0] - since >= _LOOK_S:
            self._are_idle = now[1] - cpu_s < (1 - _IDLE_SHARE) * self._n_cores * (now[0] - since)
            self._looked = now
            if self._are_idle:
                self._may_take.notify_all()

    def _samples_of(self, task: int) -> _Int64s:
        start = task * self._per_task
        stop = min(self._n, start + self._per_task)
        return np.arange(start, stop, dtype=np.int64) if self._samples is None else self._samples[start:stop]

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
            self._look()
            if self._progress is not None and not self._stopped:
                self._progress(min(self._n, self._next_merged * self._per_task), self._n)


def _plan(selection: Selection, samples: _Int64s, address: int) -> tuple[Extents, list[tuple[int, int, int]]]:
    """Work out how to read samples to an address with the rows of each group side by side.

    Returns:
        What to read, and the groups as (group, first row, stop).
    """
    md = selection.md
    cells = selection.cells(samples)
    _, layers, tokens = selection.split(cells)
    shards, rows = selection.disk_rows(cells)
    group = 2 * layers + (tokens >= selection.n_special)
    if selection.n_parts > 1:
        parts = np.arange(selection.n_parts, dtype=np.int64)[:, None]
        shift = (np.array(selection.layer_idxs) - selection.layer_idxs[0])[:, None] * md.tokens_per_example
        rows, group = (rows + shift).ravel(), (group + 2 * parts).ravel()
        shards = np.tile(shards, selection.n_parts)
    row_nbytes = md.row_nbytes
    places = np.arange(address, address + len(rows) * row_nbytes, row_nbytes, dtype=np.int64)
    counts = np.bincount(group)
    if counts[-1] != len(rows):
        in_order = places.copy()
        places[np.argsort(group, kind="stable")] = in_order
    ends = np.cumsum(counts).tolist()
    groups = [(g, ends[g] - n, ends[g]) for g, n in enumerate(counts.tolist()) if n]
    return make_extents(shards, rows, places, row_nbytes), groups
