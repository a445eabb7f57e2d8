"""What must be over before the interpreter goes: a thread that then wakes up in native code aborts the process."""

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

# How long the exit may wait for a consumer to leave native code.
_WAIT_S = 1.0


class Gate:
    """Work in native code is done within `with gate`; when the interpreter exits, none begins any more.

    At exit, `close` is called, if there is one. A daemon thread that comes to the gate then stays there.
    """

    def __init__(self) -> None:
        self.close: Callable[[], Any] | None = None
        self._lock = threading.Lock()
        _gates.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        if _is_exiting and threading.current_thread() is not threading.main_thread():
            self._lock.release()
            threading.Event().wait()

    def __exit__(self, *args: object) -> None:
        self._lock.release()

    def _leave(self) -> None:
        has_lock = self._lock.acquire(timeout=_WAIT_S)
        if self.close is not None:
            self.close()
        if has_lock:
            self._lock.release()


_gates: "weakref.WeakSet[Gate]" = weakref.WeakSet()
_is_exiting = False


@atexit.register
def _leave() -> None:
    global _is_exiting
    _is_exiting = True
    for gate in tuple(_gates):
        gate._leave()


# A forked child has none of the threads.
os.register_at_fork(after_in_child=_gates.clear)
