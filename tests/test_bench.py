"""The benchmark and the doctor: that they run, and that what they say follows from what they measured."""

import ctypes
import dataclasses
import errno
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import factory
import numpy as np
import psutil
import pytest
import torch
import uring
from conftest import wait_until
from torch.utils.data import DataLoader

from saev_torch import (
    FormatError,
    IndexedConfig,
    IndexedDataset,
    Metadata,
    OrderedConfig,
    ShuffledConfig,
    ShuffledDataLoader,
)
from saev_torch.__main__ import main
from saev_torch.bench import doctor, machine, raw
from saev_torch.bench.advice import Vitals, interpolate, note_few, note_short, note_start, recommend
from saev_torch.bench.command import _wants_layers
from saev_torch.bench.data import BenchData, choose_ignored, example_nbytes, make
from saev_torch.bench.epochs import run_epochs
from saev_torch.bench.measuring import Measured, MemoryUse, family, measure_statistics, processor_s, pss_nbytes
from saev_torch.bench.raw import grid_pieces, layer_pieces, read_rate, staged_rate
from saev_torch.bench.rounds import compare_cold, compare_warm
from saev_torch.bench.shapes import SHAPES, run_shapes
from saev_torch.bench.sides import IndexBatches, MemmapBatches, MemmapSamples, Side, make_sides
from saev_torch.processes import machine as limits
from saev_torch.reading import reader as reading
from saev_torch.reading.direct import DirectReader
from saev_torch.reading.extents import Extents
from saev_torch.reading.ring import Ring
from saev_torch.reading.store import ShardStore
from saev_torch.stats import streaming
from saev_torch.writing.progress import Progress

Make = Callable[..., Path]

_WARM_ONLY = {"read", "gather"}
_LOADERS = {"shuffled-0", "shuffled-1", "ordered-0", "ordered-1", "indexed-1", "scaled-0", "scaled-1", "labels-1",
            "layers-1", "statistics", "memmap-0", "memmap-1", "samples-0", "samples-1"}  # fmt: skip


