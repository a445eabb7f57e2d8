"""The one way to read: a `Reader` takes extents of a store to their places.

One `preadv` reads consecutive rows of a shard into as many separate places. That is one pass over each byte: there is
no buffer in between and nothing to gather afterwards. numpy makes the arguments, and ctypes releases the interpreter
lock. The other readers make many reads in one system call, or read past the page cache, or convert what they read.
What any of them leaves unfinished is finished here, and tried again after errors that may pass.
"""

import abc
import collections
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import operator
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ReadError
from saev_torch.reading.extents import Extents
from saev_torch.reading.store import Files, advise

_Int64s = NDArray[np.int64]

# A thread that reads fewer bytes than this in a second, calls aside, waits for a disk; a call may take so long.
_SLOW_NBYTES_PER_S = 1.5e9
_CALL_S = 20e-6
# Threads beyond the number of cores begin to read when one of the others takes this long.
_HELP_AFTER_S = 0.02
# What was announced is read before what is asked for later: no more than takes so long, or is this little.
_ANNOUNCED_S, _MIN_ANNOUNCED_NBYTES = 0.25, 1 << 20

_preadv = ctypes.CDLL(None, use_errno=True).preadv
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_preadv.restype = ctypes.c_ssize_t


@dataclasses.dataclass
class Spot:
    """Where a thread is reading, for the message about a read that does not return.

    `where` tells, also another thread, the shard and the byte offset; it is None while nothing is read. `since` is when
    it was set, on the clock of `time.monotonic`. Where it stands for many reads, `count` is another number whenever one
    of them has finished.
    """

    where: Callable[[], tuple[int, int]] | None = None
    since: float = 0.0
    count: Callable[[], int] | None = None

    def set(self, where: Callable[[], tuple[int, int]], count: Callable[[], int] | None = None) -> None:
        """A read begins, or many."""
        self.where, self.count, self.since = where, count, time.monotonic()

    def clear(self) -> None:
        """Nothing is read any more."""
        self.where = self.count = None

    def look(self) -> tuple[float, bool, int]:
        """Return what is another value whenever a read has finished."""
        count = self.count
        return self.since, self.where is None, 0 if count is None else count()


class Pace:
    """How fast some threads read: the first `n_regular` always do, the others where the latest read `is_slow`.

    They wait for a disk then; else threads that share a core only take time from each other. All of them share this: a
    figure that is a moment old does no harm, so there is no lock.
    """

    def __init__(self, n_regular: int) -> None:
        self.is_slow = False
        # How many bytes each of them may ask the kernel to read ahead.
        self.to_announce = _MIN_ANNOUNCED_NBYTES
        self._n_regular = n_regular
        self._done_at = time.monotonic()

    def note(self, nbytes: int, n_calls: int, seconds: float) -> None:
        """Note how long a read took."""
        self._done_at = time.monotonic()
        self.is_slow = seconds > nbytes / _SLOW_NBYTES_PER_S + n_calls * _CALL_S
        self.to_announce = max(_MIN_ANNOUNCED_NBYTES, int(nbytes / max(seconds, 1e-9) * _ANNOUNCED_S))

    def count_working(self, n_threads: int) -> int:
        """How many of the threads read, as things stand."""
        return n_threads if self.is_slow else min(self._n_regular, n_threads)

    def wait_s(self, number: int) -> float | None:
        """How long thread `number`, from 0, is to wait before it takes a task; None for not at all."""
        if number < self._n_regular or self.is_slow:
            return None
        left = self._done_at + _HELP_AFTER_S - time.monotonic()
        return None if left <= 0 else min(left, threading.TIMEOUT_MAX)


