"""One harness for the order of batches, which every loader runs through; the oracle is numpy over the whole tensor.

Run as a script it prints the digests of three epochs, so that a test can compare processes:

    python contracts.py '{"shards": "...", "workers": 2}'
"""

import collections
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
import torch
from conftest import PATIENCE_S
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from saev_torch import (
    ActivationBatch,
    MixedActivations,
    OrderedActivations,
    OrderedConfig,
    OrderedDataLoader,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
)
from saev_torch.iterable import activations
from saev_torch.reading import engine, gather, watch
from saev_torch.reading.slots import SlotPool

# The order must not depend on the number of workers, so tests use more than a small machine has cores. This is for
# `pytest.mark.filterwarnings`: unlike pyproject.toml, it holds under `pytest -W error`, too.
MANY_WORKERS = "ignore:This DataLoader will create .* worker processes in total:UserWarning"

Config = OrderedConfig | ShuffledConfig
Batches = list[ActivationBatch]

_DTYPES = {
    "example_idx": torch.int64,
    "token_idx": torch.int64,
    "token_labels": torch.int64,
    "layer": torch.int64,
}


# What there is to yield


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples in file order: a column for each key of a batch, and a number that no two samples share."""

    columns: dict[str, np.ndarray]
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "Samples":
        return Samples({key: column[rows] for key, column in self.columns.items()}, self.ids[rows])


def positions(layers: tuple[int, ...], layer: int) -> int:
    """Where a layer is: by value, else a negative one from the end."""
    return layers.index(layer) if layer in layers else len(layers) + layer


def expected(spec: factory.Spec, tokens: str, layer: Any, ignore_labels: Iterable[int] = ()) -> Samples:
    """Return every selected sample, in file order, by slicing the whole tensor."""
    acts, labels = factory.oracle(spec), factory.oracle_labels(spec)
    first = spec.cls if tokens == "content" else 0
    n_tokens = {"special": 1, "content": spec.content_tokens, "all": spec.content_tokens + spec.cls}[tokens]
    stored = slice(first, first + n_tokens)
    if layer == "all":
        acts, layers = acts[:, :, stored], np.array(spec.layers)
    elif isinstance(layer, tuple):
        # Several layers side by side: they become an axis of each sample.
        side_by_side = acts[:, [positions(spec.layers, x) for x in layer]][:, :, stored]
        acts, layers = np.moveaxis(side_by_side, 1, 2)[:, None], np.zeros(1)
    else:
        acts, layers = acts[:, [positions(spec.layers, layer)], stored], np.zeros(1)
    shape = acts.shape[:3]
    example, grid_layer, token = (x.ravel() for x in np.indices(shape))
    token = token + first - spec.cls
    label = np.where(token < 0, -1, labels[example, token].astype(np.int64))
    columns = {"act": acts.reshape(-1, *acts.shape[3:]), "example_idx": example, "token_idx": token}
    if spec.labels:
        columns["token_labels"] = label
    if layer == "all":
        columns["layer"] = layers[grid_layer]
    samples = Samples(columns, np.arange(len(example)))
    return samples.take(np.flatnonzero(~np.isin(label, list(ignore_labels)) | (token < 0)))


def expected_for(spec: factory.Spec, cfg: Config) -> Samples:
    ignored = cfg.ignore_labels if isinstance(cfg, ShuffledConfig) else ()
    return expected(spec, cfg.tokens, cfg.layer, ignored)


def act_dtype(spec: factory.Spec, cfg: Config) -> torch.dtype:
    """What activations are in a batch."""
    found: torch.dtype = getattr(torch, spec.dtype if cfg.act_dtype == "stored" else cfg.act_dtype)
    return found


def to_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, of which numpy may not know the type."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def find_rows(batches: Sequence[Mapping[str, torch.Tensor]], samples: Samples) -> np.ndarray:
    """Return which of `samples` each row of the batches is, -1 for none of them."""
    keys = [key for key in ("example_idx", "layer", "token_idx") if key in samples.columns]
    rows = {row: i for i, row in enumerate(zip(*(samples.columns[key].tolist() for key in keys), strict=True))}
    found = [rows.get(row, -1) for b in batches for row in zip(*(b[key].tolist() for key in keys), strict=True)]
    return np.array(found, dtype=np.int64)


# What every loader must do


def check_epoch(batches: Batches, spec: factory.Spec, cfg: Config) -> None:
    """Check one epoch: every sample exactly once, the right values, full batches; file order where it is promised."""
    samples = expected_for(spec, cfg)
    n, size = len(samples), cfg.batch_size
    sizes = [size] * (n // size) + ([n % size] if n % size and not cfg.drop_last else [])
    assert [len(b["act"]) for b in batches] == sizes
    for batch in batches:
        assert type(batch) is ActivationBatch
        assert set(batch) == set(samples.columns)
        for key, tensor in batch.items():
            assert tensor.dtype == (act_dtype(spec, cfg) if key == "act" else _DTYPES[key]), key
            assert tuple(tensor.shape) == (len(batch["act"]), *samples.columns[key].shape[1:]), key
    rows = find_rows(batches, samples)
    assert (rows >= 0).all(), "a sample that was not selected"
    assert len(np.unique(rows)) == len(rows) == sum(sizes), "a sample twice"
    if isinstance(cfg, OrderedConfig):
        assert rows.tolist() == list(range(len(rows)))
    for key, column in samples.columns.items():
        got = b"".join(to_bytes(b[key]) for b in batches)
        # The type of activations holds all of them.
        wanted = torch.from_numpy(column[rows]).to(batches[0][key].dtype) if batches else torch.empty(0)
        # Bit for bit, so that a NaN or a negative zero could not hide.
        assert got == to_bytes(wanted), key


def check_attributes(loader: Any, spec: factory.Spec, cfg: Config) -> None:
    """Check what a data set or a ready-made loader says about itself."""
    n, size = len(expected_for(spec, cfg)), cfg.batch_size
    n_batches = n // size if cfg.drop_last else -(-n // size)
    assert loader.cfg is cfg
    assert loader.metadata is loader.md
    assert loader.metadata.n_examples == spec.n_examples
    assert loader.d_model == spec.d_model
    assert loader.n_samples == n
    assert loader.n_batches == len(loader) == n_batches
    assert loader.batch_size == size
    assert loader.drop_last is cfg.drop_last


def check_mixture(batches: Batches, specs: list[factory.Spec], mixed: MixedActivations) -> None:
    """Check one epoch of a mixture: the right values; of each source whole epochs, one after the other, and a part."""
    cfg, n, size = mixed.cfg, mixed.n_samples, mixed.batch_size
    sizes = [size] * (n // size) + ([n % size] if n % size and not cfg.drop_last else [])
    assert [len(b["act"]) for b in batches] == sizes
    is_whole = []
    for i, (spec, own) in enumerate(zip(specs, cfg.sources, strict=True)):
        samples = expected_for(spec, own)
        n_given = len(samples)
        if any(other.labels for other in specs) and not spec.labels:
            samples.columns["token_labels"] = np.full(n_given, -1)
        if any(other.layer == "all" for other in cfg.sources) and own.layer != "all":
            samples.columns["layer"] = np.full(n_given, spec.layers[positions(spec.layers, own.layer)])
        mine = [{key: tensor[b["source"] == i] for key, tensor in b.items() if key != "source"} for b in batches]
        assert all(set(part) == set(samples.columns) for part in mine)
        rows = find_rows(mine, samples)
        assert (rows >= 0).all(), "a sample that was not selected"
        n_epochs = len(rows) // n_given
        for epoch in range(n_epochs):
            assert len(np.unique(rows[epoch * n_given : (epoch + 1) * n_given])) == n_given, "a sample twice"
        rest = rows[n_epochs * n_given :]
        assert len(np.unique(rest)) == len(rest), "a sample twice"
        is_whole.append((n_epochs, len(rest)))
        for key, column in samples.columns.items():
            wanted = torch.from_numpy(column[rows]).to(batches[0][key].dtype)
            assert b"".join(to_bytes(part[key]) for part in mine) == to_bytes(wanted), key
    if cfg.drop_last:
        return
    if cfg.until == "shortest":
        assert all(n_epochs == 0 or (n_epochs, n_rest) == (1, 0) for n_epochs, n_rest in is_whole)
        assert (1, 0) in is_whole
    else:
        assert all(n_epochs for n_epochs, _ in is_whole)
        assert (1, 0) in is_whole


def assert_same(got: Batches, wanted: Batches) -> None:
    """Check that two sequences of batches are the same, bit for bit."""
    assert len(got) == len(wanted)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert list(a) == list(b), i
        for key in a:
            assert a[key].dtype == b[key].dtype, (i, key)
            assert a[key].shape == b[key].shape, (i, key)
            assert to_bytes(a[key]) == to_bytes(b[key]), f"batch {i}: {key} differs"


def digest(batches: Iterable[ActivationBatch]) -> str:
    """Hash a sequence of batches: every bit of them, and where one ends."""
    whole = hashlib.sha256()
    for batch in batches:
        for key, tensor in batch.items():
            whole.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole.update(to_bytes(tensor))
    return whole.hexdigest()


# The loaders


def make_data_set(cfg: Config) -> OrderedActivations | ShuffledActivations:
    return OrderedActivations(cfg) if isinstance(cfg, OrderedConfig) else ShuffledActivations(cfg)


def copy_here() -> None:
    """Let machine code copy what is gathered, also where another test took the signal from it."""
    found = watch.find_watch()
    assert found is not None
    found._begin_anew()
    assert found.is_on


def copy_in_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel copy what is gathered, as it does where no machine code can be made."""
    monkeypatch.setattr(gather, "find_watch", lambda: None)