def _bench(*args: str | Path, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-m", "saev_torch", "bench", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **env})


def _numbers(found: Any) -> Iterator[float]:
    if isinstance(found, dict | list):
        for one in found.values() if isinstance(found, dict) else found:
            yield from _numbers(one)
    elif isinstance(found, float):
        yield found


def _check_spread(spread: dict[str, Any], expected: list[float]) -> None:
    assert spread["rounds"] == pytest.approx(expected)
    assert spread["median"] == pytest.approx(statistics.median(expected))
    assert (spread["min"], spread["max"]) == (min(spread["rounds"]), max(spread["rounds"]))


def _check_ratios(section: dict[str, Any], limit: list[float]) -> None:
    """Compute every ratio again from the rates of its round."""
    sides = section["sides"]
    _check_spread(section["limit_gb_per_s"], limit)

    def rounds(name: str, key: str) -> list[float]:
        found: list[float] = sides[name][key]["rounds"]
        return found

    def best(kind: str) -> list[float]:
        return [
            max(row) for row in zip(*(rounds(n, "samples_per_s") for n in sides if n.startswith(kind)), strict=True)
        ]

    for name, side in sides.items():
        figures = (rounds(name, "gb_per_s"), rounds(name, "samples_per_s"))
        for rate in (*figures[0], *figures[1]):
            assert math.isfinite(rate)
            assert rate > 0
        _check_spread(side["to_limit"], [a / b for a, b in zip(figures[0], limit, strict=True)])
        for kind in ("memmap", "samples"):
            if name in _LOADERS:
                _check_spread(side[f"to_{kind}"], [a / b for a, b in zip(figures[1], best(kind), strict=True)])
        if name in ("labels-1", "layers-1", "scaled-1"):
            plain = rounds("shuffled-1", "samples_per_s")
            _check_spread(side["to_shuffled"], [a / b for a, b in zip(figures[1], plain, strict=True)])
        if name == "statistics":
            _check_spread(side["to_ordered"], [a / b for a, b in zip(figures[1], best("ordered"), strict=True)])


def test_bench(tmp_path: Path) -> None:
    """Everything, warm and cold, on data that it makes and removes again."""
    (tmp_path / "tmp").mkdir()
    out = tmp_path / "figures.json"
    size = ("--make-gb", "0.01", "--layers", "3", "--batch-size", "256", "--buffer-size", "4", "--workers", "0,1")
    plot = tmp_path / "epochs.svg"
    how = ("--quick", "--cold", "--touch", "--json", out, "--plot", plot)
    done = _bench(*size, *how, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "tmp").glob("saev_torch*")) == []
    assert list((tmp_path / "cache").rglob("*.npz")) == []

    found = json.loads(out.read_text())
    assert all(math.isfinite(number) for number in _numbers(found))
    assert found["data"]["n_samples"] == 17 * 196
    assert found["data"]["ignored_share"] == pytest.approx(1 / 3, abs=0.05)
    warm, cold = found["warm"]["sides"], found["cold"]["sides"]
    assert set(warm) == _WARM_ONLY | _LOADERS
    assert set(cold) == {"raw-1", "raw-4", "raw-16"} | _LOADERS
    read, gather = (warm[name]["gb_per_s"]["rounds"] for name in ("read", "gather"))
    cores = found["machine"]["cores"]
    _check_ratios(found["warm"], [cores / (1 / a + 1 / b) for a, b in zip(read, gather, strict=True)])
    raw = zip(*(cold[f"raw-{n}"]["gb_per_s"]["rounds"] for n in (1, 4, 16)), strict=True)
    _check_ratios(found["cold"], [max(row) for row in raw])
    assert 0 <= found["cold"]["cached_share"] <= 1
    assert min(found["first_batch_s"]["rounds"]) > 0
    assert [use["n_workers"] for use in found["memory"]] == [0, 1]
    for use in found["memory"]:
        assert 0 < max(use["deciles_nbytes"]) <= use["peak_nbytes"]

    epochs = found["epochs"]
    assert {*epochs["sides"]} == {"shuffled-0", "shuffled-1"}
    for side in epochs["sides"].values():
        assert {*side} == {"first_cold", "first", "later", "steady"}
        assert min(min(one["rounds"]) for one in side.values()) > 0
    limits = {"one pass", *(f"cached-{n}" for n in (1, 4, 16))}
    assert limits <= {*epochs["limits"]} <= limits | {f"direct-{n}" for n in (1, 4, 16)}
    assert min(one["median"] for one in epochs["limits"].values()) > 0
    assert re.search(r"first, from disk +first, in memory +later epochs +steady state\n", done.stdout)
    assert re.search(r"\nlimit( +[\d.]+){4}\n", done.stdout)
    assert b"steady state" in plot.read_bytes()

    for name in {*warm, *cold}:
        assert f"\n{name} " in done.stdout
        assert name in done.stderr
    assert "\nfirst batch: " in done.stdout
    assert "\nmemory: " in done.stdout


def test_data_of_less_than_three_buffers_have_no_steady_state(make_shards: Make, tmp_path: Path) -> None:
    data = BenchData.open(make_shards(), 7)
    for buffer_size, columns in (
        (3, {"first_cold", "first", "later", "steady"}),
        (4, {"first_cold", "first", "later"}),
    ):
        table = run_epochs(1, data, data.config(8, buffer_size), [0])
        assert {*table.sides["shuffled-0"]} == columns
        has_note = any("9 batches are less than 3 buffers of 4" in note for note in table.notes)
        assert has_note == (buffer_size == 4)
        assert str(table).splitlines()[1].endswith(" -") == has_note


