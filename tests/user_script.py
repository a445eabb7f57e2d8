"""What a user would write, with all that is accepted; checked by mypy, see test_installed.py, and not run."""

import os
from pathlib import Path
from typing import assert_type

import torch
from torch.utils.data import DataLoader

from saev_torch import (
    ActivationBatch,
    Examples,
    IndexedConfig,
    IndexedDataset,
    Metadata,
    OrderedActivations,
    OrderedConfig,
    OrderedDataLoader,
    ShardWriter,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    UniformBatches,
    compute_statistics,
    export_array,
    import_arrays,
    make_mask,
    make_ordered_config,
    record,
    repack,
    verify,
)

md = Metadata(
    family="clip",
    ckpt="ViT-B-16",
    layers=[6, 11],
    content_tokens_per_example=196,
    cls_token=True,
    d_model=768,
    n_examples=32,
    max_tokens_per_shard=500_000,
    dataset="/data/images",
    data="",
)
with ShardWriter(os.environ["SCRATCH"] + "/saev/shards", md) as writer:
    writer.write_batch(torch.randn(16, 2, 197, 768), 0)
shards: Path = writer.shards_dir

cfg = ShuffledConfig(shards="here", layer=11, ignore_labels=(3, 4), scale_norm=True, examples=Examples.span(0, 5))
several = ShuffledConfig(shards=shards, layer=[6, 11], mask="mask.npy", batch_timeout_s=3)
ordered = OrderedConfig(shards="here", layer="all")
ordered = make_ordered_config(cfg, batch_size=3)
assert_type(cfg.shards, Path)
assert_type(several.mask, Path | None)
assert_type(md.layers, tuple[int, ...])

loader = ShuffledDataLoader(cfg, num_workers=2)
for batch in loader:
    assert_type(batch, ActivationBatch)
    x = batch["act"]
    assert_type(x, torch.Tensor)
for batch in OrderedDataLoader(ordered):
    assert_type(batch, ActivationBatch)
for batch in ShuffledActivations(cfg):
    assert_type(batch, ActivationBatch)
for batch in OrderedActivations(ordered):
    assert_type(batch, ActivationBatch)
assert_type(loader.scale, float | None)
loader.load_state_dict(loader.state_dict())
plain = DataLoader(ShuffledActivations(cfg), num_workers=2)

samples = IndexedDataset(IndexedConfig(shards="here", layer=3))
print(samples[3]["act"], DataLoader(samples, batch_sampler=UniformBatches(len(samples), 16384)))
compute_statistics(cfg)
make_mask("here", "there.npy", norm_above=3, positions=[0])
repack("here", "there", layers=(3,), examples=range(4))
import_arrays("acts.npy", "there", tokens_per_example=128)
export_array("here", "acts.npy", examples=[3, 4])
record(
    torch.nn.Linear(3, 3), plain, layers=[1, -1], shards_root="here", cls_token=True, family="f", ckpt="c", dataset="d"
)
if not verify("here").ok:
    Metadata.load("here").dump("there")
