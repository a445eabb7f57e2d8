"""`python -m saev_torch bench --doctor`: what this machine and this disk can do, and which options suit them.

Every prediction follows from figures that were measured a moment before. Both are shown, and the loader is then run
with the recommended options to see whether the prediction holds.
"""

import dataclasses
import random
from typing import Any

from saev_torch.bench.advice import (
    Forecast,
    Grid,
    Recommended,
    Vitals,
    note_few,
    note_order,
    note_short,
    note_start,
    recommend,
)
from saev_torch.bench.data import BenchData
from saev_torch.bench.machine import NOT_COLD, Machine, cached_share, drop_cache, look
from saev_torch.bench.measuring import Measured, measure_cold, measure_warm
from saev_torch.bench.raw import WINDOW_NBYTES, gather_rate, grid_pieces, layer_pieces, read_rate, staged_rate
from saev_torch.bench.sides import Side, make_side
from saev_torch.config import ShuffledConfig
from saev_torch.format.files import counted
from saev_torch.reading.slots import can_share
from saev_torch.writing.progress import Progress

BLOCKS_NBYTES = (12 << 10, 48 << 10, 192 << 10, 768 << 10, 4 << 20)
THREADS = (1, 2, 4, 8, 16)
_WORKERS = (0, 1, 2, 4, 8)
_WARM_NBYTES = 1 << 28
_MANY_FILES = 1024


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the doctor found, with rates in GB/s.

    `warm` is of blocks in the page cache; `read` and `gather` are of one thread, warm, that reads the files in order or
    gathers rows. `cached_before` is the share of the shards that was in the page cache at first, `cached_after` what
    stayed there when it was dropped; `checked` the loader with the recommended options, over an epoch, cold.
    """

    machine: Machine
    vitals: Vitals
    warm: Grid
    read: float
    gather: float
    cached_before: float
    cached_after: float
    recommended: Recommended
    checked: Measured

    @property
    def limit(self) -> float:
        """GB/s of all cores, if they did nothing but read each byte from the page cache once, and gather it once."""
        return self.machine.cores / (1 / self.read + 1 / self.gather)

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        vitals = self.vitals

        def rows(grid: Grid) -> list[dict[str, float]]:
            return [{"n_threads": t, "block_nbytes": nbytes, "gb_per_s": rate} for (t, nbytes), rate in grid.items()]

        return {
            "machine": dataclasses.asdict(self.machine),
            "data": {"nbytes": vitals.nbytes, "batch_size": vitals.cfg.batch_size, "cached_share": self.cached_before},
            "cold": rows(vitals.cold),
            "warm": rows(self.warm),
            "read": self.read,
            "gather": self.gather,
            "limit": self.limit,
            "copying": {str(n_workers): rate for n_workers, rate in vitals.copying.items()},
            "recommended": dataclasses.asdict(self.recommended),
            "checked": self.checked.gb_per_s,
            "is_cut": self.checked.is_cut,
        }


def examine(data: BenchData, cfg: ShuffledConfig, quick: bool) -> Findings:
    """Measure what `cfg` reads of `data`, if `quick` so shortly that the figures mean little, and draw conclusions."""
    seconds, trial_s, check_s = (0.02, 0.05, 1.0) if quick else (0.4, 1.5, 15.0)
    machine, store = look(), data.store
    cached_before = cached_share(store)
    drop_cache([store])
    cached_after = cached_share(store)
    workers = [w for w in _WORKERS if w <= max(1, machine.cores)]
    with Progress(2 * len(BLOCKS_NBYTES) * len(THREADS) + len(workers) + 2, "doctor", "steps") as progress:
        cold = _measure_grid(data, seconds, False, progress)
        progress.begin("reading and gathering, warm")
        pieces = layer_pieces(store, data.layer)
        read_rate(store, pieces, repeat=False)
        read = read_rate(store, pieces, seconds=seconds).gb_per_s
        window_nbytes = WINDOW_NBYTES // (50 if quick else 1)
        gather = gather_rate(store.metadata.d_model, cfg.batch_size, window_nbytes, seconds).gb_per_s
        progress.update(1)
        warm = _measure_grid(data, seconds, True, progress)
        vitals = Vitals(machine.cores, machine.available_nbytes, store.metadata, cfg, cold)
        copying = {}
        for n_workers in workers:
            progress.begin(f"the loader, warm, {counted(n_workers, 'worker')}")
            trial = _side(cfg, recommend(vitals, n_workers), data)
            copying[n_workers] = measure_warm(trial, trial_s, touch=False).gb_per_s
            progress.update(1)
        vitals = dataclasses.replace(vitals, copying=copying)
        recommended = recommend(vitals)
        progress.begin("the loader, cold")
        drop_cache([store])
        checked = measure_cold(_side(cfg, recommended, data), check_s, touch=False)
        progress.update(1)
    return Findings(machine, vitals, warm, read, gather, cached_before, cached_after, recommended, checked)


def _measure_grid(data: BenchData, seconds: float, is_warm: bool, progress: Progress) -> dict[tuple[int, int], float]:
    """Read blocks in random order, as the shuffle does, for each size and number of threads."""
    rates, store = {}, data.store
    for nbytes in BLOCKS_NBYTES:
        pieces = grid_pieces(store, nbytes)
        random.Random(0).shuffle(pieces)
        if is_warm:
            pieces = pieces[: max(1, _WARM_NBYTES // nbytes)]
            read_rate(store, pieces, repeat=False)
        for n_threads in THREADS:
            threads = counted(n_threads, "thread")
            progress.begin(f"{'warm' if is_warm else 'cold'}, {threads}, blocks of {nbytes >> 10} KB")
            if not is_warm:
                drop_cache([store])
            how: dict[str, Any] = {"n_threads": n_threads, "seconds": seconds}
            found = None if is_warm else staged_rate(store, pieces, **how)
            found = found or read_rate(store, pieces, repeat=is_warm, reads_ahead=False, **how)
            rates[n_threads, nbytes] = found.gb_per_s
            progress.update(1)
    return rates


def _side(cfg: ShuffledConfig, chosen: Recommended, data: BenchData) -> Side:
    """The loader with recommended options."""
    return make_side("recommended", chosen.config(cfg), chosen.num_workers, data)


def describe(findings: Findings) -> str:
    """Write the findings for a person."""
    parts = (_machine(findings), _rates(findings), _advice(findings), _paste(findings))
    return "\n\n".join("\n".join(part) for part in parts)


def _machine(findings: Findings) -> list[str]:
    machine, vitals = findings.machine, findings.vitals
    limit = "no limit" if machine.memory_limit_nbytes is None else f"limit {machine.memory_limit_nbytes / 1e9:.1f} GB"
    quota = "no quota" if machine.cpu_quota is None else f"quota of {machine.cpu_quota:g}"
    shm = f"/dev/shm: {machine.shm_nbytes / 1e9:.2f} GB"
    if can_share():
        shm += ", not needed: workers hand batches over in memory of their own"
    else:
        shm += f", needed: batches go through it, {vitals.batch_nbytes / 1e6:.0f} MB each, 2 or more for each worker"
    files = f"file descriptors: {machine.n_files:,}"
    if machine.n_files < _MANY_FILES:
        files += "; raise it (ulimit -n) where other loaders or many workers run beside"
    return [
        f"machine: {machine.system}",
        f"cores: {machine.n_affinity} by affinity, {quota}",
        f"memory: {machine.memory_nbytes / 1e9:.1f} GB, {machine.available_nbytes / 1e9:.1f} GB available, {limit} "
        "of the control group",
        shm,
        files,
        f"data: {vitals.nbytes / 1e9:.2f} GB in content tokens of {vitals.metadata.d_model} {vitals.metadata.dtype}; "
        f"{findings.cached_before:.0%} of the shards' pages were in the page cache",
    ]


def _rates(findings: Findings) -> list[str]:
    lines = ["measured, in GB/s: reading blocks in random order, by threads"]
    for title, grid in (("cold", findings.vitals.cold), ("warm", findings.warm)):
        lines.append(f"{title:>10} " + "".join(f"{n:>8}" for n in THREADS))
        for nbytes in BLOCKS_NBYTES:
            rates = "".join(f"{grid[n, nbytes]:8.2f}" for n in THREADS)
            lines.append(f"{nbytes >> 10:>7} KB {rates}")
    if findings.cached_after > NOT_COLD:
        stayed = f"{findings.cached_after:.0%} of the pages stayed in the page cache when it was dropped"
        lines.append(f"note: {stayed}, so cold is not quite cold")
    lines.append(
        f"one thread, warm: read {findings.read:.2f}, gather {findings.gather:.2f}; so at most {findings.limit:.2f} "
        f"with {findings.machine.cores:g} cores that read and gather each byte once"
    )
    tried = ", ".join(f"{rate:.2f} with {w}" for w, rate in findings.vitals.copying.items())
    return [*lines, f"the loader, warm, by workers: {tried}"]


def _advice(findings: Findings) -> list[str]:
    chosen = findings.recommended
    options = ("num_workers", "n_threads", "n_lanes", "block_size", "buffer_size")
    lines = ["recommended", *(f"  {one} = {getattr(chosen, one)}: {chosen.reasons[one]}" for one in options)]
    if chosen.forecast is not None:
        lines += ["", *_forecast(findings, chosen.forecast)]
    return lines


def _forecast(findings: Findings, forecast: Forecast) -> list[str]:
    gigabytes, checked = findings.vitals.nbytes / 1e9, findings.checked.gb_per_s
    expected = min(forecast.disk, forecast.copying)
    first = (
        f"predicted, first epoch: {forecast.first_s:.3g} s, bound by {forecast.first_bound}: {gigabytes:.2f} GB at "
        f"the lower of disk {forecast.disk:.2f} and copying {forecast.copying:.2f} GB/s, both as measured above"
    )
    why = {
        "copying": f"bound by copying: {forecast.copying:.2f} GB/s as measured, ",
        "memory": "bound by memory: the data do not fit into the page cache, so they come from the disk again, ",
    }[forecast.later_bound]
    fits = forecast.later_bound == "copying" and forecast.later_s != forecast.first_s
    why += "all in the page cache" if fits else "as in the first"
    cut = ", stopped early" if findings.checked.is_cut else ""
    notes = [
        note_few(findings.vitals.n_batches, findings.vitals.cfg.buffer_size),
        note_short(forecast.later_s),
        note_start(findings.checked, expected),
        note_order(findings.vitals),
    ]
    return [
        first,
        f"predicted, later epochs: {forecast.later_s:.3g} s, {why}",
        f"checked: the loader with these options, cold, start of workers included{cut}: {checked:.2f} GB/s, "
        f"{gigabytes / checked:.3g} s for an epoch, {checked / expected:.2f} of what was predicted",
        *filter(None, notes),
    ]


def _paste(findings: Findings) -> list[str]:
    """The recommended options as code."""
    cfg = findings.recommended.config(findings.vitals.cfg)
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default}
    fields = {name: str(value) if name == "shards" else value for name, value in fields.items() if value != []}
    return [
        "to paste",
        f"  cfg = ShuffledConfig({', '.join(f'{name}={value!r}' for name, value in fields.items())})",
        f"  loader = ShuffledDataLoader(cfg, num_workers={findings.recommended.num_workers})",
    ]
