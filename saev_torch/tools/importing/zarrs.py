"""A Zarr array, or a group with one, of format 2 or 3 in a folder. Only codecs that run no code are decoded."""

import math
import os
import stat
from pathlib import Path
from typing import Any

import torch

from saev_torch.errors import ConfigError, FormatError
from saev_torch.format.files import check_name, links_allowed, read_json, short

_ARRAY_NAMES = ("zarr.json", ".zarray")
_NAMES = (*_ARRAY_NAMES, ".zgroup")
# Among others are pickles, which run what a stranger wrote.
_CODECS = frozenset(("blosc", "zstd", "zlib", "gzip", "lz4", "bz2", "bytes", "crc32c", "transpose", "sharding_indexed"))
_MAX_CHUNK_NBYTES = 1 << 30


def is_zarr(folder: Path) -> bool:
    """Whether a folder is an array or a group of Zarr."""
    return any(os.path.lexists(folder / name) for name in _NAMES)


def open_zarr(folder: Path, name: str | None) -> "ZarrPiece":
    """Look at an array, or at the one of this name in a group.

    Raises:
        ConfigError: The group has several arrays, or none of that name.
        FormatError: It is none of floats, has links in it, or codecs that are not known to be harmless.
    """
    if _meta(folder) is not None:
        return ZarrPiece(folder)
    found = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    found = sorted(inner for inner in found if _meta(folder / inner) is not None)
    if name is None and len(found) != 1:
        raise ConfigError(f"array: expected one array in {folder}, got {found}; name one.")
    name = found[0] if name is None else check_name(name)
    if name not in found:
        raise ConfigError(f"array: expected one of {found} in {folder}, got {short(name)}.")
    return ZarrPiece(folder / name)


class ZarrPiece:
    """A Zarr array; see `rows.Piece`."""

    def __init__(self, folder: Path) -> None:
        self.where, self._folder = str(folder), folder
        _require_harmless(folder, _meta(folder))
        _require_plain(folder)
        array = self._open()
        dtype = array.dtype
        if getattr(dtype, "kind", "") != "f" or dtype.itemsize > 8 or not array.shape:
            raise FormatError(
                f"{folder}: expected an array of float16, float32 or float64, got {array.shape} of {dtype}"
            )
        chunks = tuple(array.chunks)
        if math.prod(chunks) * dtype.itemsize > _MAX_CHUNK_NBYTES:
            raise FormatError(f"{folder}: expected chunks of at most 1 GiB, got {list(chunks)}; write smaller ones")
        self.shape = tuple(array.shape)
        self.dtype: torch.dtype = getattr(torch, dtype.newbyteorder("=").name)
        self._n_tokens = self.shape[1] if len(self.shape) == 3 else 1
        self.n_together = chunks[0] * self._n_tokens
        self._array: Any = array

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows, `[n, d_model]`."""
        if self._array is None:
            self._array = self._open()
        n = self._n_tokens
        first = start // n
        try:
            found = self._array[first : -(-stop // n)].reshape(-1, self.shape[-1])
        except (ValueError, RuntimeError, OSError, KeyError) as err:
            raise FormatError(f"{self.where}: expected whole chunks, got damaged ones: {short(str(err))}") from err
        found = found[start - first * n : stop - first * n]
        return torch.from_numpy(found.astype(found.dtype.newbyteorder("="), copy=False))

    def close(self) -> None:
        """Let go of the array."""
        self._array = None

    def _open(self) -> Any:
        import zarr

        try:
            return zarr.open_array(str(self._folder), mode="r")
        except (ValueError, KeyError, TypeError, OSError) as err:
            raise FormatError(f"{self._folder}: expected a Zarr array, got {short(str(err))}; write it again") from err


def _meta(folder: Path) -> dict[str, Any] | None:
    """What a folder says of itself, if it is an array."""
    for name in _ARRAY_NAMES:
        if os.path.lexists(folder / name):
            found = read_json(folder, name)
            if not isinstance(found, dict):
                raise FormatError(f"{folder / name}: expected a JSON object, got {short(found)}")
            return None if found.get("node_type") == "group" else found
    return None


def _require_harmless(folder: Path, meta: dict[str, Any] | None) -> None:
    for codec in _codecs(meta):
        if codec not in _CODECS:
            raise FormatError(
                f"{folder}: expected codecs among {sorted(_CODECS)}, got {short(codec)}, which might run code; write "
                "the array again with another"
            )


def _codecs(meta: Any) -> list[object]:
    """Names of all codecs in metadata of either format, at any depth."""
    if isinstance(meta, list):
        return [name for one in meta for name in _codecs(one)]
    if not isinstance(meta, dict):
        return []
    found: list[object] = []
    for key, value in meta.items():
        if key in ("codecs", "index_codecs", "filters", "storage_transformers"):
            found += [_name(one) for one in value or []]
        elif key == "compressor" and value is not None:
            found.append(_name(value))
        if key != "attributes":
            found += _codecs(value)
    return found


def _name(codec: Any) -> object:
    return codec.get("id", codec.get("name")) if isinstance(codec, dict) else codec


def _require_plain(folder: Path) -> None:
    """Refuse links, and all else that is no file or folder, in an array's folder."""
    if links_allowed():
        return
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            mode = os.lstat(os.path.join(root, name)).st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise FormatError(f"{root}/{name}: expected a file, got a link or a device; copy the array itself")
