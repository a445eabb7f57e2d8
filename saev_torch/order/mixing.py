"""How well batches are mixed: entropy and coverage of examples and tokens, and classes over an epoch."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.config import ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.metadata import Metadata
from saev_torch.order.shuffle import ShufflePlan

_Int64s = NDArray[np.int64]


@functools.lru_cache(maxsize=64)
def _hypergeometric(population: int, marked: int, n: int) -> NDArray[np.float64]:
    """Probability that a draw of n without replacement holds k of the marked, for each k from 0 to min(marked, n)."""
    marked, n = min(marked, population), min(n, population)
    low, high = max(0, n - (population - marked)), min(marked, n)

    def choose(total: int, part: int) -> float:
        return math.lgamma(total + 1) - math.lgamma(part + 1) - math.lgamma(total - part + 1)

    k = np.arange(low, high, dtype=np.float64)
    ratios = np.log((marked - k) * (n - k)) - np.log((k + 1) * (population - marked - n + k + 1))
    first = choose(marked, low) + choose(population - marked, n - low) - choose(population, n)
    logs = first + np.concatenate(([0.0], np.cumsum(ratios)))
    probabilities = np.zeros(high + 1)
    # The logarithms of huge factorials lose digits; what they lose is the same for all k.
    probabilities[low:] = np.exp(logs - logs.max())
    probabilities /= probabilities.sum()
    probabilities.setflags(write=False)
    return probabilities


def expected_distinct(n_kinds: int, per_kind: int, n: int) -> float:
    """Distinct kinds expected in a uniform draw of n without replacement, of `n_kinds` kinds of `per_kind` each."""
    return n_kinds * (1 - float(_hypergeometric(n_kinds * per_kind, per_kind, n)[0]))


@functools.lru_cache(maxsize=64)
def expected_entropy(n_kinds: int, per_kind: int, n: int) -> float:
    """Entropy of kinds, in nats, expected in a uniform draw of n without replacement."""
    probabilities = _hypergeometric(n_kinds * per_kind, per_kind, n)
    k = np.arange(1, len(probabilities))
    n = min(n, n_kinds * per_kind)
    return math.log(n) - n_kinds / n * float(probabilities[1:] @ (k * np.log(k)))


def batch_metrics(batch: Mapping[str, Any], metadata: Metadata) -> dict[str, float]:
    """Measure how well a batch is mixed.

    The first six are defined as in `saev`: entropy in nats of the shares that examples (content tokens) have in the
    batch; the same divided by the logarithm of how many there are; and the share of them that occurs. A small batch of
    many examples cannot reach 1, so each has a second form with `_relative`: divided by what a uniform draw without
    replacement of as many samples of the data set would give on average.

    Args:
        batch: A batch; only `example_idx`, `token_idx` and, if it is there, `layer` are looked at.
        metadata: Metadata of the shards.

    Returns:
        `loader/example_entropy`, `loader/example_entropy_normalized`, `loader/example_coverage`,
        `loader/example_entropy_relative`, `loader/example_coverage_relative`, and the same with `token`. Special tokens
        are not among the tokens; a batch of nothing else has no `token` figures.
    """
    examples, tokens = batch["example_idx"].numpy(force=True), batch["token_idx"].numpy(force=True)
    if not len(examples):
        return {}
    content = tokens[tokens >= 0]
    n_layers = len(metadata.layers) if "layer" in batch else 1
    per_example = (metadata.content_tokens_per_example if len(content) else 0) + (len(content) < len(tokens))
    found = _describe("example", examples, metadata.n_examples, per_example * n_layers)
    if len(content):
        found |= _describe("token", content, metadata.content_tokens_per_example, metadata.n_examples * n_layers)
    return found


def _describe(name: str, numbers: _Int64s, n_kinds: int, per_kind: int) -> dict[str, float]:
    n = len(numbers)
    counts = _count(numbers)
    # A sum and no product of vectors, for which BLAS would wake its threads.
    entropy = max(0.0, math.log(n) - float((counts * np.log(counts)).sum()) / n)
    uniform_entropy = expected_entropy(n_kinds, per_kind, n)
    return {
        f"loader/{name}_entropy": entropy,
        # Of one kind only, any batch is perfectly mixed.
        f"loader/{name}_entropy_normalized": entropy / math.log(n_kinds) if n_kinds > 1 else 1.0,
        f"loader/{name}_coverage": len(counts) / n_kinds,
        f"loader/{name}_entropy_relative": entropy / uniform_entropy if uniform_entropy > 1e-12 else 1.0,
        f"loader/{name}_coverage_relative": len(counts) / expected_distinct(n_kinds, per_kind, n),
    }


def _count(numbers: _Int64s) -> _Int64s:
    """How often each of the numbers occurs that do."""
    if numbers.max() > 4 * len(numbers):
        # Not an array as long as the data set has examples.
        return np.unique(numbers, return_counts=True)[1]
    counts = np.bincount(numbers)
    return counts[counts > 0]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Classes in the full batches of an epoch; `shares` are `[n_batches, n_classes] float64`."""

    name: str
    shares: NDArray[np.float64]

    @property
    def distance(self) -> NDArray[np.float64]:
        """Total variation distance of each batch from the data set, `[n_batches] float64`: 0 alike, 1 disjoint."""
        distances: NDArray[np.float64] = np.abs(self.shares - self.shares.mean(axis=0)).sum(axis=1) / 2
        return distances


def class_mixtures(md: Metadata, cfg: ShuffledConfig, n_classes: int = 10, seed: int = 0) -> list[Mixture]:
    """Follow the classes over one epoch of content tokens of one layer, with examples stored in order of their class.

    Found are the published loader's documented scheme (the order of shards is shuffled, their samples go through one
    reservoir of `buffer_size` batches, from which batches are drawn at random), ours, and a uniform permutation.
    Classes have equally many examples. `seed` is that of what is not ours.
    """
    if not 1 <= n_classes <= md.n_examples:
        raise ConfigError(f"n_classes: expected 1 to {md.n_examples}, the examples, got {n_classes}.")
    per_example = md.content_tokens_per_example
    n, size = md.n_examples * per_example, cfg.batch_size
    if n < size:
        raise ConfigError(f"batch_size: expected at most {n}, the samples of a layer, got {size}; no batch is full.")
    rng = np.random.Generator(np.random.PCG64(seed))
    plan = ShufflePlan(n, size, cfg.buffer_size, cfg.n_lanes, cfg.block_size, cfg.seed, 0)
    permutation = rng.permutation(n)

    def follow(name: str, batches: Iterable[_Int64s]) -> Mixture:
        classes = (samples // per_example * n_classes // md.n_examples for samples in batches)
        shares = [np.bincount(found, minlength=n_classes) / size for found in classes]
        return Mixture(name, np.array(shares).reshape(-1, n_classes))

    return [
        follow("shards shuffled, one reservoir", _reservoir(md, size, cfg.buffer_size, rng)),
        follow("saev_torch", map(plan.locate, range(n // size))),
        follow("uniform permutation", permutation[: n // size * size].reshape(-1, size)),
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
