"""How far work of minutes to hours has come, on stderr: a bar of tqdm on a terminal, else a line now and then."""

import datetime
import sys
import time
from types import TracebackType
from typing import Any, Self

_EVERY_S = 30.0


class Progress:
    """What has been done of some work, shown while its `with` block runs.

    Args:
        total: Units of all the work.
        what: What is being done, for instance "recording".
        unit: What is counted; "B" is shown as MB.
        enabled: True to show it, False for never; None is as True on a terminal, and elsewhere, as in a batch job, says
            nothing of work that is done in half a minute.
        done: Units that were done before.
    """

    def __init__(self, total: int, what: str, unit: str, enabled: bool | None = None, done: int = 0) -> None:
        self._total, self._what, self._unit, self._enabled, self._done = total, what, unit, enabled, done
        self._bar: Any = None

    def __enter__(self) -> Self:
        """Begin to count the time."""
        if self._enabled is not False:
            is_terminal = sys.stderr.isatty()
            self._bar = self._draw() if is_terminal else None
            if self._bar is None:
                says_end = is_terminal or self._enabled is True
                self._bar = _Lines(self._total, self._what, self._unit, self._done, says_end)
        return self

    def _draw(self) -> Any:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            return None  # It comes with the extra `demo`.
        is_bytes = self._unit == "B"
        unit = "B" if is_bytes else f" {self._unit}"
        return tqdm(
            total=self._total, initial=self._done, desc=self._what, unit=unit, unit_scale=is_bytes, dynamic_ncols=True
        )

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Show the last state."""
        if self._bar is not None:
            self._bar.close()

    def begin(self, what: str) -> None:
        """Say what is done from now on."""
        if self._bar is not None:
            self._bar.set_description(what)

    def update(self, n: int) -> None:
        """Count `n` units as done."""
        if self._bar is not None:
            self._bar.update(n)


class _Lines:
    """What Progress uses of tqdm, in lines: one for each new description, one each half a minute, one at the end."""

    def __init__(self, total: int, what: str, unit: str, done: int, says_end: bool) -> None:
        self._total, self._what, self._done, self._says_end = total, what, done, says_end
        self._unit, self._scale = ("MB", 1e6) if unit == "B" else (unit, 1.0)
        self._first, self._started = done, time.monotonic()
        self._said = self._started

    def set_description(self, what: str) -> None:
        self._what = what
        self._say()

    def update(self, n: int) -> None:
        self._done += n
        if time.monotonic() - self._said >= _EVERY_S:
            self._say()

    def close(self) -> None:
        if self._says_end:
            self._say()

    def _say(self) -> None:
        self._said, self._says_end = time.monotonic(), True
        share = self._done / self._total if self._total else 1.0
        line = f"{self._what}: {share:.0%} ({self._done / self._scale:,.0f} of {self._total / self._scale:,.0f} "
        line += self._unit
        if self._done > self._first:
            left_s = (self._said - self._started) * (self._total - self._done) / (self._done - self._first)
            line += f", {datetime.timedelta(seconds=round(left_s))} left"
        sys.stderr.write(f"{line})\n")
        sys.stderr.flush()
