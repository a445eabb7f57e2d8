"""Says once where rank and number of ranks were learned, and what of the environment contradicts it."""

import logging
import os

from torch.utils.data import get_worker_info

from saev_torch.processes.notices import Notices
from saev_torch.processes.world import (
    FROM_DISTRIBUTED,
    FROM_NAMES,
    FROM_NOTHING,
    NAMES,
    NAMES_OF,
    World,
    is_initialized,
)

_log = logging.getLogger("saev_torch")

# What launchers set beside RANK and WORLD_SIZE.
_COMPANIONS = ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def announce(world: World, notices: Notices) -> None:
    """Log which rank this is, of how many, and where that was learned; as a warning if it is contradicted."""
    if not notices.may_say(str(world)):
        return
    contradiction = find_contradiction(world)
    if contradiction is None:
        _log.info("%s", world)
    else:
        _log.warning("%s: %s", world, contradiction)


def find_contradiction(world: World) -> str | None:
    """What contradicts a world, and what to do about it; None where nothing does, or somebody gave it."""
    if world.source == FROM_DISTRIBUTED:
        return _contradict_distributed(world) or _find_tasks(world)
    if world.source == FROM_NAMES:
        return _find_leftovers(world) or _find_tasks(world)
    return _find_half_of_names() or _find_tasks(world) if world.source == FROM_NOTHING else None


def _quote(names: tuple[str, ...]) -> str:
    return " and ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))


def _contradict_distributed(world: World) -> str | None:
    own = dict(zip(NAMES, (world.rank, world.world_size), strict=True))
    differing = tuple(name for name in NAMES if os.environ.get(name, str(own[name])) not in ("", str(own[name])))
    return f"the environment has {_quote(differing)}; torch.distributed is believed" if differing else None


def _find_leftovers(world: World) -> str | None:
    # A spawned worker has no process group; its parent has looked before.
    is_launched = is_initialized() or get_worker_info() is not None or any(map(os.environ.get, _COMPANIONS))
    if is_launched or world.world_size == 1:
        return None
    return (
        f"torch.distributed is not initialized, and none of {', '.join(_COMPANIONS)} is set, as launchers do. If these "
        f"variables are left over, only 1/{world.world_size} of the batches are read: unset both, or give rank=0, "
        "world_size=1."
    )


def _find_half_of_names() -> str | None:
    said = _quote(NAMES)
    return f"everything is read, as of {' and '.join(NAMES)} only {said} is set; set both or none" if said else None


def _find_tasks(world: World) -> str | None:
    for launcher, pairs in NAMES_OF.items():
        for names in pairs:
            rank, n_tasks = (os.environ.get(name, "") for name in names)
            if not n_tasks.isdecimal() or int(n_tasks) < 2:
                continue
            if world.world_size == 1:
                return (
                    f"everything is read, but there are {_quote(names)}. If they started this process, each of "
                    f"{n_tasks} reads everything: give rank={launcher!r}, or use torchrun. If there is only this "
                    "process, rank=0, world_size=1 says so."
                )
            # The processes of torchrun may have other numbers than the tasks that started it.
            is_free = world.source != FROM_NAMES or "TORCHELASTIC_RUN_ID" in os.environ
            if int(n_tasks) == world.world_size and rank != str(world.rank) and not is_free:
                return (
                    f"there are also {_quote(names)}, so several processes may read the same: give rank={launcher!r}."
                )
    return None
