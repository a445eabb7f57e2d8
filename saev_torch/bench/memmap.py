"""What a user would write without this package: `np.memmap` behind an ordinary `DataLoader`.

Two ways: a sampler of whole batches of shuffled indices, which is about the best of its kind, and one sample at a time.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from saev_torch.bench.data import BenchData
from saev_torch.order.selection import resolve_layers

_Int64s = NDArray[np.int64]


class _Memmaps(Dataset[dict[str, Any]]):
    """Content tokens of one layer, in the order of the disk."""

    def __init__(self, data: BenchData) -> None:
        store, self._md = data.store, data.store.metadata
        (self._layer_idx,) = resolve_layers(self._md, data.layer)
        self._files = [(store.path(i), shard.n_examples) for i, shard in enumerate(store.shards) if shard.n_examples]
        self._n_samples = data.n_samples
        self._opened: list[NDArray[np.float32]] = []

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memmap is a copy of the file.
        return {**self.__dict__, "_opened": []}

    def __len__(self) -> int:
        return self._n_samples

    @property
    def _shards(self) -> list[NDArray[np.float32]]:
        """A `[rows, d_model] float32` array for each file."""
        if not self._opened:
            md = self._md
            self._opened = [
                np.memmap(path, md.value_type.storage, "r", shape=(n * md.n_layers * md.tokens_per_example, md.d_model))
                for path, n in self._files
            ]
        return self._opened

    def _locate(self, samples: Any) -> tuple[Any, Any]:
        """Shard and row in it."""
        md = self._md
        example, token = np.divmod(samples, md.content_tokens_per_example)
        shard, example = np.divmod(example, md.examples_per_shard)
        row = (example * md.n_layers + self._layer_idx) * md.tokens_per_example + token + int(md.cls_token)
        return shard, row


class MemmapBatches(_Memmaps):
    """Whole batches by their indices, `[batch] int64`; with `DataLoader(sampler=IndexBatches(...), batch_size=None)`.

    Within a batch the samples of a shard come together, which makes no difference to training and saves a copy.
    """

    def __getitem__(self, samples: _Int64s) -> dict[str, Any]:
        samples = samples[np.argsort(self._locate(samples)[0], kind="stable")]
        shard, row = self._locate(samples)
        act = np.empty((len(samples), self._md.d_model), dtype=np.float32)
        bounds = np.searchsorted(shard, np.arange(len(self._files) + 1)).tolist()
        for rows, start, stop in zip(self._shards, bounds[:-1], bounds[1:], strict=True):
            # With the default mode numpy would make an array of its own first.
            np.take(rows, row[start:stop], axis=0, out=act[start:stop], mode="clip")
        return {"act": torch.from_numpy(act), "index": torch.from_numpy(samples)}


class MemmapSamples(_Memmaps):
    """One sample at a time; for `DataLoader(..., batch_size=..., shuffle=True)`."""

    def __getitem__(self, sample: int) -> dict[str, Any]:
        shard, row = self._locate(sample)
        return {"act": torch.from_numpy(np.array(self._shards[shard][row])), "index": sample}


class IndexBatches(Sampler[_Int64s]):
    """Batches of shuffled indices, `[batch] int64` each."""

    def __init__(self, n_samples: int, batch_size: int) -> None:
        self._n_samples, self._batch_size = n_samples, batch_size

    def __len__(self) -> int:
        return -(-self._n_samples // self._batch_size)

    def __iter__(self) -> Iterator[_Int64s]:
        order = torch.randperm(self._n_samples).numpy()
        for start in range(0, len(order), self._batch_size):
            yield order[start : start + self._batch_size]
