"""Trainers that others made: each hands on our batches as they are, and its ranks together see each sample once."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import lightning
import lightning.pytorch.cli
import lightning_runs
import pytest
import pytorch_lightning
import pytorch_lightning.cli
import torch
from torch.utils.data import DataLoader

from saev_torch import (
    ConfigError,
    IndexedConfig,
    IndexedDataset,
    OrderedActivations,
    OrderedConfig,
    OrderedDataLoader,
    ShuffledActivations,
    ShuffledConfig,
    ShuffledDataLoader,
    make_ordered_config,
)
from saev_torch.lightning import ActivationsCheckpoint, ActivationsDataModule, LoaderMetrics

trainer_runs = pytest.importorskip("trainer_runs", reason="transformers is not installed: it is in the extra demo")
TrainerCallback = pytest.importorskip("transformers").TrainerCallback

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in lightning_runs.WARNINGS]

HERE = Path(__file__).parent
FIELDS: dict[str, Any] = {"layer": 7, "batch_size": 12, "buffer_size": 8}
N_BATCHES = 31
PACKAGES: dict[str, Any] = {"lightning": lightning.pytorch, "pytorch_lightning": pytorch_lightning}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> ShuffledConfig:
    """31 batches, the last not full."""
    root = tmp_path_factory.mktemp("trainers") / "shards"
    shards = factory.make_shards(root, n_examples=61, d_model=4, examples_per_shard=13)
    return ShuffledConfig(shards=shards, **FIELDS)


@pytest.fixture(scope="module")
def epochs(cfg: ShuffledConfig) -> list[list[Any]]:
    """Batches of two epochs."""
    ds = ShuffledActivations(cfg)
    return [list(ds) for _ in range(2)]


@pytest.fixture(scope="module")
def two_epochs(epochs: list[list[Any]]) -> list[Any]:
    """The samples of each batch of two epochs."""
    return [trainer_runs.samples(batch) for batch in itertools.chain(*epochs)]


# Two processes


@pytest.fixture(scope="module")
def ranks(cfg: ShuffledConfig, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks found, that torchrun started."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = {"shards": str(cfg.shards), "fields": FIELDS, "out": str(out)}
    command += [str(HERE / "trainer_runs.py"), json.dumps(arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def test_ranks_see_the_sequence(ranks: list[dict[str, Any]], two_epochs: list[Any]) -> None:
    """Rank r the batches r, r + 2, ...; the first comes again at the end, so that both have equally many."""
    for epoch in range(2):
        whole = two_epochs[epoch * N_BATCHES :][:N_BATCHES]
        parts = [found["fabric, plain"][16 * epoch :][:16] for found in ranks]
        assert [batch for pair in zip(*parts, strict=True) for batch in pair] == [*whole, whole[0]]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("way", ["ready-made", "plain", "module"])
def test_ranks_of_lightning(ranks: list[dict[str, Any]], epochs: list[list[Any]], package: str, way: str) -> None:
    """No sampler is put in, which would share the batches once more."""
    for rank, found in enumerate(ranks):
        wanted = [batch.digest for whole in epochs for batch in [*whole, whole[0]][rank::2]]
        assert found[f"{package}, {way}"] == wanted


@pytest.mark.parametrize("run", ["rank 0 of 1", "rank 0 of 1, not dispatched"])
def test_accelerate_shares_for_the_trainer(ranks: list[dict[str, Any]], two_epochs: list[Any], run: str) -> None:
    for epoch in range(2):
        whole = two_epochs[epoch * N_BATCHES :][:N_BATCHES]
        parts = [found[f"Trainer, {run}"][16 * epoch :][:16] for found in ranks]
        seen = {tuple(sample) for part in parts for batch in part for sample in batch}
        assert seen == {tuple(sample) for batch in whole for sample in batch}
        assert max(len(batch) for part in parts for batch in part) == 12


def test_a_trainer_that_shares_once_more(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "get_train_dataloader of a Trainer" in found["error"]


# Hugging Face's Trainer


def ready_made(cfg: ShuffledConfig) -> ShuffledDataLoader:
    return ShuffledDataLoader(cfg, num_workers=1)


OPTIONS: dict[str, tuple[Callable[[ShuffledConfig], Any], dict[str, Any]]] = {
    "as it is": (ShuffledActivations, {}),
    "all columns": (ShuffledActivations, {"remove_unused_columns": False}),
    "workers": (ShuffledActivations, {"dataloader_num_workers": 2}),
    "persistent": (ShuffledActivations, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    "dispatched": (ShuffledActivations, {"accelerator_config": {"dispatch_batches": True}}),
    "split": (ShuffledActivations, {"accelerator_config": {"split_batches": True}}),
    "accumulated": (ShuffledActivations, {"gradient_accumulation_steps": 3}),
    "ready-made": (ready_made, {"kind": trainer_runs.ReadyMade, "per_device_train_batch_size": 8}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_trainer_gets_batches_as_they_are(
    cfg: ShuffledConfig, two_epochs: list[Any], tmp_path: Path, case: str
) -> None:
    make, options = OPTIONS[case]
    model = trainer_runs.train(make(cfg), tmp_path, **options)
    assert model.shapes == [(len(batch), 4) for batch in two_epochs]
    assert model.seen == two_epochs


@pytest.mark.parametrize("options", [{}, {"remove_unused_columns": False}])
def test_the_trainer_gathers_no_batches(cfg: ShuffledConfig, tmp_path: Path, options: dict[str, Any]) -> None:
    """Its default is to gather eight."""
    with pytest.raises(ConfigError, match=r"TrainingArguments.per_device_train_batch_size .*: expected 1, got 8"):
        trainer_runs.train(ShuffledActivations(cfg), tmp_path, per_device_train_batch_size=8, **options)


def test_a_collator_of_ones_own(cfg: ShuffledConfig, two_epochs: list[Any], tmp_path: Path) -> None:
    def join(batches: list[Any]) -> dict[str, Any]:
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    options = {"data_collator": join, "per_device_train_batch_size": 4}
    model = trainer_runs.train(ShuffledActivations(cfg), tmp_path, num_train_epochs=1, **options)
    assert [len(batch) for batch in model.seen] == [48] * 7 + [2 * 12 + 6]
    assert list(itertools.chain(*model.seen)) == list(itertools.chain(*two_epochs[:N_BATCHES]))


def test_the_trainer_evaluates(cfg: ShuffledConfig, tmp_path: Path) -> None:
    options = {"eval_strategy": "epoch", "per_device_eval_batch_size": 1, "num_train_epochs": 1}
    evaluated = OrderedActivations(make_ordered_config(cfg))
    model = trainer_runs.train(ShuffledActivations(cfg), tmp_path, eval_dataset=evaluated, **options)
    assert len(model.seen) == N_BATCHES
    # The next epoch of what was evaluated is its second.
    assert evaluated.state_dict()["epoch"] == 1


def test_single_samples_in_the_trainer(cfg: ShuffledConfig, tmp_path: Path) -> None:
    ds = IndexedDataset(IndexedConfig(cfg.shards, layer=7))
    model = trainer_runs.train(ds, tmp_path, per_device_train_batch_size=12, num_train_epochs=1)
    assert len(set(map(tuple, itertools.chain(*model.seen)))) == len(ds)


class TellEpoch(TrainerCallback):
    """What the error says."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **others: Any) -> None:
        train_dataloader.set_epoch(int(state.epoch))


