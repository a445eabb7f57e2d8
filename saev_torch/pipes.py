"""Data pipes: the data sets as the source of a chain of `IterDataPipe`, with state."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, IterDataPipe
from torch.utils.data.graph import traverse_dps
from torch.utils.data.graph_settings import get_all_graph_pipes

from saev_torch.batch import ActivationBatch
from saev_torch.errors import ConfigError
from saev_torch.iterable.activations import Activations


class ActivationsPipe(IterDataPipe[ActivationBatch]):
    """The source of a chain: `ActivationsPipe(data).map(f)`.

    The data set finds rank and worker by itself, so the chain needs no `sharding_filter`; torch refuses one behind this
    pipe, because it would lose batches.

    Args:
        dataset: What to yield.
    """

    def __init__(self, dataset: Activations) -> None:
        super().__init__()
        self.dataset = dataset
        self._begun: Iterator[ActivationBatch] | None = None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_begun": None}

    def begin(self) -> None:
        """Begin the next iteration now; the chain, which is lazy, takes it up with its first item."""
        self._begun = iter(self.dataset)

    def __iter__(self) -> Iterator[ActivationBatch]:
        begun, self._begun = self._begun, None
        return iter(self.dataset) if begun is None else begun

    def __len__(self) -> int:
        """Batches that this rank yields in an epoch."""
        return len(self.dataset)

    def apply_sharding(self, num_of_instances: int, instance_id: int, sharding_group: Any = None) -> None:
        """Do nothing, but let torch know that sharding is taken care of."""


class StatefulPipe(IterableDataset[Any]):
    """The end of a chain: a data set with the state of the chain's source.

    torch's own pipes have no state, and `DataLoader` and torchdata's `StatefulDataLoader` would not find the source's
    behind them. Here they do. The state is exact behind pipes that hold nothing back: `map`, `filter`, `batch`, and
    others like them; it does not know what a `shuffle` buffers.

    Args:
        pipe: The last pipe of a chain that begins with one `ActivationsPipe`.

    Raises:
        ConfigError: There is no `ActivationsPipe` in the chain, or more than one.
    """

    def __init__(self, pipe: IterDataPipe[Any]) -> None:
        self.pipe = pipe
        sources = [dp for dp in get_all_graph_pipes(traverse_dps(pipe)) if isinstance(dp, ActivationsPipe)]
        if len(sources) != 1:
            raise ConfigError(
                f"pipe: expected a chain with one ActivationsPipe, got {len(sources)} of them; make the chain from one."
            )
        self._source = sources[0]

    def __iter__(self) -> Iterator[Any]:
        # A worker may be asked for its state before its first item, so it must know where it is.
        self._source.begin()
        return iter(self.pipe)

    def __len__(self) -> int:
        """Items in an epoch, where the last pipe knows."""
        return len(self.pipe)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; see the data set."""
        self._source.dataset.set_epoch(epoch)

    def state_dict(self, n_batches: int | None = None, epoch: int | None = None) -> dict[str, Any]:
        """Where the source stands; see the data set."""
        return self._source.dataset.state_dict(n_batches, epoch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where a state was taken; see the data set."""
        self._source.dataset.load_state_dict(state)
