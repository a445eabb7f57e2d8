"""Threads that take tasks from a queue, each with a reader of its own."""

import collections
import dataclasses
import functools
import itertools
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator

from saev_torch.errors import ReadError
from saev_torch.processes.interrupts import whole
from saev_torch.processes.locks import renewed
from saev_torch.processes.threads import Thread
from saev_torch.reading.reader import Pace, Reader, Spot

# A task is large enough that what it takes to begin one does not count, and small enough that all threads have some.
# Where a disk is waited for, a thread that is to end has to finish one first.
_TASK_NBYTES, _MAX_TASK_NBYTES, _MAX_SLOW_TASK_NBYTES = 4 << 20, 64 << 20, 16 << 20
_TASKS_PER_THREAD = 2
# Reads are announced so many tasks ahead.
_N_ANNOUNCED = 8


@dataclasses.dataclass
class Task:
    """Work for one thread, done with its reader; `announce` tells the kernel before what will be read.

    What `run` refers to keeps alive what is read into.
    """

    run: Callable[[Reader], None]
    announce: Callable[[Reader], None] | None = None


def guarded(target: Callable[[], None], on_error: Callable[[BaseException], None]) -> None:
    """Run what a thread is for, and hand over the error that ends it."""
    try:
        target()
    except BaseException as caught:  # noqa: BLE001 -- who waits for the thread raises it
        err = caught
        # Who keeps the error does not keep what the thread read with.
        traceback.clear_frames(caught.__traceback__)
        if isinstance(caught, MemoryError):
            err = ReadError(f"buffer_size: no memory is left ({caught}); lower it, or the number of workers.")
            err.__cause__ = caught
        try:
            on_error(err)
        finally:
            # The traceback keeps this frame, which must not keep the error.
            del err


def start_threads(threads: list[Thread]) -> None:
    """Start threads, of which `threads` keeps those that could be started; a `ReadError` unless it is all."""
    whole(functools.partial(_start, threads))


def _start(threads: list[Thread]) -> None:
    n_wanted, waiting = len(threads), threads.copy()
    threads.clear()
    try:
        for thread in waiting:
            # First, because an interrupt may come when it has started.
            threads.append(thread)
            thread.start()
    except (RuntimeError, MemoryError) as err:
        threads.pop()
        raise ReadError(
            f"n_threads: expected {n_wanted} more threads, got {len(threads)}: {err}; lower n_threads or the number of "
            "workers, or raise the limits of processes and memory."
        ) from err


class Crew:
    """Threads that run tasks until one fails, or they are stopped. Those beyond the number of cores wait, see `Pace`.

    Each opens its reader when it has its first task. Where the queue is empty they take tasks from `more`, and end with
    it; without `more` they wait for `put`. `on_error` is called with the error that ends a thread.
    """

    def __init__(
        self,
        name: str,
        n_threads: int,
        pace: Pace,
        open_reader: Callable[[Pace], Reader],
        on_error: Callable[[BaseException], None],
        more: Iterator[Task] | None = None,
    ) -> None:
        self._pace, self._open_reader, self._on_error, self._more = pace, open_reader, on_error, more
        # Taken by itself: an interrupt in a condition's own `__enter__` would leave it held.
        self._lock = lock = renewed(threading.RLock())
        self._has_task, self._may_look = threading.Condition(lock), threading.Condition(lock)
        # Of those that wait for their turn, the one that looks at the clock. If all did, they would take time from
        # those that read.
        self._lookout: int | None = None
        self._tasks: collections.deque[Task] = collections.deque()
        self.spots: list[Spot] = []
        self._stopped = False
        self.threads = [Thread(functools.partial(self._run, i), f"{name} {i}") for i in range(n_threads)]

    def count_working(self) -> int:
        """How many of the threads do not wait, as things stand."""
        return self._pace.count_working(len(self.threads))

    def task_nbytes(self, nbytes: int) -> int:
        """How many bytes a task is to read, of so many that are to be read."""
        most = _MAX_SLOW_TASK_NBYTES if self._pace.is_slow else _MAX_TASK_NBYTES
        return max(_TASK_NBYTES, min(nbytes // (_TASKS_PER_THREAD * self.count_working()), most))

    def put(self, tasks: Iterable[Task]) -> None:
        """Add tasks to the queue, unless the threads are to end."""
        with self._lock:
            if not self._stopped:
                self._tasks.extend(tasks)
                self._has_task.notify_all()

    def stop(self) -> None:
        """Let the threads end with the task that they are at."""
        with self._lock:
            self._stopped = True
            self._tasks.clear()
            self._wake_all()

    def _wake_all(self) -> None:
        self._has_task.notify_all()
        self._may_look.notify_all()

    def _run(self, number: int) -> None:
        guarded(functools.partial(self._work, number), self._on_error)
        # One that ends has failed, or found nothing more to do: neither have the others.
        self.stop()

    def _work(self, number: int) -> None:
        reader: Reader | None = None
        while (task := self._take(number)) is not None:
            if reader is None:
                # Only now it has been decided how to read.
                reader = self._open_reader(self._pace)
                self.spots.append(reader.spot)
            if self._pace.is_slow:
                self._announce(reader)
            was_slow = self._pace.is_slow
            task.run(reader)
            del task
            if self._pace.is_slow and not was_slow:
                with self._lock:
                    self._wake_all()

    def _take(self, number: int) -> Task | None:
        """Wait for a task, and for its turn to be this thread's; None where the thread is to end."""
        with self._lock:
            while not self._stopped:
                if not self._tasks and self._more is not None:
                    self._tasks.extend(itertools.islice(self._more, 1))
                    if not self._tasks:
                        break
                wait_s = self._pace.wait_s(number)
                if self._tasks and wait_s is None:
                    self._look_no_more(number)
                    return self._tasks.popleft()
                if wait_s is not None and self._lookout not in (None, number):
                    self._may_look.wait()
                    continue
                if wait_s is not None:
                    self._lookout = number
                self._has_task.wait(wait_s if self._tasks else None)
            return None

    def _look_no_more(self, number: int) -> None:
        """Where nobody looks at the clock, let the next one do so: there may be tasks for it as well."""
        if self._lookout in (None, number):
            self._lookout = None
            self._may_look.notify()

    def _announce(self, reader: Reader) -> None:
        """Announce one of the next tasks. Only where reads are slow, because it takes time of its own."""
        with self._lock:
            task = next((one for one in itertools.islice(self._tasks, _N_ANNOUNCED) if one.announce), None)
            if task is None:
                return
            announce, task.announce = task.announce, None
        if announce is not None:
            announce(reader)


def run_tasks(
    name: str, n_threads: int, pace: Pace, open_reader: Callable[[Pace], Reader], tasks: Iterator[Task]
) -> None:
    """Run tasks by at most `n_threads` threads until all are done, and raise the first error.

    `tasks` is asked for the next one when a thread is free.
    """
    errors: list[BaseException] = []
    crew = Crew(name, n_threads, pace, open_reader, errors.append, tasks)
    try:
        start_threads(crew.threads)
        for thread in crew.threads:
            thread.join()
    finally:
        crew.stop()
        for thread in crew.threads:
            thread.join()
    if errors:
        try:
            raise errors[0]
        finally:
            # The traceback keeps this frame, which must not keep the error, nor what the tasks were for.
            errors.clear()
            del crew, tasks
