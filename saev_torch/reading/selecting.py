"""The one place where a config and a directory become a selection."""

import logging
import os
from pathlib import Path
from typing import Any, TypeAlias

from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.sidecars import ATTENTION_MASK
from saev_torch.order.selection import Selection
from saev_torch.processes.notices import Notices
from saev_torch.reading.labels import Labels
from saev_torch.reading.mask import Mask
from saev_torch.reading.store import ShardStore

_log = logging.getLogger("saev_torch")

AnyConfig: TypeAlias = IndexedConfig | OrderedConfig | ShuffledConfig


def open_store(taker: str, cfg: Any, *kinds: type[Any], may_copy: bool = True) -> ShardStore:
    """Open the directory of a config, after a look at whether it is one; `use_tmpdir` holds if it `may_copy`.

    Raises:
        ConfigError: It is a path, or the config of another data set; the message says how to make one.
        ShardsNotFoundError, FormatError, ReadError: As `ShardStore` does.
    """
    _require_config(taker, cfg, *kinds)
    is_local = may_copy and isinstance(cfg, ShuffledConfig) and cfg.use_tmpdir
    store = ShardStore(cfg.shards, is_local=is_local, allow_links=cfg.allow_links)
    mask = Path(cfg.shards) / ATTENTION_MASK.name
    # Others may look at padding on purpose.
    is_training = isinstance(cfg, ShuffledConfig) and cfg.mask is None and ATTENTION_MASK in store.sidecars
    if is_training and Notices.of_process().may_say(f"padding {mask}"):
        _log.warning("mask: expected one, as there may be padding, got none; leave it out with mask=%r", str(mask))
    return store


def _require_config(taker: str, cfg: Any, *kinds: type[Any]) -> None:
    if isinstance(cfg, kinds):
        return
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if isinstance(cfg, str | os.PathLike):
        got, remedy = repr(os.fspath(cfg)), f"{kinds[0].__name__}(shards={os.fspath(cfg)!r}, layer=...)"
    else:
        name = type(cfg).__name__
        got, remedy = f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}", f"{kinds[0].__name__}(shards=..., layer=...)"
        if isinstance(cfg, ShuffledConfig) and OrderedConfig in kinds:
            remedy = "make_ordered_config(cfg)"
    raise ConfigError(f"{taker}: expected a config of type {wanted}, got {got}; give it {remedy}.")


def select(store: ShardStore, cfg: AnyConfig) -> Selection:
    """Work out which samples of a directory a config selects; this may read all labels, and a mask, once.

    Raises:
        ConfigError: The config asks for what was not recorded, or leaves nothing.
        FormatError: Labels or a mask do not follow the format.
        ShardsNotFoundError, ReadError: They cannot be read.
    """
    ignored = cfg.ignore_labels if isinstance(cfg, ShuffledConfig) else ()
    labels = Labels(store)
    # A selection that needs no labels is pickled without them.
    read_labels = labels.of_examples if ignored else None
    mask = None if cfg.mask is None else Mask(cfg.mask, store.metadata, cfg.allow_links)
    read_mask = None if mask is None else mask.of_examples
    md = store.metadata
    selection = Selection(md, cfg.tokens, cfg.layer, ignored, read_labels, cfg.act_dtype, cfg.examples, read_mask)
    # What they select is known from now on: others are refused when they are read.
    labels.expect(selection)
    return selection


def tell_counted_layers(cfg: AnyConfig, recorded: tuple[int, ...]) -> None:
    """Say in the log which recorded layers are read for those that count from the end; warn where that is a default."""
    asked = cfg.layer if isinstance(cfg.layer, tuple) else (cfg.layer,)
    counted = [one for one in asked if isinstance(one, int) and one < 0 and one not in recorded]
    if not counted:
        return
    name, of_these = f"{type(cfg).__name__}.layer", f"of the recorded layers {list(recorded)}"
    chosen = ", ".join(f"{one} is layer {recorded[one]}" for one in counted)
    if cfg.layer == getattr(type(cfg), "layer", None):
        _log.warning(
            "%s: %s, counted from the end %s; that is the default, so say which you mean", name, chosen, of_these
        )
    else:
        _log.info("%s: %s, counted from the end %s", name, chosen, of_these)
