"""A thread that is waited for until it has ended, whatever interrupts."""

import _thread
import os
import threading
import time
from collections.abc import Callable

# How long to wait before looking again: who was interrupted between two lines may have kept the lock.
_LOOK_S = 1.0


class Thread(threading.Thread):
    """A daemon, because a read that hangs must not keep the interpreter from exiting.

    Before 3.13, Python takes a thread for ended once an interrupt comes into `join` or `is_alive`, though it goes on
    (https://github.com/python/cpython/issues/90882). What it reads to would then be used again.
    """

    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self._pid, self._is_over, self._over = os.getpid(), False, _thread.allocate_lock()
        self._over.acquire()

    def run(self) -> None:
        """Do what it is for."""
        try:
            super().run()
        finally:
            self._is_over = True
            self._over.release()

    def is_alive(self) -> bool:
        """Whether it was started and goes on, in this process."""
        return self.ident is not None and not self._is_over and self._pid == os.getpid()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, or for so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.is_alive():
            left = _LOOK_S if deadline is None else min(_LOOK_S, deadline - time.monotonic())
            if self._over.acquire(timeout=max(0.0, left)):
                self._over.release()
            elif deadline is not None and time.monotonic() >= deadline:
                return
