"""Lightning: a run that is resumed from any checkpoint trains on the batches that it would have trained on."""

import dataclasses
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import factory
import lightning_runs
import pytest
from lightning.fabric.utilities.data import get_all_subclasses
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning_runs import Model, Trainee, make_trainer
from torch.utils.data import DataLoader

from saev_torch import (
    OrderedActivations,
    OrderedDataLoader,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    StateError,
    StreamDigest,
    make_ordered_config,
)
from saev_torch.lightning import ActivationsCheckpoint, ActivationsDataModule

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in lightning_runs.WARNINGS]

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> ShuffledConfig:
    """20 batches, the last not full."""
    root = tmp_path_factory.mktemp("lightning") / "shards"
    shards = factory.make_shards(root, n_examples=39, d_model=4, examples_per_shard=11)
    return ShuffledConfig(shards=shards, layer=7, batch_size=12, buffer_size=8)


@pytest.fixture(scope="module")
def epochs(cfg: ShuffledConfig) -> list[list[int]]:
    """Digests of the batches of four epochs."""
    ds = ShuffledActivations(cfg)
    return [[batch.digest for batch in ds] for _ in range(4)]


# Ways to train


def by_module(cfg: ShuffledConfig, validate: bool, n_workers: int) -> tuple[dict[str, Any], list[Callback]]:
    val_cfg = make_ordered_config(cfg) if validate else None
    return {"datamodule": ActivationsDataModule(cfg, val_cfg, num_workers=n_workers)}, []


def by_loader(cfg: ShuffledConfig, validate: bool, n_workers: int) -> tuple[dict[str, Any], list[Callback]]:
    val = OrderedDataLoader(make_ordered_config(cfg)) if validate else None
    return {"train_dataloaders": ShuffledDataLoader(cfg, num_workers=n_workers), "val_dataloaders": val}, []


def by_plain_loader(cfg: ShuffledConfig, validate: bool, n_workers: int) -> tuple[dict[str, Any], list[Callback]]:
    ds = ShuffledActivations(cfg)
    val = DataLoader(OrderedActivations(make_ordered_config(cfg))) if validate else None
    loaders = {"train_dataloaders": DataLoader(ds, num_workers=n_workers), "val_dataloaders": val}
    return loaders, [ActivationsCheckpoint(ds)]


Way = Callable[[ShuffledConfig, bool, int], tuple[dict[str, Any], list[Callback]]]
WAYS: dict[str, Way] = {"module": by_module, "loader": by_loader, "plain loader": by_plain_loader}


def fit(
    way: str,
    cfg: ShuffledConfig,
    model: Model,
    callbacks: tuple[Callback, ...] = (),
    *,
    resume: Path | None = None,
    validate: bool = False,
    n_workers: int = 0,
    save: Path | None = None,
    **options: Any,
) -> StreamDigest | None:
    """Train; return the digest where the way has one."""
    data, more = WAYS[way](cfg, validate, n_workers)
    trainer = make_trainer((*more, *callbacks), checkpoints=bool(callbacks), **options)
    trainer.fit(model, ckpt_path=resume, **data)
    if save is not None:
        trainer.save_checkpoint(save)
    source = data.get("datamodule", data.get("train_dataloaders"))
    if isinstance(source, ShuffledDataLoader):
        source.shutdown()
    return getattr(source, "digest", None)


def is_sequence(model: Model, epochs: list[list[int]]) -> bool:
    """Whether each batch is the one that Lightning's numbers name: a new order in each epoch."""
    return all(epochs[epoch][i] == digest for epoch, i, digest in model.seen)


