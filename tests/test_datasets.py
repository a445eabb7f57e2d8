import contextlib
import dataclasses
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import contracts
import factory
import numpy as np
import pytest
import torch
from conftest import PATIENCE_S, Resources, wait_until
from contracts import expected, make_data_set, selections, specs
from factory import Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, SequentialSampler, Subset

from saev_torch import (
    ActivationBatch,
    ConfigError,
    IndexedConfig,
    IndexedDataset,
    IndexMap,
    OrderedActivations,
    OrderedConfig,
    ReadError,
    ShardsNotFoundError,
    ShuffledActivations,
    ShuffledConfig,
    StalledReadError,
    WriteError,
)
from saev_torch.reading import reader as reading
from saev_torch.reading.ring import Ring

ROOT = Path(__file__).parent.parent
CONFIGS = [OrderedConfig, ShuffledConfig]

# Named labels here, not tokens: one label is what one sample has.
SINGULAR = {"token_labels": "token_label"}


# IndexedDataset


def check_sample(sample, wanted, i):
    keys = {SINGULAR.get(key, key): column[i] for key, column in wanted.columns.items()}
    assert sample.keys() == keys.keys()
    assert sample["act"].dtype == torch.float32
    assert sample["act"].numpy().tobytes() == keys.pop("act").tobytes()
    for key, value in keys.items():
        assert type(sample[key]) is int
        assert sample[key] == value


def check_collated(batch, wanted):
    assert type(batch) is ActivationBatch
    assert batch.keys() == {SINGULAR.get(key, key) for key in wanted.columns}
    for key, column in wanted.columns.items():
        got = batch[SINGULAR.get(key, key)].numpy()
        assert got.shape == column.shape
        assert got.tobytes() == column.astype(got.dtype).tobytes(), key


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(st.data())
def test_indexed_samples(data):
    spec = data.draw(specs())
    fields = data.draw(selections(spec))
    wanted = expected(spec, **fields)
    numbers = data.draw(st.lists(st.integers(0, len(wanted) - 1), max_size=20))
    with tempfile.TemporaryDirectory() as root:
        data_set = IndexedDataset(IndexedConfig(shards=factory.make_shards(Path(root), spec), **fields))
        assert len(data_set) == len(wanted)
        for i in numbers:
            check_sample(data_set[i], wanted, i)
        samples = data_set.__getitems__(numbers)
        assert len(samples) == len(numbers)
        for sample, i in zip(samples, numbers, strict=True):
            check_sample(sample, wanted, i)
        if numbers:
            check_collated(torch.utils.data.default_collate(samples), wanted.take(np.array(numbers)))


@pytest.fixture
def indexed(make_shards):
    spec = Spec(n_examples=60, content_tokens=20, examples_per_shard=13)
    data_set = IndexedDataset(IndexedConfig(shards=make_shards(spec), tokens="all", layer="all"))
    yield data_set, expected(spec, "all", "all")
    data_set._store.close()


@pytest.mark.parametrize("batch_size", [1, 7, 600, 3000])
def test_indexed_in_a_loader(indexed, batch_size):
    """As it comes, shuffled, in workers; batches of 600 are read by several threads into memory that is reused."""
    data_set, wanted = indexed
    for options in ({}, {"num_workers": 2}):
        first = 0
        for batch in DataLoader(data_set, batch_size=batch_size, **options):
            check_collated(batch, wanted.take(np.arange(first, first + len(batch["act"]))))
            first += len(batch["act"])
            if first > 300 and batch_size < 10:
                break
    loader = DataLoader(data_set, batch_size=batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    drawn = torch.randperm(len(data_set), generator=torch.Generator().manual_seed(0))
    seen = []
    for batch in loader:
        keys = zip(*(batch[key].tolist() for key in ("example_idx", "layer", "token_idx")), strict=True)
        seen += [example * 42 + (3, 7).index(layer) * 21 + token + 1 for example, layer, token in keys]
        check_collated(batch, wanted.take(np.array(seen[-len(batch["act"]) :])))
        if len(seen) > 300 and batch_size < 10:
            break
    assert len(set(seen)) == len(seen)
    if batch_size >= 600:
        assert sorted(seen) == list(range(len(data_set)))
        assert seen != drawn.sort().values.tolist()


def test_indexed_batches_are_kept(indexed):
    """Many batches held at once, and a slice of one."""
    data_set, wanted = indexed
    for n_workers in (0, 2):
        batches = list(DataLoader(data_set, batch_size=600, num_workers=n_workers))
        pieces = [batch["act"][5:7] for batch in DataLoader(data_set, batch_size=600, num_workers=n_workers)]
        for i, (batch, piece) in enumerate(zip(batches, pieces, strict=True)):
            check_collated(batch, wanted.take(np.arange(600 * i, min(len(wanted), 600 * i + 600))))
            assert torch.equal(piece, batch["act"][5:7])


def test_interrupts_while_threads_read(indexed, monkeypatch):
    """Two of them, so that their end is not waited for: what they read late goes to memory that nobody else has."""
    data_set, wanted = indexed
    real, go_on, left, begun = reading.CallReader._read, threading.Event(), threading.Event(), threading.Event()
    n, n_left = len(wanted) // 2, 2

    def read(reader, extents, start, stop):
        begun.set()
        go_on.wait(60)
        real(reader, extents, start, stop)

    def interrupt(number, frame):
        nonlocal n_left
        is_ours = frame.f_code.co_filename.endswith(("crew.py", "threads.py"))
        if is_ours and begun.is_set() and n_left:
            n_left -= 1
            raise KeyboardInterrupt

    def send():
        while not left.wait(0.05):
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Ring, "open", lambda: None)
    monkeypatch.setattr("saev_torch.reading.many._MIN_MANY", 1)
    # These are read from a disk.
    data_set._many._gather = None
    before, sender = signal.signal(signal.SIGUSR1, interrupt), threading.Thread(target=send)
    with monkeypatch.context() as slow:
        slow.setattr(reading.CallReader, "_read", read)
        data_set._many._pace.is_slow = True
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            data_set.__getitems__(range(n))
        left.set()
    sender.join()
    signal.signal(signal.SIGUSR1, before)
    late = [thread for thread in threading.enumerate() if thread.name.startswith("saev_torch indexed")]
    assert late
    data_set._many._pace.is_slow = False
    batch = next(iter(DataLoader(data_set, batch_size=n, sampler=range(n, 2 * n))))
    go_on.set()
    for thread in late:
        thread.join()
    check_collated(batch, wanted.take(np.arange(n, 2 * n)))


def test_indexed_in_the_wrappers_of_torch(indexed):
    data_set, wanted = indexed
    subset = Subset(data_set, [5, 3, 2000])
    check_collated(next(iter(DataLoader(subset, batch_size=3))), wanted.take(np.array([5, 3, 2000])))
    check_sample(subset[1], wanted, 3)
    both = ConcatDataset([data_set, data_set])
    check_sample(both[len(data_set) + 1], wanted, 1)
    # Sample by sample, and so collated by torch itself: the same columns wherever [CLS] comes.
    for numbers in ([1, 2, 2521], [0, 1, 2520], [1, 0, 2], [0, 2520]):
        batch = next(iter(DataLoader(Subset(both, numbers), batch_size=3)))
        columns = wanted.take(np.array(numbers) % 2520).columns
        assert batch.keys() == {SINGULAR.get(key, key) for key in columns}
        for key, column in columns.items():
            assert batch[SINGULAR.get(key, key)].tolist() == column.tolist()
    sampler = BatchSampler(SequentialSampler(data_set), 5, drop_last=False)
    check_collated(next(iter(DataLoader(data_set, batch_sampler=sampler))), wanted.take(np.arange(5)))
    acts = next(iter(DataLoader(data_set, batch_size=4, collate_fn=lambda samples: [x["act"] for x in samples])))
    assert torch.stack(acts).numpy().tobytes() == wanted.columns["act"][:4].tobytes()


def test_indexed_with_and_without_labels(make_shards):
    """A column that only some samples of a batch have is not left out without a word."""
    labelled, plain = (IndexedDataset(IndexedConfig(shards=make_shards(Spec(labels=x)))) for x in (True, False))
    for numbers in ([0, 66], [66, 0]):
        loader = DataLoader(Subset(ConcatDataset([labelled, plain]), numbers), batch_size=2)
        with pytest.raises(ConfigError, match=r"samples with the same keys, got \['token_label'\] only in some"):
            next(iter(loader))


@pytest.mark.parametrize("i", [-1, 2520, 10**12, -(10**12)])
def test_indices_must_be_in_range(indexed, i):
    data_set, _ = indexed
    for read in (lambda: data_set[i], lambda: data_set.__getitems__([0, i]), lambda: data_set.index_map.from_global(i)):
        with pytest.raises(IndexError, match=rf"sample {i} is out of range: .* 2520"):
            read()
    # So that a plain loop over a data set ends.
    with pytest.raises(IndexError):
        data_set[len(data_set)]


@pytest.mark.parametrize("i", [1.0, 1.7, "3", None])
def test_indices_must_be_integers(indexed, i):
    data_set, _ = indexed
    for read in (lambda: data_set[i], lambda: data_set.__getitems__([i])):
        with pytest.raises(TypeError):
            read()


def test_integers_of_all_kinds(indexed):
    data_set, wanted = indexed
    for i in (5, np.int64(5), np.uint8(5), torch.tensor(5)):
        check_sample(data_set[i], wanted, 5)
    for numbers in ([5, 6], (5, 6), np.array([5, 6]), torch.tensor([5, 6])):
        assert len(data_set.__getitems__(numbers)) == 2


def test_indexed_attributes(indexed):
    data_set, _ = indexed
    assert data_set.cfg.layer == "all"
    assert data_set.metadata is data_set.md
    assert data_set.metadata.n_examples == 60
    assert data_set.d_model == 8
    assert isinstance(data_set.index_map, IndexMap)
    assert len(data_set.index_map) == len(data_set) == 2520
    assert data_set.index_map.from_global(21).layer_idx_in_shard == 1
    assert len(pickle.dumps(data_set)) < 10_000


def test_indexed_reads_when_asked(indexed):
    """Files are opened where they are read, and a change is noticed."""
    data_set, wanted = indexed
    path = data_set.cfg.shards / "acts000001.bin"
    check_sample(data_set[0], wanted, 0)
    path.unlink()
    with pytest.raises(ShardsNotFoundError, match=r"acts000001\.bin"):
        data_set[13 * 42]
    check_sample(data_set[1], wanted, 1)


# Both orders


def config(make_shards, kind=ShuffledConfig, **fields):
    spec = Spec(n_examples=60, content_tokens=20, examples_per_shard=13)
    return kind(**{"shards": make_shards(spec), "layer": 3, "batch_size": 16, "buffer_size": 8, **fields})


@pytest.mark.parametrize("layer", [-1, -3, 4, (3, 4)])
def test_layers_that_were_not_recorded(make_shards, layer):
    shards = make_shards()
    with pytest.raises(ConfigError, match=r"layer: expected one of the recorded layers \[3, 7\], got"):
        ShuffledActivations(ShuffledConfig(shards=shards, layer=layer))
    if layer != -1:
        for data_set, cfg in ((OrderedActivations, OrderedConfig), (IndexedDataset, IndexedConfig)):
            with pytest.raises(ConfigError, match=r"layer: expected one of the recorded layers \[3, 7\], got"):
                data_set(cfg(shards=shards, layer=layer))


def test_the_default_layer_must_be_changed(make_shards):
    with pytest.raises(ConfigError, match=r"got -1, the default, which must be changed"):
        ShuffledActivations(ShuffledConfig(shards=make_shards()))
    # Where it was recorded it is a layer like any other, and elsewhere it counts from the end.
    recorded = make_shards(layers=(4, -1, 5))
    assert next(iter(ShuffledActivations(ShuffledConfig(shards=recorded))))["act"][0, 0] % 1000 // 100 == 1
    assert next(iter(OrderedActivations(OrderedConfig(shards=make_shards(), layer=-1))))["act"][0, 0] == 101


