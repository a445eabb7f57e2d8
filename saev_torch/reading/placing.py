"""Where every row of a step goes: from the order in which a plan deals samples to the order of the disk."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.runs import expand_runs
from saev_torch.order.selection import Selection
from saev_torch.order.steps import Step
from saev_torch.reading.slots import Slot

_Int64s = NDArray[np.int64]


@dataclasses.dataclass
class OpenBatch:
    """A batch of `size` samples that is being read, or was.

    Attributes:
        cells: `[size] int64`, the cell of each row; see `Selection`.
        labels: `[size] uint8`, the label of each row (anything for a special token), where labels are read.
    """

    slot: Slot
    size: int
    cells: _Int64s
    labels: NDArray[np.uint8] | None


_Target = tuple[OpenBatch, _Int64s, _Int64s]


@dataclasses.dataclass(frozen=True)
class Placed:
    """The samples of a step that are wanted, in the order of the disk.

    Attributes:
        cells: `[n] int64`, the cell of each; see `Selection`.
        addresses: `[n] int64`, where the activations of each go.
        positions: `[n] int64`, position of each in the step.
        n_positions: Samples of the step, wanted or not.
        targets: For each batch and load: the batch, positions in the step, and the rows that they go to.
    """

    cells: _Int64s
    addresses: _Int64s
    positions: _Int64s
    n_positions: int
    targets: list[_Target]

    def deal_labels(self, labels: NDArray[np.uint8]) -> None:
        """Give the labels `[n] uint8` to the batches."""
        dealt = np.empty(self.n_positions, dtype=np.uint8)
        dealt[self.positions] = labels
        for opened, positions, rows in self.targets:
            if opened.labels is not None:
                opened.labels[rows] = dealt[positions]


def place(step: Step, opened: Mapping[int, OpenBatch], selection: Selection) -> Placed:
    """Work out where every row of a step with loads goes, and tell each open batch which cells it holds."""
    chunks = [load.chunk for load in step.loads]
    starts, lengths = (np.concatenate(x) for x in zip(*((c.starts, c.lengths) for c in chunks), strict=True))
    order = np.argsort(starts, kind="stable")
    on_disk = expand_runs((np.cumsum(lengths) - lengths)[order], lengths[order])
    cells = selection.cells(expand_runs(starts[order], lengths[order]))

    dealt = np.empty_like(cells)
    dealt[on_disk] = cells
    addresses = np.zeros_like(cells)
    targets = list(_targets(step, opened))
    for batch, positions, rows in targets:
        batch.cells[rows] = dealt[positions]
        addresses[positions] = rows * selection.sample_nbytes + batch.slot.address
    addresses = addresses[on_disk]
    if not addresses.all():
        wanted = np.flatnonzero(addresses)
        on_disk, cells, addresses = on_disk[wanted], cells[wanted], addresses[wanted]
    return Placed(cells, addresses, on_disk, len(dealt), targets)


def _targets(step: Step, opened: Mapping[int, OpenBatch]) -> Iterator[_Target]:
    offset = 0
    for load in step.loads:
        chunk = load.chunk
        for batch, d in load.targets:
            part = slice(chunk.bounds[d], chunk.bounds[d + 1])
            yield opened[batch], chunk.dealt[part] + offset, chunk.rows[part]
        offset += len(chunk.dealt)
