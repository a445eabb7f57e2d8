"""How far work of minutes to hours has come, on stderr: a bar of tqdm on a terminal, else a line now and then."""

import datetime
import sys
import time
from typing import Any, Self

_EVERY_S = 30.0


class Progress:
    """What has been done of some work, shown while its `with` block runs. Of units, "B" is shown as MB.

    With `enabled` it is always shown, with False never. None is as True on a terminal; elsewhere, as in a batch job, it
    says nothing of work that is done in half a minute. Lines come for each new description, each half a minute, and at
    the end.
    """

    def __init__(self, total: int, what: str, unit: str, enabled: bool | None = None, done: int = 0) -> None:
        self._total, self._what, self._unit, self._enabled = total, what, unit, enabled
        self._first = self._done = done
        self._says_end = False
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._started = self._said = time.monotonic()
        if self._enabled is not False:
            is_terminal = sys.stderr.isatty()
            self._says_end = is_terminal or self._enabled is True
            self._bar = self._draw() if is_terminal else None
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

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._says_end:
            self._say()

    def begin(self, what: str) -> None:
        """Say what is done from now on."""
        self._what = what
        if self._bar is not None:
            self._bar.set_description(what)
        else:
            self._say()

    def update(self, n: int) -> None:
        """Count `n` units as done."""
        self._done += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._said >= _EVERY_S:
            self._say()

    def _say(self) -> None:
        if self._enabled is False:
            return
        self._said, self._says_end = time.monotonic(), True
        share = self._done / self._total if self._total else 1.0
        unit, scale = ("MB", 1e6) if self._unit == "B" else (self._unit, 1.0)
        line = f"{self._what}: {share:.0%} ({self._done / scale:,.0f} of {self._total / scale:,.0f} {unit}"
        if self._done > self._first:
            left_s = (self._said - self._started) * (self._total - self._done) / (self._done - self._first)
            line += f", {datetime.timedelta(seconds=round(left_s))} left"
        sys.stderr.write(f"{line})\n")
        sys.stderr.flush()
