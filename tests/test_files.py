import errno
import fcntl
import os
import resource
import socket
import stat
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saev_torch.errors import FormatError, ReadError, ShardsNotFoundError, WriteError
from saev_torch.format import files
from saev_torch.format.files import (
    check_name,
    first_repeated,
    lock,
    open_regular,
    read_json,
    replacing,
    short,
    sync_dir,
    write_atomic,
    writing,
)


def read(directory: Path, name: str) -> bytes:
    with os.fdopen(open_regular(directory, name), "rb") as file:
        return file.read()


def test_open_regular_reads(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    fd = open_regular(tmp_path, "a.bin")
    assert os.read(fd, 10) == b"abc"
    assert not os.get_inheritable(fd)
    os.close(fd)


BAD_NAMES = ["", ".", "..", "../a", "/etc/passwd", "a/b", "a/", "a\0b", "x" * 256, "é" * 128, "\ud800"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_must_be_plain(tmp_path, name):
    (tmp_path / "sub").mkdir()
    with pytest.raises(FormatError, match="name: expected"):
        open_regular(tmp_path / "sub", name)


@pytest.mark.parametrize("name", [None, 3, b"a", ["a"], {}])
def test_name_must_be_text(name):
    with pytest.raises(FormatError, match="expected a file name"):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["a", ".hidden", "...", "a b", "acts000000.bin", "x" * 255, "\u00e9", "a\nb", "~", "$HOME"]
)
def test_plain_names(tmp_path, name):
    (tmp_path / name).write_bytes(b"1")
    assert check_name(name) == name
    assert read(tmp_path, name) == b"1"


def test_directory_in_place(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FormatError, match="expected a regular file, got a directory"):
        open_regular(tmp_path, "a")


def test_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(FormatError, match="got a FIFO"):
        open_regular(tmp_path, "a")


def test_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a")
        with pytest.raises(FormatError, match="got a socket"):
            open_regular(tmp_path, "a")


def test_device():
    with pytest.raises(FormatError, match="got a character device"):
        open_regular(Path("/dev"), "null")


@pytest.mark.parametrize("target", ["inside", "../outside", "/etc/passwd", "dangling"])
def test_link(tmp_path, target):
    directory = tmp_path / "shards"
    directory.mkdir()
    (directory / "inside").write_bytes(b"")
    (tmp_path / "outside").write_bytes(b"")
    (directory / "a").symlink_to(target)
    with pytest.raises(FormatError, match=r"got a symbolic link.*local_dir"):
        open_regular(directory, "a")


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_exchanged_while_opening(tmp_path, monkeypatch, kind):
    """What stands in the place of a file that was looked at a moment ago is still not opened."""
    (tmp_path / "a").write_bytes(b"")
    lstat = os.lstat

    def lstat_then_exchange(path):
        found = lstat(path)
        os.unlink(path)
        os.symlink("/etc/passwd", path) if kind == "link" else os.mkfifo(path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "lstat", lstat_then_exchange)
        with pytest.raises(FormatError, match=r"got a symbolic link|got a FIFO"):
            open_regular(tmp_path, "a")


def test_directory_reached_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"1")
    (tmp_path / "link").symlink_to("real")
    assert read(tmp_path / "link", "a") == b"1"


def test_missing(tmp_path):
    with pytest.raises(ShardsNotFoundError, match=r"a\.bin: expected a file, but it does not exist"):
        open_regular(tmp_path, "a.bin")
    with pytest.raises(FileNotFoundError, match="nowhere: expected a shard directory, but it does not exist"):
        open_regular(tmp_path / "nowhere", "a.bin")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardsNotFoundError, match="file: expected a shard directory, but it is not a directory"):
        open_regular(tmp_path / "file", "a.bin")


@pytest.mark.parametrize("call", ["lstat", "open"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_refused_by_the_system(tmp_path, monkeypatch, call, code):
    (tmp_path / "a").write_bytes(b"")

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, refuse)
        with pytest.raises(ReadError, match=f"a: could not be opened: {os.strerror(code)}") as info:
            open_regular(tmp_path, "a")
    assert isinstance(info.value.__cause__, OSError)


def test_read_json(tmp_path):
    (tmp_path / "a.json").write_text('{"b": [1, -2, 0.5, "é", true, null], "a": {"b": 123456789012345678901234567890}}')
    obj = read_json(tmp_path, "a.json")
    assert obj == {"b": [1, -2, 0.5, "é", True, None], "a": {"b": 123456789012345678901234567890}}
    assert list(obj) == ["b", "a"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "valid JSON"),
        (b"{", "valid JSON"),
        (b'{"a": 1} x', "valid JSON"),
        (b"{'a': 1}", "valid JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' is repeated"),
        (b'[{"x": {"k": 1, "k": 2}}]', "the key 'k' is repeated"),
        (b"[NaN]", "valid JSON"),
        (b"[Infinity]", "valid JSON"),
        (b"[-Infinity]", "valid JSON"),
        (b"[1e400]", "valid JSON"),
        (b"[1" + b"0" * 5000 + b"]", "valid JSON"),
        (b'["\xff"]', "valid JSON"),
        (b'["\xed\xa0\x80"]', "valid JSON"),
        (rb'["\ud800"]', "valid JSON"),
        (rb'["\udc80"]', "valid JSON"),
        (b"\xff\xfe[\x00]\x00", "valid JSON"),
        (b"\xef\xbb\xbf[]", "valid JSON"),
        (b"[" * 100_000, "valid JSON|deeply"),
        (b"[" * 1020 + b"]" * 1020, "deeply"),
        (b'{"a":' * 1020 + b"1" + b"}" * 1020, "deeply"),
        (b'{"a":' * 500_000, "valid JSON|deeply"),
    ],
)
def test_bad_json(tmp_path, raw, message):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(FormatError, match=message) as info:
        read_json(tmp_path, "a.json")
    assert str(info.value).startswith(f"{tmp_path}/a.json: expected")
    assert info.value.__cause__ is not None
    assert len(str(info.value)) < 500


