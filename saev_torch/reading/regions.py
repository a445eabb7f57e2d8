"""Files of memory that a worker shares with its parent: each holds many slots, so that few descriptors do for all.

Slots stand next to each other, in whole pages. Behind them are words for both sides: for each slot how often it was
sent, how often it came back, and how often it was given back to the system. Each word has one writer, so there are no
locks. Memory that is given back is gone from the file, whoever maps it, and the place in the file is used again.
"""

import collections
import ctypes
import errno
import functools
import mmap
import os
import sys
import time
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.processes import handover
from saev_torch.processes.machine import memory_file
from saev_torch.reading.leases import Lease, Loan

HUGE_PAGE = 2 << 20
_MAP_FIXED = 0x10
_MADV_REMOVE, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 9, 14, 15, 23, 25
# What a signal ended, or another thread of the system has its hands on, may be had later.
_PASSES = frozenset({errno.EINTR, errno.EAGAIN})
# Huge pages are asked for in such pieces. Those of a slot come fast at so many bytes in a second of the processor. If
# there are many slots they may be slow, as small pages would stay for too long, but each takes a few seconds at most.
_HUGE_NBYTES, _HUGE_RATE = 4 * HUGE_PAGE, 2e9
_N_LARGE, _LONGEST_S = 16, 2.0
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_IS_CLOSED, _IS_MAPPED, _N_DISCARDED, _N_WORDS = range(4)
_SENT, _RETURNED, _AGE, _N_COUNTS = range(4)
# Whether huge pages of the process alone have come fast so far.
_has_fast = True

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
if hasattr(_libc, "fallocate"):
    _libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

Name = tuple[int, int, int, int, int, int, int, Any]
"""Process, number and descriptor of a region; size and number of its slots; the slot, its age; what was offered."""


def advise(memory: NDArray[np.uint8], advice: int) -> bool:
    """Give the system advice about memory that begins and ends with a page; whether it took it."""
    if not hasattr(_libc, "madvise") or sys.platform != "linux":
        return False
    return not _libc.madvise(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), advice)


def _are_fast(memory: NDArray[np.uint8], advice: int, may_be_slow: bool = False) -> bool | None:
    """Ask for huge pages, piece after piece, as long as they come fast, or fast enough where they `may_be_slow`.

    Returns whether all came; None where the system refuses.
    """
    # Not the time that others have the core: they read, and there are more of them than cores.
    latest = time.thread_time() + (_LONGEST_S if may_be_slow else memory.nbytes / _HUGE_RATE)
    for start in range(0, memory.nbytes, _HUGE_NBYTES):
        if not advise(memory[start : start + _HUGE_NBYTES], advice) and ctypes.get_errno() not in _PASSES:
            return None
        if time.thread_time() > latest:
            return False
    return True


def make_pages(nbytes: int, may_be_huge: bool = True) -> tuple[NDArray[np.uint8], bool]:
    """Memory of this process alone, in huge pages where the system has them and they come fast; whether it is so.

    Where it may not, a page comes when it is written to.

    Raises:
        OSError: No memory is left.
    """
    global _has_fast
    if nbytes < HUGE_PAGE:
        return np.frombuffer(mmap.mmap(-1, max(1, nbytes), flags=_PRIVATE), dtype=np.uint8), True
    pages = _reserve(nbytes)
    if not may_be_huge:
        advise(pages, _MADV_NOHUGEPAGE)
        return pages, False
    advise(pages, _MADV_HUGEPAGE)
    # Where nobody can ask for them they come when they are touched.
    if _has_fast and _are_fast(pages, _MADV_POPULATE_WRITE) is False:
        _has_fast = False
    if not _has_fast:
        advise(pages, _MADV_NOHUGEPAGE)
    return pages, _has_fast


def make_pages_huge(pages: NDArray[np.uint8], n_huge: int) -> int:
    """Let a piece more of what `make_pages` returned be of huge pages, where the system has some. What is in it stays.

    The first `n_huge` bytes are done. Returns how many are from now on.
    """
    if not n_huge:
        advise(pages, _MADV_HUGEPAGE)
    return _make_huge(pages, n_huge)


def _make_huge(memory: NDArray[np.uint8], n_huge: int) -> int:
    # Only a piece: nothing is read ahead meanwhile, and a whole slot may take a tenth of a second.
    advise(memory[n_huge : n_huge + _HUGE_NBYTES], _MADV_COLLAPSE)
    return n_huge + _HUGE_NBYTES


