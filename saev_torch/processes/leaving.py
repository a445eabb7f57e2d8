"""What must be over before the interpreter goes: a thread that then comes out of native code aborts the process.

That is so for native code in C++, torch's, which a user's own daemon thread runs too: for each batch that it takes it
comes by here, and at exit that is as far as it gets.
"""

import atexit
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import (
    active_children,
    process,
    util,  # noqa: F401 -- what it does at exit was registered before, so it comes after what is done here
)
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from saev_torch.processes.locks import members

# How long the exit may wait for threads to come by; for processes to end when they are asked to; when they are killed.
_WAIT_S, _ASK_S, _KILL_S = 1.0, 1.0, 1.0

_gates: "weakref.WeakSet[Gate]" = weakref.WeakSet()
_is_exiting = False
_consumers: set[int] = set()
"""Threads that have come by, but for the main one; those that have stopped here are in `_parked`, too."""
_parked: set[int] = set()


def come_by() -> None:
    """Called by threads that take batches, before and after native code of ours; a daemon thread stays here at exit."""
    number = threading.get_ident()
    if number == threading.main_thread().ident:
        return
    _consumers.add(number)
    if _is_exiting:
        _park(number)


def _park(number: int) -> NoReturn:
    _parked.add(number)
    while True:
        threading.Event().wait()


class Gate:
    """Work in native code is done within `with gate`; when the interpreter exits, `close` is called, if there is one.

    Then none begins any more, and none that has begun goes on behind it.
    """

    def __init__(self) -> None:
        self.close: Callable[[], Any] | None = None
        _gates.add(self)

    def __enter__(self) -> None:
        come_by()

    def __exit__(self, *args: object) -> None:
        come_by()


def _is_busy(frame: FrameType | None) -> bool:
    """Whether a thread may come out of native code soon: not where it waits for another, in a program's own code."""
    if frame is not None and frame.f_globals.get("__name__") not in ("threading", "queue"):
        return True
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in ("saev_torch", "torch"):
            return True
        frame = frame.f_back
    return False


def _wait_for_consumers() -> None:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        frames = sys._current_frames()
        left = [number for number in tuple(_consumers) if number in frames and number not in _parked]
        if not any(_is_busy(frames[number]) for number in left):
            return
        del frames
        time.sleep(0.002)


def end_processes(processes: Sequence[process.BaseProcess], ask_s: float = 0.0) -> list[int]:
    """Ask child processes to end, kill those that have not done so in time, and forget those that cannot be killed.

    One that waits in the operating system for a read that does not return cannot. It would be waited for for ever when
    this process exits.

    Returns:
        The process ids of those that are left behind.
    """
    if ask_s:
        for one in processes:
            one.terminate()
        _join(processes, ask_s)
    for one in processes:
        if one.is_alive():
            one.kill()
    _join(processes, _KILL_S)
    left = [one for one in processes if one.is_alive()]
    # A private set, but there is no other way to let the exit of this process not join them.
    process._children.difference_update(left)  # type: ignore[attr-defined]
    return [one.pid for one in left if one.pid is not None]


def _join(processes: Sequence[process.BaseProcess], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for one in processes:
        one.join(max(0.0, deadline - time.monotonic()))


def _may_read(pid: int | None) -> bool:
    """Whether a child process may be a worker that reads: by pages of ours, or by the name that torch gives workers."""
    try:
        name, maps = Path(f"/proc/{pid}/comm").read_text(), Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False
    # Of one that has ended, but for threads that hang, no more can be told.
    return not maps or "memfd:saev_torch" in maps or name.startswith("pt_data_worker")


def _close_gates() -> None:
    for gate in members(_gates):
        if gate.close is not None:
            gate.close()


def _leave() -> None:
    global _is_exiting
    _is_exiting = True
    _close_gates()
    _wait_for_consumers()
    # What was only just being opened.
    _close_gates()
    # Workers of a plain DataLoader, which multiprocessing is about to end in the same way, but without a limit of time.
    workers = [one for one in active_children() if one.daemon and _may_read(one.pid)]
    if workers and threading.current_thread() is threading.main_thread():
        # torch's handler would raise an error for each that has to be killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_processes(workers, _ASK_S)


atexit.register(_leave)


def _begin_anew() -> None:
    # A forked child has none of the threads.
    for mine in (_gates, _consumers, _parked):
        mine.clear()


os.register_at_fork(after_in_child=_begin_anew)
