"""A file that is mapped: address space, and no memory of ours. Only the kernel reads from it, see `gather`."""

import ctypes
import mmap
import os
import sys
import weakref
from typing import Any, Protocol

_libc: Any = ctypes.CDLL(None, use_errno=True)
_can_map = sys.platform.startswith("linux") and hasattr(_libc, "mincore")
if _can_map:
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


class Descriptor(Protocol):
    """A file descriptor that stays open as long as somebody holds this."""

    fd: int


class Mapping:
    """A file that is mapped, and open as long; see `open`. It is unmapped when nobody holds it any more."""

    def __init__(self, address: int, nbytes: int, descriptor: Descriptor) -> None:
        self.address, self._nbytes, self._descriptor = address, nbytes, descriptor
        weakref.finalize(self, _libc.munmap, address, nbytes).atexit = False

    @classmethod
    def open(cls, descriptor: Descriptor) -> "Mapping | None":
        """Map a file; None where the system refuses. Python's own would open the file once more."""
        nbytes = os.fstat(descriptor.fd).st_size
        address = _libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor.fd, 0) if _can_map else None
        return None if address in (None, _FAILED) else cls(int(address), nbytes, descriptor)

    @property
    def is_whole(self) -> bool:
        """Whether the file is as long as it was: behind its end, a mapped page holds zeros."""
        return os.fstat(self._descriptor.fd).st_size == self._nbytes


def is_in_memory(address: int) -> bool:
    """Whether the page of an address in a mapping is in the page cache; True where nobody knows."""
    state = ctypes.c_ubyte()
    failed = _libc.mincore(address // mmap.PAGESIZE * mmap.PAGESIZE, mmap.PAGESIZE, ctypes.byref(state))
    return bool(failed or state.value & 1)
