"""A bar on a terminal that has tqdm, lines elsewhere, and nothing where nothing was asked for."""

import io
import os
import re
import sys
import termios
import threading
import tty
from types import SimpleNamespace

import pytest
from conftest import wait_until
from tqdm import tqdm

from saev_torch.writing import progress as progress_module
from saev_torch.writing.progress import Progress

# By default the lock of a bar is a semaphore of the system, which stays until the process ends.
tqdm.set_lock(threading.RLock())


def on_a_terminal(work):
    """Do some work with a terminal as stderr, and return what was shown there."""
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    termios.tcsetwinsize(theirs, (24, 120))
    with open(theirs, "w") as stderr, pytest.MonkeyPatch.context() as patch:
        # Not in a fixture: pytest puts its own stderr back before the test begins.
        patch.setattr(sys, "stderr", stderr)
        work()
        stderr.write("end")
        stderr.flush()
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(ours, 1 << 16)
    os.close(ours)
    return shown.decode().removesuffix("end")


def work(unit="examples", enabled=None, done=0):
    with Progress(40, "first", unit, enabled) as progress:
        progress.skip(done)
        progress.update(10 - done)
        progress.begin("second")
        progress.update(30)


@pytest.mark.parametrize("enabled", [None, True])
def test_a_bar_on_a_terminal(enabled):
    shown = on_a_terminal(lambda: work(enabled=enabled))
    assert re.search(r"\rsecond: 100%\|.*\| 40/40 \[\d+:\d+<.* examples/s\]\s*\n$", shown)
    assert re.search(r"first: +0%\|.*\| 0/40 ", shown)


def test_bytes_in_a_bar():
    assert re.search(r"first: +0%\|.*\| 0.00/40.0 \[.*\?B/s\]", on_a_terminal(lambda: work("B")))


@pytest.mark.parametrize("enabled", [None, True])
def test_lines_on_a_terminal_without_tqdm(monkeypatch, enabled):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    shown = on_a_terminal(lambda: work(enabled=enabled, done=8))
    left = r", \d:\d\d:\d\d left"
    assert re.fullmatch(rf"second: 25% \(10 of 40 examples{left}\)\nsecond: 100% \(40 of 40 examples{left}\)\n", shown)


def test_a_line_a_minute(monkeypatch):
    """A batch job says how far it has come, also in the middle of a long step, and when it is done."""
    now, minute, stderr = [100.0], threading.Semaphore(0), io.StringIO()

    class Minutes(threading.Event):
        def set(self):
            super().set()
            minute.release()

        def wait(self, timeout):
            minute.acquire()
            return self.is_set()

    # Not time.monotonic itself, which other threads need.
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys, "stderr", stderr)

    def pass_minutes(n):
        n_lines = stderr.getvalue().count("\n")
        now[0] += 60 * n
        minute.release(n)
        wait_until(lambda: stderr.getvalue().count("\n") == n_lines + n)

    progress = Progress(10_000_000, "repacking", "B")
    progress._over = Minutes()
    with progress:
        pass_minutes(1)
        progress.skip(1_000_000)
        progress.update(3_000_000)
        pass_minutes(2)
        progress.update(2_000_000)
        now[0] += 60
    assert stderr.getvalue().splitlines() == [
        "repacking: 0% (0 of 10 MB)",
        "repacking: 40% (4 of 10 MB, 0:06:00 left)",
        "repacking: 40% (4 of 10 MB, 0:06:00 left)",
        "repacking: 60% (6 of 10 MB, 0:03:12 left)",
    ]


def test_short_work_of_a_batch_job_says_nothing(capfd):
    with Progress(10, "verifying", "B") as progress:
        progress.update(10)
    assert capfd.readouterr().err == ""


def test_never(capfd):
    assert on_a_terminal(lambda: work(enabled=False)) == ""
    work(enabled=False)
    assert capfd.readouterr().err == ""


def test_nothing_to_do(capfd):
    with Progress(0, "recording", "examples", True):
        pass
    assert capfd.readouterr().err == "recording: 100% (0 of 0 examples)\n"