class Reader(abc.ABC):
    """Reads for one thread at a time. It tells `pace` how long each read took, and `spot` what is read."""

    has_ring: bool = False

    def __init__(self, store: Files, pace: Pace | None = None, spot: Spot | None = None) -> None:
        self.store, self.pace, self.spot = store, pace, spot or Spot()

    def read(self, extents: Extents, start: int, stop: int) -> None:
        """Read a range of extents to their places; errors are those of `ShardStore.opened`.

        `ReadError` is also for a read that failed for good, and for a shard that became shorter.
        """
        began = time.monotonic()
        self._read(extents, start, stop)
        self.spot.clear()
        if self.pace is not None:
            self.pace.note(int(extents.nbytes[start:stop].sum()), stop - start, time.monotonic() - began)

    def read_ranges(self, memory: NDArray[np.uint8], shard: int, ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
        """Read ranges of a shard, each an offset and a size, to the beginning of memory; yields the size of each.

        As `read`, but for one at a time: what looks at each before the next one finds it in the cache of the core.
        """
        vector = np.array([memory.ctypes.data, 0])
        address = vector.ctypes.data
        left, is_whole = collections.deque(ranges), True
        while left:
            # Anew after a read that was finished otherwise: the descriptor may have been lost.
            with self.store.opened(shard) as fd:
                while left and is_whole:
                    offset, nbytes = left.popleft()
                    began, vector[1] = time.monotonic(), nbytes
                    self.spot.where, self.spot.since = functools.partial(_pair, shard, offset), began
                    n = _preadv(fd, address, 1, offset)
                    is_whole = n == nbytes
                    if not is_whole:
                        code = ctypes.get_errno()
                        extents = Extents.in_a_row(memory, *(np.array([x]) for x in (shard, offset, nbytes)))
                        self._finish_one(extents, 0, n, code)
                    self.spot.clear()
                    if self.pace is not None:
                        self.pace.note(nbytes, 1, time.monotonic() - began)
                    yield nbytes
            is_whole = True

    @abc.abstractmethod
    def _read(self, extents: Extents, start: int, stop: int) -> None: ...

    @contextlib.contextmanager
    def opened(self, extents: Extents, start: int, stop: int, direct: bool = False) -> Iterator[_Int64s]:
        """Hold open what a range of extents is read from, see `ShardStore.opened`: yields the descriptor of each."""
        with contextlib.ExitStack() as stack:
            fds = np.empty(stop - start, dtype=np.int64)
            for first, last in extents.by_shard(start, stop):
                self.spot.set(functools.partial(extents.where, first))
                shard = int(extents.shards[first])
                fds[first - start : last - start] = stack.enter_context(self.store.opened(shard, direct))
            yield fds

    def announce(self, extents: Extents, start: int, stop: int) -> None:
        """Ask the kernel to begin reading a range of extents, so that a disk has many reads to work on at a time.

        Of a range that would take long, only the first.
        """
        if self.pace is not None:
            ends = np.cumsum(extents.nbytes[start:stop])
            stop = start + min(stop - start, int(np.searchsorted(ends, self.pace.to_announce)) + 1)
        for first, last in extents.by_shard(start, stop):
            part = slice(first, last)
            with self.store.opened(int(extents.shards[first])) as fd:
                # A disk that has too much to do already lets it wait.
                for i, offset, nbytes in zip(
                    range(first, last), extents.offsets[part].tolist(), extents.nbytes[part].tolist(), strict=True
                ):
                    self.spot.set(functools.partial(extents.where, i))
                    advise(fd, "WILLNEED", offset, nbytes)
        self.spot.clear()

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
            elif self.store.may_pass(path, offset, code, tries):
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


def _pair(shard: int, offset: int) -> tuple[int, int]:
    return shard, offset


def _where(extents: Extents, first: int, last: int, left: Iterator[int]) -> tuple[int, int]:
    return extents.where(max(first, last - 1 - operator.length_hint(left)))


class CallReader(Reader):
    """One system call for each extent."""

    def _read(self, extents: Extents, start: int, stop: int) -> None:
        for first, last in extents.by_shard(start, stop):
            part = slice(first, last)
            # How many are left it tells at any time, also another thread.
            offsets = iter(extents.offsets[part].tolist())
            self.spot.set(functools.partial(_where, extents, first, last, offsets), offsets.__length_hint__)
            with self.store.opened(int(extents.shards[first])) as fd:
                addresses = (extents.vectors.ctypes.data + 16 * extents.firsts[part]).tolist()
                got = list(map(_preadv, itertools.repeat(fd), addresses, extents.counts[part].tolist(), offsets))
                # The last error of this thread: the one of the reads that failed, or of one of them.
                code = ctypes.get_errno()
            self._finish(extents, first, np.array(got, dtype=np.int64), code)
