"""Reads the steps of a plan with threads, ahead of the consumer. The same in a worker and in the caller's process.

A *scheduler* thread works out what to read and waits for free memory; *reader* threads read; the consumer takes whole
batches. Memory is bounded by the number of batches that may be open, not by time.

A buffer costs memory, which may come slowly, and its rows are read to places all over it. Where the page cache holds
the rows, their batches are gathered there one by one instead; they are the same ones. Where only the kernel can gather,
a buffer is faster once it is there, so this is for a worker that ends with its epoch, and would fill it once.
"""

import dataclasses
import functools
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from saev_torch.errors import ReadError
from saev_torch.order.shuffle import OrderedPlan
from saev_torch.order.steps import Plan, Share, Step, count_open_slots, has_buffer, make_steps, slot_nbytes
from saev_torch.order.uniform import UniformPlan
from saev_torch.processes.interrupts import whole
from saev_torch.processes.threads import Thread
from saev_torch.processes.world import count_own_cores
from saev_torch.reading.ahead import look_ahead
from saev_torch.reading.batches import Batches, Running
from saev_torch.reading.crew import Crew, Task, guarded, start_threads
from saev_torch.reading.direct import fits_page_cache
from saev_torch.reading.extents import Extents, Placed, make_sample_extents, place
from saev_torch.reading.feeds import AnyFeed, AnyGather
from saev_torch.reading.gather import Found, FoundBatch, Gather, copies_here
from saev_torch.reading.patience import OnWait, Patience, Reads
from saev_torch.reading.reader import Pace, Reader, Spot
from saev_torch.reading.scattered import ScatteredRows
from saev_torch.reading.slots import OpenBatch, Pools, make_pool

