"""The files of `examples/`, run as they are by two processes: each sample once, and a resume that is exact."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contracts
import factory
import pytest

from saev_torch import ShuffledActivations, ShuffledConfig, StreamDigest

pytest.importorskip("transformers", reason="it is in the extra demo")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
WITH_RANKS = ("ddp", "with_fabric", "with_lightning", "with_accelerate", "with_transformers")
# 61 examples of 6 tokens in batches of 12 are 31 batches, and 16 steps of two ranks: the first batch comes once more.
SPEC = factory.Spec(n_examples=61, d_model=8, examples_per_shard=13)
N_BATCHES, N_STEPS, STOP = 31, 16, 21
FIELDS: dict[str, Any] = {"layer": 7, "batch_size": 12}
Trained = list[list[float]]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> ShuffledConfig:
    return ShuffledConfig(factory.make_shards(tmp_path_factory.mktemp("examples") / "shards", SPEC), **FIELDS)


@pytest.fixture(scope="module")
def wanted(cfg: ShuffledConfig) -> list[Trained]:
    """The first values of the samples, by epoch and batch."""
    ds = ShuffledActivations(cfg)
    epochs = [list(ds) for _ in range(2)]
    for epoch in epochs:
        contracts.check_epoch(epoch, SPEC, cfg)
    return [[batch["act"][:, 0].tolist() for batch in epoch] for epoch in epochs]


def runs(shards: Path, out: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Whole, and stopped and continued, with other numbers of workers."""
    found = {}
    for name in names:
        common = [f"{name}.py", str(shards), "--layer=7", "--batch-size=12", f"--save-every={STOP}"]
        for part, options in {
            "whole": ["--workers=1", f"--out={out / name / 'whole'}"],
            "stopped": ["--workers=0", f"--out={out / name / 'parts'}", f"--stop={STOP}"],
            "rest": ["--workers=1", f"--out={out / name / 'parts'}"],
        }.items():
            found[f"{name}, {part}"] = [*common, *options]
    return found


def execute(command: Sequence[str], arguments: dict[str, Any]) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *command, str(HERE / "example_runs.py"), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def plain(cfg: ShuffledConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("plain")
    execute([], {"runs": runs(cfg.shards, out, ["plain"]), "out": str(out)})
    return json.loads((out / "0.json").read_text())


@pytest.fixture(scope="module")
def ranks(cfg: ShuffledConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    execute(launcher, {"runs": runs(cfg.shards, out, WITH_RANKS), "out": str(out)})
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def digest_of(found: dict[str, Any]) -> StreamDigest:
    return StreamDigest.parse(re.search(r"digest ([0-9a-f]{16}-\d+)", found["said"][-1])[1])


def test_the_plain_loop(plain: dict[str, Any], wanted: list[Trained]) -> None:
    whole, stopped, rest = (plain[f"plain, {part}"] for part in ("whole", "stopped", "rest"))
    assert whole["trained"] == list(itertools.chain(*wanted))
    assert stopped["trained"] == whole["trained"][:STOP]
    assert stopped["trained"] + rest["trained"] == whole["trained"]
    assert digest_of(whole) == digest_of(rest)


@pytest.mark.parametrize("name", WITH_RANKS)
def test_ranks_share_the_sequence_of_the_plain_loop(
    ranks: list[dict[str, Any]], plain: dict[str, Any], wanted: list[Trained], name: str
) -> None:
    """Rank r trains on batches r, r + 2, ...; together they are those of the plain loop, and the first once more."""
    sequence = [[*epoch, epoch[0]] for epoch in wanted]
    for rank, found in enumerate(ranks):
        mine = list(itertools.chain(*(epoch[rank::2] for epoch in sequence)))
        assert found[f"{name}, whole"]["trained"] == mine
        assert found[f"{name}, stopped"]["trained"] == mine[:STOP]
        assert found[f"{name}, stopped"]["trained"] + found[f"{name}, rest"]["trained"] == mine


@pytest.mark.parametrize("name", sorted({*WITH_RANKS} - {"with_transformers"}))
def test_digests_add_up(ranks: list[dict[str, Any]], cfg: ShuffledConfig, name: str) -> None:
    """To that of the plain loop, and of the batches that came once more."""
    ds = ShuffledActivations(cfg)
    expected = StreamDigest()
    for epoch in range(2):
        batches = list(ds)
        for number, batch in enumerate([*batches, batches[0]]):
            expected = expected.including(epoch, number, batch.digest)
    whole, rest = ([digest_of(found[f"{name}, {part}"]) for found in ranks] for part in ("whole", "rest"))
    assert whole[0] + whole[1] == expected
    # A checkpoint has the digest of one rank, in Accelerate of the one that wrote last.
    assert rest[0] == whole[0] or rest[1] == whole[1]


def test_examples_are_short() -> None:
    files = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    # It takes minutes: docs/massive-activations.md says what it shows.
    assert files.pop("massive_activations").count("\n") < 90
    assert set(files) == {"common", "plain", *WITH_RANKS}
    assert max(text.count("\n") for text in files.values()) < 60
