"""Code for `saev` runs here: its names, its errors, what its trainer asks of a loader, and its directories."""

import dataclasses
import logging
import math
import os
import pathlib
import pickle
import subprocess
import sys

import factory
import numpy as np
import pytest
import torch
from conftest import wait_until
from factory import oracle, oracle_labels
from test_metadata import PROTOCOLS
from torch.utils.data import ConcatDataset, DataLoader

import saev_torch
import saev_torch.compat as data
from saev_torch import (
    ActivationBatch,
    ConfigError,
    EmptyShardError,
    FormatError,
    IndexedConfig,
    IndexedDataset,
    IndexMap,
    LabelsNotFoundError,
    Metadata,
    OrderedActivations,
    OrderedConfig,
    OrderedDataLoader,
    SaevTorchError,
    ShardInfo,
    ShardsNotFoundError,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    compute_statistics,
    repack,
    verify,
)
from saev_torch.compat.shards import pixel_to_patch_labels

# What the published page of `saev.data` documents, by module, and for classes what it says of them.
PAGE = {
    "": {
        "IndexedConfig": ["shards", "tokens", "layer", "debug"],
        "IndexedDataset": ["Example", "cfg", "md", "d_model", "transform", "index_map"],
        "OrderedConfig": ["shards", "tokens", "layer", "batch_size", "batch_timeout_s", "drop_last", "buffer_size"],
        "OrderedDataLoader": [
            "ExampleBatch",
            "cfg",
            "md",
            "n_batches",
            "n_samples",
            "batch_size",
            "drop_last",
            "shutdown",
        ],
        "ShuffledConfig": ["shards", "layer", "scale_norm", "ignore_labels", "min_buffer_fill", "use_tmpdir", "seed"],
        "ShuffledDataLoader": [
            "ExampleBatch",
            "metadata",
            "manager_pid",
            "reservoir",
            "n_batches",
            "n_samples",
            "shutdown",
        ],
        "Metadata": ["load", "dump", "hash", "make_data_cfg", "n_shards", "examples_per_shard", "tokens_per_example"],
        "PixelAgg": ["MAJORITY", "PREFER_FG"],
        "make_ordered_config": [],
    },
    "shards": {
        "Index": ["idx", "example_idx", "content_token_idx", "shard_idx", "layer_idx_in_shard", "token_idx_in_shard"],
        "IndexMap": ["md", "tokens", "layer", "layer_idx_lookup", "from_global"],
        "Metadata": ["shard_shape"],
        "PixelAgg": [],
        "Shard": ["name", "n_examples"],
        "ShardInfo": ["load", "dump", "append", "validate"],
        "ShardWriter": ["write_batch", "flush", "shards_dir", "md"],
        "pixel_to_patch_labels": [],
    },
    "indexed": {"Config": ["layer"], "Dataset": ["Example", "transform"]},
    "ordered": {"Config": ["batch_size"], "DataLoader": ["ExampleBatch"]},
    "shuffled": {"Config": ["n_threads"], "DataLoader": ["ExampleBatch"]},
}


def make_page(make_shards):
    """Something of each class of the page, whose attributes are looked up."""
    shards = make_shards()
    made = {
        "IndexedDataset": data.IndexedDataset(data.IndexedConfig(shards, layer=3)),
        "OrderedDataLoader": data.OrderedDataLoader(data.OrderedConfig(shards, layer=3)),
        "ShuffledDataLoader": data.ShuffledDataLoader(data.ShuffledConfig(shards, layer=3)),
        "Metadata": data.Metadata.load(shards),
        "IndexMap": data.shards.IndexMap(data.Metadata.load(shards), "content", 3),
        "ShardWriter": data.shards.ShardWriter(shards.parent, data.Metadata.load(shards)),
        "Shard": data.shards.ShardInfo.load(shards)[0],
    }
    made["Index"] = made["IndexMap"].from_global(0)
    return made | {"Dataset": made["IndexedDataset"], "DataLoader": made["ShuffledDataLoader"]}


def test_every_name_of_the_page(make_shards):
    made = make_page(make_shards)
    for module, names in PAGE.items():
        home = getattr(data, module) if module else data
        assert set(names) <= set(home.__all__), module
        assert home.__all__ == sorted(home.__all__)
        for name, attributes in names.items():
            kind = getattr(home, name)
            of = made.get(name, kind() if "Config" in name else kind)
            missing = [attribute for attribute in attributes if not hasattr(of, attribute)]
            assert not missing, f"{module}.{name}"


