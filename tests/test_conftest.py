"""The guard against leaks, itself: it must see each kind, and must not see what goes away by itself."""

import gc
import mmap
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import conftest
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def leaks_of(action):
    before = conftest.Resources.now()
    held = action()
    return before.leaks_now(0.05), held


def test_sees_a_file_descriptor(tmp_path):
    leaks, fd = leaks_of(lambda: os.open(tmp_path, os.O_RDONLY))
    os.close(fd)
    assert leaks == [f"file descriptor: {tmp_path} ({fd})"]


def test_sees_a_thread():
    stop = threading.Event()

    def start():
        thread = threading.Thread(target=stop.wait, name="left behind")
        thread.start()
        return thread

    leaks, thread = leaks_of(start)
    stop.set()
    thread.join()
    assert leaks == ["thread: left behind"]


def test_sees_a_child_process():
    leaks, child = leaks_of(lambda: subprocess.Popen(["sleep", "30"]))
    child.kill()
    child.wait()
    assert leaks == [f"child process: sleep ({child.pid})"]


def test_sees_a_memfd_that_is_only_mapped():
    def make():
        fd = os.memfd_create("left-behind")
        os.truncate(fd, 4096)
        memory = mmap.mmap(fd, 4096)
        os.close(fd)
        return memory

    leaks, memory = leaks_of(make)
    memory.close()
    # Python's mmap keeps a descriptor of its own.
    assert sorted(leak.split(":")[0] for leak in leaks) == ["file descriptor", "shared memory"]
    assert all("memfd:left-behind" in leak for leak in leaks)


def test_sees_anonymous_shared_memory():
    if torch.cuda.is_initialized():
        pytest.skip("CUDA keeps such memory for itself, so it is not looked at")
    leaks, memory = leaks_of(lambda: mmap.mmap(-1, 4096))
    memory.close()
    assert [leak.split(":")[0] for leak in leaks] == ["shared memory"]


def test_sees_a_shared_tensor():
    leaks, tensor = leaks_of(lambda: torch.zeros(1000).share_memory_())
    del tensor
    assert leaks


def test_waits_for_garbage_and_for_what_is_ending(tmp_path):
    before = conftest.Resources.now()
    cycle = [os.fdopen(os.open(tmp_path / "a", os.O_CREAT | os.O_RDWR), "r+"), None]
    cycle[1] = cycle
    gc.disable()
    del cycle
    threading.Thread(target=time.sleep, args=(0.1,)).start()
    try:
        # The file closes itself with a ResourceWarning, which is what the test is about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert before.leaks_now(conftest.PATIENCE_S) == []
    finally:
        gc.enable()


def test_does_not_see_the_pools_of_multiprocessing():
    before = conftest.Resources.now()
    value = multiprocessing.get_context("spawn").Value("q", 0)
    # Its lock is shared memory that goes with it; the arena that its number lies in stays for the next one.
    assert before.leaks_now(0.05)
    del value
    assert before.leaks_now(conftest.PATIENCE_S) == []


@settings(max_examples=2)
@given(st.booleans())
def test_examples_may_be_slow(flag):
    """Hypothesis fails one that takes 200 ms, if it is not told otherwise, as on a loaded machine they may."""
    time.sleep(0.25)


def test_slow_files_are_there():
    assert {f"{name}.py" for name in conftest.SLOW} <= {path.name for path in Path(__file__).parent.iterdir()}


def test_processes_leave_torch_out_of_collections():
    code = "import torch, gc; print(gc.get_freeze_count() > 10_000, gc.isenabled())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.stdout, done.stderr) == ("True True\n", "")
