"""Safe access to files in a directory that a stranger may have filled, and atomic replacement of our own.

Names come out of shards.json, so they are data: a name may try to leave the directory, and what it names may be a
link, a FIFO that never answers, or a device. Everything that reads a shard directory opens its files here.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import reprlib
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import orjson

from saev_torch.errors import ConfigError, FormatError, ReadError, ShardsNotFoundError, WriteError

MAX_JSON_BYTES = 3 << 20
"""Default bound of `read_json`: hostile JSON takes 30 times its bytes while it is parsed, real metadata is a few KB."""

NOT_SAVED = "Activations are not saved at"
"""How a `ShardsNotFoundError` begins: as `saev` does, whose users may look for it."""

_MAX_LOOKED_AT, _MAX_NAMED = 1000, 3
LOCKLESS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
"""Errors of a file system that has no locks: Lustre without `-o flock`, NFS without its lock manager."""

# Some file systems force files to disk, but no directories: FUSE, shares of Windows.
_NO_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})
_NAME_MAX_BYTES = 255
_LINKS_VARIABLE = "SAEV_TORCH_ALLOW_LINKS"
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def short(value: object) -> str:
    """Show an untrusted value in a message: its repr, cut to about 80 characters."""
    try:
        return _repr.repr(value)
    except ValueError:
        return "an integer of thousands of digits"


def counted(n: int, noun: str) -> str:
    """A number and what is counted: 1 fault, 2 faults."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def fingerprint(directory: Path, names: Iterable[str], about: bytes) -> str:
    """Digest, in 64 hex digits, of `about` and of each file's size and time of change."""
    digest = hashlib.sha256(about)
    for name in names:
        found = os.stat(directory / name)
        digest.update(f"\0{name}\0{found.st_size}\0{found.st_mtime_ns}".encode())
    return digest.hexdigest()


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first of `names` that came before, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def check_name(name: object) -> str:
    """Return `name` if it is a plain file name, which cannot lead out of a directory; else raise `FormatError`."""
    if not isinstance(name, str):
        raise FormatError(f"name: expected a file name, got {short(name)}")
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise FormatError(f"name: expected a plain file name without '/', got {short(name)}; refused as unsafe")
    try:
        n_bytes = len(os.fsencode(name))
    except UnicodeEncodeError as err:
        raise FormatError(f"name: expected a file name, got {short(name)}, which is not valid text") from err
    if n_bytes > _NAME_MAX_BYTES:
        raise FormatError(f"name: expected at most {_NAME_MAX_BYTES} bytes, got {n_bytes}: {short(name)}")
    return name


