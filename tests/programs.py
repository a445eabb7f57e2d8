"""Random short programs of what users do around a loader, against a model of what they were promised.

    python tests/programs.py --n 10000 --seed 0 --minutes 30

A program is a list of steps. Numbers in a step choose among what there is then, modulo how many, so that a program is
still one when steps are left out: of one that fails, the shortest that still does is printed, and
`--program '[...]'` runs it. Programs run one after another in processes of their own, some in each, with a time limit.

The model is small and slow. The values come from numpy over the whole tensor, the order from one plain iteration
without workers, for each config and epoch (the sequence C). `Count`, `Run` and `Source` say which batch is
next, what a state says, and which errors are due. Anything else that is seen, and whatever is left when a program is
over, is a `Difference`.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import errno
import faulthandler
import fcntl
import gc
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import select
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contracts
import factory
import numpy as np
import torch
from conftest import FOREIGN_WARNINGS, Resources
from torch.utils.data import DataLoader

from saev_torch import (
    EndedError,
    IndexedConfig,
    IndexedDataset,
    OrderedActivations,
    OrderedConfig,
    OrderedDataLoader,
    ReadError,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    StateError,
)
from saev_torch.processes.notices import Notices
from saev_torch.processes.undone import make_up
from saev_torch.reading import engine, gather
from saev_torch.reading.watch import find_watch

SPECS = {
    "small": factory.Spec(n_examples=20, content_tokens=6, cls=True, layers=(3, 7), d_model=8, examples_per_shard=4),
    "wide": factory.Spec(n_examples=48, content_tokens=8, cls=False, layers=(0, 5), d_model=16, examples_per_shard=13),
}
CONFIGS: tuple[tuple[str, type[Any], dict[str, Any]], ...] = (
    ("small", ShuffledConfig, {"layer": 3, "batch_size": 16, "buffer_size": 4}),
    ("small", ShuffledConfig, {"layer": 7, "batch_size": 11, "buffer_size": 2, "n_lanes": 2, "drop_last": True}),
    ("wide", ShuffledConfig, {"layer": "all", "batch_size": 64, "buffer_size": 8}),
    ("small", OrderedConfig, {"layer": 3, "batch_size": 12}),
    ("wide", OrderedConfig, {"layer": "all", "tokens": "all", "batch_size": 100, "drop_last": True}),
    ("small", ShuffledConfig, {"layer": (3, 7), "tokens": "all", "batch_size": 30, "ignore_labels": [0, 5]}),
    ("small", ShuffledConfig, {"layer": 3, "tokens": "special", "batch_size": 7}),
    ("small", ShuffledConfig, {"layer": 7, "batch_size": 40, "min_buffer_fill": 1.0, "n_threads": 1, "n_lanes": 3}),
    ("wide", ShuffledConfig, {"layer": 5, "batch_size": 32, "buffer_size": 3, "scale_norm": True, "n_threads": 2}),
)
INDEXED = (("small", {"layer": 3}), ("wide", {"layer": "all"}), ("small", {"layer": "all", "tokens": "all"}))
RANKS = ((0, 1), (0, 1), (0, 1), (0, 2), (1, 2), (2, 3), (1, 8))
CHILD_S = 100.0
"""How long a child or a thread of a program may take; nothing that works takes a hundredth of it."""
PROGRAM_S = 150.0

Place = tuple[int, int]
"""Epoch, and how many batches of it came before, over all ranks."""
Step = list[Any]
Arrays = dict[str, np.ndarray]


class Difference(AssertionError):
    """What was seen is not what the model says."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Difference(message)


# The oracle


