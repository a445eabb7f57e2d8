"""A progress bar with an estimate of the time left, on stderr, for work of minutes to hours."""

import sys
import time
from types import TracebackType
from typing import Self

__all__ = ["Progress"]

_EVERY_S = 0.2
_WIDTH = 24


class Progress:
    """A bar that is drawn while its `with` block runs.

    Args:
        total: Units of all the work.
        what: What is being done, for instance "recording".
        unit: What is counted; "B" is shown as MB and MB/s.
        enabled: Whether to draw; None for yes where stderr is a terminal.
        done: Units that were done before.
    """

    def __init__(self, total: int, what: str, unit: str, enabled: bool | None = None, done: int = 0) -> None:
        self._total, self._what = total, what
        self._unit, self._scale = ("MB", 1e6) if unit == "B" else (unit, 1.0)
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._done = self._first = done
        self._started = time.monotonic()
        self._drawn = 0.0

    def __enter__(self) -> Self:
        """Begin to count the time."""
        self._started = time.monotonic()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Draw the last state and leave the line."""
        if self._enabled:
            self._draw()
            sys.stderr.write("\n")
            sys.stderr.flush()

    def begin(self, what: str) -> None:
        """Say what is done from now on; where no bar is drawn, in a line of its own."""
        self._what = what
        if self._enabled:
            self._draw()
        else:
            sys.stderr.write(f"{what} ({self._done} of {self._total} {self._unit} done)\n")

    def update(self, n: int) -> None:
        """Count `n` units as done."""
        self._done += n
        if self._enabled and time.monotonic() - self._drawn >= _EVERY_S:
            self._draw()

    def _draw(self) -> None:
        self._drawn = now = time.monotonic()
        spent = max(now - self._started, 1e-9)
        rate = (self._done - self._first) / spent
        share = self._done / self._total if self._total else 1.0
        left = f"{_clock((self._total - self._done) / rate)} left" if rate > 0 else "? left"
        bar = ("#" * round(_WIDTH * share)).ljust(_WIDTH, ".")
        counts = f"{self._done / self._scale:,.0f}/{self._total / self._scale:,.0f} {self._unit}"
        line = f"{self._what} [{bar}] {100 * share:3.0f} % {counts}, {rate / self._scale:,.0f} {self._unit}/s, "
        sys.stderr.write(f"\r{line}{_clock(spent)}, {left}\x1b[K")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
