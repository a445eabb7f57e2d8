import ctypes
import dataclasses
import errno
import gc
import mmap
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import contracts
import numpy as np
import pytest
import torch
from conftest import Resources, wait_until
from factory import Spec
from torch.utils.data import DataLoader

from saev_torch import (
    IndexedConfig,
    IndexedDataset,
    ReadError,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    WorkerLostError,
)
from saev_torch.reading import leases, received, regions
from saev_torch.reading import slots as memory
from saev_torch.reading.received import attach
from saev_torch.reading.regions import OwnRegion
from saev_torch.reading.slots import Slot, SlotPool

ROOT = Path(__file__).parent.parent
NBYTES = 1 << 16

# All that a user may make of a batch and keep; each takes the array of a lease.
VIEWS = {
    "the array": lambda array: array,
    "a slice": lambda array: array[5:7],
    "a slice of a slice": lambda array: array[10:][::2][:3],
    "another dtype": lambda array: array.view(np.float32).reshape(-1, 4),
    "a memoryview": lambda array: memoryview(array)[3:5],
    "a tensor": torch.from_numpy,
    "a slice of a tensor": lambda array: torch.from_numpy(array)[3:5],
    "a transposed tensor": lambda array: torch.from_numpy(array.view(np.float32)).view(-1, 4).t(),
    "a detached tensor": lambda array: torch.from_numpy(array).detach(),
    "an array of a tensor": lambda array: torch.from_numpy(array)[2:].numpy(),
    "a tensor's storage": lambda array: torch.from_numpy(array).untyped_storage(),
    "a graph": lambda array: torch.from_numpy(array.view(np.float32)).nan_to_num_().requires_grad_().square().sum(),
    "dlpack": lambda array: torch.from_dlpack(torch.from_numpy(array)),
}


@pytest.fixture(autouse=True)
def forget_sent():
    """A process that sends slots, as this one plays at here, drops those that came back when it wants another one."""
    yield
    memory._forget_returned()


def memfds():
    return sum("memfd:saev_torch" in name for name in Resources.now().held.values())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_a_slot_is_free_when_its_last_view_is_gone(view, shared):
    pool = SlotPool(NBYTES, shared)
    slot = pool.acquire(4)
    array = slot.lease().array()
    array[:] = 7
    kept = VIEWS[view](array)
    assert not slot.is_free
    del array
    assert not slot.is_free
    other = pool.acquire(4)
    assert other is not slot
    del kept
    assert slot.is_free
    assert pool.acquire(4) is slot


def test_a_slot_that_is_filled_is_not_free():
    pool = SlotPool(NBYTES, shared=False)
    slot = pool.acquire(4)
    assert not slot.is_free
    assert pool.acquire(4) is not slot
    slot.release()
    assert pool.acquire(4) is slot


@pytest.mark.parametrize("shared", [False, True])
def test_a_user_who_keeps_everything_gets_new_memory(shared):
    # What tests before this one left for the garbage collector is not this one's.
    gc.collect()
    before = memfds()
    pool = SlotPool(NBYTES, shared)
    arrays = [pool.acquire(keep=2).lease().array() for _ in range(20)]
    for i, array in enumerate(arrays):
        array[:] = i
    assert [np.unique(array).tolist() for array in arrays] == [[i] for i in range(20)]
    assert len(pool._slots) == 20
    # Free ones are given back, but for those that are worth keeping, once so many were not needed for a while.
    arrays.clear()
    for _ in range(2 * memory._WINDOW + 1):
        pool.acquire(keep=2).release()
    assert len(pool._slots) == 2
    # Five files: for 2 slots, 2 more, 4, 8 and 16.
    assert memfds() - before <= 2 * 5 * shared


def test_memory_is_zero_or_more():
    assert SlotPool(0, shared=False).acquire(1).lease().array().nbytes >= 0
    assert SlotPool(0, shared=True).acquire(1).lease().array().nbytes >= 0


def test_memory_that_there_is_not():
    with pytest.raises(ReadError, match=f"batch_size: expected {1 << 60} bytes of memory for another batch, got"):
        Slot(1 << 60, shared=False)


# Memory that goes to another process. `attach` works within one process, too.


def test_a_sent_slot_is_free_when_the_receiver_lets_go():
    slot = Slot(NBYTES, shared=True)
    lease = slot.lease()
    lease.array()[:] = 9
    name = slot.send()
    del lease
    assert not slot.is_free  # on its way
    received = attach(*name).array()
    assert received.min() == received.max() == 9
    assert not slot.is_free
    view = torch.from_numpy(received)[3:]
    del received
    assert not slot.is_free
    del view
    assert slot.is_free


def test_a_slot_that_is_sent_twice_is_free_when_both_let_go():
    slot = Slot(NBYTES, shared=True)
    names = [slot.send(), slot.send()]
    one, other = (attach(*name).array() for name in names)
    one[0] = 5
    assert other[0] == 5
    del one
    assert not slot.is_free
    del other
    assert slot.is_free


