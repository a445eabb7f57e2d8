"""What a forked child inherits, and must leave to its parent: torch ends the workers of an iterator that is dropped."""

import os
import weakref
from typing import Any, Protocol

from saev_torch.processes.locks import members


class Heir(Protocol):
    """Something that may hold what is its parent's, in a child."""

    def leave_to_parent(self) -> Any:
        """Let go of it, and return it."""


_heirs: "weakref.WeakSet[Heir]" = weakref.WeakSet()
_kept: list[Any] = []


def register(heir: Heir) -> None:
    """Ask it in every child that is forked while it lives."""
    _heirs.add(heir)


def _leave_all() -> None:
    _kept.extend(heir.leave_to_parent() for heir in members(_heirs))


os.register_at_fork(after_in_child=_leave_all)
