"""The two iterable data sets: batches in file order, and in a seeded random order."""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from saev_torch.batch import ActivationBatch, make_batch
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.errors import ConfigError, SaevTorchError, StateError
from saev_torch.format.localcopy import local_copy
from saev_torch.format.metadata import Metadata
from saev_torch.order.selection import Selection
from saev_torch.order.shuffle import OrderedPlan, ShufflePlan
from saev_torch.order.steps import Share
from saev_torch.processes.counters import Board, Meter, Watch
from saev_torch.processes.epochs import EpochCounter
from saev_torch.processes.world import World, check_world, consumer_pid, find_world
from saev_torch.reading.compiled import find_scale_kernels
from saev_torch.reading.engine import Engine, EngineOptions
from saev_torch.reading.labels import Labels
from saev_torch.reading.placing import OpenBatch
from saev_torch.reading.store import ShardStore
from saev_torch.resume import Position, StreamDigest, dump_state, load_state
from saev_torch.stats.statistics import compute_scale

__all__ = ["Activations", "OrderedActivations", "ShuffledActivations"]

_log = logging.getLogger("saev_torch")
_ORDERED_THREADS = 4


class Activations(IterableDataset[ActivationBatch]):
    """What the ordered and the shuffled data set share: everything but the plan."""

    cfg: OrderedConfig | ShuffledConfig

    def __init__(
        self,
        cfg: OrderedConfig | ShuffledConfig,
        shards_dir: Path,
        ignore_labels: Sequence[int],
        rank: int | None,
        world_size: int | None,
    ) -> None:
        check_world(rank, world_size)
        self.cfg = cfg
        self._rank, self._world_size = rank, world_size
        self._known_world: World | None = None
        self._store = ShardStore(shards_dir)
        self._ignore_labels = ignore_labels
        self._selection: Selection | None = self._select(self._store.clone())
        self.n_samples = self._selection.n_samples
        self._epochs = EpochCounter()
        self._board = Board()
        self._meter: Meter | None = None
        # Where the latest iteration in this process stands, and where a loaded state says that the next one begins.
        self._position: Position | None = None
        self._resumed: Position | None = None
        self._resumed_pid = 0
        self._earlier = StreamDigest()

    def _select(self, store: ShardStore) -> Selection:
        try:
            read_labels = Labels(store).of_examples
            return Selection(store.metadata, self.cfg.tokens, self.cfg.layer, self._ignore_labels, read_labels)
        finally:
            store.close()

    def __getstate__(self) -> dict[str, Any]:
        # The selection may hold a number for each example; a worker works it out again.
        world = find_world(self._rank, self._world_size, self._known_world)
        return {**self.__dict__, "_selection": None, "_known_world": world, "_position": None, "_meter": None}

    @property
    def metadata(self) -> Metadata:
        """Metadata of the shards."""
        return self._store.metadata

    @property
    def md(self) -> Metadata:
        """Short for `metadata`."""
        return self._store.metadata

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.metadata.d_model

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.cfg.batch_size

    @property
    def drop_last(self) -> bool:
        """Whether a last batch that is not full is left out."""
        return self.cfg.drop_last

    @property
    def scale(self) -> float | None:
        """What activations are multiplied with; None for nothing."""
        return self._board.scale

    def metrics(self) -> dict[str, float]:
        """What the readers of this rank, here or in workers, did since the last call; see `Meter.read`."""
        if self._meter is None:
            self._meter = Meter(self._board)
        return self._meter.read(find_world(self._rank, self._world_size, self._known_world).rank)

    @property
    def n_batches(self) -> int:
        """Batches in an epoch, over all ranks, before padding."""
        n = self.n_samples
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def _stop(self, start: int, world_size: int) -> int:
        """End of the sequence of batches that all ranks yield equally many of, from `start` on."""
        left = max(0, self.n_batches - start)
        if self.drop_last:
            return start + left // world_size * world_size
        return start + -(-left // world_size) * world_size

    def is_over(self, batch_idx: int) -> bool:
        """Whether no batch of an epoch is left where `batch_idx` of them, over all ranks, have been yielded."""
        return self._stop(batch_idx, self.world_size) <= batch_idx

    def __len__(self) -> int:
        """Batches that this rank yields in an epoch."""
        world = find_world(self._rank, self._world_size, self._known_world)
        return self._stop(0, world.world_size) // world.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the ones after it count on from there.

        Raises:
            ConfigError: `epoch` is no integer from 0 on.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or not 0 <= epoch < 2**62:
            raise ConfigError(f"epoch: expected an integer from 0 on, got {epoch!r}; count epochs from 0.")
        self._earlier = self.digest
        self._position = self._resumed = None
        self._epochs.set(consumer_pid(), epoch, 0)

    def state_dict(self, n_batches: int | None = None, epoch: int | None = None) -> dict[str, Any]:
        """Where this data set stands, as a small dict of JSON's types.

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
        world = find_world(self._rank, self._world_size, self._known_world)
        current, start, in_workers = self._epochs.current(consumer_pid())
        if n_batches is None:
            if in_workers and (self._position is None or get_worker_info() is None):
                raise StateError(
                    "state_dict: expected n_batches, because workers make the batches and only the consumer knows how "
                    "many it took, got None; call state_dict(n_batches=...), or use ShuffledDataLoader or "
                    "OrderedDataLoader, which count."
                )
            position = self._position or self._resumed or self._next_position()
            return dump_state(self.metadata, self.cfg, position)
        for name, value in (("n_batches", n_batches), ("epoch", 0 if epoch is None else epoch)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
                raise ConfigError(f"{name}: expected an integer from 0 on, got {value!r}.")
        if epoch is not None:
            current, start = epoch, 0
        position = Position(
            current,
            start + n_batches * world.world_size,
            rank=world.rank,
            world_size=world.world_size,
            scale=self.scale,
        )
        return dump_state(self.metadata, self.cfg, position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where a state was taken, with any number of workers and ranks.

        Args:
            state: What `state_dict` returned.

        Raises:
            StateError: It is no state, of a newer version, or of other data or another config.
        """
        position = load_state(self.metadata, self.cfg, state)
        # What training began with counts, whatever the data say today.
        self._board.scale = position.scale
        world = find_world(self._rank, self._world_size, self._known_world)
        if (position.rank, position.world_size) != (world.rank, world.world_size):
            position = dataclasses.replace(
                position, digest=StreamDigest(), rank=world.rank, world_size=world.world_size
            )
        self._position, self._resumed, self._resumed_pid = None, position, os.getpid()
        if get_worker_info() is None:
            self._epochs.set(consumer_pid(), position.epoch, position.batch)

    @property
    def digest(self) -> StreamDigest:
        """Digest of the batches that were yielded in this process, and before the state that was loaded."""
        position = self._position or self._resumed
        return self._earlier if position is None else position.digest

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
        if not 0 <= batch_idx < self.n_batches:
            raise IndexError(f"batch {batch_idx} is out of range: there are {self.n_batches}, from 0.")
        plan, selection = self._plan(self._epoch_or_latest(epoch)), self._own_selection()
        examples, layers, tokens = selection.split(selection.cells(plan.locate(batch_idx)))
        found = {"example_idx": examples, "token_idx": tokens - selection.n_special}
        if selection.layer_is_all:
            found["layer"] = np.array(self.metadata.layers, dtype=np.int64)[layers]
        return {key: torch.from_numpy(column) for key, column in found.items()}

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
        md, selection = self.metadata, self._own_selection()
        token = token_idx + selection.n_special
        layer_idx = 0
        if selection.layer_is_all:
            layer_idx = md.layers.index(layer) if layer in md.layers else -1
        inside = 0 <= example_idx < md.n_examples and 0 <= token < md.tokens_per_example and layer_idx >= 0
        cell = (example_idx * selection.n_grid_layers + layer_idx) * md.tokens_per_example + token
        sample = int(selection.samples(np.array([cell], dtype=np.int64))[0]) if inside else -1
        if sample < 0:
            raise IndexError(
                f"example {example_idx}, token {token_idx}, layer {layer}: this selection has no such sample."
            )
        return self._plan(self._epoch_or_latest(epoch)).find(sample)

    @property
    def world_size(self) -> int:
        """Number of ranks, as far as it is known now."""
        return find_world(self._rank, self._world_size, self._known_world).world_size

    def begin_elsewhere(self) -> Position:
        """Settle where the next iteration begins, for a consumer whose workers make the batches.

        Returns:
            The place that `iter` of this data set, here or in workers, will begin at.
        """
        world = find_world(self._rank, self._world_size, self._known_world)
        epoch, start = self._epochs.next(consumer_pid())
        self._epochs.set(consumer_pid(), epoch, start)
        digest = self.digest
        self._resumed = None
        return Position(epoch, start, digest, world.rank, world.world_size, self.scale)

    def _next_position(self) -> Position:
        return Position(*self._epochs.next(consumer_pid()), scale=self.scale)

    def _epoch_or_latest(self, epoch: int | None) -> int:
        return self._epochs.current(consumer_pid())[0] if epoch is None else epoch

    def _own_selection(self) -> Selection:
        if self._selection is None:
            self._selection = self._select(self._store.clone())
        return self._selection

    def __iter__(self) -> Iterator[ActivationBatch]:
        # Not a generator itself: which epoch this is must be settled now, not at the first batch.
        info = get_worker_info()
        if info is None:
            worker, n_workers, session = 0, 1, None
        else:
            worker, n_workers, session = info.id, info.num_workers, info.seed - info.id
        # A forked worker inherits what was loaded in its parent, which has told all workers already.
        resumed = self._resumed if self._resumed_pid == os.getpid() else None
        self._resumed = None
        # A worker that loaded a state itself knows best; else the parent put the place where all workers find it.
        at = (resumed.epoch, resumed.batch) if resumed is not None and info is not None else None
        epoch, start = self._epochs.begin(consumer_pid(), session, worker, n_workers, at)
        world = find_world(self._rank, self._world_size, self._known_world)
        digest = self.digest if resumed is None else resumed.digest
        position = Position(epoch, start, digest, world.rank, world.world_size, self.scale)
        share = Share(
            first=start + world.rank + world.world_size * worker,
            stride=world.world_size * n_workers,
            stop=self._stop(start, world.world_size),
        )
        self._position = position
        return self._iterate(position, share)

    def _plan(self, epoch: int) -> OrderedPlan | ShufflePlan:
        raise TypeError(f"{type(self).__name__}: expected OrderedActivations or ShuffledActivations; use one of them.")

    def _engine_options(self, plan: OrderedPlan | ShufflePlan, share: Share) -> dict[str, Any]:
        return {"n_threads": _ORDERED_THREADS, "n_fills": 0}

    def _iterate(self, position: Position, share: Share) -> Iterator[ActivationBatch]:
        if share.first >= share.stop:
            return
        store = self._store.clone()
        labels = Labels(store)
        selection = self._own_selection().reading_with(labels.of_examples)
        plan = self._plan(position.epoch)
        if position.rank == 0:
            self._advise(plan, share)
        watch = Watch(self.cfg, position.epoch, position.batch, position.rank, share, self._board)
        with self._naming(position, share):
            options = EngineOptions(
                buffer_size=self.cfg.buffer_size,
                timeout_s=self.cfg.batch_timeout_s,
                is_only=position.epoch == 0,
                scale=position.scale,
                **self._engine_options(plan, share),
            )
            engine = Engine(labels, selection, plan, share, options)
        batch_idx = share.first
        try:
            while (opened := self._next_batch(engine, position, share)) is not None:
                watch.count(opened.size, engine.waits, engine.fill)
                batch = make_batch(opened, selection, self.batch_size)
                if position.scale is not None and not engine.is_scaled:
                    act = batch["act"].numpy()
                    np.multiply(act, np.float32(position.scale), out=act)
                # The caller alone decides how long the batch lives.
                del opened
                digest = position.digest.including(position.epoch, batch_idx, batch.digest)
                later = dataclasses.replace(position, batch=position.batch + share.stride, digest=digest)
                if self._position is position:
                    self._position = later
                position = later
                batch_idx += share.stride
                yield batch
                del batch
        finally:
            watch.stop()
            engine.close()

    def _next_batch(self, engine: Engine, position: Position, share: Share) -> OpenBatch | None:
        with self._naming(position, share):
            return engine.next_batch()

    @contextlib.contextmanager
    def _naming(self, position: Position, share: Share) -> Iterator[None]:
        """Let errors say which of many readers on many machines met them."""
        try:
            yield
        except SaevTorchError as err:
            info = get_worker_info()
            worker = "" if info is None else f"worker {info.id} of {info.num_workers}, "
            raise type(err)(
                f"{err} [rank {position.rank} of {position.world_size}, {worker}process {os.getpid()}, "
                f"epoch {position.epoch}, after batch {position.batch} of {share.stop}]"
            ) from err

    def _advise(self, plan: OrderedPlan | ShufflePlan, share: Share) -> None:
        """Say once if lanes are read by several readers, and what would avoid it."""
        if isinstance(plan, OrderedPlan) or plan.n_lanes % share.stride == 0 or plan.n_lanes < plan.max_lanes:
            return
        if self._epochs.first(0):
            good = [n for n in range(1, plan.n_lanes + 1) if plan.n_lanes % n == 0]
            _log.warning(
                "n_lanes: %d reading processes (ranks x workers) do not divide %d lanes, so each lane is read by "
                "several of them; the order is the same, at more reads. Use one of %s reading processes, or "
                "n_lanes=%d.",
                share.stride, plan.n_lanes, good, share.stride,
            )  # fmt: skip


class OrderedActivations(Activations):
    """Whole batches in file order.

    Args:
        cfg: What to read.
        rank: This rank; without it torch.distributed or the launcher's variables tell, when iterating.
        world_size: Number of ranks; given with `rank`.

    Attributes:
        cfg: The config.
        n_samples: Samples in the selection.

    Raises:
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
        ConfigError: The config asks for what these shards do not hold.
    """

    cfg: OrderedConfig

    def __init__(self, cfg: OrderedConfig, *, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__(cfg, cfg.shards, (), rank, world_size)

    def _plan(self, epoch: int) -> OrderedPlan:
        return OrderedPlan(self.n_samples, self.batch_size)


class ShuffledActivations(Activations):
    """Whole batches in a seeded random order, another in each epoch; see `saev_torch.order.shuffle`.

    Args:
        cfg: What to read.
        rank: This rank; without it torch.distributed or the launcher's variables tell, when iterating.
        world_size: Number of ranks; given with `rank`.

    Attributes:
        cfg: The config.
        n_samples: Samples in the selection.

    Raises:
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
        ConfigError: The config asks for what these shards do not hold.
    """

    cfg: ShuffledConfig

    def __init__(self, cfg: ShuffledConfig, *, rank: int | None = None, world_size: int | None = None) -> None:
        recorded = Metadata.load(cfg.shards).layers
        if cfg.layer == -1 and -1 not in recorded:
            raise ConfigError(
                f"ShuffledConfig.layer: expected one of the recorded layers {list(recorded)}, got -1, the default, "
                "which must be changed; choose a layer."
            )
        shards_dir = local_copy(cfg.shards) if cfg.use_tmpdir else cfg.shards
        super().__init__(cfg, shards_dir, cfg.ignore_labels, rank, world_size)
        if cfg.scale_norm:
            # Here, because all workers and epochs must have the same number.
            self._board.scale = compute_scale(dataclasses.replace(cfg, shards=shards_dir))
            # Compiled here, for all workers that are forked.
            find_scale_kernels()

    def _plan(self, epoch: int) -> ShufflePlan:
        cfg = self.cfg
        return ShufflePlan.make(
            self.n_samples, cfg.batch_size, cfg.buffer_size, cfg.n_lanes, cfg.block_size, cfg.seed, epoch
        )

    def _engine_options(self, plan: OrderedPlan | ShufflePlan, share: Share) -> dict[str, Any]:
        n_lanes = plan.n_lanes if isinstance(plan, ShufflePlan) else 1
        lanes_here = n_lanes // math.gcd(share.stride, n_lanes)
        lanes_here = min(lanes_here, len(range(share.first, share.stop, share.stride)))
        return {"n_threads": self.cfg.n_threads, "n_fills": math.ceil(self.cfg.min_buffer_fill * lanes_here)}
