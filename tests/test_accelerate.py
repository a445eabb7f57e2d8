"""Accelerate shares batches among ranks, as we do: each sample comes once, or an error says that it would not."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from factory import Spec

pytest.importorskip("accelerate")

HERE = Path(__file__).parent
SPEC = Spec(n_examples=64, content_tokens=8, examples_per_shard=20)
ALL = [[example, token] for example in range(64) for token in range(8)]
OPTIONS = [
    {"dispatch_batches": None, "workers": 1},
    {"dispatch_batches": True},
    {"dispatch_batches": False, "workers": 1},
    {"dispatch_batches": None, "split_batches": True},
]


def run_ranks(out: Path, shards: Path, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Run the script in two processes; return what each of them found, by case."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    arguments = {"shards": str(shards), "out": str(out), "cases": cases}
    command = [sys.executable, str(HERE / "accelerate_script.py"), json.dumps(arguments)]
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    command, env={**common, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
                )
            )
            for rank in "01"
        ]
        for rank in ranks:
            stack.callback(rank.kill)
        for rank in ranks:
            _, stderr = rank.communicate(timeout=240)
            assert rank.returncode == 0, stderr
    found = [json.loads((out / f"{rank}.json").read_text()) for rank in "01"]
    assert all(case["n_processes"] == 2 for rank in found for case in rank)
    return [list(pair) for pair in zip(*found, strict=True)]


def seen(*cases: dict[str, Any]) -> list[list[int]]:
    return sorted(sample for case in cases for batch in case["seen"] for sample in batch)


@pytest.mark.parametrize("make", ["plain", "pipe"])
def test_shared_twice(make_shards, tmp_path, make):
    """Half of the samples would never be seen."""
    for pair in run_ranks(tmp_path, make_shards(SPEC), [{"make": make, **options} for options in OPTIONS]):
        for rank in pair:
            assert "ConfigError: Accelerator.prepare: expected a loader whose batches are shared" in rank["error"]
            assert rank["seen"] == []


@pytest.mark.parametrize("make", ["ready-made", "alone"])
def test_shared_once(make_shards, tmp_path, make):
    """By us, in the batches that a rank has without Accelerate, or by Accelerate alone."""
    for pair in run_ranks(tmp_path, make_shards(SPEC), [{"make": make, **options} for options in OPTIONS]):
        assert [rank["error"] for rank in pair] == [None, None]
        assert seen(*pair) == ALL
        if make == "ready-made":
            assert [[len(batch) for batch in rank["seen"]] for rank in pair] == [[16] * 16] * 2
