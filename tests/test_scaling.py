"""`scale_norm`: one number for the data set, the same for every process, and never another one after a resume."""

import dataclasses
import errno
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from factory import Spec, write_acts
from torch.utils.data import DataLoader

from saev_torch import (
    FormatError,
    ReadError,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    StateError,
    compute_statistics,
)
from saev_torch.order.selection import Selection
from saev_torch.reading import crew, source
from saev_torch.reading import direct as staging
from saev_torch.reading import reader as reading
from saev_torch.reading.direct import DirectReader
from saev_torch.reading.extents import make_sample_extents
from saev_torch.reading.kernels import find_convert_kernels
from saev_torch.reading.ring import Ring
from saev_torch.reading.source import ConvertingReader, Source
from saev_torch.reading.store import ShardStore

SCALE = ("float32", "float32", True)
SPEC = Spec(n_examples=120, content_tokens=9, d_model=16, examples_per_shard=40, labels=True)


@pytest.fixture
def shards(make_shards):
    rng = np.random.default_rng(0)
    norms = rng.lognormal(2, 0.5, (120, 2, 10, 1))
    made = make_shards(SPEC)
    write_acts(made, (rng.standard_normal((120, 2, 10, 16)) * norms).astype(np.float32))
    return made


def config(shards, **fields) -> ShuffledConfig:
    return ShuffledConfig(**{"shards": shards, "layer": 7, "batch_size": 64, "buffer_size": 8, **fields})


def norms_of(batches) -> torch.Tensor:
    return torch.cat([torch.linalg.vector_norm(b["act"].double(), dim=-1).flatten() for b in batches])


