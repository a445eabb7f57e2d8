"""A buffer that would be filled for one epoch only is not: the same batches, gathered with the memory of a few."""

import dataclasses
import itertools
import time
import weakref

import contracts
import numpy as np
import pytest
from conftest import wait_until
from factory import Spec
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from saev_torch import ShuffledActivations, ShuffledConfig
from saev_torch.errors import EndedError
from saev_torch.order.runs import expand_runs
from saev_torch.order.shuffle import ShuffledBatches, ShufflePlan
from saev_torch.order.steps import Share, count_open_slots
from saev_torch.processes.callers import ends_with_epoch
from saev_torch.reading import engine, scattered, slots
from saev_torch.reading import gather as gather_module
from saev_torch.reading.gather import Gather
from saev_torch.reading.regions import HUGE_PAGE, OwnRegion
from saev_torch.reading.slots import SlotPool

SPEC = Spec(n_examples=150, content_tokens=9, layers=(3, 7), examples_per_shard=40)


@pytest.fixture
def cfg(make_shards):
    return ShuffledConfig(shards=make_shards(SPEC), layer=3, batch_size=16, buffer_size=32, ignore_labels=[2])


class Found:
    """How many batches were found in memory, and how many were not, in this process and its workers."""

    def __init__(self, file):
        self._file = file
        file.touch()

    def note(self, is_found):
        with self._file.open("a") as file:
            file.write("01"[is_found])

    @property
    def counts(self):
        text = self._file.read_text()
        return text.count("1"), text.count("0")


@pytest.fixture
def found(tmp_path, monkeypatch):
    noted, real = Found(tmp_path / "found"), Gather.find

    def find(self, *args):
        rows = real(self, *args)
        noted.note(rows is not None)
        return rows

    monkeypatch.setattr(Gather, "find", find)
    return noted