class Truth:
    """What the batches of a config hold, by epoch and number."""

    def __init__(self, spec: factory.Spec, cfg: contracts.Config) -> None:
        self.cfg, self.samples = cfg, contracts.expected_for(spec, cfg)
        data_set = self._make()
        self.n_batches, self.scale = data_set.n_batches, data_set.scale
        if self.scale is not None:
            acts = self.samples.columns["act"]
            right = math.sqrt(spec.d_model) / np.linalg.norm(acts.astype(np.float64), axis=1).mean()
            require(abs(self.scale / right - 1) < 1e-6, f"scale: {self.scale} instead of {right}")
        self._epochs: dict[int, list[np.ndarray]] = {}

    def _make(self) -> Any:
        kind = OrderedActivations if isinstance(self.cfg, OrderedConfig) else ShuffledActivations
        return kind(self.cfg, rank=0, world_size=1)

    def rows(self, epoch: int) -> list[np.ndarray]:
        """Return which samples each batch of an epoch holds."""
        if epoch not in self._epochs:
            data_set, cfg = self._make(), self.cfg
            data_set.set_epoch(epoch)
            batches = list(data_set)
            rows = [contracts.find_rows([batch], self.samples) for batch in batches]
            n, size = len(self.samples), cfg.batch_size
            sizes = [size] * (n // size) + ([n % size] if n % size and not cfg.drop_last else [])
            whole = np.concatenate(rows)
            require([len(part) for part in rows] == sizes, f"epoch {epoch} has other batches than full ones")
            require(len(np.unique(whole)) == len(whole) and whole.min() >= 0, f"epoch {epoch} repeats samples")
            is_sorted = whole.tolist() == list(range(len(whole)))
            require(is_sorted or not isinstance(cfg, OrderedConfig), f"epoch {epoch} is not in order")
            for batch, part in zip(batches, rows, strict=True):
                compare(arrays(batch), self._values(part), f"epoch {epoch} of the oracle")
            self._epochs[epoch] = rows
        return self._epochs[epoch]

    def _values(self, rows: np.ndarray) -> Arrays:
        found = {key: column[rows] for key, column in self.samples.columns.items()}
        if self.scale is not None:
            found["act"] = found["act"] * np.float32(self.scale)
        return {key: array.astype(np.float32 if key == "act" else np.int64) for key, array in found.items()}

    def batch(self, epoch: int, number: int) -> Arrays:
        """Return the values of a batch of the padded sequence."""
        return self._values(self.rows(epoch)[number % self.n_batches])


def arrays(batch: Any) -> Arrays:
    return {key: value.numpy() for key, value in batch.items()}


def compare(got: Arrays, wanted: Arrays, what: str) -> None:
    """Check that all bits are the same."""
    require(set(got) == set(wanted), f"{what}: keys {sorted(got)} instead of {sorted(wanted)}")
    for key, right in wanted.items():
        array = got[key]
        same_kind = (array.dtype, array.shape) == (right.dtype, right.shape)
        require(same_kind, f"{what}: {key} is {array.dtype} {array.shape} instead of {right.dtype} {right.shape}")
        if array.tobytes() != right.tobytes():
            rows = np.flatnonzero((array.reshape(len(array), -1) != right.reshape(len(right), -1)).any(axis=1))
            raise Difference(f"{what}: {key} differs in rows {rows.tolist()}")


# The model


@dataclasses.dataclass(eq=False)
class Count:
    """Which epoch is next for a data set, its shallow copies and its loaders.

    An epoch or a state is chosen, or an iteration has begun. A copy, and a forked child, has one of its own: the copy
    goes on from there, the child from what was chosen last.
    """

    place: Place = (0, 0)
    chosen: Place = (0, 0)
    is_chosen: bool = True
    is_state: bool = False
    in_workers: bool = False
    latest: "Run | None" = None

    def following(self) -> Place:
        return self.place if self.is_chosen else (self.place[0] + 1, 0)

    def choose(self, place: Place, is_state: bool) -> None:
        self.place = self.chosen = place
        self.is_chosen, self.is_state, self.in_workers, self.latest = True, is_state, False, None

    def copied(self) -> "Count":
        return dataclasses.replace(self, in_workers=False, latest=None)

    def enter_child(self) -> None:
        self.place, self.is_chosen, self.in_workers = self.chosen, True, False


@dataclasses.dataclass(eq=False)
class Source:
    """Something that can be iterated: a data set, a plain loader of one, or a ready-made loader."""

    real: Any
    kind: str
    truth: Truth
    count: Count
    rank: int = 0
    world: int = 1
    workers: int = 0
    persistent: bool = False
    counted: "Run | None" = None
    runs: list["Run"] = dataclasses.field(default_factory=list)
    is_unsure: bool = False
    """Whether its latest start was interrupted, so that it may count as begun."""

    @property
    def data_set(self) -> Any:
        return self.real if self.kind == "set" else self.real.dataset

    @property
    def is_foreign(self) -> bool:
        """Whether torch alone looks after its workers."""
        return self.kind == "plain" and self.workers > 0

    def end(self, start: int) -> int:
        left = max(0, self.truth.n_batches - start)
        n = left // self.world if self.truth.cfg.drop_last else -(-left // self.world)
        return start + n * self.world

    def settle(self, place: Place) -> Place:
        """The same place, but behind the last batch that of the next epoch."""
        return (place[0] + 1, 0) if place[1] and self.end(place[1]) <= place[1] else place

    def begin(self) -> "Run":
        """Say what an iteration that begins now is."""
        count, latest = self.count, self.count.latest
        # A place that was loaded holds until a batch is taken, where the process knows.
        holds = latest is not None and latest.is_resumed and not latest.n_taken and count.place == latest.start
        if holds and latest is not None and not self.is_foreign:
            count.choose(latest.start, is_state=True)
        place, is_resumed = count.following(), count.is_chosen and count.is_state
        run = Run(self, place, is_resumed)
        count.place, count.is_chosen, count.in_workers = place, False, self.is_foreign
        if not self.is_foreign:
            count.latest = run
        if self.kind == "ready":
            self.counted, self.is_unsure = run, False
        return run

    def state(self) -> Place | None:
        """Say where it stands; None where only the consumer can know."""
        count = self.count
        if self.kind == "ready" and self.counted is not None and count.latest is not None:
            return self.counted.place
        if count.in_workers:
            return None
        return count.following() if count.latest is None else count.latest.place


@dataclasses.dataclass(eq=False)
class Run:
    """One iteration: `status` is open, over, failed with one of the errors of `due`, or in doubt after an interrupt."""

    source: Source
    start: Place
    is_resumed: bool
    real: Any = None
    n_taken: int = 0
    status: str = "open"
    due: tuple[type[Exception], ...] = ()
    thread: int | None = None
    pid: int = dataclasses.field(default_factory=os.getpid)

    @property
    def number(self) -> int:
        return self.start[1] + self.source.rank + self.n_taken * self.source.world

    @property
    def is_complete(self) -> bool:
        return self.number >= self.source.end(self.start[1])

    @property
    def place(self) -> Place:
        epoch, batch = self.start[0], self.start[1] + self.n_taken * self.source.world
        return (epoch + 1, 0) if batch and batch >= self.source.end(self.start[1]) else (epoch, batch)


@dataclasses.dataclass(eq=False)
class Kept:
    """Something that the user holds, how to look at it, and what must be seen."""

    held: Any
    look: Callable[[Any], Arrays]
    wanted: Arrays
    name: str
    is_shared: bool
    """Whether a forked child sees what its parent writes to it."""
    is_batch: bool

    def check(self) -> None:
        compare(self.look(self.held), self.wanted, f"kept {self.name}")


def _views(batch: Any) -> list[tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]]:
    """Ways to keep a part of `act`: what is held, how to look at it, and the same of the right values."""
    act = batch["act"]
    return [
        (act[2:5], lambda held: held.numpy(), lambda right: right[2:5]),
        (act.numpy()[::2], lambda held: held, lambda right: right[::2]),
        (act.transpose(0, -1), lambda held: held.transpose(0, -1).numpy(), lambda right: right),
        (act.untyped_storage(), lambda held: _of_storage(held, act.shape), lambda right: right),
        (memoryview(act.numpy()), np.asarray, lambda right: right),
    ]


def _of_storage(storage: Any, shape: Any) -> np.ndarray:
    n = math.prod(shape)
    return torch.empty(0, dtype=torch.float32).set_(storage, 0, (n,)).numpy().reshape(shape)


HOW = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


class Alarm:
    """A real SIGINT to this process after a time, that is heard only where it is wanted."""

    def __init__(self) -> None:
        self.is_armed, self.n_heard = False, 0
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        if self.is_armed:
            # Here, because Python drops what is raised in a finalizer.
            self.is_armed, self.n_heard = False, self.n_heard + 1
            raise KeyboardInterrupt

    def during(self, work: Callable[[], Any], delay_s: float) -> BaseException | None:
        """Do some work; the interrupt, if it came in time."""
        try:
            self.is_armed = True
            signal.setitimer(signal.ITIMER_REAL, delay_s)
            work()
            self.is_armed = False
        except (KeyboardInterrupt, RuntimeError) as err:
            # Python's own `Condition.wait` may let go of its lock once too often then.
            if not isinstance(err, KeyboardInterrupt) and not isinstance(err.__context__, KeyboardInterrupt):
                raise
            return err
        finally:
            self.is_armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return None


@dataclasses.dataclass
class Environment:
    """What all programs of a process share."""

    truths: list[Truth]
    indexed: list[tuple[factory.Spec, IndexedConfig, contracts.Samples]]
    alarm: Alarm | None = None

    @classmethod
    def make(cls, root: Path) -> "Environment":
        shards = {name: factory.make_shards(root / name, spec) for name, spec in SPECS.items()}
        truths = [Truth(SPECS[name], kind(shards=shards[name], **fields)) for name, kind, fields in CONFIGS]
        for truth in truths:
            for epoch in range(6):
                truth.rows(epoch)
        indexed = []
        for name, fields in INDEXED:
            samples = contracts.expected(SPECS[name], fields.get("tokens", "content"), fields["layer"])
            indexed.append((SPECS[name], IndexedConfig(shards=shards[name], **fields), samples))
        return cls(truths, indexed)


