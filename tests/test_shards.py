import dataclasses
import json
import os
from pathlib import Path

import factory
import pytest
from factory import Spec
from hypothesis import given
from hypothesis import strategies as st

from saev_torch.errors import FormatError, ReadError, SaevTorchError, ShardsNotFoundError, WriteError
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import Shard, ShardInfo, check_nbytes, shard_name, shard_nbytes
from saev_torch.format.sidecars import LABELS

# What saev 0.1 wrote, byte for byte: no newline at the end.
TRAILING_EMPTY = """\
[
  {
    "name": "acts000000.bin",
    "n_examples": 3
  },
  {
    "name": "acts000001.bin",
    "n_examples": 3
  },
  {
    "name": "acts000002.bin",
    "n_examples": 0
  }
]"""
GEOMETRIES = [
    {},
    {"n_examples": 12},
    {"n_examples": 12, "trailing_empty": False},
    {"trailing_empty": True},
    {"preallocate_last": False},
    {"n_examples": 12, "preallocate_last": False},
    {"n_examples": 1, "examples_per_shard": 1, "content_tokens": 1, "cls": False, "layers": (-2,), "d_model": 1},
    {"n_examples": 3, "examples_per_shard": 100},
    {"labels": False},
    {"protocol": "1.1"},
    {"protocol": "1.0.0", "labels": False},
]


def table(*counts: int) -> ShardInfo:
    return ShardInfo([Shard(shard_name(i), n) for i, n in enumerate(counts)])


def metadata(**fields: object) -> Metadata:
    spec = Spec(**fields)
    obj = spec.metadata()
    return Metadata(**obj)


def test_reference_bytes(tmp_path):
    (tmp_path / "shards.json").write_text(TRAILING_EMPTY)
    info = ShardInfo.load(tmp_path)
    assert info == table(3, 3, 0)
    (tmp_path / "copy").mkdir()
    assert info.dump(tmp_path / "copy") == tmp_path / "copy" / "shards.json"
    assert (tmp_path / "copy" / "shards.json").read_text() == TRAILING_EMPTY
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["shards.json"]


def test_is_like_a_list():
    info = ShardInfo()
    assert (len(info), list(info), info) == (0, [], ShardInfo())
    info.append(Shard("a", 3))
    info.append(Shard("b", 1))
    assert (len(info), info[0], info[-1], info[0:1]) == (2, Shard("a", 3), Shard("b", 1), [Shard("a", 3)])
    assert list(info) == [Shard("a", 3), Shard("b", 1)]
    assert Shard("b", 1) in info
    assert info == ShardInfo([Shard("a", 3), Shard("b", 1)])
    assert info != ShardInfo([Shard("a", 3)])
    assert ShardInfo() == ShardInfo([])
    with pytest.raises(IndexError):
        info[2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        info[0].n_examples = 4


def test_dump_needs_the_directory(tmp_path):
    with pytest.raises(WriteError, match=r"shards\.json: could not be written"):
        table(3).dump(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "..", "../a", "/a", "a/b", "a\0", 3, None])
def test_shard_name_must_be_plain(name):
    with pytest.raises(FormatError, match="name: expected"):
        Shard(name, 1)


@pytest.mark.parametrize("n_examples", [-1, True, 1.0, "1", None, [1]])
def test_shard_count_must_be_a_count(n_examples):
    with pytest.raises(FormatError, match="n_examples: expected an integer from 0 on, got"):
        Shard("a", n_examples)


def test_names_and_sizes():
    assert [shard_name(i) for i in (0, 12, 1_000_000)] == ["acts000000.bin", "acts000012.bin", "acts1000000.bin"]
    md = metadata()
    assert shard_nbytes(md, 3) == 3 * 2 * 7 * 8 * 4
    assert shard_nbytes(md, 0) == 0
    assert LABELS.nbytes(md) == 11 * 6


