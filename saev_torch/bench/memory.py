"""Memory of a loader over an epoch: the sum of proportional set sizes over all its processes."""

import contextlib
import dataclasses
import multiprocessing
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil

from saev_torch.bench.sides import allowing_many_workers, make_loader
from saev_torch.bench.timing import family
from saev_torch.config import ShuffledConfig
from saev_torch.iterable import ShuffledActivations

PROCESS_NBYTES = 350_000_000
_N_BATCHES_PER_PROCESS = 6
_EPOCH_PER_BUFFER = 10
_N_PROBES = 100


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


def pss_nbytes(processes: Iterable[psutil.Process]) -> int:
    """Sum of the proportional set sizes of processes: memory that n of them share counts 1/n for each of them."""
    total = 0
    for process in processes:
        # A process that has ended in the meantime uses nothing.
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def _libraries_nbytes(process: psutil.Process) -> int:
    """The share of a process in the libraries that it maps, without what it wrote there."""
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
    n_batches = ShuffledActivations(cfg).n_batches
    cfg = dataclasses.replace(cfg, buffer_size=max(1, min(cfg.buffer_size, n_batches // _EPOCH_PER_BUFFER)))
    dataset = ShuffledActivations(cfg)
    probes: list[tuple[float, int]] = []
    every = max(1, n_batches // _N_PROBES)
    with allowing_many_workers():
        for i, _ in enumerate(make_loader(dataset, n_workers)):
            if i % every == 0:
                # The benchmark's own process maps the same libraries, and so would take a share of them.
                outside = _libraries_nbytes(psutil.Process().parent())
                probes.append((i / n_batches, pss_nbytes(family()) + outside))
    tenths = [[nbytes for at, nbytes in probes if int(at * 10) == tenth] for tenth in range(10)]
    deciles = tuple(round(statistics.median(tenth)) for tenth in tenths if tenth)
    batch_nbytes, peak_nbytes = cfg.batch_size * dataset.metadata.row_nbytes, max(nbytes for _, nbytes in probes)
    return MemoryUse(n_workers, cfg.buffer_size, batch_nbytes, n_batches, deciles, peak_nbytes)