@pytest.mark.parametrize("kind", CONFIGS)
def test_iterations_at_the_same_time(make_shards, kind):
    data_set = make_data_set(config(make_shards, kind))
    a, b = zip(*zip(data_set, data_set, strict=True), strict=True)
    alone = make_data_set(data_set.cfg)
    contracts.assert_same(list(a), list(alone))
    contracts.assert_same(list(b), list(alone))


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("saev_torch")]


@pytest.mark.parametrize("n_threads", [1, 4, 7])
def test_n_threads(make_shards, n_threads):
    iterator = iter(ShuffledActivations(config(make_shards, n_threads=n_threads)))
    next(iterator)
    assert len([name for name in threads() if "reader" in name]) == n_threads
    iterator.close()
    assert threads() == []


@pytest.fixture
def enable_gc():
    yield
    gc.enable()


@pytest.mark.usefixtures("enable_gc")
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("end", ["all", "break", "exception", "nothing taken", "not begun"])
def test_nothing_is_left_at_the_end(make_shards, kind, n_workers, end):
    """Whichever way an iteration ends; at once, not when memory happens to be collected."""
    loader = DataLoader(make_data_set(config(make_shards, kind)), num_workers=n_workers)
    before = Resources.now()
    gc.disable()
    if end == "all":
        for _ in loader:
            pass
        del _
    elif end == "break":
        for _ in loader:
            break
        del _
    elif end == "exception":
        with contextlib.suppress(KeyError):
            for _ in loader:
                raise KeyError
        del _
    elif end == "nothing taken":
        iter(loader)
    assert threads() == []
    # The pipes of the workers are closed by threads of torch, a moment later.
    assert before.leaks_now(PATIENCE_S) == []


@pytest.mark.parametrize("n_workers", [0, 2])
def test_ignored_labels(make_shards, n_workers):
    cfg = config(make_shards, tokens="all", ignore_labels=[0, 3])
    loader = DataLoader(ShuffledActivations(cfg), num_workers=n_workers)
    labels = torch.cat([batch["token_labels"] for batch in loader])
    assert set(labels.tolist()) == {-1, 1, 2, 4, 5, 6}
    wanted = (~np.isin(factory.oracle_labels(loader.dataset.metadata), [0, 3])).sum() + 60
    assert len(labels) == loader.dataset.n_samples == wanted


@pytest.mark.parametrize(
    ("fill", "n_rows", "is_enough"),
    [(0.0, 30, True), (0.5, 30, False), (1.0, 30, False), (0.5, 110, True), (1.0, 110, True)],
)
def test_min_buffer_fill(make_shards, monkeypatch, fill, n_rows, is_enough):
    """More must be read before the first batch comes; the batches are the same.

    Of 128 rows that the buffer holds some 90 will do: a batch is made from as many chunks as a lane has slots, and each
    chunk goes to as many slots, so that not all rows must be there for all of it to be mixed as well as it will be.
    """
    # Rows of 32 KB, which are too far apart to be read in one call.
    spec = Spec(n_examples=20, content_tokens=10, layers=(3,), d_model=8192, labels=False)
    cfg = ShuffledConfig(
        shards=make_shards(spec), layer=3, batch_size=2, buffer_size=64, n_threads=1, min_buffer_fill=fill,
        batch_timeout_s=60.0 if is_enough else 1.0,
    )  # fmt: skip
    wanted = list(ShuffledActivations(dataclasses.replace(cfg, min_buffer_fill=0.0)))
    real, n_read, go_on = reading._preadv, [0], threading.Event()

    def preadv(*args):
        if n_read[0] >= n_rows * 8192 * 4:
            go_on.wait(60)
        n = real(*args)
        n_read[0] += n
        return n

    monkeypatch.setattr(reading, "_preadv", preadv)
    iterator = iter(ShuffledActivations(cfg))
    if is_enough:
        first = next(iterator)
        go_on.set()
        contracts.assert_same([first, *iterator], wanted)
    else:
        with pytest.raises(StalledReadError):
            next(iterator)
        go_on.set()


