"""The two iterable data sets: batches in file order, and in a seeded random order."""

import contextlib
import functools
import logging
import math
import operator
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from saev_torch.batch import ActivationBatch, describe, make_batch
from saev_torch.config import BatchConfig, OrderedConfig, ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.sidecars import TOKEN_IDS
from saev_torch.iterable.batched import Batched
from saev_torch.order.joint import AnySelection
from saev_torch.order.kept import labels_changed, mask_changed
from saev_torch.order.selection import Selection
from saev_torch.order.shuffle import OrderedPlan, ShufflePlan
from saev_torch.order.steps import Plan, Share, advise_lanes
from saev_torch.order.uniform import UniformPlan
from saev_torch.processes.callers import ends_with_epoch, keep_whole, require_known_epoch, require_shared_once
from saev_torch.processes.counters import Counters, Watch, log_to_stderr
from saev_torch.processes.leaving import Gate
from saev_torch.processes.undone import make_up
from saev_torch.processes.world import Rank
from saev_torch.reading.columns import Column
from saev_torch.reading.engine import Engine, EngineOptions
from saev_torch.reading.feeds import AnyFeed, Feed
from saev_torch.reading.labels import Labels
from saev_torch.reading.room import advise_order, advise_room, count_ranks_here
from saev_torch.reading.selecting import open_store, select, tell_counted_layers
from saev_torch.reading.slots import OpenBatch, Pools
from saev_torch.reading.source import Source
from saev_torch.reading.store import LABELS_IDX, ShardStore
from saev_torch.resume.cursor import Cursor, Iteration
from saev_torch.resume.state import Position, Recording, dump_state
from saev_torch.stats.statistics import find_scale

_log = logging.getLogger("saev_torch")
_ORDERED_THREADS = 4


