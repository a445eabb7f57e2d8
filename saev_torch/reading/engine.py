"""Reads the steps of a plan with threads, ahead of the consumer. The same in a worker and in the caller's process.

A *scheduler* thread works out what to read and waits for free memory; *reader* threads read; the consumer takes whole
batches. Memory is bounded by the number of batches that may be open, not by time.
"""

import collections
import dataclasses
import functools
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import numpy as np

from saev_torch.errors import ReadError, StalledReadError
from saev_torch.order.selection import Selection
from saev_torch.order.shuffle import OrderedPlan, ShufflePlan
from saev_torch.order.steps import Step
from saev_torch.processes.counters import Waits
from saev_torch.processes.world import count_own_cores
from saev_torch.reading.direct import Stage
from saev_torch.reading.extents import (
    Extents,
    Note,
    announce_extents,
    make_sample_extents,
    read_cell_labels,
    read_extents,
)
from saev_torch.reading.placing import OpenBatch, Placed, place
from saev_torch.reading.ring import Ring
from saev_torch.reading.scaling import Scaler
from saev_torch.reading.slots import Slot, SlotPool
from saev_torch.reading.store import ShardStore

__all__ = ["Engine"]

# A task is one call, or a few: small enough that all threads have some, large enough that calls do not count.
_TASK_NBYTES, _MAX_TASK_NBYTES = 4 << 20, 16 << 20
_TASKS_PER_THREAD = 2
# A reading thread that is slower than this waits for a disk: then reads are announced, this many tasks ahead.
_SLOW_NBYTES_PER_S = 1.5e9
_N_ANNOUNCED = 8
# Threads beyond the number of cores begin to read when the others wait for a disk, or take this long.
_HELP_AFTER_S = 0.02
_N_SPARE = 2
_MAX_TAKEN = 4
# Another process lets go of a batch without telling.
_POLL_S = 0.002


@dataclasses.dataclass
class _Running:
    """A step whose tasks are not all done."""

    n_tasks: int
    fills: int


@dataclasses.dataclass
class _Task:
    """A part of a step for one thread, which may have a ring. What `run` refers to keeps alive what is read into."""

    step: _Running
    run: Callable[[Ring | None, Stage | None], None]
    announce: Callable[[], None] | None = None
    nbytes: int = 0


@dataclasses.dataclass
class _Reading:
    """What a thread is reading, for the message about a stall: `where` tells shard and offset."""

    where: Callable[[], tuple[int, int]]
    since: float


