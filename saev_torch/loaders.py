"""Ready-made loaders under the published names."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader

from saev_torch.batch import ActivationBatch
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.iterable.activations import OrderedActivations, ShuffledActivations
from saev_torch.iterable.batched import Batched
from saev_torch.iterable.counted import CountedBatches
from saev_torch.processes.callers import EpochListener
from saev_torch.processes.counters import Reservoir
from saev_torch.processes.epochs import PLACE
from saev_torch.processes.inherited import register
from saev_torch.processes.interrupts import whole
from saev_torch.processes.locks import members
from saev_torch.processes.page import SharedPage
from saev_torch.processes.undone import make_up
from saev_torch.processes.workers import WorkerBatches, children_here, end_iterator, end_unfinished
from saev_torch.processes.world import Rank
from saev_torch.resume.cursor import Iteration
from saev_torch.resume.state import StreamDigest, dump_state

_SAMPLERS = ("sampler", "batch_sampler")
_START_S, _MAX_TIMEOUT_S = 60.0, 1e6

# While Lightning makes a loader it notes what is set on it, and goes on doing so where that failed.
_NOTED = "__pl_attrs_record"


class _Now:
    """What a loader does in this process; on an object of its own, which nobody who looks at loaders keeps."""

    def __init__(self) -> None:
        # How far the latest iteration came, which stays known when the user breaks off.
        self.counted: Iteration | None = None
        self.forget()

    def forget(self) -> None:
        """Leave the iterations that run, but for how far the latest came."""
        # An iterator, with its workers and threads, is the user's alone. The latest may be asked to follow the epoch.
        self.running: weakref.WeakSet[CountedBatches] = weakref.WeakSet()
        self.batches: weakref.ref[CountedBatches] | None = None
        # Where workers begin, which persistent ones look up.
        self.place: SharedPage | None = None


class _ActivationDataLoader(Batched, DataLoader[ActivationBatch]):  # type: ignore[misc, override]
    """A `DataLoader` of whole batches that knows its config, counts what is taken, and can be shut down."""

    dataset: OrderedActivations | ShuffledActivations

    ExampleBatch = ActivationBatch
    manager_pid = -1
    """No process of its own reads for a loader, as one does in `saev`: `DataLoader` knows its workers."""

    # So Accelerate leaves it alone, which would share its batches among the ranks again, and saves its state.
    _is_accelerate_prepared = use_stateful_dataloader = True

    def __init__(self, dataset: OrderedActivations | ShuffledActivations, **kwargs: Any) -> None:
        if all(key in kwargs and kwargs[key] is None for key in _SAMPLERS):
            # Lightning makes a loader anew so, of its arguments or of its attributes.
            kwargs = {key: value for key, value in kwargs.items() if key not in _SAMPLERS}
        refused = {"batch_size", "shuffle", "drop_last", "dataset", *_SAMPLERS} & kwargs.keys()
        if refused:
            raise TypeError(f"{sorted(refused)}: the config decides this; remove the argument.")
        self.cfg, self.metadata, self.n_samples = dataset.cfg, dataset.metadata, dataset.n_samples
        self.recording, self.cursor, self.counters = dataset.recording, dataset.cursor, dataset.counters
        if kwargs.get("num_workers"):
            # A worker reports a stalled read by itself; one that was stopped says nothing.
            kwargs.setdefault("timeout", min(dataset.cfg.batch_timeout_s + _START_S, _MAX_TIMEOUT_S))
        self._now = _Now()
        register(self)
        super().__init__(dataset, batch_size=None, **kwargs)

    def leave_to_parent(self) -> Any:
        """In a forked child: let go of persistent workers."""
        iterator, self._iterator, self._now.place = self._iterator, None, None
        return iterator

    def __getstate__(self) -> dict[str, Any]:
        # A copy has nothing to do with iterations of this loader, nor with their workers.
        kept = {key: value for key, value in self.__dict__.items() if key != _NOTED}
        return {**kept, "_iterator": None, "_now": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _now=_Now())
        register(self)

    @property
    def reservoir(self) -> Reservoir:
        """How full the buffers of this rank's readers are: `reservoir.fill()`."""
        return Reservoir(self.counters, self.cursor.world.rank)

    @property
    def sampler(self) -> Iterable[Any]:  # type: ignore[override]
        """Where a trainer announces the epoch: `sampler.set_epoch`."""
        return EpochListener(self)

    def __setattr__(self, attr: str, val: Any) -> None:
        # While it is made, torch would set these to None, False and a sampler of its own.
        if attr not in ("batch_size", "drop_last", "sampler") or "_iterator" in self.__dict__:
            super().__setattr__(attr, val)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; see the data set."""
        self.cursor.set_epoch(epoch)
        self._now.batches = None

    def follow_epoch(self, epoch: int) -> None:
        """Let an iteration that has begun, but has yielded nothing yet, be that of a later epoch."""
        # Lightning makes the iterator first, and then says which epoch it is for: after a resume not the one that it
        # would be by itself. It counts from 0, so where the user chose an epoch or loaded a state, it may be behind.
        batches = None if self._now.batches is None else self._now.batches()
        if batches is None or batches.iterator is None:
            return
        if batches.iteration.n_taken or batches.iteration.start.epoch >= epoch:
            return
        self.shutdown()
        self.cursor.set_epoch(epoch)
        batches.iterator, batches.iteration = self._begin()
        self._now.running.add(batches)
        self._now.batches = weakref.ref(batches)

    def _begin(self) -> tuple[Any, Iteration]:
        make_up()
        if getattr(self._iterator, "_shutdown", False):
            # Persistent workers that have failed.
            self._iterator = self._now.place = None
        if self._now.place is None or not self.persistent_workers:
            # A worker that begins late, for an iterator that is gone, must not take the place of another's.
            self._now.place = SharedPage(PLACE)
        iteration = self.cursor.begin_elsewhere()
        place = self._now.place.fields
        place["epoch"], place["start"] = iteration.start.place
        # One worker yields its batches in turn.
        iteration.in_order = self.in_order or self.num_workers < 2
        children = children_here() if self.num_workers else None
        with self.cursor.telling(place):
            try:
                iterator = super().__iter__()
            except BaseException as err:
                end_unfinished(err, children)
                raise
        # What is counted is what is taken, also where this process makes the batches.
        self.cursor.follow(iteration)
        self._now.counted = iteration
        return iterator, iteration

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return WorkerBatches(self, self.counters)

    def __iter__(self) -> CountedBatches:  # type: ignore[override]
        # What torch has half done nobody can undo; and persistent workers would go on behind an interrupt.
        try:
            return whole(self._iterate)
        except BaseException:
            iterator, self._iterator = self._iterator, None
            end_iterator(iterator)
            raise

    def _iterate(self) -> CountedBatches:
        if self.persistent_workers:
            # There is one set of workers, which is about to begin anew.
            for other in members(self._now.running):
                other.give_way()
        batches = CountedBatches(*self._begin())
        self._now.running.add(batches)
        self._now.batches = weakref.ref(batches)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Where this loader stands: after the batches that were taken from it. After a whole epoch, at the next one."""
        if self._now.counted is None or self.cursor.is_chosen:
            return self.dataset.state_dict()
        # Somebody else may have looked into the data set meanwhile.
        return dump_state(self.metadata, self.recording, self.cfg, self._now.counted.position)

    @property
    def n_batches_left(self) -> int:
        """Batches that are still to be taken of this epoch; see the data set."""
        return self.cursor.n_left(None if self.cursor.is_chosen else self._now.counted)

    @property
    def digest(self) -> StreamDigest:
        """Digest of the batches that were taken from this loader, and before the state that was loaded."""
        is_own = self._now.counted is not None and not self.cursor.is_chosen
        return self._now.counted.digest if is_own and self._now.counted is not None else self.cursor.digest

    def shutdown(self) -> None:
        """Stop all running iterations with their workers and threads, and give memory back. It can be used again.

        A thread that is in the middle of another epoch gets an `EndedError`. In a signal handler that interrupts the
        wait for a batch, the iteration ends when that has come.
        """
        iterator, self._iterator = self._iterator, None
        running = members(self._now.running)
        self._now.forget()
        for batches in running:
            if not batches.shut_down() and batches.iterator is iterator:
                iterator = None
        end_iterator(iterator)
        self.dataset.pools.clear()
        make_up()


