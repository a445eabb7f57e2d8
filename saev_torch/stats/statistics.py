"""Statistics of stored activations: one streaming pass over a selection, or a seeded sample of it.

They are kept in a user's cache folder under a fingerprint of the files and the selection, never beside the shards: as
an npz file of plain arrays, which is never unpickled. A file that is damaged, or that was made from something else, is
made again. The same data give the same numbers, bit for bit, for any number of threads.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import logging
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig
from saev_torch.errors import ConfigError, FormatError, ShardsNotFoundError, WriteError
from saev_torch.format.files import fingerprint, lock, write_atomic, writing
from saev_torch.format.sidecars import LABELS
from saev_torch.order.permute import Bijection, make_key
from saev_torch.order.selection import Selection
from saev_torch.reading.labels import Labels
from saev_torch.reading.selecting import open_store, select, tell_counted_layers
from saev_torch.reading.store import ShardStore
from saev_torch.stats.moments import Moments
from saev_torch.stats.streaming import NonFinite, Pass, Progress

_log = logging.getLogger("saev_torch")

_VERSION = 2
_SAMPLE = 3
# More than cores: a disk is faster with many reads at a time.
_N_THREADS = 16
_MAX_FULL_NBYTES = 16 << 30
_N_SAMPLED = 1 << 18

_COLUMNS = ("mean", "variance")
_SCALARS: dict[str, Any] = {x.name: x.type for x in dataclasses.fields(Moments) if x.type in (int, float)}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Moments of a selection, and of each layer and kind of token in it.

    Attributes:
        total: All vectors of the selection together.
        groups: By (recorded layer, "special" or "content").
        n_selected: Vectors in the selection, measured or not.
        fingerprint: What was measured: a digest of the files' sizes and times, the metadata and the selection.
        first_nonfinite: The first NaN or infinity, and where it is; None where all that was measured is finite.
    """

    total: Moments
    groups: dict[tuple[int, str], Moments]
    n_selected: int
    fingerprint: str
    first_nonfinite: NonFinite | None = None

    @property
    def is_full(self) -> bool:
        """Whether every vector was measured."""
        return self.total.n_samples + self.total.n_nonfinite_samples == self.n_selected

    @property
    def mean_norm_error(self) -> float:
        """Standard error of the mean norm: 0 for a full pass, else that of drawing without replacement."""
        n, population = self.total.n_samples, max(2, self.n_selected)
        if self.is_full or not n:
            return 0.0
        return self.total.std_norm * math.sqrt((population - n) / (population - 1) / n)

    @property
    def scale(self) -> float:
        """The number that makes the mean L2 norm sqrt(d_model), rounded to float32.

        Raises:
            FormatError: No such number exists: every vector is zero, or has a value that is not finite.
        """
        return self._scale_to("mean", self.total.mean_norm)

    @property
    def median_scale(self) -> float:
        """The number that makes the median L2 norm sqrt(d_model), as `norm_quantiles` knows it, rounded to float32.

        Raises:
            FormatError: No such number exists: half of the vectors are zero, or none is finite.
        """
        return self._scale_to("median", self.total.norm_quantiles[0.5])

    def _scale_to(self, which: str, norm: float) -> float:
        with np.errstate(over="ignore"):
            scale = np.float32(math.sqrt(len(self.total.mean)) / norm if norm else math.inf)
        if not 0 < scale < np.inf:
            raise FormatError(
                f"scale_norm: expected activations with a {which} norm above 0, got {norm}"
                f"{'' if self.first_nonfinite is None else f' (the first value is {self.first_nonfinite})'}; these "
                "cannot be scaled, set scale_norm=False."
            )
        return float(scale)

    def save(self, path: Path) -> None:
        """Write them to a file, in numpy's npz format without pickled objects.

        Raises:
            WriteError: The file cannot be written.
        """
        everything = [self.total, *self.groups.values()]
        arrays = {name: np.array([getattr(m, name) for m in everything]) for name in (*_COLUMNS, *_SCALARS)}
        arrays["norm_quantiles"] = np.array([list(m.norm_quantiles.items()) for m in everything])
        arrays["layers"] = np.array([layer for layer, _ in self.groups], dtype=np.int64)
        arrays["is_content"] = np.array([kind == "content" for _, kind in self.groups], dtype=np.bool_)
        arrays["n_selected"] = np.array(self.n_selected, dtype=np.int64)
        arrays["fingerprint"] = np.array(self.fingerprint)
        found = self.first_nonfinite
        arrays["first_nonfinite"] = np.array(json.dumps(None if found is None else dataclasses.asdict(found)))
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what `save` wrote; nothing is ever unpickled.

        Raises:
            FormatError: It is another kind of file, or of another version.
            ShardsNotFoundError: There is no such file.
        """
        try:
            # Opened here, because numpy leaves a file open that turns out to be no archive.
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            everything = []
            for i, quantiles in enumerate(arrays["norm_quantiles"]):
                fields = {name: arrays[name][i] for name in _COLUMNS}
                fields |= {name: kind(arrays[name][i]) for name, kind in _SCALARS.items()}
                everything.append(Moments(**fields, norm_quantiles={float(q): float(norm) for q, norm in quantiles}))
            labelled = zip(arrays["layers"].tolist(), arrays["is_content"], everything[1:], strict=True)
            groups = {(layer, "content" if x else "special"): moments for layer, x, moments in labelled}
            found = json.loads(str(arrays["first_nonfinite"]))
            first = None if found is None else NonFinite(**found)
            return cls(everything[0], groups, int(arrays["n_selected"]), str(arrays["fingerprint"]), first)
        except FileNotFoundError as err:
            raise ShardsNotFoundError(f"{path}: expected a file of Statistics.save(), but there is none.") from err
        except (OSError, LookupError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as err:
            raise FormatError(f"{path}: expected npz of saev_torch, got something else ({err}); delete it.") from err


def compute_statistics(
    cfg: IndexedConfig | OrderedConfig | ShuffledConfig,
    *,
    n_sampled: int | None = None,
    seed: int = 0,
    n_threads: int = _N_THREADS,
    cache: bool | Path = True,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Measure the activations that a config selects.

    Args:
        cfg: What to measure: its shards, tokens, layer and ignored labels.
        n_sampled: Measure so many samples, drawn without replacement; None for all of them.
        seed: Seed of that draw.
        n_threads: Reading and computing threads, at most: those beyond the number of cores join while cores are idle,
            as they are where a disk is slow.
        cache: Keep the result, and use what was kept: in `$XDG_CACHE_HOME/saev_torch` (else `~/.cache/saev_torch`), in
            a folder of your own, or with False not at all. One process measures, others that ask wait for it.
        progress: Called now and then, from one thread at a time, with the samples measured and the samples in all.

    Returns:
        The statistics, with the layers of a tuple counted as vectors of their own.

    Raises:
        ConfigError: A bad value, or a cache folder inside the shard directory.
        ShardsNotFoundError, FormatError, ReadError: The shards cannot be read.
    """
    for name, value, least in (("n_sampled", 1 if n_sampled is None else n_sampled, 1), ("n_threads", n_threads, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}: expected an integer of at least {least}, got {value!r}.")
    kinds = OrderedConfig, ShuffledConfig, IndexedConfig
    with contextlib.closing(open_store("compute_statistics", cfg, *kinds, may_copy=False)) as store:
        selection = select(store, cfg)
        tell_counted_layers(cfg, store.metadata.layers)
        return _compute(store, selection, n_sampled, seed, n_threads, cache, progress)


def find_scale(cfg: OrderedConfig | ShuffledConfig, store: ShardStore, selection: Selection) -> float | None:
    """What a config multiplies activations with, None for nothing; measured only where `scale_norm` asks for it.

    Raises:
        FormatError: The activations cannot be scaled.
        ConfigError: Scaled, they would be too large for their type in memory.
    """
    if cfg.scale is not None:
        return float(np.float32(cfg.scale))
    if not isinstance(cfg, ShuffledConfig) or not cfg.scale_norm:
        return None
    return _compute_scale(store.clone(), selection, cfg.scale_samples, cfg.scale_norm == "median")


def _compute_scale(store: ShardStore, selection: Selection, n_sampled: int | None, is_median: bool) -> float:
    """The number of `scale_norm`, from kept statistics or new ones: the same in every process and on every machine.

    Without `n_sampled`, large data are sampled, others are read whole. The store is closed when it is measured.
    """
    if n_sampled is None:
        md = store.metadata
        nbytes = md.n_examples * md.tokens_per_example * md.row_nbytes * len(selection.layer_idxs)
        n_sampled = _N_SAMPLED if nbytes > _MAX_FULL_NBYTES else None
    with contextlib.closing(store):
        # The epoch that follows finds in the page cache what was read for this.
        found = _compute(store, selection.reading_with(Labels(store, selection).of_examples), n_sampled, is_only=False)
    scale = found.median_scale if is_median else found.scale
    largest, act_type = max(-found.total.min, found.total.max), selection.act_type
    if largest * scale > torch.finfo(getattr(torch, act_type.name)).max:
        raise ConfigError(
            f"act_dtype: expected activations that {act_type.name} holds when they are scaled, got {largest:.6g} "
            f"times {scale:.6g}; use act_dtype='float32'."
        )
    return scale


def _digest_of(store: ShardStore, selection: Selection, sample: list[int]) -> str:
    """Digest what is measured: the files, what is selected of them, and how many samples are drawn with which seed."""
    ignored = sorted(set(selection.ignore_labels))
    what: list[Any] = [_VERSION, selection.tokens, selection.layer_idxs, selection.layer_is_all, ignored]
    if selection.examples is not None:
        what.append(selection.examples.to_dict())
    if selection.mask_digest is not None:
        what.append(f"mask {selection.mask_digest}")
    what += sample
    names = [shard.name for shard in store.shards] + [LABELS.name] * store.has_labels
    return fingerprint(store.shards_dir, names, f"{store.metadata.hash}\0{what!r}".encode())[:32]


def _compute(
    store: ShardStore,
    selection: Selection,
    n_sampled: int | None,
    seed: int = 0,
    n_threads: int = _N_THREADS,
    cache: bool | Path = True,
    progress: Progress | None = None,
    is_only: bool = True,
) -> Statistics:
    """Find kept statistics, or make and keep them; of several processes that ask at once, one makes them."""
    if n_sampled is not None and n_sampled >= selection.n_samples:
        n_sampled = None
    made_from = _digest_of(store, selection, [] if n_sampled is None else [n_sampled, seed])

    def make() -> Statistics:
        samples = None
        if n_sampled is not None:
            draw = Bijection(selection.n_samples, make_key(seed, _SAMPLE))
            samples = np.sort(draw(np.arange(n_sampled, dtype=np.int64)))
        measuring = Pass(store, selection, samples, progress, is_only)
        total, groups = measuring.run(n_threads)
        n_selected = selection.n_samples * selection.n_parts
        if measuring.first_nonfinite is not None:
            _log.warning(
                "%s: %d of %d vectors have values that are not finite, and are left out; the first is %s",
                store.shards_dir, total.n_nonfinite_samples, n_selected, measuring.first_nonfinite,
            )  # fmt: skip
        return Statistics(total, groups, n_selected, made_from, measuring.first_nonfinite)

    if cache is False:
        return make()
    folder = _cache_dir() if cache is True else Path(cache)
    if folder is None:
        _log.warning(
            "XDG_CACHE_HOME: expected a folder to keep statistics in, or a home directory, got neither; the result is "
            "not kept, and will be computed again."
        )
        return make()
    if folder.resolve().is_relative_to(store.shards_dir.resolve()):
        raise ConfigError(
            f"cache: expected a folder outside {store.shards_dir}, got {folder}; shards are never written to."
        )
    path = folder / f"statistics-{made_from}.npz"
    if (found := _load_matching(path, made_from)) is not None:
        return found
    with _locked(path) as may_keep:
        if (found := _load_matching(path, made_from)) is not None:
            return found
        made = make()
        if may_keep:
            try:
                made.save(path)
            except WriteError as err:
                _log.warning("%s; the result is not kept, and will be computed again.", err)
        return made


def _cache_dir() -> Path | None:
    """The user's cache folder for this package: `$XDG_CACHE_HOME/saev_torch`, else `~/.cache/saev_torch`, if any.

    See the XDG Base Directory Specification, which says that a relative path there is to be ignored. A user without
    HOME and without an entry in the list of users, as in some containers, has no `~`.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "saev_torch"
    except RuntimeError:
        return None


def _load_matching(path: Path, made_from: str) -> Statistics | None:
    try:
        found = Statistics.load(path)
    except ShardsNotFoundError:
        return None
    except FormatError as err:
        _log.warning("%s It is made again.", err)
        return None
    return found if found.fingerprint == made_from else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file that is being made, or go on without one; yields whether the file can be made at all."""
    with contextlib.ExitStack() as stack:
        may_keep = True
        try:
            with writing(path):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                file = stack.enter_context(open(path.with_suffix(".lock"), "w"))
                if not lock(file.fileno(), fcntl.LOCK_EX):
                    _log.warning("%s: its file system has no locks; other processes may compute the same.", path)
        except WriteError as err:
            may_keep = False
            _log.warning("%s; the result is not kept, and will be computed again.", err)
        yield may_keep
