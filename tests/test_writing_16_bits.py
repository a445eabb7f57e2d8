"""Activations of any float type, written as float32, float16 and bfloat16: bit for bit, against torch and numpy."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import logging
import random
import re

import factory
import numpy as np
import pytest
import rank_records
import torch
from factory import Spec, oracle_bits, oracle_labels
from test_dtypes import EVERY, HALVES, bits_of, every_value, read_all, widened
from test_resume import kill_at
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from saev_torch import ConfigError, Metadata, ShardWriter, WriteError, record, repack, verify
from saev_torch.__main__ import main
from saev_torch.format.dtypes import DTYPES
from saev_torch.tools.repack import Rounding
from saev_torch.writing import checkpoints
from saev_torch.writing.narrowing import Given, to_stored

INF = float("inf")
NAMES = {"family": "test", "ckpt": "none", "dataset": "none"}


def metadata(**fields) -> Metadata:
    return Metadata(**Spec(**fields).metadata())


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "checksums.json"}


def tensor_of(bits: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16).copy()).view(getattr(torch, dtype))


def write(root, md: Metadata, acts, **options):
    with ShardWriter(root, md, **options) as writer:
        for start in range(0, md.n_examples, 7):
            writer.write_batch(acts[start : start + 7], start)
    return writer.shards_dir


def read(shards_dir) -> np.ndarray:
    """Bits, [n_examples, n_layers, tokens, d_model], read without any code of the package but metadata."""
    md = Metadata.load(shards_dir)
    raw = b"".join(path.read_bytes() for path in sorted(shards_dir.glob("acts*.bin")))
    kind = "<u4" if md.dtype == "float32" else "<u2"
    shape = (-1, md.n_layers, md.tokens_per_example, md.d_model)
    return np.frombuffer(raw, kind).reshape(shape)[: md.n_examples]


# All values there are


@pytest.mark.parametrize("width", [64, 331])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_from_the_writer_through_all_data_sets(tmp_path, dtype, width) -> None:
    spec = dataclasses.replace(EVERY[width], dtype=dtype, labels=False)
    values = every_value(spec)
    shards = write(tmp_path, Metadata(**spec.metadata()), tensor_of(values, dtype))
    np.testing.assert_array_equal(read(shards), values)
    assert verify(shards).ok
    for kind in ("indexed", "one by one", "ordered", "shuffled"):
        stored, loaded = (read_all(kind, shards, act_dtype=act_dtype) for act_dtype in ("stored", "float32"))
        np.testing.assert_array_equal(bits_of(stored).view("<u2"), values.reshape(stored.shape))
        np.testing.assert_array_equal(bits_of(loaded), bits_of(widened(values, dtype)).reshape(loaded.shape))


@pytest.mark.parametrize("wrap", ["tensor", "array"])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_as_float32(tmp_path, dtype, wrap) -> None:
    """Written wider, all of them are what torch makes of them, and come back as they were, but for which NaN it is."""
    md = dataclasses.replace(metadata(**dataclasses.asdict(EVERY[331])), dtype="float32")
    values = every_value(EVERY[331])
    given = tensor_of(values, dtype)
    wide = write(tmp_path, md, given if wrap == "tensor" or dtype == "bfloat16" else values.view("<f2"))
    wanted = bits_of(widened(values, dtype)).view("<u4")
    np.testing.assert_array_equal(read(wide), wanted)
    back = repack(wide, tmp_path, dtype=dtype)
    is_nan = given.isnan().numpy()
    np.testing.assert_array_equal(read(back)[~is_nan], values[~is_nan])
    assert tensor_of(read(back), dtype).isnan().numpy()[is_nan].all()


# Rounding


def hard_values(dtype: str) -> np.ndarray:
    """float64 at, beside and between all neighbours of a 16-bit type, of all sizes, and random ones."""
    exact = np.sort(widened(np.arange(1 << 15, dtype="<u2"), dtype).double().numpy())
    exact = exact[np.isfinite(exact)]
    middle = (exact[1:] + exact[:-1]) / 2
    largest = exact[-1]
    edge = largest + (largest - exact[-2]) / 2
    found = [exact, middle, np.nextafter(middle, INF), np.nextafter(middle, 0), [np.nextafter(edge, 0), largest]]
    rng = np.random.default_rng(0)
    found += [rng.standard_normal(40_000) * 10.0 ** rng.integers(-50, 5, 40_000), [INF, np.nan, 0.0, 5e-324]]
    positive = np.concatenate(found)
    return np.concatenate([positive, -positive])


def nearest(values: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest value of a 16-bit type, of two the even one, by comparing with all of them."""
    exact = widened(np.arange(1 << 15, dtype="<u2"), dtype).double().numpy()
    n = int(np.isfinite(exact).sum())
    size = np.abs(values)
    high = np.clip(np.searchsorted(exact[:n], size), 1, n - 1)
    with np.errstate(invalid="ignore"):
        below, above = size - exact[high - 1], exact[high] - size
    odd_is_high = high % 2 == 1
    bits = np.where((above < below) | ((above == below) & ~odd_is_high), high, high - 1)
    bits = np.where(np.isinf(values), n, bits)
    return (bits | np.where(np.signbit(values), 1 << 15, 0)).astype("<u2")


