"""Many reads in one system call: Linux's io_uring, for reads that are as good as free once they are asked for.

A read of a few KB from the page cache takes less time than it takes Python to ask for it. Here numpy writes the
arguments of hundreds of reads into memory that the kernel shares, and one call runs them all, without Python's lock:
16,384 single rows of 3 KB took 17 ms where one `pread` for each took 28. Where a disk is waited for, it has all of them
to work on.

Containers often forbid io_uring, and old systems lack it; then `Ring.open` returns None, and `preadv` does the same.
It also reads where a file system may answer short, see `ShardStore`.
"""

import ctypes
import errno
import mmap
import os
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ReadError
from saev_torch.processes.undone import close_with
from saev_torch.reading.extents import Extents
from saev_torch.reading.reader import CallReader, Pace, Spot
from saev_torch.reading.store import Files

_Int64s = NDArray[np.int64]

_N_ENTRIES = 1024
_WORD_NBYTES = np.dtype("u4").itemsize
# Fewer reads than this are not worth the arguments of a ring.
_MIN_ON_RING = 8
_SETUP, _ENTER = 425, 426
_GET_EVENTS = 1
# Completions wait until the thread asks for them, instead of interrupting it (Linux 5.19).
_COOP_TASKRUN = 1 << 8
_SINGLE_MMAP, _NO_DROP = 1, 2
_OFFSET_OF_ENTRIES = 0x10000000
_READV, _READ = 1, 22
_MODULUS = 0xFFFFFFFF
# A set of all signals, as the kernel takes it.
_ALL_SIGNALS, _SIGNALS_NBYTES = ctypes.byref(ctypes.c_uint64(_MODULUS << 32 | _MODULUS)), ctypes.c_size_t(8)

# struct io_uring_params, io_uring_sqe and io_uring_cqe of <linux/io_uring.h>
_PARAMS = np.dtype(
    [("sq_entries", "u4"), ("cq_entries", "u4"), ("flags", "u4"), ("cpu", "u4"), ("idle", "u4"), ("features", "u4")]
    + [("wq_fd", "u4"), ("reserved", "u4", 3)]
    + [(f"sq_{name}", "u4") for name in ("head", "tail", "mask", "n", "flags", "dropped", "array", "r1", "r2", "r3")]
    + [(f"cq_{name}", "u4") for name in ("head", "tail", "mask", "n", "overflow", "cqes", "flags", "r1", "r2", "r3")]
)
_ENTRY = np.dtype(
    [("opcode", "u1"), ("flags", "u1"), ("priority", "u2"), ("fd", "i4"), ("offset", "i8"), ("address", "i8"),
     ("length", "u4"), ("rw_flags", "u4"), ("number", "u8"), ("rest", "u8", 3)]
)  # fmt: skip
_RESULT = np.dtype([("number", "u8"), ("result", "i4"), ("flags", "u4")])

_syscall: Any = getattr(ctypes.CDLL(None, use_errno=True), "syscall", None)
if _syscall is not None:
    _syscall.restype = ctypes.c_long


