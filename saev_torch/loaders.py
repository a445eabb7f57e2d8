"""Ready-made loaders under the published names."""

import weakref
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from saev_torch.batch import ActivationBatch
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.datasets import OrderedActivations, ShuffledActivations
from saev_torch.metadata import Metadata

__all__ = ["OrderedDataLoader", "ShuffledDataLoader"]


class _ActivationDataLoader(DataLoader[ActivationBatch]):
    """A `DataLoader` of whole batches that knows its config, and can be shut down."""

    dataset: OrderedActivations | ShuffledActivations

    def __init__(self, dataset: OrderedActivations | ShuffledActivations, **kwargs: Any) -> None:
        refused = {"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "dataset"} & kwargs.keys()
        if refused:
            raise TypeError(f"{sorted(refused)}: the config decides this; remove the argument.")
        self._running: weakref.ref[Any] | None = None
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
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        self._running = weakref.ref(iterator)
        return iterator

    def shutdown(self) -> None:
        """Stop the running iteration with its workers and threads. The loader can be used again."""
        iterator = self._running() if self._running is not None else None
        self._running = None
        self._iterator = None
        if iterator is None:
            return
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        else:
            batches: Iterator[ActivationBatch] = iterator._dataset_fetcher.dataset_iter
            batches.close()  # type: ignore[attr-defined]


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
