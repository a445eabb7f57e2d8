import dataclasses
import hashlib
import itertools
import os
import signal
import threading

import numpy as np
import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saev_torch.order import permute
from saev_torch.order.runs import choose_block_size, expand_runs
from saev_torch.order.shuffle import OrderedPlan, ShufflePlan

many = settings(deadline=None, max_examples=100)
few = settings(many, max_examples=50)


def order(plan: plans.Plan) -> np.ndarray:
    return np.concatenate([plan.locate(batch) for batch in range(plan.n_batches)] or [np.zeros(0, dtype=np.int64)])


@pytest.mark.parametrize(
    ("fields", "golden"),
    [
        ((100, 7, 3, 8, None, 17, 0), "5f9ab86fa68713ee"),
        ((3000, 16, 64, 8, None, 17, 0), "3bc534384ebe1542"),
        ((3000, 16, 64, 8, None, 17, 1), "cae43fe11583ebaa"),
        ((50_000, 100, 16, 4, 5, 0, 2), "57facf21b1bacd1a"),
    ],
)
def test_golden_orders(fields, golden):
    """A change would silently turn every resumed run into another one: it needs a new version of the state."""
    whole = order(ShufflePlan(*fields)).astype("<i8").tobytes()
    assert hashlib.sha256(whole).hexdigest()[:16] == golden


@few
@given(plans.any_plans())
def test_every_sample_once(plan):
    sizes = [len(plan.locate(batch)) for batch in range(plan.n_batches)]
    assert sizes == [plan.size(batch) for batch in range(plan.n_batches)]
    assert sizes[:-1] == [plan.batch_size] * (len(sizes) - 1)
    assert np.array_equal(np.sort(order(plan)), np.arange(plan.n_samples))


@many
@given(plans.any_plans(), st.data())
def test_find_is_the_inverse(plan, data):
    if plan.n_samples:
        sample = data.draw(st.integers(0, plan.n_samples - 1))
        batch, row = plan.find(sample)
        assert plan.locate(batch)[row] == sample


@many
@given(plans.shuffle_plans())
def test_lanes_and_depths_fit_the_buffer(plan):
    assert plan.max_lanes % plan.n_lanes == 0
    depths = [plan.depth(lane) for lane in range(plan.n_lanes)]
    assert all(1 <= depth <= max(1, plan.n_turns(lane)) for lane, depth in enumerate(depths))
    assert sum(depths) <= max(plan.buffer_size, 1)
    assert sum(plan.n_turns(lane) for lane in range(plan.n_lanes)) == plan.n_batches


@many
@given(plans.shuffle_plans(), st.data())
def test_chunks_deal_evenly(plan, data):
    lane = data.draw(st.integers(0, plan.n_lanes - 1))
    if not plan.n_turns(lane):
        return
    chunk = plan.chunk(lane, data.draw(st.integers(0, plan.n_turns(lane) - 1)))
    assert np.array_equal(np.sort(chunk.dealt), np.arange(chunk.lengths.sum()))
    assert (chunk.lengths > 0).all()
    assert len(chunk.turns) == plan.depth(lane) == len(set(chunk.turns))
    for turn, n in zip(chunk.turns, np.diff(chunk.bounds), strict=True):
        assert abs(n - plan.size(turn * plan.n_lanes + lane) / plan.depth(lane)) < 1


def test_the_order_is_a_function_of_the_fields():
    """Batches are the same whether or not those before them were worked out."""
    plan = ShufflePlan(5000, 16, 64, 8, None, 17, 0)
    wanted = [plan.locate(batch).tolist() for batch in range(plan.n_batches)]
    for batch in (200, 5, 5, plan.n_batches - 1, 0):
        fresh = dataclasses.replace(plan)
        assert fresh.locate(batch).tolist() == wanted[batch]


@pytest.mark.parametrize("name", ["seed", "epoch"])
def test_seeds_and_epochs_matter(name):
    plan = ShufflePlan(5000, 16, 64, 8, None, 17, 0)
    drawn = [order(dataclasses.replace(plan, **{name: value})) for value in range(4)]
    for one, other in itertools.combinations(drawn, 2):
        assert (one == other).sum() <= 10


def test_data_that_fit_the_buffer_are_mixed_whole():
    """Every sample may come in every batch: over many seeds all do, about equally often."""
    n_samples, batch_size, n_seeds = 40, 8, 300
    counts = np.zeros((n_samples, n_samples // batch_size))
    for seed in range(n_seeds):
        plan = ShufflePlan(n_samples, batch_size, 64, 8, None, seed, 0)
        for batch in range(plan.n_batches):
            counts[plan.locate(batch), batch] += 1
    # 60 are expected, with a standard deviation of 7.
    assert counts.min() > 30
    assert counts.max() < 90


def test_rows_of_a_batch_are_in_no_order():
    plan = ShufflePlan(200_000, 1000, 64, 8, None, 17, 0)
    for batch in (0, 57, 199):
        samples = plan.locate(batch)
        assert abs(np.corrcoef(samples, np.arange(1000))[0, 1]) < 0.15
        assert (np.diff(samples) == 1).sum() < 30
        # Every part of a batch is a sample of the whole of it.
        for part in np.split(samples, 4):
            assert abs(part.mean() - samples.mean()) < 4 * samples.std() / np.sqrt(250)


@many
@given(st.integers(1, 50_000), st.integers(1, 70))
def test_block_sizes_keep_the_mixing(batch_size, depth):
    size = choose_block_size(batch_size, depth)
    assert 1 <= size <= max(1, batch_size // 64)
    # The share of distinct blocks in a batch is what the size was chosen for.
    assert size == 1 or (depth / size) * (1 - (1 - 1 / depth) ** size) > 0.34


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 5)), max_size=20))
def test_expand_runs(runs):
    starts, lengths = (np.array([run[i] for run in runs], dtype=np.int64) for i in (0, 1))
    assert expand_runs(starts, lengths).tolist() == [x for s, n in runs for x in range(s, s + n)]


def test_ordered_batches_are_slices():
    plan = OrderedPlan(10, 4)
    assert [plan.locate(i).tolist() for i in range(plan.n_batches)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [plan.find(i) for i in (0, 5, 9)] == [(0, 0), (1, 1), (2, 1)]
    assert OrderedPlan(0, 4).n_batches == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_is_forked_while_a_plan_is_worked_out_works_out_its_own(monkeypatch):
    """Locks are inherited as they are."""
    plan = ShufflePlan(1000, 10, 8, 2, None, 0, 0)
    begun, go_on, real, main = threading.Event(), threading.Event(), permute.make_key, threading.current_thread()

    def slow(*parts):
        if threading.current_thread() is not main:
            begun.set()
            go_on.wait(60)
        return real(*parts)

    monkeypatch.setattr(permute, "make_key", slow)
    thread = threading.Thread(target=lambda: plan._streams._permutation._keys)
    thread.start()
    begun.wait(60)
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        os._exit(len(dataclasses.replace(plan).locate(0)))
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 10