def test_a_slot_on_its_way_stays_open():
    """Even if nothing in this process refers to it any more."""
    gc.collect()
    n_before = memfds()
    name = Slot(NBYTES, shared=True).send()
    gc.collect()
    received = attach(*name).array()
    received[:] = 1
    del received
    # What has been returned is forgotten as soon as another slot is wanted.
    SlotPool(NBYTES, shared=False).acquire(1)
    assert memfds() == n_before


def test_a_worker_that_is_gone():
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    with pytest.raises(WorkerLostError, match=rf"worker \(pid {child.pid}\) exited unexpectedly: .* the last state"):
        attach(child.pid, 0, 3, NBYTES, 1, 0, 0)
    child.close()


def test_a_name_of_something_else(tmp_path):
    """Another process may have the number by now: what is found must at least be of the right size."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises(WorkerLostError, match="exited unexpectedly"):
        attach(os.getpid(), os.fstat(fd).st_ino, fd, NBYTES, 1, 0, 0)
    os.close(fd)


def test_a_child_has_no_say():
    """A forked process drops its copies of leases; what its parent holds is still held."""
    slot = Slot(NBYTES, shared=True)
    array = slot.lease().array()

    def drop():
        nonlocal array
        array = None
        gc.collect()

    child = multiprocessing.get_context("fork").Process(target=drop)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert not slot.is_free
    name = slot.send()
    del array
    received = attach(*name).array()

    def drop_received():
        nonlocal received
        received = None
        gc.collect()

    child = multiprocessing.get_context("fork").Process(target=drop_received)
    child.start()
    child.join()
    assert not slot.is_free
    del received
    assert slot.is_free


def test_a_worker_shares_memory_whatever_its_parent_has_read(make_shards):
    """A data set that was used in the parent has memory already, which is private to that."""
    ds = IndexedDataset(IndexedConfig(shards=make_shards(Spec(n_examples=200, content_tokens=30)), layer=3))
    ds.__getitems__(range(600))
    loader = DataLoader(ds, batch_size=600, num_workers=1, multiprocessing_context="fork")
    assert all(batch.memory is not None for batch in loader)


# Whole epochs


def config(make_shards, **fields):
    spec = Spec(n_examples=200, content_tokens=30, layers=(3,), d_model=16, examples_per_shard=37)
    return ShuffledConfig(**{"shards": make_shards(spec), "layer": 3, "batch_size": 64, "buffer_size": 8, **fields})


@pytest.mark.parametrize("n_workers", [0, 2])
def test_kept_batches_stay_as_they_were(make_shards, n_workers):
    """All of them, to the end of the epoch and beyond the end of the workers."""
    cfg = config(make_shards)
    loader = DataLoader(ShuffledActivations(cfg), num_workers=n_workers)
    batches, digests = [], []
    for batch in loader:
        batches.append(batch)
        digests.append(contracts.digest([batch]))
    del loader, batch
    gc.collect()
    assert len(batches) == 94
    assert [contracts.digest([batch]) for batch in batches] == digests


@pytest.mark.parametrize("n_workers", [0, 2])
def test_kept_pieces_stay_as_they_were(make_shards, n_workers):
    """A tensor of a batch, a slice of one, an array: each alone keeps its memory, while others are reused."""
    takes = [
        lambda batch: batch["act"][3:5],
        lambda batch: batch["act"][:, 0],
        lambda batch: batch["example_idx"],
        lambda batch: batch["act"].numpy()[7],
        lambda batch: batch["token_idx"][10:11],
    ]
    kept = []
    for i, batch in enumerate(DataLoader(ShuffledActivations(config(make_shards)), num_workers=n_workers)):
        piece = takes[i % 5](batch)
        if i % 7 < 3:
            kept.append((piece, np.asarray(piece).copy()))
        del batch, piece
    assert len(kept) > 30
    assert all(np.array_equal(np.asarray(piece), then) for piece, then in kept)


@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_memory_is_reused(make_shards, n_workers):
    """A consumer that keeps one batch at a time sees few different places, over three epochs."""
    loader = DataLoader(
        ShuffledActivations(config(make_shards)), num_workers=n_workers, persistent_workers=n_workers > 0
    )
    places = [{batch["act"].data_ptr() for batch in loader} for _ in range(3)]
    assert max(len(epoch) for epoch in places) < 40
    # The third epoch finds no place that the first two have not had, give or take the order of things.
    assert len(places[2] - places[1] - places[0]) < 10


@pytest.fixture
def made(monkeypatch):
    """Weak references to all slots that are made in this process."""
    slots, init = [], Slot.__init__

    def note(self, *args, **kwargs):
        init(self, *args, **kwargs)
        slots.append(weakref.ref(self))

    monkeypatch.setattr(Slot, "__init__", note)
    return slots


@pytest.mark.parametrize("closer", ["saev_torch scheduler", "another"])
def test_an_engine_is_collected_by_who_has_its_pool(make_shards, closer):
    """The garbage collector closes what was left in a cycle in any thread, be it in the middle of a pool's work."""
    ds = ShuffledActivations(config(make_shards))
    batches = iter(ds)
    next(batches)
    (pool,) = ds.pools.values()

    def close():
        with pool._lock:
            batches.close()

    thread = threading.Thread(target=close, name=closer, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    wait_until(lambda: not any(one.name.startswith("saev_torch ") for one in threading.enumerate()))


def test_without_workers_memory_is_kept_for_the_next_epoch(make_shards, made):
    """Also where one is broken off, or keeps many batches for a while; it goes with the data set."""
    ds = ShuffledActivations(config(make_shards))
    for epoch in range(7):
        for i, _ in enumerate(ds):
            if epoch % 2 and i == 20:
                break
    del _
    # As many as the buffer has, and two or three on their way to the consumer.
    assert len(made) <= 14
    batches = list(ds)
    assert len(made) > 90
    del batches
    gc.collect()
    assert sum(slot() is not None for slot in made) <= 12
    pickle.dumps(ds)
    del ds
    gc.collect()
    assert not any(slot() for slot in made)
    # A loader gives it back when it is asked to.
    loader = ShuffledDataLoader(config(make_shards))
    for _ in loader:
        pass
    del _
    gc.collect()
    assert sum(slot() is not None for slot in made) > 5
    loader.shutdown()
    gc.collect()
    assert not any(slot() for slot in made)


def test_a_child_has_none_of_the_memory_that_is_kept(make_shards, made):
    """Or its parent would copy every page that it writes to from then on."""
    ds = ShuffledActivations(config(make_shards))
    batches = iter(ds)
    held = [next(batches) for _ in range(3)]
    expected = contracts.digest(held)
    # Those that are read ahead, too, however slowly.
    wait_until(lambda: sum(slot() is not None for slot in made) > len(held) + 1)
    batches.close()
    assert sum(slot() is not None for slot in made) > len(held) + 1

    def look():
        left = sum(slot() is not None for slot in made)
        ds.set_epoch(0)
        again = [batch for batch, _ in zip(ds, range(3), strict=False)]
        ours = contracts.digest(held) == contracts.digest(again) == expected
        os._exit(0 if left <= len(held) + 1 and ours else 1)

    child = multiprocessing.get_context("fork").Process(target=look)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert contracts.digest(held) == expected


def test_changing_a_batch_changes_no_other(make_shards):
    """A batch is the user's: writing into it is seen in none that comes after."""
    cfg = config(make_shards)
    wanted = [contracts.digest([batch]) for batch in ShuffledActivations(cfg)]
    for n_workers in (0, 2):
        got = []
        for batch in DataLoader(ShuffledActivations(cfg), num_workers=n_workers):
            got.append(contracts.digest([batch]))
            for tensor in batch.values():
                tensor.zero_()
        assert got == wanted


# In a process of its own: torch notices a worker's death in a signal handler, which raises wherever that process is.
KILLED_WORKER = """
import os, signal, sys, time
import contracts
from torch.utils.data import DataLoader
from saev_torch import ShuffledActivations, ShuffledConfig
loader = iter(DataLoader(ShuffledActivations(ShuffledConfig(shards=sys.argv[1], layer=3, batch_size=8)), num_workers=1))
batch = next(loader)
before = contracts.digest([batch])
try:
    os.kill(loader._workers[0].pid, signal.SIGKILL)
    for _ in loader:
        time.sleep(0.01)
except RuntimeError as err:
    print(err)
del loader
print(contracts.digest([batch]) == before)
"""


def test_a_killed_worker_leaves_what_was_received(make_shards):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WORKER, str(config(make_shards).shards)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=240,
        check=False,
    )
    error, same = done.stdout.strip().split("\n")
    assert "killed by signal" in error or "exited unexpectedly" in error
    assert (same, done.returncode) == ("True", 0)


