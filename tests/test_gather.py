"""Rows that are gathered from mapped files: the same as ever, whatever happens to the files; what is not, and why."""

import contextlib
import gc
import os
import re
import resource
from pathlib import Path

import contracts
import numpy as np
import pytest
import torch
from factory import Spec, oracle
from torch.utils.data import DataLoader

from saev_torch import IndexedConfig, IndexedDataset, ReadError, ShuffledActivations, ShuffledConfig
from saev_torch.order.selection import Selection
from saev_torch.reading import columns
from saev_torch.reading import gather as gather_module
from saev_torch.reading.gather import Gather
from saev_torch.reading.labels import Labels
from saev_torch.reading.mapping import all_pages
from saev_torch.reading.reader import Pace, Spot
from saev_torch.reading.scattered import ScatteredRows
from saev_torch.reading.source import Source
from saev_torch.reading.store import ShardStore

SPEC = Spec(n_examples=60, content_tokens=7, layers=(3, 7), examples_per_shard=9)
WIDE = Spec(n_examples=12, content_tokens=50, cls=False, layers=(0,), d_model=256, examples_per_shard=6, labels=False)


@pytest.fixture(params=["here", "kernel"])
def copied_by(request, monkeypatch):
    """Machine code copies, and where none can be made, the kernel."""
    if request.param == "kernel":
        contracts.copy_in_kernel(monkeypatch)
    else:
        contracts.copy_here()
    return request.param


@pytest.fixture
def counted(monkeypatch, copied_by):
    """Rows that were gathered, and rows that were read otherwise."""
    counts = {"gathered": 0, "read": 0}
    real_gather, real_read = Gather._gather, ScatteredRows.read

    def gathering(self, rows, most_waits):
        n = real_gather(self, rows, most_waits)
        counts["gathered"] += n
        return n

    def reading(self, reader):
        counts["read"] += len(self)
        real_read(self, reader)

    monkeypatch.setattr(Gather, "_gather", gathering)
    monkeypatch.setattr(ScatteredRows, "read", reading)
    return counts


