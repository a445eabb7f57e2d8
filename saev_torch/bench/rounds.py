"""Runs the sides in rounds: every side once in each, in another order than the round before."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from saev_torch.bench.data import BenchData
from saev_torch.bench.machine import cached_share, drop_cache
from saev_torch.bench.memory import MemoryUse, measure_memory
from saev_torch.bench.raw import WINDOW_NBYTES, gather_rate, layer_pieces, read_rate
from saev_torch.bench.report import Comparison, compare_cold, compare_warm
from saev_torch.bench.sides import Side
from saev_torch.bench.timing import Measured, measure_cold, measure_statistics, measure_warm
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.writing.progress import Progress

_COLD_THREADS = (1, 4, 16)

_T = TypeVar("_T")
_Measures = dict[str, Callable[[], Measured]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how often to measure.

    Attributes:
        seconds: Least time of a warm side in a round.
        cold_limit_s: Most time of a cold side in a round, and of statistics.
        touch: Add up the activations of each batch.
        window_nbytes: What `gather` takes rows from.
        memory_workers: Numbers of workers to look at the memory with.
    """

    n_rounds: int
    seconds: float
    cold_limit_s: float
    touch: bool
    window_nbytes: int = WINDOW_NBYTES
    memory_workers: tuple[int, ...] = (0, 1, 4)
    statistics: bool = True


def run_rounds(title: str, n_rounds: int, sides: Mapping[str, Callable[[], _T]]) -> dict[str, list[_T]]:
    """Run every side once in each round, and begin each round with another one."""
    names = list(sides)
    results: dict[str, list[_T]] = {name: [] for name in names}
    with Progress(n_rounds * len(names), title, "runs") as progress:
        for i in range(n_rounds):
            shift = i * len(names) // n_rounds
            for name in names[shift:] + names[:shift]:
                progress.begin(f"{title}: {name}")
                results[name].append(sides[name]())
                progress.update(1)
    return results


def warm_up(data: BenchData, layers_data: BenchData | None) -> None:
    """Bring what will be read into the page cache, and nothing else."""
    if layers_data is not None:
        # The layers that are not read would only be in the way.
        drop_cache([layers_data.store])
        read_rate(layers_data.store, layer_pieces(layers_data.store, layers_data.layer), repeat=False)
    read_rate(data.store, layer_pieces(data.store, data.layer), repeat=False)


def _statistics(settings: Settings, data: BenchData) -> _Measures:
    cfg = OrderedConfig(shards=data.store.shards_dir, layer=data.layer)
    measure = functools.partial(measure_statistics, cfg, data.sample_nbytes, settings.cold_limit_s)
    return {"statistics": measure} if settings.statistics else {}


def run_warm(settings: Settings, cores: float, data: BenchData, batch_size: int, sides: Sequence[Side]) -> Comparison:
    """Measure all that is read from the page cache, and the limits `read` and `gather`."""
    pieces, d_model = layer_pieces(data.store, data.layer), data.store.metadata.d_model
    todo: _Measures = {
        "read": functools.partial(read_rate, data.store, pieces, seconds=settings.seconds),
        "gather": functools.partial(gather_rate, d_model, batch_size, settings.window_nbytes, settings.seconds),
    }
    todo |= {side.name: functools.partial(measure_warm, side, settings.seconds, settings.touch) for side in sides}
    todo |= _statistics(settings, data)
    return compare_warm(run_rounds("warm", settings.n_rounds, todo), cores)


def run_cold(
    settings: Settings, data: BenchData, layers_data: BenchData | None, sides: Sequence[Side]
) -> tuple[Comparison, float]:
    """Measure with an empty page cache, and raw reads by several threads.

    Returns the largest share of pages, too, that a side found in the page cache after all.
    """
    pieces, limit_s = layer_pieces(data.store, data.layer), settings.cold_limit_s
    stores = [one.store for one in (data, layers_data) if one is not None]
    left: list[float] = []

    def drop_and(measure: Callable[[], Measured]) -> Measured:
        drop_cache(stores)
        left.append(cached_share(data.store))
        return measure()

    todo: _Measures = {
        f"raw-{n}": functools.partial(read_rate, data.store, pieces, n_threads=n, seconds=limit_s, repeat=False)
        for n in _COLD_THREADS
    }
    todo |= {side.name: functools.partial(measure_cold, side, limit_s, settings.touch) for side in sides}
    todo |= _statistics(settings, data)
    dropping = {name: functools.partial(drop_and, measure) for name, measure in todo.items()}
    return compare_cold(run_rounds("cold", settings.n_rounds, dropping)), max(left)


def run_memory(settings: Settings, cfg: ShuffledConfig) -> list[MemoryUse]:
    """Measure the memory of an epoch for several numbers of workers."""
    sides = {f"{n} workers": functools.partial(measure_memory, cfg, n) for n in settings.memory_workers}
    return [use for uses in run_rounds("memory", 1, sides).values() for use in uses]
