"""Lightning, an extra: a data module that resumes exactly, and a callback with which a plain `DataLoader` does.

Lightning restores its own counts of epochs and batches from a checkpoint, but it hands the state of a loader back only
in some cases: not at the end of an epoch, and not where `estimated_stepping_batches` asked for the loader early. And it
begins to iterate before it knows where. So the module takes its state back itself, and begins with the first batch.

It is installed as `lightning`, as `pytorch_lightning`, or as both, and the trainer of each takes only what derives from
its own classes: ours derive from those of all that are there.
"""

import contextlib
import importlib
import inspect
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from saev_torch.config import BatchConfig, ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.rules import is_integer
from saev_torch.iterable.activations import Activations
from saev_torch.loaders import OrderedDataLoader, ShuffledDataLoader
from saev_torch.order.mixing import batch_metrics
from saev_torch.resume.state import Position, StreamDigest, dump_state, load_state

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
else:

    def _join(name: str) -> type:
        """A class that derives from those of this name in all packages that are installed."""
        bases = []
        for package in ("lightning.pytorch", "pytorch_lightning"):
            with contextlib.suppress(ModuleNotFoundError):
                bases.append(getattr(importlib.import_module(package), name))
        if not bases:
            raise ModuleNotFoundError(
                "lightning or pytorch_lightning: expected one of them, got none; pip install 'saev_torch[lightning]'",
                name="lightning",
            )
        return type(name, tuple(bases), {"__module__": __name__})

    Callback, LightningDataModule = _join("Callback"), _join("LightningDataModule")

_KEY = "saev_torch"
_N_TRAINED = "n_trained"
_IS_OVER = "is_over"


def _batch_progress(trainer: "Trainer") -> Any:
    """Lightning's counts of batches: in all epochs (`total`), and in this one (`current`)."""
    return trainer.fit_loop.epoch_loop.batch_progress


def _n_trained(trainer: "Trainer") -> int:
    """Batches that this rank has trained on, in all epochs."""
    return int(_batch_progress(trainer).total.processed)


def _is_over(trainer: "Trainer") -> bool:
    """Whether the last batch that was trained on is the last of Lightning's epoch."""
    progress = _batch_progress(trainer)
    # The flag is up as soon as the batch is fetched.
    return bool(progress.is_last_batch) and progress.current.processed == progress.current.ready


