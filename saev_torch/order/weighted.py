"""Samples drawn with replacement, in proportion to the weights of their labels."""

import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ConfigError
from saev_torch.order.permute import hashed, make_key
from saev_torch.order.streams import WEIGHTED
from saev_torch.order.uniform import UniformPlan

_Int64s = NDArray[np.int64]

# Candidates for each sample of a batch, at most.
_MAX_DRAWN = 1000


class WeightedDraw:
    """Draws by rejection, so that nothing has to be counted, and any batch is drawn without the others.

    Candidates are drawn from all samples alike, and each stays with the probability of its weight divided by the
    largest.

    Args:
        weights: Weights from 0.0 on, by label; -1 stands for special tokens. Labels that are not named weigh 1.0.
        labels_of: Reads the labels of samples: `[m] int64` to `[m] int64`.

    Raises:
        ConfigError: A bad label or weight.
    """

    def __init__(self, weights: Mapping[int, float], labels_of: Callable[[_Int64s], _Int64s]) -> None:
        by_label = {**dict.fromkeys(range(-1, 256), 1.0), **weights}
        is_right = all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in by_label.values())
        if len(by_label) != 257 or not is_right or not max(by_label.values()):
            raise ConfigError(
                "label_weights: expected finite weights from 0.0 on, not all of them 0, by labels from 0 to 255, or -1 "
                f"for special tokens, got {dict(weights)!r}."
            )
        # The last entry is that of -1, as numpy counts.
        self._shares = np.array([by_label[label] for label in (*range(256), -1)], dtype=np.float64)
        self._shares /= self._shares.max()
        self._labels_of = labels_of
        self.digest = hashlib.sha256(self._shares.astype("<f8").tobytes()).hexdigest()[:16]

    def __call__(self, plan: UniformPlan, batch: int) -> _Int64s:
        """Draw a batch: `[size] int64`. A `ConfigError` where nearly no sample has a weight."""
        key, size = make_key(plan.seed, plan.epoch, WEIGHTED, batch), plan.size(batch)
        found, n_drawn = np.empty(0, dtype=np.int64), 0
        while len(found) < size:
            if n_drawn >= _MAX_DRAWN * size:
                raise ConfigError(
                    f"label_weights: expected samples whose weight is not far below the largest, got {len(found)} of "
                    f"{n_drawn} that were drawn; choose labels that occur more often, or weights nearer to each other."
                )
            numbers = np.arange(n_drawn, n_drawn + 2 * size, dtype=np.uint64)
            n_drawn += len(numbers)
            samples = (_random(numbers, key, 0) % np.uint64(plan.n_samples)).view(np.int64)
            chances = (_random(numbers, key, 1) >> np.uint64(11)) / 2**53
            found = np.append(found, samples[chances < self._shares[self._labels_of(samples)]])
        return found[:size]


def _random(numbers: NDArray[np.uint64], key: int, stream: int) -> NDArray[np.uint64]:
    """64 random bits for each number, of one of several streams."""
    bits = hashed(hashed(numbers, make_key(key, stream, 0)), make_key(key, stream, 1))
    bits ^= bits >> np.uint64(29)
    return bits