ORPHANS = """
import os, signal, sys
from torch.utils.data import DataLoader
from saev_torch import ShuffledActivations, ShuffledConfig
loader = iter(DataLoader(ShuffledActivations(ShuffledConfig(shards=sys.argv[1], layer=3, batch_size=8)), num_workers=2))
# One batch of each worker: one that has not begun yet does not know its parent, and torch does not see it die.
batches = [next(loader), next(loader)]
print(*(worker.pid for worker in loader._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_workers_end_when_their_parent_is_killed(make_shards):
    """They and the memory that they share: a memfd goes with the last process that maps it."""
    shards = config(make_shards).shards
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS, str(shards)],
        stdout=subprocess.PIPE,
        timeout=240,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_nothing_is_mapped_after_the_workers(make_shards):
    cfg = config(make_shards)
    for _ in range(2):
        for _batch in DataLoader(ShuffledActivations(cfg), num_workers=2):
            pass
        del _batch
    gc.collect()
    assert received._regions == {}


def mapped_kb(array, what):
    """What /proc says of the mapping that an array is in."""
    at = array.ctypes.data
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        low, high = (int(word, 16) for word in entry.split()[0].split("-"))
        if low <= at < high:
            return int(re.search(rf"^{what}: +(\d+) kB", entry, re.MULTILINE)[1])
    raise AssertionError("not mapped")


def used_again(pool, slots, what):
    """How many KB of slots are in huge pages after each time that they were used again; what is in them stays."""
    found = []
    for _ in range(4):
        for slot in slots:
            slot.release()
        assert {pool.acquire(4) for _ in slots} == {*slots}
        found.append([mapped_kb(slot.first(slot.nbytes), what) for slot in slots])
        for i, slot in enumerate(slots):
            assert (slot.first(slot.nbytes) == i).all()
    return found


@pytest.mark.parametrize(("rate", "share"), [(1, 0), (np.inf, 0), (np.inf, 1e9)])
def test_shared_memory_is_in_huge_pages(rate, share, monkeypatch):
    """As far as slots in use stand next to each other, where the system gives any: at once, or a piece at each use."""
    monkeypatch.setattr(memory, "_HUGE_SHARE", share)
    monkeypatch.setattr(regions, "_HUGE_RATE", rate)
    monkeypatch.setattr(regions, "_HUGE_NBYTES", 2 << 20)
    pool = SlotPool(5 << 20, shared=True)
    slots = [pool.acquire(4) for _ in range(3)]
    array = slots[0].first(slots[0].nbytes)
    # All of it is there before anybody writes, but for what a huge page would share with nobody.
    assert mapped_kb(array, "Rss") >= 14 << 10
    at_once = mapped_kb(array, "ShmemPmdMapped")
    for i, slot in enumerate(slots):
        fill(slot, i)
    # They are in one mapping.
    found = [kb[0] for kb in used_again(pool, slots, "ShmemPmdMapped")]
    if (share or rate == 1) and not found[0]:
        pytest.skip("the system gives no huge pages on request")
    # Of the first piece it was tried how fast they come.
    assert at_once == (14 << 10 if rate == 1 else 2 << 10)
    assert found == ([6 << 10, 12 << 10, 14 << 10, 14 << 10] if share else [at_once] * 4)
    # 15 MB in all, of which the last one is in small pages.
    assert os.fstat(slots[0].fd).st_blocks * 512 <= (15 << 20) + 8 * mmap.PAGESIZE


@pytest.mark.parametrize(("in_haste", "n_slots"), [(True, 16), (False, 16), (False, 15)])
def test_a_large_buffer_is_in_huge_pages_once_the_first_batch_is_there(in_haste, n_slots, monkeypatch):
    """Also where they come slowly."""
    monkeypatch.setattr(memory, "_HUGE_SHARE", 0)
    monkeypatch.setattr(regions, "_HUGE_RATE", np.inf)
    monkeypatch.setattr(regions, "_HUGE_NBYTES", 2 << 20)
    pool = SlotPool(4 << 20, shared=True)
    first = pool.acquire(n_slots)
    array = first.first(first.nbytes)
    # Of the first piece it was tried how fast they come.
    if not mapped_kb(array, "ShmemPmdMapped"):
        pytest.skip("the system gives no huge pages on request")
    assert mapped_kb(array, "ShmemPmdMapped") == 2 << 10
    pool.in_haste = in_haste
    others = [pool.acquire(n_slots) for _ in range(3)]
    assert mapped_kb(array, "ShmemPmdMapped") == (2 << 10 if in_haste or n_slots < 16 else 14 << 10)
    for i, slot in enumerate([first, *others]):
        fill(slot, i)
    assert all((slot.first(slot.nbytes) == i).all() for i, slot in enumerate([first, *others]))


def test_a_slot_of_a_large_buffer_does_not_wait_for_ever(monkeypatch):
    real, asked = regions.advise, []

    def advise(memory, advice):
        asked.append(advice == regions._MADV_COLLAPSE)
        if asked[-1]:
            burn(0.02)
        return asked[-1] or real(memory, advice)

    monkeypatch.setattr(regions, "advise", advise)
    monkeypatch.setattr(regions, "_HUGE_NBYTES", 2 << 20)
    monkeypatch.setattr(regions, "_LONGEST_S", 0.05)
    pool = SlotPool(16 << 20, shared=True)
    pool.in_haste = False
    slots = [pool.acquire(16) for _ in range(2)]
    # Three pieces of each, of eight.
    assert sum(asked) == 6
    del slots


@pytest.mark.parametrize(
    ("copies_here", "ends", "n_fills"), [(False, False, 0), (False, True, 0), (True, False, 0), (True, False, 1)]
)
def test_the_first_batch_ends_the_haste(make_shards, monkeypatch, copies_here, ends, n_fills):
    """But where the buffer is not wanted for long: a worker ends, or later epochs gather without it."""
    if copies_here:
        contracts.copy_here()
    else:
        contracts.copy_in_kernel(monkeypatch)
    monkeypatch.setattr("saev_torch.iterable.activations.ends_with_epoch", lambda: ends)
    seen, real = [], SlotPool.acquire
    monkeypatch.setattr(SlotPool, "acquire", lambda self, keep: (seen.append(self.in_haste), real(self, keep))[1])
    cfg = dataclasses.replace(config(make_shards), min_buffer_fill=0.5 * n_fills)
    data_set = ShuffledActivations(cfg)
    next(iter(data_set))
    assert seen[0]
    is_brief = ends or (copies_here and not n_fills)
    assert [pool.in_haste for pool in data_set.pools.values()] == [is_brief]


def test_what_is_streamed_to_is_in_small_pages(make_shards, monkeypatch):
    """And no time is spent to find others."""
    asked, real = [], regions.advise
    monkeypatch.setattr(regions, "advise", lambda memory, advice: (asked.append(advice), real(memory, advice))[1])
    monkeypatch.setattr(memory, "_HUGE_SHARE", 1e9)
    for shared in (False, True):
        pool = SlotPool(16 << 20, shared=shared)
        pool.is_streamed = True
        slot = pool.acquire(4)
        slot.release()
        assert pool.acquire(4) is slot
    assert asked
    assert not {regions._MADV_HUGEPAGE, regions._MADV_COLLAPSE} & set(asked)


@pytest.mark.parametrize(("rate", "share"), [(1, 0), (np.inf, 0), (np.inf, 1e9)])
def test_private_memory_is_in_huge_pages(rate, share, monkeypatch):
    """At once where they come fast, else a piece each time that it is used again."""
    monkeypatch.setattr(memory, "_HUGE_SHARE", share)
    monkeypatch.setattr(regions, "_HUGE_RATE", rate)
    monkeypatch.setattr(regions, "_HUGE_NBYTES", 2 << 20)
    monkeypatch.setattr(regions, "_has_fast", True)
    pool = SlotPool(8 << 20, shared=False)
    slots = [pool.acquire(4) for _ in range(3)]
    for i, slot in enumerate(slots):
        fill(slot, i)
    at_once = [mapped_kb(slot.first(slot.nbytes), "AnonHugePages") for slot in slots]
    found = used_again(pool, slots, "AnonHugePages")
    if (share or rate == 1) and not any(found[0]):
        pytest.skip("the system gives no huge pages on request")
    # Of the first piece it was tried how fast they come.
    assert at_once == ([8 << 10] * 3 if rate == 1 else [2 << 10, 0, 0])
    assert found == ([[n << 11] * 3 for n in range(1, 5)] if share else [at_once] * 4)


def test_where_no_memory_is_had_at_once_it_is_in_huge_pages_as_it_comes(monkeypatch):
    """Linux before 5.14 knows no such advice."""
    real, advices = regions.advise, []

    def advise(memory, advice):
        advices.append(advice)
        ctypes.set_errno(errno.EINVAL)
        return advice != regions._MADV_POPULATE_WRITE and real(memory, advice)

    monkeypatch.setattr(regions, "advise", advise)
    monkeypatch.setattr(regions, "_has_fast", True)
    slots = [Slot(8 << 20, shared=False) for _ in range(2)]
    assert advices == [regions._MADV_HUGEPAGE, regions._MADV_POPULATE_WRITE] * 2
    for i, slot in enumerate(slots):
        fill(slot, i)
        slot.make_huge()
        assert (slot.first(slot.nbytes) == i).all()
    assert len(advices) == 4


def burn(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.mark.parametrize(
    ("delay", "code", "n_asked"),
    [(burn, 0, 1), *((time.sleep, *case) for case in ((0, 6), (errno.EAGAIN, 6), (errno.EINTR, 6), (errno.EINVAL, 1)))],
)
def test_huge_pages_are_asked_for_as_long_as_they_come_fast(delay, code, n_asked, monkeypatch):
    """In time of the processor: while others have it, this thread waits. A page that is busy says nothing of others."""
    real, asked = regions.advise, []

    def advise(memory, advice):
        if advice != regions._MADV_COLLAPSE:
            return real(memory, advice)
        asked.append(memory.nbytes)
        delay(0.05)
        ctypes.set_errno(code)
        return not code

    monkeypatch.setattr(regions, "advise", advise)
    monkeypatch.setattr(regions, "_HUGE_NBYTES", 1 << 30)
    pool = SlotPool(8 << 20, shared=True)
    slots = [pool.acquire(8) for _ in range(6)]
    assert len(asked) == n_asked
    del slots


def test_memory_that_is_refused_at_once_is_not_asked_for_again(monkeypatch):
    """As Python's own call does after each signal, for which a kernel may begin anew."""
    calls = []
    monkeypatch.setattr(regions, "_HUGE_RATE", np.inf)
    monkeypatch.setattr(regions._libc, "fallocate", lambda *args: calls.append(args) or -1)
    slot = SlotPool(5 << 20, shared=True).acquire(4)
    assert len(calls) == 1
    fill(slot, 1)
    assert (slot.first(slot.nbytes) == 1).all()


