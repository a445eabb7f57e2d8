"""A folder of Hugging Face `datasets`, as `Dataset.save_to_disk` leaves it and SAELens caches activations in.

Its Arrow files are mapped and read by pyarrow alone: `datasets` is not needed, and nothing of it runs.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.errors import ConfigError, FormatError
from saev_torch.format.files import check_name, open_regular, read_json, short

STATE_NAME = "state.json"


class ArrowPiece:
    """A column of an Arrow file, one row of which is `[tokens, d_model]` or `[d_model]`; see `rows.Piece`."""

    def __init__(self, path: Path, column: str) -> None:
        self.where = f"{path}: {short(column)}"
        self._path, self._column = path, column
        self._batches: Iterator[tuple[int, Any]] = iter(())
        self._now: tuple[int, Any] | None = None
        self._file: Any = None
        n_rows, inner, self.n_together = 0, None, 1
        try:
            for start, values in self._iterate():
                shape, dtype = values.shape[1:], values.dtype
                if inner not in (None, (shape, dtype)):
                    raise FormatError(f"{self.where}: expected rows of one shape, got {inner} and {(shape, dtype)}")
                inner, n_rows = (shape, dtype), start + len(values)
        finally:
            self.close()
        if inner is None:
            raise FormatError(f"{self.where}: expected rows, got none; leave the file out")
        self.shape = (n_rows, *inner[0])
        self.dtype: torch.dtype = getattr(torch, inner[1].name)
        self._room = torch.empty(0)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows, `[n, d_model]`, in memory that the next call uses again."""
        d_model, n_tokens = self.shape[-1], self.shape[1] if len(self.shape) == 3 else 1
        if len(self._room) < stop - start:
            # Mapped, so that it goes back to the system: on the heap each file would leave a hole of that size.
            memory = mmap.mmap(-1, (stop - start) * d_model * self.dtype.itemsize)
            self._room = torch.frombuffer(memory, dtype=self.dtype).view(-1, d_model)
        room = self._room[: stop - start]
        done = start
        while done < stop:
            low, values = self._batch_of(done // n_tokens)
            rows = values.reshape(-1, d_model)
            first = done - low * n_tokens
            n = min(stop - done, len(rows) - first)
            room.numpy()[done - start : done - start + n] = rows[first : first + n]
            done += n
        # What was read stays in the page cache, and need not be counted as memory of this process.
        self._file.madvise(mmap.MADV_DONTNEED)
        return room

    def close(self) -> None:
        """Let go of the file, and of the memory that was read to."""
        self._batches, self._now = iter(()), None
        self._file, self._room = None, torch.empty(0)

    def _batch_of(self, row: int) -> tuple[int, Any]:
        """Return the batch of the file that has a row, and where it begins; forward is quick."""
        now = self._now
        if now is None or row < now[0]:
            self._batches = self._iterate()
            now = next(self._batches)
        while row >= now[0] + len(now[1]):
            now = next(self._batches)
        self._now = now
        return now

    def _iterate(self) -> Iterator[tuple[int, Any]]:
        import pyarrow as pa

        with open(open_regular(self._path.parent, self._path.name), "rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        start = 0
        try:
            with pa.ipc.open_stream(pa.py_buffer(self._file)) as stream:
                for batch in stream:
                    values = _values(self.where, batch.column(self._column))
                    if len(values):
                        yield start, values
                    start += len(values)
        except (pa.ArrowException, OSError) as err:
            raise FormatError(f"{self.where}: expected an Arrow stream of datasets, got {short(str(err))}") from err


def _values(where: str, column: Any) -> Any:
    """Return a column as an array, without a copy, checked against what an Arrow file may claim."""
    import pyarrow as pa

    column.validate(full=True)
    values = column.storage if isinstance(column, pa.ExtensionArray) else column
    shape = [len(values)]
    while hasattr(values.type, "value_type"):
        n, inner = len(values), values.flatten()
        if values.null_count or (n and len(inner) % n):
            raise FormatError(f"{where}: expected rows of one length, got several, or none; cut the text to windows")
        if hasattr(values, "offsets"):
            lengths = np.diff(_view(values.offsets, "i"))
            if n and (lengths != lengths[0]).any():
                raise FormatError(f"{where}: expected rows of one length, got {set(lengths.tolist())}")
        shape.append(len(inner) // n if n else 0)
        values = inner
    if values.null_count or not pa.types.is_floating(values.type):
        raise FormatError(f"{where}: expected numbers of a float type, got {values.type}; choose another column")
    return _view(values, "f").reshape(shape)


def _view(numbers: Any, kind: str) -> NDArray[Any]:
    """The memory of numbers, none of which is null, as an array; pyarrow's own way to it loads pandas."""
    dtype = np.dtype(f"{kind}{numbers.type.bit_width // 8}")
    start, n = numbers.offset, len(numbers)
    return np.frombuffer(numbers.buffers()[1], dtype, start + n)[start:] if n else np.empty(0, dtype)


def open_dataset(folder: Path, column: str | None) -> list[ArrowPiece]:
    """Look at the Arrow files of a folder, in their order.

    Raises:
        FormatError: The folder is not as datasets writes it.
        ConfigError: There are several columns of activations, or none of that name.
    """
    state = read_json(folder, STATE_NAME)
    try:
        names = [check_name(file["filename"]) for file in state["_data_files"]]  # type: ignore[index]
    except (KeyError, TypeError) as err:
        raise FormatError(f"{folder / STATE_NAME}: expected _data_files, got {short(state)}; save it again") from err
    if not names:
        raise FormatError(f"{folder / STATE_NAME}: expected one or more files, got none; save the data set again")
    column = column if column is not None else _only_column(folder / names[0])
    return [ArrowPiece(folder / name, column) for name in names]


def _only_column(path: Path) -> str:
    import pyarrow as pa

    with open(open_regular(path.parent, path.name), "rb") as file:
        try:
            schema = pa.ipc.open_stream(file).schema
        except (pa.ArrowException, OSError) as err:
            raise FormatError(f"{path}: expected an Arrow stream of datasets, got {short(str(err))}") from err
    found: list[str] = [field.name for field in schema if _holds_floats(field.type)]
    if len(found) != 1:
        raise ConfigError(f"array: expected one column of activations, got {found or schema.names}; name one.")
    return found[0]


def _holds_floats(type_: Any) -> bool:
    import pyarrow as pa

    type_ = getattr(type_, "storage_type", type_)
    if not hasattr(type_, "value_type"):
        return False
    while hasattr(type_, "value_type"):
        type_ = type_.value_type
    return bool(pa.types.is_floating(type_))
