"""Launchers: where a rank is learned, that it is said once, and that what contradicts it is not passed over."""

import copy
import itertools
import logging
import multiprocessing
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contracts
import factory
import pytest
import torch.distributed
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    IndexedConfig,
    IndexedDataset,
    OrderedActivations,
    OrderedDataLoader,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    StateError,
    make_ordered_config,
)

pytestmark = pytest.mark.filterwarnings(contracts.MANY_WORKERS)

PAIRS = [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"), ("PMI_RANK", "PMI_SIZE")]
PAIRS += [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")]
PAIRS += [("MASTER_ADDR", "MASTER_PORT"), ("TORCHELASTIC_RUN_ID", "GROUP_RANK")]
N_BATCHES = 31


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in itertools.chain(*PAIRS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> ShuffledConfig:
    """31 batches, the last not full."""
    shards = factory.make_shards(tmp_path_factory.mktemp("launchers") / "shards", n_examples=61, examples_per_shard=13)
    return ShuffledConfig(shards=shards, layer=7, batch_size=12, buffer_size=8)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="saev_torch"):
        yield caplog


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Any]:
    """What this process and its forked workers log, as a function that returns the lines."""
    path, logger = tmp_path / "log", logging.getLogger("saev_torch")
    handler, level = logging.FileHandler(path), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: path.read_text().splitlines()
    logger.removeHandler(handler)
    logger.setLevel(level)
    handler.close()


def digests(batches: Any) -> list[str]:
    return [contracts.digest([batch]) for batch in batches]


def setenv(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    for pair in said.split():
        monkeypatch.setenv(*pair.split("="))


def said(log: pytest.LogCaptureFixture) -> tuple[str, str]:
    """Level and text of the only line."""
    (record,) = log.records
    return record.levelname, record.getMessage()


# What is learned, and where


QUIET = {
    "": "rank 0 of 1 (no launcher found)",
    "RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost": "rank 1 of 2 (from RANK and WORLD_SIZE)",
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1": "rank 1 of 2 (from RANK and WORLD_SIZE)",
    "RANK=0 WORLD_SIZE=1": "rank 0 of 1 (from RANK and WORLD_SIZE)",
    # An allocation for one task, as notebooks have it.
    "SLURM_PROCID=0 SLURM_NTASKS=1": "rank 0 of 1 (no launcher found)",
    # Each of two tasks starts torchrun, or one process that has the task's number.
    "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 SLURM_PROCID=1 SLURM_NTASKS=2": "rank 3 of 4 (from RANK and WORLD_SIZE)",
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 SLURM_PROCID=1 SLURM_NTASKS=2": "rank 1 of 2 (from RANK and WORLD_SIZE)",
    "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 TORCHELASTIC_RUN_ID=x SLURM_PROCID=1 SLURM_NTASKS=2": (
        "rank 0 of 2 (from RANK and WORLD_SIZE)"
    ),
}
CONTRADICTED = {
    "RANK=0 WORLD_SIZE=2": (2, "rank 0 of 2 .* only 1/2 of the batches are read: unset both, or give rank=0, world_"),
    "SLURM_PROCID=1 SLURM_NTASKS=4": (1, "rank 0 of 1 .*SLURM_PROCID=1 and SLURM_NTASKS=4.* give rank='slurm'"),
    "SLURM_PROCID=0 SLURM_NTASKS=4": (1, "If there is only this process, rank=0, world_size=1 says so"),
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2": (1, "OMPI_COMM_WORLD_SIZE=2.* give rank='mpi'"),
    "PMI_RANK=1 PMI_SIZE=2": (1, "PMI_RANK=1 and PMI_SIZE=2.* give rank='mpi'"),
    "RANK=0 WORLD_SIZE=1 SLURM_PROCID=1 SLURM_NTASKS=2": (1, "give rank='slurm'"),
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=x SLURM_PROCID=1 SLURM_NTASKS=2": (2, "several processes may read the same"),
    "RANK=1": (1, "of RANK and WORLD_SIZE only RANK=1 is set"),
    "WORLD_SIZE=2": (1, "of RANK and WORLD_SIZE only WORLD_SIZE=2 is set"),
}


@pytest.mark.parametrize("environment", QUIET)
def test_nothing_contradicts(
    cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, environment: str
) -> None:
    setenv(monkeypatch, environment)
    ds = ShuffledActivations(cfg)
    next(iter(ds))
    assert said(log) == ("INFO", QUIET[environment])
    assert QUIET[environment] in repr(ds)


@pytest.mark.parametrize("environment", CONTRADICTED)
def test_a_contradiction_is_a_warning(
    cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, environment: str
) -> None:
    """What is read stays what it was: only the user knows which of the two is right."""
    setenv(monkeypatch, environment)
    world_size, message = CONTRADICTED[environment]
    ds = ShuffledActivations(cfg)
    assert len(digests(ds)) == -(-N_BATCHES // world_size)
    level, text = said(log)
    assert level == "WARNING"
    assert re.search(message, text), text


@pytest.mark.parametrize("world", [{"rank": 0, "world_size": 1}, {"rank": 1, "world_size": 2}])
def test_what_the_user_says_is_not_doubted(
    cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, world: dict[str, Any]
) -> None:
    setenv(monkeypatch, "RANK=2 WORLD_SIZE=4 SLURM_PROCID=1 SLURM_NTASKS=8")
    next(iter(ShuffledActivations(cfg, **world)))
    assert said(log) == ("INFO", f"rank {world['rank']} of {world['world_size']} (as arguments say)")


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("environment", "level", "message"),
    [
        ("", "INFO", "rank 0 of 1 (from torch.distributed)"),
        (
            "RANK=1 WORLD_SIZE=2",
            "WARNING",
            "the environment has RANK=1 and WORLD_SIZE=2; torch.distributed is believed",
        ),
        ("RANK=0 WORLD_SIZE=2", "WARNING", "the environment has WORLD_SIZE=2; torch.distributed is believed"),
        ("WORLD_SIZE=1", "INFO", "rank 0 of 1 (from torch.distributed)"),
        ("SLURM_PROCID=1 SLURM_NTASKS=2", "WARNING", "give rank='slurm'"),
    ],
)
def test_torch_distributed(
    cfg: ShuffledConfig,
    process_group: None,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
    environment: str,
    level: str,
    message: str,
) -> None:
    setenv(monkeypatch, environment)
    assert len(digests(ShuffledActivations(cfg))) == N_BATCHES
    found = said(log)
    assert (found[0], message in found[1]) == (level, True), found


# rank="slurm", rank="mpi"

LAUNCHED = {
    "slurm": "SLURM_PROCID={} SLURM_NTASKS={}",
    "mpi": "OMPI_COMM_WORLD_RANK={} OMPI_COMM_WORLD_SIZE={}",
    "mpi, of MPICH": "PMI_RANK={} PMI_SIZE={}",
}


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_a_launcher_that_is_named(
    cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, launcher: str
) -> None:
    """Its ranks together see each sample once; what a leftover says does not count."""
    setenv(monkeypatch, "RANK=0 WORLD_SIZE=5")
    whole = digests(ShuffledActivations(cfg, rank=0, world_size=1))
    name: Any = launcher.partition(",")[0]
    data = [ShuffledActivations(cfg, rank=name), ShuffledDataLoader(cfg, rank=name), OrderedDataLoader(
        make_ordered_config(cfg), rank=name
    )]  # fmt: skip
    seen: list[list[str]] = [[], [], []]
    for rank in range(4):
        log.clear()
        setenv(monkeypatch, LAUNCHED[launcher].format(rank, 4))
        for found, source in zip(seen, data, strict=True):
            source.set_epoch(0)
            assert len(source) == 8
            found += digests(source)
        level, text = said(log)
        variables = " and ".join(pair.partition("=")[0] for pair in LAUNCHED[launcher].split())
        assert (level, text) == ("INFO", f"rank {rank} of 4 (from {variables})")
        assert text in repr(data[1])
    # One batch comes twice, so that all ranks have equally many.
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(whole + whole[:1])
    assert len(set(seen[2])) == N_BATCHES


def test_workers_know_the_named_launcher(cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digests(ShuffledActivations(cfg))
    setenv(monkeypatch, "SLURM_PROCID=1 SLURM_NTASKS=2")
    loader = DataLoader(ShuffledActivations(cfg, rank="slurm"), num_workers=1, multiprocessing_context="spawn")
    assert digests(loader) == (whole + whole)[1:32:2]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("", "expected SLURM_PROCID and SLURM_NTASKS in the environment for rank='slurm', got neither; start .* srun"),
        ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2", "expected SLURM_PROCID and SLURM_NTASKS in the environment"),
        ("SLURM_PROCID=1", "expected integers in SLURM_PROCID and SLURM_NTASKS"),
        ("SLURM_PROCID=2 SLURM_NTASKS=2", "expected 0 <= SLURM_PROCID < SLURM_NTASKS"),
    ],
)
def test_a_named_launcher_that_is_not_there(
    cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch, environment: str, message: str
) -> None:
    setenv(monkeypatch, environment)
    ds = ShuffledActivations(cfg, rank="slurm")
    for ask in (iter, len):
        with pytest.raises(ConfigError, match=message):
            ask(ds)
    # Who debugs that must be able to print it.
    assert "SLURM_PROCID" in repr(ds)


@pytest.mark.parametrize("world", [{"rank": "torchrun"}, {"rank": "slurm", "world_size": 2}])
def test_launchers_that_make_no_sense(cfg: ShuffledConfig, world: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected an integer, 'slurm' or 'mpi'|expected none with rank='slurm'"):
        OrderedDataLoader(make_ordered_config(cfg), **world)


# Said once


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_rank_and_lanes_are_said_once(cfg: ShuffledConfig, lines: Any, context: str | None) -> None:
    """By whichever process knows, for all data sets, loaders, epochs and workers."""
    world: dict[str, Any] = {"rank": 0, "world_size": 3}
    options: dict[str, Any] = {"num_workers": 0 if context is None else 1, "multiprocessing_context": context}
    for _ in range(2):
        list(DataLoader(ShuffledActivations(cfg, **world), **options))
    if context != "spawn":
        loader = ShuffledDataLoader(cfg, **world, **options)
        for _ in range(2):
            list(loader)
    found = lines()
    assert sum("rank 0 of 3" in line for line in found) == 1, found
    # A spawned worker has no log.
    assert sum("reading processes" in line for line in found) == (context != "spawn"), found


def _iterate(ds: ShuffledActivations, log: Path) -> None:
    """What a process does that was started for a rank; its workers, which are forked, log to the same file."""
    logging.getLogger("saev_torch").addHandler(logging.FileHandler(log))
    logging.getLogger("saev_torch").setLevel(logging.INFO)
    forked: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"}
    for data in (DataLoader(ds, **forked), ds, ShuffledDataLoader(ds.cfg, **forked), ShuffledActivations(ds.cfg)):
        list(data)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_every_process_says_it_for_itself(cfg: ShuffledConfig, tmp_path: Path, context: str) -> None:
    """Also where its parent has said so before."""
    ds, start = ShuffledActivations(cfg), multiprocessing.get_context(context)
    next(iter(ds))
    for i in range(2 if context == "fork" else 1):
        child: Any = start.Process(target=_iterate, args=(ds, tmp_path / str(i)))
        child.start()
        child.join(240)
        child.close()
        assert (tmp_path / str(i)).read_text() == "rank 0 of 1 (no launcher found)\n"


# What a loader says of itself


def test_repr(cfg: ShuffledConfig) -> None:
    common = f"of {cfg.shards}: tokens='content', layer=7, 31 batches of 12"
    ordered = make_ordered_config(cfg)
    for make, source in ((ShuffledActivations, cfg), (ShuffledDataLoader, cfg), (OrderedDataLoader, ordered)):
        found: Any = make
        assert repr(found(source)) == f"<{make.__name__} {common}, 31 of them for rank 0 of 1 (no launcher found)>"
    alone = OrderedActivations(ordered, rank=1, world_size=2)
    assert repr(alone) == f"<OrderedActivations {common}, 16 of them for rank 1 of 2 (as arguments say)>"
    assert repr(pickle.loads(pickle.dumps(alone))) == repr(copy.deepcopy(alone)) == repr(alone)
    ds = IndexedDataset(IndexedConfig(cfg.shards, layer="all"))
    wanted = f"<IndexedDataset of {cfg.shards}: tokens='content', layer='all', {len(ds)} samples, whatever the rank>"
    assert repr(ds) == wanted


@pytest.mark.parametrize(("world_size", "n"), [(1, 31), (2, 16)])
def test_batches_that_are_left(cfg: ShuffledConfig, world_size: int, n: int) -> None:
    world: dict[str, Any] = {"rank": 0, "world_size": world_size}
    for source in (ShuffledActivations(cfg, **world), ShuffledDataLoader(cfg, **world, num_workers=1)):
        assert source.n_batches_left == len(source) == n
        batches = iter(source)
        for taken in range(1, n):
            next(batches)
            assert source.n_batches_left == n - taken
            if taken == 5:
                state = source.state_dict()
        # Behind the last one the next epoch is left, as in the state.
        next(batches)
        assert source.n_batches_left == n
        source.set_epoch(4)
        assert source.n_batches_left == n
        source.load_state_dict(state)
        assert (source.n_batches_left, len(source)) == (n - 5, n)
        assert len(list(source)) == n - 5
        assert source.n_batches_left == n
        del batches
    # Four ranks continue where one or two stood: equally many batches for each.
    data = [OrderedActivations(make_ordered_config(cfg), rank=rank, world_size=4) for rank in range(4)]
    for ds in data:
        ds.load_state_dict(OrderedActivations(make_ordered_config(cfg), **world).state_dict(n_batches=5))
        assert (ds.n_batches_left, len(ds)) == (-(-(N_BATCHES - 5 * world_size) // 4), 8)
        assert len(list(ds)) == -(-(N_BATCHES - 5 * world_size) // 4)


def test_only_the_consumer_knows_what_workers_have_left(cfg: ShuffledConfig) -> None:
    ds = ShuffledActivations(cfg)
    loader = DataLoader(ds, num_workers=1)
    batches = iter(loader)
    next(batches)
    with pytest.raises(StateError, match="n_batches_left: expected a count of what was taken"):
        _ = ds.n_batches_left
    del batches
    ds.set_epoch(0)
    assert ds.n_batches_left == N_BATCHES


def test_persistent_workers_and_breaks(cfg: ShuffledConfig) -> None:
    loader = ShuffledDataLoader(cfg, num_workers=2, persistent_workers=True)
    for _ in range(2):
        for taken, _batch in enumerate(loader, start=1):
            assert loader.n_batches_left == N_BATCHES - taken or taken == N_BATCHES
            if taken == 7:
                break
        assert loader.n_batches_left == N_BATCHES - 7
    # Looking into the data set meanwhile changes nothing.
    next(iter(loader.dataset))
    assert loader.n_batches_left == N_BATCHES - 7
    loader.shutdown()


def test_the_environment_is_left_alone(cfg: ShuffledConfig) -> None:
    before = dict(os.environ)
    list(ShuffledDataLoader(cfg))
    assert dict(os.environ) == before
