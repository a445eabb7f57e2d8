"""What an interrupt kept from being done: Python calls a finalizer once, and one that is interrupted there never again.

Then a descriptor stays open, or an engine, with all that it holds, stays in the list of finalizers for good.
"""

import weakref
from typing import Any


def _finalizers() -> list[tuple[Any, Any]]:
    # A private table, but all public ways to it begin at a finalizer that somebody has kept.
    table = getattr(weakref.finalize, "_registry", {})
    while True:
        try:
            return list(table.items())
        except RuntimeError:
            # Another thread, or the garbage collector, has just changed it.
            continue


def make_up() -> None:
    """Call the finalizers of objects that are gone, which should have been called when they went."""
    for finalizer, info in _finalizers():
        # Each is called once.
        if info.weakref() is None:
            finalizer()