class World:
    """Runs the steps of a program, and knows what must be seen.

    A thread of a program has a world of its own; a forked child goes on in a copy of its parent's.
    """

    def __init__(self, env: Environment, is_main: bool = True) -> None:
        self.env, self.is_main, self.is_child = env, is_main, False
        self.sources: list[Source] = []
        self.runs: list[Run] = []
        self.kept: list[Kept] = []
        self.states: list[tuple[int, dict[str, Any]]] = []
        self.errors: list[BaseException] = []
        self.children: list[tuple[Any, int, int]] = []
        self.threads: list[tuple[threading.Thread, World, list[BaseException]]] = []
        self.graveyard: list[Any] = []

    # How a program runs

    def run(self, steps: list[Step]) -> None:
        for i, (name, *args) in enumerate(steps):
            try:
                getattr(self, f"do_{name}")(*args)
            except Exception as err:
                where = f"step {i}: {[name, *args]}: "
                if isinstance(err, Difference):
                    raise Difference(where + str(err)) from err
                raise Difference(f"{where}{type(err).__name__}: {err}") from err

    def finish(self) -> None:
        """Wait for children and threads, and look at all that was kept once more."""
        self.do_join()
        self.check_kept()

    def check_kept(self) -> None:
        for kept in self.kept:
            kept.check()

    def drop(self) -> None:
        # First, because what its traceback keeps is ended late, by the garbage collector.
        self.errors.clear()
        for run in tuple(self.runs):
            self._let_go(run)
        for source in tuple(self.sources):
            self._let_go_source(source)
        for held in (self.kept, self.states):
            held.clear()

    def _let_go(self, run: Run) -> None:
        """Drop an iterator at once, as a user does: the model still knows its iteration."""
        self.runs.remove(run)
        if run in run.source.runs:
            run.source.runs.remove(run)
        if self.is_child and run.source.is_foreign:
            # Torch would end the workers of the parent.
            self.graveyard.append(run.real)
        run.real = None

    def _let_go_source(self, source: Source) -> None:
        self.sources.remove(source)
        if self.is_child and source.is_foreign:
            self.graveyard.append(source.real)
        source.real = None

    def _pick(self, held: list[Any], number: int) -> Any:
        return held[number % len(held)] if held else None

    # Sources

    def do_make(self, number: int, kind: str, workers: int, persistent: bool, ranks: int) -> None:
        truth, (rank, world) = self.env.truths[number % len(CONFIGS)], RANKS[ranks % len(RANKS)]
        is_ordered = isinstance(truth.cfg, OrderedConfig)
        options: dict[str, Any] = {} if world == 1 else {"rank": rank, "world_size": world}
        persistent = persistent and workers > 0
        if kind == "ready":
            make: Any = OrderedDataLoader if is_ordered else ShuffledDataLoader
            real = make(truth.cfg, num_workers=workers, persistent_workers=persistent, **options)
        else:
            make = OrderedActivations if is_ordered else ShuffledActivations
            real = make(truth.cfg, **options)
        source = Source(real, "ready" if kind == "ready" else "set", truth, Count(), rank, world)
        if kind == "ready":
            source.workers, source.persistent = workers, persistent
        self.sources.append(source)
        if kind == "plain":
            self.do_plain(-1, workers, persistent)

    def do_plain(self, s: int, workers: int, persistent: bool) -> None:
        """A plain `DataLoader` on a data set that may have other consumers."""
        source = self._pick(self.sources, s)
        if source is None:
            return
        persistent = persistent and workers > 0
        options: dict[str, Any] = {"batch_size": None} if workers % 2 else {}
        real = DataLoader(source.data_set, num_workers=workers, persistent_workers=persistent, **options)
        more = {"workers": workers, "persistent": persistent, "counted": None, "runs": []}
        self.sources.append(dataclasses.replace(source, real=real, kind="plain", **more))

    def do_look(self, s: int) -> None:
        """Take the data set out of a loader."""
        source = self._pick(self.sources, s)
        if source is not None:
            more = {"workers": 0, "persistent": False, "counted": None, "runs": []}
            self.sources.append(dataclasses.replace(source, real=source.data_set, kind="set", **more))

    def do_copy(self, s: int, how: str) -> None:
        source = self._pick(self.sources, s)
        # torch's own loader cannot be copied while its persistent workers run, which it keeps when a run is dropped.
        if source is None or (source.kind == "plain" and source.real._iterator is not None):
            return
        count = source.count if how == "copy" else source.count.copied()
        self.sources.append(dataclasses.replace(source, real=HOW[how](source.real), count=count, counted=None, runs=[]))

    def do_length(self, s: int) -> None:
        source = self._pick(self.sources, s)
        if source is not None:
            require(len(source.real) == source.end(0) // source.world, f"len: {len(source.real)}")
            if source.kind != "plain":
                repr(source.real), source.real.metrics()

    def do_drop_source(self, s: int) -> None:
        source = self._pick(self.sources, s)
        if source is not None:
            self._let_go_source(source)

    # Epochs and states

    def do_set_epoch(self, s: int, epoch: int) -> None:
        source = self._pick(self.sources, s)
        if source is not None:
            source.data_set.set_epoch(epoch) if source.kind == "plain" else source.real.set_epoch(epoch)
            source.count.choose((epoch, 0), is_state=False)

    def do_save(self, s: int) -> None:
        source = self._pick(self.sources, s)
        # Where an interrupted start and another iteration came after each other, it may tell of either.
        if source is not None and (source.count.is_chosen or not source.is_unsure):
            owner = source.data_set if source.kind == "plain" else source.real
            self._save(source, owner.state_dict, source.state())

    def do_save_counted(self, r: int) -> None:
        """The state that a user of a plain loader asks for, who counts."""
        run = self._pick(self.runs, r)
        if run is None or run.source.real is None:
            return
        source, count = run.source, run.source.count
        epoch = None if count.place == run.start and not count.is_chosen else run.start[0]
        if epoch is None or run.start[1] == 0:
            wanted = source.settle((run.start[0], run.start[1] + run.n_taken * source.world))
            self._save(source, lambda: source.data_set.state_dict(run.n_taken, epoch), wanted)

    def _save(self, source: Source, save: Callable[[], dict[str, Any]], wanted: Place | None) -> None:
        try:
            state = json.loads(json.dumps(save()))
        except StateError as err:
            require(wanted is None, f"state {wanted} was refused: {err}")
            return
        got = state["epoch"], state["batch"]
        require(got == wanted, f"state: {got} instead of {wanted}")
        require((state["rank"], state["world_size"]) == (source.rank, source.world), f"state: of another rank: {state}")
        self.states.append((self.env.truths.index(source.truth), state))

    def do_load(self, s: int, t: int) -> None:
        source, saved = self._pick(self.sources, s), self._pick(self.states, t)
        if source is None or saved is None:
            return
        number, state = saved
        owner = source.data_set if source.kind == "plain" else source.real
        if number != self.env.truths.index(source.truth):
            before = source.state()
            with contextlib.suppress(StateError):
                owner.load_state_dict(state)
                raise Difference("the state of another config was loaded")
            require(source.state() == before, "a state that was refused moved the source")
            return
        owner.load_state_dict(state)
        source.count.choose(source.settle((state["epoch"], state["batch"])), is_state=True)

    def do_resume(self, t: int, kind: str, workers: int, persistent: bool, ranks: int) -> None:
        """A new source, perhaps of another kind, at a state."""
        if self.states:
            number = self._pick(self.states, t)[0]
            self.do_make(number, kind, workers, persistent, ranks)
            self.do_load(len(self.sources) - 1, t)

    # Iterations

    def do_iter(self, s: int) -> None:
        self._iter(self._pick(self.sources, s))

    def _iter(self, source: Source | None) -> Run | None:
        if source is None:
            return None
        unfinished = list(source.runs)
        if source.persistent and source.kind == "plain":
            # For torch the same iterator begins again.
            for run in unfinished:
                self._let_go(run)
            unfinished = []
        real = iter(source.real)
        run = source.begin()
        run.real = real
        if source.persistent and source.kind == "ready":
            for other in unfinished:
                if other.status in ("over", "failed"):
                    continue
                if other.status != "doubt":
                    other.status, other.due = ("over", ()) if other.is_complete else ("failed", (EndedError,))
                else:
                    other.status, other.due = "failed", (EndedError, StopIteration)
        source.runs = [*unfinished, run]
        self.runs.append(run)
        if source.is_foreign:
            # Its workers settle the epoch some time before the first batch comes.
            self._take(run)
        return run

    def do_take(self, r: int, n: int, keep: int) -> None:
        run = self._pick(self.runs, r)
        for _ in range(n if run is not None else 0):
            self._take(run, keep)

    def do_take_in_thread(self, r: int, n: int) -> None:
        run = self._pick(self.runs, r)
        if run is not None:
            self._in_thread(lambda: [self._take(run) for _ in range(n)])

    def _in_thread(self, work: Callable[[], Any]) -> None:
        errors: list[BaseException] = []

        def guarded() -> None:
            try:
                work()
            except BaseException as err:  # noqa: BLE001 -- raised below
                errors.append(err)

        thread = threading.Thread(target=guarded)
        thread.start()
        thread.join(CHILD_S)
        require(not thread.is_alive(), "a thread hangs")
        if errors:
            raise errors[0]

    def _due(self, run: Run) -> tuple[type[Exception], ...] | None:
        """Errors that are due for who asks for the next batch; StopIteration at the end, None where a batch is due."""
        if run.status == "over":
            return (StopIteration,)
        if run.status == "failed":
            return run.due
        if run.pid != os.getpid() and run.thread is not None:
            # The threads that read are the parent's. One of which nothing was taken begins here.
            return (ReadError,)
        return (StopIteration,) if run.is_complete else None

    def _take(self, run: Run, keep: int = 0) -> bool:
        """Take a batch, check it, and keep it in some way; whether one came."""
        due = self._due(run)
        try:
            batch = next(run.real)
        except Exception as err:  # noqa: BLE001 -- compared with what is due
            is_due = due is not None and isinstance(err, due)
            if run.status == "doubt":
                # A generator that was interrupted is over; a ready-made loader says what has happened.
                is_due = is_due or isinstance(
                    err, (EndedError, RuntimeError) if run.source.kind == "ready" else StopIteration
                )
            place = f"{run.start}, {run.n_taken} taken, {run.status}"
            require(is_due, f"{type(err).__name__}: {err}; due was {due or 'a batch'} ({place})")
            run.status = "over" if isinstance(err, StopIteration) or run.source.kind != "ready" else "failed"
            run.due = (type(err),)
            return False
        require(due is None, f"got batch {batch.number} after {run.n_taken} of {run.start}; due was {due}")
        self._receive(run, batch, keep)
        run.thread = threading.get_ident()
        return True

    def _receive(self, run: Run, batch: Any, keep: int) -> None:
        epoch, number = run.start[0], run.number
        what = f"batch {number} of epoch {epoch} from {run.source.kind}, {run.source.workers} workers"
        require(batch.number == number, f"{what}: got number {batch.number}")
        right = run.source.truth.batch(epoch, number)
        compare(arrays(batch), right, what)
        if run.thread is None:
            # Begun by whoever takes the first batch.
            run.pid = os.getpid()
        run.n_taken += 1
        self._keep(batch, right, f"{what}, in way {keep}", keep, run.source.workers > 0)

    def do_drain(self, r: int, keep: int) -> None:
        run = self._pick(self.runs, r)
        while run is not None and self._take(run, keep):
            pass

    def do_epoch(self, s: int, n: int, keep: int, end: str) -> None:
        """A loop that ends by itself, breaks, or raises, in which case the user may keep the error."""
        run = self._iter(self._pick(self.sources, s))
        if run is None:
            return
        while run.n_taken < n or n >= 12:
            if not self._take(run, keep):
                break
        if end == "raise":
            self._keep_error(run.real)
        if end != "hold":
            self._let_go(run)

    def _keep_error(self, iterator: Any) -> None:
        try:
            self._fail(iterator)
        except ValueError as err:
            self.errors.append(err)

    @staticmethod
    def _fail(iterator: Any) -> None:
        raise ValueError(f"in a training step on a {type(iterator).__name__}")

    def do_forget_errors(self) -> None:
        self.errors.clear()

    def do_drop_run(self, r: int) -> None:
        run = self._pick(self.runs, r)
        if run is not None:
            self._let_go(run)

    def do_close(self, r: int) -> None:
        """Close the generator that a data set gave."""
        run = self._pick(self.runs, r)
        if run is not None and run.source.kind == "set":
            run.real.close()
            run.status = "over"

    def do_shutdown(self, s: int, in_thread: bool) -> None:
        source = self._pick(self.sources, s)
        if source is None or source.kind != "ready":
            return
        callers: list[int] = []
        call: Callable[[], Any] = lambda: (callers.append(threading.get_ident()), source.real.shutdown())  # noqa: E731
        self._in_thread(call) if in_thread else call()
        for run in source.runs:
            if run.status in ("open", "doubt"):
                is_foreign = run.thread not in (None, callers[0]) and not run.is_complete
                errors = (EndedError, StopIteration) if run.status == "doubt" else (EndedError,)
                is_failure = is_foreign or run.status == "doubt"
                run.status, run.due = ("failed", errors) if is_failure else ("over", ())
        source.runs = []

    def do_interrupt(self, r: int, n: int, delay_us: int, keep_error: bool) -> None:
        run = self._pick(self.runs, r)
        # What torch does with its workers then is its own.
        if run is None or self.env.alarm is None or run.source.is_foreign or run.status != "open" or self._due(run):
            return
        received: list[Any] = []
        # So nothing of this program comes between the batch and its place in the list.
        take = collections.deque(itertools.repeat(None, n))

        def work() -> None:
            for _ in take:
                n_before = len(received)
                received.extend(itertools.islice(run.real, 1))
                if len(received) == n_before:
                    break

        err = self.env.alarm.during(work, delay_us / 1e6)
        if received or err is not None:
            run.thread = threading.get_ident()
        for batch in received:
            self._receive(run, batch, 0)
        if err is None:
            if len(received) < n:
                require(run.is_complete, f"ended after {run.n_taken} batches")
                run.status = "over"
            return
        if keep_error:
            self.errors.append(err)
        self._settle_after(run)

    def _settle_after(self, run: Run) -> None:
        """Behind an interrupt the batch that was on its way may count as taken, and what torch does is its own."""
        if run.source.real is None:
            self._let_go(run)
        elif run.source.kind == "plain":
            self._let_go(run)
            run.source.count.choose((0, 0), is_state=False)
            run.source.data_set.set_epoch(0)
        else:
            run.status = "doubt"
            if run.source.state() == run.place:
                run.n_taken += self._counts_one_more(run)

    def _counts_one_more(self, run: Run) -> bool:
        state = run.source.real.state_dict()
        got = state["epoch"], state["batch"]
        if got == run.place:
            return False
        run.n_taken += 1
        one_more = run.place
        run.n_taken -= 1
        require(got == one_more, f"after an interrupt: state {got} instead of {run.place}")
        return True

    def do_interrupt_start(self, s: int, delay_us: int, keep_error: bool) -> None:
        source = self._pick(self.sources, s)
        if source is None or source.kind == "plain" or self.env.alarm is None:
            return
        if source.persistent:
            # Nor can it whether the workers went to it, which ends those before.
            for run in list(source.runs):
                self._let_go(run)
        begun: list[Any] = []
        err = self.env.alarm.during(lambda: begun.extend(map(iter, (source.real,))), delay_us / 1e6)
        begun.clear()
        if keep_error and err is not None:
            self.errors.append(err)
        # Whether it counts as begun cannot be known.
        source.is_unsure = True
        source.real.set_epoch(3)
        source.count.choose((3, 0), is_state=False)

    def do_interrupt_state(self, s: int, n: int) -> None:
        """Many interrupts of who asks for the state, which is left as it is; the errors are kept."""
        source = self._pick(self.sources, s)
        if source is None or source.kind == "plain" or self.env.alarm is None or source.state() is None:
            return
        if source.is_unsure and not source.count.is_chosen:
            return
        for i in range(n):
            err = self.env.alarm.during(
                lambda: [source.real.state_dict() for _ in range(1000)], (50 + 7 * i % 300) / 1e6
            )
            if err is not None:
                self.errors.append(err)
                _require_no_lock()
        self._save(source, source.real.state_dict, source.state())

    # What is kept

    def _keep(self, batch: Any, right: Arrays, name: str, keep: int, is_shared: bool) -> None:
        way = keep % 12
        if way in (1, 2, 3):
            self.kept.append(Kept(batch, arrays, right, name, is_shared, True))
        elif way in (4, 5, 6):
            other = list(HOW.values())[way - 4](batch)
            require(other.number == batch.number, f"{name}: a copy has number {other.number}")
            self.kept.append(Kept(other, arrays, right, name, is_shared and way == 6, True))
        elif way >= 7:
            held, look, select_right = _views(batch)[way - 7]
            wanted = {"act": select_right(right["act"])}
            self.kept.append(Kept(held, lambda held: {"act": look(held)}, wanted, name, is_shared, False))

    def do_check(self, k: int) -> None:
        kept = self._pick(self.kept, k)
        if kept is not None:
            kept.check()

    def do_drop_kept(self, k: int) -> None:
        kept = self._pick(self.kept, k)
        if kept is not None:
            self.kept.remove(kept)

    def do_edit(self, k: int, how: int) -> None:
        """Change a kept batch in place, which changes those that share its memory, and nothing else."""
        kept = self._pick(self.kept, k)
        if kept is None or not kept.is_batch or (kept.is_shared and (self.children or self.is_child)):
            return
        batch = kept.held
        others = [o for o in self.kept if o is not kept and _shares(o, kept)]
        if others:
            return
        kept.wanted = {key: value.copy() for key, value in kept.wanted.items()}
        if how % 4 == 0 and "act" in batch:
            batch["act"].mul_(2.0)
            kept.wanted["act"] *= 2
        elif how % 4 == 1 and "act" in batch:
            batch["act"][0] = -1.0
            kept.wanted["act"][0] = -1
        elif how % 4 == 2 and "example_idx" in batch:
            batch["example_idx"].add_(7)
            kept.wanted["example_idx"] += 7
        elif how % 4 == 3:
            batch.pop("token_idx", None)
            kept.wanted.pop("token_idx", None)
            batch["mine"] = torch.arange(3)
            kept.wanted["mine"] = np.arange(3)

    def do_collect(self) -> None:
        gc.collect()

    def do_pause(self, ms: int) -> None:
        time.sleep(ms / 1000)

    def do_seed(self) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)

    # Random access

    def do_index(self, number: int, first: int, n: int, step: int, keep: int) -> None:
        _, cfg, samples = self.env.indexed[number % len(INDEXED)]
        data_set = IndexedDataset(cfg)
        if n > 200:
            data_set = HOW[("pickle", "deepcopy", "copy")[n % 3]](data_set)
        require(len(data_set) == len(samples), f"{len(data_set)} samples instead of {len(samples)}")
        rows = (first + step * np.arange(n)) % len(samples)
        for _ in range(2):
            right = _indexed_values(samples, rows)
            batch = data_set.__getitems__(rows.tolist()).batch
            compare(arrays(batch), right, f"{n} samples")
            self._keep(_Numbered(batch), right, f"{n} samples, in way {keep}", keep, False)
        i = first % len(samples)
        one = data_set[i]
        require(one["act"].numpy().tobytes() == samples.columns["act"][i].tobytes(), f"sample {i} differs")
        for wrong in (-1, len(samples)):
            with contextlib.suppress(IndexError):
                raise Difference(f"sample {wrong}: {data_set[wrong]}")

    def do_index_loader(self, number: int, size: int, workers: int, n: int, keep: int) -> None:
        _, cfg, samples = self.env.indexed[number % len(INDEXED)]
        rows = np.random.default_rng(size).permutation(len(samples))
        loader = DataLoader(IndexedDataset(cfg), batch_size=size, num_workers=workers, sampler=rows.tolist())
        for i, batch in enumerate(itertools.islice(loader, n)):
            right = _indexed_values(samples, rows[i * size : (i + 1) * size])
            compare(arrays(batch), right, f"batch {i} of samples, {workers} workers")
            self._keep(_Numbered(batch), right, f"batch {i} of samples, in way {keep}", keep, workers > 0)

    # Children and threads

    def do_fork(self, how: str, steps: list[Step]) -> None:
        """A child goes on with what it inherits, beside its parent, until that is done."""
        if not self.is_main or self.is_child:
            return
        (report, reporter), (told, teller) = os.pipe(), os.pipe()
        if how == "fork":
            child: Any = os.fork()
            if not child:
                self._live_as_child(steps, reporter, told, (report, teller))
                os._exit(0)
        else:
            arguments = (steps, reporter, told, (report, teller))
            child = multiprocessing.get_context("fork").Process(target=self._live_as_child, args=arguments)
            child.start()
        os.close(reporter)
        os.close(told)
        self.children.append((child, report, teller))

    def _live_as_child(self, steps: list[Step], reporter: int, told: int, parents: tuple[int, ...]) -> None:
        message = ""
        try:
            for fd in parents:
                os.close(fd)
            self._enter_child()
            self.run(steps)
            self.check_kept()
            # The parent goes on meanwhile.
            os.read(told, 1)
            self.check_kept()
        except BaseException as err:  # noqa: BLE001 -- the parent raises it
            message = str(err) if isinstance(err, Difference) else "".join(traceback.format_exception(err))
        os.write(reporter, f"{message[:4000]}\n".encode())
        os.close(reporter)

    def _enter_child(self) -> None:
        self.is_child, self.env.alarm = True, None
        # Iterators of torch would end the workers of the parent.
        self.graveyard += [self.threads, self.children, [run for run in self.runs if run.source.is_foreign]]
        # Whether one has begun that was interrupted before its first batch cannot be known.
        self.graveyard += [run for run in self.runs if run.status == "doubt" and not run.n_taken]
        self.runs = [run for run in self.runs if not run.source.is_foreign and run not in self.graveyard]
        self.graveyard += [source for source in self.sources if source.is_foreign and source.persistent]
        self.sources = [source for source in self.sources if not (source.is_foreign and source.persistent)]
        self.threads, self.children = [], []
        for source in self.sources:
            source.count.enter_child()
        for run in self.runs:
            if run.source.workers and run.status in ("open", "doubt"):
                # What makes its batches is the parent's.
                run.status, run.due = "failed", (ReadError, EndedError) if run.status == "doubt" else (ReadError,)
                run.source.runs = [other for other in run.source.runs if other is not run]

    def do_thread(self, steps: list[Step]) -> None:
        """A thread that has sources of its own, beside all else."""
        if not self.is_main or self.is_child:
            return
        world, errors = World(dataclasses.replace(self.env, alarm=None), is_main=False), []

        def work() -> None:
            try:
                world.run(steps)
                world.finish()
            except BaseException as err:  # noqa: BLE001 -- raised when it is joined
                errors.append(err)
            finally:
                world.drop()

        thread = threading.Thread(target=work)
        thread.start()
        self.threads.append((thread, world, errors))

    def do_join(self) -> None:
        for thread, _, errors in self.threads:
            thread.join(CHILD_S)
            require(not thread.is_alive(), "a thread hangs")
            if errors:
                raise Difference(f"in a thread: {errors[0]}") from errors[0]
        self.threads.clear()
        children, self.children = self.children, []
        reports = [self._end_child(*child) for child in children]
        for message in filter(None, reports):
            raise Difference(f"in a child: {message}")

    def _end_child(self, child: Any, report: int, teller: int) -> str:
        with contextlib.suppress(BrokenPipeError):
            os.write(teller, b"x")
        text, deadline = b"", time.monotonic() + CHILD_S
        while not text.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            part = os.read(report, 5000) if select.select([report], [], [], left)[0] else b""
            if not part:
                break
            text += part
        pid = child if isinstance(child, int) else child.pid
        if not text.endswith(b"\n"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
            text = b"it hangs, or has died" + text
        if isinstance(child, int):
            os.waitpid(pid, 0)
        else:
            child.join()
            child.close()
        os.close(report)
        os.close(teller)
        return text.decode().strip()


# As the kernel has it: type, whence, start, length, process.
_LOCK = struct.Struct("hhqqi4x")


def _has_lock(fd: int, start: int = 0, stop: int = 0) -> bool:
    """Whether this process itself holds a lock of a range of a file, whoever has others; a `stop` of 0 is its end."""
    wanted = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, stop and stop - start, 0)
    # Asked for an open file description, which no process is, the kernel names the processes that are in its way.
    kind, _, first, n, pid = _LOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))
    if kind == fcntl.F_UNLCK or pid == os.getpid():
        return kind != fcntl.F_UNLCK
    # One of another process, as in a file that was inherited: what is before it, and what is behind.
    is_before = first > start and _has_lock(fd, start, first)
    return is_before or (n > 0 and first + n != stop and _has_lock(fd, first + n, stop))


