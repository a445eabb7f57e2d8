"""An open shard directory: checked once, read by threads.

File descriptors are opened where they are used, so that a store pickles in a few KB; they are few however many
shards there are, and each is checked again when it is opened.
"""

import collections
import contextlib
import copy
import ctypes
import errno
import fcntl
import logging
import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from saev_torch.errors import FormatError, ReadError
from saev_torch.format.files import open_regular
from saev_torch.format.localcopy import local_copy
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import ShardInfo, check_nbytes, identify, shard_nbytes
from saev_torch.format.sidecars import LABELS, SIDECARS, TOKEN_IDS, sidecar_idx
from saev_torch.processes.interrupts import whole
from saev_torch.processes.locks import renewed
from saev_torch.processes.undone import close_with
from saev_torch.reading.mapping import Mapping, Pages, all_pages

LABELS_IDX = sidecar_idx(LABELS)
"""Stands for labels.bin where the number of a shard is expected."""

_log = logging.getLogger("saev_torch")

_MAX_OPEN = 256
# Of 65,530 mappings that a process may have by default, its memory included.
_MAX_MAPPED = 4096
_WAITS_S = (0.02, 0.1, 0.5, 2.0)
_AT_ONCE = frozenset({errno.EINTR, errno.EAGAIN})
# EMFILE and ENFILE pass when other threads and processes close their files.
_TOO_MANY_OPEN = frozenset({errno.EMFILE, errno.ENFILE})
_TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOBUFS}) | _TOO_MANY_OPEN

# File systems that may answer a read with fewer bytes than there are, by their numbers in <linux/magic.h>: FUSE
# (virtiofs, too), 9p, the shared folders of VirtualBox and Parallels, hostfs, Coda.
_SHORT = frozenset({0x65735546, 0x01021997, 0x786F4256, 0x7C7C6673, 0x00C0FFEE, 0x73757245})
_STATFS_NBYTES = 256

_ADVICE = {name: getattr(os, f"POSIX_FADV_{name}", None) for name in ("RANDOM", "SEQUENTIAL", "WILLNEED", "DONTNEED")}

_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs if sys.platform.startswith("linux") else None


def _file_system(fd: int) -> int:
    """The number of the file system of an open file, see `_SHORT`; 0 where there is none to be had."""
    found = ctypes.create_string_buffer(_STATFS_NBYTES)
    return 0 if _fstatfs is None or _fstatfs(fd, found) else int.from_bytes(found.raw[:4], sys.byteorder)


def advise(fd: int, advice: str, offset: int = 0, nbytes: int = 0) -> None:
    """Tell the kernel what comes, by the end of a name `POSIX_FADV_...`; some systems cannot be told."""
    number = _ADVICE.get(advice)
    if number is not None:
        try:
            os.posix_fadvise(fd, offset, nbytes, number)
        except OSError:
            # It is only advice.
            return


