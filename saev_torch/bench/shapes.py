"""Data and batches of other shapes: whole later epochs of each from the page cache, against those of the main shape."""

import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from saev_torch.bench.data import BenchData, example_nbytes, make
from saev_torch.bench.epochs import measure_epochs
from saev_torch.bench.rounds import Spread, run_rounds, warm_up
from saev_torch.format.dtypes import FLOAT32
from saev_torch.writing.progress import Progress

# Disk that data of several layers take, of which one is read, over that of the others.
_SHARE_OF_LAYERS = 3
_N_BUFFERS, _N_LANES = 3, 8
_N_LATER = 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is recorded and how it is read."""

    d_model: int = 768
    n_layers: int = 1
    batch_size: int = 16384
    n_workers: int = 2

    @property
    def data(self) -> tuple[int, int]:
        """Shapes that have this in common read the same data."""
        return self.d_model, self.n_layers

    def __str__(self) -> str:
        layers = f"1 of {self.n_layers} layers" if self.n_layers > 1 else "1 layer"
        return f"d_model {self.d_model}, {layers}, batches of {self.batch_size}, {self.n_workers} workers"


SHAPES = {
    "main": Shape(),
    "wide": Shape(d_model=4096, batch_size=4096),
    "narrow": Shape(d_model=64),
    "small-batches": Shape(batch_size=256),
    "layers": Shape(n_layers=12),
    "many-workers": Shape(n_workers=8),
}
"""By name; the others are held against `main`."""


@dataclasses.dataclass(frozen=True)
class ShapeTable:
    """GB/s of each shape over the rounds."""

    rates: Mapping[str, Spread]

    def _ratio(self, name: str) -> Spread:
        return self.rates[name] / self.rates["main"]

    def to_json(self) -> dict[str, Any]:
        """Everything, in JSON's types."""
        return {
            name: {
                **dataclasses.asdict(SHAPES[name]),
                "gb_per_s": rate.to_json(),
                "to_main": self._ratio(name).to_json(),
            }
            for name, rate in self.rates.items()
        }

    def __str__(self) -> str:
        rows = [("", "GB/s", "of main", "")]
        rows += [(name, str(rate), str(self._ratio(name)), str(SHAPES[name])) for name, rate in self.rates.items()]
        return "\n".join(f"{name:<13}  {rate:>17}  {ratio:>17}  {about}".rstrip() for name, rate, ratio, about in rows)


def run_shapes(
    n_rounds: int, gigabytes: float, buffer_size: int, folder: Path | None, shapes: Mapping[str, Shape] = SHAPES
) -> ShapeTable:
    """Make data of so many GB for each shape, and measure later epochs of all shapes in each round.

    The buffer is lowered to a third of the epoch. Of several layers, data of three times the size are made.
    """
    with ExitStack() as stack:
        made = {
            shape.data: _make(shape, gigabytes, stack.enter_context(_temporary(folder))) for shape in shapes.values()
        }
        todo = {}
        for name, shape in shapes.items():
            data = made[shape.data]
            most = -(-data.n_samples // shape.batch_size) // _N_BUFFERS
            most = most // _N_LANES * _N_LANES or most
            cfg = data.config(shape.batch_size, max(1, min(buffer_size, most)))
            todo[name] = functools.partial(measure_epochs, cfg, shape.n_workers, _N_LATER)
        several = [data for (_, n_layers), data in made.items() if n_layers > 1]
        for data in made.values():
            # Of several layers, the one that is read.
            warm_up(data, data if data in several else None)
        found = run_rounds("shapes", n_rounds, todo)
    return ShapeTable(
        {name: Spread(tuple(statistics.median(one.later) for one in epochs)) for name, epochs in found.items()}
    )


def _temporary(folder: Path | None) -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="saev_torch_bench_", dir=folder)


def _make(shape: Shape, gigabytes: float, root: str) -> BenchData:
    per_example = example_nbytes(FLOAT32.name, shape.d_model) * shape.n_layers
    wanted = gigabytes * 1e9 * (_SHARE_OF_LAYERS if shape.n_layers > 1 else 1)
    n_examples = max(1, round(wanted / per_example))
    with Progress(n_examples, f"making data, d_model {shape.d_model}", "examples") as progress:
        return BenchData.open(
            make(Path(root), n_examples, shape.n_layers, progress.update, d_model=shape.d_model), None
        )
