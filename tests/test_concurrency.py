"""Several loaders at once, in one process, in threads, in workers; data sets copied, and used after a shutdown."""

import ast
import contextlib
import copy
import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import contracts
import factory
import pytest
from conftest import PATIENCE_S
from torch.utils.data import DataLoader, Dataset, IterableDataset

import saev_torch
from saev_torch import IndexedConfig, IndexedDataset, OrderedConfig, ReadError, ShuffledActivations, ShuffledConfig
from saev_torch.processes import locks
from saev_torch.reading import engine as engine_module
from saev_torch.reading import received
from saev_torch.reading.slots import SlotPool

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


def test_threads_that_ask_for_more_and_less_do_not_write_beyond_what_they_have(shards):
    class Raced(IndexedDataset):
        def __setattr__(self, name, value):
            # What a thread does that asks for less, and comes at once.
            super().__setattr__(name, SlotPool(1, shared=False) if name == "_pool" and value is not None else value)

    data_set = Raced(IndexedConfig(shards=shards, layer=5))
    assert data_set._acquire(1000).nbytes >= 1000 * SPEC.d_model * 4
    assert data_set._pool.nbytes == 1


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
    got = list(map(list, zip(*zip(iter(loader), iter(loader), strict=True), strict=True)))
    # Whose worker begins first has the first epoch.
    if contracts.digest(got[0]) != contracts.digest(first):
        got.reverse()
    contracts.assert_same(got[0], first)
    contracts.assert_same(got[1], second)


# Forks, by users


