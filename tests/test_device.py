"""Batches on a device. Without CUDA only the pass-through can be tested; the rest runs wherever CUDA is."""

import pytest
import torch
from torch.utils.data import DataLoader

from saev_torch import ConfigError, DevicePrefetcher, ShuffledActivations, ShuffledConfig, ShuffledDataLoader

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def config(make_shards):
    shards = make_shards(n_examples=120, content_tokens=6, cls=True, layers=(3, 7), d_model=16, examples_per_shard=50)
    return ShuffledConfig(shards=shards, layer=7, batch_size=32, buffer_size=16)


def test_the_cpu_passes_batches_through(config):
    batches = list(DataLoader(ShuffledActivations(config), batch_size=None))
    passed = list(DevicePrefetcher(batches, "cpu"))
    assert len(passed) == len(batches) > 10
    assert all(a is b for a, b in zip(passed, batches, strict=True))


def test_length_and_state_are_those_of_the_loader(config):
    loader = ShuffledDataLoader(config)
    prefetcher = DevicePrefetcher(loader, "cpu")
    assert len(prefetcher) == len(loader)
    iterator = iter(prefetcher)
    for _ in range(3):
        next(iterator)
    state = prefetcher.state_dict()
    assert state["batch"] == 3
    rest = [batch["example_idx"] for batch in iterator]
    resumed = DevicePrefetcher(ShuffledDataLoader(config), "cpu")
    resumed.load_state_dict(state)
    assert [x.tolist() for x in rest] == [batch["example_idx"].tolist() for batch in resumed]


@pytest.mark.parametrize("n_ahead", [0, -1, 1.5, True])
def test_a_bad_number_of_batches_ahead_is_refused(n_ahead):
    with pytest.raises(ConfigError, match="n_ahead"):
        DevicePrefetcher([], "cpu", n_ahead)


@needs_cuda
@pytest.mark.parametrize("n_workers", [0, 2])
def test_what_arrives_is_what_was_read(config, n_workers):
    wanted = [{k: v.clone() for k, v in batch.items()} for batch in ShuffledActivations(config)]
    loader = DataLoader(ShuffledActivations(config), batch_size=None, num_workers=n_workers)
    got = list(DevicePrefetcher(loader, "cuda"))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert all(a[k].is_cuda and torch.equal(a[k].cpu(), b[k]) for k in b)


@needs_cuda
@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_slot_is_not_reused_before_its_copy_has_finished(make_shards, n_workers):
    # The stream is kept busy, so that copies are late, while the loader runs on and would overwrite their source.
    shards = make_shards(n_examples=250, content_tokens=160, cls=False, layers=(0,), d_model=64, examples_per_shard=500)
    config = ShuffledConfig(shards=shards, layer=0, batch_size=256, buffer_size=8)
    wanted = [batch["act"].clone() for batch in ShuffledActivations(config)]
    loader = DataLoader(ShuffledActivations(config), batch_size=None, num_workers=n_workers)
    got = []
    for batch in DevicePrefetcher(loader, "cuda"):
        torch.cuda._sleep(20_000_000)
        got.append(batch["act"].clone())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))


@needs_cuda
def test_pinned_collation_gives_page_locked_batches(config):
    loader = DataLoader(ShuffledActivations(config), batch_size=None, num_workers=2, pin_memory=True)
    for batch, wanted in zip(loader, ShuffledActivations(config), strict=True):
        assert all(v.is_pinned() for v in batch.values())
        assert torch.equal(batch["act"], wanted["act"])
