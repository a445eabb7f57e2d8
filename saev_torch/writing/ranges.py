"""Which of the integers 0..n have been seen, when they come in ranges of any order."""

import bisect
from collections.abc import Iterator


class Ranges:
    """Disjoint ranges of integers, neighbours merged: batches in order keep it at one range."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def overlap(self, start: int, stop: int) -> tuple[int, int] | None:
        """Return the first part of `start..stop` that is in a range already."""
        i = bisect.bisect_right(self._stops, start)
        if start < stop and i < len(self._starts) and self._starts[i] < stop:
            return max(start, self._starts[i]), min(stop, self._stops[i])
        return None

    def add(self, start: int, stop: int) -> None:
        """Add `start..stop`, parts of which may be in a range already."""
        # Ranges low..high overlap or touch it, and become one with it.
        low = bisect.bisect_left(self._stops, start)
        high = bisect.bisect_right(self._starts, stop)
        self._starts[low:high] = [min([start, *self._starts[low:high]])]
        self._stops[low:high] = [max([stop, *self._stops[low:high]])]

    def gaps(self, stop: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield what is missing from `start..stop`."""
        at = start
        first = bisect.bisect_right(self._stops, start)
        for low, high in zip(self._starts[first:], self._stops[first:], strict=True):
            if low >= stop:
                break
            if at < low:
                yield at, low
            at = high
        if at < stop:
            yield at, stop
