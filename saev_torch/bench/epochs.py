"""Speed as users meet it: whole epochs beside the steady state, the first epoch apart, and what the machine can do.

A whole epoch is from `iter()` to the last batch. The first is that of a new process: workers start, and all memory is
fresh. The steady state is the middle of a later epoch, between the first buffer and the last, so it takes data of three
buffers. Two limits stand beside them. The one pass: two threads that do nothing but `preadv` from the page cache, into
memory of the buffer's size that has been touched before. The disk: the best of some threads that read 8 MB at a time,
through the page cache and past it, after the pages were dropped.
"""

import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from saev_torch.bench.data import BenchData
from saev_torch.bench.machine import NOT_COLD, cached_share, drop_cache
from saev_torch.bench.measuring import Measured
from saev_torch.bench.raw import direct_rate, layer_pieces, read_rate
from saev_torch.bench.rounds import Spread, run_rounds
from saev_torch.bench.sides import Loader, make_loader
from saev_torch.config import ShuffledConfig
from saev_torch.iterable.activations import ShuffledActivations

COLUMNS = {
    "first_cold": "first, from disk",
    "first": "first, in memory",
    "later": "later epochs",
    "steady": "steady state",
}
"""What is measured of a side, in GB/s, and how it is called: `first` and what follows reads from the page cache."""

_ONE_PASS, _N_ONE_PASS_THREADS = "one pass", 2
_DISK_THREADS, _DISK_NBYTES = (1, 4, 16), 8 << 20
_N_LATER = 2
_N_BUFFERS = 3
_MAX_ROUNDS = 3

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Rates of the epochs of one process, in GB/s; `steady` of all later ones that are long enough."""

    first: float
    later: tuple[float, ...]
    steady: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class EpochTable:
    """The rates of sides over rounds, by column, and the limits by name, all in GB/s; `notes` say what is amiss."""

    sides: Mapping[str, Mapping[str, Spread]]
    limits: Mapping[str, Spread]
    notes: tuple[str, ...]

    @property
    def one_pass(self) -> float:
        """What two threads read into memory that was touched."""
        return self.limits[_ONE_PASS].median

    @property
    def disk(self) -> tuple[str, float]:
        """The best way to read the disk, and its rate."""
        best = max((name for name in self.limits if name != _ONE_PASS), key=lambda name: self.limits[name].median)
        return best, self.limits[best].median

    def limit(self, column: str) -> float:
        """What a column is held against."""
        return self.disk[1] if column == "first_cold" else self.one_pass

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        sides = {name: {key: one.to_json() for key, one in columns.items()} for name, columns in self.sides.items()}
        return {
            "sides": sides,
            "limits": {name: one.to_json() for name, one in self.limits.items()},
            "notes": self.notes,
        }

    def __str__(self) -> str:
        """Medians in GB/s, each with its share of the limit."""
        first = max(map(len, [*self.sides, "limit"]))
        limits = {key: f"{self.limit(key):.2f}" for key in COLUMNS}
        rows = [("", COLUMNS), *((name, self._cells(name)) for name in self.sides), ("limit", limits)]
        lines = [f"{name:<{first}}" + "".join(f"  {cells[key]:>16}" for key in COLUMNS) for name, cells in rows]
        disk = ", ".join(f"{name} {one.median:.2f}" for name, one in self.limits.items() if name != _ONE_PASS)
        lines += [
            f"limit in memory: {_ONE_PASS}, {_N_ONE_PASS_THREADS} threads, into touched memory of the buffer's size"
        ]
        lines += [f"limit from disk: the best of {disk}", *self.notes]
        return "\n".join(lines)

    def _cells(self, name: str) -> dict[str, str]:
        found = self.sides[name]
        medians = {key: found[key].median for key in found}
        shares = {key: f"{rate:.2f} ({rate / self.limit(key):.2f})" for key, rate in medians.items()}
        return {key: shares.get(key, "-") for key in COLUMNS}


def note_short_data(n_batches: int, buffer_size: int) -> str | None:
    """What to say where an epoch has no middle."""
    if n_batches >= _N_BUFFERS * buffer_size:
        return None
    return (
        f"note: {n_batches} batches are less than {_N_BUFFERS} buffers of {buffer_size}: they have no steady state, "
        "and their epochs are mostly start and end; take more data, or a smaller --buffer-size"
    )


def measure_epochs(cfg: ShuffledConfig, n_workers: int, n_later: int) -> Epochs:
    """Measure the first epoch of a new process, and so many later ones."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, cfg, n_workers, n_later).result()


