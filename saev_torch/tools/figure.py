"""The figures of `inspect` and `plan`. Needs matplotlib, of the `demo` and the `plot` extra.

Made without pyplot, which keeps a list of all figures and may want a display.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure

from saev_torch.errors import WriteError
from saev_torch.format.files import write_atomic
from saev_torch.format.metadata import Metadata
from saev_torch.order.mixing import Mixture
from saev_torch.order.predict import Prediction

_MUTED = "#7d858f"
_MAX_COLUMNS = 400


def save(figure: Figure, path: Path) -> None:
    """Save a figure in the format of the file's suffix; `WriteError` where there is no such format."""
    buffer = io.BytesIO()
    try:
        figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=120)
    except ValueError as err:
        raise WriteError(f"{path}: could not be drawn: {err}; choose another file, for instance .png") from err
    write_atomic(path, buffer.getvalue())


def draw_overview(
    md: Metadata, norms_by_layer: dict[int, npt.NDArray[np.float32]], counts: npt.NDArray[np.int64] | None
) -> Figure:
    """Draw the norms of each layer and the counts of the labels, None where there are none."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    norms, labels = figure.subplots(1, 2)
    nbytes = md.n_examples * md.example_nbytes
    figure.suptitle(f"{md.family} {md.ckpt}: {md.n_examples:,} examples, {nbytes / 1e6:,.0f} MB")
    top = max(float(of_layer.max()) for of_layer in norms_by_layer.values())
    for layer, of_layer in norms_by_layer.items():
        norms.hist(of_layer, bins=np.linspace(0, top or 1.0, 40).tolist(), histtype="step", label=f"{layer}")
    norms.set(xlabel="L2 norm", ylabel="sampled content tokens", title="norms by layer")
    norms.legend(title="layer", frameon=False)
    if counts is None:
        labels.text(0.5, 0.5, "no labels", ha="center", va="center", transform=labels.transAxes)
        labels.set_axis_off()
    else:
        there = np.flatnonzero(counts)
        labels.bar(there, counts[there])
        labels.set(xlabel="label", ylabel="content tokens", yscale="log", title="labels")
    return figure


def draw_mixtures(mixtures: Sequence[Mixture]) -> Figure:
    """Draw which classes the batches of an epoch hold, one panel for each of `class_mixtures`."""
    figure = Figure(figsize=(8, 1 + 1.8 * len(mixtures)), layout="constrained")
    panels = figure.subplots(len(mixtures), squeeze=False)[:, 0]
    for axes, mixture in zip(panels, mixtures, strict=True):
        shares = mixture.shares
        # More batches than pixels would be drawn over each other; whole batches are left out, not averaged.
        kept = np.unique(np.linspace(0, len(shares) - 1, min(len(shares), _MAX_COLUMNS)).astype(int))
        colours = colormaps["viridis"](np.linspace(0, 1, shares.shape[1]))
        axes.stackplot((kept + 0.5) / len(shares), shares[kept].T, colors=colours, linewidth=0)
        title = f"{mixture.name}: {mixture.distance.mean():.3f} from the data set on average"
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.tick_params(labelbottom=axes is panels[-1], bottom=axes is panels[-1])
        axes.set_ylabel("share of classes", color=_MUTED)
    panels[-1].set_xlabel("part of the epoch", color=_MUTED)
    figure.suptitle("Classes in the batches of one epoch; examples stored class by class", x=0.01, ha="left")
    return figure


def draw_plan(chosen: Prediction, others: Sequence[Prediction]) -> Figure:
    """Draw quality against memory: of `others`, a line for each block size; `chosen` is marked."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for block_size in sorted({p.cfg.block_size or 0 for p in others}):
        line = sorted((p for p in others if p.cfg.block_size == block_size), key=lambda p: p.memory_nbytes)
        kib = np.median([p.read_nbytes for p in line]) / 1024
        label = f"blocks of {block_size}: reads of {kib:.0f} KiB"
        axes.plot([p.memory_nbytes / 2**30 for p in line], [p.quality for p in line], marker=".", label=label)
    axes.plot(chosen.memory_nbytes / 2**30, chosen.quality, "*", color="black", markersize=14, label="this one")
    axes.set(xscale="log", ylim=(0, 1.05))
    axes.set_xlabel("memory of batches, GiB")
    axes.set_ylabel("distinct examples, relative to a uniform draw")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure
