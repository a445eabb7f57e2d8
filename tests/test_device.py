"""Batches on a device. What needs CUDA runs wherever it is; its rules are simulated everywhere."""

import contextlib
import gc
import multiprocessing
import sys

import pytest
import simulated_cuda
import torch
from torch.utils.data import DataLoader

from saev_torch import (
    ActivationBatch,
    ConfigError,
    DevicePrefetcher,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    device,
)

pytestmark = pytest.mark.usefixtures("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def half_config(make_shards):
    shards = make_shards(
        n_examples=120, content_tokens=6, layers=(3, 7), d_model=64, examples_per_shard=50, dtype="bfloat16"
    )
    return ShuffledConfig(shards=shards, layer=7, batch_size=32, buffer_size=16, act_dtype="stored")


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


@pytest.mark.parametrize("dtype", [torch.int64, "float32", 1, torch.complex64])
def test_a_bad_dtype_is_refused(dtype):
    with pytest.raises(ConfigError, match=r"DevicePrefetcher\.dtype: expected a floating point dtype .*, got "):
        DevicePrefetcher([], "cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_cpu_converts_too(half_config, dtype):
    batches = list(ShuffledActivations(half_config))
    converted = list(DevicePrefetcher(batches, "cpu", dtype=dtype))
    for a, b in zip(converted, batches, strict=True):
        assert type(a) is ActivationBatch
        assert a.number == b.number
        assert torch.equal(a["act"], b["act"].to(dtype))
        assert a["example_idx"].dtype == torch.int64
    plain = next(iter(DevicePrefetcher([{"x": torch.ones(2), "i": torch.arange(2)}], "cpu", dtype=dtype)))
    assert type(plain) is ActivationBatch
    assert plain["x"].dtype == dtype
    assert plain["i"].dtype == torch.int64


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_what_is_stored_is_converted_on_the_device(runtime, half_config, n_workers, dtype, monkeypatch):
    """Half the bytes are copied, and what arrives is what torch makes of them on the host."""
    copied, loader = [], make_loader(half_config, n_workers)
    keep = device._locked_batch

    def note(batch, locks):
        copied.append(batch["act"].dtype)
        return keep(batch, locks)

    monkeypatch.setattr(device, "_locked_batch", note)
    got = []
    for batch in DevicePrefetcher(loader, "cuda", dtype=dtype):
        runtime.step()
        assert batch["act"].is_cuda
        got.append(batch["act"])
    runtime.finish()
    assert set(copied) == {torch.bfloat16}
    wanted = [batch["act"].clone() for batch in ShuffledActivations(half_config)]
    assert len(got) == len(wanted) > 10
    assert all(torch.equal(a.cpu(), b.to(dtype or b.dtype)) for a, b in zip(got, wanted, strict=True))


class Runtime:
    """What tests need of CUDA, the real one."""

    def register(self, batch):
        return int(torch.cuda.cudart().cudaHostRegister(batch.memory.ctypes.data, batch.memory.nbytes, 0))

    def unregister(self, batch):
        assert int(torch.cuda.cudart().cudaHostUnregister(batch.memory.ctypes.data)) == 0

    def step(self):
        """A kernel of a training step, which takes a while."""
        torch.cuda._sleep(20_000_000)

    def finish(self):
        torch.cuda.synchronize()


class Simulation(Runtime):
    """The same, simulated."""

    def __init__(self, cuda):
        self.step = cuda.launch


@pytest.fixture
def simulated(monkeypatch):
    cuda = simulated_cuda.SimulatedCuda()
    cuda.install(monkeypatch)
    return Simulation(cuda)


@pytest.fixture(params=["simulated", pytest.param("real", marks=needs_cuda)])
def runtime(request):
    return Runtime() if request.param == "real" else request.getfixturevalue("simulated")


@pytest.fixture
def slow_config(make_shards):
    """Batches large enough for copies to be late."""
    shards = make_shards(n_examples=250, content_tokens=160, cls=False, layers=(0,), d_model=64, examples_per_shard=500)
    return ShuffledConfig(shards=shards, layer=0, batch_size=256, buffer_size=8)


@needs_cuda
@pytest.mark.parametrize("n_workers", [0, 2])
def test_what_arrives_is_what_was_read(config, n_workers):
    wanted = [{k: v.clone() for k, v in batch.items()} for batch in ShuffledActivations(config)]
    loader = DataLoader(ShuffledActivations(config), batch_size=None, num_workers=n_workers)
    got = list(DevicePrefetcher(loader, "cuda"))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert all(a[k].is_cuda and torch.equal(a[k].cpu(), b[k]) for k in b)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_slot_is_not_reused_before_its_copy_has_finished(runtime, slow_config, n_workers):
    # The stream is kept busy, so that copies are late, while the loader runs on and would overwrite their source.
    got = []
    for batch in DevicePrefetcher(make_loader(slow_config, n_workers), "cuda"):
        runtime.step()
        got.append(batch["act"])
    check(runtime, got, slow_config)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_memory_is_not_locked_after_prefetching(runtime, slow_config, n_workers):
    """A user's plain asynchronous copy, for which nobody waits, is safe again; from locked memory it would not be."""
    loader = make_loader(slow_config, n_workers)
    with contextlib.closing(iter(DevicePrefetcher(loader, "cuda"))) as iterator:
        next(iterator)
    assert all(DevicePrefetcher(loader, "cuda"))
    loader.dataset.set_epoch(0)
    got, owners = [], []
    for batch in loader:
        runtime.step()
        owners.append(batch.memory)
        got.append(batch["act"].to("cuda", non_blocking=True))
        del batch
    check(runtime, got, slow_config)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_batch_that_is_copied_beside_a_prefetcher(runtime, slow_config, n_workers):
    """The prefetcher is done with the memory before the user's own copy is, which must keep it then."""
    got, owners = [], []

    loader = make_loader(slow_config, n_workers)

    def copied():
        for batch in loader:
            runtime.step()
            owners.append(batch.memory)
            got.append(batch.to("cuda", non_blocking=True)["act"])
            yield batch
            del batch

    for _ in range(2):
        loader.dataset.set_epoch(0)
        got.clear()
        assert all(DevicePrefetcher(copied(), "cuda"))
        check(runtime, got, slow_config)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_asynchronous_copy_of_a_locked_batch(runtime, slow_config, n_workers):
    got, owners = [], {}
    for batch in make_loader(slow_config, n_workers):
        address = batch.memory.ctypes.data
        if address not in owners:
            assert runtime.register(batch) == 0
            owners[address] = ActivationBatch()
            owners[address].memory = batch.memory
        runtime.step()
        got.append(batch.to("cuda", non_blocking=True)["act"])
        del batch
    check(runtime, got, slow_config)
    ActivationBatch().to("cuda", non_blocking=True)  # which forgets those that have finished
    for owner in owners.values():
        runtime.unregister(owner)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_may_be_forked_while_memory_is_locked(runtime, config, capfd, monkeypatch):
    """A child drops its copies of what the parent has locked, and has no CUDA to ask."""
    # pytest's own hook would keep to itself what happens in a child.
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    loader = make_loader(config, 2)
    assert all(DevicePrefetcher(loader, "cuda"))
    iterator, own = iterate_both(loader, config)
    assert len(list(make_loader(config, 2))) == len(loader)
    # Nor has it unlocked anything of its parent's: what is left arrives.
    assert len(list(iterator)) == len(list(own)) == len(loader) - 12
    err = capfd.readouterr().err
    assert "Exception ignored" not in err
    assert "CUDA" not in err


def test_a_forked_child_may_end_its_copies_of_iterators(simulated, config, capfd):
    loader = make_loader(config, 2)  # kept: torch's iterator over it would end the workers where it is dropped
    iterator, own = iterate_both(loader, config)
    child = multiprocessing.get_context("fork").Process(target=end, args=([iterator, own], ShuffledActivations(config)))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert len(list(iterator)) == len(list(own)) == len(loader) - 12
    assert "CUDA" not in capfd.readouterr().err


def iterate_both(loader, config):
    iterators = iter(DevicePrefetcher(loader, "cuda")), iter(DevicePrefetcher(ShuffledActivations(config), "cuda"))
    for iterator in iterators:
        # Enough for memory to be locked that no batch uses just now.
        for _ in range(12):
            next(iterator)
    return iterators


def end(iterators, data_set):
    for iterator in iterators:
        iterator.close()
    iterators.clear()
    gc.collect()
    assert list(data_set)


def test_memory_that_cuda_will_not_lock(runtime, config):
    """Batches go another way, and the refusal is not laid at the door of the user's next kernel."""
    n_refused = 0

    def locked_by_others():
        nonlocal n_refused
        for batch in ShuffledActivations(config):
            assert runtime.register(batch) == 0
            yield batch
            n_refused += 1
            runtime.finish()
            runtime.unregister(batch)

    got = []
    for batch in DevicePrefetcher(locked_by_others(), "cuda"):
        runtime.step()
        got.append(batch["act"] + 0)
    assert n_refused == len(got)
    check(runtime, got, config)


def test_memory_that_somebody_else_has_unlocked(runtime, config):
    seen = []

    def unlocked_by_others():
        for batch in ShuffledActivations(config):
            yield batch
            runtime.finish()
            if not seen:
                runtime.unregister(batch)
            seen.append(batch.memory)

    got = [batch["act"] for batch in DevicePrefetcher(unlocked_by_others(), "cuda")]
    runtime.step()
    check(runtime, got, config)


def make_loader(config, n_workers):
    data = ShuffledActivations(config)
    return DataLoader(data, batch_size=None, num_workers=n_workers, persistent_workers=n_workers > 0)


def check(runtime, got, config):
    """Compare activations on the device with those of the first epoch."""
    runtime.finish()
    wanted = [batch["act"].clone() for batch in ShuffledActivations(config)]
    n_wrong = sum(not torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))
    assert n_wrong == 0, f"{n_wrong} of {len(wanted)} batches are wrong"


@needs_cuda
def test_pinned_collation_gives_page_locked_batches(config):
    loader = DataLoader(ShuffledActivations(config), batch_size=None, num_workers=2, pin_memory=True)
    for batch, wanted in zip(loader, ShuffledActivations(config), strict=True):
        assert all(v.is_pinned() for v in batch.values())
        assert torch.equal(batch["act"], wanted["act"])
