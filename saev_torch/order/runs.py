"""Runs of consecutive samples: how long they are, and where the samples of a chunk go."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

MAX_READ_ROWS = 1024
"""Rows that one read takes to places of their own, at most: IOV_MAX of Linux."""

MAX_READ_NBYTES = 2 << 20
"""Bytes that one read takes, at most, unless a single row has more."""

MAX_GAP_NBYTES = 16 << 10
"""A gap up to this size is read over, which is cheaper than another call."""

_Int64s = NDArray[np.int64]

_MIN_BLOCKS_PER_CHUNK = 64
_WISHED_BLOCKS_PER_SAMPLE = 0.35


def expand_runs(starts: _Int64s, lengths: _Int64s) -> _Int64s:
    """List the members of runs of consecutive integers, one run after the other.

    >>> expand_runs(np.array([5, 0]), np.array([3, 2])).tolist()
    [5, 6, 7, 0, 1]
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    runs: _Int64s = np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
    return runs


def find_runs(numbers: _Int64s) -> tuple[_Int64s, _Int64s]:
    """Starts and lengths of the runs of consecutive numbers: the inverse of `expand_runs`."""
    firsts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    return numbers[firsts], np.diff(np.append(firsts, len(numbers)))


def divisor_at_most(n: int, limit: int) -> int:
    """The largest divisor of `n` that is at most `limit` (and at least 1)."""
    return max((d for d in range(1, min(n, max(1, limit)) + 1) if n % d == 0), default=1)


def choose_block_size(batch_size: int, depth: int) -> int:
    """Choose how many consecutive samples are read at once.

    A batch holds rows of `(depth / k) * (1 - (1 - 1/depth)**k)` distinct blocks of k samples for each of its samples.
    The block is the largest divisor of `batch_size` (else the largest number) that keeps this above 0.35: a little
    more than the reference's reservoir reaches with 196 tokens per example. Small batches have smaller blocks still.
    """
    best = 1
    while best < batch_size // _MIN_BLOCKS_PER_CHUNK:
        k = best + 1
        if (depth / k) * (1 - (1 - 1 / depth) ** k) < _WISHED_BLOCKS_PER_SAMPLE:
            break
        best = k
    return next((d for d in range(best, best // 2, -1) if batch_size % d == 0), best)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The samples of one chunk, and where they go.

    Attributes:
        starts, lengths: `[n_runs] int64`, first sample and length of each run, in the order of the stream.
        dealt: `[n] int64`, positions in the chunk, in the order in which they are dealt to turns.
        turns, bounds: `dealt[bounds[d]:bounds[d + 1]]` goes to `turns[d]`.
        rows: `[n] int64`, row in the batch of each of `dealt`.
        is_in_order: Whether it is a whole batch, row by row.
    """

    starts: _Int64s
    lengths: _Int64s
    dealt: _Int64s
    turns: tuple[int, ...]
    bounds: tuple[int, ...]
    rows: _Int64s
    is_in_order: bool = False

    @classmethod
    def of_batch(cls, batch: int, samples: _Int64s, rows: _Int64s | None = None) -> "Chunk":
        """The samples `[size] int64` of a whole batch, row by row, or those of its `rows [size] int64`."""
        ones, own = np.ones_like(samples), np.arange(len(samples))
        return cls(samples, ones, own, (batch,), (0, len(own)), own if rows is None else rows, rows is None)
