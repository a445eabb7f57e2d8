"""The table of faults, and a server that lets each of them happen in a process of its own.

The server has imported everything once; for each line on its input, a JSON object with `case`, `shards` and `out`, it
forks a process that is the leader of a session, in which the fault happens. It writes to `out` what the user saw:

    LD_PRELOAD=faults.so python faults.py

`python faults.py --table` prints the table as it stands in docs/faults.md.
"""

import ctypes
import dataclasses
import errno
import gc
import itertools
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contracts
import factory
from conftest import PATIENCE_S, Resources
from torch.utils.data import DataLoader

from saev_torch import OrderedConfig, ShuffledConfig
from saev_torch.processes.notices import Notices
from saev_torch.reading import columns
from saev_torch.reading.kernels import find_convert_kernels

AFTER = 3
"""Batches that are taken before the fault begins."""

SPECS = {
    "small": factory.Spec(
        n_examples=200, content_tokens=16, cls=False, layers=(0,), d_model=16, examples_per_shard=20, labels=True
    ),
    "wide": factory.Spec(
        n_examples=200, content_tokens=20, cls=False, layers=(0,), d_model=512, examples_per_shard=20, labels=False
    ),
}
BATCH_SIZES = {"small": 32, "wide": 400}


class TrainingError(Exception):
    """What a training step raises."""


@dataclasses.dataclass
class Run:
    """A process in which a fault happens.

    Attributes:
        fault: The fault.
        shards: Shard directory, the process's own.
        out: Folder for what it says.
        delivered: A digest of each batch that was taken.
        began: When the fault began.
        extra: What else the test wants to know.
    """

    fault: "Fault"
    shards: Path
    out: Path
    delivered: list[str] = dataclasses.field(default_factory=list)
    began: float = 0.0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    iterator: Any = None
    kept: list[Any] = dataclasses.field(default_factory=list)

    def config(self) -> contracts.Config:
        return config_of(self.fault, self.shards)

    def loader(self) -> Any:
        options = {"num_workers": self.fault.workers, **self.fault.options}
        if self.fault.plain:
            return DataLoader(contracts.make_data_set(self.config()), batch_size=None, **options)
        return contracts.make_ready(self.config(), **options)

    def shard(self, i: int) -> Path:
        # Without the empty file behind an exact multiple.
        return sorted(self.shards.glob("acts*.bin"))[:10][i]

    def take(self, batch: Any) -> None:
        if self.fault.keep:
            self.kept.append(batch)
        self.delivered.append(contracts.digest([batch]))

    def begin(self) -> None:
        """Let the fault begin."""
        self.began = time.monotonic()
        for key, value in self.fault.shim.items():
            os.environ[f"FAULT_{key}"] = value
        if self.fault.act is not None:
            self.fault.act(self)


def consume(run: Run) -> None:
    """What most users do: take batches in a loop. The fault begins after some of them."""
    if run.fault.early:
        run.begin()
    run.iterator = iter(run.loader())
    for batch in run.iterator:
        run.take(batch)
        del batch
        if len(run.delivered) == AFTER and not run.fault.early:
            run.begin()