def file_mb(fd):
    """Memory that a file takes."""
    return os.fstat(fd).st_blocks * 512 / (1 << 20)


def test_a_batch_of_2_mib_takes_no_more():
    pool = SlotPool((2 << 20) + 5000, shared=True)
    slots = [pool.acquire(8) for _ in range(8)]
    for slot in slots:
        fill(slot, 1)
    assert {slot.fd for slot in slots} == {slots[0].fd}
    assert file_mb(slots[0].fd) < 16.2


@pytest.mark.parametrize("nbytes", [70_000, (2 << 20) + 5000])
def test_what_is_given_back_is_gone_from_the_receiver(nbytes):
    pool = SlotPool(nbytes, shared=True)
    slots = [pool.acquire(keep=2) for _ in range(30)]
    for i, slot in enumerate(slots):
        fill(slot, i)
    received = [attach(*slot.send()) for slot in slots]
    files = {slot.fd for slot in slots}
    assert sum(map(file_mb, files)) > 30 * nbytes / (1 << 20)
    kept, place = received[7], slots[7].address
    del received, slot
    slots.clear()
    for _ in range(2 * memory._WINDOW + 1):
        pool.acquire(keep=2).release()
    # The two that are kept, and the one that is held, with pages of many slots' words.
    assert sum(map(file_mb, files)) < 3 * nbytes / (1 << 20) + 0.1 + 2 * (nbytes > 1 << 20)
    assert (kept.array() == 7).all()
    # What was given back can be had again, and does not touch what is held.
    again = [pool.acquire(keep=2) for _ in range(30)]
    assert place not in {slot.address for slot in again}
    for slot in again:
        fill(slot, 99)
    assert (kept.array() == 7).all()