def test_reads_past_the_page_cache_have_every_byte(make_shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(make_shards(d_model=100, n_examples=60, examples_per_shard=16))
    found = raw.direct_rate(store, grid_pieces(store, 7000), n_threads=2)
    assert found is None or found.nbytes == factory.oracle(store.metadata).nbytes

    def refuse(fd: int, command: int, value: int) -> None:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    assert raw.direct_rate(store, grid_pieces(store, 7000), n_threads=1) is None


def test_one_pass_goes_through_all_of_the_memory(make_shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    store, places, preadv = ShardStore(make_shards()), set(), os.preadv

    def note(fd: int, buffers: list[memoryview], offset: int) -> int:
        places.add(np.frombuffer(buffers[0], dtype=np.uint8).ctypes.data)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    read_rate(store, grid_pieces(store, 100), repeat=False, memory_nbytes=1000)
    assert len(places) == 10


def test_shapes_are_held_against_the_main_one(tmp_path: Path) -> None:
    shapes = {name: dataclasses.replace(shape, batch_size=64, n_workers=0) for name, shape in SHAPES.items()}
    table = run_shapes(1, 0.005, 64, tmp_path, {name: shapes[name] for name in ("main", "narrow", "layers")})
    assert list(tmp_path.iterdir()) == []
    found = table.to_json()
    assert {*found} == {"main", "narrow", "layers"}
    for shape in found.values():
        assert shape["to_main"]["median"] == pytest.approx(
            shape["gb_per_s"]["median"] / found["main"]["gb_per_s"]["median"]
        )
        assert shape["gb_per_s"]["median"] > 0
    assert re.search(r"\nlayers .* d_model 768, 1 of 12 layers", str(table))


def test_bench_on_given_shards_and_some_sides(make_shards: Make, tmp_path: Path) -> None:
    shards, several = make_shards(layers=(7,), labels=False), make_shards(layers=(3, 7, 9))
    before = {path: path.read_bytes() for path in shards.iterdir()}
    out = tmp_path / "figures.json"
    done = _bench(shards, "--batch-size", "8", "--buffer-size", "4", "--quick", "--json", out,
                  "--only", "shuffled-0,layers", "--layers-shards", several)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["warm"]["sides"]) == {"read", "gather", "shuffled-0", "layers-2"}
    assert not {"cold", "memory", "first_batch_s"} & set(found)
    assert {path: path.read_bytes() for path in shards.iterdir()} == before


@pytest.mark.parametrize(
    ("only", "wanted"), [([], True), (["layers"], True), (["memmap", "layers-2"], True), (["labels-2"], False)]
)
def test_data_of_several_layers_are_made_where_they_are_wanted(only: list[str], wanted: bool) -> None:
    assert _wants_layers(only) == wanted


def test_doctor(make_shards: Make, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    shards = make_shards()
    done = _bench(shards, "--doctor", "--quick", "--batch-size", "8", "--buffer-size", "4", "--json", out)
    assert done.returncode == 0, done.stderr
    for line in ("machine: ", "cores: ", "memory: ", "/dev/shm: ", "file descriptors: ", "measured, in GB/s: ",
                 "recommended\n", "  num_workers = ", "  n_threads = ", "  n_lanes = ", "  block_size = ",
                 "  buffer_size = ", "predicted, first epoch: ", "predicted, later epochs: ", "checked: "):  # fmt: skip
        assert f"\n{line}" in f"\n{done.stdout}"
    found = json.loads(out.read_text())
    assert all(math.isfinite(number) for number in _numbers(found))
    for grid in (found["cold"], found["warm"]):
        assert {(row["n_threads"], row["block_nbytes"] >> 10) for row in grid} == {
            (t, nbytes) for t in (1, 2, 4, 8, 16) for nbytes in (12, 48, 192, 768, 4096)
        }
        assert min(row["gb_per_s"] for row in grid) > 0
    cores = found["machine"]["n_affinity"]
    if found["machine"]["cpu_quota"] is None:
        assert found["limit"] == pytest.approx(cores / (1 / found["read"] + 1 / found["gather"]))
    chosen = found["recommended"]
    forecast = chosen["forecast"]
    assert forecast["copying"] == found["copying"][str(chosen["num_workers"])]
    lower = min(forecast["disk"], forecast["copying"])
    assert forecast["first_s"] == pytest.approx(11 * 6 * 8 * 4 / 1e9 / lower)
    assert found["checked"] > 0
    # What it recommends can be pasted.
    code = re.search(r"\nto paste\n  (cfg = .*)\n  (loader = .*)\n", done.stdout)
    assert code is not None
    names = {"ShuffledConfig": ShuffledConfig, "ShuffledDataLoader": ShuffledDataLoader}
    exec(f"{code[1]}\n{code[2]}", names)
    options = {name: chosen[name] for name in ("n_threads", "n_lanes", "block_size", "buffer_size")}
    cfg: Any = names["cfg"]
    assert cfg == ShuffledConfig(shards=shards, layer=7, batch_size=8, **options)
    assert names["loader"].num_workers == chosen["num_workers"]
    assert "drop_last" not in code[1]
    assert "note: 9 batches are few" in done.stdout
    assert "s needs no tuning" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "SHARDS: expected either"),
        (["shards", "--make-gb", "1"], "SHARDS: expected either"),
        (["shards", "--dtype", "bfloat16"], "--dtype: expected --make-gb"),
        (["shards", "--no-warm"], "--no-warm: expected --cold"),
        (["shards", "--shapes"], "--shapes: expected --make-gb"),
        (["shards", "--doctor", "--plot", "a.png"], "--plot: expected epochs to be measured"),
        (["shards", "--only", "memory", "--plot", "a.png"], "--plot: expected epochs to be measured"),
        (["shards", "--json", "no/such/folder/a.json"], "--json: expected a file in a folder"),
        (["--make-gb", "1", "--folder", "no/such/folder"], "--folder: expected a folder"),
        (["--make-gb", "1e9"], "--make-gb: expected room"),
        (["no/such/shards"], "Activations are not saved at no/such/shards: expected a shard directory"),
    ],
)
def test_bench_refuses_in_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"saev_torch: {re.escape(message)}.*\n", err)


