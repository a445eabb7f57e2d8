"""How far work of minutes to hours has come, on stderr: a bar of tqdm on a terminal, else a line a minute."""

import contextlib
import datetime
import sys
import threading
import time
from typing import Any, Self

from saev_torch.processes.threads import Thread

_EVERY_S = 60.0


class Progress:
    """What has been done of some work, shown while its `with` block runs. Of units, "B" is shown as MB.

    With `enabled` it is always shown, with False never. None is as True on a terminal; elsewhere, as in a batch job, it
    says nothing of work that is done in a minute. Lines come for each new description, each minute, however long a
    single step takes, and at the end.
    """

    def __init__(self, total: int, what: str, unit: str, enabled: bool | None = None) -> None:
        self._total, self._what, self._unit, self._enabled = total, what, unit, enabled
        self._first = self._done = 0
        self._more = ""
        self._says_end = False
        self._bar: Any = None
        self._over = threading.Event()
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._enabled is not False:
            is_terminal = sys.stderr.isatty()
            self._says_end = is_terminal or self._enabled is True
            self._bar = self._draw() if is_terminal else None
            if self._bar is None:
                self._thread = Thread(self._say_each_minute, "progress")
                self._thread.start()
        return self

    def _draw(self) -> Any:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            return None  # It comes with the extra `demo`.
        is_bytes = self._unit == "B"
        unit = "B" if is_bytes else f" {self._unit}"
        return tqdm(total=self._total, desc=self._what, unit=unit, unit_scale=is_bytes, dynamic_ncols=True)

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
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

    def conclude(self, what: str) -> None:
        """Say something more at the end."""
        self._more = f"; {what}"
        if self._bar is not None:
            self._bar.set_postfix_str(what)

    def skip(self, n: int) -> None:
        """Count `n` units as done before, which took no time."""
        self._first += n
        self._done += n
        if self._bar is not None:
            self._bar.initial = self._first
            self._bar.n = self._done
            self._bar.refresh()

    def update(self, n: int) -> None:
        """Count `n` units as done."""
        self._done += n
        if self._bar is not None:
            self._bar.update(n)

    def _say_each_minute(self) -> None:
        # A stderr that is closed meanwhile is no reason to fail.
        with contextlib.suppress(OSError, ValueError):
            while not self._over.wait(_EVERY_S):
                self._say()

    def _say(self) -> None:
        if self._enabled is False:
            return
        self._says_end = True
        share = self._done / self._total if self._total else 1.0
        unit, scale = ("MB", 1e6) if self._unit == "B" else (self._unit, 1.0)
        line = f"{self._what}: {share:.0%} ({self._done / scale:,.0f} of {self._total / scale:,.0f} {unit}"
        if self._done > self._first:
            spent_s = time.monotonic() - self._started
            left_s = spent_s * (self._total - self._done) / (self._done - self._first)
            line += f", {datetime.timedelta(seconds=round(left_s))} left"
        sys.stderr.write(f"{line}{self._more})\n")
        sys.stderr.flush()
