"""When more threads help: as many read as there are cores, and the others join where a disk is waited for."""

import threading
import time

# A thread that reads fewer bytes than this in a second, calls aside, waits for a disk; a call may take so long.
_SLOW_NBYTES_PER_S = 1.5e9
_CALL_S = 20e-6
# Threads beyond the number of cores begin to read when one of the others takes this long.
_HELP_AFTER_S = 0.02


class Pace:
    """How fast some threads read. They share it; a figure that is a moment old does no harm, so there is no lock.

    Args:
        n_regular: Threads that always read. Threads that share a core only take time from each other.

    Attributes:
        is_slow: Whether the latest read waited for a disk.
    """

    def __init__(self, n_regular: int) -> None:
        self.is_slow = False
        self._n_regular = n_regular
        self._done_at = time.monotonic()

    def note(self, nbytes: int, n_calls: int, seconds: float) -> None:
        """Note that a read of `nbytes` bytes in `n_calls` calls took so many seconds."""
        self._done_at = time.monotonic()
        self.is_slow = seconds > nbytes / _SLOW_NBYTES_PER_S + n_calls * _CALL_S

    def wait_s(self, number: int) -> float | None:
        """How long thread `number`, from 0, is to wait before it takes a task; None for not at all."""
        if number < self._n_regular or self.is_slow:
            return None
        left = self._done_at + _HELP_AFTER_S - time.monotonic()
        return None if left <= 0 else min(left, threading.TIMEOUT_MAX)
