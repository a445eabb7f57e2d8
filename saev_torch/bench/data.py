"""Data to measure on: a shard directory of the user's, or one that is made for the purpose."""

import base64
import dataclasses
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from saev_torch.config import ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.dtypes import DTYPES, FLOAT32
from saev_torch.format.metadata import Metadata
from saev_torch.format.rules import ActDtype
from saev_torch.reading.store import ShardStore
from saev_torch.tools.inspect import count_labels
from saev_torch.writing.writer import ShardWriter

_D_MODEL, _N_CONTENT = 768, 196
_MADE_LABELS = 3
_MAX_TOKENS_PER_SHARD = 500_000
_EXAMPLES_AT_ONCE = 64
_ROOM_NBYTES = 256 << 20
_LEAST_IGNORED, _MOST_IGNORED = 0.2, 0.4


@dataclasses.dataclass(frozen=True)
class BenchData:
    """A data set, and the recorded layer of it that is read."""

    store: ShardStore
    layer: int

    @classmethod
    def open(cls, shards: Path, layer: int | None) -> "BenchData":
        """Open a shard directory, for a recorded layer; None for the one in the middle."""
        store = ShardStore(shards)
        layers = store.metadata.layers
        if layer is not None and layer not in layers:
            raise ConfigError(f"--layer: expected one of the recorded layers {list(layers)}, got {layer}; choose one.")
        return cls(store, layers[len(layers) // 2] if layer is None else layer)

    def config(self, batch_size: int, buffer_size: int, act_dtype: ActDtype = "float32") -> ShuffledConfig:
        """How it is read shuffled."""
        return ShuffledConfig(
            shards=self.store.shards_dir,
            layer=self.layer,
            batch_size=batch_size,
            buffer_size=buffer_size,
            act_dtype=act_dtype,
        )

    @property
    def n_samples(self) -> int:
        """Content tokens of the layer."""
        return self.store.metadata.n_examples * self.store.metadata.content_tokens_per_example

    @property
    def sample_nbytes(self) -> int:
        """Size of a sample in bytes."""
        return self.store.metadata.row_nbytes

    @property
    def nbytes(self) -> int:
        """Size of all samples of the layer in bytes."""
        return self.n_samples * self.sample_nbytes


def example_nbytes(dtype: str, d_model: int = _D_MODEL) -> int:
    """Size of one layer of an example that is made, of values of a type."""
    return d_model * DTYPES[dtype].nbytes * _N_CONTENT


def make(
    root: Path,
    n_examples: int,
    n_layers: int,
    on_written: Callable[[int], None],
    dtype: str = FLOAT32.name,
    d_model: int = _D_MODEL,
) -> Path:
    """Write shards of random activations, and labels on a third of the tokens each, into a new directory below `root`.

    `on_written` is called with the number of examples just written. Raises SaevTorchError, as where there is no room.
    """
    wanted = n_examples * n_layers * example_nbytes(dtype, d_model)
    free = shutil.disk_usage(root).free
    if wanted + _ROOM_NBYTES > free:
        raise ConfigError(
            f"--make-gb: expected room for {wanted / 1e9:.1f} GB ({n_layers} recorded layers) in {root}, got "
            f"{free / 1e9:.1f} GB; lower --make-gb or --layers, or choose another --folder."
        )
    md = Metadata(
        family="random",
        ckpt="none",
        layers=tuple(range(n_layers)),
        content_tokens_per_example=_N_CONTENT,
        cls_token=False,
        d_model=d_model,
        n_examples=n_examples,
        max_tokens_per_shard=max(_MAX_TOKENS_PER_SHARD, n_layers * _N_CONTENT),
        data=base64.b64encode(pickle.dumps({"made_by": "saev_torch bench"})).decode(),
        dataset=Path("none"),
        dtype=dtype,
    )
    rng = np.random.default_rng(0)
    with ShardWriter(root, md) as writer:
        for start in range(0, n_examples, _EXAMPLES_AT_ONCE):
            n = min(_EXAMPLES_AT_ONCE, n_examples - start)
            acts = rng.random((n, n_layers, _N_CONTENT, d_model), dtype=np.float32)
            writer.write_batch(acts, start, rng.integers(_MADE_LABELS, size=(n, _N_CONTENT)))
            on_written(n)
    return writer.shards_dir


def choose_ignored(store: ShardStore) -> tuple[list[int], float]:
    """Choose labels that stand on about a third of the tokens, if there are such, and say on which share they do."""
    if not store.has_labels:
        return [], 0.0
    counts = count_labels(store)
    shares = counts / counts.sum()
    chosen: list[int] = []
    total = 0.0
    # The most frequent first, each where it brings the sum nearer to a third.
    for label in np.argsort(-shares, kind="stable").tolist():
        share = float(shares[label])
        nearer = abs(total + share - 1 / 3) < abs(total - 1 / 3)
        if share and nearer and total + share <= _MOST_IGNORED:
            chosen.append(label)
            total += share
    return (chosen, total) if total >= _LEAST_IGNORED else ([], 0.0)
