"""Loaders that hand batches out as they come: `in_order=False`."""

import multiprocessing
from typing import Any

import contracts
import pytest
import torch
from torch.utils.data import get_worker_info

from saev_torch import ShuffledActivations, ShuffledConfig, ShuffledDataLoader, StateError

N_BATCHES = 24


class Behind(ShuffledActivations):
    """Worker 0 yields nothing until it is let go."""

    def __iter__(self) -> Any:
        iterator = super().__iter__()
        info = get_worker_info()
        if info is not None and info.id == 0:
            assert self.go_on.wait(60)
        return iterator


@pytest.fixture
def cfg(make_shards: Any) -> ShuffledConfig:
    return ShuffledConfig(shards=make_shards(n_examples=64), layer=3, batch_size=16, buffer_size=4)


@pytest.fixture
def wanted(cfg: ShuffledConfig) -> contracts.Batches:
    batches = list(ShuffledActivations(cfg))
    assert len(batches) == N_BATCHES
    return batches


def make(cfg: ShuffledConfig, monkeypatch: pytest.MonkeyPatch, **options: Any) -> ShuffledDataLoader:
    """A loader whose worker 0 is behind, until `loader.dataset.go_on` is set."""
    monkeypatch.setattr("saev_torch.loaders.ShuffledActivations", Behind)
    kind = {"multiprocessing_context": "fork"}
    loader = ShuffledDataLoader(cfg, num_workers=2, in_order=False, **kind, **options)
    loader.dataset.go_on = multiprocessing.get_context("fork").Event()
    return loader


def test_a_state_says_which_batches_were_taken_or_that_it_cannot(
    cfg: ShuffledConfig, wanted: contracts.Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(cfg, monkeypatch)
    iterator = iter(loader)
    early = [next(iterator) for _ in range(3)]
    contracts.assert_same(early, wanted[1:6:2])
    with pytest.raises(StateError, match=r"in_order: expected True.*batch 0 .*in_order=True"):
        loader.state_dict()
    loader.dataset.go_on.set()
    got = [*early, *iterator]
    assert sorted(batch.number for batch in got) == list(range(N_BATCHES))
    contracts.assert_same(sorted(got, key=lambda batch: batch.number), wanted)
    # All were taken, each at its own place.
    whole = ShuffledDataLoader(cfg)
    contracts.assert_same(list(whole), wanted)
    assert loader.state_dict() == whole.state_dict()
    assert loader.digest == whole.digest


def test_resuming_misses_and_repeats_nothing(
    cfg: ShuffledConfig, wanted: contracts.Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(cfg, monkeypatch)
    iterator = iter(loader)
    taken = [next(iterator) for _ in range(3)]
    loader.dataset.go_on.set()
    state = None
    while state is None:
        taken.append(next(iterator))
        try:
            state = loader.state_dict()
        except StateError:
            continue
    loader.shutdown()
    other = ShuffledDataLoader(cfg)
    other.load_state_dict(state)
    got = sorted((*taken, *(other if state["epoch"] == 0 else ())), key=lambda batch: batch.number)
    contracts.assert_same(got, wanted)


def test_with_ranks_there_is_no_state_within_an_epoch(cfg: ShuffledConfig) -> None:
    """A state is that of all ranks, and the others may have taken other batches."""
    loader = ShuffledDataLoader(cfg, rank=1, world_size=2, num_workers=2, in_order=False)
    state = loader.state_dict()
    iterator = iter(loader)
    assert loader.state_dict() == state
    assert next(iterator).number % 2 == 1
    with pytest.raises(StateError, match="in_order"):
        loader.state_dict()
    assert len(list(iterator)) == N_BATCHES // 2 - 1
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (1, 0)


def test_what_is_no_batch_any_more_has_no_number(cfg: ShuffledConfig) -> None:
    loader = ShuffledDataLoader(cfg, num_workers=2, in_order=False, collate_fn=lambda batch: batch["act"])
    iterator = iter(loader)
    assert isinstance(next(iterator), torch.Tensor)
    with pytest.raises(StateError, match="in_order"):
        loader.state_dict()
    assert len(list(iterator)) == N_BATCHES - 1
    assert loader.state_dict()["epoch"] == 1


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_batch_knows_its_number(cfg: ShuffledConfig, wanted: contracts.Batches, context: str) -> None:
    assert [batch.number for batch in wanted] == list(range(N_BATCHES))
    loader = ShuffledDataLoader(cfg, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert [batch.number for batch in batches] == list(range(N_BATCHES))
    assert batches[3].to("cpu").number == 3
    assert list(batches[3]) == list(wanted[3])


def test_one_worker_is_in_order(cfg: ShuffledConfig, wanted: contracts.Batches) -> None:
    loader = ShuffledDataLoader(cfg, num_workers=1, in_order=False)
    iterator = iter(loader)
    contracts.assert_same([next(iterator), next(iterator)], wanted[:2])
    assert loader.state_dict()["batch"] == 2
    loader.shutdown()
