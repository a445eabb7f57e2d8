"""The files of an unfinished directory, under hidden names until they are published."""

import os
from pathlib import Path
from typing import Any

import numpy.typing as npt

from saev_torch.errors import WriteError
from saev_torch.format.files import open_own, writing
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import shard_nbytes
from saev_torch.format.sidecars import SIDECARS

_MAX_PWRITE_BYTES = 1 << 30  # The kernel takes at most 2 GiB less a page in one call.
_SIDECARS = {sidecar.name: sidecar for sidecar in SIDECARS}


class Parts:
    """The data files under hidden names, which they keep until all of them are published."""

    def __init__(self, shards_dir: Path, md: Metadata) -> None:
        self._shards_dir, self._md = shards_dir, md
        self._fds: dict[str, int] = {}
        self._changed: set[str] = set()

    def write(self, name: str, rows: npt.NDArray[Any], offset: int) -> None:
        """Write rows at an offset of a file, in bytes; the file is made where there is none."""
        with writing(self._shards_dir / name):
            fd = self._open(name)
            view = rows.data.cast("B")
            while view:
                n_bytes = os.pwrite(fd, view[:_MAX_PWRITE_BYTES], offset)
                view, offset = view[n_bytes:], offset + n_bytes
            # Not before: a signal handler may ask for a checkpoint in the middle, which would take it.
            self._changed.add(name)

    def read(self, name: str, nbytes: int, offset: int) -> bytes:
        """Read what was written to a file, under whichever name it has by now."""
        part = part_name(name)
        fd = open_own(self._shards_dir, part if (self._shards_dir / part).exists() else name)
        with writing(self._shards_dir / name), os.fdopen(fd, "rb") as file:
            file.seek(offset)
            found = file.read(nbytes)
        if len(found) < nbytes:
            raise WriteError(
                f"{self._shards_dir / name}: expected {nbytes} bytes at {offset}, got {len(found)}: it was changed; "
                "delete the directory and write it again"
            )
        return found

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
        # Sidecars and one shard are all that batches in order need; many shards would run out of descriptors.
        if name not in _SIDECARS:
            for other in self._fds.keys() - _SIDECARS:
                os.close(self._fds.pop(other))
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._shards_dir / part_name(name), flags, 0o666)
        try:
            # Full size at once, zeros where nothing is written; the last one is cut when it is published.
            os.ftruncate(fd, self._nbytes(name))
            if name in _SIDECARS:
                os.pwrite(fd, _SIDECARS[name].header(self._md), 0)
        except BaseException:
            os.close(fd)
            raise
        self._fds[name] = fd
        return fd

    def _nbytes(self, name: str) -> int:
        if name in _SIDECARS:
            return _SIDECARS[name].nbytes(self._md)
        return shard_nbytes(self._md, self._md.examples_per_shard)

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

    def reveal(self, name: str, nbytes: int, cut: bool = True) -> None:
        """Give a file its own name, unless a writer that was killed has done so, and cut it to `nbytes` if asked to."""
        path, part = self._shards_dir / name, self._shards_dir / part_name(name)
        with writing(path):
            if part.exists():
                os.rename(part, path)
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found, full = os.fstat(fd).st_size, self._nbytes(name)
                if found not in (nbytes, full):
                    raise WriteError(
                        f"{path}: expected {full} bytes, got {found}: it was changed; delete the directory and write "
                        "it again"
                    )
                if found != (nbytes if cut else full):
                    # What stands behind its examples is zeros that nobody wrote.
                    os.ftruncate(fd, nbytes if cut else full)
                    os.fsync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Let go of the files."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def part_name(name: str) -> str:
    """The hidden name of a file."""
    return f".{name}.part"
