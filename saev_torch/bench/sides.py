"""The sides of the benchmark: which loaders are measured, ours and what a user would write without this package.

That is `np.memmap` behind an ordinary `DataLoader`, in two ways: with a sampler of whole batches of shuffled indices,
which is about the best of its kind, and one sample at a time.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from saev_torch.bench.data import BenchData
from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig
from saev_torch.indexed import IndexedDataset
from saev_torch.iterable.activations import OrderedActivations, ShuffledActivations
from saev_torch.order.selection import resolve_layers

FAMILIES = {
    "shuffled": "DataLoader(ShuffledActivations(cfg))",
    "ordered": "DataLoader(OrderedActivations(cfg))",
    "indexed": "DataLoader(IndexedDataset(cfg), batch_size=..., shuffle=True)",
    "scaled": "shuffled, with scale_norm",
    "labels": "shuffled, with ignore_labels that leave about two thirds of the tokens",
    "layers": "shuffled, one of several recorded layers",
    "memmap": "np.memmap in a DataLoader with a sampler of shuffled index batches",
    "samples": "np.memmap in a DataLoader, sample by sample",
}
"""Kinds of sides; a side is named for its kind and its number of workers, as in `shuffled-2`."""

# An epoch of so many buffers has a quarter of one to measure between the filling and the emptying.
_LONG = 2.25
# An epoch of so many buffers can turn over the buffer before the clock starts.
_VERY_LONG = 8
_N_SCALE_SAMPLES = 4096

Loader = DataLoader[Any]
_Int64s = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Side:
    """A loader to measure, named for its kind and its number of workers.

    Attributes:
        n_batches: Batches in an epoch.
        n_settle: Batches that an epoch begins with until the loader is as full as it will be.
        n_lanes: Batches that are read together; 0 for a side without a buffer that an epoch fills and empties.
    """

    name: str
    make: Callable[[], Loader]
    sample_nbytes: int
    n_workers: int
    n_batches: int
    n_settle: int
    n_lanes: int

    @property
    def has_buffer(self) -> bool:
        """Whether batches come from a buffer, which an epoch fills at its start and empties at its end."""
        return self.n_lanes > 0

    @property
    def is_long(self) -> bool:
        """Whether there is something to measure between the filling of the buffer and its emptying."""
        return self.n_batches >= _LONG * self.n_settle

    @property
    def n_before(self) -> int:
        """Batches to take before the clock starts."""
        if not self.has_buffer:
            return self.n_settle
        return 2 * self.n_settle if self.n_batches >= _VERY_LONG * self.n_settle else self.n_batches + self.n_settle

    def may_stop(self, n_timed: int, is_late: bool) -> bool:
        """Whether the clock may stop, so many batches after it was started; `is_late` where the time is up."""
        if self.has_buffer and not self.is_long:
            return is_late and n_timed % self.n_batches == 0
        # What is read together, or made by workers at the same time, also comes together.
        step = math.lcm(max(1, self.n_workers), max(1, self.n_lanes))
        at = self.n_before % self.n_batches + n_timed
        is_last = self.has_buffer and at + step > self.n_batches - self.n_settle
        return (is_late or is_last) and n_timed % step == 0


def make_loader(dataset: Any, n_workers: int, **kwargs: Any) -> Loader:
    """Make a `DataLoader` whose workers stay from epoch to epoch."""
    # Torch says so when a loader is made, and again when it is iterated: more workers than cores are meant here.
    warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes", UserWarning)
    return DataLoader(dataset, num_workers=n_workers, persistent_workers=n_workers > 0, **kwargs)


class _Memmaps(Dataset[dict[str, Any]]):
    """Content tokens of one layer, in the order of the disk."""

    def __init__(self, data: BenchData) -> None:
        self._data, self._md = data, data.store.metadata
        (self._layer_idx,) = resolve_layers(self._md, data.layer)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memmap is a copy of the file.
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}

    def __len__(self) -> int:
        return self._data.n_samples

    @functools.cached_property
    def _shards(self) -> list[NDArray[Any]]:
        """A `[rows, d_model]` array for each file, of what numpy calls the type that is stored."""
        md, store = self._md, self._data.store
        shapes = [(shard.n_examples * md.n_layers * md.tokens_per_example, md.d_model) for shard in store.shards]
        return [np.memmap(store.path(i), md.value_type.storage, "r", shape=s) for i, s in enumerate(shapes) if s[0]]

    def _float32(self, act: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(act).view(getattr(torch, self._md.dtype)).float()

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
        act = np.empty((len(samples), self._md.d_model), dtype=self._md.value_type.storage)
        bounds = np.searchsorted(shard, np.arange(len(self._shards) + 1)).tolist()
        for rows, start, stop in zip(self._shards, bounds[:-1], bounds[1:], strict=True):
            # With the default mode numpy would make an array of its own first.
            np.take(rows, row[start:stop], axis=0, out=act[start:stop], mode="clip")
        return {"act": self._float32(act), "index": torch.from_numpy(samples)}


class MemmapSamples(_Memmaps):
    """One sample at a time; for `DataLoader(..., batch_size=..., shuffle=True)`."""

    def __getitem__(self, sample: int) -> dict[str, Any]:
        shard, row = self._locate(sample)
        return {"act": self._float32(np.array(self._shards[shard][row])), "index": sample}


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


def make_sides(
    data: BenchData, layers_data: BenchData | None, cfg: ShuffledConfig, workers: Sequence[int], ignored: Sequence[int]
) -> list[Side]:
    """List the sides that a data set allows; those that are measured with one number of workers have the largest.

    Without `layers_data`, of which one of several recorded layers is read, or without `ignored` labels, the sides that
    need them are left out. `cfg` is of `data`, with the sizes of batch and buffer.
    """
    shards, layer, batch_size, act_dtype = cfg.shards, cfg.layer, cfg.batch_size, cfg.act_dtype
    n_batches, most = -(-data.n_samples // batch_size), [max(workers)]

    def ours(kind: str, numbers: Sequence[int], cfg: ShuffledConfig, data: BenchData = data) -> list[Side]:
        return [make_side(f"{kind}-{w}", cfg, w, data) for w in numbers]

    def plain(kind: str, numbers: Sequence[int], make: Callable[[int], Loader]) -> list[Side]:
        # What workers prepare in advance, by the default of DataLoader, and a little more, comes before the clock.
        return [
            Side(f"{kind}-{w}", functools.partial(make, w), data.sample_nbytes, w, n_batches, 2 * w + 2, n_lanes=0)
            for w in numbers
        ]

    ordered = OrderedConfig(shards=shards, layer=layer, batch_size=batch_size, act_dtype=act_dtype)
    indexed = IndexedConfig(shards=shards, layer=layer, act_dtype=act_dtype)
    by_sample = {"batch_size": batch_size, "shuffle": True}
    sides = ours("shuffled", workers, cfg)
    sides += plain("ordered", workers, lambda w: make_loader(OrderedActivations(ordered), w))
    sides += plain("indexed", most, lambda w: make_loader(IndexedDataset(indexed), w, **by_sample))
    # By a number that is found quickly: any other is multiplied by as fast.
    sides += ours("scaled", workers, dataclasses.replace(cfg, scale_norm=True, scale_samples=_N_SCALE_SAMPLES))
    if ignored:
        sides += ours("labels", most, dataclasses.replace(cfg, ignore_labels=list(ignored)))
    if layers_data is not None:
        several = dataclasses.replace(cfg, shards=layers_data.store.shards_dir, layer=layers_data.layer)
        sides += ours("layers", most, several, layers_data)
    # Memmaps are made anew each time, because pages that are mapped cannot be dropped from the page cache.
    whole = {"sampler": IndexBatches(data.n_samples, batch_size), "batch_size": None}
    sides += plain("memmap", workers, lambda w: make_loader(MemmapBatches(data), w, **whole))
    return sides + plain("samples", workers, lambda w: make_loader(MemmapSamples(data), w, **by_sample))


def make_side(name: str, cfg: ShuffledConfig, n_workers: int, data: BenchData) -> Side:
    """Make the side of a shuffled data set, `cfg` on `data`."""
    n_batches = ShuffledActivations(dataclasses.replace(cfg, scale_norm=False)).n_batches
    n_settle = min(n_batches, cfg.buffer_size)

    def make() -> Loader:
        return make_loader(ShuffledActivations(cfg), n_workers)

    return Side(name, make, data.sample_nbytes, n_workers, n_batches, n_settle, cfg.n_lanes)
