"""The worker processes of one iteration: how long they are waited for, and that they end."""

import contextlib
import logging
import time
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from saev_torch.processes.counters import Counters
from saev_torch.processes.idling import Idle
from saev_torch.processes.leaving import come_by, end_processes

_log = logging.getLogger("saev_torch")

# How often torch looks whether workers are alive, and how long all of them together have to end by themselves.
_LOOK_S, _LEAVE_S = 5.0, 4.0


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
        if getattr(self, "_shutdown", True):
            return
        workers: list[Any] = self._workers
        deadline = time.monotonic() + _LEAVE_S
        self._workers = [_Leaving(worker, deadline) for worker in workers]  # type: ignore[misc]
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
    """End an iterator of torch, with its workers or threads."""
    if not hasattr(iterator, "_shutdown_workers"):
        iterator._dataset_fetcher.dataset_iter.close()
    else:
        iterator._shutdown_workers()


def end_unfinished(err: BaseException) -> None:
    """End the workers of an iterator of torch that was interrupted while it was made: then it cannot do so itself."""
    traceback = err.__traceback__
    while traceback is not None:
        found = traceback.tb_frame.f_locals
        iterator: Any = found.get("self")
        if hasattr(iterator, "_workers_done_event") and hasattr(iterator, "_workers"):
            iterator._shutdown = True
            # Else torch raises an error for each that is killed here, in place of what interrupted.
            with contextlib.suppress(ValueError):
                signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
            # The latest may not have come to the others yet.
            workers = {*iterator._workers, found.get("w", None)} - {None}
            end_workers([worker for worker in workers if worker.pid is not None])
        traceback = traceback.tb_next