@pytest.mark.parametrize("n_examples", [1, 3])
def test_nbytes(n_examples):
    md = metadata()
    exact, full = shard_nbytes(md, n_examples), shard_nbytes(md, 4)
    for nbytes in (exact, full):
        check_nbytes(Path("a"), md, n_examples, nbytes)
    for nbytes in (0, exact - 1, exact + 1, full - 1, full + 1, 2 * full):
        with pytest.raises(FormatError, match=rf"^a: expected {exact} bytes \(or {full}, .*, got {nbytes}:"):
            check_nbytes(Path("a"), md, n_examples, nbytes)
    with pytest.raises(FormatError, match=rf"^a: expected {full} bytes for 4 examples, got 0: it is truncated"):
        check_nbytes(Path("a"), md, 4, 0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{}", "expected a list of shards"),
        ("null", "expected a list of shards"),
        ("[3]", "entry 0: expected an object"),
        ("[[]]", "entry 0: expected an object"),
        ('[{"name": "a"}]', "entry 0: expected an object with the keys name and n_examples"),
        ('[{"n_examples": 1}]', "entry 0: expected an object with the keys name and n_examples"),
        ('[{"name": "a", "n_examples": 1, "n_imgs": 1}]', "entry 0: expected an object with the keys"),
        ('[{"name": "a", "n_examples": 1, "x": 1}]', "entry 0: expected an object with the keys"),
        ('[{"name": "a", "n_examples": 1}, {"name": "../a", "n_examples": 1}]', "entry 1: name: expected a plain"),
        ('[{"name": "/etc/passwd", "n_examples": 1}]', "entry 0: name: expected a plain"),
        ('[{"name": "a", "n_examples": 1.0}]', "entry 0: n_examples: expected an integer"),
        ('[{"name": "a", "n_examples": -1}]', "entry 0: n_examples: expected an integer"),
        ('[{"name": "a", "n_imgs": true}]', "entry 0: n_examples: expected an integer"),
        ('[{"name": "a", "name": "b", "n_examples": 1}]', "the key 'name' is repeated"),
        ("[", "expected valid JSON"),
    ],
)
def test_bad_table(tmp_path, raw, message):
    (tmp_path / "shards.json").write_text(raw)
    with pytest.raises(FormatError, match=rf"shards\.json: .*{message}"):
        ShardInfo.load(tmp_path)


def test_no_table(tmp_path):
    with pytest.raises(ShardsNotFoundError, match=r"shards\.json: expected a file"):
        ShardInfo.load(tmp_path)


@pytest.mark.parametrize("fields", GEOMETRIES)
def test_loads_checks_and_validates(make_shards, fields):
    spec = Spec(**fields)
    shards_dir = make_shards(spec)
    info = ShardInfo.load(shards_dir)
    assert [(shard.name, shard.n_examples) for shard in info] == spec.shards()
    info.check(Metadata.load(shards_dir))
    info.validate(shards_dir)


@pytest.mark.parametrize("counts", [(4, 4, 3), (4, 4, 3, 0)])
def test_check_accepts(counts):
    table(*counts).check(metadata())


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((), "expected 11 examples in all shards.*got 0"),
        ((0,), "expected 11 examples in all shards.*got 0"),
        ((4, 4), "expected 11 examples in all shards.*got 8"),
        ((4, 4, 4), "expected 11 examples in all shards.*got 12"),
        ((4, 3, 4), r"entry 1 \('acts000001\.bin'\): expected n_examples of exactly 4.*got 3"),
        ((4, 4, 2, 1), "entry 2 .*exactly 4.*got 2"),
        ((4, 0, 4, 3), "entry 1 .*exactly 4.*got 0"),
        ((0, 4, 4, 3), "entry 0 .*exactly 4.*got 0"),
        ((4, 4, 3, 0, 0), "entry 2 .*exactly 4.*got 3"),
        ((11,), "entry 0 .*1 to 4.*got 11"),
        ((4, 7), "entry 1 .*1 to 4.*got 7"),
        ((5, 4, 2), "entry 0 .*exactly 4.*got 5"),
        ((4, 4, 10**30), "entry 2 .*1 to 4.*got 1000"),
    ],
)
def test_check_refuses(counts, message):
    with pytest.raises(FormatError, match=rf"^here: {message}"):
        table(*counts).check(metadata(), "here")


