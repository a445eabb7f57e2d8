"""Configs and metadata go through JSON, checkpoints, Hydra, OmegaConf and command lines, and come back the same."""

import array
import dataclasses
import enum
import inspect
import json
import math
import pickle
import subprocess
import sys
import typing
from collections import UserList
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
import tyro
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, TensorDataset

from saev_torch import (
    ConfigError,
    IndexedConfig,
    IndexedDataset,
    Metadata,
    OrderedConfig,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    record,
)
from saev_torch.format.plain import as_plain

CONFIGS = [IndexedConfig, OrderedConfig, ShuffledConfig]
# Something else than the default in every field that has a rule of its own.
OTHER = {
    "shards": "/data/x",
    "tokens": "all",
    "layer": [6, 11],
    "batch_size": 7,
    "batch_timeout_s": 2.5,
    "drop_last": True,
    "buffer_size": 3,
    "debug": True,
    "log_every_s": 1.5,
    "scale_norm": True,
    "ignore_labels": [0, 255],
    "n_threads": 2,
    "min_buffer_fill": 0.5,
    "seed": 2**70,
    "use_tmpdir": True,
    "n_lanes": 3,
    "block_size": 5,
    "scale_samples": 9,
}


def other(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in OTHER.items() if name in names})


def is_json(value):
    if isinstance(value, dict):
        return all(type(key) is str and is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_json, value))
    return value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value))


@pytest.mark.parametrize("kind", CONFIGS)
def test_through_json_and_back(kind):
    for cfg in (kind(), other(kind), kind(layer="all"), kind(layer=-2), kind(layer=(3,))):
        fields = cfg.to_dict()
        assert list(fields) == [field.name for field in dataclasses.fields(kind)]
        assert is_json(fields), fields
        back = kind.from_dict(json.loads(json.dumps(fields)))
        assert back == cfg
        assert type(back) is kind
        assert repr(back) == repr(cfg)
        assert hash(back) == hash(cfg)


def test_to_dict_is_a_copy():
    cfg = other(ShuffledConfig)
    cfg.to_dict()["ignore_labels"].append(3)
    assert cfg.ignore_labels == [0, 255]


def test_what_is_left_out_has_its_default():
    assert ShuffledConfig.from_dict({"seed": 3}) == ShuffledConfig(seed=3)
    assert IndexedConfig.from_dict({}) == IndexedConfig()


def test_infinity_is_no_json():
    cfg = OrderedConfig(batch_timeout_s=math.inf, shards="inf")
    assert (cfg.to_dict()["batch_timeout_s"], cfg.to_dict()["shards"]) == ("inf", "inf")
    back = OrderedConfig.from_dict(cfg.to_dict())
    assert (back.batch_timeout_s, back.shards) == (math.inf, Path("inf"))
    with pytest.raises(ConfigError, match="batch_timeout_s"):
        OrderedConfig(batch_timeout_s="inf")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ShuffledConfig, {"batchsize": 3}, r"got unknown 'batchsize' \(did you mean 'batch_size'\?\); rename"),
        (
            ShuffledConfig,
            {"batch_size": 3, "colour": 1, "sed": 2},
            r"unknown 'colour', 'sed' \(did you mean 'seed'\?\);",
        ),
        (OrderedConfig, {"seed": 3}, "fields of OrderedConfig, got unknown 'seed'"),
        (IndexedConfig, {3: 4, None: 5}, "got unknown 3, None; rename"),
        (IndexedConfig, [("layer", 3)], "expected a dict of fields, got list"),
        (IndexedConfig, None, "expected a dict of fields, got NoneType"),
        (ShuffledConfig, {"batch_size": "3"}, "ShuffledConfig.batch_size: expected an integer"),
        (ShuffledConfig, {"layer": {"a": 1}}, "ShuffledConfig.layer: expected an integer, 'all', or a sequence"),
    ],
)
def test_what_from_dict_refuses(kind, fields, message):
    with pytest.raises(ConfigError, match=message):
        kind.from_dict(fields)


@dataclasses.dataclass(frozen=True)
class Nested:
    """Stands for a value of a field that knows how to become a dict."""

    low: int

    def to_dict(self):
        return {"low": self.low}


@dataclasses.dataclass(frozen=True, eq=False)
class Wider(IndexedConfig):
    """A user's own config with more fields."""

    nested: Nested = Nested(3)
    mode: typing.Literal["a", "b"] = "a"
    path: Path | None = None