def test_the_submodules_have_the_same_classes():
    assert data.indexed.Config is data.IndexedConfig is saev_torch.IndexedConfig
    assert data.indexed.Dataset is data.IndexedDataset is saev_torch.IndexedDataset
    assert data.ordered.Config is data.OrderedConfig is saev_torch.OrderedConfig
    assert data.ordered.DataLoader is data.OrderedDataLoader is saev_torch.OrderedDataLoader
    assert data.shuffled.Config is data.ShuffledConfig is saev_torch.ShuffledConfig
    assert data.shuffled.DataLoader is data.ShuffledDataLoader is saev_torch.ShuffledDataLoader
    assert data.shards.Metadata is data.Metadata is saev_torch.Metadata


# Written for the modules of saev, as its users write: only the line of the import is another.
USER_CODE = """
import dataclasses
import pathlib

import torch

{imports}


def write(root: pathlib.Path, acts, labels) -> pathlib.Path:
    md = shards.Metadata(
        family="clip", ckpt="ViT-B-32/openai", layers=(2, 5), content_tokens_per_example=6, cls_token=True, d_model=8,
        n_examples=len(acts), max_tokens_per_shard=56, data="b3BhcXVl", dataset=pathlib.Path("/data"),
        pixel_agg=shards.PixelAgg.PREFER_FG,
    )
    md.dump(root)
    with shards.ShardWriter(root, md) as writer:
        for i in range(0, len(acts), 3):
            writer.write_batch(acts[i : i + 3], i, patch_labels=labels[i : i + 3])
    return root / md.hash


def collect(directory: pathlib.Path):
    md = shards.Metadata.load(directory)
    info = shards.ShardInfo.load(directory)
    assert sum(shard.n_examples for shard in info) == md.n_examples
    index_map = shards.IndexMap(md, "content", md.layers[1])
    ds = indexed.Dataset(indexed.Config(shards=directory, tokens="content", layer=md.layers[1]))
    assert len(ds) == len(index_map) == md.n_examples * md.content_tokens_per_example
    cfg = shuffled.Config(shards=directory, tokens="content", layer=md.layers[1], batch_size=16, n_threads=2, seed=3)
    found = torch.zeros(len(ds), ds.d_model)
    dataloader = shuffled.DataLoader(cfg)
    for batch in dataloader:
        rows = batch["example_idx"] * md.content_tokens_per_example + batch["token_idx"]
        found[rows] = batch["act"]
        assert 0.0 <= dataloader.reservoir.fill() <= 1.0
    dataloader.shutdown()
    for i in range(0, len(ds), 7):
        at, example = index_map.from_global(i), ds[i]
        assert (example["example_idx"], example["token_idx"]) == (at.example_idx, at.content_token_idx)
        assert torch.equal(example["act"], found[i])
    params = {{f.name: getattr(cfg, f.name) for f in dataclasses.fields(ordered.Config) if hasattr(cfg, f.name)}}
    in_order = list(ordered.DataLoader(ordered.Config(**params)))
    assert torch.equal(torch.cat([batch["act"] for batch in in_order]), found)
    return found, torch.cat([batch["token_labels"] for batch in in_order])
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import saev_torch.compat as data\nfrom saev_torch.compat import indexed, ordered, shards, shuffled",
        "import saev_torch.compat as data\nshards, indexed = data.shards, data.indexed\n"
        "ordered, shuffled = data.ordered, data.shuffled",
    ],
)
def test_code_for_its_modules_runs(tmp_path, imports):
    spec = factory.Spec(n_examples=11, layers=(2, 5))
    acts, labels = torch.from_numpy(oracle(spec)), torch.from_numpy(oracle_labels(spec))
    names = {"__name__": "user"}
    exec(compile(USER_CODE.format(imports=imports), "user.py", "exec"), names)
    (tmp_path / "saev" / "shards").mkdir(parents=True)
    found, found_labels = names["collect"](names["write"](tmp_path / "saev" / "shards", acts, labels))
    assert torch.equal(found, acts[:, 1, 1:].reshape(-1, 8))
    assert torch.equal(found_labels, labels.reshape(-1).long())


INSTALLED = """
import saev_torch.compat
saev_torch.compat.install()
saev_torch.compat.install()
import saev.data
import saev.data.shards
from saev.data import ShuffledConfig, OrderedDataLoader, shuffled
from saev.data.ordered import Config, DataLoader
assert {name: getattr(saev.data, name) for name in saev_torch.compat.__all__} == {
    name: getattr(saev_torch.compat, name) for name in saev_torch.compat.__all__
}
assert saev.data.shards is saev_torch.compat.shards
assert (ShuffledConfig, OrderedDataLoader) == (saev_torch.ShuffledConfig, saev_torch.OrderedDataLoader)
assert (Config, DataLoader, shuffled.Config) == (saev_torch.OrderedConfig, OrderedDataLoader, ShuffledConfig)
"""
WITH_THE_PACKAGE = """
from saev.data import datasets
from saev.framework import Loader, Images
assert Loader is saev_torch.ShuffledDataLoader
assert Images is datasets.Images
assert saev.data.Metadata is saev_torch.Metadata
"""


def run_python(code, **env):
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=os.environ | env)


def make_saev(root):
    """A package of that name, of which `saev.data` may not be imported."""
    for path, text in {
        "saev/__init__.py": "",
        "saev/framework.py": "from .data import ShuffledDataLoader as Loader\nfrom .data.datasets import Images\n",
        "saev/data/__init__.py": "raise RuntimeError('imported')",
        "saev/data/datasets.py": "class Images: pass\n",
        "saev/data/shards.py": "raise RuntimeError('imported')",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("is_there", [False, True])
def test_install(tmp_path, is_there):
    if is_there:
        make_saev(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run_python(INSTALLED + WITH_THE_PACKAGE * is_there, PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_install_comes_too_late(tmp_path):
    make_saev(tmp_path)
    (tmp_path / "saev" / "data" / "__init__.py").write_text("")
    code = "import saev.data, saev_torch.compat\nsaev_torch.compat.install()"
    done = run_python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert "ConfigError: saev_torch.compat.install: expected to be called before anything imports" in done.stderr


# 8. Errors


def every_reader(shards, **fields):
    layer = {"layer": 3} | fields
    return [
        lambda: Metadata.load(shards),
        lambda: ShardInfo.load(shards),
        lambda: IndexedDataset(IndexedConfig(shards, **layer)),
        lambda: OrderedDataLoader(OrderedConfig(shards, **layer)),
        lambda: ShuffledDataLoader(ShuffledConfig(shards, **layer)),
        lambda: OrderedActivations(OrderedConfig(shards, **layer)),
        lambda: ShuffledActivations(ShuffledConfig(shards, **layer)),
        lambda: compute_statistics(IndexedConfig(shards, **layer), cache=False),
    ]


def test_a_missing_directory(tmp_path):
    for read in every_reader(tmp_path / "nowhere"):
        with pytest.raises(RuntimeError, match=r"^Activations are not saved at .*nowhere") as caught:
            read()
        assert isinstance(caught.value, ShardsNotFoundError)
        assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("name", ["acts000001.bin", "metadata.json", "shards.json"])
def test_a_missing_file(make_shards, name):
    shards = make_shards()
    (shards / name).unlink()
    for read in every_reader(shards)[2:]:
        with pytest.raises(RuntimeError, match=rf"^Activations are not saved at .*{name}") as caught:
            read()
        assert isinstance(caught.value, ShardsNotFoundError)
        assert isinstance(caught.value, FileNotFoundError)


def test_labels_that_are_absent(make_shards):
    cfg = ShuffledConfig(make_shards(labels=False), layer=3, ignore_labels=[0])
    for read in (ShuffledDataLoader, ShuffledActivations, lambda cfg: compute_statistics(cfg, cache=False)):
        with pytest.raises(FileNotFoundError, match=r"labels\.bin: expected labels") as caught:
            read(cfg)
        assert isinstance(caught.value, ConfigError)
        assert isinstance(caught.value, LabelsNotFoundError)


def test_an_empty_shard(make_shards):
    shards = make_shards()
    (shards / "acts000001.bin").write_bytes(b"")
    readers = [*every_reader(shards)[2:], lambda: ShardInfo.load(shards).validate(shards)]
    for read in readers:
        with pytest.raises(FileNotFoundError, match=r"acts000001\.bin: expected 1792 .*got 0: it is trunc") as caught:
            read()
        assert isinstance(caught.value, FormatError)
        assert isinstance(caught.value, EmptyShardError)
    (shards / "acts000001.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="got 1: it is truncated") as caught:
        readers[0]()
    assert not isinstance(caught.value, FileNotFoundError)


def all_errors(kind=SaevTorchError):
    return {kind}.union(*map(all_errors, kind.__subclasses__()))


def test_errors_are_made_of_a_string_and_pickle():
    # torch raises a worker's exception again in the parent process, from its text.
    for kind in all_errors():
        for err in (kind("what is wrong"), pickle.loads(pickle.dumps(kind("what is wrong")))):
            assert type(err) is kind
            assert str(err) == "what is wrong"


# 7. Layers that are counted from the end


def messages(caplog, make):
    # What is said of layers; of ranks something is said, too, if nothing was yet.
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="saev_torch"):
        make()
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    return [(level, message) for level, message in found if "layer" in message]


def test_a_layer_counted_from_the_end_is_told(make_shards, caplog):
    shards = make_shards(layers=(3, 7, 9))
    for make, kind in (
        (lambda **fields: IndexedDataset(IndexedConfig(shards, **fields)), "IndexedConfig"),
        (lambda **fields: OrderedDataLoader(OrderedConfig(shards, **fields)), "OrderedConfig"),
        (lambda **fields: compute_statistics(IndexedConfig(shards, **fields), cache=False), "IndexedConfig"),
    ):
        for fields, level, said in (
            (
                {},
                "WARNING",
                f"{kind}.layer: -2 is layer 7, counted from the end of the recorded layers [3, 7, 9]; that is",
            ),
            (
                {"layer": -1},
                "INFO",
                f"{kind}.layer: -1 is layer 9, counted from the end of the recorded layers [3, 7, 9]",
            ),
            ({"layer": (-3, 9, -2)}, "INFO", f"{kind}.layer: -3 is layer 3, -2 is layer 7, counted from the end"),
        ):
            ((found_level, found),) = messages(caplog, lambda make=make, fields=fields: make(**fields))
            assert found_level == level
            assert found.startswith(said)
        for quiet in ({"layer": 7}, {"layer": "all"}, {"layer": (9, 3)}):
            assert messages(caplog, lambda make=make, quiet=quiet: make(**quiet)) == []


def test_a_layer_that_was_recorded_as_negative_is_read_without_a_word(make_shards, caplog):
    assert messages(caplog, lambda: OrderedDataLoader(OrderedConfig(make_shards(layers=(-2,))))) == []
    cfg = ShuffledConfig(make_shards(layers=(-1, -2)))
    assert messages(caplog, lambda: ShuffledDataLoader(cfg)) == []
    shuffled = ShuffledConfig(make_shards(layers=(3, 7)), layer=-2)
    ((level, said),) = messages(caplog, lambda: ShuffledDataLoader(shuffled))
    assert (level, said.partition(",")[0]) == ("INFO", "ShuffledConfig.layer: -2 is layer 3")


def test_workers_do_not_tell_it_again(make_shards, capfd, caplog):
    loader = OrderedDataLoader(OrderedConfig(make_shards(), layer=-1, batch_size=8), num_workers=2)
    assert len(messages(caplog, lambda: list(loader))) == 0
    assert "counted" not in capfd.readouterr().err


# 9. What loaders, data sets and writers have


def test_the_types_of_batches_and_samples(make_shards):
    shards = make_shards()
    loaders = [ShuffledDataLoader(ShuffledConfig(shards, layer=3)), OrderedDataLoader(OrderedConfig(shards, layer=3))]
    for loader in loaders:
        batch = next(iter(loader))
        assert type(batch) is type(loader).ExampleBatch is ActivationBatch
        assert loader.ExampleBatch(act=batch["act"], example_idx=batch["example_idx"]).keys() == {"act", "example_idx"}
        loader.shutdown()
    ds = IndexedDataset(IndexedConfig(shards, layer=3))
    assert type(ds[0]) is IndexedDataset.Example
    assert ds.Example(act=ds[0]["act"], example_idx=0, token_idx=0)["token_idx"] == 0


def test_layer_idx_lookup(make_shards):
    md = Metadata.load(make_shards(layers=(7, 3, -2)))
    for tokens, layer in (("content", 3), ("all", "all"), ("special", (-2, 7))):
        assert IndexMap(md, tokens, layer).layer_idx_lookup == {7: 0, 3: 1, -2: 2}


def test_nobody_manages(make_shards):
    shards = make_shards()
    for loader in (
        ShuffledDataLoader(ShuffledConfig(shards, layer=3, batch_size=4), num_workers=1),
        OrderedDataLoader(OrderedConfig(shards, layer=3, batch_size=4)),
    ):
        assert loader.manager_pid == -1
        next(iter(loader))
        assert loader.manager_pid == -1
        loader.shutdown()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_reservoir_is_as_full_as_it_is(make_shards, num_workers):
    shards = make_shards(n_examples=200, content_tokens=16, examples_per_shard=50)
    cfg = ShuffledConfig(shards, layer=3, batch_size=16, buffer_size=16, n_lanes=4, min_buffer_fill=1.0)
    loader = ShuffledDataLoader(cfg, num_workers=num_workers)
    assert loader.reservoir.fill() == 0.0
    batches = iter(loader)
    next(batches)
    fills = [loader.reservoir.fill() for _ in zip(range(60), batches, strict=False)]
    assert 0.2 < max(fills) <= 1.0
    assert min(fills) >= 0.0
    # Workers may hand out another one between the two questions, until as many are ready as they may have.
    wait_until(lambda: loader.metrics()["loader/buffer_fill"] == loader.reservoir.fill())
    loader.shutdown()
    assert loader.reservoir.fill() == 0.0


def test_what_was_read_of_the_buffer_is_counted_to_the_end(make_shards):
    """What is added when it was read is taken away when it is handed out: nothing is left after the last batch."""
    shards = make_shards(n_examples=40, content_tokens=16)
    kinds = [
        ShuffledActivations(ShuffledConfig(shards, layer=3, batch_size=24, buffer_size=8, ignore_labels=[2])),
        ShuffledActivations(ShuffledConfig(shards, layer="all", batch_size=24, buffer_size=8)),
        ShuffledActivations(ShuffledConfig(shards, layer=(3, 7), batch_size=24, buffer_size=8), rank=1, world_size=3),
        OrderedActivations(OrderedConfig(shards, layer=3, batch_size=24, drop_last=True)),
    ]
    for ds in kinds:
        engine = ds._open_engine(ds._plan(0), ds.cursor.begin())
        try:
            engine.start()
            fills = []
            while (opened := engine.next_batch()) is not None:
                fills.append(engine.batches.fill)
                del opened
            assert engine.batches._n_loaded == 0
            assert len(fills) > 4
            # In file order a consumer may be as fast as the readers.
            assert max(fills) > 0 or isinstance(ds, OrderedActivations)
        finally:
            engine.close()


class Doubled(IndexedDataset):
    """A user's own, who wants something else of an activation."""

    def transform(self, act):
        return 2 * super().transform(act)


