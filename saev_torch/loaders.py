"""Ready-made loaders under the published names."""

import itertools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from saev_torch.batch import ActivationBatch
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.errors import SaevTorchError
from saev_torch.iterable import Batched, OrderedActivations, ShuffledActivations
from saev_torch.resume.cursor import Iteration

_START_S = 60.0
_MAX_TIMEOUT_S = 1e6


class _ActivationDataLoader(Batched, DataLoader[ActivationBatch]):  # type: ignore[misc, override]
    """A `DataLoader` of whole batches that knows its config, counts what is taken, and can be shut down."""

    dataset: OrderedActivations | ShuffledActivations

    def __init__(self, dataset: OrderedActivations | ShuffledActivations, **kwargs: Any) -> None:
        refused = {"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "dataset"} & kwargs.keys()
        if refused:
            raise TypeError(f"{sorted(refused)}: the config decides this; remove the argument.")
        self.cfg, self.metadata, self.n_samples = dataset.cfg, dataset.metadata, dataset.n_samples
        self.cursor, self.counters = dataset.cursor, dataset.counters
        if kwargs.get("num_workers"):
            # A worker reports a stalled read by itself; one that was stopped says nothing.
            kwargs.setdefault("timeout", min(dataset.cfg.batch_timeout_s + _START_S, _MAX_TIMEOUT_S))
        # The iterator, with its workers and threads, is the user's alone.
        self._batches: weakref.ref[CountedBatches] | None = None
        super().__init__(dataset, batch_size=None, **kwargs)

    @property
    def sampler(self) -> Iterable[Any]:  # type: ignore[override]
        """Where a trainer announces the epoch: `sampler.set_epoch`."""
        return _EpochListener(self)

    def __setattr__(self, attr: str, val: Any) -> None:
        # While it is made, torch would set these to None, False and a sampler of its own.
        if attr not in ("batch_size", "drop_last", "sampler") or "_iterator" in self.__dict__:
            super().__setattr__(attr, val)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; see the data set."""
        self.cursor.set_epoch(epoch)
        self._batches = None

    def follow_epoch(self, epoch: int) -> None:
        """Let an iteration that has begun, but has yielded nothing yet, be that of a later epoch."""
        # Lightning makes the iterator first, and then says which epoch it is for: after a resume not the one that it
        # would be by itself. It counts from 0, so where the user chose an epoch or loaded a state, it may be behind.
        batches = None if self._batches is None else self._batches()
        if batches is None or batches.iterator is None:
            return
        if batches.iteration.n_taken or batches.iteration.start.epoch >= epoch:
            return
        self.shutdown()
        self.cursor.set_epoch(epoch)
        batches.iterator, batches.iteration = self._begin()
        self._batches = weakref.ref(batches)

    def _begin(self) -> tuple[Any, Iteration]:
        if getattr(self._iterator, "_shutdown", False):
            # Persistent workers that have failed.
            self._iterator = None
        # The workers find out for themselves where they begin; here it must be known too.
        iteration = self.cursor.begin_elsewhere()
        # One worker yields its batches in turn.
        iteration.in_order = self.in_order or self.num_workers < 2
        iterator = super().__iter__()
        # What is counted is what is taken, also where this process makes the batches.
        self.cursor.follow(iteration)
        return iterator, iteration

    def __iter__(self) -> Any:
        batches = CountedBatches(*self._begin())
        self._batches = weakref.ref(batches)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Where this loader stands: after the batches that were taken from it. After a whole epoch, at the next one."""
        return self.dataset.state_dict()

    def shutdown(self) -> None:
        """Stop the running iteration with its workers and threads. The loader can be used again."""
        batches = None if self._batches is None else self._batches()
        iterator: Any = self._iterator if batches is None else batches.iterator
        self._iterator = self._batches = None
        if batches is not None:
            batches.iterator = None
        if iterator is not None:
            _end(iterator)


def _end(iterator: Any) -> None:
    """End an iterator of torch, with its workers or threads."""
    if not hasattr(iterator, "_shutdown_workers"):
        iterator._dataset_fetcher.dataset_iter.close()
        return
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():
            # One that was stopped does not see torch's SIGTERM, and would be waited for when this process exits.
            worker.kill()
            worker.join()


class CountedBatches(Iterator[ActivationBatch]):
    """Counts the batches that are taken from an iterator, None when it is over; its `iteration` outlives it."""

    def __init__(self, iterator: Any, iteration: Iteration) -> None:
        self.iterator, self.iteration = iterator, iteration
        self._failure: Exception | None = None

    def __next__(self) -> Any:
        if self._failure is not None:
            raise self._failure
        if self.iterator is None:
            raise StopIteration
        try:
            batch: Any = next(self.iterator)
        except StopIteration:
            # The iterator of persistent workers stays with the loader; any other ends its workers here.
            self.iterator = None
            raise
        except Exception as err:
            # What other workers have ready must not follow, as if nothing were missing. And torch's iterator would live
            # on in the traceback, until the garbage collector ends it in the wrong order, in 5 s for each worker.
            self._failure = type(err)(str(err)) if isinstance(err, SaevTorchError) else RuntimeError(str(err))
            iterator, self.iterator = self.iterator, None
            _end(iterator)
            raise
        # A `collate_fn` may make something else of a batch; then it is counted, and the digest leaves it out.
        if isinstance(batch, ActivationBatch):
            self.iteration.count(batch.digest, batch.number)
        else:
            self.iteration.count(None)
        return batch


class _EpochListener(Sampler[None]):
    """Stands where a sampler would: trainers tell it the epoch, and torch asks it for indices."""

    def __init__(self, loader: _ActivationDataLoader) -> None:
        # The iterator keeps its sampler, so this must not keep the loader, which may keep the iterator.
        self._loader = weakref.ref(loader)

    def __iter__(self) -> Iterator[None]:
        return itertools.repeat(None)

    def set_epoch(self, epoch: int) -> None:
        loader = self._loader()
        if loader is not None:
            loader.follow_epoch(epoch)


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

    Arguments are those of `OrderedDataLoader`.
    """

    def __init__(
        self, cfg: ShuffledConfig, *, rank: int | None = None, world_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(ShuffledActivations(cfg, rank=rank, world_size=world_size), **kwargs)
