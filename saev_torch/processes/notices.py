"""What is said once in a process, and not again by its other data sets, in later epochs, or by its workers."""

import os
import zlib
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from saev_torch.processes.page import SharedPage, is_spawning

# Checksums of what was said, 0 where there is room.
_PAGE = np.dtype([("said", np.int64, (64,))])


class Notices:
    """Remembers what was said, for a process and its workers; a process that is no worker says it for itself.

    There is one in a process. Pickled to a process that is being started, perhaps a worker, it becomes the one there.
    """

    _of_process: "Notices | None" = None

    def __init__(self, page: SharedPage) -> None:
        self._page = page

    @classmethod
    def of_process(cls) -> "Notices":
        """Those of this process, or of its parent if it is a forked worker."""
        if cls._of_process is None:
            cls._of_process = cls(SharedPage(_PAGE))
        return cls._of_process

    @classmethod
    def leave_parent(cls) -> None:
        """Remember in memory of this process's own from now on, if it is its parent's and this is no worker."""
        notices = cls._of_process
        if notices is not None and not notices._page.is_own and get_worker_info() is None:
            notices._page = SharedPage(_PAGE)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_adopt, (self._page,)) if is_spawning() else (Notices.of_process, ())

    def may_say(self, key: str) -> bool:
        """Whether `key` is asked about for the first time, here or in any worker; never when very much was said."""
        self.leave_parent()
        checksum = zlib.crc32(key.encode()) + 1

        def look() -> bool:
            said = self._page.fields["said"]
            if checksum in said or said.all():
                return False
            said[np.argmin(said != 0)] = checksum
            return True

        return self._page.while_locked(look)

    def forget(self) -> None:
        """Let everything be said again."""
        self._page.fields["said"] = 0


def _adopt(page: SharedPage) -> Notices:
    notices = Notices._of_process = Notices._of_process or Notices(page)
    notices._page = page
    return notices


# What is forked may be a worker, which shares the memory.
os.register_at_fork(before=Notices.leave_parent)
