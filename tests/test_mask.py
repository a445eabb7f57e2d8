"""Making masks: every rule against numpy over the whole tensor, and what training on one then sees."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
from factory import Spec

from saev_torch import (
    ConfigError,
    FormatError,
    IndexedConfig,
    IndexedDataset,
    Metadata,
    ShardWriter,
    ShuffledActivations,
    ShuffledConfig,
    WriteError,
    make_mask,
)
from saev_torch.__main__ import main

N, WIDTH, D = 90, 11, 6


@pytest.fixture(scope="module")
def acts():
    """Some tokens have norms far above the others, as those of language models do; one is no number."""
    values = np.random.default_rng(0).standard_normal((N, 2, WIDTH + 1, D)).astype(np.float32)
    values[::7, :, 1] *= 300
    values[5, 1, 4] *= 1000
    return values


@pytest.fixture(scope="module")
def shards(acts, tmp_path_factory):
    md = Metadata(
        family="clip", ckpt="x", layers=(3, 7), content_tokens_per_example=WIDTH, cls_token=True, d_model=D,
        n_examples=N, max_tokens_per_shard=500, data="eA==", dataset="/data",
    )  # fmt: skip
    labels = (np.arange(N * WIDTH) % 5).astype(np.uint8).reshape(N, WIDTH)
    with ShardWriter(tmp_path_factory.mktemp("root"), md) as writer:
        writer.write_batch(acts, 0, labels)
    return next(tmp_path_factory.getbasetemp().glob(f"root*/{md.hash}"))


def norms_of(acts, layer):
    return np.linalg.norm(acts[:, layer, 1:].astype(np.float64), axis=-1)


def test_every_rule(acts, shards, tmp_path):
    path = tmp_path / "keep.npy"
    norms = norms_of(acts, 1)
    median = np.median(norms)
    labels = np.arange(N * WIDTH).reshape(N, WIDTH) % 5
    place = np.broadcast_to(np.arange(WIDTH), (N, WIDTH))
    rules = [
        ({"positions": [0, -1]}, np.isin(place, [0, WIDTH - 1])),
        ({"norm_above": "10x-median"}, norms > 10 * median),
        ({"norm_above": 50.0}, norms > 50),
        ({"norm_below": 1.5}, norms < 1.5),
        ({"norm_below": "0.5x-median"}, norms < 0.5 * median),
        ({"labels": [1, 3]}, np.isin(labels, [1, 3])),
    ]
    everything = {}
    for fields, dropped in rules:
        report = make_mask(shards, path, layer=7, **fields)
        assert np.array_equal(np.load(path), ~dropped), fields
        assert report.n_dropped == dropped.sum()
        assert report.n_tokens == N * WIDTH
        assert list(report.by_rule.values()) == [dropped.sum()]
        assert report.share == dropped.mean()
        everything |= fields
    report = make_mask(shards, path, layer=7, positions=[0], norm_above="10x-median", labels=[2])
    dropped = (place == 0) | (norms > 10 * median) | (labels == 2)
    assert np.array_equal(np.load(path), ~dropped)
    assert report.n_dropped == dropped.sum() < sum(report.by_rule.values())
    assert report.median_norm == pytest.approx(median, rel=2e-3)


def test_training_on_a_mask(acts, shards, tmp_path):
    """The massive tokens are gone, and with them what they did to the scale."""
    report = make_mask(shards, tmp_path / "keep.npy", layer=7, norm_above="10x-median")
    cfg = ShuffledConfig(shards, layer=7, batch_size=64, mask=report.path, scale_norm=True)
    norms = norms_of(acts, 1)
    kept = norms[norms <= 10 * np.median(norms)]
    data_set = ShuffledActivations(cfg)
    assert data_set.n_samples == len(kept) == report.n_tokens - report.n_dropped
    assert data_set.scale == pytest.approx(D**0.5 / kept.mean(), rel=1e-6)
    got = torch.cat([batch["act"] for batch in data_set])
    assert np.sort(got.norm(dim=1).numpy()) == pytest.approx(np.sort(kept * data_set.scale), rel=1e-5)
    assert norms.mean() > 3 * kept.mean()


def test_norms_that_are_no_numbers_are_dropped(make_shards, tmp_path):
    spec = Spec(n_examples=4, content_tokens=3, layers=(0,), d_model=2, cls=False)
    shards = make_shards(spec)
    whole = np.fromfile(shards / "acts000000.bin", dtype="<f4")
    whole[0] = np.nan
    os.chmod(shards / "acts000000.bin", 0o644)
    whole.tofile(shards / "acts000000.bin")
    for rule in ({"norm_above": 1e30}, {"norm_below": 0.0}):
        assert make_mask(shards, tmp_path / "keep.npy", **rule).n_dropped == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected a rule"),
        ({"positions": [11]}, "positions: expected integers from -11 to 10"),
        ({"positions": [0.5]}, "positions: expected integers"),
        ({"norm_above": 3}, r"layer: expected one of \[3, 7\], whose norms count, got none"),
        (
            {"norm_above": "10x", "layer": 7},
            "norm_above: expected a number from 0 on, or one as .* got '10x'",
        ),
        ({"norm_below": -1, "layer": 7}, "norm_below: expected a number"),
        ({"norm_below": float("nan"), "layer": 7}, "norm_below: expected a number"),
        ({"labels": [256]}, "labels: expected integers from 0 to 255"),
        ({"positions": list(range(11))}, "expected that tokens are left"),
        ({"layer": 9, "norm_above": 1.0}, "layer: expected one of the recorded layers"),
    ],
)
def test_what_is_refused_leaves_no_file(shards, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_mask(shards, tmp_path / "keep.npy", **fields)
    assert [path for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_labels_that_are_not_there_and_a_folder_that_is_not(make_shards, tmp_path):
    shards = make_shards(Spec(labels=False))
    with pytest.raises(ConfigError, match="labels: expected shards with labels"):
        make_mask(shards, tmp_path / "keep.npy", labels=[1])
    with pytest.raises(WriteError, match="could not be written"):
        make_mask(shards, tmp_path / "no" / "keep.npy", positions=[0])


def test_the_command(acts, shards, tmp_path, capsys):
    out = tmp_path / "keep.npy"
    arguments = ["--norm-above", "10x-median", "--positions", "0", "--layer", "7", "-o", str(out)]
    assert main(["mask", str(shards), *arguments]) == 0
    norms = norms_of(acts, 1)
    dropped = (norms > 10 * np.median(norms)) | (np.arange(WIDTH) == 0)
    assert np.array_equal(np.load(out), ~dropped)
    assert f"drops {dropped.sum()} of {N * WIDTH} tokens, {dropped.mean():.3%}" in capsys.readouterr().out
    assert main(["mask", str(shards), "--norm-above", "many", "--layer", "7", "-o", str(out)]) == 2
    assert "norm_above: expected a number" in capsys.readouterr().err


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ds: pickle.loads(pickle.dumps(ds))])
def test_random_access_with_a_mask_is_copied_and_pickled(shards, tmp_path, copied):
    make_mask(shards, tmp_path / "keep.npy", layer=7, labels=[1])
    ds = IndexedDataset(IndexedConfig(shards, layer=7, mask=tmp_path / "keep.npy"))
    found = copied(ds).__getitems__(range(len(ds)))
    assert torch.equal(found.batch["act"], ds.__getitems__(range(len(ds))).batch["act"])


def test_a_mask_that_is_written_anew_is_named(shards, tmp_path):
    """A worker that is spawned counts again, and must not blame the labels."""
    path = tmp_path / "keep.npy"
    make_mask(shards, path, layer=7, labels=[1])
    ds = ShuffledActivations(ShuffledConfig(shards, layer=7, mask=path, ignore_labels=[2], batch_size=64))
    make_mask(shards, path, layer=7, labels=[3])
    with pytest.raises(FormatError, match=r"keep\.npy: expected the mask that samples were selected by"):
        list(pickle.loads(pickle.dumps(ds)))