def test_transform(make_shards):
    cfg = IndexedConfig(make_shards(), layer=7)
    plain, doubled = IndexedDataset(cfg), Doubled(cfg)
    act = np.arange(8, dtype=np.float32)
    made = plain.transform(act)
    assert made.dtype == torch.float32
    act[0] = 99
    assert made.tolist() == list(range(8))
    assert torch.equal(doubled[5]["act"], 2 * plain[5]["act"])
    assert {key: value for key, value in doubled[5].items() if key != "act"} == {
        key: value for key, value in plain[5].items() if key != "act"
    }
    expected = torch.from_numpy(oracle(plain.metadata)[:, 1, 1:].reshape(-1, 8))
    for batch in (doubled.__getitems__([3, 1]), next(iter(DataLoader(doubled, batch_size=2, sampler=[3, 1])))):
        acts = batch["act"] if isinstance(batch, dict) else torch.stack([sample["act"] for sample in batch])
        assert torch.equal(acts, 2 * expected[[3, 1]])
    both = next(iter(DataLoader(ConcatDataset([plain, doubled]), batch_size=2, sampler=[3, len(plain) + 3])))
    assert torch.equal(both["act"], torch.stack([expected[3], 2 * expected[3]]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_transform_gets_float32_of_what_is_stored_in_16_bits(make_shards, dtype):
    cfg = IndexedConfig(make_shards(dtype=dtype), layer=7, act_dtype="stored")
    found = Doubled(cfg)[5]["act"]
    assert found.dtype == torch.float32
    assert torch.equal(found, 2 * IndexedDataset(cfg)[5]["act"].float())


def test_transform_is_not_called_where_it_is_not_overridden(make_shards):
    ds = IndexedDataset(IndexedConfig(make_shards(), layer=7))
    batch = next(iter(DataLoader(ds, batch_size=4)))
    assert type(batch) is ActivationBatch
    assert not isinstance(ds.__getitems__([0, 1]), list)


@pytest.mark.parametrize(("height", "width", "size"), [(4, 6, 2), (32, 32, 8)])
def test_pixel_to_patch_labels(height, width, size):
    seg = np.random.default_rng(0).integers(0, 3, (height, width)).astype(np.uint8)
    n_patches = height * width // size**2
    expected = []
    for top in range(0, height, size):
        for left in range(0, width, size):
            counts = np.bincount(seg[top : top + size, left : left + size].ravel(), minlength=3)
            expected.append((counts.argmax(), counts[1:].argmax() + 1 if counts[1:].any() else 0))
    for agg, column in ((data.PixelAgg.MAJORITY, 0), (data.PixelAgg.PREFER_FG, 1)):
        found = pixel_to_patch_labels(seg, n_patches, size, agg)
        assert found.dtype == torch.uint8
        assert found.tolist() == [labels[column] for labels in expected]
    with pytest.raises(ValueError, match="n_patches: expected as many as the image has"):
        pixel_to_patch_labels(seg, n_patches + 1, size)


# 10. Directories of every protocol


@pytest.mark.parametrize("fields", PROTOCOLS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_directories_of_every_protocol_are_read(make_shards, fields):
    spec = factory.Spec(**fields)
    shards = make_shards(spec)
    md = data.Metadata.load(shards)
    assert md.hash == shards.name == spec.hash()
    acts, labels = (
        torch.from_numpy(oracle(spec)[:, 1, 1:].reshape(-1, 8)),
        torch.from_numpy(oracle_labels(spec).ravel()),
    )
    data.shards.ShardInfo.load(shards).validate(shards)
    ds = data.IndexedDataset(data.IndexedConfig(shards, layer=7))
    assert all(torch.equal(ds[i]["act"], acts[i]) for i in range(len(ds)))
    (ordered,) = data.OrderedDataLoader(data.OrderedConfig(shards, layer=7))
    assert torch.equal(ordered["act"], acts)
    assert torch.equal(ordered["token_labels"], labels.long())
    loader = data.ShuffledDataLoader(data.ShuffledConfig(shards, layer=7, batch_size=16))
    found = torch.cat([torch.column_stack([b["example_idx"] * 6 + b["token_idx"], b["act"]]) for b in loader])
    assert torch.equal(found[found[:, 0].argsort(), 1:], acts)
    # A state says which directory it belongs to, by that hash.
    state = loader.state_dict()
    data.ShuffledDataLoader(loader.cfg).load_state_dict(state)


@pytest.mark.parametrize("fields", PROTOCOLS[1:], ids=lambda fields: "-".join(map(str, fields.values())))
def test_directories_of_older_protocols_are_written_anew(make_shards, tmp_path, fields):
    shards = make_shards(**fields)
    assert verify(shards).ok
    written = repack(shards, tmp_path / "root")
    md = Metadata.load(written)
    assert (md.protocol, len(md.hash), md.hash) == ("2.1", 8, written.name)
    assert verify(written).ok
    old, new = (next(iter(OrderedActivations(OrderedConfig(path, layer="all")))) for path in (shards, written))
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_the_rest_of_the_names(make_shards, tmp_path):
    shards = make_shards()
    info = data.shards.ShardInfo.load(shards)
    copy = data.shards.ShardInfo()
    for shard in info:
        copy.append(data.shards.Shard(name=shard.name, n_examples=shard.n_examples))
    copy.dump(tmp_path)
    assert (tmp_path / "shards.json").read_bytes() == (shards / "shards.json").read_bytes()
    shuffled = data.ShuffledConfig(shards, layer=3, batch_size=5, seed=3)
    assert data.make_ordered_config(shuffled, drop_last=True) == data.OrderedConfig(
        shards, layer=3, batch_size=5, drop_last=True
    )
    at = data.shards.IndexMap(data.Metadata.load(shards), "all", "all").from_global(20)
    assert at == data.shards.Index(
        idx=20,
        example_idx=1,
        content_token_idx=5,
        shard_idx=0,
        example_idx_in_shard=1,
        layer_idx_in_shard=0,
        token_idx_in_shard=6,
    )


def test_the_published_default_of_shards_is_a_path(monkeypatch):
    monkeypatch.setenv("SAEV_SCRATCH", "/scratch")
    assert data.ShuffledConfig().shards == pathlib.Path("/scratch/saev/shards/abcdefg")
    assert math.isclose(data.OrderedConfig().batch_timeout_s, 30.0)
    assert dataclasses.is_dataclass(data.indexed.Config)
