"""The uniform order: one permutation of all samples, by its own laws and against a uniform draw."""

import dataclasses
import itertools
import json

import contracts
import numpy as np
import pytest
from factory import Spec

from saev_torch import ConfigError, ShuffledActivations, ShuffledConfig, StateError
from saev_torch.format.metadata import Metadata
from saev_torch.order.mixing import expected_distinct
from saev_torch.order.predict import predict
from saev_torch.order.uniform import UniformPlan

SPEC = Spec(n_examples=60, content_tokens=7, layers=(3, 7), examples_per_shard=9)


def cfg_of(shards, **fields):
    return ShuffledConfig(**{"shards": shards, "layer": 3, "batch_size": 16, "order": "uniform", **fields})


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 1000, 4099])
def test_one_permutation_cut_into_batches(n):
    plans = [UniformPlan(n, 16, seed, epoch) for seed, epoch in itertools.product((17, 18), (0, 1))]
    orders = [np.concatenate([plan.locate(batch) for batch in range(plan.n_batches)]) for plan in plans]
    for plan, order in zip(plans, orders, strict=True):
        assert np.array_equal(np.sort(order), np.arange(n))
        for row in range(0, n, max(1, n // 50)):
            assert plan.find(int(order[row])) == divmod(row, 16)
    if n >= 1000:
        for a, b in itertools.combinations(orders, 2):
            # One agreement is expected; more than ten come once in 10**8.
            assert (a == b).sum() <= 10


def test_the_order_is_the_same_for_ever():
    """A state of today means the same batch in later versions."""
    assert UniformPlan(1000, 8, 17, 0).locate(3).tolist() == [442, 220, 882, 582, 718, 775, 4, 978]
    assert UniformPlan(2_000_000_000, 4, 17, 5).locate(499_999_999).tolist() == [
        705818078,
        1763517694,
        669431617,
        1682770777,
    ]


def test_it_is_as_uniform_as_a_draw():
    """Distinct examples in a batch, and the places of samples, as a uniform permutation has them."""
    n_examples, per_example, size = 500, 20, 1000
    plan = UniformPlan(n_examples * per_example, size, 17, 0)
    batches = [plan.locate(batch) // per_example for batch in range(plan.n_batches)]
    found = np.array([len(np.unique(batch)) for batch in batches])
    rng = np.random.default_rng(0)
    drawn = np.array([len(np.unique(rng.permutation(plan.n_samples)[:size] // per_example)) for _ in range(1000)])
    assert abs(found.mean() - expected_distinct(n_examples, per_example, size)) < 3 * drawn.std() / len(found) ** 0.5
    # Chi-square of where the samples of each tenth of the data come, over seeds: 81 degrees of freedom.
    chi = []
    for seed in range(50):
        order = np.concatenate([UniformPlan(10_000, 1000, seed, 0).locate(batch) for batch in range(10)])
        table = np.histogram2d(order, np.arange(10_000), bins=10)[0]
        chi.append(((table - 100) ** 2 / 100).sum())
    # Rows and columns have fixed sums, and draws are without replacement: the mean is 81 * n / (n - 1).
    assert abs(np.mean(chi) - 81) < 3 * (2 * 81 / 50) ** 0.5


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_take_turns(make_shards, workers, world_size):
    cfg = cfg_of(make_shards(SPEC))
    whole = list(ShuffledActivations(cfg))
    contracts.check_epoch(whole, SPEC, cfg)
    wanted = (whole + whole)[: -(-len(whole) // world_size) * world_size]
    for rank in range(world_size):
        data_set = ShuffledActivations(cfg, rank=rank, world_size=world_size)
        loader = contracts.DataLoader(data_set, batch_size=None, num_workers=workers)
        contracts.assert_same(list(loader), wanted[rank::world_size])


@pytest.mark.slow
def test_every_cut_resumes_and_locates(make_shards):
    cfg = cfg_of(make_shards(SPEC), ignore_labels=[2])
    data_set = ShuffledActivations(cfg)
    whole = list(data_set)
    contracts.check_epoch(whole, SPEC, cfg)
    for cut in range(len(whole)):
        state = json.loads(json.dumps(ShuffledActivations(cfg).state_dict(n_batches=cut)))
        # What only matters to a buffer does not matter here.
        other = ShuffledActivations(dataclasses.replace(cfg, buffer_size=7, n_lanes=3))
        other.load_state_dict(state)
        contracts.assert_same(list(other), whole[cut:])
        located = data_set.locate(cut, epoch=0)
        for key, column in located.items():
            assert np.array_equal(column, whole[cut][key])
        example, token = (int(whole[cut][key][5]) for key in ("example_idx", "token_idx"))
        assert data_set.find(example, token, epoch=0) == (cut, 5)


def test_states_of_the_other_order_are_refused(make_shards):
    cfg = cfg_of(make_shards(SPEC))
    other = dataclasses.replace(cfg, order="blocks")
    with pytest.raises(StateError, match=r"order: expected 'shuffled', got 'uniform'"):
        ShuffledActivations(other).load_state_dict(ShuffledActivations(cfg).state_dict())
    with pytest.raises(StateError, match=r"order: expected 'uniform', got 'shuffled'"):
        ShuffledActivations(cfg).load_state_dict(ShuffledActivations(other).state_dict())


@pytest.mark.parametrize("order", ["blocked", None, 1, True])
def test_another_order_is_refused(tmp_path, order):
    with pytest.raises(ConfigError, match=r"ShuffledConfig\.order: expected 'blocks' or 'uniform', got"):
        cfg_of(tmp_path, order=order)


def test_the_planner_knows_it(make_shards):
    md = Metadata.load(make_shards(Spec(n_examples=200, content_tokens=100, d_model=64, examples_per_shard=50)))
    cfg = ShuffledConfig(layer=3, batch_size=256, buffer_size=64, order="uniform")
    uniform, blocks = predict(md, cfg), predict(md, dataclasses.replace(cfg, order="blocks"))
    assert uniform.quality == 1.0
    assert uniform.distinct_examples == expected_distinct(200, 100, 256)
    assert uniform.memory_nbytes < 0.2 * blocks.memory_nbytes
    plan = UniformPlan(20_000, 256, 17, 0)
    # Rows of 256 bytes: 64 of them may be read over.
    gaps = np.concatenate([np.diff(np.sort(plan.locate(batch))) - 1 for batch in range(plan.n_batches - 1)])
    over = gaps[gaps <= 64].sum() / (plan.n_batches - 1) / 256
    assert uniform.read_per_byte == pytest.approx(1 + over, rel=0.05)


def test_data_that_memory_cannot_hold_are_warned_of(make_shards, monkeypatch, caplog):
    shards = make_shards(SPEC)
    list(ShuffledActivations(cfg_of(shards)))
    assert not caplog.records
    monkeypatch.setattr("saev_torch.reading.direct.memory", lambda: (1 << 30, 1000))
    with caplog.at_level("WARNING", "saev_torch"):
        list(ShuffledActivations(cfg_of(shards)))
    (record,) = caplog.records
    assert "order: expected data that memory can hold" in record.getMessage()
    assert "order='blocks'" in record.getMessage()
    with caplog.at_level("WARNING", "saev_torch"):
        list(ShuffledActivations(cfg_of(shards, order="blocks")))
    assert len(caplog.records) == 1
