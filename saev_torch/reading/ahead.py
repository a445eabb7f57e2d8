"""Finds the rows of batches that are to be gathered: of some batches together, before they are opened."""

import itertools
import time
from collections.abc import Iterator

from saev_torch.order.joint import AnySelection
from saev_torch.order.steps import Step
from saev_torch.reading.feeds import AnyGather
from saev_torch.reading.gather import FoundBatch
from saev_torch.reading.reader import Spot

# What works out a batch leaves the caches of the processor while rows are copied: so many batches are worked out
# together, those of so many rows, or what is found in so many seconds, for which the consumer may wait.
_MOST_TOGETHER, _ROWS_TOGETHER, _SECONDS_TOGETHER = 16, 1 << 17, 0.01
# They hold few shards open, or few more than one of them alone: else each is worked out by itself from then on.
_FEW_SHARDS, _MORE_SHARDS = 16, 1.25


def look_ahead(
    steps: Iterator[Step], gather: AnyGather | None, selection: AnySelection, spot: Spot
) -> Iterator[tuple[Step, FoundBatch | None]]:
    """Yield steps, each with the batch that is to be gathered; None where it is to be read otherwise.

    With a `gather`, a step has one batch. The first step is worked out alone, so that it comes early; where rows are
    copied here, those behind it some together. Errors are those of `Selection.cells` and `Gather.find`.
    """
    n, most = 1, _MOST_TOGETHER
    while n:
        some: list[tuple[Step, FoundBatch | None]] = []
        found, held, n_held, latest = None, set[int](), _FEW_SHARDS, time.monotonic() + _SECONDS_TOGETHER
        try:
            for step in itertools.islice(steps, n):
                found = _find(step, gather, selection, spot)
                some.append((step, found))
                own = _shards(found)
                held |= own
                n_held = max(n_held, int(_MORE_SHARDS * len(own)))
                if len(held) > n_held:
                    most = 1
                if found is None or most == 1 or time.monotonic() > latest:
                    break
        finally:
            # Those before one that cannot be found, too.
            yield from some
        if found is not None and gather is not None and gather.is_fast:
            n = min(2 * n, most, max(1, _ROWS_TOGETHER // sum(len(rows) for _, rows in found[1])))
        else:
            n = len(some[:1])


def _shards(found: FoundBatch | None) -> set[int]:
    """Numbers of the shards that the rows of a batch hold open."""
    return set() if found is None else {number for _, rows in found[1] for number in rows.mappings}


def _find(step: Step, gather: AnyGather | None, selection: AnySelection, spot: Spot) -> FoundBatch | None:
    if gather is None or gather.is_refused:
        return None
    chunk = step.loads[0].chunk
    cells = selection.cells(chunk.starts)
    rows = gather.find(selection, cells, spot, None if chunk.is_in_order else chunk.rows)
    return None if rows is None else (cells, rows)
