"""inspect, verify and repack, through the real command line."""

import base64
import contextlib
import dataclasses
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factory import Spec, oracle, oracle_labels

from saev_torch.__main__ import main
from saev_torch.errors import ConfigError, FormatError, WriteError
from saev_torch.format.metadata import Metadata
from saev_torch.tools.repack import repack
from saev_torch.tools.verify import verify
from saev_torch.writing.writer import ShardWriter

SPEC = Spec(n_examples=11, d_model=8)
ROOT = Path(__file__).parent.parent


def run(*args):
    """Run a command in this process, as torch takes two seconds to come; `run_apart` is what a user does."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, args)])
    return code, out.getvalue(), err.getvalue()


def run_apart(*args):
    command = [sys.executable, "-m", "saev_torch", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write(root, md, acts, labels=None):
    with ShardWriter(root, md) as writer:
        writer.write_batch(acts, 0, labels)
    return writer.shards_dir


@pytest.fixture
def shards_dir(tmp_path):
    md = Metadata(**SPEC.metadata())
    return write(tmp_path / "source", md, oracle(md), oracle_labels(md))


def flip(path, offset):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 4
    path.write_bytes(raw)


@pytest.mark.slow
def test_inspect(shards_dir, tmp_path):
    figure = tmp_path / "figure.png"
    code, out, err = run_apart("inspect", shards_dir, "--plot", figure)
    assert (code, err) == (0, "")
    assert f"directory    {shards_dir} (protocol 2.1, hash {shards_dir.name})\n" in out
    assert "examples     11 x 6 content tokens, with [CLS]\n" in out
    assert "files        3 of up to 4 examples, 0.0 MB\nchecksums    yes\n" in out
    content_norms = np.linalg.norm(oracle(SPEC)[:, 1, 1:], axis=-1)
    assert f"layer 7      norm {content_norms.mean():.4g} (from {content_norms.min():.4g} to " in out
    counts = np.bincount(oracle_labels(SPEC).ravel())
    assert re.findall(r"^ +(\d) +(\d+) ", out, re.MULTILINE)[0] == (str(counts.argmax()), str(counts.max()))
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_inspect_without_labels(make_shards):
    code, out, _ = run("inspect", make_shards(labels=False, protocol="1.1"))
    assert code == 0
    assert "protocol 1.1" in out
    assert "checksums    none" in out
    assert "labels       none" in out


def test_verify(shards_dir):
    before = content(shards_dir)
    assert run("verify", shards_dir, "--finite") == (0, f"{shards_dir}: all is well (33 checksums, values)\n", "")
    assert content(shards_dir) == before
    flip(shards_dir / "acts000001.bin", 300)
    code, out, err = run("verify", shards_dir)
    assert (code, err) == (1, "")
    assert out.startswith("acts000001.bin, example 4, layer 7, block at byte 224: expected checksum ")
    assert out.endswith(f"{shards_dir}: 1 fault (33 checksums)\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("verify", "nowhere"),
            "Activations are not saved at nowhere: expected a shard directory",
        ),
        (("inspect", "tests"), "Activations are not saved at tests/metadata.json: does not exist"),
        (("inspect", "tests", "--plot", "no/such/folder.png"), "--plot: expected a file in a folder that exists"),
        (
            ("repack", "nowhere", "target"),
            "Activations are not saved at nowhere: expected a shard directory",
        ),
    ],
)
def test_errors_are_one_line(args, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"saev_torch: {re.escape(message)}.*\n", err)


def test_repack(shards_dir, tmp_path):
    before = content(shards_dir)
    root = tmp_path / "target"
    code, out, err = run(
        "repack", shards_dir, root, "--layers=7", "--examples", "1:9:2", "--max-tokens-per-shard", "21"
    )
    assert (code, err) == (0, "")
    data = base64.b64encode(f"opaque\nrepacked from {SPEC.hash()}: examples 1:8:2".encode()).decode()
    md = dataclasses.replace(
        Metadata(**SPEC.metadata()), layers=(7,), n_examples=4, max_tokens_per_shard=21, data=data
    )  # fmt: skip
    expected = write(tmp_path / "expected", md, oracle(SPEC)[1:9:2, 1:], oracle_labels(SPEC)[1:9:2])
    assert out == f"{root / expected.name}\n"
    assert content(root / expected.name) == content(expected)
    assert content(shards_dir) == before
    code, _, err = run("repack", shards_dir, root, "--layers=4")
    assert code == 2
    assert err.startswith("saev_torch: layers: expected some of [3, 7], as recorded, got [4]")


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [7, 3]},
        {"layers": [3]},
        {"examples": [10, 0, 3, 4, 5]},
        {"max_tokens_per_shard": 14},
        {"max_tokens_per_shard": 10**6, "examples": range(2, 11)},
    ],
)
def test_what_repack_writes(make_shards, tmp_path, options):
    """From a directory that saev wrote, without checksums; and in pieces of one example."""
    source = make_shards(SPEC)
    found = repack(source, tmp_path / "one", **options)
    rows = list(options.get("examples", range(11)))
    layers = [SPEC.layers.index(layer) for layer in options.get("layers", SPEC.layers)]
    expected = write(
        tmp_path / "expected", Metadata.load(found), oracle(SPEC)[rows][:, layers], oracle_labels(SPEC)[rows]
    )
    assert content(found) == content(expected)
    assert verify(found).ok


def test_other_examples_are_another_directory(make_shards, tmp_path):
    """Be they as many, of the same source, or the same ones of another source."""
    data = base64.b64encode(pickle.dumps({"root": "/data", "n": 7})).decode()
    source, larger = make_shards(SPEC, data=data), make_shards(SPEC, data=data, n_examples=12)
    chosen = [range(4), range(4, 8), range(3, -1, -1), range(0, 8, 2), [0, 1, 2, 9], [0, 2, 1, 9], range(10, -1, -1)]
    taken = [repack(source, tmp_path, examples=examples) for examples in chosen]
    taken.append(repack(larger, tmp_path, examples=chosen[0]))
    assert len({path.name for path in [*taken, source, larger]}) == len(taken) + 2
    for path in taken:
        md = Metadata.load(path)
        # What reads the original's description goes on reading it: a pickle ends where it says so.
        assert pickle.loads(base64.b64decode(md.data, validate=True)) == {"root": "/data", "n": 7}
        assert md.data != data
        assert verify(path).ok
    # The same again is the same directory, which is there.
    with pytest.raises(WriteError, match=taken[1].name):
        repack(source, tmp_path, examples=[4, 5, 6, 7])
    assert Metadata.load(repack(source, tmp_path, layers=[7])).data == data


def test_small_pieces(shards_dir, tmp_path, monkeypatch):
    whole = repack(shards_dir, tmp_path / "whole", layers=[7, 3])
    monkeypatch.setattr("saev_torch.tools.repack._BATCH_NBYTES", 1)
    assert content(repack(shards_dir, tmp_path / "pieces", layers=[7, 3])) == content(whole)


def test_repack_of_an_old_protocol(make_shards, tmp_path):
    source = make_shards(protocol="1.1", labels=False)
    md = Metadata.load(repack(source, tmp_path, layers=[3]))
    assert (md.protocol, md.layers, md.n_examples) == ("2.1", (3,), 11)


def test_damage_is_not_carried_over(shards_dir, tmp_path):
    flip(shards_dir / "acts000002.bin", 600)
    with pytest.raises(FormatError, match="expected example 9, layer 3 as it was written"):
        repack(shards_dir, tmp_path / "target", examples=range(5, 11))
    assert not (tmp_path / "target").exists() or not any((tmp_path / "target").iterdir())
    repack(shards_dir, tmp_path / "target", layers=[7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected a change"),
        ({"layers": []}, "layers: expected some of"),
        ({"examples": [11]}, "examples: expected some of"),
        ({"examples": [-1]}, "examples: expected some of"),
        ({"examples": []}, "examples: expected some of"),
    ],
)
def test_refused(shards_dir, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        repack(shards_dir, tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()
