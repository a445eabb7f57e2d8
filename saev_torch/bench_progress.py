"""A progress bar on stderr: tqdm's where it is installed, else a line for each step."""

import importlib
import sys
import time
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]


class Progress:
    """Counts steps. A context manager.

    Args:
        title: What is going on.
        total: Number of steps.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._began = time.monotonic()
        self._bar: Any = None
        try:
            tqdm = importlib.import_module("tqdm").tqdm
        except ModuleNotFoundError:
            return
        # Its monitor would be one more thread in this process when workers are forked.
        tqdm.monitor_interval = 0
        self._bar = tqdm(total=total, desc=title, file=sys.stderr, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Clear the bar away."""
        if self._bar is not None:
            self._bar.close()

    def begin(self, name: str) -> None:
        """Say what the next step is."""
        if self._bar is not None:
            self._bar.set_postfix_str(name)
        else:
            took = time.monotonic() - self._began
            sys.stderr.write(f"{self._title}: {self._done} of {self._total} after {took:.0f} s, next {name}\n")
            sys.stderr.flush()

    def advance(self, n: int = 1) -> None:
        """Count steps that are done."""
        self._done += n
        if self._bar is not None:
            self._bar.update(n)
