"""Shuffled and ordered loading of stored transformer activations, as plain torch data sets."""

from saev_torch.batch import ActivationBatch
from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig, make_ordered_config
from saev_torch.datasets import IndexedDataset, OrderedActivations, ShuffledActivations
from saev_torch.device import DevicePrefetcher
from saev_torch.digest import StreamDigest, batch_digest
from saev_torch.errors import (
    ConfigError,
    FormatError,
    ReadError,
    SaevTorchError,
    ShardsNotFoundError,
    StalledReadError,
    StateError,
    WriteError,
)
from saev_torch.loaders import OrderedDataLoader, ShuffledDataLoader
from saev_torch.metadata import Metadata, PixelAgg
from saev_torch.selection import Index, IndexMap
from saev_torch.shards import Shard, ShardInfo
from saev_torch.writer import ShardWriter

__all__ = [
    "ActivationBatch",
    "ConfigError",
    "DevicePrefetcher",
    "FormatError",
    "Index",
    "IndexMap",
    "IndexedConfig",
    "IndexedDataset",
    "Metadata",
    "OrderedActivations",
    "OrderedConfig",
    "OrderedDataLoader",
    "PixelAgg",
    "ReadError",
    "SaevTorchError",
    "Shard",
    "ShardInfo",
    "ShardWriter",
    "ShardsNotFoundError",
    "ShuffledActivations",
    "ShuffledConfig",
    "ShuffledDataLoader",
    "StalledReadError",
    "StateError",
    "StreamDigest",
    "WriteError",
    "batch_digest",
    "make_ordered_config",
]