def test_memory_that_was_given_back_is_other_memory():
    """Whoever page-locked it has locked pages that are there no more."""
    own = OwnRegion(NBYTES, 1)
    region = received.ReceivedRegion(own.fd, NBYTES, 1)

    def use():
        *_, index, age, _ = own.send(0)
        return weakref.ref(region.begin_use(index, age).owner)

    assert own.take(in_haste=True) == 0
    then = use()
    assert then() is not None
    assert use()() is then()
    own.give_back(0)
    assert own.take(in_haste=True) == 0
    assert use()() is not None
    assert then() is None


KILLED_AND_KEPT = """
import gc, os, signal, sys
from torch.utils.data import DataLoader
from saev_torch import ShuffledActivations, ShuffledConfig
def shared_kb():
    gc.collect()
    text = open("/proc/self/smaps_rollup").read()
    return int(text.split("Pss_Shmem:")[1].split()[0])
cfg = ShuffledConfig(shards=sys.argv[1], layer=0, batch_size=512, buffer_size=16)
loader = iter(DataLoader(ShuffledActivations(cfg), num_workers=1))
kept = [next(loader) for _ in range(20)]
for batch in kept:
    assert (batch["act"][:, 0] == 1000 * batch["example_idx"] + batch["token_idx"]).all()
before = shared_kb()
del batch
try:
    os.kill(loader._workers[0].pid, signal.SIGKILL)
    for batch in loader:
        pass
except RuntimeError as err:
    del err
del loader
for batch in kept:
    assert (batch["act"][:, 0] == 1000 * batch["example_idx"] + batch["token_idx"]).all()
all_kb = shared_kb()
kept, batch = kept[11], None
one_kb = shared_kb()
assert (kept["act"][:, 0] == 1000 * kept["example_idx"] + kept["token_idx"]).all()
print(all_kb, one_kb)
"""


