"""Many reads in one system call. What is made of them is in test_reading.py, with a ring and without."""

import errno
import gc
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import contracts
import numpy as np
import pytest
import uring
from conftest import wait_until
from factory import Spec, oracle
from torch.utils.data import DataLoader

from saev_torch import (
    IndexedConfig,
    IndexedDataset,
    OrderedConfig,
    ShuffledConfig,
    compute_statistics,
    repack,
    verify,
)
from saev_torch.errors import ReadError
from saev_torch.reading import ring as ring_module
from saev_torch.reading import store as store_module
from saev_torch.reading.extents import make_extents
from saev_torch.reading.ring import Ring
from saev_torch.reading.source import Source
from saev_torch.reading.store import ShardStore

CONTENT = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)


class Held:
    """Stands for a ring, and lets go of it at the end of the test: pytest keeps what it was given a little longer."""

    def __init__(self, held):
        self._held = held

    def __getattr__(self, name):
        return getattr(self._held[0], name)


@pytest.fixture
def ring():
    if uring.refusal() is not None:
        pytest.skip(uring.refusal())
    ring = Ring.open()
    assert ring is not None, "the kernel gives rings here"
    held = [ring]
    del ring
    yield Held(held)
    held.clear()


@pytest.fixture
def fd(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT.tobytes())
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def read(ring, fd, memory, starts, lengths, vectors_per_read=1):
    """Read pieces of the file to the same places of memory, each with so many vectors."""
    n = len(starts)
    bounds = np.linspace(0, lengths, vectors_per_read + 1, axis=1).astype(np.int64)
    vectors = np.stack((memory.ctypes.data + starts[:, None] + bounds[:, :-1], np.diff(bounds)), axis=2).reshape(-1, 2)
    firsts = np.arange(n) * vectors_per_read
    return ring.read(np.full(n, fd), np.ascontiguousarray(vectors), firsts, np.full(n, vectors_per_read), starts)


@pytest.mark.parametrize("vectors_per_read", [1, 3])
def test_any_reads(ring, fd, vectors_per_read):
    """Many calls, so that the places in the ring are used again and again, from any of them on."""
    generator = np.random.default_rng(1)
    for n in [1, 5, 511, 512, 512, 7, 300, 400, 500]:
        memory = np.zeros_like(CONTENT)
        starts = np.sort(generator.choice(np.arange(0, len(CONTENT), 100), n, replace=False))
        lengths = generator.integers(10, 101, n)
        assert read(ring, fd, memory, starts, lengths, vectors_per_read).tolist() == lengths.tolist()
        wanted = np.zeros_like(CONTENT)
        for start, length in zip(starts, lengths, strict=True):
            wanted[start : start + length] = CONTENT[start : start + length]
        assert (memory == wanted).all()


def test_the_end_of_the_file_and_errors_are_results(ring, fd):
    memory = np.zeros(len(CONTENT) + 1000, dtype=np.uint8)
    end = len(CONTENT)
    starts, lengths = np.array([end - 10, end, 0, 50]), np.array([20, 20, 5, 5])
    assert read(ring, fd, memory, starts, lengths).tolist() == [10, 0, 5, 5]
    assert read(ring, 10_000, memory, starts, lengths).tolist() == [-errno.EBADF] * 4
    assert read(ring, fd, memory, starts, lengths).tolist() == [10, 0, 5, 5]


def test_what_is_pending_is_seen_by_others(ring, fd):
    """A read from an empty pipe waits; the others are done."""
    receiver, sender = os.pipe()
    memory = np.zeros(4, dtype=np.uint8)
    vectors = np.stack((memory.ctypes.data + np.arange(4), np.ones(4, dtype=np.int64)), axis=1)
    fds, offsets = np.array([fd, fd, receiver, fd]), np.array([0, 1, -1, 3])
    got = []
    thread = threading.Thread(
        target=lambda: got.extend(ring.read(fds, vectors, np.arange(4), np.ones(4, np.int64), offsets).tolist())
    )
    thread.start()
    try:
        wait_until(lambda: ring._n_done == 3)
        assert ring.first_pending(4) == 2
        # Asked about fewer reads, those of a moment ago.
        assert ring.first_pending(2) == 1
        assert not got
    finally:
        os.write(sender, b"x")
        thread.join(60)
    assert got == [1, 1, 1, 1]
    assert memory.tolist() == [CONTENT[0], CONTENT[1], ord("x"), CONTENT[3]]
    os.close(receiver)
    os.close(sender)


