"""Batches that are mixed of several sources, each in its own order, in exact shares.

The rows of all batches, counted through, are shared out among the sources by their weights, see `Weights`. So the rows
that a source has in batch b are positions in its own sequence that are known without the batches before it. That
sequence is an epoch of the source, and where that is over before the mixture is, another one, and so on: *passes*.
A pass is a plan as for a data set of one directory, but its batches are the source's parts of the mixture's.
"""

import dataclasses
import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from saev_torch.format.rules import OrderKind
from saev_torch.order.lazy import lazy
from saev_torch.order.shuffle import Batching, ShufflePlan
from saev_torch.order.uniform import UniformPlan

Until: TypeAlias = Literal["shortest", "longest"]
"""When an epoch of a mixture is over."""

_Int64s = NDArray[np.int64]
_Rows = TypeVar("_Rows", int, _Int64s)

# With rows below 2**62 no product of what is left of a division overflows.
_MAX_DENOMINATOR = 1 << 30


def _rounded(rows: _Rows, numerator: int, denominator: int) -> _Rows:
    """A ratio of rows, rounded half up."""
    whole = rows // denominator
    rest = rows - whole * denominator
    return whole * numerator + (2 * rest * numerator + denominator) // (2 * denominator)


@dataclasses.dataclass(frozen=True)
class Weights:
    """How many of the first rows of a mixture come from each source, for any number of rows.

    The source with the largest weight takes its part of all rows, rounded; the next its part of what is left; and so
    on. What is rounded is the sum, so nothing adds up, and a source never has fewer of more rows. With two sources that
    is the method of largest remainders.

    Attributes:
        ratios: Number of each source, largest weight first, and the part that it takes of what is left.
    """

    ratios: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, weights: Sequence[Fraction]) -> "Weights":
        """Weights above 0. A ratio that is not exact with a denominator of 30 bits is rounded to one."""
        ratios, left = [], sum(weights, Fraction(0))
        for source in sorted(range(len(weights)), key=lambda source: -weights[source]):
            ratio = (weights[source] / left).limit_denominator(_MAX_DENOMINATOR)
            ratios.append((source, ratio.numerator, ratio.denominator))
            left -= weights[source]
        return cls(tuple(ratios))

    @property
    def starved(self) -> int | None:
        """The number of a source that would have no rows at all; None where each has some."""
        for source, numerator, _ in self.ratios:
            if not numerator:
                return source
        # One that takes all leaves nothing to the next.
        takes_all = (i for i, (_, numerator, denominator) in enumerate(self.ratios[:-1]) if numerator == denominator)
        return next((self.ratios[i + 1][0] for i in takes_all), None)

    def counts(self, rows: _Int64s) -> _Int64s:
        """How many of the first `rows [m] int64` come from each source: `[n_sources, m] int64`."""
        found, left = np.empty((len(self.ratios), len(rows)), dtype=np.int64), rows
        for source, numerator, denominator in self.ratios:
            found[source] = _rounded(left, numerator, denominator)
            left = left - found[source]
        return found

    def count(self, source: int, n_rows: int) -> int:
        """How many of the first rows come from one source."""
        for number, numerator, denominator in self.ratios:
            taken = _rounded(n_rows, numerator, denominator)
            if number == source:
                return taken
            n_rows -= taken
        raise IndexError(source)

    def row(self, source: int, n: int) -> int:
        """The number of the row that has `n` rows of this source before it, and is one itself."""
        high = n + 1
        while self.count(source, high) <= n:
            high *= 2
        return bisect_right(range(high + 1), n, key=functools.partial(self.count, source)) - 1

    def n_rows(self, sizes: Sequence[int], until: Until) -> int:
        """Rows of an epoch, where sources have so many samples.

        "shortest": as many as there can be so that no sample comes twice. "longest": as few as there can be so that
        every sample comes.
        """
        if until == "shortest":
            return min(self.row(source, size) for source, size in enumerate(sizes))
        return max(self.row(source, size - 1) + 1 for source, size in enumerate(sizes))

    def pattern(self, start: int, size: int) -> tuple[_Int64s, ...]:
        """Which rows of a batch that begins with row `start` are of each source: `[n] int64` each."""
        rests, left = [], start
        for _, numerator, denominator in self.ratios:
            rests.append(left % denominator)
            left -= _rounded(left, numerator, denominator)
        return _pattern(self.ratios, tuple(rests), size)


