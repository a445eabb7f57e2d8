"""Shard directories of symbolic links, as the cache of Hugging Face has them: refused, or followed on request."""

import hashlib
import os
import pickle
from pathlib import Path

import contracts
import numpy as np
import pytest
from factory import Spec, oracle, oracle_labels
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    FormatError,
    IndexedConfig,
    IndexedDataset,
    Metadata,
    OrderedActivations,
    OrderedConfig,
    ShardInfo,
    ShardsNotFoundError,
    ShardWriter,
    ShuffledActivations,
    ShuffledConfig,
    WriteError,
    compute_statistics,
    make_ordered_config,
    verify,
)
from saev_torch.__main__ import main
from saev_torch.format.checksums import Checksums, checksums_digest
from saev_torch.reading.store import ShardStore

SPEC = Spec(n_examples=21, content_tokens=6, layers=(3, 7), examples_per_shard=5)
REVISION = "0123456789abcdef0123456789abcdef01234567"
VARIABLE = "SAEV_TORCH_ALLOW_LINKS"
FILES = ["metadata.json", "shards.json", "acts000000.bin", "acts000004.bin", "labels.bin"]


def write(root: Path) -> Path:
    """A directory that this package wrote, with checksums."""
    with ShardWriter(root, Metadata(**SPEC.metadata())) as writer:
        writer.write_batch(oracle(SPEC), 0, oracle_labels(SPEC))
    return writer.shards_dir


def cache(shards: Path, hub: Path) -> Path:
    """Lay a directory out as `huggingface_hub` does: blobs by their digest, and a snapshot of relative links."""
    repo = hub / "datasets--somebody--activations"
    snapshot = repo / "snapshots" / REVISION / "saev" / "shards" / shards.name
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(REVISION)
    for path in shards.iterdir():
        raw = path.read_bytes()
        blob = repo / "blobs" / hashlib.sha256(raw).hexdigest()
        blob.write_bytes(raw)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return cache(write(tmp_path / "written"), tmp_path / "hub")


def test_refused_unless_asked_for(snapshot: Path) -> None:
    """The message says what to do, whichever file comes first."""
    for cfg in (IndexedConfig(shards=snapshot, layer=3), OrderedConfig(shards=snapshot, layer=3)):
        data_set = IndexedDataset if isinstance(cfg, IndexedConfig) else OrderedActivations
        with pytest.raises(
            FormatError,
            match=rf"metadata\.json: expected a regular file, got a symbolic link; .*allow_links=True.*{VARIABLE}=1",
        ):
            data_set(cfg)
    with pytest.raises(FormatError, match="allow_links=True"):
        compute_statistics(IndexedConfig(shards=snapshot, layer=3))


@pytest.mark.parametrize("name", FILES)
def test_one_link_among_files(tmp_path: Path, name: str) -> None:
    """Each of the files is refused as a link, and followed, alone."""
    shards = write(tmp_path)
    (shards / name).rename(tmp_path / "elsewhere")
    (shards / name).symlink_to(tmp_path / "elsewhere")
    cfg = {"shards": shards, "layer": "all", "tokens": "all", "batch_size": 64}
    with pytest.raises(FormatError, match=rf"{name}: expected a regular file, got a symbolic link"):
        OrderedActivations(OrderedConfig(**cfg))
    followed = OrderedConfig(**cfg, allow_links=True)
    contracts.check_epoch(list(OrderedActivations(followed)), SPEC, followed)


