import os
import pickle
import threading

import numpy as np
import pytest
from conftest import Resources
from factory import Spec, oracle_labels

from saev_torch import ConfigError, FormatError, ReadError, ShardsNotFoundError
from saev_torch.reading import columns
from saev_torch.reading.labels import Labels
from saev_torch.reading.store import ShardStore

SPEC = Spec(n_examples=30, examples_per_shard=2)  # 15 shards, and one without examples


@pytest.fixture
def store(make_shards):
    store = ShardStore(make_shards(SPEC))
    yield store
    store.close()


def open_shards():
    targets = [name for (kind, _), name in Resources.now().held.items() if kind == "file descriptor"]
    return sorted(os.path.basename(target.split(" (")[0]) for target in targets if ".bin" in target)


def test_what_it_knows(store, make_shards):
    assert store.metadata.n_examples == 30
    assert [shard.n_examples for shard in store.shards] == [2] * 15 + [0]
    assert store.has_labels
    assert store.path(3) == store.shards_dir / "acts000003.bin"
    assert not ShardStore(make_shards(labels=False)).has_labels
    assert open_shards() == []


def test_descriptors_are_kept_and_closed(store):
    for i in (0, 1, 0):
        with store.opened(i) as fd:
            assert os.fstat(fd).st_ino == store.path(i).stat().st_ino
    assert open_shards() == ["acts000000.bin", "acts000001.bin"]
    store.close()
    assert open_shards() == []
    # Usable after that, as by the next epoch.
    with store.opened(2) as fd:
        assert os.pread(fd, 4, 0)


def test_nothing_stays_open_without_the_store(make_shards):
    store = ShardStore(make_shards(SPEC))
    with store.opened(2):
        assert open_shards() == ["acts000002.bin"]
    del store
    assert open_shards() == []