# How long all threads together have to leave what they are at; one that waits for a disk may never do so.
_LEAVE_S, _STALLED_S = 5.0, 0.2
_READER, _SCHEDULER = "saev_torch reader", "saev_torch scheduler"
# Where rows are copied here, a buffer of fewer bytes is as good.
_SMALL_NBYTES = 8 << 20
# Where the kernel copies them, what a buffer of so many bytes costs until it is there pays only in later epochs;
# narrower rows cost more by themselves.
_LARGE_NBYTES, _WIDE_NBYTES = 256 << 20, 1 << 10
# Threads up to which it pays that they gather neighbours together.
_MOST_IN_ORDER = 2
# Batches until it is known whether memory comes slowly, and buffers of them after which a buffer has paid all the same.
_N_TRIED, _MOST_BUFFERS = 4, 12


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How to read.

    The whole job may hold `buffer_size` batches. `n_fills` steps that fill a lane are complete before the first batch.
    Data that `is_only` may not be read again. Without `keeps_memory` no later engine will use the memory of this one.
    """

    buffer_size: int
    n_threads: int
    timeout_s: float
    n_fills: int = 0
    is_only: bool = False
    keeps_memory: bool = True


class Engine:
    """Reads the batches of one reader ahead, from a feed whose store is closed with the engine.

    `start` starts its threads; `next_batch` then returns batches in order, then None, and `finish` converts what the
    readers did not. `close` must be called, whatever interrupts `start`. Memory comes from `pools`, and stays there.
    `describe` writes beside the activations of a batch which samples they are.
    """

    def __init__(
        self,
        feed: AnyFeed,
        plan: Plan,
        share: Share,
        options: EngineOptions,
        pools: Pools,
        describe: Callable[[OpenBatch], None],
    ) -> None:
        self._pid = os.getpid()
        self._store, self._selection = feed.store, feed.selection
        self._plan, self._share, self._options = plan, share, options
        self._feed, self._describe = feed, describe
        self._scheduler_spot = Spot()
        self._gather: AnyGather | None = None
        pool = make_pool(slot_nbytes(min(plan.batch_size, plan.n_samples), feed.selection.act_nbytes), pools)
        max_open = count_open_slots(plan, share, options.buffer_size)
        self._pool, self._max_open = pool, max_open
        self.batches = Batches(pool, max_open, options.n_fills)
        self._pace, fail = Pace(min(options.n_threads, count_own_cores())), self.batches.fail
        self._crew = Crew(_READER, options.n_threads, self._pace, feed.open_reader, fail)
        self._crew.spots.append(self._scheduler_spot)
        self._reads = Reads(self._store, self._crew.spots, self.batches.waits)
        scheduler = Thread(functools.partial(guarded, self._schedule, self.batches.fail_last), _SCHEDULER)
        self._threads = [scheduler, *self._crew.threads]

    def start(self) -> None:
        """Start the threads; a `ReadError` where the system gives none."""
        start_threads(self._threads)

    # The scheduler thread

    def _schedule(self) -> None:
        spot, is_only = self._scheduler_spot, self._options.is_only
        self._feed.choose(is_only, spot)
        spot.clear()
        saves_buffer, n_saved = self._choose_gather(), 0
        self.batches.one_by_one = saves_buffer or isinstance(self._plan, UniformPlan | OrderedPlan)
        # With more threads, not the copying but the working out is what is waited for.
        finds_order = self._crew.count_working() <= _MOST_IN_ORDER
        steps = make_steps(self._plan, self._share, saves_buffer, finds_order)
        ahead, reader = look_ahead(steps, self._gather, self._selection, spot), None
        while (found := next(ahead, None)) is not None:
            step, wanted = found
            new = sorted({batch for load in step.loads for batch, _ in load.targets} - self.batches.open.keys())
            if not self.batches.wait_for_room(len(new)):
                return
            has = self._store.has_labels, self._store.has_token_ids
            for batch in new:
                self.batches.open_one(batch, self._plan.size(batch % self._plan.n_batches), *has)
            rows = self._place_rows(step, wanted)
            if saves_buffer:
                if rows is None or self._wants_buffer(n_saved):
                    # From here on with the buffer, this batch, too. A disk wants many rows at a time.
                    self._only(step).is_finished = False
                    saves_buffer = self.batches.one_by_one = self._pool.is_streamed = False
                    self._gather = None
                    share = dataclasses.replace(self._share, first=step.batches[0])
                    ahead = look_ahead(make_steps(self._plan, share), None, self._selection, spot)
                    continue
                n_saved += 1
            running = Running(step, 0)
            tasks = list(self._divide(step, rows, running))
            running.n_tasks = len(tasks)
            self.batches.begin(running)
            if rows is None or self._crew.count_working() > 1:
                self._crew.put(tasks)
            else:
                # With one core, to hand a task over takes half as long as the task.
                reader = reader or self._open_own_reader()
                if not _run_here(tasks, self.batches, reader):
                    return
        self.batches.finish_scheduling()

    def _choose_gather(self) -> bool:
        """Choose whether rows are gathered from the page cache, and whether that saves a buffer."""
        is_shuffled = has_buffer(self._plan)
        gather = self._feed.open_gather() if is_shuffled or isinstance(self._plan, UniformPlan) else None
        if gather is not None and (not is_shuffled or self._may_save_buffer(gather)):
            self._gather = gather
        self._pool.is_streamed = self._gather is not None and self._gather.is_fast
        # A buffer that is filled now, since a disk has the data, is filled once where a later epoch gathers them.
        gathers_later = is_shuffled and not self._options.n_fills and copies_here()
        nbytes = self._plan.n_samples * self._selection.sample_nbytes
        self.batches.is_brief = not self._options.keeps_memory or (gathers_later and fits_page_cache(nbytes))
        return is_shuffled and self._gather is not None

    def _open_own_reader(self) -> Reader:
        reader = self._feed.open_reader(self._pace)
        self._crew.spots.append(reader.spot)
        return reader

    def _may_save_buffer(self, gather: AnyGather) -> bool:
        """Whether rows that are in memory are to be gathered there, and not read to a large buffer."""
        nbytes = self._max_open * self._pool.nbytes
        if self._options.n_fills or gather.is_fast:
            return not self._options.n_fills and nbytes >= _SMALL_NBYTES
        is_wide = self._selection.md.row_nbytes >= _WIDE_NBYTES
        return is_wide and nbytes >= _LARGE_NBYTES and not self._options.keeps_memory and self._pool.is_new

    def _wants_buffer(self, n_saved: int) -> bool:
        """Whether a buffer is cheaper from now on, after so many batches without one."""
        if self._gather is not None and self._gather.is_fast:
            return False
        return (n_saved == _N_TRIED and not self._pool.is_slow) or n_saved == _MOST_BUFFERS * self._max_open

    def _divide(self, step: Step, rows: list[Found] | None, running: Running) -> Iterator[Task]:
        """Cut the reads of a step into tasks; `rows` are gathered."""
        if not step.loads:
            return
        if rows is None:
            placed = place(step, self.batches.open, self._selection)
        else:
            placed = Placed.in_own_order(self._only(step), self._selection.act_nbytes)
        running.n_samples = len(placed.cells)
        self._check(placed)
        if rows is not None:
            yield Task(functools.partial(self._complete, self._only(step), running))
            for gather, found in rows:
                for part in found.divide(self._crew.count_working()):
                    yield Task(functools.partial(self._gather_rows, gather, part, placed, running))
            return
        if self._store.has_labels:
            yield Task(functools.partial(self._read_labels, placed, running))
        if self._store.has_token_ids:
            yield Task(functools.partial(self._read_token_ids, placed, running))
        for extents in make_sample_extents(self._selection, placed.cells, placed.addresses):
            for start, stop in extents.cut(self._crew.task_nbytes(int(extents.nbytes.sum()))):
                # The batches are named so that their memory lives as long as the task.
                yield Task(
                    functools.partial(self._read_rows, extents, start, stop, placed, running),
                    operator.methodcaller("announce", extents, start, stop),
                )

    def _only(self, step: Step) -> OpenBatch:
        """The batch of a step that has one."""
        ((number, _),) = step.loads[0].targets
        return self.batches.open[number]

    def _place_rows(self, step: Step, wanted: FoundBatch | None) -> list[Found] | None:
        """Rows that were found, if they are still to be gathered; tell the batch, which is open, what it holds."""
        if wanted is None or self._gather is None or (self._pace.is_slow and has_buffer(self._plan)):
            return None
        opened, (cells, found) = self._only(step), wanted
        opened.cells[step.loads[0].chunk.rows] = cells
        opened.is_finished = True
        return [(gather, rows.at(opened.slot.address)) for gather, rows in found]

    def _check(self, placed: Placed) -> None:
        """Make sure that nothing is written to memory that is not for this; a `ReadError` says so."""
        slots = [opened.slot for opened, _, _ in placed.targets]
        low, high = min(slot.address for slot in slots), max(slot.address + slot.nbytes for slot in slots)
        is_inside = low <= placed.addresses.min(initial=low) and placed.addresses.max(initial=low) < high
        if not is_inside or any(slot.pid != self._pid for slot in slots):
            raise ReadError(
                f"{self._store.shards_dir}: expected rows to go to batches of this process, got an address elsewhere: "
                "this is a fault of saev_torch; please report it."
            )

    # The reader threads

    def _read_rows(
        self, extents: Extents, start: int, stop: int, placed: Placed, running: Running, reader: Reader
    ) -> None:
        reader.read(extents, start, stop)
        self.batches.finish_task(running, int(extents.nbytes[start:stop].sum()))

    def _gather_rows(
        self, gather: Gather, rows: ScatteredRows, placed: Placed, running: Running, reader: Reader
    ) -> None:
        gather.read(rows, reader)
        self.batches.finish_task(running, len(rows) * rows.row_nbytes)

    def _complete(self, opened: OpenBatch, running: Running, reader: Reader) -> None:
        """Read what stands beside the activations of a batch, whose rows others may gather meanwhile, and describe it.

        The consumer has other things to do.
        """
        if opened.labels is not None:
            opened.labels[:] = self._feed.labels_of(opened.cells, reader.spot)
        if opened.token_ids is not None:
            opened.token_ids[:] = self._feed.token_ids_of(opened.cells, reader.spot)
        self._describe(opened)
        self.batches.finish_task(running)

    def _read_labels(self, placed: Placed, running: Running, reader: Reader) -> None:
        placed.deal_labels(self._feed.labels_of(placed.cells, reader.spot))
        self.batches.finish_task(running)

    def _read_token_ids(self, placed: Placed, running: Running, reader: Reader) -> None:
        placed.deal_token_ids(self._feed.token_ids_of(placed.cells, reader.spot))
        self.batches.finish_task(running)

    # The consumer

    def next_batch(self, on_wait: OnWait | None = None) -> OpenBatch | None:
        """Take the next batch, and hold its slot; None after the last.

        Raises `StalledReadError` where no batch comes and no read finishes in time, `ReadError` in a process that was
        forked from the one that made the engine, and else what ended a thread.
        """
        if self._pid != os.getpid():
            raise ReadError(
                f"{self._store.shards_dir}: expected an iteration of this process, {os.getpid()}, got one of process "
                f"{self._pid}, which forked this one: the threads that read are not here; iterate anew."
            )
        make_patience = functools.partial(Patience, self._options.timeout_s, self._reads, on_wait)
        opened = self.batches.take(self._selection.sample_nbytes, make_patience)
        if opened is not None and not opened.fields:
            self._describe(opened)
        return opened

    def finish(self, opened: OpenBatch, batch: Mapping[str, torch.Tensor]) -> None:
        """Convert the activations of a batch, unless that was done when they were read."""
        if not opened.is_finished:
            self._feed.finish(batch)

    def close(self) -> None:
        """Stop the threads, and give unused memory and descriptors back. May be called twice."""
        whole(self._close)

    def _close(self) -> None:
        if self._pid != os.getpid():
            # Here are no threads, and locks may be held for ever by those of the parent.
            return
        if threading.current_thread().name.startswith((_READER, _SCHEDULER)):
            # An iterator that was left in a reference cycle is collected in whichever thread allocates next. One of
            # ours cannot wait for itself, and may hold a lock, be it of another engine.
            Thread(self.close, "saev_torch closer").start()
            return
        self.batches.stop()
        self._crew.stop()
        deadline = time.monotonic() + (_STALLED_S if self.batches.is_stalled else _LEAVE_S)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        # One that an interrupt kept from being started has no number yet.
        self.batches.release(all(thread.ident is not None and not thread.is_alive() for thread in self._threads))
        self._store.close()


def _run_here(tasks: list[Task], batches: Batches, reader: Reader) -> bool:
    """Run the tasks of the step that began last in this thread; whether to go on."""
    try:
        for task in tasks:
            if batches.is_stopped:
                return False
            task.run(reader)
    except BaseException:
        batches.abandon()
        raise
    return True
