"""What makes an unfinished directory safe to go on with: a claim, and journals of what is durably on disk.

    .unfinished              there until all is published; its lock is held for moments, to claim and to publish
    .journal-<start>-<stop>  one for each writer, by the examples that it is for; locked for as long as it lives

A journal is lines `start stop sidecars algorithm checksums crc`: examples start..stop are on disk, and their
checksums. Bit i of the number `sidecars` says whether the values of `SIDECARS[i]` are, too. A line is appended, and
itself forced to disk, only after the data it speaks of was. What no line speaks of counts as not written. The locks are
the kernel's, which a killed process cannot keep.
"""

import bisect
import contextlib
import fcntl
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from saev_torch.errors import WriteError
from saev_torch.format.checksums import ALGORITHM
from saev_torch.format.files import lock, open_own
from saev_torch.format.metadata import Metadata
from saev_torch.format.sidecars import SIDECARS, Sidecar

CLAIM_NAME = ".unfinished"
_JOURNAL = re.compile(r"\.journal-(\d{1,19})-(\d{1,19})")

Sidecars = tuple[Sidecar, ...]
"""Those that belong to some examples, in the order of `SIDECARS`."""

# A worker that a DataLoader forks inherits the locks, and could hold them after its parent was killed.
_held: set[int] = set()


def _close_held() -> None:
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)


class Entry(NamedTuple):
    """One line of a journal: examples `start..stop` are durably on disk; checksums as `block_checksums` packs them."""

    start: int
    stop: int
    sidecars: Sidecars
    algorithm: str
    checksums: bytes

    def _to_line(self) -> bytes:
        bits = sum(1 << SIDECARS.index(sidecar) for sidecar in self.sidecars)
        text = f"{self.start} {self.stop} {bits} {self.algorithm} {self.checksums.hex()}"
        return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()

    @classmethod
    def _from_line(cls, line: bytes) -> "Entry | None":
        text, _, crc = line.rpartition(b" ")
        fields = text.split(b" ")
        if len(fields) != 5 or crc != b"%08x\n" % zlib.crc32(text):
            return None
        start, stop, bits, algorithm, checksums = (field.decode() for field in fields)
        sidecars = tuple(sidecar for i, sidecar in enumerate(SIDECARS) if int(bits) >> i & 1)
        return cls(int(start), int(stop), sidecars, algorithm, bytes.fromhex(checksums))


@contextlib.contextmanager
def claimed(shards_dir: Path, content: bytes, alone: bool) -> Iterator[bool]:
    """Hold the claim of a directory, one process at a time; its content says what is being written there.

    Yields whether the claim is new, so that nobody wrote here before. A new one is removed after an exception. A claim
    with other content, or a file that is none, is a `WriteError`, as is a file system without locks unless the writer
    is to be `alone`: making the claim is enough for who goes on only with a new one.
    """
    path = shards_dir / CLAIM_NAME
    while True:
        flags, is_new = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, True
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            is_new = False
            try:
                fd = os.open(path, flags)
            except FileNotFoundError:
                continue
        _held.add(fd)
        try:
            if not lock(fd, fcntl.LOCK_EX) and not alone:
                raise WriteError(
                    f"{shards_dir}: expected a file system with locks, because of resume or example_range, got one "
                    "without; mount it with them (Lustre: -o flock), write to another one, or write without both."
                )
            # Whoever published while we waited has removed the file that we hold.
            if not _is_same(path, fd):
                continue
            found = os.pread(fd, len(content) + 1, 0)
            if content.startswith(found) and found != content:
                os.pwrite(fd, content, 0)
            elif found != content:
                raise WriteError(
                    f"{shards_dir}: expected an empty directory, got ['{CLAIM_NAME}'] of another data set; "
                    "if no other process is writing there, delete the directory"
                )
            yield is_new
            return
        except BaseException:
            if is_new and _is_same(path, fd):
                path.unlink()
            raise
        finally:
            _held.discard(fd)
            os.close(fd)


