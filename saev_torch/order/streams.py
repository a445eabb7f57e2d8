"""The stream of each lane: which samples it reads, one block after the other.

The samples, in file order, are cut into *super-blocks* of one block for each lane, and those are permuted, anew in each
epoch. Each lane takes one block of each. What does not divide evenly goes to the ends of the lanes' streams.

Which block that is: the digits of the lane's number, the last one first, rotated by random digits of the super-block.
So lanes that are congruent modulo a divisor stay neighbours on disk, and which samples share a lane is another draw in
each epoch.
"""

import bisect
import dataclasses
import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.lazy import lazy
from saev_torch.order.permute import Bijection, hashed, make_key

_Int64s = NDArray[np.int64]
_Runs = tuple[_Int64s, _Int64s]

SUPER_BLOCKS, CHUNKS, BLOCKS, UNIFORM, WEIGHTED = 1, 2, 3, 4, 5
"""What a key is for: no two draws of an epoch share one."""


@dataclasses.dataclass(frozen=True)
class Streams:
    """The streams of all lanes, of `lengths` samples: together, every sample once."""

    n_samples: int
    block_size: int
    lengths: tuple[int, ...]
    seed: int
    epoch: int

    @lazy
    def _super_size(self) -> int:
        """Samples in a super-block."""
        return len(self.lengths) * self.block_size

    @lazy
    def _n_shared(self) -> int:
        """Super-blocks of which each lane takes one block."""
        return min(self.n_samples // self._super_size, min(self.lengths) // self.block_size)

    @lazy
    def _extra_starts(self) -> list[int]:
        """Where each lane's part of what is not split evenly begins."""
        shared = self._n_shared * self.block_size
        return list(itertools.accumulate((length - shared for length in self.lengths[:-1]), initial=0))

    @lazy
    def _permutation(self) -> Bijection:
        return Bijection(self.n_samples // self._super_size, make_key(self.seed, self.epoch, SUPER_BLOCKS))

    @lazy
    def _digits(self) -> list[tuple[int, int]]:
        """The digits of a block's number in its super-block: how many values each has, and its weight."""
        digits, weight = [], len(self.lengths)
        while weight > 1:
            base = next(b for b in range(2, weight + 1) if weight % b == 0)
            weight //= base
            digits.append((base, weight))
        return digits

    def runs(self, lane: int, start: int, stop: int) -> _Runs:
        """Samples at positions start..stop-1 of a lane's stream: first sample and length of each run of them."""
        shared = self._n_shared * self.block_size
        own = self._cut(start, min(stop, shared), lane)
        # Where the lane is in the sequence of what is not split evenly: whole super-blocks, then less than one.
        shift = self._extra_starts[lane] - shared
        left, right = max(start, shared) + shift, stop + shift
        n_whole = (self._permutation.n - self._n_shared) * self._super_size
        whole = self._cut(left, min(right, n_whole), None)
        rest = max(left, n_whole)
        last = [rest + self._n_shared * self._super_size], [max(0, right - rest)]
        starts, lengths = (np.concatenate(parts) for parts in zip(own, whole, last, strict=True))
        return starts[lengths > 0], lengths[lengths > 0]

    def _cut(self, start: int, stop: int, lane: int | None) -> _Runs:
        """Positions start..stop-1 of a lane's blocks, or with no lane of the super-blocks that are left whole."""
        if start >= stop:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        width, skipped = (self._super_size, self._n_shared) if lane is None else (self.block_size, 0)
        first, last = start // width, (stop - 1) // width + 1
        supers = _images(self._permutation, skipped + first, skipped + last)
        starts = supers * self._super_size
        if lane is not None:
            starts += self._blocks(lane, supers) * self.block_size
        lengths = np.full(last - first, width, dtype=np.int64)
        starts[0] += start - first * width
        lengths[0] -= start - first * width
        lengths[-1] -= last * width - stop
        return starts, lengths

    def find(self, sample: int) -> tuple[int, int]:
        """The lane that a sample belongs to, and its position in the lane's stream."""
        shared = self._n_shared * self.block_size
        number, inside = divmod(sample, self._super_size)
        if number < self._permutation.n:
            (position,) = self._permutation.inverse(np.array([number], dtype=np.int64)).tolist()
            if position < self._n_shared:
                lane = self._lane(inside // self.block_size, number)
                return lane, position * self.block_size + inside % self.block_size
            number = position
        extra = (number - self._n_shared) * self._super_size + inside
        lane = bisect.bisect_right(self._extra_starts, extra) - 1
        return lane, shared + extra - self._extra_starts[lane]

    def _rotations(self, supers: _Int64s) -> _Int64s:
        key = make_key(self.seed, self.epoch, BLOCKS)
        return (hashed(supers.astype(np.uint64), key) >> np.uint64(33)).view(np.int64) % len(self.lengths)

    def _blocks(self, lane: int, supers: _Int64s) -> _Int64s:
        """The block that a lane takes of each of the super-blocks `[m] int64`: `[m] int64`."""
        rotations = self._rotations(supers)
        blocks = np.zeros_like(supers)
        for base, weight in self._digits:
            blocks += (lane + rotations // weight) % base * weight
            lane //= base
        return blocks

    def _lane(self, block: int, super_block: int) -> int:
        """The inverse of `_blocks`: the lane that takes a block of a super-block."""
        (rotation,) = self._rotations(np.array([super_block], dtype=np.int64)).tolist()
        lane, radix = 0, 1
        for base, weight in self._digits:
            lane += (block // weight - rotation // weight) % base * radix
            radix *= base
        return lane


@functools.lru_cache(maxsize=16)
def _images(permutation: Bijection, first: int, stop: int) -> _Int64s:
    """Images of first..stop-1, kept because the lanes ask for the same ones in turn."""
    images = permutation(np.arange(first, stop, dtype=np.int64))
    images.setflags(write=False)
    return images
