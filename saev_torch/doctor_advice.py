"""From what was measured to what to do: the doctor's conclusions, as functions of figures only."""

import dataclasses
import math
from collections.abc import Mapping

from saev_torch.bench_memory import N_BATCHES_PER_PROCESS, PROCESS_NBYTES
from saev_torch.plan import ShufflePlan

__all__ = ["Grid", "Prediction", "Recommended", "Vitals", "interpolate", "recommend"]

Grid = Mapping[tuple[int, int], float]
"""GB/s for (threads, bytes of a block)."""

_N_LANES = 8
_NEARLY = 0.9
# The training process and the page cache want memory, too.
_SHARE_FOR_LOADER = 0.5
_WORST_MIXING = 0.1


@dataclasses.dataclass(frozen=True)
class Vitals:
    """What was measured.

    Attributes:
        cores: Cores' worth of time that there is.
        available_nbytes: Memory that can be had.
        n_samples: Samples in an epoch.
        sample_nbytes: Size of a sample in bytes.
        run_nbytes: Bytes of the layer that lie next to each other on disk.
        batch_size: Samples in a batch.
        buffer_size: Batches of buffer that are wished for.
        cold: Rates of reading blocks in random order that are not in the page cache.
        copying: GB/s of the loader for each number of workers, all in the page cache.
    """

    cores: float
    available_nbytes: int
    n_samples: int
    sample_nbytes: int
    run_nbytes: int
    batch_size: int
    buffer_size: int
    cold: Grid
    copying: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of an epoch."""
        return self.n_samples * self.sample_nbytes

    @property
    def batch_nbytes(self) -> int:
        """Bytes of a batch."""
        return self.batch_size * self.sample_nbytes

    def plan(self, buffer_size: int, block_size: int | None = None) -> ShufflePlan:
        """The shuffle that these options make."""
        return ShufflePlan.make(self.n_samples, self.batch_size, buffer_size, _N_LANES, block_size, 0, 0)

    def read_nbytes(self, n_workers: int, plan: ShufflePlan) -> int:
        """Bytes that a process reads at once."""
        # Lanes that share a process are neighbours on disk.
        n_lanes = plan.n_lanes // math.gcd(max(1, n_workers), plan.n_lanes) if plan.reads_lanes_together else 1
        return min(self.run_nbytes, plan.block_size * n_lanes * self.sample_nbytes)

    def loader_nbytes(self, n_workers: int, buffer_size: int) -> int:
        """Memory of a loader and its processes, at most."""
        n_processes = 1 + n_workers
        buffer = (buffer_size + N_BATCHES_PER_PROCESS * n_processes) * self.batch_nbytes
        return buffer + PROCESS_NBYTES * n_processes

    def fits(self, n_workers: int, buffer_size: int) -> bool:
        """Whether the data stay in the page cache beside the loader."""
        return self.nbytes + self.loader_nbytes(n_workers, buffer_size) <= self.available_nbytes


@dataclasses.dataclass(frozen=True)
class Prediction:
    """How long epochs will take.

    Attributes:
        disk: GB/s that the disk gives for reads of this size by so many threads.
        copying: GB/s that the loader reaches with no disk in the way.
        first_s: Seconds of the first epoch, nothing in the page cache.
        later_s: Seconds of the ones after it.
        first_bound: What bounds the first one: "disk" or "copying".
        later_bound: What bounds the ones after it: "copying"; or "memory", where the disk does and a page cache for all
            the data would help; or "disk", where it would not.
    """

    disk: float
    copying: float
    first_s: float
    later_s: float
    first_bound: str
    later_bound: str


@dataclasses.dataclass(frozen=True)
class Recommended:
    """Options, why, and what comes of them.

    Attributes:
        num_workers: For the `DataLoader`.
        n_threads: Of the config, like the ones that follow.
        n_lanes: Lanes.
        block_size: Samples in a block; None for the default.
        buffer_size: Batches of buffer.
        reasons: One line for each.
        prediction: How long epochs will take; None before the loader was tried.
    """

    num_workers: int
    n_threads: int
    n_lanes: int
    block_size: int | None
    buffer_size: int
    reasons: Mapping[str, str]
    prediction: Prediction | None


def interpolate(grid: Grid, n_threads: int, nbytes: int) -> float:
    """Rate for a size of block between those that were measured, with at least as few threads."""
    threads = max((t for t, _ in grid if t <= n_threads), default=min(t for t, _ in grid))
    points = sorted((size, rate) for (t, size), rate in grid.items() if t == threads)
    below = max((p for p in points if p[0] <= nbytes), default=points[0])
    above = min((p for p in points if p[0] >= nbytes), default=points[-1])
    if below[0] >= above[0]:
        return below[1]
    share = math.log(nbytes / below[0]) / math.log(above[0] / below[0])
    return below[1] + share * (above[1] - below[1])


def recommend(vitals: Vitals, n_workers: int | None = None) -> Recommended:
    """Choose options.

    Args:
        vitals: What was measured. Before the loader was tried, `copying` is empty and `n_workers` must be given.
        n_workers: Number of workers; None to choose it, too.
    """
    reasons: dict[str, str] = {}
    buffer_size = _choose_buffer(vitals, n_workers, reasons)
    if n_workers is None:
        n_workers = _choose_workers(vitals, buffer_size, reasons)
    n_readers = max(1, n_workers)
    block_size = _choose_block(vitals, n_workers, buffer_size, reasons)
    plan = vitals.plan(buffer_size, block_size)
    nbytes = vitals.read_nbytes(n_workers, plan)
    n_total, disk = _fewest_threads(vitals, nbytes)
    n_threads = max(math.ceil(n_total / n_readers), math.ceil(vitals.cores / n_readers))
    reasons["n_threads"] = (
        f"in each of {_n(n_readers, 'process', 'processes')}: cold, {_n(n_total, 'thread')} in all read blocks of "
        f"{nbytes >> 10} KB at {disk:.2f} GB/s, and more gain less than {1 - _NEARLY:.0%}; and none of "
        f"{vitals.cores:g} cores is left idle"
    )
    n_lanes = math.lcm(_N_LANES, n_readers)
    readers = _n(n_readers, "reading process divides", "reading processes divide")
    reasons["n_lanes"] = f"{readers} it, so that each serves whole lanes"
    disk = interpolate(vitals.cold, n_threads * n_readers, nbytes)
    prediction = _predict(vitals, n_workers, buffer_size, disk) if vitals.copying else None
    return Recommended(n_workers, n_threads, n_lanes, block_size, buffer_size, reasons, prediction)


def _n(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _choose_buffer(vitals: Vitals, n_workers: int | None, reasons: dict[str, str]) -> int:
    most = max(vitals.copying, default=0) if n_workers is None else n_workers
    room = vitals.available_nbytes * _SHARE_FOR_LOADER
    wished = vitals.buffer_size
    size = min(wished, int((room - vitals.loader_nbytes(most, 0)) // vitals.batch_nbytes))
    size = max(1, size // _N_LANES * _N_LANES if _N_LANES <= size < wished else size)
    gigabytes, available = size * vitals.batch_nbytes / 1e9, vitals.available_nbytes / 1e9
    reasons["buffer_size"] = f"{size} batches of {vitals.batch_nbytes / 1e6:.0f} MB are {gigabytes:.2f} GB, of "
    reasons["buffer_size"] += f"{available:.1f} GB available"
    if size < wished:
        share = f"half of them, less what {_n(1 + most, 'process', 'processes')} need"
        reasons["buffer_size"] += f"; {wished} would not fit into {share}"
    return size


def _choose_workers(vitals: Vitals, buffer_size: int, reasons: dict[str, str]) -> int:
    most = max(vitals.copying)
    wanted = max(vitals.copying.values())
    why = "nearly the best"
    if not vitals.fits(most, buffer_size):
        disk = max(vitals.cold.values())
        if disk < wanted:
            wanted, why = disk, f"nearly what the disk gives ({disk:.2f} GB/s), from which each epoch must come"
    # One at least, so that the training loop has its interpreter to itself, but not on its only core.
    enough = [w for w, rate in vitals.copying.items() if rate >= _NEARLY * wanted and (w or vitals.cores <= 1)]
    n_workers = min(enough, default=most)
    tried = ", ".join(f"{w}: {rate:.2f}" for w, rate in sorted(vitals.copying.items()))
    reasons["num_workers"] = f"tried warm, in GB/s, {tried}; the fewest that reach {why}"
    if vitals.cores > 1 and n_workers == 1:
        reasons["num_workers"] += ", and not 0, which shares the interpreter with the training loop"
    return n_workers


def _fewest_threads(vitals: Vitals, nbytes: int) -> tuple[int, float]:
    """The fewest threads that read blocks of a size at nearly the best rate, and that rate."""
    rates = {t: interpolate(vitals.cold, t, nbytes) for t in sorted({t for t, _ in vitals.cold})}
    best = max(rates.values())
    return next((t, rate) for t, rate in rates.items() if rate >= _NEARLY * best)


def _mixing(plan: ShufflePlan) -> float:
    """Distinct blocks that a batch holds rows of, for each of its samples: 1.0 for a uniform draw of long data."""
    depth, k = plan.depth(0), plan.block_size
    return depth / k * (1 - (1 - 1 / depth) ** k)


def _choose_block(vitals: Vitals, n_workers: int, buffer_size: int, reasons: dict[str, str]) -> int | None:
    plan = vitals.plan(buffer_size)
    nbytes = vitals.read_nbytes(n_workers, plan)
    _, rate = _fewest_threads(vitals, nbytes)
    best = max(vitals.cold.values())
    here = f"the default of {plan.block_size} samples makes reads of {nbytes >> 10} KB, {rate:.2f} GB/s cold"
    copying = vitals.copying.get(n_workers, math.inf)
    reason = None
    if vitals.fits(n_workers, buffer_size):
        reason = "and after the first epoch the data are in the page cache"
    elif rate >= _NEARLY * best:
        reason = f"of at most {best:.2f}"
    elif rate >= copying:
        reason = f"which is more than the loader can copy ({copying:.2f} GB/s)"
    if reason is not None:
        reasons["block_size"] = f"{here}, {reason}"
        return None
    block_size = plan.block_size
    while True:
        larger = vitals.plan(buffer_size, 2 * block_size)
        larger_nbytes = vitals.read_nbytes(n_workers, larger)
        if _mixing(larger) < _WORST_MIXING or larger_nbytes <= nbytes or rate >= _NEARLY * best:
            break
        block_size, nbytes = 2 * block_size, larger_nbytes
        _, rate = _fewest_threads(vitals, nbytes)
    if block_size == plan.block_size:
        reasons["block_size"] = f"{here}, of at most {best:.2f}, but larger ones would mix too badly"
        return None
    mixing = _mixing(vitals.plan(buffer_size, block_size))
    reasons["block_size"] = (
        f"{here}; this one {nbytes >> 10} KB, {rate:.2f} GB/s, at the price of mixing: a batch is drawn from "
        f"{mixing:.2f} distinct blocks for each sample, not {_mixing(plan):.2f}"
    )
    return block_size


def _predict(vitals: Vitals, n_workers: int, buffer_size: int, disk: float) -> Prediction:
    copying, gigabytes = vitals.copying[n_workers], vitals.nbytes / 1e9
    is_disk, fits = disk < copying, vitals.fits(n_workers, buffer_size)
    first_s = gigabytes / min(disk, copying)
    return Prediction(
        disk=disk,
        copying=copying,
        first_s=first_s,
        later_s=gigabytes / copying if fits else first_s,
        first_bound="disk" if is_disk else "copying",
        later_bound="copying" if fits or not is_disk else "memory",
    )