@pytest.mark.parametrize("given", ["float64 array", "float64 tensor", "longdouble", "big-endian"])
@pytest.mark.parametrize("dtype", HALVES)
def test_float64_is_rounded_once(dtype, given) -> None:
    """By torch it would be rounded to float32 first, and then away from the nearest."""
    values = hard_values(dtype)
    wrap = {
        "float64 tensor": lambda: Given.of_tensor(torch.from_numpy(values)),
        "float64 array": lambda: Given.of_array(values),
        "longdouble": lambda: Given.of_array(values.astype(np.longdouble)),
        "big-endian": lambda: Given.of_array(values.astype(">f8")),
    }
    found = to_stored(wrap[given](), DTYPES[dtype])
    is_nan = np.isnan(values)
    np.testing.assert_array_equal(found.values.view("<u2")[~is_nan], nearest(values, dtype)[~is_nan])
    assert tensor_of(found.values, dtype).isnan().numpy()[is_nan].all()
    assert (found.first_overflow, found.n_overflowed) == (None, 0)
    if dtype == "bfloat16" and given == "float64 tensor":
        by_torch = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view("<u2")
        assert (by_torch != found.values)[~is_nan].any()


def random_float32() -> torch.Tensor:
    """All exponents, subnormal numbers, infinities and NaNs of any payload."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_001, dtype=np.uint32)
    ends = [
        0,
        1 << 31,
        0x7F800000,
        0xFF800000,
        0x7F800001,
        0xFFFFFFFF,
        0x7FC00000,
        1,
        0x007FFFFF,
        0x33000000,
        0x33000001,
    ]
    bits[: len(ends)] = ends
    # And as many that float16 holds.
    bits[100_000:] = bits[100_000:] & 0x87FFFFFF | 0x38000000 - (bits[100_000:] % 3 << 27)
    return torch.from_numpy(bits.view("<f4"))


@pytest.mark.parametrize("dtype", HALVES)
def test_random_float32_as_torch_rounds_it(dtype) -> None:
    values = random_float32()
    with_torch = values.to(getattr(torch, dtype))
    found = to_stored(Given.of_tensor(values), DTYPES[dtype])
    is_nan, overflowed = values.isnan().numpy(), (with_torch.isinf() & values.isfinite()).numpy()
    plain = ~is_nan & ~overflowed
    got = found.values.view("<u2")
    np.testing.assert_array_equal(got[plain], bits_of(with_torch).view("<u2")[plain])
    assert set(got[is_nan]) == {0x7E00 if dtype == "float16" else 0x7FC0}
    # What is too large is told, and the largest there is.
    sign = np.signbit(values.numpy())[overflowed].astype("<u2") << 15
    assert (got[overflowed] == sign + (0x7BFF if dtype == "float16" else 0x7F7F)).all()
    assert found.n_overflowed == overflowed.sum() > 0
    first = int(np.argmax(overflowed))
    assert found.first_overflow == (first, values[first].item())
    assert np.isfinite(values.numpy()[overflowed]).all()
    n_subnormal = ((got & (0x7C00 if dtype == "float16" else 0x7F80) == 0) & (got << 1 != 0)).sum()
    assert n_subnormal > 100


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 511 * 64 - 1, 511 * 64, 511 * 64 + 1])
@pytest.mark.parametrize(("old", "new"), [
    ("float32", "bfloat16"), ("float16", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32"),
    ("float64", "float32"), ("float8_e5m2", "float16"), ("float8_e4m3fn", "bfloat16"), ("bfloat16", "bfloat16"),
])  # fmt: skip
def test_any_number_of_values_of_any_type(old, new, n) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float32).to(getattr(torch, old))
    found = to_stored(Given.of_tensor(values), DTYPES[new]).values
    assert found.dtype == np.dtype(DTYPES[new].storage)
    wanted = values.to(getattr(torch, new)).view(torch.int32 if new == "float32" else torch.int16).numpy()
    np.testing.assert_array_equal(found.view(wanted.dtype), wanted)


def test_read_only_arrays_and_lazy_tensors(tmp_path) -> None:
    md = metadata(dtype="bfloat16")
    values = torch.from_numpy(factory.oracle(metadata())).to(torch.bfloat16)
    wanted = bits_of(values).view("<u2")
    array = factory.oracle(metadata())
    array.flags.writeable = False
    strange = values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).requires_grad_()
    for i, given in enumerate((array, strange, torch._neg_view(-values), np.asfortranarray(array, dtype=">f8"))):
        np.testing.assert_array_equal(read(write(tmp_path / str(i), md, given, check_finite=True)), wanted)
    zeros = torch._efficientzerotensor(values.shape, dtype=torch.bfloat16)
    assert not read(write(tmp_path / "zeros", md, zeros)).any()
    # What is on disk is compared with what is given again, which may be read-only, too.
    assert write(tmp_path / "0", md, array * np.float32(1.001), resume=True).name == md.hash


# What is too large


@pytest.mark.parametrize(("dtype", "value", "message"), [
    ("float16", 65_520.0, r"that float16 holds, up to 65504, got 65520 in example 9, layer 7, stored token 2, dimension"
     r" 3; use bfloat16, or clip such values with on_overflow='clip'"),
    ("float16", -1e30, r"got -1e\+30 in example 9, layer 7, stored token 2, dimension 3; use bfloat16"),
    ("bfloat16", 3.4e38, r"that bfloat16 holds, up to 3.38953e\+38, got 3.4e\+38 in example 9, .*; use float32"),
    ("float32", -1e300, r"that float32 holds, up to 3.40282e\+38, got -1e\+300 in example 9, .*; scale them down"),
])  # fmt: skip
@pytest.mark.parametrize("wrap", [torch.from_numpy, np.asarray])
def test_too_large(tmp_path, caplog, dtype, value, message, wrap) -> None:
    md = metadata(dtype=dtype)
    acts = np.zeros((11, 2, 7, 8))
    acts[9, 1, 2, 3] = value
    # What just holds is no reason.
    acts[4, 0, 0, 0] = np.nextafter(65_520.0, 0) if dtype == "float16" else 1e38
    with pytest.raises(WriteError, match=message), ShardWriter(tmp_path, md) as writer:
        writer.write_batch(wrap(acts[3:]), 3)
    assert list(tmp_path.iterdir()) == []
    # A batch that was refused has changed nothing.
    with ShardWriter(tmp_path / "mended", md) as writer:
        with pytest.raises(WriteError, match=message):
            writer.write_batch(wrap(acts), 0)
        writer.write_batch(wrap(np.minimum(np.abs(acts), 1.0)), 0)
    assert writer.n_clipped == 0
    with caplog.at_level(logging.WARNING, "saev_torch"):
        shards = write(tmp_path / "clipped", md, wrap(acts), on_overflow="clip", check_finite=True)
    assert f"clipped 1 value that {dtype} does not hold" in caplog.text
    largest = {"float16": 0x7BFF, "bfloat16": 0x7F7F, "float32": 0x7F7FFFFF}[dtype]
    sign = (value < 0) << 8 * DTYPES[dtype].nbytes - 1
    assert read(shards)[9, 1, 2, 3] == sign + largest


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_not_a_number(tmp_path, dtype) -> None:
    """What is infinite already is not too large, and `check_finite` names what it sees in the type that is stored."""
    md = metadata(dtype=dtype)
    for value in (INF, -INF, float("nan")):
        acts = torch.zeros(11, 2, 7, 8)
        acts[9, 1, 2, 3] = value
        given = acts.to(getattr(torch, dtype))
        for one in (acts, given):
            with pytest.raises(WriteError, match=rf"finite values, got {value} in example 9, layer 7, stored token 2"):
                write(tmp_path / "refused", md, one, check_finite=True)
        shards = write(tmp_path / str(value), md, acts, on_overflow="clip")
        stored = read(shards)[9, 1, 2, 3]
        exponent = DTYPES[dtype].exponent
        mantissa = (exponent & -exponent) - 1
        assert stored & exponent == exponent
        assert bool(stored & mantissa) == (value != value)
        (fault,) = verify(shards, finite=True).faults
        assert (fault.example, fault.layer) == (9, 7)


@pytest.mark.parametrize("value", ["Clip", None, True, 1])
def test_other_ways_of_overflow(tmp_path, value) -> None:
    with pytest.raises(ConfigError, match="on_overflow: expected 'refuse' or 'clip', got "):
        ShardWriter(tmp_path, metadata(), on_overflow=value)


# Whole directories


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("preallocate", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_equals_the_factory(tmp_path, make_shards, dtype, preallocate, batch_size) -> None:
    spec = Spec(dtype=dtype, preallocate_last=preallocate)
    acts, labels = tensor_of(oracle_bits(spec), dtype), oracle_labels(spec)
    with ShardWriter(tmp_path, Metadata(**spec.metadata()), preallocate=preallocate) as writer:
        for start in range(0, 11, batch_size):
            writer.write_batch(acts[start : start + batch_size], start, labels[start : start + batch_size])
    assert content(writer.shards_dir) == content(make_shards(spec))
    assert verify(writer.shards_dir, finite=True).ok
    path = writer.shards_dir / "acts000001.bin"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    (fault,) = verify(writer.shards_dir).faults
    assert (fault.example, fault.layer) == (4, 3)


@pytest.mark.parametrize("dtype", HALVES)
def test_killed_at_random_moments(tmp_path, monkeypatch, dtype) -> None:
    """A writer that rounds, killed and resumed: the same bytes, or a refusal."""
    monkeypatch.setattr(checkpoints, "_SYNC_NBYTES", 10_000)
    spec = Spec(n_examples=120, examples_per_shard=17, d_model=16, dtype=dtype)
    md, labels = Metadata(**spec.metadata()), oracle_labels(spec)
    acts = torch.randn(120, 2, 7, 16, generator=torch.Generator().manual_seed(0))

    def run(root, values=acts):
        with ShardWriter(root, md, resume=True) as writer:
            for at in range(0, 120, 3):
                writer.write_batch(values[at : at + 3], at, labels[at : at + 3])
        return writer.shards_dir

    whole = run(tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    np.testing.assert_array_equal(read(whole), bits_of(acts.to(getattr(torch, dtype))).view("<u2"))
    generator, root, n_kills = random.Random(0), tmp_path / "killed", 0
    for i in range(40):
        n_kills += kill_at(lambda root=root: run(root), generator.uniform(0, 0.05)) != 0
        if (root / md.hash / "metadata.json").exists() or i % 10 == 9:
            assert {path.name: path.read_bytes() for path in run(root).iterdir()} == expected
            root = tmp_path / f"killed{i}"
    assert n_kills > 5
    # What is given again is compared with what is stored: rounding elsewhere is the same, other data is not.
    assert run(tmp_path / "whole", acts * (1 + 1e-3)) == whole
    with pytest.raises(WriteError, match="expected the values on disk to be given again, got others for example 0"):
        run(tmp_path / "whole", acts.flip(0))


def test_threads_that_clip_count_together(tmp_path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    md = metadata(n_examples=64, dtype="float16")
    acts = torch.full((64, 2, 7, 8), 1e6)
    with ThreadPoolExecutor(8) as pool, ShardWriter(tmp_path, md, on_overflow="clip") as writer:
        list(pool.map(lambda i: writer.write_batch(acts[i : i + 1], i), range(64)))
    assert writer.n_clipped == acts.numel()
    assert (read(writer.shards_dir) == 0x7BFF).all()


# record


def make_llama(dtype: torch.dtype) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 4, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, **sizes)).eval().to(dtype)


def windows() -> DataLoader:
    ids = torch.randint(50, (9, 7), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=4)


def hidden_states(model: nn.Module) -> torch.Tensor:
    """Of layers 0 and 2, [n_examples, n_layers, tokens, d_model]."""
    found = []
    with torch.no_grad():
        for batch in windows():
            hidden = model(**batch, output_hidden_states=True).hidden_states
            found.append(torch.stack([hidden[1], hidden[3]], dim=1))
    return torch.cat(found)


@pytest.mark.parametrize("given", ["bfloat16", "float16", "float32", "float64"])
def test_a_model_is_recorded_as_it_is(tmp_path, caplog, capfd, given) -> None:
    """File bytes are the hidden states of a transformers model, bit for bit; of float64 the nearest float32."""
    model = make_llama(getattr(torch, given))
    options = {"layers": [0, 2], "cls_token": False, "shards_root": tmp_path, **NAMES}
    with caplog.at_level(logging.INFO, "saev_torch"):
        shards = record(model, windows(), **options)
    dtype = "float32" if given == "float64" else given
    assert Metadata.load(shards).dtype == dtype
    hidden = hidden_states(model)
    assert hidden.dtype == getattr(torch, given)
    wanted = hidden.to(getattr(torch, dtype))
    np.testing.assert_array_equal(read(shards), bits_of(wanted).view("<u4" if dtype == "float32" else "<u2"))
    (line,) = [record.message for record in caplog.records if "blocks" in record.message]
    assert line == f"recording {dtype}; the blocks put out torch.{given}"
    # And where there is no log: but for float32, which all directories had before.
    assert ("recording " + dtype in capfd.readouterr().err) == (dtype != "float32")
    assert verify(shards, finite=True).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_recorded_in_the_type_that_is_asked_for(tmp_path, dtype) -> None:
    model = make_llama(torch.float32)
    options = {"layers": [0, 2], "cls_token": False, "shards_root": tmp_path, "progress": False, **NAMES}
    shards = record(model, windows(), dtype=dtype, **options)
    wanted = hidden_states(model).to(getattr(torch, dtype))
    np.testing.assert_array_equal(read(shards), bits_of(wanted).view("<u4" if dtype == "float32" else "<u2"))
    # Recorded as float32 and repacked, it is the same directory.
    if dtype != "float32":
        full = record(model, windows(), **options)
        again = repack(full, tmp_path / "repacked", dtype=dtype)
        assert (again.name, content(again)) == (shards.name, content(shards))
    with pytest.raises(WriteError, match="got a finished one with this metadata"):
        record(model, windows(), dtype=dtype, **options)
    assert record(model, windows(), dtype=dtype, resume=True, **options) == shards


def test_a_model_that_overflows(tmp_path) -> None:
    model = make_llama(torch.float32)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3] *= 1e8
    options = {"layers": [0, 2], "cls_token": False, "shards_root": tmp_path, "progress": False, **NAMES}
    with pytest.raises(WriteError, match=r"that float16 holds, .* in example 0, layer 2, stored .* 3; use bfloat16"):
        record(model, windows(), dtype="float16", **options)
    assert list(tmp_path.iterdir()) == []
    clipped = record(model, windows(), dtype="float16", on_overflow="clip", **options)
    wanted = hidden_states(model).clamp(-65_504, 65_504).half()
    assert (wanted.abs() == 65_504).any()
    np.testing.assert_array_equal(read(clipped), bits_of(wanted).view("<u2"))
    record(model, windows(), dtype="bfloat16", **options)


class Mixed(nn.Module):
    """Blocks that put out several types, and others in later batches."""

    def __init__(self, dtypes: list[torch.dtype], later: torch.dtype | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity() for _ in dtypes])
        self.dtypes, self.later, self.n_calls = dtypes, later, 0

    def forward(self, x: torch.Tensor) -> None:
        self.n_calls += 1
        for block, dtype in zip(self.blocks, self.dtypes, strict=True):
            block(x.to(self.later if self.later is not None and self.n_calls > 1 else dtype))


@pytest.mark.parametrize(("dtypes", "stored"), [
    ([torch.bfloat16, torch.float16], "float32"), ([torch.float32, torch.bfloat16], "float32"),
    ([torch.bfloat16, torch.bfloat16], "bfloat16"), ([torch.float64, torch.float16], "float32"),
])  # fmt: skip
def test_blocks_of_several_types(tmp_path, dtypes, stored) -> None:
    x = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x), batch_size=4)
    shards = record(Mixed(dtypes), loader, layers=[0, 1], cls_token=False, shards_root=tmp_path, **NAMES)
    wanted = torch.stack([x.to(dtype).to(getattr(torch, stored)) for dtype in dtypes], dim=1)
    assert Metadata.load(shards).dtype == stored
    np.testing.assert_array_equal(read(shards), bits_of(wanted).view("<u4" if stored == "float32" else "<u2"))


def test_a_type_that_changes_on_the_way(tmp_path) -> None:
    """It would be rounded to what the first batch was, and nobody would know."""
    loader = DataLoader(TensorDataset(torch.randn(6, 3, 8)), batch_size=4)
    options = {"layers": [0], "cls_token": False, "shards_root": tmp_path, **NAMES}
    message = r"put out torch\.bfloat16, as in the first batch, got torch\.float32 in that of example 4; give the dtype"
    with pytest.raises(ConfigError, match=f"dtype: expected blocks that {message}"):
        record(Mixed([torch.bfloat16], torch.float32), loader, **options)
    assert list(tmp_path.iterdir()) == []
    record(Mixed([torch.bfloat16], torch.float32), loader, dtype="bfloat16", **options)


@pytest.mark.parametrize(("option", "message"), [
    ({"dtype": "float8"}, r"dtype: expected one of \['float32', 'float16', 'bfloat16'\], or None, got 'float8'"),
    ({"dtype": torch.bfloat16}, r"dtype: expected one of .*, got torch\.bfloat16"),
    ({"dtype": ""}, "dtype: expected one of"), ({"dtype": ["float32"]}, "dtype: expected one of"),
    ({"on_overflow": "raise"}, "on_overflow: expected 'refuse' or 'clip', got 'raise'"),
])  # fmt: skip
def test_record_refuses(tmp_path, option, message) -> None:
    with pytest.raises(ConfigError, match=message):
        rank_records.main(tmp_path, **option)
    with contextlib.suppress(FileNotFoundError):
        assert list(tmp_path.iterdir()) == []


# repack


def directory(tmp_path, dtype: str, acts: torch.Tensor, **options):
    md = metadata(n_examples=len(acts), dtype=dtype, d_model=acts.shape[-1])
    return write(tmp_path, md, acts, **options)


def some_acts() -> torch.Tensor:
    acts = torch.randn(11, 2, 7, 40, generator=torch.Generator().manual_seed(0))
    return acts * 10.0 ** torch.randint(-9, 5, acts.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("new", DTYPES)
@pytest.mark.parametrize("old", DTYPES)
def test_repack_changes_the_type_and_says_how_far_off_values_are(tmp_path, old, new) -> None:
    if old == new:
        with pytest.raises(ConfigError, match="dtype: expected a change"):
            repack(directory(tmp_path, old, some_acts(), on_overflow="clip"), tmp_path / "new", dtype=new)
        return
    acts = some_acts()
    acts[3, 1, 2, 5], acts[4, 1, 2, 5], acts[6, 0, 0, 0] = 1e6, float("nan"), -float("inf")
    acts[5, 0, 0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    source = directory(tmp_path, old, acts, on_overflow="clip")
    reports: list[Rounding] = []
    shards = repack(source, tmp_path / "new", dtype=new, on_overflow="clip", report=reports.append)
    x = tensor_of(read(source), old) if old != "float32" else torch.from_numpy(read(source).view("<f4").copy())
    y = x.to(getattr(torch, new))
    is_large = y.isinf() & x.isfinite()
    y[is_large] = torch.finfo(y.dtype).max
    got = torch.from_numpy(read(shards).view("<i4" if new == "float32" else "<i2").copy()).view(y.dtype)
    assert torch.equal(got.nan_to_num(7), y.nan_to_num(7))
    assert verify(shards).ok
    (found,) = reports
    x, y = x.double(), y.double()
    lost = (x != 0) & (y == 0)
    kept = x.isfinite() & (x != 0) & ~lost & ~is_large
    relative = ((y - x) / x).abs()[kept]
    assert found == Rounding(
        old, new, acts.numel(), relative.max().item(), pytest.approx(relative.mean().item(), rel=1e-12),
        int(is_large.sum()), int(lost.sum()),
    )  # fmt: skip
    if new == "float32":
        assert (found.max_relative, found.n_overflowed, found.n_became_zero) == (0, 0, 0)
    elif new == "bfloat16":
        assert 1e-3 < found.mean_relative < found.max_relative <= 2.0**-8
    else:
        assert found.n_became_zero > 100
        assert found.n_overflowed >= 1


def test_repack_refuses_what_overflows_and_names_it_in_the_source(tmp_path) -> None:
    acts = torch.zeros(11, 2, 7, 8)
    acts[9, 1, 2, 3] = -70_000
    source = directory(tmp_path, "float32", acts)
    message = "that float16 holds, up to 65504, got -70000 in example 9, layer 7, stored token 2, dimension 3; use bfl"
    with pytest.raises(WriteError, match=message):
        repack(source, tmp_path / "new", dtype="float16", examples=[2, 10, 9], layers=[7])
    assert not any((tmp_path / "new").iterdir())
    with pytest.raises(ConfigError, match=r"dtype: expected one of \['float32', .*\], or None, got 'half'"):
        repack(source, tmp_path / "new", dtype="half")
    with pytest.raises(ConfigError, match="on_overflow: expected 'refuse' or 'clip', got 'ignore'"):
        repack(source, tmp_path / "new", dtype="float16", on_overflow="ignore")


@pytest.mark.parametrize("n_examples", [11, 12])
@pytest.mark.parametrize("dtype", HALVES)
def test_repack_to_float32_gives_what_saev_takes(tmp_path, make_shards, dtype, n_examples) -> None:
    """By saev's own rules, written down here: names, hash, JSON, and files that are mapped whole."""
    source = make_shards(dtype=dtype, n_examples=n_examples, preallocate_last=False)
    shards = repack(source, tmp_path / "new", dtype="float32")
    raw = (shards / "metadata.json").read_bytes()
    obj = json.loads(raw)
    spec = Spec(n_examples=n_examples, data=obj["data"])
    assert list(obj.items()) == list(spec.metadata().items())
    assert raw == json.dumps(spec.metadata(), indent=2).encode()
    compact = json.dumps(obj, separators=(",", ":")).encode()
    assert shards.name == hashlib.sha256(compact).hexdigest()[:8]
    entries = [{"name": name, "n_examples": n} for name, n in spec.shards()]
    assert json.loads((shards / "shards.json").read_bytes()) == entries
    wanted = factory.to_float32(oracle_bits(dataclasses.replace(spec, dtype=dtype)), dtype)
    for i, entry in enumerate(entries):
        acts = np.memmap(shards / entry["name"], "<f4", "r", shape=(4, 2, 7, 8))
        assert (shards / entry["name"]).stat().st_size == acts.nbytes
        np.testing.assert_array_equal(acts[: entry["n_examples"]], wanted[4 * i : 4 * i + entry["n_examples"]])
    # Rounded values have another name than the recording in float32 that they are not.
    assert shards.name != Spec(n_examples=n_examples).hash()
    assert base64.b64decode(obj["data"]) == f"opaque\nrepacked from {source.name}: values of {dtype}".encode()
    assert repack(source, tmp_path / "cut", dtype="float32", preallocate=False).name == shards.name


