"""The order of batches, as the contract has it: every loader, random geometries, any number and kind of workers."""

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import contracts
import factory
import numpy as np
import pytest
import torch
from contracts import WAYS, assert_same, check_attributes, check_epoch, make_data_set
from factory import Spec
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    OrderedConfig,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    compute_statistics,
)

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.filterwarnings(contracts.MANY_WORKERS)

# A case is cheap or not depending on what else the machine does, so no time limits.
many = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
few = settings(many, max_examples=25)

# Geometries of all kinds, for what is too slow to repeat for many random ones: workers.
SMALL_BUFFER = (
    Spec(n_examples=60, content_tokens=7, layers=(3, 7), examples_per_shard=9),
    {"tokens": "all", "layer": "all", "batch_size": 17, "buffer_size": 8},
)
LARGE_BUFFER = (
    Spec(
        n_examples=41, content_tokens=9, layers=(0, 4, 11), examples_per_shard=4, d_model=3, cls=False, dtype="bfloat16"
    ),
    {"tokens": "content", "layer": (11, 0), "batch_size": 10, "buffer_size": 64},
)
ONE_BY_ONE = (
    Spec(n_examples=9, content_tokens=5, layers=(-2,), labels=False, preallocate_last=False, dtype="float16"),
    {"tokens": "content", "layer": -2, "batch_size": 1, "buffer_size": 3, "act_dtype": "stored"},
)
ONE_BATCH = (Spec(), {"tokens": "special", "layer": 7, "batch_size": 1000})
UNIFORM = (SMALL_BUFFER[0], {**SMALL_BUFFER[1], "order": "uniform"})
CASES = {"small buffer": SMALL_BUFFER, "large buffer": LARGE_BUFFER, "one by one": ONE_BY_ONE, "one batch": ONE_BATCH}
CASES["uniform"] = UNIFORM
KINDS = [ShuffledConfig, OrderedConfig]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The directories of CASES, and a small one under None."""
    root = tmp_path_factory.mktemp("made")
    dirs = {name: factory.make_shards(root / name, spec) for name, (spec, _) in CASES.items()}
    return dirs | {None: factory.make_shards(root / "small", Spec(n_examples=30))}


def case_of(made, name, kind):
    spec, fields = CASES[name]
    known = {field.name for field in dataclasses.fields(kind)}
    return spec, kind(shards=made[name], **{key: value for key, value in fields.items() if key in known})


def small(made, **fields):
    return ShuffledConfig(**{"shards": made[None], "layer": 3, "batch_size": 16, "buffer_size": 4, **fields})


# Every sample exactly once


@pytest.mark.parametrize("way", ["data set", *WAYS])
@settings(many, max_examples=25)
@given(contracts.cases())
def test_every_sample_once(way, case):
    spec, kind, fields = case
    with tempfile.TemporaryDirectory() as root:
        cfg = kind(shards=factory.make_shards(Path(root), spec), **fields)
        loader = make_data_set(cfg) if way == "data set" else WAYS[way](cfg)
        if way in ("data set", "ready-made"):
            check_attributes(loader, spec, cfg)
        for _ in range(2):
            batches = list(loader)
            event(f"{len(batches)} batches" if len(batches) < 2 else "many batches")
            assert len(batches) == len(loader)
            check_epoch(batches, spec, cfg)


@few
@given(contracts.cases(), st.sampled_from(list(WAYS)), st.integers(1, 4), st.booleans())
def test_every_sample_once_with_workers(case, way, n_workers, persistent):
    spec, kind, fields = case
    with tempfile.TemporaryDirectory() as root:
        cfg = kind(shards=factory.make_shards(Path(root), spec), **fields)
        wanted = make_data_set(cfg)
        options = {"num_workers": n_workers, "multiprocessing_context": "fork", "persistent_workers": persistent}
        loader = WAYS[way](cfg, **options)
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == len(loader)
            check_epoch(batches, spec, cfg)
            assert_same(batches, list(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_drop_last_leaves_out_the_last_batch_only(made, kind):
    spec, cfg = case_of(made, "small buffer", kind)
    assert len(contracts.expected_for(spec, cfg)) % cfg.batch_size
    assert_same(list(make_data_set(dataclasses.replace(cfg, drop_last=True))), list(make_data_set(cfg))[:-1])


@pytest.mark.parametrize("ignored", [range(256), range(7)])
@pytest.mark.parametrize("layer", [3, "all"])
def test_nothing_selected(made, ignored, layer):
    """Nobody wants to train for no steps, nor to know the moments of nothing."""
    cfg = small(made, ignore_labels=list(ignored), layer=layer)
    for make in (ShuffledActivations, ShuffledDataLoader, compute_statistics):
        with pytest.raises(ConfigError, match=r"ignore_labels: expected that samples are left, got \[0, 1, .* fewer"):
            make(cfg)
    cfg = dataclasses.replace(cfg, tokens="all")
    assert {int(i) for batch in make_data_set(cfg) for i in batch["token_idx"]} == {-1}


# The same sequence, however it is read

# (workers, persistent, way, threads): each number of workers with several of the others.
READERS = [
    (0, False, "batch_size=None", 1),
    (0, False, "ready-made", 4),
    (1, False, "default", 4),
    (1, True, "batch_size=None", 1),
    (2, True, "default", 1),
    (2, False, "ready-made", 4),
    (3, False, "batch_size=None", 4),
    (8, True, "default", 1),
]


def read(cfg, n_workers, persistent, way, context):
    """Two epochs of a loader with workers."""
    options = {"num_workers": n_workers, "multiprocessing_context": context if n_workers else None}
    loader = WAYS[way](cfg, persistent_workers=persistent, **options)
    return [list(loader), list(loader)]


# File order needs no buffer, lanes or threads of its own: a third of them will do.
READ = [(ShuffledConfig, name, *reader) for name in CASES for reader in READERS]
READ += [(OrderedConfig, name, *reader) for name in CASES if name != "uniform" for reader in READERS[::3]]


@pytest.mark.parametrize(("kind", "name", "n_workers", "persistent", "way", "n_threads"), READ)
def test_the_same_with_forked_workers(made, kind, name, n_workers, persistent, way, n_threads):
    spec, cfg = case_of(made, name, kind)
    data_set = make_data_set(cfg)
    wanted = [list(data_set), list(data_set)]
    if kind is ShuffledConfig:
        cfg = dataclasses.replace(cfg, n_threads=n_threads)
    got = read(cfg, n_workers, persistent, way, "fork")
    for epoch in (0, 1):
        assert_same(got[epoch], wanted[epoch])
        check_epoch(got[epoch], spec, cfg)


# Starting such a worker takes two to four seconds, so there are few.
@pytest.mark.parametrize(
    ("context", "kind", "name", "n_workers", "persistent", "way", "n_threads"),
    [
        ("spawn", ShuffledConfig, "small buffer", 2, True, "default", 4),
        ("spawn", OrderedConfig, "small buffer", 1, True, "batch_size=None", 1),
        ("forkserver", ShuffledConfig, "large buffer", 1, False, "ready-made", 4),
        ("forkserver", OrderedConfig, "one by one", 2, True, "default", 1),
    ],
)
def test_the_same_with_other_start_methods(made, context, kind, name, n_workers, persistent, way, n_threads):
    spec, cfg = case_of(made, name, kind)
    data_set = make_data_set(cfg)
    wanted = [list(data_set), list(data_set)]
    if kind is ShuffledConfig:
        cfg = dataclasses.replace(cfg, n_threads=n_threads)
    got = read(cfg, n_workers, persistent, way, context)
    for epoch in (0, 1):
        assert_same(got[epoch], wanted[epoch])
        check_epoch(got[epoch], spec, cfg)


@pytest.mark.parametrize("n_workers", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", ["small buffer", "one by one"])
def test_a_full_buffer_changes_nothing_and_stalls_nothing(made, name, n_workers):
    """Also where the number of workers does not divide the lanes, and finished batches fill the room of others."""
    _, cfg = case_of(made, name, ShuffledConfig)
    for fill in (0.5, 1.0):
        full = dataclasses.replace(cfg, min_buffer_fill=fill, batch_timeout_s=60.0)
        assert_same(list(DataLoader(make_data_set(full), num_workers=n_workers)), list(make_data_set(cfg)))


# Epochs


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("way", WAYS)
def test_three_iterations_three_orders(made, way, n_workers, persistent):
    cfg = small(made)
    loader = WAYS[way](cfg, num_workers=n_workers, persistent_workers=persistent)
    epochs = [list(loader) for _ in range(3)]
    orders = [torch.cat([b["example_idx"] * 100 + b["token_idx"] for b in epoch]) for epoch in epochs]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).float().mean() < 0.1
    for e, epoch in enumerate(epochs):
        data_set = ShuffledActivations(cfg)
        data_set.set_epoch(e)
        assert_same(epoch, list(data_set))


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("seeded", [False, True])
def test_breaking_off_moves_on(made, n_workers, persistent, seeded):
    """Also where the base seed, by which workers could tell iterations apart, is always the same."""
    cfg = small(made)
    wanted = [list(epoch) for epoch in itertools.repeat(ShuffledActivations(cfg), 6)]
    loader = DataLoader(ShuffledActivations(cfg), num_workers=n_workers, persistent_workers=persistent)
    for e, n_taken in enumerate([1, 100, 3, 0, 5, 100]):
        if seeded:
            torch.manual_seed(0)
        iterator = iter(loader)
        got = list(itertools.islice(iterator, n_taken))
        del iterator
        assert_same(got, wanted[e][:n_taken])


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_set_epoch_wins(made, n_workers, persistent):
    cfg = small(made)
    epochs = [list(epoch) for epoch in itertools.repeat(ShuffledActivations(cfg), 8)]
    loader = DataLoader(ShuffledActivations(cfg), num_workers=n_workers, persistent_workers=persistent)
    loader.dataset.set_epoch(5)
    assert_same(list(loader), epochs[5])
    assert_same(list(loader), epochs[6])
    assert_same(list(itertools.islice(iter(loader), 2)), epochs[7][:2])
    for epoch in (0, 0, 3):
        loader.dataset.set_epoch(epoch)
        assert_same(list(loader), epochs[epoch])
    loader.dataset.set_epoch(1)
    loader.dataset.set_epoch(2)
    assert_same(list(loader), epochs[2])
    assert_same(list(loader), epochs[3])


def test_set_epoch_of_a_ready_made_loader(made):
    loader = ShuffledDataLoader(small(made), num_workers=2, persistent_workers=True)
    first = list(loader)
    loader.set_epoch(0)
    assert_same(list(loader), first)


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "1", None])
def test_set_epoch_refuses(made, epoch):
    with pytest.raises(ValueError, match=r"epoch: expected an integer"):
        ShuffledActivations(small(made)).set_epoch(epoch)


def test_two_loaders_of_one_data_set_take_turns(made):
    """Two iterations at a time of one data set: two epochs, neither of them mixed."""
    cfg = small(made)
    data_set = ShuffledActivations(cfg)
    wanted = [list(ShuffledActivations(cfg)), None]
    other = ShuffledActivations(cfg)
    other.set_epoch(1)
    wanted[1] = list(other)
    pairs = list(zip(DataLoader(data_set, num_workers=2), DataLoader(data_set), strict=True))
    # Which of the two came first is not promised.
    got = sorted(([b[i] for b in pairs] for i in (0, 1)), key=contracts.digest)
    for a, b in zip(got, sorted(wanted, key=contracts.digest), strict=True):
        assert_same(a, b)


def test_the_ordered_epochs_are_the_same(made):
    _, cfg = case_of(made, "small buffer", OrderedConfig)
    data_set = make_data_set(cfg)
    first = list(data_set)
    assert_same(list(data_set), first)


# Seeds, and what the order must not depend on


def sequence(cfg, epoch=0):
    data_set = make_data_set(cfg)
    data_set.set_epoch(epoch)
    return torch.cat([b["example_idx"] * 100 + b["token_idx"] for b in data_set]).numpy()


def test_seeds_and_epochs_are_unrelated(make_shards):
    """Neighbours, too: a seed must not be the other's next epoch, nor agree with it at more places than chance has."""
    spec = Spec(n_examples=200, content_tokens=20, examples_per_shard=50, d_model=1)
    cfg = ShuffledConfig(shards=make_shards(spec), layer=3, batch_size=100, buffer_size=8)
    drawn = {
        (seed, epoch): sequence(dataclasses.replace(cfg, seed=seed), epoch)
        for seed in (17, 18, -17, 17 + 2**32, 17 << 8)
        for epoch in (0, 1, 2)
    }
    for (a, one), (b, other) in itertools.combinations(drawn.items(), 2):
        # One agreement is expected among 4,000 samples; more than ten come once in 10**8.
        assert (one == other).sum() <= 10, (a, b)
        # Of the 100 samples of a first batch 2.5 are expected in the other's.
        assert len(np.intersect1d(one[:100], other[:100])) <= 15, (a, b)
        # Neighbours in one order are no neighbours in the other: some 2 of 4,000 by chance.
        pairs = [set(zip(x[:-1].tolist(), x[1:].tolist(), strict=True)) for x in (one, other)]
        assert len(pairs[0] & pairs[1]) <= 40, (a, b)


