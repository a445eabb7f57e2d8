"""Which examples of a directory to use, as a small value that configs hold and files keep."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from saev_torch.errors import ConfigError

_MAX_EXAMPLE = 1 << 48


def _is_integer(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(least <= value <= most)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Which examples to use. Make one by `span`, `fraction` or `only`; a config takes it as `examples`.

    Attributes:
        kind: "span", "fraction" or "only".
        bounds: Start and stop (-1 for the end), or low and high, or starts and stops of ranges in turn.
        seed: Seed of a fraction.
    """

    kind: str
    bounds: tuple[int | float, ...]
    seed: int = 0

    @classmethod
    def span(cls, start: int, stop: int | None = None) -> "Examples":
        """The examples `start` to `stop - 1`; without `stop` to the end.

        Raises:
            ConfigError: They are no such integers.
        """
        is_right = _is_integer(start, 0, _MAX_EXAMPLE) and (stop is None or _is_integer(stop, start + 1, _MAX_EXAMPLE))
        if not is_right:
            raise ConfigError(f"Examples.span: expected integers 0 <= start < stop, got {start!r} and {stop!r}.")
        return cls("span", (int(start), -1 if stop is None else int(stop)))

    @classmethod
    def fraction(cls, low: float, high: float, seed: int = 0) -> "Examples":
        """A share of the examples, `low` to `high` of 0.0 to 1.0, drawn by hashing their numbers.

        Fractions of one seed that do not overlap share no example, and together they are all. Which examples belong to
        one does not change when others are added behind them.

        Raises:
            ConfigError: They are no such numbers.
        """
        is_right = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (low, high))
        if not is_right or not 0 <= low < high <= 1:
            raise ConfigError(f"Examples.fraction: expected 0.0 <= low < high <= 1.0, got {low!r} and {high!r}.")
        if not _is_integer(seed):
            raise ConfigError(f"Examples.fraction: seed: expected an integer, got {seed!r}.")
        return cls("fraction", (float(low), float(high)), int(seed))

    @classmethod
    def only(cls, numbers: Iterable[int]) -> "Examples":
        """These examples, in the order of the disk; their numbers may come in any order, and more than once.

        Raises:
            ConfigError: There are none, or they are no integers from 0 on.
        """
        given = np.asarray(numbers if isinstance(numbers, np.ndarray) else list(numbers))
        is_list = given.size > 0 and given.ndim == 1 and given.dtype.kind in "iu"
        if not is_list or given.min() < 0 or given.max() > _MAX_EXAMPLE:
            raise ConfigError(
                f"Examples.only: expected numbers of examples, integers from 0 on, got {str(numbers)[:100]}; name at "
                "least one."
            )
        sorted_ = np.unique(given.astype(np.int64))
        heads = np.flatnonzero(np.diff(sorted_, prepend=-2) != 1)
        tails = np.append(heads[1:], len(sorted_)) - 1
        return cls("only", tuple(np.stack((sorted_[heads], sorted_[tails] + 1), axis=1).ravel().tolist()))

    def to_dict(self) -> dict[str, Any]:
        """As a dict of JSON's types; `from_dict` takes it back."""
        return {"kind": self.kind, "bounds": list(self.bounds), "seed": self.seed}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Examples":
        """Make one of what `to_dict` returned.

        Raises:
            ConfigError: It is something else.
        """
        try:
            kind, bounds, seed = fields["kind"], list(fields["bounds"]), fields.get("seed", 0)
            if kind == "span" and len(bounds) == 2:
                return cls.span(bounds[0], None if bounds[1] == -1 else bounds[1])
            if kind == "fraction" and len(bounds) == 2:
                return cls.fraction(bounds[0], bounds[1], seed)
            starts, stops = bounds[::2], bounds[1::2]
            is_right = all(_is_integer(x, 0, _MAX_EXAMPLE) for x in bounds) and bounds == sorted(set(bounds))
            if kind == "only" and starts and len(starts) == len(stops) and is_right:
                return cls("only", tuple(bounds))
        except (KeyError, TypeError, AttributeError):
            pass
        raise ConfigError(f"examples: expected what Examples.to_dict() returned, got {str(fields)[:100]}.")

    def __str__(self) -> str:
        shown = ", ".join(str(x) for x in self.bounds[:6]) + (", ..." if len(self.bounds) > 6 else "")
        return f"Examples.{self.kind}({shown})"

    __repr__ = __str__