def test_bench_knows_its_sides(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "shards", "--only", "shufled"])
    assert "expected some of shuffled, ordered" in capsys.readouterr().err


def test_an_interrupt_leaves_no_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "saev_torch", "bench", "--make-gb", "0.02", "--folder", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: process.poll() is not None or list(tmp_path.glob("*/*/*.part")))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, errors.decode()
    assert list(tmp_path.iterdir()) == []


# What a user would write instead


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("n_examples", [11, 12])
def test_memmap_loaders_yield_the_same_samples_as_ours(make_shards: Make, cls: bool, n_examples: int) -> None:
    shards = make_shards(cls=cls, n_examples=n_examples)
    data = BenchData.open(shards, 7)
    acts = factory.oracle(Metadata.load(shards))[:, 1, int(cls) :].reshape(data.n_samples, -1)
    ours = IndexedDataset(IndexedConfig(shards=shards, layer=7))
    assert np.array_equal(torch.stack([ours[i]["act"] for i in range(len(ours))]).numpy(), acts)
    whole = DataLoader(MemmapBatches(data), sampler=IndexBatches(data.n_samples, 10), batch_size=None)
    single = DataLoader(MemmapSamples(data), batch_size=10, shuffle=True)
    for loader in (whole, single):
        batches = list(loader)
        index = torch.cat([batch["index"] for batch in batches]).numpy()
        assert sorted(index) == list(range(data.n_samples))
        assert not np.array_equal(index, np.arange(data.n_samples))
        assert [len(batch["act"]) for batch in batches[:-1]] == [10] * (len(batches) - 1)
        assert np.array_equal(torch.cat([batch["act"] for batch in batches]).numpy(), acts[index])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_data_of_any_type_are_made(tmp_path: Path, dtype: str) -> None:
    data = BenchData.open(make(tmp_path, 3, 2, lambda n: None, dtype), None)
    assert data.store.metadata.dtype == dtype
    sizes = [path.stat().st_size for path in data.store.shards_dir.glob("acts*.bin")]
    assert sum(sizes) == 3 * 2 * example_nbytes(dtype)
    assert example_nbytes(dtype) == 196 * 768 * (4 if dtype == "float32" else 2)


def test_ignored_labels_are_about_a_third(make_shards: Make) -> None:
    shards = make_shards(n_examples=40)
    labels = factory.oracle_labels(Metadata.load(shards))
    chosen, share = choose_ignored(ShardStore(shards))
    assert share == pytest.approx(np.isin(labels, chosen).mean())
    assert share == pytest.approx(1 / 3, abs=0.08)
    assert choose_ignored(ShardStore(make_shards(labels=False))) == ([], 0.0)


# The clock and the ratios


@pytest.mark.parametrize(("limit_s", "is_cut"), [(60.0, False), (0.0, True)])
def test_statistics_are_one_pass_or_what_the_time_allows(make_shards: Make, monkeypatch, limit_s, is_cut) -> None:
    monkeypatch.setattr(streaming, "_TASK_NBYTES", 1000)
    # One thread, so that no other one goes on while it is stopped.
    monkeypatch.setattr(streaming, "count_cores", lambda: 1)
    monkeypatch.setattr(reading, "_HELP_AFTER_S", 1e9)
    monkeypatch.setattr(reading, "_CALL_S", 1e9)
    cfg = OrderedConfig(shards=make_shards(n_examples=60), layer=7)
    found = measure_statistics(cfg, 32, limit_s)
    assert found.is_cut == is_cut
    assert found.nbytes == 32 * found.n_samples
    assert 0 < found.n_samples <= 360
    assert (found.n_samples < 360) == is_cut