def rng_states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_the_global_rngs_are_left_alone(made):
    before = rng_states()
    list(ShuffledActivations(small(made)))
    loader = ShuffledDataLoader(small(made), generator=torch.Generator())
    assert rng_states() == before
    list(loader)
    assert rng_states() == before


def test_the_global_rngs_decide_nothing(made):
    wanted = list(ShuffledActivations(small(made)))
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert_same(list(ShuffledActivations(small(made))), wanted)
    assert_same(list(DataLoader(ShuffledActivations(small(made)), num_workers=2)), wanted)


def test_the_place_on_disk_decides_nothing(made, tmp_path):
    elsewhere = factory.make_shards(tmp_path, Spec(n_examples=30)).rename(tmp_path / "another name")
    moved = small(made, shards=elsewhere)
    assert_same(list(ShuffledActivations(moved)), list(ShuffledActivations(small(made))))


@pytest.mark.parametrize(("hash_seed", "n_workers", "context"), [("0", 0, None), ("1", 2, "fork"), ("2", 1, "spawn")])
def test_a_new_process_draws_the_same_and_is_silent(made, hash_seed, n_workers, context):
    """Under `python -W error`, three epochs of both orders: the same everywhere, and nothing on stderr."""
    fields = {"tokens": "all", "layer": 3, "batch_size": 16, "buffer_size": 4}
    wanted = ""
    for kind in KINDS:
        data_set = make_data_set(kind(shards=made[None], **fields))
        wanted += f"{kind.__name__} {' '.join(contracts.digest(data_set) for _ in range(3))}\n"
    arguments = {"shards": str(made[None]), "workers": n_workers, "context": context, "fields": fields}
    # Starting such a worker takes seconds.
    arguments["persistent"] = context in ("spawn", "forkserver")
    done = subprocess.run(
        [sys.executable, "-W", "error", Path(contracts.__file__), json.dumps(arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        timeout=250,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (wanted, "", 0)
    digests = wanted.split()
    assert len(set(digests[1:4])) == 3
    assert len(set(digests[5:])) == 1
