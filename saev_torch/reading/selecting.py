"""The one place where a config and a directory become a selection."""

from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig
from saev_torch.order.selection import Selection
from saev_torch.reading.labels import Labels
from saev_torch.reading.mask import Mask
from saev_torch.reading.store import ShardStore


def select(store: ShardStore, cfg: IndexedConfig | OrderedConfig | ShuffledConfig) -> Selection:
    """Work out which samples of a directory a config selects; this may read all labels, and a mask, once.

    Raises:
        ConfigError: The config asks for what was not recorded, or leaves nothing.
        FormatError: Labels or a mask do not follow the format.
        ShardsNotFoundError, ReadError: They cannot be read.
    """
    ignored = cfg.ignore_labels if isinstance(cfg, ShuffledConfig) else ()
    labels = Labels(store)
    mask = None if cfg.mask is None else Mask(cfg.mask, store.metadata, cfg.allow_links)
    read_mask = None if mask is None else mask.of_examples
    md = store.metadata
    selection = Selection(
        md, cfg.tokens, cfg.layer, ignored, labels.of_examples, cfg.act_dtype, cfg.examples, read_mask
    )
    # What was written while it was counted is found now.
    labels.expect(selection)
    return selection
