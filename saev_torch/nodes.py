"""`torchdata.nodes`: the data sets and loaders as the first node of a graph."""

from collections.abc import Iterator
from typing import Any, TypeAlias

from torchdata.nodes import BaseNode

from saev_torch.batch import ActivationBatch
from saev_torch.iterable.activations import Activations
from saev_torch.loaders import OrderedDataLoader, ShuffledDataLoader

Source: TypeAlias = Activations | OrderedDataLoader | ShuffledDataLoader


class ActivationsNode(BaseNode[ActivationBatch]):  # type: ignore[misc]
    """Yields the batches of one epoch after each `reset`; a state makes the next epoch begin where it was taken.

    Args:
        source: A data set, which reads with threads of this process, or a ready-made loader, perhaps with workers.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self._batches: Iterator[ActivationBatch] = iter(())

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Begin the next epoch, or continue where a state of `get_state` was taken; see the source."""
        super().reset(initial_state)
        if initial_state is not None:
            self.source.load_state_dict(initial_state)
        self._batches = iter(self.source)

    def next(self) -> ActivationBatch:
        """The next batch."""
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Where the source stands, after the batches that were taken; after the last one, at the next epoch."""
        # torchdata 0.11 returns the same old state for ever where an epoch is over, so it must never seem to be.
        return self.source.state_dict()
