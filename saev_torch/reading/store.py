"""An open shard directory: checked once, read by threads.

File descriptors are opened where they are used, so that a store pickles in a few KB; they are few however many
shards there are, and each is checked again when it is opened.
"""

import collections
import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import resource
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ConfigError, FormatError, ReadError
from saev_torch.format.files import open_regular
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import LABELS_NAME, ShardInfo, check_nbytes
from saev_torch.order.runs import expand_runs
from saev_torch.reading.retries import Retries

__all__ = ["ShardStore"]

_pread = ctypes.CDLL(None, use_errno=True).pread
_pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_pread.restype = ctypes.c_ssize_t

_Key = tuple[int, bool]
"""Number of a shard, and whether it is read past the page cache."""

_LABELS = -1
_MAX_OPEN = 256
# A labels.bin up to this size is kept in memory once read: a block's few labels cost a read as dear as its activations.
_MAX_KEPT_NBYTES = 32 << 20


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
        self._labels_lock = threading.Lock()
        self._labels: NDArray[np.uint8] | None = None
        # -> [descriptor, users], least recently used first.
        self._open: collections.OrderedDict[_Key, list[int]] = collections.OrderedDict()
        self._limit = _limit_open()
        weakref.finalize(self, _close_all, self._open).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_") and k != "retries"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def clone(self) -> "ShardStore":
        """Another store on the same directory, with descriptors of its own; nothing is checked again yet."""
        other = object.__new__(ShardStore)
        other.__setstate__(self.__getstate__())
        return other

    @property
    def labels_idx(self) -> int:
        """What stands for labels.bin where the number of a shard is expected."""
        return _LABELS

    def path(self, shard_idx: int) -> Path:
        """Path of a shard, for messages."""
        return self.shards_dir / self._name(shard_idx)

    def _name(self, shard_idx: int) -> str:
        return LABELS_NAME if shard_idx == _LABELS else self.shards[shard_idx].name

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
            if shard_idx != _LABELS:
                stat = os.fstat(fd)
                check_nbytes(self.path(shard_idx), self.metadata, self.shards[shard_idx].n_examples, stat.st_size)
                # One of the two alone proves nothing: `touch` changes the time, and some file systems number anew.
                inode, written = self.identities[shard_idx].tolist()
                if ctypes.c_int64(stat.st_ino).value != inode and ctypes.c_int64(stat.st_mtime_ns).value != written:
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

    def read_labels(self, examples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read the labels of examples.

        Args:
            examples: `[m] int64`, fastest where they ascend.

        Returns:
            `[m, content_tokens_per_example] uint8`.

        Raises:
            ConfigError: There is no labels.bin.
            ReadError: Reading failed, or the file became shorter.
        """
        width = self.metadata.content_tokens_per_example
        if not self.has_labels:
            raise ConfigError(
                f"{self.shards_dir / LABELS_NAME}: expected labels, because labels are asked for, got no such file; "
                "leave ignore_labels empty, or use shards with labels."
            )
        nbytes = self.metadata.n_examples * width
        if nbytes <= _MAX_KEPT_NBYTES:
            return self._keep_labels(nbytes).reshape(-1, width)[examples]
        starts = np.flatnonzero(np.diff(examples, prepend=-2) != 1)
        lengths = np.diff(np.append(starts, len(examples)))
        return self.read_label_runs(examples[starts] * width, lengths * width).reshape(len(examples), width)

    def read_label_runs(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read runs of bytes of labels.bin.

        Args:
            starts: `[n_runs] int64`, offset of each run in the file.
            lengths: `[n_runs] int64`, bytes of each run.

        Returns:
            `[sum of lengths] uint8`, one run after the other.

        Raises:
            ReadError: Reading failed, or the file became shorter.
        """
        ends = np.cumsum(lengths)
        nbytes = self.metadata.n_examples * self.metadata.content_tokens_per_example
        if nbytes <= _MAX_KEPT_NBYTES:
            return self._keep_labels(nbytes)[expand_runs(starts, lengths)]
        labels = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        addresses = labels.ctypes.data + ends - lengths
        wanted = lengths.tolist()
        with self.opened(_LABELS) as fd:
            got = list(map(_pread, itertools.repeat(fd), addresses.tolist(), wanted, starts.tolist()))
        if got != wanted:
            code = ctypes.get_errno()
            for first, length, end, n in zip(starts.tolist(), wanted, ends.tolist(), got, strict=True):
                if n != length:
                    self._read_rest(labels[end - length : end], first, n, code)
        return labels

    def _keep_labels(self, nbytes: int) -> NDArray[np.uint8]:
        """Read all of labels.bin, the first time."""
        with self._labels_lock:
            if self._labels is None:
                labels = np.empty(nbytes, dtype=np.uint8)
                with self.opened(_LABELS) as fd:
                    n = _pread(fd, labels.ctypes.data, nbytes, 0)
                    code = ctypes.get_errno()
                if n != nbytes:
                    self._read_rest(labels, 0, n, code)
                self._labels = labels
            return self._labels

    def _read_rest(self, labels: NDArray[np.uint8], offset: int, n: int, code: int) -> None:
        """Finish a run whose first read returned `n`, trying again where that may help."""
        path, nbytes = self.path(_LABELS), len(labels)
        done = tries = 0
        while True:
            if n > 0:
                done += n
            elif n == 0:
                raise ReadError(
                    f"{path}: expected {nbytes} bytes at offset {offset}, got {done}: the file became shorter while it "
                    "was in use; copy it again and start again."
                )
            elif self.retries.again(path, offset, code, tries):
                tries += 1
                self.drop(_LABELS)
            else:
                raise ReadError(
                    f"{path}: reading {nbytes} bytes at offset {offset} failed after {tries + 1} tries: "
                    f"{os.strerror(code)}; check the file system."
                )
            if done == nbytes:
                return
            with self.opened(_LABELS) as fd:
                n = _pread(fd, labels.ctypes.data + done, nbytes - done, offset + done)
                code = ctypes.get_errno()

    def close(self) -> None:
        """Close all descriptors that no thread is reading from; those follow when their read returns."""
        with self._lock:
            for fd, users in self._open.values():
                if not users:
                    os.close(fd)
            self._open.clear()
