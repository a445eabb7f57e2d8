"""What an interrupt keeps from being done: Python calls a finalizer once, and an interrupted one never again.

Then an engine, with all that it holds, stays in the list of finalizers for good, until it is made up for. Descriptors
are closed in a way that nothing interrupts.
"""

import functools
import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any

_keys = itertools.count()
_closing: dict[int, "weakref.ref[Any]"] = {}


def close_with(owner: object, fd: int) -> Callable[[], Any]:
    """Close a descriptor when its owner is gone, or when what is returned is called, once. At exit it stays open."""
    key = next(_keys)
    # All of it is in C: handlers of signals are called between instructions of Python only, and here are none.
    work = zip(map(os.close, (fd,)), map(_closing.pop, (key,)), strict=False)
    _closing[key] = weakref.ref(owner, functools.partial(next, work))
    return functools.partial(next, work, None)


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
