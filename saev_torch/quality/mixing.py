"""How classes mix over an epoch when the examples are stored class by class: ours, a reservoir, and a permutation.

Only numbers of samples are drawn; nothing is read.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from saev_torch.config import ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.metadata import Metadata
from saev_torch.plan import ShufflePlan

__all__ = ["Mixture", "class_mixtures"]

_Int64s = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Classes of the batches of an epoch.

    Attributes:
        name: What made the batches.
        shares: `[n_batches, n_classes] float64`, share of each class in each full batch.
    """

    name: str
    shares: NDArray[np.float64]

    @property
    def distance(self) -> NDArray[np.float64]:
        """Total variation distance of each batch from the data set, `[n_batches] float64`: 0 alike, 1 disjoint."""
        whole = self.shares.mean(axis=0)
        distances: NDArray[np.float64] = np.abs(self.shares - whole).sum(axis=1) / 2
        return distances


def class_mixtures(md: Metadata, cfg: ShuffledConfig, n_classes: int = 10, seed: int = 0) -> list[Mixture]:
    """Follow the classes over one epoch of content tokens of one layer, with examples stored in order of their class.

    Args:
        md: Metadata of the shards.
        cfg: Batch size, buffer size, lanes and seed.
        n_classes: Classes, of equally many examples.
        seed: Seed of what is not ours.

    Returns:
        The published loader's documented scheme (the order of shards is shuffled, their samples go through one
        reservoir of `buffer_size` batches, from which batches are drawn at random), ours, and a uniform permutation.

    Raises:
        ConfigError: There are fewer examples than classes.
    """
    if not 1 <= n_classes <= md.n_examples:
        raise ConfigError(f"n_classes: expected 1 to {md.n_examples}, the examples, got {n_classes}.")
    per_example = md.content_tokens_per_example
    n, size = md.n_examples * per_example, cfg.batch_size
    rng = np.random.Generator(np.random.PCG64(seed))
    plan = ShufflePlan.make(n, size, cfg.buffer_size, cfg.n_lanes, cfg.block_size, cfg.seed, 0)
    permutation = rng.permutation(n)
    schemes: list[tuple[str, Iterator[_Int64s]]] = [
        ("shards shuffled, one reservoir", _reservoir(md, size, cfg.buffer_size, rng)),
        ("saev_torch", (plan.locate(i) for i in range(n // size))),
        ("uniform permutation", (permutation[i * size : (i + 1) * size] for i in range(n // size))),
    ]

    def count(samples: _Int64s) -> NDArray[np.float64]:
        classes = samples // per_example * n_classes // md.n_examples
        return np.bincount(classes, minlength=n_classes) / len(samples)

    return [
        Mixture(name, np.array([count(batch) for batch in batches]).reshape(-1, n_classes)) for name, batches in schemes
    ]


def _reservoir(md: Metadata, batch_size: int, buffer_size: int, rng: np.random.Generator) -> Iterator[_Int64s]:
    """Full batches drawn from a reservoir that is filled shard by shard."""
    per_shard = md.examples_per_shard * md.content_tokens_per_example
    n = md.n_examples * md.content_tokens_per_example
    shards = rng.permutation(-(-n // per_shard))
    stream = np.concatenate([np.arange(i * per_shard, min(n, (i + 1) * per_shard)) for i in shards])
    held, rest = stream[: batch_size * buffer_size].copy(), stream[batch_size * buffer_size :]
    while len(held) >= batch_size:
        rng.shuffle(held)
        yield held[:batch_size]
        held = np.concatenate((held[batch_size:], rest[:batch_size]))
        rest = rest[batch_size:]