@pytest.mark.parametrize("says", ["config", "environment"])
def test_followed(snapshot: Path, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All data sets, with workers, a copy, statistics, a state: as from the files themselves."""
    is_config = says == "config"
    if not is_config:
        monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shuffled = ShuffledConfig(shards=snapshot, layer=7, batch_size=16, ignore_labels=[2], allow_links=is_config)
    for cfg in (shuffled, make_ordered_config(shuffled, layer=3)):
        assert cfg.allow_links == is_config
        contracts.check_epoch(list(DataLoader(contracts.make_data_set(cfg), num_workers=2)), SPEC, cfg)
    data_set = pickle.loads(pickle.dumps(IndexedDataset(IndexedConfig(snapshot, layer=7, allow_links=is_config))))
    got = data_set.__getitems__(range(len(data_set))).batch["act"].numpy()
    assert (got == oracle(SPEC)[:, 1, 1:].reshape(-1, SPEC.d_model)).all()
    copied = ShuffledConfig(
        shards=snapshot, layer=7, batch_size=16, use_tmpdir=True, scale_norm=True, allow_links=is_config
    )
    data_set = ShuffledActivations(copied)
    assert len(list(data_set)) == len(data_set)
    copy = next((tmp_path / f"saev_torch-{os.getuid()}").glob("*/metadata.json")).parent
    assert {path.name for path in copy.iterdir()} == {path.name for path in snapshot.iterdir()}
    assert not [path for path in copy.iterdir() if path.is_symlink()]
    assert Metadata.load(snapshot, allow_links=is_config) == Metadata(**SPEC.metadata())
    info = ShardInfo.load(snapshot, allow_links=is_config)
    assert len(info) == 5
    info.validate(snapshot, allow_links=is_config)


def test_a_state_is_of_the_files(snapshot: Path, tmp_path: Path) -> None:
    """One that was saved where they are links goes on where they are not."""
    options = {"layer": 7, "batch_size": 16}
    linked = ShuffledActivations(ShuffledConfig(shards=snapshot, allow_links=True, **options))
    plain = ShuffledActivations(ShuffledConfig(shards=tmp_path / "written" / snapshot.name, **options))
    plain.load_state_dict(linked.state_dict())
    assert linked.state_dict() == plain.state_dict()


def test_commands(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For them there is the environment."""
    assert main(["verify", str(snapshot)]) != 0
    assert f"{VARIABLE}=1" in "".join(capfd.readouterr())
    monkeypatch.setenv(VARIABLE, "1")
    assert main(["verify", str(snapshot)]) == 0
    assert main(["inspect", str(snapshot)]) == 0
    assert main(["repack", str(snapshot), str(tmp_path / "new"), "--layers=7", "--quiet"]) == 0
    (made,) = (tmp_path / "new").iterdir()
    assert not [path for path in made.iterdir() if path.is_symlink()]
    monkeypatch.delenv(VARIABLE)
    assert verify(made).ok
    capfd.readouterr()


def test_statistics_are_those_of_the_target(snapshot: Path, cache_home: Path) -> None:
    """They are made again where the target is another file, and kept where the link is a new one."""
    cfg = IndexedConfig(shards=snapshot, layer=7, allow_links=True)
    before = compute_statistics(cfg)
    link = snapshot / "acts000000.bin"
    target = os.readlink(link)
    link.unlink()
    link.symlink_to(target)
    assert compute_statistics(cfg).fingerprint == before.fingerprint
    blob = link.resolve()
    rows = np.fromfile(blob, "<f4")
    blob.unlink()
    (rows + 1).tofile(blob)
    os.utime(blob, ns=(1, 1))
    after = compute_statistics(cfg)
    assert after.fingerprint != before.fingerprint
    assert after.total.mean_norm != before.total.mean_norm
    assert len(list((cache_home / "saev_torch").glob("*.npz"))) == 2


# What is not followed to


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "nowhere", "itself"])
@pytest.mark.parametrize("name", [*FILES, "checksums.json"])
def test_only_to_regular_files(snapshot: Path, tmp_path: Path, kind: str, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (snapshot / name).unlink()
    target = {"device": Path("/dev/zero"), "itself": snapshot / name}.get(kind, tmp_path / kind)
    (snapshot / name).symlink_to(target)
    expected = {
        "fifo": (FormatError, "expected a regular file, got a FIFO"),
        "folder": (FormatError, "expected a regular file, got a directory"),
        "device": (FormatError, "expected a regular file, got a character device"),
        "nowhere": (
            ShardsNotFoundError,
            r"got a symbolic link to '.+', which does not exist; is the download complete",
        ),
        "itself": (FormatError, "got a symbolic link that leads back to itself"),
    }[kind]
    if name == "checksums.json":
        assert checksums_digest(snapshot, allow_links=True) is None
        with pytest.raises(expected[0], match=rf"{name}: .*{expected[1]}"):
            Checksums.load(snapshot, Metadata(**SPEC.metadata()), allow_links=True)
        return
    with pytest.raises(expected[0], match=rf"{name}: .*{expected[1]}"):
        ShardStore(snapshot, allow_links=True)


def test_a_link_that_comes_later(snapshot: Path, tmp_path: Path) -> None:
    """A file is looked at again when it is opened."""
    store = ShardStore(tmp_path / "written" / snapshot.name)
    store.path(2).unlink()
    store.path(2).symlink_to(snapshot / "acts000002.bin")
    message = r"acts000002\.bin: expected a regular file, got a symbolic link"
    with pytest.raises(FormatError, match=message), store.opened(2):
        pass


@pytest.mark.parametrize("value", ["yes", "2", "true "])
def test_an_unclear_environment(snapshot: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=f"{VARIABLE}: expected 1 to follow symbolic links, or 0, got {value!r}"):
        ShardStore(snapshot)


@pytest.mark.parametrize("value", ["", "0"])
def test_the_environment_says_no(snapshot: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """That is the default; a config may say yes all the same."""
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(FormatError, match="got a symbolic link"):
        ShardStore(snapshot)
    assert ShardStore(snapshot, allow_links=True).has_labels


@pytest.mark.parametrize("config", [IndexedConfig, OrderedConfig, ShuffledConfig])
def test_a_flag(config: type, tmp_path: Path) -> None:
    assert config(shards=tmp_path).allow_links is False
    with pytest.raises(ConfigError, match="allow_links: expected True or False, got 'yes'"):
        config(shards=tmp_path, allow_links="yes")


# Writing


@pytest.mark.parametrize("name", [".acts000000.bin.part", ".journal-0-21", ".unfinished"])
def test_what_is_written_goes_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever the environment says: a resumed writer finds a link where it has left a file."""
    monkeypatch.setenv(VARIABLE, "1")
    md = Metadata(**SPEC.metadata())
    with pytest.raises(KeyError), ShardWriter(tmp_path, md, resume=True) as writer:  # noqa: PT012
        writer.write_batch(oracle(SPEC)[:7], 0)
        raise KeyError
    path = writer.shards_dir / name
    path.rename(tmp_path / "precious")
    before = (tmp_path / "precious").read_bytes()
    path.symlink_to(tmp_path / "precious")
    with pytest.raises((WriteError, FormatError)), ShardWriter(tmp_path, md, resume=True) as writer:
        writer.write_batch(oracle(SPEC), 0)
    assert (tmp_path / "precious").read_bytes() == before
