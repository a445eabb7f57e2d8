"""Where the consumer of a data set stands.

A place behind the last batch of an epoch is the start of the next epoch, for whoever asks: so what is resumed is never
an epoch of which nothing is left. Only a worker of `DataLoader` does not know whether the others are as far; its own
place stays at the end.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import get_worker_info

from saev_torch.errors import ConfigError, SaevTorchError, StateError
from saev_torch.format.plain import as_plain
from saev_torch.format.rules import is_integer
from saev_torch.order.steps import Share
from saev_torch.processes.epochs import EpochCounter
from saev_torch.processes.launchers import announce
from saev_torch.processes.notices import Notices
from saev_torch.processes.page import is_spawning
from saev_torch.processes.world import Rank, World, check_world, consumer_pid, find_session, find_world
from saev_torch.resume.state import MAX_COUNT, Position, StreamDigest


class Iteration:
    """One iteration of a share of batches, as far as it has come; who hands its batches out counts them.

    Other workers hand out the rest where it `is_part` of an iteration; `is_resumed` says that it begins where a state
    was loaded. The digest is that of the `n_taken` batches that were handed out, and of what came before the iteration.
    Where they may come out of turn, it is not `in_order`; then each is counted by its own number.
    """

    in_order = True

    def __init__(self, start: Position, share: Share, is_part: bool = False, is_resumed: bool = False) -> None:
        self.start, self.share, self.is_part, self.is_resumed = start, share, is_part, is_resumed
        self.n_taken, self.digest, self.pid = 0, start.digest, os.getpid()
        # Numbers of those that came before their turn, and how many came in turn.
        self._early: set[int] = set()
        self._n_in_turn, self._is_numbered = 0, True

    def count(self, digest: int | None, number: int | None = None) -> None:
        """Count a batch that is handed out, by its `batch_digest`; None if what is handed out is no batch any more.

        Left out, its number is that of the batch whose turn it is.
        """
        self.n_taken += 1
        if number is None:
            number, self._is_numbered = self.next_number, False
        if digest is not None:
            self.digest = self.digest.including(self.start.epoch, number, digest)
        self._early.add(number)
        while self.next_number in self._early:
            self._early.remove(self.next_number)
            self._n_in_turn += 1

    @property
    def _batch(self) -> int:
        return self.start.batch + self._n_in_turn * self.share.stride

    @property
    def is_over(self) -> bool:
        """Whether all of its batches were handed out."""
        return self.next_number >= self.share.stop

    @property
    def n_left(self) -> int:
        """Batches of its share that were not handed out yet."""
        return len(range(self.share.first, self.share.stop, self.share.stride)) - self.n_taken

    @property
    def next_number(self) -> int:
        """Number of the batch whose turn it is."""
        return self.share.first + self._n_in_turn * self.share.stride

    @property
    def position(self) -> Position:
        """Where its next batch stands; a `StateError` where no place has before it just what was taken."""
        # Other ranks, or a `collate_fn` that leaves no number, may have taken others.
        is_unsure = bool(self._early) or self.start.world_size > 1 or not self._is_numbered
        if is_unsure and not self.in_order and self.n_taken and self._batch < self.share.stop:
            raise StateError(
                f"in_order: expected True for a state within an epoch, got False: {self.n_taken} batches were taken, "
                f"but perhaps not batch {self.next_number} of epoch {self.start.epoch}; make the loader with "
                "in_order=True, or save at the end of an epoch."
            )
        here = dataclasses.replace(self.start, batch=self._batch, digest=self.digest)
        return here.next_start() if here.batch >= self.share.stop and not self.is_part else here

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Let errors say which of many readers on many machines met them."""
        try:
            yield
        except SaevTorchError as err:
            info, start = get_worker_info(), self.start
            worker = "" if info is None else f"worker {info.id} of {info.num_workers}, "
            raise type(err)(
                f"{err} [rank {start.rank} of {start.world_size}, {worker}process {os.getpid()}, epoch {start.epoch}, "
                f"after batch {self._batch} of {self.share.stop}]"
            ) from err


