"""Seeded permutations that are the same on every machine and for every numpy version.

Two kinds: `Bijection` permutes a range of any size in constant memory, one index at a time if need be, and can be
inverted; `shuffled` draws a whole permutation of a small range at once. Both rest on raw 64-bit integers only
(numpy promises the streams of its bit generators, not those of `Generator.permutation`), and neither touches a
global random number generator.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.lazy import lazy

_N_ROUNDS = 8
_MASK = (1 << 64) - 1
_C1 = 0xBF58476D1CE4E5B9
_C2 = 0x94D049BB133111EB

_Int64s = NDArray[np.int64]
_UInt64s = NDArray[np.uint64]
_Ints = TypeVar("_Ints", _Int64s, _UInt64s)


def make_key(*parts: int) -> int:
    """Hash integers of any size and sign, in their order, into one key in [0, 2**64)."""
    key = 0x9E3779B97F4A7C15
    for part in (len(parts), *parts):
        key = _mix(key ^ (part & _MASK))
        if not 0 <= part <= _MASK:
            # The bits that the mask leaves out: no two seeds share an order.
            key = _mix(key ^ make_key(int(part < 0), abs(part) >> 64))
    return key


def _mix(x: int) -> int:
    # The finaliser of SplitMix64 (Steele, Lea, Flood 2014), on Python integers.
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * _C1) & _MASK
    x = ((x ^ (x >> 27)) * _C2) & _MASK
    return x ^ (x >> 31)


def hashed(x: _UInt64s, key: int) -> _UInt64s:
    """Hash `x [m] uint64` with a key, to `[m] uint64` whose high bits are the random ones."""
    h = x ^ np.uint64(key)
    h *= np.uint64(_C1)
    h ^= h >> np.uint64(32)
    h *= np.uint64(_C2)
    return h


def shuffled(n: int, key: int) -> _Int64s:
    """Draw a permutation of 0..n-1, for n below 2**31: `[n] int64`.

    The random bits carry the index in their low end, so no two are equal and any correct sort gives the same answer.
    """
    index_mask = np.uint64((1 << max(1, n - 1).bit_length()) - 1)
    keys: _UInt64s = np.random.PCG64(key).random_raw(n)
    keys &= ~index_mask
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= index_mask
    return keys.view(np.int64)


def divide(x: _Ints, by: Any) -> tuple[_Ints, _Ints]:
    """Quotients and remainders of `x [m]`, as `divmod`."""
    # numpy divides by one number with vector instructions, but takes remainders one by one: five times slower.
    quotients = x // by
    rest = quotients * by
    return quotients, np.subtract(x, rest, out=rest)


@dataclasses.dataclass(frozen=True)
class Bijection:
    """A pseudo-random permutation of 0..n-1 in constant memory, for a key of 64 bits.

    A Feistel network over a rectangle of `side x side >= n` cells with modular addition (the FE construction of
    Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002); values that leave the range walk on until they
    come back. The rectangle is at most `2 * side + 1` cells too large, so few walk.
    """

    n: int
    key: int

    def __call__(self, x: _Int64s) -> _Int64s:
        """Map `x [m] int64`, each in 0..n-1, to their images `[m] int64`."""
        return self._walk(x, self._encrypt)

    def inverse(self, y: _Int64s) -> _Int64s:
        """Map images `y [m] int64` back, so that `inverse(self(x)) == x`."""
        return self._walk(y, self._decrypt)

    @lazy
    def _side(self) -> np.uint64:
        return np.uint64(math.isqrt(max(0, self.n - 1)) + 1)

    @lazy
    def _keys(self) -> list[int]:
        return [make_key(self.key, i) for i in range(_N_ROUNDS)]

    def _walk(self, x: _Int64s, step: Callable[[_UInt64s], _UInt64s]) -> _Int64s:
        out = step(x.astype(np.uint64))
        (outside,) = np.nonzero(out >= self.n)
        while outside.size:
            moved = step(out[outside])
            out[outside] = moved
            outside = outside[moved >= self.n]
        return out.view(np.int64)

    def _round(self, half: _UInt64s, i: int) -> _UInt64s:
        h = hashed(half, self._keys[i])
        h ^= h >> np.uint64(29)
        return divide(h, self._side)[1]

    def _reduced(self, x: _UInt64s) -> _UInt64s:
        # Of what is below twice the side. Below zero, whole numbers begin again at the largest.
        less: _UInt64s = x - self._side
        return np.minimum(x, less, out=less)

    def _encrypt(self, x: _UInt64s) -> _UInt64s:
        left, right = divide(x, self._side)
        for i in range(_N_ROUNDS):
            left, right = right, self._reduced(left + self._round(right, i))
        return left * self._side + right

    def _decrypt(self, y: _UInt64s) -> _UInt64s:
        left, right = divide(y, self._side)
        for i in reversed(range(_N_ROUNDS)):
            left, right = self._reduced(right + self._side - self._round(left, i)), left
        return left * self._side + right
