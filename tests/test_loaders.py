import gc
import multiprocessing
import threading
import time
import weakref

import contracts
import pytest
import torch
from conftest import PATIENCE_S, Resources, wait_until
from contracts import make_data_set, make_ready
from factory import Spec
from torch.utils.data import DataLoader

from saev_torch import OrderedConfig, OrderedDataLoader, ShuffledConfig, ShuffledDataLoader

KINDS = [OrderedConfig, ShuffledConfig]
SPEC = Spec(n_examples=60, content_tokens=20, examples_per_shard=13)


@pytest.fixture
def config(make_shards):
    shards = make_shards(SPEC)
    return lambda kind, **fields: kind(**{"shards": shards, "layer": 3, "batch_size": 16, "buffer_size": 8, **fields})


def n_children():
    return len(multiprocessing.active_children())


def reading_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("saev_torch")]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_loader_says(config, kind, drop_last):
    cfg = config(kind, batch_size=17, drop_last=drop_last)
    loader = make_ready(cfg, num_workers=2)
    assert isinstance(loader, DataLoader)
    contracts.check_attributes(loader, SPEC, cfg)
    assert loader.num_workers == 2
    contracts.check_attributes(loader.dataset, SPEC, cfg)


def test_the_published_names(config):
    assert isinstance(make_ready(config(OrderedConfig)), OrderedDataLoader)
    assert isinstance(make_ready(config(ShuffledConfig)), ShuffledDataLoader)


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_passed_through(config, kind):
    begun = multiprocessing.get_context("fork").SimpleQueue()
    generator = torch.Generator()
    loader = make_ready(
        config(kind),
        num_workers=2,
        prefetch_factor=5,
        persistent_workers=True,
        timeout=33.0,
        worker_init_fn=begun.put,
        multiprocessing_context="fork",
        generator=generator,
        collate_fn=lambda batch: (batch["act"], batch["example_idx"]),
    )
    assert (loader.prefetch_factor, loader.persistent_workers, loader.timeout) == (5, True, 33.0)
    assert loader.generator is generator
    batches = list(loader)
    assert sorted(begun.get() for _ in range(2)) == [0, 1]
    begun.close()
    wanted = list(make_data_set(loader.cfg))
    assert all(torch.equal(act, batch["act"]) for (act, _), batch in zip(batches, wanted, strict=True))


@pytest.mark.parametrize("name", ["batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_config_decides_is_refused(config, kind, name):
    with pytest.raises(TypeError, match=rf"\['{name}'\]: the config decides this"):
        make_ready(config(kind), **{name: None})


@pytest.mark.parametrize("name", ["batch_size", "drop_last", "sampler"])
def test_what_the_config_decides_stays(config, name):
    loader = make_ready(config(ShuffledConfig))
    with pytest.raises(ValueError, match=f"{name} attribute should not be set"):
        setattr(loader, name, 3)
    assert (loader.batch_size, loader.drop_last) == (16, False)


def test_options_that_torch_does_not_know(config):
    with pytest.raises(TypeError, match="num_wokers"):
        make_ready(config(ShuffledConfig), num_wokers=2)


# Ending


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_shutdown(config, kind, n_workers, persistent):
    """It ends processes and threads at once, though the iterator is still held; the loader can be used again."""
    loader = make_ready(config(kind), num_workers=n_workers, persistent_workers=persistent)
    wanted = make_data_set(loader.cfg)
    loader.shutdown()  # before anything has begun
    iterator = iter(loader)
    contracts.assert_same([next(iterator), next(iterator)], list(wanted)[:2])
    assert n_children() == n_workers
    assert bool(reading_threads()) == (n_workers == 0)
    loader.shutdown()
    assert (n_children(), reading_threads()) == (0, [])
    assert list(iterator) == []
    loader.shutdown()
    contracts.assert_same(list(loader), list(wanted))
    loader.shutdown()
    assert (n_children(), reading_threads()) == (0, [])


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (2, False)])
def test_breaking_off_ends_the_workers(config, n_workers, persistent):
    loader = make_ready(config(ShuffledConfig), num_workers=n_workers)
    for _ in range(2):
        for _batch in loader:
            assert n_children() == n_workers
            break
        assert (n_children(), reading_threads()) == (0, [])


def test_persistent_workers_stay(config):
    loader = make_ready(config(ShuffledConfig), num_workers=2, persistent_workers=True)
    pids = set()
    for n_taken in (3, 75, 1):
        for _ in zip(range(n_taken), loader, strict=False):
            pass
        pids |= {child.pid for child in multiprocessing.active_children()}
    assert len(pids) == 2


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("n_taken", [0, 1, 1000])
def test_a_dropped_loader_is_gone(config, monkeypatch, n_workers, persistent, n_taken):
    """At once and whole, with its workers: not when cycles happen to be collected, and in no longer than they take."""
    # Where a worker does not end by itself, torch waits for this long.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 2 * PATIENCE_S)
    before = Resources.now()
    loader = make_ready(config(ShuffledConfig), num_workers=n_workers, persistent_workers=persistent)
    for _ in zip(range(n_taken), loader, strict=False):
        pass
    gone = weakref.ref(loader)
    gc.disable()
    try:
        began = time.monotonic()
        _ = None
        del loader
        assert gone() is None
        wait_until(lambda: not before.since(Resources.now()))
        assert time.monotonic() - began < PATIENCE_S
    finally:
        gc.enable()


def test_two_iterators_of_one_loader(config):
    """As torch has it without persistent workers: each is an iteration of its own."""
    loader = make_ready(config(ShuffledConfig), num_workers=1)
    wanted = make_data_set(loader.cfg)
    epochs = [list(wanted), list(wanted)]
    a, b = iter(loader), iter(loader)
    pairs = [(next(a), next(b)) for _ in range(5)]
    contracts.assert_same([x for x, _ in pairs], epochs[0][:5])
    contracts.assert_same([x for _, x in pairs], epochs[1][:5])


def test_an_iterator_is_its_own_iterator(config):
    loader = make_ready(config(ShuffledConfig))
    iterator = iter(loader)
    assert iter(iterator) is iterator
    assert len(list(iterator)) == len(loader)
    assert list(iterator) == []


def test_loaders_do_not_disturb_each_other(config):
    a = make_ready(config(ShuffledConfig), num_workers=2)
    b = make_ready(config(OrderedConfig), num_workers=1)
    wanted_a, wanted_b = list(make_data_set(a.cfg)), list(make_data_set(b.cfg))
    pairs = list(zip(a, b, strict=True))
    contracts.assert_same([x for x, _ in pairs], wanted_a)
    contracts.assert_same([x for _, x in pairs], wanted_b)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_who_looks_into_the_data_set_does_not_move_the_loader(make_shards, num_workers):
    cfg = ShuffledConfig(shards=make_shards(n_examples=100), layer=3, batch_size=16, buffer_size=8)
    whole = list(ShuffledDataLoader(cfg))
    loader = ShuffledDataLoader(cfg, num_workers=num_workers)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    next(iter(loader.dataset))
    state, digest = loader.state_dict(), loader.digest
    assert (state["epoch"], state["batch"], digest.n_batches) == (0, 3, 3)
    again = ShuffledDataLoader(cfg)
    again.load_state_dict(state)
    contracts.assert_same(list(again), whole[3:])
    contracts.assert_same(list(batches), whole[3:])
    loader.shutdown()
