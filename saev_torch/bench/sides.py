"""The sides of the benchmark: which loaders are measured."""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from saev_torch.bench.data import BenchData
from saev_torch.bench.memmap import IndexBatches, MemmapBatches, MemmapSamples
from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig
from saev_torch.indexed import IndexedDataset
from saev_torch.iterable import OrderedActivations, ShuffledActivations

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


@contextlib.contextmanager
def allowing_many_workers() -> Iterator[None]:
    """Keep torch from warning, when a `DataLoader` is made or iterated, of more workers than cores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes", UserWarning)
        yield


def make_loader(dataset: Any, n_workers: int, **kwargs: Any) -> Loader:
    """Make a `DataLoader` whose workers stay from epoch to epoch."""
    with allowing_many_workers():
        return DataLoader(dataset, num_workers=n_workers, persistent_workers=n_workers > 0, **kwargs)


def make_sides(
    data: BenchData, layers_data: BenchData | None, cfg: ShuffledConfig, workers: Sequence[int], ignored: Sequence[int]
) -> list[Side]:
    """List the sides that a data set allows; those that are measured with one number of workers have the largest.

    Without `layers_data`, of which one of several recorded layers is read, or without `ignored` labels, the sides that
    need them are left out. `cfg` is of `data`, with the sizes of batch and buffer.
    """
    shards, layer, batch_size = cfg.shards, cfg.layer, cfg.batch_size
    n_batches, most = -(-data.n_samples // batch_size), [max(workers)]

    def ours(kind: str, numbers: Sequence[int], cfg: ShuffledConfig, data: BenchData = data) -> list[Side]:
        return [make_side(f"{kind}-{w}", cfg, w, data) for w in numbers]

    def plain(kind: str, numbers: Sequence[int], make: Callable[[int], Loader]) -> list[Side]:
        # What workers prepare in advance, by the default of DataLoader, and a little more, comes before the clock.
        return [
            Side(f"{kind}-{w}", functools.partial(make, w), data.sample_nbytes, w, n_batches, 2 * w + 2, n_lanes=0)
            for w in numbers
        ]

    def ordered(w: int) -> Loader:
        return make_loader(OrderedActivations(OrderedConfig(shards=shards, layer=layer, batch_size=batch_size)), w)

    def indexed(w: int) -> Loader:
        cfg = IndexedConfig(shards=shards, layer=layer)
        return make_loader(IndexedDataset(cfg), w, batch_size=batch_size, shuffle=True)

    # Memmaps are made anew each time, because pages that are mapped cannot be dropped from the page cache.
    def memmap(w: int) -> Loader:
        return make_loader(MemmapBatches(data), w, sampler=IndexBatches(data.n_samples, batch_size), batch_size=None)

    def samples(w: int) -> Loader:
        return make_loader(MemmapSamples(data), w, batch_size=batch_size, shuffle=True)

    sides = ours("shuffled", workers, cfg) + plain("ordered", workers, ordered) + plain("indexed", most, indexed)
    # By a number that is found quickly: any other is multiplied by as fast.
    sides += ours("scaled", workers, dataclasses.replace(cfg, scale_norm=True, scale_samples=_N_SCALE_SAMPLES))
    if ignored:
        sides += ours("labels", most, dataclasses.replace(cfg, ignore_labels=list(ignored)))
    if layers_data is not None:
        several = dataclasses.replace(cfg, shards=layers_data.store.shards_dir, layer=layers_data.layer)
        sides += ours("layers", most, several, layers_data)
    return sides + plain("memmap", workers, memmap) + plain("samples", workers, samples)


def make_side(name: str, cfg: ShuffledConfig, n_workers: int, data: BenchData) -> Side:
    """Make the side of a shuffled data set, `cfg` on `data`."""
    n_batches = ShuffledActivations(dataclasses.replace(cfg, scale_norm=False)).n_batches
    n_settle = min(n_batches, cfg.buffer_size)

    def make() -> Loader:
        return make_loader(ShuffledActivations(cfg), n_workers)

    return Side(name, make, data.sample_nbytes, n_workers, n_batches, n_settle, cfg.n_lanes)