def save_buffers(monkeypatch: pytest.MonkeyPatch, is_slow: bool = True, copies_here: bool = False) -> None:
    """Let no buffer be filled, however small it is, in workers that are forked and here: memory comes slowly."""
    if copies_here:
        copy_here()
    else:
        copy_in_kernel(monkeypatch)
    monkeypatch.setattr(engine, "_SMALL_NBYTES", 0)
    monkeypatch.setattr(engine, "_LARGE_NBYTES", 0)
    monkeypatch.setattr(engine, "_WIDE_NBYTES", 0)
    monkeypatch.setattr(activations, "ends_with_epoch", lambda: True)
    monkeypatch.setattr(SlotPool, "is_slow", is_slow)
    monkeypatch.setattr(SlotPool, "is_new", True)


def make_ready(cfg: Config, **options: Any) -> OrderedDataLoader | ShuffledDataLoader:
    if isinstance(cfg, OrderedConfig):
        return OrderedDataLoader(cfg, **options)
    return ShuffledDataLoader(cfg, **options)


# The three ways to a loader that users have; each takes a config and options of `DataLoader`.
WAYS: dict[str, Callable[..., Any]] = {
    "default": lambda cfg, **options: DataLoader(make_data_set(cfg), **options),
    "batch_size=None": lambda cfg, **options: DataLoader(make_data_set(cfg), batch_size=None, **options),
    "ready-made": make_ready,
}


