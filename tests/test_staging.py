"""Reading past the page cache gives what reading through it gives. That it is chosen is tested here, too."""

import dataclasses
import errno
import os
from pathlib import Path

import contracts
import pytest
import uring
from conftest import Resources
from factory import Spec

from saev_torch import FormatError, OrderedConfig, ReadError, ShuffledConfig, compute_statistics
from saev_torch.bench.machine import cached_share, drop_cache
from saev_torch.order.selection import Selection
from saev_torch.processes import machine as limits
from saev_torch.reading import direct as staging
from saev_torch.reading.direct import DirectReader, fits_page_cache, reads_past_cache
from saev_torch.reading.reader import Spot
from saev_torch.reading.ring import Ring, RingReader
from saev_torch.reading.store import ShardStore

# Rows of 2.5 KB, so that nothing of a block is where a page begins, and shards that end within a page.
SPEC = Spec(n_examples=60, content_tokens=20, cls=True, layers=(3, 7), d_model=640, examples_per_shard=17, labels=True)
CONFIGS = {
    "shuffled": (ShuffledConfig, {"layer": 7, "batch_size": 64, "buffer_size": 8}),
    "labels": (ShuffledConfig, {"layer": 3, "batch_size": 50, "buffer_size": 4, "ignore_labels": [0, 2]}),
    "side by side": (ShuffledConfig, {"layer": (7, 3), "tokens": "all", "batch_size": 48, "n_lanes": 2}),
    "in order": (OrderedConfig, {"layer": "all", "tokens": "all", "batch_size": 100}),
}

pytestmark = uring.needed


@pytest.fixture
def staged(monkeypatch):
    """Let no data fit the page cache; the sizes of what went over stages of this process."""
    monkeypatch.setattr(staging, "fits_page_cache", lambda nbytes: False)
    sizes = []
    read = DirectReader._read

    def note(self, extents, start, stop):
        sizes.append(int(extents.nbytes[start:stop].sum()))
        read(self, extents, start, stop)

    monkeypatch.setattr(DirectReader, "_read", note)
    return sizes


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_batches(make_shards, staged, name, workers):
    kind, fields = CONFIGS[name]
    cfg = kind(shards=make_shards(SPEC), **fields)
    batches = list(contracts.make_ready(cfg, num_workers=workers))
    contracts.check_epoch(batches, SPEC, cfg)
    if not workers:
        assert sum(staged) >= sum(batch["act"].nbytes for batch in batches)


def test_a_stage_smaller_than_what_is_read(make_shards, staged, monkeypatch):
    """Several fillings of it, and extents that are too large for it."""
    cfg = ShuffledConfig(shards=make_shards(SPEC), layer=7, batch_size=64, buffer_size=8)
    reads = []
    read = RingReader._read
    monkeypatch.setattr(RingReader, "_read", lambda *args: (reads.append(args[2:]), read(*args)))
    filled, fill = [], DirectReader._fill_and_scatter
    monkeypatch.setattr(
        DirectReader, "_fill_and_scatter", lambda *args: (filled.append(int(args[4].sum())), fill(*args))
    )
    for nbytes, beside in ((4096, True), (100_000, False)):
        reads.clear()
        filled.clear()
        monkeypatch.setattr(staging, "_STAGE_NBYTES", nbytes)
        contracts.check_epoch(list(contracts.make_ready(cfg)), SPEC, cfg)
        assert bool(reads) == beside
        assert max(filled, default=0) <= nbytes
    assert len(staged) > 2