def test_a_killed_worker_leaves_no_more_than_is_kept(make_shards):
    spec = Spec(
        n_examples=250, content_tokens=131, cls=False, layers=(0,), d_model=32, labels=False, examples_per_shard=99
    )
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AND_KEPT, str(make_shards(spec))], capture_output=True, text=True, check=False,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A batch takes 76 KB; with the buffer, and what was on its way, the worker had twice as many.
    all_kb, one_kb = map(int, done.stdout.split())
    assert 20 * 72 <= all_kb < 24 * 80
    assert 72 <= one_kb < 3 * 80


def test_a_region_that_is_done_with_is_unmapped(make_shards):
    """Larger batches need larger slots, in other files."""
    indexed = IndexedDataset(IndexedConfig(shards=config(make_shards).shards, layer=3))
    sizes = [range(n) for n in range(600, 3000, 100)]
    n_mapped = []
    for batch in DataLoader(indexed, batch_sampler=sizes, num_workers=1):
        del batch
        n_mapped.append(len(next(iter(received._regions.values()))))
    assert len(n_mapped) == 24
    assert max(n_mapped) <= 5


# Memory that a forked child inherits


class Child:
    """A forked child that holds on to arrays, and tells what it sees of the first byte; told so, it forks and ends."""

    def __init__(self, *arrays):
        self._sock, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            held = list(arrays)
            self._sock.close()
            while (told := theirs.recv(1)) not in (b"", b"e"):
                if told == b"f" and os.fork():
                    os._exit(0)
                theirs.send(bytes([int(held[0][0])]))
            os._exit(0)
        theirs.close()

    def tell(self, what):
        self._sock.send(what)
        return self._sock.recv(1)

    def end(self):
        self._sock.send(b"e")
        self._sock.close()
        os.waitpid(self.pid, 0)