def test_fields_of_a_subclass_travel_too():
    cfg = Wider(layer=(1, 2), path=Path("/x"))
    assert cfg.to_dict()["nested"] == {"low": 3}
    assert (cfg.to_dict()["mode"], cfg.to_dict()["path"]) == ("a", "/x")
    assert cfg == Wider(layer=[1, 2], path=Path("/x"))
    assert hash(cfg) == hash(Wider(layer=[1, 2], path=Path("/x")))
    assert cfg != Wider(layer=[1, 2], mode="b", path=Path("/x"))
    with pytest.raises(ConfigError, match=r"'pat' \(did you mean 'path'\?\)"):
        Wider.from_dict({"pat": 1})


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_are_hashable(kind):
    cfg = other(kind)
    assert {cfg: 1}[other(kind)] == 1
    assert len({cfg, kind(), kind(layer=3)}) == 3
    assert IndexedConfig() != dataclasses.replace(IndexedConfig(), debug=True)
    # Another class is another config, whatever its fields are.
    assert IndexedConfig(layer=3) != OrderedConfig(layer=3)
    assert cfg != cfg.to_dict()


class Layer(enum.IntEnum):
    LAST = 11


class Tokens(enum.StrEnum):
    ALL = "all"


NUMPY_FIELDS = {
    "batch_size": np.int64(5),
    "buffer_size": np.uint8(6),
    "n_threads": np.int32(2),
    "n_lanes": torch.tensor(4),
    "seed": np.uint64(2**63),
    "block_size": np.array(7),
    "scale_samples": np.int16(8),
    "min_buffer_fill": np.float32(0.5),
    "batch_timeout_s": np.float64(2.5),
    "log_every_s": np.int64(3),
    "drop_last": np.True_,
    "scale_norm": np.False_,
    "debug": torch.tensor(True),
    "tokens": np.str_("content"),
    "layer": np.int64(11),
    "ignore_labels": np.array([0, 3], dtype=np.uint8),
}


def test_values_of_numpy_become_plain():
    cfg = ShuffledConfig(**NUMPY_FIELDS)
    plain = dict(zip(NUMPY_FIELDS, (5, 6, 2, 4, 2**63, 7, 8, 0.5, 2.5, 3, True, False, True, "content", 11, [0, 3])))  # noqa: B905
    for name, value in plain.items():
        assert getattr(cfg, name) == value, name
        assert type(getattr(cfg, name)) is type(value), name
    assert all(type(label) is int for label in cfg.ignore_labels)
    assert cfg == ShuffledConfig(**plain)
    assert is_json(cfg.to_dict())
    assert type(IndexedConfig(layer=Layer.LAST).layer) is int
    assert type(IndexedConfig(tokens=Tokens.ALL).tokens) is str


@pytest.mark.parametrize(
    "several",
    [
        [6, 11],
        (6, 11),
        np.array([6, 11]),
        torch.tensor([6, 11]),
        [np.int64(6), torch.tensor(11)],
        range(6, 12, 5),
        UserList([6, 11]),
        array.array("i", [6, 11]),
        OmegaConf.create([6, 11]),
        OmegaConf.create({"x": 11, "layers": [6, "${x}"]}).layers,
    ],
    ids=lambda several: type(several).__name__,
)
def test_any_sequence_of_integers(several):
    for kind in CONFIGS:
        layer = kind(layer=several).layer
        assert layer == (6, 11)
        assert [type(one) for one in layer] == [int, int]
    labels = ShuffledConfig(ignore_labels=several).ignore_labels
    assert labels == [6, 11]
    assert [type(labels), *map(type, labels)] == [list, int, int]


@pytest.mark.parametrize(
    "bad",
    [
        np.array([6.0, 11.0]),
        np.array([[6, 11]]),
        np.array([True, False]),
        OmegaConf.create(["6", 11]),
        OmegaConf.create({"a": 6}),
        np.array([6, 6]),
        np.float64(6),
        {6, 11},
        iter([6, 11]),
        np.array([]),
    ],
)
def test_what_is_no_sequence_of_integers(bad):
    with pytest.raises(
        ConfigError, match=r"IndexedConfig\.layer: expected an integer, 'all', or a sequence of distinct"
    ):
        IndexedConfig(layer=bad)


