"""The figures of `inspect` and `plan`. Needs matplotlib, of the `demo` and the `plot` extra."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure

from saev_torch.format.files import counted
from saev_torch.format.metadata import Metadata
from saev_torch.order.mixing import Mixture
from saev_torch.order.predict import Prediction
from saev_torch.tools.style import BLUE, COLOURS, INK, MUTED, in_style, make_figure, mark_values

_MAX_COLUMNS = 400
_WIDE = 20
_MIB, _GIB = 2**20, 2**30


def draw_overview(
    md: Metadata, norms_by_layer: dict[int, npt.NDArray[np.float32]], counts: npt.NDArray[np.int64] | None
) -> Figure:
    """Draw the norms of each layer and the counts of the labels, None where there are none."""
    nbytes = md.n_examples * md.example_nbytes
    subtitle = f"{md.n_examples:,} examples of {md.tokens_per_example} tokens, {nbytes / 1e6:,.1f} MB of {md.dtype}"
    with in_style():
        figure = make_figure((9, 4), f"{md.family} {md.ckpt}", subtitle)
        norms, labels = figure.subplots(1, 2)
        top = max(float(of_layer.max()) for of_layer in norms_by_layer.values())
        bins = np.linspace(0, top or 1.0, 40).tolist()
        for i, (layer, of_layer) in enumerate(norms_by_layer.items()):
            norms.hist(of_layer, bins=bins, histtype="step", linewidth=1.6, label=f"{layer}", color=_colour(i))
        norms.set(xlabel="L2 norm", ylabel="sampled content tokens", title="Norms by layer", xlim=(0, None))
        norms.legend(title="layer")
        labels.set_title("Labels")
        if counts is None:
            labels.text(0.5, 0.5, "none", ha="center", va="center", transform=labels.transAxes, color=MUTED)
            labels.set_axis_off()
        else:
            there = np.flatnonzero(counts)
            labels.bar(there, counts[there], color=BLUE)
            labels.set(xlabel="label", ylabel="content tokens")
            if counts.max() > _WIDE * counts[there].min():
                labels.set_yscale("log")
                top = math.ceil(math.log10(counts.max()))
                mark_values(labels, "y", [10.0**i for i in range(top + 1)])
                labels.set_ylim(0.7, None)
            labels.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_mixtures(mixtures: Sequence[Mixture]) -> Figure:
    """Draw which classes the batches of an epoch hold, one panel for each of `class_mixtures`."""
    title = "Classes in the batches of one epoch"
    with in_style():
        figure = make_figure((8, 1.1 + 1.7 * len(mixtures)), title, "examples stored class by class, a colour each")
        panels = figure.subplots(len(mixtures), squeeze=False)[:, 0]
        for axes, mixture in zip(panels, mixtures, strict=True):
            shares = mixture.shares
            # More batches than pixels would be drawn over each other; whole batches are left out, not averaged.
            kept = np.unique(np.linspace(0, len(shares) - 1, min(len(shares), _MAX_COLUMNS)).astype(int))
            colours = colormaps["viridis"](np.linspace(0, 1, shares.shape[1]))
            # Each batch is as wide as it lasts, from the first to the last; without smoothing no seam shows white.
            edges = np.linspace(0, 1, len(kept) + 1)
            columns = np.vstack([shares[kept], shares[kept[-1:]]])
            areas = axes.stackplot(edges, columns.T, colors=colours, linewidth=0, step="post", antialiased=False)
            for area in areas:
                area.set_edgecolor("face")
            distance = f"{mixture.distance.mean():.3f} from the data set on average"
            axes.set_title(f"{mixture.name}: {distance}", loc="left", fontsize=10, fontweight="normal", pad=5)
            axes.set(xlim=(0, 1), ylim=(0, 1))
            axes.tick_params(labelbottom=axes is panels[-1], bottom=axes is panels[-1])
            mark_values(axes, "y", [0, 0.5, 1])
        figure.supylabel("share of classes", fontsize=10, color=INK)
        panels[-1].set_xlabel("part of the epoch")
    return figure


def draw_plan(chosen: Prediction, others: Sequence[Prediction]) -> Figure:
    """Draw quality against memory: of `others`, a line for each block size; `chosen` is marked."""
    cfg = chosen.cfg
    readers = counted(chosen.n_readers, "reader")
    subtitle = f"batches of {cfg.batch_size:,}, {counted(cfg.n_lanes, 'lane')}, {readers} (ranks x workers)"
    sizes = [p.memory_nbytes for p in (chosen, *others)]
    unit, name = (_GIB, "GiB") if max(sizes) > _GIB / 2 else (_MIB, "MiB")
    with in_style():
        figure = make_figure((8.6, 4.6), "How well batches are mixed, by the memory that it takes", subtitle)
        axes = figure.add_subplot()
        for i, block_size in enumerate(sorted({p.cfg.block_size or 0 for p in others})):
            line = sorted((p for p in others if p.cfg.block_size == block_size), key=lambda p: p.memory_nbytes)
            kib = np.median([p.read_nbytes for p in line]) / 1024
            label = f"blocks of {block_size}: reads of {kib:,.3g} KiB"
            memory, quality = [p.memory_nbytes / unit for p in line], [p.quality for p in line]
            axes.plot(memory, quality, marker=".", color=_colour(i), label=label)
        axes.plot(chosen.memory_nbytes / unit, chosen.quality, "*", color=INK, markersize=14, label="this one")
        axes.set(xscale="log", ylim=(0, 1.05))
        mark_values(axes, "x", _powers(min(sizes) / unit, max(sizes) / unit))
        axes.set_xlabel(f"memory of batches, {name}")
        axes.set_ylabel("distinct examples, of a uniform draw")
        axes.grid()
        axes.legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _powers(low: float, high: float) -> list[float]:
    """At most eight powers of two from `low` to `high`, at one distance."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return [2.0**i for i in range(first, last + 1, max(1, -(-(last - first + 1) // 8)))]
