"""Several selections as one, so that what reads and places samples need not know how many directories there are."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.selection import Selection

_Int64s = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Division:
    """The cells of one selection among others.

    Attributes:
        number: Which selection it is.
        selection: The selection.
        at: `[m] int64`, where its cells are among all, or all of them.
        cells: `[m] int64`, its own numbers of them.
        first_shard: Number of its first shard among those of all.
    """

    number: int
    selection: Selection
    at: _Int64s | slice
    cells: _Int64s
    first_shard: int


class JointSelection:
    """Selections one behind the other: their samples, cells and shards are numbered on from each to the next.

    Samples of all have the same shape and type in memory.

    Attributes:
        parts: The selections.
        n_samples, act_type, act_nbytes, n_parts, has_parts: As of one selection.
        sample_nbytes: Bytes of one sample on disk; the most, where they differ.
        layer_is_all: Whether in any of them every layer is a sample of its own.
    """

    def __init__(self, parts: Sequence[Selection]) -> None:
        self.parts, first = tuple(parts), parts[0]
        self.act_type, self.act_nbytes = first.act_type, first.act_nbytes
        self.n_parts, self.has_parts = first.n_parts, first.has_parts
        self.sample_nbytes = max(part.sample_nbytes for part in parts)
        self.layer_is_all = any(part.layer_is_all for part in parts)
        self._samples = _bounds([part.n_samples for part in parts])
        self._cells = _bounds([p.md.n_examples * p.n_grid_layers * p.md.tokens_per_example for p in parts])
        self._shards = _bounds([part.md.n_shards for part in parts])
        self.n_samples = self._samples[-1]
        self.md = first.md

    def cells(self, samples: _Int64s) -> _Int64s:
        """Map sample numbers `[m]` to cells `[m]`; see `Selection.cells`."""
        cells = np.empty_like(samples)
        for i, (part, (low, high)) in enumerate(zip(self.parts, itertools.pairwise(self._samples), strict=True)):
            at = np.flatnonzero((samples >= low) & (samples < high))
            cells[at] = part.cells(samples[at] - low) + self._cells[i]
        return cells

    def divide(self, cells: _Int64s) -> Iterator[Division]:
        """Divide cells `[m]` by the selections that they are of."""
        for i, (part, (low, high)) in enumerate(zip(self.parts, itertools.pairwise(self._cells), strict=True)):
            at = np.flatnonzero((cells >= low) & (cells < high))
            if len(at):
                yield Division(i, part, at, cells[at] - low, self._shards[i])

    def columns(self, cells: _Int64s) -> dict[str, _Int64s]:
        """What a batch says of cells `[m]`: as `Selection.columns`, and the number of each one's selection, `source`.

        Where one of them has a `layer`, the others say which layer they read.
        """
        keys = ["example_idx", "token_idx", *["layer"] * self.layer_is_all, "source"]
        columns = {key: np.empty(len(cells), dtype=np.int64) for key in keys}
        for one in self.divide(cells):
            found = one.selection.columns(one.cells)
            layer = one.selection.md.layers[one.selection.layer_idxs[0]]
            for key, column in columns.items():
                column[one.at] = one.number if key == "source" else found.get(key, layer)
        return columns

    def find(self, number: int, example_idx: int, token_idx: int, layer: int | None) -> int:
        """Number of the sample of which a batch says this; see `Selection.find`."""
        part = self.parts[number]
        if self.layer_is_all and not part.layer_is_all:
            layer = None
        return part.find(example_idx, token_idx, layer) + self._samples[number]


AnySelection: TypeAlias = Selection | JointSelection
"""The samples that are read: of one directory, or of several."""


def divide(selection: AnySelection, cells: _Int64s) -> Iterator[Division]:
    """Divide cells `[m]` by the selections that they are of; with one, it has all."""
    if isinstance(selection, JointSelection):
        return selection.divide(cells)
    return iter((Division(0, selection, slice(None), cells, 0),))


def _bounds(sizes: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(sizes, initial=0))