def _write_out(shards):
    for path in shards.glob("acts*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


@pytest.fixture
def cold(make_shards):
    """Shards that are not in the page cache, on a file system that can be read past it."""
    spec = Spec(n_examples=240, content_tokens=50, cls=False, layers=(7,), d_model=512, examples_per_shard=100)
    store = ShardStore(make_shards(spec))
    _write_out(store.shards_dir)
    with store.opened(0, direct=True) as direct:
        is_direct = _fails_unaligned(direct)
    store.close()
    drop_cache([store])
    if not is_direct or cached_share(store) > 0.1:
        pytest.skip("this file system cannot be read directly, or keeps its pages")
    return spec, store


def test_the_page_cache_is_left_alone(cold, staged):
    spec, store = cold
    cfg = ShuffledConfig(shards=store.shards_dir, layer=7, batch_size=256, buffer_size=16)
    contracts.check_epoch(list(contracts.make_ready(cfg)), spec, cfg)
    assert cached_share(store) < 0.1


def test_a_second_epoch_goes_through_the_page_cache(cold):
    spec, store = cold
    cfg = ShuffledConfig(shards=store.shards_dir, layer=7, batch_size=256, buffer_size=16)
    loader = contracts.make_ready(cfg, num_workers=2)
    for share in (0.0, 1.0, 1.0):
        contracts.check_epoch(list(loader), spec, cfg)
        assert cached_share(store) == pytest.approx(share, abs=0.1)


def test_what_is_measured_for_a_scale_is_read_once(cold):
    """An epoch is certain to follow, unlike after statistics that somebody asked for."""
    _, store = cold
    cfg = ShuffledConfig(shards=store.shards_dir, layer=7, batch_size=256, buffer_size=16)
    compute_statistics(cfg, cache=False)
    assert cached_share(store) < 0.1
    contracts.make_ready(dataclasses.replace(cfg, scale_norm=True))
    assert cached_share(store) > 0.9


def _fails_unaligned(fd):
    try:
        os.pread(fd, 10, 1)
    except OSError as err:
        return err.errno == errno.EINVAL
    return False


def test_what_fails_on_the_way_is_read_again(make_shards, staged, monkeypatch):
    """Of each call some reads fail, come short, or find the end of the file."""
    read, calls = Ring.read, []

    def fail(self, fds, vectors, firsts, counts, offsets):
        got = read(self, fds, vectors, firsts, counts, offsets)
        calls.append(len(got))
        got[len(calls) % 3 :: 7] = (-errno.EIO, 0, 100)[len(calls) % 3]
        return got

    monkeypatch.setattr(Ring, "read", fail)
    cfg = ShuffledConfig(shards=make_shards(SPEC), layer=7, batch_size=64, buffer_size=8)
    contracts.check_epoch(list(contracts.make_ready(cfg)), SPEC, cfg)
    assert sum(calls) > 50


def test_a_file_that_became_shorter(make_shards, staged):
    cfg = ShuffledConfig(shards=make_shards(SPEC), layer=7, batch_size=16, buffer_size=4)
    loader = contracts.make_ready(cfg)
    batches = iter(loader)
    next(batches)
    for path in cfg.shards.glob("acts*"):
        os.truncate(path, 0)
    # One that had not been opened yet is found to be no longer what it was.
    with pytest.raises((ReadError, FormatError), match=r"acts00000\d\.bin: expected \d+ bytes") as caught:
        list(batches)
    del batches, loader
    # Who keeps the error does not keep what the threads read with.
    assert caught.value.__traceback__ is not None
    assert not [name for name in Resources.now().held.values() if "io_uring" in name]


# What is read past the page cache


def _machine(monkeypatch, tmp_path, limit):
    group = tmp_path / "cgroup"
    group.mkdir()
    (group / "memory.max").write_text(limit)
    (group / "memory.current").write_text("3000000")
    (group / "memory.stat").write_text("anon 5\ninactive_file 900000\nactive_file 100000\n")
    monkeypatch.setattr(limits, "_groups", lambda controller: [group] if controller == "memory" else [])


@pytest.mark.parametrize(("limit", "room"), [("max", None), ("10000000", 8_000_000), ("1000000", 0)])
def test_data_fit_where_there_is_memory(monkeypatch, tmp_path, limit, room):
    _machine(monkeypatch, tmp_path, limit)
    if room is None:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (room,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
        assert fits_page_cache(room // 2)
        assert not fits_page_cache(room * 2)
    else:
        assert fits_page_cache(room)
        assert not fits_page_cache(room + 1)


def test_where_nothing_is_known_the_page_cache_is_used(monkeypatch):
    def fail():
        raise OSError(errno.ENOENT, "no such file")

    monkeypatch.setattr(staging, "memory", fail)
    assert fits_page_cache(1 << 60)


def test_data_that_are_cached_are_read_from_there(make_shards, monkeypatch):
    monkeypatch.setattr(DirectReader, "_read", lambda *args: pytest.fail("past the page cache"))
    for layer in (7, (3, 7), "all"):
        list(contracts.make_ready(ShuffledConfig(shards=make_shards(SPEC), layer=layer)))


def test_only_what_is_read_counts(cold, monkeypatch):
    """Its size, and whether it is cached; and an error is left to those who read."""
    spec, store = cold
    sizes = []
    monkeypatch.setattr(staging, "fits_page_cache", lambda nbytes: sizes.append(nbytes) or True)
    for tokens, layer in (("content", 7), ("all", (7,)), ("content", "all")):
        selection = Selection(store.metadata, tokens, layer)
        assert reads_past_cache(store, selection, True, Spot())
        assert not reads_past_cache(store, selection, False, Spot())
    assert set(sizes) == {spec.n_examples * 50 * 512 * 4}
    (store.shards_dir / "acts000001.bin").unlink()
    store.close()
    assert not reads_past_cache(store, selection, True, Spot())
    store.close()


def test_one_of_several_layers_is_cached(make_shards):
    spec = Spec(n_examples=60, content_tokens=32, cls=False, layers=(3, 7, 9), d_model=1024, examples_per_shard=20)
    store = ShardStore(make_shards(spec))
    _write_out(store.shards_dir)
    drop_cache([store])
    if cached_share(store) > 0.1:
        pytest.skip("this file system keeps its pages")
    selections = [Selection(store.metadata, "content", layer) for layer in spec.layers]
    size = 32 * 1024 * 4
    for path in sorted(store.shards_dir.glob("acts*")):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for example in range(20):
            os.pread(fd, size, (3 * example + 1) * size)
        os.close(fd)
    assert [reads_past_cache(store, selection, True, Spot()) for selection in selections] == [True, False, True]
    store.close()
