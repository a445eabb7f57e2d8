"""The order of samples, as integer arithmetic: which sample stands where in which batch.

Nothing here reads a file or knows about processes. A plan is a pure function of its fields, so every process
computes the same one, any batch can be worked out without the ones before it, and resuming is seeking.

How the shuffle works
---------------------
1. Each lane has a *stream* of its own: blocks of samples, drawn at random from all over the selection. See `streams`.
   Lanes that share a process have blocks that are neighbours on disk.
2. Batch c belongs to lane `c % n_lanes`, as that lane's turn `t = c // n_lanes`.
3. A stream is cut into *chunks*, as many as the lane has turns. The samples of chunk i are dealt at random, equally
   many to each, to the turns i, i+1, ..., i+depth-1, around the end of the lane. So a turn is made from `depth`
   chunks, a chunk is read at once, and `depth` turns of a lane are open at any time:

       turn      0   1   2   3   4   5          depth 3
       chunk 0   x   x   x
       chunk 1       x   x   x
       chunk 2           x   x   x
       chunk 3               x   x   x
       chunk 4   x               x   x          <- around the end: every batch is mixed equally well,
       chunk 5   x   x               x             the first and the last too

Rows are read straight to their final place in a batch; there is no second copy to shuffle. The price of going around
the end is that `depth - 1` chunks of a lane are visited twice in an epoch.
"""

import bisect
import dataclasses
import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.lazy import lazy
from saev_torch.order.permute import make_key, shuffled
from saev_torch.order.runs import Chunk, choose_block_size, divisor_at_most, expand_runs
from saev_torch.order.streams import CHUNKS, Streams

_Int64s = NDArray[np.int64]

_MIN_PART_TO_SPARE = 4
# Positions in a chunk have no more, see `permute.shuffled`.
_N_BITS = 31


