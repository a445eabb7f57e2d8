"""What this process may use: memory and processor time, by the machine and its control groups, and nameless files."""

import contextlib
import errno
import itertools
import operator
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
# A limit that is not set reads as about 2**63.
_UNLIMITED = 1 << 60

# Where a file without a name lies in memory, on systems that have such a folder.
_SHARED_MEMORY = "/dev/shm"
_PIECE_NBYTES = 1 << 20


def memory_file(nbytes: int = 0) -> int:
    """Make a file without a name, of zeros, that goes with the last process that has it open or mapped.

    It is in memory, where the system has such files. Else it is a temporary file, with room for all of its bytes: a
    process that writes to mapped memory for which there is none is killed.

    Returns:
        Its descriptor, which is the caller's to close.

    Raises:
        OSError: There is no room, or no descriptor.
    """
    fd = _memory_fd()
    if fd is not None:
        try:
            os.ftruncate(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
        return fd
    try:
        return _temporary_fd(nbytes, _SHARED_MEMORY)
    except OSError:
        return _temporary_fd(nbytes, None)


def has_memory_files() -> bool:
    """Whether files without names are in memory, and take only what was written to them."""
    fd = _memory_fd()
    if fd is not None:
        os.close(fd)
    return fd is not None


def _memory_fd() -> int | None:
    """A descriptor of an empty file in memory; None where the system has no such files."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        return os.memfd_create("saev_torch")
    except OSError as err:
        # Old systems, and containers that forbid it.
        if err.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            return None
        raise


def _temporary_fd(nbytes: int, folder: str | None) -> int:
    """A descriptor of a temporary file of so many bytes of zeros; without a folder it is in the user's."""
    with tempfile.TemporaryFile(prefix="saev_torch", dir=folder, buffering=0) as file:
        # Room is made by writing: a hole would be filled later, or not.
        for start in range(0, nbytes, _PIECE_NBYTES):
            os.pwrite(file.fileno(), bytes(min(_PIECE_NBYTES, nbytes - start)), start)
        return os.dup(file.fileno())


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number, which may be another's by now."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0


def memory() -> tuple[int, int, int | None]:
    """Look at the memory, in bytes.

    Returns:
        That of the machine, what can be had without swapping (the page cache included, within the group's limit), and
        the limit of the control group, None without one.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    limit, used = _memory_limit()
    if limit is not None:
        available = min(available, max(0, limit - used))
    return total, available, limit


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and those above it, for one controller of version 1 or for version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, name = line.split(":", 2)
        is_version_2 = number == "0" and not controllers
        if is_version_2 or controller in controllers.split(","):
            root = _CGROUP_ROOT if is_version_2 else _CGROUP_ROOT / controller
            group = root / name.strip("/")
            # In a container the name may be that of the host: the root is what is seen of it there.
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _number(path: Path) -> int | None:
    """The number in a file of a control group; None if there is no such file, or it says "max"."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _memory_limit() -> tuple[int | None, int]:
    """The lowest limit of the groups, and what its group uses of it without the page cache."""
    limits: list[tuple[int, int]] = []
    files = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for group, (limit_name, used_name) in itertools.product(_groups("memory"), files):
        limit = _number(group / limit_name)
        if limit is None or limit >= _UNLIMITED:
            continue
        used = _number(group / used_name) or 0
        with contextlib.suppress(OSError):
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            prefix = "total_" if "total_inactive_file" in stat else ""
            used -= sum(int(stat.get(f"{prefix}{key}", 0)) for key in ("inactive_file", "active_file"))
        limits.append((limit, max(0, used)))
    return min(limits, key=operator.itemgetter(0), default=(None, 0))


def cpu_quota() -> float | None:
    """Cores' worth of time that the control group may use, None without a limit."""
    quotas = []
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        old_quota, old_period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if old_quota is not None and old_period and old_quota > 0:
            quotas.append(old_quota / old_period)
    return min(quotas, default=None)