def _is_same(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def journal_ranges(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Pick the names of journals, with the examples that each is for."""
    found = {name: _JOURNAL.fullmatch(name) for name in sorted(names)}
    return {name: (int(match[1]), int(match[2])) for name, match in found.items() if match}


def read_journals(shards_dir: Path, md: Metadata) -> Iterator[Entry]:
    """Yield the entries of all journals of a directory, which stays claimed meanwhile.

    What a process without the package xxhash has written, or one with it, is left out: that is written again.
    """
    sidecars = None
    for name in journal_ranges(os.listdir(shards_dir)):
        for entry in _read_journal(shards_dir, name):
            if entry.algorithm != ALGORITHM:
                continue
            n_sums = (entry.stop - entry.start) * (md.n_layers + len(entry.sidecars))
            is_fit = 0 <= entry.start < entry.stop <= md.n_examples and len(entry.checksums) == 4 * n_sums
            if not is_fit or sidecars not in (None, entry.sidecars):
                raise WriteError(
                    f"{shards_dir / name}: expected labels and the like for all examples or for none, and examples of "
                    f"this data set, got {entry.start}..{entry.stop}; delete the directory and write it again"
                )
            sidecars = entry.sidecars
            yield entry


def _read_journal(shards_dir: Path, name: str) -> Iterator[Entry]:
    # Up to the first line that is torn.
    with os.fdopen(open_own(shards_dir, name), "rb") as file:
        for line in file:
            entry = Entry._from_line(line)
            if entry is None:
                return
            yield entry


class Journal:
    """The journal of the writer of examples `start..stop`, which must hold the claim while it makes or closes one.

    A `BlockingIOError` says that a living writer has it.
    """

    def __init__(self, shards_dir: Path, start: int, stop: int) -> None:
        name = self.name(start, stop)
        self._fd = os.open(shards_dir / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        _held.add(self._fd)
        try:
            lock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # What a kill left of a line would swallow the next one.
            n_bytes = sum(len(entry._to_line()) for entry in _read_journal(shards_dir, name))
            os.ftruncate(self._fd, n_bytes)
            os.lseek(self._fd, n_bytes, os.SEEK_SET)
        except BaseException:
            self.close()
            raise

    def append(self, entries: Iterable[Entry]) -> None:
        """Append entries of data that is on disk already, and return when they are, too."""
        view = memoryview(b"".join(entry._to_line() for entry in entries))
        while view:
            view = view[os.write(self._fd, view) :]
        os.fsync(self._fd)

    def close(self) -> None:
        """Let go of it; the file stays."""
        if self._fd in _held:
            _held.discard(self._fd)
            os.close(self._fd)

    @staticmethod
    def name(start: int, stop: int) -> str:
        """Name of the journal of the writer of these examples."""
        return f".journal-{start}-{stop}"

    @staticmethod
    def is_alive(shards_dir: Path, name: str) -> bool:
        """Whether a living writer holds the journal of this name."""
        fd = os.open(shards_dir / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


class Ranges:
    """Which examples have been seen: disjoint ranges, neighbours merged, so that batches in order keep it at one."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def overlap(self, start: int, stop: int) -> tuple[int, int] | None:
        """Return the first part of `start..stop` that is in a range already."""
        i = bisect.bisect_right(self._stops, start)
        if start < stop and i < len(self._starts) and self._starts[i] < stop:
            return max(start, self._starts[i]), min(stop, self._stops[i])
        return None

    def add(self, start: int, stop: int) -> None:
        """Add `start..stop`, parts of which may be in a range already."""
        # Ranges low..high overlap or touch it, and become one with it.
        low = bisect.bisect_left(self._stops, start)
        high = bisect.bisect_right(self._starts, stop)
        self._starts[low:high] = [min([start, *self._starts[low:high]])]
        self._stops[low:high] = [max([stop, *self._stops[low:high]])]

    def gaps(self, stop: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield what is missing from `start..stop`."""
        at = start
        first = bisect.bisect_right(self._stops, start)
        for low, high in zip(self._starts[first:], self._stops[first:], strict=True):
            if low >= stop:
                break
            if at < low:
                yield at, low
            at = high
        if at < stop:
            yield at, stop