def uniform(shards, **fields):
    return ShuffledConfig(**{"shards": shards, "layer": 3, "batch_size": 64, "order": "uniform", **fields})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tokens": "special"},
        {"tokens": "all", "layer": "all"},
        {"layer": (7, 3)},
        {"ignore_labels": [2]},
        {"act_dtype": "stored", "layer": (7, 3), "tokens": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_small", [True, False])
def test_every_selection(make_shards, monkeypatch, counted, dtype, fields, is_small):
    """Rows stand in no order on disk; neither do labels, which are read one by one where they are not kept."""
    if not is_small:
        monkeypatch.setattr(columns, "_MAX_KEPT_NBYTES", 0)
    spec = Spec(**{**SPEC.__dict__, "dtype": dtype})
    cfg = uniform(make_shards(spec), **fields)
    data_set = ShuffledActivations(cfg)
    contracts.check_epoch(list(data_set), spec, cfg)
    n_parts = 2 if isinstance(cfg.layer, tuple) else 1
    assert counted == {"gathered": data_set.n_samples * n_parts, "read": 0}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("act_dtype", ["float32", "stored"])
def test_what_is_multiplied_is_what_a_ring_reads(make_shards, monkeypatch, counted, dtype, act_dtype):
    """A stage that has room for a few rows only, so that it is used again and again."""
    shards = make_shards(Spec(**{**WIDE.__dict__, "dtype": dtype}))
    monkeypatch.setattr(gather_module, "_STAGE_NBYTES", 5000)
    cfg = uniform(shards, layer=0, scale_norm=True, act_dtype=act_dtype)
    gathered = list(ShuffledActivations(cfg))
    assert counted == {"gathered": 600, "read": 0}
    monkeypatch.setattr(Gather, "open", lambda source: None)
    contracts.assert_same(gathered, list(ShuffledActivations(cfg)))
    assert counted["gathered"] == 600


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("act_dtype", ["float32", "stored"])
@pytest.mark.parametrize("scale_norm", [False, True])
@pytest.mark.parametrize("n_read", [0, 37])
def test_without_a_compiler(make_shards, monkeypatch, counted, dtype, act_dtype, scale_norm, n_read):
    """torch converts what was copied; what came short, and was read, too, and nothing twice."""
    monkeypatch.setattr("saev_torch.reading.source.find_convert_kernels", lambda *args: None)
    shards = make_shards(Spec(**{**WIDE.__dict__, "dtype": dtype}))
    cfg = uniform(shards, layer=0, scale_norm=scale_norm, act_dtype=act_dtype, batch_size=100)
    first, second = ShuffledActivations(cfg), ShuffledActivations(cfg)
    gather = Gather._gather
    monkeypatch.setattr(Gather, "_gather", lambda self, rows, most: min(gather(self, rows, most), 100 - n_read))
    batches = list(first)
    # A reader that was slow reads more.
    assert counted["gathered"] > 0
    assert counted["read"] >= 6 * n_read
    assert n_read or counted == {"gathered": 600, "read": 0}
    with monkeypatch.context() as patch:
        patch.setattr(Gather, "open", lambda source: None)
        contracts.assert_same(batches, list(second))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale_norm", [False, True])
@pytest.mark.parametrize("has_numba", [False, True])
def test_random_access_is_converted_once(make_shards, monkeypatch, counted, dtype, scale_norm, has_numba):
    if not has_numba:
        monkeypatch.setattr("saev_torch.reading.source.find_convert_kernels", lambda *args: None)
    shards = make_shards(Spec(**{**WIDE.__dict__, "dtype": dtype, "n_examples": 24}))
    data_set = ShuffledActivations(uniform(shards, layer=0, batch_size=1200, scale_norm=scale_norm))
    wanted = next(iter(data_set))["act"]
    indexed, scale = IndexedDataset(IndexedConfig(shards=shards, layer=0)), data_set.cursor.scale
    counted["gathered"] = 0
    order = data_set.locate(0)
    numbers = (order["example_idx"] * 50 + order["token_idx"]).tolist()
    for found in (indexed.__getitems__(numbers), indexed.__getitems__(numbers[:700])):
        act = torch.stack([sample["act"] for sample in found])
        assert torch.equal(act if scale is None else act * scale, wanted[: len(act)])
    assert counted == {"gathered": 1900, "read": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_random_access_in_batches(make_shards, counted, workers):
    spec = Spec(**{**WIDE.__dict__, "n_examples": 40})
    data_set = IndexedDataset(IndexedConfig(shards=make_shards(spec), layer=0))
    numbers = np.random.default_rng(0).integers(0, len(data_set), (3, 700))
    wanted = oracle(spec)[:, 0].reshape(-1, 256)
    for i, batch in enumerate(DataLoader(data_set, batch_sampler=numbers, num_workers=workers)):
        assert np.array_equal(batch["act"].numpy(), wanted[numbers[i]])
    if not workers:
        assert counted == {"gathered": 2100, "read": 0}


def open_rows(shards, n=400, pace=None, order=None):
    """A gather, rows of all shards, and the memory that they go to."""
    store = ShardStore(shards)
    source, selection = Source(store), Selection(store.metadata, "content", 0)
    memory = np.full((n, 256), -1, dtype=np.float32)
    samples = np.random.default_rng(1).permutation(selection.n_samples)[:n]
    gather = Gather.open(source)
    cells = selection.cells(samples)
    found = gather.find(selection, cells if order is None else cells[order], Spot(), order)
    rows = None if found is None else found[0][1].at(memory.ctypes.data)
    return gather, rows, source.open_reader(pace), memory, oracle(WIDE)[:, 0].reshape(-1, 256)[samples], store


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("copied_by", ["here"], indirect=True)
def test_rows_that_are_copied_in_another_order(make_shards, monkeypatch, counted, is_lost):
    """In parts; and where others took the signal since they were found, so that nothing may be copied here."""
    order = np.random.default_rng(2).permutation(400)
    gather, rows, reader, memory, wanted, store = open_rows(make_shards(WIDE), order=order)
    assert rows.numbers.tolist() == order.tolist()
    monkeypatch.setattr(Gather, "is_fast", not is_lost)
    for part in (rows.part(0, 150), rows.part(150, 400)):
        gather.read(part, reader)
    assert np.array_equal(memory, wanted)
    assert counted == ({"gathered": 0, "read": 400} if is_lost else {"gathered": 400, "read": 0})
    store.close()


@pytest.mark.parametrize("left", [0, 1, 3])
@pytest.mark.parametrize("copied_by", ["kernel"], indirect=True)
def test_a_call_that_comes_short_is_finished_otherwise(make_shards, monkeypatch, counted, left):
    gather, rows, reader, memory, wanted, store = open_rows(make_shards(WIDE))
    real = gather_module._copy_in_kernel
    monkeypatch.setattr(gather_module, "_copy_in_kernel", lambda *args: real(*args) // 100 * left)
    gather.read(rows, reader)
    assert np.array_equal(memory, wanted)
    assert counted["read"] == 400 - counted["gathered"] > 0
    store.close()


@pytest.mark.parametrize("rows_left", [0, 10, 149.5, 299], ids=str)
def test_a_file_that_becomes_shorter_is_an_error(make_shards, copied_by, rows_left):
    """Never SIGBUS; and no zeros, which are what a mapping holds between the end of a file and that of its page."""
    shards = make_shards(WIDE)
    gather, rows, reader, _memory, _, store = open_rows(shards)
    os.truncate(shards / "acts000001.bin", int(rows_left * 1024))
    with pytest.raises(
        ReadError, match=r"acts000001.bin: expected .* bytes .* the file became shorter while it was in"
    ):
        gather.read(rows, reader)
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_says_that_a_file_became_shorter(make_shards, copied_by, workers):
    spec = Spec(**{**WIDE.__dict__, "n_examples": 60, "examples_per_shard": 20})
    shards = make_shards(spec)
    cfg = uniform(shards, layer=0, batch_size=100)
    batches = iter(DataLoader(ShuffledActivations(cfg), batch_size=None, num_workers=workers))
    next(batches)
    os.truncate(shards / "acts000001.bin", 5000)
    with pytest.raises(ReadError, match="the file became shorter while it was in use"):
        list(batches)
    del batches


def test_a_file_that_is_replaced_is_the_one_that_was_checked(make_shards):
    """As with any reader: until the epoch ends what was open is read; then the other one is refused."""
    shards = make_shards(WIDE)
    gather, rows, reader, memory, wanted, store = open_rows(shards)
    other = shards / "other"
    other.write_bytes(bytes((shards / "acts000001.bin").stat().st_size))
    os.replace(other, shards / "acts000001.bin")
    gather.read(rows, reader)
    assert np.array_equal(memory, wanted)
    store.close()


def test_a_disk_is_asked_by_a_ring(make_shards, monkeypatch, counted):
    pace = Pace(1)
    gather, rows, reader, memory, wanted, store = open_rows(make_shards(WIDE), pace=pace)
    waits = iter(range(0, 10_000, 1000))
    monkeypatch.setattr(gather_module, "_n_waits", lambda: next(waits))
    gather.read(rows.part(0, 100), reader)
    assert pace.is_slow
    assert counted == {"gathered": 100, "read": 0}
    # Before a read that is fast lets it gather again.
    gather.read(rows.part(100, 400), reader)
    assert counted == {"gathered": 100, "read": 300}
    assert np.array_equal(memory, wanted)
    store.close()


def test_a_part_of_which_a_disk_is_waited_for_is_left_to_a_ring(make_shards, monkeypatch, counted):
    """Else nothing would be seen to finish for as long as it takes."""
    gather, rows, reader, memory, wanted, store = open_rows(make_shards(WIDE))
    waits = iter([0, 3, 6, 7, 8, 9])
    monkeypatch.setattr(gather_module, "_n_waits", lambda: next(waits))
    monkeypatch.setattr(gather_module, "MAX_READ_ROWS", 50)
    monkeypatch.setattr(gather_module, "_PIECE_NBYTES", 50 << 10)
    gather.read(rows, reader)
    assert counted == {"gathered": 150, "read": 250}
    assert np.array_equal(memory, wanted)
    store.close()


def test_rows_that_are_not_in_memory_are_left_to_a_ring(make_shards, monkeypatch, counted):
    shards = make_shards(WIDE)
    monkeypatch.setattr(gather_module, "is_in_memory", lambda address: False)
    cfg = uniform(shards, layer=0)
    contracts.check_epoch(list(ShuffledActivations(cfg)), WIDE, cfg)
    assert counted == {"gathered": 0, "read": 0}


def test_each_layer_is_looked_for_in_the_page_cache(make_shards, monkeypatch):
    store = ShardStore(make_shards(SPEC))
    selection = Selection(store.metadata, "content", (3, 7))
    gather, cells = Gather.open(Source(store)), selection.cells(np.arange(64))
    ((_, rows),) = gather.find(selection, cells, Spot())
    # Those of the layers take turns.
    for layer in range(2):
        gone = set(rows.sources[layer::2].tolist())
        monkeypatch.setattr(gather_module, "is_in_memory", lambda address, gone=gone: address not in gone)
        assert gather.find(selection, cells, Spot()) is None
    store.close()


def test_labels_of_an_example_are_read_once_in_whatever_order_its_samples_come(make_shards):
    store = ShardStore(make_shards(SPEC))
    labels, asked = Labels(store), []

    def read(examples):
        asked.extend(examples.tolist())
        return labels.of_examples(examples)

    selection = Selection(store.metadata, "content", 3, [2], read)
    in_order, samples = selection.cells(np.arange(selection.n_samples)), np.random.default_rng(0).permutation(200)
    asked.clear()
    assert np.array_equal(selection.cells(samples), in_order[samples])
    assert len(asked) == len(set(asked)) > 0
    store.close()


def test_what_the_page_cache_does_not_hold(make_shards):
    """The real question, asked of the real page cache."""
    shards = make_shards(WIDE)
    for file in shards.glob("acts*.bin"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    gather, rows, _, _, _, store = open_rows(shards)
    assert rows is None
    for file in shards.glob("acts*.bin"):
        file.read_bytes()
    selection = Selection(store.metadata, "content", 0)
    assert gather.find(selection, np.arange(400), Spot()) is not None
    store.close()


@pytest.mark.parametrize("why", ["forbidden", "address space", "many shards", "short answers"])
def test_where_it_cannot_be(make_shards, monkeypatch, counted, why):
    shards = make_shards(WIDE)
    if why == "forbidden":
        monkeypatch.setattr(gather_module, "_can_gather", lambda: False)
    elif why == "address space":
        monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 40, 1 << 40))
    elif why == "many shards":
        monkeypatch.setattr(ShardStore, "most_open", 1)
    else:
        monkeypatch.setattr("saev_torch.reading.store._file_system", lambda fd: 0x01021997)
    cfg = uniform(shards, layer=0)
    contracts.check_epoch(list(ShuffledActivations(cfg)), WIDE, cfg)
    assert counted == {"gathered": 0, "read": 0}


def mapped(shards):
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(shards) in line]


def opened(shards):
    links = (link for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return sum(str(link.readlink()).startswith(str(shards)) for link in links)


def test_mappings_last_as_long_as_the_data_set_and_files_as_an_epoch(make_shards):
    shards = make_shards(WIDE)
    cfg = uniform(shards, layer=0)
    data_set, n_fds, places = ShuffledActivations(cfg), len(os.listdir("/proc/self/fd")), []
    for _ in range(3):
        batches = iter(data_set)
        next(batches)
        with contextlib.closing(batches):
            pass
        assert len(os.listdir("/proc/self/fd")) == n_fds
        places.append(mapped(shards))
    assert 0 < len(places[0]) <= 3
    assert places == places[:1] * 3
    del batches, data_set
    gc.collect()
    assert mapped(shards) == []


def test_a_file_that_was_replaced_is_mapped_anew(make_shards):
    shards = make_shards(WIDE)
    first = ShardStore(shards)
    before = first.mapped(0)
    assert first.clone().mapped(0).address == before.address
    (shards / "copy").write_bytes((shards / "acts000000.bin").read_bytes())
    (shards / "copy").replace(shards / "acts000000.bin")
    third = first.clone()
    third.identities = None
    assert third.mapped(0).address != before.address
    assert before.is_whole


def test_many_stores_do_not_keep_all_of_their_files_open(make_shards):
    """Each mapping holds a descriptor, of which a process has few: ten data sets of a hundred shards had too many."""
    shards = make_shards(SPEC)
    stores = [ShardStore(shards) for _ in range(6)]
    for store in stores:
        store._limit = 7
        assert all(store.mapped(number) is not None for number in range(7))
        assert opened(shards) <= 14
    for store in stores:
        store.close()
    del stores, store
    assert mapped(shards) == []


def test_many_stores_do_not_keep_all_of_their_files_mapped(make_shards, monkeypatch):
    """A process may have so many mappings; 260 data sets of 250 files left none to memory."""
    gc.collect()
    shards = make_shards(SPEC)
    monkeypatch.setattr("saev_torch.reading.store._MAX_MAPPED", len(all_pages) + 14)
    stores = [ShardStore(shards) for _ in range(6)]
    for store in stores:
        assert all(store.mapped(number) is not None for number in range(7))
        store.close()
        assert len(mapped(shards)) <= 14
    # Those of the last one are not let go of.
    assert len(store._pages) == 7


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"layer": "all", "tokens": "all"}, {"layer": (7, 3)}, {"act_dtype": "stored"}])
def test_single_samples_are_those_of_a_batch(make_shards, dtype, fields):
    spec = Spec(**{**SPEC.__dict__, "dtype": dtype})
    data_set = IndexedDataset(IndexedConfig(**{"shards": make_shards(spec), "layer": 7, **fields}))
    for i in [*range(0, len(data_set), 5), len(data_set) - 1]:
        (wanted,) = data_set.__getitems__([i])
        for number in (i, np.int32(i)):
            found = data_set[number]
            assert list(found) == list(wanted)
            assert torch.equal(found.pop("act"), wanted["act"])
            assert found == {key: value for key, value in wanted.items() if key != "act"}
            assert all(type(value) is int for value in found.values())
    # Memory of its own.
    kept = data_set[0]["act"]
    kept.zero_()
    assert data_set[0]["act"].any()


def test_a_single_sample_of_a_file_that_became_shorter(make_shards):
    shards = make_shards(WIDE)
    data_set = IndexedDataset(IndexedConfig(shards=shards, layer=0))
    wanted = data_set[599]["act"]
    os.truncate(shards / "acts000001.bin", 299 * 1024 + 1000)
    assert not torch.equal(data_set[598]["act"], wanted)
    with pytest.raises(ReadError, match=re.escape("acts000001.bin: expected 1024 bytes at offset 306176, got 1000")):
        data_set[599]
