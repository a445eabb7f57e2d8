"""Runs of trainers, for `test_trainers.py`; as a script under torchrun, the ranks train and write what they saw.

What `examples/` do, `test_trainer_examples.py` runs: these do it in other ways.

torchrun ... trainer_runs.py '{"shards": ..., "fields": {...}, "out": ...}'
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import lightning_runs
import pytorch_lightning
import torch
import torch.distributed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from saev_torch import ConfigError, ShuffledActivations, ShuffledConfig, ShuffledDataLoader
from saev_torch.lightning import ActivationsDataModule

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}

Samples = list[list[int]]
"""Example and token of each sample of a batch."""


def samples(batch: Any) -> Samples:
    return torch.stack([batch["example_idx"], batch["token_idx"]], dim=1).tolist()


class Model(torch.nn.Module):
    """What Hugging Face's Trainer trains: it writes down shapes and samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.shapes: list[tuple[int, ...]] = []
        self.seen: list[Samples] = []

    def forward(
        self, act: torch.Tensor, example_idx: torch.Tensor, token_idx: torch.Tensor, **others: Any
    ) -> dict[str, torch.Tensor]:
        if self.training:
            self.shapes.append(tuple(act.shape))
            self.seen.append(samples({"example_idx": example_idx, "token_idx": token_idx}))
        return {"loss": self.layer(act / 1e5).mean()}


class ReadyMade(Trainer):
    """A Trainer that gets its batches from a ready-made loader, which is its data set, too."""

    def get_train_dataloader(self) -> "DataLoader[Any]":
        return self.train_dataset


def train(data: Any, out: Path, kind: type[Trainer] = Trainer, **options: Any) -> Model:
    """Two epochs of Hugging Face's Trainer."""
    model = Model()
    named = {key: options.pop(key) for key in ("callbacks", "data_collator", "eval_dataset") if key in options}
    resume = options.pop("resume", None)
    common = {"per_device_train_batch_size": 1, "num_train_epochs": 2, "save_strategy": "no", "report_to": []}
    quiet = {"disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "dataloader_pin_memory": False}
    arguments = TrainingArguments(output_dir=str(out), **{**common, **quiet, **options})
    kind(model, arguments, train_dataset=data, **named).train(resume_from_checkpoint=resume)
    return model


def _train_in_turn(make: dict[str, Callable[[], Any]], cfg: ShuffledConfig, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    layer = torch.nn.Linear(4, 1)
    model, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), lr=1e-3))
    loader, seen = fabric.setup_dataloaders(make["plain"]()), []
    for _ in range(2):
        for batch in loader:
            fabric.backward(model(batch["act"] / 1e5).mean())
            optimizer.step()
            seen.append(samples(batch))
    found["fabric, plain"] = seen
    for package in (lightning, pytorch_lightning):

        class Trainee(package.LightningModule):
            training_step = lightning_runs.Trainee.training_step
            configure_optimizers = lightning_runs.Trainee.configure_optimizers

            def __init__(self) -> None:
                super().__init__()
                self.layer, self.seen, self._fail_at, self._estimate = torch.nn.Linear(4, 1), [], None, False

        for name in ("ready-made", "plain", "module"):
            model = Trainee()
            trainer = package.Trainer(max_epochs=2, strategy="ddp", devices=2, enable_checkpointing=False, **QUIET)
            data = {"datamodule": ActivationsDataModule(cfg)} if name == "module" else [make[name]()]
            trainer.fit(model, **data) if isinstance(data, dict) else trainer.fit(model, *data)
            found[f"{package.__name__}, {name}"] = [digest for *_, digest in model.seen]
    alone = ShuffledActivations(cfg, rank=0, world_size=1)
    for name, data, options in (
        ("rank 0 of 1", alone, {}),
        ("rank 0 of 1, not dispatched", alone, {"accelerator_config": {"dispatch_batches": False}}),
    ):
        model = train(data, out, **options)
        assert {len(shape) for shape in model.shapes} == {2}
        found[f"Trainer, {name}"] = model.seen
    try:
        train(ShuffledActivations(cfg), out)
    except ConfigError as err:
        found["error"] = str(err)
    return found


def _main(shards: str, fields: dict[str, Any], out: str) -> None:
    cfg = ShuffledConfig(shards=Path(shards), **fields)
    make: dict[str, Callable[[], Any]] = {
        "ready-made": lambda: ShuffledDataLoader(cfg, num_workers=1),
        "plain": lambda: DataLoader(ShuffledActivations(cfg)),
    }
    found = _train_in_turn(make, cfg, Path(out))
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    _main(**json.loads(sys.argv[1]))