def fill(slot, value):
    lease = slot.lease()
    lease.array()[:] = value
    return lease


HOLDERS = pytest.mark.parametrize("holder", ["the parent of a worker", "a worker"])


def hold(holder):
    """A slot of a worker, and what holds it."""
    slot = Slot(NBYTES, shared=True)
    held = [fill(slot, 7)]
    if holder == "the parent of a worker":
        name = slot.send()
        held.clear()
        held.append(attach(*name))
    return slot, held


def pipes():
    return sum(name.startswith("pipe:") for name in Resources.now().held.values())


@HOLDERS
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_slot_is_not_free_while_a_child_holds_it(holder, end):
    slot, held = hold(holder)
    before = pipes()
    child = Child(held[0].array())
    other = Child(held[0].array())
    held.clear()
    for one in (child, other):
        leases.settle()
        assert not slot.is_free
        assert one.tell(b"?") == b"\x07"
        if end == "kill":
            os.kill(one.pid, signal.SIGKILL)
        one.end()
    leases.settle()
    assert slot.is_free
    assert pipes() == before


@HOLDERS
def test_a_child_goes_before_the_batch(holder):
    slot, held = hold(holder)
    before = pipes()
    for _ in range(50):
        Child(held[0].array()).end()
        assert pipes() <= before + 1
    assert not slot.is_free
    held.clear()
    assert slot.is_free
    assert pipes() == before


@HOLDERS
def test_a_grandchild_holds_what_its_parent_held(holder):
    slot, held = hold(holder)
    child = Child(held[0].array())
    held.clear()
    # It forks, and ends; who answers from now on is the grandchild.
    assert child.tell(b"f") == b"\x07"
    os.waitpid(child.pid, 0)
    leases.settle()
    assert not slot.is_free
    assert child.tell(b"?") == b"\x07"
    child._sock.send(b"e")
    assert child._sock.recv(1) == b""
    child._sock.close()
    wait_until(lambda: (leases.settle(), slot.is_free)[1])


@HOLDERS
def test_a_child_lets_go(holder):
    """It lives on, but nothing in it refers to the memory."""
    slot, held = hold(holder)
    go_on, told = os.pipe()
    seen, tell = os.pipe()
    pid = os.fork()
    if not pid:
        held.clear()
        os.write(tell, b"x")
        os.close(told)
        os.read(go_on, 1)
        os._exit(0)
    held.clear()
    os.read(seen, 1)
    leases.settle()
    assert slot.is_free
    for fd in (go_on, told, seen, tell):
        os.close(fd)
    os.waitpid(pid, 0)


def test_a_fork_makes_nothing_where_nothing_is_held():
    private = SlotPool(NBYTES, shared=False).acquire(1).lease()
    pid = os.fork()
    if not pid:
        os._exit(len(leases._forking) + len(leases._children))
    assert os.waitpid(pid, 0)[1] == 0
    assert not leases._children
    del private


@HOLDERS
def test_a_fork_without_descriptors(holder, monkeypatch):
    """What the child inherits is never used again."""
    slot, held = hold(holder)

    def refuse():
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", refuse)
    child = Child(held[0].array())
    monkeypatch.undo()
    held.clear()
    child.end()
    leases.settle()
    assert not slot.is_free
    leases._children.clear()
    for loan in list(leases._loans.values()):
        loan.children.clear()
        loan.settle()


def test_a_slot_is_kept_by_its_memory():
    """Where somebody keeps a tensor of a batch, and its pool goes."""
    pool = SlotPool(NBYTES, shared=True)
    kept = fill(pool.acquire(1), 7).array()
    del pool
    gc.collect()
    assert kept.min() == kept.max() == 7


