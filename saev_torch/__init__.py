"""Shuffled and ordered loading of stored transformer activations, as plain torch data sets."""

from saev_torch.batch import ActivationBatch
from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig, make_ordered_config
from saev_torch.device import DevicePrefetcher
from saev_torch.errors import (
    ConfigError,
    EmptyShardError,
    EndedError,
    FormatError,
    LabelsNotFoundError,
    ReadError,
    SaevTorchError,
    ShardsNotFoundError,
    StalledReadError,
    StateError,
    UntrustedError,
    WorkerLostError,
    WriteError,
)
from saev_torch.format.examples import Examples
from saev_torch.format.metadata import Metadata, PixelAgg
from saev_torch.format.rules import LayerSpec, TokenKind
from saev_torch.format.shards import Shard, ShardInfo
from saev_torch.indexed import IndexedDataset, UniformBatches
from saev_torch.iterable.activations import OrderedActivations, ShuffledActivations
from saev_torch.iterable.mixed import MixedActivations
from saev_torch.loaders import OrderedDataLoader, ShuffledDataLoader
from saev_torch.order.mixing import batch_metrics
from saev_torch.order.selection import Index, IndexMap
from saev_torch.resume.state import StreamDigest
from saev_torch.stats.statistics import Statistics, compute_statistics
from saev_torch.tools.export import export_array
from saev_torch.tools.importing.arrays import import_arrays
from saev_torch.tools.mask import MaskReport, make_mask
from saev_torch.tools.repack import repack
from saev_torch.tools.verify import verify
from saev_torch.writing.labels import pixel_to_token_labels
from saev_torch.writing.recorder import record, token_windows
from saev_torch.writing.writer import ShardWriter

__version__ = "0.1.0"

__all__ = [
    "ActivationBatch",
    "ConfigError",
    "DevicePrefetcher",
    "EmptyShardError",
    "EndedError",
    "Examples",
    "FormatError",
    "Index",
    "IndexMap",
    "IndexedConfig",
    "IndexedDataset",
    "LabelsNotFoundError",
    "LayerSpec",
    "MaskReport",
    "Metadata",
    "MixedActivations",
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
    "Statistics",
    "StreamDigest",
    "TokenKind",
    "UniformBatches",
    "UntrustedError",
    "WorkerLostError",
    "WriteError",
    "__version__",
    "batch_metrics",
    "compute_statistics",
    "export_array",
    "import_arrays",
    "make_mask",
    "make_ordered_config",
    "pixel_to_token_labels",
    "record",
    "repack",
    "token_windows",
    "verify",
]
