"""An iteration of a ready-made loader: it counts what is taken, and others than its consumer may end it."""

import os
import threading
from collections.abc import Iterator
from typing import Any

from saev_torch.batch import ActivationBatch
from saev_torch.errors import EndedError, ReadError, SaevTorchError
from saev_torch.processes.inherited import register
from saev_torch.processes.leaving import come_by
from saev_torch.processes.locks import renewed
from saev_torch.processes.workers import end_iterator
from saev_torch.resume.cursor import Iteration

# How long another thread may wait for the batch that it is about to take.
_LET_GO_S = 5.0
_FORKED = "expected an iteration of its own, got one whose workers are of the process that forked it; iterate anew."
_INTERRUPTED = "{}: expected to take a batch, got interrupted; load_state_dict(state_dict()), and iterate again."


class CountedBatches(Iterator[ActivationBatch]):
    """Counts the batches that are taken from an iterator, None when it is over; its `iteration` outlives it.

    One thread takes a batch at a time. Others, and signal handlers, may end it.
    """

    def __init__(self, iterator: Any, iteration: Iteration) -> None:
        self.iterator, self.iteration = iterator, iteration
        self._failure: Exception | None = None
        # A signal handler gets it while its own thread has it, and then sees that it is busy.
        self._lock = renewed(threading.RLock())
        self._thread: int | None = None
        self._is_busy = self._ends = False
        register(self)

    def __next__(self) -> ActivationBatch:
        come_by()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self.iterator is None:
                raise StopIteration
            self._thread, self._is_busy = threading.get_ident(), True
            try:
                return self._count(self._take())
            except BaseException as err:
                if not isinstance(err, Exception) and not self._ends:
                    # The batch that was on its way may be lost: none may seem to follow.
                    self._failure, self._ends = EndedError(_INTERRUPTED.format(type(err).__name__)), True
                raise
            finally:
                self._is_busy = False
                if self._ends:
                    self._end()

    def _count(self, batch: ActivationBatch) -> ActivationBatch:
        if self._ends:
            raise self._failure or StopIteration
        # A `collate_fn` may make something else of a batch; then it is counted, and the digest leaves it out.
        known = (batch.digest, batch.number) if isinstance(batch, ActivationBatch) else (None,)
        self.iteration.count(*known)
        return batch

    def _take(self) -> Any:
        try:
            return next(self.iterator)
        except StopIteration:
            # The iterator of persistent workers stays with the loader; any other ends its workers here.
            self.iterator = None
            raise
        except Exception as err:
            if self._failure is not None:
                raise self._failure from err
            # What other workers have ready must not follow, as if nothing were missing. And torch's iterator would live
            # on in the traceback, until the garbage collector ends it in the wrong order, in 5 s for each worker.
            self._failure = type(err)(str(err)) if isinstance(err, SaevTorchError) else RuntimeError(str(err))
            self._end()
            raise

    def _end(self) -> None:
        iterator, self.iterator = self.iterator, None
        end_iterator(iterator)

    def give_way(self) -> None:
        """Let another iteration have the workers."""
        with self._lock:
            if self.iterator is not None and not self.iteration.is_over:
                self._failure = EndedError(
                    "persistent_workers: expected one iteration at a time, got another, to which the workers went; "
                    "use persistent_workers=False, or a loader for each."
                )
            self.iterator = None

    def leave_to_parent(self) -> Any:
        """In a forked child: let go of workers."""
        self._lock, self._is_busy, iterator = renewed(threading.RLock()), False, self.iterator
        if not hasattr(iterator, "_shutdown_workers"):
            return None
        self._failure, self.iterator = ReadError(f"process {os.getpid()}: {_FORKED}"), None
        return iterator

    def shut_down(self) -> bool:
        """End the iteration; whether it is over now, not only when its consumer has the batch that it waits for."""
        has_lock = self._lock.acquire(timeout=_LET_GO_S)
        try:
            if self.iterator is None:
                return True
            if self._thread not in {None, threading.get_ident()} and not self.iteration.is_over:
                self._failure = EndedError(
                    f"shutdown: expected to be called when an iteration is done with, got a call from another thread "
                    f"after {self.iteration.n_taken} batches; iterate again, or end the iteration first."
                )
            # Nobody but its consumer can end a generator that runs, or queues that this very thread is in.
            if self._is_busy and (has_lock or not hasattr(self.iterator, "_shutdown_workers")):
                self._ends = True
                return False
            self._end()
            return True
        finally:
            if has_lock:
                self._lock.release()
