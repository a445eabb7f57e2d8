"""One seeded permutation of all samples, cut into batches: what no buffer can mix better.

Each row of a batch is anywhere on disk, so each is a read of its own. That costs little where memory holds the data,
and there is nothing to fill: the first batch comes at once, and a few batches are all that is held.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.lazy import lazy
from saev_torch.order.permute import Bijection, make_key
from saev_torch.order.runs import Chunk
from saev_torch.order.shuffle import Batching
from saev_torch.order.streams import UNIFORM

_Int64s = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class UniformPlan(Batching):
    """One epoch of batches in a uniformly random order, in constant memory."""

    seed: int
    epoch: int

    @lazy
    def _permutation(self) -> Bijection:
        return Bijection(self.n_samples, make_key(self.seed, self.epoch, UNIFORM))

    def locate(self, batch: int) -> _Int64s:
        """The samples of a batch, row by row: `[size] int64`. Nothing is read."""
        start = self.start(batch)
        return self._permutation(np.arange(start, start + self.size(batch), dtype=np.int64))

    def find(self, sample: int) -> tuple[int, int]:
        """The inverse of `locate`: batch and row of a sample. Nothing is read."""
        position = int(self._permutation.inverse(np.array([sample], dtype=np.int64))[0])
        return self.at(position)

    def whole(self, batch: int) -> Chunk:
        """A batch as one chunk, in its own order."""
        return Chunk.of_batch(batch, self.locate(batch))