# A read that does not return


@pytest.fixture
def stalled(monkeypatch):
    """Let reads of shard 2 hang, in this process and in those that it forks, until the test is over."""
    go_on = threading.Event()
    real = reading._preadv

    def preadv(fd, *args):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("acts000002.bin"):
            go_on.wait(60)
        return real(fd, *args)

    monkeypatch.setattr(reading, "_preadv", preadv)
    yield go_on
    go_on.set()
    wait_until(lambda: not threads())


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_stalled_read(make_shards, stalled, kind, n_workers):
    """The error comes when it should, and says which file, where in it, and for how long."""
    cfg = config(make_shards, kind, batch_timeout_s=1.0)
    loader = DataLoader(
        make_data_set(cfg), num_workers=n_workers, multiprocessing_context="fork" if n_workers else None
    )
    began = time.monotonic()
    message = r"expected a batch within 1\.0 s.*acts000002\.bin at offset \d+ for \d+\.\d s"
    # The reads that hang do so for a minute.
    err = contracts.check_fails(loader, StalledReadError, message, within_s=45)
    assert time.monotonic() - began > 1.0
    assert isinstance(err, TimeoutError)
    stalled.set()


@pytest.mark.slow
def test_a_slow_consumer_is_no_stall(make_shards):
    for batch in ShuffledActivations(config(make_shards, batch_timeout_s=2.0, batch_size=600)):
        time.sleep(2.5)
        del batch


def test_no_timeout(make_shards):
    cfg = config(make_shards, batch_timeout_s=float("inf"))
    assert len(list(ShuffledActivations(cfg))) == 75


def test_a_slow_disk_is_no_stall(make_shards, monkeypatch):
    """As long as batches come within the time."""
    real = reading._preadv
    monkeypatch.setattr(reading, "_preadv", lambda *args: (time.sleep(0.002), real(*args))[1])
    cfg = config(make_shards, batch_timeout_s=30.0, batch_size=50, n_threads=1)
    assert len(list(ShuffledActivations(cfg))) == 24


# Logging


@pytest.fixture
def quiet_again():
    logger = logging.getLogger("saev_torch")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.mark.parametrize("kind", CONFIGS)
def test_debug(make_shards, kind, caplog, quiet_again):
    list(make_data_set(config(make_shards, kind)))
    assert caplog.records == []
    cfg = config(make_shards, kind, debug=True, log_every_s=1e-9)
    n_batches = len(list(make_data_set(cfg)))
    lines = [record.getMessage() for record in caplog.records]
    assert all(str(cfg.shards) in line for line in lines)
    assert "epoch 0" in lines[0]
    assert sum("samples/s" in line for line in lines) == n_batches


@pytest.mark.slow
def test_debug_without_logging_set_up(make_shards):
    """It is seen on stderr, from workers too; without it nothing is."""
    script = (
        "import sys; from torch.utils.data import DataLoader; from saev_torch import *\n"
        "cfg = ShuffledConfig(shards=sys.argv[1], layer=3, debug=sys.argv[2] == 'debug')\n"
        "list(DataLoader(ShuffledActivations(cfg), num_workers=int(sys.argv[3])))\n"
        "IndexedDataset(IndexedConfig(shards=sys.argv[1], layer=3, debug=cfg.debug))\n"
    )
    shards = make_shards()
    for debug, n_workers in (("debug", "2"), ("", "2")):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, shards, debug, n_workers],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert ("epoch 0" in done.stderr and "66 samples" in done.stderr) if debug else done.stderr == ""


# A local copy


@pytest.fixture
def tmpdir_env(tmp_path, monkeypatch):
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return place


def copies(place):
    return [path.parent for path in place.rglob("metadata.json")]


