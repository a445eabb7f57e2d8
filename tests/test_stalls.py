"""Reads that never return, reads that are slow, and processes that are stopped: what is a stall, and what is none."""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import contracts
import numpy as np
import pytest
from factory import Spec
from torch.utils.data import DataLoader

from saev_torch import ShuffledConfig, StalledReadError
from saev_torch.processes import leaving, workers
from saev_torch.processes.idling import Idle
from saev_torch.reading import reader as reading
from saev_torch.reading import source
from saev_torch.reading.extents import make_extents
from saev_torch.reading.reader import CallReader, Spot
from saev_torch.reading.ring import Ring, RingReader
from saev_torch.reading.store import ShardStore

# What a busy machine may take on top: processes start and end slowly there.
PATIENCE_S = 60.0 * float(os.environ.get("SAEV_TORCH_PATIENCE", "1"))

# Rows of 8 KB, each a read of its own.
SPEC = Spec(n_examples=40, content_tokens=9, cls=False, layers=(0, 5), d_model=2048, examples_per_shard=13)
FIELDS = {"layer": 5, "batch_size": 32, "buffer_size": 8}


@pytest.fixture(scope="module")
def fuse(tmp_path_factory):
    """A program that mounts a directory, and answers slowly or never; see short_fuse.c."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/fuse here")
    program = tmp_path_factory.mktemp("fuse") / "fuse"
    try:
        subprocess.run(["cc", "-O1", "-o", program, Path(__file__).parent / "short_fuse.c"], check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"there is no compiler, or no linux/fuse.h: {err}")
    return program


class Mounted:
    """Shards on a file system that answers as it is told to."""

    def __init__(self, shards, control, server):
        self.shards, self._control, self._server = shards, control, server

    def answer(self, how):
        other = self._control.with_suffix(".new")
        other.write_text(how)
        other.replace(self._control)

    def abort(self):
        """Let all reads return that wait."""
        self._server.kill()
        self._server.wait(PATIENCE_S)


@pytest.fixture
def mounted(fuse, make_shards, tmp_path):
    shards, control = make_shards(SPEC), tmp_path / "control"
    control.write_text("")
    # Its name is part of what is checked.
    target = tmp_path / "mounted" / "saev" / "shards" / shards.name
    target.mkdir(parents=True)
    with subprocess.Popen([fuse, shards, target, control], stdout=subprocess.PIPE) as server:
        if server.stdout.readline() != b"mounted\n":
            server.wait()
            pytest.skip("mounting is not allowed here")
        found = Mounted(target, control, server)
        yield found
        found.abort()
        subprocess.run(["umount", "-l", target], check=True)


def until(found, what, seconds=2 * PATIENCE_S):
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)
    return value


# A read that never returns

_SCRIPT = """
import json, sys, time
import torch.utils.data
from saev_torch import ShuffledActivations, ShuffledConfig, ShuffledDataLoader
shards, control, out, kind, n_workers = sys.argv[1:]
cfg = ShuffledConfig(shards=shards, layer=5, batch_size=32, buffer_size=8, batch_timeout_s=1.0)
options = {"num_workers": int(n_workers), "multiprocessing_context": "fork" if int(n_workers) else None}
if kind == "ready":
    loader = ShuffledDataLoader(cfg, **options)
else:
    loader = torch.utils.data.DataLoader(ShuffledActivations(cfg), batch_size=None, **options)
open(control, "w").write("hang acts")
began = time.monotonic()
try:
    list(loader)
except TimeoutError as err:
    said = {"error": type(err).__name__, "message": str(err), "seconds": time.monotonic() - began}
with open(out, "w") as file:
    json.dump(said, file)
"""


def is_over(pid):
    """Whether a process has ended, but for threads that the system does not let go."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"