class Region:
    """Memory for `n_slots` slots of `nbytes` bytes each, in a file that is mapped here.

    Raises:
        OSError: The system refuses to map it.
    """

    def __init__(self, fd: int, nbytes: int, n_slots: int) -> None:
        self.nbytes, self.n_slots = nbytes, n_slots
        self._stride = _slot_stride(nbytes)
        self._owner = _map_shared(fd, file_nbytes(nbytes, n_slots))
        words = self._owner[self._stride * n_slots :].view(np.int64)
        self._words = words[:_N_WORDS]
        self._counts = words[_N_WORDS : _N_WORDS + _N_COUNTS * n_slots].reshape(n_slots, _N_COUNTS)

    def memory(self, index: int) -> NDArray[np.uint8]:
        """The pages of a slot; an array of its own for each call."""
        return self._owner[index * self._stride : (index + 1) * self._stride]


class OwnRegion(Region):
    """A region that this process made; it takes memory for the slots that are used.

    Args:
        nbytes: Size of a slot.
        n_slots: Slots that there is room for. Of many, each is in huge pages, also where these come slowly, but for
            those that are taken in haste.

    Attributes:
        is_fast: Whether huge pages have come fast so far.

    Raises:
        OSError: There is no memory, or no descriptor.
    """

    def __init__(self, nbytes: int, n_slots: int) -> None:
        self.fd = memory_file(file_nbytes(nbytes, n_slots))
        try:
            super().__init__(self.fd, nbytes, n_slots)
        except BaseException:
            os.close(self.fd)
            raise
        self.pid = os.getpid()
        # A process id is used again, and what its last owner sent may be mapped still; an inode is not.
        self._number = os.fstat(self.fd).st_ino
        self._unused = collections.deque(reversed(range(n_slots)))
        self._is_used = np.zeros(n_slots + 1, dtype=bool)
        self._n_huge = [0] * n_slots
        self.is_fast = nbytes >= HUGE_PAGE
        weakref.finalize(self, _close, self.fd, self.pid, self._words).atexit = False

    @property
    def has_room(self) -> bool:
        """Whether there is a slot that nobody uses."""
        return len(self._unused) > 0

    def take(self, in_haste: bool, may_be_huge: bool = True) -> int:
        """The number of a slot that nobody uses, of which there must be one."""
        index = self._unused.pop()
        self._is_used[index] = True
        may_be_slow = not in_haste and self.n_slots >= _N_LARGE and self.nbytes >= HUGE_PAGE
        is_huge = may_be_huge and (self.is_fast or may_be_slow)
        if is_huge:
            # A huge page comes where there is a small one.
            self.memory(index)[::HUGE_PAGE] = 0
            is_huge = bool(_are_fast(self._huge_part(index), _MADV_COLLAPSE, may_be_slow))
            self.is_fast = is_huge and self.is_fast
        self._n_huge[index] = self._stride if is_huge else 0
        if not is_huge:
            self._populate(index)
        return index

    def _populate(self, index: int) -> None:
        """Ask for the memory of a slot at once, in small pages: a page fault for each takes half as long again."""
        # Where the system refuses, each page comes when it is written to. Python's own call would ask again after each
        # signal, for which a kernel may begin anew: under a profiler's timer it would never return.
        _libc.fallocate(self.fd, 0, self.offset(index), self._stride)
        advise(self.memory(index), _MADV_POPULATE_WRITE)

    def make_huge(self, index: int) -> None:
        """Let a piece more of the memory of a slot be of huge pages, where the system has some. What is in it stays."""
        if self.nbytes >= HUGE_PAGE and self._n_huge[index] < self._stride:
            self._n_huge[index] = _make_huge(self._huge_part(index), self._n_huge[index])

    def _huge_part(self, index: int) -> NDArray[np.uint8]:
        """The memory of a slot as far as it may be of huge pages: without what it shares with one that is not used."""
        first, last = index * self._stride, (index + 1) * self._stride
        before, after = first % HUGE_PAGE, last % HUGE_PAGE
        first += -before if self._is_used[index - 1] else -first % HUGE_PAGE
        last += -last % HUGE_PAGE if self._is_used[index + 1] else -after
        return self._owner[first : min(last, self._stride * self.n_slots)]

    def give_back(self, index: int) -> None:
        """Take a slot back that nobody can see any more, and let the system have its memory."""
        if os.getpid() == self.pid:
            advise(self.memory(index), _MADV_REMOVE)
            self._counts[index, _AGE] += 1
            self._words[_N_DISCARDED] += 1
            self._is_used[index] = False
            self._unused.append(index)

    def offset(self, index: int) -> int:
        """Where a slot begins in the file."""
        return index * self._stride

    def counts(self, index: int) -> NDArray[np.int64]:
        """How often a slot was sent, and how often it came back: `[2] int64`, as they are at any time."""
        return self._counts[index, : _RETURNED + 1]

    def send(self, index: int) -> Name | None:
        """Note that a slot goes to the parent process: the name by which it finds it; None where it cannot have it."""
        can_have, offered = (True, None) if self._words[_IS_MAPPED] else handover.offer(self.fd)
        if not can_have:
            return None
        self._counts[index, _SENT] += 1
        age = int(self._counts[index, _AGE])
        return self.pid, self._number, self.fd, self.nbytes, self.n_slots, index, age, offered


