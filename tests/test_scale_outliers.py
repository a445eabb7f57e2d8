"""Tokens with huge norms are told of, with the mask that leaves them out; and commands take examples and masks."""

import logging
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import Spec, make_shards, write_acts
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from saev_torch import Examples, IndexedConfig, IndexedDataset, Metadata, ShuffledConfig, make_mask, record, repack
from saev_torch.__main__ import main
from saev_torch.order.predict import predict
from saev_torch.stats.outliers import NormMeter, advise_mask
from saev_torch.tools import inspect as inspect_command

SPEC = Spec(n_examples=80, content_tokens=32, d_model=16, examples_per_shard=30, layers=(3, -2))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """In layer -2 one content token of each example is huge, one that inspect's spread of samples does not meet."""
    values = np.random.default_rng(0).standard_normal((80, 2, 33, 16)).astype(np.float32)
    values[:, 1, 1 + 3] *= 100
    # The mask leaves the special token alone, and so does the warning.
    values[:, 0, 0] *= 1000
    made = make_shards(tmp_path_factory.mktemp("a root"), SPEC)
    write_acts(made, values)
    return made


def inspect(capsys, *args) -> str:
    assert main(["inspect", *map(str, args)]) == 0
    return capsys.readouterr().out


def test_inspect_names_the_mask(shards, tmp_path, capsys, monkeypatch):
    out = inspect(capsys, shards)
    (line,) = [line for line in out.splitlines() if "medians" in line]
    assert line.startswith("  layer -2: the largest norm, ")
    # What it names does it.
    command = line.partition("python -m saev_torch ")[2].partition(", then")[0]
    monkeypatch.chdir(tmp_path)
    assert shlex.split(command)[:2] == ["mask", str(shards)]
    assert main(shlex.split(command)) == 0
    keep = np.load(tmp_path / "keep.npy")
    assert not keep[:, 3].any()
    assert keep.sum() == 80 * 31
    capsys.readouterr()
    out = inspect(capsys, shards, "--mask", "keep.npy")
    assert "medians" not in out
    assert "chosen       2,480 of 2,560 content tokens, 96.875%\n" in out


@pytest.mark.parametrize("place", [0, 17, 31])
def test_inspect_finds_them_wherever_they_are_in_an_example(tmp_path, capsys, monkeypatch, place):
    """The samples that are taken evenly are the first and the last of all here."""
    monkeypatch.setattr(inspect_command, "_N_SAMPLED", 2)
    spec = Spec(n_examples=63, content_tokens=32, d_model=2, examples_per_shard=50, cls=False, layers=(3,))
    values = np.ones((63, 1, 32, 2), dtype=np.float32)
    values[:, 0, place] = 50
    made = make_shards(tmp_path, spec)
    write_acts(made, values)
    out = inspect(capsys, made)
    assert "layer 3: the largest norm, 70.71, is 50 medians" in out


def test_a_ratio_of_twenty_is_no_news(tmp_path):
    assert advise_mask(tmp_path, 3, 2.0, 40.0) is None
    assert "is 20 medians" in advise_mask(tmp_path, 3, 2.0, 40.01)
    # Where most are zero, nothing is known.
    for median in (0.0, float("nan")):
        assert advise_mask(tmp_path, 3, median, 40.0) is None


