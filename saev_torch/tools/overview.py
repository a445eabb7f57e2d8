"""What is in a shard directory: sizes, labels, and how large activations are."""

import contextlib
import dataclasses
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from saev_torch.config import IndexedConfig
from saev_torch.format.checksums import CHECKSUMS_NAME
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import shard_nbytes
from saev_torch.indexed import IndexedDataset
from saev_torch.reading.labels import Labels
from saev_torch.reading.store import ShardStore

_N_SAMPLED = 512
_EXAMPLES_PER_READ = 4096


@dataclasses.dataclass(frozen=True)
class LayerSample:
    """What some content tokens of one layer look like, taken evenly from the whole data set.

    Attributes:
        layer: The recorded layer.
        norms: [n] float32, L2 norms.
        mean: Mean of all values.
        std: Standard deviation of all values.
        n_not_finite: Values that are NaN or infinite.
    """

    layer: int
    norms: npt.NDArray[np.float32]
    mean: float
    std: float
    n_not_finite: int


@dataclasses.dataclass(frozen=True)
class Overview:
    """What is in a shard directory.

    Attributes:
        metadata: Its metadata.
        n_files: Shard files that hold examples.
        nbytes: Bytes of activations, without padding.
        has_checksums: Whether there is a checksums.json.
        labels: [256] int64, content tokens by label; None where there are no labels.
        layers: A sample of each layer.
    """

    metadata: Metadata
    n_files: int
    nbytes: int
    has_checksums: bool
    labels: npt.NDArray[np.int64] | None
    layers: list[LayerSample]


def overlook(shards_dir: Path) -> Overview:
    """Look at a shard directory: all labels, and a few hundred activations of each layer.

    Raises:
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
        ReadError: A file could not be read.
    """
    store = ShardStore(Path(shards_dir))
    md = store.metadata
    return Overview(
        metadata=md,
        n_files=sum(shard.n_examples > 0 for shard in store.shards),
        nbytes=shard_nbytes(md, md.n_examples),
        has_checksums=os.path.lexists(store.shards_dir / CHECKSUMS_NAME),
        labels=count_labels(store) if store.has_labels else None,
        layers=[_sample(store.shards_dir, layer) for layer in md.layers],
    )


def count_labels(store: ShardStore) -> npt.NDArray[np.int64]:
    """Count the content tokens of each label, `[256] int64`, with descriptors that are closed again."""
    counts = np.zeros(256, dtype=np.int64)
    n_examples = store.metadata.n_examples
    with contextlib.closing(store.clone()) as opened:
        labels = Labels(opened)
        for start in range(0, n_examples, _EXAMPLES_PER_READ):
            examples = np.arange(start, min(n_examples, start + _EXAMPLES_PER_READ), dtype=np.int64)
            counts += np.bincount(labels.of_examples(examples).ravel(), minlength=256)
    return counts


def _sample(shards_dir: Path, layer: int) -> LayerSample:
    data = IndexedDataset(IndexedConfig(shards=shards_dir, layer=layer))
    rows = np.linspace(0, len(data) - 1, min(_N_SAMPLED, len(data))).astype(np.int64).tolist()
    acts = np.stack([data[i]["act"].numpy() for i in rows])
    n_bad = int(np.count_nonzero(~np.isfinite(acts)))
    acts = np.nan_to_num(acts, nan=0.0, posinf=0.0, neginf=0.0)
    return LayerSample(layer, np.linalg.norm(acts, axis=1), float(acts.mean()), float(acts.std()), n_bad)
