"""An open shard directory: checked once, read by threads.

File descriptors are opened where they are used, so that a store pickles in a few KB; they are few however many
shards there are, and each is checked again when it is opened.
"""

import collections
import contextlib
import ctypes
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

from saev_torch.errors import ConfigError, ReadError
from saev_torch.files import open_regular
from saev_torch.metadata import Metadata
from saev_torch.shards import LABELS_NAME, ShardInfo, check_nbytes

__all__ = ["ShardStore"]

_pread = ctypes.CDLL(None, use_errno=True).pread
_pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_pread.restype = ctypes.c_ssize_t

_LABELS = -1
_MAX_OPEN = 256


def _limit_open() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if soft == resource.RLIM_INFINITY else max(4, min(_MAX_OPEN, soft // 8))


def _close_all(entries: dict[int, list[int]]) -> None:
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
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        # Number of a shard -> [descriptor, users], least recently used first.
        self._open: collections.OrderedDict[int, list[int]] = collections.OrderedDict()
        self._limit = _limit_open()
        weakref.finalize(self, _close_all, self._open).atexit = False

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def clone(self) -> "ShardStore":
        """Another store on the same directory, with descriptors of its own; nothing is checked again yet."""
        other = object.__new__(ShardStore)
        other.__setstate__(self.__getstate__())
        return other

    def path(self, shard_idx: int) -> Path:
        """Path of a shard, for messages."""
        return self.shards_dir / self._name(shard_idx)

    def _name(self, shard_idx: int) -> str:
        return LABELS_NAME if shard_idx == _LABELS else self.shards[shard_idx].name

    @contextlib.contextmanager
    def opened(self, shard_idx: int) -> Iterator[int]:
        """Hold a shard open: yields its file descriptor.

        Raises:
            ShardsNotFoundError: The file is gone.
            FormatError: It is no longer a regular file of the right size.
            ReadError: It cannot be opened.
        """
        with self._lock:
            entry = self._open.get(shard_idx)
            if entry is None:
                entry = self._open[shard_idx] = [self._open_checked(shard_idx), 0]
                self._close_unused()
            self._open.move_to_end(shard_idx)
            entry[1] += 1
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                if self._open.get(shard_idx) is not entry and not entry[1]:
                    os.close(entry[0])

    def _open_checked(self, shard_idx: int) -> int:
        fd = open_regular(self.shards_dir, self._name(shard_idx))
        try:
            if shard_idx != _LABELS:
                nbytes = os.fstat(fd).st_size
                check_nbytes(self.path(shard_idx), self.metadata, self.shards[shard_idx].n_examples, nbytes)
                # Blocks are read in random order: what the kernel would read ahead is not wanted yet.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _close_unused(self) -> None:
        for shard_idx in [i for i, (_, users) in self._open.items() if not users][: len(self._open) - self._limit]:
            os.close(self._open.pop(shard_idx)[0])

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
        labels = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        addresses = labels.ctypes.data + ends - lengths
        with self.opened(_LABELS) as fd:
            wanted = lengths.tolist()
            got = list(map(_pread, itertools.repeat(fd), addresses.tolist(), wanted, starts.tolist()))
            if got != wanted:
                for first, length, end in zip(starts.tolist(), wanted, ends.tolist(), strict=True):
                    self._read_fully(fd, labels.data[end - length : end], first)
        return labels

    def _read_fully(self, fd: int, buffer: memoryview, offset: int) -> None:
        path, done = self.path(_LABELS), 0
        while done < len(buffer):
            try:
                n = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as err:
                raise ReadError(f"{path}: reading {len(buffer)} bytes at {offset} failed: {err.strerror}") from err
            if n == 0:
                raise ReadError(
                    f"{path}: expected {len(buffer)} bytes at {offset}, got {done}: the file became shorter while it "
                    "was in use; copy it again and start again."
                )
            done += n

    def close(self) -> None:
        """Close all descriptors that no thread is reading from; those follow when their read returns."""
        with self._lock:
            for fd, users in self._open.values():
                if not users:
                    os.close(fd)
            self._open.clear()
