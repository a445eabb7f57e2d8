"""A page of memory that a data set shares with its copies in workers: the scale, and what each reader has done.

Each figure has one writer, so there are no locks: a worker that is killed leaves nothing behind, and a reader of the
page sees figures that are at most one batch old.
"""

import mmap
import os
import time
import weakref
from multiprocessing import context, reduction
from typing import Any

import numpy as np

__all__ = ["Board", "Row"]

_N_ROWS = 256
_HEADER = np.dtype([("scale", np.float64)])
_ROW = np.dtype(
    [
        ("rank", np.int64),  # 1 more than the rank; 0: not in use
        ("is_active", np.int64),
        ("began", np.float64),  # on the clock that all processes of a machine share
        ("n_samples", np.int64),
        ("nbytes", np.int64),
        ("fill", np.float64),
        ("disk_s", np.float64),
        ("plan_s", np.float64),
        ("consumer_s", np.float64),
    ]
)
_SUMS = ("n_samples", "nbytes", "disk_s", "plan_s", "consumer_s")

Row = Any
"""A structured numpy scalar with the fields of the page's rows; writing to it writes to the page."""


class Board:
    """Figures of a data set and its copies in workers.

    Pickled to a worker it stays the same page; pickled or copied otherwise it becomes one of its own.
    """

    def __init__(self) -> None:
        self._attach(os.memfd_create("saev_torch", os.MFD_CLOEXEC))

    def _attach(self, fd: int) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd).atexit = False
        nbytes = _HEADER.itemsize + _N_ROWS * _ROW.itemsize
        os.ftruncate(fd, nbytes)
        pages = mmap.mmap(fd, nbytes)
        self._header = np.frombuffer(pages, dtype=_HEADER, count=1)[0:1]
        self._rows = np.frombuffer(pages, dtype=_ROW, offset=_HEADER.itemsize)

    def __getstate__(self) -> dict[str, Any]:
        if context.get_spawning_popen() is not None:
            return {"fd": reduction.DupFd(self._fd)}
        return {"scale": self.scale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "fd" in state:
            self._attach(state["fd"].detach())
        else:
            self.__init__()  # type: ignore[misc]
            self.scale = state["scale"]

    @property
    def scale(self) -> float | None:
        """What activations are multiplied with; None for nothing."""
        return float(self._header["scale"][0]) or None

    @scale.setter
    def scale(self, value: float | None) -> None:
        self._header["scale"][0] = value or 0.0

    def begin(self, rank: int, reader: int) -> Row:
        """Take the row of a reader for an iteration; what it counts goes on from the last one."""
        row = self._rows[reader % _N_ROWS]
        row["rank"], row["is_active"], row["fill"], row["began"] = rank + 1, 1, 0.0, time.monotonic()
        return row

    def sums(self, rank: int) -> dict[str, float]:
        """Sums over the readers of a rank.

        Returns:
            `n_samples`, `nbytes`, `disk_s`, `plan_s`, `consumer_s`; the number of readers `n_active` that are at work,
            their mean `fill`, and `began`, the earliest time at which they began.
        """
        mine = self._rows[self._rows["rank"] == rank + 1]
        active = mine[mine["is_active"] != 0]
        found = {name: float(mine[name].sum()) for name in _SUMS}
        return {
            **found,
            "n_active": float(len(active)),
            "fill": float(active["fill"].mean()) if len(active) else 0.0,
            "began": float((active if len(active) else mine)["began"].min(initial=np.inf)),
        }
