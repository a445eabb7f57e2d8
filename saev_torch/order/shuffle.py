"""The order of samples, as integer arithmetic: which sample stands where in which batch.

Nothing here reads a file or knows about processes. A plan is a pure function of its fields, so every process
computes the same one, any batch can be worked out without the ones before it, and resuming is seeking.

How the shuffle works
---------------------
1. The samples, in file order, are cut into *super-blocks* of `n_lanes * block_size`, and those are permuted by
   `Bijection`, anew in each epoch. Each lane takes one *block* of each, another in each epoch, but so that lanes that
   share a process are neighbours on disk: its *stream*. What does not divide evenly goes to the lanes' ends.
2. Batch c belongs to lane `c % n_lanes`, as that lane's slot `t = c // n_lanes`.
3. A stream is cut into *chunks*, as many as the lane has slots. The samples of chunk i are dealt at random, equally
   many to each, to the slots i, i+1, ..., i+depth-1, around the end of the lane. So a slot is made from `depth`
   chunks, a chunk is read at once, and `depth` slots of a lane are open at any time:

       slot      0   1   2   3   4   5          depth 3
       chunk 0   x   x   x
       chunk 1       x   x   x
       chunk 2           x   x   x
       chunk 3               x   x   x
       chunk 4   x               x   x          <- around the end: every batch is mixed equally well,
       chunk 5   x   x               x             the first and the last too

Rows are read straight to their final place in a batch; there is no second copy to shuffle. The price of going around
the end is that `depth - 1` chunks of a lane are visited twice in an epoch.
"""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.permute import Bijection, make_key, shuffled
from saev_torch.order.runs import Chunk, choose_block_size, divisor_at_most, expand_runs

__all__ = ["OrderedPlan", "ShufflePlan"]

_Int64s = NDArray[np.int64]

_SUPER_BLOCKS, _CHUNK, _PLACES = 1, 2, 3
_MIN_PART_TO_SPARE = 4