def fork(target):
    """Run in a forked child, which ends with 0 where it raised nothing; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        target()
        code = 0
    except BaseException as err:  # noqa: BLE001 -- nothing of the parent may run here
        os.write(2, f"in the child: {type(err).__name__}: {err}\n".encode())
    finally:
        os._exit(code)


def assert_ends_well(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class ForksInWorker(IterableDataset):
    """After a few batches its worker forks, and both go on: the child with an iteration of its own."""

    def __init__(self, cfg):
        self.cfg = cfg

    def __iter__(self):
        batches = iter(contracts.make_data_set(self.cfg))
        for _ in range(4):
            yield next(batches)
        pid = fork(self.check_all)
        # Slow, so that both are at work at a time.
        for batch in batches:
            time.sleep(0.005)
            yield batch
        assert_ends_well(pid)

    def check_all(self):
        for _ in range(3):
            kept = []
            for batch in contracts.make_data_set(self.cfg):
                time.sleep(0.002)
                kept.append(copy.deepcopy(batch))
            contracts.check_epoch(kept, SPEC, self.cfg)


def test_a_fork_inside_a_worker(cfg):
    """Neither reads to the memory of the other."""
    batches = [copy.deepcopy(batch) for batch in DataLoader(ForksInWorker(cfg), num_workers=1)]
    contracts.check_epoch(batches, SPEC, cfg)


class IndexedForksInWorker(Dataset):
    """Its worker has a pool of memory when it forks; the child draws from a copy of it."""

    def __init__(self, shards):
        self.data_set = IndexedDataset(IndexedConfig(shards=shards, tokens="all", layer="all"))

    def __len__(self):
        return len(self.data_set)

    def __getitems__(self, indices):
        wanted = self.data_set.__getitems__(range(600)).batch["act"].clone()
        receiver, sender = os.pipe()
        # The child reads while this process holds what it read to memory that was free when the child came to be.
        pid = fork(lambda: (os.read(receiver, 1), self.data_set.__getitems__(range(300, 900))))
        now = self.data_set.__getitems__(range(600))
        os.write(sender, b"x")
        assert_ends_well(pid)
        os.close(receiver)
        os.close(sender)
        assert now.batch["act"].equal(wanted)
        return now


def test_a_fork_inside_a_worker_with_random_access(shards):
    data_set = IndexedForksInWorker(shards)
    assert len(data_set) == 960
    assert len(next(iter(DataLoader(data_set, batch_size=600, num_workers=1)))["act"]) == 600


def test_an_iteration_does_not_go_on_in_a_child(cfg):
    """Its threads are not there; that of the parent goes on, and the child may iterate anew."""
    data_set = contracts.make_data_set(dataclasses.replace(cfg, batch_timeout_s=100.0))
    batches = iter(data_set)
    taken = [next(batches)]

    def go_on():
        began = time.monotonic()
        with pytest.raises(ReadError, match=re.escape(f"iteration of this process, {os.getpid()}, got one of process")):
            next(batches)
        batches.close()
        assert time.monotonic() - began < PATIENCE_S
        data_set.set_epoch(0)
        contracts.check_epoch(list(data_set), SPEC, cfg)

    pid = fork(go_on)
    rest = list(batches)
    assert_ends_well(pid)
    contracts.check_epoch(taken + rest, SPEC, cfg)


def test_a_child_that_drops_an_iteration(cfg):
    data_set = contracts.make_data_set(cfg)
    batches = iter(data_set)
    taken = [next(batches)]
    began = time.monotonic()
    assert_ends_well(fork(batches.close))
    # The threads of the parent, which are not there, would be waited for: four of them, 5 s each.
    assert time.monotonic() - began < 15
    assert data_set.metrics()["loader/n_readers"] == 1
    contracts.check_epoch(taken + list(batches), SPEC, cfg)


@pytest.mark.parametrize("shift", [-(10**6), 10**6])
def test_rows_go_to_slots_of_this_process_only(cfg, monkeypatch, shift):
    real = engine_module.place

    def place(*args):
        placed = real(*args)
        placed.addresses[len(placed.addresses) // 2] += shift
        return placed

    monkeypatch.setattr(engine_module, "place", place)
    with pytest.raises(ReadError, match="expected rows to go to batches of this process, got an address elsewhere"):
        list(contracts.make_data_set(cfg))


# Locks that another thread has when a process is forked


def in_time(target):
    """Run in a forked child, which is killed where it hangs."""
    return fork(lambda: (signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.alarm(100), target()))


@contextlib.contextmanager
def held(lock):
    """Let another thread have a lock."""
    has, go_on = threading.Event(), threading.Event()

    def hold():
        with lock:
            has.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait(60)
    yield
    go_on.set()
    thread.join(60)


def test_every_lock_is_renewed_in_a_child():
    """Of a kind that knows how, and by the one way: conditions share such a lock."""
    makers, found = {"Lock", "RLock", "Semaphore", "BoundedSemaphore", "Barrier", "Condition"}, 0
    for path in sorted(Path(saev_torch.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        renewed = {id(node.args[0]) for node in calls if ast.unparse(node.func).endswith("renewed") and node.args}
        for node in calls:
            name = ast.unparse(node.func).removeprefix("threading.")
            if name in makers and not (name == "Condition" and node.args):
                assert id(node) in renewed, f"{path.name}:{node.lineno}: {ast.unparse(node)} is not renewed"
                found += 1
    assert found >= 8


def test_all_locks_are_free_in_a_child(cfg):
    data_set, loader = contracts.make_data_set(cfg), contracts.make_ready(cfg)
    batches = [iter(data_set), iter(loader)]
    for one in batches:
        next(one)
    known = list(locks._locks)
    assert len(known) > 5
    with contextlib.ExitStack() as stack:
        for lock in known:
            # Threads of ours may have some for a moment, and go on in this process.
            stack.enter_context(held(lock))
        free = []
        pid = in_time(lambda: (free.extend(lock.acquire(timeout=1) for lock in known), check(free, len(known))))
    assert_ends_well(pid)
    loader.shutdown()


def check(free, n):
    assert free == [True] * n


@pytest.mark.parametrize("where", ["store", "received"])
def test_random_access_in_a_child_that_was_forked_while_a_thread_read(shards, where, monkeypatch):
    # So that batches come in shared memory.
    monkeypatch.setattr("saev_torch.reading.many._MIN_MANY", 1)
    data_set = IndexedDataset(IndexedConfig(shards=shards, layer=5))
    wanted = data_set.__getitems__(range(40)).batch["act"]
    lock = data_set._store._lock if where == "store" else received._lock

    def read():
        assert data_set.__getitems__(range(40)).batch["act"].equal(wanted)
        for batch in DataLoader(data_set, batch_size=100, num_workers=1, multiprocessing_context="fork"):
            assert len(batch["act"])

    with held(lock):
        pid = in_time(read)
    assert_ends_well(pid)


def test_workers_fork_while_a_thread_reads_more_shards_than_are_held_open(make_shards, monkeypatch):
    monkeypatch.setattr("saev_torch.reading.store._MAX_OPEN", 4)
    data_set = IndexedDataset(
        IndexedConfig(shards=make_shards(dataclasses.replace(SPEC, examples_per_shard=2)), layer=5)
    )
    over = threading.Event()

    def read():
        while not over.is_set():
            data_set.__getitems__(range(0, len(data_set), 7))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(4):
            loader = DataLoader(data_set, batch_size=100, num_workers=2, multiprocessing_context="fork", timeout=100)
            assert sum(len(batch["act"]) for batch in loader) == len(data_set)
    finally:
        over.set()
        thread.join(60)


def test_a_lock_that_the_forking_thread_has_stays_its_own():
    lock = locks.renewed(threading.RLock())
    with lock:
        pid = in_time(lambda: lock.release())
    assert_ends_well(pid)


_NO_IMPORTS = """
import sys
from saev_torch import IndexedConfig, IndexedDataset
from saev_torch import OrderedActivations, OrderedConfig, ShuffledActivations, ShuffledConfig
fields = {"shards": sys.argv[1], "layer": 5}
shuffled = ShuffledActivations(ShuffledConfig(batch_size=32, buffer_size=8, **fields))
uniform = ShuffledActivations(ShuffledConfig(batch_size=32, order="uniform", **fields))
ordered = OrderedActivations(OrderedConfig(batch_size=32, **fields))
indexed = IndexedDataset(IndexedConfig(**fields))
before = set(sys.modules)
for data_set in (shuffled, uniform, ordered):
    list(data_set)
indexed.__getitems__(range(400))
indexed.__getitems__([*range(400)] * 3)
print(sorted(set(sys.modules) - before))
"""


def test_reading_imports_nothing(shards):
    """A module that a thread imports while another forks has a lock that nobody gives back in the child."""
    done = subprocess.run(
        [sys.executable, "-c", _NO_IMPORTS, str(shards)], capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