def test_a_slot_that_is_lent_while_somebody_looks_is_not_free():
    slot = SlotPool(NBYTES, shared=True).acquire(1)
    lent = []

    class Before:
        """The loan before, which is over; meanwhile another thread lends the slot."""

        @property
        def is_over(self):
            lent.append(slot.lease())
            return True

    slot._loan = Before()
    assert not slot.is_free


def test_a_use_is_counted_once_whoever_is_first():
    slot, held = hold("the parent of a worker")
    loan = held[0].loan
    settled = weakref.ref(held[0], lambda _: loan.settle())
    held.clear()
    assert settled() is None
    loan.settle()
    assert slot._counts.tolist() == [1, 1]


def test_a_child_whose_hook_was_interrupted_has_no_say():
    slot, held = hold("the parent of a worker")
    words, loans = dict(leases._words), dict(leases._loans)
    pid = os.fork()
    if not pid:
        # As if it had forgotten nothing.
        leases._words.update(words)
        leases._loans.update(loans)
        held.clear()
        for loan in loans.values():
            loan.children.clear()
            loan.settle()
        os._exit(slot._counts.tolist() != [1, 0])
    assert os.waitpid(pid, 0)[1] == 0
    held.clear()
    leases.settle()
    assert slot.is_free


def keep_and_compare(batch, go_on, wrong):
    then = {key: column.clone() for key, column in batch.items()}
    wrong.put(-1)
    go_on.wait()
    wrong.put(sum(int((batch[key] != column).sum()) for key, column in then.items()))


@pytest.mark.parametrize("n_workers", [0, 1, 2])
def test_a_child_keeps_the_batch_that_it_was_given(make_shards, n_workers):
    """Its parent lets go of its own, and goes on."""
    spec = Spec(n_examples=60, content_tokens=8, cls=False, examples_per_shard=13)
    cfg = ShuffledConfig(shards=make_shards(spec), layer=7, batch_size=16, buffer_size=2)
    batches = iter(DataLoader(ShuffledActivations(cfg), num_workers=n_workers))
    context = multiprocessing.get_context("fork")
    go_on, wrong, children = context.Event(), context.SimpleQueue(), []
    for _ in range(3):
        batch = next(batches)
        child = context.Process(target=keep_and_compare, args=(batch, go_on, wrong))
        child.start()
        children.append(child)
        del batch
        assert wrong.get() == -1
    n_left = sum(1 for _ in batches)
    assert n_left == 27
    go_on.set()
    assert [wrong.get() for _ in children] == [0, 0, 0]
    for child in children:
        child.join()
        child.close()
    wrong.close()


# Memory, mappings and descriptors, over many epochs


class Use:
    """What this process and some others have of our shared memory: megabytes, mappings, descriptors."""

    def __init__(self, pids):
        gc.collect()
        leases.settle()
        self.shared_mb, self.n_mappings, self.n_fds = 0.0, 0, 0
        for pid in [os.getpid(), *pids]:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            self.shared_mb += int(re.search(r"^Pss_Shmem: +(\d+) kB", rollup, re.MULTILINE)[1]) / 1024
            self.n_mappings += Path(f"/proc/{pid}/maps").read_text().count("memfd:saev_torch")
            self.n_fds += len(os.listdir(f"/proc/{pid}/fd"))


def iterable_loader(shards, prefetch_factor):
    cfg = ShuffledConfig(shards=shards, layer=0, batch_size=512, buffer_size=4, n_lanes=2)
    return DataLoader(ShuffledActivations(cfg), num_workers=1, prefetch_factor=prefetch_factor, persistent_workers=True)


def indexed_loader(shards, prefetch_factor):
    return DataLoader(
        IndexedDataset(IndexedConfig(shards=shards, layer=0)), batch_size=512, shuffle=True, num_workers=1,
        prefetch_factor=prefetch_factor, persistent_workers=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make_loader", "prefetch_factor"),
    [(iterable_loader, 2), (iterable_loader, 8), (iterable_loader, 24), (indexed_loader, 8)],
)
def test_15_epochs_take_no_more_than_a_few(make_shards, make_loader, prefetch_factor):
    """Even where 60 batches are held in each for a while."""
    spec = Spec(
        n_examples=250, content_tokens=131, cls=False, layers=(0,), d_model=32, labels=False, examples_per_shard=99
    )
    loader = make_loader(make_shards(spec), prefetch_factor)
    uses = []
    for epoch in range(15):
        held = []
        for batch in loader:
            if len(held) < 60:
                held.append(batch)
        del held, batch
        if epoch % 3 == 2:
            uses.append(Use([worker.pid for worker in loader._iterator._workers]))
    for what in ("n_mappings", "n_fds"):
        seen = [getattr(use, what) for use in uses]
        assert max(seen[2:]) <= max(seen[:2]), what
    # A batch takes 80 KB.
    assert max(use.shared_mb for use in uses[2:]) < max(use.shared_mb for use in uses[:2]) + 1.5
    assert uses[-1].n_mappings < 40