def epochs(cfg, **options):
    """Three epochs of a plain loader, and one from the middle of the second."""
    data_set = ShuffledActivations(cfg)
    loader = DataLoader(data_set, **options)
    batches = [list(loader) for _ in range(3)]
    data_set.load_state_dict(data_set.state_dict(n_batches=len(batches[0]) // 2, epoch=1))
    return [*batches, list(loader)]


@pytest.fixture
def wanted(cfg):
    return epochs(cfg, num_workers=0)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("is_slow", [True, False])
def test_batches_are_those_of_a_buffer(cfg, wanted, found, monkeypatch, workers, is_slow):
    contracts.save_buffers(monkeypatch, is_slow)
    for got, right in zip(epochs(cfg, num_workers=workers), wanted, strict=True):
        contracts.assert_same(got, right)
    n_batches = sum(map(len, wanted))
    # Where memory comes fast, one more is found before the buffer is used.
    assert found.counts == (n_batches if is_slow else 4 * workers * (engine._N_TRIED + 1), 0)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize(("persistent", "in_order"), [(False, True), (True, False)])
def test_what_is_copied_here_never_needs_a_buffer(cfg, wanted, found, monkeypatch, workers, persistent, in_order):
    """That is faster than to read to a buffer, whoever asks, how fast memory comes, and how long an epoch is."""
    ends = SlotPool.is_new, contracts.activations.ends_with_epoch
    contracts.save_buffers(monkeypatch, is_slow=False, copies_here=True)
    monkeypatch.setattr(SlotPool, "is_new", ends[0])
    monkeypatch.setattr(contracts.activations, "ends_with_epoch", ends[1])
    monkeypatch.setattr(engine, "_WIDE_NBYTES", 1 << 40)
    monkeypatch.setattr(engine, "_MOST_BUFFERS", 0)
    monkeypatch.setattr(engine, "_MOST_IN_ORDER", 1000 * in_order)
    found_epochs = epochs(cfg, num_workers=workers, persistent_workers=persistent and workers > 0)
    for got, right in zip(found_epochs, wanted, strict=True):
        contracts.assert_same(got, right)
    assert found.counts == (sum(map(len, wanted)), 0)


@pytest.mark.parametrize("most_in_order", [0, 1000])
def test_few_threads_gather_neighbours_together(cfg, monkeypatch, most_in_order):
    contracts.save_buffers(monkeypatch, copies_here=True)
    monkeypatch.setattr(engine, "_MOST_IN_ORDER", most_in_order)
    orders, find = [], Gather.find
    monkeypatch.setattr(Gather, "find", lambda *args: (orders.append(args[-1]), find(*args))[1])
    batches = list(ShuffledActivations(cfg))
    assert [order is not None for order in orders] == [most_in_order > 0] * len(batches)


def test_neighbours_on_disk_follow_each_other():
    """The samples of each chunk are in the order of the stream, in which blocks of neighbours are whole."""
    plan = ShufflePlan(4096, 64, 16, 1, 8, 0, 0)
    chunks = [plan.chunk(0, number) for number in range(plan.n_batches)]
    position = np.empty(4096, dtype=np.int64)
    position[np.concatenate([expand_runs(chunk.starts, chunk.lengths) for chunk in chunks])] = np.arange(4096)
    batches = ShuffledBatches(plan, finds_order=True)
    for number in range(plan.n_batches):
        chunk = batches.whole(number)
        assert np.array_equal(chunk.starts, plan.locate(number)[chunk.rows])
        assert np.array_equal(np.sort(chunk.rows), np.arange(64))
        n_descents = (np.diff(position[chunk.starts]) < 0).sum()
        assert n_descents < plan.depth(0) < (np.diff(position[plan.locate(number)]) < 0).sum()


@pytest.mark.parametrize("n_before", [0, 1, 7, 40])
@pytest.mark.parametrize("copies_here", [False, True])
def test_what_is_not_in_memory_needs_a_buffer_from_then_on(cfg, wanted, found, monkeypatch, n_before, copies_here):
    contracts.save_buffers(monkeypatch, copies_here=copies_here)
    monkeypatch.setattr(gather_module, "is_in_memory", lambda address: found.counts[0] < n_before)
    contracts.assert_same(list(ShuffledActivations(cfg)), wanted[0])
    assert found.counts == (n_before, 1)


@pytest.mark.parametrize("copies_here", [False, True])
def test_a_disk_that_is_waited_for_needs_a_buffer(cfg, wanted, found, monkeypatch, copies_here):
    contracts.save_buffers(monkeypatch, copies_here=copies_here)
    read = Gather.read

    def reading(self, rows, reader):
        read(self, rows, reader)
        reader.pace.is_slow = found.counts[0] >= 3

    monkeypatch.setattr(Gather, "read", reading)
    contracts.assert_same(list(ShuffledActivations(cfg)), wanted[0])
    # A few may have been found before the third was read.
    assert 3 <= found.counts[0] < len(wanted[0]) // 2


@pytest.mark.parametrize("act_dtype", ["float32", "stored"])
@pytest.mark.parametrize("scale_norm", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_batch_that_a_buffer_begins_with_is_converted(make_shards, monkeypatch, dtype, act_dtype, scale_norm):
    """It was to be gathered, and converted on the way; then torch does that, and once."""
    shards = make_shards(dataclasses.replace(SPEC, dtype=dtype))
    cfg = ShuffledConfig(
        shards=shards, layer=3, batch_size=16, buffer_size=32, act_dtype=act_dtype, scale_norm=scale_norm
    )
    wanted = list(ShuffledActivations(cfg))
    contracts.save_buffers(monkeypatch)
    monkeypatch.setattr("saev_torch.reading.source.find_convert_kernels", lambda *names: None)
    monkeypatch.setattr(engine.Engine, "_wants_buffer", lambda self, n_saved: n_saved == 3)
    contracts.assert_same(list(ShuffledActivations(cfg)), wanted)


def test_the_first_batch_is_read_alone(cfg, monkeypatch):
    """Nothing keeps the cores from it; the others follow."""
    contracts.save_buffers(monkeypatch)
    n_open, open_one = [], engine.Batches.open_one

    def opening(self, *args):
        n_open.append((self.waits.nbytes, len(self.open)))
        open_one(self, *args)

    monkeypatch.setattr(engine.Batches, "open_one", opening)
    batches = iter(ShuffledActivations(cfg))
    time.sleep(0.3)
    next(batches)
    wait_until(lambda: len(n_open) >= 3)
    batches.close()
    assert [before > 0 for before, _ in n_open] == [False, *[True] * (len(n_open) - 1)]


def test_one_that_is_closed_begins_no_more_tasks(cfg, monkeypatch):
    """Also where they are run in the thread that works them out."""
    contracts.save_buffers(monkeypatch, copies_here=True)
    monkeypatch.setattr(engine, "count_own_cores", lambda: 1)
    monkeypatch.setattr(scattered, "_MAX_PART_NBYTES", 1)
    monkeypatch.setattr(scattered, "MAX_READ_ROWS", 1)
    n_read, read, iterator = [], Gather.read, []

    def reading(self, rows, reader):
        n_read.append(len(rows))
        if len(n_read) == 40:
            iterator[0].batches.stop()
        read(self, rows, reader)

    monkeypatch.setattr(Gather, "read", reading)
    start = engine.Engine.start
    monkeypatch.setattr(engine.Engine, "start", lambda self: (iterator.append(self), start(self))[1])
    batches = iter(ShuffledActivations(cfg))
    with pytest.raises(EndedError):
        list(batches)
    assert len(n_read) == 40


@pytest.mark.parametrize("kept", [False, True])
def test_few_batches_have_memory(cfg, monkeypatch, kept):
    if kept:
        contracts.copy_in_kernel(monkeypatch)
    else:
        contracts.save_buffers(monkeypatch)
    data_set = ShuffledActivations(cfg)
    batches = iter(data_set)
    next(batches)
    (pool,) = data_set.pools.values()
    wait_until(lambda: len(pool._slots) > (24 if kept else 3))
    time.sleep(0.2)
    # Those that are open, those on their way, and the one that the consumer has.
    assert kept or len(pool._slots) <= 3 + 2 + 1
    assert pool.in_haste is not kept
    assert sum(1 for _ in batches) == data_set.n_batches - 1
    assert kept or len(pool._slots) <= 3 + 2 + 1


def test_a_long_epoch_pays_for_its_buffer(cfg, wanted, found, monkeypatch):
    contracts.save_buffers(monkeypatch)
    monkeypatch.setattr(engine, "_MOST_BUFFERS", 1)
    contracts.assert_same(list(ShuffledActivations(cfg)), wanted[0])
    plan = ShuffledActivations(cfg)._plan(0)
    assert found.counts == (count_open_slots(plan, Share(0, 1, plan.n_batches), 32) + 1, 0)
    assert found.counts[0] < len(wanted[0])


def test_a_worker_that_iterates_again_has_its_buffer(cfg, wanted, found, monkeypatch):
    is_new = SlotPool.is_new
    contracts.save_buffers(monkeypatch)
    monkeypatch.setattr(SlotPool, "is_new", is_new)
    data_set = ShuffledActivations(cfg)
    for right in wanted[:2]:
        contracts.assert_same(list(data_set), right)
    assert found.counts == (len(wanted[0]), 0)


def test_a_buffer_that_is_to_be_filled_first_is(cfg, wanted, found, monkeypatch):
    contracts.save_buffers(monkeypatch)
    filled = dataclasses.replace(cfg, min_buffer_fill=1.0)
    contracts.assert_same(list(ShuffledActivations(filled)), wanted[0])
    assert found.counts == (0, 0)


@pytest.mark.parametrize(
    ("name", "copies_here"), [("_LARGE_NBYTES", False), ("_WIDE_NBYTES", False), ("_SMALL_NBYTES", True)]
)
def test_what_costs_little_has_its_buffer(cfg, wanted, found, monkeypatch, name, copies_here):
    before = getattr(engine, name)
    contracts.save_buffers(monkeypatch, copies_here=copies_here)
    monkeypatch.setattr(engine, name, before)
    contracts.assert_same(list(ShuffledActivations(cfg)), wanted[0])
    assert found.counts == (0, 0)


@pytest.mark.parametrize(("n_slots", "is_slow"), [(3, False), (1, True)])
def test_memory_is_slow_where_huge_pages_were(monkeypatch, n_slots, is_slow):
    pool = slots.SlotPool(HUGE_PAGE, shared=True)
    assert not pool.is_slow
    monkeypatch.setattr("saev_torch.reading.regions._are_fast", lambda *args: not is_slow)
    for _ in range(n_slots):
        pool.acquire(8)
    assert pool.is_slow == is_slow
    assert all(isinstance(region, OwnRegion) for region in pool._regions)


class Marker:
    """Something that an iteration holds."""


class Looking(IterableDataset):
    """Asks, and yields how many iterations before are not gone."""

    def __init__(self):
        self.markers = []

    def __iter__(self):
        n_before, marker = sum(ref() is not None for ref in self.markers), Marker()
        self.markers.append(weakref.ref(marker))
        ends_with_epoch()
        while True:
            yield n_before


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_who_asks_keeps_nothing(kind):
    loader = kind(Looking(), batch_size=None, num_workers=1, persistent_workers=True)
    assert [next(iter(loader)) for _ in range(3)] == [0, 0, 0]


class Asking(IterableDataset):
    """Asks in a worker."""

    def __iter__(self):
        yield ends_with_epoch()


@pytest.mark.parametrize(
    ("kind", "context", "persistent"),
    [
        *itertools.product([DataLoader, StatefulDataLoader], ["fork"], [False, True]),
        # Starting such a worker takes seconds.
        (DataLoader, "spawn", False),
        (StatefulDataLoader, "spawn", True),
    ],
)
def test_who_ends_with_the_epoch(kind, context, persistent):
    options = {"num_workers": 1, "persistent_workers": persistent, "multiprocessing_context": context}
    assert list(kind(Asking(), batch_size=None, **options)) == [not persistent]
    assert list(kind(Asking(), batch_size=None, num_workers=0)) == [False]
