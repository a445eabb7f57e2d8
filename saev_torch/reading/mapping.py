"""A file that is mapped: address space, and no memory of ours. It is read by the kernel, or here under a `Watch`."""

import ctypes
import mmap
import os
import sys
import weakref
from typing import Any, Protocol

from saev_torch.reading.watch import Watch, find_watch

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


class Pages:
    """The address space of a file, unmapped when nobody holds it any more; `key` tells which file, and its size."""

    def __init__(self, address: int, key: tuple[int, int, int]) -> None:
        self.address, self.key = address, key
        self._watch = find_watch()
        self._number = None if self._watch is None else self._watch.add(address, key[2])
        weakref.finalize(self, _unmap, self._watch, self._number, address, key[2]).atexit = False
        all_pages.add(self)

    @property
    def is_watched(self) -> bool:
        """Whether it may be read here, while the watch is on."""
        return self._number is not None

    @property
    def is_broken(self) -> bool:
        """Whether there are zeros instead of the file, a part of which could not be read."""
        return self._watch is not None and self._number is not None and self._watch.is_broken(self._number)


def _unmap(watch: Watch | None, number: int | None, address: int, nbytes: int) -> None:
    if watch is not None and number is not None:
        watch.remove(number)
    _libc.munmap(address, nbytes)


all_pages: "weakref.WeakSet[Pages]" = weakref.WeakSet()
"""What is mapped in this process."""


class Mapping:
    """A file that is mapped, and open as long; see `open`."""

    def __init__(self, pages: Pages, descriptor: Descriptor) -> None:
        self.pages, self.address, self._descriptor = pages, pages.address, descriptor

    @classmethod
    def open(cls, descriptor: Descriptor, known: Pages | None) -> "Mapping | None":
        """Map a file, where it is not the one that is `known`; None where the system refuses.

        To map it anew costs a fault for each 64 KB. Python's own would open the file once more.
        """
        key = _key_of(descriptor)
        if known is not None and known.key == key and not known.is_broken:
            return cls(known, descriptor)
        address = _libc.mmap(None, key[2], mmap.PROT_READ, mmap.MAP_SHARED, descriptor.fd, 0) if _can_map else None
        return None if address in (None, _FAILED) else cls(Pages(int(address), key), descriptor)

    @property
    def nbytes(self) -> int:
        """Size of the file when it was mapped."""
        return self.pages.key[2]

    @property
    def is_whole(self) -> bool:
        """Whether what was read is of the file, which is as long as it was: behind its end, a page holds zeros."""
        return not self.pages.is_broken and os.fstat(self._descriptor.fd).st_size == self.nbytes


def _key_of(descriptor: Descriptor) -> tuple[int, int, int]:
    found = os.fstat(descriptor.fd)
    return found.st_dev, found.st_ino, found.st_size


def is_in_memory(address: int) -> bool:
    """Whether the page of an address in a mapping is in the page cache; True where nobody knows."""
    state = ctypes.c_ubyte()
    failed = _libc.mincore(address // mmap.PAGESIZE * mmap.PAGESIZE, mmap.PAGESIZE, ctypes.byref(state))
    return bool(failed or state.value & 1)
