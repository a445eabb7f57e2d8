"""What the readers of a data set did, on a page that they share: for `metrics`, and for lines in the log.

Each row has one writer at a time, so there are no locks but where rows are given out: a worker that is killed leaves
nothing behind, and who looks sees figures that are at most one batch old.
"""

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from saev_torch.processes.machine import is_alive
from saev_torch.processes.page import SharedPage, is_spawning

_N_ROWS = 256
_WAITS = {"wait_disk": "disk_s", "wait_plan": "plan_s", "wait_consumer": "consumer_s"}
# 1 more than the rank, 0 where a row is not in use; it is active for the process of that number, and began on the clock
# that all processes of a machine share.
# The beat goes on while a batch is waited for and reads finish.
_INTEGERS = ("rank", "is_active", "n_samples", "nbytes", "beat")
_FLOATS = ("began", "fill", *_WAITS.values())
_ROW = np.dtype([*((name, np.int64) for name in _INTEGERS), *((name, np.float64) for name in _FLOATS)])
_SUMS = ("n_samples", "nbytes", *_WAITS.values())


class Counters:
    """Figures of a data set and its copies in other processes; pickled or copied otherwise, it begins at 0."""

    def __init__(self, page: SharedPage | None = None) -> None:
        self._page = page or SharedPage(np.dtype([("rows", _ROW, (_N_ROWS,))]))
        self._rows = self._page.fields["rows"]
        self._last: tuple[float, dict[str, float]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Counters, ((self._page,) if is_spawning() else ())

    def begin(self, rank: int) -> Any:
        """Take a row for an iteration, to be written to; what it counts goes on from who had it before."""

        def take() -> Any:
            row = self._rows[self._find_free(rank)]
            row["rank"], row["is_active"], row["fill"], row["began"] = rank + 1, os.getpid(), 0.0, time.monotonic()
            return row

        return self._page.while_locked(take)

    def _find_free(self, rank: int) -> int:
        ranks, is_free = self._rows["rank"], self._rows["is_active"] == 0
        for wanted in (is_free & (ranks == rank + 1), ranks == 0):
            if wanted.any():
                return int(wanted.argmax())
        # The last of them are of processes that were killed, or, with very many readers, are shared.
        mine = np.flatnonzero(ranks == rank + 1)
        ended = (i for i in mine if not is_alive(self._rows["is_active"][i]))
        return int(next(ended, (mine if len(mine) else np.flatnonzero(ranks))[0]))

    def sums(self, rank: int) -> dict[str, float]:
        """Sums over the readers of a rank, and of those at work: how many, their mean fill, when the first began."""
        mine = self._rows[self._rows["rank"] == rank + 1]
        # A reader that was killed could not say so.
        active = mine[[is_alive(pid) for pid in mine["is_active"].tolist()]]
        found = {name: float(mine[name].sum()) for name in _SUMS}
        found["n_active"] = float(len(active))
        found["fill"] = float(active["fill"].sum()) / max(1, len(active))
        found["began"] = float((active if len(active) else mine)["began"].min(initial=np.inf))
        return found

    def beats(self, pids: list[int]) -> list[int]:
        """The beats of the readers in some processes: others than before where reads have finished there meanwhile."""
        beats: list[int] = self._rows["beat"][np.isin(self._rows["is_active"], pids)].tolist()
        return beats

    def rates(self, rank: int) -> dict[str, float]:
        """Rates of the readers of a rank since the last call, or since the iteration began.

        `loader/samples_per_s` and `loader/bytes_per_s` (of activations), as the readers finish batches;
        `loader/read_mb`, all megabytes so far, and `loader/read_mb_s`, as `saev` has them; `loader/buffer_fill`, see
        `Reservoir.fill`; `loader/wait_disk`, `loader/wait_plan` and
        `loader/wait_consumer`, the share of the readers' time in which a batch was awaited from the disk or from
        planning, or nothing was left to read until the consumer took one; `loader/n_readers`, those at work.
        """
        now, sums = time.monotonic(), self.sums(rank)
        then, before = self._last or (min(now, sums["began"]), dict.fromkeys(sums, 0.0))
        self._last = now, sums
        per_s = {key: (sums[key] - before[key]) / max(now - then, 1e-9) for key in _SUMS}
        found = {
            "loader/samples_per_s": per_s["n_samples"],
            "loader/bytes_per_s": per_s["nbytes"],
            "loader/read_mb": sums["nbytes"] / 1e6,
            "loader/read_mb_s": per_s["nbytes"] / 1e6,
            "loader/buffer_fill": sums["fill"],
            "loader/n_readers": sums["n_active"],
        }
        for name, key in _WAITS.items():
            found[f"loader/{name}"] = min(1.0, per_s[key] / max(1.0, sums["n_active"]))
        return found


class Reservoir:
    """What stands where the loaders of `saev` have their buffer, for what their trainer logs of it."""

    def __init__(self, counters: Counters, rank: int) -> None:
        self._counters, self._rank = counters, rank

    def fill(self) -> float:
        """The share of the buffer that was loaded when the latest batch was handed out, from 0.0 to 1.0.

        Samples are dealt to batches to come as others are taken, so a shuffle that is read as fast as it is used stays
        between a half and 0.9. It is 0.0 where nothing is iterated, and near it where the disk is waited for.
        """
        return self._counters.sums(self._rank)["fill"]


_log = logging.getLogger("saev_torch")


def log_to_stderr() -> None:
    """With `debug` and no logging set up, say it on stderr."""
    if not _log.handlers and not logging.getLogger().handlers:
        _log.addHandler(logging.StreamHandler())
    _log.setLevel(logging.DEBUG)


@dataclasses.dataclass
class Waits:
    """What an engine waited for, in seconds since it began, and the bytes of activations that it handed out and read.

    The consumer waited while reads were under way (`disk_s`), or while it was being worked out what to read (`plan_s`);
    or nothing was left to read until the consumer took a batch (`consumer_s`). `n_events` counts what has been planned
    and what has been read.
    """

    disk_s: float = 0.0
    plan_s: float = 0.0
    consumer_s: float = 0.0
    nbytes: int = 0
    n_read: int = 0
    n_events: int = 0


class Watch:
    """Counts what one reader did in an iteration, in its row; logs it under its name, at most every so many seconds."""

    def __init__(self, row: Any, name: str, every_s: float) -> None:
        self._row, self._name, self._every_s = row, name, every_s
        self._pid = os.getpid()
        self._waits = Waits()
        self._n_samples = 0
        self._told_s = 0.0
        self._began = self._logged = time.monotonic()

    def count(self, n_samples: int, waits: Waits, fill: float) -> None:
        """Count a batch that was made, with what was waited for since the iteration began."""
        self._n_samples += n_samples
        row, before = self._row, self._waits
        row["n_samples"] += n_samples
        row["nbytes"] += waits.nbytes - before.nbytes
        for key in _WAITS.values():
            row[key] += getattr(waits, key) - getattr(before, key)
        row["fill"] = fill
        self._waits = dataclasses.replace(waits)
        now = time.monotonic()
        if now - self._logged < self._every_s:
            return
        self._logged = now
        spent = now - self._began
        shares = {"disk": waits.disk_s, "planning": waits.plan_s, "the consumer": waits.consumer_s}
        _log.info(
            "%s: %.0f samples/s, %.2f GB/s; waited for %s",
            self._name, self._n_samples / spent, waits.nbytes / spent / 1e9,
            ", ".join(f"{name} {100 * seconds / spent:.0f}%" for name, seconds in shares.items()),
        )  # fmt: skip

    def wait(self, goes_on: bool, waited_s: float, describe: Callable[[], str]) -> None:
        """Note that a batch has been awaited for so long, and whether reads finish; the log tells what is waited for.

        It does so at most every so many seconds, and never where batches come faster.
        """
        if goes_on:
            self._row["beat"] += 1
        self._told_s = min(self._told_s, waited_s)
        if waited_s - self._told_s >= self._every_s:
            self._told_s = waited_s
            _log.warning("%s: no batch for %.0f s; %s", self._name, waited_s, describe())

    def stop(self) -> None:
        """Note that the iteration ended; in a forked child, that of the parent goes on."""
        if self._pid == os.getpid():
            self._row["is_active"] = 0