def test_use_tmpdir(make_shards, tmpdir_env):
    cfg = config(make_shards, use_tmpdir=True)
    wanted = list(ShuffledActivations(config(make_shards)))
    times = {path: path.stat().st_mtime_ns for path in cfg.shards.iterdir()}
    for _ in range(2):
        data_set = ShuffledActivations(cfg)
        contracts.assert_same(list(DataLoader(data_set, num_workers=2)), wanted)
    assert {path: path.stat().st_mtime_ns for path in cfg.shards.iterdir()} == times, "written into the original"
    (copy,) = copies(tmpdir_env)
    assert copy.parent.stat().st_mode & 0o077 == 0
    for path in copy.iterdir():
        assert path.read_bytes() == (cfg.shards / path.name).read_bytes()
    # The copy is what is read: the original may go away, a data set that is in use does not mind.
    data_set = ShuffledActivations(cfg)
    (cfg.shards / "acts000001.bin").unlink()
    contracts.assert_same(list(data_set), wanted)
    with pytest.raises(ShardsNotFoundError, match=r"acts000001\.bin"):
        ShuffledActivations(cfg)


def test_use_tmpdir_of_a_changed_original(make_shards, tmpdir_env):
    cfg = config(make_shards, use_tmpdir=True)
    before = next(iter(OrderedActivations(config(make_shards, OrderedConfig))))["act"]
    ShuffledActivations(cfg)
    for i in range(5):
        path = cfg.shards / f"acts{i:06}.bin"
        (np.fromfile(path, "<f4") * 2).tofile(path)
        os.utime(path, ns=(i, i))
    batch = next(iter(ShuffledActivations(cfg)))
    # The other one is of no use any more.
    assert len(copies(tmpdir_env)) == 1
    assert batch["act"].max() > before.max() * 1.5


@pytest.mark.slow
def test_use_tmpdir_in_several_processes(make_shards, tmpdir_env):
    """They all ask at once: one copies, the others wait, all read the same."""
    script = (
        "import sys, time, contracts; from saev_torch import *; from saev_torch.format import localcopy\n"
        "copy_file = localcopy._copy_file\n"
        "def copy_slowly(*args):\n"
        "    time.sleep(0.1)\n"
        "    print(args[1])\n"
        "    return copy_file(*args)\n"
        "localcopy._copy_file = copy_slowly\n"
        "cfg = ShuffledConfig(shards=sys.argv[1], layer=3, batch_size=16, buffer_size=8, use_tmpdir=True)\n"
        "print(contracts.digest(ShuffledActivations(cfg)))\n"
    )
    cfg = config(make_shards)
    running = [
        subprocess.Popen([sys.executable, "-c", script, cfg.shards], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=240)[0].split() for process in running]
    assert [output[-1] for output in outputs] == [contracts.digest(ShuffledActivations(cfg))] * 3
    copied = [name for output in outputs for name in output[:-1]]
    assert sorted(copied) == sorted(path.name for path in cfg.shards.iterdir())
    assert len(copies(tmpdir_env)) == 1
    assert not list(tmpdir_env.rglob("*.part"))


def test_use_tmpdir_after_a_copy_that_was_cut_off(make_shards, tmpdir_env):
    cfg = config(make_shards, use_tmpdir=True)
    ShuffledActivations(cfg)
    (copy,) = copies(tmpdir_env)
    # As a killed process leaves it: under another name, which nobody takes for a copy.
    part = copy.rename(copy.with_suffix(".part"))
    (part / "acts000001.bin").write_bytes(b"rubbish")
    contracts.assert_same(list(ShuffledActivations(cfg)), list(ShuffledActivations(config(make_shards))))
    assert copies(tmpdir_env) == [copy]


def test_use_tmpdir_where_nothing_can_be_written(make_shards, tmpdir_env):
    cfg = config(make_shards, use_tmpdir=True)
    (tmpdir_env / f"saev_torch-{os.getuid()}").write_text("a file in its place")
    with pytest.raises((WriteError, ReadError), match="saev_torch-"):
        ShuffledActivations(cfg)