def test_check_refuses_repeated_names():
    info = table(4, 4, 3)
    info.shards[2] = Shard("acts000000.bin", 3)
    with pytest.raises(FormatError, match=r"expected each name once, got 'acts000000\.bin' again"):
        info.check(metadata())


def spoil(shards_dir: Path, name: str, how: str) -> None:
    path = shards_dir / name
    size = path.stat().st_size
    if how in ("missing", "directory", "fifo", "link"):
        path.rename(path.with_name("moved"))
    {
        "missing": lambda: None,
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("moved"),
        "empty": lambda: os.truncate(path, 0),
        "short": lambda: os.truncate(path, size - 1),
        "long": lambda: os.truncate(path, size + 1),
    }[how]()


SPOILT = {
    "missing": (ShardsNotFoundError, "it does not exist"),
    "directory": (FormatError, "got a directory"),
    "fifo": (FormatError, "got a FIFO"),
    "link": (FormatError, "got a symbolic link"),
    "empty": (FormatError, "expected .* bytes.*, got 0"),
    "short": (FormatError, "expected .* bytes.*, got"),
    "long": (FormatError, "expected .* bytes.*, got"),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", ["acts000000.bin", "acts000002.bin"])
@pytest.mark.parametrize("preallocate_last", [True, False])
def test_validate_finds(make_shards, name, how, preallocate_last):
    shards_dir = make_shards(preallocate_last=preallocate_last)
    info = ShardInfo.load(shards_dir)
    spoil(shards_dir, name, how)
    kind, message = SPOILT[how]
    with pytest.raises(kind, match=rf"{shards_dir}/{name}: .*{message}"):
        info.validate(shards_dir)


@pytest.mark.parametrize("how", [how for how in SPOILT if how != "missing"])
def test_validate_finds_labels(make_shards, how):
    shards_dir = make_shards()
    spoil(shards_dir, "labels.bin", how)
    kind, message = SPOILT[how]
    with pytest.raises(kind, match=rf"{shards_dir}/labels\.bin: .*{message}"):
        ShardInfo.load(shards_dir).validate(shards_dir)


def test_validate_does_without_what_holds_nothing(make_shards):
    shards_dir = make_shards(n_examples=12)
    (shards_dir / "acts000003.bin").unlink()
    (shards_dir / "labels.bin").unlink()
    ShardInfo.load(shards_dir).validate(shards_dir)


def test_validate_refuses_another_table(make_shards):
    shards_dir = make_shards()
    with pytest.raises(FormatError, match=rf"{shards_dir}/shards\.json: expected 11 examples"):
        table(4, 4).validate(shards_dir)


def test_validate_says_what_may_not_be_read(make_shards, monkeypatch):
    shards_dir = make_shards()
    info = ShardInfo.load(shards_dir)
    real_open = os.open

    def refuse(path, *args):
        if str(path).endswith("acts000001.bin"):
            raise PermissionError(13, "Permission denied")
        return real_open(path, *args)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ReadError, match=r"acts000001\.bin: could not be opened: Permission denied"):
        info.validate(shards_dir)


@given(st.data())
def test_any_table(tmp_path_factory, data):
    """Whatever stands in shards.json: what passes `check` has the examples that the metadata announces, in order."""
    directory = tmp_path_factory.mktemp("any")
    md = metadata()
    names = st.sampled_from([shard_name(i) for i in range(5)] + ["..", "", "a/b"])
    entry = st.fixed_dictionaries({"name": names, "n_examples": st.sampled_from([-1, 0, 3, 4, 11, 2**70, None])})
    entries = data.draw(st.lists(entry, max_size=5) | st.just(json.loads(TRAILING_EMPTY)))
    (directory / "shards.json").write_text(json.dumps(entries))
    try:
        info = ShardInfo.load(directory)
        info.check(md)
    except SaevTorchError:
        return
    assert [shard.n_examples for shard in info if shard.n_examples] == [4, 4, 3]
    assert len({shard.name for shard in info}) == len(info)


def test_factory_is_independent_of_the_names_of_directories(make_shards, tmp_path):
    shards_dir = make_shards()
    other = tmp_path / "anything at all"
    shards_dir.rename(other)
    ShardInfo.load(other).validate(other)
    assert factory.Spec().hash() == Metadata.load(other).hash
