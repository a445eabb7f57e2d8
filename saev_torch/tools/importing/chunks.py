"""Tensors that `torch.save` wrote, read by `weights_only` and mapped, so that of a file only what is used comes in."""

import os
import pickle
from pathlib import Path

import torch

from saev_torch.errors import FormatError, ReadError
from saev_torch.format.dtypes import DTYPES
from saev_torch.format.files import open_regular, short
from saev_torch.format.shards import identify

_MAX_MAPPED_NBYTES = 16 << 20
"""What has been read of a mapped file counts as memory of the process, until the file is mapped anew."""

_FLOATS = {torch.float64, *(getattr(torch, name) for name in DTYPES)}


class TensorPiece:
    """A tensor in a file of `torch.save`; see `rows.Piece`."""

    n_together = 1

    def __init__(self, path: Path, name: str | None, tensor: torch.Tensor, identity: tuple[int, int]) -> None:
        self.where = str(path) if name is None else f"{path}: {short(name)}"
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self._path, self._name, self._identity = path, name, identity
        self._rows: torch.Tensor | None = None
        self._n_mapped, self._is_mapped = 0, False

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows, `[n, d_model]`, which lie in the file."""
        if self._rows is None or self._n_mapped >= _MAX_MAPPED_NBYTES:
            self.close()
            found, identity = _load(self._path)
            tensor = found.get(self._name) if isinstance(found, dict) else found
            if identity != self._identity or not isinstance(tensor, torch.Tensor):
                raise FormatError(f"{self.where}: expected {list(self.shape)} as before, got another file; start anew")
            self._rows = tensor.flatten(0, -2)
            self._is_mapped = tensor.is_contiguous()
        rows = self._rows[start:stop]
        # What is not contiguous has been copied as a whole, which is not to be done over and over.
        self._n_mapped += rows.nbytes if self._is_mapped else 0
        return rows

    def close(self) -> None:
        """Let go of the file."""
        self._rows, self._n_mapped = None, 0


def open_chunk(path: Path) -> dict[str | None, TensorPiece]:
    """Look at the tensors of floats in a file of `torch.save`: one, named None, or a dict of them.

    Raises:
        FormatError: There is something else in it.
    """
    found, identity = _load(path)
    tensors = found if isinstance(found, dict) else {None: found}
    is_right = all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
    if not is_right and not isinstance(found, dict):
        raise FormatError(f"{path}: expected a tensor or a dict of tensors, got {type(found).__name__}; save a tensor")
    return {
        name: TensorPiece(path, name, tensor, identity)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and tensor.dtype in _FLOATS and tensor.layout == torch.strided
    }


def _load(path: Path) -> tuple[object, tuple[int, int]]:
    # Opened once before, so that a link or a device is refused as everywhere.
    with open(open_regular(path.parent, path.name), "rb") as file:
        try:
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            return found, identify(os.fstat(file.fileno()))
        except pickle.UnpicklingError as err:
            raise FormatError(
                f"{path}: expected tensors and nothing that runs code when it is loaded, got other objects; load it "
                "where you trust it, and save the tensor alone"
            ) from err
        except OSError as err:
            raise ReadError(f"{path}: could not be read: {err.strerror}; check the file system") from err
        except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as err:
            raise FormatError(
                f"{path}: expected a file that torch.save wrote (1.6 or later), got {short(str(err))}; save it again"
            ) from err