def _side(n_batches: int, n_settle: int, n_lanes: int, n_workers: int = 0) -> Side:
    return Side("some", lambda: pytest.fail("not to be made"), 4, n_workers, n_batches, n_settle, n_lanes)


def test_a_long_epoch_is_timed_in_its_middle() -> None:
    side = _side(n_batches=200, n_settle=64, n_lanes=8, n_workers=2)
    assert side.is_long
    assert [n for n in range(1, 100) if side.may_stop(n, True)] == list(range(8, 100, 8))
    # In the second epoch, at the latest before the buffer empties.
    assert side.n_before == 264
    assert next(n for n in range(1, 200) if side.may_stop(n, False)) == 72


def test_a_very_long_epoch_is_timed_in_its_first() -> None:
    side = _side(n_batches=800, n_settle=64, n_lanes=8)
    assert side.n_before == 128
    assert next(n for n in range(1, 800) if side.may_stop(n, False)) == 608


def test_a_short_epoch_is_timed_whole() -> None:
    side = _side(n_batches=80, n_settle=64, n_lanes=8)
    assert side.n_before == 144
    assert not side.is_long
    assert [n for n in range(1, 200) if side.may_stop(n, True)] == [80, 160]
    assert not any(side.may_stop(n, False) for n in range(1, 200))


def test_workers_without_a_buffer_are_timed_in_step() -> None:
    side = _side(n_batches=80, n_settle=6, n_lanes=0, n_workers=3)
    assert [n for n in range(1, 10) if side.may_stop(n, True)] == [3, 6, 9]


def _measured(*rates: float) -> list[Measured]:
    """Rates in GB/s, of samples of 1000 bytes, over two seconds of which half are spent computing."""
    return [Measured(round(2e6 * rate), round(2e9 * rate), 2.0, 0.75, 0.25) for rate in rates]


def test_ratios_are_taken_within_rounds() -> None:
    rounds = {
        "read": _measured(6, 3, 6),
        "gather": _measured(3, 6, 6),
        "shuffled-2": _measured(1, 2, 3),
        "labels-2": _measured(1, 1, 1),
        "memmap-0": _measured(1, 0.5, 1),
        "memmap-1": _measured(0.5, 1, 2),
    }
    found = compare_warm(rounds, cores=2)
    assert found.limit.rounds == pytest.approx((4, 4, 6))
    assert found.sides["shuffled-2"]["to_limit"].rounds == pytest.approx((1 / 4, 2 / 4, 3 / 6))
    assert found.sides["shuffled-2"]["to_memmap"].rounds == pytest.approx((1, 2, 3 / 2))
    assert found.sides["shuffled-2"]["to_memmap"].median == pytest.approx(1.5)
    assert found.sides["shuffled-2"]["cores_busy"].rounds == pytest.approx((0.5, 0.5, 0.5))
    assert found.sides["labels-2"]["to_shuffled"].rounds == pytest.approx((1, 1 / 2, 1 / 3))
    assert "to_samples" not in found.sides["shuffled-2"]
    assert "to_memmap" not in found.sides["read"]


def test_cold_sides_are_held_against_the_best_raw_read() -> None:
    cut = [dataclasses.replace(one, is_cut=True) for one in _measured(1, 1)]
    found = compare_cold({"raw-1": _measured(1, 4), "raw-4": _measured(2, 2), "memmap-0": cut})
    assert found.limit.rounds == (2, 4)
    assert found.sides["memmap-0"]["to_limit"].rounds == (0.5, 0.25)
    assert found.cut == ("memmap-0",)


def test_memory_that_is_allowed() -> None:
    use = MemoryUse(2, 8, 50_000_000, 80, (1_000, 2_000, 3_000), 3_500)
    assert use.allowed_nbytes == (8 + 6 * 3) * 50_000_000 + 3 * 350_000_000
    assert use.growth == 1.5


# The machine


def test_pieces_cover_the_layer_and_the_shards(make_shards: Make) -> None:
    shards = make_shards()
    store, acts = ShardStore(shards), factory.oracle(Metadata.load(shards))
    with machine.opened_shards(store) as fds:
        layer = b"".join(os.pread(fds[i], nbytes, offset) for i, offset, nbytes in layer_pieces(store, 7))
        whole = b"".join(os.pread(fds[i], nbytes, offset) for i, offset, nbytes in grid_pieces(store, 100))
    assert layer == acts[:, 1].tobytes()
    assert whole == acts.tobytes()
    rate = read_rate(store, grid_pieces(store, 100), n_threads=3, repeat=False)
    assert rate.nbytes == acts.nbytes


