"""States: a run that is cut anywhere and resumed, elsewhere and otherwise, is the run that was not."""

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contracts
import factory
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from saev_torch import (
    Metadata,
    OrderedActivations,
    OrderedConfig,
    OrderedDataLoader,
    ShardWriter,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    StateError,
    StreamDigest,
)
from saev_torch.resume.state import batch_digest

pytestmark = pytest.mark.filterwarnings(contracts.MANY_WORKERS)

Config = ShuffledConfig | OrderedConfig

RECORDING = {"n_samples", "table", "checksums", "kept"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A config, and what the run that is not cut yields: three epochs."""

    cfg: Config
    epochs: tuple[contracts.Batches, ...]

    @property
    def n(self) -> int:
        return len(self.epochs[0])

    def after(self, epoch: int, n_batches: int) -> contracts.Batches:
        """What comes after so many batches of an epoch, in two iterations: none of them is empty."""
        return [*self.rest(epoch, n_batches), *self.epochs[epoch + 1 + n_batches // self.n]]

    def rest(self, epoch: int, n_batches: int) -> contracts.Batches:
        """What comes first after so many batches of an epoch: the rest of it; after all of them, the next epoch."""
        return self.epochs[epoch][n_batches:] or self.epochs[epoch + 1]


def make_run(root: Path, n_examples: int, kind: type[Any] = ShuffledConfig, **fields: Any) -> Run:
    shards = factory.make_shards(root / "shards", n_examples=n_examples, examples_per_shard=23)
    cfg = kind(**{"shards": shards, "layer": 7, "batch_size": 12, **fields})
    ds = contracts.make_data_set(cfg)
    return Run(cfg, tuple(list(ds) for _ in range(3)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """13 batches, the last not full; the buffer is smaller."""
    return make_run(tmp_path_factory.mktemp("small"), 25, buffer_size=4, n_lanes=2)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """131 batches, the last not full."""
    return make_run(tmp_path_factory.mktemp("large"), 261, buffer_size=16)


@pytest.fixture(scope="module", params=["shuffled", "in file order", "layers side by side"])
def either(request: pytest.FixtureRequest, small: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The small one in both orders, and with aligned layers."""
    if request.param == "shuffled":
        return small
    root = tmp_path_factory.mktemp("either")
    if request.param == "in file order":
        return make_run(root, 25, OrderedConfig)
    return make_run(root, 25, layer=(7, 3), tokens="all", buffer_size=4)


def take(source: Any, n: int) -> contracts.Batches:
    """Take some batches of an iteration, and leave it."""
    iterator = iter(source)
    return [next(iterator) for _ in range(n)]


def make_loader(cfg: Config, n_workers: int = 0, state: Any = None, **options: Any) -> Any:
    kind = ShuffledDataLoader if isinstance(cfg, ShuffledConfig) else OrderedDataLoader
    loader = kind(cfg, num_workers=n_workers, **options)
    if state is not None:
        loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


# Our loaders and data sets


@pytest.mark.slow
def test_every_cut(either: Run) -> None:
    """In one process; the rest, the next epoch, and the same from a second cut two batches later."""
    for k in range(either.n + 1):
        loader = make_loader(either.cfg)
        contracts.assert_same(take(loader, k), either.epochs[0][:k])
        state = loader.state_dict()
        assert len(json.dumps(state)) < 1024

        loader = make_loader(either.cfg, state=state)
        contracts.assert_same([*loader, *loader], either.after(0, k))

        n_more = min(2, either.n - k)
        loader = make_loader(either.cfg, state=state)
        take(loader, n_more)
        loader = make_loader(either.cfg, state=loader.state_dict())
        contracts.assert_same([*loader, *loader], either.after(0, k + n_more))


@pytest.mark.slow
def test_every_cut_of_a_data_set(either: Run) -> None:
    for k in range(either.n + 1):
        ds = contracts.make_data_set(either.cfg)
        take(ds, k)
        other = contracts.make_data_set(either.cfg)
        other.load_state_dict(ds.state_dict())
        contracts.assert_same([*other, *other], either.after(0, k))
        # A state may also be taken back by the data set that it comes from.
        state = ds.state_dict()
        take(ds, 1)
        ds.load_state_dict(state)
        contracts.assert_same(list(ds), either.rest(0, k))


@pytest.mark.slow
def test_every_cut_across_workers(small: Run) -> None:
    """0 workers, then 2, then 1, which stay for the next epoch."""
    for k in range(small.n + 1):
        loader = make_loader(small.cfg)
        take(loader, k)
        n_more = min(3, small.n - k)
        loader = make_loader(small.cfg, 2, loader.state_dict())
        contracts.assert_same(take(loader, n_more), small.epochs[0][k : k + n_more])
        state = loader.state_dict()
        loader.shutdown()
        loader = make_loader(small.cfg, 1, state, persistent_workers=True)
        contracts.assert_same([*loader, *loader], small.after(0, k + n_more))
        loader.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_cuts_of_a_larger_epoch(large: Run, seed: int) -> None:
    """Five in a row, anywhere in the first epochs, across any numbers of workers."""
    rng = random.Random(seed)
    state, done = None, 0
    for _ in range(5):
        loader = make_loader(large.cfg, rng.choice([0, 0, 1, 2]), state)
        epoch, k = divmod(done, large.n)
        n_more = min(rng.randrange(large.n // 2), large.n - k)
        iterator = iter(loader)
        contracts.assert_same([next(iterator) for _ in range(n_more)], large.after(epoch, k)[:n_more])
        if k + n_more == large.n:
            assert list(iterator) == []
        state, done = loader.state_dict(), done + n_more
        loader.shutdown()
    loader = make_loader(large.cfg, 2, state)
    epoch, k = divmod(done, large.n)
    contracts.assert_same(list(loader), large.epochs[epoch][k:])


@pytest.mark.parametrize("n_workers", [None, 0, 2])
def test_the_state_after_an_epoch(small: Run, n_workers: int | None) -> None:
    """Behind the last batch it is the next epoch's, also before the iteration has ended; None: the data set's own."""

    def make() -> Any:
        return ShuffledActivations(small.cfg) if n_workers is None else make_loader(small.cfg, n_workers)

    source = make()
    for epoch in range(2):
        iterator = iter(source)
        for _ in range(small.n):
            next(iterator)
        before = source.state_dict()
        assert list(iterator) == []
        after = source.state_dict()
        assert before == after
        assert (after["epoch"], after["batch"]) == (epoch + 1, 0)
        other = make()
        other.load_state_dict(after)
        contracts.assert_same(list(other), small.epochs[epoch + 1])


@pytest.mark.parametrize("n_workers", [None, 0, 2])
def test_an_older_state_at_the_end_of_an_epoch(small: Run, n_workers: int | None) -> None:
    """The code of before left the number of all batches there; 13 of them, and over two ranks 14."""
    for end in (small.n, small.n + 1):
        state = ShuffledActivations(small.cfg).state_dict() | {"batch": end}
        source = ShuffledActivations(small.cfg) if n_workers is None else make_loader(small.cfg, n_workers)
        source.load_state_dict(state)
        assert (source.state_dict()["epoch"], source.state_dict()["batch"]) == (1, 0)
        contracts.assert_same([*source, *source], small.after(0, small.n))


def test_the_state_of_a_data_set_at_any_time(small: Run) -> None:
    ds = ShuffledActivations(small.cfg)

    def place() -> tuple[int, int]:
        return ds.state_dict()["epoch"], ds.state_dict()["batch"]

    assert place() == (0, 0)
    iterator = iter(ds)
    assert place() == (0, 0)
    for k, _ in zip(range(1, 4), iterator, strict=False):
        assert place() == (0, k)
    del iterator
    assert place() == (0, 3)
    iterator = iter(ds)
    assert place() == (1, 0)
    list(iterator)
    assert place() == (2, 0)
    ds.set_epoch(1)
    assert place() == (1, 0)
    list(ds)
    assert place() == (2, 0)


@pytest.mark.parametrize("n_workers", [None, 0])
@pytest.mark.parametrize("k", [0, 5])
def test_a_loaded_place_holds_until_a_batch_is_taken(small: Run, n_workers: int | None, k: int) -> None:
    """torchdata's loader begins twice where it restores the end of an epoch."""
    source = ShuffledActivations(small.cfg) if n_workers is None else make_loader(small.cfg, n_workers)
    source.load_state_dict(ShuffledActivations(small.cfg).state_dict(n_batches=k, epoch=1))
    for _ in range(3):
        iter(source)
    contracts.assert_same(take(source, 1), small.epochs[1][k : k + 1])
    contracts.assert_same(list(source), small.epochs[2])
    # Chosen or reached, an epoch that begins is one that has begun.
    source.set_epoch(0)
    iter(source)
    contracts.assert_same(list(source), small.epochs[1])


def test_set_epoch_wins_over_a_state(small: Run) -> None:
    loader = make_loader(small.cfg)
    take(loader, 5)
    state = loader.state_dict()
    for n_workers in (0, 2):
        loader = make_loader(small.cfg, n_workers, state)
        loader.set_epoch(2)
        assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (2, 0)
        contracts.assert_same(list(loader), small.epochs[2])


def test_a_state_that_was_only_loaded_is_given_back(small: Run) -> None:
    loader = make_loader(small.cfg)
    take(loader, 5)
    state = loader.state_dict()
    assert make_loader(small.cfg, 2, state).state_dict() == state
    ds = ShuffledActivations(small.cfg)
    ds.load_state_dict(state)
    assert ds.state_dict() == state


# Across ranks


@pytest.mark.slow
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_sizes", [(1, 2, 4), (4, 2, 1), (3, 1, 8)])
def test_every_cut_across_ranks(small: Run, world_sizes: tuple[int, ...], drop_last: bool) -> None:
    """Cut at a step of all ranks, and go on with another number of them; the digests add up."""
    cfg = dataclasses.replace(small.cfg, drop_last=drop_last)
    whole = small.epochs[0][:12] if drop_last else small.epochs[0]
    for n_steps in range(len(whole) // world_sizes[0] + 1):
        got: contracts.Batches = []
        state: Any = None
        total = StreamDigest()
        for turn, world_size in enumerate(world_sizes):
            sets = [ShuffledActivations(cfg, rank=rank, world_size=world_size) for rank in range(world_size)]
            if state is not None:
                for ds in sets:
                    ds.load_state_dict(state)
            if sets[0].state_dict()["epoch"] == 1:
                # Too few were left for so many ranks, so that they begin the next epoch.
                assert len(whole) - len(got) < (world_size if drop_last else 1)
                contracts.assert_same([next(iter(ds)) for ds in sets], small.epochs[1][:world_size])
                break
            left = (len(whole) - len(got)) // world_size
            n = -1 if turn == len(world_sizes) - 1 else min(n_steps if turn == 0 else 1, left)
            parts = [list(ds) if n < 0 else take(ds, n) for ds in sets]
            got += [batch for step in zip(*parts, strict=True) for batch in step]
            total = sum((ds.digest for ds in sets), total)
            states = [ds.state_dict() for ds in sets]
            assert len({(s["epoch"], s["batch"]) for s in states}) == 1
            state = states[-1]
        assert len(got) >= len(whole) - world_sizes[-1] * drop_last + drop_last
        contracts.assert_same(got, [whole[i % len(whole)] for i in range(len(got))][: len(got)])
        assert total == digest_of([got])


# A plain DataLoader, which tells nothing but how many batches were taken


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"batch_size": None}])
def test_every_cut_of_a_plain_loader(small: Run, options: dict[str, Any]) -> None:
    for k in range(small.n + 1):
        state = None
        done = 0
        for n_workers, n in ((0, k), (2, min(3, small.n - k))):
            ds = ShuffledActivations(small.cfg)
            if state is not None:
                ds.load_state_dict(state)
            take(DataLoader(ds, num_workers=n_workers, **options), n)
            state, done = ds.state_dict(n_batches=n), done + n
        ds = ShuffledActivations(small.cfg)
        ds.load_state_dict(state)
        loader = DataLoader(ds, num_workers=1, **options)
        contracts.assert_same([*loader, *loader], small.after(0, done))


@pytest.mark.parametrize("persistent", [False, True])
def test_a_plain_loader_in_a_later_epoch(small: Run, persistent: bool) -> None:
    ds = ShuffledActivations(small.cfg)
    loader = DataLoader(ds, num_workers=2, persistent_workers=persistent)
    take(loader, 4)
    take(loader, 7)
    state = ds.state_dict(n_batches=7)
    assert (state["epoch"], state["batch"]) == (1, 7)
    assert ds.state_dict(n_batches=0, epoch=2)["epoch"] == 2
    # Persistent workers take a state up, too.
    ds.load_state_dict(state)
    contracts.assert_same([*loader, *loader], small.after(1, 7))
    del loader


def test_a_plain_loader_with_ranks(small: Run) -> None:
    """The count is this rank's."""
    ds = ShuffledActivations(small.cfg, rank=1, world_size=3)
    take(DataLoader(ds, num_workers=1), 2)
    other = ShuffledActivations(small.cfg)
    other.load_state_dict(ds.state_dict(n_batches=2))
    contracts.assert_same(list(other), small.epochs[0][6:])


def test_only_the_consumer_knows_how_many_batches_workers_made(small: Run) -> None:
    ds = ShuffledActivations(small.cfg)
    take(ds, 3)
    take(DataLoader(ds, num_workers=1), 2)
    with pytest.raises(StateError, match=r"state_dict\(n_batches=...\)"):
        ds.state_dict()


@pytest.mark.parametrize(("arguments", "name"), [((-1,), "n_batches"), ((True,), "n_batches"), ((1, "2"), "epoch")])
def test_counts_that_make_no_sense(small: Run, arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ShuffledActivations(small.cfg).state_dict(*arguments)


# torchdata's StatefulDataLoader, which takes snapshots of its own


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (1, False), (2, False), (2, True)])
def test_stateful_data_loader(small: Run, n_workers: int, persistent: bool, every: int) -> None:
    """Two resumes in a row, at the start, inside, at the end; into the next epoch, and the one after it.

    Behind the last batch one process goes on with the next epoch; with workers, which do not know of each other,
    torchdata first yields the rest of the epoch, which is empty.
    """
    ds = ShuffledActivations(small.cfg)
    ds.set_epoch(3)
    epochs = [*small.epochs, list(ds)]

    def make(state: Any = None) -> Any:
        ds = ShuffledActivations(small.cfg)
        options = {"num_workers": n_workers, "persistent_workers": persistent, "snapshot_every_n_steps": every}
        loader = StatefulDataLoader(ds, batch_size=None, **options)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    # Where in an epoch matters in one process, too, which takes a tenth of the time.
    for k in (5, small.n) if n_workers else (0, 1, 5, small.n - 1, small.n):
        loader = make()
        contracts.assert_same(take(loader, k), small.epochs[0][:k])
        n_more = min(4, small.n - k)
        loader = make(loader.state_dict())
        contracts.assert_same(take(loader, n_more), small.epochs[0][k : k + n_more])
        loader = make(loader.state_dict())
        is_next = k + n_more == small.n and not n_workers
        contracts.assert_same(list(loader), epochs[1] if is_next else epochs[0][k + n_more :])
        contracts.assert_same(list(loader), epochs[1 + is_next])
        loader = make(loader.state_dict())
        contracts.assert_same(list(loader), epochs[2 + is_next])
        del loader


