"""What a process may use: files without names, on systems of all kinds."""

import errno
import os
import tempfile

import pytest
from conftest import wait_until

from saev_torch.processes import machine
from saev_torch.processes.machine import is_alive, memory_file


def refuse(*args):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=["memfd", "no memfd", "memfd is forbidden", "no memfd, no /dev/shm"])
def system(request, monkeypatch, tmp_path):
    if request.param.startswith("no memfd"):
        monkeypatch.delattr(os, "memfd_create")
    if request.param == "memfd is forbidden":
        monkeypatch.setattr(os, "memfd_create", refuse)
    if "/dev/shm" in request.param:
        monkeypatch.setattr(machine, "_SHARED_MEMORY", str(tmp_path / "nowhere"))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return request.param


@pytest.mark.parametrize("nbytes", [0, 5000, (3 << 20) + 1])
def test_a_file_without_a_name(system, nbytes, tmp_path):
    fd = memory_file(nbytes)
    try:
        assert os.fstat(fd).st_size == nbytes
        assert os.fstat(fd).st_nlink == 0
        assert not os.get_inheritable(fd)
        assert not any(os.pread(fd, 1 << 20, start).strip(b"\0") for start in range(0, nbytes, 1 << 20))
        os.pwrite(fd, b"x", nbytes)
        assert os.pread(fd, 1, nbytes) == b"x"
    finally:
        os.close(fd)
    # Another process of tests may be at the same.
    wait_until(lambda: not [name for name in os.listdir("/dev/shm") if name.startswith("saev_torch")])
    assert os.listdir(tmp_path) == []


def test_no_room(system, monkeypatch):
    def no_room(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "ftruncate", no_room)
    monkeypatch.setattr(os, "pwrite", no_room)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="No space left"):
        memory_file(5000)
    assert os.listdir("/proc/self/fd") == before


def test_who_is_alive():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
    assert not is_alive(pid)
    assert is_alive(os.getpid())
    assert is_alive(1)
    assert not is_alive(0)
    assert not is_alive(1 << 40)
