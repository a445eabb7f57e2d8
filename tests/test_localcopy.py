"""The copy under `$TMPDIR`: whole after a power loss, mended where a cleaner was at it, gone when it is of no use."""

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contracts
import factory
import pytest

from saev_torch import ConfigError, Metadata, ShardWriter, ShuffledActivations, ShuffledConfig, WriteError
from saev_torch.format import localcopy

ROOT = Path(__file__).parent.parent
SPEC = factory.Spec(n_examples=20, examples_per_shard=7)
# _IOR("X", 125, __u32), and to lose what the journal has not written yet.
_EXT4_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "scratch"
    place.mkdir()
    _set_tmpdir(monkeypatch, place)
    return place


def _set_tmpdir(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def cfg(tmp_path: Path) -> ShuffledConfig:
    with ShardWriter(tmp_path / "source", Metadata(**SPEC.metadata())) as writer:
        writer.write_batch(factory.oracle(SPEC), 0, factory.oracle_labels(SPEC))
    return ShuffledConfig(shards=writer.shards_dir, layer=7, batch_size=16, buffer_size=8, use_tmpdir=True)


def _copies(scratch: Path) -> list[Path]:
    return [path.parent for path in scratch.rglob("metadata.json")]


def _check(cfg: ShuffledConfig, scratch: Path) -> Path:
    """Read by a copy, and return it, when it is not in use any more."""
    contracts.check_epoch(list(ShuffledActivations(cfg)), SPEC, cfg)
    (copy,) = _copies(scratch)
    names = {path.name for path in cfg.shards.iterdir()}
    assert {path.name for path in copy.iterdir()} == names - {"acts000003.bin"}
    for name in names - {"acts000003.bin"}:
        assert (copy / name).read_bytes() == (cfg.shards / name).read_bytes()
    return copy


# What is there already


@pytest.mark.parametrize("n_left", [None, 0, 100])
@pytest.mark.parametrize("name", ["acts000001.bin", "shards.json", "metadata.json", "labels.bin"])
def test_a_file_that_is_missing_or_cut_is_copied_again(
    cfg: ShuffledConfig, scratch: Path, name: str, n_left: int | None
) -> None:
    copy = _check(cfg, scratch)
    inodes = {path.name: path.stat().st_ino for path in copy.iterdir()}
    if n_left is None:
        (copy / name).unlink()
    else:
        os.truncate(copy / name, n_left)
    assert _check(cfg, scratch) == copy
    # Others may be reading what is whole.
    assert {key: (copy / key).stat().st_ino for key in inodes if key != name} == {
        key: inode for key, inode in inodes.items() if key != name
    }


def test_a_link_in_the_place_of_a_file_is_replaced(cfg: ShuffledConfig, scratch: Path) -> None:
    copy = _check(cfg, scratch)
    (copy / "acts000000.bin").unlink()
    (copy / "acts000000.bin").symlink_to(cfg.shards / "acts000000.bin")
    assert _check(cfg, scratch) == copy
    assert not (copy / "acts000000.bin").is_symlink()


@pytest.fixture
def power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A file system as `$TMPDIR`; what is given loses its power, and comes up again."""
    image, place = tmp_path / "image", tmp_path / "mounted"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(32 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"an ext4 image cannot be made and mounted here: {err}")

    def lose() -> None:
        # The journal is written by anybody who syncs anything; the data of other files are not.
        other = os.open(place / "other", os.O_WRONLY | os.O_CREAT)
        os.write(other, b"x")
        os.fsync(other)
        try:
            fcntl.ioctl(other, _EXT4_SHUTDOWN, _NO_LOG_FLUSH.to_bytes(4, "little"))
        except OSError as err:
            pytest.skip(f"ext4 refuses to be shut down here: {err}")
        finally:
            os.close(other)
        subprocess.run(["umount", place], check=True)
        # A copy of it: another process of tests may have a mount of the first one in a namespace of its own, so that
        # the system would give that again, which is shut down.
        again = image.with_suffix(".again")
        shutil.copyfile(image, again)
        subprocess.run(["mount", "-o", "loop", again, place], check=True)

    _set_tmpdir(monkeypatch, place)
    yield lose
    subprocess.run(["umount", "-l", place], check=True)


def test_after_a_power_loss(cfg: ShuffledConfig, power: Callable[[], None], tmp_path: Path) -> None:
    place = tmp_path / "mounted"
    copy = _check(cfg, place)
    # What was not synced is lost.
    (copy.parent / "canary").write_bytes(b"x" * 100_000)
    inodes = {path.name: path.stat().st_ino for path in copy.iterdir()}
    power()
    assert (copy.parent / "canary").stat().st_size == 0
    assert {path.name: path.stat().st_ino for path in copy.iterdir()} == inodes, "the copy must have survived"
    assert _check(cfg, place) == copy
    assert {path.name: path.stat().st_ino for path in copy.iterdir()} == inodes, "it was copied again"


def test_what_a_power_loss_left_of_a_copy_is_mended(
    cfg: ShuffledConfig, power: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a device that says it had synced, and had not."""
    place = tmp_path / "mounted"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: None)
        copy = _check(cfg, place)
    power()
    assert sum(path.stat().st_size for path in copy.iterdir()) == 0
    assert _check(cfg, place) == copy


