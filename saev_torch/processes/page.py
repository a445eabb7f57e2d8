"""A page of memory that a process shares with the workers that it starts."""

import mmap
import os
import weakref
from multiprocessing import context, reduction
from typing import Any

import numpy as np


def is_spawning() -> bool:
    """Whether what is being pickled goes to a process that is being started."""
    return context.get_spawning_popen() is not None


class SharedPage:
    """Memory for one structured value, which goes with the last process that has it.

    Forked, or pickled for a process that is being started, it is the same memory; pickled or copied otherwise it
    becomes memory of its own with the same value. The value is all zeros at first; writing to its `fields` writes to
    the memory. A descriptor `fd` of memory that exists already is the page's to close.
    """

    def __init__(self, dtype: np.dtype[Any], fd: int | None = None) -> None:
        self.fd = os.memfd_create("saev_torch", os.MFD_CLOEXEC) if fd is None else fd
        weakref.finalize(self, os.close, self.fd).atexit = False
        os.ftruncate(self.fd, dtype.itemsize)
        self.fields: Any = np.frombuffer(mmap.mmap(self.fd, dtype.itemsize), dtype=dtype)[0]

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
