import dataclasses
import pickle
from pathlib import Path

import pytest

from saev_torch import ConfigError, IndexedConfig, OrderedConfig, ShuffledConfig, make_ordered_config

CONFIGS = [IndexedConfig, OrderedConfig, ShuffledConfig]

# The published fields in their order, with their defaults; "shards" comes first in each.
PUBLISHED = {
    IndexedConfig: {"tokens": "content", "layer": -2, "debug": False},
    OrderedConfig: {
        "tokens": "content",
        "layer": -2,
        "batch_size": 16384,
        "batch_timeout_s": 30.0,
        "drop_last": False,
        "buffer_size": 64,
        "debug": False,
        "log_every_s": 30.0,
    },
    ShuffledConfig: {
        "tokens": "content",
        "layer": -1,
        "batch_size": 16384,
        "drop_last": False,
        "scale_norm": False,
        "ignore_labels": [],
        "n_threads": 4,
        "buffer_size": 64,
        "min_buffer_fill": 0.0,
        "batch_timeout_s": 30.0,
        "seed": 17,
        "debug": False,
        "log_every_s": 30.0,
        "use_tmpdir": False,
        "n_lanes": 8,
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_published_fields_and_defaults(kind):
    names = [field.name for field in dataclasses.fields(kind)]
    assert names[: 1 + len(PUBLISHED[kind])] == ["shards", *PUBLISHED[kind]]
    cfg = kind()
    for name, default in PUBLISHED[kind].items():
        assert getattr(cfg, name) == default, name
        assert type(getattr(cfg, name)) is type(default), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_are_frozen_values(kind):
    cfg = kind(shards="/a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.tokens = "all"
    assert cfg == kind(shards=Path("/a"))
    assert cfg != kind(shards=Path("/b"))
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert dataclasses.replace(cfg, tokens="all").tokens == "all"
    with pytest.raises(ConfigError):
        dataclasses.replace(cfg, tokens="cls")


@pytest.mark.parametrize("kind", CONFIGS)
def test_paths_are_expanded(kind, monkeypatch):
    monkeypatch.setenv("SAEV_SCRATCH", "/scratch")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert kind().shards == Path("/scratch/saev/shards/abcdefg")
    assert kind(shards=Path("$SAEV_SCRATCH/x")).shards == Path("/scratch/x")
    assert kind(shards="${SAEV_SCRATCH}/x").shards == Path("/scratch/x")
    assert kind(shards="~/x").shards == Path("/home/somebody/x")
    assert kind(shards="relative").shards == Path("relative")
    monkeypatch.delenv("SAEV_SCRATCH")
    # Nothing to put there: the name stays, and whoever opens the directory says which.
    assert kind().shards == Path("$SAEV_SCRATCH/saev/shards/abcdefg")


def test_the_environment_is_read_when_the_config_is_made(monkeypatch):
    monkeypatch.setenv("SAEV_SCRATCH", "/one")
    one = ShuffledConfig()
    monkeypatch.setenv("SAEV_SCRATCH", "/other")
    assert (one.shards, ShuffledConfig().shards) == (
        Path("/one/saev/shards/abcdefg"),
        Path("/other/saev/shards/abcdefg"),
    )


EVERYWHERE = [
    *[("shards", bad) for bad in (None, 3, "", b"/a", "a\0b")],
    *[("tokens", bad) for bad in ("cls", "", None, 1, ["content"], "CONTENT")],
    *[("layer", bad) for bad in ("last", None, 1.0, True, (), (1, 1), (1, True), ("all",), [2, 2], [1.5])],
    *[("debug", bad) for bad in (1, None, "yes")],
]
IN_BATCHES = [
    *[("batch_size", bad) for bad in (0, -1, 1.0, True, None, "16", 2**31)],
    *[("buffer_size", bad) for bad in (0, -1, 64.0, True, None)],
    *[("batch_timeout_s", bad) for bad in (0, -1.0, float("nan"), None, "30", True)],
    *[("log_every_s", bad) for bad in (0, -1.0, float("nan"), None, "30", True)],
    *[("drop_last", bad) for bad in (1, None, "yes")],
]
SHUFFLED = [
    *[("n_threads", bad) for bad in (0, -1, 4.0, True, None, 100_000)],
    *[("min_buffer_fill", bad) for bad in (-0.1, 1.5, float("nan"), None, "0.5", True)],
    *[("seed", bad) for bad in (1.0, None, "17", True)],
    *[("ignore_labels", bad) for bad in ([-1], [256], [1.0], [None], [True], None, 5, "5", b"\x05")],
    *[("scale_norm", bad) for bad in (1, None)],
    *[("use_tmpdir", bad) for bad in (1, None)],
    *[("n_lanes", bad) for bad in (0, -1, 8.0, True, None)],
    *[("block_size", bad) for bad in (0, -1, 8.0, True)],
]
BAD = [
    *[(kind, *bad) for kind in CONFIGS for bad in EVERYWHERE],
    *[(kind, *bad) for kind in (OrderedConfig, ShuffledConfig) for bad in IN_BATCHES],
    *[(ShuffledConfig, *bad) for bad in SHUFFLED],
]


def test_bad_values():
    """Each is a ValueError, of our own type, that names config, field and value."""
    for kind, field, bad in BAD:
        with pytest.raises(ConfigError, match=rf"{kind.__name__}\.{field}: expected .*, got .*; ") as caught:
            kind(**{field: bad})
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "fields",
    [
        {"layer": -2},
        {"layer": "all"},
        {"layer": (7, 3)},
        {"batch_size": 1},
        {"buffer_size": 1},
        {"min_buffer_fill": 1},
        {"min_buffer_fill": 1.0},
        {"batch_timeout_s": float("inf")},
        {"seed": -1},
        {"seed": 2**70},
        {"ignore_labels": (0, 255)},
        {"ignore_labels": [1, 1]},
        {"n_lanes": 7},
        {"block_size": None},
        {"block_size": 10**6},
    ],
)
def test_good_values(fields):
    cfg = ShuffledConfig(**fields)
    for name, value in fields.items():
        got = getattr(cfg, name)
        assert (tuple(got) if name == "ignore_labels" else got) == (tuple(value) if name == "ignore_labels" else value)


def test_a_list_of_layers_becomes_a_tuple():
    cfg = OrderedConfig(layer=[3, 7])
    assert cfg.layer == (3, 7)
    assert cfg == OrderedConfig(layer=(3, 7))


def test_the_list_of_labels_is_a_copy():
    labels = [1]
    cfg = ShuffledConfig(ignore_labels=labels)
    labels.append(999)
    assert cfg.ignore_labels == [1]
    assert ShuffledConfig().ignore_labels is not ShuffledConfig().ignore_labels


def test_special_tokens_have_no_labels():
    with pytest.raises(ConfigError, match=r"ignore_labels: .* special tokens have no label"):
        ShuffledConfig(tokens="special", ignore_labels=[3])
    assert ShuffledConfig(tokens="all", ignore_labels=[3]).ignore_labels == [3]


def test_make_ordered_config():
    shared = {"shards": "/a", "tokens": "all", "layer": 7, "debug": True}
    shared |= {"batch_size": 5, "drop_last": True, "buffer_size": 3, "batch_timeout_s": 2.0, "log_every_s": 4.0}
    shuffled = ShuffledConfig(**shared, seed=99)
    assert make_ordered_config(shuffled) == OrderedConfig(**shared)
    changed = make_ordered_config(shuffled, batch_size=9, drop_last=False)
    assert (changed.batch_size, changed.drop_last, changed.layer) == (9, False, 7)
    with pytest.raises(ConfigError, match="batch_size"):
        make_ordered_config(shuffled, batch_size=0)
    with pytest.raises(TypeError, match="seed"):
        make_ordered_config(shuffled, seed=3)
