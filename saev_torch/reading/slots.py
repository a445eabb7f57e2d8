"""Batch memory that is handed out again only when the last view of it is gone.

Fresh memory costs more than reading into it, because of its page faults, so slots are reused. In a worker process they
are parts of a memfd, see `regions`: it does not count against /dev/shm, travels to the parent as a name, and vanishes
with the last process that maps it. Elsewhere they are private memory. Both are in huge pages where the system has them:
copying into those is up to a fifth faster for good.

Most systems give shared memory none when it is touched, but do so on request (`MADV_COLLAPSE`, Linux 6.1). Where the
machine has memory they come at 11 to 16 GB/s, and small ones at 1.4 to 2.3. On a virtual machine whose host has to find
memory first it was 0.4: 3 GB took 4 s of the first epoch. So huge pages come first where they come fast, and in a
buffer of many shared slots once the first batch is there: it is used for days. Elsewhere small ones come first, and
become huge when they are used again, in a share of the time. A worker that ends with its epoch may do without most of
it, see `Engine`.

A slot knows that it is free from counters with one writer each: the worker counts what it sent, the parent what it
let go of. A worker that is killed cannot leave a lock behind.
"""

import contextlib
import dataclasses
import os
import threading
import time
import weakref

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from saev_torch.errors import ReadError
from saev_torch.processes import inherited
from saev_torch.processes.locks import renewed
from saev_torch.processes.machine import has_memory_files
from saev_torch.reading.leases import Lease, Loan, settle
from saev_torch.reading.regions import Name, OwnRegion, make_pages, make_pages_huge

# The memory that was needed within so many batches is kept.
_WINDOW = 64
# The share of the time in which small pages may become huge.
_HUGE_SHARE = 0.02
_NONE_SENT = np.zeros(2, dtype=np.int64)


class Slot:
    """Memory for one batch, shared if another process will read it: then `fd` is its file, else -1.

    It begins at `file_offset` there. A `region` with a slot to take is where it is; without one it has its own.
    """

    def __init__(
        self,
        nbytes: int,
        shared: bool,
        region: OwnRegion | None = None,
        in_haste: bool = True,
        may_be_huge: bool = True,
    ) -> None:
        self.nbytes = nbytes
        self.pid = os.getpid()
        self._held, self._counts = False, _NONE_SENT
        self._loan: Loan | None = None
        self.fd, self.file_offset, self._region, self._index = -1, 0, region, 0
        try:
            if shared and region is None:
                self._region = OwnRegion(nbytes, 1)
            if self._region is None:
                self._owner, is_huge = make_pages(nbytes, may_be_huge)
                self._n_huge = nbytes if is_huge else 0
            else:
                self._owner = self._take_from(self._region, in_haste, may_be_huge)
        except (OSError, MemoryError) as err:
            raise ReadError(
                f"batch_size: expected {nbytes} bytes of memory for another batch, got: {err}; keep fewer batches, or "
                "lower batch_size, buffer_size or the number of workers."
            ) from err
        self._memory = self._owner[:nbytes]
        self.address = int(self._memory.ctypes.data)

    def _take_from(self, region: OwnRegion, in_haste: bool, may_be_huge: bool) -> NDArray[np.uint8]:
        self._index = region.take(in_haste, may_be_huge)
        self.fd, self.file_offset = region.fd, region.offset(self._index)
        self._counts = region.counts(self._index)
        weakref.finalize(self, region.give_back, self._index).atexit = False
        return region.memory(self._index)

    @property
    def is_free(self) -> bool:
        """Whether nobody can see the memory: neither this process nor one that it was sent to."""
        # In this order: a slot is lent before it is not held any more, and sent before it is not lent.
        if self._held:
            return False
        loan = self._loan
        return (loan is None or loan.is_over) and bool(self._counts[0] == self._counts[1])

    @property
    def is_own(self) -> bool:
        """Whether this process may send the slot on: it is shared, and was made here."""
        return self._region is not None and self.pid == os.getpid()

    def make_huge(self) -> None:
        """Let a piece more of the memory be of huge pages, where the system has some."""
        if self._region is not None:
            self._region.make_huge(self._index)
        elif self._n_huge < len(self._owner):
            self._n_huge = make_pages_huge(self._owner, self._n_huge)

    def lease(self) -> Lease:
        """Hand the memory out; the slot is free again when the lease and all views of it are gone."""
        lease = Lease(self._memory, self._owner, self._region is not None, keeper=self)
        self._loan, self._held = lease.loan, False
        return lease

    def first(self, nbytes: int) -> NDArray[np.uint8]:
        """The first bytes of the memory, for who has a lease of it."""
        return self._memory[:nbytes]

    def release(self) -> None:
        """Take the slot back, which nobody has a lease of: nothing in this process uses it any more."""
        self._held = False

    def send(self) -> Name | None:
        """Note that the slot goes to the parent process: the name by which it attaches it; None if it never can."""
        name = None if self._region is None else self._region.send(self._index)
        if name is not None:
            _sent.add(self)
        return name


Field = tuple[str, str, int, tuple[int, ...]]
"""Key, name of the dtype, byte offset and shape of a tensor in a slot."""


@dataclasses.dataclass
class OpenBatch:
    """A batch of `size` samples that is being read, or was.

    Attributes:
        cells: `[size] int64`, the cell of each row; see `Selection`.
        labels: `[size] uint8`, the label of each row (anything for a special token), where labels are read.
        token_ids: `[size] int32`, the token id of each row (anything for a special token), where they are read.
        is_finished: Whether its activations have been converted, if they are to be.
        fields: What its slot holds, once it is known which samples they are.
        digest: Digest of which samples they are, likewise.
    """

    slot: Slot
    size: int
    cells: NDArray[np.int64]
    labels: NDArray[np.uint8] | None
    token_ids: NDArray[np.int32] | None = None
    is_finished: bool = False
    fields: tuple[Field, ...] = ()
    digest: int | None = None