# Every checkpoint of a run: what the trainer does, and when it saves.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epochs": ({"max_epochs": 3}, {"every_n_train_steps": 7}),
    "saved at the end of epochs": ({"max_epochs": 3}, {}),
    "limit_train_batches": ({"max_epochs": 3, "limit_train_batches": 9}, {"every_n_train_steps": 4}),
    "limit_train_batches, a share": ({"max_epochs": 3, "limit_train_batches": 0.5}, {"every_n_train_steps": 5}),
    "max_steps": ({"max_steps": 47}, {"every_n_train_steps": 10}),
    "max_steps and limit_train_batches": ({"max_steps": 30, "limit_train_batches": 10}, {"every_n_train_steps": 5}),
    "val_check_interval": ({"max_epochs": 3, "validate": True, "val_check_interval": 6}, {}),
    "val_check_interval, a share": ({"max_epochs": 3, "validate": True, "val_check_interval": 0.4}, {}),
}


# Asked for `estimated_stepping_batches`, Lightning makes the loader before it loads the checkpoint, and does not give a
# loader its state back any more: there it takes the module, or the callback.
ESTIMATED = [(way, run, True) for way in ("module", "plain loader") for run in ("epochs", "limit_train_batches")]


@pytest.mark.parametrize(("way", "run", "estimate"), [*itertools.product(WAYS, RUNS, [False]), *ESTIMATED])
def test_resume(
    way: str, run: str, estimate: bool, cfg: ShuffledConfig, epochs: list[list[int]], tmp_path: Path
) -> None:
    """From some checkpoint in the middle of an epoch and some at its end; the batches and the digest are the same."""
    options, saving = RUNS[run]
    whole = Model(estimate=estimate)
    digest = fit(way, cfg, whole, (ModelCheckpoint(tmp_path, save_top_k=-1, **saving),), **options)
    assert is_sequence(whole, epochs)
    checkpoints = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(checkpoints) > 2
    # The last one was saved at the end of the run.
    for path in checkpoints[:-1][:: max(1, len(checkpoints) // 2)]:
        rest = Model(estimate=estimate)
        resumed_digest = fit(way, cfg, rest, resume=path, **options)
        done = len(whole.seen) - len(rest.seen)
        assert 0 < done < len(whole.seen)
        assert rest.seen == whole.seen[done:], path.name
        if way == "module":
            assert resumed_digest == digest


@pytest.mark.parametrize("way", WAYS)
def test_resume_with_other_workers(way: str, cfg: ShuffledConfig, epochs: list[list[int]], tmp_path: Path) -> None:
    """2 workers, then 0; then 1, from a checkpoint of the resumed run."""
    whole, first, second = Model(), Model(), Model()
    saving = ModelCheckpoint(tmp_path / "a", save_top_k=-1, every_n_train_steps=7)
    fit(way, cfg, whole, (saving,), max_epochs=2, n_workers=2)
    assert is_sequence(whole, epochs)
    saving = ModelCheckpoint(tmp_path / "b", save_top_k=-1, every_n_train_steps=7)
    fit(way, cfg, first, (saving,), resume=tmp_path / "a" / "epoch=0-step=14.ckpt", max_epochs=2)
    assert first.seen == whole.seen[14:]
    fit(way, cfg, second, resume=tmp_path / "b" / "epoch=1-step=28.ckpt", max_epochs=2, n_workers=1)
    assert second.seen == whole.seen[28:]


@pytest.mark.parametrize("way", ["module", "plain loader"])
def test_train_on_after_max_steps(way: str, cfg: ShuffledConfig, epochs: list[list[int]], tmp_path: Path) -> None:
    """Lightning takes the epoch for over that `max_steps` broke off, and counts on strangely; the batches are right."""
    path = tmp_path / "stopped.ckpt"
    whole = fit(way, cfg, Model(), max_steps=50)
    for steps in (5, 19, 33):
        first, second = Model(), Model()
        fit(way, cfg, first, max_steps=steps, save=path)
        digest = fit(way, cfg, second, max_steps=50, resume=path)
        assert [seen[2] for seen in first.seen + second.seen] == list(itertools.chain(*epochs))[:50]
        assert digest == whole


@pytest.mark.parametrize("way", ["module", "plain loader"])
def test_a_step_that_fails(way: str, cfg: ShuffledConfig, epochs: list[list[int]], tmp_path: Path) -> None:
    """The batch was fetched, but not trained on: it comes again, also where it is the last of an epoch."""
    whole = fit(way, cfg, Model(), max_epochs=2)
    for step in (0, 13, 19, 20):
        first, second = Model(fail_at=step), Model()
        with pytest.raises(KeyError, match="preempted"):
            fit(way, cfg, first, (OnExceptionCheckpoint(tmp_path / str(step)),), max_epochs=2)
        (path,) = (tmp_path / str(step)).iterdir()
        digest = fit(way, cfg, second, resume=path, max_epochs=2)
        assert [seen[2] for seen in first.seen + second.seen] == epochs[0] + epochs[1]
        assert digest == whole


class Watch(Callback):
    """Writes down where the loader says it stands while a batch is trained on, and after it."""

    def __init__(self, loader: ShuffledDataLoader) -> None:
        self.loader = loader
        self.during: list[int] = []
        self.after: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.during.append(self.loader.state_dict()["batch"])

    def on_train_batch_end(self, *args: Any) -> None:
        self.after.append(self.loader.state_dict()["batch"])


@pytest.mark.parametrize("n_workers", [0, 2])
def test_lightning_fetches_no_batch_ahead(cfg: ShuffledConfig, n_workers: int) -> None:
    """It knows the length, so it need not look ahead; the module's loader counts a batch only once it is trained on."""
    loader = ShuffledDataLoader(cfg, num_workers=n_workers)
    watch = Watch(loader)
    make_trainer([watch], max_epochs=1).fit(Model(), loader)
    # Behind the last batch it is the start of the next epoch.
    assert watch.during == watch.after == [*range(1, 20), 0]
    loader.shutdown()

    data = ActivationsDataModule(cfg, num_workers=n_workers)
    watch = Watch(data.train_dataloader())
    make_trainer([watch], max_epochs=1).fit(Model(), datamodule=data)
    assert watch.during == list(range(20))
    assert watch.after == [*range(1, 20), 0]


@pytest.mark.parametrize("way", WAYS)
def test_estimated_stepping_batches(way: str, cfg: ShuffledConfig) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({"max_epochs": 3}, 60),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 21),
        ({"max_epochs": 2, "limit_train_batches": 7}, 14),
        ({"max_steps": 30, "max_epochs": 5}, 30),
    ]
    for options, estimated in cases:
        model = Model(estimate=True)
        fit(way, cfg, model, **options)
        assert model.estimated == estimated


