"""How long nothing has happened, for who waits; time in which the waiter itself did not run is none."""

import threading
from collections.abc import Callable
from typing import Any

_STEP_S = 0.25


class Idle:
    """Whether nothing has happened for `timeout_s` seconds: what `look` returns is the same all the time.

    The waiter waits at most `step_s` at a time, and notes how long it took. More than that is the time in which it was
    stopped, as its container or its machine may be, or in which others had the processor; then nobody could have done
    anything, and it does not count.
    """

    def __init__(self, timeout_s: float, look: Callable[[], Any]) -> None:
        self._timeout_s, self._look = timeout_s, look
        self.step_s = min(_STEP_S, timeout_s / 4, threading.TIMEOUT_MAX)
        self._seen = look()
        self._idle_s = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        return self._idle_s >= self._timeout_s

    def note(self, waited_s: float) -> bool:
        """Note that the waiter has waited, and look; whether something has happened."""
        seen = self._look()
        has_changed = bool(seen != self._seen)
        self._seen = seen
        self._idle_s = 0.0 if has_changed else self._idle_s + min(waited_s, self.step_s)
        return has_changed
