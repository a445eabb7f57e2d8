"""Multiplying activations while the core that read them has them in its cache.

A pass over whole batches finds them in memory again and takes half as long as reading them did: 13.3 GB/s became 9.3.
Here one extent is read and multiplied, then the next, in one compiled loop: 12.6 GB/s.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from saev_torch.reading.compiled import ScaleKernels, find_scale_kernels
from saev_torch.reading.extents import Extents, Note, opened_shards, read_extents, split_extents
from saev_torch.reading.store import ShardStore

__all__ = ["Scaler"]

# No number of bytes, and no error.
_PENDING = np.iinfo(np.int64).min


class Scaler:
    """Multiplies what extents are read to by one number. Threads may share it.

    Args:
        by: The number; float32, as the activations.
        kernels: What `find_scale_kernels` found.
    """

    def __init__(self, by: float, kernels: ScaleKernels) -> None:
        self._by = np.float32(by)
        self._scale_places, self._read_and_scale = kernels

    @classmethod
    def find(cls, by: float | None) -> "Scaler | None":
        """Make one, where there is something to multiply by, and the means to do it."""
        kernels = None if by is None else find_scale_kernels()
        return None if by is None or kernels is None else cls(by, kernels)

    def apply(self, extents: Extents, start: int, stop: int) -> None:
        """Multiply a range of extents that have been read to their places."""
        self._scale_places(extents.vectors_of(start, stop), extents.trash.ctypes.data, self._by)

    def read(self, store: ShardStore, extents: Extents, start: int, stop: int, note: Note) -> None:
        """Read a range of extents and multiply them; see `read_extents`, which also reads what fails here."""
        for first, last in split_extents(extents, start, stop, stop - start):
            part = slice(first, last)
            got = np.full(last - first, _PENDING)
            with opened_shards(store, extents, first, last, note) as fds:
                note(functools.partial(_where, extents, first, got))
                self._read_and_scale(
                    fds, extents.vectors, extents.firsts[part], extents.counts[part], extents.offsets[part],
                    extents.nbytes[part], got, extents.trash.ctypes.data, self._by,
                )  # fmt: skip
            for i in np.flatnonzero(got != extents.nbytes[part]).tolist():
                read_extents(store, extents, first + i, first + i + 1, note)
                self.apply(extents, first + i, first + i + 1)


def _where(extents: Extents, first: int, got: NDArray[np.int64]) -> tuple[int, int]:
    return extents.where(first + int(np.argmax(got == _PENDING)))