class _TrainLoader(ShuffledDataLoader):
    """A `ShuffledDataLoader` that stands behind the batches which the trainer has trained on."""

    def __init__(self, cfg: ShuffledConfig, module: LightningDataModule, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        self._module = module
        # Places in the sequence, by the number of batches that were trained on when they are reached.
        self._places: dict[int, Position] = {}
        # Whether the next iteration is the one after the latest place, not the rest of that one.
        self._next_is_new = False

    def __iter__(self) -> Any:
        # A generator, because only with the first batch the trainer's counts are those of the checkpoint.
        trainer: Any = self._module.trainer
        if trainer is None or not trainer.training:
            self._places, self._next_is_new = {}, True
            yield from super().__iter__()
            return
        self.cursor.load(self._find_start(trainer))
        batches, n_before = super().__iter__(), _n_trained(trainer)
        self._places, self._next_is_new = {n_before: batches.iteration.position}, True
        for n_fetched, batch in enumerate(batches, start=1):
            # The place behind this batch counts once that is trained on; those before it are not asked for again.
            n_trained = _n_trained(trainer)
            self._places = {n: place for n, place in self._places.items() if n >= n_trained}
            self._places[n_before + n_fetched] = batches.iteration.position
            yield batch

    def _find_start(self, trainer: Any) -> Position:
        """Where the trainer stands."""
        place = self._places.get(_n_trained(trainer))
        if place is None:
            # No state that belongs to these counts: nothing better is known than the counts.
            epochs: Any = trainer.fit_loop.epoch_progress.current
            n_batches = _batch_progress(trainer).current.processed
            return self.cursor.position_after(n_batches, epochs.processed)
        return place.next_start() if self._next_is_new else place

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last batch that was trained on."""
        trainer = self._module.trainer
        place = None if trainer is None else self._places.get(_n_trained(trainer))
        if trainer is None or place is None:
            return super().state_dict()
        state = dump_state(self.metadata, self.recording, self.cfg, place)
        return {**state, _N_TRAINED: _n_trained(trainer), _IS_OVER: _is_over(trainer)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; it holds if the trainer then turns out to have trained on as many batches."""
        super().load_state_dict(state)
        place = load_state(self.metadata, self.recording, self.cfg, state)
        self._places = {state.get(_N_TRAINED, -1): place}
        self._next_is_new = state.get(_IS_OVER, False)


def _drop_defaults(kwargs: dict[str, Any]) -> None:
    """Drop arguments that are torch's defaults, which a command line fills in, also where the loader has its own."""
    for name, parameter in inspect.signature(DataLoader).parameters.items():
        if name in kwargs and kwargs[name] == parameter.default:
            del kwargs[name]


class ActivationsDataModule(LightningDataModule):
    """Shuffled batches to train on, and others to validate on.

    A checkpoint continues with the batch after the last one that was trained on, with any number of workers. The number
    of ranks may change between epochs; if it changes within one, the data still continue exactly, but Lightning ends
    that epoch by its own count of batches.

    Args:
        train_cfg: What to train on.
        val_cfg: What to validate on; None for no validation.
        **loader_kwargs: Arguments of `torch.utils.data.DataLoader`, for instance `num_workers`.
    """

    # What a module does not have, a trainer must not find: not even the other package's, which only says so.
    val_dataloader = test_dataloader = predict_dataloader = None  # type: ignore[assignment]

    def __init__(self, train_cfg: ShuffledConfig, val_cfg: BatchConfig | None = None, **loader_kwargs: Any) -> None:
        super().__init__()
        self.train_cfg, self.val_cfg = train_cfg, val_cfg
        # A name that LightningCLI follows, to learn what options there are.
        self._loader_kwargs = loader_kwargs
        _drop_defaults(loader_kwargs)
        self._train: _TrainLoader | None = None
        self._val: OrderedDataLoader | ShuffledDataLoader | None = None
        self._state: dict[str, Any] | None = None
        if val_cfg is not None:
            # Lightning takes the method for a promise of data to validate on, so without them there must be none.
            self.val_dataloader = self._val_dataloader

    def train_dataloader(self) -> ShuffledDataLoader:
        """The loader of the batches to train on, the same one at each call."""
        if self._train is None:
            self._train = _TrainLoader(self.train_cfg, self, **self._loader_kwargs)
            if self._state is not None:
                self._train.load_state_dict(self._state)
        return self._train

    def _val_dataloader(self) -> OrderedDataLoader | ShuffledDataLoader:
        if self._val is None:
            make: Any = ShuffledDataLoader if isinstance(self.val_cfg, ShuffledConfig) else OrderedDataLoader
            self._val = make(self.val_cfg, **self._loader_kwargs)
        return self._val

    @property
    def digest(self) -> StreamDigest:
        """Digest of the batches that were fetched to train on; on rank 0 also of those before a checkpoint."""
        return self.train_dataloader().digest

    def state_dict(self) -> dict[str, Any]:
        """Where the data to train on stand, for a checkpoint."""
        return self.train_dataloader().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a checkpoint was saved, in a trainer that restored its counts from it; see the data set."""
        self._state = state_dict
        if self._train is not None:
            self._train.load_state_dict(state_dict)

    def on_exception(self, exception: BaseException) -> None:
        """Stop workers and threads: Lightning tears nothing down then."""
        self.teardown("fit")

    def teardown(self, stage: str) -> None:
        """Stop workers and threads."""
        for loader in (self._train, self._val):
            if loader is not None:
                loader.shutdown()


class ActivationsCheckpoint(Callback):
    """Keeps in Lightning's checkpoints where a data set stands, for a plain `DataLoader` on it.

    Args:
        dataset: The data set to train on, the one that the loader has.
    """

    def __init__(self, dataset: Activations) -> None:
        self.dataset = dataset
        self._n_batches = 0

    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begin to count: the loader is iterated anew."""
        self._n_batches = 0

    def on_train_batch_end(self, trainer: "Trainer", pl_module: "LightningModule", *args: Any) -> None:
        """Count a batch."""
        self._n_batches += 1

    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Save the place behind the last batch that was trained on; after the last of an epoch, the next epoch."""
        if _is_over(trainer):
            checkpoint[_KEY] = self.dataset.state_dict(n_batches=0, epoch=self.dataset.cursor.epoch + 1)
        else:
            checkpoint[_KEY] = self.dataset.state_dict(n_batches=self._n_batches)

    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Let the loader continue at the place that was saved."""
        self._n_batches = 0
        if _KEY in checkpoint:
            self.dataset.load_state_dict(checkpoint[_KEY])


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
        if not is_integer(every_n_steps, 1):
            raise ConfigError(f"every_n_steps: expected an integer of at least 1, got {every_n_steps!r}.")
        self._every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if it is time to."""
        step, loader = trainer.global_step, trainer.train_dataloader
        is_due = trainer.is_global_zero and step % self._every_n_steps == 0
        if is_due and isinstance(loader, OrderedDataLoader | ShuffledDataLoader):
            figures = loader.metrics() | batch_metrics(batch, loader.metadata)
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=step)