def _require_no_lock() -> None:
    """Check that this process holds no lock of the file system that another one would wait for."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        deadline = time.monotonic() + CHILD_S
        # Another thread may have it just now, for as long as what it collects meanwhile takes to end.
        while _has_lock_of_ours(fd):
            if time.monotonic() > deadline:
                faulthandler.dump_traceback()
                raise Difference(f"behind an interrupt a lock of descriptor {fd} is held; all threads are above")
            time.sleep(0.001)


def _has_lock_of_ours(fd: int) -> bool:
    try:
        return "memfd:saev_torch" in os.readlink(f"/proc/self/fd/{fd}") and _has_lock(fd)
    except OSError as err:
        # Another thread may close it meanwhile.
        if err.errno not in (errno.ENOENT, errno.EBADF):
            raise
        return False


class _Numbered(dict[str, Any]):
    """The batch of a random access, which has no number."""

    number = None


def _shares(a: Kept, b: Kept) -> bool:
    def spans(kept: Kept) -> list[np.ndarray]:
        return list(kept.look(kept.held).values())

    return any(np.shares_memory(x, y) for x in spans(a) for y in spans(b))


def _indexed_values(samples: contracts.Samples, rows: np.ndarray) -> Arrays:
    names = {"token_labels": "token_label"}
    return {
        names.get(key, key): column[rows].astype(np.float32 if key == "act" else np.int64)
        for key, column in samples.columns.items()
    }


# Drawing programs

KINDS = ("set", "ready", "ready", "plain")
LIGHT, FORKS, THREADS, WORKERS, ALL, SCENE = "light", "forks", "threads", "workers", "all", "scene"
PROFILES = {LIGHT: 52, FORKS: 12, THREADS: 6, WORKERS: 9, ALL: 5, SCENE: 16}
OPS = {
    "make": 8, "plain": 4, "look": 3, "copy": 6, "length": 2, "drop_source": 2,
    "set_epoch": 5, "save": 8, "save_counted": 4, "load": 6, "resume": 6,
    "iter": 14, "take": 26, "take_in_thread": 2, "drain": 7, "epoch": 8,
    "forget_errors": 1, "drop_run": 5, "close": 2, "shutdown": 4,
    "interrupt": 5, "interrupt_start": 1, "interrupt_state": 1,
    "check": 2, "drop_kept": 7, "edit": 5, "collect": 1, "seed": 2, "pause": 1,
    "index": 3, "index_loader": 1, "fork": 0, "thread": 0, "join": 0,
}  # fmt: skip


class Draw:
    """Draws a program."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def program(self) -> list[Step]:
        profile = self.rng.choices(list(PROFILES), list(PROFILES.values()))[0]
        weights = dict(OPS)
        if profile in (FORKS, ALL):
            weights |= {"fork": 14, "join": 3}
        if profile in (THREADS, ALL):
            weights |= {"thread": 10, "join": 3}
        if profile == SCENE:
            scene = self.rng.choice([self._heirs, self._heirs, self._twice, self._ended, self._chosen])
            # What chance alone brings about too seldom, and then anything.
            return scene() + self.steps(self.rng.randrange(4), OPS, [0, 0, 1])[2:]
        workers = [0, 1, 1, 2, 2, 3] if profile == WORKERS else [0, 0, 1, 2] if profile == ALL else [0]
        n = self.rng.randrange(3, 10 if max(workers) else 18)
        return self.steps(n, weights, workers)

    def _make(self, kinds: tuple[str, ...], workers: list[int], persistent: bool) -> list[Step]:
        kind, n_workers = self.rng.choice(kinds), self.rng.choice(workers)
        return [
            ["make", self.rng.randrange(len(CONFIGS)), kind, n_workers, persistent, self.rng.randrange(4)],
            ["iter", -1],
        ]

    def _heirs(self) -> list[Step]:
        """A child inherits batches of workers, of which its parent lets go while it goes on."""
        rng, keep = self.rng, self.rng.choice([1, 2, 3, 6, 7, 8, 9, 10, 11])
        steps = [["take", -1, rng.choice([1, 2, 3]), keep], self._fork([["check", 0]]), ["drop_kept", 0]]
        ending = [["drop_kept", 0], ["take", -1, 3, 0], ["drain", -1, 0], ["epoch", -1, 15, 0, "break"]]
        return self._make(("ready", "plain"), [1, 1, 2], False) + steps + rng.sample(ending, k=3)

    def _twice(self) -> list[Step]:
        """One loader is iterated while an iteration of it is under way."""
        rng = self.rng
        takes = [["take", rng.randrange(2), rng.choice([1, 2, 4]), rng.randrange(4)] for _ in range(4)]
        first = self._make(("ready", "ready", "set"), [0, 1, 2], rng.random() < 0.7)
        return [*first, ["take", 0, rng.randrange(3), 1], ["iter", -1], *takes, ["save", -1]]

    def _ended(self) -> list[Step]:
        """A loader is shut down in the middle of an epoch, perhaps by another thread, and used again."""
        rng = self.rng
        first = self._make(("ready",), [0, 0, 1, 2], rng.random() < 0.5)
        end: Step = rng.choice([["shutdown", -1, True], ["shutdown", -1, False], ["copy", -1, "deepcopy"]])
        return [
            *first,
            ["take", -1, rng.randrange(4), 1],
            end,
            ["shutdown", -1, False],
            ["take", -1, 2, 0],
            ["save", 0],
        ]

    def _chosen(self) -> list[Step]:
        """Parent and child choose their epochs when the child has been forked."""
        rng = self.rng
        child = [["pause", rng.choice([0, 10, 30])], ["epoch", 0, rng.randrange(3), 0, "hold"], ["save", 0]]
        parent = [["set_epoch", 0, rng.randrange(5)], ["epoch", 0, 2, 0, "break"], ["save", 0]]
        first = self._make(("set", "ready", "plain"), [0, 0, 1], rng.random() < 0.5)
        return [*first, ["set_epoch", -1, rng.randrange(5)], self._fork(child), *parent]

    def _fork(self, steps: list[Step]) -> Step:
        return ["fork", self.rng.choice(["fork", "process"]), steps]

    def steps(self, n: int, weights: dict[str, int], workers: list[int]) -> list[Step]:
        names = self.rng.choices(list(weights), list(weights.values()), k=n)
        # What does nothing where there is nothing yet would be most of a program.
        return [self.step(name, weights, workers) for name in ["make", "iter", *names]]

    def step(self, name: str, weights: dict[str, int], workers: list[int]) -> Step:
        rng = self.rng
        any_one, n_workers, persistent = rng.randrange(60), rng.choice(workers), rng.random() < 0.4
        keep = rng.choice([0, 0, rng.randrange(12)])
        ranks = rng.randrange(len(RANKS))
        within = {**weights, "fork": 0, "thread": 0, "join": 0}
        arguments: dict[str, Callable[[], list[Any]]] = {
            "make": lambda: [rng.randrange(len(CONFIGS)), rng.choice(KINDS), n_workers, persistent, ranks],
            "plain": lambda: [any_one, n_workers, persistent],
            "copy": lambda: [any_one, rng.choice(list(HOW))],
            "set_epoch": lambda: [any_one, rng.randrange(5)],
            "load": lambda: [any_one, rng.randrange(60)],
            "resume": lambda: [any_one, rng.choice(KINDS), n_workers, persistent, ranks],
            "take": lambda: [any_one, rng.choice([1, 1, 2, 3, 6]), keep],
            "take_in_thread": lambda: [any_one, rng.choice([1, 2])],
            "drain": lambda: [any_one, keep],
            "epoch": lambda: [any_one, rng.randrange(16), keep, rng.choice(["break", "break", "raise", "hold"])],
            "shutdown": lambda: [any_one, rng.random() < 0.4],
            "interrupt": lambda: [any_one, rng.choice([1, 3, 8]), int(10 ** rng.uniform(1, 4.3)), persistent],
            "interrupt_start": lambda: [any_one, int(10 ** rng.uniform(1, 4.5)), persistent],
            "interrupt_state": lambda: [any_one, rng.choice([1, 5])],
            "edit": lambda: [any_one, rng.randrange(4)],
            "index": lambda: [any_one, rng.randrange(900), rng.choice([1, 7, 300, 600]), rng.randrange(1, 9), keep],
            "index_loader": lambda: [any_one, rng.choice([7, 100, 600]), n_workers, rng.randrange(1, 9), keep],
            "pause": lambda: [rng.choice([1, 5, 20])],
            "fork": lambda: [rng.choice(["fork", "process"]), self._inherits(within, workers)],
            "thread": lambda: [self.steps(rng.randrange(1, 6), within, workers)],
        }
        if name in arguments:
            return [name, *arguments[name]()]
        return [name] if name in ("forget_errors", "collect", "seed", "join") else [name, any_one]

    def _inherits(self, weights: dict[str, int], workers: list[int]) -> list[Step]:
        steps = self.steps(self.rng.randrange(1, 6), weights, workers)
        return steps if self.rng.random() < 0.3 else steps[2:]