@functools.lru_cache(maxsize=64)
def _pattern(ratios: tuple[tuple[int, int, int], ...], rests: tuple[int, ...], size: int) -> tuple[_Int64s, ...]:
    left, found = np.arange(size + 1, dtype=np.int64), {}
    for (source, numerator, denominator), rest in zip(ratios, rests, strict=True):
        taken = _rounded(left + rest, numerator, denominator) - _rounded(rest, numerator, denominator)
        found[source] = np.flatnonzero(np.diff(taken))
        found[source].setflags(write=False)
        left = left - taken
    return tuple(found[source] for source in range(len(ratios)))


class _Cut(Batching):
    """Batches of any sizes: batch b has the samples at positions `bounds[b]`, ... `bounds[b + 1] - 1`."""

    bounds: _Int64s

    @property
    def n_batches(self) -> int:
        return len(self.bounds) - 1

    def start(self, batch: int) -> int:
        return int(self.bounds[batch])

    def size(self, batch: int) -> int:
        return int(self.bounds[batch + 1] - self.bounds[batch])

    def at(self, position: int) -> tuple[int, int]:
        batch = int(np.searchsorted(self.bounds, position, side="right")) - 1
        return batch, position - int(self.bounds[batch])


@dataclasses.dataclass(frozen=True, eq=False)
class CutUniformPlan(_Cut, UniformPlan):
    """A uniformly random order in batches of any sizes."""

    bounds: _Int64s