def check_fails(
    loader: Any, error: type[Exception], message: str, within_s: float = PATIENCE_S, each: Callable[[Any], None] = id
) -> Exception:
    """Check that iterating fails with an error that names what it should, in the parent, soon; return the error."""
    iterator = iter(loader)
    began = time.monotonic()
    try:
        with pytest.raises(error, match=message) as caught:
            collections.deque(map(each, iterator), maxlen=0)
    finally:
        # The traceback keeps the iterator; its workers would be missed as a leak, or ended slowly by the collector.
        workers = getattr(iterator, "iterator", iterator)
        if hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()
    assert time.monotonic() - began < within_s
    return caught.value


# Random geometries


@st.composite
def specs(draw: st.DrawFn) -> factory.Spec:
    return factory.Spec(
        n_examples=draw(st.integers(1, 40)),
        content_tokens=draw(st.integers(1, 12)),
        cls=draw(st.booleans()),
        layers=draw(st.sampled_from([(5,), (-2,), (3, 7), (-2, -1), (0, 4, 11), (7, -1, 3)])),
        d_model=draw(st.sampled_from([1, 2, 3, 8, 17])),
        examples_per_shard=draw(st.integers(1, 50)),
        labels=draw(st.booleans()),
        preallocate_last=draw(st.booleans()),
        trailing_empty=draw(st.sampled_from([None, True, False])),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    )