def links_allowed() -> bool:
    """Whether `$SAEV_TORCH_ALLOW_LINKS` lets links be followed, whatever configs say; `ConfigError` if unclear."""
    value = os.environ.get(_LINKS_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{_LINKS_VARIABLE}: expected 1 to follow symbolic links, or 0, got {short(value)}; set it.")
    return value == "1"


def open_regular(directory: Path, name: str, allow_links: bool = False) -> int:
    """Open a regular file of a directory for reading, whatever a stranger may have put in its place.

    The directory is trusted, and may itself be reached through links; the name is not. The caller closes what it gets.
    With `allow_links`, or where `$SAEV_TORCH_ALLOW_LINKS` is 1, a link is followed, wherever it leads.

    Raises:
        FormatError: The name is not plain, or names something else than a regular file.
        ShardsNotFoundError: The directory or the file does not exist.
        ReadError: The operating system refused, for instance for want of permission.
    """
    return open_own(directory, name, allow_links or links_allowed())


def open_own(directory: Path, name: str, allow_links: bool = False) -> int:
    """As `open_regular`, for files that the writer itself has left: the environment does not make it follow links."""
    path = directory / check_name(name)
    try:
        # Looking first keeps devices from being opened at all, which may do things; O_NOFOLLOW and O_NONBLOCK keep
        # us safe, and fstat right, if the file is exchanged between the two calls.
        _require_regular(path, (os.stat if allow_links else os.lstat)(path).st_mode)
        nofollow = 0 if allow_links else os.O_NOFOLLOW
        fd = os.open(path, os.O_RDONLY | nofollow | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as err:
        if path.is_symlink():
            raise ShardsNotFoundError(
                f"{NOT_SAVED} {path}: expected a file, got a symbolic link to {short(os.readlink(path))}, which "
                "does not exist; is the download complete?"
            ) from err
        if not directory.is_dir():
            what = "is not a directory" if directory.exists() else "does not exist"
            raise ShardsNotFoundError(f"{NOT_SAVED} {directory}: expected a shard directory, but it {what}") from err
        raise ShardsNotFoundError(
            f"{NOT_SAVED} {path}: expected a file, but it does not exist; is the copy complete?"
        ) from err
    except OSError as err:
        if err.errno == errno.ELOOP and path.is_symlink():
            loop = f"{path}: expected a file, got a symbolic link that leads back to itself; put a regular file there"
            raise FormatError(loop if allow_links else _not_regular(path, "a symbolic link")) from err
        raise ReadError(f"{path}: could not be opened: {err.strerror}; check permissions and the file system") from err
    try:
        _require_regular(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise FormatError(_not_regular(path, next((kind for test, kind in _KINDS if test(mode)), "something else")))


def _not_regular(path: Path, kind: str) -> str:
    remedy = "put a regular file there"
    if kind == "a symbolic link":
        # What huggingface_hub downloads into its cache is a folder of links, so name the way out.
        remedy = (
            "links are not followed unless you say so: set allow_links=True in the config (for commands, "
            f"{_LINKS_VARIABLE}=1), or copy the files themselves (Hugging Face: download with local_dir=...)"
        )
    return f"{path}: expected a regular file, got {kind}; {remedy}"


def folders_with(name: str, root: Path) -> str:
    """Name a few of the folders in a folder that have a file of this name; empty if there are none."""
    found: list[str] = []
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        looked_at = itertools.islice(entries, _MAX_LOOKED_AT)
        found = [entry.name for entry in looked_at if os.path.isfile(os.path.join(entry.path, name))]
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return ", ".join(map(short, sorted(found)[:_MAX_NAMED])) + more


def read_regular(directory: Path, name: str, max_bytes: int = MAX_JSON_BYTES, allow_links: bool = False) -> bytes:
    """Read a whole JSON file, opened by `open_regular`; `FormatError` beyond `max_bytes`, whatever size it claims."""
    path = directory / check_name(name)
    with os.fdopen(open_regular(directory, name, allow_links), "rb") as fd:
        n_bytes = os.fstat(fd.fileno()).st_size
        try:
            raw = fd.read(max_bytes + 1)
        except OSError as err:
            raise ReadError(f"{path}: could not be read: {err.strerror}; check the file system") from err
    if len(raw) > max_bytes:
        raise FormatError(f"{path}: expected at most {max_bytes} bytes of JSON, got {max(n_bytes, len(raw))}")
    return raw


def read_json(directory: Path, name: str, *, max_bytes: int = MAX_JSON_BYTES, allow_links: bool = False) -> object:
    """Read one JSON document from an untrusted directory, strictly; integers are exact, of any size.

    Raises what `read_regular` does, and `FormatError` for what is not UTF-8, not JSON or too deeply nested, for NaN and
    infinities, and for an object with a repeated key.
    """
    path, raw = directory / name, read_regular(directory, name, max_bytes, allow_links)
    try:
        # orjson is the strict gate: it bounds the depth, and refuses bad UTF-8, NaN and infinities. The second parse
        # sees what orjson drops in silence: repeated keys, and the digits of integers beyond 64 bits.
        orjson.loads(raw)
        return json.loads(raw, object_pairs_hook=_unique_keys)
    except RecursionError as err:
        raise FormatError(f"{path}: expected metadata of a few levels, got JSON nested too deeply") from err
    except ValueError as err:
        raise FormatError(f"{path}: expected valid JSON, got {len(raw)} bytes that are not: {err}") from err


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    obj = dict(pairs)
    if len(obj) < len(pairs):
        raise ValueError(f"the key {short(first_repeated(key for key, _ in pairs))} is repeated in one object")
    return obj


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's errors while writing `path` into `WriteError`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as err:
        raise WriteError(f"{path}: could not be written: {err.strerror or err}; {_remedy(err)}") from err


def _remedy(err: OSError) -> str:
    if err.errno in LOCKLESS:
        return "the file system cannot do that: write to another one"
    if err.errno == errno.EROFS:
        return "write to another file system, or let this one be mounted for writing"
    return "check free space, quota and permissions"


def lock(fd: int, flags: int) -> bool:
    """Lock an open file, as `flock` does; False where its file system has no locks.

    Raises `BlockingIOError` with `LOCK_NB` where another process has it, and other errors of the system.
    """
    try:
        fcntl.flock(fd, flags)
    except OSError as err:
        if err.errno not in LOCKLESS:
            raise
        return False
    return True


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that other processes, and a crash at any time, see the old one, or all of the new one."""
    with replacing(path) as file, writing(path):
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a hidden name: it has its own when it is complete, and is gone if it never is."""
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    file = os.fdopen(fd, "wb")
    try:
        yield file
        with writing(path):
            file.flush()
            os.fsync(fd)
            file.close()
            os.replace(temp, path)
    except BaseException:
        # To close it writes what is left, which may fail again.
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise
    with writing(path):
        sync_dir(path.parent)


def sync_dir(directory: Path) -> None:
    """Make the names in a directory (created, renamed) survive a power failure, where its file system can do that."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as err:
        if err.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)