@dataclasses.dataclass(frozen=True, eq=False)
class CutShufflePlan(_Cut, ShufflePlan):
    """A shuffle in batches of any sizes, about `batch_size`."""

    bounds: _Int64s

    def _lengths(self) -> list[int]:
        sizes = np.diff(self.bounds)
        return [int(sizes[lane :: self.n_lanes].sum()) for lane in range(self.n_lanes)]

    @lazy
    def _chunk_starts(self) -> list[_Int64s]:
        """For each lane, where its chunks begin in its stream."""
        found = []
        for lane in range(self.n_lanes):
            sizes, depth = np.diff(self.bounds)[lane :: self.n_lanes], self.depth(lane)
            lengths = sum(
                (np.roll((d + 1) * sizes // depth - d * sizes // depth, -d) for d in range(depth)), np.zeros_like(sizes)
            )
            found.append(np.append(0, np.cumsum(lengths)))
        return found

    def _chunk_start(self, lane: int, chunk: int) -> int:
        return int(self._chunk_starts[lane][chunk])

    def _chunk_at(self, lane: int, position: int) -> int:
        return int(np.searchsorted(self._chunk_starts[lane], position, side="right")) - 1


@dataclasses.dataclass(frozen=True)
class MixedSource:
    """One source of a mixture, and the order of its own.

    Attributes:
        n_samples: Samples that it has.
        n_rows: Rows that it has in a batch, rounded.
        order, buffer_size, max_lanes, wished_block_size, seed: As in the plans for one directory.
    """

    n_samples: int
    n_rows: int
    order: OrderKind
    buffer_size: int
    max_lanes: int
    wished_block_size: int | None
    seed: int

    def make(self, bounds: _Int64s, epoch: int) -> CutShufflePlan | CutUniformPlan:
        """The plan of a pass."""
        if self.order == "uniform":
            return CutUniformPlan(self.n_samples, self.n_rows, self.seed, epoch, bounds)
        sizes = self.buffer_size, self.max_lanes, self.wished_block_size
        return CutShufflePlan(self.n_samples, self.n_rows, *sizes, self.seed, epoch, bounds)


@dataclasses.dataclass(frozen=True)
class Pass:
    """Once through a source.

    Attributes:
        source: Number of the source.
        plan: Its order; batch j of it is its part of the mixture's batch `first + j`.
        begin: Samples of the source in the passes before.
    """

    source: int
    plan: CutShufflePlan | CutUniformPlan
    first: int
    begin: int


@dataclasses.dataclass(frozen=True)
class MixturePlan(Batching):
    """One epoch of a mixture; its samples are numbered on from source to source, see `JointSelection`."""

    weights: Weights
    sources: tuple[MixedSource, ...]
    epoch: int

    @lazy
    def first_samples(self) -> tuple[int, ...]:
        """Number of the first sample of each source."""
        return tuple(itertools.accumulate((source.n_samples for source in self.sources[:-1]), initial=0))

    def n_passes(self, source: int) -> int:
        """How often a source is begun in an epoch."""
        return -(-self.weights.count(source, self.n_samples) // self.sources[source].n_samples)

    def passes(self, source: int, batch: int, stop: int | None = None) -> Iterator[Pass]:
        """The passes through a source that have rows in batches from `batch` on, before `stop`."""
        for number in self.pass_numbers(source, batch, stop):
            yield make_pass(self, source, number)

    def pass_numbers(self, source: int, batch: int, stop: int | None = None) -> range:
        """Which ones those are."""
        size = self.sources[source].n_samples
        end = self.n_samples if stop is None else min(self._edge(stop), self.n_samples)
        first, last = (self.weights.count(source, n_rows) for n_rows in (self._edge(batch), end))
        return range(first // size, -(-last // size) if last > first else 0)

    def first_passes(self) -> list[Pass]:
        """The first pass through each source."""
        return [make_pass(self, source, 0) for source in range(len(self.sources))]

    def _edge(self, batch: int) -> int:
        """Rows before a batch. Behind the last one, which may not be full, they count on for passes that end later."""
        n_behind = batch - self.n_batches
        return batch * self.batch_size if n_behind < 0 else self.n_samples + n_behind * self.batch_size

    def batch_of(self, source: int, n: int) -> int:
        """The batch with the row that has `n` rows of this source before it, and is one itself."""
        row = self.weights.row(source, n)
        behind = row - self.n_samples
        return row // self.batch_size if behind < 0 else self.n_batches + behind // self.batch_size

    def rows(self, made: Pass, batch: int) -> _Int64s:
        """Rows of a batch that are of a pass, in the order of its own part."""
        start = self._edge(batch)
        mine = self.weights.pattern(start, self.size(batch))[made.source]
        before = made.begin + made.plan.start(batch - made.first) - self.weights.count(made.source, start)
        return mine[before : before + made.plan.size(batch - made.first)]

    def locate(self, batch: int) -> _Int64s:
        """The samples of a batch, row by row: `[size] int64`. Nothing is read."""
        samples = np.empty(self.size(batch), dtype=np.int64)
        for source, first_sample in enumerate(self.first_samples):
            for made in self.passes(source, batch, batch + 1):
                samples[self.rows(made, batch)] = made.plan.locate(batch - made.first) + first_sample
        return samples

    def find(self, sample: int) -> tuple[int, int]:
        """Batch and row where a sample comes first. Nothing is read.

        Raises:
            IndexError: It does not come in this epoch, of which another source is the end.
        """
        source = bisect_right(self.first_samples, sample) - 1
        made = make_pass(self, source, 0)
        batch, row = made.plan.find(sample - self.first_samples[source])
        batch += made.first
        if batch >= self.n_batches:
            raise IndexError(f"this sample of source {source} does not come in epoch {self.epoch}, which ends before.")
        return batch, int(self.rows(made, batch)[row])

    def with_buffer(self, buffer_size: int) -> "MixturePlan":
        """The same with another buffer."""
        sources = tuple(dataclasses.replace(source, buffer_size=buffer_size) for source in self.sources)
        return dataclasses.replace(self, sources=sources)


@functools.lru_cache(maxsize=16)
def make_pass(plan: MixturePlan, source: int, number: int) -> Pass:
    """Work out a pass through a source: the sizes of its parts of all batches."""
    own = plan.sources[source]
    begin = number * own.n_samples
    end = begin + own.n_samples
    first, stop = plan.batch_of(source, begin), plan.batch_of(source, end - 1) + 1
    batches = np.arange(first, stop + 1, dtype=np.int64)
    edges = np.where(
        batches < plan.n_batches,
        batches * plan.batch_size,
        plan.n_samples + (batches - plan.n_batches) * plan.batch_size,
    )
    bounds = np.clip(plan.weights.counts(edges)[source], begin, end) - begin
    # No two passes of a run are alike.
    epoch = plan.epoch * plan.n_passes(source) + number
    return Pass(source, own.make(bounds, epoch), first, begin)