_sent: set[Slot] = set()
"""Slots on their way: their descriptors stay open until the parent has let go of them."""


def _forget_returned() -> None:
    _sent.difference_update([slot for slot in tuple(_sent) if slot.is_free])


class SlotPool:
    """Slots of one size. It never waits for a user who keeps batches: it makes another slot.

    Attributes:
        in_haste: Whether memory is to come soon: an engine has still to hand out its first batch, needs few, or needs
            them not for long.
        is_streamed: Whether it is written to past the caches, for which huge pages are of no use.
    """

    def __init__(self, nbytes: int, shared: bool) -> None:
        self.nbytes, self.shared, self.in_haste, self.is_streamed = nbytes, shared, True, False
        self._begin()

    def _begin(self) -> None:
        # A thread that has it may be the one in which another engine of the same memory is collected, and closed.
        self._pid, self._lock = os.getpid(), renewed(threading.RLock())
        self._slots: list[Slot] = []
        self._regions: list[OwnRegion] = []
        # The most slots in use at a time, of late and before.
        self._peaks = [0, 0]
        self._n_acquired = 0
        self._began, self._huge_s = time.monotonic(), 0.0

    @property
    def is_own(self) -> bool:
        """Whether it was made, or has begun anew, in this process."""
        return self._pid == os.getpid()

    def acquire(self, keep: int) -> Slot:
        """Take a free slot, or make one; it is held until its lease is gone.

        As many as `keep`, or as were in use of late, are worth keeping; free ones beyond that are given back to the
        system.
        """
        if not self.is_own:
            # In a child, the slots are its parent's.
            self._begin()
        settle()
        with self._lock:
            _forget_returned()
            free = [slot for slot in self._slots if slot.is_free]
            most = max(keep, self._find_peak(len(self._slots) - len(free) + 1))
            n_gone = min(len(free) - 1, len(self._slots) - most)
            if n_gone > 0:
                gone = set(free[-n_gone:])
                self._slots = [slot for slot in self._slots if slot not in gone]
            slot = free[0] if free else self._make(keep)
            if not free:
                self._slots.append(slot)
            slot._held = True
            if free and not self.is_streamed:
                self._make_huge(slot)
            return slot

    @property
    def is_new(self) -> bool:
        """Whether no engine has used it yet."""
        return not self._n_acquired

    @property
    def is_slow(self) -> bool:
        """Whether memory that is shared has come slowly, as small pages always do."""
        return not all(region.is_fast for region in self._regions)

    def _make_huge(self, slot: Slot) -> None:
        if self._huge_s < _HUGE_SHARE * (time.monotonic() - self._began):
            # Time of the processor, which others have meanwhile, too.
            began = time.thread_time()
            slot.make_huge()
            self._huge_s += time.thread_time() - began

    def _find_peak(self, n_used: int) -> int:
        if self._n_acquired % _WINDOW == 0:
            self._peaks = [n_used, self._peaks[0]]
        self._n_acquired += 1
        self._peaks[0] = max(self._peaks[0], n_used)
        return max(self._peaks)

    def _make(self, keep: int) -> Slot:
        if not self.shared:
            return Slot(self.nbytes, shared=False, may_be_huge=not self.is_streamed)
        for region in self._regions:
            if region.has_room:
                return Slot(self.nbytes, True, region, self.in_haste, not self.is_streamed)
        # Twice as many each time, so that few descriptors do. They cost address space, which may be limited, too.
        with contextlib.suppress(OSError, MemoryError, OverflowError):
            region = OwnRegion(self.nbytes, max(keep, len(self._slots)))
            self._regions.append(region)
            return Slot(self.nbytes, True, region, self.in_haste, not self.is_streamed)
        return Slot(self.nbytes, shared=True)

    def shrink(self, keep: int) -> None:
        """Keep at most so many slots, free ones first; another lives as long as its memory is used."""
        with self._lock:
            self._slots = sorted(self._slots, key=lambda slot: not slot.is_free)[:keep]

    def leave_to_parent(self) -> None:
        """Forget all slots, in a child that is forked: those are its parent's."""
        self._begin()

    def forget(self, slot: Slot) -> None:
        """Never hand a slot out again: somebody may still write to it."""
        with self._lock, contextlib.suppress(ValueError):
            self._slots.remove(slot)


os.register_at_fork(after_in_child=_sent.clear)

Pools = dict[int, SlotPool]
"""Pools by the size of a slot."""

_worker_pools: Pools = {}
os.register_at_fork(after_in_child=_worker_pools.clear)


def make_pool(nbytes: int, kept: Pools) -> SlotPool:
    """Memory for batches, used again in the next epoch: in a worker shared with its parent, else private, and `kept`.

    A child that is forked has none of what is kept, so that its parent need not copy what it writes to from then on.
    """
    if can_share():
        return _worker_pools.setdefault(nbytes, SlotPool(nbytes, shared=True))
    pool = kept.get(nbytes)
    if pool is None:
        pool = kept.setdefault(nbytes, SlotPool(nbytes, shared=False))
        inherited.register(pool)
    return pool


def can_share() -> bool:
    """Whether batches are for another process, which can map their memory."""
    return get_worker_info() is not None and has_memory_files()
