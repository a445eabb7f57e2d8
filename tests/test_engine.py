"""Which threads read, and when."""

import collections
import gc
import itertools
import os
import threading
import time
import weakref
from types import SimpleNamespace

import contracts
import pytest
from factory import Spec

from saev_torch import ShuffledConfig
from saev_torch.processes import world
from saev_torch.processes.world import count_own_cores
from saev_torch.reading import crew, engine
from saev_torch.reading import reader as reading
from saev_torch.reading.crew import Task, run_tasks
from saev_torch.reading.engine import Engine
from saev_torch.reading.extents import place
from saev_torch.reading.reader import Pace, Reader, Spot
from saev_torch.reading.ring import Ring

SPEC = Spec(n_examples=60, content_tokens=20, layers=(3, 7), d_model=64, examples_per_shard=17)


@pytest.mark.parametrize(
    ("cores", "workers", "ranks", "own"),
    [(8, None, "", 8), (8, 2, "", 4), (8, 2, "2", 2), (8, 3, "", 2), (2, 8, "", 1), (8, 1, "zero", 8), (8, 1, "0", 8)],
)
def test_cores_are_shared(monkeypatch, cores, workers, ranks, own):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(world, "get_worker_info", lambda: workers and SimpleNamespace(num_workers=workers))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert count_own_cores() == own


@pytest.fixture
def cfg(make_shards, monkeypatch):
    monkeypatch.setattr(engine, "count_own_cores", lambda: 1)
    return ShuffledConfig(shards=make_shards(SPEC), layer=7, batch_size=32, buffer_size=8, n_threads=4)


@pytest.fixture
def readers(monkeypatch):
    """The threads that read, a name for each task."""
    names, read = [], Engine._read_rows

    def note(self, *args):
        names.append(threading.current_thread().name)
        read(self, *args)

    monkeypatch.setattr(Engine, "_read_rows", note)
    return names


def test_all_threads_help_where_none_comes_back():
    """Each takes one task, and has it until all have one: nobody notes that reads are slow."""
    pace, together = Pace(1), threading.Barrier(6)
    # Until then those that are to help have begun to wait.
    pace._done_at += 0.1
    tasks = (Task(lambda reader: together.wait(60) and None) for _ in range(6))
    run_tasks("reader", 6, pace, lambda pace: SimpleNamespace(pace=pace, spot=Spot()), tasks)


def intercept_reads(monkeypatch, before):
    """Call a function before each read, in the thread that reads."""
    read = Reader.read

    def read_later(self, *args):
        before()
        read(self, *args)

    monkeypatch.setattr(Reader, "read", read_later)


def always_slow(monkeypatch):
    """Let every read look as if a disk had been waited for."""
    monkeypatch.setattr(reading, "_SLOW_NBYTES_PER_S", float("inf"))
    monkeypatch.setattr(reading, "_CALL_S", 0.0)


def test_as_many_threads_as_cores_read(cfg, readers, monkeypatch):
    monkeypatch.setattr(reading, "_HELP_AFTER_S", 1e9)
    monkeypatch.setattr(reading, "_CALL_S", 1e9)
    contracts.check_epoch(list(contracts.make_ready(cfg)), SPEC, cfg)
    assert len(readers) > 5
    assert set(readers) == {"saev_torch reader 0"}


def test_all_read_where_a_disk_is_waited_for(cfg, readers, monkeypatch):
    monkeypatch.setattr(reading, "_HELP_AFTER_S", 1e9)
    always_slow(monkeypatch)
    monkeypatch.setattr(crew, "_TASK_NBYTES", 1)
    monkeypatch.setattr(crew, "_MAX_TASK_NBYTES", 1)
    together = threading.Barrier(4)

    def meet():
        # The first task, which tells that it is slow, is read alone.
        if len(readers) in range(2, 6):
            together.wait(60)

    intercept_reads(monkeypatch, meet)
    contracts.check_epoch(list(contracts.make_ready(cfg)), SPEC, cfg)
    assert set(readers) == {f"saev_torch reader {i}" for i in range(4)}


