"""Who iterates a data set: torch and trainers tell it nothing, but are among its callers, also in a forked worker."""

import itertools
import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.utils.data import Sampler, default_convert
from torch.utils.data._utils.fetch import _IterableDatasetFetcher

from saev_torch.errors import ConfigError
from saev_torch.processes.world import World

_ACCELERATE = "accelerate.data_loader"
_WORKERS = "torch.utils.data._utils.worker", "torchdata.stateful_dataloader.worker"


def _callers(module: str) -> Iterator[FrameType]:
    """Calls of functions of a module that are under way, the latest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            yield frame
        frame = frame.f_back


def _is_skipping(frame: FrameType) -> bool:
    return frame.f_code.co_qualname.startswith("SkipDataLoader.")


def require_shared_once(world: World) -> None:
    """Refuse to share batches among ranks where Accelerate does so again: each would see a part of its part.

    It is among the callers of `set_epoch`, which it calls before it iterates, and of the iteration.

    Raises:
        ConfigError: It is among them, and there is more than one rank.
    """
    if world.world_size > 1 and not all(map(_is_skipping, _callers(_ACCELERATE))):
        raise ConfigError(
            f"Accelerator.prepare: expected a loader whose batches are shared among {world.world_size} ranks once, "
            "got one that Accelerate shares again, so samples would be missed; prepare ShuffledDataLoader(cfg) "
            "or OrderedDataLoader(cfg), which it leaves as they are (and which get_train_dataloader of a Trainer may "
            "return), or give the data set rank=0, world_size=1."
        )


def require_known_epoch(is_known: bool) -> None:
    """Refuse to let Accelerate skip batches of epoch 0 only because nobody has said which epoch it is.

    Raises:
        ConfigError: Its `skip_first_batches` is among the callers, and the epoch is not known.
    """
    if not is_known and any(map(_is_skipping, _callers(_ACCELERATE))):
        raise ConfigError(
            "skip_first_batches: expected the epoch whose first batches are skipped, got none; call set_epoch(epoch) "
            "before (with a Trainer, in on_epoch_begin of a callback), or do not skip, but call load_state_dict(state)."
        )


def keep_whole() -> None:
    """Let each batch come as it is, where a trainer's loader would gather some of them, or stack one: [1, batch, ...].

    A collator of the user's own does what it likes.
    """
    fetchers = (frame.f_locals.get("self") for frame in _callers("torch.utils.data._utils.fetch"))
    fetcher: Any = next(fetchers, None)
    if not isinstance(fetcher, _IterableDatasetFetcher) or not fetcher.auto_collation:
        return
    outer: Any = fetcher.collate_fn
    if outer is default_convert:
        # A loader that Accelerate made of the attributes of a ready-made one, whose batch_size counts samples.
        fetcher.auto_collation = False
    # The default collator of Transformers, perhaps in one for this loader that leaves out what the model does not take.
    inner = getattr(outer, "data_collator", outer)
    if str(getattr(inner, "__module__", "")).startswith("transformers."):
        if inner is outer:
            fetcher.collate_fn = _take_one
        else:
            outer.data_collator = _take_one


def _take_one(batches: list[Any]) -> Any:
    if len(batches) != 1:
        raise ConfigError(
            f"TrainingArguments.per_device_train_batch_size (or _eval_): expected 1, got {len(batches)}: the data set "
            "yields whole batches; set batch_size in its config instead."
        )
    return batches[0]


def ends_with_epoch() -> bool:
    """Whether this is a worker of torch that ends when the epoch does, so that the next one has other memory."""
    loops = (frame for module in _WORKERS for frame in _callers(module) if frame.f_code.co_name == "_worker_loop")
    return any(_local(frame, "persistent_workers") is False for frame in loops)


def _local(frame: FrameType, name: str) -> Any:
    found = frame.f_locals
    value = found.get(name)
    if isinstance(found, dict):
        # Before Python 3.13 it is a copy that stays with the frame, and with it whatever is let go of there.
        found.clear()
    return value


class EpochListener(Sampler[None]):
    """Stands where a sampler would: trainers tell it the epoch, and torch asks it for indices."""

    def __init__(self, loader: Any) -> None:
        # The iterator keeps its sampler, so this must not keep the loader, which may keep the iterator.
        self._loader = weakref.ref(loader)

    def __iter__(self) -> Iterator[None]:
        return itertools.repeat(None)

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader."""
        loader = self._loader()
        if loader is not None:
            loader.follow_epoch(epoch)
