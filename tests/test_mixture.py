"""Mixtures: shares that are exact, the contract of every data set, one buffer, and what is refused."""

import collections
import dataclasses
import itertools
import json
import pickle
from fractions import Fraction

import contracts
import factory
import lightning_runs
import numpy as np
import plans
import pytest
import torch
from factory import Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import Trainee, make_trainer
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    Examples,
    FormatError,
    MixedActivations,
    SaevTorchError,
    ShardInfo,
    ShuffledActivations,
    ShuffledConfig,
    StateError,
)
from saev_torch.lightning import ActivationsCheckpoint
from saev_torch.order import steps
from saev_torch.order.mixture import MixedSource, MixturePlan, Weights
from saev_torch.order.steps import MixedBatches, Share, count_open_slots
from saev_torch.reading import engine, gather, mapping, slots, source
from saev_torch.reading.feeds import JointGather
from saev_torch.reading.gather import Gather
from saev_torch.reading.reader import Spot
from saev_torch.reading.scattered import ScatteredRows
from saev_torch.reading.store import ShardStore

pytestmark = [
    pytest.mark.filterwarnings(contracts.MANY_WORKERS),
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in lightning_runs.WARNINGS),
]

# Several layers and labels; neither, in 16 bits; small and in a uniform order.
SPECS = [
    Spec(n_examples=60, content_tokens=7, layers=(3, 7), examples_per_shard=9),
    Spec(n_examples=21, content_tokens=5, layers=(7,), examples_per_shard=4, labels=False, dtype="bfloat16", cls=False),
    Spec(n_examples=13, content_tokens=6, layers=(0, 7), examples_per_shard=5),
]
FIELDS = [
    {"layer": "all", "buffer_size": 8, "n_threads": 2},
    {"layer": 7, "buffer_size": 6, "n_lanes": 3, "n_threads": 2},
    {"layer": 7, "order": "uniform", "tokens": "all", "n_threads": 2},
]
# Shares that are no whole numbers of rows.
WEIGHTS = [5, 2, 1]
ENDS = ["shortest", "longest"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    dirs = [factory.make_shards(root / str(i), spec) for i, spec in enumerate(SPECS)]
    return [ShuffledConfig(shards=path, **fields) for path, fields in zip(dirs, FIELDS, strict=True)]


def mix(configs, until="longest", weights=WEIGHTS, batch_size=18, **options):
    return MixedActivations(list(zip(configs, weights, strict=True)), batch_size, until, **options)


@pytest.fixture(scope="module")
def whole(configs):
    """Two epochs of each kind."""
    made = {until: mix(configs, until) for until in ENDS}
    return {until: [list(mixed), list(mixed)] for until, mixed in made.items()}


@pytest.fixture(params=["buffer", "gathered"])
def way(request, monkeypatch):
    """A buffer, which so small ones have; or none, as where all rows are in the page cache."""
    if request.param == "gathered":
        contracts.save_buffers(monkeypatch, copies_here=True)


# Shares


@pytest.mark.parametrize(
    "weights", [[3, 1], [1, 2], [1, 1, 1], [10, 1], [0.7, 0.3], [1 / 3, 2 / 3], [0.1, 0.2, 0.7], [1, 1000], [7]]
)
@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000])
def test_shares_are_exact_over_1000_batches(weights, batch_size):
    shared, part = Weights.of([Fraction(weight) for weight in weights]), np.array(weights) / sum(weights)
    counts = shared.counts(np.arange(1001) * batch_size)
    assert (counts.sum(axis=0) == np.arange(1001) * batch_size).all()
    assert (np.diff(counts) >= 0).all()
    # At any time to within one row; in a batch to within two.
    assert np.abs(counts - part[:, None] * counts.sum(axis=0)).max() < 1
    assert np.abs(np.diff(counts) - part[:, None] * batch_size).max() < 2
    if all(part * batch_size % 1 == 0):
        assert (np.diff(counts) == part[:, None] * batch_size).all()
    for batch in (0, 1, 500, 999):
        rows = shared.pattern(batch * batch_size, batch_size)
        assert sorted(np.concatenate(rows).tolist()) == list(range(batch_size))
        assert [len(x) for x in rows] == np.diff(counts)[:, batch].tolist()
    for i in range(len(weights)):
        assert shared.count(i, 1000 * batch_size) == counts[i, 1000]
        row = shared.row(i, int(counts[i, 500]))
        assert (shared.count(i, row), shared.count(i, row + 1)) == (counts[i, 500], counts[i, 500] + 1)


