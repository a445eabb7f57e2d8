"""`scale_norm`: one number for the data set, the same for every process, and never another one after a resume."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from factory import Spec, write_acts

from saev_torch import (
    FormatError,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    StateError,
    compute_statistics,
)

SPEC = Spec(n_examples=120, content_tokens=9, d_model=16, examples_per_shard=40)


@pytest.fixture
def shards(make_shards):
    rng = np.random.default_rng(0)
    norms = rng.lognormal(2, 0.5, (120, 2, 10, 1))
    made = make_shards(SPEC)
    write_acts(made, (rng.standard_normal((120, 2, 10, 16)) * norms).astype(np.float32))
    return made


def config(shards, **fields) -> ShuffledConfig:
    return ShuffledConfig(**{"shards": shards, "layer": 7, "batch_size": 64, "buffer_size": 8, **fields})


def norms_of(batches) -> torch.Tensor:
    return torch.cat([torch.linalg.vector_norm(b["act"].double(), dim=-1).flatten() for b in batches])


@pytest.mark.parametrize("layer", [7, "all", (3, 7)])
@pytest.mark.parametrize("tokens", ["content", "all", "special"])
def test_the_mean_norm_is_sqrt_d_model(shards, layer, tokens: str) -> None:
    ds = ShuffledActivations(config(shards, layer=layer, tokens=tokens, scale_norm=True))
    assert float(norms_of(ds).mean()) == pytest.approx(4.0, rel=1e-6)
    assert ds.scale != 1
    assert ShuffledActivations(config(shards)).scale is None


def test_ignored_labels_are_not_in_the_mean(shards) -> None:
    batches = list(ShuffledActivations(config(shards, scale_norm=True, ignore_labels=[0, 1, 2])))
    assert float(norms_of(batches).mean()) == pytest.approx(4.0, rel=1e-6)


def test_only_the_activations_change(shards) -> None:
    ds = ShuffledActivations(config(shards, scale_norm=True))
    for scaled, raw in zip(ds, ShuffledActivations(config(shards)), strict=True):
        torch.testing.assert_close(scaled["act"], raw["act"] * np.float32(ds.scale), rtol=0, atol=0)
        for key in raw.keys() - {"act"}:
            assert torch.equal(scaled[key], raw[key])


def test_a_sampled_scale_is_within_its_standard_error(shards) -> None:
    cfg = config(shards, scale_norm=True, scale_samples=400)
    sampled = compute_statistics(cfg, n_sampled=400)
    assert not sampled.is_full
    mean = float(norms_of(ShuffledActivations(cfg)).mean())
    assert mean != pytest.approx(4.0, rel=1e-6)
    assert abs(mean - 4.0) < 3 * 4.0 * sampled.mean_norm_error / sampled.total.mean_norm


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_scale_by_the_same_number(shards, start_method: str) -> None:
    cfg = config(shards, scale_norm=True)
    expected = list(ShuffledActivations(cfg))
    loader = ShuffledDataLoader(cfg, num_workers=2, multiprocessing_context=start_method)
    for found, wanted in zip(loader, expected, strict=True):
        assert torch.equal(found["act"], wanted["act"])
    loader.shutdown()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_never_rescales(shards, num_workers: int) -> None:
    cfg = config(shards, scale_norm=True)
    loader = ShuffledDataLoader(cfg, num_workers=num_workers, persistent_workers=num_workers > 0)
    batches = list(loader)
    for _, _ in zip(range(5), loader, strict=False):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    loader.shutdown()
    scale = loader.scale
    assert state["scale"] == scale

    # The files are not what they were; a run that goes on keeps its number, a new one would have another.
    rng = np.random.default_rng(5)
    write_acts(shards, (rng.standard_normal((120, 2, 10, 16)) * 3).astype(np.float32))
    assert ShuffledActivations(cfg).scale != scale
    again = ShuffledDataLoader(cfg, num_workers=num_workers, persistent_workers=num_workers > 0)
    # Persistent workers have begun with the number of the constructor.
    next(iter(again))
    again.load_state_dict(state)
    raw = ShuffledActivations(config(shards))
    raw.load_state_dict({**state, "scale": None})
    found = list(again)
    assert again.scale == scale
    assert again.state_dict()["scale"] == scale
    assert len(found) == len(batches) - 5
    for a, b in zip(found, raw, strict=True):
        assert torch.equal(a["act"], b["act"] * np.float32(scale))
    again.shutdown()


@pytest.mark.parametrize(
    ("scale_norm", "scale", "message"),
    [
        (True, None, "expected a number with scale_norm=True"),
        (False, 2.0, "expected none with scale_norm=False"),
        (True, -1.0, "number above 0"),
        (True, float("nan"), "number above 0"),
        (True, "2", "number above 0"),
    ],
)
def test_states_that_do_not_fit(shards, scale_norm: bool, scale, message: str) -> None:
    ds = ShuffledActivations(config(shards, scale_norm=scale_norm))
    with pytest.raises(StateError, match=message):
        ds.load_state_dict({**ds.state_dict(), "scale": scale})


def test_a_state_without_a_scale_is_one_of_raw_activations(shards) -> None:
    ds = ShuffledActivations(config(shards))
    state = ds.state_dict()
    del state["scale"]
    ds.load_state_dict(state)


def test_zeros_cannot_be_scaled(make_shards) -> None:
    zeros = make_shards(SPEC)
    write_acts(zeros, np.zeros((120, 2, 10, 16), np.float32))
    with pytest.raises(FormatError, match="cannot be scaled"):
        ShuffledActivations(config(zeros, scale_norm=True))


def test_processes_that_start_together_measure_once(shards) -> None:
    code = f"""
import saev_torch.stats.statistics as s
from saev_torch import ShuffledActivations, ShuffledConfig
run = s.Pass.run
def counted(*args):
    print("measured"); return run(*args)
s.Pass.run = counted
print(ShuffledActivations(ShuffledConfig(shards={str(shards)!r}, layer=7, scale_norm=True), rank=0, world_size=2).scale)
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outs = [p.communicate(timeout=120)[0].split() for p in ranks]
    assert sum(out.count("measured") for out in outs) == 1
    assert len({out[-1] for out in outs}) == 1
