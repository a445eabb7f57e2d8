import ctypes
import errno
import os

import factory
import numpy as np
import pytest
import uring
from contracts import selections
from factory import Spec, oracle, oracle_labels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saev_torch import (
    IndexedConfig,
    IndexedDataset,
    OrderedConfig,
    ReadError,
    ShuffledActivations,
    ShuffledConfig,
    compute_statistics,
    repack,
    verify,
)
from saev_torch.order.selection import Selection
from saev_torch.reading import reader as reading
from saev_torch.reading import ring as ring_module
from saev_torch.reading import store as store_module
from saev_torch.reading.extents import make_extents, make_sample_extents
from saev_torch.reading.labels import Labels
from saev_torch.reading.reader import CallReader
from saev_torch.reading.ring import Ring, RingReader
from saev_torch.reading.store import ShardStore

# Rows of 4 bytes: thousands to a shard. Rows of 8 KB: a gap of three is too large to read over.
NARROW = Spec(n_examples=250, content_tokens=20, layers=(1, 2), d_model=1, examples_per_shard=100)
WIDE = Spec(n_examples=5, content_tokens=7, layers=(0, 4, 11), d_model=2048, examples_per_shard=3)
SPECS = {"narrow": NARROW, "wide": WIDE}

RING: Ring | None = None

SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
many = settings(deadline=None, max_examples=60, suppress_health_check=SLOW)


@pytest.fixture(params=[False, True], ids=["calls", "ring"], autouse=True)
def ring(request, monkeypatch):
    """Every test with single system calls, and with a ring of them, however few reads there are."""
    monkeypatch.setattr(ring_module, "_MIN_ON_RING", 1)
    global RING
    if request.param and uring.refusal() is not None:
        pytest.skip(uring.refusal())
    RING = Ring.open() if request.param else None
    assert not request.param or RING is not None, "the kernel gives rings here"
    yield
    RING = None


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    return {name: factory.make_shards(tmp_path_factory.mktemp(name), spec) for name, spec in SPECS.items()}


@pytest.fixture
def stores(dirs):
    stores = {name: ShardStore(path) for name, path in dirs.items()}
    yield stores
    for store in stores.values():
        store.close()


def flat_rows(spec):
    """Every row of every shard: shard numbers, rows in the shard, values."""
    acts = oracle(spec).reshape(-1, spec.d_model)
    per_shard = spec.examples_per_shard * len(spec.layers) * spec.tokens_per_example
    return *np.divmod(np.arange(len(acts)), per_shard), acts


def make_reader(store):
    return CallReader(store) if RING is None else RingReader(RING, store)


def read(store, shards, rows, row_nbytes, task_nbytes=1 << 30):
    """Read rows to places in another order, far enough apart to see what is written between them."""
    n = len(rows)
    width = row_nbytes // 4
    memory = np.full((n, width + 1), np.nan, dtype="<f4")
    order = np.random.default_rng(0).permutation(n)
    places = memory.ctypes.data + order * memory.strides[0]
    extents = make_extents(shards, rows, places, row_nbytes)
    notes, reader = [], make_reader(store)
    set_spot = reader.spot.set
    reader.spot.set = lambda where, *args: (notes.append(where()), set_spot(where, *args))
    for start, stop in extents.cut(task_nbytes):
        reader.read(extents, start, stop)
    assert reader.spot.where is None
    assert np.isnan(memory[:, width]).all(), "written beside the place"
    return memory[order, :width], extents, notes


def pick(data, n, most):
    """Some of n rows: runs with gaps of all sizes, in rising order or not."""
    chosen = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=most)), dtype=np.int64)
    runs = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(1, 2500), st.integers(1, 5)), max_size=3))
    for start, length, step in runs:
        chosen = np.concatenate([chosen, np.arange(start, min(n, start + length), step)])
    return np.sort(chosen) if data.draw(st.booleans()) else chosen