def test_huge_numbers_of_rows_do_not_overflow():
    shared = Weights.of([Fraction(0.123456789), Fraction(1), Fraction(3e-9)])
    rows = np.array([10**15, 10**15 + 1])
    for i in range(3):
        assert shared.counts(rows)[i].tolist() == [shared.count(i, n) for n in rows.tolist()]


def test_rows_of_the_sources_take_turns(configs):
    """Any part of a batch is mixed as the whole."""
    batch = next(iter(mix(configs[1:], weights=[3, 1], batch_size=16)))
    assert batch["source"].tolist() == [0, 0, 1, 0] * 4


# The contract


@pytest.mark.parametrize("until", ENDS)
@settings(deadline=None, max_examples=12)
@given(st.data())
def test_any_plan_keeps_the_contract(until, data):
    """All readers together make the sequence; of each source whole epochs and a part; `find` is the first place."""
    plan = data.draw(plans.mixture_plans(until))
    plans.check_readers(plan, data.draw(plans.shares(plan)))
    located = [plan.locate(batch) for batch in range(plan.n_batches)]
    order = np.concatenate(located)
    assert len(order) == plan.n_samples
    passed = []
    for one, first in zip(plan.sources, plan.first_samples, strict=True):
        mine = order[(order >= first) & (order < first + one.n_samples)]
        n_epochs = len(mine) // one.n_samples
        passed.append((n_epochs, len(mine) % one.n_samples))
        for epoch in range(n_epochs + 1):
            part = mine[epoch * one.n_samples : (epoch + 1) * one.n_samples]
            assert len(np.unique(part)) == len(part)
    assert (1, 0) in passed
    assert all(each >= (1, 0) if until == "longest" else each <= (1, 0) for each in passed)
    batch = data.draw(st.integers(0, plan.n_batches - 1))
    sample = int(located[batch][0])
    found = plan.find(sample)
    assert found <= (batch, 0)
    assert located[found[0]][found[1]] == sample


def test_a_pass_that_another_reader_has_is_not_waited_for():
    """Its own next rows are read when they are due: else a batch was open that nothing was said of."""
    sizes = {"n_rows": 1, "order": "blocks", "max_lanes": 1, "wished_block_size": None, "seed": 0}
    small = MixedSource(n_samples=1, buffer_size=1, **sizes)
    sources = (small, small, MixedSource(n_samples=2, buffer_size=8, **sizes))
    plan = MixturePlan(32, 1, Weights(((0, 10, 21), (1, 10, 11), (2, 1, 1))), sources, 0)
    plans.check_readers(plan, [Share(first, 2, 32) for first in range(2)])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("until", ENDS)