def test_the_scaled_sides_scale(make_shards: Make) -> None:
    data = BenchData.open(make_shards(), 7)
    for side in make_sides(data, None, data.config(8, 4), [0], []):
        scale = getattr(side.make().dataset, "scale", None)
        assert (scale is not None) == side.name.startswith("scaled")


@pytest.mark.parametrize("act_dtype", ["float32", "stored"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_sides_read_16_bits(make_shards: Make, dtype: str, act_dtype: Any) -> None:
    """Memmaps as float32, as nothing else trains with them."""
    data = BenchData.open(make_shards(dtype=dtype), 7)
    wanted = factory.oracle(data.store.metadata)[:, 1, 1:].reshape(-1, 8)
    wanted = wanted[np.lexsort(wanted.T)]
    for side in make_sides(data, None, data.config(8, 4, act_dtype), [0], []):
        acts = torch.cat([batch["act"] for batch in side.make()])
        is_stored = act_dtype == "stored" and not side.name.startswith(("memmap", "samples"))
        assert acts.dtype == (getattr(torch, dtype) if is_stored else torch.float32), side.name
        if not side.name.startswith("scaled"):
            got = acts.float().numpy()
            np.testing.assert_array_equal(got[np.lexsort(got.T)], wanted)


def test_the_memory_of_a_batch_follows_the_dtypes(make_shards: Make) -> None:
    for dtype, act_dtype, nbytes in (("float32", "stored", 4), ("bfloat16", "float32", 4), ("bfloat16", "stored", 2)):
        data = BenchData.open(make_shards(dtype=dtype), 7)
        vitals = Vitals(2, 1 << 30, data.store.metadata, data.config(8, 4, act_dtype), {})
        assert vitals.batch_nbytes == 8 * 8 * nbytes
        assert vitals.nbytes == 11 * 6 * data.store.metadata.row_nbytes


@pytest.mark.parametrize("has_ring", [True, False])
def test_the_doctor_reads_a_cold_disk_as_the_loader_does(make_shards: Make, monkeypatch, has_ring: bool) -> None:
    data, rates = (
        BenchData.open(make_shards(), 7),
        {"staged": Measured(7, 7 * _GB, 1.0), "raw": Measured(3, 3 * _GB, 1.0)},
    )
    monkeypatch.setattr(doctor, "staged_rate", lambda *args, **kwargs: rates["staged"] if has_ring else None)
    monkeypatch.setattr(doctor, "read_rate", lambda *args, **kwargs: rates["raw"])
    with Progress(100, "doctor", "steps") as progress:
        cold, warm = (doctor._measure_grid(data, 0.01, is_warm, progress) for is_warm in (False, True))
    assert set(warm.values()) == {3.0}
    assert set(cold.values()) == {7.0 if has_ring else 3.0}


@uring.needed
@pytest.mark.parametrize("task_nbytes", [1000, 1 << 20])
def test_reads_as_the_loader_does_have_every_byte(make_shards: Make, monkeypatch, task_nbytes: int) -> None:
    store = ShardStore(make_shards(d_model=100, n_examples=60, examples_per_shard=16))
    acts = factory.oracle(store.metadata)
    monkeypatch.setattr(raw, "_TASK_NBYTES", task_nbytes)
    found: dict[tuple[int, int], bytes] = {}
    read = DirectReader.read

    def note(reader: DirectReader, extents: Extents, *args: Any) -> None:
        read(reader, extents, *args)
        for (address, nbytes), shard, offset in zip(extents.vectors, extents.shards, extents.offsets, strict=True):
            found[int(shard), int(offset)] = ctypes.string_at(int(address), int(nbytes))

    monkeypatch.setattr(DirectReader, "read", note)
    pieces = grid_pieces(store, 700)
    rate = staged_rate(store, pieces[::-1], n_threads=3, seconds=60.0)
    assert rate is not None
    assert rate.nbytes == acts.nbytes
    assert b"".join(found[where] for where in sorted(found)) == acts.tobytes()
    cut = staged_rate(store, pieces, n_threads=1, seconds=0.0)
    assert cut is not None
    assert 0 < cut.nbytes <= min(acts.nbytes, max(700, task_nbytes))
    os.truncate(store.path(1), 500)
    with pytest.raises(FormatError, match="acts000001"):
        staged_rate(store, pieces, n_threads=2, seconds=60.0)


def test_without_a_ring_there_is_no_such_rate(make_shards: Make, monkeypatch) -> None:
    monkeypatch.setattr(Ring, "open", lambda: None)
    store = ShardStore(make_shards())
    assert staged_rate(store, grid_pieces(store, 700), n_threads=2, seconds=60.0) is None


def test_the_page_cache_is_looked_at(make_shards: Make) -> None:
    store = ShardStore(make_shards(d_model=512, n_examples=60, examples_per_shard=16))
    read_rate(store, grid_pieces(store, 1 << 16), repeat=False)
    assert machine.cached_share(store) == 1.0
    with machine.opened_shards(store) as fds:
        for fd in fds:
            os.fsync(fd)
    machine.drop_cache([store])
    assert 0.0 <= machine.cached_share(store) <= 1.0


def test_memory_and_time_of_this_process() -> None:
    own = psutil.Process()
    assert own in family()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        below = psutil.Process(child.pid)
        assert below in family()
        assert pss_nbytes([own]) > 10 << 20
        assert pss_nbytes([below, own]) > pss_nbytes([below]) > 0
    finally:
        child.communicate(b"\n")
    assert pss_nbytes([below]) == 0
    before = processor_s()
    deadline = time.process_time() + 0.1
    while time.process_time() < deadline:
        pass
    user_s, _ = processor_s() - before
    assert user_s > 0


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 300\nactive_file 100\n"},
        {
            "memory.limit_in_bytes": "1000",
            "memory.usage_in_bytes": "700",
            "memory.stat": "inactive_file 0\nactive_file 0\ntotal_inactive_file 300\ntotal_active_file 100\n",
        },
    ],
)
def test_limits_of_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for folder, limit in ((inner, "max"), (outer, None)):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(limit if limit and text == "1000" else text)
    (inner / "cpu.max").write_text("max 100000")
    (outer / "cpu.max").write_text("150000 100000")
    monkeypatch.setattr(limits, "_groups", lambda _: iter([inner, outer]))
    found = machine.look()
    assert (found.memory_limit_nbytes, found.available_nbytes) == (1000, 700)
    assert found.cpu_quota == 1.5
    assert found.cores == min(found.n_affinity, 1.5)