def test_the_command_says_how_far_off_values_became(tmp_path, capsys) -> None:
    acts = torch.ones(11, 2, 7, 8)
    acts[0, 0, 0, :4] = torch.tensor([1e6, 1e-20, 0.0, 1 + 2.0**-12])
    source = directory(tmp_path, "float32", acts)
    assert main(["repack", str(source), str(tmp_path / "new"), "--dtype=float16", "--quiet"]) == 2
    assert "use bfloat16, or clip such values with on_overflow='clip'" in capsys.readouterr().err
    code = main(["repack", str(source), str(tmp_path / "new"), "--dtype=float16", "--on-overflow=clip", "--quiet"])
    out = capsys.readouterr().out
    assert code == 0
    mean = 2.0**-12 / (1 + 2.0**-12) / (11 * 2 * 7 * 8 - 3)
    assert out.splitlines()[0] == (
        f"float32 to float16: relative error {mean:.3g} on average, 0.000244 at most; of 1,232 values 1 (0.0812 %) "
        "overflowed, 1 (0.0812 %) became 0"
    )
    assert re.fullmatch(rf"{tmp_path}/new/[0-9a-f]{{8}}", out.splitlines()[1])
    assert main(["inspect", out.splitlines()[1]]) == 0
    assert "d_model 8, float16" in capsys.readouterr().out
