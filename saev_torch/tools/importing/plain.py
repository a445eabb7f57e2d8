"""Arrays that stand in a file as their bytes: `.npy`, `.npz`, `.safetensors`. Nothing is unpickled, or mapped."""

import contextlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
import torch

from saev_torch.errors import FormatError, ReadError
from saev_torch.format.files import open_regular, short

_MAX_HEADER_NBYTES = 16 << 20
_NPY_MAX_HEADER = 10_000
_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}
_Opener = Callable[[contextlib.ExitStack], IO[bytes]]
_BROKEN = (EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class BytesPiece:
    """Rows that stand one behind the other in a file, or in a member of an archive; see `rows.Piece`."""

    n_together = 1

    def __init__(self, where: str, shape: tuple[int, ...], descr: str, offset: int, open_: _Opener) -> None:
        self.where, self.shape = where, shape
        self._open, self._offset = open_, offset
        self._file: IO[bytes] | None = None
        self._opened = contextlib.ExitStack()
        # numpy has no bfloat16: those are read as their bits.
        self._read_as = np.dtype("<u2" if descr == "bfloat16" else descr)
        self.dtype = torch.bfloat16 if descr == "bfloat16" else getattr(torch, self._read_as.name)
        self._room = bytearray()

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] * self._read_as.itemsize

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows, `[n, d_model]`, in memory that the next call uses again.

        Raises:
            FormatError: The file ends before, or its archive is damaged.
            ReadError: The system could not read it.
        """
        n_bytes = (stop - start) * self.row_nbytes
        if len(self._room) < n_bytes:
            self._room = bytearray(n_bytes)
        view = memoryview(self._room)[:n_bytes]
        try:
            if self._file is None:
                self._file = self._open(self._opened)
            self._file.seek(self._offset + start * self.row_nbytes)
            done = 0
            while done < n_bytes:
                n = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                if not n:
                    raise FormatError(
                        f"{self.where}: expected {list(self.shape)} values of {self.dtype}, got a file that ends "
                        f"{n_bytes - done} bytes before row {stop}; is the copy complete?"
                    )
                done += n
        except OSError as err:
            raise ReadError(f"{self.where}: could not be read: {err.strerror}; check the file system") from err
        except _BROKEN as err:
            if isinstance(err, FormatError):
                raise
            raise FormatError(f"{self.where}: expected a whole archive, got {err}; copy it again") from err
        found: np.ndarray[Any, Any] = np.frombuffer(view, self._read_as).reshape(stop - start, self.shape[-1])
        if not found.dtype.isnative:
            found = found.astype(found.dtype.newbyteorder("="))
        rows = torch.from_numpy(found)
        return rows.view(torch.bfloat16) if self.dtype == torch.bfloat16 else rows

    def close(self) -> None:
        """Close the file; reading opens it again."""
        self._file = None
        self._opened.close()


def open_npy(path: Path) -> BytesPiece:
    """Look at the header of a `.npy` file.

    Raises:
        FormatError: It is no array of floats, in the order of C, or not as large as it says.
    """
    with _open(path) as file:
        shape, descr, offset = _npy_header(str(path), file)
        n_bytes = os.fstat(file.fileno()).st_size
    piece = BytesPiece(str(path), shape, descr, offset, _opener(path))
    _require_size(piece, offset + math.prod(shape[:-1]) * piece.row_nbytes, n_bytes)
    return piece


def open_npz(path: Path) -> dict[str, BytesPiece]:
    """Look at the headers of the arrays in a `.npz` file, by name; those that are no floats are left out."""
    found = {}
    with _open(path) as file, _archive(path, file) as archive:
        for info in archive.infolist():
            where = f"{path}: {short(info.filename)}"
            with contextlib.suppress(_Unfit):
                with archive.open(info) as member:
                    shape, descr, offset = _npy_header(where, member)
                piece = BytesPiece(where, shape, descr, offset, _opener(path, info.filename))
                _require_size(piece, offset + math.prod(shape[:-1]) * piece.row_nbytes, info.file_size)
                found[info.filename.removesuffix(".npy")] = piece
    return found


def open_safetensors(path: Path) -> dict[str, BytesPiece]:
    """Look at the tensors of floats in a `.safetensors` file, by name."""
    with _open(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        n_header = int.from_bytes(file.read(8), "little")
        if not 2 <= n_header <= min(_MAX_HEADER_NBYTES, n_bytes - 8):
            raise FormatError(f"{path}: expected a safetensors file, got a header of {n_header} bytes; check the file")
        raw = file.read(n_header)
    try:
        header = orjson.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("no object")
    except ValueError as err:
        raise FormatError(f"{path}: expected a safetensors file, got a header that is not JSON: {err}") from err
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        where = f"{path}: {short(name)}"
        descr, shape, begin, end = _entry(where, entry)
        if descr in _SAFETENSORS and shape:
            piece = BytesPiece(where, shape, _SAFETENSORS[descr], 8 + n_header + begin, _opener(path))
            _require_size(piece, math.prod(shape[:-1]) * piece.row_nbytes, end - begin)
            if 8 + n_header + end > n_bytes:
                raise FormatError(f"{where}: expected {8 + n_header + end} bytes of file, got {n_bytes}; copy it again")
            found[name] = piece
    return found


def _entry(where: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    try:
        descr, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        numbers = [*shape, *offsets]
        is_right = isinstance(descr, str) and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        if is_right and len(offsets) == 2 and offsets[0] <= offsets[1]:
            return descr, tuple(shape), offsets[0], offsets[1]
    except (KeyError, TypeError, IndexError):
        pass
    raise FormatError(f"{where}: expected dtype, shape and data_offsets, got {short(entry)}; write the file again")


class _Unfit(FormatError):
    """An array that is none of floats."""


def _npy_header(where: str, file: IO[bytes]) -> tuple[tuple[int, ...], str, int]:
    """Read the header of an array: its shape, what numpy calls its type, and where its values begin."""
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"version {version}")
        shape, is_fortran, dtype = read(file, max_header_size=_NPY_MAX_HEADER)
        offset = file.tell()
    except _BROKEN as err:
        raise FormatError(f"{where}: expected a .npy file, got something else: {short(str(err))}") from err
    if is_fortran and len(shape) > 1:
        raise _Unfit(f"{where}: expected values in the order of C, got that of Fortran; save np.ascontiguousarray(it)")
    # As ml_dtypes.bfloat16 is saved.
    descr = "bfloat16" if dtype == np.dtype("V2") else dtype.str
    if not shape or (descr != "bfloat16" and (dtype.kind != "f" or dtype.itemsize > 8)):
        raise _Unfit(f"{where}: expected an array of float16, float32 or float64, got {list(shape)} of {dtype}")
    if any(not 0 <= n < 1 << 62 for n in shape):
        raise FormatError(f"{where}: expected a shape of an array, got {short(shape)}")
    return tuple(int(n) for n in shape), descr, offset


def _require_size(piece: BytesPiece, expected: int, got: int) -> None:
    if expected != got:
        raise FormatError(
            f"{piece.where}: expected {expected} bytes for {list(piece.shape)} values of {piece.dtype}, got {got}; is "
            "the copy complete?"
        )


def _open(path: Path) -> io.FileIO:
    return os.fdopen(open_regular(path.parent, path.name), "rb", buffering=0)


@contextlib.contextmanager
def _archive(path: Path, file: IO[bytes]) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except _BROKEN as err:
        if isinstance(err, FormatError):
            raise
        raise FormatError(f"{path}: expected an archive of numpy.savez, got something else: {err}") from err


def _opener(path: Path, member: str | None = None) -> _Opener:
    """Return what opens a file, or a member of an archive, and closes it with the stack that it gets."""

    def open_(opened: contextlib.ExitStack) -> IO[bytes]:
        file = opened.enter_context(_open(path))
        if member is None:
            return file
        return opened.enter_context(opened.enter_context(zipfile.ZipFile(file)).open(member))

    return open_