def test_nothing_is_left(ring):
    """Rings come and go with the threads that read."""
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        Ring.open()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_there_is_one_where_the_kernel_gives_one():
    """So that nothing is skipped in silence where it should run."""
    assert (Ring.open() is None) == (uring.refusal() is not None)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EMFILE])
def test_none_where_there_is_none(monkeypatch, code):
    def refuse(*args):
        ring_module.ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(ring_module, "_syscall", refuse)
    assert Ring.open() is None


def test_a_call_that_fails(ring, fd, monkeypatch):
    """Interrupted or short of memory it is made again; else it is our error."""
    real, codes = ring_module._syscall, [errno.EINTR, errno.EAGAIN, errno.EINTR]

    def enter(*args):
        if codes:
            ring_module.ctypes.set_errno(codes.pop())
            return -1
        return real(*args)

    monkeypatch.setattr(ring_module, "_syscall", enter)
    memory = np.zeros(100, dtype=np.uint8)
    assert read(ring, fd, memory, np.array([0, 20]), np.array([10, 10])).tolist() == [10, 10]
    codes.append(errno.EINVAL)
    with pytest.raises(ReadError, match="expected 2 reads to be made, got: Invalid argument"):
        read(ring, fd, memory, np.array([0, 20]), np.array([10, 10]))


class Interrupt(Exception):
    """What a signal handler raises."""


@pytest.fixture
def raising():
    """Handlers of two signals that raise while the ring reads."""

    def handle(number, frame):
        if frame.f_code.co_filename == ring_module.__file__:
            raise (KeyboardInterrupt if number == signal.SIGINT else Interrupt)

    numbers = signal.SIGINT, signal.SIGUSR1
    before = [signal.signal(number, handle) for number in numbers]
    yield numbers
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def wait_until_sleeping(tid):
    """Until a thread of this process waits in the kernel for a ring."""
    path = Path(f"/proc/self/task/{tid}/syscall")
    wait_until(lambda: path.read_text().split()[0] == str(ring_module._ENTER))


@pytest.mark.parametrize("n_signals", [1, 2, 10])
def test_what_interrupts_is_raised_when_no_read_is_under_way(ring, fd, raising, n_signals):
    """However often: until the slow read is done, memory is not free to be used again. The ring goes on after it."""
    receiver, sender = os.pipe()
    memory = np.zeros(4, dtype=np.uint8)
    vectors = np.stack((memory.ctypes.data + np.arange(4), np.ones(4, dtype=np.int64)), axis=1)
    fds, offsets, main, written = (
        np.array([fd, fd, receiver, fd]),
        np.array([0, 1, -1, 3]),
        threading.get_native_id(),
        [],
    )

    def interrupt():
        for i in range(n_signals):
            wait_until_sleeping(main)
            os.kill(os.getpid(), raising[i % 2])
        wait_until_sleeping(main)
        # Time for an exception to come too early.
        time.sleep(0.1)
        written.append(True)
        os.write(sender, b"x")

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises((KeyboardInterrupt, Interrupt)):
        ring.read(fds, vectors, np.arange(4), np.ones(4, np.int64), offsets)
    now = memory.tolist(), bool(written)
    thread.join()
    os.close(receiver)
    os.close(sender)
    assert now == ([CONTENT[0], CONTENT[1], ord("x"), CONTENT[3]], True)
    starts, lengths = np.arange(300) * 100, np.full(300, 50)
    target = np.zeros_like(CONTENT)
    assert read(ring, fd, target, starts, lengths).tolist() == lengths.tolist()
    assert (target[: 300 * 100].reshape(300, 100)[:, :50] == CONTENT[: 300 * 100].reshape(300, 100)[:, :50]).all()


@pytest.mark.parametrize("begun", [0, 3])
def test_what_was_not_begun_is_taken_back(ring, fd, monkeypatch, begun):
    """An exception between asking and beginning, and with some of the reads begun: nothing is read later."""
    real = ring_module._syscall

    def enter(number, ring_fd, n, *rest):
        if n:
            real(number, ring_fd, begun, begun, *rest[1:])
            raise Interrupt
        return real(number, ring_fd, n, *rest)

    memory, starts, lengths = np.zeros(1000, dtype=np.uint8), np.arange(8) * 100, np.full(8, 100)
    monkeypatch.setattr(ring_module, "_syscall", enter)
    with pytest.raises(Interrupt):
        read(ring, fd, memory, starts, lengths)
    monkeypatch.undo()
    memory[:] = 0
    other = np.zeros(1000, dtype=np.uint8)
    for n in (2, 512, 5):
        assert read(ring, fd, other, np.arange(n), np.ones(n, np.int64)).tolist() == [1] * n
    assert (other[:512] == CONTENT[:512]).all()
    assert not memory.any()


