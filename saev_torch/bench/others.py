"""Loaders of other packages, as sides of the comparison: torchdata, SPDL and LitData, each where it is installed.

torchdata and SPDL have threads gather whole batches from the same `np.memmap`. LitData reads chunks of its own format;
its items are examples, and a window of them is mixed here, which is several times as fast as items of single samples.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from saev_torch.bench.data import BenchData
from saev_torch.bench.sides import IndexBatches, Loader, MemmapBatches, Side, make_loader

PACKAGES = {"torchdata": "torchdata", "spdl": "spdl", "litdata": "litdata"}
"""Which package a side needs."""

WINDOW = 512
"""Examples of LitData that a worker mixes."""

_CHUNK = "64MB"


class Threads:
    """Iterates like a `DataLoader` over what a function makes for each epoch."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin
        # What a `DataLoader` keeps its workers in.
        self._iterator = None

    def __iter__(self) -> Iterator[Any]:
        yield from self._begin()


def _torchdata(data: BenchData, batch_size: int, n_threads: int) -> Threads:
    from torchdata.nodes import Loader as Nodes
    from torchdata.nodes import ParallelMapper, SamplerWrapper

    source = SamplerWrapper(IndexBatches(data.n_samples, batch_size))
    gathering = ParallelMapper(source, MemmapBatches(data).__getitem__, num_workers=n_threads, method="thread")
    nodes = Nodes(gathering)
    return Threads(lambda: nodes)


def _spdl(data: BenchData, batch_size: int, n_threads: int) -> Threads:
    from spdl.pipeline import PipelineBuilder

    # It talks of each stage when it ends.
    logging.getLogger("spdl").setLevel(logging.ERROR)
    batches, gather = IndexBatches(data.n_samples, batch_size), MemmapBatches(data).__getitem__

    def begin() -> Iterator[Any]:
        builder = PipelineBuilder().add_source(batches).pipe(gather, concurrency=n_threads)
        pipeline = builder.add_sink(n_threads).build(num_threads=n_threads)
        with pipeline.auto_stop():
            yield from pipeline

    return Threads(begin)


def write_litdata(data: BenchData, folder: Path) -> None:
    """Write the examples once more, in the format of LitData."""
    from litdata.streaming.cache import Cache

    md = data.store.metadata
    cache = Cache(str(folder), chunk_bytes=_CHUNK)
    memmaps = MemmapBatches(data)
    width = md.content_tokens_per_example
    for example in range(md.n_examples):
        act = memmaps[np.arange(example * width, (example + 1) * width)]["act"]
        cache[example] = {"act": act, "example": example}
    cache.done()
    cache.merge()


class _Windows(IterableDataset[dict[str, torch.Tensor]]):
    """Batches from windows of whole examples, which LitData shuffles by its own rule."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        from litdata import StreamingDataset

        self._data = StreamingDataset(str(folder), shuffle=True, drop_last=False)
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        # One window, which is filled again and again, and numpy's arrays, which are in huge pages: fresh memory costs
        # more than the mixing.
        window: NDArray[np.float32] | None = None
        which: list[NDArray[np.int64]] = []
        for item in self._data:
            width, d_model = item["act"].shape
            if window is None:
                window = np.empty((WINDOW * width, d_model), dtype=np.float32)
            window[len(which) * width :][:width] = item["act"].numpy()
            which.append(np.arange(width) + int(item["example"]) * width)
            if len(which) == WINDOW:
                yield from self._mix(window, np.concatenate(which))
                which = []
        if window is not None and which:
            yield from self._mix(window, np.concatenate(which))

    def _mix(self, window: NDArray[np.float32], which: NDArray[np.int64]) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(len(which)).numpy()
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            act = np.empty((len(rows), window.shape[1]), dtype=np.float32)
            np.take(window, rows, axis=0, out=act, mode="clip")
            yield {"act": torch.from_numpy(act), "index": torch.from_numpy(which[rows])}


def _litdata(folder: Path, batch_size: int, n_workers: int) -> Loader:
    return make_loader(_Windows(folder, batch_size), n_workers, batch_size=None)


def make_other_sides(data: BenchData, batch_size: int, n: int, litdata: Path | None) -> list[Side]:
    """List the sides of others that can be measured here, with `n` threads or workers each.

    `litdata` is where `write_litdata` wrote the data; None leaves it out.
    """
    n_batches = -(-data.n_samples // batch_size)
    makers: dict[str, Callable[[], Any]] = {
        "torchdata": functools.partial(_torchdata, data, batch_size, n),
        "spdl": functools.partial(_spdl, data, batch_size, n),
    }
    if litdata is not None:
        makers["litdata"] = functools.partial(_litdata, litdata, batch_size, n)
    # What they prepare in advance comes before the clock, as for the sides of `np.memmap`.
    return [
        Side(f"{kind}-{n}", make, data.sample_nbytes, n, n_batches, 2 * n + 2, n_lanes=0)
        for kind, make in makers.items()
        if importlib.util.find_spec(PACKAGES[kind]) is not None
    ]
