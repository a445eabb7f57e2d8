"""Moments of float32 vectors in float64, in pieces that any thread can measure and that merge to the whole.

Within a piece, values and squares are summed; where the mean is so large that squares would cancel, the deviations
from the piece's own mean are summed instead. Pieces merge by the formulas of Chan, Golub, LeVeque (1979), "Updating
formulae and a pairwise algorithm for computing sample variances", which are exact and never subtract large sums.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
_Values = NDArray[np.float32]

# Small enough that BLAS starts no threads of its own, large enough that threads seldom ask for the interpreter lock.
_BLOCK_VALUES = 128 << 10
# Squares lose about log10 of this many digits of a variance: 2 of 16.
_MAX_MEAN_OVER_STD_SQUARED = 100.0
_HISTOGRAM_SHIFT = 13
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclasses.dataclass(frozen=True)
class Moments:
    """What is known about a set of vectors. Those with a value that is not finite are counted, and else left out.

    Attributes:
        n_samples: Vectors described: those of finite values only.
        n_nonfinite_samples: Vectors left out.
        share_nonfinite: Share of NaN and infinite values among all values.
        mean: `[d_model] float64`.
        variance: `[d_model] float64`, of the population: divided by the count, as `numpy.var` does.
        mean_norm: Mean L2 norm.
        std_norm: Standard deviation of the L2 norm.
        mean_squared_norm: Mean squared L2 norm.
        min: Least value.
        max: Greatest value.
        norm_quantiles: Quantiles of the L2 norm by their probability, to 0.1%; those of 0 and 1 are exact.
    """

    n_samples: int
    n_nonfinite_samples: int
    share_nonfinite: float
    mean: _Floats
    variance: _Floats
    mean_norm: float
    std_norm: float
    mean_squared_norm: float
    min: float
    max: float
    norm_quantiles: dict[float, float]


class Scratch:
    """Memory of one thread for `measure`, and the way to sum: as `compiled.find_sum_kernel`, None for numpy."""

    def __init__(self, d_model: int, sum_vectors: Callable[..., None] | None = None) -> None:
        self.sum_vectors = sum_vectors
        self.n_rows = max(1, _BLOCK_VALUES // d_model)
        self.values = np.empty((self.n_rows, d_model))
        self.squares = np.empty((self.n_rows, d_model))
        self.row_ones = np.ones(self.n_rows)
        self.column_ones = np.ones(d_model)

    def sum_blocks(
        self, vectors: _Values, sums: _Floats, squares: _Floats, squared_norms: _Floats, lows: _Values, highs: _Values
    ) -> None:
        """Do in numpy what the compiled kernel does, but for the bounds: those of all columns are set for each."""
        with np.errstate(all="ignore"):
            for start in range(0, len(vectors), self.n_rows):
                block = vectors[start : start + self.n_rows]
                values, squared = self.values[: len(block)], self.squares[: len(block)]
                np.copyto(values, block)
                np.multiply(values, values, out=squared)
                # Products with ones are the fastest sums there are.
                ones = self.row_ones[: len(block)]
                np.dot(squared, self.column_ones, out=squared_norms[start : start + len(block)])
                sums += np.dot(ones, values)
                squares += np.dot(ones, squared)
                np.minimum(lows, block.min(), out=lows)
                np.maximum(highs, block.max(), out=highs)


@dataclasses.dataclass
class Piece:
    """Sums over some vectors, or over several merged pieces.

    Attributes:
        n: Vectors of finite values; `n_nonfinite_samples` counts the others.
        mean, m2: `[d_model] float64`, and sum of squared deviations from it.
        n_nonfinite: Values that are not finite.
        norm_mean, norm_m2: Mean L2 norm, and sum of squared deviations from it.
        squared: Sum of squared L2 norms.
    """

    n: int
    mean: _Floats
    m2: _Floats
    n_nonfinite_samples: int = 0
    n_nonfinite: int = 0
    norm_mean: float = 0.0
    norm_m2: float = 0.0
    squared: float = 0.0
    low: float = np.inf
    high: float = -np.inf
    norm_low: float = np.inf
    norm_high: float = 0.0

    @classmethod
    def empty(cls, d_model: int) -> "Piece":
        """No vectors."""
        return cls(0, np.zeros(d_model), np.zeros(d_model))

    def merge(self, other: "Piece") -> None:
        """Take in another piece."""
        self.n_nonfinite_samples += other.n_nonfinite_samples
        self.n_nonfinite += other.n_nonfinite
        if not other.n:
            return
        n = self.n + other.n
        share = other.n / n
        delta = other.mean - self.mean
        self.m2 += other.m2 + delta * delta * (self.n * share)
        self.mean += delta * share
        norm_delta = other.norm_mean - self.norm_mean
        self.norm_m2 += other.norm_m2 + norm_delta * norm_delta * (self.n * share)
        self.norm_mean += norm_delta * share
        self.squared += other.squared
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.norm_low, self.norm_high = min(self.norm_low, other.norm_low), max(self.norm_high, other.norm_high)
        self.n = n

    def moments(self, histogram: "NormHistogram") -> Moments:
        """Finish: the moments, with quantiles from the histogram of the same vectors."""
        n = self.n or np.nan
        n_values = (self.n + self.n_nonfinite_samples) * len(self.mean)
        return Moments(
            n_samples=self.n,
            n_nonfinite_samples=self.n_nonfinite_samples,
            share_nonfinite=self.n_nonfinite / n_values if n_values else 0.0,
            mean=self.mean if self.n else np.full_like(self.mean, np.nan),
            variance=self.m2 / n,
            mean_norm=self.norm_mean if self.n else np.nan,
            std_norm=float(np.sqrt(self.norm_m2 / n)),
            mean_squared_norm=float(self.squared / n),
            min=self.low if self.n else np.nan,
            max=self.high if self.n else np.nan,
            norm_quantiles={q: histogram.quantile(q, self.norm_low, self.norm_high) for q in QUANTILES},
        )


class NormHistogram:
    """Counts of norms in bins, 0.1% wide by default: the leading bits of a float32, so any magnitude has its bin.

    The bins leave out the last `shift` of the 23 bits behind the point, so they are at most `2**(shift - 23)` wide.
    """

    def __init__(self, shift: int = _HISTOGRAM_SHIFT) -> None:
        self._shift = np.uint32(shift)
        self.counts = np.zeros(1 << (31 - shift), dtype=np.int64)

    def add(self, norms: _Floats) -> None:
        """Count `[n]` norms."""
        with np.errstate(over="ignore"):
            bins = norms.astype(np.float32).view(np.uint32) >> self._shift
        np.add.at(self.counts, bins, 1)

    def quantile(self, q: float, low: float, high: float) -> float:
        """Find a quantile; `low` and `high` are the least and the greatest norm."""
        cumulated = np.cumsum(self.counts)
        n = int(cumulated[-1])
        if not n:
            return float("nan")
        if q in (0.0, 1.0):
            return high if q else low
        rank = q * (n - 1) + 0.5
        found = int(np.searchsorted(cumulated, rank))
        if not found:
            # Zeros, and what is hardly more.
            return low
        edges = (np.array([found, found + 1], dtype=np.uint32) << self._shift).view(np.float32)
        inside = (rank - (cumulated[found] - self.counts[found])) / self.counts[found]
        return float(np.clip(edges[0] + inside * (edges[1] - edges[0]), low, high))


def measure(vectors: _Values, scratch: Scratch) -> tuple[Piece, _Floats]:
    """Measure `[n, d_model] float32`, some megabytes of them.

    Found are their piece, and the L2 norms `[n] float64` of those whose values are all finite.
    """
    n, d_model = vectors.shape
    total, total_squares = np.zeros(d_model), np.zeros(d_model)
    squared_norms = np.empty(n)
    lows = np.full(d_model, np.inf, dtype=np.float32)
    highs = -lows
    (scratch.sum_vectors or scratch.sum_blocks)(vectors, total, total_squares, squared_norms, lows, highs)
    # The square of a float32 is finite in float64, so a sum is if all its values are.
    is_finite = np.isfinite(squared_norms)
    if not is_finite.all():
        piece, norms = measure(vectors[is_finite], scratch)
        piece.n_nonfinite_samples = int(n - is_finite.sum())
        piece.n_nonfinite = int(np.count_nonzero(~np.isfinite(vectors[~is_finite])))
        return piece, norms
    norms = np.sqrt(squared_norms)
    if not n:
        return Piece.empty(d_model), norms
    mean = total / n
    m2 = total_squares - total * mean
    cancelled = np.flatnonzero(~(mean * mean * n <= _MAX_MEAN_OVER_STD_SQUARED * m2))
    if len(cancelled):
        m2[cancelled] = _deviations(vectors, mean, cancelled, scratch)
    norm_mean = float(norms.mean())
    norm_deviations = norms - norm_mean
    piece = Piece(
        n=n,
        mean=mean,
        m2=m2,
        norm_mean=norm_mean,
        norm_m2=float(norm_deviations @ norm_deviations),
        squared=float(squared_norms.sum()),
        low=float(lows.min()),
        high=float(highs.max()),
        norm_low=float(norms.min()),
        norm_high=float(norms.max()),
    )
    return piece, norms


def _deviations(vectors: _Values, mean: _Floats, columns: NDArray[Any], scratch: Scratch) -> _Floats:
    """Sums of squared deviations of some columns."""
    total = np.zeros(len(columns))
    all_of_them = len(columns) > len(mean) // 2
    shift = mean if all_of_them else mean[columns]
    for start in range(0, len(vectors), scratch.n_rows):
        block = vectors[start : start + scratch.n_rows]
        if all_of_them:
            values = scratch.values[: len(block)]
            np.copyto(values, block)
            values -= shift
            np.multiply(values, values, out=values)
            total += np.dot(scratch.row_ones[: len(block)], values)[columns]
        else:
            total += np.square(block[:, columns] - shift).sum(axis=0)
    return total
