"""One pass over stored vectors: threads that read, and measure what they read while it is still in their cache."""

import dataclasses
import functools
import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.format.dtypes import FLOAT32
from saev_torch.order.selection import Selection
from saev_torch.processes.locks import renewed
from saev_torch.processes.world import count_cores
from saev_torch.reading.compiled import find_sum_kernel
from saev_torch.reading.crew import Task, run_tasks
from saev_torch.reading.direct import reads_past_cache
from saev_torch.reading.extents import Extents, make_extents
from saev_torch.reading.reader import Pace, Reader, Spot
from saev_torch.reading.regions import HUGE_PAGE
from saev_torch.reading.source import Source
from saev_torch.reading.store import ShardStore
from saev_torch.stats.moments import Moments, NormHistogram, Piece, Scratch, measure

_Int64s = NDArray[np.int64]

Progress = Callable[[int, int], None]
"""Called with the samples measured and the samples in all."""

_log = logging.getLogger("saev_torch")

_EVERY_S = 60.0
# What is planned, read and measured at once: large enough that Python's part does not count, less than caches hold.
_TASK_NBYTES = 8 << 20
# To compile takes some tenths of a second, as measuring a few of these does without it. A fixed size, so that the same
# data give the same sums, to the last bit, whatever else the process did before.
_MIN_COMPILED_NBYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """A value that is not finite, and where it is: `token_idx` is -1 for the special token, as in batches."""

    value: float
    file: str
    example_idx: int
    layer: int
    token_idx: int
    dimension: int

    def __str__(self) -> str:
        return (
            f"{self.value} in {self.file}, example_idx {self.example_idx}, layer {self.layer}, token_idx "
            f"{self.token_idx}, dimension {self.dimension}"
        )