@pytest.mark.parametrize("name", SPECS)
@many
@given(data=st.data())
def test_any_rows_to_any_places(stores, name, data):
    """Repeated rows, rows in any order, small gaps and large ones, more than the 1,024 that one call can read."""
    shards, rows, acts = flat_rows(SPECS[name])
    chosen = pick(data, len(rows), 30)
    row_nbytes = SPECS[name].d_model * 4
    got, extents, _ = read(stores[name], shards[chosen], rows[chosen], row_nbytes, data.draw(st.integers(1, 100_000)))
    assert got.tobytes() == acts[chosen].tobytes()
    assert sum(extents.counts) == len(extents.vectors)
    assert (extents.nbytes == extents.counts * row_nbytes).all()


def test_neighbours_are_read_at_once(stores):
    shards, rows, acts = flat_rows(NARROW)
    got, extents, notes = read(stores["narrow"], shards[:1000], rows[:1000], 4)
    assert (extents.counts.tolist(), set(notes)) == ([1000], {(0, 0)})
    assert got.tobytes() == acts[:1000].tobytes()


def test_small_gaps_are_read_over_and_large_ones_are_not(stores):
    row_nbytes = WIDE.d_model * 4
    zeros = np.zeros(3, dtype=np.int64)
    # Up to 16 KB are cheaper to read than another call: two rows of 8 KB.
    _, extents, _ = read(stores["wide"], zeros, np.array([0, 3, 6]), row_nbytes)
    assert extents.counts.tolist() == [7]
    _, extents, _ = read(stores["wide"], zeros, np.array([0, 4, 8]), row_nbytes)
    assert extents.counts.tolist() == [1, 1, 1]


def test_one_call_reads_no_more_than_the_kernel_takes(stores):
    shards, rows, acts = flat_rows(NARROW)
    chosen = np.flatnonzero(shards == 1)
    got, extents, _ = read(stores["narrow"], shards[chosen], rows[chosen], 4)
    assert max(extents.counts) == 1024 == os.sysconf("SC_IOV_MAX")
    assert got.tobytes() == acts[chosen].tobytes()
    # A gap where one call ends and the next begins.
    chosen = np.concatenate([chosen[:1020], chosen[1030:3000]])
    got, _, _ = read(stores["narrow"], shards[chosen], rows[chosen], 4)
    assert got.tobytes() == acts[chosen].tobytes()


def test_one_call_reads_no_more_than_two_megabytes():
    extents = make_extents(*(np.arange(1000) * x for x in (0, 1, 8192)), 8192)
    assert max(extents.nbytes) == 2 << 20
    # A row may be larger than that all the same.
    extents = make_extents(*(np.arange(3) * x for x in (0, 1, 1)), 3 << 20)
    assert extents.nbytes.tolist() == [3 << 20] * 3


def test_shards_are_not_joined(stores):
    shards, rows, acts = flat_rows(NARROW)
    edge = int(np.flatnonzero(shards == 1)[0])
    around = np.arange(edge - 3, edge + 3)
    got, extents, notes = read(stores["narrow"], shards[around], rows[around], 4)
    assert extents.counts.tolist() == [3, 3]
    assert [shard for shard, _ in notes[:2]] == [0, 1]
    assert got.tobytes() == acts[around].tobytes()


def test_no_rows(stores):
    empty = np.zeros(0, dtype=np.int64)
    got, extents, notes = read(stores["narrow"], empty, empty, 4)
    assert (len(got), extents.counts.tolist(), notes, extents.cut(10)) == (0, [], [], [])


@many
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_cut(counts, task_nbytes):
    rows = np.concatenate([np.arange(n) for n in counts] or [np.zeros(0, dtype=np.int64)])
    shards = np.repeat(np.arange(len(counts)), counts)
    extents = make_extents(shards, rows, rows, 4)
    assert (extents.nbytes // 4).tolist() == counts
    cuts = extents.cut(task_nbytes)
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(len(counts)))
    # Full tasks: each reaches the next multiple of the size, or is the last.
    for start, stop in cuts:
        assert sum(extents.nbytes[start : stop - 1]) < task_nbytes


