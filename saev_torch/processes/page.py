"""A page of memory that a process shares with the workers that it starts."""

import fcntl
import functools
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from multiprocessing import context, reduction
from typing import Any, TypeVar

import numpy as np

from saev_torch.processes.interrupts import whole
from saev_torch.processes.locks import renewed
from saev_torch.processes.machine import memory_file
from saev_torch.processes.undone import close_with

_SHEET_NBYTES = 1 << 20
_ALIGN = 64
_T = TypeVar("_T")


def is_spawning() -> bool:
    """Whether what is being pickled goes to a process that is being started."""
    return context.get_spawning_popen() is not None


class _Sheet:
    """A file that many pages are parts of, so that few descriptors do; what a page had is not used again."""

    def __init__(self, nbytes: int, fd: int | None = None) -> None:
        self.fd = memory_file(nbytes) if fd is None else fd
        close_with(self, self.fd)
        self.memory = mmap.mmap(self.fd, nbytes)
        self._n_used = 0
        _sheets[os.fstat(self.fd).st_ino] = self

    def take(self, nbytes: int) -> int | None:
        """Where so many bytes begin that nobody has had yet; None where there are not so many."""
        start = self._n_used
        if nbytes > len(self.memory) - start:
            return None
        self._n_used += -(-nbytes // _ALIGN) * _ALIGN
        return start

    def __reduce__(self) -> tuple[Any, ...]:
        # Many pages may be pickled for a process, but a descriptor must be passed to it only once.
        return _attach_sheet, (len(self.memory), reduction.DupFd(self.fd))


_sheets: "weakref.WeakValueDictionary[int, _Sheet]" = weakref.WeakValueDictionary()


def _attach_sheet(nbytes: int, offered: Any) -> _Sheet:
    fd = offered.detach()
    # A process loses its locks of a file when it closes any descriptor of it, so there must be one only.
    with _here.lock:
        known = _sheets.get(os.fstat(fd).st_ino)
        if known is not None:
            os.close(fd)
        return known or _Sheet(nbytes, fd)


class _Here:
    """This process: what it makes it knows by this, and a forked child has another."""

    def __init__(self) -> None:
        # A signal handler may ask for what its own thread is about to write.
        self.lock = renewed(threading.RLock())
        # It goes with its last page.
        self._sheet: weakref.ref[_Sheet] | None = None

    def find_place(self, nbytes: int) -> tuple[_Sheet, int]:
        """Memory that nobody has had yet: its sheet, and where it begins there."""
        with self.lock:
            sheet = None if self._sheet is None else self._sheet()
            start = None if sheet is None else sheet.take(nbytes)
            if sheet is None or start is None:
                sheet, start = whole(functools.partial(_Sheet, max(_SHEET_NBYTES, nbytes))), 0
                sheet.take(nbytes)
                self._sheet = weakref.ref(sheet)
            return sheet, start


_here = _Here()


def _begin_anew() -> None:
    # Another thread may have had the lock when this process was forked.
    global _here
    _here = _Here()


os.register_at_fork(after_in_child=_begin_anew)


class SharedPage:
    """Memory for one structured value, which goes with the last process that has it, and what was made around it.

    Forked, or pickled for a process that is being started, it is the same memory; pickled or copied otherwise it
    becomes memory of its own with the same value. The value is all zeros at first; writing to its `fields` writes to
    the memory. A `place` is that of memory that exists already.
    """

    def __init__(self, dtype: np.dtype[Any], place: tuple[_Sheet, int] | None = None) -> None:
        self._maker = _here if place is None else None
        self._sheet, self._start = place or _here.find_place(dtype.itemsize)
        self.fields: Any = np.frombuffer(self._sheet.memory, dtype, 1, self._start)[0]

    @property
    def is_own(self) -> bool:
        """Whether this process made the memory, and did not come by it from its parent."""
        return self._maker is _here

    def while_locked(self, work: Callable[[], _T]) -> _T:
        """Do some work, and keep other threads and processes out meanwhile."""
        # No context manager: an interrupt between its own calls would leave the lock held, and others wait for ever.
        # A lock of the file system goes away with a killed worker; it does not tell threads apart.
        with _here.lock:
            try:
                fcntl.lockf(self._sheet.fd, fcntl.LOCK_EX, self.fields.nbytes, self._start)
                return work()
            finally:
                fcntl.lockf(self._sheet.fd, fcntl.LOCK_UN, self.fields.nbytes, self._start)

    def __reduce__(self) -> tuple[Any, ...]:
        if is_spawning():
            return SharedPage, (self.fields.dtype, (self._sheet, self._start))
        return _copy, (self.fields.dtype, self.fields.tobytes())


def _copy(dtype: np.dtype[Any], value: bytes) -> SharedPage:
    page = SharedPage(dtype)
    page._sheet.memory[page._start : page._start + len(value)] = value
    return page
