"""Ratios between the sides of each round, and tables of their medians.

Sides are compared within a round only, where the machine was in the same mood; what is quoted is the median of these
ratios, with the lowest and the highest.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from saev_torch.bench.memory import MemoryUse
from saev_torch.bench.timing import Measured

RoundsOfSides = Mapping[str, Sequence[Measured]]
"""For each side what it did in each round."""


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


@dataclasses.dataclass(frozen=True)
class Comparison:
    """For each side, warm or cold, its figures by name: rates, and ratios `to_...`.

    The limit that they are held against, in GB/s, is warm `cores / (1/read + 1/gather)`, cold the best raw read. Those
    that are `cut` were stopped before the end of a cold epoch, or of a pass of statistics.
    """

    limit: Spread
    sides: dict[str, dict[str, Spread]]
    cut: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        sides = {name: {key: one.to_json() for key, one in figures.items()} for name, figures in self.sides.items()}
        return {"limit_gb_per_s": self.limit.to_json(), "sides": sides, "cut": list(self.cut)}


def compare_warm(rounds: RoundsOfSides, cores: float) -> Comparison:
    """Hold warm sides against the limit of `cores`; `rounds` has the sides `read` and `gather`."""
    pairs = zip(rounds["read"], rounds["gather"], strict=True)
    return _compare(rounds, Spread(tuple(cores / (1 / read.gb_per_s + 1 / gather.gb_per_s) for read, gather in pairs)))


def compare_cold(rounds: RoundsOfSides) -> Comparison:
    """Hold cold sides against the best of the sides `raw-...` in the same round."""
    return _compare(rounds, _best(rounds, "raw", "gb_per_s"))


def _best(rounds: RoundsOfSides, name: str, figure: str = "samples_per_s") -> Spread:
    """The best side of a kind, or the side of that name, in each round; no rounds where there is none.

    The best of several is a high bar for what is compared with it.
    """
    columns = [
        [getattr(one, figure) for one in measured]
        for side, measured in rounds.items()
        if name in (side, side.partition("-")[0])
    ]
    return Spread(tuple(max(row) for row in zip(*columns, strict=True)))


def _compare(rounds: RoundsOfSides, limit: Spread) -> Comparison:
    sides: dict[str, dict[str, Spread]] = {}
    for name, measured in rounds.items():
        kind, _, n_workers = name.partition("-")
        shown, others = ["gb_per_s", "samples_per_s"], {}
        if kind not in ("read", "gather", "raw"):
            shown += ["cores_busy", "cores_busy_in_kernel"]
            others = {"to_memmap": _best(rounds, "memmap"), "to_samples": _best(rounds, "samples")}
        if kind in ("labels", "layers", "scaled"):
            others["to_shuffled"] = _best(rounds, f"shuffled-{n_workers}")
        if kind == "statistics":
            others["to_ordered"] = _best(rounds, "ordered")
        figures = {key: Spread(tuple(getattr(one, key) for one in measured)) for key in shown}
        figures["to_limit"] = figures["gb_per_s"] / limit
        figures |= {key: figures["samples_per_s"] / other for key, other in others.items() if other.rounds}
        sides[name] = figures
    cut = tuple(name for name, measured in rounds.items() if any(one.is_cut for one in measured))
    return Comparison(limit, sides, cut)


_COLUMNS = (
    ("GB/s", "gb_per_s", 1.0),
    ("thousand/s", "samples_per_s", 1e-3),
    ("of limit", "to_limit", 1.0),
    ("x memmap", "to_memmap", 1.0),
    ("x samples", "to_samples", 1.0),
    ("of shuffled", "to_shuffled", 1.0),
    ("of ordered", "to_ordered", 1.0),
    ("cores", "cores_busy", 1.0),
    ("in kernel", "cores_busy_in_kernel", 1.0),
)


def format_table(title: str, limit_name: str, comparison: Comparison) -> str:
    """Write a comparison as a table: medians, and for ratios the extremes."""
    columns = [column for column in _COLUMNS if any(column[1] in f for f in comparison.sides.values())]
    rows = [["", *(head for head, _, _ in columns)]]
    for name, figures in comparison.sides.items():
        row = [name + "*" * (name in comparison.cut)]
        for _, key, scale in columns:
            figure = figures.get(key)
            if figure is None:
                row.append("-")
            else:
                row.append(str(figure) if key.startswith("to_") else _short(figure.median * scale))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [title, f"limit: {limit_name} = {comparison.limit} GB/s"]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    if comparison.cut:
        lines.append("* stopped before its end")
    return "\n".join(lines)


def format_memory(uses: Sequence[MemoryUse]) -> str:
    """Write what was measured of memory as a table, in GB."""
    lines = ["memory: sum of proportional set sizes over all processes, in GB, medians of tenths of an epoch"]
    for use in uses:
        tenths = " ".join(f"{nbytes / 1e9:.2f}" for nbytes in use.deciles_nbytes)
        lines.append(
            f"{use.n_workers} workers, buffer of {use.buffer_size} in {use.n_batches} batches: {tenths}; "
            f"peak {use.peak_nbytes / 1e9:.2f} of {use.allowed_nbytes / 1e9:.2f} allowed, "
            f"last over second tenth {use.growth:.2f}"
        )
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"
