"""How the sides of the benchmark are measured: their speed, and their memory.

Warm: the stream of batches goes on from epoch to epoch with the same workers. The clock starts after the buffer has
been filled and everything in it has been replaced, or where an epoch is not much longer, in its second epoch: memory
that a process has just been given is slow the first times, on virtual machines more than anywhere. In a long epoch the
clock stops when the time is up or a buffer's worth is left, before the buffer empties. A short epoch has little or
nothing between filling and emptying: there it stops a whole number of epochs after it was started. Either way the
loader is as full as it was at the start. Whole batches count only, and all of them. Statistics are one full pass.

Cold: one epoch from `iter()` to its last batch, workers' start included, after the page cache was dropped. A later
epoch would find in memory what this one read.

Memory: the sum of proportional set sizes over all processes, over an epoch.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import re
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.bench.sides import Loader, Side, make_loader
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.iterable.activations import ShuffledActivations
from saev_torch.reading.compiled import find_sum_kernel
from saev_torch.stats.statistics import compute_statistics

if TYPE_CHECKING:
    import psutil

PROCESS_NBYTES = 350_000_000
_N_BATCHES_PER_PROCESS = 6
_EPOCH_PER_BUFFER = 10
_N_PROBES = 100
_SHARD = re.compile(r"/acts\d+\.bin$")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one side did once: samples, bytes of their activations, its time, and the processor time of all processes.

    `is_cut` says that a cold epoch, or a pass of statistics, was stopped before its end. In a cold epoch `start_s` went
    by until the first batch came, of `n_first` samples.
    """

    n_samples: int
    nbytes: int
    seconds: float
    user_s: float = 0.0
    system_s: float = 0.0
    is_cut: bool = False
    start_s: float = 0.0
    n_first: int = 0

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes of activations per second."""
        return self.nbytes / self.seconds / 1e9

    @property
    def gb_per_s_then(self) -> float:
        """The same after the first batch; 0 where there is no other."""
        share = 1 - self.n_first / self.n_samples
        return share * self.nbytes / (self.seconds - self.start_s) / 1e9 if share else 0.0


def family() -> "list[psutil.Process]":
    """This process and all processes below it."""
    import psutil

    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def processor_s() -> NDArray[np.float64]:
    """Processor time of this process and all below it since each began: `[user, system]` in seconds."""
    import psutil

    total = np.zeros(2)
    for process in family():
        # One that has ended in the meantime takes its time with it.
        with contextlib.suppress(psutil.Error):
            total += process.cpu_times()[:2]
    return total


class _Clock:
    """Counts samples from when it is made on; with `touch` it adds up each batch, as a consumer that looks at it."""

    def __init__(self, sample_nbytes: int, touch: bool = False) -> None:
        self._sample_nbytes, self._touch = sample_nbytes, touch
        self.n_samples, self.seconds = 0, 0.0
        self._start_s, self._n_first = 0.0, 0
        self._before, self._began = processor_s(), time.perf_counter()

    def count(self, batch: Any) -> None:
        if self._touch:
            batch["act"].sum()
        self.count_to(self.n_samples + len(batch["act"]))

    def count_to(self, n_samples: int) -> None:
        self.n_samples, self.seconds = n_samples, time.perf_counter() - self._began
        if not self._n_first:
            self._start_s, self._n_first = self.seconds, n_samples

    def read(self, is_cut: bool = False) -> Measured:
        nbytes = self.n_samples * self._sample_nbytes
        # A process that ended took its time with it.
        user_s, system_s = np.maximum(0, processor_s() - self._before).tolist()
        first = self._start_s, self._n_first
        return Measured(self.n_samples, nbytes, self.seconds, user_s, system_s, is_cut, *first)


def measure_warm(side: Side, seconds: float, touch: bool) -> Measured:
    """Measure the steady state for so many seconds at least; see the module and `_Clock`."""
    with running(side.make()) as loader:
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for _ in range(side.n_before):
            next(batches)
        clock = _Clock(side.sample_nbytes, touch)
        for n_timed, batch in enumerate(batches, 1):
            clock.count(batch)
            if side.may_stop(n_timed, clock.seconds >= seconds):
                break
        return clock.read()


def measure_cold(side: Side, limit_s: float, touch: bool) -> Measured:
    """Measure one epoch; see the module. The caller has dropped the page cache.

    After `limit_s` it is stopped. A side with a buffer then counts from the batch after which it was full.
    """
    with running(side.make()) as loader:
        clocks = [_Clock(side.sample_nbytes, touch)]
        for n_taken, batch in enumerate(loader, 1):
            for clock in clocks:
                clock.count(batch)
            if clocks[0].seconds > limit_s and n_taken < side.n_batches:
                return clocks[-1].read(is_cut=True)
            if side.has_buffer and n_taken == side.n_settle < side.n_batches // 2:
                # Of long data: should it be cut, what filled the buffer must not count without what empties it.
                clocks.append(_Clock(side.sample_nbytes))
        return clocks[0].read()


class _LateError(Exception):
    """The time is up."""


def measure_statistics(cfg: OrderedConfig, sample_nbytes: int, limit_s: float) -> Measured:
    """Measure a full pass of `compute_statistics`, or its first samples and `limit_s` at least.

    What is compiled, once for a process and 1 GiB or more, is ready.
    """
    find_sum_kernel()
    clock, is_cut = _Clock(sample_nbytes), False

    def count(done: int, total: int) -> None:
        clock.count_to(done)
        if 0 < done < total and clock.seconds > limit_s:
            raise _LateError

    try:
        compute_statistics(cfg, cache=False, progress=count)
    except _LateError:
        is_cut = True
    clock.count_to(clock.n_samples)
    return clock.read(is_cut)


def first_batch_s(cfg: ShuffledConfig) -> float:
    """Time from `iter()` to the first batch, in seconds, without workers."""
    loader = make_loader(ShuffledActivations(cfg), 0)
    began = time.perf_counter()
    batches = iter(loader)
    next(batches)
    return time.perf_counter() - began


@contextlib.contextmanager
def running(loader: Loader) -> Iterator[Loader]:
    """End the workers at once, not when the garbage collector comes by."""
    try:
        yield loader
    finally:
        iterator: Any = loader._iterator
        loader._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """What an epoch of `ShuffledActivations` took, in bytes of all processes together.

    `deciles_nbytes` has the median of each tenth of the epoch; of a short epoch fewer.
    """

    n_workers: int
    buffer_size: int
    batch_nbytes: int
    n_batches: int
    deciles_nbytes: tuple[int, ...]
    peak_nbytes: int

    @property
    def allowed_nbytes(self) -> int:
        """The buffer, and six batches and 0.35 GB for each process."""
        n_processes = 1 + self.n_workers
        n_batches = self.buffer_size + _N_BATCHES_PER_PROCESS * n_processes
        return n_batches * self.batch_nbytes + PROCESS_NBYTES * n_processes

    @property
    def growth(self) -> float:
        """Memory in the last tenth over that in the second: 1.0 where it does not grow."""
        return self.deciles_nbytes[-1] / self.deciles_nbytes[min(1, len(self.deciles_nbytes) - 1)]

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        return {**dataclasses.asdict(self), "allowed_nbytes": self.allowed_nbytes, "growth": self.growth}

    def __str__(self) -> str:
        tenths = " ".join(f"{nbytes / 1e9:.2f}" for nbytes in self.deciles_nbytes)
        return (
            f"{self.n_workers} workers, buffer of {self.buffer_size} in {self.n_batches} batches: {tenths}; "
            f"peak {self.peak_nbytes / 1e9:.2f} of {self.allowed_nbytes / 1e9:.2f} allowed, "
            f"last over second tenth {self.growth:.2f}"
        )


def pss_nbytes(processes: "Iterable[psutil.Process]") -> int:
    """Sum of the proportional set sizes of processes: memory that n of them share counts 1/n for each of them.

    Shards that they map are left out: those pages are the page cache's, with a mapping and without.
    """
    import psutil

    total = 0
    for process in processes:
        # A process that has ended in the meantime uses nothing.
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
            total -= sum(part.pss for part in process.memory_maps() if _SHARD.search(part.path))
    return total


def _libraries_nbytes(process: "psutil.Process") -> int:
    """The share of a process in the libraries that it maps, without what it wrote there."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return sum(part.pss - part.anonymous for part in process.memory_maps() if ".so" in part.path)
    return 0