# Where to


def test_without_tmpdir_it_is_read_in_place(
    cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "default"))
    (tmp_path / "default").mkdir()
    for value in (None, ""):
        monkeypatch.delenv("TMPDIR", raising=False) if value is None else monkeypatch.setenv("TMPDIR", value)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            contracts.check_epoch(list(ShuffledActivations(cfg)), SPEC, cfg)
        assert "TMPDIR: expected" in caplog.text
        assert list((tmp_path / "default").iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_an_invalid_tmpdir_is_refused(
    cfg: ShuffledConfig, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if kind == "a file":
        (tmp_path / "place").write_text("")
    _set_tmpdir(monkeypatch, tmp_path / "place")
    with pytest.raises(ConfigError, match=r"TMPDIR: expected a directory, .*place.*use_tmpdir=False"):
        ShuffledActivations(cfg)


# How


@pytest.mark.parametrize("code", [errno.ENODATA, errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize("n_sent", [0, 2])
def test_where_the_system_does_not_copy_it_is_read_and_written(
    cfg: ShuffledConfig, scratch: Path, code: int, n_sent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, n_calls = os.sendfile, 0

    def refuse(out: int, source: int, offset: Any, nbytes: int) -> int:
        nonlocal n_calls
        n_calls += 1
        if n_calls > n_sent:
            raise OSError(code, os.strerror(code))
        return send(out, source, offset, min(nbytes, 1000))

    monkeypatch.setattr(os, "sendfile", refuse)
    monkeypatch.setattr(localcopy, "_SEND_NBYTES", 1500)
    _check(cfg, scratch)
    assert n_calls > n_sent


def test_another_error_does_not_say_that_there_is_no_room(
    cfg: ShuffledConfig, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "sendfile", fail)
    with pytest.raises(WriteError, match="could not be made: Input/output error") as caught:
        ShuffledActivations(cfg)
    assert "room" not in str(caught.value)
    assert _copies(scratch) == []


# What is of no use any more


def _rewrite(cfg: ShuffledConfig) -> None:
    for path in cfg.shards.glob("acts*"):
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def test_a_copy_of_what_has_changed_is_removed(cfg: ShuffledConfig, scratch: Path) -> None:
    before = _check(cfg, scratch)
    _rewrite(cfg)
    assert _check(cfg, scratch) != before


def test_a_copy_of_what_is_gone_is_removed(
    cfg: ShuffledConfig, scratch: Path, make_shards: Callable[..., Path]
) -> None:
    other = ShuffledConfig(shards=make_shards(SPEC), layer=7, batch_size=16, use_tmpdir=True)
    ShuffledActivations(other)
    ShuffledActivations(cfg)
    assert len(_copies(scratch)) == 2
    shutil.rmtree(other.shards)
    _check(cfg, scratch)


def test_a_copy_in_use_is_kept(cfg: ShuffledConfig, scratch: Path) -> None:
    data_set = ShuffledActivations(cfg)
    _rewrite(cfg)
    ShuffledActivations(cfg)
    assert len(_copies(scratch)) == 2
    contracts.check_epoch(list(data_set), SPEC, cfg)
    del data_set
    _check(cfg, scratch)


def test_a_copy_in_use_elsewhere_is_kept(cfg: ShuffledConfig, scratch: Path) -> None:
    script = (
        "import sys; from saev_torch import *\n"
        "ds = ShuffledActivations(ShuffledConfig(shards=sys.argv[1], layer=7, batch_size=16, use_tmpdir=True))\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
        "print(sum(len(batch['act']) for batch in ds))\n"
    )
    command = [sys.executable, "-c", script, str(cfg.shards)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "open\n"
        _rewrite(cfg)
        ShuffledActivations(cfg)
        assert len(_copies(scratch)) == 2
        assert user.communicate()[0] == f"{SPEC.n_examples * SPEC.content_tokens}\n"
    _check(cfg, scratch)


def test_what_somebody_else_has_put_there_is_left_alone(cfg: ShuffledConfig, scratch: Path) -> None:
    root = _check(cfg, scratch).parent
    strange = {"0123.use": b"\xff\x00", "4567.use": b"[1]", "89ab.use": b'{"source": 3, "names": ["x"]}', "notes": b"x"}
    for name, content in strange.items():
        (root / name).write_bytes(content)
    _rewrite(cfg)
    _check(cfg, scratch)
    assert {name: (root / name).read_bytes() for name in strange} == strange
