"""What a configuration will do, from metadata alone: how well it mixes, how it reads, and how much memory it takes."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from saev_torch.config import ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.metadata import Metadata
from saev_torch.order.mixing import expected_distinct
from saev_torch.order.runs import MAX_GAP_NBYTES, MAX_READ_NBYTES, MAX_READ_ROWS
from saev_torch.order.selection import Selection
from saev_torch.order.shuffle import ShufflePlan
from saev_torch.order.steps import Share, count_open_slots, slot_nbytes
from saev_torch.order.uniform import UniformPlan

_MAX_TABLE = 1 << 20

MIN_READ_NBYTES = 64 << 10
"""Reads on average at least this large are looked for, unless another size is asked for."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a configuration will do.

    Attributes:
        cfg: The configuration, its block size chosen.
        n_readers: Ranks times workers.
        distinct_examples: Distinct examples in a full batch, on average.
        uniform_distinct: The same of a uniform draw from the whole data set.
        read_nbytes: Mean size of a read in bytes, about.
        read_per_byte: Bytes read for each byte that is used, about: small gaps are read over.
        memory_nbytes: Bytes of batches that all readers hold together, without what a process itself takes.
    """

    cfg: ShuffledConfig
    n_readers: int
    distinct_examples: float
    uniform_distinct: float
    read_nbytes: float
    read_per_byte: float
    memory_nbytes: int

    @property
    def quality(self) -> float:
        """Distinct examples relative to a uniform draw: 1 is perfect."""
        return self.distinct_examples / self.uniform_distinct


def _make_plan(md: Metadata, cfg: ShuffledConfig) -> tuple[Selection, ShufflePlan]:
    unknown = {"ignore_labels": cfg.ignore_labels or None, "mask": cfg.mask}
    for name, value in unknown.items():
        if value is not None:
            raise ConfigError(
                f"{name}: expected none, because which tokens it leaves is not in the metadata, got {value}; plan "
                "without."
            )
    selection = Selection(md, cfg.tokens, cfg.layer, act_dtype=cfg.act_dtype, examples=cfg.examples)
    plan = ShufflePlan(selection.n_samples, cfg.batch_size, cfg.buffer_size, cfg.n_lanes, cfg.block_size, cfg.seed, 0)
    return selection, plan


def predict(md: Metadata, cfg: ShuffledConfig, n_readers: int = 1) -> Prediction:
    """Predict what a configuration will do; nothing is read.

    A full batch of a lane takes `1 / depth` of the samples of each of `depth` chunks out of `n_turns`, and of each
    super-block the lane has one block, at any place. So a run of o samples in one block is in a given batch with
    probability `depth / n_turns * (1 - (1 - 1 / depth)**o)`, and super-blocks are independent of each other.

    Args:
        md: Metadata of the shards.
        cfg: The configuration; its `shards` are not looked at.
        n_readers: Ranks times workers.

    Returns:
        The prediction.

    Raises:
        ConfigError: The configuration does not fit the metadata, or has ignored labels.
    """
    selection, plan = _make_plan(md, cfg)
    per_example = selection.n_samples // selection.n_examples
    if cfg.order == "uniform":
        return _predict_uniform(selection, cfg, n_readers, per_example)
    batch_size = min(plan.batch_size, plan.n_samples)
    read_nbytes, read_per_byte = _predict_reads(selection, plan, n_readers)
    shares = (Share(i, n_readers, plan.n_batches) for i in range(min(n_readers, plan.n_batches)))
    n_open = sum(min(count_open_slots(plan, s, cfg.buffer_size), -(-plan.n_batches // n_readers)) for s in shares)
    return Prediction(
        cfg=dataclasses.replace(cfg, block_size=plan.block_size),
        n_readers=n_readers,
        distinct_examples=min(_predict_distinct(plan, selection.n_examples, per_example), float(batch_size)),
        uniform_distinct=expected_distinct(selection.n_examples, per_example, batch_size),
        read_nbytes=read_nbytes,
        read_per_byte=read_per_byte,
        memory_nbytes=n_open * slot_nbytes(batch_size, selection.act_nbytes),
    )


def _predict_uniform(selection: Selection, cfg: ShuffledConfig, n_readers: int, per_example: int) -> Prediction:
    md = selection.md
    plan = UniformPlan(selection.n_samples, cfg.batch_size, cfg.seed, 0)
    size = min(plan.batch_size, plan.n_samples)
    n_reads, over = _scatter(size, size / max(1, plan.n_samples), MAX_GAP_NBYTES // md.row_nbytes)
    n_open = count_open_slots(plan, Share(0, n_readers, plan.n_batches), cfg.buffer_size)
    distinct = expected_distinct(selection.n_examples, per_example, size)
    return Prediction(
        cfg=cfg,
        n_readers=n_readers,
        distinct_examples=distinct,
        uniform_distinct=distinct,
        read_nbytes=(size + over) * md.row_nbytes / max(1.0, n_reads),
        read_per_byte=1 + over / max(1, size),
        memory_nbytes=n_readers * n_open * slot_nbytes(plan.batch_size, selection.sample_nbytes),
    )


def _scatter(n_rows: float, share: float, max_gap: int) -> tuple[float, float]:
    """Reads for rows of one run that are a share of it, drawn at random, and the rows in gaps that are read over."""
    run = n_rows / share
    gaps = np.arange(max(0, min(max_gap, math.ceil(run) - 2)) + 1)
    # Of each length, how many gaps there are; each saves a read.
    n_gaps = np.maximum(0.0, run - 1 - gaps) * share**2 * (1 - share) ** gaps
    return n_rows - float(n_gaps.sum()), float((n_gaps * gaps).sum())


def _predict_distinct(plan: ShufflePlan, n_examples: int, per_example: int) -> float:
    if plan.n_batches == 1:
        return float(n_examples)
    depth, n_lanes, size = plan.depth(0), plan.n_lanes, min(plan.batch_size, plan.n_samples)
    block = min(plan.block_size, size)
    width = block * n_lanes
    n_supers = (per_example - 1) // width + 2
    # An example's place among the super-blocks repeats; a spread of examples stands for all.
    n = min(n_examples, max(64, _MAX_TABLE // (n_supers * n_lanes)))
    first = (np.unique(np.linspace(0, n_examples - 1, n).astype(np.int64)) * per_example)[:, None, None]
    # [n, n_supers, n_lanes]: where the blocks of each super-block that an example may touch begin.
    begins = (first // width + np.arange(n_supers)[:, None]) * width + np.arange(n_lanes) * block
    overlap = np.minimum(begins + block, first + per_example) - np.maximum(begins, first)
    taken = (1 - _missed_by_chunk(np.maximum(0, overlap), size, depth)) * min(1.0, depth / plan.n_turns(0))
    missed = (1 - taken.mean(axis=2)).prod(axis=1)
    return float(n_examples * (1 - missed).mean())


def _missed_by_chunk(overlap: NDArray[np.int64], size: int, depth: int) -> NDArray[np.float64]:
    """Probability that `size / depth` of a chunk's samples, drawn without replacement, are none of `overlap`."""
    k = np.arange(int(overlap.max(initial=0)))
    factors = np.maximum(0.0, size - size / depth - k) / np.maximum(1, size - k)
    table: NDArray[np.float64] = np.concatenate(([1.0], np.cumprod(factors)))
    return table[overlap]


