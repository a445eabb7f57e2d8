"""A copy of a shard directory under `$TMPDIR`, made once per machine.

In saev_torch-<user id>/ are, for each:

    <key>/          the copy; its key tells its source, and each file's size and time of change
    <key>.part/     files on their way there: whatever has its name in <key> was on the disk before
    <key>.lock      locked by the one process that copies or removes; stays, empty
    <key>.use       locked, shared, by all that read; what it was copied from
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

from saev_torch.errors import ConfigError, ReadError, WriteError
from saev_torch.format.checksums import CHECKSUMS_NAME
from saev_torch.format.files import LOCKLESS, fingerprint, open_regular, sync_dir
from saev_torch.format.metadata import METADATA_NAME
from saev_torch.format.shards import SHARDS_NAME, ShardInfo
from saev_torch.format.sidecars import SIDECARS

_log = logging.getLogger("saev_torch")

_SEND_NBYTES = 64 << 20
_READ_NBYTES = 1 << 20
# Some file systems cannot be copied from by the system, or only some of their files.
_NO_SENDFILE = frozenset({errno.ENODATA, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class LocalCopy:
    """A directory to read from, which stays as long as this object lives, here or in a process that was forked."""

    def __init__(self, path: Path, fd: int | None = None) -> None:
        self.path = path
        if fd is not None:
            weakref.finalize(self, os.close, fd).atexit = False


def local_copy(shards_dir: Path, shards: ShardInfo, allow_links: bool = False) -> LocalCopy:
    """Copy a shard directory to `$TMPDIR/saev_torch-<user id>/`, unless an unchanged copy is there.

    Several processes may ask at once: one copies, the others wait. The copy stays for the next run; it is removed when
    its source has changed or is gone, and nobody reads it. Files that it lacks, or that are cut, are copied again.

    Args:
        shards_dir: Directory with `metadata.json` and the shards, which were checked before.
        shards: Its table.
        allow_links: Follow symbolic links to regular files. The copy has files.

    Returns:
        The copy; without `$TMPDIR`, or where that has no locks, the original.

    Raises:
        ConfigError: `$TMPDIR` is no directory.
        WriteError: `$TMPDIR` is full or cannot be written.
        ReadError: A file could not be read.
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
    """
    place = os.environ.get("TMPDIR")
    if not place:
        _log.warning("TMPDIR: expected a directory, because of use_tmpdir, got none: %s is read in place", shards_dir)
        return LocalCopy(shards_dir)
    if not os.path.isdir(place):
        raise ConfigError(
            f"TMPDIR: expected a directory, because of use_tmpdir, got {place!r}, which is none; make it, set TMPDIR "
            "to another, or set use_tmpdir=False."
        )
    root = Path(place).absolute() / f"saev_torch-{os.getuid()}"
    names = _list(shards_dir, shards, allow_links)
    copy = root / _key(str(shards_dir.resolve()), names)
    try:
        return _find_or_make(copy, shards_dir, names, allow_links)
    except OSError as err:
        if isinstance(err, ReadError | WriteError) or not err.errno:
            raise
        if err.errno in LOCKLESS:
            _log.warning(
                "TMPDIR: expected a file system with locks, because of use_tmpdir, got %s without (%s): %s is read "
                "in place", place, err.strerror, shards_dir,
            )  # fmt: skip
            return LocalCopy(shards_dir)
        if err.errno in _NO_ROOM:
            what = f"expected room for a copy of {shards_dir}, got: {err.strerror}; free some"
        else:
            what = f"the copy of {shards_dir} could not be made: {err.strerror}; check permissions and the file system"
        raise WriteError(f"{copy}: {what}, set TMPDIR to another file system, or set use_tmpdir=False.") from err


def _list(shards_dir: Path, shards: ShardInfo, allow_links: bool) -> list[str]:
    """The names of the files to copy."""
    others = [*(sidecar.name for sidecar in SIDECARS), CHECKSUMS_NAME]
    others = [name for name in others if os.path.lexists(shards_dir / name)]
    for name in others:
        # It may be no file at all: nobody has looked yet.
        os.close(open_regular(shards_dir, name, allow_links))
    return [METADATA_NAME, SHARDS_NAME, *(shard.name for shard in shards if shard.n_examples), *others]


def _find_or_make(copy: Path, shards_dir: Path, names: list[str], allow_links: bool) -> LocalCopy:
    root = copy.parent
    root.mkdir(mode=0o700, exist_ok=True)
    if root.lstat().st_uid != os.getuid() or root.is_symlink():
        raise WriteError(f"{root}: expected a directory of this user, got somebody else's; set TMPDIR.")
    with _locked(copy):
        found = LocalCopy(copy, _use(copy, str(shards_dir.resolve()), names))
        for other in root.glob("*.use"):
            # Before room is needed.
            _remove_if_stale(other.with_suffix(""))
        missing = [name for name in names if not _is_whole(copy / name, shards_dir / name)]
        if missing:
            _log.info("copying %s to %s: %d of %d files", shards_dir, copy, len(missing), len(names))
            _copy(shards_dir, missing, copy, allow_links)
    return found


def _key(source: str, names: list[str]) -> str:
    # Another one if any file was changed or replaced. Copies of before were not synced: they have other keys.
    return fingerprint(Path(source), names, b"synced\0" + os.fsencode(source))[:16]


@contextlib.contextmanager
def _locked(copy: Path, flags: int = 0) -> Iterator[None]:
    """Be the only process that makes or removes a copy; with `LOCK_NB`, or raise `BlockingIOError`."""
    with open(copy.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | flags)
        yield


def _use(copy: Path, source: str, names: list[str]) -> int:
    """Open what says that a copy is used; under the lock, because else it may be removed meanwhile."""
    fd = os.open(copy.with_suffix(".use"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        note = json.dumps({"source": source, "names": names}).encode()
        os.ftruncate(fd, os.pwrite(fd, note, 0))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_whole(path: Path, original: Path) -> bool:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == original.stat().st_size


def _remove_if_stale(copy: Path) -> None:
    """Remove a copy if it is not what would be made of its source today, and nobody uses it."""
    use = copy.with_suffix(".use")
    try:
        note = json.loads(use.read_bytes())
        if _key(note["source"], note["names"]) == copy.name:
            return
    except (FileNotFoundError, NotADirectoryError):
        # The source, or a file of it, is gone.
        pass
    except (OSError, ValueError, TypeError, KeyError):
        return
    # Being removed by somebody else, or in use.
    with contextlib.suppress(OSError), _locked(copy, fcntl.LOCK_NB), open(use) as used:
        fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _log.info("removing %s: its source has changed, or is gone", copy)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(copy.with_suffix(".part"), ignore_errors=True)
        use.unlink()


def _copy(shards_dir: Path, names: list[str], copy: Path, allow_links: bool) -> None:
    """Copy files to a directory, or none of them; the caller holds the lock, so that nobody else is at it."""
    part = copy.with_suffix(".part")
    # What a process that was killed has left.
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        for name in names:
            _copy_file(shards_dir, name, part / name, allow_links)
        if copy.exists():
            for name in names:
                os.replace(part / name, copy / name)
            sync_dir(copy)
        else:
            # The names of files must be on the disk before that of the folder is.
            sync_dir(part)
            part.rename(copy)
            sync_dir(copy.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _copy_file(shards_dir: Path, name: str, target: Path, allow_links: bool) -> None:
    source = open_regular(shards_dir, name, allow_links)
    try:
        with open(target, "wb", buffering=0) as out:
            left = os.fstat(source).st_size
            while left:
                n = _send(out.fileno(), source, left)
                if n == 0:
                    raise ReadError(f"{shards_dir / name}: expected {left} more bytes, got none; copy it again.")
                left -= n
            # A name may reach the disk before the data: after a power loss it would name a file without them.
            os.fsync(out.fileno())
    finally:
        os.close(source)


def _send(out: int, source: int, nbytes: int) -> int:
    """Copy up to so many bytes from where a file stands, and say how many."""
    if hasattr(os, "sendfile"):
        try:
            return os.sendfile(out, source, None, min(nbytes, _SEND_NBYTES))
        except OSError as err:
            if err.errno not in _NO_SENDFILE:
                raise
    data = os.read(source, min(nbytes, _READ_NBYTES))
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(out, rest) :]
    return len(data)
