"""Loaders that are copied, interrupted, shut down from elsewhere or iterated twice: nothing ends without a word."""

import collections
import copy
import gc
import itertools
import multiprocessing
import multiprocessing.queues
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import contracts
import pytest
from conftest import PATIENCE_S, Resources, wait_until
from factory import Spec
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from saev_torch import EndedError, ShuffledActivations, ShuffledConfig, ShuffledDataLoader
from saev_torch.iterable.counted import CountedBatches
from saev_torch.processes import interrupts, leaving

COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "copy": copy.copy, "deepcopy": copy.deepcopy}
WORKERS = [(0, False), (2, False), (2, True)]


@pytest.fixture
def cfg(make_shards: Any) -> ShuffledConfig:
    return ShuffledConfig(shards=make_shards(Spec(n_examples=64)), layer=3, batch_size=16, buffer_size=4)


@pytest.fixture
def epochs(cfg: ShuffledConfig) -> list[contracts.Batches]:
    data_set = ShuffledActivations(cfg)
    return [list(data_set) for _ in range(3)]


def make(cfg: ShuffledConfig, n_workers: int, persistent: bool = False, **options: Any) -> ShuffledDataLoader:
    context = "fork" if n_workers else None
    return ShuffledDataLoader(
        cfg, num_workers=n_workers, persistent_workers=persistent, multiprocessing_context=context, **options
    )


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("n_workers", "persistent"), WORKERS)
def test_a_copy_has_nothing_to_do_with_an_iteration(
    cfg: ShuffledConfig, epochs: Any, n_workers: int, persistent: bool, how: str
) -> None:
    loader = make(cfg, n_workers, persistent)
    iterator = iter(loader)
    got = [next(iterator)]
    other = COPIES[how](loader)
    assert other.state_dict()["batch"] == (1 if how == "copy" else 0)
    other.shutdown()
    got += iterator
    contracts.assert_same(got, epochs[0])
    contracts.assert_same(list(other), epochs[1])
    other.shutdown()
    loader.shutdown()


