"""Ranks and workers: what they yield together is C, whoever they are and however they are started."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contracts
import factory
import pytest
import torch
import torch.distributed
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    OrderedActivations,
    OrderedConfig,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    StreamDigest,
)

pytestmark = pytest.mark.filterwarnings(contracts.MANY_WORKERS)

HERE = Path(__file__).parent
WORLD_SIZES = [1, 2, 3, 4, 8]

# (examples, examples in a shard, config), with 6 samples in an example and 12 in a batch.
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "24 full batches": (48, 13, {"buffer_size": 8}),
    "24 full batches and another": (49, 13, {"buffer_size": 8}),
    "all buffered": (49, 13, {"buffer_size": 64}),
    "26 full batches and another, one shard, layers side by side": (53, 100, {"buffer_size": 8, "layer": (7, 3)}),
    "3 batches": (5, 2, {"buffer_size": 8}),
    "1 batch": (1, 2, {"buffer_size": 8}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], int]:
    n_examples, per_shard, fields = CASES[request.param]
    root = tmp_path_factory.mktemp("ranks") / "shards"
    shards = factory.make_shards(root, n_examples=n_examples, examples_per_shard=per_shard)
    return shards, {"batch_size": 12, "layer": 7, **fields}, list(CASES).index(request.param)


def together(per_rank: list[contracts.Batches]) -> contracts.Batches:
    """Concatenate over steps and ranks; refuses ranks that yield different numbers."""
    return [batch for step in zip(*per_rank, strict=True) for batch in step]


def padded(whole: contracts.Batches, world_size: int, drop_last: bool) -> contracts.Batches:
    """What the ranks must yield together, by the definition."""
    n = len(whole)
    if drop_last:
        return whole[: n // world_size * world_size]
    return [whole[i % n] for i in range(-(-n // world_size) * world_size)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_together_yield_the_sequence(
    case: tuple[Path, dict[str, Any], int], world_size: int, drop_last: bool
) -> None:
    shards, fields, number = case
    cfg = ShuffledConfig(shards=shards, drop_last=drop_last, **fields)
    whole = list(ShuffledActivations(cfg))
    # Which batches are left out is settled before there are workers: one case has all numbers of them. Else two of the
    # six have each number of ranks with each number of workers.
    some = (0,) if drop_last else (0, 1 + (world_size + number) % 3)
    for n_workers in (0, 1, 2, 3) if drop_last and len(whole) == 26 else some:
        per_rank = []
        for rank in range(world_size):
            ds = ShuffledActivations(cfg, rank=rank, world_size=world_size)
            per_rank.append(list(DataLoader(ds, num_workers=n_workers)))
            assert len(per_rank[-1]) == len(ds)
        contracts.assert_same(together(per_rank), padded(whole, world_size, drop_last))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_in_file_order(case: tuple[Path, dict[str, Any], int], world_size: int, drop_last: bool) -> None:
    shards, fields, _ = case
    cfg = OrderedConfig(shards=shards, drop_last=drop_last, **fields)
    whole = list(OrderedActivations(cfg))
    per_rank = [list(OrderedActivations(cfg, rank=rank, world_size=world_size)) for rank in range(world_size)]
    contracts.assert_same(together(per_rank), padded(whole, world_size, drop_last))


# How rank and world size are found


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> ShuffledConfig:
    shards = factory.make_shards(tmp_path_factory.mktemp("ranks") / "shards", n_examples=61, examples_per_shard=13)
    return ShuffledConfig(shards=shards, layer=7, batch_size=12, buffer_size=8)


def digests(batches: Any) -> list[str]:
    return [contracts.digest([batch]) for batch in batches]


def test_the_launchers_variables_are_read_when_iterating(cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digests(ShuffledActivations(cfg))
    ds, explicit = ShuffledActivations(cfg), ShuffledActivations(cfg, rank=0, world_size=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert len(ds) == -(-len(whole) // 3)
    assert digests(ds) == (whole + whole)[1 : 3 * len(ds) : 3]
    assert digests(explicit) == (whole + whole)[0 : 2 * len(explicit) : 2]
    monkeypatch.delenv("WORLD_SIZE")
    ds.set_epoch(0)
    assert digests(ds) == whole


@pytest.mark.parametrize(("rank", "world_size"), [("3", "3"), ("-1", "2"), ("one", "2")])
def test_launchers_variables_that_make_no_sense(
    cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str
) -> None:
    ds = ShuffledActivations(cfg)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError, match=r"RANK.*unset both"):
        iter(ds)


@pytest.mark.parametrize("world", [{"rank": 0}, {"world_size": 2}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_explicit_ranks_that_make_no_sense(cfg: ShuffledConfig, world: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="rank"):
        ShuffledActivations(cfg, **world)


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_torch_distributed_reaches_workers(cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch, context: str) -> None:
    """A spawned worker has no process group, so it must be told; torch.distributed wins over the variables."""
    whole = digests(ShuffledActivations(cfg))
    ds = ShuffledActivations(cfg)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    loader = DataLoader(ds, num_workers=2, multiprocessing_context=context)
    assert digests(loader) == (whole + whole)[2 : 4 * len(ds) : 4]


# Real processes


def torchrun(n_ranks: int, out: Path, **arguments: Any) -> list[dict[str, Any]]:
    """Run the script with that many ranks, and return what each of them found."""
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    command += [str(HERE / "torchrun_script.py"), json.dumps({**arguments, "out": str(out)})]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(n_ranks)]


def test_torchrun(cfg: ShuffledConfig, tmp_path: Path) -> None:
    """Two ranks with an all-reduce for each batch; preempted in the second epoch, then four ranks go on."""
    fields = {"layer": cfg.layer, "batch_size": cfg.batch_size, "buffer_size": cfg.buffer_size}
    common = {"shards": str(cfg.shards), "fields": fields, "epochs": 2}
    loader = ShuffledDataLoader(cfg)
    epochs = [digests(loader) for _ in range(3)]
    n, stop = len(epochs[0]), 6
    assert n % 2 == 1

    two = torchrun(2, tmp_path / "two", workers=1, state=None, stop=stop, **common)
    assert [found["len"] for found in two] == [n // 2 + 1] * 2
    for rank, found in enumerate(two):
        assert found["digests"] == [(epochs[0] + epochs[0])[rank : n + 1 : 2], epochs[1][rank : 2 * stop : 2]]

    rest = epochs[1][2 * stop :]
    four = torchrun(4, tmp_path / "four", workers=0, state=two[0]["state"], stop=n, **common)
    n_steps = [-(-len(rest) // 4), -(-n // 4)]
    for rank, found in enumerate(four):
        first = (rest + epochs[1])[rank : 4 * n_steps[0] : 4]
        assert found["digests"] == [first, (epochs[2] + epochs[2])[rank : 4 * n_steps[1] : 4]]

    # The digests of all ranks, before and after, add up to that of one process, but for the padding at the ends.
    padding = (n + 1, 2 * stop + 4 * n_steps[0], 4 * n_steps[1])
    assert wanted(cfg, padding) == sum((StreamDigest.parse(x["digest"]) for x in [*two, *four]), StreamDigest())


def wanted(cfg: ShuffledConfig, n_batches: tuple[int, ...]) -> StreamDigest:
    """The digest of so many batches of each epoch, the epoch repeated where there are more than it has."""
    ds, total = ShuffledActivations(cfg), StreamDigest()
    for epoch, n in enumerate(n_batches):
        whole = list(ds)
        for i in range(n):
            total = total.including(epoch, i, whole[i % len(whole)].digest)
    return total


# The advice about lanes


@pytest.fixture
def advice(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="saev_torch"):
        yield caplog


def test_advice_where_readers_do_not_divide_the_lanes(cfg: ShuffledConfig, advice: pytest.LogCaptureFixture) -> None:
    ds = ShuffledActivations(cfg, rank=0, world_size=3)
    for _ in range(2):
        list(ds)
    (record,) = advice.records
    assert (record.name, record.levelname) == ("saev_torch", "WARNING")
    message = record.getMessage()
    assert "3 reading processes (ranks x workers) do not divide 8 lanes" in message
    assert "[1, 2, 4, 8] reading processes, or n_lanes=3" in message


def test_advice_comes_once_from_many_workers(cfg: ShuffledConfig, capfd: pytest.CaptureFixture[str]) -> None:
    loader = DataLoader(ShuffledActivations(cfg, rank=0, world_size=2), num_workers=3)
    handler = logging.StreamHandler()
    logging.getLogger("saev_torch").addHandler(handler)
    for _ in range(2):
        list(loader)
    logging.getLogger("saev_torch").removeHandler(handler)
    assert capfd.readouterr().err.count("6 reading processes") == 1


@pytest.mark.parametrize(
    ("fields", "world_size", "rank"),
    [
        ({}, 4, 0),
        ({}, 3, 1),  # the first rank says it for all
        ({"n_lanes": 3, "buffer_size": 9}, 3, 0),
        ({"buffer_size": 64}, 3, 0),  # all data fit the buffer
    ],
)
def test_no_advice(
    cfg: ShuffledConfig, advice: pytest.LogCaptureFixture, fields: dict[str, Any], world_size: int, rank: int
) -> None:
    given = {"shards": cfg.shards, "layer": 7, "batch_size": 12, "buffer_size": 8, **fields}
    list(ShuffledActivations(ShuffledConfig(**given), rank=rank, world_size=world_size))
    assert not advice.records


def test_the_advice_is_good(cfg: ShuffledConfig, advice: pytest.LogCaptureFixture) -> None:
    """The settings that it names bring no advice again, and its `n_lanes` can be had."""
    list(ShuffledActivations(cfg, rank=0, world_size=3))
    advice.clear()
    for n_readers in (1, 2, 4, 8):
        list(ShuffledActivations(cfg, rank=0, world_size=n_readers))
    assert not advice.records
