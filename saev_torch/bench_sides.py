"""The sides of the benchmark: which loaders are measured, and how.

Warm: the stream of batches goes on from epoch to epoch with the same workers. The clock starts after the buffer has
been filled once, and stops, once the time is up, at one of two points: within the first epoch, at least a buffer before
its end; or a whole number of epochs after it was started. At both the loader is as full as it was at the start, so the
rate is that of a long run. Whole batches count only, and all of them.

Cold: one epoch from `iter()` to its last batch, workers' start included, after the page cache was dropped. A later
epoch would find in memory what this one read.
"""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from saev_torch.bench_data import BenchData
from saev_torch.bench_machine import Usage
from saev_torch.bench_memmap import IndexBatches, MemmapBatches, MemmapSamples
from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig
from saev_torch.datasets import IndexedDataset, OrderedActivations, ShuffledActivations
from saev_torch.errors import ConfigError

__all__ = [
    "FAMILIES",
    "Measured",
    "Side",
    "first_batch_s",
    "make_loader",
    "make_side",
    "make_sides",
    "measure_cold",
    "measure_warm",
]

FAMILIES = {
    "shuffled": "DataLoader(ShuffledActivations(cfg))",
    "ordered": "DataLoader(OrderedActivations(cfg))",
    "indexed": "DataLoader(IndexedDataset(cfg), batch_size=..., shuffle=True)",
    "labels": "shuffled, with ignore_labels that leave about two thirds of the tokens",
    "layers": "shuffled, one of several recorded layers",
    "memmap": "np.memmap in a DataLoader with a sampler of shuffled index batches",
    "samples": "np.memmap in a DataLoader, sample by sample",
}
"""Kinds of sides; a side is named for its kind and its number of workers, as in `shuffled-2`."""

_Loader = DataLoader[Any]


@dataclasses.dataclass(frozen=True)
class Side:
    """A loader to measure.

    Attributes:
        name: Kind and number of workers.
        make: Makes the loader.
        sample_nbytes: Size of a sample's activations in bytes.
        n_workers: Worker processes.
        n_batches: Batches in an epoch.
        n_settle: Batches to take before the clock starts.
        has_buffer: Whether batches come from a buffer, which an epoch fills at its start and empties at its end.
    """

    name: str
    make: Callable[[], _Loader]
    sample_nbytes: int
    n_workers: int
    n_batches: int
    n_settle: int
    has_buffer: bool

    def may_stop(self, n_timed: int) -> bool:
        """Whether the loader is, after so many timed batches, as full as when the clock was started."""
        if self.has_buffer:
            before_the_end = self.n_settle + n_timed <= self.n_batches - self.n_settle
            return before_the_end or n_timed % self.n_batches == 0
        # Workers finish their batches at about the same time.
        return n_timed % max(1, self.n_workers) == 0


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one side did once.

    Attributes:
        n_samples: Samples that came.
        nbytes: Their activations in bytes.
        seconds: Time that they took.
        user_s: Processor time of all processes, outside the kernel.
        system_s: Processor time of all processes, in the kernel.
        is_cut: Whether a cold epoch was stopped before its end.
    """

    n_samples: int
    nbytes: int
    seconds: float
    user_s: float = 0.0
    system_s: float = 0.0
    is_cut: bool = False

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes of activations per second."""
        return self.nbytes / self.seconds / 1e9

    @property
    def samples_per_s(self) -> float:
        """Samples per second."""
        return self.n_samples / self.seconds


