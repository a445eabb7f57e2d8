"""Ready-made loaders under the published names."""

import dataclasses
from typing import Any

from torch.utils.data import DataLoader

from saev_torch.batch import ActivationBatch
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.datasets import OrderedActivations, ShuffledActivations
from saev_torch.digest import StreamDigest
from saev_torch.metadata import Metadata
from saev_torch.state import Position, dump_state

__all__ = ["OrderedDataLoader", "ShuffledDataLoader"]


class _ActivationDataLoader(DataLoader[ActivationBatch]):
    """A `DataLoader` of whole batches that knows its config, and can be shut down."""

    dataset: OrderedActivations | ShuffledActivations

    def __init__(self, dataset: OrderedActivations | ShuffledActivations, **kwargs: Any) -> None:
        refused = {"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "dataset"} & kwargs.keys()
        if refused:
            raise TypeError(f"{sorted(refused)}: the config decides this; remove the argument.")
        self._counting: _Counting | None = None
        super().__init__(dataset, batch_size=None, **kwargs)

    @property
    def cfg(self) -> OrderedConfig | ShuffledConfig:
        """The config."""
        return self.dataset.cfg

    @property
    def metadata(self) -> Metadata:
        """Metadata of the shards."""
        return self.dataset.metadata

    @property
    def md(self) -> Metadata:
        """Short for `metadata`."""
        return self.dataset.metadata

    @property
    def n_samples(self) -> int:
        """Samples in the selection."""
        return self.dataset.n_samples

    @property
    def n_batches(self) -> int:
        """Batches in an epoch, over all ranks."""
        return self.dataset.n_batches

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.dataset.d_model

    # torch's own class sets these two to None and False, because the data set makes the batches.
    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.dataset.batch_size

    @batch_size.setter
    def batch_size(self, value: Any) -> None:
        pass

    @property
    def drop_last(self) -> bool:
        """Whether a last batch that is not full is left out."""
        return self.dataset.drop_last

    @drop_last.setter
    def drop_last(self, value: Any) -> None:
        pass

    def __len__(self) -> int:
        """Batches that this rank yields in an epoch."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; see the data set."""
        self._counting = None
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Any:
        # What the workers will find out for themselves is settled here, so that it is known here.
        start = self.dataset.begin_elsewhere()
        iterator = super().__iter__()
        self._counting = counting = _Counting(iterator, start, self.dataset.world_size)
        return counting

    @property
    def digest(self) -> StreamDigest:
        """Digest of the batches that were taken from this loader, and before the state that was loaded."""
        return self.dataset.digest if self._counting is None else self._counting.position.digest

    def state_dict(self) -> dict[str, Any]:
        """Where this loader stands: after the batches that were taken from it. After a whole epoch, at the next one."""
        if self._counting is None:
            return self.dataset.state_dict()
        position = self._counting.position
        if self._counting.finished:
            position = dataclasses.replace(position, epoch=position.epoch + 1, batch=0)
        return dump_state(self.metadata, self.cfg, position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where a state was taken, with any number of workers and ranks.

        Args:
            state: What `state_dict` returned, of a loader or a data set with the same data and config.

        Raises:
            StateError: It is no state, of a newer version, or of other data or another config.
        """
        self.dataset.load_state_dict(state)
        self._counting = None

    def shutdown(self) -> None:
        """Stop the running iteration with its workers and threads. The loader can be used again."""
        iterator: Any = self._iterator if self._counting is None else self._counting.iterator
        self._iterator = None
        if self._counting is not None:
            self._counting.iterator = None
        if iterator is None:
            return
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        else:
            iterator._dataset_fetcher.dataset_iter.close()


class _Counting:
    """Counts the batches that are taken from an iterator."""

    def __init__(self, iterator: Any, position: Position, world_size: int) -> None:
        self.iterator = iterator
        self.position = position
        self.finished = False
        self._world_size = world_size

    def __iter__(self) -> "_Counting":
        return self

    def __next__(self) -> ActivationBatch:
        if self.iterator is None:
            raise StopIteration
        try:
            batch: ActivationBatch = next(self.iterator)
        except StopIteration:
            # The iterator of persistent workers stays with the loader; any other ends its workers here.
            self.finished, self.iterator = True, None
            raise
        here = self.position
        digest = here.digest.including(here.epoch, here.batch + here.rank, batch.digest)
        self.position = dataclasses.replace(here, batch=here.batch + self._world_size, digest=digest)
        return batch


class OrderedDataLoader(_ActivationDataLoader):
    """Batches in file order: a `DataLoader` on `OrderedActivations`.

    Args:
        cfg: What to read.
        rank: This rank; without it torch.distributed or the launcher's variables tell, when iterating.
        world_size: Number of ranks; given with `rank`.
        **kwargs: Arguments of `torch.utils.data.DataLoader`, for instance `num_workers`.
    """

    def __init__(
        self, cfg: OrderedConfig, *, rank: int | None = None, world_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(OrderedActivations(cfg, rank=rank, world_size=world_size), **kwargs)


class ShuffledDataLoader(_ActivationDataLoader):
    """Batches in a seeded random order: a `DataLoader` on `ShuffledActivations`.

    Args:
        cfg: What to read.
        rank: This rank; without it torch.distributed or the launcher's variables tell, when iterating.
        world_size: Number of ranks; given with `rank`.
        **kwargs: Arguments of `torch.utils.data.DataLoader`, for instance `num_workers`.
    """

    def __init__(
        self, cfg: ShuffledConfig, *, rank: int | None = None, world_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(ShuffledActivations(cfg, rank=rank, world_size=world_size), **kwargs)
