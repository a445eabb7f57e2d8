"""How the sides of the benchmark are measured.

Warm: the stream of batches goes on from epoch to epoch with the same workers. The clock starts after the buffer has
been filled and everything in it has been replaced, or where an epoch is not much longer, in its second epoch: memory
that a process has just been given is slow the first times, on virtual machines more than anywhere. In a long epoch the
clock stops when the time is up or a buffer's worth is left, before the buffer empties. A short epoch has little or
nothing between filling and emptying: there it stops a whole number of epochs after it was started. Either way the
loader is as full as it was at the start. Whole batches count only, and all of them. Statistics are one full pass.

Cold: one epoch from `iter()` to its last batch, workers' start included, after the page cache was dropped. A later
epoch would find in memory what this one read.
"""

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from saev_torch.bench.sides import Loader, Side, allowing_many_workers, make_loader
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.iterable import ShuffledActivations
from saev_torch.reading.compiled import find_sum_kernel
from saev_torch.stats.statistics import compute_statistics


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one side did once: samples, bytes of their activations, its time, and the processor time of all processes.

    `is_cut` says that a cold epoch, or a pass of statistics, was stopped before its end.
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

    @property
    def cores_busy(self) -> float:
        """Processor time per second."""
        return (self.user_s + self.system_s) / self.seconds

    @property
    def cores_busy_in_kernel(self) -> float:
        """The part of it that was spent in the kernel."""
        return self.system_s / self.seconds

    def since(self, start: "Measured") -> "Measured":
        """What was done after `start`, which was measured on the way."""
        return Measured(
            self.n_samples - start.n_samples,
            self.nbytes - start.nbytes,
            self.seconds - start.seconds,
            # A process that ended took its time with it.
            max(0.0, self.user_s - start.user_s),
            max(0.0, self.system_s - start.system_s),
            self.is_cut,
        )


def family() -> list[psutil.Process]:
    """This process and all processes below it."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def processor_s() -> NDArray[np.float64]:
    """Processor time of this process and all below it since each began: `[user, system]` in seconds."""
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
        self._before, self._began = processor_s(), time.perf_counter()

    def count(self, batch: Any) -> None:
        """Count the samples of a batch."""
        if self._touch:
            batch["act"].sum()
        self.count_to(self.n_samples + len(batch["act"]))

    def count_to(self, n_samples: int) -> None:
        """Set the number of samples so far."""
        self.n_samples, self.seconds = n_samples, time.perf_counter() - self._began

    def read(self, is_cut: bool = False) -> Measured:
        """What came until the last one was counted."""
        nbytes = self.n_samples * self._sample_nbytes
        user_s, system_s = np.maximum(0, processor_s() - self._before).tolist()
        return Measured(self.n_samples, nbytes, self.seconds, user_s, system_s, is_cut)


def measure_warm(side: Side, seconds: float, touch: bool) -> Measured:
    """Measure the steady state for so many seconds at least; see the module and `_Clock`."""
    with _running(side.make()) as loader, contextlib.closing(_stream(loader)) as batches:
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
    full: Measured | None = None
    is_cut = False
    with _running(side.make()) as loader:
        clock = _Clock(side.sample_nbytes, touch)
        for n_taken, batch in enumerate(loader, 1):
            clock.count(batch)
            is_cut = clock.seconds > limit_s and n_taken < side.n_batches
            if is_cut:
                break
            if side.has_buffer and n_taken == side.n_settle < side.n_batches // 2:
                # Of long data: should it be cut, what filled the buffer must not count without what empties it.
                full = clock.read()
        whole = clock.read(is_cut)
    return whole.since(full) if is_cut and full is not None else whole


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


def _stream(loader: Loader) -> Generator[Any, None, None]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


@contextlib.contextmanager
def _running(loader: Loader) -> Iterator[Loader]:
    """End the workers at once, not when the garbage collector comes by."""
    try:
        with allowing_many_workers():
            yield loader
    finally:
        iterator: Any = loader._iterator
        loader._iterator = None
        if iterator is not None:
            iterator._shutdown_workers()