def test_the_trainer_resumes(cfg: ShuffledConfig, two_epochs: list[Any], tmp_path: Path) -> None:
    """Within the second epoch; it skips batches, of the right epoch, or it says that it does not know which."""
    trainer_runs.train(ShuffledActivations(cfg), tmp_path, save_strategy="steps", save_steps=40)
    common = {"resume": str(tmp_path / "checkpoint-40"), "save_steps": 40}
    rest = trainer_runs.train(ShuffledActivations(cfg), tmp_path, dataloader_num_workers=1, **common)
    assert rest.seen == two_epochs[40:]
    ready: dict[str, Any] = {"kind": trainer_runs.ReadyMade, **common}
    with pytest.raises(ConfigError, match=r"skip_first_batches: .* set_epoch\(epoch\) before"):
        trainer_runs.train(ShuffledDataLoader(cfg), tmp_path, **ready)
    loader = ShuffledDataLoader(cfg, num_workers=1)
    rest = trainer_runs.train(loader, tmp_path, callbacks=[TellEpoch()], **ready)
    assert rest.seen == two_epochs[40:]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_accelerate_skips_batches(cfg: ShuffledConfig, epochs: list[list[Any]], n_workers: int) -> None:
    """Also where there are ranks: it shares nothing by that."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    for rank in range(2):
        loader = accelerator.prepare(ShuffledDataLoader(cfg, rank=rank, world_size=2, num_workers=n_workers))
        loader.set_epoch(1)
        wanted = [batch.digest for batch in [*epochs[1], epochs[1][0]][26 + rank :: 2]]
        # Its length is wrong, as it divides ours by the samples of a batch.
        assert [batch.digest for batch in iter(accelerator.skip_first_batches(loader, 13))] == wanted
    accelerator.free_memory()


# Fabric


def test_fabric(cfg: ShuffledConfig, epochs: list[list[Any]]) -> None:
    """It counts epochs by itself, and says so where a sampler would be; our own count is right, after a resume, too."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    loader = ShuffledDataLoader(cfg, num_workers=1)
    ours, val = fabric.setup_dataloaders(loader, OrderedDataLoader(make_ordered_config(cfg)))
    for whole in epochs:
        assert [batch.digest for batch in ours] == [batch.digest for batch in whole]
    assert len(ours) == len(list(val)) == N_BATCHES
    state = loader.dataset.state_dict(n_batches=20, epoch=1)
    again = ShuffledDataLoader(cfg)
    again.load_state_dict(state)
    resumed = fabric.setup_dataloaders(again)
    assert again.n_batches_left == 11
    assert [batch.digest for batch in resumed] == [batch.digest for batch in epochs[1][20:]]
    plain = fabric.setup_dataloaders(DataLoader(ShuffledActivations(cfg), num_workers=1))
    assert [batch["act"].shape for batch in plain] == [(12, 4)] * 30 + [(6, 4)]