def test_every_sample(configs, whole, until, drop_last):
    mixed = mix([dataclasses.replace(cfg, drop_last=drop_last) for cfg in configs], until)
    for epoch in range(2):
        batches = list(mixed)
        assert len(batches) == len(mixed) == mixed.n_batches
        contracts.check_mixture(batches, SPECS, mixed)
        contracts.assert_same(batches, whole[until][epoch][: len(batches)])
    assert mixed.n_samples % mixed.batch_size
    assert len(batches) == len(whole[until][1]) - drop_last
    assert (whole[until][0][0]["example_idx"] != batches[0]["example_idx"]).any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("until", "n_workers", "persistent", "batch_size"),
    [
        ("longest", 1, False, 1),
        ("longest", 2, True, None),
        ("shortest", 2, False, None),
        ("longest", 3, False, 1),
        ("shortest", 3, True, None),
        ("shortest", 8, True, 1),
    ],
)
def test_the_same_with_workers(configs, whole, until, n_workers, persistent, batch_size):
    loader = DataLoader(mix(configs, until), batch_size, num_workers=n_workers, persistent_workers=persistent)
    for epoch in whole[until]:
        contracts.assert_same(list(loader), epoch)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_take_turns(configs, whole, world_size):
    for (until, epochs), n_workers in zip(whole.items(), (2, 0), strict=True):
        wanted = (epochs[0] + epochs[0])[: -(-len(epochs[0]) // world_size) * world_size]
        for rank in range(world_size):
            mixed = mix(configs, until, rank=rank, world_size=world_size)
            got = list(DataLoader(mixed, num_workers=n_workers))
            assert len(got) == len(mixed)
            contracts.assert_same(got, wanted[rank::world_size])


@pytest.mark.usefixtures("way")
@pytest.mark.slow
@pytest.mark.parametrize("until", ENDS)
def test_every_cut_resumes(configs, whole, until):
    batches, mixed, digest = whole[until][0], mix(configs, until), mix(configs, until)
    list(digest)
    for cut, taken in enumerate(itertools.islice(mixed, len(batches))):
        state = json.loads(json.dumps(mixed.state_dict()))
        other = mix(configs, until)
        other.load_state_dict(state)
        wanted = batches[cut + 1 :] or whole[until][1]
        # All of the rest at some cuts, with workers or without; at every cut what comes next.
        n_batches, n_workers = (None, cut // 16 % 2) if cut % 16 == 5 else (2, 0)
        rest = list(itertools.islice(DataLoader(other, num_workers=n_workers), n_batches))
        contracts.assert_same(rest, wanted[:n_batches])
        assert taken["source"].tolist() == batches[cut]["source"].tolist()
        if n_batches is None and not n_workers:
            assert other.digest == digest.digest


def test_what_a_batch_holds_is_known_before(configs, whole):
    mixed, places = mix(configs), collections.defaultdict(list)
    for number, batch in enumerate(whole["longest"][0]):
        for key, column in mixed.locate(number, epoch=0).items():
            assert torch.equal(column, batch[key]), key
        keys = ("source", "example_idx", "token_idx", "layer")
        for row, sample in enumerate(zip(*(batch[key].tolist() for key in keys), strict=True)):
            places[sample].append((number, row))
    for i, example, token, layer in list(places)[::50]:
        assert mixed.find(example, token, layer, epoch=0, source=i) == places[i, example, token, layer][0]
    with pytest.raises(IndexError, match="source 3 is out of range"):
        mixed.find(0, 0, source=3)
    short, seen = mix(configs, "shortest"), whole["shortest"][0]
    left = {(e, t) for e in range(60) for t in range(7)} - {
        (e, t) for b in seen for s, e, t in zip(*(b[k].tolist() for k in keys[:3]), strict=True) if s == 0
    }
    with pytest.raises(IndexError, match="does not come in epoch 0"):
        short.find(*min(left), layer=3, epoch=0)


def test_it_travels_and_follows_the_epoch(configs, whole):
    mixed = pickle.loads(pickle.dumps(mix(configs)))
    mixed.set_epoch(1)
    contracts.assert_same(list(mixed), whole["longest"][1])
    assert repr(mixed).startswith(f"<MixedActivations of 5/8 {configs[0].shards}, 1/4 {configs[1].shards}, 1/8 ")


def test_sources_of_one_directory_are_not_in_step(configs):
    """Two layers of one directory, which have the same seed, come in orders of their own; another seed, another one."""
    cfg = dataclasses.replace(configs[0], layer=3)
    pair = [(cfg, 1), (dataclasses.replace(cfg, layer=7), 1)]
    first, other = (torch.cat([b["example_idx"] for b in MixedActivations(pair, 20, seed=seed)]) for seed in (17, 18))
    assert (first[::2] == first[1::2]).float().mean() < 0.1
    assert (first == other).float().mean() < 0.1


# What is particular to each source


@pytest.mark.usefixtures("way")
def test_each_source_has_a_scale_of_its_own(configs, whole):
    scaled = [dataclasses.replace(cfg, scale_norm=i != 1) for i, cfg in enumerate(configs)]
    mixed = mix(scaled)
    scales = [one.scale for one in mixed.sources]
    assert scales == [one and ShuffledActivations(dataclasses.replace(cfg, batch_size=9)).scale
                      for one, cfg in zip((True, None, True), scaled, strict=True)]  # fmt: skip
    by = torch.tensor([scale or 1.0 for scale in scales])
    for n_workers in (0, 2):
        mixed.set_epoch(0)
        for got, plain in zip(DataLoader(mixed, num_workers=n_workers), whole["longest"][0], strict=True):
            assert torch.equal(got["act"], plain["act"] * by[plain["source"]][:, None])
    # What training began with counts.
    state = mixed.state_dict(n_batches=0, epoch=0)
    state["sources"][2]["scale"] *= 2
    mixed.load_state_dict(state)
    assert [one.scale for one in mixed.sources] == [scales[0], None, 2 * scales[2]]
    batch = next(iter(DataLoader(mixed, num_workers=1)))
    plain = whole["longest"][0][0]
    by[2] *= 2
    assert torch.equal(batch["act"], plain["act"] * by[plain["source"]][:, None])


@pytest.mark.usefixtures("way")
def test_each_source_has_token_ids_of_its_own(make_shards):
    """As labels, -1 for special tokens, and where a source has none; batches have all columns that there are."""
    configs, ids = [], []
    for i, (spec, fields) in enumerate(zip(SPECS, FIELDS, strict=True)):
        path, shape = make_shards(spec), (spec.n_examples, spec.content_tokens)
        ids.append(np.full(shape, -1) if i == 1 else 1000 * (i + 1) + np.arange(np.prod(shape)).reshape(shape))
        if i != 1:
            (path / "token_ids.bin").write_bytes(ids[i].astype("<i4").tobytes())
        configs.append(ShuffledConfig(shards=path, **fields))
    mixed = mix(configs)
    for n_workers in (0, 1):
        for batch in DataLoader(mixed, num_workers=n_workers):
            assert batch.keys() == {"act", "token_labels", "token_ids", "layer", "source", "example_idx", "token_idx"}
            places = zip(*(batch[key].tolist() for key in ("source", "example_idx", "token_idx")), strict=True)
            expected = [-1 if token < 0 else ids[source][example, token] for source, example, token in places]
            assert batch["token_ids"].tolist() == expected


@pytest.mark.usefixtures("way")
def test_the_same_without_a_compiler(configs, monkeypatch):
    scaled = [dataclasses.replace(cfg, scale_norm=i != 1) for i, cfg in enumerate(configs)]
    wanted = list(mix(scaled))
    monkeypatch.setattr(source, "find_convert_kernels", lambda *names: None)
    contracts.assert_same(list(mix(scaled)), wanted)


def test_past_the_page_cache(configs, whole, monkeypatch):
    """Of sources that memory can hold alone, but not together."""
    monkeypatch.setattr("saev_torch.reading.feeds.fits_page_cache", lambda nbytes: False)
    contracts.assert_same(list(mix(configs)), whole["longest"][0])


@pytest.fixture
def found(monkeypatch):
    """How many batches were found in memory, and of how many parts rows were read otherwise."""
    contracts.save_buffers(monkeypatch, copies_here=True)
    counts, find, read = {"found": 0, "not found": 0, "read": 0}, JointGather.find, ScatteredRows.read

    def finding(*args):
        rows = find(*args)
        counts["not found" if rows is None else "found"] += 1
        return rows

    def reading(*args):
        counts["read"] += 1
        read(*args)

    monkeypatch.setattr(JointGather, "find", finding)
    monkeypatch.setattr(ScatteredRows, "read", reading)
    return counts


@pytest.mark.parametrize("until", ENDS)
@pytest.mark.parametrize("most_in_order", [0, 1000])
def test_rows_of_all_sources_are_gathered_where_they_are_in_memory(
    configs, whole, found, until, monkeypatch, most_in_order
):
    monkeypatch.setattr(engine, "_MOST_IN_ORDER", most_in_order)
    mixed = mix(configs, until)
    for epoch in whole[until]:
        contracts.assert_same(list(mixed), epoch)
    assert found == {"found": 2 * len(mixed), "not found": 0, "read": 0}


@pytest.mark.parametrize("n_before", [0, 1, 7, 20])
@pytest.mark.parametrize("gone", range(3))
def test_rows_of_one_source_that_are_not_need_a_buffer_from_then_on(configs, whole, found, monkeypatch, gone, n_before):
    mixed, real = mix(configs), gather.is_in_memory
    own = str(configs[gone].shards)

    def is_in_memory(address):
        is_own = any(
            pages.address <= address < pages.address + pages.key[2] and own in _path_of(pages.address)
            for pages in mapping.all_pages
        )
        return real(address) and (found["found"] < n_before or not is_own)

    monkeypatch.setattr(gather, "is_in_memory", is_in_memory)
    contracts.assert_same(list(mixed), whole["longest"][0])
    # Not every batch has rows of each.
    assert found["found"] >= n_before
    assert found["not found"] == 1
    assert found["read"] == 0


def _path_of(address):
    with open("/proc/self/maps") as lines:
        return next(line for line in lines if line.startswith(f"{address:x}-"))


def test_more_files_than_may_be_open_are_read_to_a_buffer(configs, whole, found, monkeypatch):
    """Each source has few enough, all together have not: one batch would hold the files of all."""
    monkeypatch.setattr(ShardStore, "most_open", 15)
    n_shards = [ShardInfo.load(cfg.shards) for cfg in configs]
    assert max(map(len, n_shards)) <= 15 < sum(map(len, n_shards))
    contracts.assert_same(list(mix(configs)), whole["longest"][0])
    assert found == {"found": 0, "not found": 0, "read": 0}


def test_a_pass_is_worked_out_once_however_many_sources_there_are(monkeypatch):
    sources = tuple(MixedSource(300, 10, "blocks", 4, 1, None, seed) for seed in range(20))
    plan, made = MixturePlan(6000, 200, Weights.of([Fraction(1)] * 20), sources, 0), []
    with monkeypatch.context() as patch:
        real = steps.make_pass
        patch.setattr(steps, "make_pass", lambda *args: (made.append(args[1:]), real(*args))[1])
        batches = MixedBatches(plan, True)
        chunks = [batches.whole(number) for number in range(plan.n_batches)]
    assert sorted(made) == [(source, 0) for source in range(20)]
    for number, chunk in enumerate(chunks):
        assert np.array_equal(chunk.starts, plan.locate(number)[chunk.rows])
        assert np.array_equal(np.sort(chunk.rows), np.arange(plan.size(number)))


@pytest.mark.parametrize("has_numba", [False, True])
def test_what_came_short_is_read_and_converted_once(configs, found, monkeypatch, has_numba):
    scaled = [dataclasses.replace(cfg, scale_norm=i != 1) for i, cfg in enumerate(configs)]
    wanted = list(mix(scaled))
    found["read"] = 0
    if not has_numba:
        monkeypatch.setattr(source, "find_convert_kernels", lambda *names: None)
    real = Gather._gather
    monkeypatch.setattr(Gather, "_gather", lambda self, rows, most: min(real(self, rows, most), len(rows) // 2))
    contracts.assert_same(list(mix(scaled)), wanted)
    # Of the first batch at least; then a buffer may be thought better.
    assert found["read"] >= len(configs)


# Memory


def test_there_is_one_buffer(configs, monkeypatch):
    cfgs = [dataclasses.replace(cfg, buffer_size=16, order="blocks", n_lanes=8) for cfg in configs]
    mixed, made = mix(cfgs, weights=[1, 1, 1]), []
    plan = mixed._plan(0)
    n_slots = count_open_slots(plan, Share(0, 1, plan.n_batches), 16)
    alone = ShuffledActivations(dataclasses.replace(cfgs[0], batch_size=6))._plan(0)
    assert n_slots == count_open_slots(alone, Share(0, 1, alone.n_batches), 16) == 18
    make = slots.Slot.__init__
    monkeypatch.setattr(slots.Slot, "__init__", lambda *args, **kwargs: (made.append(1), make(*args, **kwargs))[0])
    assert sum(1 for _ in mixed) == mixed.n_batches > 40
    # The batches that are on their way to the consumer come to it.
    assert len(made) <= n_slots + 6


def test_nothing_is_read_of_a_source_before_its_first_row_is_due():
    sources = (MixedSource(1, 1, "blocks", 1, 1, None, 0),) * 4
    plan = MixturePlan(4, 1, Weights(((0, 1, 4), (1, 1, 3), (2, 1, 2), (3, 1, 1))), sources, 0)
    assert plans.carry_out(plan, Share(0, 1, 4))[2] == 1


# What is refused


def test_states_of_other_mixtures_are_refused(configs, tmp_path):
    state = json.loads(json.dumps(mix(configs).state_dict()))
    assert len(json.dumps(state)) < 4 * 1024
    a, b, c = configs
    mask = np.ones((60, 7), dtype=bool)
    mask[3] = False
    np.save(tmp_path / "mask.npy", mask)
    for cfgs, options, named in (
        (configs, {"weights": [5, 2, 2]}, r"weights: expected \['5/9', '2/9', '2/9'\], got \['5/8', '1/4', '1/8'\]"),
        (configs, {"until": "shortest"}, "until: expected 'shortest', got 'longest'"),
        (configs, {"batch_size": 36}, "batch_size: expected 36, got 18"),
        (configs, {"seed": 18}, "seed: expected 18, got 17"),
        ([a, b, dataclasses.replace(c, seed=3)], {}, r"sources\[2\].seed: expected 3, got 17"),
        ([b, a, c], {"weights": [5, 2, 1]}, r"sources\[0\].data: .*sources\[1\].data: "),
        ([a, b], {"weights": [5, 2]}, "weights: "),
        ([dataclasses.replace(a, examples=Examples.span(0, 59)), b, c], {}, r"sources\[0\].n_samples: .*\.examples: "),
        ([dataclasses.replace(a, mask=tmp_path / "mask.npy"), b, c], {}, r"sources\[0\].*mask: expected '\w+', got No"),
        ([dataclasses.replace(a, scale_norm=True), b, c], {}, "scale: expected a number"),
    ):
        with pytest.raises(StateError, match=named):
            mix(cfgs, **options).load_state_dict(state)
    alone = ShuffledActivations(b)
    with pytest.raises(StateError, match=r"expected the keys \['weights', 'until', 'sources'\]"):
        mix(configs).load_state_dict(alone.state_dict())
    with pytest.raises(StateError, match=r"expected the keys .*'data'"):
        alone.load_state_dict(state)
    # Weights of the same ratio are the same.
    mix(configs, weights=[2.5, 1, 0.5]).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": None}, "sources: expected a list of 3, got None"),
        ({"sources": [1, 2, 3]}, r"sources\[0\]: expected a dict, got 1"),
        ({"sources": [{}, {}, {}]}, "expected the keys"),
        ({"batch": 10**9}, "batch: expected at most"),
        ({"digest": "?"}, "digest: expected 16 hex digits"),
        ({"version": 2}, "use a newer saev_torch"),
    ],
)
def test_damaged_states_are_refused(configs, change, message):
    mixed = mix(configs)
    with pytest.raises(StateError, match=message):
        mixed.load_state_dict({**mixed.state_dict(), **change})


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ([1, 0, 1], {}, r"sources\[1\]: expected a finite weight above 0, got 0"),
        ([1, float("nan"), 1], {}, r"sources\[1\]: expected a finite weight"),
        ([1, True, 1], {}, r"sources\[1\]: expected a finite weight"),
        ([1, "3", 1], {}, r"sources\[1\]: expected a finite weight"),
        ([1, 1, 1e-12], {}, r"sources\[2\]: expected a weight that is not below a billionth"),
        ([1, 1, 1], {"until": "end"}, "until: expected 'shortest' or 'longest', got 'end'"),
        ([1, 1, 1], {"batch_size": 0}, "batch_size: expected an integer from 1"),
        ([1, 1, 1], {"seed": 1.5}, "seed: expected an integer, got 1.5"),
        ([1, 1, 1], {"rank": 2, "world_size": 2}, "rank"),
    ],
)
def test_bad_values_are_refused(configs, weights, options, message):
    with pytest.raises(ConfigError, match=message):
        mix(configs, **{"weights": weights, **options})


@pytest.mark.parametrize("sources", [[], None, "ab", 3, [1], [("a", 1)], [(None, 1, 2)]])
def test_what_are_no_sources_is_refused(sources):
    with pytest.raises(ConfigError, match=r"MixedActivations\.sources.*: expected .*ShuffledConfig, weight"):
        MixedActivations(sources, 8)


def test_sources_must_be_alike(configs, make_shards):
    a, b, _ = configs
    wide = ShuffledConfig(shards=make_shards(SPECS[0], d_model=16), layer=7)
    for other, message in (
        (wide, r"sources\[1\]: expected d_model 8 as of sources\[0\] .*, got 16 "),
        (dataclasses.replace(b, act_dtype="stored"), "expected activations of type float32 .* got bfloat16"),
        (dataclasses.replace(a, layer=(3, 7)), r"expected samples of shape \(8,\) .* got \(2, 8\)"),
        (dataclasses.replace(b, drop_last=True), r"sources\[1\].drop_last: expected False"),
    ):
        with pytest.raises(ConfigError, match=message):
            MixedActivations([(a, 1), (other, 1)], 8)


@pytest.mark.slow
def test_errors_name_the_directory(configs, make_shards):
    broken = make_shards(SPECS[2])
    mixed = MixedActivations([(configs[0], 1), (dataclasses.replace(configs[2], shards=broken), 1)], 8)
    for path in broken.glob("acts*.bin"):
        with open(path, "r+b") as file:
            file.truncate(10)
    for n_workers in (0, 1):
        with pytest.raises(FormatError, match=str(broken)) as caught:
            list(DataLoader(mixed, num_workers=n_workers))
        assert isinstance(caught.value, SaevTorchError)


def test_what_hangs_is_called_by_its_name(configs, monkeypatch):
    """Which file a thread was reading, be it before the first step, or a sidecar."""
    feed, spot, named = mix(configs)._open_feed(None, None), Spot(), []

    def note(store, selection, is_only, own):
        for idx in (0, store.metadata.n_shards - 1, -1):
            own.set(lambda idx=idx: (idx, 0))
            named.append(feed.store.path(spot.where()[0]) == store.path(idx))
        return False

    monkeypatch.setattr("saev_torch.reading.feeds.reads_past_cache", note)
    feed.choose(True, spot)
    assert named == [True] * 9


# Lightning


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [0, 2])
def test_lightning_resumes_within_an_epoch(configs, whole, tmp_path, n_workers):
    epochs = [[batch.digest for batch in epoch] for epoch in whole["shortest"]]
    n_first = len(epochs[0])

    def fit(model, callbacks=(), resume=None):
        mixed = mix(configs, "shortest")
        loader = DataLoader(mixed, num_workers=n_workers, persistent_workers=n_workers > 0)
        trainer = make_trainer((ActivationsCheckpoint(mixed), *callbacks), checkpoints=bool(callbacks), max_epochs=2)
        trainer.fit(model, loader, ckpt_path=resume)
        loader._iterator = None

    seen, rest = Model(), Model()
    fit(seen, (ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=n_first + 4),))
    assert [digest for _, _, digest in seen.seen] == epochs[0] + epochs[1]
    (path,) = tmp_path.iterdir()
    fit(rest, resume=path)
    assert [digest for _, _, digest in rest.seen] == epochs[1][4:]


class Model(Trainee):
    """One whose weights fit these activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
