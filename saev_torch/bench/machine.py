"""What the machine has: cores, memory, descriptors, and what of the shards is in its page cache."""

import contextlib
import ctypes
import dataclasses
import errno
import mmap
import os
import platform
import resource
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from saev_torch.errors import ReadError
from saev_torch.format.files import open_regular
from saev_torch.processes.machine import cpu_quota, memory
from saev_torch.processes.world import count_cores
from saev_torch.reading.store import ShardStore, advise

NOT_COLD = 0.01
"""Pages of which a larger share is in the page cache are not quite cold."""

_mincore: Any = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
if _mincore is not None:
    _mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this process may use.

    `n_affinity` counts the cores that it may run on, `n_files` the descriptors that it may have open. Its control group
    may have a quota, in cores' worth of time, and a limit of memory; else these are None. What is available can be had
    without swapping, the page cache included, within that limit. `shm_nbytes` is the size of /dev/shm.
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
    shm_nbytes = 0
    with contextlib.suppress(OSError):
        shm_nbytes = shutil.disk_usage("/dev/shm").total
    n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    system = f"Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}"
    try:
        nbytes = memory()
    except (OSError, KeyError, ValueError) as err:
        raise ReadError(
            f"/proc/meminfo: expected to read how much memory there is, got: {err}; measure where there is a /proc."
        ) from err
    return Machine(count_cores(), cpu_quota(), *nbytes, shm_nbytes, n_files, system)


@contextlib.contextmanager
def opened_shards(store: ShardStore) -> Iterator[list[int]]:
    """Open every shard with data, in order: yields file descriptors, which do not outlive the block."""
    fds: list[int] = []
    with contextlib.ExitStack() as stack:
        for shard in store.shards:
            if shard.n_examples:
                fds.append(open_regular(store.shards_dir, shard.name, store.allow_links))
                stack.callback(os.close, fds[-1])
        yield fds


def drop_cache(stores: Sequence[ShardStore]) -> None:
    """Ask the system to forget the pages of shards. What a host or a disk array keeps is beyond its reach."""
    for store in stores:
        with opened_shards(store) as fds:
            for fd in fds:
                advise(fd, "DONTNEED")


def cached_share(store: ShardStore) -> float:
    """Share of the examples' pages that are in the page cache, 0.0 to 1.0."""
    if _mincore is None:
        raise _unknown(errno.ENOSYS)
    found = []
    with opened_shards(store) as fds:
        # A shard without examples is the last one, and not opened.
        for fd, shard in zip(fds, store.shards, strict=False):
            with mmap.mmap(fd, shard.n_examples * store.metadata.example_nbytes, prot=mmap.PROT_READ) as pages:
                there = np.zeros(-(-len(pages) // mmap.PAGESIZE), dtype=np.uint8)
                address = np.frombuffer(pages, dtype=np.uint8).ctypes.data
                if _mincore(address, len(pages), there.ctypes.data):
                    raise _unknown(ctypes.get_errno())
                found.append(there & 1)
    return float(np.concatenate(found).mean())


def _unknown(code: int) -> ReadError:
    return ReadError(
        f"mincore: expected to be told what of a file is in the page cache, got: {os.strerror(code)}; without that "
        "nothing can be measured with a cold one."
    )