class Ring:
    """Reads for one thread at a time; see `open`. Its descriptor is closed when it is gone."""

    def __init__(self, fd: int, params: Any) -> None:
        close_with(self, fd)
        self._fd = fd
        self.n_entries = int(params["sq_entries"])
        results_at, n_results = int(params["cq_cqes"]), int(params["cq_entries"])
        nbytes = max(int(params["sq_array"]) + 4 * self.n_entries, results_at + _RESULT.itemsize * n_results)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        shared = mmap.mmap(fd, nbytes, flags=flags)
        entries = mmap.mmap(fd, _ENTRY.itemsize * self.n_entries, flags=flags, offset=_OFFSET_OF_ENTRIES)
        self._entries = np.frombuffer(entries, dtype=_ENTRY)
        self._results = np.frombuffer(shared, _RESULT, n_results, results_at)
        # What was asked for, begun, done and taken, as the ring itself counts; the kernel counts `begun` and `done`.
        self._words = memoryview(shared)[: nbytes - nbytes % _WORD_NBYTES].cast("I")
        names = "sq_tail", "sq_head", "cq_tail", "cq_head"
        self._asked, self._begun, self._done, self._taken = (int(params[name]) // _WORD_NBYTES for name in names)
        np.frombuffer(shared, "u4", self.n_entries, int(params["sq_array"]))[:] = np.arange(self.n_entries)

    @classmethod
    def open(cls) -> "Ring | None":
        """Make a ring; None where the system has none to give."""
        if _syscall is None or not sys.platform.startswith("linux"):
            return None
        for flags in (_COOP_TASKRUN, 0):
            params = np.zeros((), dtype=_PARAMS)
            params["flags"] = flags
            fd = int(_syscall(_SETUP, _N_ENTRIES, ctypes.c_void_p(params.ctypes.data)))
            if fd >= 0:
                break
        else:
            return None
        if int(params["features"]) & (_SINGLE_MMAP | _NO_DROP) != _SINGLE_MMAP | _NO_DROP:
            os.close(fd)
            return None
        try:
            return cls(fd, params)
        except OSError:
            return None

    def read(
        self, fds: _Int64s, vectors: _Int64s, firsts: _Int64s, counts: _Int64s, offsets: _Int64s
    ) -> NDArray[np.int32]:
        """Read from descriptors, at most `n_entries` times; for the arguments see `Extents`.

        For each it tells the bytes that were read, or a negative error number. Whatever interrupts it is raised when
        the kernel writes to memory no more.
        """
        words, n = self._words, len(fds)
        # An interrupted call may have left what was not begun, and results that nobody took.
        first = words[self._asked] = words[self._begun]
        words[self._taken] = words[self._done]
        # A single vector needs no detour through a list of one.
        is_one = counts == 1
        columns = {
            "opcode": np.where(is_one, _READ, _READV),
            "fd": fds,
            "offset": offsets,
            "address": np.where(is_one, vectors[firsts, 0], vectors.ctypes.data + 16 * firsts),
            "length": np.where(is_one, vectors[firsts, 1], counts),
            "number": np.arange(n),
        }
        # From where the ring stands to its end, and on from its beginning. What is not named stays zero.
        at = first % self.n_entries
        n_to_end = min(n, self.n_entries - at)
        for name, values in columns.items():
            column = self._entries[name]
            column[at : at + n_to_end] = values[:n_to_end]
            column[: n - n_to_end] = values[n_to_end:]
        try:
            words[self._asked] = (first + n) & _MODULUS
            self._finish(n)
        except BaseException:
            # One call, which no signal ends, and before which Python calls nothing: only there would it look whether a
            # handler of another signal is to be run, which may raise, too.
            while words[self._begun] != words[self._done]:
                _syscall(
                    _ENTER, self._fd, 0, words[self._begun] - words[self._taken] & _MODULUS, _GET_EVENTS,
                    _ALL_SIGNALS, _SIGNALS_NBYTES,
                )  # fmt: skip
            raise
        results = np.empty(n, dtype=np.int32)
        done = self._look()
        results[done["number"].astype(np.int64)] = done["result"]
        words[self._taken] = words[self._done]
        return results

    def _finish(self, n: int) -> None:
        """Hand the reads over, and wait until all are done: until then the kernel writes to memory."""
        words = self._words
        while self._n_done < n:
            n_left = words[self._asked] - words[self._begun] & _MODULUS
            got = _syscall(_ENTER, self._fd, n_left, n, _GET_EVENTS, None, 0)
            code = ctypes.get_errno()
            if got >= 0 or code == errno.EINTR:
                continue
            if code not in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM) and words[self._begun] == words[self._done]:
                raise ReadError(f"io_uring: expected {n} reads to be made, got: {os.strerror(code)}.")
            # Short of memory for a moment; or what was asked for still writes to memory, and must be waited for.
            time.sleep(0.001)

    @property
    def _n_done(self) -> int:
        return self._words[self._done] - self._words[self._taken] & _MODULUS

    def _look(self) -> NDArray[Any]:
        found: NDArray[Any] = self._results[(self._words[self._taken] + np.arange(self._n_done)) % len(self._results)]
        return found

    def count_done(self) -> int:
        """How many reads have been done, as the ring counts; also another thread may ask."""
        return self._words[self._done]

    def first_pending(self, n: int) -> int:
        """Of `n` reads that another thread has asked for, the number of the first that is not done."""
        # That thread may have gone on to more reads meanwhile.
        pending = np.ones(self.n_entries, dtype=bool)
        pending[self._look()["number"].astype(np.int64)] = False
        return min(int(pending.argmax()), n - 1)


class RingReader(CallReader):
    """Many reads in one call, on a ring of the thread's own; single calls for a few, and where answers may be short."""

    has_ring = True

    def __init__(self, ring: Ring, store: Files, pace: Pace | None = None, spot: Spot | None = None) -> None:
        super().__init__(store, pace, spot)
        self.ring = ring

    def _read(self, extents: Extents, start: int, stop: int) -> None:
        if stop - start < _MIN_ON_RING:
            super()._read(extents, start, stop)
            return
        for first, last in extents.split(start, stop, self.ring.n_entries):
            part, got = slice(first, last), None
            with self.opened(extents, first, last) as fds:
                # Only now it is known.
                if not self.store.answers_short:
                    self.watch(extents, first, last)
                    got = self.ring.read(
                        fds, extents.vectors, extents.firsts[part], extents.counts[part], extents.offsets[part]
                    )
            if got is None:
                super()._read(extents, first, last)
            else:
                self._finish(extents, first, got, 0)

    def watch(self, extents: Extents, first: int, last: int) -> None:
        """Let the spot be the first of these extents that the ring has not read yet."""
        ring = self.ring
        self.spot.set(lambda: extents.where(first + ring.first_pending(last - first)), ring.count_done)
