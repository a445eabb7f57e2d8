"""The one place where a config and a directory become a selection."""

import logging

from saev_torch.config import BatchConfig, IndexedConfig, OrderedConfig, ShuffledConfig
from saev_torch.order.selection import Selection
from saev_torch.reading.labels import Labels
from saev_torch.reading.mask import Mask
from saev_torch.reading.store import ShardStore

_log = logging.getLogger("saev_torch")


def select(store: ShardStore, cfg: IndexedConfig | OrderedConfig | ShuffledConfig) -> Selection:
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
    # What was written while it was counted is found now.
    labels.expect(selection)
    return selection


def tell_counted_layers(cfg: IndexedConfig | BatchConfig, recorded: tuple[int, ...]) -> None:
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
