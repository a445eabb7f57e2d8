"""The picture of `inspect --plot`. Needs matplotlib, of the `demo` extra."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from saev_torch.errors import WriteError
from saev_torch.tools.overview import Overview

__all__ = ["draw_overview"]


def draw_overview(overview: Overview, path: Path) -> None:
    """Draw the norms of each layer and the counts of the labels.

    Raises:
        WriteError: The file could not be written.
    """
    md = overview.metadata
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    norms, labels = figure.subplots(1, 2)
    figure.suptitle(f"{md.family} {md.ckpt}: {md.n_examples:,} examples, {overview.nbytes / 1e6:,.0f} MB")
    top = max(float(sample.norms.max()) for sample in overview.layers)
    for sample in overview.layers:
        norms.hist(sample.norms, bins=np.linspace(0, top or 1.0, 40).tolist(), histtype="step", label=f"{sample.layer}")
    norms.set(xlabel="L2 norm", ylabel="sampled content tokens", title="norms by layer")
    norms.legend(title="layer", frameon=False)
    if overview.labels is None:
        labels.text(0.5, 0.5, "no labels", ha="center", va="center", transform=labels.transAxes)
        labels.set_axis_off()
    else:
        there = np.flatnonzero(overview.labels)
        labels.bar(there, overview.labels[there])
        labels.set(xlabel="label", ylabel="content tokens", yscale="log", title="labels")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as err:
        raise WriteError(f"{path}: could not be drawn: {err}; choose another file, for instance .png") from err