def _predict_reads(selection: Selection, plan: ShufflePlan, n_readers: int) -> tuple[float, float]:
    """Mean size of a read in bytes, and bytes read for each byte used."""
    md, row_nbytes = selection.md, selection.md.row_nbytes
    common = math.gcd(n_readers, plan.n_lanes)
    # Lanes of one reader are neighbours on disk, and read together where there is room for it.
    lanes = plan.n_lanes // common if plan.reads_lanes_together else 1
    per_example = selection.n_samples // selection.n_examples // selection.n_grid_layers
    run = min(plan.block_size * lanes, plan.n_samples)
    gap = 0 if len(md.layers) == 1 or selection.layer_is_all else (len(md.layers) - 1) * md.tokens_per_example
    gap += md.tokens_per_example - per_example
    max_gap = MAX_GAP_NBYTES // row_nbytes
    # Places in a run where rows of an example, or layer, end.
    n_ends = (run - 1) / per_example
    over, n_reads = (n_ends * gap, 1.0) if gap <= max_gap else (0.0, 1 + n_ends)
    wanted = total_over = total_reads = 0.0
    for weight, share in _visits(plan, common / n_readers):
        n_first, joined = _scatter(run * share, share, max_gap)
        wanted += weight * run * share
        total_over += weight * (over * share + joined)
        total_reads += weight * (n_reads - 1 + n_first)
    most = max(1, min(MAX_READ_ROWS, MAX_READ_NBYTES // row_nbytes))
    n_rows = max(1.0, wanted + total_over)
    n_reads = min(max(total_reads, n_rows / most), n_rows)
    return n_rows * row_nbytes / n_reads, n_rows / max(1.0, wanted)


def _visits(plan: ShufflePlan, part: float) -> list[tuple[float, float]]:
    """Visits to the chunks of a lane, by readers that own a part of its turns: a weight, and the share they want."""
    n_turns, depth = plan.n_turns(0), plan.depth(0)
    if part < 1 or depth >= n_turns:
        # A chunk deals to `depth` turns, of which a reader owns at least the one for which it reads.
        share = min(1.0, max(part, 1 / depth))
        return [(1.0, share)]
    # Those around the end are read for some turns when the lane is filled, and for the others at its end.
    around = [(1 / n_turns, d / depth) for d in range(1, depth)]
    return [((n_turns - depth + 1) / n_turns, 1.0), *around, *around]


def _candidates(md: Metadata, cfg: ShuffledConfig, n_readers: int, min_read_nbytes: float) -> Iterator[Prediction]:
    """Buffer sizes from small to large, each with the smallest blocks that are still read in large enough pieces."""
    per_lane = 0
    for exponent in itertools.count():
        per_lane = max(per_lane + 1, round(1.19**exponent))
        trial = dataclasses.replace(cfg, buffer_size=per_lane * cfg.n_lanes, block_size=1)
        selection, plan = _make_plan(md, trial)
        largest = max(1, cfg.batch_size // 8)
        while plan.block_size < largest and _predict_reads(selection, plan, n_readers)[0] < min_read_nbytes:
            plan = dataclasses.replace(plan, wished_block_size=plan.block_size + 1)
        yield predict(md, dataclasses.replace(trial, block_size=plan.block_size), n_readers)
        if trial.buffer_size >= plan.n_batches:
            return


def find_smallest(
    md: Metadata, cfg: ShuffledConfig, quality: float, n_readers: int = 1, min_read_nbytes: float = MIN_READ_NBYTES
) -> Prediction:
    """Find the smallest memory for a wished quality.

    Args:
        md: Metadata of the shards.
        cfg: What to keep; `buffer_size` and `block_size` are chosen anew.
        quality: Distinct examples in a batch relative to a uniform draw, 0 to 1.
        n_readers: Ranks times workers.
        min_read_nbytes: Reads on average at least this large, where the data allow it.

    Returns:
        The prediction of the configuration found.

    Raises:
        ConfigError: No configuration reaches it.
    """
    reached = 0.0
    for found in _candidates(md, cfg, n_readers, min_read_nbytes):
        if found.quality >= quality:
            return found
        reached = max(reached, found.quality)
    raise ConfigError(
        f"quality: expected one that can be reached, at most {reached:.3f} with reads of {min_read_nbytes / 1024:.3g} "
        f"KiB, got {quality}; lower it, or allow smaller reads (--min-read-kib)."
    )


def find_best(
    md: Metadata, cfg: ShuffledConfig, memory_nbytes: int, n_readers: int = 1, min_read_nbytes: float = MIN_READ_NBYTES
) -> Prediction:
    """Find the best quality in a given memory; arguments and result as of `find_smallest`.

    Raises:
        ConfigError: Not even the smallest buffer fits.
    """
    fitting = [f for f in _candidates(md, cfg, n_readers, min_read_nbytes) if f.memory_nbytes <= memory_nbytes]
    if not fitting:
        raise ConfigError(
            f"memory_nbytes: expected room for {cfg.n_lanes} batches or more, got {memory_nbytes}; use smaller batches "
            "or fewer lanes."
        )
    return max(fitting, key=lambda found: found.quality)
