import base64
import dataclasses
import hashlib
import json
import os
import pickle
from pathlib import Path

import factory
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saev_torch import ShardInfo
from saev_torch.errors import FormatError, ShardsNotFoundError, UntrustedError, WriteError
from saev_torch.format.metadata import Metadata, PixelAgg

FIELDS = {
    "family": "clip",
    "ckpt": "ViT-B-16/openai",
    "layers": (3, 7),
    "content_tokens_per_example": 6,
    "cls_token": True,
    "d_model": 8,
    "n_examples": 11,
    "max_tokens_per_shard": 56,
    "data": "b3BhcXVl",
    "dataset": Path("/data/images/two-layers-labelled"),
}

# What saev 0.1 wrote, byte for byte, and how it named the directory.
TWO_LAYERS = """\
{
  "family": "clip",
  "ckpt": "ViT-B-16/openai",
  "layers": [
    3,
    7
  ],
  "content_tokens_per_example": 6,
  "cls_token": true,
  "d_model": 8,
  "n_examples": 11,
  "max_tokens_per_shard": 56,
  "data": "b3BhcXVl",
  "dataset": "/data/images/two-layers-labelled",
  "pixel_agg": "majority",
  "dtype": "float32",
  "protocol": "2.1"
}"""
NO_CLS = """\
{
  "family": "siglip",
  "ckpt": "hf-hub:timm/ViT-L-16-SigLIP2-256",
  "layers": [
    0
  ],
  "content_tokens_per_example": 4,
  "cls_token": false,
  "d_model": 4,
  "n_examples": 6,
  "max_tokens_per_shard": 15,
  "data": "b3BhcXVl",
  "dataset": "/data/images/no-cls-exact-multiple",
  "pixel_agg": "majority",
  "dtype": "float32",
  "protocol": "2.1"
}"""
NEGATIVE_LAYER = """\
{
  "family": "dinov3",
  "ckpt": "dinov3_vits16",
  "layers": [
    -2
  ],
  "content_tokens_per_example": 5,
  "cls_token": true,
  "d_model": 16,
  "n_examples": 5,
  "max_tokens_per_shard": 54,
  "data": "b3BhcXVl",
  "dataset": "/data/images/negative-layer-one-shard",
  "pixel_agg": "prefer-fg",
  "dtype": "float32",
  "protocol": "2.1"
}"""
REFERENCE = [  # metadata.json, hash, n_shards, shard_shape
    (TWO_LAYERS, "69ebc70f", 3, (4, 2, 7, 8)),
    (NO_CLS, "5fad6d40", 2, (3, 1, 4, 4)),
    (NEGATIVE_LAYER, "e4998da4", 1, (9, 1, 6, 16)),
]
OLD_1_0_0 = {
    "vit_family": "clip",
    "vit_ckpt": "ViT-B-32/openai",
    "layers": [11],
    "n_patches_per_img": 4,
    "cls_token": True,
    "d_vit": 4,
    "n_imgs": 5,
    "max_patches_per_shard": 10,
    "data": "Imagenet(name='x')",
    "dtype": "float32",
    "protocol": "1.0.0",
}
OLD_1_1 = {
    "vit_family": "clip",
    "vit_ckpt": "ViT-B-32/openai",
    "layers": [2, 5],
    "n_patches_per_img": 6,
    "cls_token": True,
    "d_vit": 8,
    "n_imgs": 7,
    "max_patches_per_shard": 42,
    "data": {"root": "/data", "__class__": "ImageFolder"},
    "dtype": "float32",
    "protocol": "1.1",
}


# Fields of `factory.Spec`, one of each kind of directory that there is.
PROTOCOLS = [
    {"protocol": "2.1"},
    {"protocol": "1.1"},
    {"protocol": "1.0.0"},
    *[{"protocol": "2.0", "names": names} for names in ("patches", "n_content", "today")],
    {"protocol": "2.0", "names": "patches", "has_dataset": False, "pixel_agg": None},
    {"protocol": "2.1", "pixel_agg": None},
    {"protocol": "2.1", "pixel_agg": ""},
]


