"""Bad input, each with an exception of ours that names the path or the field: when opened, or when iterating."""

import gc
import json
import os
import shutil

import contracts
import numpy as np
import pytest
from factory import Spec
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    FormatError,
    IndexedConfig,
    IndexedDataset,
    OrderedActivations,
    OrderedConfig,
    ReadError,
    SaevTorchError,
    ShardsNotFoundError,
    ShuffledActivations,
    ShuffledConfig,
)
from saev_torch.reading.engine import Engine

DATA_SETS = {
    "indexed": lambda shards, **fields: IndexedDataset(IndexedConfig(shards=shards, **fields)),
    "ordered": lambda shards, **fields: OrderedActivations(OrderedConfig(shards=shards, batch_size=4, **fields)),
    "shuffled": lambda shards, **fields: ShuffledActivations(ShuffledConfig(shards=shards, batch_size=4, **fields)),
}
every_data_set = pytest.mark.parametrize("make", DATA_SETS.values(), ids=DATA_SETS)


def edit(shards, **fields):
    path = shards / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def put_directory(path):
    path.unlink()
    path.mkdir()


# What is done to a directory, what it is called, and what the message says: the path, and what is wrong with it.
BAD_DIRECTORIES = {
    "no directory": (
        shutil.rmtree,
        ShardsNotFoundError,
        r"{shards}: expected a shard directory, but it does not exist",
    ),
    "a file for a directory": (
        lambda shards: (shutil.rmtree(shards), shards.write_text("x")),
        ShardsNotFoundError,
        r"{shards}: expected a shard directory, but it is not a directory",
    ),
    "no metadata.json": (
        lambda shards: (shards / "metadata.json").unlink(),
        ShardsNotFoundError,
        r"{shards}/metadata\.json: does not exist",
    ),
    "no shards.json": (
        lambda shards: (shards / "shards.json").unlink(),
        ShardsNotFoundError,
        r"{shards}/shards\.json: expected a file, but it does not exist",
    ),
    "a missing shard": (
        lambda shards: (shards / "acts000001.bin").unlink(),
        ShardsNotFoundError,
        r"{shards}/acts000001\.bin: expected a file, but it does not exist",
    ),
    "a shard one byte short": (
        lambda shards: cut(shards / "acts000001.bin"),
        FormatError,
        r"{shards}/acts000001\.bin: expected 896 bytes .* got 895: it is truncated",
    ),
    "the last shard one byte short": (
        lambda shards: cut(shards / "acts000002.bin"),
        FormatError,
        r"{shards}/acts000002\.bin: expected 672 bytes \(or 896, preallocated\) .* got 895",
    ),
    "a shard one byte long": (
        lambda shards: os.truncate(shards / "acts000001.bin", 897),
        FormatError,
        r"{shards}/acts000001\.bin: expected 896 bytes .* got 897",
    ),
    "an empty shard": (
        lambda shards: os.truncate(shards / "acts000000.bin", 0),
        FormatError,
        r"{shards}/acts000000\.bin: expected 896 bytes .* got 0: it is truncated",
    ),
    "a directory for a shard": (
        lambda shards: put_directory(shards / "acts000000.bin"),
        FormatError,
        r"{shards}/acts000000\.bin: expected a regular file, got a directory",
    ),
    "an unknown protocol": (
        lambda shards: edit(shards, protocol="9.9"),
        FormatError,
        r"{shards}/metadata\.json: protocol: expected one of .*'2\.1'.*, got '9\.9'",
    ),
    "an unknown dtype": (
        lambda shards: edit(shards, dtype="float8_e4m3fn"),
        FormatError,
        r"{shards}/metadata\.json: dtype: expected one of .*'bfloat16'\], got 'float8_e4m3fn'; read it with",
    ),
    "labels one byte short": (
        lambda shards: cut(shards / "labels.bin"),
        FormatError,
        r"{shards}/labels\.bin: expected 66 bytes \(11 examples x 6 content tokens\), got 65",
    ),
    "empty metadata.json": (
        lambda shards: (shards / "metadata.json").write_text(""),
        FormatError,
        r"{shards}/metadata\.json: expected valid JSON",
    ),
    "empty shards.json": (
        lambda shards: (shards / "shards.json").write_text("[]"),
        FormatError,
        r"{shards}/shards\.json: expected 11 examples in all shards, .* got 0",
    ),
}


@every_data_set
@pytest.mark.parametrize(("damage", "error", "message"), BAD_DIRECTORIES.values(), ids=BAD_DIRECTORIES)
def test_bad_directories(make_shards, make, damage, error, message):
    """Found when the data set is made, before any worker is started or any sample read."""
    shards = make_shards(layers=(3,))
    assert len(make(shards, layer=3)) > 0
    damage(shards)
    with pytest.raises(error, match=message.format(shards=shards)) as caught:
        make(shards, layer=3)
    assert isinstance(caught.value, SaevTorchError)
    assert isinstance(caught.value, FileNotFoundError if error is ShardsNotFoundError else ValueError)


@every_data_set
@pytest.mark.parametrize("layer", [4, -3, (3, 4)])
def test_an_unrecorded_layer(make_shards, make, layer):
    with pytest.raises(ConfigError, match=r"layer: expected one of the recorded layers \[3, 7\], got"):
        make(make_shards(), layer=layer)


@every_data_set
def test_special_tokens_without_cls(make_shards, make):
    with pytest.raises(ConfigError, match=r"tokens: .* for shards without a \[CLS\] token, got 'special'"):
        make(make_shards(cls=False), layer=3, tokens="special")


