"""Checksums with and without the package xxhash, which is an extra."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from factory import Spec, oracle, oracle_labels

from saev_torch.errors import WriteError
from saev_torch.format.checksums import CHECKSUMS_NAME
from saev_torch.format.metadata import Metadata
from saev_torch.tools.verify import verify
from saev_torch.writing.writer import ShardWriter

SPEC = Spec(n_examples=11, d_model=16)


def without_xxhash(code: str) -> "subprocess.CompletedProcess[str]":
    code = 'import sys; sys.modules["xxhash"] = None\n' + textwrap.dedent(code)
    tests = Path(__file__).parent
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=tests)


def write(root: Path, stop: int = SPEC.n_examples, **options: bool) -> Path:
    md = Metadata(**SPEC.metadata())
    acts, labels = oracle(md), oracle_labels(md)
    with ShardWriter(root, md, **options) as writer:
        for low, high in writer.missing():
            writer.write_batch(acts[low : min(high, stop)], low, labels[low : min(high, stop)])
        if stop < SPEC.n_examples:
            raise KeyError
    return writer.shards_dir


def algorithm(shards_dir: Path) -> str:
    return json.loads((shards_dir / CHECKSUMS_NAME).read_bytes())["algorithm"]


def test_with(tmp_path):
    shards_dir = write(tmp_path)
    assert algorithm(shards_dir) == "xxh3"
    assert verify(shards_dir).ok


def test_written_without_and_verified_with(tmp_path):
    done = without_xxhash(f"import test_checksums; print(test_checksums.write({str(tmp_path)!r}))")
    assert done.returncode == 0, done.stderr
    shards_dir = Path(done.stdout.strip())
    assert algorithm(shards_dir) == "crc32"
    report = verify(shards_dir)
    assert report.ok
    assert report.n_blocks == SPEC.n_examples * (len(SPEC.layers) + 1)
    with open(shards_dir / "acts000001.bin", "r+b") as file:
        file.write(b"\x01")
    assert [fault.file for fault in verify(shards_dir).faults] == ["acts000001.bin"]


def test_written_with_and_verified_without(tmp_path):
    shards_dir = write(tmp_path)
    done = without_xxhash(f"from saev_torch.__main__ import main; sys.exit(main(['verify', {str(shards_dir)!r}]))")
    assert done.returncode == 2, done.stderr
    assert "pip install 'saev_torch[checksums]'" in done.stderr


def test_resumed_with_the_other(tmp_path):
    """What has checksums of the other kind is written again, so that all have the same."""
    code = f"import test_checksums; test_checksums.write({str(tmp_path)!r}, 7, resume=True)"
    done = without_xxhash(code)
    assert "KeyError" in done.stderr
    assert [len(list(tmp_path.glob(pattern))) for pattern in ("*/.journal-*", "*/metadata.json")] == [1, 0]
    shards_dir = write(tmp_path, resume=True)
    assert algorithm(shards_dir) == "xxh3"
    assert verify(shards_dir).ok
    assert sorted(path.name for path in shards_dir.iterdir() if path.name.startswith(".")) == []


def test_resumed_with_the_same(tmp_path):
    with pytest.raises(KeyError):
        write(tmp_path, 7, resume=True)
    md = Metadata(**SPEC.metadata())
    writer = ShardWriter(tmp_path, md, resume=True)
    with pytest.raises(WriteError, match="4 are missing"), writer:
        assert writer.missing() == [(7, SPEC.n_examples)]
