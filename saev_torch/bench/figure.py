"""The charts of `compare`, samples per second of each loader, and of `bench`, its epochs. Need matplotlib."""

from typing import Any

from matplotlib.figure import Figure

from saev_torch.bench.epochs import COLUMNS, EpochTable
from saev_torch.tools.style import BLUE, COLOURS, FAINT, INK, MUTED, ORANGE, in_style, make_figure

_BAR = 0.38


def draw_comparison(report: dict[str, Any]) -> Figure:
    """Draw the figures of a run: two bars for each side, the fastest at the top, and the reference as a line."""
    sides, data = report["sides"], report["data"]
    shown = sorted(sides.values(), key=lambda side: side["warm"]["median"])
    gigabytes, cores = data["nbytes"] / 1e9, report["machine"]["cores"]
    title = "Thousand samples per second, shuffled, into a training loop"
    subtitle = (
        f"{gigabytes:.1f} GB of {data['d_model']} float32, batches of {data['batch_size']:,}, {cores:g} cores; "
        f"medians of {report['rounds']} interleaved rounds"
    )
    with in_style():
        figure = make_figure((9.2, 1.3 + 0.62 * len(shown)), title, subtitle)
        axes = figure.add_subplot()
        for kind, colour, shift in (("warm", BLUE, 0.2), ("cold", ORANGE, -0.2)):
            values = [side[kind]["median"] / 1e3 for side in shown]
            label = "in the page cache" if kind == "warm" else "from an empty page cache, whole epoch"
            where = [i + shift for i in range(len(shown))]
            axes.barh(where, values, height=_BAR, color=colour, label=label)
            for y, value in zip(where, values, strict=True):
                axes.text(value, y, f" {value:,.0f}", va="center", fontsize=9, color=INK)
        axes.set_yticks(range(len(shown)), [side["label"] for side in shown], color=INK)
        for name, side in zip(axes.get_yticklabels(), shown, strict=True):
            name.set_fontweight("bold" if side["label"].startswith("saev_torch") else "normal")
        right = 1.34 * max(side["warm"]["median"] for side in shown) / 1e3
        for i, side in enumerate(shown):
            text = f"{side['distinct_examples']:,} examples"
            axes.text(right, i, text, ha="right", va="center", fontsize=9, color=MUTED)
        axes.text(right, len(shown) - 0.45, "mixed into a batch:", ha="right", va="bottom", fontsize=9, color=MUTED)
        reference = report["reference"] / 1e3
        axes.axvline(reference, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        axes.text(reference, -0.52, f" saev: {reference:.0f}", ha="left", va="top", fontsize=9, color=INK)
        axes.set(xlim=(0, right), ylim=(-0.8, len(shown) - 0.4))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=FAINT)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.09), ncols=2, fontsize=9, borderaxespad=0)
    return figure


def draw_epochs(table: EpochTable) -> Figure:
    """Draw the rates of each side, a bar for each column, and the two limits as lines."""
    names, height = list(table.sides), 0.8 / len(COLUMNS)
    best, disk = table.disk
    limits = {f"one pass {table.one_pass:.1f}": table.one_pass, f"disk, {best} {disk:.1f}": disk}
    title, subtitle = "Whole epochs and the steady state", "shuffled, GB/s of activations, by number of workers"
    with in_style():
        figure = make_figure((9.2, 1.6 + 0.9 * len(names)), title, subtitle)
        axes = figure.add_subplot()
        for i, (key, label) in enumerate(COLUMNS.items()):
            where = {y - 0.4 + (i + 0.5) * height: table.sides[name].get(key) for y, name in enumerate(names)}
            shown = {y: found.median for y, found in where.items() if found is not None}
            if shown:
                axes.barh(list(shown), list(shown.values()), height=height * 0.9, color=COLOURS[i], label=label)
            for y, value in shown.items():
                axes.text(value, y, f" {value:.2f}", va="center", fontsize=8.5, color=INK)
        right = 1.1 * max(*limits.values(), *(one.median for side in table.sides.values() for one in side.values()))
        for label, rate in limits.items():
            axes.axvline(rate, color=INK, linewidth=1, linestyle=(0, (4, 2)))
            side = "left" if rate < right / 2 else "right"
            axes.text(rate, -0.55, f" {label} ", ha=side, va="bottom", fontsize=8.5, color=INK)
        axes.set(xlim=(0, right), ylim=(len(names) - 0.4, -0.8))
        axes.set_yticks(range(len(names)), names, color=INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=FAINT)
        axes.spines["left"].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(COLUMNS), fontsize=9, borderaxespad=0)
    return figure
