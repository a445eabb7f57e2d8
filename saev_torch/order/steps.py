"""What one reading process does, in which order: still integer arithmetic only.

With R ranks and W workers, reader (r, w) owns the batches `r + R * (w + W * t)` of the sequence, so it serves the
lanes that are congruent to it modulo gcd(R * W, n_lanes). It reads only the rows that its own batches need.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from saev_torch.order.mixture import CutUniformPlan, MixturePlan, Pass, make_pass
from saev_torch.order.runs import Chunk
from saev_torch.order.shuffle import OrderedPlan, ShuffledBatches, ShufflePlan
from saev_torch.order.uniform import UniformPlan

Plan: TypeAlias = OrderedPlan | ShufflePlan | UniformPlan | MixturePlan
"""The order of one epoch."""

ALIGN = 64
"""Behind the activations of a batch, its columns begin at a multiple of so many bytes."""

N_COLUMNS = 6
"""Columns of a batch beside its activations, at most."""


@dataclasses.dataclass(frozen=True)
class Share:
    """The batches that one reader owns: `range(first, stop, stride)` of the padded sequence.

    The stride is ranks times workers. Numbers from `n_batches` on repeat the sequence from its start.
    """

    first: int
    stride: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Load:
    """A chunk to read, and its targets `(batch, d)`: what it deals to its d-th turn goes to this batch."""

    chunk: Chunk
    targets: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """Chunks to read together, and the batches to hand out after it, in this order.

    `fills` counts the lanes whose part of the buffer is full after it, for the first time.
    """

    loads: tuple[Load, ...]
    batches: tuple[int, ...]
    fills: int


N_ONE_BY_ONE = 3
"""Batches that are open at a time where each is read by itself: one that is read, one before, and one behind it."""


def make_steps(plan: Plan, share: Share, one_by_one: bool = False, finds_order: bool = False) -> Iterator[Step]:
    """Yield the steps of one reader, in order: over all of them, each owned batch once.

    With `one_by_one` the batches of a plan with a buffer are the same, but each has a step of its own, and needs none;
    where it `finds_order`, too, its samples are in one in which neighbours on disk follow each other.
    """
    n = plan.n_batches
    for start in range(share.first // n * n if n else share.stop, share.stop, max(1, n)):
        begin = max(share.first, start + (share.first - start) % share.stride)
        own = range(begin - start, min(share.stop - start, n), share.stride)
        if len(own):
            yield from _make_steps(plan, own, start, one_by_one, finds_order)


def _make_steps(
    plan: Plan, own: range, offset: int, one_by_one: bool = False, finds_order: bool = False
) -> Iterator[Step]:
    """The steps of batches of one pass over a plan; `offset` counts the batches of the padded sequence before it."""
    if isinstance(plan, MixturePlan):
        return _one_by_one(MixedBatches(plan, finds_order), own, offset) if one_by_one else _mixed(plan, own, offset)
    if isinstance(plan, ShufflePlan):
        batches = ShuffledBatches(plan, finds_order)
        return _one_by_one(batches, own, offset) if one_by_one else iter(_ShuffledSteps(plan, own, offset))
    return _one_by_one(plan, own, offset)


def has_buffer(plan: Plan) -> bool:
    """Whether batches of an order are mixed in a buffer, unless each is gathered by itself."""
    return isinstance(plan, ShufflePlan | MixturePlan)


def count_open_slots(plan: Plan, share: Share, buffer_size: int) -> int:
    """Batches that a reader may hold at a time: its part of the buffer."""
    if isinstance(plan, MixturePlan):
        # A batch has a slot once, for all of its sources.
        return max(count_open_slots(made.plan, share, buffer_size) for made in plan.first_passes())
    if not isinstance(plan, ShufflePlan):
        return min(N_ONE_BY_ONE, max(2, buffer_size))
    turns = max(plan.depth(lane) for lane in range(plan.n_lanes)) + plan.reads_lanes_together
    return -(-turns * plan.n_lanes // share.stride) + (0 if plan.reads_lanes_together else 2)


def slot_nbytes(batch_size: int, sample_nbytes: int) -> int:
    """Size of the memory that holds any batch of a selection, in bytes."""
    act = batch_size * sample_nbytes
    return act + -act % ALIGN + N_COLUMNS * 8 * batch_size


class MixedBatches:
    """The batches of a mixture, in ascending order, each by itself; see `ShuffledBatches`."""

    def __init__(self, plan: MixturePlan, finds_order: bool) -> None:
        self._plan, self._finds_order = plan, finds_order
        # The passes that the last batch has rows of, by source and number, and their batches.
        self._passes: dict[tuple[int, int], tuple[Pass, ShuffledBatches | CutUniformPlan]] = {}

    def whole(self, batch: int) -> Chunk:
        """A batch as one chunk, source by source."""
        plan, samples, into = self._plan, [], []
        used: dict[tuple[int, int], tuple[Pass, ShuffledBatches | CutUniformPlan]] = {}
        for source, first_sample in enumerate(plan.first_samples):
            for number in plan.pass_numbers(source, batch, batch + 1):
                key = source, number
                made, batches = used[key] = self._passes.get(key) or self._begin(source, number)
                rows, part = plan.rows(made, batch), batches.whole(batch - made.first)
                samples.append(part.starts + first_sample)
                into.append(rows[part.rows])
        self._passes = used
        return Chunk.of_batch(batch, np.concatenate(samples), np.concatenate(into))

    def _begin(self, source: int, number: int) -> tuple[Pass, ShuffledBatches | CutUniformPlan]:
        made = make_pass(self._plan, source, number)
        own = made.plan
        return made, own if isinstance(own, CutUniformPlan) else ShuffledBatches(own, self._finds_order)


def _one_by_one(
    plan: OrderedPlan | UniformPlan | ShuffledBatches | MixedBatches, own: range, offset: int
) -> Iterator[Step]:
    for batch in own:
        yield Step((Load(plan.whole(batch), ((offset + batch, 0),)),), (offset + batch,), 0)


class _ShuffledSteps:
    """The steps of one reader in one pass over a shuffled plan; the picture in `shuffle` is of one of its lanes.

    A lane begins with a fill: the chunks that deal to its first turn, of which all but one lie before it, around the
    start of the lane if need be. Then it advances: each turn takes one chunk more. `own` are the reader's batches of
    this pass; `offset` counts the batches of the padded sequence before it.
    """

    def __init__(self, plan: ShufflePlan, own: range, offset: int) -> None:
        self._plan, self._own, self._offset = plan, own, offset
        n_lanes, common = plan.n_lanes, math.gcd(own.step, plan.n_lanes)
        self._turns: dict[int, range] = {}
        """For each lane that the reader serves, the turns that it owns."""
        for batch in own[: n_lanes // common]:
            turn, lane = divmod(batch, n_lanes)
            self._turns[lane] = range(turn, (own[-1] - lane) // n_lanes + 1, own.step // common)

    def __iter__(self) -> Iterator[Step]:
        n_lanes = self._plan.n_lanes
        for turn in range(self._own[0] // n_lanes, self._own[-1] // n_lanes + 1):
            batches = [batch for batch in range(turn * n_lanes, (turn + 1) * n_lanes) if batch in self._own]
            new = [lane for lane, turns in self._turns.items() if turns[0] == turn]
            # Batches are handed out in order, so those of new lanes wait for lanes that have begun before.
            is_first = len(new) == len(batches)
            yield from self._fill(turn, new, batches if is_first else [])
            yield from self._advance(turn, [] if is_first else batches)

    def _fill(self, turn: int, new: list[int], batches: list[int]) -> Iterator[Step]:
        plan = self._plan
        # The first lane alone, so that the first batch comes early; then the others together, in larger reads.
        for lanes in filter(None, (new[:1], new[1:])):
            for back in reversed(range(max(plan.depth(lane) for lane in lanes))):
                loads: list[Load] = []
                for lane in lanes:
                    if back < plan.depth(lane):
                        chunk = (turn - back) % plan.n_turns(lane)
                        loads += self._wanted(lane, chunk, turn, turn + plan.depth(lane))
                if back == 0:
                    yield self._step(loads, [batch for batch in batches if batch % plan.n_lanes in lanes], len(lanes))
                elif loads:
                    yield self._step(loads, [])

    def _advance(self, turn: int, batches: list[int]) -> Iterator[Step]:
        plan = self._plan
        loads: list[Load] = []
        for lane, turns in sorted(self._turns.items()):
            if turns[0] < turn < plan.n_turns(lane):
                depth = plan.depth(lane)
                # A chunk that was read around the end, when the lane was filled, has dealt to the turns open then.
                was_read = turn > plan.n_turns(lane) + turns[0] - depth
                low = max(turn, turns[0] + depth) if was_read else turn
                loads += self._wanted(lane, turn, low, turn + depth)
            if not plan.reads_lanes_together:
                ready = [batch for batch in batches if batch % plan.n_lanes <= lane]
                if ready:
                    yield self._step(loads, ready)
                    loads, batches = [], batches[len(ready) :]
        if loads or batches:
            yield self._step(loads, batches)

    def _wanted(self, lane: int, chunk: int, low: int, high: int) -> Iterator[Load]:
        """The chunk, where it deals to turns low..high-1 that the reader owns; else nothing."""
        plan, mine = self._plan, self._turns[lane]
        targets = tuple(
            (self._offset + turn * plan.n_lanes + lane, d)
            for d, turn in enumerate(plan.turns_of(lane, chunk))
            if low <= turn < high and turn in mine
        )
        # Of many readers, each owns few turns; then most chunks are not for it.
        if targets:
            yield Load(plan.chunk(lane, chunk), targets)

    def _step(self, loads: list[Load], batches: list[int], fills: int = 0) -> Step:
        return Step(tuple(loads), tuple(self._offset + batch for batch in batches), fills)


def _mixed(plan: MixturePlan, own: range, offset: int) -> Iterator[Step]:
    """The steps of all sources together: a batch follows when each source has read its part of it."""
    sources = [_steps_of_source(plan, source, own, offset) for source in range(len(plan.sources))]
    # All batches before these have been read, of each source; nothing is read of one before its first row is due.
    passes = (_own_passes(plan, source, own) for source in range(len(sources)))
    complete = [next((mine.start for _, mine in of_source), own.stop) for of_source in passes]
    at, nothing = 0, Step((), (), 0)
    while at < len(own):
        steps = []
        for i, source in enumerate(sources):
            if complete[i] <= own[at]:
                step, complete[i] = next(source, (nothing, own.stop))
                steps.append(step)
        done = at
        while done < len(own) and own[done] < min(complete):
            done += 1
        loads = tuple(load for step in steps for load in step.loads)
        yield Step(loads, tuple(offset + batch for batch in own[at:done]), sum(step.fills for step in steps))
        at = done


def _own_passes(plan: MixturePlan, source: int, own: range) -> Iterator[tuple[Pass, range]]:
    """The passes through a source that have rows in the reader's batches, and these batches."""
    for made in plan.passes(source, own[0], own[-1] + 1):
        first, stop = (max(0, -(-(n - own.start) // own.step)) for n in (made.first, made.first + made.plan.n_batches))
        if len(mine := own[first:stop]):
            yield made, mine


def _steps_of_source(plan: MixturePlan, source: int, own: range, offset: int) -> Iterator[tuple[Step, int]]:
    """The steps of one source, pass after pass; with each, the first batch of which its part is not complete then."""
    for passed, following in itertools.pairwise(itertools.chain(_own_passes(plan, source, own), [None])):
        if passed is None:
            return
        made, mine = passed
        # The last batch of a pass may be the first of the next, too.
        complete, most = mine.start, own.stop if following is None else following[1].start
        local = range(mine.start - made.first, mine.stop - made.first, own.step)
        for step in _make_steps(made.plan, local, offset + made.first):
            if step.batches:
                complete = min(step.batches[-1] - offset + 1, most)
            loads = tuple(_moved(plan, made, load, offset) for load in step.loads)
            yield dataclasses.replace(step, loads=loads), complete


def _moved(plan: MixturePlan, made: Pass, load: Load, offset: int) -> Load:
    """A load of a source, to where its samples are in the batches of the mixture."""
    chunk = load.chunk
    rows = chunk.rows.copy()
    for number, d in load.targets:
        part = slice(chunk.bounds[d], chunk.bounds[d + 1])
        rows[part] = plan.rows(made, number - offset)[rows[part]]
    starts = chunk.starts + plan.first_samples[made.source]
    return Load(dataclasses.replace(chunk, starts=starts, rows=rows), load.targets)


def advise_lanes(plan: Plan, share: Share) -> str | None:
    """Say what would avoid that lanes are read by several readers; None where it is so already."""
    if isinstance(plan, MixturePlan):
        return next(filter(None, (advise_lanes(made.plan, share) for made in plan.first_passes())), None)
    if not isinstance(plan, ShufflePlan) or plan.n_lanes % share.stride == 0 or plan.n_lanes < plan.max_lanes:
        return None
    good = [n for n in range(1, plan.n_lanes + 1) if plan.n_lanes % n == 0]
    return (
        f"n_lanes: {share.stride} reading processes (ranks x workers) do not divide {plan.n_lanes} lanes, so each lane "
        f"is read by several of them; the order is the same, at more reads. Use one of {good} reading processes, or "
        f"n_lanes={share.stride}."
    )
