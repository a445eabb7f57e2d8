"""Activations of 16 bits, as they are stored and as float32: every value there is, bit for bit, however it is read."""

import dataclasses
import errno
import json

import contracts
import factory
import numpy as np
import pytest
import torch
from factory import Spec, write_acts
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    IndexedConfig,
    IndexedDataset,
    OrderedActivations,
    OrderedConfig,
    OrderedDataLoader,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    StateError,
    compute_statistics,
)
from saev_torch.__main__ import main
from saev_torch.format.dtypes import DTYPES
from saev_torch.order.predict import predict
from saev_torch.order.steps import N_COLUMNS
from saev_torch.reading import converting, crew, slots, source
from saev_torch.reading import direct as staging
from saev_torch.reading import reader as reading
from saev_torch.reading.converting import convert_batch
from saev_torch.reading.direct import DirectReader
from saev_torch.reading.kernels import NAN_BITS, find_convert_kernels
from saev_torch.reading.ring import Ring
from saev_torch.reading.source import ConvertingReader
from saev_torch.tools.verify import verify

HALVES = ["float16", "bfloat16"]
# Of 65,536 values and a few more: rows that are lines of the cache, and rows that are not.
EVERY = {
    64: Spec(n_examples=64, content_tokens=7, layers=(3, 7), d_model=64, examples_per_shard=30),
    331: Spec(n_examples=25, content_tokens=3, layers=(3, 7), d_model=331, examples_per_shard=9),
    # One row is more than what is converted at a time, and than the stage holds.
    66000: Spec(n_examples=2, content_tokens=1, cls=False, layers=(3, 7), d_model=66_000, examples_per_shard=1),
}


