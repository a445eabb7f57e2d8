"""How a process gets a file without a name that another one has open.

Most may open it by the other's name under /proc, which costs the other nothing. A process that changed its user, or
that forbids others to look into it, may not: then the other hands it over through a socket, as torch does with tensors.
"""

import ctypes
import errno
import os
from multiprocessing import AuthenticationError, parent_process, reduction
from pathlib import Path
from typing import Any

_PR_GET_DUMPABLE = 3
_CREDENTIALS = ("Uid:", "Gid:", "CapPrm:", "CapEff:")

# All else means that the process is gone.
_REFUSALS = frozenset({errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class RefusedError(OSError):
    """The other process is there, but what it has open cannot be had."""


def offer(fd: int) -> tuple[bool, Any]:
    """Prepare to let the parent of this process have a file.

    Returns:
        Whether it can have it, and what to send to it for `take`.
    """
    parent = parent_process()
    pid = os.getpid() if parent is None or parent.pid is None else parent.pid
    if _may_open(pid, fd):
        return True, None
    try:
        # A socket of another user's is out of reach.
        return (True, reduction.DupFd(fd)) if _has_same_user(pid) else (False, None)
    except OSError:
        return False, None


def take(pid: int, fd: int, offered: Any) -> int:
    """Get a file that a process has open as `fd`; `offered` is what came with it.

    Returns:
        A descriptor of it.

    Raises:
        ProcessLookupError: The process is gone.
        RefusedError: It is there, but its file cannot be had.
    """
    try:
        return _open_of(pid, fd) if offered is None else int(offered.detach())
    except (OSError, EOFError, AuthenticationError) as err:
        if getattr(err, "errno", None) in _REFUSALS:
            raise RefusedError(str(err)) from err
        raise ProcessLookupError(str(err)) from err


def _open_of(pid: int, fd: int) -> int:
    return os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def _may_open(pid: int, fd: int) -> bool:
    """Whether a process may open a file of this one under /proc; False where that is not sure."""
    try:
        # Where it is forbidden altogether, or there is no /proc, this process cannot do it itself.
        os.close(_open_of(os.getpid(), fd))
        is_open = ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1
        return is_open and _credentials(pid) == _credentials(os.getpid())
    except OSError:
        return False


def _credentials(pid: int) -> list[str]:
    """Users, groups and privileges of a process."""
    return [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(_CREDENTIALS)]


def _has_same_user(pid: int) -> bool:
    """Whether a process is of this one's user, as far as that can be known."""
    try:
        return _credentials(pid)[0] == _credentials(os.getpid())[0]
    except OSError:
        return True
