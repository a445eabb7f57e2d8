"""Rows from anywhere in files that are mapped."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.runs import MAX_READ_ROWS
from saev_torch.reading.extents import make_extents
from saev_torch.reading.mapping import Mapping
from saev_torch.reading.reader import Reader

_Int64s = NDArray[np.int64]

# What one thread gathers at a time, unless a single call is more.
_MAX_PART_NBYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class ScatteredRows:
    """Rows from anywhere, and where they go in memory.

    Attributes:
        shards, sources: `[n] int64`, shard and address in its mapping of each row.
        row_nbytes: Size of a row on disk.
        place: Address of the first row in memory, when that is known.
        stride: Bytes that a row takes there.
        mappings: Shards by number, those that rows are in.
        numbers: `[n] int64`, which row from `place` on each becomes; None where they go one behind the other.
    """

    shards: _Int64s
    sources: _Int64s
    row_nbytes: int
    stride: int
    mappings: dict[int, Mapping]
    numbers: _Int64s | None = None
    place: int = 0

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def offsets(self) -> _Int64s:
        """`[n] int64`, byte offset of each row in its shard."""
        offsets: _Int64s = self.sources - _bases(self.mappings)[self.shards]
        return offsets

    def where(self, i: int) -> tuple[int, int]:
        """Shard and byte offset of a row."""
        shard = int(self.shards[i])
        return shard, int(self.sources[i]) - self.mappings[shard].address

    def at(self, place: int) -> "ScatteredRows":
        """The rows, with the address where the first one goes."""
        return dataclasses.replace(self, place=place)

    def divide(self, n_parts: int) -> Iterator["ScatteredRows"]:
        """Divide the rows into parts of about the same size, of whole calls."""
        n_calls = -(-len(self) // MAX_READ_ROWS)
        most = MAX_READ_ROWS * max(
            1, min(-(-n_calls // n_parts), _MAX_PART_NBYTES // (MAX_READ_ROWS * self.row_nbytes))
        )
        for start in range(0, len(self), most):
            yield self.part(start, min(len(self), start + most))

    def part(self, start: int, stop: int) -> "ScatteredRows":
        """A range of the rows."""
        shards, sources = self.shards[start:stop], self.sources[start:stop]
        if self.numbers is not None:
            return dataclasses.replace(self, shards=shards, sources=sources, numbers=self.numbers[start:stop])
        return dataclasses.replace(self, shards=shards, sources=sources, place=self.place + start * self.stride)

    def read(self, reader: Reader) -> None:
        """Read the rows with a reader, in the order of the disk; errors are those of `Reader.read`."""
        offsets = self.offsets
        order = np.lexsort((offsets, self.shards))
        # What becomes wider in memory is read to the back of its place.
        numbers = order if self.numbers is None else self.numbers[order]
        places = self.place + numbers * self.stride + (self.stride - self.row_nbytes)
        rows = offsets[order] // self.row_nbytes
        extents = make_extents(self.shards[order], rows, places, self.row_nbytes)
        reader.read(extents, 0, len(extents.nbytes))


def find_sources(mappings: dict[int, Mapping], shards: _Int64s, offsets: _Int64s) -> _Int64s:
    """Addresses `[n] int64` of what is at byte offsets `[n] int64` in shards that are mapped."""
    return _bases(mappings)[shards] + offsets


def _bases(mappings: dict[int, Mapping]) -> _Int64s:
    bases = np.zeros(max(mappings, default=0) + 1, dtype=np.int64)
    for number, mapping in mappings.items():
        bases[number] = mapping.address
    return bases
