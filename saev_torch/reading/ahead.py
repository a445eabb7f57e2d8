"""Finds the rows of batches that are to be gathered: of some batches together, before they are opened."""

import itertools
from collections.abc import Iterator

from saev_torch.order.joint import AnySelection
from saev_torch.order.steps import Step
from saev_torch.reading.feeds import AnyGather
from saev_torch.reading.gather import FoundBatch
from saev_torch.reading.reader import Spot

# What works out a batch leaves the caches of the processor while rows are copied: so many batches are worked out
# together, or those of so many samples.
_MOST_TOGETHER, _SAMPLES_TOGETHER = 16, 1 << 17


def look_ahead(
    steps: Iterator[Step], gather: AnyGather | None, selection: AnySelection, spot: Spot
) -> Iterator[tuple[Step, FoundBatch | None]]:
    """Yield steps, each with the batch that is to be gathered; None where it is to be read otherwise.

    With a `gather`, a step has one batch. The first step is worked out alone, so that it comes early; where rows are
    copied here, those behind it some together. Errors are those of `Selection.cells` and `Gather.find`.
    """
    n = 1
    while n:
        some: list[tuple[Step, FoundBatch | None]] = []
        try:
            for step in itertools.islice(steps, n):
                some.append((step, _find(step, gather, selection, spot)))
                if some[-1][1] is None:
                    break
        finally:
            # Those before one that cannot be found, too.
            yield from some
        found = some[-1][1] if some else None
        if found is not None and gather is not None and gather.is_fast:
            n = min(2 * n, _MOST_TOGETHER, max(1, _SAMPLES_TOGETHER // len(found[0])))
        else:
            n = len(some[:1])


def _find(step: Step, gather: AnyGather | None, selection: AnySelection, spot: Spot) -> FoundBatch | None:
    if gather is None or gather.is_refused:
        return None
    chunk = step.loads[0].chunk
    cells = selection.cells(chunk.starts)
    rows = gather.find(selection, cells, spot, None if chunk.is_in_order else chunk.rows)
    return None if rows is None else (cells, rows)
