"""Whether the batches that readers hold fit into memory: a process that takes too much is killed without a word."""

import dataclasses
import os

from saev_torch.order.mixture import MixturePlan
from saev_torch.order.shuffle import ShufflePlan
from saev_torch.order.steps import Plan, Share, count_open_slots, slot_nbytes
from saev_torch.order.uniform import UniformPlan
from saev_torch.processes.machine import memory
from saev_torch.reading.direct import fits_page_cache


def advise_room(plan: Plan, share: Share, buffer_size: int, sample_nbytes: int, world_size: int) -> str | None:
    """Say what would fit where the batches that all readers on this machine hold do not; None where they do.

    The readers, `share.stride` in all, are those of `world_size` ranks, of which some are elsewhere.
    """
    try:
        _, available, limit = memory()
    except (OSError, KeyError, ValueError):
        return None
    n_readers = share.stride // world_size * count_ranks_here(world_size)
    needed = _needed_nbytes(plan, share, buffer_size, sample_nbytes) * n_readers
    if needed <= available:
        return None
    fitting = buffer_size
    while fitting and (_needed_with(plan, share, fitting, sample_nbytes) * n_readers > available):
        fitting = fitting * 7 // 8
    is_group = "" if limit is None else f", in a control group with a limit of {limit / 1e9:.1f} GB"
    remedy = f"use buffer_size={fitting}" if fitting else f"use smaller batches than of {plan.batch_size} samples"
    return (
        f"buffer_size: expected batches that fit into memory, got {needed / 1e9:.1f} GB for the {n_readers} reading "
        f"processes of this machine, which has {available / 1e9:.1f} GB to give{is_group}; {remedy}, or a process may "
        "be killed."
    )


def advise_order(plan: Plan, sample_nbytes: int) -> str | None:
    """Say what suits data that memory cannot hold where samples are read one by one; None where all is well."""
    if isinstance(plan, MixturePlan):
        return next(filter(None, (advise_order(made.plan, sample_nbytes) for made in plan.first_passes())), None)
    nbytes = plan.n_samples * sample_nbytes
    if not isinstance(plan, UniformPlan) or fits_page_cache(nbytes):
        return None
    return (
        f"order: expected data that memory can hold, because order='uniform' reads each sample alone, got "
        f"{nbytes / 1e9:.1f} GB; a disk gives large blocks several times faster: use order='blocks'."
    )


def count_ranks_here(world_size: int) -> int:
    """How many of the ranks run on this machine, as far as the launcher says so."""
    found = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(world_size, max(1, int(found))) if found.isdecimal() else 1


def _needed_with(plan: Plan, share: Share, buffer_size: int, sample_nbytes: int) -> int:
    if isinstance(plan, MixturePlan):
        plan = plan.with_buffer(buffer_size)
    elif isinstance(plan, ShufflePlan):
        plan = dataclasses.replace(plan, buffer_size=buffer_size)
    return _needed_nbytes(plan, share, buffer_size, sample_nbytes)


def _needed_nbytes(plan: Plan, share: Share, buffer_size: int, sample_nbytes: int) -> int:
    n_own = -(-plan.n_batches // share.stride)
    n_open = min(n_own, count_open_slots(plan, share, buffer_size))
    return n_open * slot_nbytes(min(plan.batch_size, plan.n_samples), sample_nbytes)