def test_plain_leaves_other_things_alone():
    path, text = Path("/x"), b"\x05"
    assert as_plain(path) is path
    assert as_plain(text) is text
    assert as_plain(None) is None
    assert as_plain(DictConfig({"a": 1})) == {"a": 1}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_checkpoint_that_holds_a_config_is_safe_to_load(tmp_path, kind):
    given = {name: value for name, value in NUMPY_FIELDS.items() if name in inspect.signature(kind).parameters}
    cfg = kind(**given)
    torch.save({"weights": torch.zeros(2), "cfg": cfg.to_dict()}, tmp_path / "x.pt")
    assert kind.from_dict(torch.load(tmp_path / "x.pt", weights_only=True)["cfg"]) == cfg


def test_a_checkpoint_that_holds_a_state_is_safe_to_load(tmp_path, make_shards):
    fields = {"batch_size": np.int64(4), "seed": np.int32(3), "layer": np.array([3, 7]), "scale_norm": np.True_}
    cfg = ShuffledConfig(make_shards(), **fields)
    loader = ShuffledDataLoader(cfg, rank=np.int64(0), world_size=np.int64(1))
    loader.set_epoch(np.int64(2))
    expected = next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "x.pt")
    loader.shutdown()
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert is_json(state)
    assert (state["epoch"], state["batch"]) == (2, 1)
    other = ShuffledDataLoader(cfg)
    other.load_state_dict(state)
    assert not torch.equal(next(iter(other))["act"], expected["act"])
    other.shutdown()


@pytest.mark.parametrize("kind", CONFIGS)
def test_omegaconf(kind):
    cfg = OmegaConf.structured(kind)
    assert OmegaConf.to_object(cfg) == kind()
    fields = other(kind).to_dict()
    merged = OmegaConf.merge(cfg, OmegaConf.create(json.loads(json.dumps(fields))))
    assert OmegaConf.to_object(merged) == other(kind)
    assert kind(**merged) == kind.from_dict(merged) == other(kind)
    assert kind.from_dict(OmegaConf.create(OmegaConf.to_yaml(merged))) == other(kind)
    dots = ["layer=all", "shards=/x", "tokens=special"]
    assert OmegaConf.to_object(OmegaConf.merge(cfg, OmegaConf.from_dotlist(dots))) == kind("/x", "special", "all")
    assert OmegaConf.structured(other(kind)) == merged
    # It checks what it is given, as for any other dataclass.
    with pytest.raises(Exception, match="Key 'colour' not in"):
        OmegaConf.merge(cfg, {"colour": 1})
    with pytest.raises(Exception, match="is not a valid bool"):
        OmegaConf.merge(cfg, {"debug": "x"})


def test_omegaconf_of_a_subclass():
    merged = OmegaConf.merge(OmegaConf.structured(ShuffledOfUser), {"layer": [3, 7], "name": "x"})
    assert OmegaConf.to_object(merged) == ShuffledOfUser(layer=(3, 7), name="x")


@dataclasses.dataclass(frozen=True, eq=False)
class ShuffledOfUser(ShuffledConfig):
    """A user's own config with one more field."""

    name: str = ""


HYDRA_MAIN = """
import hydra, sys
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import OmegaConf
from saev_torch import ShuffledConfig

# A frozen dataclass is read-only to Hydra, so this is what one has to do to override its fields.
node = OmegaConf.structured(ShuffledConfig)
OmegaConf.set_readonly(node, False)
ConfigStore.instance().store(name="loader", node=node)

@hydra.main(version_base=None, config_name="loader")
def main(cfg):
    made = ShuffledConfig(**cfg)
    assert made == OmegaConf.to_object(cfg) == ShuffledConfig.from_dict(cfg)
    print(made.layer, made.tokens, made.ignore_labels, made.block_size, made.seed)

main()
"""