@pytest.mark.parametrize("kind", ["ready", "plain"])
@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_read_that_never_returns(mounted, tmp_path, kind, n_workers):
    """The error comes, and the process ends, though no signal ends its workers."""
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-c", _SCRIPT, mounted.shards, tmp_path / "control", out, kind, str(n_workers)]
    with open(log, "wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            until(lambda: is_over(process.pid), f"the process ends; it said: {log.read_text()}")
            # Without workers it has the read itself, in a thread that ends no sooner than that.
            tasks = Path(f"/proc/{process.pid}/task")
            until(lambda: any(map(is_waiting, tasks.iterdir())) == (not n_workers), "a read is waited for, or none")
        finally:
            mounted.abort()
            process.kill()
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    said = json.loads(out.read_text())
    assert said["error"] == "StalledReadError"
    assert re.search(
        r"within 1\.0 s, got none: reading .*acts00000\d\.bin at offset \d+ for \d+\.\d s", said["message"]
    )
    assert said["seconds"] < 1.0 + 5.0 + PATIENCE_S
    assert ("cannot be killed" in log.read_text()) == (kind == "ready" and n_workers > 0)


def is_waiting(task):
    with contextlib.suppress(OSError):
        return (task / "stat").read_text().rpartition(") ")[2][0] == "D"
    return False


def stay(worker):
    """Not even its exit ends this worker: as one that waits in the system."""
    multiprocessing.util.Finalize(None, time.sleep, (300,), exitpriority=0)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_cannot_be_killed(make_shards, monkeypatch, caplog, persistent):
    """All of them together are waited for as long as one."""
    loader = contracts.make_ready(
        ShuffledConfig(shards=make_shards(SPEC), **FIELDS), num_workers=3, worker_init_fn=stay,
        persistent_workers=persistent, multiprocessing_context="fork",
    )  # fmt: skip
    monkeypatch.setattr(workers, "_LEAVE_S", 0.5)
    monkeypatch.setattr(leaving, "_KILL_S", 0.5)
    batches = iter(loader)
    next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 3
    with monkeypatch.context() as patched:
        for how in ("kill", "terminate"):
            patched.setattr(multiprocessing.process.BaseProcess, how, lambda process: None)
        loader.shutdown()
        assert multiprocessing.active_children() == []
    message = caplog.records[-1].getMessage()
    assert "cannot be killed" in message
    assert all(str(child.pid) in message for child in children)
    for child in children:
        child.kill()
        child.join(PATIENCE_S)


def test_a_worker_that_was_stopped_is_killed(make_shards):
    loader = contracts.make_ready(
        ShuffledConfig(shards=make_shards(SPEC), **FIELDS), num_workers=2, multiprocessing_context="fork"
    )
    batches = iter(loader)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
    loader.shutdown()
    assert multiprocessing.active_children() == []


# Reads that are slow, but finish


@pytest.fixture
def no_ring(monkeypatch):
    monkeypatch.setattr(Ring, "open", classmethod(lambda cls: None))


@pytest.fixture
def slow_calls(make_shards, monkeypatch, no_ring):
    """Each read takes 30 ms, in workers, too, until it is to be fast; for where there is no FUSE."""
    real, delay_s = reading._preadv, multiprocessing.RawValue("d", 0.03)
    monkeypatch.setattr(reading, "_preadv", lambda *args: (time.sleep(delay_s.value), real(*args))[1])
    return make_shards(SPEC), lambda: setattr(delay_s, "value", 0.0)


@pytest.fixture
def slow_mount(mounted):
    mounted.answer("slow 15000")
    return mounted.shards, lambda: mounted.answer("")


@pytest.mark.parametrize("where", ["slow_calls", "slow_mount"])
@pytest.mark.parametrize("n_workers", [0, 2])
def test_slow_reads_are_no_stall(request, where, n_workers, capfd):
    """No batch comes for longer than `batch_timeout_s` and the loader's timeout: it takes 140 reads, or two times 72.

    Such timeouts must be long enough for a busy machine to let workers start.
    """
    shards, hurry = request.getfixturevalue(where)
    cfg = ShuffledConfig(
        shards=shards, layer=5, batch_size=72, buffer_size=4, n_lanes=2, n_threads=1,
        min_buffer_fill=1.0, batch_timeout_s=2.0, log_every_s=0.4,
    )  # fmt: skip
    options = {"num_workers": n_workers, "multiprocessing_context": "fork", "timeout": 2.0} if n_workers else {}
    handler = logging.StreamHandler()
    logging.getLogger("saev_torch").addHandler(handler)
    try:
        loader = contracts.make_ready(cfg, **options)
        began = time.monotonic()
        batches = iter(loader)
        first = next(batches)
        assert time.monotonic() - began > 2.0
        hurry()
        rest = list(batches)
    finally:
        logging.getLogger("saev_torch").removeHandler(handler)
    contracts.check_epoch([first, *rest], SPEC, cfg)
    said = (
        r"reader \d/\d: no batch for \d+ s; \d+\.\d MB were read meanwhile, \d+\.\d\d MB/s; now reading .*acts00000\d"
    )
    assert re.search(said, capfd.readouterr().err)


def test_every_read_of_a_call_counts(make_shards, monkeypatch):
    """Whoever looks sees another value after each of them, and where the thread is."""
    store, memory = ShardStore(make_shards(SPEC)), np.zeros((20, 8192), np.uint8)
    extents = make_extents(np.zeros(20, np.int64), 4 * np.arange(20), memory.ctypes.data + 8192 * np.arange(20), 8192)
    n, spot, seen, real = len(extents.nbytes), Spot(), [], reading._preadv
    assert n == 20
    monkeypatch.setattr(reading, "_preadv", lambda *args: (seen.append((spot.look(), spot.where())), real(*args))[1])
    CallReader(store, spot=spot).read(extents, 0, n)
    assert len({look for look, _ in seen}) == n
    assert [offset for _, (_, offset) in seen] == extents.offsets.tolist()
    assert spot.look() not in [look for look, _ in seen]
    assert spot.where is None
    store.close()


def test_every_read_of_a_ring_counts(make_shards):
    ring = Ring.open()
    if ring is None:
        pytest.skip("there is no io_uring here")
    store, memory = ShardStore(make_shards(SPEC)), np.zeros((20, 8192), np.uint8)
    extents = make_extents(np.zeros(20, np.int64), 4 * np.arange(20), memory.ctypes.data + 8192 * np.arange(20), 8192)
    reader = RingReader(ring, store)
    reader.watch(extents, 0, 20)
    before = reader.spot.look()
    reader.read(extents, 0, 20)
    reader.watch(extents, 0, 20)
    assert reader.spot.look()[2] - before[2] == 20
    store.close()


def test_every_read_that_is_scaled_counts():
    got = np.full(5, source._PENDING)
    looks = [source._n_pending(got)]
    for i in range(5):
        got[i] = 0
        looks.append(source._n_pending(got))
    assert looks == [5, 4, 3, 2, 1, 0]


def test_one_read_that_hangs_is_a_stall_when_the_others_are_done(make_shards, monkeypatch, no_ring):
    real = reading._preadv
    done = threading.Event()

    def preadv(fd, *args):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("acts000001.bin"):
            done.wait(60)
        return real(fd, *args)

    monkeypatch.setattr(reading, "_preadv", preadv)
    cfg = ShuffledConfig(shards=make_shards(SPEC), **FIELDS, batch_timeout_s=1.5)
    with pytest.raises(
        StalledReadError, match=r"within 1\.5 s, got none: reading .*acts000001\.bin .* No read finished"
    ):
        list(contracts.make_data_set(cfg))
    done.set()
    until(lambda: not any(one.name.startswith("saev_torch") for one in threading.enumerate()), "threads end")


# Time in which nobody runs


def test_idle():
    value = [0]
    idle = Idle(1.0, lambda: value[0])
    assert idle.step_s == 0.25
    for _ in range(3):
        assert not idle.note(0.25)
    assert not idle.is_over
    # As if it had been stopped for an hour.
    assert not idle.note(3600.0)
    assert idle.is_over
    value[0] = 1
    assert idle.note(3600.0)
    assert not idle.is_over
    assert Idle(float("inf"), lambda: 0).step_s == 0.25


def hold_reads(go_on, held):
    """Let reads of one shard wait until a file exists; another tells that they do."""
    real = reading._preadv

    def preadv(fd, *args):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("acts000001.bin"):
            held.touch()
            while not go_on.exists():
                time.sleep(0.01)
        return real(fd, *args)

    return preadv


@pytest.mark.parametrize(
    ("n_workers", "ready", "batch_timeout_s", "timeout"),
    [(0, True, 3.0, 0), (2, True, 3.0, 60), (2, True, 60.0, 3), (2, False, 3.0, 0)],
)
def test_time_in_which_a_process_is_stopped_does_not_count(
    make_shards, tmp_path, monkeypatch, no_ring, n_workers, ready, batch_timeout_s, timeout
):
    """As by a container's pause, or by a scheduler: parent and workers, for longer than they wait for a batch."""
    cfg = ShuffledConfig(shards=make_shards(SPEC), **FIELDS, batch_timeout_s=batch_timeout_s)
    go_on, held = tmp_path / "go_on", tmp_path / "held"
    monkeypatch.setattr(reading, "_preadv", hold_reads(go_on, held))
    options = {"num_workers": n_workers, "multiprocessing_context": "fork", "timeout": timeout} if n_workers else {}
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            if ready:
                loader = contracts.make_ready(cfg, **options)
            else:
                loader = DataLoader(contracts.make_data_set(cfg), batch_size=None, **options)
            contracts.check_epoch(list(loader), SPEC, cfg)
            code = 0
        except BaseException as err:  # noqa: BLE001 -- nothing of the parent may run here
            os.write(2, f"in the child: {type(err).__name__}: {err}\n".encode())
        finally:
            os._exit(code)
    try:
        until(held.exists, "a read is under way")
        os.killpg(pid, signal.SIGSTOP)
        # Longer than it waits; the machine may be as busy as it likes.
        time.sleep(3.5)
        os.killpg(pid, signal.SIGCONT)
        time.sleep(0.1)
        go_on.touch()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
