import collections

import plans
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saev_torch.order.shuffle import OrderedPlan, ShufflePlan
from saev_torch.order.steps import Share, count_open_slots, make_steps

many = settings(deadline=None, max_examples=60)


@many
@given(plans.any_plans(), st.data())
def test_all_readers_together_make_the_sequence(plan, data):
    """From any batch on and padded: each batch by one reader, as `locate` has it, in order, in bounded memory."""
    plans.check_readers(plan, data.draw(plans.shares(plan)))


@many
@given(plans.shuffle_plans(), st.data())
def test_each_lane_is_filled_once_in_a_pass(plan, data):
    for share in data.draw(plans.shares(plan)):
        if share.stop <= plan.n_batches:
            lanes = {batch % plan.n_lanes for batch in range(share.first, share.stop, share.stride)}
            assert sum(step.fills for step in make_steps(plan, share)) == len(lanes)


@pytest.mark.parametrize("n_workers", [1, 2, 4, 8])
def test_whole_lanes_are_read_once(n_workers):
    """Where the readers divide the lanes, a chunk is read by one reader; twice at most, around the lane's end."""
    plan = ShufflePlan(20_000, 16, 64, 8, None, 17, 0)
    visits = collections.Counter()
    for worker in range(n_workers):
        for step in make_steps(plan, Share(worker, n_workers, plan.n_batches)):
            visits.update({tuple(load.chunk.starts[:1].tolist()) + load.chunk.turns: 1 for load in step.loads})
    n_chunks = sum(plan.n_turns(lane) for lane in range(plan.n_lanes))
    assert len(visits) == n_chunks
    assert sum(visits.values()) <= n_chunks + sum(plan.depth(lane) - 1 for lane in range(plan.n_lanes))


@pytest.mark.parametrize("n_workers", [1, 2, 4, 8])
def test_memory_of_the_job_does_not_grow_with_workers(n_workers):
    plan = ShufflePlan(20_000, 16, 64, 8, None, 17, 0)
    shares = [Share(worker, n_workers, plan.n_batches) for worker in range(n_workers)]
    assert sum(count_open_slots(plan, share, 64) for share in shares) <= 64 + 2 * n_workers


def test_resuming_reads_about_one_buffer():
    """Before the first batch from the middle of an epoch, not more is read than from its start."""
    plan = ShufflePlan(200_000, 16, 64, 8, None, 17, 0)
    n_read = []
    for first in (0, 5000):
        samples = 0
        for step in make_steps(plan, Share(first, 1, plan.n_batches)):
            for load in step.loads:
                samples += sum(load.chunk.bounds[d + 1] - load.chunk.bounds[d] for _, d in load.targets)
            if step.batches:
                break
        n_read.append(samples)
    assert max(n_read) <= plan.buffer_size * plan.batch_size


@pytest.mark.parametrize("plan", [OrderedPlan(0, 3), ShufflePlan(0, 3, 64, 8, None, 17, 0)])
def test_no_samples(plan):
    assert list(make_steps(plan, Share(0, 1, 0))) == []


def test_nothing_owned():
    plan = ShufflePlan(10, 10, 64, 8, None, 17, 0)
    assert list(make_steps(plan, Share(3, 8, 1))) == []
