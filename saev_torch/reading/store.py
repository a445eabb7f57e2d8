"""An open shard directory: checked once, read by threads.

File descriptors are opened where they are used, so that a store pickles in a few KB; they are few however many
shards there are, and each is checked again when it is opened.
"""

import collections
import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saev_torch.errors import FormatError, ReadError
from saev_torch.format.files import open_regular
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import LABELS_NAME, ShardInfo, check_nbytes
from saev_torch.reading.retries import Retries

_Key = tuple[int, bool]
"""Number of a shard, and whether it is read past the page cache."""

LABELS_IDX = -1
"""Stands for labels.bin where the number of a shard is expected."""

_MAX_OPEN = 256
_UNKNOWN = -1, -1


def _limit_open() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if soft == resource.RLIM_INFINITY else max(4, min(_MAX_OPEN, soft // 8))


def _close_all(entries: dict[_Key, list[int]]) -> None:
    while entries:
        os.close(entries.popitem()[1][0])


class ShardStore:
    """A checked shard directory.

    Args:
        shards_dir: Directory with `metadata.json` and the shards.

    Attributes:
        shards_dir: The directory.
        metadata: Its metadata.
        shards: Its table of shards.
        has_labels: Whether it has a labels.bin.
        retries: What was tried again.

    Raises:
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
        ReadError: A file cannot be opened.
    """

    def __init__(self, shards_dir: Path) -> None:
        self.shards_dir = Path(shards_dir)
        self.metadata = Metadata.load(self.shards_dir)
        self.shards = ShardInfo.load(self.shards_dir)
        self.shards.validate(self.shards_dir)
        self.has_labels = os.path.lexists(self.shards_dir / LABELS_NAME)
        self.identities = np.array([self._identity(i) for i in range(len(self.shards))], dtype=np.int64).reshape(-1, 2)
        self._forget()

    def _identity(self, shard_idx: int) -> tuple[int, int]:
        """What tells a file from another one of the same name and size: its inode, and when it was written."""
        if not self.shards[shard_idx].n_examples:
            return 0, 0
        try:
            stat = os.stat(self.path(shard_idx), follow_symlinks=False)
        except OSError as err:
            raise ReadError(f"{self.path(shard_idx)}: could not be looked at: {err.strerror}.") from err
        return ctypes.c_int64(stat.st_ino).value, ctypes.c_int64(stat.st_mtime_ns).value

    def _forget(self) -> None:
        self.retries = Retries()
        self._lock = threading.Lock()
        # -> [descriptor, users], least recently used first.
        self._open: collections.OrderedDict[_Key, list[int]] = collections.OrderedDict()
        self._limit = _limit_open()
        weakref.finalize(self, _close_all, self._open).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_") and k != "retries"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @classmethod
    def of(cls, shards_dir: Path, metadata: Metadata, shards: ShardInfo) -> "ShardStore":
        """A store on tables that were loaded before. No file is looked at until it is opened."""
        store = object.__new__(cls)
        store.shards_dir, store.metadata, store.shards = shards_dir, metadata, shards
        store.has_labels = os.path.lexists(shards_dir / LABELS_NAME)
        store.identities = np.full((len(shards), 2), _UNKNOWN, dtype=np.int64)
        store._forget()
        return store

    def clone(self) -> "ShardStore":
        """Another store on the same directory, with descriptors of its own; nothing is checked again yet."""
        other = object.__new__(ShardStore)
        other.__setstate__(self.__getstate__())
        return other

    def path(self, shard_idx: int) -> Path:
        """Path of a shard, for messages."""
        return self.shards_dir / self._name(shard_idx)

    def _name(self, shard_idx: int) -> str:
        return LABELS_NAME if shard_idx == LABELS_IDX else self.shards[shard_idx].name

    @contextlib.contextmanager
    def opened(self, shard_idx: int, direct: bool = False) -> Iterator[int]:
        """Hold a shard open: yields its file descriptor.

        Args:
            shard_idx: The shard.
            direct: Read past the page cache, where the file system can do so: what is read, where it is in the file,
                and where it goes are then multiples of 4096 bytes.

        Raises:
            ShardsNotFoundError: The file is gone.
            FormatError: It is no longer a regular file of the right size.
            ReadError: It cannot be opened.
        """
        key = shard_idx, direct
        entry = self._take(key)
        if entry is None:
            # Not under the lock: opening may hang, and then `close` must not.
            entry = self._add(key, self._open_again(key))
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                if self._open.get(key) is not entry and not entry[1]:
                    os.close(entry[0])

    def _take(self, key: _Key) -> list[int] | None:
        """Use the descriptor of a shard, if there is one."""
        with self._lock:
            entry = self._open.get(key)
            if entry is not None:
                self._open.move_to_end(key)
                entry[1] += 1
            return entry

    def _add(self, key: _Key, fd: int) -> list[int]:
        """Use the descriptor of a shard that was just opened, unless another thread was faster."""
        with self._lock:
            entry = self._open.setdefault(key, [fd, 0])
            entry[1] += 1
            if entry[0] != fd:
                os.close(fd)
            self._open.move_to_end(key)
            self._close_unused(self._limit)
            return entry

    def drop(self, shard_idx: int) -> None:
        """Forget the descriptor of a shard, so that it is opened anew: a network file system may have lost it."""
        with self._lock:
            for key in ((shard_idx, False), (shard_idx, True)):
                entry = self._open.pop(key, None)
                if entry is not None and not entry[1]:
                    os.close(entry[0])

    def _open_again(self, key: _Key) -> int:
        """Open a shard, several times if that may help."""
        shard_idx, direct = key
        tries = 0
        while True:
            try:
                return self._open_checked(shard_idx, direct)
            except ReadError as err:
                code = err.__cause__.errno if isinstance(err.__cause__, OSError) else None
                if code in (errno.EMFILE, errno.ENFILE):
                    with self._lock:
                        self._close_unused(0)
                if not self.retries.again(self.path(shard_idx), None, code, tries):
                    raise
                tries += 1

    def _open_checked(self, shard_idx: int, direct: bool) -> int:
        fd = open_regular(self.shards_dir, self._name(shard_idx))
        try:
            if shard_idx != LABELS_IDX:
                stat = os.fstat(fd)
                check_nbytes(self.path(shard_idx), self.metadata, self.shards[shard_idx].n_examples, stat.st_size)
                # One of the two alone proves nothing: `touch` changes the time, and some file systems number anew.
                known = tuple(self.identities[shard_idx].tolist())
                inode, written = ctypes.c_int64(stat.st_ino).value, ctypes.c_int64(stat.st_mtime_ns).value
                if known != _UNKNOWN and inode != known[0] and written != known[1]:
                    raise FormatError(
                        f"{self.path(shard_idx)}: expected the file that was checked, got another one: it was replaced "
                        "while it was in use; start again, so that all of the directory is checked."
                    )
                # Blocks are read in random order: what the kernel would read ahead is not wanted yet.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                if direct:
                    with contextlib.suppress(OSError):
                        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _close_unused(self, keep: int) -> None:
        unused = [key for key, (_, users) in self._open.items() if not users]
        for key in unused[: max(0, len(self._open) - keep)]:
            os.close(self._open.pop(key)[0])

    def close(self) -> None:
        """Close all descriptors that no thread is reading from; those follow when their read returns."""
        with self._lock:
            for fd, users in self._open.values():
                if not users:
                    os.close(fd)
            self._open.clear()
