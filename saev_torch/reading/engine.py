"""Reads the steps of a plan with threads, ahead of the consumer. The same in a worker and in the caller's process.

A *scheduler* thread works out what to read and waits for free memory; *reader* threads read; the consumer takes whole
batches. Memory is bounded by the number of batches that may be open, not by time.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Iterator

from saev_torch.order.selection import Selection
from saev_torch.order.shuffle import OrderedPlan, ShufflePlan
from saev_torch.order.steps import Share, Step, count_open_slots, make_steps, slot_nbytes
from saev_torch.processes.counters import Waits
from saev_torch.processes.world import count_own_cores
from saev_torch.reading.batches import Batches, Running
from saev_torch.reading.crew import Crew, Task, guarded, start_threads
from saev_torch.reading.direct import reads_past_cache
from saev_torch.reading.extents import Extents, make_sample_extents
from saev_torch.reading.labels import Labels
from saev_torch.reading.pace import Pace
from saev_torch.reading.placing import OpenBatch, Placed, place
from saev_torch.reading.reader import Reader, Spot
from saev_torch.reading.slots import make_pool
from saev_torch.reading.source import Source

# A task is one call, or a few: small enough that all threads have some, large enough that calls do not count.
_TASK_NBYTES, _MAX_TASK_NBYTES = 4 << 20, 16 << 20
_TASKS_PER_THREAD = 2


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How to read.

    Attributes:
        buffer_size: Batches that the whole job may hold.
        n_threads: Reading threads.
        timeout_s: Seconds to wait for a batch.
        n_fills: Steps that fill a lane, to complete before the first batch.
        is_only: Whether the data may not be read again.
        scale: What to multiply by; None for nothing.
    """

    buffer_size: int
    n_threads: int
    timeout_s: float
    n_fills: int = 0
    is_only: bool = False
    scale: float | None = None


class Engine:
    """Reads the batches of one reader ahead.

    Args:
        labels: The labels of the store to read from. The store is closed with the engine.
        selection: Which samples there are.
        plan: The order of samples.
        share: The batches to read.
        options: How to read.

    Attributes:
        is_scaled: Whether batches are multiplied when they come.

    `next_batch` returns batches in order, then None. `close` must be called.
    """

    def __init__(
        self,
        labels: Labels,
        selection: Selection,
        plan: ShufflePlan | OrderedPlan,
        share: Share,
        options: EngineOptions,
    ) -> None:
        self._labels, self._store = labels, labels.store
        self._selection, self._plan, self._options = selection, plan, options
        self._steps = make_steps(plan, share)
        self._source = Source(self._store, scale=options.scale)
        self.is_scaled = self._source.is_scaled
        self._scheduler_spot = Spot()
        pool = make_pool(slot_nbytes(plan.batch_size, selection.sample_nbytes))
        max_open = count_open_slots(plan, share, options.buffer_size)
        self._batches = Batches(pool, max_open, options.timeout_s, options.n_fills)
        pace = Pace(min(options.n_threads, count_own_cores()))
        fail = self._batches.fail
        self._crew = Crew("saev_torch reader", options.n_threads, pace, self._source.open_reader, fail)
        scheduler = threading.Thread(
            target=guarded, args=(self._schedule, fail), name="saev_torch scheduler", daemon=True
        )
        self._threads = [scheduler, *self._crew.threads]
        try:
            start_threads(self._threads)
        except BaseException:
            self.close()
            raise

    # The scheduler thread

    def _schedule(self) -> None:
        self._source.past_cache = reads_past_cache(
            self._store, self._selection, self._options.is_only, self._scheduler_spot
        )
        self._scheduler_spot.where = None
        for step in self._steps:
            new = sorted({batch for load in step.loads for batch, _ in load.targets} - self._batches.open.keys())
            if not self._batches.wait_for_room(len(new)):
                return
            for batch in new:
                self._batches.open_one(batch, self._plan.size(batch % self._plan.n_batches), self._store.has_labels)
            running = Running(step, 0)
            tasks = list(self._divide(step, running))
            running.n_tasks = len(tasks)
            self._batches.begin(running)
            self._crew.put(tasks)
        self._batches.finish_scheduling()

    def _divide(self, step: Step, running: Running) -> Iterator[Task]:
        """Cut the reads of a step into tasks."""
        if not step.loads:
            return
        placed = place(step, self._batches.open, self._selection)
        if self._store.has_labels:
            yield Task(functools.partial(self._read_labels, placed, running))
        for extents in make_sample_extents(self._selection, placed.cells, placed.addresses):
            wished = int(extents.nbytes.sum()) // (_TASKS_PER_THREAD * self._options.n_threads)
            for start, stop in extents.cut(max(_TASK_NBYTES, min(wished, _MAX_TASK_NBYTES))):
                # The batches are named so that their memory lives as long as the task.
                yield Task(
                    functools.partial(self._read_rows, extents, start, stop, placed, running),
                    functools.partial(_announce, extents, start, stop),
                )

    # The reader threads

    def _read_rows(
        self, extents: Extents, start: int, stop: int, placed: Placed, running: Running, reader: Reader
    ) -> None:
        reader.read(extents, start, stop)
        self._batches.finish_task(running)

    def _read_labels(self, placed: Placed, running: Running, reader: Reader) -> None:
        placed.deal_labels(self._labels.of_cells(self._selection, placed.cells, reader.spot))
        self._batches.finish_task(running)

    # The consumer

    def next_batch(self) -> OpenBatch | None:
        """Take the next batch; its slot is held by the caller then.

        Returns:
            The batch, or None after the last.

        Raises:
            StalledReadError: No batch within `timeout_s`.
            SaevTorchError: Reading failed.
        """
        return self._batches.take(self._selection.sample_nbytes, self._describe_stall)

    @property
    def waits(self) -> Waits:
        """What was waited for, and what was handed out."""
        return self._batches.waits

    @property
    def fill(self) -> float:
        """Share of the batches that may be open that are."""
        return self._batches.fill

    def _describe_stall(self) -> str:
        now, reads = time.monotonic(), []
        for spot in [self._scheduler_spot, *self._crew.spots()]:
            where = spot.where
            if where is not None:
                shard, offset = where()
                reads.append(f"{self._store.path(shard)} at offset {offset} for {now - spot.since:.1f} s")
        return "reading " + "; ".join(reads) if reads else "no read is under way, so the machine is overloaded"

    def close(self) -> None:
        """Stop the threads, and give unused memory and descriptors back. May be called twice."""
        if threading.current_thread() in self._threads:
            # An iterator that was left in a reference cycle is collected in whichever thread allocates next. One of
            # ours cannot wait for itself, and may hold a lock.
            threading.Thread(target=self.close, name="saev_torch closer", daemon=True).start()
            return
        self._batches.stop()
        self._crew.stop()
        for thread in self._threads:
            thread.join(0.1 if self._batches.is_stalled else 5.0)
        self._batches.release(not any(thread.is_alive() for thread in self._threads))
        self._store.close()


def _announce(extents: Extents, start: int, stop: int, reader: Reader) -> None:
    reader.announce(extents, start, stop)
