"""The sampler for random access: every sample once, ranks, states, weights by label, and constant memory."""

import itertools
import json
import resource
import time

import factory
import numpy as np
import pytest
import torch
from factory import Spec
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    IndexedConfig,
    IndexedDataset,
    ShuffledActivations,
    ShuffledConfig,
    StateError,
    UniformBatches,
)

SPEC = Spec(n_examples=60, content_tokens=7, layers=(3, 7), examples_per_shard=9)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 5), (10, 5), (11, 5), (1000, 7)])
def test_every_sample_once_in_each_epoch(n, size, drop_last):
    batches = UniformBatches(n, size, drop_last=drop_last)
    epochs = [list(batches) for _ in range(2)]
    for epoch in epochs:
        assert len(epoch) == len(batches) == (n // size if drop_last else -(-n // size))
        found = np.concatenate([np.empty(0, dtype=np.int64), *epoch])
        assert len(np.unique(found)) == len(found) == (n // size * size if drop_last else n)
        assert not len(found) or (found.min() >= 0 and found.max() < n)
    if n == 1000:
        assert not np.array_equal(epochs[0][0], epochs[1][0])
    batches.set_epoch(0)
    assert [b.tolist() for b in batches] == [b.tolist() for b in epochs[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_the_uniform_order(make_shards, workers):
    """The same batches as `order="uniform"` has, so that one run can change from one to the other."""
    shards = make_shards(SPEC)
    wanted = list(ShuffledActivations(ShuffledConfig(shards, layer=3, batch_size=16, order="uniform")))
    data_set = IndexedDataset(IndexedConfig(shards, layer=3))
    loader = DataLoader(data_set, batch_sampler=UniformBatches(len(data_set), 16), num_workers=workers)
    got = list(loader)
    assert len(got) == len(loader) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        for key in ("act", "example_idx", "token_idx"):
            assert torch.equal(a[key], b[key])


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_take_turns(monkeypatch, world_size, drop_last):
    whole = [b.tolist() for b in UniformBatches(1000, 64, drop_last=drop_last)]
    n = len(whole) // world_size if drop_last else -(-len(whole) // world_size)
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        batches = UniformBatches(1000, 64, drop_last=drop_last)
        assert [b.tolist() for b in batches] == (whole + whole)[rank::world_size][:n]
        assert len(batches) == n


@pytest.mark.slow
def test_every_cut_resumes():
    whole = [b.tolist() for b in itertools.chain(*itertools.repeat(UniformBatches(100, 16), 2))]
    for cut in range(len(whole)):
        batches = UniformBatches(100, 16)
        iterator = itertools.chain(batches, batches)
        assert [next(iterator).tolist() for _ in range(cut)] == whole[:cut]
        state = json.loads(json.dumps(batches.state_dict()))
        other = UniformBatches(100, 16)
        other.load_state_dict(state)
        assert [b.tolist() for b in itertools.chain(other, other)][: len(whole) - cut] == whole[cut:][:14]


def test_a_state_counts_what_was_taken(make_shards):
    """Workers ask ahead, so only the consumer knows."""
    data_set = IndexedDataset(IndexedConfig(make_shards(SPEC), layer=3))
    batches = UniformBatches(len(data_set), 16)
    iterator = iter(DataLoader(data_set, batch_sampler=batches, num_workers=2))
    for _ in range(3):
        next(iterator)
    state = batches.state_dict(n_batches=3)
    rest = [b["example_idx"].tolist() for b in iterator]
    other = UniformBatches(len(data_set), 16)
    other.load_state_dict(state)
    got = [b["example_idx"].tolist() for b in DataLoader(data_set, batch_sampler=other)]
    assert got == rest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n: expected an integer from 1"),
        ({"n": 1.5}, "n: expected an integer"),
        ({"batch_size": 0}, "batch_size: expected an integer from 1"),
        ({"seed": None}, "seed: expected an integer"),
        ({"drop_last": 1}, "drop_last: expected True or False"),
        ({"label_weights": {1: 2.0}}, "n: expected the IndexedDataset, because of label_weights"),
    ],
)
def test_bad_arguments(fields, message):
    with pytest.raises(ConfigError, match=message):
        UniformBatches(**{"n": 10, "batch_size": 2, **fields})


@pytest.mark.parametrize(
    "weights", [{300: 1.0}, {1: -1.0}, {1: float("nan")}, {1: "x"}, dict.fromkeys(range(-1, 256), 0)]
)
def test_bad_weights(make_shards, weights):
    data_set = IndexedDataset(IndexedConfig(make_shards(SPEC), layer=3))
    with pytest.raises(ConfigError, match="label_weights: expected finite weights from 0"):
        UniformBatches(data_set, 4, label_weights=weights)


def test_states_of_others_are_refused():
    state = UniformBatches(100, 16).state_dict()
    for other, what in ((UniformBatches(101, 16), "n: expected 101"), (UniformBatches(100, 16, seed=3), "seed")):
        with pytest.raises(StateError, match=what):
            other.load_state_dict(state)
    for broken in (None, {}, {**state, "epoch": -1}, {**state, "batch": 10**12}, {**state, "epoch": "1"}):
        with pytest.raises(StateError, match="state: "):
            UniformBatches(100, 16).load_state_dict(broken)


def test_labels_are_drawn_by_their_weights(make_shards):
    """Against the labels themselves: each class in proportion to its weight and size, within 4 standard errors."""
    spec = Spec(n_examples=60, content_tokens=7, layers=(3,), examples_per_shard=9)
    data_set = IndexedDataset(IndexedConfig(make_shards(spec), layer=3, tokens="all"))
    weights = {-1: 2.0, 0: 0.0, 3: 5.0}
    batches = UniformBatches(data_set, 200, label_weights=weights)
    drawn = np.concatenate([b for _ in range(40) for b in batches])
    labels = np.concatenate([np.full((60, 1), -1), factory.oracle_labels(spec)], axis=1).ravel()
    weight = np.array([weights.get(label, 1.0) for label in labels.tolist()])
    counts = np.bincount(drawn, minlength=len(labels))
    assert len(drawn) == 40 * len(labels)
    assert not counts[labels == 0].any()
    for label in np.unique(labels):
        p = weight[labels == label].sum() / weight.sum()
        error = (p * (1 - p) / len(drawn)) ** 0.5
        assert abs(counts[labels == label].sum() / len(drawn) - p) <= 4 * error, label
    # With replacement: a sample comes again in one epoch.
    assert max(np.bincount(np.concatenate(list(batches)))) > 1
    # Seeded: the same again, and for any rank.
    again = UniformBatches(data_set, 200, label_weights=weights)
    assert np.concatenate(list(again)).tolist() == drawn[: len(labels)].tolist()


def test_labels_that_do_not_occur(make_shards):
    data_set = IndexedDataset(IndexedConfig(make_shards(SPEC), layer=3))
    batches = UniformBatches(data_set, 4, label_weights={**dict.fromkeys(range(-1, 256), 0.0), 255: 1.0})
    with pytest.raises(ConfigError, match="label_weights: expected samples whose weight"):
        next(iter(batches))
    bare = IndexedDataset(IndexedConfig(make_shards(Spec(labels=False)), layer=3))
    with pytest.raises(ConfigError, match="label_weights: expected labels"):
        UniformBatches(bare, 4, label_weights={1: 2.0})


def test_two_billion_samples_in_constant_memory():
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    first = next(iter(UniformBatches(2_000_000_000, 16384)))
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert len(np.unique(first)) == 16384


def test_integers_of_numpy_are_integers():
    of_numpy = UniformBatches(np.int64(100), np.int32(7), seed=np.uint8(3))
    plain = UniformBatches(100, 7, seed=3)
    assert of_numpy.state_dict() == json.loads(json.dumps(of_numpy.state_dict())) == plain.state_dict()
    assert all(np.array_equal(*pair) for pair in zip(of_numpy, plain, strict=True))