# File systems that answer short


@pytest.fixture(scope="module")
def short_fuse(tmp_path_factory):
    """A program that mounts a directory so that every read is answered short; see short_fuse.c."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/fuse here")
    program = tmp_path_factory.mktemp("fuse") / "short_fuse"
    try:
        source = Path(__file__).parent / "short_fuse.c"
        subprocess.run(["cc", "-O1", "-o", program, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"there is no compiler, or no linux/fuse.h: {err}")
    return program


# Rows that take two answers.
SPEC = Spec(n_examples=40, content_tokens=9, cls=False, layers=(0, 5), d_model=2048, examples_per_shard=13)


@pytest.fixture
def mounted(short_fuse, make_shards, tmp_path):
    shards, at = make_shards(SPEC), tmp_path / "short"
    # Its name is part of what is checked.
    target = at / "saev" / "shards" / shards.name
    target.mkdir(parents=True)
    with subprocess.Popen([short_fuse, shards, target], stdout=subprocess.PIPE) as server:
        if server.stdout.readline() != b"mounted\n":
            server.wait()
            pytest.skip("mounting is not allowed here")
        yield target
        gc.collect()
        subprocess.run(["umount", "-l", target], check=True)
        server.wait(60)


@pytest.mark.parametrize("kind", [OrderedConfig, ShuffledConfig])
@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_file_system_that_answers_short(mounted, kind, n_workers):
    cfg = kind(shards=mounted, layer=5, batch_size=64, buffer_size=4)
    batches = list(DataLoader(contracts.make_data_set(cfg), num_workers=n_workers))
    contracts.check_epoch(sorted(batches, key=lambda batch: -len(batch["act"])), SPEC, cfg)


def test_random_access_where_answers_are_short(mounted, make_shards, monkeypatch):
    monkeypatch.setattr("saev_torch.reading.many._MIN_MANY", 1)
    wanted, got = (
        IndexedDataset(IndexedConfig(shards=shards, tokens="all", layer="all")).__getitems__(range(0, 720, 4)).batch
        for shards in (make_shards(SPEC), mounted)
    )
    assert {key: bool((column == got[key]).all()) for key, column in wanted.items()} == dict.fromkeys(wanted, True)


def test_statistics_and_copies_where_answers_are_short(mounted, make_shards, tmp_path):
    wanted, got = (
        compute_statistics(IndexedConfig(shards=shards, tokens="all", layer="all"), cache=False)
        for shards in (make_shards(SPEC), mounted)
    )
    assert (wanted.total.mean == got.total.mean).all()
    copied = repack(mounted, tmp_path / "root", layers=[5])
    verify(copied)
    data_set = IndexedDataset(IndexedConfig(shards=copied, tokens="all", layer="all"))
    assert (data_set.__getitems__(range(360)).batch["act"].numpy() == oracle(SPEC)[:, 1].reshape(360, -1)).all()


@pytest.mark.parametrize("number", sorted(store_module._SHORT))
@pytest.mark.parametrize("past_cache", [False, True])
def test_no_ring_where_answers_may_be_short(make_shards, monkeypatch, number, past_cache):
    """Asked once for each file system and store."""
    asked = []
    monkeypatch.setattr(store_module, "_file_system", lambda fd: asked.append(fd) or number)
    monkeypatch.setattr(Ring, "read", lambda *args: pytest.fail("read by a ring"))
    store = ShardStore(make_shards(SPEC))
    reader = Source(store, past_cache).open_reader()
    memory = np.zeros(SPEC.n_examples * 18 * SPEC.d_model, dtype=np.float32)
    rows, per_shard = np.arange(720), 13 * 18
    extents = make_extents(rows // per_shard, rows % per_shard, memory.ctypes.data + rows * 8192, 8192)
    for start in range(len(extents.nbytes)):
        reader.read(extents, start, start + 1)
    reader.read(extents, 0, len(extents.nbytes))
    store.close()
    assert len(asked) == 1


def test_the_file_system_of_this_directory(fd):
    """As `stat -f` tells it."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    told = subprocess.run(["stat", "-f", "-c", "%t", path], check=True, capture_output=True, text=True).stdout
    assert store_module._file_system(fd) == int(told, 16)
    assert store_module._file_system(10_000) == 0
