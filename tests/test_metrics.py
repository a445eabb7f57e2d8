"""What a loader says of itself while it runs: here, in workers, and to Lightning's loggers."""

import copy
import pickle
import time

import lightning_runs
import pytest
import torch

from saev_torch import ConfigError, OrderedConfig, OrderedDataLoader, ShuffledConfig, ShuffledDataLoader
from saev_torch.processes.counters import Counters

NAMES = {
    "loader/samples_per_s", "loader/bytes_per_s", "loader/read_mb", "loader/read_mb_s", "loader/buffer_fill",
    "loader/n_readers", "loader/wait_disk", "loader/wait_plan", "loader/wait_consumer",
}  # fmt: skip


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_figures_of_an_epoch(make_shards, context: str | None) -> None:
    shards = make_shards(n_examples=200)
    n_workers = 0 if context is None else 2
    cfg = ShuffledConfig(shards=shards, layer=3, batch_size=32, buffer_size=8)
    loader = ShuffledDataLoader(cfg, num_workers=n_workers, multiprocessing_context=context)
    times = [time.monotonic()]
    assert loader.metrics()["loader/read_mb"] == 0
    times.append(time.monotonic())
    for _ in loader:
        pass
    times.append(time.monotonic())
    found = loader.metrics()
    times.append(time.monotonic())
    assert found.keys() == NAMES
    # All samples in the time between the two calls, and of 8 float32 values each.
    assert 1200 / (times[3] - times[0]) <= found["loader/samples_per_s"] <= 1200 / (times[2] - times[1])
    assert found["loader/bytes_per_s"] == pytest.approx(32 * found["loader/samples_per_s"])
    assert found["loader/read_mb"] == pytest.approx(1200 * 32 / 1e6)
    assert all(0 <= found[f"loader/{name}"] <= 1 for name in ("buffer_fill", "wait_disk", "wait_plan", "wait_consumer"))
    # Nothing has happened since.
    assert loader.metrics()["loader/samples_per_s"] == 0
    loader.shutdown()


def test_while_it_runs(make_shards) -> None:
    cfg = OrderedConfig(shards=make_shards(n_examples=250, content_tokens=50), layer=3, batch_size=32)
    loader = OrderedDataLoader(cfg)
    batches = iter(loader)
    next(batches)
    times = [time.monotonic()]
    loader.metrics()
    # What was waited for is known when the next batch is taken.
    for _ in range(10):
        time.sleep(0.05)
        next(batches)
    found = loader.metrics()
    times.append(time.monotonic())
    assert found["loader/n_readers"] == 1
    assert found["loader/buffer_fill"] > 0
    # The consumer took its time, with the buffer full: a third of half a second, whatever else took time.
    assert found["loader/wait_consumer"] * (times[1] - times[0]) > 0.3 * 0.5
    assert 320 / (times[1] - times[0]) <= found["loader/samples_per_s"] <= 320 / 0.5
    del batches
    loader.shutdown()


def test_several_readers_add_up() -> None:
    counters = Counters()
    for reader, rank in ((0, 0), (1, 1), (2, 0)):
        row = counters.begin(rank)
        row["n_samples"], row["nbytes"], row["fill"], row["disk_s"] = 100, 4e6, reader / 4, 1.0
    sums = counters.sums(0)
    assert (sums["n_samples"], sums["nbytes"], sums["disk_s"], sums["n_active"]) == (200, 8e6, 2, 2)
    assert sums["fill"] == 0.25
    assert counters.sums(1)["n_samples"] == 100
    assert counters.sums(2)["n_active"] == 0
    time.sleep(0.1)
    found = counters.rates(0)
    assert 0 < found["loader/samples_per_s"] < 2000
    assert found["loader/read_mb"] == 8


@pytest.mark.parametrize("world_size", [64, 128])
def test_a_rank_of_many(make_shards, world_size: int) -> None:
    """All of its workers are seen, each in a row of its own."""
    cfg = OrderedConfig(shards=make_shards(n_examples=250, content_tokens=100), layer=3, batch_size=4)
    loader = OrderedDataLoader(cfg, rank=3, world_size=world_size, num_workers=8, prefetch_factor=1)
    batches = iter(loader)
    n_taken = 16
    for _ in range(n_taken):
        next(batches)
    found = loader.metrics()
    assert found["loader/n_readers"] == 8
    n_taken += len(list(batches))
    # To the last sample: rows have one writer each.
    assert loader.counters.sums(3)["n_samples"] == 4 * n_taken
    loader.shutdown()


def test_two_iterations_at_once(make_shards) -> None:
    cfg = ShuffledConfig(shards=make_shards(n_examples=60), layer=3, batch_size=16, buffer_size=4)
    loader = ShuffledDataLoader(cfg, num_workers=1)
    pairs = zip(loader, loader, strict=True)
    next(pairs)
    assert loader.metrics()["loader/n_readers"] == 2
    assert sum(1 for _ in pairs) == len(loader) - 1
    assert loader.counters.sums(0)["n_samples"] == 2 * loader.n_samples
    loader.shutdown()


def test_rows_are_used_again() -> None:
    counters = Counters()
    for _ in range(600):
        row = counters.begin(0)
        row["n_samples"] += 1
        row["is_active"] = 0
    # Those of processes that were killed, too.
    for _ in range(600):
        row = counters.begin(0)
        row["n_samples"] += 1
        row["is_active"] = 1 << 30
    assert counters.sums(0)["n_samples"] == 1200


def test_a_copy_counts_from_0() -> None:
    counters = Counters()
    counters.begin(0)["n_samples"] = 100
    for other in (copy.deepcopy(counters), pickle.loads(pickle.dumps(counters))):
        assert other.sums(0)["n_samples"] == 0
        other.begin(0)["n_samples"] = 7
        assert counters.sums(0)["n_samples"] == 100
    assert len(pickle.dumps(counters)) < 200


@pytest.mark.slow
@pytest.mark.filterwarnings(*(f"ignore:{message}" for message in lightning_runs.WARNINGS))
def test_lightning(make_shards, tmp_path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers.logger import DummyLogger

    from saev_torch.lightning import LoaderMetrics

    class Logged(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics, step=None) -> None:
            self.found.append((step, metrics))

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def training_step(self, batch, batch_idx):
            return self.linear(batch["act"]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    loader = ShuffledDataLoader(ShuffledConfig(shards=make_shards(n_examples=100), layer=3, batch_size=50))
    logger = Logged()
    trainer = lightning.Trainer(
        max_steps=9, logger=logger, callbacks=[LoaderMetrics(every_n_steps=4)], accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), loader)
    loader.shutdown()
    ours = [(step, found) for step, found in logger.found if "loader/samples_per_s" in found]
    assert [step for step, _ in ours] == [4, 8]
    assert found_names(ours) >= NAMES | {"loader/example_entropy", "loader/token_coverage_relative"}
    with pytest.raises(ConfigError, match="every_n_steps"):
        LoaderMetrics(0)


def found_names(logged: list[tuple[int, dict[str, float]]]) -> set[str]:
    return set.union(*(set(found) for _, found in logged))