@given(st.binary(max_size=50))
def test_any_bytes(tmp_path_factory, raw):
    directory = tmp_path_factory.mktemp("any")
    (directory / "a.json").write_bytes(raw)
    try:
        obj = read_json(directory, "a.json")
    except FormatError:
        return
    assert orjson.loads(raw) == obj


def test_json_size_is_bounded(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" + b" " * 98 + b"]")
    assert read_json(tmp_path, "a.json", max_bytes=100) == []
    with pytest.raises(FormatError, match="expected at most 99 bytes of JSON, got 100"):
        read_json(tmp_path, "a.json", max_bytes=99)


def test_gigabytes_are_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(FormatError, match=f"expected at most {3 << 20} bytes of JSON, got {1 << 36}"):
        read_json(tmp_path, "a.json")


def test_growing_json_is_bounded(tmp_path, monkeypatch):
    """A size that was right when it was asked for is not trusted: /proc says 0 for files of any size."""
    (tmp_path / "a.json").write_bytes(b" " * 1000)
    fstat = os.fstat

    def small(fd):
        found = list(fstat(fd))
        found[6] = 0
        return os.stat_result(found)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fstat", small)
        with pytest.raises(FormatError, match="expected at most 100 bytes of JSON, got 101"):
            read_json(tmp_path, "a.json", max_bytes=100)


def test_short():
    assert short("abc") == "'abc'"
    assert len(short("x" * 10_000)) < 100
    assert len(short(["x" * 1000] * 1000)) < 1000
    assert len(short(10**3000)) < 100
    assert len(short(10**5000)) < 100


def test_first_repeated():
    assert first_repeated([]) is None
    assert first_repeated(["a", "b"]) is None
    assert first_repeated(["a", "b", "c", "b", "a"]) == "b"


def test_write_atomic(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_fails_whole(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, refuse)
        with pytest.raises(WriteError, match=r"a\.json: could not be written: No space left.*free space") as info:
            write_atomic(path, b"new")
    assert info.value.__cause__.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.fixture
def no_room():
    """Files of 1000 bytes at most: what was not written stays in its buffer, and fails again when that is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [3000, 300_000])
def test_write_atomic_where_there_is_no_room(tmp_path, no_room, nbytes):
    with pytest.raises(WriteError, match=r"a\.json: could not be written: File too large"):
        write_atomic(tmp_path / "a.json", bytes(nbytes))
    assert list(tmp_path.iterdir()) == []


def test_what_stopped_the_writing_is_raised(tmp_path, no_room):
    with pytest.raises(KeyError, match="mine"), replacing(tmp_path / "a") as file:  # noqa: PT012
        file.write(bytes(3000))
        raise KeyError("mine")
    assert list(tmp_path.iterdir()) == []


def test_write_atomic_is_complete_before_it_is_visible(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *args, name=name, call=call: (calls.append(name), call(*args))[1])
    write_atomic(path, b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_write_atomic_without_directory(tmp_path):
    with pytest.raises(WriteError, match="could not be written: No such file"):
        write_atomic(tmp_path / "nowhere" / "a", b"")


def test_writing_passes_ours_through(tmp_path):
    with pytest.raises(WriteError, match=r"^mine$"), writing(tmp_path):
        raise WriteError("mine")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_directory_that_cannot_be_forced_to_disk(tmp_path, monkeypatch, code):
    """Some file systems refuse that; what is written there is there all the same."""
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, os.strerror(code))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        write_atomic(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_lock_where_there_are_none(tmp_path, monkeypatch, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    with open(tmp_path / "a", "w") as file, open(tmp_path / "a") as other:
        assert lock(file.fileno(), fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            lock(other.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        with monkeypatch.context() as patch:
            patch.setattr(files.fcntl, "flock", refuse)
            assert not lock(file.fileno(), fcntl.LOCK_EX)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "check free space, quota and permissions"),
        (errno.EROFS, "write to another file system, or let this one be mounted for writing"),
        (errno.ENOSYS, "the file system cannot do that: write to another one"),
    ],
)
def test_writing_says_what_helps(tmp_path, code, remedy):
    with pytest.raises(WriteError, match=rf"could not be written: {os.strerror(code)}; {remedy}$"), writing(tmp_path):
        raise OSError(code, os.strerror(code))


def test_sync_dir(tmp_path):
    sync_dir(tmp_path)
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        sync_dir(tmp_path / "a")
