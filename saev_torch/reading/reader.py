"""The one way to read: a `Reader` takes extents of a store to their places.

One `preadv` reads consecutive rows of a shard into as many separate places. That is one pass over each byte: there is
no buffer in between and nothing to gather afterwards. numpy makes the arguments, and ctypes releases the interpreter
lock. The other readers make many reads in one system call, or read past the page cache, or multiply what they read.
What any of them leaves unfinished is finished here, and tried again after errors that may pass.
"""

import abc
import collections
import contextlib
import ctypes
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ReadError
from saev_torch.reading.extents import Extents
from saev_torch.reading.pace import Pace
from saev_torch.reading.store import ShardStore

_Int64s = NDArray[np.int64]

_preadv = ctypes.CDLL(None, use_errno=True).preadv
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_preadv.restype = ctypes.c_ssize_t


class Spot:
    """Where a thread is reading, for the message about a read that does not return.

    Attributes:
        where: Tells, also another thread, the shard and the byte offset; None while nothing is read.
        since: When it was set, on the clock of `time.monotonic`.
    """

    def __init__(self) -> None:
        self.where: Callable[[], tuple[int, int]] | None = None
        self.since = 0.0

    def set(self, where: Callable[[], tuple[int, int]]) -> None:
        """A read begins."""
        self.where, self.since = where, time.monotonic()


class Reader(abc.ABC):
    """Reads for one thread at a time.

    Args:
        store: Where to read from.
        pace: Told how long each read took; None where nobody asks.
        spot: Told what is read; None for one of its own.
    """

    def __init__(self, store: ShardStore, pace: Pace | None = None, spot: Spot | None = None) -> None:
        self.store = store
        self.pace = pace
        self.spot = spot or Spot()

    def read(self, extents: Extents, start: int, stop: int) -> None:
        """Read a range of extents to their places.

        Args:
            extents: What to read.
            start: First extent.
            stop: One past the last extent.

        Raises:
            ReadError: A read failed for good, or a shard became shorter.
            ShardsNotFoundError: A shard is gone.
            FormatError: A shard is no longer a regular file of the right size.
        """
        began = time.monotonic()
        self._read(extents, start, stop)
        self.spot.where = None
        if self.pace is not None:
            self.pace.note(int(extents.nbytes[start:stop].sum()), stop - start, time.monotonic() - began)

    @abc.abstractmethod
    def _read(self, extents: Extents, start: int, stop: int) -> None: ...

    @contextlib.contextmanager
    def opened(self, extents: Extents, start: int, stop: int, direct: bool = False) -> Iterator[_Int64s]:
        """Hold open what a range of extents is read from; see `ShardStore.opened`.

        Yields:
            `[stop - start] int64`, the file descriptor of each extent.
        """
        with contextlib.ExitStack() as stack:
            fds = np.empty(stop - start, dtype=np.int64)
            for first, last in extents.by_shard(start, stop):
                self.spot.set(functools.partial(extents.where, first))
                shard = int(extents.shards[first])
                fds[first - start : last - start] = stack.enter_context(self.store.opened(shard, direct))
            yield fds

    def announce(self, extents: Extents, start: int, stop: int) -> None:
        """Ask the kernel to begin reading a range of extents, so that a disk has many reads to work on at a time."""
        for first, last in extents.by_shard(start, stop):
            part = slice(first, last)
            with self.store.opened(int(extents.shards[first])) as fd:
                advice = itertools.repeat(os.POSIX_FADV_WILLNEED)
                offsets, nbytes = extents.offsets[part].tolist(), extents.nbytes[part].tolist()
                collections.deque(map(os.posix_fadvise, itertools.repeat(fd), offsets, nbytes, advice), 0)

    def _finish(self, extents: Extents, first: int, got: NDArray[np.int64] | NDArray[np.int32], code: int) -> None:
        """Finish the extents from `first` on that are not complete; `code` is the error where a result has none."""
        for i in np.flatnonzero(got != extents.nbytes[first : first + len(got)]).tolist():
            self.spot.set(functools.partial(extents.where, first + i))
            n = int(got[i])
            self._finish_one(extents, first + i, n, code or -n)

    def _finish_one(self, extents: Extents, i: int, n: int, code: int) -> None:
        """Finish an extent whose first read returned `n` and not all bytes, trying again where that may help."""
        shard, offset, nbytes = int(extents.shards[i]), int(extents.offsets[i]), int(extents.nbytes[i])
        path = self.store.path(shard)
        vectors = extents.vectors_of(i, i + 1)
        ends = np.cumsum(vectors[:, 1])
        done = tries = 0
        while True:
            if n > 0:
                done += n
            elif n == 0:
                raise ReadError(
                    f"{path}: expected {nbytes} bytes at offset {offset}, got {done}: the file became shorter while it "
                    "was in use; copy it again and start again."
                )
            elif self.store.retries.again(path, offset, code, tries):
                tries += 1
                self.store.drop(shard)
            else:
                raise ReadError(
                    f"{path}: reading {nbytes} bytes at offset {offset} failed after {tries + 1} tries: "
                    f"{os.strerror(code)}; check the file system."
                )
            if done == nbytes:
                return
            skipped = int(np.searchsorted(ends, done, side="right"))
            rest = vectors[skipped:].copy()
            inside = done - int(ends[skipped] - vectors[skipped, 1])
            rest[0] += (inside, -inside)
            with self.store.opened(shard) as fd:
                n = _preadv(fd, rest.ctypes.data, len(rest), offset + done)
                code = ctypes.get_errno()


class CallReader(Reader):
    """One system call for each extent."""

    def _read(self, extents: Extents, start: int, stop: int) -> None:
        for first, last in extents.by_shard(start, stop):
            part = slice(first, last)
            self.spot.set(functools.partial(extents.where, first))
            with self.store.opened(int(extents.shards[first])) as fd:
                addresses = (extents.vectors.ctypes.data + 16 * extents.firsts[part]).tolist()
                offsets = extents.offsets[part].tolist()
                got = list(map(_preadv, itertools.repeat(fd), addresses, extents.counts[part].tolist(), offsets))
                # The last error of this thread: the one of the reads that failed, or of one of them.
                code = ctypes.get_errno()
            self._finish(extents, first, np.array(got, dtype=np.int64), code)
