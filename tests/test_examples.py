"""Subsets of examples and masks of tokens: against numpy over the whole tensor, through every data set."""

import dataclasses
import itertools
import json
import os
import time
import tracemalloc

import contracts
import factory
import numpy as np
import pytest
import torch
from factory import Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    Examples,
    FormatError,
    IndexedConfig,
    IndexedDataset,
    OrderedConfig,
    ReadError,
    SaevTorchError,
    ShardsNotFoundError,
    ShuffledActivations,
    ShuffledConfig,
    StateError,
    compute_statistics,
)
from saev_torch.format.metadata import Metadata
from saev_torch.order.examples import make_subset
from saev_torch.order.predict import predict
from saev_torch.reading.mask import Mask

SPEC = Spec(n_examples=150, content_tokens=7, layers=(3, 7), examples_per_shard=40, d_model=2)
SUBSETS = {
    "span": Examples.span(20, 90),
    "to the end": Examples.span(130),
    "fraction": Examples.fraction(0.2, 0.7, seed=3),
    "small fraction": Examples.fraction(0.0, 0.03),
    "only": Examples.only([3, 4, 5, 77, 149, 0, 4]),
}


def members_of(examples, n):
    subset = make_subset(examples, n)
    return subset.members(np.arange(subset.n, dtype=np.int64))


# Which examples


@pytest.mark.parametrize("n", [150, 1000, 64, 65, 4097])
@pytest.mark.parametrize("name", SUBSETS)
def test_members_and_their_numbers(name, n):
    if name in ("to the end", "only", "span"):
        n = max(n, 150)
    subset = make_subset(SUBSETS[name], n)
    members = members_of(SUBSETS[name], n)
    assert (np.diff(members) > 0).all()
    assert members[0] >= 0
    assert members[-1] < n
    wanted = np.full(n, -1)
    wanted[members] = np.arange(len(members))
    assert np.array_equal(subset.ordinals(np.arange(n)), wanted)
    rng = np.random.default_rng(0)
    some = rng.integers(0, subset.n, 100)
    assert np.array_equal(subset.members(some), members[some])


def test_what_they_name():
    assert members_of(Examples.span(3, 6), 10).tolist() == [3, 4, 5]
    assert members_of(Examples.span(8), 10).tolist() == [8, 9]
    assert members_of(Examples.only([7, 2, 3, 2]), 10).tolist() == [2, 3, 7]
    assert members_of(Examples.only(np.array([7, 2], dtype=np.uint8)), 10).tolist() == [2, 7]
    assert members_of(Examples.fraction(0.0, 1.0), 777).tolist() == list(range(777))


def test_fractions_are_the_same_for_ever():
    """Held-out examples stay held out in later versions."""
    assert members_of(Examples.fraction(0.0, 0.1), 200).tolist() == [
        4,
        7,
        19,
        31,
        39,
        42,
        44,
        64,
        67,
        69,
        83,
        94,
        100,
        129,
        130,
        137,
        146,
        158,
        190,
        191,
    ]
    assert members_of(Examples.fraction(0.5, 0.6, seed=7), 200).tolist() == [
        0,
        16,
        17,
        26,
        37,
        60,
        82,
        85,
        95,
        99,
        110,
        120,
        130,
        141,
        142,
        164,
        172,
        179,
        182,
        194,
    ]


@pytest.mark.parametrize("bounds", [(0.9,), (0.5,), (0.001,), (0.2, 0.21, 0.8), (1 / 3, 2 / 3)])
@pytest.mark.parametrize("n", [64, 1000, 100_003])
def test_fractions_are_disjoint_complete_and_as_large_as_they_say(bounds, n):
    edges = (0.0, *bounds, 1.0)
    parts = []
    for low, high in itertools.pairwise(edges):
        try:
            parts.append(members_of(Examples.fraction(low, high, seed=5), n))
        except ConfigError:
            # Nothing is drawn of few examples.
            assert (high - low) * n < 2
            parts.append(np.empty(0, dtype=np.int64))
        p = high - low
        assert abs(len(parts[-1]) - p * n) <= max(3 * (n * p * (1 - p)) ** 0.5, 2)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(0, 3000), st.floats(0, 0.9), st.floats(0.01, 1), st.integers())
