"""What was written and may not be on disk yet, and the thread that forces it there."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

from saev_torch.writing.journal import Entry
from saev_torch.writing.unfinished import Unfinished

_SYNC_NBYTES = 256 << 20  # At most about so much is written again after a kill, or
_SYNC_S = 10.0  # what took so long.


class Checkpoints:
    """Forces what was added to disk, and then says in the journal that it is there; in `threads`, now and then."""

    def __init__(self, unfinished: Unfinished, threads: ThreadPoolExecutor) -> None:
        self._unfinished, self._threads = unfinished, threads
        self._entries: list[Entry] = []
        self._nbytes, self._since = 0, time.monotonic()
        self._running: Future[None] | None = None

    def add(self, entries: list[Entry], nbytes: int) -> None:
        """Add what the journal is to say of so many bytes more, and begin a checkpoint if they have become much."""
        self._entries += entries
        self._nbytes += nbytes
        if self._nbytes < _SYNC_NBYTES and time.monotonic() - self._since < _SYNC_S:
            return
        # Bounded, as what is not on disk yet would all have to be written again.
        if self._running is None or self._running.done() or self._nbytes >= 4 * _SYNC_NBYTES:
            self._join()
            self._running = self._threads.submit(self._unfinished.sync, *self._take())

    def force(self) -> None:
        """Force to disk all that was added, and wait for it."""
        self._join()
        self._unfinished.sync(*self._take())

    def raise_failed(self) -> None:
        """Raise what a checkpoint that has ended has raised, if any."""
        if self._running is not None and self._running.done():
            self._running.result()

    def _join(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None

    def _take(self) -> tuple[set[str], list[Entry]]:
        # By the thread that writes, so that no write to these files is under way.
        entries, self._entries = self._entries, []
        self._nbytes, self._since = 0, time.monotonic()
        return self._unfinished.parts.take_changed(), entries
