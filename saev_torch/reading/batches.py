"""The batches that are open: being read, or read and not handed out. Their number bounds the memory."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable

import numpy as np

from saev_torch.errors import EndedError
from saev_torch.order.steps import N_ONE_BY_ONE, Step
from saev_torch.processes.counters import Waits
from saev_torch.processes.locks import renewed
from saev_torch.reading.patience import Patience
from saev_torch.reading.slots import OpenBatch, Slot, SlotPool

_N_SPARE = 2
_MAX_TAKEN = 4
# Another process lets go of a batch without telling.
_POLL_S = 0.002


@dataclasses.dataclass
class Running:
    """A step, how many of its tasks are left, and how many samples they read."""

    step: Step
    n_tasks: int
    n_samples: int = 0


class Batches:
    """Batches from the time that they are opened by one thread, and read by others, until a consumer takes them.

    At most `max_open` are `open` at a time, by number; `n_fills` steps that fill a lane are complete before the first
    one is handed out. `waits` tells what was waited for.

    Attributes:
        one_by_one: Whether each batch is read by itself, so that few need be open.
        is_brief: Whether the memory of all that are open is not wanted for long: huge pages may not pay.
    """

    def __init__(self, pool: SlotPool, max_open: int, n_fills: int) -> None:
        self.open: dict[int, OpenBatch] = {}
        self.waits = Waits()
        self.one_by_one = self.is_brief = False
        self._pool, self._max_open = pool, max_open
        self._fills_wanted = n_fills
        self._lock = renewed(threading.Lock())
        self._has_room = threading.Condition(self._lock)
        self._has_batch = threading.Condition(self._lock)
        # Steps in order; the batches that are complete after each follow when its tasks are done.
        self._running: collections.deque[Running] = collections.deque()
        self._ready: collections.deque[int] = collections.deque()
        self._taken: list[Slot] = []
        # Samples that were read and not handed out, and those of a full batch.
        self._n_loaded = self._batch_size = 0
        self._all_scheduled = self._stopped = self._is_full = False
        # What ended a thread; where that was the one that opens batches, those that it opened before come first.
        self._error: BaseException | None = None
        self._is_last = False
        self.is_stalled = False
        """Whether a batch did not come in time."""

    # The thread that opens them

    @property
    def _most(self) -> int:
        """How many may be open now."""
        if not self.one_by_one:
            return self._max_open
        # The first one alone, so that nothing keeps the cores from it.
        return min(N_ONE_BY_ONE, self._max_open) if self.waits.nbytes else 1

    def wait_for_room(self, n_new: int) -> bool:
        """Wait until so many batches may be opened; whether to go on."""
        with self._lock:
            began = time.monotonic()
            while not self._stopped and (wait_s := self._wait_s(n_new)) is not None:
                self._is_full = True
                self._has_batch.notify_all()
                self._has_room.wait(wait_s or None)
            self._is_full = False
            if not self._running:
                self.waits.consumer_s += time.monotonic() - began
            return not self._stopped

    def _wait_s(self, n_new: int) -> float | None:
        """How long to wait before opening more batches: None if not at all, 0.0 until one is taken."""
        if not self._ready and not self._running:
            return None
        if len(self.open) + n_new > self._most:
            return 0.0
        self._taken = [slot for slot in self._taken if not slot.is_free]
        # Batches on their way to the consumer count too, but a user who keeps them must not be waited for.
        n_held = len(self.open) + min(len(self._taken), _MAX_TAKEN)
        return None if n_held + n_new <= self._most + _N_SPARE else _POLL_S

    def open_one(self, number: int, size: int, has_labels: bool, has_token_ids: bool = False) -> None:
        """Open a batch of `size` samples."""
        labels = np.empty(size, dtype=np.uint8) if has_labels else None
        token_ids = np.empty(size, dtype=np.int32) if has_token_ids else None
        slot = self._pool.acquire(self._max_open + _N_SPARE)
        with self._lock:
            self._batch_size = max(self._batch_size, size)
            self.open[number] = OpenBatch(slot, size, np.empty(size, dtype=np.int64), labels, token_ids)

    def begin(self, running: Running) -> None:
        """A step begins; its batches have been opened."""
        with self._lock:
            self._running.append(running)
            self.waits.n_events += 1
            self._has_batch.notify_all()

    def finish_scheduling(self) -> None:
        """No step follows."""
        with self._lock:
            self._all_scheduled = True
            self._has_batch.notify_all()

    def fail_last(self, err: BaseException) -> None:
        """Let the consumer raise an error behind all batches that have begun."""
        with self._lock:
            self._is_last, self._all_scheduled = self._error is None, True
            self._error = self._error or err
            self._has_batch.notify_all()

    def abandon(self) -> None:
        """The step that began last will not be finished by the thread that opened it; no other has a task of it."""
        with self._lock:
            self._running.pop()

    # The threads that read

    def finish_task(self, running: Running, nbytes: int = 0) -> None:
        """A task of a step is done, which has read so many bytes of activations."""
        with self._lock:
            running.n_tasks -= 1
            self.waits.n_events += 1
            self.waits.n_read += nbytes
            if not running.n_tasks:
                self._n_loaded += running.n_samples
                self._has_batch.notify_all()

    def fail(self, err: BaseException) -> None:
        """Let the consumer raise an error behind the batches that are ready; others may never be."""
        with self._lock:
            # It is of an earlier batch than the last one's.
            self._error, self._is_last = err if self._is_last else self._error or err, False
            self._has_batch.notify_all()

    # The consumer

    def take(self, sample_nbytes: int, make_patience: Callable[[], Patience]) -> OpenBatch | None:
        """Wait for the next batch; None after the last.

        Raises `StalledReadError` when patience is over, `EndedError` where `stop` was called, and else what ended a
        thread.
        """
        patience: Patience | None = None
        while True:
            with self._lock:
                is_there, opened = self._find(sample_nbytes)
                if is_there:
                    return opened
                if patience is None:
                    patience = make_patience()
                if patience.is_over:
                    self.is_stalled = self._stopped = True
                    raise patience.error()
                waited_s = self._wait(patience.step_s)
            patience.note(waited_s)

    def _find(self, sample_nbytes: int) -> tuple[bool, OpenBatch | None]:
        """Whether there is something to be taken, and what; None where nothing follows."""
        while self._running and not self._running[0].n_tasks:
            done = self._running.popleft().step
            self._fills_wanted -= done.fills
            self._ready.extend(done.batches)
        finished = self._all_scheduled and not self._running
        filled = self._fills_wanted <= 0 or finished or (self._is_full and not self._running)
        if self._stopped or not self._ready or not filled:
            if self._stopped or finished or not self._is_last:
                self._raise_error()
            return finished, None
        self._fills_wanted = 0
        opened = self.open.pop(self._ready.popleft())
        # Memory of the other batches is not for now.
        self._pool.in_haste = self.one_by_one or self.is_brief
        self._taken.append(opened.slot)
        self._n_loaded -= opened.size
        self.waits.nbytes += opened.size * sample_nbytes
        self._has_room.notify()
        return True, opened

    def _raise_error(self) -> None:
        if self._error is not None:
            err, self._error, self._stopped = self._error, None, True
            try:
                raise err
            finally:
                # What is raised names its frames. Kept here, too, it would keep us, and we it, for ever.
                del err
        if self._stopped:
            raise EndedError("next: expected an iteration that goes on, got one that was ended; iterate anew.")

    def _wait(self, step_s: float) -> float:
        began = time.monotonic()
        self._has_batch.wait(step_s)
        waited_s = time.monotonic() - began
        if self._running:
            self.waits.disk_s += waited_s
        else:
            self.waits.plan_s += waited_s
        return waited_s

    @property
    def fill(self) -> float:
        """Share of the buffer, the batches that may be open, that has been read and not handed out."""
        return min(1.0, max(0, self._n_loaded) / max(1, self._most * self._batch_size))

    @property
    def is_stopped(self) -> bool:
        """Whether nothing is wanted any more."""
        return self._stopped

    def stop(self) -> None:
        """Let all who wait here go on."""
        with self._lock:
            self._stopped = True
            self._has_room.notify_all()
            self._has_batch.notify_all()

    def release(self, is_quiet: bool) -> None:
        """Forget the open batches; their memory is used again if `is_quiet`, so that nobody writes to it any more."""
        for opened in self.open.values():
            if is_quiet:
                opened.slot.release()
            else:
                self._pool.forget(opened.slot)
        self.open.clear()
        if not self._pool.shared:
            self._pool.shrink(self._max_open + _N_SPARE)
