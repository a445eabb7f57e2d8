"""The worker processes of one iteration: how long they are waited for, and that they end."""

import logging
import os
import signal
import threading
import time
from multiprocessing import popen_fork, queues
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, _utils
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from saev_torch.processes.counters import Counters
from saev_torch.processes.idling import Idle
from saev_torch.processes.interrupts import whole
from saev_torch.processes.leaving import come_by, end_processes

_log = logging.getLogger("saev_torch")

# How often torch looks whether workers are alive, and how long all of them together have to end by themselves.
_LOOK_S, _LEAVE_S = 5.0, 4.0
# How long what was interrupted may wait for a lock, a thread or a process that is about to be free or to end.
_LOCK_S = 1.0
_HELPERS = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")


class _Leaving:
    """A worker that torch waits for no longer than until `deadline`, where it would wait 5 s for each."""

    def __init__(self, worker: BaseProcess, deadline: float) -> None:
        self._worker, self._deadline = worker, deadline

    def join(self, timeout: float) -> None:
        self._worker.join(min(timeout, max(0.0, self._deadline - time.monotonic())))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


class WorkerBatches(_MultiProcessingDataLoaderIter):
    """torch's iterator with workers. Its timeout is over where no reads have finished in them for so long.

    Time in which this process did not run does not count. It ends its workers also where they wait for a read that
    never returns.
    """

    def __init__(self, loader: DataLoader[Any], counters: Counters) -> None:
        self._counters = counters
        super().__init__(loader)

    def _try_get_data(self, timeout: float = _LOOK_S) -> tuple[bool, Any]:
        idle = Idle(timeout, self._look)
        while True:
            began = time.monotonic()
            found: tuple[bool, Any] = super()._try_get_data(idle.step_s)  # type: ignore[no-untyped-call]
            come_by()
            if not found[0]:
                idle.note(time.monotonic() - began)
            if found[0] or idle.is_over:
                return found

    def _look(self) -> Any:
        return self._counters.beats([worker.pid or 0 for worker in self._workers])

    def _shutdown_workers(self) -> None:
        # One that was interrupted or failed while it was made has none yet.
        if not getattr(self, "_shutdown", True) and hasattr(self, "_workers"):
            whole(self._end)

    def _end(self) -> None:
        workers: list[Any] = self._workers
        index_queues: list[Any] = self._index_queues
        deadline = time.monotonic() + _LEAVE_S
        self._workers = [_Leaving(worker, deadline) for worker in workers]  # type: ignore[misc]
        for queue in index_queues:
            # An interrupt in a `put` may have left its lock held. The `put` that ends a worker would wait for ever.
            queue._notempty.acquire(timeout=_LOCK_S)
            queue._notempty.release()
        try:
            super()._shutdown_workers()
        finally:
            self._workers = workers
            # Not where the interpreter goes: then torch has done nothing, and the workers have ended.
            if self._shutdown:
                end_workers(workers)


def end_workers(workers: list[BaseProcess]) -> None:
    """Kill workers that have not ended, and say which cannot be killed."""
    left = end_processes(workers)
    if left:
        _log.error(
            "worker processes %s cannot be killed, because they wait in the operating system, most likely for a read "
            "that does not return: they are left behind, and end when it does.",
            left,
        )


def end_iterator(iterator: Any) -> None:
    """End an iterator of torch, if there is one, with its workers or threads."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
    elif iterator is not None:
        iterator._dataset_fetcher.dataset_iter.close()


def children_here() -> set[int]:
    """Process ids of the processes that this thread has started; none where the system does not tell."""
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()}
    except OSError:
        return set()


def end_unfinished(err: BaseException, before: set[int] | None) -> None:
    """End the workers of an iterator of torch that was interrupted while it was made: then it cannot do so itself.

    `before` are the processes that this thread had started when that began, None where it has no workers.
    """
    traceback = err.__traceback__
    while traceback is not None:
        found = traceback.tb_frame.f_locals
        iterator: Any = found.get("self")
        if hasattr(iterator, "_workers_done_event") and hasattr(iterator, "_workers"):
            _end_half_made(iterator, found.get("w"), found.get("index_queue"))
        if type(iterator) is popen_fork.Popen and not hasattr(iterator, "pid"):
            # At the fork: then nothing has closed its pipes, nor will.
            for name in ("parent_r", "child_w", "child_r", "parent_w"):
                if name in found:
                    os.close(found[name])
        traceback = traceback.tb_next
    for pid in set() if before is None else children_here() - before:
        _end_unknown(pid)


def _end_half_made(iterator: Any, worker: Any, queue: Any) -> None:
    """End what there is of an iterator; the latest worker and its queue may not have come to the others yet."""
    iterator._shutdown = True
    iterator._workers_done_event.set()
    if hasattr(iterator, "_pin_memory_thread_done_event"):
        iterator._pin_memory_thread_done_event.set()
    if iterator._worker_pids_set:
        # Else torch's handler would raise an error for each that is killed.
        _utils.signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
        iterator._worker_pids_set = False
    end_workers([one for one in {*iterator._workers, worker} - {None} if one.pid is not None])
    for one in {*iterator._index_queues, queue} - {None}:
        _end_feeder(one)


def _end_feeder(queue: Any) -> None:
    """Close a queue of multiprocessing, and end its thread, also where an interrupt came into a `put`."""
    # What `close` does; but the `put` may have kept the lock, or not have come to the finalizer that `close` calls.
    queue._closed, queue._close, thread = True, None, queue._thread
    queue._notempty.acquire(timeout=_LOCK_S)
    queue._buffer.append(queues._sentinel)  # type: ignore[attr-defined]
    queue._notempty.notify()
    queue._notempty.release()
    if thread is not None and thread.ident is not None:
        thread.join(_LOCK_S)
    if thread is None or not thread.is_alive():
        queue._reader.close()
        queue._writer.close()


def _end_unknown(pid: int) -> None:
    """Kill a worker that was forked when the interrupt came, before multiprocessing learned its number."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        # The helpers of multiprocessing start with the first worker, and stay.
        if any(name in command for name in _HELPERS):
            return
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + _LOCK_S
        while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.001)
    except OSError:
        # It has ended, and whoever started it has waited for it.
        return
