"""What is being read, for who waits for it: the clock of a stall, which each read that finishes sets back."""

import time
from collections.abc import Callable
from typing import Any

from saev_torch.errors import StalledReadError
from saev_torch.processes.counters import Waits
from saev_torch.processes.idling import Idle
from saev_torch.reading.reader import Spot
from saev_torch.reading.store import Files


class Reads:
    """What some threads are reading from a store, each at its spot; `waits` counts what they have read."""

    def __init__(self, store: Files, spots: list[Spot], waits: Waits) -> None:
        self._store, self._spots, self.waits = store, spots, waits

    def look(self) -> Any:
        """Return what is another thing whenever a read has finished."""
        return self.waits.n_events, [spot.look() for spot in tuple(self._spots)]

    def describe(self) -> str:
        """Which reads are under way, and since when."""
        now, reads = time.monotonic(), []
        for spot in tuple(self._spots):
            if (where := spot.where) is not None:
                shard, offset = where()
                reads.append(f"{self._store.path(shard)} at offset {offset} for {now - spot.since:.1f} s")
        return "reading " + "; ".join(reads) if reads else "no read is under way, so the machine is overloaded"


OnWait = Callable[[bool, float, Callable[[], str]], None]
"""Called a few times a second while a batch is awaited: whether reads go on, for how long, and what is read."""


class Patience(Idle):
    """How long a consumer waits for a batch: until no read has finished for `timeout_s` seconds."""

    def __init__(self, timeout_s: float, reads: Reads, on_wait: OnWait | None) -> None:
        super().__init__(timeout_s, reads.look)
        self._reads, self._on_wait = reads, on_wait
        self._waited_s, self._nbytes = 0.0, reads.waits.n_read

    def note(self, waited_s: float) -> bool:
        """As `Idle`, and let others know."""
        goes_on = super().note(waited_s)
        self._waited_s += min(waited_s, self.step_s)
        if self._on_wait is not None:
            self._on_wait(goes_on, self._waited_s, self._describe)
        return goes_on

    def error(self) -> StalledReadError:
        """What to raise when it is over."""
        return StalledReadError(
            f"batch_timeout_s: expected a batch within {self._timeout_s} s, got none: {self._reads.describe()}. No "
            "read finished meanwhile: check the file system, or raise batch_timeout_s."
        )

    def _describe(self) -> str:
        megabytes = (self._reads.waits.n_read - self._nbytes) / 1e6
        return f"{megabytes:.1f} MB were read meanwhile, {megabytes / max(self._waited_s, 1e-9):.2f} MB/s; now " + (
            self._reads.describe()
        )