@dataclasses.dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        name: Its name.
        what: What happens, for that page.
        sees: What the user sees, for that page.
        error: Name of the exception; None if all batches are delivered.
        says: Patterns that its message contains, in this order.
        act: How the fault begins.
        shim: Variables of `faults.c`, without FAULT_.
        kind: Which loader.
        workers: Its workers.
        options: Options of `DataLoader`.
        fields: Fields of the config.
        early: The fault begins before the first batch.
        within_s: Seconds from the fault to what the user sees.
        logs: Patterns that standard error contains.
        scene: What the process does.
        dies_of: Signal that ends the process.
        env: Variables.
        left: Patterns of files that may be left under $TMPDIR.
        keep: The user keeps all batches.
        spec: Which data.
        plain: Whether the loader is a plain `DataLoader`.
        stops_early: No error, but the user stops.
    """

    name: str
    what: str
    sees: str
    error: str | None = None
    says: tuple[str, ...] = ()
    act: Callable[[Run], None] | None = None
    shim: dict[str, str] = dataclasses.field(default_factory=dict)
    kind: type[Any] = OrderedConfig
    workers: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    early: bool = False
    within_s: float = 5.0
    logs: tuple[str, ...] = ()
    scene: Callable[[Run], None] = consume
    dies_of: int = 0
    keep: bool = False
    spec: str = "small"
    plain: bool = False
    stops_early: bool = False


def config_of(fault: Fault, shards: Path) -> contracts.Config:
    fields = {"layer": 0, "batch_size": BATCH_SIZES[fault.spec], "buffer_size": 8, "batch_timeout_s": 10.0}
    return fault.kind(shards=shards, **{**fields, **fault.fields})


# How faults begin


def truncate_last(run: Run) -> None:
    os.truncate(run.shard(-1), run.shard(-1).stat().st_size // 2)


def truncate_all(run: Run) -> None:
    for path in run.shards.glob("acts*.bin"):
        os.truncate(path, 0)


def delete_last(run: Run) -> None:
    run.shard(-1).unlink()


def delete_all(run: Run) -> None:
    run.shards.rename(run.shards.with_name("moved"))


def replace_last(run: Run) -> None:
    """Another file of the same size, as `mv` or `rsync` put it there."""
    other = run.shards / "other"
    other.write_bytes(bytes(run.shard(-1).stat().st_size))
    other.replace(run.shard(-1))


def replace_by_fifo(run: Run) -> None:
    path = run.shard(-1)
    path.unlink()
    os.mkfifo(path)


def truncate_labels(run: Run) -> None:
    os.truncate(run.shards / "labels.bin", 10)


def pids(run: Run) -> list[int]:
    return [worker.pid for worker in getattr(run.iterator, "iterator", run.iterator)._workers]


def kill_worker(run: Run) -> None:
    os.kill(pids(run)[1], signal.SIGKILL)


def stop_worker(run: Run) -> None:
    os.kill(pids(run)[1], signal.SIGSTOP)


def kill_self(run: Run) -> None:
    (run.out / "began").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_self(run: Run) -> None:
    (run.out / "began").touch()
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt_soon(run: Run) -> None:
    """Ctrl-C: the terminal sends SIGINT to all processes of the group, a moment later."""
    threading.Timer(0.2, os.killpg, (os.getpgid(0), signal.SIGINT)).start()


def raise_error(run: Run) -> None:
    raise TrainingError("the loss is NaN")


def limit_memory(headroom: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + headroom, resource.RLIM_INFINITY))


def limit_own_memory(run: Run) -> None:
    limit_memory(3 << 20)


def _limit_worker_memory(worker: int) -> None:
    limit_memory(20 << 20)


def limit_descriptors(run: Run) -> None:
    used = [int(fd) for fd in os.listdir("/proc/self/fd")]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(used) + 2, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


# What processes do


def break_off(run: Run) -> None:
    for batch in run.loader():
        run.take(batch)
        if len(run.delivered) == AFTER:
            break


def drop(run: Run) -> None:
    loader = run.loader()
    iterator = iter(loader)
    for _ in range(AFTER):
        run.take(next(iterator))
    del loader, iterator


def shut_down(run: Run) -> None:
    loader = run.loader()
    iterator = iter(loader)
    for _ in range(AFTER):
        run.take(next(iterator))
    loader.shutdown()
    # The state is that of the batches that were taken, and another loader goes on from there.
    again = contracts.make_ready(run.config())
    again.load_state_dict(loader.state_dict())
    for batch in again:
        run.take(batch)


def fork_in_epoch(run: Run) -> None:
    """A user's own fork, while threads of the parent read: both must live."""
    iterator = iter(run.loader())
    for _ in range(AFTER):
        run.take(next(iterator))
    run.begin()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            own = contracts.make_data_set(run.config())
            code = 0 if sum(len(batch["act"]) for batch in own) == 3200 else 2
        finally:
            os._exit(code)
    for batch in iterator:
        run.take(batch)
    run.extra["child"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def resume_after_error(run: Run) -> None:
    """A worker dies, and the user goes on with a new loader from the old one's state."""
    loader, received = run.loader(), list[Any]()
    try:
        run.iterator = iter(loader)
        # Torch's error comes at any time; so nothing of this program comes between a batch and its place in the list.
        while len(received) < len(loader):
            received.extend(itertools.islice(run.iterator, 1))
            if len(received) == AFTER:
                run.begin()
    except RuntimeError as err:
        run.extra["error"] = str(err)
    for batch in received:
        run.take(batch)
    try:
        next(run.iterator)
    except RuntimeError as err:
        run.extra["again"] = str(err)
    state = loader.state_dict()
    loader.shutdown()
    again = contracts.make_ready(run.config())
    again.load_state_dict(state)
    for batch in again:
        run.take(batch)


def _mount(size: str, target: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):  # NEWNS; REC | PRIVATE
        raise OSError(ctypes.get_errno(), "unshare")
    if libc.mount(b"tmpfs", os.fsencode(target), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def use_small_tmpdir(run: Run) -> None:
    try:
        _mount("64k", run.out / "tmp")
    except OSError as err:
        run.extra["skip"] = f"mounting is not allowed here: {err}"
        return
    consume(run)


def copy_twice(run: Run) -> None:
    """Two processes ask for the same copy at the same moment."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            contracts.make_data_set(run.config())
            code = 0
        finally:
            os._exit(code)
    consume(run)
    run.extra["child"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    run.extra["copies"] = len([path for path in (run.out / "tmp").glob("saev_torch-*/*") if path.is_dir()])


def copy_after_kill(run: Run) -> None:
    """A process is killed while it copies; the next one copies anew."""
    pid = os.fork()
    if pid == 0:
        os.environ.update(FAULT_CALL="sendfile", FAULT_PATH="acts000005", FAULT_KIND="hang")
        contracts.make_data_set(run.config())
        os._exit(1)
    while not list((run.out / "tmp").glob("saev_torch-*/*.part/acts000005.bin")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    consume(run)


_EVERY = {"CALL": "pread", "PATH": "acts"}
_TMPDIR = {"kind": ShuffledConfig, "fields": {"use_tmpdir": True}, "early": True}
_LABELS = {"kind": ShuffledConfig, "early": False}
_AGAIN = ("trying again",)
_FROM = r"\[rank 0 of 1, "
_WORKER = r"\[rank 0 of 1, worker \d of 2, "


def _number(code: int) -> str:
    return str(int(code))


FAULTS = (
    # Files
    Fault("truncated", "a shard is truncated before it is opened", "`FormatError`: the file, its size, the right size",
          "FormatError", (r"acts000009\.bin: expected 20480 bytes.* got 10240: it is truncated", _FROM), truncate_last),
    Fault("truncated-open", "a shard is truncated while it is open",
          "`ReadError`: the file, the offset, its size now", "ReadError",
          (r"acts00000\d\.bin: expected \d+ bytes at offset \d+, got 0: the file became shorter", _FROM), truncate_all,
          kind=ShuffledConfig),
    Fault("truncated-worker", "the same, in worker processes", "the same, with rank and worker", "ReadError",
          (r"DataLoader worker process [01]", r"acts00000\d\.bin.*offset \d+.*became shorter", _WORKER), truncate_all,
          kind=ShuffledConfig, workers=2),
    Fault("truncated-plain", "the same, with a plain `DataLoader`", "the same; its workers end when Python collects it",
          "ReadError", (r"DataLoader worker process [01]", r"acts00000\d\.bin.*offset \d+.*became shorter", _WORKER),
          truncate_all, kind=ShuffledConfig, workers=2, plain=True),
    Fault("deleted", "a shard is deleted before it is opened", "`ShardsNotFoundError`: the file", "ShardsNotFoundError",
          (r"acts000009\.bin: expected a file, but it does not exist", _FROM), delete_last),
    Fault("deleted-worker", "the same, in worker processes", "the same, with rank and worker", "ShardsNotFoundError",
          (r"DataLoader worker process [01]", r"acts000009\.bin.*does not exist", _WORKER), delete_last, workers=2),
    Fault("moved", "the whole directory is moved away", "`ShardsNotFoundError`: the directory", "ShardsNotFoundError",
          (r"expected a shard directory, but it does not exist", _FROM), delete_all),
    Fault("replaced", "a shard is replaced by another file of the same size", "`FormatError`: the file was replaced",
          "FormatError", (r"acts000009\.bin: .*it was replaced", _FROM), replace_last),
    Fault("fifo", "a shard is replaced by a FIFO", "`FormatError`: the file is a FIFO", "FormatError",
          (r"acts000009\.bin: expected a regular file, got a FIFO", _FROM), replace_by_fifo),
    Fault("unreadable", "a shard may no longer be read", "`ReadError`: the file, permission denied", "ReadError",
          (r"acts000009\.bin: could not be opened: Permission denied", _FROM),
          shim={"CALL": "open", "PATH": "acts000009", "KIND": _number(errno.EACCES)}),
    Fault("labels-truncated", "a labels.bin over 32 MB is truncated", "`ReadError`: the file, the offset", "ReadError",
          (r"labels\.bin: expected \d+ bytes at offset \d+, got \d+: the file became shorter", _FROM),
          truncate_labels, kind=ShuffledConfig),
    # Reads
    Fault("eio-once", "a read fails once (EIO)", "all batches; the log has the file, the offset and the error",
          shim={**_EVERY, "KIND": _number(errno.EIO), "TIMES": "1"}, logs=(r"acts.*offset \d+ failed \(Input/output",)),
    Fault("eio-once-worker", "the same, in worker processes", "the same", workers=2,
          shim={**_EVERY, "KIND": _number(errno.EIO), "TIMES": "1"}, early=True, logs=_AGAIN),
    Fault("stale", "an open file becomes stale (ESTALE)", "all batches: the file is opened again; the log says so",
          shim={**_EVERY, "KIND": _number(errno.ESTALE), "UNTIL_OPENED": "2"}, kind=ShuffledConfig,
          fields={"n_threads": 1}, logs=(r"acts.*Stale file handle.*trying again",)),
    Fault("eintr", "reads are interrupted (EINTR)", "all batches",
          shim={**_EVERY, "KIND": _number(errno.EINTR), "TIMES": "20"}),
    Fault("short", "reads fall short", "all batches", shim={**_EVERY, "KIND": "short", "TIMES": "500"},
          kind=ShuffledConfig),
    Fault("short-worker", "the same, in worker processes", "all batches",
          shim={**_EVERY, "KIND": "short", "TIMES": "500"}, kind=ShuffledConfig, workers=2, early=True),
    Fault("eio", "reads of a shard fail for good",
          "after 2.6 s of retries `ReadError`: the file, the offset, the error",
          "ReadError", (r"acts000005\.bin: reading \d+ bytes at offset \d+ failed after 5 tries: Input/output", _FROM),
          shim={"CALL": "pread", "PATH": "acts000005", "KIND": _number(errno.EIO)}, logs=_AGAIN, within_s=8.0),
    Fault("eio-worker", "the same, in worker processes", "the same, with rank and worker", "ReadError",
          (r"DataLoader worker process [01]", r"acts000005\.bin.*offset \d+ failed after 5 tries", _WORKER),
          shim={"CALL": "pread", "PATH": "acts000005", "KIND": _number(errno.EIO)}, workers=2, early=True,
          within_s=8.0, logs=_AGAIN),
    Fault("open-once", "opening a shard fails once (ESTALE)", "all batches; the log says so",
          shim={"CALL": "open", "PATH": "acts000009", "KIND": _number(errno.ESTALE), "TIMES": "1"},
          logs=(r"acts000009\.bin: opening failed \(Stale file handle\), trying again",)),
    Fault("labels-once", "a read of such a labels.bin fails once", "all batches; the log says so", kind=ShuffledConfig,
          shim={"CALL": "pread", "PATH": "labels.bin", "KIND": _number(errno.EIO), "TIMES": "2"},
          fields={"n_threads": 1}, logs=(r"labels\.bin: reading at offset \d+ failed",)),
    Fault("labels-eio", "reads of it fail for good", "`ReadError`: the file, the offset, the error",
          "ReadError", (r"labels\.bin: reading \d+ bytes at offset \d+ failed after 5 tries: Input/output", _FROM),
          shim={"CALL": "pread", "PATH": "labels.bin", "KIND": _number(errno.EIO)}, kind=ShuffledConfig, within_s=8.0),
    Fault("hang", "a read does not return",
          "after `batch_timeout_s` `StalledReadError`: the file, the offset, since when", "StalledReadError",
          (r"within 1\.0 s, got none: reading .*acts000005\.bin at offset \d+ for \d+\.\d s", _FROM),
          shim={"CALL": "pread", "PATH": "acts000005", "KIND": "hang"}, fields={"batch_timeout_s": 1.0}),
    Fault("hang-worker", "the same, in worker processes", "the same, with rank and worker", "StalledReadError",
          (r"DataLoader worker process [01]", r"reading .*acts000005\.bin at offset \d+ for \d+\.\d s", _WORKER),
          shim={"CALL": "pread", "PATH": "acts000005", "KIND": "hang"}, workers=2, early=True,
          fields={"batch_timeout_s": 1.0}),
    Fault("hang-open", "opening a shard does not return", "the same as a read", "StalledReadError",
          (r"within 1\.0 s, got none: reading .*acts000005\.bin", _FROM), fields={"batch_timeout_s": 1.0},
          shim={"CALL": "open", "PATH": "acts000005", "KIND": "hang"}),
    Fault("hang-labels", "a read of a labels.bin over 32 MB does not return", "the same as a read", "StalledReadError",
          (r"within 1\.0 s, got none: reading .*labels\.bin", _FROM), fields={"batch_timeout_s": 1.0},
          shim={"CALL": "pread", "PATH": "labels.bin", "KIND": "hang"}, kind=ShuffledConfig),
    # Processes
    Fault("killed-worker", "a worker is killed (kill -9, or out of memory)",
          "a `RuntimeError` (torch's, or our `WorkerLostError`): the worker", "RuntimeError",
          (r"DataLoader worker \(pid\(?s?\)? ?\d+\)? (is killed by signal: Killed|exited unexpectedly)",), kill_worker,
          workers=2, within_s=8.0),
    Fault("killed-resume", "the same, and training goes on from the last state of a ready-made loader",
          "an error each time, then the batches that are left", None, (), kill_worker, workers=2,
          scene=resume_after_error, within_s=10.0),
    Fault("stopped-worker", "a worker is stopped (SIGSTOP), `DataLoader(timeout=2)`",
          "after the timeout torch's `RuntimeError`", "RuntimeError", (r"timed out after 2 seconds",), stop_worker,
          workers=2, options={"timeout": 2}, within_s=15.0),
    Fault("memory-worker", "a worker runs into its limit of memory", "`ReadError`: size of the batch, rank and worker",
          "ReadError", (r"DataLoader worker process [01]", r"memory", _WORKER), workers=2, keep=True, spec="wide",
          options={"worker_init_fn": _limit_worker_memory}, fields={"buffer_size": 8}, early=True),
    Fault("memory", "the process runs into its limit of memory", "`ReadError`: size of the batch", "ReadError",
          (r"memory", _FROM), limit_own_memory, keep=True, spec="wide"),
    Fault("memfd", "the system gives no shared memory", "`ReadError`: size of the batch, rank and worker", "ReadError",
          (r"DataLoader worker process [01]", r"expected \d+ bytes of memory for another batch", _WORKER), workers=2,
          options={"worker_init_fn": lambda worker: os.environ.update(FAULT_CALL="memfd_create", FAULT_KIND="12",
                                                                      FAULT_SKIP="1")}, early=True),
    Fault("threads", "no thread can be started", "`ReadError`: how many threads were wanted", "ReadError",
          (r"n_threads: expected \d+ more threads, got 0",), early=True,
          shim={"CALL": "pthread_create", "KIND": _number(errno.EAGAIN)}),
    Fault("descriptors", "all descriptors are in use", "all batches, with fewer files open at a time",
          act=limit_descriptors, logs=()),
    Fault("no-proc", "/proc/<pid>/fd may not be opened", "all batches, through a socket", workers=2, early=True,
          shim={"CALL": "open", "PATH": "/fd/", "KIND": _number(errno.EACCES)}),
    Fault("killed", "the process is killed (kill -9)", "nothing; its workers end within seconds", act=kill_self,
          workers=2, dies_of=signal.SIGKILL, within_s=15.0),
    Fault("terminated", "the process is terminated (SIGTERM)", "nothing; its workers end within seconds",
          act=terminate_self, workers=2, dies_of=signal.SIGTERM, within_s=15.0),
    Fault("interrupt", "Ctrl-C", "`KeyboardInterrupt`", "KeyboardInterrupt", (), interrupt_soon,
          shim={**_EVERY, "KIND": "hang", "SECONDS": "2"}),
    Fault("interrupt-worker", "Ctrl-C, with workers", "`KeyboardInterrupt`", "KeyboardInterrupt", (), interrupt_soon,
          workers=2, early=True, shim={"CALL": "pread", "PATH": "acts000005", "KIND": "hang"}),
    Fault("training", "the training step raises", "its own exception; workers and threads end", "TrainingError",
          (r"the loss is NaN",), raise_error, workers=2),
    Fault("training-plain", "the same, with a plain `DataLoader`", "the same", "TrainingError", (r"NaN",), raise_error,
          workers=2, plain=True),
    Fault("training-here", "the same, without workers", "the same", "TrainingError", (r"NaN",), raise_error),
    Fault("break", "`break`", "nothing; workers and threads end", workers=2, scene=break_off, stops_early=True),
    Fault("break-here", "`break`, without workers", "nothing; threads end", scene=break_off, stops_early=True),
    Fault("dropped", "the loader is dropped", "nothing; workers and threads end", workers=2, scene=drop,
          stops_early=True),
    Fault("shutdown", "`shutdown()` in an epoch, then another loader with the state", "all batches", workers=2,
          scene=shut_down),
    Fault("fork", "a fork while threads read", "all batches, in both processes", scene=fork_in_epoch),
    # $TMPDIR
    Fault("tmpdir-full", "$TMPDIR is full (a small tmpfs)", "`WriteError`: the path, no space left", "WriteError",
          (r"expected room for a copy of .*No space left on device",), scene=use_small_tmpdir, **_TMPDIR),
    Fault("tmpdir-enospc", "$TMPDIR becomes full in the middle of a file", "the same; the part is deleted",
          "WriteError", (r"No space left on device",),
          shim={"CALL": "sendfile", "PATH": "acts000005", "KIND": _number(errno.ENOSPC)}, **_TMPDIR),
    Fault("tmpdir-sendfile", "the system refuses to copy a file for us (ENODATA)",
          "all batches: it is read and written",
          shim={"CALL": "sendfile", "PATH": "acts000005", "KIND": _number(errno.ENODATA)}, **_TMPDIR),
    Fault("two-copies", "two processes copy at once", "one copy, all batches", scene=copy_twice, **_TMPDIR),
    Fault("copy-killed", "a process is killed while it copies", "the next one copies anew, all batches",
          scene=copy_after_kill, **_TMPDIR),
)  # fmt: skip

# What happens to reads and to memory, on directories of 16 bits, too.
ON_HALVES = (
    "truncated-open", "truncated-worker", "replaced", "eio-once", "eio-once-worker", "stale", "eintr", "short",
    "short-worker", "eio", "hang", "killed-resume", "no-proc", "shutdown",
)  # fmt: skip

BY_NAME = {fault.name: fault for fault in FAULTS}


def table() -> str:
    """The table of docs/faults.md."""
    rows = [f"| {fault.what} | {fault.sees} | {fault.within_s:.0f} s |" for fault in FAULTS]
    return "\n".join(["| what happens | what you see | within |", "|---|---|---|", *rows])


# The server


def _run(case: str, shards: str, out: str) -> None:
    run = Run(BY_NAME[case], Path(shards), Path(out))
    temp = run.out / "tmp"
    temp.mkdir()
    os.environ["TMPDIR"] = str(temp)
    if run.fault.shim.get("CALL") == "pread":
        # What it is to fail must be calls that the library sees.
        os.environ["FAULT_NO_RING"] = "1"
    if "labels" in case:
        # A small one is in memory when the fault begins, and nothing happens.
        columns._MAX_KEPT_NBYTES = 0
    with open(run.out / "stderr", "wb") as file:
        os.dup2(file.fileno(), 2)
    logging.basicConfig()
    # Each process remembers for good what it has said.
    Notices.of_process()
    Notices.leave_parent()
    before = Resources.now()
    outcome: dict[str, Any] = {"error": None, "message": "", "bases": []}
    try:
        run.fault.scene(run)
    except BaseException as err:  # noqa: BLE001 -- this is what the test is about
        outcome.update(error=type(err).__name__, message=str(err), bases=[x.__name__ for x in type(err).__mro__])
        del err
    outcome["seconds"] = time.monotonic() - run.began if run.began else 0.0
    # What follows is not the fault's business; reads that hang go on.
    os.environ["FAULT_KIND"] = ""
    run.iterator = None
    run.kept.clear()
    gc.collect()
    outcome["leaks"] = before.leaks_now(PATIENCE_S)
    outcome["ended_s"] = time.monotonic() - run.began if run.began else 0.0
    outcome.update(delivered=run.delivered, extra=run.extra)
    outcome["temporary"] = [str(path.relative_to(temp)) for path in temp.rglob("*") if path.is_file()]
    (run.out / "outcome").write_text(json.dumps(outcome))


def _lines() -> Iterator[dict[str, str]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Answer one line for each request: the process that was forked; and one when it has ended: its exit code."""
    # Compiled here, once for all processes.
    find_convert_kernels("bfloat16", "float32", False)
    # What is imported need not be looked at by each garbage collection of each process, the last ones too.
    gc.collect()
    gc.freeze()
    for request in _lines():
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(0)
            code = 1
            try:
                _run(**request)
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())
                # An orderly end, with what libraries have to say at exit; not back into the server's loop.
                sys.exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    print(table()) if sys.argv[1:] == ["--table"] else main()