def test_descriptors_are_few(store):
    store._limit = 4
    for i in range(15):
        with store.opened(i):
            assert len(open_shards()) <= 5
    assert open_shards() == [f"acts{i:06}.bin" for i in range(11, 15)]


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_more_threads_than_descriptors(store, limit):
    """What is in use is never closed, also where that takes more descriptors than are kept otherwise."""
    store._limit = limit
    together, errors = threading.Barrier(12), []

    def read(i):
        try:
            with store.opened(i) as fd:
                together.wait(60)
                assert os.fstat(fd).st_ino == store.path(i).stat().st_ino
                together.wait(60)
        except BaseException as err:  # noqa: BLE001 -- checked below, in the main thread
            errors.append(err)
            together.abort()

    threads = [threading.Thread(target=read, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with store.opened(14):
        assert len(open_shards()) <= max(limit, 1) + 1
    store.close()
    assert open_shards() == []


def test_one_shard_in_many_threads(store):
    def read():
        for i in np.random.default_rng(0).integers(0, 15, 300).tolist():
            with store.opened(i) as fd:
                assert len(os.pread(fd, 4, 0)) == 4

    store._limit = 3
    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(open_shards()) <= 3
    store.close()


def test_closing_waits_for_readers(store):
    with store.opened(0) as fd, store.opened(0) as same:
        assert fd == same
        store.close()
        assert os.pread(fd, 4, 0)
        assert open_shards() == ["acts000000.bin"]
    assert open_shards() == []


def test_an_exception_inside_gives_the_shard_back(store):
    with pytest.raises(KeyError), store.opened(0):
        raise KeyError
    store.close()
    assert open_shards() == []


def test_it_pickles_small_and_without_descriptors(store):
    with store.opened(0):
        data = pickle.dumps(store)
        copy = pickle.loads(data)
        clone = store.clone()
    assert len(data) < 4000
    store.close()
    for other in (copy, clone):
        with other.opened(1) as fd:
            assert os.pread(fd, 4, 0)
        assert other.metadata == store.metadata
        assert open_shards() == ["acts000001.bin"]
        other.close()


def test_a_failed_open_leaves_nothing(store):
    os.unlink(store.path(3))
    for _ in range(3):
        with pytest.raises(ShardsNotFoundError, match=r"acts000003\.bin"), store.opened(3):
            pass
    assert open_shards() == []


def test_a_shard_is_checked_again_when_it_is_opened(store):
    os.truncate(store.path(0), store.path(0).stat().st_size - 1)
    os.unlink(store.path(1))
    os.mkdir(store.path(1))
    os.unlink(store.path(2))
    os.symlink(store.path(5), store.path(2))
    with (
        pytest.raises(FormatError, match=r"acts000000\.bin: expected .* bytes .* got .*: it is truncated"),
        store.opened(0),
    ):
        pass
    with (
        pytest.raises(FormatError, match=r"acts000001\.bin: expected a regular file, got a directory"),
        store.opened(1),
    ):
        pass
    with (
        pytest.raises(FormatError, match=r"acts000002\.bin: expected a regular file, got a symbolic link"),
        store.opened(2),
    ):
        pass
    assert open_shards() == []


# Labels


def test_labels(store):
    wanted = oracle_labels(SPEC)
    for examples in ([], [0], [29], [3, 4, 5], [7, 3, 3, 4], [29, 0], list(range(30))):
        got = Labels(store).of_examples(np.array(examples, dtype=np.int64))
        assert got.dtype == np.uint8
        assert got.tolist() == wanted[examples].tolist()
    assert open_shards() == ["labels.bin"]


def test_label_runs(store):
    flat = oracle_labels(SPEC).ravel()
    runs = [(0, 1), (5, 0), (179, 1), (10, 100), (10, 2)]
    got = Labels(store).of_runs(*(np.array([run[i] for run in runs], dtype=np.int64) for i in (0, 1)))
    assert got.tolist() == [int(x) for start, n in runs for x in flat[start : start + n]]


def test_no_labels(make_shards):
    store = ShardStore(make_shards(labels=False))
    with pytest.raises(ConfigError, match=r"labels\.bin: expected labels, .* got no such file"):
        Labels(store).of_examples(np.array([0]))


def test_small_labels_are_read_once(store):
    kept = Labels(store)
    wanted = kept.of_examples(np.arange(SPEC.n_examples))
    assert wanted.tolist() == oracle_labels(SPEC).tolist()
    os.truncate(store.shards_dir / "labels.bin", 0)
    assert kept.of_examples(np.arange(SPEC.n_examples)).tolist() == wanted.tolist()


def test_small_labels_that_became_shorter_before_they_were_read(store):
    os.truncate(store.shards_dir / "labels.bin", 100)
    with pytest.raises(ReadError, match=r"expected \d+ bytes at offset 0, got 100: the file became shorter"):
        Labels(store).of_examples(np.array([0]))


@pytest.fixture
def large_labels(monkeypatch):
    monkeypatch.setattr(columns, "_MAX_KEPT_NBYTES", 0)


def test_large_labels_are_read_in_runs(store, large_labels):
    flat = oracle_labels(SPEC).ravel()
    runs = [(0, 1), (5, 0), (179, 1), (10, 100), (10, 2)]
    got = Labels(store).of_runs(*(np.array([run[i] for run in runs], dtype=np.int64) for i in (0, 1)))
    assert got.tolist() == [int(x) for start, n in runs for x in flat[start : start + n]]


def test_labels_that_became_shorter(store, large_labels):
    Labels(store).of_examples(np.array([0]))
    os.truncate(store.shards_dir / "labels.bin", 100)
    assert Labels(store).of_examples(np.array([15])).shape == (1, 6)
    with pytest.raises(ReadError, match=r"labels\.bin: expected 6 bytes at offset 96, got 4: the file became shorter"):
        Labels(store).of_examples(np.array([16]))


def test_labels_that_went_away(store):
    os.unlink(store.shards_dir / "labels.bin")
    with pytest.raises(ShardsNotFoundError, match=r"labels\.bin"):
        Labels(store).of_examples(np.array([0]))


def test_labels_that_became_shorter_before_they_were_opened(store):
    os.truncate(store.shards_dir / "labels.bin", 0)
    with pytest.raises((ReadError, FormatError), match=r"labels\.bin"):
        Labels(store).of_examples(np.array([0]))
