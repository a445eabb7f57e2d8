"""Fixtures: a factory of shard directories, and a guard against tests that leave something behind."""

import collections
import dataclasses
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import factory
import pytest
import torch
from hypothesis import HealthCheck, settings

from saev_torch.processes.notices import Notices
from saev_torch.reading import leases

_HERE = Path(__file__).parent
# Of Python processes that tests start: ours first, then `startup`, which Python imports from.
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (_HERE.parent, _HERE, _HERE / "startup")))

# How long a test waits for what must happen: long, because a loaded machine is slow, and only a failure waits so long.
PATIENCE_S = 60.0
# How long after a test what it used may take to go away: worker processes end a moment after their loader.
GRACE_S = 20.0

# What multiprocessing (pools) and matplotlib (fonts) keep for the life of the process, in which they are few.
_POOLS = ("/pym-", "/mpl-data/fonts/")

# Not ours, and of no consequence here; as marks they also hold under `pytest -W error`.
FOREIGN_WARNINGS = (
    # torchdata 0.11 itself calls this when a StatefulDataLoader is made.
    "ignore:'set_vital' is deprecated:UserWarning",
    # The order must not depend on the number of workers, so tests use more than a small machine has cores.
    "ignore:This DataLoader will create .* worker processes in total:UserWarning",
)


def pytest_configure() -> None:
    """Let Ctrl-C be heard, and leave time to a loaded machine.

    A shell that runs a job in the background ignores Ctrl-C, for all children, too. A child that is started from here
    has the default: handlers are not inherited, but what is ignored is.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Hypothesis waits by a clock of its own: 200 ms for an example.
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")


# Files that take long, most of it in processes that they start: `make check` leaves them to `make test`, as it does
# single tests with the mark, and cases that `_is_slow_case` names. What is left is to take less than two minutes on two
# cores, lint and types included, and to try each package.
SLOW = frozenset(
    f"test_{name}"
    for name in [
        "accelerate",
        "bare",
        "bench",
        "checksums",
        "compiled",
        "concurrency",
        "conftest",
        "contract",
        "demo",
        "dtypes",
        "ending",
        "epochs",
        "examples",
        "faults",
        "fuzz",
        "handover",
        "in_order",
        "installed",
        "launchers",
        "lightning",
        "localcopy",
        "memory",
        "notebooks",
        "plan_command",
        "programs",
        "quality",
        "ranks",
        "recorder",
        "replaced_labels",
        "resources",
        "resume",
        "scaling",
        "soak",
        "stalls",
        "statistics",
        "systems",
        "trainer_examples",
        "trainers",
        "travel",
        "writing_16_bits",
    ]
)


# Cases of a test that `make check` tries, of those that one may stand for another.
N_CASES = 3


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import slow files where no slow test is asked for."""
    return True if config.option.markexpr == "not slow" and collection_path.stem in SLOW else None


# Files that take long for few tests. They come first, so that none is left at the end for one process.
FIRST = frozenset(
    f"test_{name}"
    for name in [
        "bench",
        "demo",
        "faults",
        "installed",
        "notebooks",
        "programs",
        "recorder",
        "resources",
        "resume",
        "scaling",
        "soak",
        "stalls",
        "systems",
        "trainer_examples",
        "trainers",
    ]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    n_tests = collections.Counter(item.path for item in items)
    # Sorting keeps the order within a file.
    items.sort(key=lambda item: (item.path.stem not in FIRST, -n_tests[item.path], item.path))
    cases: dict[Any, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(getattr(item, "function", item), []).append(item)
    kept = {id(item) for of_one_test in cases.values() for item in _spread(of_one_test)}
    for item in items:
        if item.path.stem in SLOW or _is_slow_case(item, id(item) in kept):
            item.add_marker(pytest.mark.slow)
        for warning in FOREIGN_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))


def pytest_collection_finish() -> None:
    """Spare later garbage collections, of which `no_leaks` makes many, what is there before the first test."""
    gc.collect()
    gc.freeze()


