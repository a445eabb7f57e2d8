"""Plans of any kind, drawn at random, and a reader that carries out steps on paper."""

from fractions import Fraction

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from saev_torch.order.mixture import MixedSource, MixturePlan, Weights
from saev_torch.order.runs import expand_runs
from saev_torch.order.selection import Selection
from saev_torch.order.shuffle import OrderedPlan, ShufflePlan
from saev_torch.order.steps import Plan, Share, count_open_slots, make_steps
from saev_torch.order.uniform import UniformPlan
from saev_torch.reading.extents import make_sample_extents


@st.composite
def shuffle_plans(draw: st.DrawFn) -> ShufflePlan:
    batch_size = draw(st.sampled_from([1, 2, 3, 7, 16, 64, 100]))
    n_samples = draw(st.integers(0, min(3000, 120 * batch_size)))
    return ShufflePlan(
        n_samples=n_samples,
        batch_size=batch_size,
        buffer_size=draw(st.sampled_from([1, 2, 3, 8, 10, 16, 64, 65])),
        max_lanes=draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12])),
        wished_block_size=draw(st.sampled_from([None, None, 1, 2, 5, 16, 1000])),
        seed=draw(st.integers(0, 5)),
        epoch=draw(st.integers(0, 3)),
    )


@st.composite
def any_plans(draw: st.DrawFn) -> Plan:
    if draw(st.integers(0, 3)):
        return draw(shuffle_plans())
    n_samples, batch_size = draw(st.integers(0, 300)), draw(st.sampled_from([1, 3, 16, 1000]))
    if draw(st.booleans()):
        return OrderedPlan(n_samples, batch_size)
    return UniformPlan(n_samples, batch_size, draw(st.integers(0, 5)), draw(st.integers(0, 3)))


@st.composite
def mixture_plans(draw: st.DrawFn, until: str) -> MixturePlan:
    batch_size = draw(st.sampled_from([1, 2, 3, 7, 16, 64]))
    sources, weights = [], []
    for _ in range(draw(st.integers(1, 4))):
        weights.append(Fraction(draw(st.sampled_from([1, 1, 2, 3, 5, 10, 0.1, 0.7, 1 / 3]))))
        n_samples = draw(st.sampled_from([1, 2, 5, 30]) | st.integers(1, 40 * batch_size))
        source = MixedSource(
            n_samples=n_samples,
            n_rows=draw(st.integers(1, batch_size)),
            order=draw(st.sampled_from(["blocks", "blocks", "uniform"])),
            buffer_size=draw(st.sampled_from([1, 2, 3, 8, 10, 16, 64])),
            max_lanes=draw(st.sampled_from([1, 2, 3, 4, 8])),
            wished_block_size=draw(st.sampled_from([None, None, 1, 2, 5, 100])),
            seed=draw(st.integers(0, 5)),
        )
        sources.append(source)
    shared = Weights.of(weights)
    n_rows = shared.n_rows([source.n_samples for source in sources], until)
    # Not more than some 150 batches, so that a case takes milliseconds.
    assume(n_rows <= 150 * batch_size)
    return MixturePlan(n_rows, batch_size, shared, tuple(sources), draw(st.integers(0, 3)))


@st.composite
def shares(draw: st.DrawFn, plan: Plan) -> list[Share]:
    """The shares of all readers of a job, from any batch on, padded to as many batches for each rank."""
    n_ranks, n_workers = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 2), (3, 1), (8, 1), (4, 2), (2, 5)]))
    start = draw(st.just(0) | st.integers(0, plan.n_batches))
    stop = start + -(-(plan.n_batches - start) // n_ranks) * n_ranks
    stride = n_ranks * n_workers
    return [
        Share(start + rank + n_ranks * worker, stride, stop) for rank in range(n_ranks) for worker in range(n_workers)
    ]


def count_reads(selection: Selection, plan: Plan, share: Share) -> tuple[int, int, int]:
    """Work out what a reader reads: how many reads, their bytes, and the bytes that are used."""
    n_reads = n_bytes = n_used = 0
    for step in make_steps(plan, share):
        wanted = [np.empty(0, dtype=np.int64)]
        for load in step.loads:
            samples, bounds = expand_runs(load.chunk.starts, load.chunk.lengths), load.chunk.bounds
            wanted += [samples[load.chunk.dealt[bounds[d] : bounds[d + 1]]] for _, d in load.targets]
        cells = selection.cells(np.sort(np.concatenate(wanted)))
        for extents in make_sample_extents(selection, cells, np.zeros_like(cells)):
            n_reads += len(extents.nbytes)
            n_bytes += int(extents.nbytes.sum())
            n_used += len(cells) * selection.md.row_nbytes
    return n_reads, n_bytes, n_used


def carry_out(plan: Plan, share: Share, one_by_one: bool = False) -> tuple[dict[int, np.ndarray], list[int], int]:
    """Carry out the steps of a reader.

    Returns:
        The samples of each batch row by row, the batches in the order they were handed out in, and how many were open
        at most.
    """
    filled: dict[int, np.ndarray] = {}
    order: list[int] = []
    n_open = 0
    for step in make_steps(plan, share, one_by_one):
        for load in step.loads:
            chunk = load.chunk
            samples = expand_runs(chunk.starts, chunk.lengths)
            assert len(samples) == len(chunk.dealt) == len(chunk.rows) == chunk.bounds[-1]
            assert len(chunk.bounds) == len(chunk.turns) + 1
            for batch, d in load.targets:
                size = plan.size(batch % plan.n_batches)
                rows = filled.setdefault(batch, np.full(size, -1, dtype=np.int64))
                part = slice(chunk.bounds[d], chunk.bounds[d + 1])
                assert (rows[chunk.rows[part]] == -1).all(), "a row filled twice"
                rows[chunk.rows[part]] = samples[chunk.dealt[part]]
        n_open = max(n_open, len(filled) - len(order))
        for batch in step.batches:
            assert len(filled[batch]) == plan.size(batch % plan.n_batches)
            assert (filled[batch] >= 0).all(), "handed out before it was full"
            order.append(batch)
    return filled, order, n_open


def check_readers(plan: Plan, shares: list[Share]) -> None:
    """Check that all readers together make the sequence: each batch by one, as `locate` has it, in bounded memory."""
    found: dict[int, np.ndarray] = {}
    for share in shares:
        filled, order, n_open = carry_out(plan, share)
        assert order == list(range(share.first, share.stop, share.stride))
        assert filled.keys() == set(order)
        assert not found.keys() & filled.keys()
        found |= filled
        if isinstance(plan, ShufflePlan):
            singly, order_then, n_open_then = carry_out(plan, share, one_by_one=True)
            assert order_then == order
            assert all(np.array_equal(singly[batch], samples) for batch, samples in filled.items())
            assert n_open_then <= 1
        if order:
            assert n_open <= count_open_slots(plan, share, getattr(plan, "buffer_size", 64))
    start = min(share.first for share in shares)
    assert sorted(found) == list(range(start, shares[0].stop))
    for batch, samples in found.items():
        assert samples.tolist() == plan.locate(batch % plan.n_batches).tolist()
