"""A page of memory that a process shares with the workers that it starts."""

import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from multiprocessing import context, reduction
from typing import Any, TypeVar

import numpy as np

_T = TypeVar("_T")


def is_spawning() -> bool:
    """Whether what is being pickled goes to a process that is being started."""
    return context.get_spawning_popen() is not None


class _Here:
    """This process: what it makes it knows by this, and a forked child has another."""

    def __init__(self) -> None:
        # A signal handler may ask for what its own thread is about to write.
        self.lock = threading.RLock()


_here = _Here()


def _begin_anew() -> None:
    # Another thread may have had the lock when this process was forked.
    global _here
    _here = _Here()


os.register_at_fork(after_in_child=_begin_anew)


class SharedPage:
    """Memory for one structured value, which goes with the last process that has it.

    Forked, or pickled for a process that is being started, it is the same memory; pickled or copied otherwise it
    becomes memory of its own with the same value. The value is all zeros at first; writing to its `fields` writes to
    the memory. A descriptor `fd` of memory that exists already is the page's to close.
    """

    def __init__(self, dtype: np.dtype[Any], fd: int | None = None) -> None:
        self._maker = _here if fd is None else None
        self.fd = os.memfd_create("saev_torch", os.MFD_CLOEXEC) if fd is None else fd
        weakref.finalize(self, os.close, self.fd).atexit = False
        os.ftruncate(self.fd, dtype.itemsize)
        self.fields: Any = np.frombuffer(mmap.mmap(self.fd, dtype.itemsize), dtype=dtype)[0]

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
                fcntl.lockf(self.fd, fcntl.LOCK_EX)
                return work()
            finally:
                fcntl.lockf(self.fd, fcntl.LOCK_UN)

    def __reduce__(self) -> tuple[Any, ...]:
        if is_spawning():
            return _attach, (self.fields.dtype, reduction.DupFd(self.fd))
        return _copy, (self.fields.dtype, self.fields.tobytes())


def _attach(dtype: np.dtype[Any], fd: Any) -> SharedPage:
    return SharedPage(dtype, fd.detach())


def _copy(dtype: np.dtype[Any], value: bytes) -> SharedPage:
    page = SharedPage(dtype)
    os.pwrite(page.fd, value, 0)
    return page
