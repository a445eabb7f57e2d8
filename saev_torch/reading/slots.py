"""Batch memory that is handed out again only when the last view of it is gone.

Fresh memory costs more than reading into it, because of its page faults, so slots are reused. In a worker process a
slot is a memfd: it does not count against /dev/shm, travels to the parent as a name, and vanishes with the last
process that maps it. Elsewhere it is private memory. Both are in huge pages where the system has them: most systems
give none to shared memory when it is touched, but do so on request (`MADV_COLLAPSE`, Linux 6.1), and 50 MB are there
in 4 ms, not in 38, wherever that was measured; copying into them is faster for good.

A slot knows that it is free from counters with one writer each: the worker counts what it sent, the parent what it
let go of. A worker that is killed cannot leave a lock behind.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import mmap
import multiprocessing
import os
import threading
import weakref

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from saev_torch.errors import ReadError, WorkerLostError
from saev_torch.processes.locks import renewed
from saev_torch.reading.leases import Lease, settle

_HEADER = mmap.PAGESIZE
_SENT, _RETURNED = 0, 1
_HUGE_PAGE = 2 << 20
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25
_LOST = (
    "DataLoader worker (pid {}) exited unexpectedly: its batch cannot be received. Workers are killed most often where "
    "memory runs out; go on from the last state with fewer workers or a smaller buffer_size."
)
_numbers = itertools.count()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Slot:
    """Memory for one batch, shared if another process will read it: then `fd` is its descriptor, else -1."""

    # Where the memory begins in the file that `fd` stands for.
    file_offset = _HEADER

    def __init__(self, nbytes: int, shared: bool) -> None:
        self.number = next(_numbers)
        self.nbytes = nbytes
        self.pid = os.getpid()
        self._held = False
        self.fd = -1
        try:
            self._map_pages(nbytes, shared)
        except (OSError, MemoryError) as err:
            raise ReadError(
                f"batch_size: expected {nbytes} bytes of memory for another batch, got: {err}; keep fewer batches, or "
                "lower batch_size, buffer_size or the number of workers."
            ) from err
        self.address = int(self._memory.ctypes.data)

    def _map_pages(self, nbytes: int, shared: bool) -> None:
        if shared:
            self.fd = os.memfd_create("saev_torch", os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, self.fd).atexit = False
            # A count goes on in each process, and a process id is used again; an inode is not.
            self.number = os.fstat(self.fd).st_ino
            os.ftruncate(self.fd, _file_nbytes(nbytes))
            self._owner = _map_shared(self.fd, nbytes)
            if self._owner.nbytes >= _HUGE_PAGE:
                # A huge page comes where there is a small one. Without any, all is as if nothing had been asked.
                self._owner[::_HUGE_PAGE] = 0
                _libc.madvise(self._owner.ctypes.data, self._owner.nbytes, _MADV_COLLAPSE)
            self._counts = self._owner[:_HEADER].view(np.int64)
            self._memory = self._owner[_HEADER : _HEADER + nbytes]
        else:
            pages = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if nbytes >= _HUGE_PAGE:
                with contextlib.suppress(OSError):
                    pages.madvise(mmap.MADV_HUGEPAGE)
            self._owner = self._memory = np.frombuffer(pages, dtype=np.uint8)
            self._counts = np.zeros(2, dtype=np.int64)

    @property
    def is_free(self) -> bool:
        """Whether nobody can see the memory: neither this process nor one that it was sent to."""
        return not self._held and bool(self._counts[_SENT] == self._counts[_RETURNED])

    @property
    def is_own(self) -> bool:
        """Whether this process may send the slot on: it is shared, and was made here."""
        return self.fd >= 0 and self.pid == os.getpid()

    def lease(self) -> Lease:
        """Hand the memory out; the slot is free again when the lease and all views of it are gone."""
        self._held = True
        return Lease(self._memory, self._owner, self.release, self.fd >= 0)

    def release(self) -> None:
        """Take the slot back: nothing in this process uses it any more."""
        self._held = False

    def send(self) -> tuple[int, int, int, int]:
        """Note that the slot goes to the parent process; the name by which `attach` finds it there."""
        self._counts[_SENT] += 1
        _sent.add(self)
        return self.pid, self.number, self.fd, self.nbytes


@dataclasses.dataclass
class OpenBatch:
    """A batch of `size` samples that is being read, or was.

    Attributes:
        cells: `[size] int64`, the cell of each row; see `Selection`.
        labels: `[size] uint8`, the label of each row (anything for a special token), where labels are read.
    """

    slot: Slot
    size: int
    cells: NDArray[np.int64]
    labels: NDArray[np.uint8] | None


def _file_nbytes(nbytes: int) -> int:
    """Size of the file of a shared slot: with its header, in whole huge pages unless it is small."""
    unit = _HUGE_PAGE if nbytes >= _HUGE_PAGE else mmap.PAGESIZE
    return -(-(nbytes + _HEADER) // unit) * unit


def _map_shared(fd: int, nbytes: int) -> NDArray[np.uint8]:
    """Map the file of a shared slot at a boundary of huge pages; an `OSError` where the system refuses."""
    nbytes = _file_nbytes(nbytes)
    # A reservation of address space, given back as one with what is mapped into it.
    reserved = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    owner = np.frombuffer(reserved, dtype=np.uint8)
    first = -owner.ctypes.data % _HUGE_PAGE
    owner = owner[first : first + nbytes]
    address, protection = owner.ctypes.data, mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mmap(address, nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return owner


_sent: set[Slot] = set()
"""Slots on their way: their descriptors stay open until the parent has let go of them."""


def _forget_returned() -> None:
    _sent.difference_update([slot for slot in tuple(_sent) if slot.is_free])


class SlotPool:
    """Slots of one size. It never waits for a user who keeps batches: it makes another slot."""

    def __init__(self, nbytes: int, shared: bool) -> None:
        self.nbytes, self.shared = nbytes, shared
        self._begin()

    def _begin(self) -> None:
        self._pid, self._lock = os.getpid(), renewed(threading.Lock())
        self._slots: list[Slot] = []

    def acquire(self, keep: int) -> Slot:
        """Take a free slot, or make one; it is held until its lease is gone.

        As many as `keep` are worth keeping; free ones beyond that are given back to the system.
        """
        if self._pid != os.getpid():
            # In a child, the slots are its parent's.
            self._begin()
        settle()
        with self._lock:
            _forget_returned()
            free = [slot for slot in self._slots if slot.is_free]
            while len(free) > 1 and len(self._slots) > keep:
                self._slots.remove(free.pop())
            slot = free[0] if free else Slot(self.nbytes, self.shared)
            if not free:
                self._slots.append(slot)
            slot._held = True
            return slot

    def forget(self, slot: Slot) -> None:
        """Never hand a slot out again: somebody may still write to it."""
        with self._lock, contextlib.suppress(ValueError):
            self._slots.remove(slot)


def can_share() -> bool:
    """Whether a process can map the memory of another by its name under /proc, as `attach` does."""
    try:
        with open(os.memfd_create("saev_torch", os.MFD_CLOEXEC), "r+b", buffering=0) as file:
            os.close(os.open(f"/proc/{os.getpid()}/fd/{file.fileno()}", os.O_RDWR | os.O_CLOEXEC))
    except (AttributeError, OSError):
        return False
    return True


_mapped: dict[int, dict[int, NDArray[np.uint8]]] = {}
_mapped_lock = renewed(threading.Lock())
os.register_at_fork(after_in_child=_mapped.clear)
os.register_at_fork(after_in_child=_sent.clear)


def attach(pid: int, number: int, fd: int, nbytes: int) -> Lease:
    """Map a slot that a worker process sent; see `Slot.send`. A `WorkerLostError` where the worker is gone.

    The mapping is kept for the next batch in the same slot until the worker's `Process` object is gone.
    """
    settle()
    with _mapped_lock:
        memory = _mapped.get(pid, {}).get(number)
        if memory is None:
            memory = _map(pid, fd, nbytes)
            process = next((p for p in multiprocessing.active_children() if p.pid == pid), None)
            if process is not None:
                if pid not in _mapped:
                    _mapped[pid] = {}
                    weakref.finalize(process, _mapped.pop, pid, None).atexit = False
                _mapped[pid][number] = memory
    counts = memory[:_HEADER].view(np.int64)

    def release() -> None:
        counts[_RETURNED] += 1

    return Lease(memory[_HEADER : _HEADER + nbytes], memory, release, is_shared=True)


def _map(pid: int, fd: int, nbytes: int) -> NDArray[np.uint8]:
    try:
        own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        raise WorkerLostError(_LOST.format(pid)) from err
    try:
        if os.fstat(own).st_size != _file_nbytes(nbytes):
            raise WorkerLostError(_LOST.format(pid))
        return _map_shared(own, nbytes)
    finally:
        os.close(own)


_worker_pools: dict[int, SlotPool] = {}
os.register_at_fork(after_in_child=_worker_pools.clear)


def make_pool(nbytes: int) -> SlotPool:
    """Memory for batches: in a worker shared with the parent, and kept for the next epoch."""
    if get_worker_info() is None or not can_share():
        return SlotPool(nbytes, shared=False)
    return _worker_pools.setdefault(nbytes, SlotPool(nbytes, shared=True))
