"""The demo's figure: how training went, how often latents fire, and what some of them mean.

A latent is shown as a concordance, the strongest token of each word in a column with its context left and right.
Needs matplotlib.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saev_torch.tools.demo.meanings import N_HITS_SHOWN, N_LATENTS_SHOWN, N_LEFT, N_RIGHT, Hit
from saev_torch.tools.style import BLUE, INK, MUTED, ORANGE, in_style

_N_COLUMNS = N_LEFT + N_RIGHT
_LINES_PER_LATENT = N_HITS_SHOWN + 2.0


def draw(
    path: Path,
    title: str,
    subtitle: str,
    losses: Sequence[float],
    curve: Sequence[tuple[int, float]],
    frequencies: npt.NDArray[np.float64],
    meanings: Sequence[tuple[int, float, list[Hit]]],
) -> None:
    """Draw the figure: the loss of each step, the explained variance by step, the frequencies, and the meanings."""
    with in_style():
        figure = Figure(figsize=(16, 10.4), dpi=110, facecolor="white")
        figure.text(0.04, 0.957, title, fontsize=18, fontweight="bold")
        figure.text(0.04, 0.927, subtitle, fontsize=11, color=MUTED)
        grid = figure.add_gridspec(
            2, 2, width_ratios=(1, 2.5), left=0.045, right=0.985, top=0.865, bottom=0.06, hspace=0.34, wspace=0.12
        )
        _draw_training(figure.add_subplot(grid[0, 0]), losses, curve)
        _draw_frequencies(figure.add_subplot(grid[1, 0]), frequencies)
        _draw_meanings(figure.add_subplot(grid[:, 1]), meanings, figure.dpi)
        figure.savefig(path)


def _draw_training(axes: Axes, losses: Sequence[float], curve: Sequence[tuple[int, float]]) -> None:
    axes.set_title("Training")
    axes.plot(range(1, len(losses) + 1), losses, color=BLUE, linewidth=1.2)
    axes.set(xlabel="step", ylim=(0, None), xlim=(0, len(losses)))
    axes.set_ylabel("loss", color=BLUE)
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    steps, variances = zip(*curve, strict=True)
    right.plot(steps, variances, color=ORANGE, linewidth=1.6, marker="o", markersize=3.5)
    right.set_ylabel("explained variance, held out", color=ORANGE)
    right.set_ylim(min(0.0, *variances), 1)
    end = (steps[-1], variances[-1])
    right.annotate(f"{variances[-1]:.3f}", end, (-4, 8), textcoords="offset points", ha="right", color=ORANGE)


def _draw_frequencies(axes: Axes, frequencies: npt.NDArray[np.float64]) -> None:
    alive = frequencies[frequencies > 0]
    axes.set_title("How often latents fire")
    axes.hist(100 * alive, bins=list(np.geomspace(1e-3, 100, 51)), color=BLUE, alpha=0.85)
    axes.set_xscale("log")
    axes.set(xlabel="% of tokens on which a latent fires", ylabel="latents", xlim=(1e-3, 100))
    axes.xaxis.set_major_formatter("{x:g}")
    n_dead = len(frequencies) - len(alive)
    note = f"{len(alive):,} latents\n{n_dead:,} more never fire" if n_dead else f"{len(alive):,} latents,\nnone is dead"
    axes.text(0.98, 0.95, note, transform=axes.transAxes, ha="right", va="top", color=MUTED)


def _draw_meanings(axes: Axes, meanings: Sequence[tuple[int, float, list[Hit]]], dpi: float) -> None:
    axes.set_title("Latents that stand for one idea in many words")
    axes.axis("off")
    if not meanings:
        axes.text(0.5, 0.5, "none found: train longer", ha="center", color=MUTED, transform=axes.transAxes)
        return
    # One unit is one line high and one character wide. How wide that is depends on how the font is rounded to pixels.
    width_px = axes.get_window_extent().width
    font_pt = 0.98 * width_px / _N_COLUMNS / 0.602 * 72 / dpi
    # Two dollar signs would otherwise start a formula.
    mono: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": font_pt, "va": "center", "parse_math": False}
    ruler = axes.text(0, 0, 100 * "m", **mono)
    n_columns = width_px / (ruler.get_window_extent().width / 100)
    ruler.remove()
    axes.set(xlim=(0, n_columns), ylim=(N_LATENTS_SHOWN * _LINES_PER_LATENT - 1.5, -0.5))
    line = 0.0
    for latent, frequency, hits in meanings:
        words = " · ".join(hit.token.lower() for hit in hits)
        axes.text(0, line, words, fontweight="bold", fontsize=10.5, va="center", color=INK)
        share = f"latent {latent}, {100 * frequency:.2f} % of tokens"
        axes.text(n_columns, line, share, ha="right", va="center", color=MUTED)
        strongest = max(hit.value for hit in hits)
        for hit in hits:
            line += 1
            shade = (ORANGE, 0.15 + 0.45 * hit.value / strongest)
            box = {"boxstyle": "square,pad=0.1", "facecolor": shade, "edgecolor": "none"}
            axes.text(N_LEFT, line, hit.left, ha="right", color=MUTED, **mono)
            axes.text(N_LEFT, line, hit.token, bbox=box, color=INK, **mono)
            axes.text(N_LEFT + len(hit.token), line, hit.right, color=MUTED, **mono)
        line += _LINES_PER_LATENT - N_HITS_SHOWN
