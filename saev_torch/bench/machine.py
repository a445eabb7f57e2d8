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

from saev_torch.format.files import open_regular
from saev_torch.processes.machine import cpu_quota, memory
from saev_torch.reading.store import ShardStore

__all__ = ["Machine", "Usage", "cached_share", "drop_cache", "family", "look", "opened_shards", "pss_nbytes"]

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
    total, available, limit = memory()
    shm = 0
    with contextlib.suppress(OSError):
        stat = os.statvfs("/dev/shm")
        shm = stat.f_blocks * stat.f_frsize
    n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Machine(
        n_affinity=len(os.sched_getaffinity(0)),
        cpu_quota=cpu_quota(),
        memory_nbytes=total,
        available_nbytes=available,
        memory_limit_nbytes=limit,
        shm_nbytes=shm,
        n_files=n_files,
        system=f"Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}",
    )


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
    example_nbytes = md.example_nbytes
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
