"""The right to use memory that is handed out again when nobody uses it any more, forked children included.

A child sees the shared memory that its parent sees, not a copy as of other memory. So while somebody holds some, a fork
makes a pipe. The child keeps one end until what it inherited is gone, or it ends, however it does; only then the other
end tells the parent, which looks when it wants memory, that what it let go of may be filled anew. A fork while nobody
holds shared memory makes nothing.

There are no locks: finalizers run in any thread at any time, and a lock may be held for ever in a child.
"""

import contextlib
import os
import select
import threading
import weakref
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from saev_torch.processes.undone import close_with


class Lease:
    """The right to use a piece of memory: numpy arrays and tensors made from it keep it alive.

    `owner` is the array that `memory` is a part of, and lives as long as the lease. `on_release` is called once nothing
    refers to the memory any more: in this process, and where it `is_shared` in those that are forked from it.
    """

    def __init__(
        self, memory: NDArray[np.uint8], owner: NDArray[np.uint8], on_release: Callable[[], None], is_shared: bool
    ) -> None:
        self.owner = owner
        self.__array_interface__ = memory.__array_interface__
        loan = _Loan(on_release)
        weakref.finalize(self, loan.end).atexit = False
        if is_shared:
            _loans.add(loan)

    def array(self) -> NDArray[np.uint8]:
        """The memory, `[nbytes] uint8`; the lease lasts as long as any view of this."""
        return np.asarray(self)


class _Child:
    """A child that inherited memory: whether it may still look at it. Without a pipe it always may."""

    def __init__(self, fd: int | None) -> None:
        self._fd, self._is_over = fd, False
        self._close = None if fd is None else close_with(self, fd)

    def is_holding(self) -> bool:
        if self._fd is not None and self._close is not None and not self._is_over:
            poll = select.poll()
            poll.register(self._fd, 0)
            # Another thread may close it meanwhile, but never takes back that it is over.
            if poll.poll(0):
                self._is_over = True
                self._close()
        return not self._is_over


class _End:
    """The end of a child: closed when no lease that it inherited refers to it any more."""

    def __init__(self, fd: int) -> None:
        close_with(self, fd)


class _Loan:
    """What is done when a lease is gone; in a child, its `ends` of pipes go with it."""

    def __init__(self, on_release: Callable[[], None]) -> None:
        self._on_release, self._pid = on_release, os.getpid()
        self.children: list[_Child] = []
        self.ends: list[_End] = []

    def end(self) -> None:
        # A forked child drops its copies of objects too, and has no say in what its parent still uses.
        if self._pid == os.getpid():
            _loans.discard(self)
            _ended[self] = True
            self.settle()

    def settle(self) -> None:
        """Release the memory if the lease is gone, and no child holds it."""
        for child in tuple(self.children):
            if not child.is_holding():
                with contextlib.suppress(ValueError):
                    self.children.remove(child)
        # Whoever takes it out releases it.
        if not self.children and _ended.pop(self, False):
            self._on_release()


_loans: set[_Loan] = set()
"""Those of shared memory that this process holds."""
_ended: dict[_Loan, bool] = {}
"""Those that it does not hold any more, but maybe a child."""
_children: set[_Child] = set()
_forking: dict[int, tuple[_Child, int]] = {}
"""By thread: the child that is being forked, and its end of the pipe."""


def settle() -> None:
    """Release what no child holds any more. Called where memory is wanted, or comes."""
    if _children:
        _children.difference_update([child for child in tuple(_children) if not child.is_holding()])
        for loan in tuple(_ended):
            loan.settle()


def _before_fork() -> None:
    settle()
    if not _loans:
        return
    receiver, sender = None, -1
    # Without a descriptor to be had, what the child inherits is never used again.
    with contextlib.suppress(OSError):
        receiver, sender = os.pipe()
    child = _Child(receiver)
    _forking[threading.get_ident()] = child, sender
    for loan in tuple(_loans):
        loan.settle()
        loan.children.append(child)


def _after_fork_in_parent() -> None:
    child, sender = _forking.pop(threading.get_ident(), (None, -1))
    if child is None:
        return
    for loan in tuple(_loans):
        # Another thread may have taken it since.
        if child not in loan.children:
            loan.children.append(child)
    if sender >= 0:
        os.close(sender)
    _children.add(child)


def _after_fork_in_child() -> None:
    _, sender = _forking.pop(threading.get_ident(), (None, -1))
    for _, other in _forking.values():
        if other >= 0:
            os.close(other)
    end = _End(sender) if sender >= 0 else None
    for loan in _loans:
        loan.children.clear()
        if end is not None:
            loan.ends.append(end)
    # The rest are of the parent, whose ends of pipes are closed here.
    for mine in (_loans, _ended, _children, _forking):
        mine.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
