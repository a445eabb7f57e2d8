"""Slots that workers sent: mapped once for each region, until the worker is gone."""

import multiprocessing
import os
import threading
import weakref
from typing import Any

from saev_torch.errors import ReadError, WorkerLostError
from saev_torch.processes import handover
from saev_torch.processes.locks import renewed
from saev_torch.processes.machine import is_alive
from saev_torch.reading.leases import Lease, settle
from saev_torch.reading.regions import ReceivedRegion, file_nbytes

_LOST = (
    "DataLoader worker (pid {}) exited unexpectedly: its batch cannot be received. Workers are killed most often where "
    "memory runs out; go on from the last state with fewer workers or a smaller buffer_size."
)

_regions: dict[int, dict[int, ReceivedRegion]] = {}
"""By process and number."""
_lock = renewed(threading.Lock())
os.register_at_fork(after_in_child=_regions.clear)


def attach(
    pid: int, number: int, fd: int, nbytes: int, n_slots: int, index: int, age: int, offered: Any = None
) -> Lease:
    """Map a slot that a worker process sent; see `Slot.send`.

    The mapping is kept for the next batches in the same region until the worker's `Process` object is gone.

    Raises:
        WorkerLostError: The worker is gone.
        ReadError: It is there, but the system lets nobody have its memory.
    """
    settle()
    try:
        with _lock:
            region = _regions.get(pid, {}).get(number)
            # What was offered is taken at any rate, or the worker would keep it ready for ever.
            if region is None or offered is not None:
                mapped = _map(pid, number, handover.take(pid, fd, offered), nbytes, n_slots)
                region = region or mapped
                _keep(pid, number, region)
            return region.begin_use(index, age)
    except handover.RefusedError as err:
        raise ReadError(
            f"DataLoader worker (pid {pid}): expected to open its memory, got: {err}; change user or privileges before "
            "iterating, or raise the limit of open files (ulimit -n)."
        ) from err
    except ProcessLookupError as err:
        raise WorkerLostError(_LOST.format(pid)) from err


def _map(pid: int, number: int, fd: int, nbytes: int, n_slots: int) -> ReceivedRegion:
    try:
        found = os.fstat(fd)
        # Another process may have the number of this one by now.
        if (found.st_ino, found.st_size) != (number, file_nbytes(nbytes, n_slots)):
            raise ProcessLookupError
        return ReceivedRegion(fd, nbytes, n_slots)
    finally:
        os.close(fd)


def _keep(pid: int, number: int, region: ReceivedRegion) -> None:
    process = next((p for p in multiprocessing.active_children() if p.pid == pid), None)
    if process is None:
        return
    if pid not in _regions:
        _regions[pid] = {}
        weakref.finalize(process, _drop, pid).atexit = False
    known = _regions[pid]
    for other in [other for other, mapped in known.items() if mapped.is_closed]:
        del known[other]
    known[number] = region
    region.keep()


def _drop(pid: int) -> None:
    """Forget a process; if it is over, give back its memory that is not used here."""
    regions = _regions.pop(pid, {})
    # Where another has its number already, the memory goes with the last batch.
    for region in () if is_alive(pid) else regions.values():
        region.be_orphan()
