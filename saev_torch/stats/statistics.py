"""Statistics of stored activations: one streaming pass over a selection, or a seeded sample of it.

They are kept in a user's cache folder under a fingerprint of the files and the selection, never beside the shards.
The same data give the same numbers, bit for bit, for any number of threads.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.config import IndexedConfig, OrderedConfig, ShuffledConfig
from saev_torch.errors import ConfigError, FormatError
from saev_torch.order.permute import Bijection, make_key
from saev_torch.order.selection import Selection
from saev_torch.reading.labels import Labels
from saev_torch.reading.store import ShardStore
from saev_torch.stats.cached import get_or_make, load_arrays, make_fingerprint, save_arrays
from saev_torch.stats.moments import Moments
from saev_torch.stats.streaming import Pass, Progress

_Arrays = dict[str, NDArray[Any]]

_VERSION = 1
_SAMPLE = 3
# More than cores: a disk is faster with many reads at a time.
_N_THREADS = 16
_MAX_FULL_NBYTES = 16 << 30
_N_SAMPLED = 1 << 18


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Moments of a selection, and of each layer and kind of token in it.

    Attributes:
        total: All vectors of the selection together.
        groups: By (recorded layer, "special" or "content").
        n_selected: Vectors in the selection, measured or not.
        fingerprint: What was measured: a digest of the files' sizes and times, the metadata and the selection.
    """

    total: Moments
    groups: dict[tuple[int, str], Moments]
    n_selected: int
    fingerprint: str

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
        scale = math.sqrt(len(self.total.mean)) / self.total.mean_norm if self.total.mean_norm else math.inf
        if not 0 < np.float32(scale) < np.inf:
            raise FormatError(
                f"scale_norm: expected activations with a mean norm above 0, got {self.total.mean_norm}; "
                "these cannot be scaled, set scale_norm=False."
            )
        return float(np.float32(scale))

    def save(self, path: Path) -> None:
        """Write them to a file, in numpy's npz format without pickled objects.

        Raises:
            WriteError: The file cannot be written.
        """
        save_arrays(path, self.fingerprint, _to_arrays(self))

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what `save` wrote; nothing is ever unpickled.

        Raises:
            FormatError: It is another kind of file, or of another version.
            ShardsNotFoundError: There is no such file.
        """
        return _from_arrays(path, *load_arrays(path))


_COLUMNS = ("mean", "variance")
_SCALARS: dict[str, Any] = {x.name: x.type for x in dataclasses.fields(Moments) if x.type in (int, float)}


def _to_arrays(statistics: Statistics) -> _Arrays:
    everything = [statistics.total, *statistics.groups.values()]
    arrays: _Arrays = {name: np.array([getattr(m, name) for m in everything]) for name in (*_COLUMNS, *_SCALARS)}
    arrays["norm_quantiles"] = np.array([list(m.norm_quantiles.items()) for m in everything])
    arrays["layers"] = np.array([layer for layer, _ in statistics.groups], dtype=np.int64)
    arrays["is_content"] = np.array([kind == "content" for _, kind in statistics.groups], dtype=np.bool_)
    arrays["n_selected"] = np.array(statistics.n_selected, dtype=np.int64)
    return arrays


def _to_moments(arrays: _Arrays, i: int) -> Moments:
    fields: dict[str, Any] = {name: arrays[name][i] for name in _COLUMNS}
    fields |= {name: kind(arrays[name][i]) for name, kind in _SCALARS.items()}
    return Moments(**fields, norm_quantiles={float(q): float(norm) for q, norm in arrays["norm_quantiles"][i]})


def _from_arrays(path: Path, fingerprint: str, arrays: _Arrays) -> Statistics:
    try:
        everything = [_to_moments(arrays, i) for i in range(1 + len(arrays["layers"]))]
        kinds = ["content" if x else "special" for x in arrays["is_content"]]
        names = zip(arrays["layers"].tolist(), kinds, strict=True)
        groups = dict(zip(names, everything[1:], strict=True))
        return Statistics(everything[0], groups, int(arrays["n_selected"]), fingerprint)
    except (KeyError, IndexError, TypeError, ValueError) as err:
        raise FormatError(f"{path}: expected statistics of saev_torch, got something else ({err}); delete it.") from err


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
    ignore_labels = cfg.ignore_labels if isinstance(cfg, ShuffledConfig) else ()
    store = ShardStore(cfg.shards)
    try:
        selection = Selection(store.metadata, cfg.tokens, cfg.layer, ignore_labels, Labels(store).of_examples)
        return _compute(store, selection, ignore_labels, n_sampled, seed, n_threads, cache, progress)
    finally:
        store.close()


def _compute(
    store: ShardStore,
    selection: Selection,
    ignore_labels: Sequence[int],
    n_sampled: int | None,
    seed: int = 0,
    n_threads: int = _N_THREADS,
    cache: bool | Path = True,
    progress: Progress | None = None,
    is_only: bool = True,
) -> Statistics:
    what = [_VERSION, selection.tokens, selection.layer_idxs, selection.layer_is_all, sorted(set(ignore_labels))]
    if n_sampled is not None and n_sampled < selection.n_samples:
        what += [n_sampled, seed]
    else:
        n_sampled = None
    fingerprint = make_fingerprint(store, repr(what))

    def run() -> _Arrays:
        samples = None
        if n_sampled is not None:
            draw = Bijection(selection.n_samples, make_key(seed, _SAMPLE))
            samples = np.sort(draw(np.arange(n_sampled, dtype=np.int64)))
        total, groups = Pass(store, selection, samples, progress, is_only).run(n_threads)
        return _to_arrays(Statistics(total, groups, selection.n_samples * selection.n_parts, fingerprint))

    path, arrays = get_or_make(store.shards_dir, fingerprint, cache, run)
    return _from_arrays(path, fingerprint, arrays)


def compute_scale(cfg: ShuffledConfig, store: ShardStore, selection: Selection) -> float:
    """The number of `scale_norm`, from kept statistics or new ones: the same in every process and on every machine.

    The store is closed when it is measured. Activations that cannot be scaled raise a `FormatError`.
    """
    n_sampled = cfg.scale_samples
    if n_sampled is None:
        md = store.metadata
        nbytes = md.n_examples * md.tokens_per_example * md.row_nbytes * len(selection.layer_idxs)
        n_sampled = _N_SAMPLED if nbytes > _MAX_FULL_NBYTES else None
    selection = selection.reading_with(Labels(store).of_examples)
    try:
        # The epoch that follows finds in the page cache what was read for this.
        return _compute(store, selection, cfg.ignore_labels, n_sampled, is_only=False).scale
    finally:
        store.close()