@many
@given(st.sampled_from(list(SPECS)), st.data())
def test_samples(stores, name, data):
    spec = SPECS[name]
    selection = Selection(stores[name].metadata, **data.draw(selections(spec)))
    samples = pick(data, selection.n_samples, 20)
    samples = np.sort(samples)
    cells = selection.cells(samples)
    memory = np.full((len(samples), selection.n_parts, spec.d_model), np.nan, dtype="<f4")
    places = memory.ctypes.data + np.arange(len(samples)) * selection.n_parts * spec.d_model * 4
    for extents in make_sample_extents(selection, cells, places):
        reader = make_reader(stores[name])
        reader.announce(extents, 0, len(extents.counts))
        reader.read(extents, 0, len(extents.counts))
    example, layer, token = selection.split(cells)
    for part, idx in enumerate(selection.layer_idxs[: selection.n_parts]):
        wanted = oracle(spec)[example, layer if selection.layer_is_all else idx, token]
        assert memory[:, part].tobytes() == wanted.tobytes()
    labels = Labels(stores[name]).of_cells(selection, cells)
    wanted = oracle_labels(spec)[example, (token - spec.cls_token).clip(0)]
    assert labels.tolist() == np.where(token < spec.cls_token, 0, wanted).tolist()


# When reading goes wrong


def spoil_ring(monkeypatch, result):
    """Let reads on a ring return something else, and leave in memory no more than that says."""
    real = Ring.read

    def read(self, fds, vectors, firsts, counts, offsets):
        got = real(self, fds, vectors, firsts, counts, offsets)
        for i, n in enumerate(got.tolist()):
            got[i] = left = result(n)
            for address, nbytes in vectors[firsts[i] : firsts[i] + counts[i]].tolist():
                kept = min(max(left, 0), nbytes)
                ctypes.memset(address + kept, 0xFF, nbytes - kept)
                left -= kept
        return got

    monkeypatch.setattr(Ring, "read", read)


def rows_of_one_shard(store, spec, shard):
    shards, rows, acts = flat_rows(spec)
    chosen = np.flatnonzero(shards == shard)
    return lambda: read(store, shards[chosen], rows[chosen], spec.d_model * 4)[0].tobytes() == acts[chosen].tobytes()


@pytest.mark.parametrize("nbytes", [1, 3, 4, 7, 100_000])
def test_short_reads_are_finished(stores, monkeypatch, nbytes):
    """A call may read less than was asked for: in the middle of a row, between rows, or all."""
    real = reading._preadv

    def preadv(fd, address, count, offset):
        vectors = np.ctypeslib.as_array((ctypes.c_int64 * (2 * count)).from_address(address)).reshape(-1, 2).copy()
        # What fits into nbytes.
        ends = np.cumsum(vectors[:, 1])
        vectors[:, 1] -= np.clip(ends - nbytes, 0, vectors[:, 1])
        return real(fd, vectors.ctypes.data, count, offset)

    monkeypatch.setattr(reading, "_preadv", preadv)
    spoil_ring(monkeypatch, lambda n: min(n, nbytes))
    shards, rows, acts = flat_rows(NARROW)
    got, _, _ = read(stores["narrow"], shards[:300], rows[:300], 4)
    assert got.tobytes() == acts[:300].tobytes()
    if nbytes > 100:
        assert rows_of_one_shard(stores["wide"], WIDE, 1)()


@pytest.mark.parametrize("lost", [1, 4, 5000])
def test_a_shard_that_became_shorter(make_shards, lost):
    """While it was open: whoever copied over it must be told which file, and where."""
    store = ShardStore(make_shards(NARROW))
    assert rows_of_one_shard(store, NARROW, 0)()
    path = store.path(0)
    nbytes = path.stat().st_size - lost
    os.truncate(path, nbytes)
    message = r"acts000000\.bin: expected \d+ bytes at offset \d+, got \d+: the file became shorter"
    with pytest.raises(ReadError, match=message) as caught:
        rows_of_one_shard(store, NARROW, 0)()
    words = str(caught.value).split()
    offset, got = (int(words[words.index(before) + 1].rstrip(",:")) for before in ("offset", "got"))
    assert offset + got == nbytes
    store.close()


