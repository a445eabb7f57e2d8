"""Runs the sides in rounds: every side once in each, in another order than the round before."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from saev_torch.bench.data import BenchData
from saev_torch.bench.machine import cached_share, drop_cache
from saev_torch.bench.memory import MemoryUse, measure_memory
from saev_torch.bench.raw import Rate, gather_rate, layer_pieces, read_rate
from saev_torch.bench.report import Comparison, Spread, compare_cold, compare_warm
from saev_torch.bench.sides import Side
from saev_torch.bench.timing import Measured, first_batch_s, measure_cold, measure_statistics, measure_warm
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.writing.progress import Progress

__all__ = ["Settings", "run_cold", "run_first_batch", "run_memory", "run_rounds", "run_warm", "warm_up"]

_COLD_THREADS = (1, 4, 16)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how often to measure.

    Attributes:
        n_rounds: Rounds.
        seconds: Least time of a warm side in a round.
        cold_limit_s: Most time of a cold side in a round, and of statistics.
        touch: Add up the activations of each batch.
        window_nbytes: What `gather` takes rows from.
        memory_workers: Numbers of workers to look at the memory with.
        statistics: Measure `compute_statistics`, too.
    """

    n_rounds: int
    seconds: float
    cold_limit_s: float
    touch: bool
    window_nbytes: int = 400_000_000
    memory_workers: tuple[int, ...] = (0, 1, 4)
    statistics: bool = True


def run_rounds(title: str, n_rounds: int, sides: Mapping[str, Callable[[], Measured]]) -> dict[str, list[Measured]]:
    """Run every side once in each round, and begin each round with another one."""
    names = list(sides)
    results: dict[str, list[Measured]] = {name: [] for name in names}
    with Progress(n_rounds * len(names), title, "runs") as progress:
        for i in range(n_rounds):
            shift = i * len(names) // n_rounds
            for name in names[shift:] + names[:shift]:
                progress.begin(f"{title}: {name}")
                results[name].append(sides[name]())
                progress.update(1)
    return results


def _as_measured(rate: Rate, data: BenchData) -> Measured:
    return Measured(rate.nbytes // data.sample_nbytes, rate.nbytes, rate.seconds)


def warm_up(data: BenchData, layers_data: BenchData | None) -> None:
    """Bring what will be read into the page cache, and nothing else."""
    if layers_data is not None:
        # The layers that are not read would only be in the way.
        drop_cache([layers_data.store])
        read_rate(layers_data.store, layer_pieces(layers_data.store, layers_data.layer), repeat=False)
    read_rate(data.store, layer_pieces(data.store, data.layer), repeat=False)


def _statistics(settings: Settings, data: BenchData) -> dict[str, Callable[[], Measured]]:
    cfg = OrderedConfig(shards=data.store.shards_dir, layer=data.layer)
    limit_s = settings.cold_limit_s
    return {"statistics": lambda: measure_statistics(cfg, data.sample_nbytes, limit_s)} if settings.statistics else {}


def run_warm(settings: Settings, cores: float, data: BenchData, batch_size: int, sides: Sequence[Side]) -> Comparison:
    """Measure all that is read from the page cache, and the limits `read` and `gather`."""
    pieces, d_model = layer_pieces(data.store, data.layer), data.store.metadata.d_model

    def read() -> Measured:
        return _as_measured(read_rate(data.store, pieces, seconds=settings.seconds), data)

    def gather() -> Measured:
        return _as_measured(gather_rate(d_model, batch_size, settings.window_nbytes, settings.seconds), data)

    def run_side(side: Side) -> Callable[[], Measured]:
        return lambda: measure_warm(side, settings.seconds, settings.touch)

    todo = {"read": read, "gather": gather, **{side.name: run_side(side) for side in sides}}
    todo |= _statistics(settings, data)
    return compare_warm(run_rounds("warm", settings.n_rounds, todo), cores)


def run_cold(
    settings: Settings, data: BenchData, layers_data: BenchData | None, sides: Sequence[Side]
) -> tuple[Comparison, float]:
    """Measure with an empty page cache, and raw reads by several threads.

    Returns:
        The comparison, and the largest share of pages that a side found in the page cache after all.
    """
    pieces = layer_pieces(data.store, data.layer)
    stores = [one.store for one in (data, layers_data) if one is not None]
    left: list[float] = []

    def dropping(measure: Callable[[], Measured]) -> Callable[[], Measured]:
        def drop_and_measure() -> Measured:
            drop_cache(stores)
            left.append(cached_share(data.store))
            return measure()

        return drop_and_measure

    def raw(n_threads: int) -> Callable[[], Measured]:
        def measure() -> Measured:
            limit_s = settings.cold_limit_s
            return _as_measured(read_rate(data.store, pieces, n_threads=n_threads, seconds=limit_s, repeat=False), data)

        return dropping(measure)

    def run_side(side: Side) -> Callable[[], Measured]:
        return dropping(lambda: measure_cold(side, settings.cold_limit_s, settings.touch))

    todo = {f"raw-{n}": raw(n) for n in _COLD_THREADS} | {side.name: run_side(side) for side in sides}
    todo |= {name: dropping(measure) for name, measure in _statistics(settings, data).items()}
    return compare_cold(run_rounds("cold", settings.n_rounds, todo)), max(left)


def run_first_batch(settings: Settings, cfg: ShuffledConfig) -> Spread:
    """Measure the time to the first batch, in seconds."""
    # The first time finds nothing prepared, as in a process that has just begun.
    first_batch_s(cfg)
    return Spread(tuple(first_batch_s(cfg) for _ in range(settings.n_rounds)))


def run_memory(settings: Settings, cfg: ShuffledConfig) -> list[MemoryUse]:
    """Measure the memory of an epoch for several numbers of workers."""
    uses = []
    with Progress(len(settings.memory_workers), "memory", "runs") as progress:
        for n_workers in settings.memory_workers:
            progress.begin(f"memory: {n_workers} workers")
            uses.append(measure_memory(cfg, n_workers))
            progress.update(1)
    return uses
