"""Lightning, an extra: a callback that logs what the loader does, and how well its batches are mixed."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from saev_torch.errors import ConfigError
from saev_torch.loaders import OrderedDataLoader, ShuffledDataLoader
from saev_torch.quality.metrics import batch_metrics

__all__ = ["LoaderMetrics"]

_LOADERS = (OrderedDataLoader, ShuffledDataLoader)


class LoaderMetrics(Callback):
    """Logs `loader.metrics()` and `batch_metrics` to every logger of the trainer, on rank 0.

    It does so where the trainer has an `OrderedDataLoader` or a `ShuffledDataLoader` to train on, or a data module of
    ours.

    Args:
        every_n_steps: Log at each so many steps of the optimizer.

    Raises:
        ConfigError: `every_n_steps` is no integer of at least 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigError(f"every_n_steps: expected an integer of at least 1, got {every_n_steps!r}.")
        self._every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if it is time to."""
        step, loader = trainer.global_step, trainer.train_dataloader
        if not trainer.is_global_zero or step % self._every_n_steps or not isinstance(loader, _LOADERS):
            return
        figures = loader.metrics() | batch_metrics(batch, loader.metadata)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