def draw(seed: int, number: int) -> list[Step]:
    """Return a program; the same for the same numbers, whatever Python is."""
    return Draw(random.Random(f"programs {seed} {number}")).program()


# Running them

LIMITS = engine._SMALL_NBYTES, engine._LARGE_NBYTES, engine._WIDE_NBYTES


def run_one(env: Environment, program: list[Step]) -> str:
    """Run a program in this process, and look at what is left of it; what differs, or nothing."""
    # Always the same ones with a buffer, with none, and with none where the kernel copies and a worker ends soon.
    way = zlib.crc32(json.dumps(program).encode()) % 3
    engine._SMALL_NBYTES, engine._LARGE_NBYTES, engine._WIDE_NBYTES = (0, 0, 0) if way else LIMITS
    gather.find_watch = find_watch if way < 2 else lambda: None
    before, n_before = Resources.now(), env.alarm.n_heard if env.alarm is not None else 0
    world, message = World(env), ""
    try:
        world.run(program)
        world.finish()
    except Exception as err:  # noqa: BLE001 -- told
        message = str(err) if isinstance(err, Difference) else "".join(traceback.format_exception(err))
        world.graveyard.append(err)
    if message:
        # What is left of it is of no interest: this process ends.
        return message
    world.drop()
    del world
    # As the next iteration does.
    make_up()
    n_heard = 0 if env.alarm is None else env.alarm.n_heard - n_before
    return _leaks(before, n_heard)