def test_appended_examples_change_nothing(n, more, low, width, seed):
    examples = Examples.fraction(low, min(1.0, low + width), seed=seed)
    try:
        few = members_of(examples, n)
    except ConfigError:
        few = np.empty(0, dtype=np.int64)
    try:
        many = members_of(examples, n + more)
    except ConfigError:
        many = np.empty(0, dtype=np.int64)
    assert np.array_equal(many[many < n], few)


def test_fractions_look_random():
    """Whether an example is in says nothing of its neighbours, of its place modulo 64, nor of another seed's."""
    n = 200_000
    a, b = (np.isin(np.arange(n), members_of(Examples.fraction(0.0, 0.5, seed=s), n)) for s in (0, 1))
    error = 3 * 0.5 / n**0.5
    assert abs((a == b).mean() - 0.5) < error
    for lag in (1, 2, 3, 8, 32, 64, 128):
        # Within a group draws are without replacement.
        assert abs((a[lag:] == a[:-lag]).mean() - 0.5) < error + 1 / 63
    by_place = a[: n // 64 * 64].reshape(-1, 64).mean(axis=0)
    assert np.abs(by_place - 0.5).max() < 4.5 * 0.5 / (n // 64) ** 0.5


def test_a_hundred_million_examples_cost_nothing():
    tracemalloc.start()
    began = time.process_time()
    subset = make_subset(Examples.fraction(0.0, 0.9), 100_000_000)
    took = time.process_time() - began
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert abs(subset.n - 9e7) < 3 * (1e8 * 0.09) ** 0.5
    assert most < 50e6
    # Measured: 0.01 s; generous, because this is no benchmark.
    assert took < 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Examples.span(5, 5), "Examples.span: expected integers 0 <= start < stop"),
        (lambda: Examples.span(-1, 5), "Examples.span"),
        (lambda: Examples.span(1.5, 5), "Examples.span"),
        (lambda: Examples.fraction(0.5, 0.5), "Examples.fraction: expected 0.0 <= low < high <= 1.0"),
        (lambda: Examples.fraction(-0.1, 0.5), "Examples.fraction"),
        (lambda: Examples.fraction(0, float("nan")), "Examples.fraction"),
        (lambda: Examples.fraction(0, 1, seed="a"), "seed: expected an integer"),
        (lambda: Examples.only([]), "Examples.only: expected numbers of examples"),
        (lambda: Examples.only([-1]), "Examples.only"),
        (lambda: Examples.only([0.5]), "Examples.only"),
        (lambda: Examples.from_dict({}), "examples: expected what Examples.to_dict"),
        (lambda: Examples.from_dict({"kind": "only", "bounds": [3, 2]}), "examples: expected"),
        (lambda: Examples.from_dict({"kind": "x", "bounds": [3, 4]}), "examples: expected"),
        (lambda: make_subset(Examples.span(3, 11), 10), "examples: expected numbers below 10"),
        (lambda: make_subset(Examples.only([10]), 10), "examples: expected numbers below 10"),
        (lambda: make_subset(Examples.fraction(0, 1e-9), 10), "examples: expected that some of 10 are selected"),
        (lambda: IndexedConfig("x", examples=3), "IndexedConfig.examples: expected Examples, got 3"),
        (lambda: IndexedConfig("x", mask=3), "IndexedConfig.mask: expected a path, got 3"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", SUBSETS)
def test_configs_with_subsets_travel(name):
    cfg = ShuffledConfig("x", layer=3, examples=SUBSETS[name], mask="keep.npy")
    again = ShuffledConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg
    assert hash(again) == hash(cfg)
    assert again.examples == SUBSETS[name]
    assert eval(repr(SUBSETS["span"]), {"Examples": Examples}) == SUBSETS["span"]


# Through the data sets


def wanted_rows(cfg, mask=None):
    """The samples of a selection in file order, by numpy over all samples."""
    samples = contracts.expected(SPEC, cfg.tokens, cfg.layer, getattr(cfg, "ignore_labels", ()))
    example, token = samples.columns["example_idx"], samples.columns["token_idx"]
    stays = np.ones(len(samples), dtype=bool)
    if cfg.examples is not None:
        stays &= np.isin(example, members_of(cfg.examples, SPEC.n_examples))
    if mask is not None:
        stays &= mask[example, token] | (token < 0)
    return samples.take(np.flatnonzero(stays))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return factory.make_shards(tmp_path_factory.mktemp("shards"), SPEC)


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    values = np.random.default_rng(1).random((SPEC.n_examples, SPEC.content_tokens)) < 0.6
    values[40:60] = False
    path = tmp_path_factory.mktemp("masks") / "keep.npy"
    np.save(path, values)
    return path, values


def check(batches, samples, in_order):
    rows = contracts.find_rows(batches, samples)
    assert (rows >= 0).all(), "a sample that was not selected"
    assert sorted(rows.tolist()) == list(range(len(samples)))
    assert not in_order or rows.tolist() == list(range(len(samples)))
    for key, column in samples.columns.items():
        got = np.concatenate([b[key].numpy() for b in batches])
        assert got.tobytes() == np.ascontiguousarray(column[rows].astype(got.dtype)).tobytes(), key


GRID = [
    (tokens, layer, name, masked)
    for tokens in ("content", "all", "special")
    for layer in (7, "all", (7, 3))
    for name in (None, "fraction", "only")
    for masked in (False, True)
    if name or masked
]


@pytest.mark.parametrize(("tokens", "layer", "name", "masked"), GRID)
def test_every_data_set_has_just_these_samples(shards, mask, tokens, layer, name, masked):
    fields = {"tokens": tokens, "layer": layer, "examples": name and SUBSETS[name], "mask": mask[0] if masked else None}
    samples = wanted_rows(IndexedConfig(shards, **fields), mask[1] if masked else None)
    ordered = contracts.make_data_set(OrderedConfig(shards, batch_size=50, **fields))
    assert ordered.n_samples == len(samples)
    check(list(ordered), samples, in_order=True)
    for order in ("blocks", "uniform"):
        cfg = ShuffledConfig(shards, batch_size=50, buffer_size=8, order=order, **fields)
        data_set = contracts.make_data_set(cfg)
        batches = list(data_set)
        assert len(batches) == len(data_set)
        check(batches, samples, in_order=False)
        if tokens != "special":
            some = dataclasses.replace(cfg, ignore_labels=[1, 4])
            check(list(contracts.make_data_set(some)), wanted_rows(some, mask[1] if masked else None), in_order=False)
    indexed = IndexedDataset(IndexedConfig(shards, **fields))
    assert len(indexed) == len(samples)
    batch = DataLoader(indexed, batch_size=len(indexed)).__iter__().__next__()
    assert batch["act"].numpy().tobytes() == np.ascontiguousarray(samples.columns["act"]).tobytes()
    assert batch["example_idx"].tolist() == samples.columns["example_idx"].tolist()
    row = len(samples) // 2
    batch, layer_of = batches[0], batches[0].get("layer", [None] * 50)
    place = [int(batch["example_idx"][row % 50]), int(batch["token_idx"][row % 50])]
    assert data_set.find(*place, layer_of[row % 50] if layer == "all" else None, epoch=0) == (0, row % 50)
    located = data_set.locate(0, epoch=0)
    assert torch.equal(located["example_idx"], batch["example_idx"])


def test_others_are_not_found(shards):
    data_set = ShuffledActivations(ShuffledConfig(shards, layer=3, examples=SUBSETS["span"]))
    for example in (19, 90, 149):
        with pytest.raises(IndexError, match="this selection has no such sample"):
            data_set.find(example, 0)


@pytest.mark.filterwarnings(contracts.MANY_WORKERS)
@pytest.mark.parametrize("order", ["blocks", "uniform"])
@pytest.mark.parametrize(("workers", "world_size"), [(1, 4), (2, 2), (3, 1), (8, 1), (2, 4)])
def test_workers_and_ranks(shards, mask, order, workers, world_size):
    cfg = ShuffledConfig(
        shards, layer=3, batch_size=32, buffer_size=8, order=order, examples=SUBSETS["fraction"], mask=mask[0]
    )
    whole = list(ShuffledActivations(cfg))
    for rank in range(world_size):
        loader = DataLoader(ShuffledActivations(cfg, rank=rank, world_size=world_size), num_workers=workers)
        wanted = (whole + whole)[: -(-len(whole) // world_size) * world_size][rank::world_size]
        contracts.assert_same(list(loader), wanted)


def test_every_cut_resumes_and_other_subsets_are_refused(shards, mask, tmp_path):
    cfg = ShuffledConfig(shards, layer=3, batch_size=32, buffer_size=8, examples=SUBSETS["fraction"], mask=mask[0])
    whole = list(ShuffledActivations(cfg))
    for cut in range(len(whole)):
        state = json.loads(json.dumps(ShuffledActivations(cfg).state_dict(n_batches=cut)))
        again = ShuffledActivations(cfg)
        again.load_state_dict(state)
        contracts.assert_same(list(again), whole[cut:])
    values = mask[1].copy()
    # As many samples, but others.
    members = members_of(cfg.examples, SPEC.n_examples)
    mixed = next(example for example in members if 0 < values[example].sum() < SPEC.content_tokens)
    values[mixed] = np.roll(values[mixed], 1)
    assert not np.array_equal(values, mask[1])
    np.save(tmp_path / "other.npy", values)
    for other, what in (
        ({"mask": tmp_path / "other.npy"}, "mask: expected"),
        ({"mask": None}, "mask: expected None"),
        ({"examples": None}, "examples: expected None"),
        ({"examples": Examples.fraction(0.2, 0.7, seed=4)}, "examples: expected"),
    ):
        with pytest.raises(StateError, match=what):
            ShuffledActivations(dataclasses.replace(cfg, **other)).load_state_dict(state)
    # A state from before there were subsets is one of all examples.
    old = {key: value for key, value in state.items() if key not in ("mask", "examples")}
    with pytest.raises(StateError, match="examples: expected"):
        ShuffledActivations(cfg).load_state_dict(old)
    plain = dataclasses.replace(cfg, examples=None, mask=None)
    old = ShuffledActivations(plain).state_dict()
    del old["mask"], old["examples"]
    ShuffledActivations(plain).load_state_dict(old)


def test_statistics_are_those_of_the_subset(shards, mask, tmp_path):
    cfg = ShuffledConfig(shards, layer=3, examples=SUBSETS["fraction"], mask=mask[0])
    acts = wanted_rows(cfg, mask[1]).columns["act"].astype(np.float64)
    found = compute_statistics(cfg, cache=tmp_path)
    assert found.total.n_samples == len(acts)
    np.testing.assert_allclose(found.total.mean, acts.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.total.mean_norm, np.linalg.norm(acts, axis=1).mean(), rtol=1e-12)
    # What is kept is not taken for another's.
    for other in ({"mask": None}, {"examples": None}, {"examples": SUBSETS["span"]}):
        some = dataclasses.replace(cfg, **other)
        wanted = wanted_rows(some, None if some.mask is None else mask[1])
        assert compute_statistics(some, cache=tmp_path).total.n_samples == len(wanted)


def test_scale_is_that_of_the_subset(shards):
    cfg = ShuffledConfig(shards, layer=3, examples=SUBSETS["only"], scale_norm=True)
    acts = wanted_rows(cfg).columns["act"].astype(np.float64)
    scale = 2**0.5 / np.linalg.norm(acts, axis=1).mean()
    assert ShuffledActivations(cfg).scale == pytest.approx(scale, rel=1e-6)


def test_the_planner_knows_subsets(shards):
    md = Metadata.load(shards)
    cfg = ShuffledConfig(layer=3, batch_size=64, buffer_size=8, examples=SUBSETS["span"])
    assert predict(md, cfg).distinct_examples <= 70
    with pytest.raises(ConfigError, match="mask: expected none, because which tokens it leaves"):
        predict(md, dataclasses.replace(cfg, mask="keep.npy"))


# Masks that are wrong

RIGHT = np.ones((150, 7), bool)


def saved(path, values):
    np.save(path, values)
    return path


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: saved(p, np.ones((149, 7), bool)), FormatError, r"expected bool \[150, 7\] .*, got bool \[149, 7\]"),
        (lambda p: saved(p, np.ones((150, 7), np.uint8)), FormatError, r"expected bool \[150, 7\] .*, got uint8"),
        (lambda p: saved(p, np.asfortranarray(np.ones((150, 7), bool))), FormatError, "in Fortran's order"),
        (lambda p: saved(p, np.array([{"a": 1}], dtype=object)), FormatError, "got object"),
        (lambda p: p.write_bytes(b"no numpy") and p, FormatError, "expected a .npy file, got something else"),
        (lambda p: p.write_bytes(b"") or p, FormatError, "expected a .npy file, got something else"),
        (lambda p: p, ShardsNotFoundError, "expected a file, but it does not exist"),
        (lambda p: p.mkdir() or p, FormatError, "expected a regular file, got a directory"),
        (lambda p: os.mkfifo(p) or p, FormatError, "expected a regular file"),
        (
            lambda p: p.symlink_to(saved(p.with_name("x.npy"), np.ones((150, 7), bool))) or p,
            FormatError,
            "symbolic link",
        ),
    ],
)
def test_a_file_that_is_no_such_mask(shards, tmp_path, make, error, message):
    path = make(tmp_path / "keep.npy")
    for kind in (IndexedConfig, OrderedConfig, ShuffledConfig):
        with pytest.raises(error, match=f"keep.npy: .*{message}"):
            make_any(kind(shards, layer=3, mask=path))


def make_any(cfg):
    return IndexedDataset(cfg) if isinstance(cfg, IndexedConfig) else contracts.make_data_set(cfg)


def test_a_mask_of_another_size_or_value(shards, tmp_path):
    path = saved(tmp_path / "keep.npy", np.ones((150, 7), bool))
    raw = path.read_bytes()
    cfg = OrderedConfig(shards, layer=3, mask=path)
    for changed in (raw[:-1], raw + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(FormatError, match=r"keep\.npy: expected \d+ bytes, got \d+"):
            make_any(cfg)
    path.write_bytes(raw[:-1] + b"\x02")
    with pytest.raises(FormatError, match="expected only False and True, got the byte 2"):
        make_any(cfg)
    with pytest.raises(ConfigError, match="mask: expected that samples are left"):
        make_any(dataclasses.replace(cfg, mask=saved(path, np.zeros((150, 7), bool))))


@pytest.mark.parametrize("kept", [True, False])
def test_a_mask_that_is_cut_or_replaced_while_it_is_in_use(shards, tmp_path, monkeypatch, kept):
    """Where it is not kept in memory: never a crash by a signal, and never other samples."""
    if not kept:
        monkeypatch.setattr("saev_torch.reading.mask._MAX_KEPT_NBYTES", 0)
    path = saved(tmp_path / "keep.npy", np.random.default_rng(0).random((150, 7)) < 0.5)
    data_set = ShuffledActivations(ShuffledConfig(shards, layer=3, batch_size=16, mask=path))
    whole = list(data_set)
    os.truncate(path, 200)
    data_set.set_epoch(0)
    if kept:
        contracts.assert_same(list(data_set), whole)
    else:
        contracts.check_fails(data_set, SaevTorchError, r"keep\.npy: expected the mask that was checked, got another")


def test_rows_of_a_large_mask_are_read_alone(tmp_path, shards, monkeypatch):
    monkeypatch.setattr("saev_torch.reading.mask._MAX_KEPT_NBYTES", 0)
    values = np.random.default_rng(0).random((150, 7)) < 0.5
    mask = Mask(saved(tmp_path / "keep.npy", values), Metadata.load(shards))
    for examples in ([], [0], [149], [3, 4, 5, 9, 140, 141], [5, 5, 2]):
        assert np.array_equal(mask.of_examples(np.array(examples, dtype=np.int64)), values[examples])
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:3]], at))
    assert np.array_equal(mask.of_examples(np.arange(150)), values), "short reads go on"
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: 0)
    with pytest.raises(ReadError, match="it became shorter in use"):
        mask.of_examples(np.arange(150))
