"""The demo's figure: how training went, how often latents fire, and what some of them mean.

A latent is shown as a concordance, the strongest token of each word in a column with its context left and right.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from saev_torch.tools.demo.corpus import Corpus

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_N_LATENTS_SHOWN = 8
_N_HITS_SHOWN = 4
_N_STRONGEST = 40
_MIN_LETTERS = 4
_N_STEM = 3
_RARE, _COMMON = 2e-4, 1e-2
# Characters before the token, and from its first one on.
_N_LEFT, _N_RIGHT = 52, 60
_N_COLUMNS = _N_LEFT + _N_RIGHT
_LINES_PER_LATENT = _N_HITS_SHOWN + 2.0
_INK, _MUTED, _BLUE, _ORANGE = "#22262b", "#6b737d", "#2f6db5", "#d9731a"


@dataclasses.dataclass(frozen=True)
class Firings:
    """Every active latent of every token, sorted by latent and then by value, the strongest first: [n_firings] each."""

    latents: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int64]  # Window x content tokens + token.
    n_tokens: int  # Also those on which nothing fires.
    n_latents: int  # Also those that never fire.

    @property
    def frequencies(self) -> npt.NDArray[np.float64]:
        """[n_latents] float64, the share of tokens on which each latent fires; 0 for a dead one."""
        return np.bincount(self.latents, minlength=self.n_latents) / self.n_tokens


@dataclasses.dataclass(frozen=True)
class Hit:
    """One token on which a latent fires, in context."""

    left: str
    token: str
    right: str
    value: float


def find_meanings(firings: Firings, corpus: Corpus) -> list[tuple[int, float, list[Hit]]]:
    """Choose latents that stand for one idea in many words, by a rule and not by eye.

    A latent qualifies if it is neither rare nor common and its strongest firings are on whole words with at least
    `_N_HITS_SHOWN` different beginnings, so that it is more than the embedding of one word. The strongest go first, and
    of equally strong ones those that react to their words alike. Returns (latent, its frequency, a hit for each word).
    """
    frequencies = firings.frequencies
    starts = np.searchsorted(firings.latents, np.arange(firings.n_latents))
    found = []
    for latent in np.flatnonzero((frequencies >= _RARE) & (frequencies <= _COMMON)):
        n_firings = round(frequencies[latent] * firings.n_tokens)
        strongest = slice(starts[latent], starts[latent] + min(n_firings, _N_STRONGEST))
        hits: dict[str, Hit] = {}
        for position, value in zip(firings.positions[strongest], firings.values[strongest], strict=True):
            word = _whole_word(corpus, int(position))
            if word is not None:
                hits.setdefault(word[:_N_STEM].lower(), _make_hit(corpus, int(position), float(value)))
        shown = list(hits.values())[:_N_HITS_SHOWN]
        if len(shown) == _N_HITS_SHOWN:
            found.append((int(latent), float(frequencies[latent]), shown))
    found.sort(key=lambda meaning: -(meaning[2][-1].value ** 2) / meaning[2][0].value)
    return found[:_N_LATENTS_SHOWN]


def _whole_word(corpus: Corpus, position: int) -> str | None:
    start, stop = corpus.spans.reshape(-1, 2)[position]
    word = corpus.text[start:stop]
    around = corpus.text[max(0, start - 1) : start] + corpus.text[stop : stop + 1]
    is_whole = word.isalpha() and not any(char.isalnum() or char == "_" for char in around)
    return word if is_whole and len(word) >= _MIN_LETTERS else None


def _make_hit(corpus: Corpus, position: int, value: float) -> Hit:
    window, token = divmod(position, corpus.spans.shape[1])
    start, stop = corpus.spans[window, token]
    # What stands outside the window was not seen by the model.
    first, last = corpus.spans[window, 0, 0], corpus.spans[window, -1, 1]
    left = corpus.text[max(first, start - _N_LEFT) : start].replace("\n", " ")
    right = corpus.text[stop : min(last, start + _N_RIGHT)].replace("\n", " ")
    # Words that the edge cuts tell nothing. A short context has none: it ends where the window does.
    left = left.partition(" ")[2] if len(left) == _N_LEFT else left
    right = right.rpartition(" ")[0] if stop + len(right) == start + _N_RIGHT else right
    return Hit(left, corpus.text[start:stop], right, value)


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
    # Only now: to ask the demo for --help takes no matplotlib.
    from matplotlib.figure import Figure

    from saev_torch.tools.style import in_style

    with in_style():
        figure = Figure(figsize=(16, 10.4), dpi=110, facecolor="white")
        figure.text(0.04, 0.957, title, fontsize=18, fontweight="bold")
        figure.text(0.04, 0.927, subtitle, fontsize=11, color=_MUTED)
        grid = figure.add_gridspec(
            2, 2, width_ratios=(1, 2.5), left=0.045, right=0.985, top=0.865, bottom=0.06, hspace=0.34, wspace=0.12
        )
        _draw_training(figure.add_subplot(grid[0, 0]), losses, curve)
        _draw_frequencies(figure.add_subplot(grid[1, 0]), frequencies)
        _draw_meanings(figure.add_subplot(grid[:, 1]), meanings, figure.dpi)
        figure.savefig(path)


def _draw_training(axes: "Axes", losses: Sequence[float], curve: Sequence[tuple[int, float]]) -> None:
    axes.set_title("Training")
    axes.plot(range(1, len(losses) + 1), losses, color=_BLUE, linewidth=1.2)
    axes.set(xlabel="step", ylim=(0, None), xlim=(0, len(losses)))
    axes.set_ylabel("loss", color=_BLUE)
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    steps, variances = zip(*curve, strict=True)
    right.plot(steps, variances, color=_ORANGE, linewidth=1.6, marker="o", markersize=3.5)
    right.set_ylabel("explained variance, held out", color=_ORANGE)
    right.set_ylim(min(0.0, *variances), 1)
    end = (steps[-1], variances[-1])
    right.annotate(f"{variances[-1]:.3f}", end, (-4, 8), textcoords="offset points", ha="right", color=_ORANGE)


def _draw_frequencies(axes: "Axes", frequencies: npt.NDArray[np.float64]) -> None:
    alive = frequencies[frequencies > 0]
    axes.set_title("How often latents fire")
    axes.hist(100 * alive, bins=list(np.geomspace(1e-3, 100, 51)), color=_BLUE, alpha=0.85)
    axes.set_xscale("log")
    axes.set(xlabel="% of tokens on which a latent fires", ylabel="latents", xlim=(1e-3, 100))
    axes.xaxis.set_major_formatter("{x:g}")
    n_dead = len(frequencies) - len(alive)
    note = f"{len(alive):,} latents\n{n_dead:,} more never fire" if n_dead else f"{len(alive):,} latents,\nnone is dead"
    axes.text(0.98, 0.95, note, transform=axes.transAxes, ha="right", va="top", color=_MUTED)


def _draw_meanings(axes: "Axes", meanings: Sequence[tuple[int, float, list[Hit]]], dpi: float) -> None:
    axes.set_title("Latents that stand for one idea in many words")
    axes.axis("off")
    if not meanings:
        axes.text(0.5, 0.5, "none found: train longer", ha="center", color=_MUTED, transform=axes.transAxes)
        return
    # One unit is one line high and one character wide. How wide that is depends on how the font is rounded to pixels.
    width_px = axes.get_window_extent().width
    font_pt = 0.98 * width_px / _N_COLUMNS / 0.602 * 72 / dpi
    # Two dollar signs would otherwise start a formula.
    mono: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": font_pt, "va": "center", "parse_math": False}
    ruler = axes.text(0, 0, 100 * "m", **mono)
    n_columns = width_px / (ruler.get_window_extent().width / 100)
    ruler.remove()
    axes.set(xlim=(0, n_columns), ylim=(_N_LATENTS_SHOWN * _LINES_PER_LATENT - 1.5, -0.5))
    line = 0.0
    for latent, frequency, hits in meanings:
        words = " · ".join(hit.token.lower() for hit in hits)
        axes.text(0, line, words, fontweight="bold", fontsize=10.5, va="center", color=_INK)
        share = f"latent {latent}, {100 * frequency:.2f} % of tokens"
        axes.text(n_columns, line, share, ha="right", va="center", color=_MUTED)
        strongest = max(hit.value for hit in hits)
        for hit in hits:
            line += 1
            shade = (_ORANGE, 0.15 + 0.45 * hit.value / strongest)
            box = {"boxstyle": "square,pad=0.1", "facecolor": shade, "edgecolor": "none"}
            axes.text(_N_LEFT, line, hit.left, ha="right", color=_MUTED, **mono)
            axes.text(_N_LEFT, line, hit.token, bbox=box, color=_INK, **mono)
            axes.text(_N_LEFT + len(hit.token), line, hit.right, color=_MUTED, **mono)
        line += _LINES_PER_LATENT - _N_HITS_SHOWN
