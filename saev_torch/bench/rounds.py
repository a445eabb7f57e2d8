"""Runs the sides in rounds: every side once in each, in another order than the round before; and compares them.

Sides are compared within a round only, where the machine was in the same mood; what is quoted is the median of these
ratios, with the lowest and the highest.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from saev_torch.bench.data import BenchData
from saev_torch.bench.machine import cached_share, drop_cache
from saev_torch.bench.measuring import Measured, measure_cold, measure_statistics, measure_warm
from saev_torch.bench.raw import gather_rate, layer_pieces, read_rate
from saev_torch.bench.sides import Side
from saev_torch.config import OrderedConfig
from saev_torch.writing.progress import Progress

_COLD_THREADS = (1, 4, 16)
_RATES: dict[str, Callable[[Measured], float]] = {
    "gb_per_s": lambda one: one.gb_per_s,
    "samples_per_s": lambda one: one.n_samples / one.seconds,
    "cores_busy": lambda one: (one.user_s + one.system_s) / one.seconds,
    "cores_busy_in_kernel": lambda one: one.system_s / one.seconds,
}
_COLUMNS = {
    "gb_per_s": "GB/s",
    "samples_per_s": "thousand/s",
    "to_limit": "of limit",
    "to_memmap": "x memmap",
    "to_samples": "x samples",
    "to_shuffled": "of shuffled",
    "to_ordered": "of ordered",
    "cores_busy": "cores",
    "cores_busy_in_kernel": "in kernel",
}

_T = TypeVar("_T")
_Measure = Callable[[], Measured]
_RoundsOfSides = Mapping[str, Sequence[Measured]]
"""For each side what it did in each round."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how often to measure.

    In a round a warm side takes `seconds` at least, a cold one, and statistics, `cold_limit_s` at most. `touch` adds up
    the activations of each batch. `gather` takes rows from `window_nbytes`, and the memory is looked at with each
    number of `memory_workers`.
    """

    n_rounds: int
    seconds: float
    cold_limit_s: float
    touch: bool
    window_nbytes: int
    memory_workers: tuple[int, ...]
    statistics: bool


@dataclasses.dataclass(frozen=True)
class Spread:
    """One figure over the rounds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.rounds)

    def __truediv__(self, other: "Spread") -> "Spread":
        """The ratios, round by round."""
        return Spread(tuple(a / b for a, b in zip(self.rounds, other.rounds, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """The median, the extremes and all rounds."""
        return {"median": self.median, "min": min(self.rounds), "max": max(self.rounds), "rounds": list(self.rounds)}

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(min(self.rounds))}-{_short(max(self.rounds))})"


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """For each side, warm or cold, its figures by name: rates, and ratios `to_...`.

    The limit that they are held against, in GB/s, is warm `cores / (1/read + 1/gather)` or one pass, and cold the best
    raw read. Those that are `cut` were stopped before the end of a cold epoch, or of a pass of statistics.
    """

    limit: Spread
    sides: dict[str, dict[str, Spread]]
    cut: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        sides = {name: {key: one.to_json() for key, one in figures.items()} for name, figures in self.sides.items()}
        return {"limit_gb_per_s": self.limit.to_json(), "sides": sides, "cut": list(self.cut)}

    def to_table(self, title: str, limit_name: str) -> str:
        """Medians, and for ratios the extremes."""
        keys = [key for key in _COLUMNS if any(key in figures for figures in self.sides.values())]
        rows = [["", *(_COLUMNS[key] for key in keys)]]
        for name, figures in self.sides.items():
            rows.append([name + "*" * (name in self.cut), *(_cell(key, figures.get(key)) for key in keys)])
        first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
        lines = [title, f"limit: {limit_name} = {self.limit} GB/s", *(form.format(*row).rstrip() for row in rows)]
        return "\n".join(lines + ["* stopped before its end"] * bool(self.cut))


def _cell(key: str, figure: Spread | None) -> str:
    if figure is None:
        return "-"
    return str(figure) if key.startswith("to_") else _short(figure.median / (1e3 if key == "samples_per_s" else 1))


def compare_warm(rounds: _RoundsOfSides, cores: float) -> Comparison:
    """Hold warm sides against the limit of `cores`; `rounds` has the sides `read` and `gather`."""
    pairs = zip(rounds["read"], rounds["gather"], strict=True)
    return _compare(rounds, Spread(tuple(cores / (1 / read.gb_per_s + 1 / gather.gb_per_s) for read, gather in pairs)))


def compare_one_pass(rounds: _RoundsOfSides) -> Comparison:
    """Hold warm sides against the side `one-pass`, which copies each byte once, in the same round."""
    return _compare(rounds, Spread(tuple(one.gb_per_s for one in rounds["one-pass"])))


def compare_cold(rounds: _RoundsOfSides) -> Comparison:
    """Hold cold sides against the best of the sides `raw-...` in the same round."""
    return _compare(rounds, _best(rounds, "raw", "gb_per_s"))


def _best(rounds: _RoundsOfSides, name: str, figure: str = "samples_per_s") -> Spread:
    """The best side of a kind, which is a high bar, or the side of that name, in each round; no rounds without one."""
    columns = [map(_RATES[figure], rounds[side]) for side in rounds if name in (side, side.partition("-")[0])]
    return Spread(tuple(max(row) for row in zip(*columns, strict=True)))


def _compare(rounds: _RoundsOfSides, limit: Spread) -> Comparison:
    sides = {}
    for name, measured in rounds.items():
        kind, _, n_workers = name.partition("-")
        shown, others = ["gb_per_s", "samples_per_s"], {}
        if kind not in ("read", "gather", "raw", "one"):
            shown += ["cores_busy", "cores_busy_in_kernel"]
            others = {"to_memmap": _best(rounds, "memmap"), "to_samples": _best(rounds, "samples")}
        if kind in ("labels", "layers", "scaled"):
            others["to_shuffled"] = _best(rounds, f"shuffled-{n_workers}")
        if kind == "statistics":
            others["to_ordered"] = _best(rounds, "ordered")
        figures = {key: Spread(tuple(map(_RATES[key], measured))) for key in shown}
        figures["to_limit"] = figures["gb_per_s"] / limit
        figures |= {key: figures["samples_per_s"] / other for key, other in others.items() if other.rounds}
        sides[name] = figures
    return Comparison(limit, sides, tuple(name for name in rounds if any(one.is_cut for one in rounds[name])))


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


def _statistics(settings: Settings, data: BenchData) -> dict[str, _Measure]:
    cfg = OrderedConfig(shards=data.store.shards_dir, layer=data.layer)
    measure = functools.partial(measure_statistics, cfg, data.sample_nbytes, settings.cold_limit_s)
    return {"statistics": measure} if settings.statistics else {}


def run_warm(settings: Settings, cores: float, data: BenchData, batch_size: int, sides: Sequence[Side]) -> Comparison:
    """Measure all that is read from the page cache, and the limits `read` and `gather`."""
    pieces, d_model, seconds = layer_pieces(data.store, data.layer), data.store.metadata.d_model, settings.seconds
    todo: dict[str, _Measure] = {
        "read": functools.partial(read_rate, data.store, pieces, seconds=seconds),
        "gather": functools.partial(gather_rate, d_model, batch_size, settings.window_nbytes, seconds),
    }
    todo |= {side.name: functools.partial(measure_warm, side, seconds, settings.touch) for side in sides}
    return compare_warm(run_rounds("warm", settings.n_rounds, todo | _statistics(settings, data)), cores)


def run_cold(
    settings: Settings, data: BenchData, layers_data: BenchData | None, sides: Sequence[Side]
) -> tuple[Comparison, float]:
    """Measure with an empty page cache, and raw reads, too; and the largest share of pages that stayed in it."""
    pieces, limit_s = layer_pieces(data.store, data.layer), settings.cold_limit_s
    stores = [one.store for one in (data, layers_data) if one is not None]
    left: list[float] = []

    def drop_and(measure: _Measure) -> Measured:
        drop_cache(stores)
        left.append(cached_share(data.store))
        return measure()

    todo: dict[str, _Measure] = {
        f"raw-{n}": functools.partial(read_rate, data.store, pieces, n_threads=n, seconds=limit_s, repeat=False)
        for n in _COLD_THREADS
    }
    todo |= {side.name: functools.partial(measure_cold, side, limit_s, settings.touch) for side in sides}
    todo |= _statistics(settings, data)
    dropping = {name: functools.partial(drop_and, measure) for name, measure in todo.items()}
    return compare_cold(run_rounds("cold", settings.n_rounds, dropping)), max(left)