def _measure(cfg: ShuffledConfig, n_workers: int, n_later: int) -> Epochs:
    dataset = ShuffledActivations(cfg)
    loader, row_nbytes = make_loader(dataset, n_workers), dataset.metadata.row_nbytes
    marks = (0, dataset.n_batches)
    if note_short_data(dataset.n_batches, cfg.buffer_size) is None:
        marks = cfg.buffer_size, dataset.n_batches - cfg.buffer_size
    timed = [_time(loader, marks, row_nbytes) for _ in range(1 + n_later)]
    is_long = marks[0] > 0
    return Epochs(timed[0][0], tuple(t[0] for t in timed[1:]), tuple(t[1] for t in timed[1:] if is_long))


def _time(loader: Loader, marks: tuple[int, int], row_nbytes: int) -> tuple[float, float]:
    """GB/s of an epoch, and of the batches between two marks of it."""
    at, n_samples = {0: (time.perf_counter(), 0)}, 0
    for number, batch in enumerate(loader, 1):
        n_samples += len(batch["act"])
        if number in marks:
            at[number] = time.perf_counter(), n_samples
    at[-1] = time.perf_counter(), n_samples
    (began, _), (start, n_start), (stop, n_stop), (end, _) = (at[key] for key in (0, *marks, -1))
    return n_samples * row_nbytes / (end - began) / 1e9, (n_stop - n_start) * row_nbytes / (stop - start) / 1e9


def run_epochs(n_rounds: int, data: BenchData, cfg: ShuffledConfig, workers: Sequence[int]) -> EpochTable:
    """Measure whole epochs of the shuffled data set, and the limits; all in each round, no more than three."""
    n_rounds = min(n_rounds, _MAX_ROUNDS)
    buffer_nbytes = cfg.buffer_size * cfg.batch_size * data.sample_nbytes
    one_pass = functools.partial(
        read_rate, data.store, layer_pieces(data.store, data.layer), n_threads=_N_ONE_PASS_THREADS, repeat=False,
        memory_nbytes=min(data.nbytes, buffer_nbytes),
    )  # fmt: skip
    warm: dict[str, Callable[[], Epochs]] = {
        f"shuffled-{w}": functools.partial(measure_epochs, cfg, w, _N_LATER) for w in workers
    }
    left: list[float] = []
    cold = {name: functools.partial(_dropped, data, left, functools.partial(measure_epochs, cfg, w, 0))
            for name, w in zip(warm, workers, strict=True)}  # fmt: skip
    in_memory = run_rounds("epochs in memory", n_rounds, warm)
    limits = {name: [one.gb_per_s for one in found] for name, found in
              run_rounds("limit in memory", n_rounds, {_ONE_PASS: one_pass}).items()}  # fmt: skip
    from_disk = run_rounds("epochs from disk", n_rounds, cold)
    raw = run_rounds("limits from disk", n_rounds, _disk_limits(data, left))
    # Some file systems refuse to be read past the page cache.
    limits |= {name: [one.gb_per_s for one in found if one] for name, found in raw.items() if all(found)}
    sides = {}
    for name, found in in_memory.items():
        columns = {"first_cold": [one.first for one in from_disk[name]], "first": [one.first for one in found]}
        columns["later"] = [rate for one in found for rate in one.later]
        columns["steady"] = [rate for one in found for rate in one.steady]
        sides[name] = {key: Spread(tuple(rates)) for key, rates in columns.items() if rates}
    n_batches = -(-data.n_samples // cfg.batch_size)
    spreads = {name: Spread(tuple(rates)) for name, rates in limits.items()}
    stayed = f"note: up to {max(left):.0%} of the pages stayed in the page cache, so the disk was not all there was"
    notes = note_short_data(n_batches, cfg.buffer_size), stayed if max(left) > NOT_COLD else None
    return EpochTable(sides, spreads, tuple(filter(None, notes)))


def _disk_limits(data: BenchData, left: list[float]) -> dict[str, Callable[[], Measured | None]]:
    """What only reads the disk, each after the pages were dropped."""
    pieces = layer_pieces(data.store, data.layer, _DISK_NBYTES)
    through = functools.partial(read_rate, data.store, pieces, repeat=False)
    past = functools.partial(direct_rate, data.store, pieces)
    ways: dict[str, Callable[..., Measured | None]] = {"cached": through, "direct": past}
    return {
        f"{way}-{n}": functools.partial(_dropped, data, left, functools.partial(read, n_threads=n))
        for way, read in ways.items()
        for n in _DISK_THREADS
    }


def _dropped(data: BenchData, left: list[float], measure: Callable[[], _T]) -> _T:
    """Measure without the page cache, and note the share of pages that stayed in it."""
    drop_cache([data.store])
    left.append(cached_share(data.store))
    return measure()
