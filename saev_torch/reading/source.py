"""Where activations come from: which reader suits a store, decided in one place, and the reader that multiplies."""

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from saev_torch.reading.compiled import ScaleKernels, find_scale_kernels
from saev_torch.reading.direct import DirectReader
from saev_torch.reading.extents import Extents
from saev_torch.reading.reader import CallReader, Pace, Reader
from saev_torch.reading.ring import Ring, RingReader
from saev_torch.reading.store import ShardStore

# No number of bytes, and no error.
_PENDING = np.iinfo(np.int64).min


class ScalingReader(Reader):
    """Multiplies activations while the core that read them, by another reader, has them in its cache.

    A pass over whole batches finds them in memory again and takes half as long as reading them did: 13.3 GB/s became
    9.3. Here one extent is read and multiplied, then the next, in one compiled loop: 12.6 GB/s. The other reader reads
    what fails here.
    """

    def __init__(self, reader: Reader, by: float, kernels: ScaleKernels) -> None:
        super().__init__(reader.store, reader.pace, reader.spot)
        self._reader = reader
        self._by = np.float32(by)
        self._scale_places, self._read_and_scale = kernels

    def announce(self, extents: Extents, start: int, stop: int) -> None:
        """Let the other reader announce."""
        self._reader.announce(extents, start, stop)

    def _read(self, extents: Extents, start: int, stop: int) -> None:
        # One extent after the other, which a disk does not like.
        if isinstance(self._reader, DirectReader) or (self.pace is not None and self.pace.is_slow):
            self._read_then_scale(extents, start, stop)
        else:
            self._read_scaling(extents, start, stop)

    def _read_then_scale(self, extents: Extents, start: int, stop: int) -> None:
        self._reader._read(extents, start, stop)
        self._scale_places(extents.vectors_of(start, stop), extents.trash.ctypes.data, self._by)

    def _read_scaling(self, extents: Extents, start: int, stop: int) -> None:
        for first, last in extents.split(start, stop, stop - start):
            part = slice(first, last)
            got = np.full(last - first, _PENDING)
            with self.opened(extents, first, last) as fds:
                self.spot.set(functools.partial(_where, extents, first, got), functools.partial(_n_pending, got))
                self._read_and_scale(
                    fds, extents.vectors, extents.firsts[part], extents.counts[part], extents.offsets[part],
                    extents.nbytes[part], got, extents.trash.ctypes.data, self._by,
                )  # fmt: skip
            for i in np.flatnonzero(got != extents.nbytes[part]).tolist():
                self._read_then_scale(extents, first + i, first + i + 1)


def _where(extents: Extents, first: int, got: NDArray[np.int64]) -> tuple[int, int]:
    return extents.where(first + int(np.argmax(got == _PENDING)))


def _n_pending(got: NDArray[np.int64]) -> int:
    return int(np.count_nonzero(got == _PENDING))


@dataclasses.dataclass
class Source:
    """A store, whether to read past the page cache where the system can, and what to multiply by; None for nothing."""

    store: ShardStore
    past_cache: bool = False
    scale: float | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether readers multiply. Without a compiler they do not: it is faster done later, for whole batches."""
        return self.scale is not None and find_scale_kernels() is not None

    def open_reader(self, pace: Pace | None = None) -> Reader:
        """Make a reader for one thread."""
        ring = Ring.open()
        reader: Reader = CallReader(self.store, pace) if ring is None else RingReader(ring, self.store, pace)
        if self.past_cache and isinstance(reader, RingReader):
            reader = DirectReader(reader)
        kernels = None if self.scale is None else find_scale_kernels()
        return reader if self.scale is None or kernels is None else ScalingReader(reader, self.scale, kernels)