def in_a_thread(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize(("n_workers", "persistent"), WORKERS)
def test_shutdown_from_another_thread_is_an_error_there(
    cfg: ShuffledConfig, epochs: Any, n_workers: int, persistent: bool
) -> None:
    loader = make(cfg, n_workers, persistent)
    iterator = iter(loader)
    contracts.assert_same([next(iterator)], epochs[0][:1])
    in_a_thread(loader.shutdown)
    assert multiprocessing.active_children() == []
    for _ in range(2):
        with pytest.raises(EndedError, match=r"shutdown: .* another thread after 1 batches"):
            next(iterator)
    contracts.assert_same(list(loader), epochs[1])
    # Behind the last batch it is no error.
    iterator = iter(loader)
    got = [next(iterator) for _ in range(len(loader))]
    in_a_thread(loader.shutdown)
    contracts.assert_same([*got, *iterator], epochs[2])


class Sending(ShuffledActivations):
    """Does something before its fourth batch, while that is waited for."""

    def __iter__(self) -> Any:
        return self._pass_on(super().__iter__())

    def _pass_on(self, batches: Any) -> Any:
        for i, batch in enumerate(batches):
            info = get_worker_info()
            if i == 3 and (info is None or info.id == 1):
                self.act()
            yield batch


@pytest.mark.parametrize(("n_workers", "persistent"), WORKERS)
def test_shutdown_from_another_thread_while_a_batch_is_waited_for(
    cfg: ShuffledConfig, n_workers: int, persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saev_torch.loaders.ShuffledActivations", Sending)
    loader = make(cfg, n_workers, persistent)
    waiting = multiprocessing.get_context("fork").Event()
    has_begun, shut_down = multiprocessing.RawValue("b"), CountedBatches.shut_down
    monkeypatch.setattr(
        CountedBatches, "shut_down", lambda self: (setattr(has_begun, "value", True), shut_down(self))[1]
    )
    loader.dataset.act = lambda: (waiting.set(), wait_until(lambda: has_begun.value), time.sleep(0.3))
    ending = threading.Thread(target=lambda: (waiting.wait(PATIENCE_S), loader.shutdown()))
    ending.start()
    taken: list[Any] = []

    def take(batch: Any) -> None:
        taken.append(batch)
        if has_begun.value:
            ending.join(PATIENCE_S)

    with pytest.raises(EndedError):
        collections.deque(map(take, loader), maxlen=0)
    ending.join(PATIENCE_S)
    assert len(taken) < len(loader)
    assert multiprocessing.active_children() == []
    loader.shutdown()


def _is_dropped(frame: Any) -> bool:
    """Whether Python drops what is raised in a frame: it, or what called it, finalizes an object."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.endswith(("weakref.py", "_weakrefset.py")):
            return True
        frame = frame.f_back
    return False


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize(("n_workers", "persistent"), WORKERS)
def test_shutdown_in_a_signal_handler(
    cfg: ShuffledConfig, n_workers: int, persistent: bool, leave: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saev_torch.loaders.ShuffledActivations", Sending)
    loader, parent, taken = make(cfg, n_workers, persistent), os.getpid(), multiprocessing.RawValue("i")
    # All that come before the fourth batch of worker 1. Earlier the signal may come when a batch was counted, and has
    # not reached this function yet.
    n_before = 7 if n_workers else 3

    def interrupt() -> None:
        wait_until(lambda: taken.value == n_before)
        os.kill(parent, signal.SIGTERM)
        time.sleep(0.1 * bool(n_workers))

    loader.dataset.act = interrupt
    called, late = [], []

    def stop(number: int, frame: Any) -> None:
        called.append(number)
        loader.shutdown()
        if leave and _is_dropped(frame):
            late.append(SystemExit(3))
        elif leave:
            raise SystemExit(3)

    before = signal.signal(signal.SIGTERM, stop)
    left = False
    try:
        for _ in loader:
            taken.value += 1
        for err in late:
            raise err
    except SystemExit:
        left = True
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (len(called), left) == (1, leave)
    assert taken.value == n_before
    assert multiprocessing.active_children() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saev_torch")]
    assert loader.state_dict()["batch"] == n_before


def test_two_iterations_of_persistent_workers(cfg: ShuffledConfig, epochs: Any) -> None:
    loader = make(cfg, 2, persistent=True)
    first = iter(loader)
    contracts.assert_same([next(first)], epochs[0][:1])
    second = iter(loader)
    contracts.assert_same([next(second)], epochs[1][:1])
    with pytest.raises(EndedError, match="persistent_workers: expected one iteration at a time"):
        next(first)
    contracts.assert_same(list(second), epochs[1][1:])
    contracts.assert_same(list(loader), epochs[2])
    loader.shutdown()


def test_shutdown_ends_all_iterations(cfg: ShuffledConfig) -> None:
    loader = make(cfg, 1)
    iterators = [iter(loader) for _ in range(2)]
    for iterator in iterators:
        next(iterator)
    loader.set_epoch(5)
    loader.shutdown()
    assert multiprocessing.active_children() == []
    assert [list(iterator) for iterator in iterators] == [[], []]


class Interrupting(ShuffledActivations):
    """Its first worker interrupts the process that is starting the second."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        if info is not None and self.is_first.acquire(block=False):
            assert self.is_waiting.wait(PATIENCE_S)
            os.kill(os.getppid(), signal.SIGINT)
        return super().__iter__()


@pytest.mark.parametrize("persistent", [False, True])
def test_a_state_after_an_interrupt_while_workers_start(
    cfg: ShuffledConfig, epochs: Any, persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saev_torch.loaders.ShuffledActivations", Interrupting)
    context = multiprocessing.get_context("fork")
    loader = make(cfg, 3, persistent)
    loader.dataset.is_first, loader.dataset.is_waiting = context.Semaphore(1), context.Event()
    start = context.Process.start

    def slow(process: Any) -> None:
        start(process)
        if len(multiprocessing.active_children()) == 2:
            loader.dataset.is_waiting.set()
            wait_until(lambda: interrupts._deferral._due)

    with monkeypatch.context() as patched:
        patched.setattr(context.Process, "start", slow)
        with pytest.raises(KeyboardInterrupt) as kept:
            iter(loader)
    # The exception is kept, as notebooks do, but the workers have ended.
    assert multiprocessing.active_children() == []
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (0, 0)
    iterator = iter(loader)
    got = [next(iterator)]
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (1, 1)
    contracts.assert_same([*got, *iterator], epochs[1])
    contracts.assert_same(list(loader), epochs[2])
    assert kept.type is KeyboardInterrupt
    loader.shutdown()


def test_what_interrupts_the_start_is_what_is_raised(cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers run, and torch watches them by now: it must not complain that they are killed."""
    loader, put = make(cfg, 2), _MultiProcessingDataLoaderIter._try_put_index

    def interrupted(iterator: Any) -> None:
        put(iterator)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(_MultiProcessingDataLoaderIter, "_try_put_index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            iter(loader)
    assert multiprocessing.active_children() == []
    assert len(list(loader)) == len(loader)


def interrupted(real: Any, number: int) -> Any:
    """Do what `real` does, and be interrupted when that is done for the time of a number."""
    left, pid = itertools.count(1), os.getpid()

    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if os.getpid() == pid and next(left) == number:
            raise KeyboardInterrupt
        return result

    return call


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("where", ["fork", "process", "queue", "put", "feeder"])
def test_an_interrupt_while_workers_start_leaves_nothing(
    cfg: ShuffledConfig, epochs: Any, where: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a fork multiprocessing does not know the worker yet; threads that feed queues start with the first put."""
    owner, name = {
        "fork": (os, "fork"),
        "process": (multiprocessing.get_context("fork").Process, "start"),
        "queue": (multiprocessing.queues.Queue, "__init__"),
        "put": (multiprocessing.queues.Queue, "put"),
        "feeder": (multiprocessing.queues.Queue, "_start_thread"),
    }[where]
    loader = make(cfg, 3)
    gc.collect()
    before = Resources.now()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted(getattr(owner, name), number))
        with pytest.raises(KeyboardInterrupt) as kept:
            iter(loader)
    # The exception is kept, and with it some pipes.
    kinds = ("child process", "thread")
    wait_until(lambda: not any(one.startswith(kinds) for one in before.since(Resources.now())))
    del kept
    assert before.leaks_now(PATIENCE_S / 2) == []
    loader.set_epoch(1)
    contracts.assert_same(list(loader), epochs[1])


@pytest.mark.parametrize("is_last", [False, True])
def test_an_interrupt_while_a_worker_is_told_something(
    cfg: ShuffledConfig, epochs: Any, is_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may leave the lock of a queue held, for which the end of the workers would wait for ever."""
    loader, real, interrupted_at = make(cfg, 2), multiprocessing.queues.Queue.put, []
    rescues: list[threading.Timer] = []
    batches = iter(loader)
    next(batches)

    def put(queue: Any, value: Any) -> None:
        # A worker that has no more batches is told so, by None.
        if not interrupted_at and (value is None) == is_last:
            interrupted_at.append(value)
            queue._notempty.acquire()
            # So that this test ends in any case.
            rescues.append(threading.Timer(8.0, queue._notempty.release))
            rescues[0].start()
            raise KeyboardInterrupt
        real(queue, value)

    with monkeypatch.context() as patched:
        patched.setattr(multiprocessing.queues.Queue, "put", put)
        with pytest.raises(KeyboardInterrupt):
            list(batches)
    was_rescued = not rescues[0].is_alive()
    rescues[0].cancel()
    rescues[0].join()
    assert not was_rescued
    assert multiprocessing.active_children() == []
    loader.set_epoch(1)
    contracts.assert_same(list(loader), epochs[1])


class Owner:
    """Something that has a finalizer, as descriptors, pages, leases and engines have."""


@pytest.mark.parametrize("then", ["loader", "data set", "shutdown"])
def test_a_finalizer_that_was_interrupted_is_called_later(
    cfg: ShuffledConfig, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops the interrupt, and does not call the finalizer again by itself."""
    # pytest's would keep the frames.
    monkeypatch.setattr(sys, "unraisablehook", lambda args: None)
    closed: list[int] = []
    loader, owner, tracing = make(cfg, 0), Owner(), sys.gettrace()
    weakref.finalize(owner, closed.append, 1)

    def interrupt(frame: Any, event: str, arg: Any) -> None:
        # A tracer that raises is removed.
        if frame.f_code is weakref.finalize.__call__.__code__:
            raise KeyboardInterrupt

    try:
        sys.settrace(interrupt)
        del owner
    finally:
        sys.settrace(tracing)
    assert closed == []
    if then == "shutdown":
        loader.shutdown()
    else:
        next(iter(loader if then == "loader" else loader.dataset))
    assert closed == [1]


_AT_EXIT = """
import atexit, sys, threading
def report():
    print([t.name for t in threading.enumerate() if t.name.startswith("saev_torch")])
atexit.register(report)  # called after what is registered later
from saev_torch import ShuffledConfig, ShuffledDataLoader
loader = ShuffledDataLoader(ShuffledConfig(shards=sys.argv[1], layer=3, batch_size=16, buffer_size=4))
batches = iter(loader)
next(batches)
"""


def test_no_thread_of_ours_runs_when_the_interpreter_goes(cfg: ShuffledConfig) -> None:
    command = [sys.executable, "-c", _AT_EXIT, str(cfg.shards)]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


_WITH_A_DAEMON = """
import atexit, os, sys, threading
def report():
    # The last that is called: the user's thread is where nothing wakes it any more.
    print(leaving._consumers == leaving._parked != set(), flush=True)
atexit.register(report)
import torch
from saev_torch import IndexedConfig, IndexedDataset, ShuffledActivations, ShuffledConfig, ShuffledDataLoader
from saev_torch.processes import interrupts, leaving
kind, n_workers = sys.argv[2], int(sys.argv[3])
cfg = ShuffledConfig(shards=sys.argv[1], layer=3, batch_size=16, buffer_size=4)
options = {"num_workers": n_workers, "multiprocessing_context": "fork" if n_workers else None}
if kind == "ready":
    loader = ShuffledDataLoader(cfg, **options)
elif kind == "plain":
    loader = torch.utils.data.DataLoader(ShuffledActivations(cfg), batch_size=None, **options)
else:
    data_set = IndexedDataset(IndexedConfig(shards=sys.argv[1], layer=3))
    loader = torch.utils.data.DataLoader(data_set, batch_size=16, **options)
started = threading.Event()
def train():
    n_steps = 0
    while True:
        for batch in loader:
            # Long enough that it is in native code most of the time.
            (torch.ones(400, 400) @ torch.ones(400, 400)).sum()
            n_steps += 1
            if n_steps == 5:
                started.set()
threading.Thread(target=train, daemon=True).start()
started.wait(60)
"""


@pytest.mark.parametrize(("kind", "n_workers"), [("ready", 1), ("plain", 0), ("indexed", 0)])
def test_a_users_daemon_thread_is_at_rest_when_the_interpreter_goes(
    cfg: ShuffledConfig, kind: str, n_workers: int
) -> None:
    """Else torch's native code, which it then comes out of, aborts the process: 10 of 120 times."""
    command = [sys.executable, "-c", _WITH_A_DAEMON, str(cfg.shards), kind, str(n_workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_thread_that_waits_for_another_does_not_keep_the_interpreter() -> None:
    """As one that puts batches into a queue which nobody empties."""
    frames: list[Any] = []
    go_on = threading.Event()
    thread = threading.Thread(target=lambda: go_on.wait(60))
    thread.start()
    while not frames or frames[0].f_code.co_name != "wait":
        frames[:] = [sys._current_frames()[thread.ident or 0]]
    assert not leaving._is_busy(frames[0])
    assert leaving._is_busy(sys._getframe())
    go_on.set()
    thread.join(PATIENCE_S)
    frames.clear()
