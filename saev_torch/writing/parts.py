"""The data files of a directory under hidden names, which they keep until all of them are published."""

import os
from pathlib import Path
from typing import Any

import numpy.typing as npt

from saev_torch.errors import WriteError
from saev_torch.format.files import writing
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import LABELS_NAME, labels_nbytes, shard_nbytes

_MAX_PWRITE_BYTES = 1 << 30  # The kernel takes at most 2 GiB less a page in one call.


def part_name(name: str) -> str:
    """Name of a file for as long as it is not published."""
    return f".{name}.part"


class Parts:
    """The unpublished files of a directory; where the system refuses, methods raise a `WriteError`."""

    def __init__(self, shards_dir: Path, md: Metadata) -> None:
        self._shards_dir, self._md = shards_dir, md
        self._fds: dict[str, int] = {}
        self._changed: set[str] = set()

    def write(self, name: str, rows: npt.NDArray[Any], offset: int) -> None:
        """Write rows at an offset of a file, in bytes; the file is made where there is none."""
        with writing(self._shards_dir / name):
            self._changed.add(name)
            fd = self._open(name)
            view = rows.data.cast("B")
            while view:
                n_bytes = os.pwrite(fd, view[:_MAX_PWRITE_BYTES], offset)
                view, offset = view[n_bytes:], offset + n_bytes

    def take_changed(self) -> set[str]:
        """Return the files that were written since this was last asked."""
        changed, self._changed = self._changed, set()
        return changed

    def write_empty(self, name: str) -> None:
        """Make a file of zeros, unless it is there or published, and force it to disk."""
        with writing(self._shards_dir / name):
            if not (self._shards_dir / name).exists():
                os.fsync(self._open(name))

    def _open(self, name: str) -> int:
        if name in self._fds:
            return self._fds[name]
        # Labels and one shard are all that batches in order need; many shards would run out of descriptors.
        for other in [other for other in self._fds if LABELS_NAME not in (name, other)]:
            os.close(self._fds.pop(other))
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._shards_dir / part_name(name), flags, 0o666)
        try:
            # Full size at once, zeros where nothing is written: saev's files are preallocated, the last one too.
            os.ftruncate(fd, self._nbytes(name))
        except BaseException:
            os.close(fd)
            raise
        self._fds[name] = fd
        return fd

    def _nbytes(self, name: str) -> int:
        return labels_nbytes(self._md) if name == LABELS_NAME else shard_nbytes(self._md, self._md.examples_per_shard)

    def sync(self, names: set[str]) -> None:
        """Force files to disk; another thread may write meanwhile."""
        for name in sorted(names):
            with writing(self._shards_dir / name):
                # Not the descriptor of the writing thread, which may close it.
                fd = os.open(self._shards_dir / part_name(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def reveal(self, name: str) -> None:
        """Give a file its own name; a writer that was killed may have done so before.

        Raises:
            WriteError: It is missing or of another size, or the system refused.
        """
        path, part = self._shards_dir / name, self._shards_dir / part_name(name)
        with writing(path):
            if part.exists():
                os.rename(part, path)
            found = path.stat().st_size
        if found != self._nbytes(name):
            raise WriteError(
                f"{path}: expected {self._nbytes(name)} bytes, got {found}: it was changed; delete the directory and "
                "write it again"
            )

    def close(self) -> None:
        """Let go of all files."""
        while self._fds:
            os.close(self._fds.popitem()[1])