# The doctor's conclusions

_GB = 1_000_000_000


def _vitals(**fields: Any) -> Vitals:
    """A 300 GB data set of 768 float32 on a disk that likes large blocks and 4 threads; two cores."""
    md = Metadata(
        family="f", ckpt="c", layers=(1,), content_tokens_per_example=196, cls_token=True, d_model=768,
        n_examples=500_000, max_tokens_per_shard=500_000, data="", dataset=Path("d"),
    )  # fmt: skip
    cold = {
        (t, kb << 10): rate * min(t, 4) / 4
        for t in (1, 2, 4, 8, 16)
        for kb, rate in ((48, 0.5), (192, 1.0), (768, 1.4), (4096, 1.5))
    }
    cfg = ShuffledConfig(shards=Path("d"), layer=1)
    plain = Vitals(2, 64 * _GB, md, cfg, cold, {0: 2.0, 1: 2.2, 2: 3.0})
    return dataclasses.replace(plain, **fields)


def test_rates_are_interpolated_between_those_measured() -> None:
    grid = {(1, 100): 1.0, (1, 10_000): 3.0, (4, 100): 2.0, (4, 10_000): 6.0}
    assert interpolate(grid, 1, 1000) == pytest.approx(2.0)
    assert interpolate(grid, 3, 1000) == pytest.approx(2.0)
    assert interpolate(grid, 4, 100) == 2.0
    assert interpolate(grid, 9, 50) == 1.0
    assert interpolate(grid, 9, 10_001) == 6.0


def test_doctor_of_data_larger_than_memory() -> None:
    vitals = _vitals()
    found = recommend(vitals)
    # One worker copies more than the disk gives.
    assert found.num_workers == 1
    assert found.n_threads == 4
    assert found.buffer_size == 64
    forecast = found.forecast
    assert forecast is not None
    assert (forecast.first_bound, forecast.later_bound) == ("disk", "memory")
    assert forecast.first_s == forecast.later_s == pytest.approx(vitals.nbytes / 1e9 / forecast.disk)


