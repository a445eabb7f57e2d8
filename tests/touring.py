"""A tour through the package, for systems that lack something: what went wrong, and what was said; see lacking.py.

It is imported after something was taken away, and so is the package.
"""

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contracts
import factory
import numpy as np
import uring
from torch.utils.data import DataLoader

from saev_torch import (
    IndexedConfig,
    IndexedDataset,
    Metadata,
    OrderedConfig,
    SaevTorchError,
    ShardWriter,
    ShuffledConfig,
    compute_statistics,
    verify,
)
from saev_torch.bench import machine
from saev_torch.order.selection import Selection
from saev_torch.processes import counters
from saev_torch.reading import direct
from saev_torch.reading.reader import Spot
from saev_torch.reading.source import Source
from saev_torch.reading.store import ShardStore

SPEC = factory.Spec(n_examples=40, content_tokens=24, layers=(3, 7), d_model=16, examples_per_shard=13)


def tour(shards: str, place: str, workers: list[int], methods: list[str]) -> dict[str, Any]:
    """Go through the package.

    Args:
        shards: A directory of `SPEC`.
        place: An empty folder.
        workers: Numbers of workers.
        methods: How workers are started.

    Returns:
        By the step of the tour what it raised, None for nothing; what was logged; what reads data that are not in the
        page cache; whether the kernel gives an io_uring; whether this process is known to live.
    """
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.levelname}: {record.getMessage()}")

    logging.getLogger("saev_torch").addHandler(Handler())
    logging.getLogger("saev_torch").setLevel(logging.INFO)
    os.environ["TMPDIR"] = str(Path(place) / "tmp")
    (Path(place) / "tmp").mkdir()
    steps: dict[str, Callable[[], None]] = {}
    for n in workers:
        for method in methods if n else [""]:
            steps |= {f"{name} {n} {method}": _step(read, shards, n, method) for name, read in _READ.items()}
    steps |= {
        "copy": lambda: _read_copy(shards),
        "statistics": lambda: _measure(shards),
        "writer": lambda: _write(Path(place) / "written"),
        "resumed": lambda: _write(Path(place) / "resumed", resume=True),
        "verify": lambda: _verify(shards),
        "tilde": _name_home,
        "machine": _look,
        "cached": lambda: _ask_what_is_cached(shards),
    }
    found: dict[str, str | None] = {}
    for name, step in steps.items():
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", category=RuntimeWarning)
                step()
            found[name] = None
        except SaevTorchError as err:
            found[name] = f"{type(err).__name__}: {err}"
        except BaseException as err:  # noqa: BLE001 -- told to the test
            found[name] = f"RAW {type(err).__name__}: {err}"
    return {
        "steps": found,
        "log": said,
        "reader": _find_reader(shards),
        "has_ring": uring.refusal() is None,
        "is_alive": counters.is_alive(os.getpid()),
    }


@contextlib.contextmanager
def _large() -> Iterator[None]:
    """Data that do not fit the page cache, so that they are read past it."""
    fits = direct.fits_page_cache
    direct.fits_page_cache = lambda nbytes: False
    yield
    direct.fits_page_cache = fits


def _find_reader(shards: str) -> str:
    """What reads them."""
    store = ShardStore(Path(shards))
    with _large():
        past_cache = direct.reads_past_cache(store, Selection(store.metadata, "content", 7), True, Spot())
    return type(Source(store, past_cache).open_reader()).__name__


def _step(read: Callable[[str, int, str], None], shards: str, n: int, method: str) -> Callable[[], None]:
    return lambda: read(shards, n, method)


def _options(n: int, method: str) -> dict[str, Any]:
    return {"num_workers": n, "multiprocessing_context": method} if n else {"num_workers": 0}


def _read_shuffled(shards: str, n: int, method: str) -> None:
    cfg = ShuffledConfig(shards=shards, layer=7, batch_size=64, buffer_size=8, n_lanes=2, ignore_labels=[2])
    with _large():
        contracts.check_epoch(list(contracts.make_ready(cfg, **_options(n, method))), SPEC, cfg)


def _read_ordered(shards: str, n: int, method: str) -> None:
    cfg = OrderedConfig(shards=shards, layer="all", tokens="all", batch_size=100)
    contracts.check_epoch(list(contracts.make_ready(cfg, **_options(n, method))), SPEC, cfg)


def _read_indexed(shards: str, n: int, method: str) -> None:
    data = IndexedDataset(IndexedConfig(shards=shards, layer=7))
    batches = list(DataLoader(data, batch_size=600, **_options(n, method)))
    acts = np.concatenate([batch["act"].numpy() for batch in batches])
    assert (acts == factory.oracle(SPEC)[:, 1, 1:].reshape(-1, SPEC.d_model)).all()


_READ = {"shuffled": _read_shuffled, "ordered": _read_ordered, "indexed": _read_indexed}


def _read_copy(shards: str) -> None:
    cfg = ShuffledConfig(shards=shards, layer=3, batch_size=64, use_tmpdir=True)
    contracts.check_epoch(list(contracts.make_data_set(cfg)), SPEC, cfg)


def _measure(shards: str) -> None:
    found = [compute_statistics(IndexedConfig(shards=shards, layer=7)) for _ in range(2)]
    acts = factory.oracle(SPEC)[:, 1, 1:].reshape(-1, SPEC.d_model)
    assert found[0].n_selected == len(acts)
    for each in found:
        np.testing.assert_allclose(each.total.mean, acts.mean(0, dtype=np.float64), rtol=1e-9)


def _write(root: Path, **options: Any) -> None:
    md = Metadata(**dataclasses.replace(SPEC, n_examples=9).metadata())
    acts = factory.oracle(md)
    with ShardWriter(root, md, **options) as writer:
        for start in range(0, 9, 2):
            writer.write_batch(acts[start : start + 2], start)
    assert verify(writer.shards_dir).ok
    data = IndexedDataset(IndexedConfig(shards=writer.shards_dir, layer="all", tokens="all"))
    got = data.__getitems__(range(len(data))).batch["act"].numpy()  # type: ignore[attr-defined]
    assert (got == acts.reshape(-1, SPEC.d_model)).all()


def _verify(shards: str) -> None:
    assert verify(Path(shards), finite=True).ok


def _name_home() -> None:
    IndexedConfig(shards="~/shards")


def _look() -> None:
    assert machine.look().n_affinity > 0


def _ask_what_is_cached(shards: str) -> None:
    assert 0 <= machine.cached_share(ShardStore(Path(shards))) <= 1