def _spread(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Return the first case, the last and what is evenly between them."""
    if len(cases) <= N_CASES:
        return cases
    return [cases[i * (len(cases) - 1) // (N_CASES - 1)] for i in range(N_CASES)]


def _is_slow_case(item: pytest.Item, is_kept: bool) -> bool:
    """Whether others stand for this case, or it starts Python anew."""
    fields = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    # Each module of the package keeps the rules for itself.
    return (not is_kept and "module" not in fields) or not {"spawn", "forkserver"}.isdisjoint(map(str, fields.values()))


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Return `factory.make_shards` with a new folder of this test as root; takes the fields of `factory.Spec`."""
    n_made = 0

    def make(spec: factory.Spec | None = None, **fields: Any) -> Path:
        nonlocal n_made
        n_made += 1
        return factory.make_shards(tmp_path / f"made{n_made}" / "saev" / "shards", spec, **fields)

    return make


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test, and its subprocesses, a cache folder of its own; return it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def cuda() -> None:
    """What CUDA opens once and keeps for the life of the process, before `no_leaks` looks."""
    if torch.cuda.is_available():
        torch.zeros(1).pin_memory().to("cuda", non_blocking=True).add_(1)
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    """Let each test hear what is said once in a process."""
    Notices.of_process().forget()


@pytest.fixture(autouse=True)
def no_leaks(nothing_said: None) -> Iterator[None]:
    """Fail a test that leaves a file descriptor, thread, child process or shared memory behind."""
    before = Resources.now()
    yield
    leaks = before.leaks_now(GRACE_S)
    if leaks:
        pytest.fail("the test leaked:\n" + "\n".join(leaks))


def wait_until(is_so: Callable[[], Any]) -> None:
    """Wait for something that happens by itself, and fail if it does not."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {PATIENCE_S} s"
        time.sleep(0.01)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the process holds at one moment, by kind and identity, with a name for a person."""

    held: dict[tuple[str, Hashable], str]

    @classmethod
    def now(cls) -> "Resources":
        # First, because joining what has ended is a side effect of asking, and it closes descriptors.
        multiprocessing.active_children()
        # So does the package, of what children inherited that have ended.
        leases.settle()
        kinds = {
            "file descriptor": _fds(),
            "thread": _threads(),
            "child process": _children(),
            "shared memory": _shared_mappings(),
        }
        return cls({(kind, key): name for kind, found in kinds.items() for key, name in found.items()})

    def leaks_now(self, grace_s: float) -> list[str]:
        """Name what is held now and was not then, after it had `grace_s` seconds to go away."""
        deadline = time.monotonic() + grace_s
        while leaks := self.since(Resources.now()):
            if time.monotonic() > deadline:
                break
            # Only where something seems to be left: a full collection with torch loaded takes 0.1 s.
            gc.collect()
            time.sleep(0.02)
        return leaks

    def since(self, after: "Resources") -> list[str]:
        return sorted(f"{kind}: {name}" for (kind, key), name in after.held.items() if (kind, key) not in self.held)


def _fds() -> dict[Hashable, str]:
    # The helpers of multiprocessing start when first needed and stay, each with a pipe.
    helpers = {
        getattr(resource_tracker._resource_tracker, "_fd", None),
        getattr(forkserver._forkserver, "_forkserver_alive_fd", None),
    }
    found: dict[Hashable, str] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue  # the one that listed the directory
        if int(fd) not in helpers and not any(pool in target for pool in _POOLS):
            found[fd, target] = f"{target} ({fd})"
    return found


def _threads() -> dict[Hashable, str]:
    # tqdm's monitor is one thread for the life of the process.
    return {id(t): t.name for t in threading.enumerate() if type(t).__name__ != "TMonitor"}


def _children() -> dict[Hashable, str]:
    # All of them, zombies and subprocesses too, which multiprocessing.active_children does not know.
    helpers = {
        getattr(resource_tracker._resource_tracker, "_pid", None),
        getattr(forkserver._forkserver, "_forkserver_pid", None),
    }
    pids = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids |= {int(pid) for pid in (task / "children").read_text().split()}
        except OSError:
            continue  # the thread has ended, or the kernel was built without this file
    pids |= {child.pid for child in multiprocessing.active_children() if child.pid is not None}
    return {pid: f"{_command(pid)} ({pid})" for pid in pids - helpers}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "ended"


def _shared_mappings() -> dict[Hashable, str]:
    found: dict[Hashable, str] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, mode, _, device, inode, *name = line.split(maxsplit=5)
        target = name[0].strip() if name else ""
        # Anonymous shared memory is a deleted /dev/zero; by inode, as one object may be mapped in pieces.
        # torch keeps page-locked memory for later, which CUDA maps as a deleted /dev/zero, too.
        prefixes = ("/memfd:", "/dev/shm/") if torch.cuda.is_initialized() else ("/memfd:", "/dev/zero", "/dev/shm/")
        is_ours = target.startswith(prefixes) and mode.endswith("s")
        if is_ours and not any(pool in target for pool in _POOLS):
            found[device, inode] = target
    return found
