"""10 TB and 16,384 reading processes, on paper: sparse files, of which each reader is asked what it would do."""

import os
import resource
import time
import tracemalloc
from pathlib import Path

import numpy as np
import plans
import pytest
from torch.utils.data import DataLoader

from saev_torch import Metadata, ShuffledActivations, ShuffledConfig
from saev_torch.format.shards import Shard, ShardInfo
from saev_torch.order.predict import predict
from saev_torch.order.steps import Share

N_RANKS, N_WORKERS = 1024, 16
N_READERS = N_RANKS * N_WORKERS


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 TB in 1,356 files."""
    md = Metadata(
        family="clip", ckpt="x", layers=(0,), content_tokens_per_example=196, cls_token=False, d_model=768,
        n_examples=16_600_000, max_tokens_per_shard=2_400_000, data="e30=", dataset="/d",
    )  # fmt: skip
    root = tmp_path_factory.mktemp("many")
    md.dump(root)
    info, directory = ShardInfo(), root / md.hash
    for i in range(md.n_shards):
        info.append(Shard(f"acts{i:06d}.bin", min(md.examples_per_shard, md.n_examples - i * md.examples_per_shard)))
        with open(directory / info[i].name, "wb") as file:
            try:
                file.truncate(info[i].n_examples * md.tokens_per_example * md.row_nbytes)
            except OSError as err:
                pytest.skip(f"this file system has no files of 7.4 GB: {err}")
    info.dump(directory)
    return directory


def make_data_set(shards: Path, rank: int) -> tuple[ShuffledActivations, ShuffledConfig]:
    cfg = ShuffledConfig(shards=shards, layer=0)
    return ShuffledActivations(cfg, rank=rank, world_size=N_RANKS), cfg


def own_share(data_set: ShuffledActivations, rank: int, worker: int, n: int) -> Share:
    """The first `n` batches of a reader."""
    first = rank + N_RANKS * worker
    return Share(first, N_READERS, min(data_set.n_batches, first + n * N_READERS))


@pytest.mark.parametrize(("rank", "worker"), [(0, 0), (517, 9), (1023, 15)])
def test_each_reader_makes_its_batches(shards: Path, rank: int, worker: int) -> None:
    began = time.thread_time()
    data_set, cfg = make_data_set(shards, rank)
    plan, share = data_set._plan(3), own_share(data_set, rank, worker, 2)
    filled, order, n_open = plans.carry_out(plan, share)
    took_s = time.thread_time() - began
    assert len(data_set) == -(-data_set.n_batches // N_RANKS) == 194
    assert order == [rank + N_RANKS * worker, rank + N_RANKS * worker + N_READERS]
    assert all(np.array_equal(filled[batch], plan.locate(batch)) for batch in order)
    # Of what it would hold, set up and planned for two batches 16,384 apart.
    assert n_open == 1
    # A tenth of it, or a few tenths on a busy machine: where all chunks are worked out it is many times as much.
    assert took_s < 3.0
    _, n_bytes, n_used = plans.count_reads(data_set._own_selection(), plan, share)
    assert n_bytes / n_used == pytest.approx(predict(data_set.metadata, cfg, N_READERS).read_per_byte, rel=0.1)
    assert n_bytes / n_used < 2.0


def test_a_reader_takes_little_memory_and_few_descriptors(shards: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    try:
        data_set, _ = make_data_set(shards, 700)
        next(iter(plans.make_steps(data_set._plan(0), own_share(data_set, 700, 3, 2))))
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    # Its pages may be on a new sheet, which is open twice.
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    most = 0
    small = ShuffledConfig(shards=shards, layer=0, batch_size=256, buffer_size=64, block_size=1)
    batches = iter(DataLoader(ShuffledActivations(small, rank=700, world_size=N_RANKS)))
    for _ in range(8):
        assert not next(batches)["act"].any()
        most = max(most, len(os.listdir("/proc/self/fd")))
    del batches
    # 8 batches of one lane are rows of 1,356 files.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert most - before < min(limit // 8, 256) + 64
