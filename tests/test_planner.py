"""Predicted against measured: the real plan is asked where it puts samples, and nothing is read."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import plans
import pytest

from saev_torch import ConfigError, Metadata, ShuffledConfig
from saev_torch.order.predict import find_best, find_smallest, predict
from saev_torch.order.selection import Selection
from saev_torch.order.shuffle import ShufflePlan
from saev_torch.order.steps import Share


def make_metadata(**fields) -> Metadata:
    return Metadata(
        **{
            "family": "clip", "ckpt": "x", "layers": [3], "content_tokens_per_example": 196, "cls_token": True,
            "d_model": 768, "n_examples": 13_000, "max_tokens_per_shard": 500_000, "dataset": "/d", "data": "b3BhcXVl",
            **fields,
        }
    )  # fmt: skip


def measure(md: Metadata, cfg: ShuffledConfig, n_batches: int = 24) -> float:
    """Distinct examples in a batch, on average over batches spread over an epoch."""
    per_example = md.content_tokens_per_example * (len(md.layers) if cfg.layer == "all" else 1)
    plan = ShufflePlan(md.n_examples * per_example, cfg.batch_size, cfg.buffer_size, cfg.n_lanes, cfg.block_size, 5, 1)
    full = plan.n_samples // plan.batch_size
    # From the middles of equal parts of the epoch, as its ends are not like the rest; in all lanes.
    batches = np.unique(((np.arange(n_batches) + 0.5) * full / n_batches).astype(int))
    return float(np.mean([len(np.unique(plan.locate(int(b)) // per_example)) for b in batches]))


GRID = list(
    itertools.product(
        # Block sizes, buffers, and shapes of data.
        [None, 1, 16, 64, 256],
        [8, 64, 256],
        ["vision", "text", "layers"],
    )
)
SHAPES = {
    "vision": ({}, {"layer": 3, "batch_size": 4096}),
    "text": ({"content_tokens_per_example": 1000, "n_examples": 3000}, {"layer": 3, "batch_size": 8192}),
    "layers": (
        {"layers": [1, 2, 3], "content_tokens_per_example": 50, "n_examples": 8000},
        {"layer": "all", "batch_size": 2048},
    ),
}


@pytest.mark.parametrize(("block_size", "buffer_size", "shape"), GRID)
def test_predicted_quality_is_measured(block_size: int | None, buffer_size: int, shape: str) -> None:
    md_fields, cfg_fields = SHAPES[shape]
    md = make_metadata(**md_fields)
    cfg = ShuffledConfig(shards="x", buffer_size=buffer_size, block_size=block_size, **cfg_fields)
    assert predict(md, cfg).distinct_examples == pytest.approx(measure(md, cfg), rel=0.03)


def test_predicted_quality_at_the_defaults() -> None:
    md = make_metadata()
    cfg = ShuffledConfig(shards="x", layer=3)
    found = predict(md, cfg)
    assert found.distinct_examples == pytest.approx(measure(md, cfg), rel=0.03)
    assert 0 < found.quality < 1


@pytest.mark.parametrize("n_examples", [3, 40, 300])
def test_small_data_are_mixed_whole(n_examples: int) -> None:
    md = make_metadata(n_examples=n_examples)
    cfg = ShuffledConfig(shards="x", layer=3, batch_size=1024)
    assert predict(md, cfg).distinct_examples == pytest.approx(measure(md, cfg), rel=0.03)
    assert predict(md, cfg).quality == pytest.approx(1, abs=0.01)


def test_memory_is_that_of_the_buffer_and_does_not_grow_with_readers() -> None:
    md = make_metadata()
    cfg = ShuffledConfig(shards="x", layer=3)
    batch_nbytes = 16384 * 768 * 4
    for n_readers in (1, 2, 4, 8):
        assert predict(md, cfg, n_readers).memory_nbytes == pytest.approx(64 * batch_nbytes, rel=0.15)


def test_readers_that_do_not_divide_the_lanes_read_more() -> None:
    md = make_metadata()
    cfg = ShuffledConfig(shards="x", layer=3)
    good, bad = predict(md, cfg, 4), predict(md, cfg, 3)
    # The chunks around the ends of the lanes are read in two visits; of large data they are few.
    assert good.read_per_byte == pytest.approx(1.17, abs=0.01)
    assert predict(make_metadata(n_examples=1_300_000), cfg, 4).read_per_byte == pytest.approx(1, abs=0.01)
    assert bad.read_per_byte > 1.2
    assert bad.read_nbytes < good.read_nbytes


@pytest.mark.parametrize(
    ("fields", "buffer_size", "n_readers"),
    [({}, 64, 1), ({}, 64, 3), ({}, 64, 64), ({}, 16, 2), ({"n_examples": 4000}, 64, 2), ({"layers": [3, 4]}, 64, 16)],
)
def test_predicted_reads_are_those_that_are_made(fields: dict[str, Any], buffer_size: int, n_readers: int) -> None:
    md, cfg = make_metadata(**fields), ShuffledConfig(shards="x", layer=3, buffer_size=buffer_size)
    selection = Selection(md, cfg.tokens, cfg.layer)
    plan = ShufflePlan(selection.n_samples, cfg.batch_size, cfg.buffer_size, cfg.n_lanes, cfg.block_size, 5, 1)
    shares = [Share(i, n_readers, plan.n_batches) for i in range(min(n_readers, 3))]
    _, n_bytes, n_used = np.sum([plans.count_reads(selection, plan, share) for share in shares], axis=0)
    assert predict(md, cfg, n_readers).read_per_byte == pytest.approx(n_bytes / n_used, rel=0.1)


def test_the_smallest_memory_for_a_wished_quality() -> None:
    md = make_metadata()
    cfg = ShuffledConfig(shards="x", layer=3, batch_size=4096)
    found = find_smallest(md, cfg, 0.8, min_read_nbytes=48 << 10)
    assert found.quality >= 0.8
    assert found.read_nbytes >= 48 << 10
    assert measure(md, found.cfg) / found.uniform_distinct == pytest.approx(found.quality, rel=0.03)
    # Less memory would not do.
    smaller = dataclasses.replace(found.cfg, buffer_size=found.cfg.buffer_size // 2 // 8 * 8)
    assert predict(md, smaller).quality < 0.8
    with pytest.raises(ConfigError, match="quality"):
        find_smallest(md, cfg, 1.5)


def test_the_best_in_a_given_memory() -> None:
    md = make_metadata()
    cfg = ShuffledConfig(shards="x", layer=3)
    found = find_best(md, cfg, 8 << 30)
    assert (4 << 30) < found.memory_nbytes <= 8 << 30
    assert found.quality > predict(md, cfg).quality
    assert measure(md, found.cfg) / found.uniform_distinct == pytest.approx(found.quality, rel=0.03)
    with pytest.raises(ConfigError, match="memory_nbytes"):
        find_best(md, cfg, 1)


def test_ignored_labels_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match="ignore_labels"):
        predict(make_metadata(), ShuffledConfig(shards="x", layer=3, ignore_labels=[1]))