@pytest.mark.parametrize("way", WAYS)
def test_validation(way: str, cfg: ShuffledConfig) -> None:
    """Each time all of the validation data, in the order of the file."""
    in_file_order = [batch.digest for batch in OrderedActivations(make_ordered_config(cfg))]
    for interval, n_runs in ((5, 4), (0.5, 2), (1.0, 1)):
        model = Model()
        fit(way, cfg, model, validate=True, max_epochs=1, val_check_interval=interval, num_sanity_val_steps=0)
        assert model.validated == [in_file_order] * n_runs


def test_validation_on_shuffled_batches(cfg: ShuffledConfig) -> None:
    model = Model()
    data = ActivationsDataModule(cfg, dataclasses.replace(cfg, seed=5))
    make_trainer(max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=data)
    assert [sorted(x) for x in model.validated] != [sorted(digest for *_, digest in model.seen)]
    assert len(model.validated[0]) == 20


def test_loaders_made_anew_in_each_epoch(cfg: ShuffledConfig, epochs: list[list[int]], tmp_path: Path) -> None:
    whole, rest = Model(), Model()
    options = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    fit("module", cfg, whole, (ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=27),), **options)
    assert is_sequence(whole, epochs)
    fit("module", cfg, rest, resume=tmp_path / "epoch=1-step=27.ckpt", **options)
    assert rest.seen == whole.seen[27:]