def failing(monkeypatch, codes):
    """Let reads fail with these errors, one after the other, before they succeed."""
    # An iterator, because several threads may read: each error is for one of them.
    real, left, slept = reading._preadv, iter(codes), []

    def preadv(*args):
        code = next(left, 0)
        if code:
            ctypes.set_errno(code)
            return -1
        return real(*args)

    monkeypatch.setattr(reading, "_preadv", preadv)
    monkeypatch.setattr(store_module.time, "sleep", slept.append)
    spoil_ring(monkeypatch, lambda n: -next(left, 0) or n)
    return slept


def test_errors_that_pass_are_tried_again(stores, monkeypatch, caplog):
    slept = failing(monkeypatch, [errno.EIO, errno.ESTALE, errno.EIO])
    assert rows_of_one_shard(stores["wide"], WIDE, 0)()
    assert slept == sorted(slept)
    assert all("acts000000.bin" in record.message for record in caplog.records)
    assert len(caplog.records) == len(slept) > 0


ALL_WHO_READ = {
    "shuffled": lambda shards, root: list(ShuffledActivations(ShuffledConfig(shards=shards, layer=0, batch_size=16))),
    "indexed": lambda shards, root: IndexedDataset(IndexedConfig(shards=shards, layer=0)).__getitems__(range(30)),
    "statistics": lambda shards, root: compute_statistics(OrderedConfig(shards=shards, layer=0), cache=False),
    "verify": lambda shards, root: verify(shards, finite=True),
    "repack": lambda shards, root: repack(shards, root, layers=[11, 0]),
}


@pytest.mark.parametrize("name", ALL_WHO_READ)
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_all_who_read_try_again(dirs, tmp_path, monkeypatch, caplog, name, code):
    if RING is None:
        monkeypatch.setattr(Ring, "open", lambda: None)
    wanted = ALL_WHO_READ[name](dirs["wide"], tmp_path / "wanted")
    slept = failing(monkeypatch, [code, code])
    got = ALL_WHO_READ[name](dirs["wide"], tmp_path / "got")
    assert len(slept) == 2
    assert "trying again" in caplog.text
    if name == "repack":
        assert {p.name: p.read_bytes() for p in got.iterdir()} == {p.name: p.read_bytes() for p in wanted.iterdir()}
    elif name == "shuffled":
        assert [b["act"].numpy().tobytes() for b in got] == [b["act"].numpy().tobytes() for b in wanted]
    elif name == "indexed":
        assert got[3]["act"].tolist() == wanted[3]["act"].tolist()
    elif name == "statistics":
        assert got.total.mean.tolist() == wanted.total.mean.tolist()
    else:
        assert got == wanted
        assert got.ok


def test_interrupted_reads_go_on_at_once(stores, monkeypatch, caplog):
    slept = failing(monkeypatch, [errno.EINTR] * 50)
    assert rows_of_one_shard(stores["wide"], WIDE, 0)()
    assert (slept, caplog.records) == ([], [])


@pytest.mark.parametrize(("code", "n_tries"), [(errno.EIO, 5), (errno.EBADF, 1)])
def test_errors_that_stay(stores, monkeypatch, code, n_tries):
    failing(monkeypatch, [code] * 1000)
    message = rf"reading \d+ bytes at offset 0 failed after {n_tries} tries: {os.strerror(code)}"
    with pytest.raises(ReadError, match=rf"acts000000\.bin: {message}"):
        rows_of_one_shard(stores["wide"], WIDE, 0)()


def test_shards_by_the_hundred_on_one_ring(make_shards):
    """More files than are held open for one call, and more reads than one call takes."""
    spec = Spec(n_examples=150, content_tokens=20, layers=(1,), d_model=1024, examples_per_shard=2, labels=False)
    store = ShardStore(make_shards(spec))
    shards, rows, acts = flat_rows(spec)
    chosen = np.arange(0, len(rows), 7)
    got, extents, _ = read(store, shards[chosen], rows[chosen], 4096)
    assert got.tobytes() == acts[chosen].tobytes()
    assert len(extents.counts) > 64
    chosen = np.random.default_rng(0).permutation(len(rows))
    got, extents, _ = read(store, shards[chosen], rows[chosen], 4096)
    assert got.tobytes() == acts[chosen].tobytes()
    assert len(extents.counts) > 1024
    store.close()