# Lightning under both of its names


def make_trainee(package: Any) -> Any:
    """A module of that package, which trains, validates and predicts as `lightning_runs.Model`."""

    class Trainee(package.LightningModule):
        training_step = lightning_runs.Trainee.training_step
        configure_optimizers = lightning_runs.Trainee.configure_optimizers

        def __init__(self, d_model: int = 4) -> None:
            super().__init__()
            self.layer, self.seen, self._fail_at, self._estimate = torch.nn.Linear(d_model, 1), [], None, False
            self.validated: list[int] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.validated.append(batch.digest)

        def predict_step(self, batch: Any, batch_idx: int) -> int:
            return batch.digest

    return Trainee


def make_trainer(package: Any, **options: Any) -> Any:
    return package.Trainer(**{"enable_checkpointing": False, **trainer_runs.QUIET, **options})


@pytest.mark.parametrize("name", PACKAGES)
def test_one_module_for_both(cfg: ShuffledConfig, epochs: list[list[Any]], tmp_path: Path, name: str) -> None:
    """With and without validation, resumed within an epoch, with our callbacks."""
    package, ordered = PACKAGES[name], make_ordered_config(cfg)
    wanted = [batch.digest for batch in itertools.chain(*epochs)]
    model = make_trainee(package)()
    make_trainer(package, max_epochs=2).fit(model, datamodule=ActivationsDataModule(cfg))
    assert [digest for *_, digest in model.seen] == wanted
    first, rest = make_trainee(package)(), make_trainee(package)()
    trainer = make_trainer(package, max_steps=40, num_sanity_val_steps=0, callbacks=[LoaderMetrics()])
    trainer.fit(first, datamodule=ActivationsDataModule(cfg, ordered, num_workers=1))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    assert first.validated == [batch.digest for batch in OrderedActivations(ordered)]
    trainer = make_trainer(package, max_steps=62)
    trainer.fit(rest, datamodule=ActivationsDataModule(cfg), ckpt_path=tmp_path / "stopped.ckpt")
    assert [digest for *_, digest in first.seen + rest.seen] == wanted
    ds, plain = ShuffledActivations(cfg), make_trainee(package)()
    make_trainer(package, max_epochs=1, callbacks=[ActivationsCheckpoint(ds)]).fit(plain, DataLoader(ds))
    assert [digest for *_, digest in plain.seen] == wanted[:N_BATCHES]


@pytest.mark.parametrize("name", PACKAGES)
def test_what_a_module_does_not_have(cfg: ShuffledConfig, name: str) -> None:
    """Lightning says so in its own words."""
    data, model = ActivationsDataModule(cfg), make_trainee(PACKAGES[name])()
    for run, method in (("validate", "val_dataloader"), ("predict", "predict_dataloader")):
        with pytest.raises(Exception, match=f"implement `def {method}"):
            getattr(make_trainer(PACKAGES[name]), run)(model, datamodule=data)


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("n_workers", [0, 1])
def test_predict(cfg: ShuffledConfig, epochs: list[list[Any]], name: str, n_workers: int) -> None:
    """For that Lightning makes a loader anew: of its attributes, or of its arguments if a hook made it."""
    package, wanted = PACKAGES[name], [batch.digest for batch in epochs[0]]
    make = make_trainee(package)
    loader = ShuffledDataLoader(cfg, num_workers=n_workers)
    assert make_trainer(package).predict(make(), loader) == wanted
    ordered = OrderedDataLoader(make_ordered_config(cfg), num_workers=n_workers)
    assert len(set(make_trainer(package).predict(make(), ordered))) == N_BATCHES
    other = ShuffledDataLoader(cfg, rank=1, world_size=2, num_workers=n_workers)
    assert make_trainer(package).predict(make(), other) == [*wanted, wanted[0]][1::2]

    class Predicting(make):
        def predict_dataloader(self) -> ShuffledDataLoader:
            return ShuffledDataLoader(cfg, num_workers=n_workers)

    assert make_trainer(package).predict(Predicting()) == wanted