class Activations(Batched, IterableDataset[ActivationBatch]):
    """What the ordered and the shuffled data set share: everything but the plan. Its cursor says where it stands."""

    _gathers = False

    def __init__(self, cfg: BatchConfig, store: ShardStore, rank: Rank, world_size: int | None) -> None:
        self.cfg, self.metadata, self._store = cfg, store.metadata, store
        self._selection: Selection | None = None
        self._kept: tuple[str | None, str | None] | None = None
        self.pools: Pools = {}
        self.recording = Recording.of(store, self._own_selection())
        tell_counted_layers(cfg, store.metadata.layers)
        self.n_samples = self.recording.n_samples
        self.cursor = Cursor(self.n_batches, self.drop_last, rank, world_size)
        self.counters = Counters()

    def __getstate__(self) -> dict[str, Any]:
        # The selection may hold a number for each example; a worker works it out again, and has memory of its own.
        return {**self.__dict__, "_selection": None, "pools": {}}

    def _own_selection(self) -> Selection:
        if self._selection is None:
            with contextlib.closing(self._store.clone()) as store:
                selection = select(store, self.cfg)
            # A worker that counts again must find the same.
            if self._kept is not None and self._kept != selection.digests:
                is_mask = self._kept[1] != selection.mask_digest
                raise mask_changed(self.cfg.mask) if is_mask else labels_changed(store.path(LABELS_IDX))
            self._selection, self._kept = selection, selection.digests
        return self._selection

    def _selected(self) -> AnySelection:
        """What there is to yield."""
        return self._own_selection()

    def _prepare(self) -> None:
        """Find the scale, the same number for all workers and epochs, and compile what readers convert with."""
        selection = self._own_selection()
        self.cursor.scale = find_scale(self.cfg, self._store, selection)
        # Here, for all workers that are forked.
        Source(self._store, scale=self.cursor.scale, loaded=selection.act_type, gathers=self._gathers)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the ones after it count on from there.

        Raises:
            ConfigError: `epoch` is no integer from 0 on, or Accelerate shares the batches among ranks once more.
        """
        require_shared_once(self.cursor.world)
        self.cursor.set_epoch(epoch)

    def state_dict(self, n_batches: int | None = None, epoch: int | None = None) -> dict[str, Any]:
        """Where this data set stands, as a small dict of JSON's types; behind the last batch, at the next epoch.

        Args:
            n_batches: Batches that this rank has taken since the latest iteration began, be it at the start of an epoch
                or where a state was loaded. To be given where workers made them: then only the consumer knows. Left
                out, it is what was yielded in this process.
            epoch: Number of an epoch; given, `n_batches` counts from its start.

        Returns:
            A state for `load_state_dict` of any data set with the same data and config.

        Raises:
            StateError: Workers iterate, and `n_batches` was not given.
            ConfigError: `n_batches` or `epoch` is no integer from 0 on.
        """
        return self._dump(self.cursor.position() if n_batches is None else self.cursor.position_after(n_batches, epoch))

    def _dump(self, position: Position) -> dict[str, Any]:
        return dump_state(self.metadata, self.recording, self.cfg, position)

    def locate(self, batch_idx: int, epoch: int | None = None) -> dict[str, torch.Tensor]:
        """Tell which samples a batch holds, without reading activations.

        Args:
            batch_idx: Number of the batch in the sequence of all ranks.
            epoch: Number of the epoch; left out, the latest.

        Returns:
            `example_idx`, `token_idx` and, with `layer="all"`, `layer`: `[batch] int64` each, as in the batch.

        Raises:
            IndexError: There is no such batch.
        """
        # Of numpy's integers, a product may not fit into their own type.
        batch_idx = operator.index(batch_idx)
        if not 0 <= batch_idx < self.n_batches:
            raise IndexError(f"batch {batch_idx} is out of range: there are {self.n_batches}, from 0.")
        selection = self._selected()
        columns = selection.columns(selection.cells(self._plan(epoch).locate(batch_idx)))
        return {key: torch.from_numpy(column) for key, column in columns.items()}

    def find(
        self, example_idx: int, token_idx: int, layer: int | None = None, epoch: int | None = None
    ) -> tuple[int, int]:
        """Tell in which batch a sample comes, without reading activations: the inverse of `locate`.

        Args:
            example_idx: Number of the example.
            token_idx: Content token, from 0; -1 for the special token.
            layer: Recorded layer, with `layer="all"`.
            epoch: Number of the epoch; left out, the latest.

        Returns:
            Number of the batch in the sequence of all ranks, and the row in it. With `drop_last` the batch may be one
            that is left out.

        Raises:
            IndexError: The selection has no such sample.
        """
        layer = None if layer is None else operator.index(layer)
        sample = self._own_selection().find(operator.index(example_idx), operator.index(token_idx), layer)
        return self._plan(epoch).find(sample)

    def __iter__(self) -> Iterator[ActivationBatch]:
        require_shared_once(self.cursor.world)
        require_known_epoch(self.cursor.has_begun)
        keep_whole()
        make_up()
        # Not a generator itself: which epoch this is must be settled now, not at the first batch.
        return self._iterate(self.cursor.begin())

    def _plan(self, epoch: int | None) -> Plan:
        """The order of samples in an epoch, None for the latest."""
        raise TypeError(f"{type(self).__name__}: expected OrderedActivations or ShuffledActivations; use one of them.")

    def _engine_options(self, plan: Plan, share: Share) -> dict[str, Any]:
        return {"n_threads": _ORDERED_THREADS, "n_fills": 0}

    def _open_engine(self, plan: Plan, iteration: Iteration) -> Engine:
        start = iteration.start
        options = EngineOptions(
            buffer_size=self.cfg.buffer_size,
            timeout_s=self.cfg.batch_timeout_s,
            # Rows that are read one by one are slow from a disk: what memory can hold is to be there from then on.
            is_only=start.epoch == 0 and not isinstance(plan, UniformPlan),
            keeps_memory=not ends_with_epoch(),
            **self._engine_options(plan, iteration.share),
        )
        described = functools.partial(describe, selection=self._selected())
        return Engine(self._open_feed(plan, start.scale), plan, iteration.share, options, self.pools, described)

    def _open_feed(self, plan: Plan, scale: float | None) -> AnyFeed:
        """What an engine reads from."""
        return self.open_own(scale)

    def open_own(self, scale: float | None) -> Feed:
        """Open the directory to read from, with a store of its own."""
        labels = Labels(self._store.clone(), self._own_selection())
        selection = self._own_selection().reading_with(labels.of_examples)
        source = Source(labels.store, scale=scale, loaded=selection.act_type, gathers=self._gathers)
        return Feed(source, labels, Column(labels.store, TOKEN_IDS), selection)

    def _make_batch(self, opened: OpenBatch) -> ActivationBatch:
        return make_batch(opened)

    def _watch(self, iteration: Iteration) -> Watch:
        cfg, start, share = self.cfg, iteration.start, iteration.share
        name = f"{cfg.shards}: epoch {start.epoch}, rank {start.rank}, reader {share.first}/{share.stride}"
        if cfg.debug:
            log_to_stderr()
            _log.debug("%s: begins at batch %d of %d", name, start.batch, share.stop)
        return Watch(self.counters.begin(start.rank), name, cfg.log_every_s)

    def _advise(self, plan: Plan, iteration: Iteration) -> None:
        """Say once what would be better, or what will not do."""
        start, share, info, selection = iteration.start, iteration.share, get_worker_info(), self._selected()
        advice: dict[str, str | None] = {}
        if start.rank == 0:
            advice["lanes"] = advise_lanes(plan, share)
            advice["order"] = advise_order(plan, selection.sample_nbytes)
        if (info is None or info.id == 0) and start.rank % count_ranks_here(start.world_size) == 0:
            room = advise_room(plan, share, self.cfg.buffer_size, selection.act_nbytes, start.world_size)
            advice["room"] = room
        for key, line in advice.items():
            if line is not None and self.cursor.may_say(key):
                _log.warning(line)

    def _iterate(self, iteration: Iteration) -> Iterator[ActivationBatch]:
        start, share = iteration.start, iteration.share
        if share.first >= share.stop:
            return
        plan, gate = self._plan(start.epoch), Gate()
        self._advise(plan, iteration)
        with iteration.naming():
            engine = self._open_engine(plan, iteration)
            # Whatever interrupts, be it the end: its threads do not outlive this frame.
            weakref.finalize(gate, engine.close).atexit = False
            watch = self._watch(iteration)
            try:
                with gate:
                    gate.close = engine.close
                    engine.start()
                while True:
                    with gate:
                        opened = engine.next_batch(watch.wait)
                        if opened is None:
                            break
                        watch.count(opened.size, engine.batches.waits, engine.batches.fill)
                        batch = self._make_batch(opened)
                        engine.finish(opened, batch)
                        # The caller alone decides how long the batch lives.
                        del opened
                    batch.number = iteration.next_number
                    iteration.count(batch.digest)
                    yield batch
                    del batch
            finally:
                watch.stop()
                engine.close()


class OrderedActivations(Activations):
    """Whole batches in file order.

    Args:
        cfg: What to read.
        rank: This rank; without it torch.distributed, else RANK and WORLD_SIZE tell, when iterating. "slurm" and "mpi"
            take it, and the number of ranks, from the variables of `srun` and `mpirun`.
        world_size: Number of ranks; given with `rank`.

    Attributes:
        cfg: The config.
        metadata: Metadata of the shards.
        n_samples: Samples in the selection.

    Raises:
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
        ConfigError: The config asks for what these shards do not hold.
    """

    cfg: OrderedConfig

    def __init__(self, cfg: OrderedConfig, *, rank: Rank = None, world_size: int | None = None) -> None:
        super().__init__(cfg, open_store("OrderedActivations", cfg, OrderedConfig), rank, world_size)
        self._prepare()

    def _plan(self, epoch: int | None) -> OrderedPlan:
        return OrderedPlan(self.n_samples, self.batch_size)


class ShuffledActivations(Activations):
    """Whole batches in a seeded random order, another in each epoch; see `saev_torch.order.shuffle`.

    Arguments, attributes and errors are those of `OrderedActivations`.
    """

    cfg: ShuffledConfig
    _gathers = True

    def __init__(self, cfg: ShuffledConfig, *, rank: Rank = None, world_size: int | None = None) -> None:
        store = open_store("ShuffledActivations", cfg, ShuffledConfig)
        recorded = store.metadata.layers
        if cfg.layer == -1 and -1 not in recorded:
            raise ConfigError(
                f"ShuffledConfig.layer: expected one of the recorded layers {list(recorded)}, got -1, the default, "
                "which must be changed; choose a layer."
            )
        super().__init__(cfg, store, rank, world_size)
        self._prepare()

    def _plan(self, epoch: int | None) -> ShufflePlan | UniformPlan:
        cfg, epoch = self.cfg, self.cursor.epoch if epoch is None else operator.index(epoch)
        if cfg.order == "uniform":
            return UniformPlan(self.n_samples, cfg.batch_size, cfg.seed, epoch)
        return ShufflePlan(
            self.n_samples, cfg.batch_size, cfg.buffer_size, cfg.n_lanes, cfg.block_size, cfg.seed, epoch
        )

    def _engine_options(self, plan: Plan, share: Share) -> dict[str, Any]:
        n_lanes = plan.n_lanes if isinstance(plan, ShufflePlan) else 1
        n_own = len(range(share.first, share.stop, share.stride))
        lanes_here = min(n_own, n_lanes // math.gcd(share.stride, n_lanes))
        return {"n_threads": self.cfg.n_threads, "n_fills": math.ceil(self.cfg.min_buffer_fill * lanes_here)}
