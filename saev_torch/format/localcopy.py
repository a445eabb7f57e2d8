"""A copy of a shard directory under `$TMPDIR`, made once per machine."""

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

from saev_torch.errors import ReadError, WriteError
from saev_torch.format.files import fingerprint, open_regular
from saev_torch.format.metadata import METADATA_NAME
from saev_torch.format.shards import LABELS_NAME, SHARDS_NAME, ShardInfo

_log = logging.getLogger("saev_torch")

_SEND_NBYTES = 64 << 20


def local_copy(shards_dir: Path, shards: ShardInfo) -> Path:
    """Copy a shard directory to `$TMPDIR/saev_torch-<user id>/`, unless an unchanged copy is there.

    Several processes may ask at once: one copies, the others wait. The copy stays for the next run.

    Args:
        shards_dir: Directory with `metadata.json` and the shards, which were checked before.
        shards: Its table.

    Returns:
        Directory of the copy.

    Raises:
        WriteError: `$TMPDIR` is full or cannot be written.
        ReadError: A file could not be read.
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
    """
    names = [METADATA_NAME, SHARDS_NAME, *(shard.name for shard in shards if shard.n_examples)]
    names += [LABELS_NAME] * os.path.lexists(shards_dir / LABELS_NAME)
    root = Path(tempfile.gettempdir()) / f"saev_torch-{os.getuid()}"
    # Another copy if any file was changed or replaced.
    copy = root / fingerprint(shards_dir, names, os.fsencode(shards_dir.resolve()))[:16]
    part = copy.with_suffix(".part")
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        if root.lstat().st_uid != os.getuid() or root.is_symlink():
            raise WriteError(f"{root}: expected a directory of this user, got somebody else's; set TMPDIR.")
        with open(copy.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.exists():
                _log.info("copying %s to %s", shards_dir, copy)
                _copy(shards_dir, names, part)
                part.rename(copy)
    except OSError as err:
        if isinstance(err, ReadError | WriteError) or not err.errno:
            raise
        raise WriteError(
            f"{copy}: expected room for a copy of {shards_dir}, got: {err.strerror}; "
            "free some, set TMPDIR to another file system, or set use_tmpdir=False."
        ) from err
    return copy


def _copy(shards_dir: Path, names: list[str], part: Path) -> None:
    """Copy files to a new directory, or none of them; the caller holds the lock, so that nobody else is at it."""
    # What a process that was killed has left.
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        for name in names:
            _copy_file(shards_dir, name, part / name)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _copy_file(shards_dir: Path, name: str, target: Path) -> None:
    source = open_regular(shards_dir, name)
    try:
        with open(target, "wb") as out:
            left = os.fstat(source).st_size
            while left:
                n = os.sendfile(out.fileno(), source, None, min(left, _SEND_NBYTES))
                if n == 0:
                    raise ReadError(f"{shards_dir / name}: expected {left} more bytes, got none; copy it again.")
                left -= n
    finally:
        os.close(source)