def test_others_help_where_one_takes_long(cfg, readers, monkeypatch):
    monkeypatch.setattr(reading, "_CALL_S", 1e9)
    helped = threading.Event()

    def hang():
        if threading.current_thread().name.endswith(" 0"):
            assert helped.wait(60)
        else:
            helped.set()

    intercept_reads(monkeypatch, hang)
    monkeypatch.setattr(crew, "_TASK_NBYTES", 1)
    monkeypatch.setattr(crew, "_MAX_TASK_NBYTES", 1)
    contracts.check_epoch(list(contracts.make_ready(cfg)), SPEC, cfg)
    assert len(set(readers)) > 1


def test_tasks_are_large_unless_a_disk_is_waited_for():
    pace, mb = Pace(2), 1 << 20
    crew_of_four = crew.Crew("test", 4, pace, None, None)
    sizes = [1, 100 * mb, 1000 * mb]
    pace.note(1, 1, 0.0)
    assert [crew_of_four.task_nbytes(n) for n in sizes] == [4 * mb, 25 * mb, 64 * mb]
    pace.note(1, 1, 1.0)
    assert [crew_of_four.task_nbytes(n) for n in sizes] == [4 * mb, 12.5 * mb, 16 * mb]


def test_one_looks_for_all_whether_help_is_needed():
    """Each look takes the interpreter lock from those that read."""
    looks, slept = [], threading.Event()

    class Looked(Pace):
        def wait_s(self, number):
            looks.append(number)
            return super().wait_s(number)

    def run(reader):
        # Always in time, so that nobody is needed.
        for _ in range(20):
            slept.wait(0.002)
            reader.pace._done_at = time.monotonic()

    pace = Looked(1)
    tasks = (Task(run) for _ in range(10))
    began = time.monotonic()
    run_tasks("reader", 16, pace, lambda pace: SimpleNamespace(pace=pace, spot=Spot()), tasks)
    n_steps = (time.monotonic() - began) / reading._HELP_AFTER_S
    # Each of 15 when it begins, when it ends, and around a task that it takes where the machine is slow. One of them
    # every 20 ms, or a few times as often where it is late; if all did, 15 times as often, and 300 in 0.4 s.
    assert sum(number > 0 for number in looks) < 15 + 2 * 10 + 15 + 4 * n_steps


def test_without_a_ring_reads_are_announced_however_large_the_data(cfg, monkeypatch):
    monkeypatch.setattr(Ring, "open", lambda: None)
    always_slow(monkeypatch)
    monkeypatch.setattr(crew, "_TASK_NBYTES", 1)
    monkeypatch.setattr(crew, "_MAX_TASK_NBYTES", 1)
    announced, announce = [], Reader.announce
    monkeypatch.setattr(Reader, "announce", lambda *args: (announced.append(args), announce(*args)))
    monkeypatch.setattr("saev_torch.reading.direct.fits_page_cache", lambda nbytes: False)
    contracts.check_epoch(list(contracts.make_ready(cfg)), SPEC, cfg)
    assert announced


@pytest.mark.parametrize("n_taken", [0, 1, 5, None])
def test_an_engine_that_is_closed_is_gone(cfg, monkeypatch, n_taken):
    """At once, not when the garbage collector comes: it holds the memory that the next epoch would use again."""
    made, init = [], Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *args: (init(self, *args), made.append(weakref.ref(self)))[0])
    # The next step is being worked out when the engine is closed.
    monkeypatch.setattr(engine, "place", lambda *args: (time.sleep(0.03), place(*args))[1])
    data = contracts.make_data_set(cfg)
    gc.disable()
    try:
        batches = iter(data)
        collections.deque(itertools.islice(batches, n_taken), maxlen=0)
        batches.close()
        del batches
        assert [one() for one in made] == [None] * (n_taken != 0)
    finally:
        gc.enable()
