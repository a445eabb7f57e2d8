"""How all figures look: colours, type, the title and the line below it, and how a figure becomes a file.

Needs matplotlib, of the `demo` and the `plot` extra. Made without pyplot, which keeps a list of all figures and may
want a display.
"""

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from saev_torch.errors import WriteError
from saev_torch.format.files import write_atomic

INK, MUTED, FAINT = "#22262b", "#6b737d", "#e3e6ea"
BLUE, ORANGE, GREEN, VIOLET, RED = "#2f6db5", "#d9731a", "#3f8f5f", "#7a5ab0", "#b8433b"
COLOURS = (BLUE, ORANGE, GREEN, VIOLET, RED, MUTED)
"""In this order for lines that have none of their own."""

_INCH_PX = 120

_STYLE: Any = {
    "font.size": 10,
    "figure.facecolor": "white",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    # The same figure is the same file.
    "svg.hashsalt": "saev_torch",
}


def in_style() -> AbstractContextManager[None]:
    """While this is entered, axes are made in the style."""
    return rc_context(_STYLE)


def make_figure(size: tuple[float, float], title: str, subtitle: str = "") -> Figure:
    """Make a figure of so many inches, with a title and a muted line below it; axes go below both."""
    figure = Figure(figsize=size, layout="constrained")
    height = size[1]
    figure.text(0.1 / size[0], 1 - 0.1 / height, title, fontsize=13, fontweight="bold", va="top")
    if subtitle:
        figure.text(0.1 / size[0], 1 - 0.37 / height, subtitle, fontsize=9.5, color=MUTED, va="top")
    top = (0.68 if subtitle else 0.45) / height
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0.005, 0.01, 0.985, 0.99 - top))
    return figure


def mark_values(axes: Axes, which: str, values: list[float]) -> None:
    """Let an axis, "x" or "y", have ticks at these values only, written as a person would: 0.5, 4, 20,480."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(values)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> None:
    """Save a figure in the format of the file's suffix; `WriteError` where there is no such format."""
    buffer = io.BytesIO()
    kind = path.suffix[1:] or "png"
    # No date: the same figure is the same file.
    metadata = {"Date": None} if kind == "svg" else None
    try:
        with in_style():
            figure.savefig(buffer, format=kind, dpi=_INCH_PX, metadata=metadata)
    except ValueError as err:
        raise WriteError(f"{path}: could not be drawn: {err}; choose another file, for instance .png") from err
    write_atomic(path, buffer.getvalue())
