"""Modules and trainers of Lightning, for the tests."""

import logging
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from saev_torch import ActivationBatch

# What Lightning has to say about any loader without workers, about `len`, which is exact here, about short runs, and
# about a plain `DataLoader`; and what torch has to say about Lightning.
WARNINGS = (
    "Your `IterableDataset` has `__len__` defined",
    "The '.*' does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    "You're resuming from a checkpoint that ended before the epoch ended and your dataloader is not resumable",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    "`.fit\\(ckpt_path=None\\)` was called without a model",
    '.*fit\\(ckpt_path="last"\\) is set, but there is no last checkpoint available',
    "The dirpath has changed",
    "Checkpoint directory .* exists and is not empty",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "You defined a `validation_step` but have no `val_dataloader`",
)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

Seen = list[tuple[int, int, int]]
"""Of each batch, in turn: epoch and number as Lightning counts them, and its digest."""


class Trainee(lightning.LightningModule):
    """Trains a few weights, and writes down which batches it saw."""

    def __init__(self, fail_at: int | None = None, estimate: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.seen: Seen = []
        self.estimated: float | None = None
        self._fail_at, self._estimate = fail_at, estimate

    def training_step(self, batch: ActivationBatch, batch_idx: int) -> torch.Tensor:
        if self.global_step == self._fail_at:
            raise KeyError("preempted")
        self.seen.append((self.current_epoch, batch_idx, batch.digest))
        return self.layer(batch["act"] / 1e5).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self._estimate:
            self.estimated = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Model(Trainee):
    """The same with validation, where there are data for it."""

    def __init__(self, fail_at: int | None = None, estimate: bool = False) -> None:
        super().__init__(fail_at, estimate)
        self.validated: list[list[int]] = []

    def on_validation_epoch_start(self) -> None:
        self.validated.append([])

    def validation_step(self, batch: ActivationBatch, batch_idx: int) -> None:
        self.validated[-1].append(batch.digest)


def make_trainer(callbacks: Sequence[Callback] = (), *, checkpoints: bool = False, **options: Any) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(callbacks=list(callbacks), enable_checkpointing=checkpoints, **{**quiet, **options})
