import copy
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time

import contracts
import pytest
import torch
from factory import Spec
from torch.utils.data import DataLoader

from saev_torch import ShuffledActivations, ShuffledConfig
from saev_torch.processes.epochs import EpochCounter

pytestmark = pytest.mark.filterwarnings(contracts.MANY_WORKERS)

ME, OTHER = 1, 2


def begin(counter, session=None, worker=0, consumer=ME):
    return counter.begin(consumer, session, worker)


def test_without_workers():
    counter = EpochCounter()
    assert counter.next(ME) == (0, 0)
    assert [begin(counter) for _ in range(100)] == [(e, 0) for e in range(100)]
    assert counter.next(ME) == (100, 0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_workers_of_a_session_agree(order):
    counter = EpochCounter()
    for epoch in range(3):
        session = 1000 + epoch
        assert {begin(counter, session, worker) for worker in order} == {(epoch, 0)}


def test_persistent_workers_count_on():
    """Their session stays the same, so each takes part in an iteration once."""
    counter = EpochCounter()
    for epoch in range(50):
        assert {begin(counter, 7, worker) for worker in range(4)} == {(epoch, 0)}


def test_a_slow_worker_joins_the_oldest():
    counter = EpochCounter()
    assert [begin(counter, 7, 0) for _ in range(3)] == [(0, 0), (1, 0), (2, 0)]
    assert [begin(counter, 7, 1) for _ in range(4)] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert begin(counter, 7, 0) == (3, 0)


def test_many_workers():
    counter = EpochCounter()
    for epoch in range(2):
        assert {begin(counter, epoch, worker) for worker in range(200)} == {(epoch, 0)}


def test_choosing():
    counter = EpochCounter()
    begin(counter)
    counter.set(ME, 9, 40)
    assert counter.next(ME) == (9, 40)
    assert [begin(counter) for _ in range(2)] == [(9, 40), (10, 0)]
    counter.set(ME, 3, 0)
    counter.set(ME, 0, 5)
    assert {begin(counter, 7, worker) for worker in (1, 0)} == {(0, 5)}
    assert {begin(counter, 7, worker) for worker in (0, 1)} == {(1, 0)}


def test_choosing_before_a_slow_worker_has_begun():
    """Epoch 0 was broken off early: worker 1 must take part in it all the same, and not take epoch 5 for it."""
    counter = EpochCounter()
    assert begin(counter, 7, 0) == (0, 0)
    counter.set(ME, 5, 0)
    assert begin(counter, 7, 1) == (0, 0)
    assert {begin(counter, 7, worker) for worker in (1, 0)} == {(5, 0)}
    assert {begin(counter, 7, worker) for worker in (0, 1)} == {(6, 0)}


def test_consumers_count_for_themselves():
    """As ranks do that were forked with one data set."""
    counter = EpochCounter()
    for epoch in range(40):
        assert begin(counter, consumer=ME) == (epoch, 0)
        assert {begin(counter, 7, worker, consumer=OTHER) for worker in range(2)} == {(epoch, 0)}
    counter.set(ME, 3, 0)
    assert counter.next(OTHER) == (40, 0)


def test_a_busy_consumer_does_not_make_others_forget():
    counter = EpochCounter()
    assert begin(counter, consumer=OTHER) == (0, 0)
    for _ in range(100):
        begin(counter, consumer=ME)
    assert begin(counter, consumer=OTHER) == (1, 0)


def test_an_epoch_chosen_before_a_process_holds_for_it():
    counter = EpochCounter()
    counter.set(ME, 4, 0)
    assert begin(counter, consumer=OTHER) == (4, 0)
    assert begin(counter, consumer=ME) == (4, 0)
    assert begin(counter, consumer=OTHER) == (5, 0)


# Processes


def take_part(counter, session, worker, n, found):
    found.put((worker, [counter.begin(ME, session, worker)[0] for _ in range(n)]))


@pytest.fixture
def slow(monkeypatch):
    """Let it take long to add a row, so that another process or thread would come between if it could."""
    add = EpochCounter._add
    monkeypatch.setattr(EpochCounter, "_add", lambda *args: (time.sleep(0.002), add(*args))[1])


@pytest.mark.usefixtures("slow")
def test_processes_at_once():
    counter = EpochCounter()
    fork = multiprocessing.get_context("fork")
    found = fork.SimpleQueue()
    workers = [fork.Process(target=take_part, args=(counter, 7, worker, 20, found)) for worker in range(6)]
    for worker in workers:
        worker.start()
    results = dict(found.get() for _ in workers)
    for worker in workers:
        worker.join()
        worker.close()
    found.close()
    assert results == {worker: list(range(20)) for worker in range(6)}
    assert counter.next(ME) == (20, 0)


@pytest.mark.usefixtures("slow")
def test_threads_at_once():
    counter = EpochCounter()
    found = []
    threads = [threading.Thread(target=lambda: found.extend(begin(counter)[0] for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(80))


def hold_and_die(counter):
    counter._while_locked(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_killed_process_leaves_no_lock():
    counter = EpochCounter()
    child = multiprocessing.get_context("fork").Process(target=hold_and_die, args=(counter,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    child.close()
    assert begin(counter) == (0, 0)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_share_it(method):
    counter = EpochCounter()
    begin(counter)
    context = multiprocessing.get_context(method)
    child = context.Process(target=begin, args=(counter,))
    child.start()
    child.join()
    assert child.exitcode == 0
    child.close()
    assert begin(counter) == (2, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda counter: pickle.loads(pickle.dumps(counter))])
def test_copies_count_on_for_themselves(copied):
    counter = EpochCounter()
    for _ in range(3):
        begin(counter)
    other = copied(counter)
    assert [begin(other) for _ in range(2)] == [(3, 0), (4, 0)]
    assert begin(counter) == (3, 0)


def test_it_pickles_small():
    assert len(pickle.dumps(EpochCounter())) < 8000


# With data sets


@pytest.fixture
def cfg(make_shards):
    return ShuffledConfig(shards=make_shards(Spec(n_examples=30)), layer=3, batch_size=16, buffer_size=4)


@pytest.fixture
def epochs(cfg):
    data_set = ShuffledActivations(cfg)
    return [list(data_set) for _ in range(8)]


def test_other_number_of_workers_with_the_same_session(cfg, epochs):
    """The base seed, by which workers know each other, is that of an earlier iteration with fewer or more of them."""
    data_set = ShuffledActivations(cfg)
    for epoch, n_workers in enumerate([1, 2, 4, 0, 3, 1, 4]):
        torch.manual_seed(0)
        contracts.assert_same(list(DataLoader(data_set, num_workers=n_workers)), epochs[epoch])


class SlowToBegin(ShuffledActivations):
    """Worker 1 begins when worker 0 has yielded already, as it may where processes start slowly."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        if info is not None and info.id == 1:
            self.go_on.wait(60)
        return super().__iter__()


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("chosen", [None, 0, 5])
def test_breaking_off_before_a_worker_has_begun(cfg, epochs, persistent, chosen, seeded):
    data_set = SlowToBegin(cfg)
    data_set.go_on = multiprocessing.get_context("fork").Event()
    loader = DataLoader(data_set, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork")
    if seeded:
        torch.manual_seed(0)
    iterator = iter(loader)
    contracts.assert_same([next(iterator)], epochs[0][:1])
    if chosen is not None:
        data_set.set_epoch(chosen)
    data_set.go_on.set()
    del iterator
    first = 1 if chosen is None else chosen
    for epoch in (first, first + 1):
        if seeded:
            torch.manual_seed(0)
        contracts.assert_same(list(loader), epochs[epoch])


class WithSlowStarts(ShuffledActivations):
    """Worker 1 of the first iteration begins last, after both of the second."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        if info is not None:
            with self.n_begun.get_lock():
                turn = self.n_begun.value
                self.n_begun.value += 1
            time.sleep((0.0, 0.6, 0.1, 0.25)[turn])
        return super().__iter__()


@pytest.mark.parametrize("n_tries", range(3))
def test_two_plain_loaders_with_equal_seeds(cfg, epochs, n_tries):
    data_set = WithSlowStarts(cfg)
    fork = multiprocessing.get_context("fork")
    data_set.n_begun = fork.Value("i", 0)
    loaders = [
        DataLoader(data_set, num_workers=2, generator=torch.Generator().manual_seed(0), multiprocessing_context="fork")
        for _ in range(2)
    ]
    found = list(zip(*zip(*loaders, strict=True), strict=True))
    # Which of them is the first is decided by their workers; each is whole.
    first, second = sorted(found, key=lambda batches: not torch.equal(batches[0]["act"], epochs[0][0]["act"]))
    contracts.assert_same(list(first), epochs[0])
    contracts.assert_same(list(second), epochs[1])


@pytest.mark.parametrize(("method", "persistent"), [("fork", False), ("fork", True), ("spawn", True)])
def test_equal_seeds_with_any_start_method(cfg, epochs, method, persistent):
    data_set = ShuffledActivations(cfg)
    options = {"num_workers": 2, "multiprocessing_context": method, "persistent_workers": persistent}
    loaders = [DataLoader(data_set, generator=torch.Generator().manual_seed(0), **options) for _ in range(2)]
    for n in range(2 if method == "fork" else 1):
        found = list(zip(*zip(*loaders, strict=True), strict=True))
        starts = [epoch[0]["act"] for epoch in epochs]
        numbers = [next(i for i, act in enumerate(starts) if torch.equal(act, got[0]["act"])) for got in found]
        assert sorted(numbers) == [2 * n, 2 * n + 1]
        for number, got in zip(numbers, found, strict=True):
            contracts.assert_same(list(got), epochs[number])


def consume_epochs(source, n_epochs, found, together=None):
    if together is not None:
        together.wait(60)
    found.put([contracts.digest(source) for _ in range(n_epochs)])


@pytest.mark.parametrize("n_workers", [0, 1])
def test_many_processes_consume(cfg, epochs, n_workers):
    """Each, and the parent, counts for itself, as many as there are, and whether its workers or itself make batches."""
    data_set = ShuffledActivations(cfg)
    source = data_set if not n_workers else DataLoader(data_set, num_workers=1, multiprocessing_context="fork")
    wanted = [contracts.digest(epoch) for epoch in epochs]
    assert contracts.digest(source) == wanted[0]
    fork = multiprocessing.get_context("fork")
    found = fork.SimpleQueue()
    n_processes = 40 if n_workers == 0 else 34
    for _ in range(n_processes // 2):
        pair = [fork.Process(target=consume_epochs, args=(source, 1 + n_workers, found)) for _ in range(2)]
        for process in pair:
            process.start()
        for process in pair:
            assert found.get() == wanted[: 1 + n_workers]
            process.join()
            process.close()
    found.close()
    assert contracts.digest(source) == wanted[1]


def test_many_processes_consume_at_once(cfg, epochs):
    data_set = ShuffledActivations(cfg)
    data_set.set_epoch(3)
    wanted = [contracts.digest(epoch) for epoch in epochs]
    fork = multiprocessing.get_context("fork")
    found, together = fork.SimpleQueue(), fork.Barrier(40)
    processes = [fork.Process(target=consume_epochs, args=(data_set, 2, found, together)) for _ in range(40)]
    for process in processes:
        process.start()
    assert [found.get() for _ in processes] == [wanted[3:5]] * 40
    for process in processes:
        process.join()
        process.close()
    found.close()
    assert contracts.digest(data_set) == wanted[3]


def test_copies_of_a_data_set(cfg, epochs):
    data_set = ShuffledActivations(cfg)
    contracts.assert_same(list(data_set), epochs[0])
    for other in (copy.deepcopy(data_set), pickle.loads(pickle.dumps(data_set))):
        contracts.assert_same(list(other), epochs[1])
        contracts.assert_same(list(other), epochs[2])
    contracts.assert_same(list(data_set), epochs[1])
    assert len(pickle.dumps(data_set)) < 20_000