@dataclasses.dataclass(frozen=True)
class Batching:
    """Samples cut into batches; what all plans share."""

    n_samples: int
    batch_size: int

    @property
    def n_batches(self) -> int:
        """Batches in an epoch, the last perhaps not full."""
        return -(-self.n_samples // self.batch_size)

    def start(self, batch: int) -> int:
        """Samples before a batch."""
        return batch * self.batch_size

    def size(self, batch: int) -> int:
        """Samples in a batch."""
        return min(self.batch_size, self.n_samples - batch * self.batch_size)

    def at(self, position: int) -> tuple[int, int]:
        """The batch that a position in the sequence of samples is in, and its row."""
        return divmod(position, self.batch_size)


@dataclasses.dataclass(frozen=True)
class OrderedPlan(Batching):
    """Batches in file order."""

    def locate(self, batch: int) -> _Int64s:
        """The samples of a batch: `[size] int64`."""
        start = batch * self.batch_size
        return np.arange(start, start + self.size(batch), dtype=np.int64)

    def find(self, sample: int) -> tuple[int, int]:
        """The inverse of `locate`: batch and row of a sample."""
        return divmod(sample, self.batch_size)

    def whole(self, batch: int) -> Chunk:
        """A batch as one chunk."""
        size = self.size(batch)
        rows = np.arange(size, dtype=np.int64)
        return Chunk(np.array([batch * self.batch_size]), np.array([size]), rows, (batch,), (0, size), rows)


@dataclasses.dataclass(frozen=True)
class ShufflePlan(Batching):
    """One epoch of batches in a seeded random order.

    Attributes:
        buffer_size: Batches held for shuffling by all lanes together.
        max_lanes: Lanes asked for; data smaller than the buffer use fewer.
        wished_block_size: None to have `block_size` chosen.
    """

    buffer_size: int
    max_lanes: int
    wished_block_size: int | None
    seed: int
    epoch: int

    @lazy
    def block_size(self) -> int:
        """Consecutive samples that one lane reads at once."""
        return self.wished_block_size or choose_block_size(self.batch_size, self.depth(0))

    @lazy
    def n_lanes(self) -> int:
        """Lanes in use: so many that each has batches enough to fill its part of the buffer."""
        lanes = divisor_at_most(self.max_lanes, self.buffer_size)
        return divisor_at_most(lanes, self.n_batches // (self.buffer_size // lanes))

    def n_turns(self, lane: int) -> int:
        """Batches of a lane."""
        return (self.n_batches - lane + self.n_lanes - 1) // self.n_lanes

    def depth(self, lane: int) -> int:
        """Turns of a lane that are open at a time."""
        part = self.buffer_size // self.n_lanes
        # Data that fit are read once and mixed whole.
        return max(1, self.n_turns(lane) if self.n_turns(lane) <= part else part - self.reads_lanes_together)

    @property
    def reads_lanes_together(self) -> bool:
        """Whether a reader reads the same chunk of all its lanes at once, for which each lane has a batch to spare.

        Lanes that share a process are neighbours on disk, so reads are larger. A small buffer has no room for it.
        """
        return self.buffer_size // self.n_lanes >= _MIN_PART_TO_SPARE

    def _lengths(self) -> list[int]:
        """Samples of each lane."""
        lengths = [self.n_turns(lane) * self.batch_size for lane in range(self.n_lanes)]
        # The last batch may not be full.
        lengths[(self.n_batches - 1) % self.n_lanes] -= self.n_batches * self.batch_size - self.n_samples
        return lengths

    @lazy
    def _streams(self) -> Streams:
        return Streams(self.n_samples, self.block_size, tuple(self._lengths()), self.seed, self.epoch)

    def turns_of(self, lane: int, chunk: int) -> list[int]:
        """The turns that a chunk of a lane deals to, in this order."""
        n_turns = self.n_turns(lane)
        return [(chunk + d) % n_turns for d in range(self.depth(lane))]

    def _chunk_start(self, lane: int, chunk: int) -> int:
        # Only the chunks that reach the last turn, which may not be full, differ in size, by what they deal to it.
        n_turns, depth = self.n_turns(lane), self.depth(lane)
        last = self.size((n_turns - 1) * self.n_lanes + lane)
        first, stop = n_turns - chunk, n_turns - min(chunk, n_turns - depth)
        lost = [stop * size // depth - first * size // depth for size in (self.batch_size, last)]
        return chunk * self.batch_size - lost[0] + lost[1]

    def _chunk_at(self, lane: int, position: int) -> int:
        """The chunk that a position in the stream of a lane is in."""
        n_turns = self.n_turns(lane)
        index = min(position // self.batch_size, max(0, n_turns - self.depth(lane)))
        while index + 1 < n_turns and self._chunk_start(lane, index + 1) <= position:
            index += 1
        return index

    def chunk(self, lane: int, chunk: int) -> Chunk:
        """Work out one chunk of a lane, `0 <= chunk < n_turns(lane)`."""
        turns, start = self.turns_of(lane, chunk), self._chunk_start(lane, chunk)
        rows, bounds = _dealt_rows(tuple(self.size(turn * self.n_lanes + lane) for turn in turns))
        starts, lengths = self._streams.runs(lane, start, start + len(rows))
        dealt = shuffled(len(rows), make_key(self.seed, self.epoch, CHUNKS, lane, chunk))
        return Chunk(starts, lengths, dealt, tuple(turns), bounds, rows)

    def locate(self, batch: int) -> _Int64s:
        """The samples of a batch, row by row: `[size] int64`. Nothing is read."""
        return ShuffledBatches(self).locate(batch)

    def find(self, sample: int) -> tuple[int, int]:
        """The inverse of `locate`: batch and row of a sample. Nothing is read."""
        lane, position = self._streams.find(sample)
        index = self._chunk_at(lane, position)
        chunk = self.chunk(lane, index)
        (at,) = np.flatnonzero(chunk.dealt == position - self._chunk_start(lane, index)).tolist()
        d = bisect.bisect_right(chunk.bounds, at) - 1
        return chunk.turns[d] * self.n_lanes + lane, int(chunk.rows[at])


class ShuffledBatches:
    """The batches of a plan, in ascending order, each by itself. Of each lane the chunks of the last one are kept.

    Where it `finds_order`, samples that are neighbours in the stream are neighbours in the chunk of a batch.
    """

    def __init__(self, plan: ShufflePlan, finds_order: bool = False) -> None:
        self._plan, self._finds_order = plan, finds_order
        self._kept: dict[int, dict[int, tuple[_Int64s, _Int64s, tuple[int, ...]]]] = {}

    def locate(self, batch: int) -> _Int64s:
        """The samples of a batch, row by row: `[size] int64`."""
        dealt, rows = self._dealt(batch)
        samples = np.empty_like(dealt)
        samples[rows] = dealt
        return samples

    def whole(self, batch: int) -> Chunk:
        """A batch as one chunk."""
        samples = self._dealt(batch) if self._finds_order else (self.locate(batch),)
        return Chunk.of_batch(batch, *samples)

    def _dealt(self, batch: int) -> tuple[_Int64s, _Int64s]:
        """The samples of a batch, chunk by chunk, and the rows that they go to: `[size] int64` each."""
        plan = self._plan
        turn, lane = divmod(batch, plan.n_lanes)
        kept, used, parts = self._kept.get(lane, {}), {}, []
        for d in range(plan.depth(lane)):
            number = (turn - d) % plan.n_turns(lane)
            dealt, rows, bounds = used[number] = kept.get(number) or self._deal(lane, number)
            part = slice(bounds[d], bounds[d + 1])
            parts.append((dealt[part], rows[part]))
        self._kept[lane] = used
        samples, rows = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return samples, rows

    def _deal(self, lane: int, number: int) -> tuple[_Int64s, _Int64s, tuple[int, ...]]:
        """The samples of a chunk, and the rows of batches that they go to, turn by turn."""
        chunk = self._plan.chunk(lane, number)
        samples = expand_runs(chunk.starts, chunk.lengths)
        if not self._finds_order:
            return samples[chunk.dealt], chunk.rows, chunk.bounds
        # Those of each turn in the order of the stream: a position in it, and behind that which of `dealt` it is.
        keys = chunk.dealt << _N_BITS
        keys |= np.arange(len(keys))
        for start, stop in itertools.pairwise(chunk.bounds):
            keys[start:stop].sort()
        at = keys & ((1 << _N_BITS) - 1)
        keys >>= _N_BITS
        return samples[keys], chunk.rows[at], chunk.bounds


@functools.lru_cache(maxsize=8)
def _interleaved(size: int, depth: int) -> tuple[_Int64s, ...]:
    """Rows of a batch for the samples of each of its chunks, so that every part of it holds all of them."""
    portions = np.diff([d * size // depth for d in range(depth + 1)])
    number = np.concatenate([np.arange(n) for n in portions])
    chunk = np.repeat(np.arange(depth), portions)
    rows = np.empty(size, dtype=np.int64)
    rows[np.lexsort((chunk, number))] = np.arange(size)
    return tuple(np.split(rows, np.cumsum(portions)[:-1]))


@functools.lru_cache(maxsize=8)
def _dealt_rows(sizes: tuple[int, ...]) -> tuple[_Int64s, tuple[int, ...]]:
    """Rows that the samples of a chunk go to, of the batches of these sizes that it deals to, and where each begins."""
    parts = [_interleaved(size, len(sizes))[d] for d, size in enumerate(sizes)]
    rows = np.concatenate(parts)
    rows.setflags(write=False)
    return rows, tuple(itertools.accumulate(map(len, parts), initial=0))
