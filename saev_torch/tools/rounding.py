"""What it costs to store values in another type: how far off they are, and how many were lost."""

import dataclasses

import torch

# Values at a time: they stay in the cache of the core.
_N_AT_ONCE = 1 << 15


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What became of finite values that were stored in another type; those that are zero were kept, and count as such.

    Attributes:
        old: Type that the values had.
        new: Type that they have now.
        n_values: Values, also those that are not finite.
        max_relative: Largest of |new - old| / |old|, of the values that are neither zero nor lost.
        mean_relative: Mean of the same.
        n_overflowed: Values that were too large, and became the largest number.
        n_became_zero: Values other than zero that became zero.
    """

    old: str
    new: str
    n_values: int = 0
    max_relative: float = 0.0
    mean_relative: float = 0.0
    n_overflowed: int = 0
    n_became_zero: int = 0

    def __str__(self) -> str:
        return (
            f"{self.old} to {self.new}: relative error {self.mean_relative:.3g} on average, {self.max_relative:.3g} at "
            f"most; of {self.n_values:,} values {self._share(self.n_overflowed)} overflowed, "
            f"{self._share(self.n_became_zero)} became 0"
        )

    def _share(self, n: int) -> str:
        return f"{n:,} ({100 * n / max(1, self.n_values):.3g} %)"


class RoundingMeter:
    """Adds up what becomes of values, a tensor at a time."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._n_values = self._n_measured = self._n_overflowed = self._n_became_zero = 0
        self._sum = self._max = 0.0

    def add(self, old: torch.Tensor, new: torch.Tensor, n_overflowed: int) -> None:
        """Add values as they were and as they are, of one shape, of which so many were too large."""
        self._n_values += old.numel()
        self._n_overflowed += n_overflowed
        largest = float(torch.finfo(new.dtype).max)
        for before, after in zip(*(torch.split(x.view(-1), _N_AT_ONCE) for x in (old, new)), strict=True):
            x, y = before.double(), after.double()
            became_zero = (y == 0) & (x != 0)
            is_measured = x.isfinite() & (x != 0) & ~became_zero
            if n_overflowed:
                is_measured &= ~((y.abs() == largest) & (x.abs() > largest))
            relative = ((y - x) / x).abs().masked_fill_(~is_measured, 0.0)
            self._n_became_zero += int(became_zero.sum())
            self._n_measured += int(is_measured.sum())
            self._sum += float(relative.sum())
            self._max = max(self._max, float(relative.max()))

    def read(self) -> Rounding:
        """Return what was found so far."""
        mean = self._sum / max(1, self._n_measured)
        counts = self._n_values, self._max, mean, self._n_overflowed, self._n_became_zero
        return Rounding(self._old, self._new, *counts)
