"""Which part of the work is this process's: rank and worker, found in one place, when iterating."""

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import sys
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed
from torch.utils.data import get_worker_info

from saev_torch.config import is_integer
from saev_torch.errors import ConfigError


class World(NamedTuple):
    """This rank, from 0, the number of ranks, and the process that found this out, for itself and its workers."""

    rank: int
    world_size: int
    pid: int


def check_world(rank: int | None, world_size: int | None) -> None:
    """Refuse explicit arguments that make no sense, with a `ConfigError`."""
    if rank is None and world_size is None:
        return
    if rank is None or world_size is None:
        raise ConfigError(f"rank, world_size: expected both or neither, got rank={rank!r}, world_size={world_size!r}.")
    if not (is_integer(world_size, 1) and is_integer(rank, 0, world_size - 1)):
        raise ConfigError(f"rank: expected 0 <= rank < world_size, got rank={rank!r}, world_size={world_size!r}.")


def consumer_pid() -> int:
    """The process that the batches are for: the parent in a DataLoader worker, else this one."""
    parent = multiprocessing.parent_process() if get_worker_info() is not None else None
    return os.getpid() if parent is None or parent.pid is None else parent.pid


def find_session(info: Any) -> int:
    """What the workers of one iterator of a DataLoader have in common, and with no others; `info` is this worker's."""
    # The base seed is the same for two iterators where the user seeds torch before each. The pipe that the workers put
    # their batches into is not.
    arguments = getattr(multiprocessing.current_process(), "_args", ())
    queues: list[Any] = [value for value in arguments if isinstance(value, multiprocessing.queues.Queue)]
    return os.fstat(queues[-1]._reader.fileno()).st_ino if queues else int(info.seed - info.id)


def count_cores() -> int:
    """The cores that this process may run on."""
    # Some systems do not have it, others refuse it.
    with contextlib.suppress(AttributeError, OSError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_own_cores() -> int:
    """This process's part of the cores: those it may run on, divided by the workers and the ranks on this machine."""
    info = get_worker_info()
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    n_processes = (1 if info is None else info.num_workers) * (int(ranks) if ranks.isdecimal() else 1)
    return max(1, count_cores() // max(1, n_processes))


def find_world(rank: int | None, world_size: int | None, known: World | None = None) -> World:
    """Find rank and world size: explicit arguments, else torch.distributed, else the launcher's variables, else 0 of 1.

    `known` is what the parent process found when it started this worker: a spawned worker cannot find it itself.
    Launcher's variables that make no sense are a `ConfigError`.
    """
    pid = consumer_pid()
    if rank is not None and world_size is not None:
        return World(rank, world_size, pid)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), pid)
    if known is not None and get_worker_info() is not None and known.pid == pid:
        return known
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not all(found.values()):
        return World(0, 1, pid)
    try:
        rank, world_size = int(found["RANK"]), int(found["WORLD_SIZE"])
    except ValueError as err:
        raise ConfigError(f"environment: expected integers in RANK and WORLD_SIZE, got {found}; unset both.") from err
    if not 0 <= rank < world_size:
        raise ConfigError(f"environment: expected 0 <= RANK < WORLD_SIZE, got {found}; unset both.")
    return World(rank, world_size, pid)


def require_shared_once(world: World) -> None:
    """Refuse to share batches among ranks where Accelerate does so again: each would see a part of its part.

    Accelerate tells a data set nothing of that, but is among the callers: of `set_epoch`, which it calls before it
    iterates, and of the iteration, also in a worker.

    Raises:
        ConfigError: It is among them, and there is more than one rank.
    """
    frame: FrameType | None = sys._getframe(1) if world.world_size > 1 else None
    while frame is not None:
        if frame.f_globals.get("__name__") == "accelerate.data_loader":
            raise ConfigError(
                f"Accelerator.prepare: expected a loader whose batches are shared among {world.world_size} ranks once, "
                "got one that Accelerate shares again, so samples would be missed; prepare ShuffledDataLoader(cfg) "
                "or OrderedDataLoader(cfg), which it leaves as they are, or give the data set rank=0, world_size=1."
            )
        frame = frame.f_back
