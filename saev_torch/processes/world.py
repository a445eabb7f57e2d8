"""Which part of the work is this process's: rank and worker, found in one place, when iterating."""

import contextlib
import multiprocessing
import multiprocessing.queues
import os
from typing import Any, Literal, NamedTuple, TypeAlias

import torch.distributed
from torch.utils.data import get_worker_info

from saev_torch.errors import ConfigError
from saev_torch.format.rules import is_integer

Rank: TypeAlias = int | Literal["slurm", "mpi"] | None
"""A rank; or which launcher's variables tell it, with the number of ranks; or None, to look it up."""

NAMES = "RANK", "WORLD_SIZE"
"""Variables with which launchers tell rank and number of ranks."""

NAMES_OF = {
    "slurm": (("SLURM_PROCID", "SLURM_NTASKS"),),
    "mpi": (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")),
}
"""The same, by what `rank` may name."""

FROM_DISTRIBUTED, FROM_NAMES, FROM_NOTHING = "from torch.distributed", "from RANK and WORLD_SIZE", "no launcher found"
"""What a world that nobody gave says as its source."""


class World(NamedTuple):
    """This rank, from 0, the number of ranks, and the process that found this out, for itself and its workers.

    `source` says where that was learned.
    """

    rank: int
    world_size: int
    pid: int
    source: str = "as arguments say"

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} ({self.source})"


def check_world(rank: Rank, world_size: int | None) -> None:
    """Refuse explicit arguments that make no sense, with a `ConfigError`."""
    if rank is None and world_size is None:
        return
    if isinstance(rank, str):
        if rank not in NAMES_OF:
            raise ConfigError(f"rank: expected an integer, {' or '.join(map(repr, NAMES_OF))}, got {rank!r}.")
        if world_size is not None:
            raise ConfigError(f"world_size: expected none with rank={rank!r}, which tells both, got {world_size!r}.")
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


def find_world(rank: Rank, world_size: int | None, known: World | None = None) -> World:
    """Find rank and world size: explicit arguments, else torch.distributed, else RANK and WORLD_SIZE, else 0 of 1.

    `known` is what the parent process found when it started this worker: a spawned worker cannot find it itself. What
    SLURM and MPI say counts only where `rank` names them: their variables are set in a batch script, too, and in a
    shell that they opened, where one process wants all of the data.

    Raises:
        ConfigError: The launcher's variables make no sense, or are not those that `rank` names.
    """
    pid = consumer_pid()
    if rank is not None and not isinstance(rank, str) and world_size is not None:
        return World(rank, world_size, pid)
    is_known = known is not None and get_worker_info() is not None and known.pid == pid
    if known is not None and is_known and rank is not None:
        return known
    if isinstance(rank, str):
        for names in NAMES_OF[rank]:
            if any(name in os.environ for name in names):
                return _parse(names, pid)
        wanted = " or ".join(" and ".join(names) for names in NAMES_OF[rank])
        raise ConfigError(
            f"rank: expected {wanted} in the environment for rank={rank!r}, got neither; start the processes with "
            f"{'srun' if rank == 'slurm' else 'mpirun'}, or give the rank itself, with world_size."
        )
    if is_initialized():
        return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), pid, FROM_DISTRIBUTED)
    if known is not None and is_known:
        return known
    return _parse(NAMES, pid) if all(map(os.environ.get, NAMES)) else World(0, 1, pid, FROM_NOTHING)


def is_initialized() -> bool:
    """Whether this process is in a process group of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _parse(names: tuple[str, str], pid: int) -> World:
    """What two variables say, the first of them the rank."""
    found = {name: os.environ.get(name, "") for name in names}
    try:
        rank, world_size = map(int, found.values())
    except ValueError as err:
        expected = f"integers in {' and '.join(names)}"
        raise ConfigError(f"environment: expected {expected}, got {found}; unset both.") from err
    if not 0 <= rank < world_size:
        raise ConfigError(f"environment: expected 0 <= {' < '.join(names)}, got {found}; unset both.")
    return World(rank, world_size, pid, f"from {' and '.join(names)}")