def test_a_loader_takes_no_other_data_set(cfg: ShuffledConfig) -> None:
    other = ShuffledActivations(ShuffledConfig(cfg.shards, **FIELDS))
    with pytest.raises(TypeError, match="dataset"):
        ShuffledDataLoader(cfg, dataset=other)


def test_neither_is_installed() -> None:
    code = "import sys; sys.modules.update({'lightning.pytorch': None, 'pytorch_lightning': None}); "
    done = subprocess.run([sys.executable, "-c", code + "import saev_torch.lightning"], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: lightning or pytorch_lightning: expected one of them, got none; "
        "pip install 'saev_torch[lightning]'"
    )


# LightningCLI

YAML = """
data:
  train_cfg: {{shards: {shards}, layer: 7, batch_size: 12, buffer_size: 8}}
  val_cfg:
    class_path: saev_torch.OrderedConfig
    init_args: {{shards: {shards}, layer: [3, 7], batch_size: 16}}
  num_workers: 1
"""


@pytest.fixture
def run_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run LightningCLI of a package with a data module of ours, and return what it made and saw, and the loader's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    # What it thinks of LightningCLI.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    quiet = [f"--trainer.{key}={str(value).lower()}" for key, value in trainer_runs.QUIET.items()]
    quiet += ["--trainer.enable_checkpointing=false", "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0"]

    def run(name: str, *arguments: str) -> Any:
        package: Any = {"lightning": lightning.pytorch.cli, "pytorch_lightning": pytorch_lightning.cli}[name]
        options = {"save_config_kwargs": {"overwrite": True}, "seed_everything_default": False}
        trainee = make_trainee(PACKAGES[name])
        cli = package.LightningCLI(trainee, ActivationsDataModule, args=["fit", *quiet, *arguments], **options)
        data, loader, model = cli.datamodule, cli.datamodule.train_dataloader(), cli.model
        found = {"cfgs": (data.train_cfg, data.val_cfg), "seen": model.seen, "n_validated": len(model.validated)}
        found |= {"n_workers": loader.num_workers, "timeout": loader.timeout}
        # Something of jsonargparse keeps what it made, and that each other.
        for made in (cli.trainer, data, model):
            made.__dict__.clear()
        return found

    return run


@pytest.mark.parametrize("name", PACKAGES)
def test_cli(cfg: ShuffledConfig, epochs: list[list[Any]], run_cli: Any, tmp_path: Path, name: str) -> None:
    """Configs from arguments, from YAML, from both, and from what it saved itself."""
    wanted = [batch.digest for batch in epochs[0]]
    fields = [f"--data.train_cfg.{key}={value}" for key, value in {"shards": cfg.shards, **FIELDS}.items()]
    found = run_cli(name, *fields)
    assert found["cfgs"] == (cfg, None)
    assert [digest for *_, digest in found["seen"]] == wanted

    (tmp_path / "run.yaml").write_text(YAML.format(shards=cfg.shards))
    found = run_cli(name, "--config=run.yaml", "--data.train_cfg.seed=5", "--data.rank=1", "--data.world_size=2")
    val_cfg = OrderedConfig(cfg.shards, layer=(3, 7), batch_size=16)
    assert found["cfgs"] == (ShuffledConfig(cfg.shards, seed=5, **FIELDS), val_cfg)
    assert (len(found["seen"]), found["n_validated"]) == (16, 12)
    # Torch's default, no timeout, is not taken for a wish.
    assert (found["n_workers"], found["timeout"]) == (1, 90.0)
    assert run_cli(name, "--config=config.yaml") == found


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--data.train_cfg.batch_size=0", r"ShuffledConfig.batch_size: expected an integer of at least 1"),
        ("--data.train_cfg.tokens=cls", r"train_cfg.tokens"),
        ("--data.num_workers=many", r"data.num_workers"),
        ("--data.batch_size=7", r"data.batch_size"),
    ],
)
def test_cli_refuses(
    cfg: ShuffledConfig, run_cli: Any, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    with pytest.raises((SystemExit, ConfigError)) as refused:
        run_cli("lightning", f"--data.train_cfg.shards={cfg.shards}", "--data.train_cfg.layer=7", argument)
    assert re.search(message, capsys.readouterr().err + str(refused.value))