# An interrupt may leave one sheet of pages: its descriptor, that of its mapping, and the mapping.
_N_LEFT = 3
_PAGES = ("file descriptor: /memfd:saev_torch", "shared memory: /memfd:saev_torch")


def _leaks(before: Resources, n_interrupts: int) -> str:
    """What is left behind, apart from what Python lets an interrupt leave."""
    leaks: list[str] = []
    # Where the garbage collector ends workers, torch waits 5 s for each.
    for grace_s in (0.3, 40.0):
        leaks = before.leaks_now(grace_s)
        for thread in [thread for thread in threading.enumerate() if n_interrupts and thread.ident is None]:
            # It came between the list of threads and the start of one.
            threading._limbo.pop(thread, None)  # type: ignore[attr-defined]
            leaks = before.leaks_now(0.0)
        # It came between a new page, or an opened file, and who is to close it, or into a finalizer. Threads, workers
        # must be gone.
        known = [leak for leak in leaks if leak.startswith(_PAGES) or ".bin (" in leak]
        is_of_interrupt = len(leaks) <= _N_LEFT * n_interrupts and len(known) == len(leaks)
        if not leaks or is_of_interrupt:
            return ""
    return "left behind: " + ", ".join(leaks)


@dataclasses.dataclass
class Campaign:
    """Runs programs in processes of their own, `n_each` in one."""

    env: Environment
    n_each: int = 25
    n_run: int = 0
    failed: list[tuple[str, list[Step], str]] = dataclasses.field(default_factory=list)

    def run(self, programs: list[tuple[str, list[Step]]]) -> None:
        """Run named programs, those after one that fails in a new process."""
        while programs:
            part = programs[: self.n_each]
            n_well, message = self.in_process([program for _, program in part])
            self.n_run += n_well + bool(message)
            if message:
                self.failed.append((*part[n_well], message))
            programs = programs[n_well + bool(message) :]

    def in_process(self, programs: list[list[Step]]) -> tuple[int, str]:
        """Run programs in a new process until one fails: how many went well, and what the next one said."""
        sys.stdout.flush()
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reader)
            self._serve(programs, writer)
        os.close(writer)
        n_well, text = 0, b""
        try:
            while n_well < len(programs):
                if not select.select([reader], [], [], PROGRAM_S)[0]:
                    os.kill(pid, signal.SIGABRT)
                    time.sleep(1)
                    return n_well, f"it hangs: nothing for {PROGRAM_S} s; all threads are above"
                part = os.read(reader, 1 << 16)
                text += part
                while text.startswith(b"ok\n"):
                    n_well, text = n_well + 1, text[3:]
                if not part:
                    return n_well, text.decode() or f"it died: {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}"
            return n_well, ""
        finally:
            os.close(reader)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _serve(self, programs: list[list[Step]], writer: int) -> None:
        try:
            # Whatever it starts can be ended with it.
            os.setsid()
            faulthandler.enable()
            # Whoever forks has threads here; that is what is tried.
            warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
            for warning in FOREIGN_WARNINGS:
                _, message, category = warning.split(":")
                warnings.filterwarnings("ignore", message, getattr(sys.modules["builtins"], category))
            torch.set_num_threads(1)
            # pytest's would keep what an interrupt of a finalizer raises, and with it the frames below, and iterators.
            sys.unraisablehook = sys.__unraisablehook__
            self.env.alarm = Alarm()
            # One page for the life of a process, which the first program would make.
            Notices.of_process().leave_parent()
            # What has been imported is not looked through again after each program.
            gc.collect()
            gc.freeze()
            for program in programs:
                message = run_one(self.env, program)
                os.write(writer, message.encode() if message else b"ok\n")
                if message:
                    break
        except BaseException as err:  # noqa: BLE001 -- the parent raises it
            os.write(writer, "".join(traceback.format_exception(err)).encode())
        finally:
            os._exit(0)

    def shrink(self, program: list[Step], seconds: float = 60.0, n_tries: int = 3) -> tuple[list[Step], str]:
        """Leave out steps as long as it still fails; the shortest, and what it says."""
        deadline, last = time.monotonic() + seconds, ""
        is_shorter = True
        while is_shorter:
            is_shorter = False
            for shorter in _shorter(program):
                if time.monotonic() > deadline:
                    return program, last
                message = next(filter(None, (self.in_process([shorter])[1] for _ in range(n_tries))), "")
                if message:
                    program, last, is_shorter = shorter, message, True
                    break
        return program, last