@pytest.fixture(params=["compiled", "torch"])
def converted_by(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where numba is installed, activations are converted as they are read; else in batches."""
    if request.param == "torch":
        monkeypatch.setattr(source, "find_convert_kernels", lambda *names: None)
    return request.param


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The bits of values, of which some may be no numbers."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).numpy()


def widened(bits: np.ndarray, dtype: str) -> torch.Tensor:
    """Bits of 16 as float32, by whole numbers: torch makes other NaNs of the values where its threads part them."""
    wide = bits.astype("<u4") << 16
    if dtype == "float16":
        is_nan = (bits & 0x7FFF) > 0x7C00
        quiet = (wide & 0x8000_0000) | 0x7FC0_0000 | (wide & 0x03FF_0000) >> 3
        wide = np.where(is_nan, quiet, bits.view("<f2").astype("<f4").view("<u4"))
    return torch.from_numpy(wide.view("<f4"))


def every_value(spec: Spec) -> np.ndarray:
    """Each pattern of 16 bits at least once, [n_examples, n_layers, tokens_per_example, d_model]."""
    shape = (spec.n_examples, len(spec.layers), spec.tokens_per_example, spec.d_model)
    n = int(np.prod(shape))
    assert n >= 1 << 16
    return (np.arange(n) * 9973 % (1 << 16)).astype("<u2").reshape(shape)


def read_all(kind: str, shards, **fields) -> torch.Tensor:
    """All samples, in the order of the disk, [n, d_model]."""
    fields = {"shards": shards, "tokens": "all", "layer": "all", **fields}
    if kind == "indexed":
        data = IndexedDataset(IndexedConfig(**fields))
        order = np.random.default_rng(0).permutation(len(data))
        back = np.argsort(order)
        return data.__getitems__(order).batch["act"][back]
    if kind == "one by one":
        data = IndexedDataset(IndexedConfig(**fields))
        return torch.stack([data[i]["act"] for i in range(len(data))])
    if kind == "ordered":
        return torch.cat([batch["act"] for batch in OrderedActivations(OrderedConfig(**fields, batch_size=53))])
    cfg = ShuffledConfig(**fields, batch_size=53, buffer_size=8)
    acts, places = [], []
    data = ShuffledActivations(cfg)
    layers = list(data.metadata.layers)
    for batch in data:
        acts.append(batch["act"])
        layer = torch.tensor([layers.index(x) for x in batch["layer"].tolist()])
        cell = batch["example_idx"] * len(layers) + layer
        places.append(cell * data.metadata.tokens_per_example + batch["token_idx"] + data.metadata.cls_token)
    return torch.cat(acts)[torch.argsort(torch.cat(places))]


@pytest.mark.parametrize("width", EVERY)
@pytest.mark.parametrize("kind", ["indexed", "one by one", "ordered", "shuffled"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("converted_by")
def test_every_value_as_float32(make_shards, dtype: str, kind: str, width: int) -> None:
    spec = dataclasses.replace(EVERY[width], dtype=dtype)
    shards, values = make_shards(spec), every_value(spec)
    write_acts(shards, values)
    got = read_all(kind, shards)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(bits_of(got), bits_of(widened(values, dtype)).reshape(got.shape))


@pytest.mark.parametrize("kind", ["indexed", "one by one", "ordered", "shuffled"])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_as_it_is_stored(make_shards, dtype: str, kind: str) -> None:
    spec = dataclasses.replace(EVERY[331], dtype=dtype)
    shards, values = make_shards(spec), every_value(spec)
    write_acts(shards, values)
    got = read_all(kind, shards, act_dtype="stored")
    assert got.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(bits_of(got).view("<u2"), values.reshape(got.shape))


@pytest.mark.parametrize("way", ["few samples", "no memory files"])
@pytest.mark.parametrize("dtype", HALVES)
def test_batches_that_go_through_a_pipe(make_shards, monkeypatch, dtype: str, way: str) -> None:
    """What no shared memory holds is sent as a copy: numpy, which cannot say bfloat16, must not be asked to."""
    shards_dir = make_shards(dtype=dtype)
    if way == "few samples":
        ds = IndexedDataset(IndexedConfig(shards=shards_dir, layer=3, act_dtype="stored"))
        loader = torch.utils.data.DataLoader(ds, batch_size=7, num_workers=1, timeout=60)
    else:
        monkeypatch.setattr(slots, "has_memory_files", lambda: False)
        cfg = OrderedConfig(shards=shards_dir, layer=3, act_dtype="stored", batch_size=7)
        loader = OrderedDataLoader(cfg, num_workers=1, timeout=60)
    batches = list(loader)
    found = torch.cat([batch["act"] for batch in batches])
    assert found.dtype == getattr(torch, dtype)
    expected = factory.oracle_bits(Spec(dtype=dtype))[:, 0, 1:].reshape(len(found), -1)
    np.testing.assert_array_equal(bits_of(found), expected.view(np.int16))
    assert [len(batch["example_idx"]) for batch in batches] == [7] * 9 + [3]


@pytest.mark.parametrize("kind", ["indexed", "ordered", "shuffled"])
def test_float32_is_the_same_in_both(make_shards, kind: str) -> None:
    shards = make_shards(Spec(n_examples=40))
    stored, loaded = (read_all(kind, shards, act_dtype=act_dtype) for act_dtype in ("stored", "float32"))
    assert stored.dtype == loaded.dtype == torch.float32
    assert torch.equal(stored, loaded)


# The loops themselves, against torch


def scaled(values: torch.Tensor, by: float, dtype: torch.dtype) -> torch.Tensor:
    """Multiplied as float32 and rounded once; what is no number is one kind of it."""
    found = (values.float() * by).to(dtype)
    if dtype != torch.float32:
        found.view(torch.int16).masked_fill_(found.isnan(), NAN_BITS[str(dtype).removeprefix("torch.")])
    return found


# Into the subnormal numbers and to infinity of both types, and between.
FACTORS = [1.0, 0.37, 3.0, 2.0**-20, 1e-30, 1e30, 40_000.0]


@pytest.mark.parametrize("loaded", ["float32", "stored"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("by", FACTORS)
@pytest.mark.parametrize("shift", [0, 2])
def test_the_compiled_loop_and_torch_make_the_same(dtype: str, loaded: str, by: float, shift: int) -> None:
    by = float(np.float32(by))
    act_type = DTYPES["float32" if loaded == "float32" else dtype]
    values = np.arange(1 << 16, dtype="<u2")
    n_bytes = len(values) * act_type.nbytes
    memory = np.zeros(n_bytes + 128, dtype=np.uint8)
    # At the beginning of a line of the cache, or not.
    first = -memory.ctypes.data % 64 + shift * act_type.nbytes
    room = memory[first : first + n_bytes]
    room[-values.nbytes :] = values.view(np.uint8)
    place = room.ctypes.data + n_bytes - values.nbytes
    kernels = find_convert_kernels(dtype, act_type.name, True)
    kernels.convert_places(np.array([[place, values.nbytes]]), 0, np.float32(by))

    other = np.zeros(n_bytes, dtype=np.uint8)
    other[-values.nbytes :] = values.view(np.uint8)
    act = torch.from_numpy(other).view(getattr(torch, act_type.name)).view(1, -1)
    convert_batch(act, DTYPES[dtype], by)

    wanted = scaled(widened(values, dtype), by, act.dtype)
    is_nan = wanted.isnan().numpy()
    got = torch.from_numpy(room.copy()).view(act.dtype)
    assert np.array_equal(bits_of(got)[~is_nan], bits_of(wanted)[~is_nan])
    assert got.isnan().numpy()[is_nan].all()
    assert np.array_equal(bits_of(got), bits_of(act[0]))
    assert not memory[:first].any()
    assert not memory[first + n_bytes :].any()


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("d_model", [1, 3, 64, 1000, 40_000])
@pytest.mark.parametrize("dtype", HALVES)
def test_batches_of_any_width(dtype: str, d_model: int, n_threads: int) -> None:
    """Torch with and without threads of its own; rows that fill many pieces, and such that several fill one."""
    n = max(2, 100_001 // d_model)
    values = (np.arange(n * d_model) * 9973 % (1 << 16)).astype("<u2").reshape(n, d_model)
    # What is left over where a processor converts many at a time is no number, in float16.
    values.reshape(-1)[-40:] = 0x7D55
    act = torch.zeros(n, d_model)
    act.view(torch.int16).numpy().view("<u2")[:, d_model:] = values
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        convert_batch(act, DTYPES[dtype], None)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(bits_of(act), bits_of(widened(values, dtype)))


@pytest.mark.parametrize("act_dtype", ["float32", "stored"])
def test_another_default_device_changes_nothing(make_shards, monkeypatch, act_dtype: str) -> None:
    """A user's `torch.set_default_device("cuda")` is not for what is done on the host."""
    monkeypatch.setattr(source, "find_convert_kernels", lambda *names: None)
    spec = Spec(n_examples=30, dtype="float16")
    cfg = config(make_shards(spec), act_dtype=act_dtype)
    with torch.device("meta"):
        batches = list(ShuffledActivations(cfg))
        scaled_batches = list(ShuffledActivations(dataclasses.replace(cfg, scale_norm=True)))
    contracts.check_epoch(batches, spec, cfg)
    assert all(batch["act"].device.type == "cpu" for batch in scaled_batches)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dtype", HALVES)
def test_samples_of_16_bits_are_collated(make_shards, dtype: str, num_workers: int) -> None:
    spec = Spec(n_examples=30, dtype=dtype)
    data = IndexedDataset(IndexedConfig(make_shards(spec), layer=7, act_dtype="stored"))
    loader = DataLoader(data, batch_size=32, num_workers=num_workers)
    got = torch.cat([batch["act"] for batch in loader])
    wanted = factory.oracle_bits(spec)[:, 1, 1:].reshape(-1, spec.d_model)
    assert got.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(bits_of(got).view("<u2"), wanted)
    # By hand, too.
    both = torch.utils.data.default_collate([data[3], data[5]])["act"]
    np.testing.assert_array_equal(bits_of(both).view("<u2"), wanted[[3, 5]])


@pytest.mark.parametrize("dtype", HALVES)
def test_inspect_says_what_is_stored(make_shards, capsys, dtype: str) -> None:
    spec = Spec(dtype=dtype)
    assert main(["inspect", str(make_shards(spec))]) == 0
    out = capsys.readouterr().out
    assert f"d_model 8, {dtype}\n" in out
    norms = np.linalg.norm(factory.oracle(spec)[:, 1, 1:].astype(np.float64), axis=-1)
    assert f"layer 7      norm {norms.mean():.4g} (from {norms.min():.4g} to {norms.max():.4g})" in out


# Wherever rows come from, each is converted, and multiplied, once


@pytest.fixture
def shards(make_shards):
    """By dtype, directories of the same values, which all three types hold."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0x3800, 0x4200, (120, 2, 10, 16)).astype("<u2")
    values = factory.to_float32(bits, "float16").astype("<f4")
    values = (values.view("<u4") >> 16 << 16).view("<f4")
    stored = {"float32": values, "float16": values.astype("<f2").view("<u2"), "bfloat16": (values.view("<u4") >> 16)}
    assert np.array_equal(factory.to_float32(stored["float16"], "float16"), values)
    made = {}
    for dtype, acts in stored.items():
        made[dtype] = make_shards(
            Spec(n_examples=120, content_tokens=9, d_model=16, examples_per_shard=40, dtype=dtype)
        )
        write_acts(made[dtype], acts.astype("<f4" if dtype == "float32" else "<u2"))
    return made


def config(shards, **fields) -> ShuffledConfig:
    return ShuffledConfig(**{"shards": shards, "layer": 7, "batch_size": 64, "buffer_size": 8, **fields})


def assert_read(cfg: ShuffledConfig, like: ShuffledConfig, num_workers: int = 0) -> None:
    """Check that a config reads the values of another, of float32, in the type that it says."""
    dtype = torch.float32 if cfg.act_dtype == "float32" else getattr(torch, ShuffledActivations(cfg).md.dtype)
    scale = ShuffledActivations(cfg).scale or 1.0
    loader = ShuffledDataLoader(cfg, num_workers=num_workers)
    got = list(loader)
    loader.shutdown()
    for batch, wanted in zip(got, ShuffledActivations(like), strict=True):
        assert batch["act"].dtype == dtype
        assert torch.equal(batch["act"], scaled(wanted["act"], scale, dtype))
        for key in wanted.keys() - {"act"}:
            assert torch.equal(batch[key], wanted[key])


@pytest.mark.parametrize(("scale_norm", "num_workers"), [(False, 0), (True, 0), (True, 2)])
@pytest.mark.parametrize(("dtype", "act_dtype"), [(d, a) for d in HALVES for a in ("float32", "stored")])
@pytest.mark.usefixtures("converted_by")
def test_scaling_multiplies_in_float32_and_rounds_once(
    shards, dtype: str, act_dtype: str, scale_norm: bool, num_workers: int
) -> None:
    for fields in ({}, {"layer": (7, 3), "tokens": "all"}, {"layer": "all", "ignore_labels": [1, 2]}):
        raw = config(shards["float32"], **fields)
        cfg = config(shards[dtype], act_dtype=act_dtype, scale_norm=scale_norm, **fields)
        assert_read(cfg, raw, num_workers)
        if scale_norm:
            # One number for the data, whatever holds them.
            assert (
                ShuffledActivations(cfg).scale == ShuffledActivations(dataclasses.replace(raw, scale_norm=True)).scale
            )


@pytest.mark.parametrize("where", ["in time", "a slow disk", "past the page cache"])
@pytest.mark.parametrize(("dtype", "act_dtype"), [("bfloat16", "float32"), ("float16", "stored")])
def test_values_are_converted_once_wherever_they_come_from(
    shards, monkeypatch, dtype: str, act_dtype: str, where: str
) -> None:
    monkeypatch.setattr(reading, "_SLOW_NBYTES_PER_S", float("inf"))
    monkeypatch.setattr(reading, "_CALL_S", 0.0 if where == "a slow disk" else 1e9)
    monkeypatch.setattr(staging, "fits_page_cache", lambda nbytes: where != "past the page cache")
    # Several tasks, because only the first tells that the disk is slow.
    monkeypatch.setattr(crew, "_TASK_NBYTES", 1)
    monkeypatch.setattr(crew, "_MAX_TASK_NBYTES", 1000)
    ways = set()
    for owner, name in ((ConvertingReader, "_read_converting"), (ConvertingReader, "_read_then_convert")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name), ways, name))
    monkeypatch.setattr(DirectReader, "_read", noting(DirectReader._read, ways, "direct"))
    scale_norm = act_dtype == "stored"
    assert_read(config(shards[dtype], act_dtype=act_dtype, scale_norm=scale_norm), config(shards["float32"]))
    if where == "in time":
        assert ways == {"_read_converting"}
    elif where == "a slow disk":
        assert ways == {"_read_converting", "_read_then_convert"}
    elif Ring.open() is not None:
        assert ways == {"direct", "_read_then_convert"}


def noting(function, ways: set[str], way: str):
    def call(*args):
        ways.add(way)
        return function(*args)

    return call


@pytest.mark.parametrize("d_model", [16, 5000])
def test_what_fails_is_read_again_and_converted_once(make_shards, monkeypatch, d_model: int) -> None:
    init, n_failed = ConvertingReader.__init__, []

    def fail(read_and_convert, fds, *args):
        kept = np.arange(len(fds)) % 3 != len(n_failed) % 3
        read_and_convert(np.where(kept, fds, -1), *args)
        assert (args[4][~kept] == -errno.EBADF).all()
        args[4][~kept] = (-errno.EINTR, 0)[len(n_failed) % 2]
        n_failed.append(int((~kept).sum()))

    def wrapped(self, *args):
        init(self, *args)
        self._read_and_convert = lambda *args, inner=self._read_and_convert: fail(inner, *args)

    monkeypatch.setattr(ConvertingReader, "__init__", wrapped)
    spec = Spec(n_examples=60, content_tokens=20, d_model=d_model, dtype="bfloat16")
    cfg = config(make_shards(spec), block_size=2, buffer_size=2)
    contracts.check_epoch(list(ShuffledActivations(cfg)), spec, cfg)
    assert sum(n_failed) > 0


def test_a_stage_smaller_than_what_is_read(make_shards, monkeypatch) -> None:
    spec = Spec(n_examples=60, content_tokens=20, d_model=24, dtype="float16", examples_per_shard=20)
    path = make_shards(spec)
    for size in (1, 48, 100, 1000):
        monkeypatch.setattr(source, "_STAGE_NBYTES", size)
        for cfg in (config(path, block_size=8), config(path, block_size=8, ignore_labels=[1, 2, 4])):
            contracts.check_epoch(list(ShuffledActivations(cfg)), spec, cfg)


def test_float16_that_a_scale_would_overflow(make_shards) -> None:
    """One value beside zeros: times the scale it is infinite in float16, and not in float32."""
    path = make_shards(Spec(n_examples=120, content_tokens=9, d_model=5000, layers=(7,), dtype="float16"))
    acts = np.zeros((120, 1, 10, 5000), dtype="<f2")
    acts[5, 0, 3, 2] = -60_000
    write_acts(path, acts.view("<u2"))
    with pytest.raises(ConfigError, match=r"act_dtype: expected .*float16.* got .*; use act_dtype='float32'"):
        ShuffledActivations(config(path, scale_norm=True, act_dtype="stored"))
    assert all(batch["act"].isfinite().all() for batch in ShuffledActivations(config(path, scale_norm=True)))


# The order, states and digests


@pytest.mark.parametrize("kind", [ShuffledConfig, OrderedConfig])
def test_the_order_and_digests_depend_on_no_dtype(make_shards, kind) -> None:
    seen = set()
    for dtype in DTYPES:
        path = make_shards(Spec(n_examples=40, dtype=dtype))
        for act_dtype in ("float32", "stored"):
            data = contracts.make_data_set(
                kind(path, layer="all", tokens="all", batch_size=16, buffer_size=4, act_dtype=act_dtype)
            )
            columns = [{key: batch[key] for key in batch if key != "act"} for batch in data]
            seen.add((contracts.digest(columns), str(data.digest)))
    assert len(seen) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_with_another_act_dtype_but_not_with_other_data(make_shards, num_workers: int) -> None:
    paths = {dtype: make_shards(Spec(n_examples=40, dtype=dtype)) for dtype in ("float32", "bfloat16")}
    cfg = config(paths["bfloat16"], batch_size=16, buffer_size=4, act_dtype="stored")
    loader = ShuffledDataLoader(cfg, num_workers=num_workers)
    wanted = list(loader)
    loader.set_epoch(0)
    for _, _ in zip(range(5), loader, strict=False):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    loader.shutdown()
    again = ShuffledDataLoader(dataclasses.replace(cfg, act_dtype="float32"), num_workers=num_workers)
    again.load_state_dict(state)
    rest = list(again)
    again.shutdown()
    assert len(rest) == len(wanted) - 5
    for got, one in zip(rest, wanted[5:], strict=True):
        assert torch.equal(got["act"], one["act"].float())
    with pytest.raises(StateError, match="data: expected"):
        ShuffledActivations(dataclasses.replace(cfg, shards=paths["float32"])).load_state_dict(state)


# Memory


@pytest.mark.parametrize(("dtype", "act_dtype", "nbytes"), [
    ("float32", "float32", 4), ("float32", "stored", 4), ("bfloat16", "float32", 4), ("bfloat16", "stored", 2),
    ("float16", "stored", 2),
])  # fmt: skip
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_slot_holds_what_is_handed_out(
    make_shards, dtype: str, act_dtype: str, nbytes: int, num_workers: int
) -> None:
    path = make_shards(Spec(n_examples=60, content_tokens=20, d_model=512, dtype=dtype))
    cfg = config(path, batch_size=64, act_dtype=act_dtype)
    loader = ShuffledDataLoader(cfg, num_workers=num_workers)
    batch = next(iter(loader))
    columns = 64 * N_COLUMNS * 8
    assert batch["act"].element_size() == nbytes
    # A shared one has a page for counters, and ends with a whole page.
    assert 0 <= batch.memory.nbytes - 64 * 512 * nbytes - columns <= 2 * 4096
    del batch
    loader.shutdown()
    data = loader.dataset if num_workers == 0 else ShuffledActivations(cfg)
    found = predict(data.metadata, cfg).memory_nbytes
    assert found % (64 * 512 * nbytes + columns) == 0


# What looks at all values


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("converted_by")
def test_statistics_are_those_of_the_values(shards, dtype: str) -> None:
    for fields in ({}, {"layer": (3, 7)}, {"layer": "all", "tokens": "all"}):
        like = compute_statistics(config(shards["float32"], **fields), cache=False)
        for act_dtype in ("float32", "stored"):
            found = compute_statistics(config(shards[dtype], act_dtype=act_dtype, **fields), cache=False)
            for name in (field.name for field in dataclasses.fields(like.total)):
                np.testing.assert_array_equal(getattr(found.total, name), getattr(like.total, name))
            assert found.groups.keys() == like.groups.keys()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", HALVES)
def test_values_that_are_not_finite_are_found(make_shards, dtype: str, bad: float) -> None:
    spec = Spec(dtype=dtype)
    path, acts = make_shards(spec), factory.oracle_bits(spec)
    assert verify(path, finite=True).ok
    acts[9, 1, 2, 3] = torch.tensor([bad]).to(getattr(torch, dtype)).view(torch.int16).numpy().view("<u2")[0]
    write_acts(path, acts)
    (fault,) = verify(path, finite=True).faults
    assert (fault.example, fault.layer) == (9, 7)
    assert "expected finite values, got 1 that are not" in fault.what
    found = compute_statistics(config(path), cache=False)
    assert (found.total.n_nonfinite_samples, found.total.n_samples) == (1, 65)


# Configs


@pytest.mark.parametrize("kind", [IndexedConfig, OrderedConfig, ShuffledConfig])
@pytest.mark.parametrize("value", ["float16", "bfloat16", None, torch.float32, 16, ["stored"]])
def test_other_act_dtypes_are_refused(kind, value) -> None:
    with pytest.raises(ConfigError, match=rf"{kind.__name__}\.act_dtype: expected 'float32' or 'stored', got "):
        kind(act_dtype=value)


def test_what_torch_may_thread_is_never_so_large() -> None:
    """A child that was forked would wait for threads of its parent's."""
    assert converting._N_AT_ONCE < 32_768
