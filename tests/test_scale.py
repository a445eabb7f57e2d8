"""`scale=`, the number of another run, and `scale_norm="median"`, which a few huge norms do not move."""

import dataclasses
import json
import logging
import sys
from typing import Any, get_type_hints

import hydra
import numpy as np
import pytest
import torch
import tyro
from factory import Spec, make_shards, oracle, write_acts
from jsonargparse import auto_cli
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    Examples,
    FormatError,
    OrderedActivations,
    OrderedConfig,
    OrderedDataLoader,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    StateError,
    compute_statistics,
    make_ordered_config,
)

SPEC = Spec(n_examples=120, content_tokens=9, d_model=16, examples_per_shard=40)


@pytest.fixture(scope="module")
def acts():
    """Norms of a language model: the first token of each example is far above all others."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((120, 2, 10, 16)).astype(np.float32)
    values *= rng.lognormal(2, 0.5, (120, 2, 10, 1)).astype(np.float32)
    values[:, :, 1] *= 200
    return values


@pytest.fixture(scope="module")
def shards(acts, tmp_path_factory):
    made = make_shards(tmp_path_factory.mktemp("root"), SPEC)
    write_acts(made, acts)
    return made


def config(shards, **fields):
    return ShuffledConfig(**{"shards": shards, "layer": 7, "batch_size": 64, "buffer_size": 8, **fields})


# The median


@pytest.mark.parametrize(
    ("fields", "select"),
    [
        ({}, lambda acts: acts[:, 1, 1:]),
        ({"tokens": "all", "layer": "all"}, lambda acts: acts),
        ({"layer": (7, 3)}, lambda acts: acts[:, :, 1:]),
        ({"tokens": "special"}, lambda acts: acts[:, 1, 0]),
        ({"examples": Examples.span(7, 50)}, lambda acts: acts[7:50, 1, 1:]),
    ],
)
def test_the_median_norm_is_sqrt_d_model(shards, acts, fields, select):
    ds = ShuffledActivations(config(shards, scale_norm="median", **fields))
    median = np.median(np.linalg.norm(select(acts).astype(np.float64), axis=-1))
    assert ds.scale * median == pytest.approx(4.0, rel=1e-3)
    assert np.float32(ds.scale) == ds.scale


def test_a_few_huge_norms_do_not_move_it(shards, acts):
    cfg, norms = config(shards, scale_norm="median"), np.linalg.norm(acts[:, 1, 2:], axis=-1)
    assert ShuffledActivations(cfg).scale * np.median(norms) == pytest.approx(4.0, rel=0.15)
    # Of the mean they are nearly all.
    assert ShuffledActivations(dataclasses.replace(cfg, scale_norm=True)).scale * norms.mean() < 1


def test_it_is_that_of_the_statistics(shards):
    cfg = config(shards, scale_norm="median")
    found = compute_statistics(cfg)
    assert found.median_scale == ShuffledActivations(cfg).scale != found.scale
    assert found.median_scale == float(np.float32(4.0 / found.total.norm_quantiles[0.5]))


def test_it_is_measured_once_and_by_all_alike(shards, monkeypatch):
    from saev_torch.stats import statistics

    runs = []
    run = statistics.Pass.run
    monkeypatch.setattr(statistics.Pass, "run", lambda self, n: runs.append(n) or run(self, n))
    cfg = config(shards, scale_norm="median")
    scale = ShuffledActivations(cfg).scale
    # The mean needs no second pass, and another rank neither.
    ShuffledActivations(dataclasses.replace(cfg, scale_norm=True))
    assert ShuffledActivations(cfg, rank=1, world_size=2).scale == scale
    assert len(runs) == 1
    alike = {compute_statistics(cfg, n_threads=n, cache=False).median_scale for n in (1, 2, 5)}
    assert alike == {scale}


def test_workers_and_ranks_multiply_by_it(shards):
    cfg = config(shards, scale_norm="median")
    raw = list(ShuffledActivations(config(shards)))
    loader = ShuffledDataLoader(cfg, num_workers=2)
    for found, wanted in zip(loader, raw, strict=True):
        assert torch.equal(found["act"], wanted["act"] * np.float32(loader.scale))
    loader.shutdown()
    for rank in (0, 1):
        for found, wanted in zip(ShuffledActivations(cfg, rank=rank, world_size=2), raw[rank::2], strict=False):
            assert torch.equal(found["act"], wanted["act"] * np.float32(loader.scale))


def test_what_has_no_median(tmp_path):
    made = make_shards(tmp_path / "zeros", SPEC)
    values = oracle(SPEC)
    values[:, 1, :6] = 0
    write_acts(made, values)
    assert ShuffledActivations(config(made, scale_norm=True)).scale
    with pytest.raises(FormatError, match=r"scale_norm: expected activations with a median norm above 0, got 0\.0"):
        ShuffledActivations(config(made, scale_norm="median"))


# The number of another run


def make_data(cfg):
    return (OrderedActivations if isinstance(cfg, OrderedConfig) else ShuffledActivations)(cfg)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [OrderedConfig, ShuffledConfig])
def test_the_number_is_what_activations_are_multiplied_with(shards, kind, num_workers):
    fields = {"shards": shards, "layer": 7, "batch_size": 64, "buffer_size": 8}
    # Not a float32: what is told is what is multiplied with.
    ds = make_data(kind(scale=0.1, **fields))
    assert ds.scale == float(np.float32(0.1))
    found = DataLoader(ds, num_workers=num_workers)
    for scaled, raw in zip(found, make_data(kind(**fields)), strict=True):
        assert torch.equal(scaled["act"], raw["act"] * np.float32(0.1))


def test_nothing_is_measured_for_it(shards, monkeypatch):
    from saev_torch.stats import statistics

    monkeypatch.setattr(statistics, "Pass", None)
    assert ShuffledActivations(config(shards, scale=0.5)).scale == 0.5
    assert OrderedActivations(OrderedConfig(shards, layer=7, scale=2)).scale == 2.0


@pytest.mark.parametrize("scale_norm", [True, "median"])
def test_one_who_measures_takes_no_number(shards, scale_norm):
    with pytest.raises(ConfigError, match=rf"scale: expected None with scale_norm={scale_norm!r}.*got 0\.5; set"):
        config(shards, scale=0.5, scale_norm=scale_norm)


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), float("nan"), 1e-39, 3.5e38, True, "0.5", [1.0]])
def test_what_is_no_scale(shards, bad):
    for kind in (OrderedConfig, ShuffledConfig):
        with pytest.raises(ConfigError, match=f"{kind.__name__}.scale: expected a number above 0.0 that float32 holds"):
            kind(shards, scale=bad)


@pytest.mark.parametrize("bad", ["mean", "Median", 1, None, 0.5])
def test_what_is_no_scale_norm(shards, bad):
    with pytest.raises(ConfigError, match=r"ShuffledConfig\.scale_norm: expected True, False or 'median', got"):
        config(shards, scale_norm=bad)


def test_held_out_data_are_scaled_as_training_was(shards, caplog):
    cfg = config(shards, scale_norm="median", examples=Examples.fraction(0.0, 0.8))
    train, held_out = ShuffledActivations(cfg), Examples.fraction(0.8, 1.0)
    ordered = make_ordered_config(cfg, scale=train.scale, examples=held_out)
    raw = OrderedActivations(dataclasses.replace(ordered, scale=None))
    for found, wanted in zip(OrderedActivations(ordered), raw, strict=True):
        assert torch.equal(found["act"], wanted["act"] * np.float32(train.scale))
    # A number in the config goes with it.
    assert make_ordered_config(config(shards, scale=0.5)).scale == 0.5
    assert make_ordered_config(config(shards, scale=0.5), scale=None).scale is None
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert make_ordered_config(cfg).scale is None
    assert "expected scale= for a config with scale_norm='median'" in caplog.text
    assert "make_ordered_config(cfg, scale=dataset.scale)" in caplog.text


# States


def scaled(shards, way):
    fields = {"none": {}, "mean": {"scale_norm": True}, "median": {"scale_norm": "median"}, "given": {"scale": 0.5}}
    return ShuffledActivations(config(shards, **fields[way]))


NAMES = {"none": "scale_norm=False", "mean": "scale_norm=True", "median": "scale_norm='median'", "given": "scale="}


@pytest.mark.parametrize("way", list(NAMES))
def test_states_of_other_scales_are_refused(shards, way):
    ds = scaled(shards, way)
    next(iter(ds))
    state = json.loads(json.dumps(ds.state_dict()))
    for other in NAMES:
        target = scaled(shards, other)
        if other == way:
            target.load_state_dict(state)
            assert target.state_dict() == state
            assert target.scale == ds.scale
        else:
            with pytest.raises(StateError, match=f"scale: expected .* with {NAMES[other]}, got .* with {NAMES[way]};"):
                target.load_state_dict(state)


def test_a_run_goes_on_with_the_number_that_it_had(shards):
    """Whoever writes the number down needs no statistics when the run resumes."""
    batches = list(ds := ShuffledActivations(config(shards, scale_norm="median")))
    it = iter(ds := ShuffledActivations(ds.cfg))
    for _ in range(3):
        next(it)
    state = ds.state_dict()
    it.close()
    again = ShuffledActivations(config(shards, scale=ds.scale))
    again.load_state_dict(state)
    for found, wanted in zip(again, batches[3:], strict=True):
        assert torch.equal(found["act"], wanted["act"])
    with pytest.raises(StateError, match=r"scale: expected 0\.5 with scale=, got .* with scale_norm='median'"):
        ShuffledActivations(config(shards, scale=0.5)).load_state_dict(state)
    with pytest.raises(StateError, match=r"expected a number with scale_norm='median', got .* with \[3\]"):
        ShuffledActivations(config(shards, scale_norm="median")).load_state_dict({**state, "scaled_by": [3]})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ordered_loaders_resume_with_it(shards, num_workers):
    cfg = OrderedConfig(shards, layer=7, batch_size=64, scale=0.25)
    loader = OrderedDataLoader(cfg, num_workers=num_workers)
    batches = list(loader)
    for _, _ in zip(range(4), loader, strict=False):
        pass
    state = loader.state_dict()
    loader.shutdown()
    assert state["scale"] == loader.scale == 0.25
    again = OrderedDataLoader(cfg, num_workers=num_workers)
    again.load_state_dict(state)
    found = list(again)
    again.shutdown()
    assert len(found) == len(batches) - 4
    assert all(torch.equal(a["act"], b["act"]) for a, b in zip(found, batches[4:], strict=True))
    with pytest.raises(StateError, match="scale: expected none with scale_norm=False"):
        OrderedActivations(dataclasses.replace(cfg, scale=None)).load_state_dict(state)


# Configs travel


@pytest.mark.parametrize(
    "cfg",
    [
        ShuffledConfig("/x", layer=7, scale_norm="median"),
        ShuffledConfig("/x", layer=7, scale=0.37),
        OrderedConfig("/x", layer=7, scale=0.37),
    ],
)
def test_configs_travel(cfg):
    kind, fields = type(cfg), cfg.to_dict()
    assert kind.from_dict(json.loads(json.dumps(fields))) == cfg
    assert kind.from_dict(fields).to_dict() == fields
    merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(OmegaConf.to_yaml(fields)))
    assert OmegaConf.to_object(merged) == cfg
    assert OmegaConf.to_object(OmegaConf.structured(cfg)) == cfg
    made = {"_target_": f"saev_torch.{kind.__name__}", **fields}
    assert hydra.utils.instantiate(OmegaConf.create(made)) == cfg

    # As Lightning's command line does it.
    def take(cfg):
        return cfg

    take.__annotations__["cfg"] = kind
    args = [f"--cfg.{name}={fields[name]}" for name in ("shards", "layer", "scale", "scale_norm") if fields.get(name)]
    assert auto_cli(take, args=args, as_positional=False) == cfg


def test_values_of_numpy_are_scales():
    assert type(ShuffledConfig(scale=np.float32(0.5)).scale) is float
    assert OrderedConfig(scale=torch.tensor(0.5)).scale == 0.5
    assert type(ShuffledConfig(scale_norm=np.str_("median")).scale_norm) is str


@pytest.mark.parametrize(
    ("args", "scale_norm"),
    [
        ([], False),
        (["--scale-norm"], True),
        (["--scale-norm", "--seed", "3"], True),
        (["--scale-norm", "True"], True),
        (["--scale-norm", "False"], False),
        (["--scale-norm", "median", "--seed", "3"], "median"),
    ],
)
def test_tyro_knows_a_flag_with_a_word(args, scale_norm):
    found = tyro.cli(ShuffledConfig, args=args)
    assert found.scale_norm is scale_norm or found.scale_norm == scale_norm == "median"
    default = ShuffledConfig(layer=3, scale_norm="median")
    assert tyro.cli(ShuffledConfig, args=args, default=default).scale_norm == (scale_norm if args else "median")


def test_tyro_refuses_other_words(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(ShuffledConfig, args=["--scale-norm", "mean"])
    assert "expected nothing, True, False or median" in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert tyro.cli(OrderedConfig, args=["--scale", "0.5"]).scale == 0.5


def test_who_has_no_tyro_sees_simple_types(monkeypatch):
    monkeypatch.delitem(sys.modules, "tyro")
    hints = get_type_hints(ShuffledConfig, include_extras=True)
    assert (hints["scale_norm"], hints["scale"]) == (Any, float | None)
