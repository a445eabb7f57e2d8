"""From what was measured to what to do: the doctor's conclusions, as functions of figures only."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from saev_torch.bench.measuring import PROCESS_NBYTES, Measured
from saev_torch.config import ShuffledConfig
from saev_torch.format.metadata import Metadata
from saev_torch.order.predict import Prediction, predict

Grid = Mapping[tuple[int, int], float]
"""GB/s for (threads, bytes of a block)."""

_N_LANES = ShuffledConfig.n_lanes
_NEARLY = 0.9
# The training process and the page cache want memory, too.
_SHARE_FOR_LOADER = 0.5
# Blocks of twice the size cost up to half of the mixing, so they are not for the last quarter of a disk's rate; and so
# much of the distinct examples in a batch must stay in any case.
_FAST_ENOUGH, _MIXING_KEPT = 0.75, 0.5
_FEW_BATCHES, _SHORT_S, _AS_PREDICTED = 32, 2.0, 0.8


@dataclasses.dataclass(frozen=True)
class Vitals:
    """What was measured: of the machine its cores' worth of time, and the memory that can be had; and rates.

    Attributes:
        cfg: What is read, with the buffer that is wished for.
        cold: Rates of reading blocks in random order that are not in the page cache.
        copying: GB/s of the loader for each number of workers, all in the page cache; empty before it was tried.
    """

    cores: float
    available_nbytes: int
    metadata: Metadata
    cfg: ShuffledConfig
    cold: Grid
    copying: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of an epoch."""
        md = self.metadata
        return md.n_examples * md.content_tokens_per_example * md.row_nbytes

    @property
    def n_batches(self) -> int:
        """Batches of an epoch."""
        md = self.metadata
        return -(-md.n_examples * md.content_tokens_per_example // self.cfg.batch_size)

    @property
    def batch_nbytes(self) -> int:
        """Bytes of a batch in memory."""
        return self.cfg.batch_size * self.metadata.loaded_row_nbytes(self.cfg.act_dtype)

    def predict(self, n_workers: int, buffer_size: int, block_size: int | None = None) -> Prediction:
        """How the shuffle mixes, reads and takes memory with these options."""
        n_readers = max(1, n_workers)
        n_lanes = math.lcm(_N_LANES, n_readers)
        cfg = dataclasses.replace(self.cfg, buffer_size=buffer_size, block_size=block_size, n_lanes=n_lanes)
        return predict(self.metadata, cfg, n_readers)

    def loader_nbytes(self, n_workers: int, buffer_size: int) -> int:
        """Memory of a loader with all its processes."""
        return self.predict(n_workers, buffer_size).memory_nbytes + PROCESS_NBYTES * (1 + n_workers)

    def fits(self, n_workers: int, buffer_size: int) -> bool:
        """Whether the data stay in the page cache beside the loader."""
        return self.nbytes + self.loader_nbytes(n_workers, buffer_size) <= self.available_nbytes


@dataclasses.dataclass(frozen=True)
class Forecast:
    """How long the first epoch will take, nothing in the page cache, and the ones after it, and what bounds them.

    `disk` is what the disk gives for reads of this size by so many threads, `copying` what the loader reaches with no
    disk in the way, both in GB/s. The first epoch is bound by "disk" or "copying", later ones by "copying"; or by
    "memory", where the data do not fit into the page cache and so come from the disk again, slower than copying.
    """

    disk: float
    copying: float
    first_s: float
    later_s: float
    first_bound: str
    later_bound: str


@dataclasses.dataclass(frozen=True)
class Recommended:
    """Options of the `DataLoader` and the config, a line of reason for each, and what comes of them, once tried."""

    num_workers: int
    n_threads: int
    n_lanes: int
    block_size: int | None
    buffer_size: int
    reasons: Mapping[str, str]
    forecast: Forecast | None

    def config(self, cfg: ShuffledConfig) -> ShuffledConfig:
        """The config with these options."""
        options = {name: getattr(self, name) for name in ("buffer_size", "n_threads", "n_lanes", "block_size")}
        return dataclasses.replace(cfg, **options)


def note_few(n_batches: int, buffer_size: int) -> str | None:
    """What to say where an epoch has few batches."""
    if n_batches >= _FEW_BATCHES:
        return None
    are = "batch is" if n_batches == 1 else "batches are"
    held = f", and the buffer of {buffer_size} holds them all" if n_batches <= buffer_size else ""
    return f"note: {n_batches} {are} few: such rates vary from run to run{held}; a smaller --batch-size makes more"


def note_short(epoch_s: float) -> str | None:
    """What to say where an epoch is over before anybody waits."""
    if epoch_s >= _SHORT_S:
        return None
    return f"note: an epoch of {epoch_s:.2g} s needs no tuning; any options will do, 0 workers too"


def note_order(vitals: Vitals) -> str | None:
    """What to say where the page cache holds the data beside a few batches."""
    if vitals.nbytes + vitals.loader_nbytes(1, 1) > vitals.available_nbytes:
        return None
    return (
        f"note: memory can hold these {vitals.nbytes / 1e9:.2f} GB: from the second epoch on, order='uniform' mixes "
        "them perfectly, at such a rate, too, and holds a few batches only"
    )


def note_start(checked: Measured, expected: float) -> str | None:
    """What to say where the loader was clearly slower than `expected` GB/s."""
    if checked.gb_per_s >= _AS_PREDICTED * expected:
        return None
    then = checked.gb_per_s_then
    start = (
        f"note: {checked.start_s:.2g} of {checked.seconds:.2g} s went by until the first batch came, as workers start "
        "and the buffer fills"
    )
    if then == 0:
        return f"{start}; there was no other batch"
    if then >= _AS_PREDICTED * expected:
        # Where the buffer holds nearly all, the rest comes from memory.
        rest = f"; from then on it was {then / expected:.2f} of it" if then < 2 * expected else ""
        return f"{start}, which the prediction leaves out{rest}"
    return (
        f"{start}; from then on, too, it was {then / expected:.2f} of what was predicted: the epoch is too short for "
        "the buffer to stay full, or the machine has other things to do"
    )


def interpolate(grid: Grid, n_threads: int, nbytes: float) -> float:
    """Rate for a size of block between those that were measured, with at most so many threads.

    Blocks smaller than any that was measured are taken to come as many in a second.
    """
    threads = max((t for t, _ in grid if t <= n_threads), default=min(t for t, _ in grid))
    sizes, rates = zip(*sorted((size, rate) for (t, size), rate in grid.items() if t == threads), strict=True)
    if nbytes < sizes[0]:
        return float(rates[0] * nbytes / sizes[0])
    return float(np.interp(math.log(nbytes), np.log(sizes), rates))


def recommend(vitals: Vitals, n_workers: int | None = None) -> Recommended:
    """Choose options; without `n_workers` the number of workers, too, for which the loader must have been tried."""
    why: dict[str, str] = {}
    buffer_size, why["buffer_size"] = _choose_buffer(vitals, max(vitals.copying) if n_workers is None else n_workers)
    if n_workers is None:
        n_workers, why["num_workers"] = _choose_workers(vitals, buffer_size)
    block_size, why["block_size"] = _choose_block(vitals, n_workers, buffer_size)
    n_readers = max(1, n_workers)
    readers = f"{n_readers} reading process{'' if n_readers == 1 else 'es'}"
    nbytes = vitals.predict(n_workers, buffer_size, block_size).read_nbytes
    n_total, rate = _fewest_threads(vitals, nbytes)
    n_threads = max(math.ceil(n_total / n_readers), math.ceil(vitals.cores / n_readers))
    why["n_lanes"] = f"a multiple of {readers}, so that each serves whole lanes"
    why["n_threads"] = (
        f"in each of {readers}; {n_total} in all read blocks of {_kb(nbytes)} cold at {rate:.2f} GB/s, where more gain "
        f"less than {1 / _NEARLY - 1:.0%}, and {vitals.cores:g} keep all cores busy"
    )
    forecast = None
    if vitals.copying:
        disk = interpolate(vitals.cold, n_threads * n_readers, nbytes)
        forecast = _forecast(vitals, n_workers, buffer_size, disk)
    return Recommended(n_workers, n_threads, math.lcm(_N_LANES, n_readers), block_size, buffer_size, why, forecast)


def _kb(nbytes: float) -> str:
    return f"{nbytes / 1024:.0f} KB"


def _choose_buffer(vitals: Vitals, n_workers: int) -> tuple[int, str]:
    wished, room = vitals.cfg.buffer_size, vitals.available_nbytes * _SHARE_FOR_LOADER
    size = wished
    while size > 1 and vitals.loader_nbytes(n_workers, size) > room:
        # Whole lanes, as long as there are batches enough for each.
        size = size - 1 if size <= _N_LANES else (size - 1) // _N_LANES * _N_LANES
    whole = vitals.loader_nbytes(n_workers, size) / 1e9
    why = (
        f"{size} batches of {vitals.batch_nbytes / 1e6:.0f} MB; with all that belongs to it up to {whole:.2f} GB of "
        f"{vitals.available_nbytes / 1e9:.1f} GB available"
    )
    return size, why if size == wished else f"{why}; {wished} would take more than half of it"


def _choose_workers(vitals: Vitals, buffer_size: int) -> tuple[int, str]:
    tried = sorted(vitals.copying.items())
    most, wanted = max(vitals.copying), max(vitals.copying.values())
    disk, reach = max(vitals.cold.values()), "nearly the best"
    if disk < wanted and not vitals.fits(most, buffer_size):
        wanted, reach = disk, f"nearly what the disk gives, {disk:.2f}, from which each epoch must come"
    enough = [w for w, rate in tried if rate >= _NEARLY * wanted] or [most]
    rates = ", ".join(f"{w}: {rate:.2f}" for w, rate in tried)
    why = f"tried warm, GB/s by workers, {rates}; the fewest that reach {reach}"
    if enough[0] == 0 and len(enough) > 1 and vitals.cores > 1:
        # So that the training loop has an interpreter to itself.
        return enough[1], f"{why}, but 0, which would share its interpreter with the training loop"
    return enough[0], why


def _fewest_threads(vitals: Vitals, nbytes: float) -> tuple[int, float]:
    """The fewest threads that read blocks of a size at nearly the best rate, and their rate."""
    rates = {t: interpolate(vitals.cold, t, nbytes) for t in sorted({t for t, _ in vitals.cold})}
    best = max(rates.values())
    return next((t, rate) for t, rate in rates.items() if rate >= _NEARLY * best)


def _choose_block(vitals: Vitals, n_workers: int, buffer_size: int) -> tuple[int | None, str]:
    default = vitals.predict(n_workers, buffer_size)
    _, rate = _fewest_threads(vitals, default.read_nbytes)
    best, copying = max(vitals.cold.values()), vitals.copying.get(n_workers, math.inf)
    enough = _FAST_ENOUGH * min(best, copying)
    read = f"{_kb(default.read_nbytes)}, {rate:.2f} GB/s cold"
    here = f"the default, {default.cfg.block_size} samples, makes reads of {read}"
    if vitals.fits(n_workers, buffer_size):
        return None, f"{here}, and after the first epoch the data are in the page cache"
    if rate >= enough:
        return None, f"{here}; the disk gives at most {best:.2f}, and the loader copies {copying:.2f}"
    found = default
    while rate < enough:
        larger = vitals.predict(n_workers, buffer_size, 2 * (found.cfg.block_size or 1))
        if larger.read_nbytes <= found.read_nbytes or larger.quality < _MIXING_KEPT * default.quality:
            break
        found = larger
        _, rate = _fewest_threads(vitals, found.read_nbytes)
    if found is default:
        return None, f"{here}; the disk gives up to {best:.2f}, but larger blocks would mix too badly"
    return found.cfg.block_size, (
        f"{here}; this one {_kb(found.read_nbytes)}, {rate:.2f} GB/s, at the price of mixing: "
        f"{found.distinct_examples:,.0f} distinct examples in a batch, not {default.distinct_examples:,.0f}"
    )


def _forecast(vitals: Vitals, n_workers: int, buffer_size: int, disk: float) -> Forecast:
    copying, gigabytes = vitals.copying[n_workers], vitals.nbytes / 1e9
    is_disk, fits = disk < copying, vitals.fits(n_workers, buffer_size)
    first_s = gigabytes / min(disk, copying)
    later_s = gigabytes / copying if fits else first_s
    first_bound, later_bound = "disk" if is_disk else "copying", "memory" if is_disk and not fits else "copying"
    return Forecast(disk, copying, first_s, later_s, first_bound, later_bound)
