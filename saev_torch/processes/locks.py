"""Locks that a forked child finds free: the thread that had one when the process was forked is not there.

Modules have locks, too, while they are imported. numpy imports some of its own only when they are used, which may be in
a thread of ours; so they are imported here.
"""

import os
import weakref
from typing import Any, TypeVar

import numpy.ma
import numpy.random  # noqa: F401 -- see above

_T = TypeVar("_T")

_locks: "weakref.WeakSet[Any]" = weakref.WeakSet()


def renewed(lock: _T) -> _T:
    """Let no other thread have a `Lock` or an `RLock` in a child that is forked from now on.

    What it guards must be whole between any two lines that write to it.
    """
    _locks.add(lock)
    return lock


def members(found: "weakref.WeakSet[_T]") -> list[_T]:
    """What is in a set that other threads may add to meanwhile."""
    while True:
        try:
            return list(found)
        except RuntimeError:
            continue


def _renew() -> None:
    for lock in members(_locks):
        # What the thread that forked has itself it will give back.
        if not (hasattr(lock, "_is_owned") and lock._is_owned()):
            lock._at_fork_reinit()


os.register_at_fork(after_in_child=_renew)
