"""Which kind of source a path is, and its pieces in their order."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saev_torch.errors import ConfigError, FormatError, ShardsNotFoundError
from saev_torch.format.files import short
from saev_torch.tools.importing import arrow, zarrs
from saev_torch.tools.importing.chunks import open_chunk
from saev_torch.tools.importing.plain import open_npy, open_npz, open_safetensors
from saev_torch.tools.importing.rows import Piece

_OPENERS: dict[str, Callable[[Path], Mapping[Any, Piece]]] = {
    ".npy": lambda path: {None: open_npy(path)},
    ".npz": open_npz,
    ".safetensors": open_safetensors,
    ".pt": open_chunk,
    ".pth": open_chunk,
}


def open_source(source: Path, array: str | None) -> Sequence[Piece]:
    """Look at all pieces of a source: a file, a folder of files of one kind, a data set, a Zarr array.

    Files of a folder are taken in the order of the numbers in their names.

    Raises:
        ShardsNotFoundError: There is no such file or folder.
        ConfigError: There is no such array, or several without one being named.
        FormatError: It is not a source of activations.
    """
    if not source.is_dir():
        if not source.exists():
            raise ShardsNotFoundError(f"{source}: expected activations in a file or a folder, but it does not exist")
        return [_open_file(source, array)]
    if zarrs.is_zarr(source):
        return [zarrs.open_zarr(source, array)]
    if os.path.lexists(source / arrow.STATE_NAME):
        return arrow.open_dataset(source, array)
    names = [name for name in os.listdir(source) if not name.startswith(".")]
    suffixes = {suffix for suffix in _OPENERS if any(name.endswith(suffix) for name in names)}
    if len(suffixes) != 1:
        raise FormatError(
            f"{source}: expected files of one kind among {', '.join(_OPENERS)}, a data set of Hugging Face, or a Zarr "
            f"array, got {sorted(suffixes) or short(sorted(names)[:5])}; name a file, or the folder that has them"
        )
    (suffix,) = suffixes
    chosen = sorted((name for name in names if name.endswith(suffix)), key=_natural)
    return [_open_file(source / name, array) for name in chosen]


def _natural(name: str) -> list[tuple[int, str]]:
    """Order names as people count: 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _open_file(path: Path, array: str | None) -> Piece:
    opener = _OPENERS.get(path.suffix)
    if opener is None:
        raise FormatError(f"{path}: expected one of {', '.join(_OPENERS)}, got {path.suffix or 'no suffix'}; rename it")
    found = opener(path)
    if array is None:
        fitting = [piece for piece in found.values() if len(piece.shape) in (2, 3)]
        # Of one array alone say what is wrong with it; of several, take the one that could be meant.
        candidates = list(found.values()) if len(found) == 1 else fitting
        if len(candidates) == 1:
            return candidates[0]
        if not found:
            raise FormatError(
                f"{path}: expected an array of floats, [examples, tokens, d_model] or [rows, d_model], got none"
            )
        raise ConfigError(
            f"array: expected one array of activations in {path}, got {sorted(map(str, found))}; name one."
        )
    if array not in found:
        raise ConfigError(f"array: expected one of {sorted(map(str, found))} in {path}, got {short(array)}.")
    return found[array]
