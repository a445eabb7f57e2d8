"""Memory for batches: never more than the data, and a warning where there is not enough of it."""

import logging
import re

import pytest
from torch.utils.data import DataLoader

from saev_torch import OrderedActivations, OrderedConfig, ShuffledActivations, ShuffledConfig
from saev_torch.order.shuffle import OrderedPlan, ShufflePlan
from saev_torch.order.steps import Share
from saev_torch.reading import room
from saev_torch.reading.room import advise_room

MB = 10**6


@pytest.mark.parametrize("n_workers", [0, 1])
@pytest.mark.parametrize("kind", ["shuffled", "ordered"])
def test_a_batch_that_is_larger_than_the_data(make_shards, kind, n_workers):
    shards = make_shards(n_examples=40, content_tokens=8, cls=False, layers=(0,), d_model=512, examples_per_shard=13)

    def read(batch_size):
        if kind == "shuffled":
            cfg = ShuffledConfig(shards=shards, layer=0, batch_size=batch_size, buffer_size=2**31 - 1)
            data_set = ShuffledActivations(cfg)
        else:
            data_set = OrderedActivations(OrderedConfig(shards=shards, layer=0, batch_size=batch_size))
        return list(DataLoader(data_set, batch_size=None, num_workers=n_workers))

    (batch,) = read(2**31 - 1)
    assert batch["act"].shape == (320, 512)
    assert sorted((batch["example_idx"] * 8 + batch["token_idx"]).tolist()) == list(range(320))
    expected = 1000 * batch["example_idx"] + batch["token_idx"]
    assert (batch["act"][:, 0] == expected).all()
    del batch


def plan(batch_size=1000, n_samples=10**6, buffer_size=64):
    return ShufflePlan(n_samples, batch_size, buffer_size, 8, None, 17, 0)


@pytest.fixture
def machine(monkeypatch):
    def set_memory(available, limit=None):
        monkeypatch.setattr(room, "memory", lambda: (10**12, available, limit))

    return set_memory


def test_a_buffer_that_fits_is_fine(machine):
    machine(300 * MB)
    # 64 batches of 1,000 samples of 4,096 bytes: 264 MB.
    assert advise_room(plan(), Share(0, 1, 1000), 64, 4096, 1) is None


@pytest.mark.parametrize("n_workers", [1, 2, 8])
@pytest.mark.parametrize("available", [10, 40, 200, 250])
def test_a_buffer_that_does_not_fit(machine, available, n_workers):
    machine(available * MB, 300 * MB)
    said = advise_room(plan(), Share(0, n_workers, 1000), 64, 4096, 1)
    assert f"{available / 1000:.1f} GB to give, in a control group with a limit of 0.3 GB" in said
    assert 0.25 <= float(re.search(r"got (\d\.\d) GB for the", said)[1]) <= 0.4
    assert f"for the {n_workers} reading processes" in said
    fitting = re.search(r"use buffer_size=(\d+),", said)
    if fitting is None:
        assert (available, n_workers) in {(10, 8), (40, 8), (10, 2), (10, 1)}, said
        assert "use smaller batches than of 1000 samples" in said
        return
    fitting = int(fitting[1])
    assert 1 <= fitting < 64
    assert advise_room(plan(buffer_size=fitting), Share(0, n_workers, 1000), fitting, 4096, 1) is None


def test_ranks_elsewhere_take_memory_elsewhere(machine, monkeypatch):
    machine(150 * MB)
    share = Share(0, 8, 1000)
    assert advise_room(plan(), share, 64, 4096, 8) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "for the 8 reading processes" in advise_room(plan(), share, 64, 4096, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert advise_room(plan(), share, 64, 4096, 8) is None


def test_the_ordered_loader_needs_smaller_batches(machine):
    machine(8 * MB)
    said = advise_room(OrderedPlan(10**6, 1000), Share(0, 1, 1000), 64, 4096, 1)
    assert "use smaller batches than of 1000 samples" in said


def test_a_system_that_does_not_say(monkeypatch):
    def fail():
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(room, "memory", fail)
    assert advise_room(plan(), Share(0, 1, 1000), 64, 4096, 1) is None


@pytest.fixture
def log(tmp_path):
    """A file that this process and its workers log to."""
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger("saev_torch").addHandler(handler)
    yield tmp_path / "log"
    logging.getLogger("saev_torch").removeHandler(handler)
    handler.close()


@pytest.mark.parametrize("n_workers", [0, 2])
def test_it_is_said_once(make_shards, machine, log, n_workers):
    machine(10_000)
    shards = make_shards(n_examples=40, content_tokens=8, cls=False, layers=(0,), d_model=64, examples_per_shard=13)
    data_set = ShuffledActivations(ShuffledConfig(shards=shards, layer=0, batch_size=32, buffer_size=8))
    for _ in range(2):
        for batch in DataLoader(data_set, num_workers=n_workers):
            assert len(batch["act"]) == 32
        del batch
    assert log.read_text().count("expected batches that fit into memory") == 1
