"""Shuffled and ordered loading of stored transformer activations, as plain torch data sets."""

from saev_torch.batch import ActivationBatch
from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig, make_ordered_config
from saev_torch.datasets import OrderedActivations, ShuffledActivations
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
    WorkerLostError,
    WriteError,
)
from saev_torch.indexed import IndexedDataset
from saev_torch.loaders import OrderedDataLoader, ShuffledDataLoader
from saev_torch.metadata import Metadata, PixelAgg
from saev_torch.quality.metrics import batch_metrics
from saev_torch.quality.planner import Prediction, find_best, find_smallest, predict
from saev_torch.selection import Index, IndexMap
from saev_torch.shards import Shard, ShardInfo
from saev_torch.stats.folding import FoldedWeights, fold
from saev_torch.stats.statistics import Statistics, compute_statistics
from saev_torch.tools.repack import repack
from saev_torch.tools.verify import Fault, VerifyReport, verify
from saev_torch.writing.labels import pixel_to_token_labels
from saev_torch.writing.recorder import record, token_windows
from saev_torch.writing.writer import ShardWriter

__all__ = [
    "ActivationBatch",
    "ConfigError",
    "DevicePrefetcher",
    "Fault",
    "FoldedWeights",
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
    "Prediction",
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
    "Statistics",
    "StreamDigest",
    "VerifyReport",
    "WorkerLostError",
    "WriteError",
    "batch_digest",
    "batch_metrics",
    "compute_statistics",
    "find_best",
    "find_smallest",
    "fold",
    "make_ordered_config",
    "pixel_to_token_labels",
    "predict",
    "record",
    "repack",
    "token_windows",
    "verify",
]
