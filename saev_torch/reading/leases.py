"""The right to use memory that is handed out again when nobody uses it any more, forked children included.

A child sees the shared memory that its parent sees, not a copy as of other memory. So while somebody holds some, a fork
makes a pipe. The child keeps one end until what it inherited is gone, or it ends, however it does; only then the other
end tells the parent, which looks when it wants memory, that what it let go of may be filled anew. A fork while nobody
holds shared memory makes nothing.

There are no locks: finalizers run in any thread at any time, and a lock may be held for ever in a child. What is done
for each batch that a consumer drops is all in C: Python drops an interrupt that comes into a finalizer of its own, so
that a user's Ctrl-C would not be heard.
"""

import contextlib
import functools
import operator
import os
import select
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.processes.undone import close_with


class Lease:
    """The right to use a piece of memory: numpy arrays and tensors made from it keep it alive.

    `owner` is the array that `memory` is a part of, and lives as long as the lease. Where the memory `is_shared`,
    forked children may use it, too. `returned` is one more once nobody does, where it is given.
    """

    def __init__(
        self,
        memory: NDArray[np.uint8],
        owner: NDArray[np.uint8],
        is_shared: bool,
        returned: NDArray[np.int64] | None = None,
    ) -> None:
        self.owner = owner
        self.__array_interface__ = memory.__array_interface__
        self.loan = Loan(self, is_shared, returned)
        # Of a pipe, in a child that inherited it; its own children inherit that.
        self.end: _End | None = None

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


class Loan:
    """Whether a lease is over, and what is done then."""

    def __init__(self, lease: Lease, is_shared: bool, returned: NDArray[np.int64] | None) -> None:
        self.children: list[_Child] = []
        self._returned, self._then = returned, _nothing
        # Once it is empty, nothing is done in C.
        self._in_c = [returned]
        if not is_shared:
            self._lease = weakref.ref(lease)
            return
        count = iter(self._in_c) if returned is None else map(operator.iadd, self._in_c, (1,))
        work = zip(count, map(_loans.discard, (self,)), strict=False)
        self._lease = weakref.ref(lease, functools.partial(next, work))
        _loans.add(self)

    @property
    def is_over(self) -> bool:
        """Whether nobody uses the memory any more, here or in a child."""
        for child in tuple(self.children):
            if not child.is_holding():
                with contextlib.suppress(ValueError):
                    self.children.remove(child)
        return not self.children and self._lease() is None

    def take_over(self, then: Callable[[], Any] | None = None) -> None:
        """Let it be done in Python, as children may use the memory, or there is more to do."""
        self._then = then or self._then
        is_new = bool(self._in_c)
        self._in_c.clear()
        lease = self._lease()
        if lease is None:
            self.settle()
        elif is_new:
            weakref.finalize(lease, self.settle).atexit = False
        if self not in _loans:
            # It was over before.
            self._then = _nothing

    def inherit(self, child: _Child) -> None:
        """Let a child that is forked use the memory."""
        self.children.append(child)
        self.take_over()

    def leave_to_parent(self, end: _End | None) -> None:
        """In the child: have no say, but tell the parent by the `end` of a pipe when the lease is over."""
        self.children.clear()
        self._in_c.clear()
        lease = self._lease()
        if lease is not None:
            lease.end = end

    def settle(self) -> None:
        """Do what is due if it is over, once."""
        if not self.is_over:
            return
        try:
            # Whoever takes it out does it, be it in C. A child that is forked has none of its parent's.
            _loans.remove(self)
        except KeyError:
            return
        then, self._then = self._then, _nothing
        if self._returned is not None:
            self._returned += 1
        then()


def _nothing() -> None:
    pass


_loans: set[Loan] = set()
"""Those of shared memory that somebody holds, in this process or in a child."""
_children: set[_Child] = set()
_forking: dict[int, tuple[_Child, int]] = {}
"""By thread: the child that is being forked, and its end of the pipe."""


def settle() -> None:
    """Release what no child holds any more. Called where memory is wanted, or comes."""
    if _children:
        _children.difference_update([child for child in tuple(_children) if not child.is_holding()])
        for loan in tuple(_loans):
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
        loan.inherit(child)


def _after_fork_in_parent() -> None:
    child, sender = _forking.pop(threading.get_ident(), (None, -1))
    if child is None:
        return
    for loan in tuple(_loans):
        # Another thread may have taken it since.
        if child not in loan.children:
            loan.inherit(child)
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
        loan.leave_to_parent(end)
    # The rest are of the parent, whose ends of pipes are closed here.
    for mine in (_loans, _children, _forking):
        mine.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