@st.composite
def selections(draw: st.DrawFn, spec: factory.Spec) -> dict[str, Any]:
    one = st.sampled_from(spec.layers) | st.integers(-len(spec.layers), -2 if len(spec.layers) > 1 else -1)
    side_by_side = st.lists(st.sampled_from(spec.layers), min_size=1, unique=True).map(tuple)
    layer = draw(one | st.just("all") | side_by_side)
    if layer == -1 and -1 not in spec.layers:
        layer = spec.layers[0]  # -1 is the default that must be changed
    return {"tokens": draw(st.sampled_from(["content", "all", *["special"] * spec.cls])), "layer": layer}


@st.composite
def cases(draw: st.DrawFn) -> tuple[factory.Spec, type[Any], dict[str, Any]]:
    """Draw a shard directory, a class of config, and the fields of one (all but `shards`)."""
    spec = draw(specs())
    fields = draw(selections(spec))
    kind = draw(st.sampled_from([ShuffledConfig, ShuffledConfig, OrderedConfig]))
    if kind is ShuffledConfig:
        if spec.labels and fields["tokens"] != "special" and draw(st.booleans()):
            ignored = draw(st.lists(st.integers(0, 6) | st.just(255), max_size=8))
            # What leaves nothing is refused.
            if len(expected(spec, **fields, ignore_labels=ignored)):
                fields["ignore_labels"] = ignored
        fields["n_threads"] = draw(st.sampled_from([1, 4]))
        fields["n_lanes"] = draw(st.sampled_from([8, 8, 1, 2, 3, 12]))
        fields["block_size"] = draw(st.sampled_from([None, None, 1, 2, 5, 100]))
        fields["min_buffer_fill"] = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
        fields["seed"] = draw(st.integers())
        fields["order"] = draw(st.sampled_from(["blocks", "blocks", "uniform"]))
    n = len(expected(spec, fields["tokens"], fields["layer"], fields.get("ignore_labels", ())))
    # Not more than some 150 batches, so that a case takes milliseconds.
    sizes = st.sampled_from([max(1, n + d) for d in (-1, 0, 1, 1000)]) | st.integers(max(1, n // 150), max(1, n // 2))
    fields["batch_size"] = draw(st.just(1) | sizes if n <= 150 else sizes)
    # Smaller than the data as well as larger.
    fields["buffer_size"] = draw(st.sampled_from([1, 2, 3, 8, 10, 16, 64]))
    fields["drop_last"] = draw(st.booleans())
    fields["act_dtype"] = draw(st.sampled_from(["float32", "stored"]))
    return spec, kind, fields


def _print_digests(
    shards: str, fields: dict[str, Any], workers: int = 0, context: str | None = None, persistent: bool = False
) -> None:
    options = {"num_workers": workers, "multiprocessing_context": context, "persistent_workers": persistent}
    for kind in (ShuffledConfig, OrderedConfig):
        loader = DataLoader(make_data_set(kind(shards=Path(shards), **fields)), **options)
        print(kind.__name__, *(digest(loader) for _ in range(3)), flush=True)


if __name__ == "__main__":
    _print_digests(**json.loads(sys.argv[1]))