def test_hydra_runs_a_program_with_a_structured_config(tmp_path):
    (tmp_path / "main.py").write_text(HYDRA_MAIN)
    args = [
        "layer=[3,7]",
        "tokens=all",
        "ignore_labels=[1]",
        "block_size=5",
        "hydra.run.dir=out",
        "hydra.job.chdir=False",
    ]
    command = [sys.executable, "main.py", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(3, 7) all [1] 5 17\n"


def test_hydra_instantiates_from_yaml(make_shards):
    text = f"""
    _target_: saev_torch.ShuffledActivations
    cfg:
      _target_: saev_torch.ShuffledConfig
      shards: {make_shards()}
      layer: [7, 3]
      ignore_labels: [0, 1]
      batch_size: 4
    """
    data = hydra.utils.instantiate(OmegaConf.create(text))
    assert isinstance(data, ShuffledActivations)
    assert (data.cfg.layer, data.cfg.ignore_labels) == ((7, 3), [0, 1])
    assert next(iter(data))["act"].shape == (4, 2, 8)


TYRO = [
    (["--layer", "11"], {"layer": 11}),
    (["--layer", "-2"], {"layer": -2}),
    (["--layer", "all"], {"layer": "all"}),
    (["--layer", "6", "11"], {"layer": (6, 11)}),
    (["--shards", "/x", "--tokens", "special", "--debug"], {"shards": "/x", "tokens": "special", "debug": True}),
]


@pytest.mark.parametrize("kind", CONFIGS)
def test_tyro(kind):
    for args, fields in TYRO:
        assert tyro.cli(kind, args=args) == kind(**fields)


def test_tyro_knows_the_choices(capsys):
    args = ["--ignore-labels", "0", "3", "--block-size", "5", "--no-drop-last", "--seed", "3"]
    assert tyro.cli(ShuffledConfig, args=args) == ShuffledConfig(ignore_labels=[0, 3], block_size=5, seed=3)
    with pytest.raises(SystemExit):
        tyro.cli(ShuffledConfig, args=["--tokens", "cls"])
    assert "('special', 'content', 'all')" in " ".join(capsys.readouterr().err.replace("│", "").split())
    # Inside a config of the user's, as trainers have it.
    assert tyro.cli(Training, args=["--data.layer", "3", "7", "--lr", "0.5"]) == Training(
        ShuffledConfig(layer=(3, 7)), 0.5
    )


@dataclasses.dataclass(frozen=True)
class Training:
    """A user's config of a training."""

    data: ShuffledConfig = dataclasses.field(default_factory=ShuffledConfig)
    lr: float = 0.1


def test_metadata_go_through_a_dict(make_shards):
    for fields in ({}, {"protocol": "1.1"}, {"layers": (-2,)}):
        md = Metadata.load(make_shards(**fields))
        as_dict = dataclasses.asdict(md)
        assert list(as_dict) == [field.name for field in dataclasses.fields(md)]
        assert not [key for key in as_dict if key.startswith("_")]
        assert Metadata(**as_dict) == md
        assert hash(Metadata(**as_dict)) == hash(md)
        assert pickle.loads(pickle.dumps(md)).hash == md.hash


def test_metadata_of_numpy():
    fields = {"family": "clip", "ckpt": "x", "data": "", "dataset": "/data"}
    numbers = {"content_tokens_per_example": 6, "d_model": 8, "n_examples": 11, "max_tokens_per_shard": 56}
    md = Metadata(
        layers=np.array([3, 7]),
        cls_token=np.True_,
        **fields,
        **{key: np.int64(value) for key, value in numbers.items()},
    )
    plain = Metadata(layers=(3, 7), cls_token=True, **fields, **numbers)
    assert md == plain
    assert md.to_json() == plain.to_json()
    assert [type(layer) for layer in md.layers] == [int, int]
    assert type(md.d_model) is int
    assert Metadata(layers=OmegaConf.create([3, 7]), cls_token=True, **fields, **numbers) == plain


@pytest.mark.parametrize(
    "layers", [np.array([0, 2]), OmegaConf.create([0, 2]), [np.int64(0), 2]], ids=lambda x: type(x).__name__
)
def test_layers_to_record_are_any_sequence(tmp_path, layers):
    blocks = [torch.nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, batch_first=True) for _ in range(3)]
    loader = DataLoader(TensorDataset(torch.randn(4, 5, 8)), batch_size=2)
    names = {"family": "plain", "ckpt": "x", "dataset": "noise"}
    recorded = record(
        torch.nn.Sequential(*blocks), loader, layers=layers, shards_root=tmp_path, cls_token=True, **names
    )
    assert Metadata.load(recorded).layers == (0, 2)


def test_a_data_set_of_numpy_layers(make_shards):
    shards = make_shards(layers=(3, 7, 9))
    assert IndexedDataset(IndexedConfig(shards, layer=np.array([9, 3])))[0]["act"].shape == (2, 8)