class ReceivedRegion(Region):
    """A region of another process, of which slots are used here; errors are those of `Region`."""

    def __init__(self, fd: int, nbytes: int, n_slots: int) -> None:
        super().__init__(fd, nbytes, n_slots)
        self._memories: dict[int, tuple[int, NDArray[np.uint8]]] = {}
        # By slot. Nothing is counted: uses end in any thread at any time.
        self._uses: dict[int, list[Loan]] = {}
        self._n_discarded = 0
        self._is_orphan = False

    def keep(self) -> None:
        """Tell the other process that its slots need no more than a name from now on."""
        self._words[_IS_MAPPED] = 1

    @property
    def is_closed(self) -> bool:
        """Whether the other process has no use for it any more."""
        return bool(self._words[_IS_CLOSED])

    def begin_use(self, index: int, age: int) -> Lease:
        """Use a slot that was sent, in one thread at a time; at the same age its pages are the same array.

        A `ProcessLookupError` says that the other process is gone.
        """
        if self._n_discarded != self._words[_N_DISCARDED]:
            # What was page-locked there, for one, is not what will be there.
            self._n_discarded = int(self._words[_N_DISCARDED])
            for other, (known, _) in tuple(self._memories.items()):
                if known != self._counts[other, _AGE]:
                    del self._memories[other]
        known, pages = self._memories.get(index, (-1, None))
        if pages is None or known != age:
            pages = self.memory(index)
            self._memories[index] = age, pages
        returned = self._counts[index, _RETURNED : _RETURNED + 1]
        lease = Lease(pages[: self.nbytes], pages, is_shared=True, returned=returned)
        self._uses[index] = [*(use for use in self._uses.get(index, ()) if not use.is_over), lease.loan]
        if self._is_orphan:
            raise ProcessLookupError
        return lease

    def be_orphan(self) -> None:
        """The other process is gone: keep only the memory that is used here."""
        self._is_orphan = True
        self._memories.clear()
        for index, uses in tuple(self._uses.items()):
            for use in uses:
                use.take_over(functools.partial(self._give_back, index))
        used = {index for index in range(self.n_slots) if self._is_used(index)}
        # Where none is, all of it goes with this.
        for index in set(range(self.n_slots)) - used if used else ():
            self._give_back(index)

    def _is_used(self, index: int) -> bool:
        return not all(use.is_over for use in self._uses.get(index, ()))

    def _give_back(self, index: int) -> None:
        if not self._is_used(index):
            advise(self.memory(index), _MADV_REMOVE)


def _slot_stride(nbytes: int) -> int:
    return -(-max(1, nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def file_nbytes(nbytes: int, n_slots: int) -> int:
    """Size of the file of a region."""
    words = (_N_WORDS + _N_COUNTS * n_slots) * np.dtype(np.int64).itemsize
    return _slot_stride(nbytes) * n_slots + _slot_stride(words)


def _close(fd: int, pid: int, words: NDArray[np.int64]) -> None:
    # A forked child drops its copy, too.
    if os.getpid() == pid:
        words[_IS_CLOSED] = 1
    os.close(fd)


def _map_shared(fd: int, nbytes: int) -> NDArray[np.uint8]:
    """Map a file at a boundary of huge pages; an `OSError` where the system refuses."""
    # Given back as one with what is mapped into it.
    owner = _reserve(nbytes)
    address, protection = owner.ctypes.data, mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mmap(address, nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return owner


def _reserve(nbytes: int) -> NDArray[np.uint8]:
    """Address space that begins at a boundary of huge pages."""
    reserved = np.frombuffer(mmap.mmap(-1, nbytes + HUGE_PAGE, flags=_PRIVATE), dtype=np.uint8)
    first = -reserved.ctypes.data % HUGE_PAGE
    return reserved[first : first + nbytes]