def load(directory: Path, obj: object) -> Metadata:
    raw = obj.encode() if isinstance(obj, str) else json.dumps(obj, indent=4).encode()
    (directory / "metadata.json").write_bytes(raw)
    return Metadata.load(directory)


@pytest.mark.parametrize(("raw", "name", "n_shards", "shard_shape"), REFERENCE)
def test_reference(tmp_path, raw, name, n_shards, shard_shape):
    md = load(tmp_path, raw)
    assert md.hash == name
    assert md.n_shards == n_shards
    assert md.shard_shape == shard_shape
    assert (md.examples_per_shard, md.n_layers, md.tokens_per_example, md.d_model) == shard_shape
    assert md.to_json() == raw.encode()
    shards_dir = md.dump(tmp_path / "saev" / "shards")
    assert shards_dir == tmp_path / "saev" / "shards" / name
    assert (shards_dir / "metadata.json").read_bytes() == raw.encode()
    assert [p.name for p in shards_dir.iterdir()] == ["metadata.json"]
    assert Metadata.load(shards_dir) == md


def test_fields():
    md = Metadata(**FIELDS)
    assert {name: getattr(md, name) for name in FIELDS} == FIELDS
    assert (md.pixel_agg, md.dtype, md.protocol) == (PixelAgg.MAJORITY, "float32", "2.1")
    assert md.hash == "69ebc70f"
    assert [agg.value for agg in PixelAgg] == ["majority", "prefer-fg"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        md.d_model = 3
    with pytest.raises(TypeError):
        Metadata("clip")


def test_constructor_takes_what_json_gives():
    md = Metadata(**FIELDS | {"layers": [3, 7], "dataset": "/data/x", "pixel_agg": "prefer-fg"})
    assert md.layers == (3, 7)
    assert md.dataset == Path("/data/x")
    assert md.pixel_agg is PixelAgg.PREFER_FG
    assert hash(md) == hash(dataclasses.replace(md))


def test_load_takes_a_string(make_shards):
    shards_dir = make_shards()
    assert Metadata.load(str(shards_dir)) == Metadata.load(shards_dir)


@pytest.mark.parametrize("fields", PROTOCOLS)
def test_factory_agrees(make_shards, fields):
    spec, protocol = factory.Spec(**fields), fields["protocol"]
    md = Metadata.load(make_shards(spec))
    assert md.hash == spec.hash()
    assert md.shard_shape == (spec.examples_per_shard, len(spec.layers), spec.tokens_per_example, spec.d_model)
    assert md.protocol == protocol


@pytest.mark.parametrize(("dtype", "nbytes"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_sizes_follow_the_dtype(make_shards, dtype, nbytes):
    spec = factory.Spec(dtype=dtype)
    shards_dir = make_shards(spec)
    md = Metadata.load(shards_dir)
    assert (md.dtype, md.hash) == (dtype, spec.hash())
    assert md.row_nbytes == spec.d_model * nbytes
    assert md.example_nbytes == spec.d_model * nbytes * spec.tokens_per_example * len(spec.layers)
    assert getattr(torch, md.value_type.name).itemsize == np.dtype(md.value_type.storage).itemsize == nbytes
    ShardInfo.load(shards_dir).validate(shards_dir)
    os.truncate(shards_dir / "acts000000.bin", spec.examples_per_shard * md.example_nbytes - 1)
    with pytest.raises(FormatError, match=r"acts000000\.bin: expected \d+ bytes"):
        ShardInfo.load(shards_dir).validate(shards_dir)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_not_finite_shows_in_its_bits(dtype):
    kind = Metadata(**FIELDS, dtype=dtype).value_type
    bits = np.arange(1 << 16, dtype="<u4")
    stored = (bits << 16 if dtype == "float32" else bits).astype(f"<u{kind.nbytes}")
    values = torch.from_numpy(stored).view(getattr(torch, dtype))
    wanted = int((~torch.isfinite(values)).sum())
    assert kind.is_nonfinite(stored).sum() == kind.is_nonfinite(memoryview(stored.tobytes())).sum() == wanted > 1


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "tfloat32"])
def test_an_unknown_dtype_says_what_to_do(tmp_path, dtype):
    with pytest.raises(
        FormatError,
        match=rf"metadata\.json: dtype: expected one of \['float32', 'float16', 'bfloat16'\], "
        rf"got '{dtype}'; read it with the version of saev_torch that wrote it, or a newer one, or write .* again",
    ):
        load(tmp_path, json.loads(TWO_LAYERS) | {"dtype": dtype})


@pytest.mark.parametrize("old", ["1.0.0", "1.1"])
def test_older_protocols_are_always_float32(tmp_path, old):
    obj = OLD_1_0_0 if old == "1.0.0" else OLD_1_1
    with pytest.raises(
        FormatError, match=rf"metadata\.json: dtype: expected 'float32', all that protocol {old} has, got"
    ):
        load(tmp_path, obj | {"dtype": "bfloat16"})


INT_FIELDS = ["content_tokens_per_example", "d_model", "n_examples", "max_tokens_per_shard"]
TEXT_FIELDS = ["family", "ckpt", "data"]
BAD_FIELDS = [
    *[(field, value) for field in INT_FIELDS for value in (0, -1, True, 4.0, "4", None, [4], 1 << 62, 10**4000)],
    *[(field, value) for field in TEXT_FIELDS for value in (None, 3, b"x", ["x"], {}, "\ud800")],
    *[("cls_token", value) for value in (0, 1, None, "true", 1.0)],
    *[("layers", value) for value in ([], (), 3, None, "37", [3, 3], [3.0], [True], ["3"], [None], [1 << 62])],
    *[("dataset", value) for value in (None, 3, b"/data", ["/data"], "\ud800")],
    *[("pixel_agg", value) for value in (None, "MAJORITY", "", 0, ["majority"])],
    *[("dtype", value) for value in ("float8_e4m3fn", "float64", "FLOAT32", "", None, 4, ["float32"])],
    *[("protocol", value) for value in ("2", "2.2", "1.0", "", None, 2.1, ["2.1"], {})],
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_bad_field(field, value):
    with pytest.raises(FormatError, match=rf"^{field}: expected .*, got ") as info:
        Metadata(**FIELDS | {field: value})
    assert len(str(info.value)) < 300


@pytest.mark.parametrize("field", [*INT_FIELDS, *TEXT_FIELDS, "cls_token", "layers", "dataset", "pixel_agg", "dtype"])
@pytest.mark.parametrize("value", [None, {}, [[]], 1.5])
def test_bad_field_in_a_file_names_the_file(tmp_path, field, value):
    if (field, value) == ("pixel_agg", None):
        return  # As the first days of the protocol have it.
    with pytest.raises(FormatError, match=rf"/metadata\.json: {field}: expected"):
        load(tmp_path, json.loads(TWO_LAYERS) | {field: value})


def test_one_example_must_fit():
    assert Metadata(**FIELDS | {"max_tokens_per_shard": 14}).examples_per_shard == 1
    with pytest.raises(FormatError, match=r"max_tokens_per_shard: expected at least 14.*got 13"):
        Metadata(**FIELDS | {"max_tokens_per_shard": 13})


@pytest.mark.parametrize(
    "huge",
    [
        {"n_examples": 1 << 60},
        {"d_model": 1 << 60},
        {"max_tokens_per_shard": 1 << 61},
        {"content_tokens_per_example": 1 << 40, "max_tokens_per_shard": 1 << 50, "d_model": 1 << 20},
    ],
)
def test_sizes_stay_below_int64(huge):
    with pytest.raises(FormatError, match=r"less than 2\*\*62 bytes"):
        Metadata(**FIELDS | huge)


def test_large_but_possible():
    md = Metadata(**FIELDS | {"n_examples": 1 << 40, "max_tokens_per_shard": 1 << 40})
    assert (md.n_shards + 1) * md.examples_per_shard * 2 * 7 * 8 * 4 < 1 << 62


@given(
    st.integers(1, 50), st.booleans(), st.integers(1, 4), st.integers(1, 64), st.integers(1, 1000), st.integers(0, 5000)
)
def test_geometry(content, cls_token, n_layers, d_model, n_examples, extra):
    per_example = (content + cls_token) * n_layers
    md = Metadata(
        family="",
        ckpt="",
        layers=tuple(range(n_layers)),
        content_tokens_per_example=content,
        cls_token=cls_token,
        d_model=d_model,
        n_examples=n_examples,
        max_tokens_per_shard=per_example + extra,
        data="",
        dataset=Path("/"),
    )
    assert md.examples_per_shard * per_example <= md.max_tokens_per_shard < (md.examples_per_shard + 1) * per_example
    assert (md.n_shards - 1) * md.examples_per_shard < n_examples <= md.n_shards * md.examples_per_shard


@pytest.mark.parametrize("key", [key for key in json.loads(TWO_LAYERS) if key != "pixel_agg"])
def test_missing_key(tmp_path, key):
    obj = json.loads(TWO_LAYERS)
    del obj[key]
    with pytest.raises(FormatError, match=rf"metadata\.json: expected the key '{key}', got none"):
        load(tmp_path, obj)


@pytest.mark.parametrize("key", [key for key in OLD_1_1 if key not in ("dtype", "protocol")])
def test_missing_old_key(tmp_path, key):
    with pytest.raises(FormatError, match=rf"expected the key '{key}', got none"):
        load(tmp_path, {k: v for k, v in OLD_1_1.items() if k != key})


def test_unknown_key(tmp_path):
    with pytest.raises(FormatError, match=r"metadata\.json: .*unknown \['_recorded_hash', 'colour'\]"):
        load(tmp_path, json.loads(TWO_LAYERS) | {"colour": 1, "_recorded_hash": "x"})


def test_unknown_protocol(tmp_path):
    with pytest.raises(FormatError, match=r"metadata\.json: protocol: expected one of .*, got '3\.0'"):
        load(tmp_path, {"protocol": "3.0"})


@pytest.mark.parametrize("obj", [[], None, 3, "x", [{}]])
def test_not_an_object(tmp_path, obj):
    with pytest.raises(FormatError, match="expected a JSON object, got"):
        load(tmp_path, json.dumps(obj))


def test_no_directory(tmp_path):
    with pytest.raises(ShardsNotFoundError, match="nowhere: expected a shard directory, but it does not exist"):
        Metadata.load(tmp_path / "nowhere")


def test_no_metadata(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metadata\.json: does not exist.*was not finished"):
        Metadata.load(tmp_path)


def test_old_1_0_0(tmp_path):
    md = load(tmp_path, OLD_1_0_0)
    assert md.hash == "e3b15fb989d3d4f503b6d47bcedaaa45c56928495850936e4d792b4222bd293e"
    assert md.shard_shape == (2, 1, 5, 4)
    assert (md.n_shards, md.n_examples, md.protocol) == (3, 5, "1.0.0")
    assert (md.family, md.ckpt, md.layers) == ("clip", "ViT-B-32/openai", (11,))
    assert (md.data, md.dataset, md.pixel_agg) == ("Imagenet(name='x')", Path(), PixelAgg.MAJORITY)


def test_old_1_1(tmp_path):
    md = load(tmp_path, OLD_1_1)
    assert md.hash == "414ed7860ab33ca9f56b866bccdc9804eb50af4cffb5893a7064be49299ca187"
    assert md.shard_shape == (3, 2, 7, 8)
    assert (md.n_shards, md.protocol) == (3, "1.1")
    assert md.data == '{"root":"/data","__class__":"ImageFolder"}'


def test_oldest_has_neither_protocol_nor_dtype(tmp_path):
    oldest = {k: v for k, v in OLD_1_0_0.items() if k not in ("protocol", "dtype")}
    md = load(tmp_path, oldest)
    assert (md.protocol, md.dtype) == ("1.0.0", "float32")
    assert md == load(tmp_path, OLD_1_0_0)
    # The hash covers the object as it was written.
    raw = json.dumps(oldest, sort_keys=True, separators=(",", ":"))
    assert load(tmp_path, oldest).hash == hashlib.sha256(raw.encode()).hexdigest()


def test_old_hash_covers_all_keys_and_digits(tmp_path):
    obj = OLD_1_1 | {"seed": 7, "data": {"é": 123456789012345678901234567890, "x": [0.1, None]}}
    raw = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    md = load(tmp_path, json.dumps(obj, ensure_ascii=False))
    assert md.hash == hashlib.sha256(raw.encode()).hexdigest()
    assert md.data == '{"é":123456789012345678901234567890,"x":[0.1,null]}'


@pytest.mark.parametrize("data", [None, 3, ["x"], True])
def test_old_data_must_be_an_object_or_a_string(tmp_path, data):
    with pytest.raises(FormatError, match="data: expected a string"):
        load(tmp_path, OLD_1_1 | {"data": data})


def test_old_data_nested_deeply(tmp_path):
    nested = '{"a":' * 900 + "1" + "}" * 900
    try:
        load(tmp_path, json.dumps(OLD_1_1 | {"data": "here"}).replace('"here"', nested))
    except FormatError as err:
        assert "nested too deeply" in str(err)  # noqa: PT017 - where Python's own limit is higher, it loads


def test_recorded_hash_is_kept_and_takes_no_part(tmp_path):
    md = load(tmp_path, OLD_1_1)
    fields = {f.name: getattr(md, f.name) for f in dataclasses.fields(md) if f.init}
    assert md == Metadata(**fields)
    assert hash(md) == hash(Metadata(**fields))
    assert "_recorded_hash" not in repr(md)
    assert pickle.loads(pickle.dumps(md)).hash == md.hash
    # Made by hand, there is no recorded object, and the names of that protocol are hashed.
    assert (
        Metadata(**fields).hash
        == hashlib.sha256(
            json.dumps(OLD_1_1 | {"data": md.data}, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()
    )


def test_old_protocols_are_not_written(tmp_path):
    md = load(tmp_path, OLD_1_1)
    with pytest.raises(WriteError, match=r"protocol: expected '2\.1'.*got '1\.1'.*dataclasses\.replace"):
        md.dump(tmp_path / "root")
    assert not (tmp_path / "root").exists()
    new = dataclasses.replace(md, protocol="2.1", dataset="/data")
    assert len(new.hash) == 8
    assert Metadata.load(new.dump(tmp_path / "root")) == new


# October 2025: protocol 2.0, as three versions of its writer wrote it, with an indent of 4 and then of 2.
EARLIEST_2_0 = """\
{
    "family": "dinov2",
    "ckpt": "dinov2_vitb14_reg",
    "layers": [
        7,
        11
    ],
    "patches_per_ex": 6,
    "cls_token": true,
    "d_model": 8,
    "n_ex": 11,
    "patches_per_shard": 69,
    "data": {
        "root": "/data/images",
        "__class__": "ImgFolder"
    },
    "pixel_agg": null,
    "dtype": "float32",
    "protocol": "2.0"
}"""
WITH_DATASET_2_0 = EARLIEST_2_0.replace("null", '"prefer-fg"').replace(
    '    "pixel_agg"', '    "dataset": "/data/images",\n    "pixel_agg"'
)
N_CONTENT_2_0 = """\
{
  "family": "dinov2",
  "ckpt": "dinov2_vitb14_reg",
  "layers": [
    7,
    11
  ],
  "n_content_tokens_per_example": 6,
  "cls_token": true,
  "d_model": 8,
  "n_examples": 11,
  "max_tokens_per_shard": 69,
  "data": {
    "root": "/data/images",
    "__class__": "ImgFolder"
  },
  "dataset": "/data/images",
  "pixel_agg": "majority",
  "dtype": "float32",
  "protocol": "2.0"
}"""
TODAYS_NAMES_2_0 = N_CONTENT_2_0.replace("n_content_", "content_").replace('  "pixel_agg": "majority",\n', "")
EARLY_2_1 = TWO_LAYERS.replace('"majority"', "null")
WITHOUT_AGG_2_1 = TWO_LAYERS.replace('  "pixel_agg": "majority",\n', "")
OCTOBER = [  # metadata.json, hash, dataset, pixel_agg
    (EARLIEST_2_0, "cb6cc02f6c1c29d3e140d886a91b5905b1f859c4d8dfb69d3bf9379efe619e3f", "", PixelAgg.MAJORITY),
    (
        WITH_DATASET_2_0,
        "8317cfd7ad73e648a70c41dc5b8eeba28f416062beac0e8bc2388a307198db64",
        "/data/images",
        PixelAgg.PREFER_FG,
    ),
    (
        N_CONTENT_2_0,
        "c094156c4e9ec2216e177bfaee8351f509ef2b7ef84545dd551e0344149fec54",
        "/data/images",
        PixelAgg.MAJORITY,
    ),
    (
        TODAYS_NAMES_2_0,
        "ea3c20c0a493b2f4067eb9ddc805e9d1dc36a2177e3734f358f935f6d95bbec5",
        "/data/images",
        PixelAgg.MAJORITY,
    ),
    (
        EARLY_2_1,
        "3faaec22e184e020879a8c5c4db4dcc71a87d100628a0264779252169e67f10e",
        "/data/images/two-layers-labelled",
        PixelAgg.MAJORITY,
    ),
    (
        WITHOUT_AGG_2_1,
        "13aa2496535b3709436081da570449e99031e3050d04103fa49aa75d99ae1a58",
        "/data/images/two-layers-labelled",
        PixelAgg.MAJORITY,
    ),
]


@pytest.mark.parametrize(("raw", "name", "dataset", "agg"), OCTOBER)
def test_october_2025(tmp_path, raw, name, dataset, agg):
    md = load(tmp_path, raw)
    assert md.hash == name
    assert len(name) == 64
    assert (md.dataset, md.pixel_agg) == (Path(dataset), agg)
    assert (md.content_tokens_per_example, md.n_examples, md.n_layers, md.d_model) == (6, 11, 2, 8)
    assert md.shard_shape == (4, 2, 7, 8)
    obj = json.loads(raw)
    assert md.protocol == obj["protocol"]
    assert md.data == ('{"root":"/data/images","__class__":"ImgFolder"}' if md.protocol == "2.0" else "b3BhcXVl")
    # It is read, not written: today's writer has the next protocol, and other names for directories.
    with pytest.raises(WriteError, match=r"protocol: expected '2\.1'.*dataclasses\.replace"):
        md.dump(tmp_path / "root")
    new = dataclasses.replace(md, protocol="2.1")
    assert len(new.hash) == 8
    assert Metadata.load(new.dump(tmp_path / "root")) == new
    assert pickle.loads(pickle.dumps(md)).hash == md.hash
    # The order of the keys in the file says nothing.
    assert load(tmp_path, json.dumps(obj, sort_keys=True)).hash == name


@pytest.mark.parametrize("raw", [EARLIEST_2_0, WITH_DATASET_2_0, N_CONTENT_2_0, TODAYS_NAMES_2_0])
def test_missing_key_of_2_0(tmp_path, raw):
    obj = json.loads(raw)
    for key in set(obj) - {"dataset", "pixel_agg"}:
        # Without the one key that differs, nothing says which set of names it was.
        said = key.removeprefix("n_")
        with pytest.raises(FormatError, match=rf"metadata\.json: expected the key '(n_)?{said}', got none"):
            load(tmp_path, {k: v for k, v in obj.items() if k != key})


@pytest.mark.parametrize("raw", [N_CONTENT_2_0, EARLY_2_1])
@pytest.mark.parametrize("value", ["MAJORITY", 3, [], {}, True])
def test_bad_pixel_agg_of_october(tmp_path, raw, value):
    with pytest.raises(FormatError, match=r"metadata\.json: pixel_agg: expected one of"):
        load(tmp_path, json.loads(raw) | {"pixel_agg": value})


def test_early_2_1_with_what_no_metadata_have(tmp_path):
    for value in (10**400, "\ud800"):
        with pytest.raises(FormatError, match=r"metadata\.json: "):
            load(tmp_path, json.loads(EARLY_2_1) | {"d_model": value})


def test_2_0_made_by_hand_has_a_hash():
    md = Metadata(**FIELDS | {"protocol": "2.0"})
    assert len(md.hash) == 64
    assert md.hash != dataclasses.replace(md, d_model=9).hash


def test_make_data_cfg_says_how_and_why_not(tmp_path):
    with pytest.raises(
        UntrustedError, match=r"runs any code.*pickle\.loads\(base64\.b64decode\(md\.data\)\)"
    ) as caught:
        Metadata(**FIELDS).make_data_cfg()
    assert isinstance(caught.value, RuntimeError)
    md = Metadata(**FIELDS | {"data": base64.b64encode(pickle.dumps({"root": "/data"})).decode()})
    said = str(caught.value).split("`")[-2]
    names = {"md": md}
    exec(said, names)
    assert names["cfg"] == {"root": "/data"}
    with pytest.raises(UntrustedError, match=r"in protocol 1\.1 it is no pickle: look at md\.data"):
        load(tmp_path, OLD_1_1).make_data_cfg()


def test_data_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    data = base64.b64encode(pickle.dumps(Bomb())).decode()
    md = load(tmp_path, json.loads(TWO_LAYERS) | {"data": data})
    assert md.data == data
    md.hash, md.dump(tmp_path / "root")
    assert not (tmp_path / "exploded").exists()


def test_text_beyond_ascii(tmp_path):
    md = Metadata(**FIELDS | {"ckpt": "модель/é", "dataset": "/data/ü"})
    raw = (md.dump(tmp_path) / "metadata.json").read_bytes()
    assert "модель/é".encode() in raw
    assert Metadata.load(tmp_path / md.hash) == md
    compact = json.dumps(json.loads(raw), separators=(",", ":"), ensure_ascii=False)
    assert md.hash == hashlib.sha256(compact.encode()).hexdigest()[:8]


def test_key_order_in_the_file_does_not_matter(tmp_path):
    md = load(tmp_path, json.dumps(json.loads(TWO_LAYERS), sort_keys=True))
    assert md.hash == "69ebc70f"
    assert md.to_json() == TWO_LAYERS.encode()


def test_dump_does_not_touch_the_same(tmp_path):
    md = Metadata(**FIELDS)
    path = md.dump(tmp_path) / "metadata.json"
    before = path.stat()
    md.dump(tmp_path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_dump_refuses_another(tmp_path):
    md = Metadata(**FIELDS)
    path = md.dump(tmp_path) / "metadata.json"
    path.write_bytes(b"{}")
    with pytest.raises(WriteError, match="got another file"):
        md.dump(tmp_path)
    assert path.read_bytes() == b"{}"
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(WriteError, match="got another file"):
        md.dump(tmp_path)


def test_dump_where_no_directory_can_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match="could not be written: Not a directory"):
        Metadata(**FIELDS).dump(tmp_path / "file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*map(json.loads, (TWO_LAYERS, EARLIEST_2_0, EARLY_2_1)), OLD_1_0_0, OLD_1_1]), st.data())
def test_any_values(tmp_path_factory, base, data):
    """Whatever stands in metadata.json, it loads as itself or is refused."""
    directory = tmp_path_factory.mktemp("any")
    keys = data.draw(st.lists(st.sampled_from(sorted(base)), min_size=1, max_size=2))
    obj = base | {key: data.draw(JSON) for key in keys}
    (directory / "metadata.json").write_text(json.dumps(obj))
    try:
        md = Metadata.load(directory)
    except FormatError as err:
        assert str(directory) in str(err)  # noqa: PT017
        return
    assert md.examples_per_shard >= 1
    assert int(md.hash, 16) >= 0
