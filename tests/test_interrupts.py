"""What no signal handler comes into, and what is told it afterwards."""

import _thread
import collections
import operator
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader

from saev_torch import (
    IndexedConfig,
    IndexedDataset,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
)
from saev_torch.processes import interrupts
from saev_torch.processes.interrupts import whole
from saev_torch.processes.threads import Thread
from saev_torch.processes.undone import close_with
from saev_torch.reading.crew import Task, run_tasks
from saev_torch.reading.reader import Pace

NUMBERS = (signal.SIGUSR1, signal.SIGINT)


class ToldError(Exception):
    """What a handler raises."""


@pytest.fixture
def told() -> Iterator[list[int]]:
    found: list[int] = []

    def tell(number: int, frame: Any) -> None:
        found.append(number)
        raise ToldError

    before = [signal.signal(number, tell) for number in NUMBERS]
    yield found
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_handlers_wait_until_the_work_is_done(told: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever asks twice is heard after a second, which may go by here on a busy machine.
    monkeypatch.setattr(interrupts, "_PATIENCE_S", 1e9)
    done: list[int] = []
    handlers = [signal.getsignal(number) for number in NUMBERS]

    def work() -> None:
        send(*NUMBERS)
        assert whole(lambda: send(signal.SIGUSR1)) is None
        assert told == []
        done.append(1)

    with pytest.raises(ToldError):
        whole(work)
    assert (done, sorted(told)) == ([1], sorted(NUMBERS))
    assert [signal.getsignal(number) for number in NUMBERS] == handlers
    assert whole(lambda: 3) == 3


def test_what_fails_tells_too(told: list[int]) -> None:
    with pytest.raises(ToldError) as caught:
        whole(lambda: (send(signal.SIGUSR1), {}["key"]))
    assert isinstance(caught.value.__context__, KeyError)


def test_what_comes_at_the_end_does_not_keep_others_from_being_told(
    told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = interrupts._set

    def interrupted(number: int, handler: Any) -> None:
        real(number, handler)
        if number == signal.SIGUSR1 and interrupts._deferral is None:
            send(number)

    monkeypatch.setattr(interrupts, "_set", interrupted)
    with pytest.raises(ToldError):
        whole(lambda: send(signal.SIGINT))
    assert told == [signal.SIGUSR1, signal.SIGINT]


def test_who_asks_again_is_heard_at_once(told: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_PATIENCE_S", 0.05)
    done: list[int] = []
    with pytest.raises(ToldError):
        whole(lambda: (send(signal.SIGINT), time.sleep(0.1), send(signal.SIGINT), done.append(1)))
    assert (told, done) == ([signal.SIGINT], [])


def test_a_handler_that_the_work_sets_stays(told: list[int]) -> None:
    whole(lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN))
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_a_forked_child_has_the_handlers(told: list[int]) -> None:
    handler = signal.getsignal(signal.SIGINT)

    def fork() -> int:
        send(signal.SIGINT)
        pid = os.fork()
        if not pid:
            os._exit(signal.getsignal(signal.SIGINT) is handler and not told)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    status: list[int] = []
    with pytest.raises(ToldError):
        whole(lambda: status.append(fork()))
    assert status == [1]


def test_another_thread_is_left_alone(told: list[int]) -> None:
    handler, seen = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: whole(lambda: seen.append(signal.getsignal(signal.SIGINT))))
    thread.start()
    thread.join()
    assert seen == [handler]


class Owner:
    """Something that has a descriptor."""


def test_no_interrupt_keeps_a_descriptor_open() -> None:
    """Python runs no line of its own to close it: a tracer, which sees all, sees none."""
    owner, (receiver, sender) = Owner(), os.pipe()
    close_with(owner, sender)
    lines: list[Any] = []
    tracing = sys.gettrace()
    try:
        sys.settrace(lambda frame, *_: lines.append(frame.f_code))
        del owner
    finally:
        sys.settrace(tracing)
    assert (os.read(receiver, 1), lines) == (b"", [])
    os.close(receiver)


def test_a_descriptor_is_closed_once() -> None:
    owner, (receiver, sender) = Owner(), os.pipe()
    close = close_with(owner, sender)
    close()
    other = os.dup(receiver)
    close()
    gone = weakref.ref(owner)
    del owner
    assert gone() is None
    # It has the number of what was closed.
    assert other == sender
    os.fstat(other)
    os.close(other)
    os.close(receiver)


def test_where_the_interpreter_goes_the_work_is_just_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that a script has left closes its engine once more when modules have been emptied."""
    monkeypatch.setattr(interrupts, "signal", None)
    monkeypatch.setattr(interrupts, "threading", None)
    assert interrupts.whole(lambda: 5, lambda: True) == 5


def send_soon(number: int, seconds: float = 0.05) -> threading.Timer:
    """To the main thread, which waits in one call meanwhile."""
    timer = threading.Timer(seconds, signal.pthread_kill, (threading.main_thread().ident, number))
    timer.start()
    return timer


def test_a_thread_goes_on_where_an_interrupt_came_into_its_join(told: list[int]) -> None:
    """Python 3.11 and 3.12 take it for ended, and join it no more."""
    go_on, ended = threading.Event(), []
    thread = Thread(lambda: ended.append(go_on.wait(60)), "waits")
    assert not thread.is_alive()
    thread.join()
    thread.start()
    for _ in range(3):
        timer = send_soon(signal.SIGUSR1)
        with pytest.raises(ToldError):
            thread.join()
        timer.join()
        assert thread.is_alive()
    began = time.monotonic()
    thread.join(0.1)
    assert time.monotonic() - began >= 0.1
    assert (ended, thread.is_alive()) == ([], True)
    go_on.set()
    thread.join()
    assert (ended, thread.is_alive()) == ([True], False)
    thread.join()


def test_tasks_are_waited_for_where_an_interrupt_comes(told: list[int]) -> None:
    """What they read to is used again."""
    n, begun, ended = 3, threading.Semaphore(0), []

    def work(reader: Any) -> None:
        begun.release()
        # The first is waited for first.
        time.sleep(0.8 if threading.current_thread().name.endswith("0") else 0.2)
        ended.append(1)

    def interrupt() -> None:
        for _ in range(n):
            begun.acquire()
        # Till all have been started.
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    sender = threading.Thread(target=interrupt)
    sender.start()
    with pytest.raises(ToldError):
        run_tasks("waits", n, Pace(n), lambda pace: SimpleNamespace(spot=None), iter([Task(work)] * n))
    assert len(ended) == n
    sender.join()


LOADERS: dict[str, Callable[[ShuffledConfig], Any]] = {
    "plain": lambda cfg: DataLoader(ShuffledActivations(cfg), batch_size=None, num_workers=2),
    "ready-made": lambda cfg: ShuffledDataLoader(cfg, num_workers=1),
    "random access": lambda cfg: map(
        IndexedDataset(IndexedConfig(cfg.shards, layer=7)).__getitems__, zip(range(20), range(20), strict=True)
    ),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_an_interrupt_is_heard_that_comes_while_a_batch_is_dropped(
    make: Callable[[ShuffledConfig], Any], make_shards: Any, told: list[int]
) -> None:
    """Python drops what a finalizer of its own raises: none of those of a batch is one."""
    cfg = ShuffledConfig(make_shards(n_examples=60), layer=7, batch_size=12, buffer_size=2)
    batches = iter(make(cfg))
    for n in range(5):
        held = [next(batches)]
        # All of it is in C, so that handlers are called at the next instruction of Python's, wherever that is.
        steps = map(operator.call, (_thread.interrupt_main, held.clear))
        with pytest.raises(ToldError):
            collections.deque(steps, maxlen=0)
        assert (held, len(told)) == ([], n + 1)
    assert sum(1 for _ in batches) > 5
