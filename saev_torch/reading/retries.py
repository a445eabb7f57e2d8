"""Errors of a file system that may pass: which they are, how often to try again, and how many there were."""

import errno
import logging
import os
import threading
import time
from pathlib import Path

_log = logging.getLogger("saev_torch")

_WAITS_S = (0.02, 0.1, 0.5, 2.0)
_AT_ONCE = frozenset({errno.EINTR, errno.EAGAIN})
# EMFILE and ENFILE pass when other threads and processes close their files.
_TRANSIENT = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOBUFS, errno.EMFILE, errno.ENFILE}
)


class Retries:
    """Counts what was tried again, for all threads of a reader.

    Attributes:
        count: How often something was tried again after an error.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def again(self, path: Path, offset: int | None, code: int | None, tries: int) -> bool:
        """Decide whether to try once more after an error, and wait for the right time: up to 2.6 s in all.

        Args:
            path: The file.
            offset: Where it was read, in bytes; None where it was opened.
            code: The error, as in `errno`.
            tries: How often it was tried again before.

        Returns:
            Whether to try again.
        """
        if code in _AT_ONCE:
            return True
        if code not in _TRANSIENT or tries >= len(_WAITS_S):
            return False
        with self._lock:
            self.count += 1
            n = self.count
        what = "opening" if offset is None else f"reading at offset {offset}"
        _log.warning(
            "%s: %s failed (%s), trying again in %s s (error no. %d of this reader that may pass)",
            path, what, os.strerror(code), _WAITS_S[tries], n,
        )  # fmt: skip
        time.sleep(_WAITS_S[tries])
        return True
