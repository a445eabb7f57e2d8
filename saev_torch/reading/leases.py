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
import itertools
import operator
import os
import select
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.processes.undone import close_with


class Lease:
    """The right to use a piece of memory: numpy arrays and tensors made from it keep it alive.

    `owner` is the array that `memory` is a part of; `keeper`, if there is one, gives it back when it goes. Both live as
    long as the lease. Where the memory `is_shared`, forked children may use it, too, and it is kept for them.
    `returned` is one more once nobody uses it, where it is given.
    """

    def __init__(
        self,
        memory: NDArray[np.uint8],
        owner: NDArray[np.uint8],
        is_shared: bool,
        keeper: object = None,
        returned: NDArray[np.int64] | None = None,
    ) -> None:
        self.owner, self.keeper = owner, keeper
        self.__array_interface__ = memory.__array_interface__
        # Of a pipe, in a child that inherited it; its own children inherit that.
        self.end: _End | None = None
        self.loan = Loan(self, is_shared, returned)

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
        self._pid, self._number, self._then = os.getpid(), next(_numbers), _nothing
        self._kept: object = None
        self._is_taken_over = False
        # Once it is empty, nothing is done in C.
        self._in_c = [self._number]
        if not is_shared:
            self._lease = weakref.ref(lease)
            return
        _words[self._number] = _uncounted if returned is None else returned
        work = zip(_count(self._in_c), map(_loans.pop, (self._number,), (None,)), strict=False)
        self._lease = weakref.ref(lease, functools.partial(next, work))
        _loans[self._number] = self

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
        # At no time nobody does it; whoever takes the word out counts.
        lease = self._lease()
        if lease is not None and not self._is_taken_over:
            weakref.finalize(lease, self.settle).atexit = False
            self._is_taken_over = True
        self._in_c.clear()
        self._then = then or self._then
        if self._lease() is None:
            self.settle()
        if self._number not in _words:
            # It was over before.
            self._then = _nothing

    def inherit(self, child: _Child) -> None:
        """Let a child that is forked use the memory."""
        self.children.append(child)
        lease = self._lease()
        self._kept = self._kept if lease is None else lease.keeper
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
        # A forked child has copies of its parent's.
        if self._pid != os.getpid() or not self.is_over or next(_count((self._number,))) is _taken:
            return
        _loans.pop(self._number, None)
        then, self._then, self._kept = self._then, _nothing, None
        then()


def _count(numbers: Iterable[int]) -> Iterator[NDArray[np.int64]]:
    """Take the word of a loan out and count, in C, so that nothing comes between; `_taken`, if somebody else has."""
    return map(operator.iadd, map(_words.pop, numbers, (_taken,)), (1,))


def _nothing() -> None:
    pass


_numbers = itertools.count()
_words: dict[int, NDArray[np.int64]] = {}
"""Where it is counted that memory came back: of each loan of shared memory that is not over, here or in a child."""
_uncounted, _taken = np.zeros((2, 1), dtype=np.int64)
_loans: dict[int, Loan] = {}
"""Those loans; one more, for a moment, whose word has just been taken out."""
_children: set[_Child] = set()
_forking: dict[int, tuple[_Child, int]] = {}
"""By thread: the child that is being forked, and its end of the pipe."""


def settle() -> None:
    """Release what no child holds any more. Called where memory is wanted, or comes."""
    if _children:
        over = [child for child in tuple(_children) if not child.is_holding()]
        for loan in tuple(_loans.values()):
            loan.settle()
        _children.difference_update(over)


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
    for loan in tuple(_loans.values()):
        loan.inherit(child)


def _after_fork_in_parent() -> None:
    child, sender = _forking.pop(threading.get_ident(), (None, -1))
    if child is None:
        return
    for loan in tuple(_loans.values()):
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
    for loan in _loans.values():
        loan.leave_to_parent(end)
    # The rest are of the parent, whose ends of pipes are closed here.
    for mine in (_loans, _words, _children, _forking):
        mine.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