def test_doctor_of_data_in_the_page_cache() -> None:
    vitals = _vitals(available_nbytes=1000 * _GB)
    found = recommend(vitals)
    assert (found.num_workers, found.n_threads, found.block_size) == (2, 2, None)
    forecast = found.forecast
    assert forecast is not None
    assert (forecast.first_bound, forecast.later_bound) == ("disk", "copying")
    assert forecast.later_s == pytest.approx(vitals.nbytes / 1e9 / 3.0)


def test_doctor_makes_blocks_larger_on_a_disk_that_needs_it() -> None:
    slow_small = {(t, nbytes): rate / 5 if nbytes < 1 << 22 else rate for (t, nbytes), rate in _vitals().cold.items()}
    vitals = _vitals(cold=slow_small)
    found = recommend(vitals)
    assert found.block_size == 2 * (vitals.predict(found.num_workers, 64).cfg.block_size or 0)
    larger = vitals.predict(found.num_workers, 64, found.block_size)
    assert larger.quality >= 0.5 * vitals.predict(found.num_workers, 64).quality
    assert "distinct examples" in found.reasons["block_size"]


@pytest.mark.parametrize(("share", "is_larger"), [(0.8, False), (0.7, True)])
def test_doctor_leaves_mixing_alone_for_the_last_of_a_disk(share: float, is_larger: bool) -> None:
    cold = {(t, kb << 10): share if kb < 4096 else 1.0 for t in (1, 16) for kb in (48, 768, 4096)}
    assert (recommend(_vitals(cold=cold)).block_size is not None) == is_larger


def test_doctor_lowers_the_buffer_to_what_fits() -> None:
    found = recommend(_vitals(available_nbytes=6 * _GB))
    assert 8 <= found.buffer_size < 64
    assert found.buffer_size % 8 == 0
    assert "64 would take more than half" in found.reasons["buffer_size"]
    assert recommend(_vitals(available_nbytes=1)).buffer_size == 1


def test_doctor_prefers_no_worker_only_where_it_is_much_faster() -> None:
    assert recommend(_vitals(copying={0: 3.0, 1: 1.0, 2: 1.2}, available_nbytes=1000 * _GB)).num_workers == 0
    found = recommend(_vitals(copying={0: 3.0, 1: 2.9, 2: 2.9}, available_nbytes=1000 * _GB))
    assert found.num_workers == 1
    assert "interpreter" in found.reasons["num_workers"]


def _checked(seconds: float, start_s: float, n_first: int = 100) -> Measured:
    return Measured(1000, 10**9, seconds, start_s=start_s, n_first=n_first)


def test_what_the_doctor_says_of_its_own_check() -> None:
    assert note_start(_checked(1.2, 0.2), 1.0) is None
    found = note_start(_checked(2.0, 1.0), 1.0)
    assert found is not None
    assert "1 of 2 s went by until the first batch came, as workers start" in found
    assert found.endswith("which the prediction leaves out; from then on it was 0.90 of it")
    found = note_start(_checked(2.0, 1.9), 1.0)
    assert found is not None
    assert found.endswith("the buffer fills, which the prediction leaves out")
    found = note_start(_checked(4.0, 1.0), 1.0)
    assert found is not None
    assert "from then on, too, it was 0.30 of what was predicted: the epoch is too short" in found
    found = note_start(_checked(4.0, 4.0, 1000), 1.0)
    assert found is not None
    assert found.endswith("there was no other batch")


def test_what_the_doctor_says_of_small_data() -> None:
    assert (note_few(32, 64), note_short(2.0)) == (None, None)
    assert note_few(1, 64) == (
        "note: 1 batch is few: such rates vary from run to run, and the buffer of 64 holds them all; a smaller "
        "--batch-size makes more"
    )
    assert str(note_few(3, 2)).startswith("note: 3 batches are few: such rates vary from run to run; a smaller")
    assert note_short(0.213) == "note: an epoch of 0.21 s needs no tuning; any options will do, 0 workers too"


def test_doctor_gives_one_reason_for_each_option() -> None:
    found = recommend(_vitals())
    for option in ("num_workers", "n_threads", "n_lanes", "block_size", "buffer_size"):
        assert found.reasons[option]
        assert "\n" not in found.reasons[option]