def measure_memory(cfg: ShuffledConfig, n_workers: int) -> MemoryUse:
    """Iterate an epoch in a process of its own, and look at the memory all the way.

    The buffer is lowered to a tenth of the epoch, so that an epoch turns it over ten times.
    """
    # A new interpreter: this one has a past that would count.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, cfg, n_workers).result()


def _measure(cfg: ShuffledConfig, n_workers: int) -> MemoryUse:
    import psutil

    n_batches = ShuffledActivations(cfg).n_batches
    cfg = dataclasses.replace(cfg, buffer_size=max(1, min(cfg.buffer_size, n_batches // _EPOCH_PER_BUFFER)))
    dataset = ShuffledActivations(cfg)
    probes: list[tuple[float, int]] = []
    every = max(1, n_batches // _N_PROBES)
    for i, _ in enumerate(make_loader(dataset, n_workers)):
        if i % every == 0:
            # The benchmark's own process maps the same libraries, and so would take a share of them.
            outside = _libraries_nbytes(psutil.Process().parent())
            probes.append((i / n_batches, pss_nbytes(family()) + outside))
    tenths = [[nbytes for at, nbytes in probes if int(at * 10) == tenth] for tenth in range(10)]
    deciles = tuple(round(statistics.median(tenth)) for tenth in tenths if tenth)
    batch_nbytes = cfg.batch_size * dataset.metadata.loaded_row_nbytes(cfg.act_dtype)
    peak_nbytes = max(nbytes for _, nbytes in probes)
    return MemoryUse(n_workers, cfg.buffer_size, batch_nbytes, n_batches, deciles, peak_nbytes)