class Pass:
    """One pass over samples, by threads. Their pieces are merged in the order of the samples, so sums do not vary.

    Args:
        samples: Numbers of the samples to measure, ascending; None for all.
        is_only: Whether the data may not be read again.

    Attributes:
        first_nonfinite: After `run`, the first value that is not finite, in the order of the samples, if there is one.
    """

    def __init__(
        self, store: ShardStore, selection: Selection, samples: _Int64s | None, progress: Progress | None, is_only: bool
    ) -> None:
        self._store, self._selection, self._samples = store, selection, samples
        self._progress: Progress | None = self._say if progress is None else progress
        self._said = time.monotonic()
        self.first_nonfinite: NonFinite | None = None
        self._n = selection.n_samples if samples is None else len(samples)
        sample_nbytes = selection.n_parts * selection.md.d_model * FLOAT32.nbytes
        self._per_task = max(1, _TASK_NBYTES // sample_nbytes)
        self._sum_vectors = find_sum_kernel() if self._n * sample_nbytes >= _MIN_COMPILED_NBYTES else None
        self._source = Source(store, reads_past_cache(store, selection, is_only, Spot()), loaded=FLOAT32)
        # What a thread reads to and measures with.
        self._threads = threading.local()
        self._lock = renewed(threading.Lock())
        self._next_merged = 0
        self._done: dict[int, tuple[list[tuple[int, Piece, NDArray[np.float64]]], NonFinite | None]] = {}
        self._pieces = defaultdict[int, Piece](functools.partial(Piece.empty, selection.md.d_model))
        self._histograms = defaultdict[int, NormHistogram](NormHistogram)

    def run(self, n_threads: int) -> tuple[Moments, dict[tuple[int, str], Moments]]:
        """Measure: moments of all vectors, and those by (recorded layer, "special" or "content")."""
        n_tasks = -(-self._n // self._per_task)
        tasks = (Task(functools.partial(self._measure, number)) for number in range(n_tasks))
        # All cores: where there are several ranks, the others wait for the result.
        run_tasks("saev_torch statistics", n_threads, Pace(count_cores()), self._source.open_reader, tasks)
        total, counts = Piece.empty(self._selection.md.d_model), NormHistogram()
        groups = {}
        for i, piece in sorted(self._pieces.items()):
            histogram = self._histograms[i]
            layer = self._selection.md.layers[self._selection.layer_idxs[i // 2]]
            groups[layer, "content" if i % 2 else "special"] = piece.moments(histogram)
            total.merge(piece)
            counts.counts += histogram.counts
        return total.moments(counts), groups

    def _measure(self, number: int, reader: Reader) -> None:
        md, mine = self._selection.md, self._threads
        if not hasattr(mine, "buffer"):
            mine.scratch = Scratch(md.d_model, self._sum_vectors)
            shape = (self._per_task * self._selection.n_parts, md.d_model)
            mine.buffer = _make_buffer(shape)
        start = number * self._per_task
        stop = min(self._n, start + self._per_task)
        samples = np.arange(start, stop, dtype=np.int64) if self._samples is None else self._samples[start:stop]
        extents, groups = _plan(self._selection, samples, mine.buffer.ctypes.data)
        reader.read(extents, 0, len(extents.nbytes))
        self._source.finish(torch.from_numpy(mine.buffer[: len(samples) * self._selection.n_parts]))
        measured = [(group, *measure(mine.buffer[rows], mine.scratch)) for group, rows in groups]
        is_bad = any(piece.n_nonfinite_samples for _, piece, _ in measured)
        found = self._locate(samples, mine.buffer) if is_bad else None
        with self._lock:
            self._done[number] = measured, found
            while self._next_merged in self._done:
                measured, found = self._done.pop(self._next_merged)
                self.first_nonfinite = self.first_nonfinite or found
                for group, piece, norms in measured:
                    self._pieces[group].merge(piece)
                    self._histograms[group].add(norms)
                self._next_merged += 1
            progress, self._progress = self._progress, None
            if progress is not None:
                progress(min(self._n, self._next_merged * self._per_task), self._n)
                # Not after it has raised an error.
                self._progress = progress

    def _say(self, done: int, total: int) -> None:
        """What takes minutes says so, where nobody else tells: `scale_norm` measures before the first batch."""
        if time.monotonic() - self._said >= _EVERY_S:
            self._said = time.monotonic()
            _log.warning("%s: measuring activations, %.0f%% (%d of %d samples)", self._store.shards_dir,
                         100 * done / total, done, total)  # fmt: skip

    def _locate(self, samples: _Int64s, vectors: NDArray[np.float32]) -> NonFinite:
        """Find the first value that is not finite among the vectors of some samples, of which there is one."""
        md = self._selection.md
        shards, rows, group = _find_rows(self._selection, samples)
        # Where each vector that was read stands among the rows.
        order = np.argsort(group, kind="stable")
        bad = np.flatnonzero(~np.isfinite(vectors[: len(rows)]).all(axis=1))
        at = bad[np.argmin(order[bad] % len(samples))]
        dimension = int(np.argmin(np.isfinite(vectors[at])))
        shard, row = int(shards[order[at]]), int(rows[order[at]])
        example, row = divmod(row, md.n_layers * md.tokens_per_example)
        layer, token = divmod(row, md.tokens_per_example)
        return NonFinite(
            value=float(vectors[at, dimension]),
            file=self._store.shards[shard].name,
            example_idx=shard * md.examples_per_shard + example,
            layer=md.layers[layer],
            token_idx=token - int(md.cls_token),
            dimension=dimension,
        )


def _make_buffer(shape: tuple[int, int]) -> NDArray[np.float32]:
    """Memory that begins at a boundary of huge pages, which numpy asks for: to read and sum there is 10 % faster.

    From numpy, because the next pass gets it again as it is, where the system would have to clear other pages.
    """
    nbytes = math.prod(shape) * FLOAT32.nbytes
    memory = np.empty(nbytes + HUGE_PAGE, dtype=np.uint8)
    first = -memory.ctypes.data % HUGE_PAGE
    return memory[first : first + nbytes].view(FLOAT32.storage).reshape(shape)


def _find_rows(selection: Selection, samples: _Int64s) -> tuple[_Int64s, _Int64s, _Int64s]:
    """The shards, the rows in them, and the groups of all vectors of samples; part by part where there are several."""
    md = selection.md
    cells = selection.cells(samples)
    shards, rows = selection.disk_rows(cells)
    _, layers, tokens = selection.split(cells)
    group = 2 * layers + (tokens >= selection.n_special)
    if selection.n_parts > 1:
        parts = np.arange(selection.n_parts, dtype=np.int64)[:, None]
        shift = (np.array(selection.layer_idxs) - selection.layer_idxs[0])[:, None] * md.tokens_per_example
        rows, group = (rows + shift).ravel(), (group + 2 * parts).ravel()
        shards = np.tile(shards, selection.n_parts)
    return shards, rows, group


def _plan(selection: Selection, samples: _Int64s, address: int) -> tuple[Extents, list[tuple[int, slice]]]:
    """Work out how to read samples to an address with the rows of each group side by side, and which rows those are."""
    shards, rows, group = _find_rows(selection, samples)
    md = selection.md
    width = md.d_model * FLOAT32.nbytes
    # What is stored goes to the back of a row, where it is converted.
    places = address + width - md.row_nbytes + width * np.arange(len(rows), dtype=np.int64)
    counts = np.bincount(group)
    if counts[-1] != len(rows):
        in_order = places.copy()
        places[np.argsort(group, kind="stable")] = in_order
    ends = np.cumsum(counts).tolist()
    groups = [(g, slice(ends[g] - n, ends[g])) for g, n in enumerate(counts.tolist()) if n]
    return make_extents(shards, rows, places, md.row_nbytes), groups
