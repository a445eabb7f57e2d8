"""A mask of content tokens: a `.npy` file of bool, read row by row, never as a whole unless it is small.

It is as untrusted as the shards: nothing is unpickled, no size is believed, and a file that is cut or written while it
is in use is an error of ours. It is not mapped, because a mapped file that is cut ends the process.
"""

import io
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import FormatError, ReadError
from saev_torch.format.files import open_regular, short
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import identify
from saev_torch.format.sidecars import ATTENTION_MASK, Sidecar
from saev_torch.order.runs import find_runs
from saev_torch.processes.locks import renewed
from saev_torch.reading.columns import Column
from saev_torch.reading.store import ShardStore

_Int64s = NDArray[np.int64]

_MAX_HEADER_NBYTES = 1 << 16
_MAX_KEPT_NBYTES = 32 << 20


class Mask:
    """A mask, `[n_examples, content_tokens_per_example] bool`: True stays. Threads may share it.

    Raises:
        FormatError: It is no `.npy` file of that shape and type, or has the wrong size.
        ShardsNotFoundError: There is no such file.
        ReadError: It could not be read.
    """

    def __init__(self, path: Path, md: Metadata, allow_links: bool = False) -> None:
        self.path, self._allow_links = Path(path), allow_links
        self._width = md.content_tokens_per_example
        fd = open_regular(self.path.parent, self.path.name, self._allow_links)
        try:
            self._start = self._check_header(os.pread(fd, _MAX_HEADER_NBYTES, 0), (md.n_examples, self._width))
            stat = os.fstat(fd)
        except OSError as err:
            raise ReadError(f"{self.path}: could not be read: {err.strerror}; check the file system.") from err
        finally:
            os.close(fd)
        self._identity, expected = identify(stat), self._start + md.n_examples * self._width
        if stat.st_size != expected:
            raise FormatError(f"{self.path}: expected {expected} bytes, got {stat.st_size}; make the mask again.")
        self._nbytes = expected - self._start
        self._kept: NDArray[np.bool_] | None = None
        self._lock = renewed(threading.Lock())

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_lock": None, "_kept": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=renewed(threading.Lock()))

    def _check_header(self, raw: bytes, shape: tuple[int, int]) -> int:
        """Check the header; where the values begin."""
        file = io.BytesIO(raw)
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            found, is_fortran, dtype = read(file)
        except (ValueError, EOFError, SyntaxError, TypeError) as err:
            raise FormatError(f"{self.path}: expected a .npy file, got something else ({short(str(err))}).") from err
        if dtype != np.bool_ or is_fortran or found != shape:
            order = " in Fortran's order" if is_fortran else ""
            raise FormatError(
                f"{self.path}: expected bool {list(shape)} (examples, content tokens), got {dtype} {list(found)}{order}"
                "; make the mask for these shards, with numpy.save."
            )
        return file.tell()

    def of_examples(self, examples: _Int64s) -> NDArray[np.bool_]:
        """Which content tokens of examples stay, `[m, content_tokens_per_example] bool`; fastest where they ascend."""
        if self._nbytes <= _MAX_KEPT_NBYTES:
            with self._lock:
                if self._kept is None:
                    self._kept = self._read(np.zeros(1, np.int64), np.array([self._nbytes])).reshape(-1, self._width)
            return self._kept[examples]
        starts, lengths = find_runs(examples)
        return self._read(starts * self._width, lengths * self._width).reshape(len(examples), self._width)

    def _read(self, starts: _Int64s, lengths: _Int64s) -> NDArray[np.bool_]:
        values = np.empty(int(lengths.sum()), dtype=np.uint8)
        view, at = memoryview(values.data), 0
        fd = open_regular(self.path.parent, self.path.name, self._allow_links)
        try:
            if identify(os.fstat(fd)) != self._identity:
                raise FormatError(
                    f"{self.path}: expected the mask that was checked, got another: it was written while it was in use"
                    "; start again, so that samples are counted anew."
                )
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
                end = at + length
                while at < end:
                    n = os.preadv(fd, [view[at:end]], self._start + start + length - (end - at))
                    if n <= 0:
                        raise ReadError(f"{self.path}: expected {length} bytes, got fewer: it became shorter in use.")
                    at += n
        except OSError as err:
            if isinstance(err, ReadError | FormatError):
                raise
            raise ReadError(f"{self.path}: could not be read: {err.strerror}; check the file system.") from err
        finally:
            os.close(fd)
        if values.max(initial=0) > 1:
            raise FormatError(f"{self.path}: expected only False and True, got the byte {values.max()}; make it again.")
        return values.view(np.bool_)


def open_sidecar(store: ShardStore, sidecar: Sidecar) -> Column | Mask:
    """Open a sidecar for the values of examples: a mask with a look at its header, and at each value."""
    if sidecar == ATTENTION_MASK:
        return Mask(store.shards_dir / sidecar.name, store.metadata, store.allow_links)
    return Column(store, sidecar)
