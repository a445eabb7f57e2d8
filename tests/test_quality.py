"""Figures about batches: definitions by hand, uniform draws by simulation, speed."""

import math
import time

import numpy as np
import pytest
import torch
from test_planner import make_metadata

from saev_torch import ConfigError, ShuffledActivations, ShuffledConfig, batch_metrics
from saev_torch.order.mixing import class_mixtures, expected_distinct, expected_entropy


def make_batch(examples, tokens, **columns) -> dict[str, torch.Tensor]:
    return {"example_idx": torch.tensor(examples), "token_idx": torch.tensor(tokens)} | columns


def test_by_hand() -> None:
    md = make_metadata(n_examples=3, content_tokens_per_example=5)
    found = batch_metrics(make_batch([0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]), md)
    entropy = -(1 / 3) * math.log(1 / 3) - (2 / 3) * math.log(2 / 3)
    assert found["loader/example_entropy"] == pytest.approx(entropy)
    assert found["loader/example_entropy_normalized"] == pytest.approx(entropy / math.log(3))
    assert found["loader/example_coverage"] == pytest.approx(2 / 3)
    assert found["loader/token_entropy"] == found["loader/token_entropy_normalized"] == 0
    assert found["loader/token_coverage"] == pytest.approx(1 / 5)
    assert found["loader/token_coverage_relative"] < 0.5
    assert len(found) == 10


def test_all_samples_are_perfect() -> None:
    md = make_metadata(n_examples=7, content_tokens_per_example=5)
    everything = np.arange(35)
    found = batch_metrics(make_batch(everything // 5, everything % 5), md)
    for name in ("entropy_normalized", "coverage", "entropy_relative", "coverage_relative"):
        assert found[f"loader/example_{name}"] == pytest.approx(1)
        assert found[f"loader/token_{name}"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("n_kinds", "per_kind", "n"), [(50, 7, 40), (13000, 196, 16384), (196, 13000, 16384), (5, 4, 20)]
)
def test_a_uniform_draw_is_as_expected(n_kinds: int, per_kind: int, n: int) -> None:
    rng = np.random.default_rng(0)
    distinct, entropies = [], []
    for _ in range(200 if n < 1000 else 12):
        kinds = rng.choice(n_kinds * per_kind, n, replace=False) // per_kind
        counts = np.bincount(kinds)
        shares = counts[counts > 0] / n
        distinct.append(len(shares))
        entropies.append(-(shares * np.log(shares)).sum())
    assert expected_distinct(n_kinds, per_kind, n) == pytest.approx(np.mean(distinct), rel=0.01)
    assert expected_entropy(n_kinds, per_kind, n) == pytest.approx(np.mean(entropies), rel=0.01)


def test_special_tokens_are_no_tokens(make_shards) -> None:
    md = make_metadata(n_examples=4, content_tokens_per_example=3)
    found = batch_metrics(make_batch([0, 1, 2, 3], [-1, -1, -1, -1]), md)
    assert found["loader/example_coverage"] == 1
    assert not [name for name in found if "token" in name]
    mixed = batch_metrics(make_batch([0, 0, 2, 3], [-1, 1, -1, 2]), md)
    assert mixed["loader/token_coverage"] == pytest.approx(2 / 3)
    assert batch_metrics(make_batch([], []), md) == {}


def test_a_real_batch(make_shards) -> None:
    ds = ShuffledActivations(
        ShuffledConfig(shards=make_shards(n_examples=60), layer="all", tokens="all", batch_size=64)
    )
    for batch in ds:
        assert 0 < batch_metrics(batch, ds.metadata)["loader/example_entropy_relative"] <= 1.1


@pytest.mark.parametrize("n_examples", [13_000, 5_000_000])
def test_less_than_2_ms(n_examples: int) -> None:
    md = make_metadata(n_examples=n_examples)
    rng = np.random.default_rng(0)
    batches = [make_batch(rng.integers(0, n_examples, 16_384), rng.integers(0, 196, 16_384)) for _ in range(20)]
    times = []
    batch_metrics(batches[0], md)  # the uniform draw is worked out once
    for batch in batches:
        began = time.thread_time()
        batch_metrics(batch, md)
        times.append(time.thread_time() - began)
    # The best of them, and of the processor's time only: the machine may do other things, too.
    assert min(times) < 2e-3


def test_class_mixtures() -> None:
    md = make_metadata(n_examples=1500, max_tokens_per_shard=20_000)
    cfg = ShuffledConfig(shards="x", layer=3, batch_size=1024, buffer_size=16)
    reservoir, ours, uniform = class_mixtures(md, cfg)
    for mixture in (reservoir, ours, uniform):
        assert mixture.shares.shape == (1500 * 196 // 1024, 10)
        np.testing.assert_allclose(mixture.shares.sum(axis=1), 1)
        # Every sample once: over the epoch all classes are equally frequent, but for what is left of a last batch.
        np.testing.assert_allclose(mixture.shares.mean(axis=0), 0.1, atol=0.005)
    # A reservoir of 16 batches holds a tenth of these data, in whole shards of few classes.
    assert reservoir.distance.mean() > 0.4
    assert ours.distance.mean() < 0.12
    assert uniform.distance.mean() < 0.06
    with pytest.raises(ConfigError, match="n_classes"):
        class_mixtures(md, cfg, n_classes=0)
