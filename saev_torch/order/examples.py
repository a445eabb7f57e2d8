"""Which examples a config selects: a range, a fraction that is drawn by hashing, or a list; arithmetic only.

`Examples` is what a config holds. `Subset` is what it means for a number of examples: which are members, how many come
before one, and which is the k-th, without a table of them all.

A fraction is drawn within *groups* of 64 examples, counted from the first: each group is permuted with a key of its
own, and an example belongs to the fraction by its place there. So an example is in or out whatever else the data hold,
and how many of a group are in is known without looking at them. The bounds fall between two places; which of the two
is drawn for each group, so that a fraction is met on average however small it is.
"""

import abc
import dataclasses

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ConfigError
from saev_torch.format.examples import Examples
from saev_torch.order.lazy import lazy
from saev_torch.order.permute import hashed, make_key

_Int64s = NDArray[np.int64]

_GROUP = 64
_GROUPS_AT_ONCE = 1 << 14
_FRACTION = 6
# Of each byte: how many bits are set, and the place of its k-th.
_BYTES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_BIT_COUNTS = _BYTES.sum(axis=1).astype(np.int64)
_BIT_PLACES = np.argsort(_BYTES == 0, axis=1, kind="stable")


class Subset(abc.ABC):
    """Members among the examples 0..n_examples-1; they are counted from 0 in ascending order.

    Attributes:
        n: Number of members.
    """

    n: int

    @abc.abstractmethod
    def members(self, ordinals: _Int64s) -> _Int64s:
        """The members of these numbers, `[m] int64`, each from 0 to n - 1: `[m] int64`."""

    @abc.abstractmethod
    def ordinals(self, examples: _Int64s) -> _Int64s:
        """The inverse: the numbers of examples `[m] int64`; -1 for those that are no members."""


@dataclasses.dataclass(frozen=True)
class Ranges(Subset):
    """Ranges of examples, ascending and apart from each other: `[m] int64` starts and stops."""

    starts: _Int64s
    stops: _Int64s

    @lazy
    def _before(self) -> _Int64s:
        return np.append(0, np.cumsum(self.stops - self.starts))

    @property
    def n(self) -> int:  # type: ignore[override]
        """Number of members."""
        return int(self._before[-1])

    def members(self, ordinals: _Int64s) -> _Int64s:
        """See `Subset`."""
        which = np.searchsorted(self._before, ordinals, side="right") - 1
        found: _Int64s = self.starts[which] + ordinals - self._before[which]
        return found

    def ordinals(self, examples: _Int64s) -> _Int64s:
        """See `Subset`."""
        which = np.searchsorted(self.starts, examples, side="right") - 1
        is_in = (which >= 0) & (examples < self.stops[which])
        return np.where(is_in, examples - self.starts[which] + self._before[which], -1)