@pytest.fixture(params=["torch", "compiled"])
def multiplying(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where numba is installed, activations are multiplied as they are read; else in batches."""
    if request.param == "torch":
        monkeypatch.setattr(source, "find_convert_kernels", lambda *names: None)
    else:
        assert find_convert_kernels(*SCALE) is not None
    return request.param


@pytest.mark.parametrize("layer", [7, "all", (3, 7)])
@pytest.mark.parametrize("tokens", ["content", "all", "special"])
@pytest.mark.usefixtures("multiplying")
def test_the_mean_norm_is_sqrt_d_model(shards, layer, tokens: str) -> None:
    ds = ShuffledActivations(config(shards, layer=layer, tokens=tokens, scale_norm=True))
    assert float(norms_of(ds).mean()) == pytest.approx(4.0, rel=1e-6)
    assert ds.scale != 1
    assert ShuffledActivations(config(shards)).scale is None


def test_ignored_labels_are_not_in_the_mean(shards) -> None:
    batches = list(ShuffledActivations(config(shards, scale_norm=True, ignore_labels=[0, 1, 2])))
    assert float(norms_of(batches).mean()) == pytest.approx(4.0, rel=1e-6)


def assert_scaled(cfg: ShuffledConfig, num_workers: int = 0) -> None:
    ds = ShuffledActivations(cfg)
    scaled = DataLoader(ds, batch_size=None, num_workers=num_workers)
    raw = ShuffledActivations(dataclasses.replace(cfg, scale_norm=False))
    for found, wanted in zip(scaled, raw, strict=True):
        # Bit for bit: a value that was multiplied twice, or not, shows.
        torch.testing.assert_close(found["act"], wanted["act"] * np.float32(ds.scale), rtol=0, atol=0)
        for key in wanted.keys() - {"act"}:
            assert torch.equal(found[key], wanted[key])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "fields", [{}, {"layer": "all", "tokens": "all"}, {"layer": (7, 3)}, {"ignore_labels": [1, 2]}]
)
@pytest.mark.usefixtures("multiplying")
def test_only_the_activations_change(shards, num_workers: int, fields) -> None:
    assert_scaled(config(shards, scale_norm=True, **fields), num_workers)


@pytest.mark.parametrize("where", ["in time", "a slow disk", "past the page cache"])
def test_values_are_multiplied_once_wherever_they_come_from(shards, monkeypatch, where: str) -> None:
    monkeypatch.setattr(reading, "_SLOW_NBYTES_PER_S", float("inf"))
    monkeypatch.setattr(reading, "_CALL_S", 0.0 if where == "a slow disk" else 1e9)
    monkeypatch.setattr(staging, "fits_page_cache", lambda nbytes: where != "past the page cache")
    ways = set()
    for owner, name in (
        (ConvertingReader, "_read_converting"),
        (ConvertingReader, "_read_then_convert"),
        (DirectReader, "_read"),
    ):
        way = f"{owner.__name__}.{name}"
        monkeypatch.setattr(owner, name, noting(getattr(owner, name), functools.partial(ways.add, way)))
    # Several tasks, because only the first tells that the disk is slow.
    monkeypatch.setattr(crew, "_TASK_NBYTES", 1)
    monkeypatch.setattr(crew, "_MAX_TASK_NBYTES", 1000)
    assert_scaled(config(shards, scale_norm=True))
    if where == "in time":
        assert ways == {"ConvertingReader._read_converting"}
    elif where == "a slow disk":
        assert ways == {"ConvertingReader._read_converting", "ConvertingReader._read_then_convert"}
    elif Ring.open() is not None:
        assert ways == {"DirectReader._read", "ConvertingReader._read_then_convert"}


def noting(function, note):
    def call(*args):
        note()
        return function(*args)

    return call


def test_what_fails_is_read_again_and_multiplied_once(make_shards, monkeypatch) -> None:
    """Of each call some reads fail, or come short."""
    init, calls = ConvertingReader.__init__, []

    def fail(read_and_convert, fds, *args):
        gone = np.full_like(fds, -1)
        kept = np.arange(len(fds)) % 3 != len(calls) % 3
        read_and_convert(np.where(kept, fds, gone), *args)
        args[4][~kept] = (-errno.EINTR, 0)[len(calls) % 2]
        calls.append(int((~kept).sum()))

    def wrapped(self, *args):
        init(self, *args)
        self._read_and_convert = functools.partial(fail, self._read_and_convert)

    monkeypatch.setattr(ConvertingReader, "__init__", wrapped)
    # Wide rows, which are not worth reading over.
    wide = make_shards(Spec(n_examples=60, content_tokens=20, d_model=5000))
    assert_scaled(config(wide, scale_norm=True, block_size=2, buffer_size=2))
    assert sum(calls) > 0


def test_a_file_that_became_shorter(shards) -> None:
    batches = iter(ShuffledActivations(config(shards, scale_norm=True, batch_size=16, buffer_size=4)))
    next(batches)
    for path in shards.glob("acts*"):
        os.truncate(path, 0)
    with pytest.raises((ReadError, FormatError), match=r"acts00000\d\.bin: expected \d+ bytes"):
        list(batches)


def test_what_is_compiled_is_there_before_workers_are_forked(shards) -> None:
    find_convert_kernels.cache_clear()
    ShuffledActivations(config(shards))
    assert not find_convert_kernels.cache_info().currsize
    ShuffledActivations(config(shards, scale_norm=True))
    assert find_convert_kernels.cache_info().currsize


def test_a_stall_is_named(make_shards) -> None:
    """Where in a range of reads a compiled loop stands, another thread sees."""
    store = ShardStore(make_shards(Spec(n_examples=60, content_tokens=20, d_model=5000)))
    selection = Selection(store.metadata, "content", 7)
    samples = np.arange(0, 900, 90)
    out = np.empty((10, 5000), dtype=np.float32)
    places = out.ctypes.data + 20_000 * np.arange(10)
    (extents,) = make_sample_extents(selection, selection.cells(samples), places)
    reader, told = Source(store, scale=0.5).open_reader(), []

    def read(fds, vectors, firsts, counts, offsets, got, trash, by, stage):
        for i in range(len(got)):
            told.append(reader.spot.where())
            got[i] = extents.nbytes[2 + i]

    reader._read_and_convert = read
    reader.read(extents, 2, len(extents.nbytes))
    store.close()
    assert len(told) == 8
    assert told == [extents.where(i) for i in range(2, len(extents.nbytes))]


def test_gaps_are_read_over_and_not_scaled(shards, monkeypatch) -> None:
    """What is read between two samples goes to one place, and would be multiplied again and again there."""
    ends = []
    read, read_then_convert = DirectReader._read, ConvertingReader._read_then_convert
    before = []

    def note_before(self, extents, *args):
        read(self, extents, *args)
        before.append(extents.trash.copy())

    def note(self, extents, start, stop):
        read_then_convert(self, extents, start, stop)
        assert not before or np.array_equal(extents.trash, before.pop())
        ends.append(int((extents.vectors[:, 0] == extents.trash.ctypes.data).sum()))

    monkeypatch.setattr(DirectReader, "_read", note_before)
    monkeypatch.setattr(ConvertingReader, "_read_then_convert", note)
    monkeypatch.setattr(staging, "fits_page_cache", lambda nbytes: False)
    assert_scaled(config(shards, scale_norm=True, ignore_labels=[1, 2, 4]))
    if Ring.open() is not None:
        assert sum(ends) > 10


def test_a_sampled_scale_is_within_its_standard_error(shards) -> None:
    cfg = config(shards, scale_norm=True, scale_samples=400)
    sampled = compute_statistics(cfg, n_sampled=400)
    assert not sampled.is_full
    mean = float(norms_of(ShuffledActivations(cfg)).mean())
    assert mean != pytest.approx(4.0, rel=1e-6)
    assert abs(mean - 4.0) < 3 * 4.0 * sampled.mean_norm_error / sampled.total.mean_norm


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_scale_by_the_same_number(shards, start_method: str) -> None:
    cfg = config(shards, scale_norm=True)
    expected = list(ShuffledActivations(cfg))
    loader = ShuffledDataLoader(cfg, num_workers=2, multiprocessing_context=start_method)
    for found, wanted in zip(loader, expected, strict=True):
        assert torch.equal(found["act"], wanted["act"])
    loader.shutdown()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_never_rescales(shards, num_workers: int) -> None:
    cfg = config(shards, scale_norm=True)
    loader = ShuffledDataLoader(cfg, num_workers=num_workers, persistent_workers=num_workers > 0)
    batches = list(loader)
    for _, _ in zip(range(5), loader, strict=False):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    loader.shutdown()
    scale = loader.scale
    assert state["scale"] == scale

    # The files are not what they were; a run that goes on keeps its number, a new one would have another.
    rng = np.random.default_rng(5)
    write_acts(shards, (rng.standard_normal((120, 2, 10, 16)) * 3).astype(np.float32))
    assert ShuffledActivations(cfg).scale != scale
    again = ShuffledDataLoader(cfg, num_workers=num_workers, persistent_workers=num_workers > 0)
    # Persistent workers have begun with the number of the constructor.
    next(iter(again))
    again.load_state_dict(state)
    raw = ShuffledActivations(config(shards))
    raw.load_state_dict({**state, "scale": None})
    found = list(again)
    assert again.scale == scale
    assert again.state_dict()["scale"] == scale
    assert len(found) == len(batches) - 5
    for a, b in zip(found, raw, strict=True):
        assert torch.equal(a["act"], b["act"] * np.float32(scale))
    again.shutdown()


@pytest.mark.parametrize(
    ("scale_norm", "scale", "message"),
    [
        (True, None, "expected a number with scale_norm=True"),
        (False, 2.0, "expected none with scale_norm=False"),
        (True, -1.0, "number above 0"),
        (True, float("nan"), "number above 0"),
        (True, "2", "number above 0"),
    ],
)
def test_states_that_do_not_fit(shards, scale_norm: bool, scale, message: str) -> None:
    ds = ShuffledActivations(config(shards, scale_norm=scale_norm))
    with pytest.raises(StateError, match=message):
        ds.load_state_dict({**ds.state_dict(), "scale": scale})


def test_a_state_without_a_scale_is_one_of_raw_activations(shards) -> None:
    ds = ShuffledActivations(config(shards))
    state = ds.state_dict()
    del state["scale"]
    ds.load_state_dict(state)


def test_zeros_cannot_be_scaled(make_shards) -> None:
    zeros = make_shards(SPEC)
    write_acts(zeros, np.zeros((120, 2, 10, 16), np.float32))
    with pytest.raises(FormatError, match="cannot be scaled"):
        ShuffledActivations(config(zeros, scale_norm=True))


def test_processes_that_start_together_measure_once(shards) -> None:
    code = f"""
import saev_torch.stats.statistics as s
from saev_torch import ShuffledActivations, ShuffledConfig
run = s.Pass.run
def counted(*args):
    print("measured"); return run(*args)
s.Pass.run = counted
print(ShuffledActivations(ShuffledConfig(shards={str(shards)!r}, layer=7, scale_norm=True), rank=0, world_size=2).scale)
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outs = [p.communicate(timeout=240)[0].split() for p in ranks]
    assert sum(out.count("measured") for out in outs) == 1
    assert len({out[-1] for out in outs}) == 1