@dataclasses.dataclass(frozen=True)
class OrderedPlan:
    """Batches in file order.

    Attributes:
        n_samples: Samples in the selection.
        batch_size: Samples in a batch.
    """

    n_samples: int
    batch_size: int

    @property
    def n_batches(self) -> int:
        """Batches in an epoch, the last perhaps not full."""
        return -(-self.n_samples // self.batch_size)

    def size(self, batch: int) -> int:
        """Samples in a batch."""
        return min(self.batch_size, self.n_samples - batch * self.batch_size)

    def locate(self, batch: int) -> _Int64s:
        """The samples of a batch: `[size] int64`."""
        start = batch * self.batch_size
        return np.arange(start, start + self.size(batch), dtype=np.int64)

    def find(self, sample: int) -> tuple[int, int]:
        """The inverse of `locate`: batch and row of a sample."""
        return divmod(sample, self.batch_size)


@dataclasses.dataclass(frozen=True)
class ShufflePlan:
    """One epoch of batches in a seeded random order.

    Attributes:
        n_samples: Samples in the selection.
        batch_size: Samples in a batch.
        buffer_size: Batches held for shuffling by all lanes together.
        max_lanes: Lanes asked for; data smaller than the buffer use fewer.
        block_size: Consecutive samples that one lane reads at once.
        seed: Seed of the order.
        epoch: Number of the epoch.
    """

    n_samples: int
    batch_size: int
    buffer_size: int
    max_lanes: int
    block_size: int
    seed: int
    epoch: int

    @classmethod
    def make(
        cls,
        n_samples: int,
        batch_size: int,
        buffer_size: int,
        n_lanes: int,
        block_size: int | None,
        seed: int,
        epoch: int,
    ) -> "ShufflePlan":
        """Make a plan, choosing the block size where `block_size` is None."""
        plan = cls(n_samples, batch_size, buffer_size, n_lanes, block_size or 1, seed, epoch)
        if block_size is None:
            plan = dataclasses.replace(plan, block_size=choose_block_size(batch_size, plan.depth(0)))
        return plan

    @property
    def n_batches(self) -> int:
        """Batches in an epoch, the last perhaps not full."""
        return -(-self.n_samples // self.batch_size)

    def size(self, batch: int) -> int:
        """Samples in a batch."""
        return min(self.batch_size, self.n_samples - batch * self.batch_size)

    @functools.cached_property
    def n_lanes(self) -> int:
        """Lanes in use: so many that each has batches enough to fill its part of the buffer."""
        lanes = divisor_at_most(self.max_lanes, self.buffer_size)
        return divisor_at_most(lanes, self.n_batches // (self.buffer_size // lanes))

    def n_slots(self, lane: int) -> int:
        """Batches of a lane."""
        return (self.n_batches - lane + self.n_lanes - 1) // self.n_lanes

    def depth(self, lane: int) -> int:
        """Slots of a lane that are open at a time."""
        part = self.buffer_size // self.n_lanes
        # Data that fit are read once and mixed whole.
        return max(1, self.n_slots(lane) if self.n_slots(lane) <= part else part - self.reads_lanes_together)

    @property
    def reads_lanes_together(self) -> bool:
        """Whether a reader reads the same chunk of all its lanes at once, for which each lane has a batch to spare.

        Lanes that share a process are neighbours on disk, so reads are larger. A small buffer has no room for it.
        """
        return self.buffer_size // self.n_lanes >= _MIN_PART_TO_SPARE

    @property
    def _super_block(self) -> int:
        return self.n_lanes * self.block_size

    @functools.cached_property
    def _lane_samples(self) -> tuple[int, ...]:
        return tuple(
            sum(self.size(lane + self.n_lanes * t) for t in {0, self.n_slots(lane) - 1} if t >= 0)
            + max(0, self.n_slots(lane) - 2) * self.batch_size
            for lane in range(self.n_lanes)
        )

    @functools.cached_property
    def _n_shared(self) -> int:
        """Super-blocks that are split evenly over the lanes."""
        return min(self.n_samples // self._super_block, min(self._lane_samples) // self.block_size)

    @functools.cached_property
    def _extra_starts(self) -> tuple[int, ...]:
        """Where each lane's part of what is not split evenly begins."""
        shared = self._n_shared * self.block_size
        return tuple(sum(s - shared for s in self._lane_samples[:lane]) for lane in range(self.n_lanes))

    @functools.cached_property
    def _permutation(self) -> Bijection:
        key = make_key(self.seed, self.epoch, _SUPER_BLOCKS)
        return Bijection(self.n_samples // self._super_block, key)

    @functools.cached_property
    def _factors(self) -> tuple[tuple[int, int], ...]:
        """The digits of a block's place in its super-block: how many values each has, and its weight."""
        factors, weight = [], self.n_lanes
        while weight > 1:
            factor = next(f for f in range(2, weight + 1) if weight % f == 0)
            weight //= factor
            factors.append((factor, weight))
        return tuple(factors)

    def _places(self, lane: int, images: _Int64s) -> _Int64s:
        """Which block of each super-block a lane takes.

        The lane's digits, the last one first, are turned by random digits of the super-block: lanes that are congruent
        modulo a divisor stay neighbours, and which samples share a lane is another draw in each epoch.
        """
        turns = self._turns(images)
        places = np.zeros_like(images)
        for factor, weight in self._factors:
            places += (lane + turns // weight) % factor * weight
            lane //= factor
        return places

    def _lane_at(self, place: int, image: int) -> int:
        """The inverse of `_places`: the lane that takes a block of a super-block."""
        (turn,) = self._turns(np.array([image], dtype=np.int64)).tolist()
        lane, radix = 0, 1
        for factor, weight in self._factors:
            lane += (place // weight - turn // weight) % factor * radix
            radix *= factor
        return lane

    def _turns(self, images: _Int64s) -> _Int64s:
        hashes = images.astype(np.uint64) ^ np.uint64(make_key(self.seed, self.epoch, _PLACES))
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(0x94D049BB133111EB)
        return (hashes >> np.uint64(33)).view(np.int64) % self.n_lanes

    @functools.cached_property
    def _images_memo(self) -> dict[tuple[int, int], _Int64s]:
        return {}

    def _images(self, first: int, stop: int) -> _Int64s:
        """Images of the super-blocks first..stop-1; the lanes ask for the same ones in turn."""
        memo = self._images_memo
        images = memo.get((first, stop))
        if images is None:
            images = self._permutation(np.arange(first, stop, dtype=np.int64))
            if len(memo) >= 4:
                memo.clear()
            memo[first, stop] = images
        return images

    def _pieces(self, start: int, stop: int, width: int, first: int, lane: int | None) -> tuple[_Int64s, _Int64s]:
        """Runs of positions start..stop-1 of a sequence of pieces: a lane's blocks of super-blocks, or all of them."""
        if start >= stop:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        q0, q1 = start // width, (stop - 1) // width + 1
        images = self._images(first + q0, first + q1)
        starts = images * self._super_block
        if lane is not None:
            starts += self._places(lane, images) * self.block_size
        lengths = np.full(q1 - q0, width, dtype=np.int64)
        starts[0] += start - q0 * width
        lengths[0] -= start - q0 * width
        lengths[-1] -= q1 * width - stop
        return starts, lengths

    def _stream(self, lane: int, start: int, stop: int) -> tuple[_Int64s, _Int64s]:
        """Runs of samples at positions start..stop-1 of a lane's stream."""
        shared = self._n_shared * self.block_size
        own = self._pieces(start, min(stop, shared), self.block_size, 0, lane)
        n_full = self.n_samples // self._super_block
        tail = (n_full - self._n_shared) * self._super_block
        shift = self._extra_starts[lane] - shared
        left, right = max(start, shared) + shift, stop + shift
        extra = self._pieces(left, min(right, tail), self._super_block, self._n_shared, None)
        rest_start = max(left, tail)
        rest = n_full * self._super_block + rest_start - tail
        rest_length = max(0, right - rest_start)
        runs = (own, extra, (np.array([rest], dtype=np.int64), np.array([rest_length], dtype=np.int64)))
        lengths = np.concatenate([r[1] for r in runs])
        return np.concatenate([r[0] for r in runs])[lengths > 0], lengths[lengths > 0]

    def _shares(self, lane: int, chunk: int) -> list[int]:
        """Samples that a chunk deals to each of its slots."""
        depth, n_slots = self.depth(lane), self.n_slots(lane)
        shares = []
        for d in range(depth):
            size = self.size((chunk + d) % n_slots * self.n_lanes + lane)
            shares.append((d + 1) * size // depth - d * size // depth)
        return shares

    def _chunk_start(self, lane: int, chunk: int) -> int:
        # Only the chunks that reach the last slot, which may not be full, differ in size.
        regular = min(chunk, max(0, self.n_slots(lane) - self.depth(lane)))
        return regular * self.batch_size + sum(sum(self._shares(lane, i)) for i in range(regular, chunk))

    def chunk(self, lane: int, chunk: int) -> Chunk:
        """Work out one chunk of a lane, `0 <= chunk < n_slots(lane)`."""
        n_slots = self.n_slots(lane)
        shares = self._shares(lane, chunk)
        slots = tuple((chunk + d) % n_slots for d in range(len(shares)))
        start = self._chunk_start(lane, chunk)
        starts, lengths = self._stream(lane, start, start + sum(shares))
        places = [_interleaved(self.size(t * self.n_lanes + lane), len(shares))[d] for d, t in enumerate(slots)]
        return Chunk(
            starts=starts,
            lengths=lengths,
            dealt=shuffled(sum(shares), make_key(self.seed, self.epoch, _CHUNK, lane, chunk)),
            slots=slots,
            bounds=tuple(sum(shares[:d]) for d in range(len(shares) + 1)),
            rows=np.concatenate(places),
        )

    def locate(self, batch: int) -> _Int64s:
        """The samples of a batch, row by row: `[size] int64`. Nothing is read."""
        lane, slot = batch % self.n_lanes, batch // self.n_lanes
        samples = np.empty(self.size(batch), dtype=np.int64)
        for d in range(self.depth(lane)):
            chunk = self.chunk(lane, (slot - d) % self.n_slots(lane))
            part = slice(chunk.bounds[d], chunk.bounds[d + 1])
            samples[chunk.rows[part]] = expand_runs(chunk.starts, chunk.lengths)[chunk.dealt[part]]
        return samples

    def find(self, sample: int) -> tuple[int, int]:
        """The inverse of `locate`: batch and row of a sample. Nothing is read."""
        lane, position = self._find_in_stream(sample)
        n_slots = self.n_slots(lane)
        index = min(position // self.batch_size, max(0, n_slots - self.depth(lane)))
        while index + 1 < n_slots and self._chunk_start(lane, index + 1) <= position:
            index += 1
        chunk = self.chunk(lane, index)
        (turn,) = np.flatnonzero(chunk.dealt == position - self._chunk_start(lane, index)).tolist()
        d = int(np.searchsorted(chunk.bounds, turn, side="right")) - 1
        return chunk.slots[d] * self.n_lanes + lane, int(chunk.rows[turn])

    def _find_in_stream(self, sample: int) -> tuple[int, int]:
        n_full, width = self.n_samples // self._super_block, self._super_block
        block, inside = divmod(sample, width)
        if block < n_full:
            (image,) = self._permutation.inverse(np.array([block], dtype=np.int64)).tolist()
            if image < self._n_shared:
                lane = self._lane_at(inside // self.block_size, block)
                return lane, image * self.block_size + inside % self.block_size
            extra = (image - self._n_shared) * width + inside
        else:
            extra = (n_full - self._n_shared) * width + sample - n_full * width
        starts = self._extra_starts
        lane = max(i for i in range(self.n_lanes) if starts[i] <= extra)
        return lane, self._n_shared * self.block_size + extra - starts[lane]


@functools.lru_cache(maxsize=8)
def _interleaved(size: int, depth: int) -> tuple[_Int64s, ...]:
    """Rows of a slot for the samples of each of its chunks, so that every part of a batch holds all of them."""
    shares = [(d + 1) * size // depth - d * size // depth for d in range(depth)]
    turn = np.concatenate([np.arange(n) for n in shares])
    chunk = np.repeat(np.arange(depth), shares)
    rows = np.empty(size, dtype=np.int64)
    rows[np.lexsort((chunk, turn))] = np.arange(size)
    return tuple(np.split(rows, np.cumsum(shares)[:-1]))
