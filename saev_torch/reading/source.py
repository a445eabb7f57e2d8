"""Where activations come from: which reader suits a store, decided in one place, and the reader that converts."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.format.dtypes import ValueType
from saev_torch.reading.converting import convert_batch
from saev_torch.reading.direct import DirectReader
from saev_torch.reading.extents import Extents
from saev_torch.reading.kernels import ConvertKernels, find_convert_kernels
from saev_torch.reading.reader import CallReader, Pace, Reader
from saev_torch.reading.ring import Ring, RingReader
from saev_torch.reading.rowcopy import RowCopy, find_row_copy
from saev_torch.reading.store import Files, ShardStore
from saev_torch.reading.watch import find_watch

# No number of bytes, and no error.
_PENDING = np.iinfo(np.int64).min
# What is read at a time: it stays in the cache of the core until it is where it goes.
_STAGE_NBYTES = 128 << 10


class ConvertingReader(Reader):
    """Converts activations, or multiplies them, or both, while the core that read them has them in its cache.

    Another reader reads. A pass over whole batches finds them in memory again: to multiply them takes half as long as
    reading them did, 13.3 GB/s became 9.3. Here one extent is read and converted, then the next, in one compiled loop:
    12.6 GB/s. The other reader reads what fails here.
    """

    def __init__(self, reader: Reader, by: float, kernels: ConvertKernels) -> None:
        super().__init__(reader.store, reader.pace, reader.spot)
        self._reader = reader
        self.has_ring = reader.has_ring
        self._by = np.float32(by)
        self._convert_places, self._read_and_convert = kernels.convert_places, kernels.read_and_convert
        self._stage = np.empty(_STAGE_NBYTES, dtype=np.uint8)

    def announce(self, extents: Extents, start: int, stop: int) -> None:
        """Let the other reader announce."""
        self._reader.announce(extents, start, stop)

    def _read(self, extents: Extents, start: int, stop: int) -> None:
        # One extent after the other, which a disk does not like.
        if isinstance(self._reader, DirectReader) or (self.pace is not None and self.pace.is_slow):
            self._read_then_convert(extents, start, stop)
        else:
            self._read_converting(extents, start, stop)

    def _read_then_convert(self, extents: Extents, start: int, stop: int) -> None:
        self._reader._read(extents, start, stop)
        self._convert_places(extents.vectors_of(start, stop), extents.trash.ctypes.data, self._by)

    def _read_converting(self, extents: Extents, start: int, stop: int) -> None:
        for first, last in extents.split(start, stop, stop - start):
            part = slice(first, last)
            got = np.full(last - first, _PENDING)
            with self.opened(extents, first, last) as fds:
                self.spot.set(functools.partial(_where, extents, first, got), functools.partial(_n_pending, got))
                self._read_and_convert(
                    fds, extents.vectors, extents.firsts[part], extents.counts[part], extents.offsets[part], got,
                    extents.trash.ctypes.data, self._by, self._stage,
                )  # fmt: skip
            for i in np.flatnonzero(got != extents.nbytes[part]).tolist():
                self._read_again(extents, first + i, int(got[i]))

    def _read_again(self, extents: Extents, i: int, got: int) -> None:
        """Read an extent of which `got` was returned."""
        if got < 0:
            self._finish_one(extents, i, -1, -got)
            self._convert_places(extents.vectors_of(i, i + 1), extents.trash.ctypes.data, self._by)
        else:
            self._read_then_convert(extents, i, i + 1)


def _where(extents: Extents, first: int, got: NDArray[np.int64]) -> tuple[int, int]:
    return extents.where(first + int(np.argmax(got == _PENDING)))


def _n_pending(got: NDArray[np.int64]) -> int:
    return int(np.count_nonzero(got == _PENDING))


def open_plain(store: Files, pace: Pace | None) -> CallReader:
    """Make a reader for one thread: with a ring, where there is one to be had."""
    ring = Ring.open()
    return CallReader(store, pace) if ring is None else RingReader(ring, store, pace)


def past_cache_of(reader: CallReader) -> Reader:
    """A reader past the page cache, on the ring of another; that one, where it has none."""
    return DirectReader(reader) if isinstance(reader, RingReader) else reader


def _convert_run(kernels: ConvertKernels, by: float, source: int, place: int, nbytes: int) -> None:
    kernels.convert_run(source, place, nbytes, np.float32(by))


@dataclasses.dataclass
class Source:
    """A store, what its values are to be in memory, and whether to read past the page cache where the system can.

    Attributes:
        loaded: Type of the values in memory; None for what is stored.
        scale: What to multiply by, a number that float32 holds; None for nothing.
        gathers: Whether single rows may be gathered, for which there is machine code.
    """

    store: ShardStore
    past_cache: bool = False
    scale: float | None = None
    loaded: ValueType | None = None
    gathers: bool = False

    def __post_init__(self) -> None:
        stored, loaded, scale = self.store.metadata.value_type, self.loaded_type, self.scale
        self._kernels: ConvertKernels | None = None
        # Compiled here: by one thread, and for all workers that are forked later.
        if self.gathers:
            find_watch()
            find_row_copy()
            self.find_row_copy()
        if loaded != stored or scale is not None:
            self._kernels = find_convert_kernels(stored.name, loaded.name, scale is not None)

    def open_reader(self, pace: Pace | None = None) -> Reader:
        """Make a reader for one thread. It converts where a compiler is installed; else `finish` does that."""
        reader = open_plain(self.store, pace)
        return self.wrap(past_cache_of(reader) if self.past_cache else reader)

    def wrap(self, reader: Reader) -> Reader:
        """A reader that converts what another one reads; that one, where there is nothing to convert, or no way."""
        return reader if self._kernels is None else ConvertingReader(reader, self.scale or 1.0, self._kernels)

    @property
    def is_unfinished(self) -> bool:
        """Whether what the readers read is still to be converted."""
        is_same = self.scale is None and self.loaded_type == self.store.metadata.value_type
        return self._kernels is None and not is_same

    @property
    def loaded_type(self) -> ValueType:
        """Type of the values in memory."""
        return self.loaded or self.store.metadata.value_type

    def find_row_copy(self) -> RowCopy | None:
        """What copies rows from mapped files, and converts them; see there."""
        return find_row_copy(self.store.metadata.value_type, self.loaded_type, self.scale)

    @property
    def convert_run(self) -> Callable[[int, int, int], None] | None:
        """What converts stored values from an address to another, so many bytes; None where nothing does."""
        return None if self._kernels is None else functools.partial(_convert_run, self._kernels, self.scale or 1.0)

    def finish(self, act: torch.Tensor) -> None:
        """Convert activations that were read, see `convert_batch`, unless the readers did."""
        if self.is_unfinished:
            self.convert(act)

    def convert(self, act: torch.Tensor) -> None:
        """Convert activations that were read by a reader that does not."""
        convert_batch(act, self.store.metadata.value_type, self.scale)
