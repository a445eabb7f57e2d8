"""Which epoch an iteration is: one number that all workers of an iteration agree on.

`IterableDataset.__iter__` runs in the workers only, which may be persistent or new, forked or spawned, and the parent
is not asked. So the count lives in memory shared by a data set and its copies in workers. The workers of one
`DataLoader` iterator know each other by `world.find_session`; each takes part in an iteration once. A process that is
no worker makes memory of its own, and counts there for itself and its workers.
"""

import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import get_worker_info

from saev_torch.processes.locks import members
from saev_torch.processes.page import SharedPage, is_spawning

_T = TypeVar("_T")
_N_ROWS = 32
_WORDS = 16
# The order is ascending, 0 where a row is not in use; of what is taken there is one bit for each worker.
_NUMBERS = ("order", "consumer", "session", "epoch", "start")
_ROW = np.dtype([*((name, np.int64) for name in _NUMBERS), ("taken", np.uint64, (_WORDS,))])
_PAGE = np.dtype([("rows", _ROW, (_N_ROWS,)), ("scale", np.float64)])
_NO_SESSION = -1
PLACE = np.dtype([("epoch", np.int64), ("start", np.int64)])
"""What the workers of a loader are told: epoch of the iteration that they begin, and the batch to start at."""

_counters: "weakref.WeakSet[EpochCounter]" = weakref.WeakSet()


def _move_all() -> None:
    # What is forked now may be a worker, which shares the memory, or a consumer, which is to know how it is now.
    if get_worker_info() is None:
        for counter in members(_counters):
            counter._move()
            counter._inherited = counter._page.fields.copy()


os.register_at_fork(before=_move_all)


class EpochCounter:
    """Counts the iterations of a data set, for each process that consumes it.

    Pickled to a worker it stays the same counter; pickled or copied otherwise it becomes one of its own.
    """

    def __init__(self, page: SharedPage | None = None, is_copy: bool = False, inherited: Any = None) -> None:
        self._page = page or SharedPage(_PAGE)
        # What a child finds that consumes by itself: its parent may have chosen something else since.
        self._inherited = inherited
        if is_copy:
            # Nobody makes batches for it yet.
            np.minimum(self._rows["session"], 0, out=self._rows["session"])
        _counters.add(self)

    @property
    def _rows(self) -> Any:
        return self._page.fields["rows"]

    def _move(self) -> None:
        """Count in memory of this process's own from now on, if it is not: there, only what was chosen is known."""
        if self._page.is_own:
            return
        there, page = self._page.fields if self._inherited is None else self._inherited, SharedPage(_PAGE)
        chosen = there["rows"][(there["rows"]["order"] > 0) & (there["rows"]["session"] == _NO_SESSION)]
        page.fields["rows"][: min(1, len(chosen))] = chosen[np.argsort(chosen["order"])][-1:]
        page.fields["scale"] = there["scale"]
        self._page = page

    def __reduce__(self) -> tuple[Any, ...]:
        if not is_spawning():
            return EpochCounter, (self._page, True)
        if get_worker_info() is None:
            self._move()
        return EpochCounter, (self._page, False, self._page.fields.copy())

    @property
    def scale(self) -> float | None:
        """What activations are multiplied with; None for nothing."""
        return float(self._page.fields["scale"]) or None

    @scale.setter
    def scale(self, value: float | None) -> None:
        if get_worker_info() is None:
            self._move()
        self._page.fields["scale"] = value or 0.0

    def _while_locked(self, work: Callable[[], _T], consumer: int = 0) -> _T:
        if consumer == os.getpid():
            self._move()
        return self._page.while_locked(work)

    def begin(
        self, consumer: int, session: int | None, worker: int, at: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """Begin an iteration, or join one that another worker of the session has begun: its epoch, and first batch.

        `consumer` is the process that the batches are for, `session` what the workers of one iterator have in common,
        None without workers, and `at` the epoch and batch that this worker was told to continue at.
        """
        word, bit = divmod(worker % (64 * _WORDS), 64)
        mask = np.uint64(1 << bit)

        def join() -> tuple[int, int]:
            rows = self._rows
            # The oldest that this worker has not taken part in: a slow worker must not skip one.
            joined = (rows["order"] > 0) & (rows["consumer"] == consumer) & (rows["session"] == session)
            joined &= (rows["taken"][:, word] & mask) == 0
            if at is not None:
                joined &= rows["epoch"] == at[0]
            if session is not None and joined.any():
                row = rows[np.flatnonzero(joined)[np.argmin(rows["order"][joined])]]
                found = int(row["epoch"]), int(row["start"])
            else:
                found = at or self._following(consumer)
                row = self._add(consumer, session or 0, *found)
            row["taken"][word] |= mask
            return at or found

        return self._while_locked(join, consumer)

    def set(self, consumer: int, epoch: int, start: int) -> None:
        """Choose the next iteration: its epoch, and the batch to start at."""
        self._while_locked(lambda: self._add(consumer, _NO_SESSION, epoch, start), consumer)

    def next(self, consumer: int) -> tuple[int, int]:
        """The epoch of the next iteration, and the batch that it starts at."""
        return self._while_locked(lambda: self._following(consumer), consumer)

    def current(self, consumer: int) -> tuple[int, int, bool]:
        """The latest iteration that has begun, else the next: epoch, first batch, and whether workers make batches."""

        def look() -> tuple[int, int, bool]:
            latest = self._latest(consumer)
            return int(latest["epoch"]), int(latest["start"]), int(latest["session"]) > 0

        return self._while_locked(look, consumer)

    def has_begun(self, consumer: int) -> bool:
        """Whether an iteration has begun, or one was chosen."""
        return self._while_locked(lambda: not isinstance(self._latest(consumer), dict), consumer)

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

    def _add(self, consumer: int, session: int, epoch: int, start: int) -> Any:
        rows = np.sort(self._rows, order="order")
        latest = dict(zip(rows["consumer"].tolist(), rows["order"].tolist(), strict=True))
        # The oldest, but no process's latest: that is all it knows of its epoch.
        free = [order for consumer, order in rows[["consumer", "order"]].tolist() if order < max(1, latest[consumer])]
        row = self._rows[np.flatnonzero(self._rows["order"] == (free or rows["order"])[0])[0]]
        # Field by field: the row is part of the page.
        row["order"] = rows["order"][-1] + 1
        row["consumer"], row["session"] = consumer, session
        row["epoch"], row["start"], row["taken"][:] = epoch, start, 0
        return row
