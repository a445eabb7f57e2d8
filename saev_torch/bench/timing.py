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

from saev_torch.bench.machine import Usage
from saev_torch.bench.sides import Loader, Side, allowing_many_workers, make_loader
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.iterable import ShuffledActivations
from saev_torch.reading.compiled import find_sum_kernel
from saev_torch.stats.statistics import compute_statistics

__all__ = ["Measured", "first_batch_s", "measure_cold", "measure_statistics", "measure_warm"]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one side did once.

    Attributes:
        n_samples: Samples that came.
        nbytes: Their activations in bytes.
        seconds: Time that they took.
        user_s: Processor time of all processes, outside the kernel.
        system_s: Processor time of all processes, in the kernel.
        is_cut: Whether a cold epoch, or a pass of statistics, was stopped before its end.
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


def measure_warm(side: Side, seconds: float, touch: bool) -> Measured:
    """Measure the steady state; see the module.

    Args:
        side: What to measure.
        seconds: How long at least.
        touch: Add up the activations of each batch, as a consumer that looks at them.
    """
    with _running(side.make()) as loader, contextlib.closing(_stream(loader)) as batches:
        for _ in range(side.n_before):
            next(batches)
        before, began = Usage.now(), time.perf_counter()
        n_samples = 0
        for n_timed, batch in enumerate(batches, 1):
            n_samples += len(batch["act"])
            if touch:
                batch["act"].sum()
            took = time.perf_counter() - began
            if side.may_stop(n_timed, took >= seconds):
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


class _LateError(Exception):
    """The time is up."""


def measure_statistics(cfg: OrderedConfig, sample_nbytes: int, limit_s: float) -> Measured:
    """Measure a full pass of `compute_statistics`; what is compiled, once for a process and 1 GiB or more, is ready.

    Args:
        cfg: What to measure.
        sample_nbytes: Size of a sample's activations in bytes.
        limit_s: Stop after so long, and the first samples at least.
    """
    find_sum_kernel()
    n_samples = 0

    def count(done: int, total: int) -> None:
        nonlocal n_samples
        n_samples = done
        if 0 < done < total and time.perf_counter() - began > limit_s:
            raise _LateError

    before, began = Usage.now(), time.perf_counter()
    is_cut = False
    try:
        compute_statistics(cfg, cache=False, progress=count)
    except _LateError:
        is_cut = True
    took = time.perf_counter() - began
    used = Usage.now().since(before)
    return Measured(n_samples, n_samples * sample_nbytes, took, used.user_s, used.system_s, is_cut)


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
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ConfigError("the selection has no samples, so there is nothing to measure; choose other data.")


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