class _Descriptor:
    """A file descriptor that is closed when nobody holds this any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        close_with(self, fd)
        _descriptors.add(self)


_descriptors: "weakref.WeakSet[_Descriptor]" = weakref.WeakSet()
_stores: "weakref.WeakSet[ShardStore]" = weakref.WeakSet()


def _limit_open(most: int, store: "ShardStore") -> None:
    """Let other stores than this close files that they only keep open, where the process has too many."""
    for other in tuple(_stores):
        if len(_descriptors) <= most:
            return
        # One that is busy goes on; in a forked process it may be so for ever.
        if other is not store and other._lock.acquire(blocking=False):
            other._kept.clear()
            other._mapped.clear()
            other._lock.release()


def _limit_mapped(store: "ShardStore") -> None:
    """Let other stores than this forget files that they only keep mapped, where the process has too many."""
    for other in tuple(_stores):
        if len(all_pages) <= _MAX_MAPPED:
            return
        if other._pages is not store._pages:
            other._pages.clear()


class Files(Protocol):
    """What readers need of a store, or of several: files by number, each open while it is held."""

    @property
    def answers_short(self) -> bool:
        """Whether reads may return fewer bytes than there are."""

    def path(self, shard_idx: int) -> Path:
        """Path of a file, for messages."""

    def opened(self, shard_idx: int, direct: bool = False) -> contextlib.AbstractContextManager[int]:
        """Hold a file open: yields its descriptor."""

    def drop(self, shard_idx: int) -> None:
        """Forget the descriptor of a file."""

    def may_pass(self, path: Path, offset: int | None, code: int | None, tries: int) -> bool:
        """Whether to try once more after an error."""


class ShardStore:
    """A shard directory with its metadata and its table of shards.

    It is checked: `ShardsNotFoundError` where a file is missing, `FormatError` where one does not follow the format or
    has the wrong size. With tables that were loaded before, no file is looked at until it is opened. With `allow_links`
    its files may be symbolic links to regular files. `sidecars` are those that are there.

    With `is_local` it reads a copy under `$TMPDIR`, which stays there as long as this object lives; see `local_copy`.

    `answers_short` says whether one that was opened is on a file system that may return fewer bytes than there are. A
    ring must not read there: the kernel may read the rest from the wrong offset, and report that all went well.
    """

    def __init__(
        self,
        shards_dir: Path,
        tables: tuple[Metadata, ShardInfo] | None = None,
        allow_links: bool = False,
        is_local: bool = False,
    ) -> None:
        self.shards_dir, self.allow_links = Path(shards_dir), allow_links
        self.metadata, self.shards = tables or (
            Metadata.load(self.shards_dir, allow_links=allow_links),
            ShardInfo.load(self.shards_dir, allow_links=allow_links),
        )
        self.identities = None if tables else self.shards.check_files(self.shards_dir, self.metadata, allow_links)
        self._copy = local_copy(self.shards_dir, self.shards, allow_links) if is_local else None
        if self._copy is not None:
            self.shards_dir = self._copy.path
            self.identities = self.shards.check_files(self.shards_dir, self.metadata)
        # Blocks are read in random order: what the kernel would read ahead is not wanted yet.
        self.advice = "RANDOM"
        # What comes after the check is left to the next one who checks.
        self.sidecars = tuple(sidecar for sidecar in SIDECARS if os.path.lexists(self.shards_dir / sidecar.name))
        if self.identities is not None:
            is_there = (self.identities != -1).any(axis=1)
            self.sidecars = tuple(sidecar for sidecar in SIDECARS if is_there[sidecar_idx(sidecar)])
        self._forget()

    def _forget(self) -> None:
        self._lock = renewed(threading.Lock())
        self._n_retries = 0
        self.answers_short = False
        self._devices: set[int] = set()
        # By number of the shard and whether it is read past the page cache: all that are open, and those that stay so
        # when no thread reads from them, least recently used first.
        self._open: weakref.WeakValueDictionary[tuple[int, bool], _Descriptor] = weakref.WeakValueDictionary()
        self._kept: collections.OrderedDict[tuple[int, bool], _Descriptor] = collections.OrderedDict()
        self._mapped: dict[int, Mapping] = {}
        # Shared with the stores that are made of this one, so that the next epoch finds the files mapped.
        self._pages: dict[int, Pages] = {}
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._limit = _MAX_OPEN if soft == resource.RLIM_INFINITY else max(4, min(_MAX_OPEN, soft // 8))
        _stores.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def has_labels(self) -> bool:
        """Whether there are labels."""
        return LABELS in self.sidecars

    @property
    def has_token_ids(self) -> bool:
        """Whether there are token ids."""
        return TOKEN_IDS in self.sidecars

    def clone(self) -> "ShardStore":
        """Another store on the same directory, with descriptors of its own; nothing is checked again yet."""
        other = copy.copy(self)
        other._pages = self._pages
        return other

    @property
    def most_open(self) -> int:
        """How many files it keeps open, at most."""
        return self._limit

    def path(self, shard_idx: int) -> Path:
        """Path of a shard, for messages."""
        return self.shards_dir / self._name(shard_idx)

    def _name(self, shard_idx: int) -> str:
        return SIDECARS[-1 - shard_idx].name if shard_idx < 0 else self.shards[shard_idx].name

    @contextlib.contextmanager
    def opened(self, shard_idx: int, direct: bool = False) -> Iterator[int]:
        """Hold a shard open: yields its file descriptor.

        With `direct` it reads past the page cache, where the file system can do so: what is read, where it is in the
        file, and where it goes are then multiples of 4096 bytes. Raises `ShardsNotFoundError` where the file is gone,
        `FormatError` where it is not the one that was checked, and `ReadError` where it cannot be opened.
        """
        held = self._hold(shard_idx, direct)
        try:
            yield held.fd
        finally:
            # Who keeps an error does not keep the file open.
            del held

    def mapped(self, shard_idx: int) -> Mapping | None:
        """A shard that is mapped; None where the system refuses, or the file became shorter since it was opened.

        It is open as long as somebody holds it or it is kept open, and mapped as long as this store or a clone exists,
        unless the process has mapped too many. Errors are those of `opened`.
        """
        found = self._mapped.get(shard_idx)
        if found is None or found.pages.is_broken:
            found = Mapping.open(self._hold(shard_idx, False), self._pages.get(shard_idx))
            if found is not None and found.nbytes < shard_nbytes(self.metadata, self.shards[shard_idx].n_examples):
                # Who reads the file says so. Behind its end there are other mappings, or none.
                return None
            if found is not None:
                self._pages[shard_idx] = found.pages
                _limit_mapped(self)
                self._mapped[shard_idx] = found
        return found

    def _hold(self, shard_idx: int, direct: bool) -> _Descriptor:
        key = shard_idx, direct
        with self._lock:
            held = self._open.get(key)
            if held is not None:
                self._keep(key, held)
        if held is None:
            # Not under the lock: opening may hang, and then `close` must not.
            opened = whole(lambda: _Descriptor(self._open_again(shard_idx, direct)))
            with self._lock:
                held = self._open.setdefault(key, opened)
                self._keep(key, held)
                _limit_open(2 * self._limit, self)
        return held

    def _keep(self, key: tuple[int, bool], held: _Descriptor) -> None:
        self._kept[key] = held
        self._kept.move_to_end(key)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def drop(self, shard_idx: int) -> None:
        """Forget the descriptor of a shard, so that it is opened anew: a network file system may have lost it."""
        with self._lock:
            for key in ((shard_idx, False), (shard_idx, True)):
                self._open.pop(key, None)
                self._kept.pop(key, None)

    def close(self) -> None:
        """Close all descriptors that no thread is reading from; those follow when their read returns."""
        with self._lock:
            self._kept.clear()
            self._mapped.clear()

    def may_pass(self, path: Path, offset: int | None, code: int | None, tries: int) -> bool:
        """Whether to try once more after an error, and wait for the right time: up to 2.6 s in all.

        `offset` is where the file was read, None where it was opened; `code` the error, as in `errno`; `tries` how
        often it was tried again before.
        """
        if code in _AT_ONCE:
            return True
        if code not in _TRANSIENT or tries >= len(_WAITS_S):
            return False
        with self._lock:
            self._n_retries += 1
            n = self._n_retries
        what = "opening" if offset is None else f"reading at offset {offset}"
        _log.warning(
            "%s: %s failed (%s), trying again in %s s (error no. %d of this reader that may pass)",
            path, what, os.strerror(code), _WAITS_S[tries], n,
        )  # fmt: skip
        time.sleep(_WAITS_S[tries])
        return True

    def _open_again(self, shard_idx: int, direct: bool) -> int:
        """Open a shard, several times if that may help."""
        tries = 0
        while True:
            try:
                return self._open_checked(shard_idx, direct)
            except ReadError as err:
                code = err.__cause__.errno if isinstance(err.__cause__, OSError) else None
                if code in _TOO_MANY_OPEN:
                    self.close()
                if not self.may_pass(self.path(shard_idx), None, code, tries):
                    raise
                tries += 1

    def _open_checked(self, shard_idx: int, direct: bool) -> int:
        fd = open_regular(self.shards_dir, self._name(shard_idx), self.allow_links)
        try:
            stat = os.fstat(fd)
            self._check(shard_idx, stat)
            if stat.st_dev not in self._devices:
                self.answers_short = self.answers_short or _file_system(fd) in _SHORT
                self._devices.add(stat.st_dev)
            if shard_idx >= 0:
                advise(fd, self.advice)
                if direct:
                    with contextlib.suppress(OSError, AttributeError):
                        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check(self, shard_idx: int, stat: os.stat_result) -> None:
        if shard_idx >= 0 and self.shards[shard_idx].n_examples:
            check_nbytes(self.path(shard_idx), self.metadata, self.shards[shard_idx].n_examples, stat.st_size)
        known = (-1, -1) if self.identities is None else tuple(self.identities[shard_idx].tolist())
        # One of the two alone proves nothing: `touch` changes the time, and some file systems number anew.
        if known != (-1, -1) and all(now != then for now, then in zip(identify(stat), known, strict=True)):
            raise FormatError(
                f"{self.path(shard_idx)}: expected the file that was checked, got another one: it was replaced while "
                "it was in use; start again, so that all of the directory is checked."
            )