# What is read to resume


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ShuffledConfig:
    """1000 batches of 12 KB; the buffer has 64 of them."""
    root = tmp_path_factory.mktemp("wide") / "shards"
    geometry = {"content_tokens": 100, "cls": False, "d_model": 128, "layers": (7,), "examples_per_shard": 50}
    shards = factory.make_shards(root, n_examples=240, labels=False, **geometry)
    return ShuffledConfig(shards=shards, layer=7, batch_size=24, buffer_size=64)


def bytes_read(pids: list[int]) -> int:
    """Bytes that processes have asked for in system calls."""
    lines = [line.split() for pid in pids for line in Path(f"/proc/{pid}/io").read_text().splitlines()]
    return sum(int(value) for key, value in lines if key == "rchar:")


@pytest.mark.parametrize("min_buffer_fill", [0.0, 1.0])
@pytest.mark.parametrize("n_workers", [0, 2])
def test_resuming_reads_one_buffer(
    wide: ShuffledConfig, n_workers: int, min_buffer_fill: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes from the state to the first batch, in the middle of an epoch, three times."""
    # The system does not count what is read by io_uring; without it the same is read.
    monkeypatch.setattr("saev_torch.reading.ring.Ring.open", lambda: None)
    buffer_nbytes = 64 * 24 * 128 * 4
    state = ShuffledActivations(wide).state_dict(n_batches=500, epoch=0)
    where = ShuffledActivations(wide).locate(500)
    found = []
    for _ in range(3):
        loader = make_loader(dataclasses.replace(wide, min_buffer_fill=min_buffer_fill), n_workers)
        before = bytes_read([os.getpid()])
        loader.load_state_dict(state)
        iterator = iter(loader)
        batch = next(iterator)
        workers = [w.pid for w in getattr(iterator.iterator, "_workers", [])]
        found.append(bytes_read([os.getpid(), *workers]) - before)
        assert torch.equal(batch["token_idx"], where["token_idx"])
        loader.shutdown()
    buffers = [nbytes / buffer_nbytes for nbytes in found]
    print(f"{n_workers} workers, {min_buffer_fill}: {buffers} buffers, where 500 batches are {500 / 64:.1f}")
    # Workers go on reading while the first batch is on its way: the more, the longer a loaded machine takes for it.
    assert 1 / 64 < min(buffers) < 2
    assert max(buffers) < 500 / 64 / 2


# States that belong to something else


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 18}, "seed: expected 18, got 17"),
        ({"batch_size": 13}, "batch_size: expected 13, got 12"),
        ({"tokens": "all"}, "tokens: expected 'all', got 'content'"),
        ({"layer": 3}, "layer: expected 3, got 7"),
        ({"layer": "all"}, "layer: expected 'all', got 7"),
        ({"layer": (3, 7)}, r"layer: expected \[3, 7\], got 7"),
        ({"ignore_labels": [2]}, "ignore_labels: expected '4', got '0'"),
        ({"buffer_size": 8}, "buffer_size: expected 8, got 4"),
        ({"n_lanes": 4}, "n_lanes: expected 4, got 2"),
        ({"block_size": 2}, "block_size: expected 2, got None"),
        ({"seed": 18, "layer": 3}, "layer: expected 3, got 7, seed: expected 18, got 17"),
        ({"scale_norm": True}, "scale: expected a number with scale_norm=True"),
    ],
)
def test_a_state_of_another_config_is_refused(small: Run, fields: dict[str, Any], message: str) -> None:
    state = ShuffledActivations(small.cfg).state_dict()
    other = dataclasses.replace(small.cfg, **fields)
    for target in (ShuffledActivations(other), ShuffledDataLoader(other)):
        with pytest.raises(StateError, match=f"{message}.*[Uu]se the config"):
            target.load_state_dict(state)


def test_settings_that_do_not_change_the_order_do_not_matter(small: Run) -> None:
    loader = make_loader(small.cfg)
    take(loader, 5)
    free = {"n_threads": 1, "min_buffer_fill": 0.5, "batch_timeout_s": 5.0, "debug": False, "log_every_s": 3.0}
    loader = make_loader(dataclasses.replace(small.cfg, **free), state=loader.state_dict())
    contracts.assert_same(list(loader), small.epochs[0][5:])


def test_a_state_of_other_data_is_refused(small: Run, large: Run) -> None:
    state = ShuffledActivations(large.cfg).state_dict()
    with pytest.raises(StateError, match=r"data: expected '[0-9a-f]{16}', got '[0-9a-f]{16}'"):
        ShuffledActivations(small.cfg).load_state_dict(state)


def _record(root: Path, factor: float) -> Path:
    spec = factory.Spec(n_examples=25, examples_per_shard=10)
    with ShardWriter(root, Metadata(**spec.metadata())) as writer:
        writer.write_batch(factory.oracle(spec) * np.float32(factor), 0, factory.oracle_labels(spec))
    return writer.shards_dir


def test_a_state_of_another_recording_is_refused(tmp_path: Path) -> None:
    """The metadata are the same, the values are not; a copy is no other recording."""
    cfg = ShuffledConfig(shards=_record(tmp_path / "a", 1), layer=7, batch_size=12, buffer_size=4)
    state = ShuffledActivations(cfg).state_dict()
    other = dataclasses.replace(cfg, shards=_record(tmp_path / "b", 2))
    assert other.shards.name == cfg.shards.name
    for source in (ShuffledActivations(other), ShuffledDataLoader(other)):
        with pytest.raises(StateError, match=r"checksums: expected '[0-9a-f]{16}', got '[0-9a-f]{16}'"):
            source.load_state_dict(state)
    copy = shutil.copytree(cfg.shards, tmp_path / "c" / cfg.shards.name)
    ShuffledActivations(dataclasses.replace(cfg, shards=copy)).load_state_dict(state)
    # Who copies only what other readers need leaves the sidecar behind: then nothing is known, and nothing is refused.
    (copy / "checksums.json").unlink()
    known = ShuffledActivations(dataclasses.replace(cfg, shards=copy))
    known.load_state_dict(state)
    ShuffledActivations(other).load_state_dict(known.state_dict())


def test_a_state_of_files_in_another_order_is_refused(tmp_path: Path) -> None:
    cfg = ShuffledConfig(shards=factory.make_shards(tmp_path, n_examples=8), layer=7, batch_size=12, buffer_size=4)
    state = ShuffledActivations(cfg).state_dict()
    table = json.loads((cfg.shards / "shards.json").read_text())
    table[:2] = table[1::-1]
    (cfg.shards / "shards.json").write_text(json.dumps(table))
    with pytest.raises(StateError, match=r"table: expected '[0-9a-f]{16}', got '[0-9a-f]{16}'"):
        ShuffledActivations(cfg).load_state_dict(state)


@pytest.mark.parametrize(("flipped", "key"), [(True, "kept"), (False, "n_samples")])
def test_a_state_of_other_labels_is_refused(tmp_path: Path, flipped: bool, key: str) -> None:
    """Where they decide what is selected; else they only come with the batches."""
    shards = factory.make_shards(tmp_path, n_examples=25)
    all_kept = ShuffledConfig(shards=shards, layer=7, batch_size=12, buffer_size=4)
    cfg = dataclasses.replace(all_kept, ignore_labels=[0, 1])
    states = [ShuffledActivations(one).state_dict() for one in (cfg, all_kept)]
    labels = factory.oracle_labels(factory.Spec(n_examples=25))
    (np.flip(labels, axis=1) if flipped else labels // 2).tofile(shards / "labels.bin")
    with pytest.raises(StateError, match=f"{key}: expected .*, got "):
        ShuffledActivations(cfg).load_state_dict(states[0])
    ShuffledActivations(all_kept).load_state_dict(states[1])


def test_a_state_of_before_loads(small: Run) -> None:
    """It does not say which recording it belongs to; one that says so must say all."""
    loader = make_loader(small.cfg)
    take(loader, 5)
    state = loader.state_dict()
    before = {key: value for key, value in state.items() if key not in RECORDING}
    assert len(before) == len(state) - len(RECORDING)
    contracts.assert_same(list(make_loader(small.cfg, state=before)), small.rest(0, 5))


def test_a_state_of_the_other_order_is_refused(small: Run) -> None:
    ordered = OrderedActivations(OrderedConfig(shards=small.cfg.shards, layer=7, batch_size=12))
    with pytest.raises(StateError, match="order: expected 'shuffled', got 'ordered'"):
        ShuffledActivations(small.cfg).load_state_dict(
            ShuffledActivations(small.cfg).state_dict() | ordered.state_dict()
        )
    with pytest.raises(StateError, match="order: expected 'ordered', got 'shuffled'"):
        ordered.load_state_dict(ShuffledActivations(small.cfg).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version: expected at most 1, got 99; use a newer saev_torch"),
        ({"version": "1"}, "version: expected 1, got '1'"),
        ({"version": 0}, "version: expected 1, got 0"),
        ({"epoch": -1}, "epoch: expected an integer from 0 on, got -1"),
        ({"batch": 1.5}, "batch: expected an integer from 0 on, got 1.5"),
        ({"batch": True}, "batch: expected an integer from 0 on, got True"),
        ({"rank": None}, "rank: expected an integer from 0 on, got None"),
        ({"batch": 10**12}, "batch: expected at most 14, .* got 1000000000000"),
        ({"batch": 15}, "batch: expected at most 14, .* got 15"),
        ({"world_size": 0}, "world_size: expected an integer from 1 on, got 0"),
        ({"rank": 1}, "rank: expected less than world_size, 1, got 1"),
        ({"rank": 5, "world_size": 3}, "rank: expected less than world_size, 3, got 5"),
        ({"n_samples": 7}, "n_samples: expected 150, got 7"),
        ({"digest": "xyz"}, "digest: expected 16 hex digits and a count, got 'xyz'"),
        ({"digest": 7}, "digest: expected 16 hex digits and a count, got 7"),
        ({"digest": None}, "digest: expected"),
        ({"seed": "17"}, "seed: expected 17, got '17'"),
    ],
)
def test_a_damaged_state_is_refused(small: Run, change: dict[str, Any], message: str) -> None:
    ds = ShuffledActivations(small.cfg)
    with pytest.raises(StateError, match=message):
        ds.load_state_dict({**ds.state_dict(), **change})
    contracts.assert_same(list(ds), small.epochs[0])


@pytest.mark.parametrize("garbage", [None, 3, "state", [], {}, {"epoch": 1, "batch": 2}, b"\x80"])
def test_garbage_is_refused(small: Run, garbage: Any) -> None:
    for target in (ShuffledActivations(small.cfg), ShuffledDataLoader(small.cfg)):
        with pytest.raises(StateError, match="state: expected a dict with a version"):
            target.load_state_dict(garbage)


def test_an_incomplete_state_is_refused(small: Run) -> None:
    ds = ShuffledActivations(small.cfg)
    # States of before there were subsets lack what says which; they are of all examples.
    for key in set(ds.state_dict()) - {"version", "scale", "mask", "examples"}:
        state = ds.state_dict()
        del state[key]
        with pytest.raises(StateError, match=key):
            ds.load_state_dict(state)


# The digest


def digest_of(epochs: list[contracts.Batches]) -> StreamDigest:
    """What the digest of whole epochs must be."""
    total = StreamDigest()
    for epoch, batches in enumerate(epochs):
        for i, batch in enumerate(batches):
            total = total.including(epoch, i, batch_digest(batch))
    return total


@pytest.mark.parametrize("n_workers", [0, 2])
def test_the_digest_runs_over_epochs_and_resumes(small: Run, n_workers: int) -> None:
    loader = make_loader(small.cfg, n_workers)
    list(loader)
    take(loader, 5)
    assert loader.digest == digest_of([small.epochs[0], small.epochs[1][:5]])
    state = loader.state_dict()
    assert StreamDigest.parse(state["digest"]) == loader.digest
    loader.shutdown()

    loader = make_loader(small.cfg, 2 - n_workers, state)
    assert loader.digest == StreamDigest.parse(state["digest"])
    list(loader)
    assert loader.digest == digest_of([*small.epochs[:2]])
    loader.set_epoch(2)
    list(loader)
    assert loader.digest == digest_of([*small.epochs])
    assert loader.digest.n_batches == 3 * small.n


def test_the_digest_of_a_data_set_is_the_loaders(small: Run) -> None:
    ds = ShuffledActivations(small.cfg)
    list(ds)
    take(ds, 5)
    assert ds.digest == digest_of([small.epochs[0], small.epochs[1][:5]])
    ds.set_epoch(2)
    list(ds)
    assert ds.digest == digest_of([small.epochs[0], small.epochs[1][:5], small.epochs[2]])


def test_a_part_of_a_run_adds_to_the_rest(small: Run) -> None:
    ds = ShuffledActivations(small.cfg)
    take(ds, 5)
    rest = ShuffledActivations(small.cfg, rank=0, world_size=1)
    rest.load_state_dict({**ds.state_dict(), "digest": str(StreamDigest())})
    list(rest)
    assert ds.digest + rest.digest == digest_of([small.epochs[0]])


def test_any_change_changes_the_digest(small: Run) -> None:
    whole = digest_of([small.epochs[0]])
    assert whole != digest_of([small.epochs[1]])
    batches = [type(b)({key: column.clone() for key, column in b.items()}) for b in small.epochs[0]]
    assert digest_of([batches]) == whole

    batches[3]["token_idx"][[4, 5]] = batches[3]["token_idx"][[5, 4]]
    batches[3]["example_idx"][[4, 5]] = batches[3]["example_idx"][[5, 4]]
    assert digest_of([batches]) != whole, "two rows changed places"
    batches[3] = small.epochs[0][3]
    batches[2], batches[3] = batches[3], batches[2]
    assert digest_of([batches]) != whole, "two batches changed places"
    assert digest_of([small.epochs[0][:-1]]) != whole


def test_the_digest_sees_the_layer(small: Run) -> None:
    cfg = dataclasses.replace(small.cfg, layer="all")
    (batch, *_) = ShuffledActivations(cfg)
    other = type(batch)({**batch, "layer": 10 - batch["layer"]})
    assert batch_digest(other) != batch_digest(batch)


def test_a_batch_has_its_digest_whichever_process_made_it(small: Run) -> None:
    for batch in DataLoader(ShuffledActivations(small.cfg), num_workers=2):
        assert batch.digest == batch_digest(batch)


@pytest.mark.parametrize("text", ["", "12", "0123456789abcde-3", "0123456789abcdef", "0123456789abcdeg-1"])
def test_text_that_is_no_digest(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 -- the caller says what is wrong
        StreamDigest.parse(text)


# What is where, without reading


SELECTIONS: dict[str, dict[str, Any]] = {
    "content": {},
    "special": {"tokens": "special"},
    "all tokens": {"tokens": "all"},
    "content, all layers": {"layer": "all"},
    "special, all layers": {"tokens": "special", "layer": "all"},
    "all tokens, all layers": {"tokens": "all", "layer": "all"},
    "side by side": {"tokens": "all", "layer": (7, 3)},
    "without labels": {"ignore_labels": [0, 3]},
    "all tokens and layers without labels": {"tokens": "all", "layer": "all", "ignore_labels": [1, 2, 5]},
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_locate_and_find(large: Run, selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both agree with every row of every batch, of two epochs and both orders; no shard is opened."""
    fields = SELECTIONS[selection]
    cfgs: list[Config] = [dataclasses.replace(large.cfg, batch_size=37, **fields)]
    if "ignore_labels" not in fields:
        cfgs.append(OrderedConfig(**{"shards": large.cfg.shards, "layer": 7, "batch_size": 37, **fields}))
    for cfg in cfgs:
        ds = contracts.make_data_set(cfg)
        epochs = [list(ds), list(ds)]
        other = contracts.make_data_set(cfg)
        monkeypatch.setattr(other._store, "opened", _refuse)
        for epoch, batches in enumerate(epochs):
            for i, batch in enumerate(batches):
                columns = [key for key in ("example_idx", "token_idx", "layer") if key in batch]
                where = other.locate(i, epoch)
                assert list(where) == columns
                for key in columns:
                    assert torch.equal(where[key], batch[key])
                if i % 9 == 0 or i == len(batches) - 1:
                    rows = zip(*(batch[key].tolist() for key in columns), strict=True)
                    assert [other.find(*row, epoch=epoch) for row in rows] == [(i, r) for r in range(len(batch["act"]))]


def _refuse(*args: Any) -> Iterator[int]:
    raise AssertionError("a shard was opened")


def test_locate_and_find_use_the_latest_epoch(small: Run) -> None:
    ds = ShuffledActivations(small.cfg)
    ds.set_epoch(1)
    first = small.epochs[1][0]
    assert torch.equal(ds.locate(0)["example_idx"], first["example_idx"])
    assert ds.find(int(first["example_idx"][3]), int(first["token_idx"][3])) == (0, 3)


def test_locate_and_find_refuse_what_is_not_there(small: Run) -> None:
    ds = ShuffledActivations(dataclasses.replace(small.cfg, layer="all", ignore_labels=[0]))
    for batch_idx in (-1, ds.n_batches):
        with pytest.raises(IndexError, match=f"batch {batch_idx} is out of range"):
            ds.locate(batch_idx)
    assert ds.find(1, 0, 3)[0] < ds.n_batches
    # Example, token, layer; the label of token 0 of example 0 is 0.
    for sample in [(25, 1, 3), (-1, 1, 3), (1, 6, 3), (1, -1, 3), (1, 1, 4), (1, 1, None), (0, 0, 3)]:
        with pytest.raises(IndexError, match="this selection has no such sample"):
            ds.find(*sample)