def test_labels_asked_for_and_absent(make_shards):
    shards = make_shards(labels=False)
    with pytest.raises(
        ConfigError, match=rf"{shards}/labels\.bin: expected labels, .* got no such file; .*ignore_labels"
    ):
        DATA_SETS["shuffled"](shards, layer=3, ignore_labels=[1])
    # Not asked for, not missed.
    assert "token_labels" not in next(iter(DATA_SETS["shuffled"](shards, layer=3)))


def test_the_default_directory_is_named(monkeypatch):
    monkeypatch.delenv("SAEV_SCRATCH", raising=False)
    with pytest.raises(ShardsNotFoundError, match=r"\$SAEV_SCRATCH/saev/shards/abcdefg: expected a shard directory"):
        OrderedActivations(OrderedConfig())


# What goes bad between the constructor and the end of an epoch


def shorter(shards):
    cut(shards / "acts000002.bin")


def empty(shards):
    os.truncate(shards / "acts000002.bin", 0)


def gone(shards):
    (shards / "acts000002.bin").unlink()


def replaced(shards):
    put_directory(shards / "acts000002.bin")


def labels_gone(shards):
    (shards / "labels.bin").unlink()


def labels_shorter(shards):
    os.truncate(shards / "labels.bin", 7)


LATER = [
    (shorter, FormatError, r"acts000002\.bin: expected .* got .*: it is truncated"),
    (empty, FormatError, r"acts000002\.bin: expected .* got 0: it is truncated"),
    (gone, ShardsNotFoundError, r"acts000002\.bin: expected a file, but it does not exist"),
    (replaced, FormatError, r"acts000002\.bin: expected a regular file, got a directory"),
    (labels_gone, ShardsNotFoundError, r"labels\.bin: expected a file, but it does not exist"),
    (labels_shorter, ReadError, r"labels\.bin: expected \d+ bytes at offset \d+, got \d+: the file became shorter"),
]


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("kind", ["ordered", "shuffled"])
@pytest.mark.parametrize(("damage", "error", "message"), LATER, ids=[damage.__name__ for damage, _, _ in LATER])
def test_damage_before_the_first_batch(make_shards, kind, n_workers, damage, error, message):
    """It reaches the parent as the same exception, soon; nothing hangs."""
    shards = make_shards(n_examples=40)
    loader = DataLoader(DATA_SETS[kind](shards, layer=3), num_workers=n_workers)
    damage(shards)
    err = contracts.check_fails(loader, error, message)
    assert str(shards) in str(err)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_damage_in_the_second_epoch(make_shards, n_workers):
    shards = make_shards(n_examples=40)
    loader = DataLoader(DATA_SETS["shuffled"](shards, layer=3), num_workers=n_workers, persistent_workers=n_workers > 0)
    assert len(list(loader)) == 60
    shorter(shards)
    contracts.check_fails(loader, FormatError, r"acts000002\.bin: expected .* it is truncated")


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_error_comes_after_the_batches_before_it(make_shards, n_workers):
    """What was read before the damage is handed out; the error comes where the batch would be that it concerns."""
    shards = make_shards(n_examples=200, content_tokens=20, d_model=2)
    loader = DataLoader(DATA_SETS["ordered"](shards, layer=3), num_workers=n_workers)
    (shards / "acts000040.bin").unlink()
    gone_at = 40 * 4 * 20 // 4  # 40 shards of four examples of 20 tokens, in batches of four
    taken = []

    def take(batch):
        taken.append(batch["example_idx"][0].item())

    contracts.check_fails(loader, ShardsNotFoundError, r"acts000040\.bin", each=take)
    assert taken == [i // 5 for i in range(len(taken))]
    assert gone_at - 4 * max(1, n_workers) <= len(taken) <= gone_at


def test_a_data_set_works_again_when_the_file_is_back(make_shards):
    shards = make_shards(n_examples=40)
    data_set = DATA_SETS["shuffled"](shards, layer=3)
    wanted = list(DATA_SETS["shuffled"](shards, layer=3))
    away = shards / "acts000002.bin"
    away.rename(shards / "elsewhere")
    contracts.check_fails(data_set, ShardsNotFoundError, r"acts000002\.bin")
    (shards / "elsewhere").rename(away)
    data_set.set_epoch(0)
    contracts.assert_same(list(data_set), wanted)


def test_values_of_all_kinds_are_handed_on(make_shards):
    """NaN, infinities and denormals are data: they are not this library's to judge."""
    shards = make_shards(Spec(n_examples=4, layers=(3,)))
    bits = np.random.default_rng(0).integers(0, 2**32, (4, 7, 8), dtype=np.uint32)
    bits.tofile(shards / "acts000000.bin")
    batch = next(iter(OrderedActivations(OrderedConfig(shards=shards, layer=3, tokens="all"))))
    assert batch["act"].numpy().tobytes() == bits.tobytes()


def test_an_error_does_not_keep_what_read(make_shards):
    """What is raised names frames that hold the engine; held by the engine in turn, none of them would ever go."""
    shards = make_shards(Spec(n_examples=200, examples_per_shard=20))
    data_set = ShuffledActivations(ShuffledConfig(shards, layer=3, batch_size=16, buffer_size=4))
    iterator = iter(data_set)
    next(iterator)
    for path in shards.glob("acts*.bin"):
        path.chmod(0o644)
        os.truncate(path, 100)
    # What was open then, or what was not.
    with pytest.raises(SaevTorchError, match=r"became shorter|is truncated"):
        list(iterator)
    del iterator
    gc.collect()
    assert [found for found in gc.get_objects() if type(found) is Engine] == []