def _is_made_anew(cfg: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a loader is made of the attributes of another, with its data set, as Lightning does to predict."""
    return getattr(kwargs.get("dataset"), "cfg", None) is cfg


class OrderedDataLoader(_ActivationDataLoader):
    """Batches in file order: a `DataLoader` on `OrderedActivations`.

    Args:
        cfg: What to read.
        rank: This rank, or "slurm" or "mpi"; see `OrderedActivations`.
        world_size: Number of ranks; given with `rank`.
        **kwargs: Arguments of `torch.utils.data.DataLoader`, for instance `num_workers`.
    """

    def __init__(self, cfg: OrderedConfig, *, rank: Rank = None, world_size: int | None = None, **kwargs: Any) -> None:
        is_own = _is_made_anew(cfg, kwargs)
        dataset = kwargs.pop("dataset") if is_own else OrderedActivations(cfg, rank=rank, world_size=world_size)
        super().__init__(dataset, **kwargs)


class ShuffledDataLoader(_ActivationDataLoader):
    """Batches in a seeded random order: a `DataLoader` on `ShuffledActivations`.

    Arguments are those of `OrderedDataLoader`.
    """

    def __init__(self, cfg: ShuffledConfig, *, rank: Rank = None, world_size: int | None = None, **kwargs: Any) -> None:
        is_own = _is_made_anew(cfg, kwargs)
        dataset = kwargs.pop("dataset") if is_own else ShuffledActivations(cfg, rank=rank, world_size=world_size)
        super().__init__(dataset, **kwargs)
