"""Writers that are killed, and writers beside each other: never a directory that loads and is wrong."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import factory
import numpy as np
import pytest
import rank_writes
import torch
from factory import Spec, oracle, oracle_labels

from saev_torch.errors import ShardsNotFoundError, WriteError
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import ShardInfo
from saev_torch.writing import checkpoints
from saev_torch.writing.writer import ShardWriter

SPEC = Spec(n_examples=120, examples_per_shard=17, d_model=16)
MD = Metadata(**SPEC.metadata())
BATCH = 3


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_all(root, md=MD, **options):
    acts, labels = oracle(md), oracle_labels(md)
    with ShardWriter(root, md, **options) as writer:
        for at in range(*writer.example_range, BATCH):
            rows = slice(at, min(writer.example_range[1], at + BATCH))
            writer.write_batch(acts[rows], at, labels[rows])
    return writer


@contextlib.contextmanager
def interrupted(root, **options):
    """A writer whose block ends by an exception."""
    with pytest.raises(KeyError), ShardWriter(root, MD, **options) as writer:  # noqa: PT012
        yield writer
        raise KeyError


@pytest.fixture
def expected(tmp_path):
    """What an undisturbed writer leaves, which but for the sidecar is what the factory makes."""
    found = content(write_all(tmp_path / "undisturbed").shards_dir)
    made = content(factory.make_shards(tmp_path / "factory", SPEC, preallocate_last=False))
    assert {name: raw for name, raw in found.items() if name != "checksums.json"} == made
    return found


def fork(work):
    """Run `work` in a child that never returns, and return its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which the child never uses
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def reap(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(work, delay_s):
    """Kill a child -9 after a time; return its exit code, 0 if it was faster."""
    pid = fork(work)
    deadline = time.perf_counter() + delay_s
    while time.perf_counter() < deadline:
        pass  # More even than sleeping.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return reap(pid)


def check_readers(shards_dir, expected):
    """Either it is refused, with a word on how to go on, or all of it is there."""
    try:
        md = Metadata.load(shards_dir)
    except ShardsNotFoundError as err:
        assert not shards_dir.exists() or "resume=True" in str(err)  # noqa: PT017
        return False
    assert md == MD
    ShardInfo.load(shards_dir).validate(shards_dir)
    assert {name: raw for name, raw in content(shards_dir).items() if name[0] != "."} == expected
    return True


@pytest.mark.parametrize("ranges", [[None], [(0, 50), (50, 120)]], ids=["one", "two"])
def test_killed_at_random_moments(tmp_path, monkeypatch, expected, ranges):
    """200 kills -9 in all, each at a random moment of what is left to write; then one run to the end."""
    monkeypatch.setattr(checkpoints, "_SYNC_NBYTES", 20_000)
    generator = random.Random(len(ranges))
    started = time.perf_counter()
    write_all(tmp_path / "timed")
    duration_s = time.perf_counter() - started
    n_kills = n_resumed = n_late = 0
    root = tmp_path / "root0"
    while n_kills < 100:
        example_range = generator.choice(ranges)
        code = kill_at(
            lambda root=root, example_range=example_range: write_all(root, resume=True, example_range=example_range),
            generator.uniform(0, 1.2 * duration_s),
        )
        assert code in (0, -signal.SIGKILL)
        n_kills += code != 0
        is_complete = check_readers(root / MD.hash, expected)
        n_late += code != 0 and is_complete
        if is_complete or generator.random() < 0.25:
            writers = [write_all(root, resume=True, example_range=example_range) for example_range in ranges]
            assert writers[-1].published
            n_resumed += 1
            assert content(root / MD.hash) == expected
            root = tmp_path / f"root{n_kills}-{n_resumed}"
    assert n_resumed > 5


def test_what_is_there_is_not_written_again(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(checkpoints, "_SYNC_NBYTES", 1)

    def until_60():
        with ShardWriter(tmp_path, MD, resume=True) as writer:
            for at in range(0, 60, BATCH):
                writer.write_batch(oracle(MD)[at : at + BATCH], at, oracle_labels(MD)[at : at + BATCH])
            writer._checkpoints._join()
            os.kill(os.getpid(), signal.SIGKILL)

    assert reap(fork(until_60)) == -signal.SIGKILL
    written = []
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: written.append(len(view)) or pwrite(fd, view, at))
    with ShardWriter(tmp_path, MD, resume=True) as writer:
        ((start, stop),) = writer.missing()
        # All but what the last checkpoint was busy with.
        assert (30 <= start <= 60, stop) == (True, 120)
        # What is there, rounded otherwise: were it written, the result would differ.
        writer.write_batch(oracle(MD)[:start] * np.float32(1.001), 0, oracle_labels(MD)[:start])
        assert written == []
        with pytest.raises(WriteError, match="each example once"):
            writer.write_batch(oracle(MD)[:2], 0, oracle_labels(MD)[:2])
        writer.write_batch(oracle(MD)[start:], start, oracle_labels(MD)[start:])
        assert writer.missing() == []
    assert sum(written) == oracle(MD)[start:].nbytes + oracle_labels(MD)[start:].nbytes
    assert content(tmp_path / MD.hash) == expected


def test_a_batch_across_what_is_there(tmp_path, expected):
    with interrupted(tmp_path, resume=True) as writer:
        writer.write_batch(oracle(MD)[40:50], 40, oracle_labels(MD)[40:50])
    with ShardWriter(tmp_path, MD, resume=True) as writer:
        assert writer.missing() == [(0, 40), (50, 120)]
        assert not writer.published
        writer.write_batch(oracle(MD), 0, oracle_labels(MD))
    assert writer.published
    assert content(tmp_path / MD.hash) == expected


def test_the_same_writer_goes_on(tmp_path, expected):
    """One that raised may be entered again, and then is as a new one."""
    writer = ShardWriter(tmp_path, MD, resume=True)
    with pytest.raises(KeyError), writer:  # noqa: PT012
        writer.write_batch(oracle(MD)[:50], 0, oracle_labels(MD)[:50])
        raise KeyError
    with writer:
        assert writer.missing() == [(50, 120)]
        writer.write_batch(oracle(MD), 0, oracle_labels(MD))
    assert writer.published
    assert content(tmp_path / MD.hash) == expected


def test_finished_is_left_as_it_is(tmp_path, expected):
    shards_dir = write_all(tmp_path).shards_dir
    before = {path.name: path.stat().st_mtime_ns for path in shards_dir.iterdir()}
    with ShardWriter(tmp_path, MD, resume=True) as writer:
        assert writer.missing() == []
        writer.write_batch(oracle(MD) * np.float32(1.001), 0, oracle_labels(MD))
    assert writer.published
    assert {path.name: path.stat().st_mtime_ns for path in shards_dir.iterdir()} == before


@pytest.mark.parametrize("first", [0, 20, 33])
def test_other_values_are_not_a_continuation(tmp_path, expected, first):
    """The first that are given again are compared, wherever they are, and nothing is written of a batch of others."""
    with interrupted(tmp_path, resume=True) as writer:
        writer.write_batch(oracle(MD)[:40], 0, oracle_labels(MD)[:40])
    others = np.ascontiguousarray(oracle(MD)[::-1])
    with ShardWriter(tmp_path, MD, resume=True) as writer:
        writer.write_batch(oracle(MD)[100:], 100, oracle_labels(MD)[100:])
        with pytest.raises(WriteError, match=rf"values on disk to be given again, got others for example {first}"):
            writer.write_batch(others[first:60], first, oracle_labels(MD)[first:60])
        with pytest.raises(WriteError, match=rf"labels on disk to be given again, got others for example {first}"):
            writer.write_batch(oracle(MD)[first:60], first, oracle_labels(MD)[first:60] + 1)
        writer.write_batch(oracle(MD)[first:100], first, oracle_labels(MD)[first:100])
    assert writer.published
    assert content(tmp_path / MD.hash) == expected


@pytest.mark.parametrize("cut", [1, 9, 40])
def test_a_torn_line_counts_as_not_written(tmp_path, expected, cut):
    with interrupted(tmp_path, resume=True) as writer:
        for at in range(0, 30, 10):
            writer.write_batch(oracle(MD)[at : at + 10], at, oracle_labels(MD)[at : at + 10])
    journal = tmp_path / MD.hash / ".journal-0-120"
    journal.write_bytes(journal.read_bytes()[:-cut])
    with ShardWriter(tmp_path, MD, resume=True) as writer:
        assert writer.missing() == [(20, 120)]
        writer.write_batch(oracle(MD)[20:], 20, oracle_labels(MD)[20:])
    assert content(tmp_path / MD.hash) == expected


def test_labels_must_go_on_as_they_began(tmp_path):
    with interrupted(tmp_path, resume=True) as writer:
        writer.write_batch(oracle(MD)[:5], 0, oracle_labels(MD)[:5])
    with pytest.raises(WriteError, match="got a batch without them"), ShardWriter(tmp_path, MD, True) as writer:
        writer.write_batch(oracle(MD)[5:], 5)


def test_a_directory_of_others_is_not_resumed(tmp_path):
    (tmp_path / MD.hash).mkdir()
    (tmp_path / MD.hash / "thesis.tex").write_bytes(b"precious")
    with pytest.raises(WriteError, match=r"got \['thesis.tex'\]"):
        write_all(tmp_path, resume=True)
    assert content(tmp_path / MD.hash) == {"thesis.tex": b"precious"}


def test_other_ranges_may_resume(tmp_path, expected):
    """Four ranks were killed, two go on."""
    for start in (0, 30, 60, 90):
        with interrupted(tmp_path, example_range=(start, start + 30)) as writer:
            writer.write_batch(oracle(MD)[start : start + 20], start, oracle_labels(MD)[start : start + 20])
    with pytest.raises(WriteError, match="continue that with resume=True"):
        write_all(tmp_path, example_range=(0, 60))
    assert not write_all(tmp_path, resume=True, example_range=(0, 60)).published
    assert write_all(tmp_path, resume=True, example_range=(60, 120)).published
    assert content(tmp_path / MD.hash) == expected


def test_the_living_are_not_overtaken(tmp_path, expected):
    with ShardWriter(tmp_path, MD, resume=True, example_range=(0, 60)) as living:
        with pytest.raises(WriteError, match=r"only writer of examples 50\.\.120, got another process writing 0\.\.60"):
            write_all(tmp_path, resume=True, example_range=(50, 120))
        with pytest.raises(WriteError, match="only writer of examples"):
            write_all(tmp_path, resume=True, example_range=(0, 60))
        write_all(tmp_path, resume=True, example_range=(60, 120))
        living.write_batch(oracle(MD)[:60], 0, oracle_labels(MD)[:60])
    assert content(tmp_path / MD.hash) == expected


def test_a_forked_worker_does_not_keep_the_lock(tmp_path, expected):
    with interrupted(tmp_path, resume=True):
        ready, says = os.pipe()
        child = fork(lambda: (os.write(says, b"!"), time.sleep(60)))
        os.read(ready, 1)
    try:
        write_all(tmp_path, resume=True)
    finally:
        os.kill(child, signal.SIGKILL)
        reap(child)
        os.close(ready)
        os.close(says)
    assert content(tmp_path / MD.hash) == expected


@pytest.mark.parametrize("example_range", [(5, 5), (-1, 3), (0, 121), (0.0, 3), 7])
def test_bad_ranges(tmp_path, example_range):
    with pytest.raises(WriteError, match=r"^example_range: expected"):
        ShardWriter(tmp_path, MD, example_range=example_range)


def test_ranges_that_overlap_or_do_not_add_up(tmp_path):
    message = r"examples in 10\.\.20 .* got 8\.\.11"
    with pytest.raises(WriteError, match=message), ShardWriter(tmp_path, MD, example_range=(10, 20)) as writer:
        writer.write_batch(oracle(MD)[8:11], 8)
    with pytest.raises(WriteError, match=r"expected an empty directory, got \['.journal-10-20'\]"):
        write_all(tmp_path, example_range=(15, 30))
    assert not write_all(tmp_path, example_range=(20, 120)).published
    assert not (tmp_path / MD.hash / "metadata.json").exists()
    message = r"expected 10 examples, as announced, 5 are missing: \[\(15, 20\)\]"
    with pytest.raises(WriteError, match=message), ShardWriter(tmp_path, MD, True, example_range=(10, 20)) as writer:
        writer.write_batch(oracle(MD)[10:15], 10, oracle_labels(MD)[10:15])


def test_not_a_number_on_request(tmp_path):
    acts = oracle(MD)
    acts[7, 1, 2, 3] = np.nan
    message = "expected finite values, got nan in example 7, layer 7, stored token 2, dimension 3"
    with pytest.raises(WriteError, match=message), ShardWriter(tmp_path, MD, check_finite=True) as writer:
        writer.write_batch(acts[5:], 5)
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(tmp_path, MD) as writer:
        writer.write_batch(acts, 0)


@pytest.fixture
def small_disk(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("resume", [False, True])
def test_disk_full(small_disk, tmp_path, expected, resume):
    with pytest.raises(WriteError, match=r"No space left on device; check free space"):
        write_all(small_disk, resume=resume)
    assert not check_readers(small_disk / MD.hash, expected)
    assert bool(os.listdir(small_disk)) is resume
    if resume:
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        write_all(small_disk, resume=True)
        assert content(small_disk / MD.hash) == expected


def test_read_only_target(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(WriteError, match="could not be written: Read-only file system"):
        write_all(small_disk)


def test_ranks_write_what_one_process_writes(tmp_path):
    md = Metadata(**rank_writes.SPEC.metadata())
    alone = write_all(tmp_path / "alone", md).shards_dir
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, rank_writes.__file__, str(tmp_path / "ranks")],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "ranks" / md.hash) == content(alone)


def test_memory_is_bounded(tmp_path):
    """By less than one batch of what the caller holds already; with journals and checksums of all of it."""
    md = Metadata(**(Spec(n_examples=400, content_tokens=196, layers=(0,), d_model=256, labels=False).metadata()))
    batch = torch.zeros(50, 1, 197, 256)
    with ShardWriter(tmp_path, md) as writer:
        writer.write_batch(batch, 0)
        tracemalloc.start()
        try:
            for at in range(50, 400, 50):
                writer.write_batch(batch, at)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < batch.nbytes


def test_checkpoint(tmp_path):
    """What was forced to disk is there after a kill, however little it was."""

    def work():
        with ShardWriter(tmp_path, MD, resume=True) as writer:
            writer.write_batch(oracle(MD)[:7], 0, oracle_labels(MD)[:7])
            writer.checkpoint()
            writer.write_batch(oracle(MD)[7:9], 7, oracle_labels(MD)[7:9])
            os.kill(os.getpid(), signal.SIGKILL)

    assert reap(fork(work)) == -signal.SIGKILL
    with interrupted(tmp_path, resume=True) as writer:
        assert writer.missing() == [(7, 120)]
    with pytest.raises(WriteError, match="expected an open writer"):
        writer.checkpoint()
