"""What the machine has, and what processes use of it: cores, memory, descriptors, the page cache."""

import contextlib
import ctypes
import dataclasses
import mmap
import os
import platform
import resource
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from saev_torch.files import open_regular
from saev_torch.store import ShardStore

__all__ = ["Machine", "Usage", "cached_share", "drop_cache", "family", "look", "opened_shards", "pss_nbytes"]

_CGROUP_ROOT = Path("/sys/fs/cgroup")
# A limit that is not set reads as about 2**63.
_UNLIMITED = 1 << 60
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this process may use.

    Attributes:
        n_affinity: Cores that it may run on.
        cpu_quota: Cores' worth of time that its control group may use, None without a limit.
        memory_nbytes: Memory of the machine.
        available_nbytes: Memory that can be had without swapping, the page cache included, within the group's limit.
        memory_limit_nbytes: Limit of the control group, None without one.
        shm_nbytes: Size of /dev/shm.
        n_files: Limit of open file descriptors.
        system: Kernel, Python, torch.
    """

    n_affinity: int
    cpu_quota: float | None
    memory_nbytes: int
    available_nbytes: int
    memory_limit_nbytes: int | None
    shm_nbytes: int
    n_files: int
    system: str

    @property
    def cores(self) -> float:
        """Cores' worth of time that there is."""
        return self.n_affinity if self.cpu_quota is None else min(self.n_affinity, self.cpu_quota)


def look() -> Machine:
    """Look at the machine, at control groups of both versions too."""
    total, available = _memory()
    limit, used = _memory_limit()
    if limit is not None:
        available = min(available, max(0, limit - used))
    shm = 0
    with contextlib.suppress(OSError):
        stat = os.statvfs("/dev/shm")
        shm = stat.f_blocks * stat.f_frsize
    n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Machine(
        n_affinity=len(os.sched_getaffinity(0)),
        cpu_quota=_cpu_quota(),
        memory_nbytes=total,
        available_nbytes=available,
        memory_limit_nbytes=limit,
        shm_nbytes=shm,
        n_files=n_files,
        system=f"Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}",
    )


def _memory() -> tuple[int, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    return total, available


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and those above it, for one controller of version 1 or for version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, name = line.split(":", 2)
        if number == "0" and not controllers:
            root = _CGROUP_ROOT
        elif controller in controllers.split(","):
            root = _CGROUP_ROOT / controller
        else:
            continue
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
    lowest: tuple[int, int] | None = None
    for group in _groups("memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _number(group / limit_name)
            if limit is None or limit >= _UNLIMITED or (lowest is not None and limit >= lowest[0]):
                continue
            used = _number(group / used_name) or 0
            with contextlib.suppress(OSError):
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                prefix = "total_" if "total_inactive_file" in stat else ""
                used -= sum(int(stat.get(f"{prefix}{key}", 0)) for key in ("inactive_file", "active_file"))
            lowest = limit, max(0, used)
    return (None, 0) if lowest is None else lowest


def _cpu_quota() -> float | None:
    quotas = []
    for group in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        old_quota, old_period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if old_quota is not None and old_period and old_quota > 0:
            quotas.append(old_quota / old_period)
    return min(quotas, default=None)


def family() -> list[int]:
    """This process and all processes below it."""
    pids = [os.getpid()]
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                pids += [int(child) for child in (task / "children").read_text().split()]
    return pids


def pss_nbytes(pids: Iterable[int], field: str = "Pss") -> int:
    """Sum of the proportional set sizes of processes: memory that n of them share counts 1/n for each of them.

    Args:
        pids: The processes.
        field: "Pss", or a part of it: "Pss_Anon", "Pss_File", "Pss_Shmem".
    """
    total = 0
    for pid in pids:
        # A process that has ended in the meantime uses nothing.
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(f"{field}:"))
    return total


class Usage(NamedTuple):
    """Processor time of this process and all below it, in seconds, since each began."""

    user_s: float
    system_s: float

    @classmethod
    def now(cls) -> "Usage":
        """What has been used so far."""
        user = system = 0
        for pid in family():
            with contextlib.suppress(OSError):
                # The name, in parentheses, may hold anything; the fields that count come behind it.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                user, system = user + int(fields[11]), system + int(fields[12])
        return cls(user / _TICKS_PER_S, system / _TICKS_PER_S)

    def since(self, before: "Usage") -> "Usage":
        """The difference; never negative, though a process that ended takes its time with it."""
        return Usage(max(0.0, self.user_s - before.user_s), max(0.0, self.system_s - before.system_s))


@contextlib.contextmanager
def opened_shards(store: ShardStore) -> Iterator[list[int]]:
    """Open every shard with data, in order: yields file descriptors, which do not outlive the block."""
    with contextlib.ExitStack() as stack:
        fds = []
        for name in [shard.name for shard in store.shards if shard.n_examples]:
            fd = open_regular(store.shards_dir, name)
            stack.callback(os.close, fd)
            fds.append(fd)
        yield fds


def drop_cache(stores: Sequence[ShardStore]) -> None:
    """Ask the system to forget the pages of shards. What a host or a disk array keeps is beyond its reach."""
    for store in stores:
        with opened_shards(store) as fds:
            for fd in fds:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(store: ShardStore) -> float:
    """Share of the examples' pages that are in the page cache, 0.0 to 1.0."""
    md = store.metadata
    example_nbytes = md.n_layers * md.tokens_per_example * md.d_model * 4
    sizes = [shard.n_examples * example_nbytes for shard in store.shards if shard.n_examples]
    n_pages = n_cached = 0
    with opened_shards(store) as fds:
        for fd, nbytes in zip(fds, sizes, strict=True):
            with mmap.mmap(fd, nbytes, prot=mmap.PROT_READ) as pages:
                there = np.zeros(-(-len(pages) // mmap.PAGESIZE), dtype=np.uint8)
                view = np.frombuffer(pages, dtype=np.uint8)
                address = view.ctypes.data
                del view
                if _mincore(address, len(pages), there.ctypes.data):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                n_pages += len(there)
                n_cached += int((there & 1).sum())
    return n_cached / n_pages if n_pages else 0.0