class Fraction(Subset):
    """The fraction from `low` to `high` of `n_examples`; see the module."""

    def __init__(self, low: float, high: float, seed: int, n_examples: int) -> None:
        self._bounds, self._key, self._n_examples = (low, high), make_key(seed, _FRACTION), n_examples
        n_groups = -(-n_examples // _GROUP)
        # Which places of a group are members, as bits from the lowest, is worked out when it is asked for.
        self._masks, self._is_known = np.zeros(n_groups, dtype=np.uint64), np.zeros(n_groups, dtype=np.bool_)
        self._before = np.zeros(n_groups + 1, dtype=np.int64)
        for start in range(0, n_groups, _GROUPS_AT_ONCE):
            groups = np.arange(start, min(n_groups, start + _GROUPS_AT_ONCE), dtype=np.int64)
            lows, highs = self._places(groups)
            self._before[groups + 1] = highs - lows
        if n_examples % _GROUP:
            self._before[-1] = int(_count_bits(self._find_masks(np.array([n_groups - 1]))).sum())
        np.cumsum(self._before, out=self._before)
        self.n = int(self._before[-1])

    def _places(self, groups: _Int64s) -> list[NDArray[np.int64]]:
        """Where the bounds fall in each group: at the place below or the one above, by chance."""
        bits = hashed(hashed(groups.astype(np.uint64), make_key(self._key, 0)), make_key(self._key, 1))
        chances = (bits >> np.uint64(11)) / 2**53
        return [(bound * _GROUP + chances).astype(np.int64) for bound in self._bounds]

    def _find_masks(self, groups: _Int64s) -> NDArray[np.uint64]:
        """The members of each group, as bits: `[m] uint64`."""
        for start in range(0, len(groups), _GROUPS_AT_ONCE):
            part = groups[start : start + _GROUPS_AT_ONCE]
            new = np.unique(part[~self._is_known[part]])
            if len(new):
                self._masks[new] = self._make_masks(new)
                # Last, as other threads may look.
                self._is_known[new] = True
        return self._masks[groups]

    def _make_masks(self, groups: _Int64s) -> NDArray[np.uint64]:
        keys = hashed(hashed(groups.astype(np.uint64), make_key(self._key, 2)), make_key(self._key, 3))
        keys ^= keys >> np.uint64(31)
        places = np.tile(np.arange(_GROUP, dtype=np.uint16), (len(groups), 1))
        # Each step is one to one on 6 bits: an odd factor, a shift of the origin, and high bits into low ones.
        for step in range(4):
            bits = (keys >> np.uint64(12 * step)).astype(np.uint16)[:, None]
            places *= bits << np.uint16(1) | np.uint16(1)
            places += bits >> np.uint16(6)
            places &= np.uint16(_GROUP - 1)
            places ^= places >> np.uint16(3)
        lows, highs = (x.astype(np.uint16)[:, None] for x in self._places(groups))
        is_member = (places >= lows) & (places < highs)
        is_member &= groups[:, None] * _GROUP + np.arange(_GROUP) < self._n_examples
        return np.packbits(is_member, axis=1, bitorder="little").view("<u8").ravel().astype(np.uint64)

    def members(self, ordinals: _Int64s) -> _Int64s:
        """See `Subset`."""
        groups = np.searchsorted(self._before, ordinals, side="right") - 1
        counts = _BIT_COUNTS[self._find_masks(groups).astype("<u8").view(np.uint8).reshape(-1, 8)]
        ends = np.cumsum(counts, axis=1)
        left = ordinals - self._before[groups]
        # The byte in which the wanted bit is, and which bit of the byte.
        which = (ends <= left[:, None]).sum(axis=1)
        at = np.arange(len(groups))
        left = left - (ends - counts)[at, which]
        masks = self._masks[groups].astype("<u8").view(np.uint8).reshape(-1, 8)
        found: _Int64s = groups * _GROUP + which * 8 + _BIT_PLACES[masks[at, which], left]
        return found

    def ordinals(self, examples: _Int64s) -> _Int64s:
        """See `Subset`."""
        groups, places = np.divmod(examples, _GROUP)
        masks, bits = self._find_masks(groups), np.uint64(1) << places.astype(np.uint64)
        return np.where(masks & bits, self._before[groups] + _count_bits(masks & (bits - np.uint64(1))), -1)


def _count_bits(masks: NDArray[np.uint64]) -> _Int64s:
    found: _Int64s = _BIT_COUNTS[masks.astype("<u8").view(np.uint8).reshape(-1, 8)].sum(axis=1)
    return found


def make_subset(examples: Examples, n_examples: int) -> Subset:
    """What is selected of so many examples.

    Raises:
        ConfigError: It names examples that are not there, or selects none.
    """
    if examples.kind == "fraction":
        low, high = examples.bounds
        found: Subset = Fraction(low, high, examples.seed, n_examples)
    else:
        bounds = np.array([n_examples if x == -1 else x for x in examples.bounds], dtype=np.int64)
        if bounds[-1] > n_examples or bounds[0] >= n_examples:
            raise ConfigError(
                f"examples: expected numbers below {n_examples}, the examples in the data, got {examples}; name others."
            )
        found = Ranges(bounds[::2], bounds[1::2])
    if not found.n:
        raise ConfigError(f"examples: expected that some of {n_examples} are selected, got none by {examples}.")
    return found
