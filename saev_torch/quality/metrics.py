"""How well a batch is mixed: entropy and coverage of its examples and tokens, and what a uniform draw would give."""

import functools
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.metadata import Metadata

__all__ = ["batch_metrics", "expected_distinct", "expected_entropy"]


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


def batch_metrics(batch: Mapping[str, torch.Tensor], metadata: Metadata) -> dict[str, float]:
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
        per_token = metadata.n_examples * n_layers
        found |= _describe("token", content, metadata.content_tokens_per_example, per_token)
    return found


def _describe(name: str, numbers: NDArray[np.int64], n_kinds: int, per_kind: int) -> dict[str, float]:
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


def _count(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each of the numbers occurs that do."""
    highest = int(numbers.max())
    if highest <= 4 * len(numbers):
        counts = np.bincount(numbers)
        return counts[counts > 0]
    # Not an array as long as the data set has examples.
    ordered = np.sort(numbers)
    return np.diff(np.flatnonzero(np.diff(ordered, prepend=-1, append=highest + 1)))
