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

    Pickled to a worker it stays the same; pickled or copied otherwise it becomes that of the process that has it then.
    """

    _of_process: "Notices | None" = None

    def __init__(self, page: SharedPage | None = None) -> None:
        self._page = page or SharedPage(_PAGE)

    @classmethod
    def of_process(cls) -> "Notices":
        """Those of this process, or of its parent if it is a forked worker."""
        if cls._of_process is None:
            cls._of_process = cls()
        return cls._of_process

    @classmethod
    def leave_parent(cls) -> None:
        """Remember in memory of this process's own from now on, if it was forked and is no worker."""
        notices = cls._of_process
        if notices is not None and not notices._page.is_own and get_worker_info() is None:
            notices._page = SharedPage(_PAGE)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Notices, (self._page,)) if is_spawning() else (Notices.of_process, ())

    def may_say(self, key: str) -> bool:
        """Whether `key` is asked about for the first time, here or in any worker; never when very much was said."""
        self.leave_parent()
        if get_worker_info() is None:
            # A process that was spawned for something else got those of its parent.
            self._page = self.of_process()._page
        checksum = zlib.crc32(key.encode()) + 1
        with self._page.locked():
            said = self._page.fields["said"]
            if checksum in said or said.all():
                return False
            said[np.argmin(said != 0)] = checksum
            return True

    def forget(self) -> None:
        """Let everything be said again."""
        self._page.fields["said"] = 0


# What is forked may be a worker, which shares the memory.
os.register_at_fork(before=Notices.leave_parent)
