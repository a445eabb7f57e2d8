"""Work that no interrupt comes into: handlers of signals are called when it is done.

Python calls them between any two of its instructions. What they raise, as Ctrl-C does, would leave a pipe that nobody
knows, a thread that waits for ever for a lock of `threading`, or one that is taken for over while it runs; and behind a
fork it would be dropped without a word.
"""

import contextlib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

_T = TypeVar("_T")

# Who asks again so long after the first time is heard at once: the work may hang.
_PATIENCE_S = 1.0
# Without the enumerations that Python wraps around them, which take 100 us for all signals.
_get: Callable[[int], Any] = inspect.unwrap(signal.getsignal)
_set: Callable[[int, Any], Any] = inspect.unwrap(signal.signal)
# torch sets its own for ends of processes while it starts some, and keeps what it finds.
_NUMBERS = sorted(set(map(int, signal.valid_signals())) - {int(signal.SIGCHLD)})


class _Deferral:
    """Stands for the handlers of signals, and notes which are due."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._set: list[int] = []
        self._due: dict[int, float] = {}

    def begin(self) -> None:
        # Only the interpreter that a program began with may set handlers, where others run in the same process.
        with contextlib.suppress(ValueError):
            self._begin()

    def _begin(self) -> None:
        for number in _NUMBERS:
            handler = _get(number)
            if callable(handler):
                self._handlers[number] = handler
                self._set.append(number)
                _set(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._due.setdefault(number, now) >= _PATIENCE_S:
            del self._due[number]
            self._handlers[number](number, frame)

    def end(self) -> None:
        """Set the handlers that were there, but where the work has set one; also if one of them raises meanwhile."""
        try:
            while self._set:
                number = self._set[-1]
                if _get(number) == self._note:
                    _set(number, self._handlers[number])
                self._set.pop()
        finally:
            if self._set:
                self.end()

    def tell(self) -> None:
        """Call the handlers that are due, all of them, and raise what they raise."""
        try:
            while self._due:
                number, _ = self._due.popitem()
                self._handlers[number](number, sys._getframe())
        finally:
            if self._due:
                self.tell()

    def forget(self) -> None:
        """Let nothing be due: a signal was for the process that this one was forked from."""
        self.end()
        self._due.clear()


_deferral: _Deferral | None = None


def whole(work: Callable[[], _T], is_going: Callable[[], bool] = sys.is_finalizing) -> _T:
    """Do some work, and let handlers of signals wait meanwhile; what they raise is raised then, and the result dropped.

    Python calls them in the main thread only. A signal that comes again after a second does not wait.
    """
    global _deferral
    if is_going():
        # The interpreter goes, and modules may be empty already; what was bound above is not.
        return work()
    if _deferral is not None or threading.get_ident() != threading.main_thread().ident:
        return work()
    deferral = _Deferral()
    try:
        _deferral = deferral
        deferral.begin()
        return work()
    finally:
        _deferral = None
        try:
            deferral.end()
        finally:
            # Also those beside one that came just now, and raised.
            deferral.tell()


def _begin_anew() -> None:
    global _deferral
    deferral, _deferral = _deferral, None
    if deferral is not None:
        deferral.forget()


os.register_at_fork(after_in_child=_begin_anew)
