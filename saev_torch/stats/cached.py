"""Results about a shard directory that are kept for the next run, in a folder of the user's.

A kept result is an npz file of plain arrays, named for what it is and a fingerprint of what it was made from. It is
never unpickled. A file that is damaged, or that was made from something else, is made again.
"""

import contextlib
import fcntl
import io
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ConfigError, FormatError, ShardsNotFoundError, WriteError
from saev_torch.format.files import fingerprint, write_atomic, writing
from saev_torch.format.shards import LABELS_NAME
from saev_torch.reading.store import ShardStore

_log = logging.getLogger("saev_torch")

_Arrays = dict[str, NDArray[Any]]
_FINGERPRINT = "fingerprint"


def cache_dir() -> Path:
    """The user's cache folder for this package: `$XDG_CACHE_HOME/saev_torch`, else `~/.cache/saev_torch`.

    See the XDG Base Directory Specification, which says that a relative path there is to be ignored.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "saev_torch"


def make_fingerprint(store: ShardStore, what: str) -> str:
    """Digest what a result depends on: the metadata, each file's size and time of change, and `what`."""
    names = [shard.name for shard in store.shards] + [LABELS_NAME] * store.has_labels
    return fingerprint(store.shards_dir, names, f"{store.metadata.hash}\0{what}".encode())[:32]


def save_arrays(path: Path, made_from: str, arrays: _Arrays) -> None:
    """Write arrays to a file, all of them or none; a `WriteError` says why not."""
    buffer = io.BytesIO()
    np.savez(buffer, **{**arrays, _FINGERPRINT: np.array(made_from)})  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def load_arrays(path: Path) -> tuple[str, _Arrays]:
    """Read what `save_arrays` wrote: the fingerprint and the arrays. A damaged file raises a `FormatError`."""
    try:
        # Opened here, because numpy leaves a file open that turns out to be no archive.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return str(arrays.pop(_FINGERPRINT)), arrays
    except FileNotFoundError as err:
        raise ShardsNotFoundError(f"{path}: expected a file that save_arrays() wrote, but there is none.") from err
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as err:
        raise FormatError(f"{path}: expected npz of saev_torch, got something else ({err}); delete it.") from err


def get_or_make(
    shards_dir: Path, made_from: str, cache: bool | Path, make: Callable[[], _Arrays]
) -> tuple[Path, _Arrays]:
    """Find a kept result and its file, or make and keep it; of several processes that ask at once, one makes it.

    `made_from` is the fingerprint. `cache` is a folder, which may not be in the shard directory; True for
    `cache_dir()`, False to keep nothing. A folder that cannot be written is logged, and else no error.
    """
    if cache is False:
        return Path(os.devnull), make()
    folder = cache_dir() if cache is True else Path(cache)
    if folder.resolve().is_relative_to(Path(shards_dir).resolve()):
        raise ConfigError(f"cache: expected a folder outside {shards_dir}, got {folder}; shards are never written to.")
    path = folder / f"statistics-{made_from}.npz"
    if (found := _load_matching(path, made_from)) is not None:
        return path, found
    with _locked(path):
        if (found := _load_matching(path, made_from)) is None:
            found = make()
            try:
                save_arrays(path, made_from, found)
            except WriteError as err:
                _log.warning("%s; the result is not kept, and will be computed again.", err)
    return path, found


def _load_matching(path: Path, made_from: str) -> _Arrays | None:
    try:
        found, arrays = load_arrays(path)
    except ShardsNotFoundError:
        return None
    except FormatError as err:
        _log.warning("%s It is made again.", err)
        return None
    return arrays if found == made_from else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is being made; without one where the folder cannot have it."""
    with contextlib.ExitStack() as stack:
        try:
            with writing(path):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        except WriteError as err:
            _log.warning("%s; other processes may compute the same.", err)
        yield
