"""Which epoch an iteration is: one number that all workers of an iteration agree on.

`IterableDataset.__iter__` runs in the workers only, which may be persistent or new, forked or spawned, and the parent
is not asked. So the count lives in memory shared by a data set and its copies in workers. The workers of one
`DataLoader` iterator know each other by the base seed that torch gave them; each takes part in an iteration once.
"""

import contextlib
import fcntl
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from saev_torch.processes.page import SharedPage, is_spawning

_N_ROWS = 32
_WORDS = 16
# The order is ascending, 0 where a row is not in use; of what is taken there is one bit for each worker.
_NUMBERS = ("order", "consumer", "session", "n_workers", "epoch", "start")
_ROW = np.dtype([*((name, np.int64) for name in _NUMBERS), ("taken", np.uint64, (_WORDS,))])
_PAGE = np.dtype([("rows", _ROW, (_N_ROWS,)), ("scale", np.float64), ("has_advised", np.bool_)])
_NO_SESSION = -1

_counters: "weakref.WeakSet[EpochCounter]" = weakref.WeakSet()


def _remember_births() -> None:
    for counter in tuple(_counters):
        counter._remember_birth()


os.register_at_fork(before=_remember_births)


class EpochCounter:
    """Counts the iterations of a data set, for each process that consumes it.

    Pickled to a worker it stays the same counter; pickled or copied otherwise it becomes one of its own. `birth` is the
    latest place that was settled when this process was made.
    """

    def __init__(self, page: SharedPage | None = None, birth: int = 0) -> None:
        self._page = page or SharedPage(_PAGE)
        self._rows = self._page.fields["rows"]
        self._lock = threading.Lock()
        self._birth = birth
        _counters.add(self)

    def _remember_birth(self) -> None:
        settled = self._rows["order"][self._rows["session"] == _NO_SESSION]
        self._birth = int(settled.max(initial=0))

    def __reduce__(self) -> tuple[Any, ...]:
        if not is_spawning():
            return EpochCounter, (self._page,)
        self._remember_birth()
        return EpochCounter, (self._page, self._birth)

    @property
    def scale(self) -> float | None:
        """What activations are multiplied with; None for nothing."""
        return float(self._page.fields["scale"]) or None

    @scale.setter
    def scale(self, value: float | None) -> None:
        self._page.fields["scale"] = value or 0.0

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # A lock of the file system goes away with a killed worker; it does not tell threads apart.
        with self._lock:
            fcntl.lockf(self._page.fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._page.fd, fcntl.LOCK_UN)

    def begin(
        self, consumer: int, session: int | None, worker: int, n_workers: int = 1, at: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """Begin an iteration, or join one that another worker of the session has begun: its epoch, and first batch.

        `consumer` is the process that the batches are for, `session` what the workers of one iterator have in common,
        None without workers, and `at` the epoch and batch that this worker was told to continue at.
        """
        word, bit = divmod(worker % (64 * _WORDS), 64)
        mask = np.uint64(1 << bit)
        with self._locked():
            rows = self._rows
            # The oldest that this worker has not taken part in: a slow worker must not skip one.
            joined = (rows["order"] > 0) & (rows["consumer"] == consumer) & (rows["session"] == session)
            # Sessions may look alike where the user seeds torch before each. What the parent settled before this
            # process was born is another's.
            joined &= (rows["n_workers"] == n_workers) & (rows["order"] > self._birth)
            joined &= (rows["taken"][:, word] & mask) == 0
            if at is not None:
                joined &= rows["epoch"] == at[0]
            if session is not None and joined.any():
                row = rows[np.flatnonzero(joined)[np.argmin(rows["order"][joined])]]
                found = int(row["epoch"]), int(row["start"])
            else:
                found = at or self._following(consumer)
                row = self._add(consumer, session or 0, *found, n_workers)
            row["taken"][word] |= mask
            return at or found

    def set(self, consumer: int, epoch: int, start: int) -> None:
        """Choose the next iteration: its epoch, and the batch to start at."""
        with self._locked():
            self._add(consumer, _NO_SESSION, epoch, start)

    def next(self, consumer: int) -> tuple[int, int]:
        """The epoch of the next iteration, and the batch that it starts at."""
        with self._locked():
            return self._following(consumer)

    def current(self, consumer: int) -> tuple[int, int, bool]:
        """The latest iteration that has begun, else the next: epoch, first batch, and whether workers make batches."""
        with self._locked():
            latest = self._latest(consumer)
            return int(latest["epoch"]), int(latest["start"]), int(latest["session"]) > 0

    def may_advise(self) -> bool:
        """Whether this is the first call, in this process or any worker."""
        with self._locked():
            is_first = not self._page.fields["has_advised"]
            self._page.fields["has_advised"] = True
            return is_first

    def _following(self, consumer: int) -> tuple[int, int]:
        latest = self._latest(consumer)
        is_settled = latest["session"] == _NO_SESSION
        return (int(latest["epoch"]), int(latest["start"])) if is_settled else (int(latest["epoch"]) + 1, 0)

    def _latest(self, consumer: int) -> Any:
        used = self._rows[self._rows["order"] > 0]
        mine = used[used["consumer"] == consumer]
        if not len(mine):
            # Chosen before this process was started, for all that come.
            mine = used[used["session"] == _NO_SESSION]
        return mine[np.argmax(mine["order"])] if len(mine) else {"session": _NO_SESSION, "epoch": 0, "start": 0}

    def _add(self, consumer: int, session: int, epoch: int, start: int, n_workers: int = 1) -> Any:
        rows = np.sort(self._rows, order="order")
        latest = dict(zip(rows["consumer"].tolist(), rows["order"].tolist(), strict=True))
        # The oldest, but no process's latest: that is all it knows of its epoch.
        free = [order for consumer, order in rows[["consumer", "order"]].tolist() if order < max(1, latest[consumer])]
        row = self._rows[np.flatnonzero(self._rows["order"] == (free or rows["order"])[0])[0]]
        # Field by field: the row is part of the page.
        row["order"] = rows["order"][-1] + 1
        row["consumer"], row["session"], row["n_workers"] = consumer, session, n_workers
        row["epoch"], row["start"], row["taken"][:] = epoch, start, 0
        return row