def test_a_checkpoint_without_a_module(cfg: ShuffledConfig, epochs: list[list[int]], tmp_path: Path) -> None:
    """Without a state of its own the module goes by Lightning's counts."""
    fit("plain loader", cfg, Model(), (ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=7),), max_epochs=2)
    rest = Model()
    fit("module", cfg, rest, resume=tmp_path / "epoch=1-step=28.ckpt", max_epochs=2)
    assert len(rest.seen) == 12
    assert is_sequence(rest, epochs)


def test_a_checkpoint_of_another_config_is_refused(cfg: ShuffledConfig, tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    for way in ("module", "plain loader"):
        fit(way, cfg, Model(), max_steps=5, save=path)
        with pytest.raises(StateError, match="seed: expected 3, got 17"):
            fit(way, dataclasses.replace(cfg, seed=3), Model(), resume=path, max_epochs=1)


def test_what_the_user_chose_wins(cfg: ShuffledConfig, epochs: list[list[int]]) -> None:
    """A trainer that begins says epoch 0, but the loader was told where to go on."""
    loader = ShuffledDataLoader(cfg)
    state = loader.dataset.state_dict(n_batches=5, epoch=2)
    choices = [
        (lambda: loader.set_epoch(2), epochs[2]),
        (lambda: loader.load_state_dict(state), epochs[2][5:]),
        (lambda: None, epochs[3]),
    ]
    for choose, wanted in choices:
        model = Model()
        choose()
        make_trainer(max_epochs=1).fit(model, loader)
        assert [digest for *_, digest in model.seen] == wanted
    loader.shutdown()


@pytest.fixture
def untouched() -> Iterator[None]:
    """Undo what Lightning leaves on the classes of loaders where it failed to make one."""
    yield
    for cls in (DataLoader, *get_all_subclasses(DataLoader)):
        for name in ("__setattr__", "__delattr__", "__init__"):
            if f"__old{name}" in cls.__dict__:
                setattr(cls, name, getattr(cls, f"__old{name}"))
                delattr(cls, f"__old{name}")


@pytest.mark.usefixtures("untouched")
def test_loaders_after_one_that_lightning_could_not_make(cfg: ShuffledConfig, epochs: list[list[int]]) -> None:
    class Broken(LightningDataModule):
        def train_dataloader(self) -> Any:
            raise ValueError("no data today")

    with pytest.raises(ValueError, match="no data today"):
        make_trainer(max_epochs=1).fit(Model(), datamodule=Broken())
    loader = ShuffledDataLoader(cfg)
    for epoch in range(2):
        assert [batch.digest for batch in loader] == epochs[epoch]
        assert len(pickle.dumps(loader)) < 20_000
    assert "__pl_saved_kwargs" in loader.__dict__
    assert "__pl_attrs_record" not in loader.__dict__
    begun = iter(loader)
    next(begun)
    assert [batch.digest for batch in pickle.loads(pickle.dumps(loader))] == epochs[3]


def test_one_module_for_two_runs(cfg: ShuffledConfig, epochs: list[list[int]]) -> None:
    data, first, second = ActivationsDataModule(cfg), Model(), Model()
    make_trainer(max_epochs=1).fit(first, datamodule=data)
    make_trainer(max_steps=7).fit(second, datamodule=data)
    assert is_sequence(first, epochs)
    assert is_sequence(second, epochs)


def test_the_module_outside_of_a_trainer(cfg: ShuffledConfig, epochs: list[list[int]]) -> None:
    data = ActivationsDataModule(cfg)
    assert [batch.digest for batch in data.train_dataloader()] == epochs[0]
    make_trainer(max_epochs=1).fit(Model(), datamodule=data)
    assert len(list(data.train_dataloader())) == 20


def test_a_module_without_validation_promises_none(cfg: ShuffledConfig) -> None:
    """Lightning would warn, and so fail the test, if it found validation data that no step uses."""
    make_trainer(max_epochs=1).fit(Trainee(), datamodule=ActivationsDataModule(cfg))