def _shorter(program: list[Step]) -> Iterator[list[Step]]:
    half = len(program) // 2
    if half > 2:
        yield program[:half]
        yield program[half:]
    for i in reversed(range(len(program))):
        yield program[:i] + program[i + 1 :]
    for i, step in enumerate(program):
        if isinstance(step[-1], list) and step[0] in ("fork", "thread"):
            for inner in _shorter(step[-1]):
                yield [*program[:i], [*step[:-1], inner], *program[i + 1 :]]


def campaign(
    root: Path,
    seed: int,
    numbers: range,
    minutes: float = math.inf,
    log: Callable[[str], Any] = str,
    is_one_enough: bool = False,
) -> Campaign:
    """Run the programs of some numbers, as long as there is time, or until one differs."""
    found, deadline = Campaign(Environment.make(root)), time.monotonic() + 60 * minutes
    for first in range(numbers.start, numbers.stop, found.n_each):
        if time.monotonic() > deadline or (is_one_enough and found.failed):
            break
        n_failed = len(found.failed)
        part = range(first, min(first + found.n_each, numbers.stop))
        found.run([(f"seed {seed}, program {number}", draw(seed, number)) for number in part])
        log(f"{found.n_run} programs, {len(found.failed)} differ")
        for name, program, message in found.failed[n_failed:]:
            log(f"{name}: {message}\n{json.dumps(program)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--stop", action="store_true", help="stop where one differs, and do not look for a shorter one")
    parser.add_argument("--program", help="one program, as it was printed")
    parser.add_argument("--times", type=int, default=1, help="how often to run that")
    args = parser.parse_args()

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as root:
        if args.program:
            found = Campaign(Environment.make(Path(root)))
            found.run([("the program", json.loads(args.program))] * args.times)
        else:
            numbers = range(args.first, args.first + args.n)
            found = campaign(Path(root), args.seed, numbers, args.minutes, log, args.stop)
        for name, program, message in found.failed[:1] if not args.program and not args.stop else ():
            shortest, last = found.shrink(program)
            log(f"shortest of {name}: {last or message}\n--program '{json.dumps(shortest)}'")
        for _, _, message in found.failed if args.program else ():
            log(message)
    print(f"{found.n_run} programs of seed {args.seed}, {len(found.failed)} differ")
    return bool(found.failed)


if __name__ == "__main__":
    sys.exit(main())