class Engine:
    """Reads batches ahead.

    Args:
        store: Where to read from; closed with the engine.
        selection: Which samples there are.
        plan: The order of samples, for the sizes of batches.
        steps: What to read, in order.
        pool: Memory for batches.
        max_open: Batches that may be open (read, or being read, and not handed out) at a time.
        n_threads: Reading threads.
        timeout_s: Seconds to wait for a batch.
        n_fills: Steps that fill a lane, to complete before the first batch.
        past_cache: Decides whether to read past the page cache, where the system has the means.
        scaler: Multiplies what is read; None for nothing.

    `next_batch` returns batches in order, then None. `close` must be called.
    """

    def __init__(
        self,
        store: ShardStore,
        selection: Selection,
        plan: ShufflePlan | OrderedPlan,
        steps: Iterator[Step],
        pool: SlotPool,
        max_open: int,
        n_threads: int,
        timeout_s: float,
        n_fills: int,
        past_cache: Callable[[Note], bool],
        scaler: Scaler | None = None,
    ) -> None:
        self._store = store
        self._selection = selection
        self._plan = plan
        self._steps = steps
        self._pool = pool
        self._max_open = max_open
        self._keep = max_open + _N_SPARE
        self._timeout_s = timeout_s
        self._fills_wanted = n_fills
        self._decide_past_cache = past_cache
        self._past_cache = False
        self._scaler = scaler
        self.waits = Waits()
        self._sample_nbytes = selection.sample_nbytes

        self._lock = threading.Lock()
        self._has_room = threading.Condition(self._lock)
        self._has_task = threading.Condition(self._lock)
        self._has_batch = threading.Condition(self._lock)
        self._open: dict[int, OpenBatch] = {}
        self._tasks: collections.deque[_Task] = collections.deque()
        # Steps in order, each with the batches that are complete after it.
        self._running: collections.deque[tuple[_Running, tuple[int, ...]]] = collections.deque()
        self._ready: collections.deque[int] = collections.deque()
        self._taken: list[Slot] = []
        self._reading: dict[int, _Reading] = {}
        self._all_scheduled = False
        self._stopped = False
        self._is_slow = False
        self._n_regular = min(n_threads, count_own_cores())
        self._done_at = time.monotonic()
        self._is_full = False
        self._error: BaseException | None = None
        names = ["saev_torch scheduler"] + [f"saev_torch reader {i}" for i in range(n_threads)]
        targets = [self._schedule] + [functools.partial(self._read, i) for i in range(n_threads)]
        # Daemons, because a read that hangs must not keep the interpreter from exiting.
        self._threads = [
            threading.Thread(target=self._guarded, args=(target,), name=name, daemon=True)
            for name, target in zip(names, targets, strict=True)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in self._threads:
                thread.start()
                started.append(thread)
        except (RuntimeError, MemoryError) as err:
            self._threads = started
            self.close()
            raise ReadError(
                f"n_threads: expected {len(names)} more threads, got {len(started)}: {err}; lower n_threads or the "
                "number of workers, or raise the limits of processes and memory."
            ) from err

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as caught:  # noqa: BLE001 -- the consumer raises it
            err = caught
            # Who keeps the error does not keep what the threads read with.
            traceback.clear_frames(caught.__traceback__)
            if isinstance(caught, MemoryError):
                err = ReadError(f"buffer_size: no memory is left ({caught}); lower it, or the number of workers.")
                err.__cause__ = caught
            with self._lock:
                self._error = self._error or err
                self._has_batch.notify_all()

    # The scheduler thread

    def _schedule(self) -> None:
        self._past_cache = self._decide_past_cache(self._note)
        self._reading.pop(threading.get_ident(), None)
        for step in self._steps:
            new = sorted({batch for load in step.loads for batch, _ in load.targets} - self._open.keys())
            with self._lock:
                began = time.monotonic()
                while not self._stopped and (wait_s := self._wait_for_room(len(new))) is not None:
                    self._is_full = True
                    self._has_batch.notify_all()
                    self._has_room.wait(wait_s or None)
                self._is_full = False
                if not self._running:
                    self.waits.consumer_s += time.monotonic() - began
                if self._stopped:
                    return
            self._prepare(step, new)
        with self._lock:
            self._all_scheduled = True
            self._has_batch.notify_all()

    def _wait_for_room(self, n_new: int) -> float | None:
        """How long to wait before opening more batches: None if not at all, 0.0 until one is taken."""
        if not self._ready and not self._running:
            return None
        if len(self._open) + n_new > self._max_open:
            return 0.0
        self._taken = [slot for slot in self._taken if not slot.is_free]
        # Batches on their way to the consumer count too, but a user who keeps them must not be waited for.
        n_held = len(self._open) + min(len(self._taken), _MAX_TAKEN)
        return None if n_held + n_new <= self._max_open + _N_SPARE else _POLL_S

    def _prepare(self, step: Step, new: list[int]) -> None:
        for batch in new:
            size = self._plan.size(batch % self._plan.n_batches)
            labels = np.empty(size, dtype=np.uint8) if self._store.has_labels else None
            opened = OpenBatch(self._pool.acquire(self._keep), size, np.empty(size, dtype=np.int64), labels)
            with self._lock:
                self._open[batch] = opened
        running = _Running(0, step.fills)
        tasks = list(self._divide(step, running))
        running.n_tasks = len(tasks)
        with self._lock:
            self._running.append((running, step.batches))
            self._tasks.extend(tasks)
            self._has_task.notify_all()
            self._has_batch.notify_all()

    def _divide(self, step: Step, running: _Running) -> Iterator[_Task]:
        """Cut the reads of a step into tasks."""
        if not step.loads:
            return
        placed = place(step, self._open, self._selection, self._sample_nbytes)
        if self._store.has_labels:
            yield _Task(running, functools.partial(self._read_labels, placed))
        for extents in make_sample_extents(self._selection, placed.cells, placed.addresses):
            n_wanted = _TASKS_PER_THREAD * (len(self._threads) - 1)
            wished = min(int(extents.nbytes.sum()) // n_wanted, _MAX_TASK_NBYTES)
            for start, stop in extents.cut(max(_TASK_NBYTES, wished)):
                # The batches are named so that their memory lives as long as the task.
                yield _Task(
                    running,
                    functools.partial(self._read_rows, extents, start, stop, placed),
                    functools.partial(announce_extents, self._store, extents, start, stop),
                    int(extents.nbytes[start:stop].sum()),
                )

    # The reader threads

    def _read(self, number: int) -> None:
        ring = Ring.open()
        stage: Stage | None = None
        while True:
            with self._lock:
                while not self._stopped and (wait_s := self._wait_for_task(number)) is not None:
                    self._has_task.wait(wait_s or None)
                if self._stopped:
                    return
                task = self._tasks.popleft()
                # Only now it has been decided. Without a ring, it is the page cache.
                is_staged = self._past_cache and ring is not None
                later = self._take_unannounced() if self._is_slow and not is_staged else None
            if later is not None:
                later()
            if stage is None and self._past_cache and ring is not None:
                stage = Stage(ring)
            began = time.monotonic()
            task.run(ring, stage)
            ended = time.monotonic()
            with self._lock:
                self._done_at = ended
                if task.nbytes:
                    was_slow, self._is_slow = self._is_slow, task.nbytes < _SLOW_NBYTES_PER_S * (ended - began)
                    if self._is_slow and not was_slow:
                        self._has_task.notify_all()
                self._reading.pop(threading.get_ident(), None)
                task.step.n_tasks -= 1
                if not task.step.n_tasks:
                    self._has_batch.notify_all()
            del task, later

    def _wait_for_task(self, number: int) -> float | None:
        """How long a thread is to wait before it takes a task: None if not at all, 0.0 until there is one.

        Threads that share a core only take time from each other, unless they wait for a disk.
        """
        if not self._tasks:
            return 0.0
        if number < self._n_regular or self._is_slow:
            return None
        left = self._done_at + _HELP_AFTER_S - time.monotonic()
        return None if left <= 0 else left

    def _take_unannounced(self) -> Callable[[], None] | None:
        """Something to announce to the kernel: only where reads are slow, because it takes time of its own."""
        for task in itertools.islice(self._tasks, _N_ANNOUNCED):
            if task.announce is not None:
                announce, task.announce = task.announce, None
                return announce
        return None

    def _read_rows(
        self, extents: Extents, start: int, stop: int, placed: Placed, ring: Ring | None, stage: Stage | None
    ) -> None:
        # One extent after the other, which a disk does not like.
        if self._scaler is not None and stage is None and not self._is_slow:
            self._scaler.read(self._store, extents, start, stop, self._note)
            return
        if stage is None:
            read_extents(self._store, extents, start, stop, self._note, ring)
        else:
            stage.read(self._store, extents, start, stop, self._note)
        if self._scaler is not None:
            self._scaler.apply(extents, start, stop)

    def _note(self, where: Callable[[], tuple[int, int]]) -> None:
        self._reading[threading.get_ident()] = _Reading(where, time.monotonic())

    def _read_labels(self, placed: Placed, ring: Ring | None, stage: Stage | None) -> None:
        self._note(lambda: (self._store.labels_idx, 0))
        placed.deal_labels(read_cell_labels(self._store, self._selection, placed.cells))

    # The consumer

    def next_batch(self) -> OpenBatch | None:
        """Take the next batch; its slot is held by the caller then.

        Returns:
            The batch, or None after the last.

        Raises:
            StalledReadError: No batch within `timeout_s`.
            SaevTorchError: Reading failed.
        """
        began = time.monotonic()
        with self._lock:
            while True:
                if self._error is not None:
                    raise self._error
                while self._running and not self._running[0][0].n_tasks:
                    done, batches = self._running.popleft()
                    self._fills_wanted -= done.fills
                    self._ready.extend(batches)
                finished = self._all_scheduled and not self._running
                filled = self._fills_wanted <= 0 or finished or (self._is_full and not self._running)
                if self._ready and filled:
                    self._fills_wanted = 0
                    opened = self._open.pop(self._ready.popleft())
                    self._taken.append(opened.slot)
                    self.waits.nbytes += opened.size * self._sample_nbytes
                    self._has_room.notify()
                    return opened
                if finished:
                    return None
                left = began + self._timeout_s - time.monotonic()
                if left <= 0:
                    self._error = StalledReadError(self._describe_stall())
                    raise self._error
                waited = time.monotonic()
                self._has_batch.wait(min(left, threading.TIMEOUT_MAX))
                waited = time.monotonic() - waited
                if self._running:
                    self.waits.disk_s += waited
                else:
                    self.waits.plan_s += waited

    @property
    def fill(self) -> float:
        """Share of the batches that may be open that are."""
        return min(1.0, len(self._open) / max(1, self._max_open))

    def _describe_stall(self) -> str:
        now = time.monotonic()
        reads = []
        for reading in tuple(self._reading.values()):
            shard, offset = reading.where()
            reads.append(f"{self._store.path(shard)} at offset {offset} for {now - reading.since:.1f} s")
        what = "reading " + "; ".join(reads) if reads else "no read is under way, so the machine is overloaded"
        return (
            f"batch_timeout_s: expected a batch within {self._timeout_s} s, got none: {what}. "
            "Check the file system, or raise batch_timeout_s."
        )

    def close(self) -> None:
        """Stop the threads, and give unused memory and descriptors back. May be called twice."""
        if threading.current_thread() in self._threads:
            # An iterator that was left in a reference cycle is collected in whichever thread allocates next. One of
            # ours cannot wait for itself, and may hold the lock.
            threading.Thread(target=self.close, name="saev_torch closer", daemon=True).start()
            return
        with self._lock:
            self._stopped = True
            stalled = isinstance(self._error, StalledReadError)
            for condition in (self._has_room, self._has_task, self._has_batch):
                condition.notify_all()
        for thread in self._threads:
            thread.join(0.1 if stalled else 5.0)
        if not any(thread.is_alive() for thread in self._threads):
            for opened in self._open.values():
                opened.slot.release()
        self._open.clear()
        self._tasks.clear()
        self._store.close()