def make_loader(dataset: Any, n_workers: int, **kwargs: Any) -> _Loader:
    """Make a `DataLoader` whose workers stay, even where they are more than the cores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes", UserWarning)
        return DataLoader(dataset, num_workers=n_workers, persistent_workers=n_workers > 0, **kwargs)


def make_sides(
    data: BenchData,
    layers_data: BenchData | None,
    batch_size: int,
    buffer_size: int,
    workers: Sequence[int],
    ignored: Sequence[int],
) -> list[Side]:
    """List the sides that a data set allows.

    Args:
        data: What is read.
        layers_data: Data of which one of several recorded layers is read; None leaves that side out.
        batch_size: Samples in a batch.
        buffer_size: Batches held for shuffling.
        workers: Numbers of workers; sides that are measured with one number have the largest.
        ignored: Labels to leave out; empty leaves that side out.
    """
    most = [max(workers)]
    shards, layer = data.store.shards_dir, data.layer
    shuffled = functools.partial(ShuffledConfig, batch_size=batch_size, buffer_size=buffer_size)
    cfg = shuffled(shards=shards, layer=layer)
    sides = [make_side(f"shuffled-{w}", cfg, w, data) for w in workers]
    sides += [_ordered(f"ordered-{w}", OrderedConfig(shards=shards, layer=layer, batch_size=batch_size), w, data)
              for w in workers]  # fmt: skip
    sides += [_indexed(f"indexed-{w}", IndexedConfig(shards=shards, layer=layer), batch_size, w, data) for w in most]
    if ignored:
        cfg = shuffled(shards=shards, layer=layer, ignore_labels=list(ignored))
        sides += [make_side(f"labels-{w}", cfg, w, data) for w in most]
    if layers_data is not None:
        cfg = shuffled(shards=layers_data.store.shards_dir, layer=layers_data.layer)
        sides += [make_side(f"layers-{w}", cfg, w, layers_data) for w in most]
    sides += [_memmap(f"memmap-{w}", batch_size, w, data) for w in workers]
    sides += [_samples(f"samples-{w}", batch_size, w, data) for w in workers]
    return sides


def make_side(name: str, cfg: ShuffledConfig, n_workers: int, data: BenchData) -> Side:
    """Make the side of a shuffled data set, `cfg` on `data`."""
    n_batches = ShuffledActivations(cfg).n_batches
    return Side(
        name=name,
        make=lambda: make_loader(ShuffledActivations(cfg), n_workers),
        sample_nbytes=data.sample_nbytes,
        n_workers=n_workers,
        n_batches=n_batches,
        n_settle=min(n_batches, cfg.buffer_size),
        has_buffer=True,
    )


def _ordered(name: str, cfg: OrderedConfig, n_workers: int, data: BenchData) -> Side:
    return _plain(name, lambda: make_loader(OrderedActivations(cfg), n_workers), cfg.batch_size, n_workers, data)


def _indexed(name: str, cfg: IndexedConfig, batch_size: int, n_workers: int, data: BenchData) -> Side:
    def make() -> _Loader:
        return make_loader(IndexedDataset(cfg), n_workers, batch_size=batch_size, shuffle=True)

    return _plain(name, make, batch_size, n_workers, data)


def _memmap(name: str, batch_size: int, n_workers: int, data: BenchData) -> Side:
    def make() -> _Loader:
        # Made anew each time, because pages that are mapped cannot be dropped from the page cache.
        sampler = IndexBatches(data.n_samples, batch_size)
        return make_loader(MemmapBatches(data), n_workers, sampler=sampler, batch_size=None)

    return _plain(name, make, batch_size, n_workers, data)


def _samples(name: str, batch_size: int, n_workers: int, data: BenchData) -> Side:
    def make() -> _Loader:
        return make_loader(MemmapSamples(data), n_workers, batch_size=batch_size, shuffle=True)

    return _plain(name, make, batch_size, n_workers, data)


def _plain(name: str, make: Callable[[], _Loader], batch_size: int, n_workers: int, data: BenchData) -> Side:
    # What workers prepare in advance, by the default of DataLoader, and a little more.
    n_settle = 2 * n_workers + 2
    return Side(name, make, data.sample_nbytes, n_workers, -(-data.n_samples // batch_size), n_settle, False)


def measure_warm(side: Side, seconds: float, touch: bool) -> Measured:
    """Measure the steady state; see the module.

    Args:
        side: What to measure.
        seconds: How long at least.
        touch: Add up the activations of each batch, as a consumer that looks at them.
    """
    with _running(side.make()) as loader, contextlib.closing(_stream(loader)) as batches:
        for _ in range(side.n_settle):
            next(batches)
        before, began = Usage.now(), time.perf_counter()
        n_samples = 0
        for n_timed, batch in enumerate(batches, 1):
            n_samples += len(batch["act"])
            if touch:
                batch["act"].sum()
            took = time.perf_counter() - began
            if took >= seconds and side.may_stop(n_timed):
                break
        used = Usage.now().since(before)
    return Measured(n_samples, n_samples * side.sample_nbytes, took, used.user_s, used.system_s)


def measure_cold(side: Side, limit_s: float, touch: bool) -> Measured:
    """Measure one epoch; see the module. The caller has dropped the page cache.

    Args:
        side: What to measure.
        limit_s: Stop after so long. A side with a buffer then counts from the batch after which it was full.
        touch: Add up the activations of each batch, as a consumer that looks at them.
    """
    with _running(side.make()) as loader:
        before, began = Usage.now(), time.perf_counter()
        deadline = began + limit_s
        full: Measured | None = None
        n_samples, n_taken, is_cut, took = 0, 0, False, 0.0
        for batch in loader:
            n_samples, n_taken = n_samples + len(batch["act"]), n_taken + 1
            if touch:
                batch["act"].sum()
            now = time.perf_counter()
            took = now - began
            if now > deadline and n_taken < side.n_batches:
                is_cut = True
                break
            if side.has_buffer and n_taken == side.n_settle < side.n_batches // 2:
                # Of long data: should it be cut, what filled the buffer must not count without what empties it.
                full = Measured(n_samples, 0, took, *Usage.now().since(before))
        used = Usage.now().since(before)
    if not n_taken:
        raise ConfigError("the selection has no samples, so there is nothing to measure; choose other data.")
    whole = Measured(n_samples, n_samples * side.sample_nbytes, took, *used, is_cut)
    return _without(whole, full, side.sample_nbytes) if is_cut and full is not None else whole


def _without(whole: Measured, start: Measured, sample_nbytes: int) -> Measured:
    n_samples = whole.n_samples - start.n_samples
    return Measured(
        n_samples=n_samples,
        nbytes=n_samples * sample_nbytes,
        seconds=whole.seconds - start.seconds,
        user_s=max(0.0, whole.user_s - start.user_s),
        system_s=max(0.0, whole.system_s - start.system_s),
        is_cut=True,
    )


def first_batch_s(cfg: ShuffledConfig) -> float:
    """Time from `iter()` to the first batch, in seconds, without workers."""
    loader = make_loader(ShuffledActivations(cfg), 0)
    began = time.perf_counter()
    batches = iter(loader)
    next(batches)
    return time.perf_counter() - began


def _stream(loader: _Loader) -> Generator[Any, None, None]:
    """Batches of one epoch after the other."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ConfigError("the selection has no samples, so there is nothing to measure; choose other data.")


@contextlib.contextmanager
def _running(loader: _Loader) -> Iterator[_Loader]:
    """End the workers at once, not when the garbage collector comes by."""
    try:
        yield loader
    finally:
        iterator: Any = loader._iterator
        loader._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()
