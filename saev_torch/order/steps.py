"""What one reading process does, in which order: still integer arithmetic only.

With R ranks and W workers, reader (r, w) owns the batches `r + R * (w + W * t)` of the sequence, so it serves the
lanes that are congruent to it modulo gcd(R * W, n_lanes). It reads only the rows that its own batches need.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from saev_torch.order.runs import Chunk
from saev_torch.order.shuffle import OrderedPlan, ShufflePlan

__all__ = ["N_COLUMNS", "Load", "Share", "Step", "advise_lanes", "count_open_slots", "make_steps", "slot_nbytes"]

_ALIGN = 64
N_COLUMNS = 4
"""Columns of a batch beside its activations, at most."""


@dataclasses.dataclass(frozen=True)
class Share:
    """The batches that one reader owns: `range(first, stop, stride)` of the padded sequence.

    Numbers from `n_batches` on repeat the sequence from its start.

    Attributes:
        first: First batch.
        stride: Ranks times workers.
        stop: Batches of the padded sequence.
    """

    first: int
    stride: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Load:
    """A chunk to read, and which of its samples are wanted.

    Attributes:
        chunk: The chunk.
        targets: `(batch, d)`: the samples that the chunk deals to its d-th slot go to this batch.
    """

    chunk: Chunk
    targets: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """Chunks to read together, and the batches that are complete after it.

    Attributes:
        loads: Chunks to read.
        batches: Batches to hand out, in this order.
        sizes: Samples in each of them.
        fills: Lanes whose part of the buffer is full after it, for the first time.
    """

    loads: tuple[Load, ...]
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    fills: int


def make_steps(plan: ShufflePlan | OrderedPlan, share: Share) -> Iterator[Step]:
    """Yield the steps of one reader, in order.

    Args:
        plan: The order of samples.
        share: The batches that the reader owns.

    Yields:
        Steps; over all of them, each owned batch once.
    """
    n = plan.n_batches
    for start in range(share.first // n * n if n else share.stop, share.stop, max(1, n)):
        begin = max(share.first, start + (share.first - start) % share.stride)
        own = range(begin - start, min(share.stop - start, n), share.stride)
        if len(own):
            yield from _ordered(plan, own, start) if isinstance(plan, OrderedPlan) else _shuffled(plan, own, start)


def count_open_slots(plan: ShufflePlan | OrderedPlan, share: Share, buffer_size: int) -> int:
    """Batches that a reader may hold at a time: its part of the buffer."""
    if isinstance(plan, OrderedPlan):
        return min(3, max(2, buffer_size))
    turns = max(plan.depth(lane) for lane in range(plan.n_lanes)) + plan.reads_lanes_together
    return -(-turns * plan.n_lanes // share.stride) + (0 if plan.reads_lanes_together else 2)


def slot_nbytes(batch_size: int, sample_nbytes: int) -> int:
    """Size of the memory that holds any batch of a selection, in bytes."""
    act = -(-batch_size * sample_nbytes // _ALIGN) * _ALIGN
    return act + N_COLUMNS * 8 * batch_size


def _ordered(plan: OrderedPlan, own: range, offset: int) -> Iterator[Step]:
    for batch in own:
        size = plan.size(batch)
        rows = np.arange(size, dtype=np.int64)
        start = np.array([batch * plan.batch_size], dtype=np.int64)
        chunk = Chunk(start, np.array([size], dtype=np.int64), rows, (batch,), (0, size), rows)
        yield Step((Load(chunk, ((offset + batch, 0),)),), (offset + batch,), (size,), 0)


def _shuffled(plan: ShufflePlan, own: range, offset: int) -> Iterator[Step]:
    n_lanes = plan.n_lanes
    apart = own.step // math.gcd(own.step, n_lanes)
    slots: dict[int, range] = {}
    for batch in own[: n_lanes // math.gcd(own.step, n_lanes)]:
        lane = batch % n_lanes
        slots[lane] = range(batch // n_lanes, (own[-1] - lane) // n_lanes + 1, apart)

    def wanted(lane: int, chunk: int, low: int, high: int) -> Iterator[Load]:
        part = plan.chunk(lane, chunk)
        targets = tuple(
            (offset + slot * n_lanes + lane, d)
            for d, slot in enumerate(part.slots)
            if low <= slot < high and slot in slots[lane]
        )
        if targets:
            yield Load(part, targets)

    for turn in range(own[0] // n_lanes, own[-1] // n_lanes + 1):
        batches = tuple(b for b in range(turn * n_lanes, (turn + 1) * n_lanes) if b in own)
        new = [lane for lane, mine in slots.items() if mine[0] == turn]
        alone = len(new) == len(batches)
        # The first lane alone, so that the first batch comes early; then the others together, in larger reads.
        for lanes in filter(None, (new[:1], new[1:])):
            depth = max(plan.depth(lane) for lane in lanes)
            done = tuple(turn * n_lanes + lane for lane in lanes) if alone else ()
            for back in reversed(range(depth)):
                loads = tuple(
                    load
                    for lane in lanes
                    if back < plan.depth(lane)
                    for load in wanted(lane, (turn - back) % plan.n_slots(lane), turn, turn + plan.depth(lane))
                )
                last = done if back == 0 else ()
                if loads or last:
                    sizes = tuple(plan.size(b) for b in last)
                    yield Step(loads, tuple(offset + b for b in last), sizes, len(lanes) if back == 0 else 0)
        if new and len(new) == len(batches):
            batches = ()
        loads = ()
        for lane, mine in sorted(slots.items()):
            if mine[0] < turn < plan.n_slots(lane):
                depth = plan.depth(lane)
                # A chunk that was read around the end, when the lane was filled, has dealt to the slots open then.
                seen = turn >= plan.n_slots(lane) + mine[0] - depth + 1
                low = max(turn, mine[0] + depth) if seen else turn
                loads += tuple(wanted(lane, turn, low, turn + depth))
            done = tuple(b for b in batches if b % n_lanes <= lane)
            if done and not plan.reads_lanes_together:
                yield Step(loads, tuple(offset + b for b in done), tuple(plan.size(b) for b in done), 0)
                loads, batches = (), batches[len(done) :]
        if loads or batches:
            yield Step(loads, tuple(offset + b for b in batches), tuple(plan.size(b) for b in batches), 0)


def advise_lanes(plan: ShufflePlan | OrderedPlan, share: Share) -> str | None:
    """Say what would avoid that lanes are read by several readers; None where it is so already."""
    if isinstance(plan, OrderedPlan) or plan.n_lanes % share.stride == 0 or plan.n_lanes < plan.max_lanes:
        return None
    good = [n for n in range(1, plan.n_lanes + 1) if plan.n_lanes % n == 0]
    return (
        f"n_lanes: {share.stride} reading processes (ranks x workers) do not divide {plan.n_lanes} lanes, so each lane "
        f"is read by several of them; the order is the same, at more reads. Use one of {good} reading processes, or "
        f"n_lanes={share.stride}."
    )
