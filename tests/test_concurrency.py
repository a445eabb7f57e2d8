"""Several loaders at once, in one process, in threads, in workers; data sets copied, and used after a shutdown."""

import copy
import pickle
import threading

import contracts
import factory
import pytest
from torch.utils.data import DataLoader, IterableDataset

from saev_torch import IndexedConfig, IndexedDataset, OrderedConfig, ShuffledActivations, ShuffledConfig

SPEC = factory.Spec(n_examples=60, content_tokens=8, cls=False, layers=(0, 5), d_model=8, examples_per_shard=13)
FIELDS = {"layer": 5, "batch_size": 32, "buffer_size": 8}


@pytest.fixture
def shards(make_shards):
    return make_shards(SPEC)


@pytest.fixture(params=[ShuffledConfig, OrderedConfig])
def cfg(request, shards):
    return request.param(shards=shards, **FIELDS)


def epochs(cfg, n=2):
    """What one loader alone yields, epoch by epoch."""
    found = []
    for epoch in range(n):
        data_set = contracts.make_data_set(cfg)
        data_set.set_epoch(epoch)
        found.append(list(data_set))
        contracts.check_epoch(found[-1], SPEC, cfg)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_two_loaders_in_turn(cfg, workers):
    (wanted,) = epochs(cfg, 1)
    first, second = (iter(contracts.make_ready(cfg, num_workers=workers)) for _ in range(2))
    pairs = list(zip(first, second, strict=True))
    contracts.assert_same([a for a, _ in pairs], wanted)
    contracts.assert_same([b for _, b in pairs], wanted)


def test_two_iterators_of_one_data_set(cfg):
    wanted = epochs(cfg, 2)
    data_set = contracts.make_data_set(cfg)
    pairs = list(zip(iter(data_set), iter(data_set), strict=True))
    for got, epoch in zip(zip(*pairs, strict=True), wanted, strict=True):
        contracts.assert_same(list(got), epoch)


def test_an_ordered_and_a_shuffled_loader_in_turn(shards):
    configs = [ShuffledConfig(shards=shards, **FIELDS), OrderedConfig(shards=shards, **FIELDS)]
    iterators = [iter(contracts.make_data_set(cfg)) for cfg in configs]
    for got, cfg in zip(zip(*zip(*iterators, strict=True), strict=True), configs, strict=True):
        contracts.assert_same(list(got), epochs(cfg, 1)[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_in_threads(cfg, workers):
    wanted = epochs(cfg, 2)
    found, errors = {}, []

    def consume(name):
        try:
            loader = contracts.make_ready(cfg, num_workers=workers)
            found[name] = [list(loader) for _ in range(2)]
        except BaseException as err:  # noqa: BLE001 -- the test raises it
            errors.append(err)

    threads = [threading.Thread(target=consume, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    for name in range(3):
        for got, epoch in zip(found[name], wanted, strict=True):
            contracts.assert_same(got, epoch)


def test_an_iterator_that_threads_take_turns_with(cfg):
    (wanted,) = epochs(cfg, 1)
    iterator, lock, got = iter(contracts.make_data_set(cfg)), threading.Lock(), []

    def consume():
        while True:
            with lock:
                batch = next(iterator, None)
                if batch is None:
                    return
                got.append(batch)

    threads = [threading.Thread(target=consume) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    contracts.assert_same(got, wanted)


def test_random_access_from_threads(shards):
    data_set = IndexedDataset(IndexedConfig(shards=shards, layer=5))
    samples = contracts.expected(SPEC, "content", 5)
    wrong = []

    def consume(first):
        mine = range(first, len(data_set), 3)
        acts = samples.columns["act"]
        wrong.extend(i for i in mine if data_set[i]["act"].numpy().tobytes() != acts[i].tobytes())

    threads = [threading.Thread(target=consume, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


class Within(IterableDataset):
    """A user's data set that reads from a loader of its own, in whatever process it is."""

    def __init__(self, cfg):
        self.cfg = cfg

    def __iter__(self):
        yield from contracts.make_ready(self.cfg)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_loader_in_a_worker_of_another_reads_the_share_of_that_worker(cfg, workers):
    # As torch's own rule for iterable data sets is: who iterates in a worker sees only what is this worker's.
    (wanted,) = epochs(cfg, 1)
    got = list(DataLoader(Within(cfg), batch_size=None, num_workers=workers))
    contracts.assert_same(got, wanted)


COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_counts_its_own_epochs(cfg, how):
    first, second, third = epochs(cfg, 3)
    data_set = contracts.make_data_set(cfg)
    contracts.assert_same(list(data_set), first)
    other = COPIES[how](data_set)
    contracts.assert_same(list(other), second)
    contracts.assert_same(list(data_set), second)
    contracts.assert_same(list(other), third)


def test_a_shallow_copy_shares_the_count(cfg):
    first, second = epochs(cfg, 2)
    data_set = contracts.make_data_set(cfg)
    contracts.assert_same(list(copy.copy(data_set)), first)
    contracts.assert_same(list(data_set), second)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_in_an_epoch_leaves_that_alone(cfg, how):
    (wanted,) = epochs(cfg, 1)
    data_set = contracts.make_data_set(cfg)
    iterator = iter(data_set)
    got = [next(iterator)]
    other = COPIES[how](data_set)
    assert len(list(other)) == len(wanted)
    got += iterator
    contracts.assert_same(got, wanted)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_an_indexed_data_set(shards, how):
    data_set = IndexedDataset(IndexedConfig(shards=shards, layer="all"))
    wanted = data_set.__getitems__(list(range(len(data_set))))
    got = COPIES[how](data_set).__getitems__(list(range(len(data_set))))
    assert got.batch["act"].numpy().tobytes() == wanted.batch["act"].numpy().tobytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_after_its_loader_was_shut_down(cfg, workers):
    first, second, third = epochs(cfg, 3)
    loader = contracts.make_ready(cfg, num_workers=workers)
    iterator = iter(loader)
    contracts.assert_same([next(iterator), next(iterator)], first[:2])
    loader.shutdown()
    assert list(iterator) == []
    contracts.assert_same(list(loader.dataset), second)
    contracts.assert_same(list(loader), third)


def test_batches_outlive_their_loader(cfg):
    (wanted,) = epochs(cfg, 1)
    loader = contracts.make_ready(cfg, num_workers=2)
    got = list(loader)
    loader.shutdown()
    del loader
    contracts.assert_same(got, wanted)


def test_the_same_loader_iterated_twice_at_once(shards):
    cfg = ShuffledConfig(shards=shards, **FIELDS)
    first, second = epochs(cfg, 2)
    loader = DataLoader(ShuffledActivations(cfg), batch_size=None, num_workers=1)
    pairs = list(zip(iter(loader), iter(loader), strict=True))
    contracts.assert_same([a for a, _ in pairs], first)
    contracts.assert_same([b for _, b in pairs], second)