class Cursor:
    """Where the consumer of a data set stands: whoever takes batches tells it, and whoever must know asks it.

    The epochs are counted for each process that consumes, and for it and its workers together. What a state said, and
    how far the latest iteration has come, is known in this process only. An epoch has `n_batches` over all ranks,
    before padding; with `drop_last` ranks leave out what is left for some of them only, instead of repeating batches.
    """

    def __init__(self, n_batches: int, drop_last: bool, rank: Rank = None, world_size: int | None = None) -> None:
        rank, world_size = as_plain(rank), as_plain(world_size)
        check_world(rank, world_size)
        self.n_batches, self._drop_last = n_batches, drop_last
        self._rank, self._world_size = rank, world_size
        self._known_world: World | None = None
        self._notices = Notices.of_process()
        self._epochs = EpochCounter()
        self._latest: Iteration | None = None
        self._loaded: Position | None = None
        self._loaded_pid = 0
        # Digest of what came before an epoch that was chosen.
        self._earlier = StreamDigest()
        # By threads of this process, what iterations that they begin are told; for a worker, by 0.
        self._told: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        told, world = self._find_told() if is_spawning() else None, self.world
        if is_spawning():
            # The logging of a worker that is spawned is not set up.
            announce(world, self._notices)
        kept = {} if told is None else {0: told}
        return {**self.__dict__, "_known_world": world, "_latest": None, "_told": kept}

    def _find_told(self) -> Any:
        return self._told.get(threading.get_ident(), self._told.get(0))

    @property
    def world(self) -> World:
        """Rank and number of ranks, as far as they are known now."""
        return find_world(self._rank, self._world_size, self._known_world)

    @property
    def scale(self) -> float | None:
        """What activations are multiplied with, here and in workers; None for nothing."""
        return self._epochs.scale

    @scale.setter
    def scale(self, value: float | None) -> None:
        self._epochs.scale = value

    @property
    def epoch(self) -> int:
        """Number of the latest epoch that has begun or was chosen."""
        return self._epochs.current(consumer_pid())[0]

    @property
    def has_begun(self) -> bool:
        """Whether an iteration has begun or was chosen, so that the next one is not the first by default only."""
        return self._epochs.has_begun(consumer_pid())

    @property
    def digest(self) -> StreamDigest:
        """Digest of the batches that were counted in this process, and before the state that was loaded."""
        if self._latest is not None:
            return self._latest.digest
        return self._earlier if self._loaded is None else self._loaded.digest

    @property
    def is_chosen(self) -> bool:
        """Whether the next iteration was chosen, by an epoch or a state, and has not begun; or none has yet."""
        return self._latest is None

    def may_say(self, key: str) -> bool:
        """Whether this is the first call with `key` in the process that consumes, its workers, and their data sets."""
        return self._notices.may_say(key)

    def end(self, start: int = 0) -> int:
        """End of the sequence of batches that all ranks yield equally many of, from `start` on."""
        world_size, left = self.world.world_size, max(0, self.n_batches - start)
        return start + (left // world_size if self._drop_last else -(-left // world_size)) * world_size

    def position(self) -> Position:
        """Where the next batch that the consumer takes stands; a `StateError` if only workers could tell."""
        if self._is_elsewhere():
            raise StateError(
                "state_dict: expected n_batches, because workers make the batches and only the consumer knows how "
                "many it took, got None; call state_dict(n_batches=...), or use ShuffledDataLoader or "
                "OrderedDataLoader, which count."
            )
        if self._latest is not None:
            return self._latest.position
        return self._loaded or self._make(*self._epochs.next(consumer_pid()))

    def _is_elsewhere(self) -> bool:
        """Whether workers make the batches, of which this process does not know how many were taken."""
        *place, in_workers = self._epochs.current(consumer_pid())
        latest, in_worker = self._latest, get_worker_info() is not None
        if latest is None or in_worker:
            return in_workers and latest is None
        # A child that is forked may begin where its parent did.
        return in_workers and (latest.pid, latest.start.place) != (os.getpid(), tuple(place))

    def n_left(self, latest: Iteration | None = None) -> int:
        """Batches that this rank has still to take of the epoch that `latest`, else the latest iteration, is in.

        After the last of them it is the number of the next epoch's. A `StateError` if only workers could tell.
        """
        if latest is None and self._is_elsewhere():
            raise StateError(
                "n_batches_left: expected a count of what was taken, but workers make the batches and only the "
                "consumer knows; subtract what it took from len(), or use ShuffledDataLoader or OrderedDataLoader, "
                "which count."
            )
        latest = latest or self._latest
        if latest is not None and (latest.n_left or latest.is_part):
            return latest.n_left
        start = 0 if latest is not None else self.position().batch
        return (self.end(start) - start) // self.world.world_size

    def position_after(self, n_batches: int, epoch: int | None = None) -> Position:
        """Where the batch after those that this rank has taken stands; their digest is not known.

        They are counted since the latest iteration began, or from the start of the epoch that is given.
        """
        current, start, _ = self._epochs.current(consumer_pid())
        if epoch is not None:
            current, start = _check_count("epoch", epoch), 0
        batch = start + _check_count("n_batches", n_batches) * self.world.world_size
        return self._settle(dataclasses.replace(self._make(current, batch), digest=StreamDigest()))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the ones after it count on from there."""
        self._epochs.set(consumer_pid(), _check_count("epoch", epoch), 0)
        self._earlier = self.digest
        self._latest = self._loaded = None

    def load(self, position: Position) -> None:
        """Let the next iteration begin at a place; it holds until a batch is taken."""
        # What training began with counts, whatever the data say today.
        self.scale = position.scale
        rank, world_size = self.world.rank, self.world.world_size
        if (position.rank, position.world_size) != (rank, world_size):
            position = dataclasses.replace(position, digest=StreamDigest(), rank=rank, world_size=world_size)
        if get_worker_info() is None:
            position = self._settle(position)
            self._epochs.set(consumer_pid(), *position.place)
        self._latest, self._loaded, self._loaded_pid = None, position, os.getpid()

    def begin(self) -> Iteration:
        """Begin an iteration in this process, or this worker's part of one."""
        info, pid, told = get_worker_info(), consumer_pid(), self._find_told()
        if told is not None:
            part = () if info is None else (info.id, info.num_workers)
            return self._start(int(told["epoch"]), int(told["start"]), *part)
        self._hold()
        if info is None:
            return self._start(*self._epochs.begin(pid, None, 0))
        # A worker that loaded a state itself knows best; else the parent put the place where all workers find it. A
        # forked worker inherits what was loaded in its parent, which has told all workers already.
        at = self._loaded.place if self._loaded is not None and self._loaded_pid == os.getpid() else None
        found = self._epochs.begin(pid, find_session(info), info.id, at)
        return self._start(*found, info.id, info.num_workers)

    def begin_elsewhere(self) -> Iteration:
        """Begin an iteration whose batches are counted here, whichever process makes them; `telling` tells that one."""
        self._hold()
        return self._start(*self._epochs.begin(consumer_pid(), None, 0))

    @contextlib.contextmanager
    def telling(self, place: Any) -> Iterator[None]:
        """Let iterations that this thread begins, and all of processes that it starts, begin at `place`.

        It has `epoch` and `start`. A `SharedPage` of `PLACE` also tells workers that have been started before.
        """
        self._told[threading.get_ident()] = place
        try:
            yield
        finally:
            del self._told[threading.get_ident()]

    def follow(self, iteration: Iteration) -> None:
        """Stand where an iteration does."""
        self._latest = iteration

    def _hold(self) -> None:
        """Let the next iteration begin where the latest did, if a state was loaded for that and no batch was taken."""
        # torchdata's loader begins an iteration to restore a state, and another one if the state is that of an end.
        latest = self._latest
        if latest is None or not latest.is_resumed or latest.n_taken or get_worker_info() is not None:
            return
        if self._epochs.current(consumer_pid())[:2] == latest.start.place:
            self.load(latest.start)

    def _start(self, epoch: int, batch: int, worker: int = 0, n_workers: int = 1) -> Iteration:
        announce(self.world, self._notices)
        start, loaded = self._make(epoch, batch), self._loaded
        first = batch + start.rank + start.world_size * worker
        share = Share(first, start.world_size * n_workers, self.end(batch))
        is_resumed = loaded is not None and loaded.place == start.place
        self._loaded = None
        self._latest = Iteration(start, share, get_worker_info() is not None, is_resumed)
        return self._latest

    def _make(self, epoch: int, batch: int) -> Position:
        world = self.world
        return Position(epoch, batch, self.digest, world.rank, world.world_size, self.scale)

    def _settle(self, position: Position) -> Position:
        return position.next_start() if self.end(position.batch) <= position.batch else position


def _check_count(name: str, value: int) -> int:
    count = as_plain(value)
    if not is_integer(count, 0, MAX_COUNT):
        raise ConfigError(f"{name}: expected an integer from 0 on, got {value!r}; count from 0.")
    return int(count)