class Model(nn.Module):
    """Puts out what it is given, twice; where it is asked to, with one huge token."""

    def __init__(self, by):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.by = by

    def forward(self, x):
        x = self.blocks[0](x).clone()
        x[:, 2] *= self.by
        return self.blocks[1](x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_record_names_the_mask(tmp_path, caplog, dtype):
    acts = torch.randn(40, 9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    loader = DataLoader(TensorDataset(acts), batch_size=16)
    options = {"layers": [0, 1], "family": "f", "ckpt": "c", "dataset": "d", "cls_token": True}
    made = record(Model(400), loader, shards_root=tmp_path / "huge", **options)
    (said,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    median = np.median(np.linalg.norm(acts[:, 1:].float().numpy(), axis=-1))
    assert "layer 1: the largest norm, " in said.getMessage()
    assert f"mask {made} --layer 1 --norm-above 10x-median" in said.getMessage()
    found = float(said.getMessage().partition("norm, ")[2].partition(",")[0])
    assert found == pytest.approx(400 * float(acts[:, 2].float().norm(dim=1).max()), rel=0.01)
    n_medians = int(said.getMessage().partition(", is ")[2].partition(" ")[0].replace(",", ""))
    assert n_medians == pytest.approx(found / median, rel=0.1)
    assert make_mask(made, tmp_path / "keep.npy", layer=1, norm_above="10x-median").n_dropped == 40
    caplog.clear()
    record(Model(3), loader, shards_root=tmp_path / "well", **options)
    # A special token may be as huge as it likes.
    record(Model(400), loader, shards_root=tmp_path / "two", **options | {"first_content_token": 3})
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


def test_a_meter_looks_at_some_of_a_large_batch():
    meter, acts = NormMeter(1), torch.ones(4096, 1, 16, 2)
    acts[1::4] = float("nan")
    acts[0, 0, 3] = 1e4
    meter.add(acts)
    (line,) = meter.advise("d", (5,))
    assert "layer 5: the largest norm, 1.414e+04, is " in line
    assert float(line.partition(" is ")[2].partition(" ")[0].replace(",", "")) == pytest.approx(1e4, rel=0.01)
    assert meter._histograms[0].counts.sum() == 4096 * 16 / 4
    # Of one example that is larger than that, all.
    meter = NormMeter(1)
    meter.add(torch.ones(2, 1, 40000, 2))
    assert meter._histograms[0].counts.sum() == 40000
    # None of nothing.
    assert not NormMeter(1).advise("d", (5,))


def test_the_example_trains(shards, tmp_path, capsys, monkeypatch):
    """Briefly, on small shards; docs/massive-activations.md says what the weights of a model showed in minutes."""
    folder = Path(__file__).parent.parent / "examples"
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), "--shards", str(shards), "--epochs=1", "--dtype=bfloat16"])
    example = runpy.run_path(str(folder / "massive_activations.py"))
    monkeypatch.setitem(example["main"].__globals__, "LAYER", -2)
    example["main"]()
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("float32 to bfloat16: relative error 0.0014")
    assert "keep.npy: drops 80 of 2,560 tokens, 3.125%" in out[1]
    scales = "False", "True", "'median'"
    wanted = [f"{name} tokens, scale_norm={scale}: " for name in ("all", "masked") for scale in scales]
    assert [line.partition("explained ")[0] for line in out[2:]] == wanted


# Examples and masks


def test_inspect_looks_at_some_examples_only(shards, capsys):
    out = inspect(capsys, shards, "--examples", "5:9")
    assert "chosen       128 of 2,560 content tokens, 5.000%\n" in out
    data = IndexedDataset(IndexedConfig(shards, layer=3, examples=Examples.span(5, 9)))
    norms = [float(torch.linalg.vector_norm(data[i]["act"])) for i in range(128)]
    assert f"layer 3      norm {np.mean(norms):.4g} (from {min(norms):.4g} to {max(norms):.4g})" in out
    assert ", 128 tokens" in out
    n_some = len(IndexedDataset(IndexedConfig(shards, layer=3, examples=Examples.fraction(0.0, 0.5))))
    assert f"chosen       {n_some:,} of 2,560 " in inspect(capsys, shards, "--examples", "0.0:0.5")


def test_repack_writes_a_fraction(shards, tmp_path):
    kept = Examples.fraction(0.0, 0.3, seed=4)
    numbers = sorted(sample["example_idx"] for sample in _samples(shards, kept))
    made = repack(shards, tmp_path, examples=kept)
    assert Metadata.load(made).n_examples == len(numbers) != 80
    found, wanted = (IndexedDataset(IndexedConfig(path, layer=3)) for path in (made, shards))
    assert torch.equal(found[0]["act"], wanted[32 * numbers[0]]["act"])
    assert torch.equal(found[len(found) - 1]["act"], wanted[32 * numbers[-1] + 31]["act"])
    # The same ones by their numbers are the same directory.
    assert repack(shards, tmp_path / "again", examples=numbers).name == made.name


def _samples(shards, examples):
    data = IndexedDataset(IndexedConfig(shards, layer=3, examples=examples))
    return [data[i] for i in range(0, len(data), 32)]


def test_repack_and_plan_take_examples_on_the_command_line(shards, tmp_path, capsys):
    assert main(["repack", str(shards), str(tmp_path), "--examples", "0.0:0.5", "--quiet"]) == 0
    n_some = len(_samples(shards, Examples.fraction(0.0, 0.5)))
    assert Metadata.load(capsys.readouterr().out.strip()).n_examples == n_some
    assert main(["plan", str(shards), "--layer", "3", "--batch-size", "64", "--examples", "10:30"]) == 0
    out = capsys.readouterr().out
    cfg = ShuffledConfig(shards, layer=3, batch_size=64, examples=Examples.span(10, 30))
    predicted = predict(Metadata.load(shards), cfg)
    assert f"{predicted.distinct_examples:,.0f} in a batch" in out
    assert predicted.uniform_distinct <= 20
    for command in (["plan", str(shards)], ["inspect", str(shards)]):
        with pytest.raises(SystemExit):
            main([*command, "--examples", "0.5:0.2"])
        message = "expected start:stop, a list as in 3,5,8, or a share as in 0.0:0.9, got '0.5:0.2'"
        assert message in " ".join(capsys.readouterr().err.split())
