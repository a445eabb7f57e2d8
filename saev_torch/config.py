"""The three configs: what to read, in which order, with how much memory.

Field names, defaults and meanings are those of the published `saev.data` API; fields of our own stand behind them.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from saev_torch.errors import ConfigError

TokenKind: TypeAlias = Literal["special", "content", "all"]
"""Which tokens of an example are samples: [CLS] only, the content tokens, or both."""

LayerSpec: TypeAlias = int | Literal["all"] | tuple[int, ...]
"""One layer, every layer as samples of their own ("all"), or several layers side by side in each sample."""

_DEFAULT_SHARDS = Path("$SAEV_SCRATCH/saev/shards/abcdefg")


def _default_shards() -> Path:
    return _DEFAULT_SHARDS


def _refuse(config: object, field: str, expected: str) -> ConfigError:
    got = getattr(config, field)
    return ConfigError(f"{type(config).__name__}.{field}: expected {expected}, got {got!r}; change that field.")


def _check_int(config: object, field: str, minimum: int | None, maximum: int | None = None) -> None:
    value = getattr(config, field)
    bounds = "an integer" if minimum is None else f"an integer of at least {minimum}"
    if maximum is not None:
        bounds += f" and at most {maximum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(config, field, bounds)
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise _refuse(config, field, bounds)


def _check_bool(config: object, *fields: str) -> None:
    for field in fields:
        if not isinstance(getattr(config, field), bool):
            raise _refuse(config, field, "True or False")


def _check_number(config: object, field: str, *, above: float | None = None, within: tuple[float, float] | None = None):  # type: ignore[no-untyped-def]
    value = getattr(config, field)
    expected = "a number" if above is None else f"a number above {above}"
    if within is not None:
        expected = f"a number from {within[0]} to {within[1]}"
    ok = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if ok and above is not None:
        ok = value > above
    if ok and within is not None:
        ok = within[0] <= value <= within[1]
    if not ok:
        raise _refuse(config, field, expected)


def _check_selection(config: Any) -> None:
    """Validate and normalise `shards`, `tokens` and `layer`, which every config has."""
    shards = config.shards
    if not isinstance(shards, str | os.PathLike) or not os.fspath(shards):
        raise _refuse(config, "shards", "a path")
    expanded = os.path.expandvars(os.fspath(shards))
    if not isinstance(expanded, str) or "\0" in expanded:
        raise _refuse(config, "shards", "a path")
    object.__setattr__(config, "shards", Path(expanded).expanduser())
    if config.tokens not in ("special", "content", "all"):
        raise _refuse(config, "tokens", "'special', 'content' or 'all'")
    layer = config.layer
    if isinstance(layer, list):
        layer = tuple(layer)
        object.__setattr__(config, "layer", layer)
    if isinstance(layer, tuple):
        plain = all(isinstance(x, int) and not isinstance(x, bool) for x in layer)
        if not layer or not plain or len(set(layer)) != len(layer):
            raise _refuse(config, "layer", "an integer, 'all', or a tuple of distinct integers")
    elif layer != "all" and (isinstance(layer, bool) or not isinstance(layer, int)):
        raise _refuse(config, "layer", "an integer, 'all', or a tuple of distinct integers")


@dataclasses.dataclass(frozen=True)
class IndexedConfig:
    """Random access by sample number; see `IndexedDataset`.

    Attributes:
        shards: Directory with `metadata.json` and the shards. `$VARS` and `~` are expanded.
        tokens: "special" ([CLS] only), "content", or "all".
        layer: A recorded layer, "all", or a tuple of layers that each sample holds side by side.
        debug: Log what is opened and read.

    Raises:
        ConfigError: A field has a bad value (it is a `ValueError`).
    """

    shards: Path = dataclasses.field(default_factory=_default_shards)
    tokens: TokenKind = "content"
    layer: LayerSpec = -2
    debug: bool = False

    def __post_init__(self) -> None:
        _check_selection(self)
        _check_bool(self, "debug")


@dataclasses.dataclass(frozen=True)
class OrderedConfig:
    """Batches in file order; see `OrderedActivations`.

    Attributes:
        shards: Directory with `metadata.json` and the shards. `$VARS` and `~` are expanded.
        tokens: "special" ([CLS] only), "content", or "all".
        layer: A recorded layer, "all", or a tuple of layers that each sample holds side by side.
        batch_size: Samples in a batch.
        batch_timeout_s: Seconds to wait for a batch before `StalledReadError`.
        drop_last: Leave out the last batch where it is not full.
        buffer_size: Batches that may be read ahead by the whole job.
        debug: Log what is opened and read.
        log_every_s: Seconds between two lines of progress in the log, with `debug`.

    Raises:
        ConfigError: A field has a bad value (it is a `ValueError`).
    """

    shards: Path = dataclasses.field(default_factory=_default_shards)
    tokens: TokenKind = "content"
    layer: LayerSpec = -2
    batch_size: int = 1024 * 16
    batch_timeout_s: float = 30.0
    drop_last: bool = False
    buffer_size: int = 64
    debug: bool = False
    log_every_s: float = 30.0

    def __post_init__(self) -> None:
        _check_selection(self)
        _check_int(self, "batch_size", 1, 2**31 - 1)
        _check_int(self, "buffer_size", 1, 2**31 - 1)
        _check_number(self, "batch_timeout_s", above=0.0)
        _check_number(self, "log_every_s", above=0.0)
        _check_bool(self, "drop_last", "debug")


@dataclasses.dataclass(frozen=True)
class ShuffledConfig:
    """Batches in a seeded random order; see `ShuffledActivations`.

    Attributes:
        shards: Directory with `metadata.json` and the shards. `$VARS` and `~` are expanded.
        tokens: "special" ([CLS] only), "content", or "all".
        layer: A recorded layer, "all", or a tuple of layers that each sample holds side by side. The default, -1,
            must be changed unless a layer -1 is recorded.
        batch_size: Samples in a batch.
        drop_last: Leave out the last batch where it is not full.
        scale_norm: Scale by one number so that the mean L2 norm of the selected samples is sqrt(d_model).
        ignore_labels: Content tokens with these labels (0..255) are left out.
        n_threads: Reading threads per process.
        buffer_size: Batches held for shuffling by the whole job, however many workers and ranks it has.
        min_buffer_fill: Share of its buffer (0.0 to 1.0) that a process loads before its first batch.
        batch_timeout_s: Seconds to wait for a batch before `StalledReadError`.
        seed: Seed of the order.
        debug: Log what is opened and read.
        log_every_s: Seconds between two lines of progress in the log, with `debug`.
        use_tmpdir: Read from a copy under `$TMPDIR`, made once per machine.
        n_lanes: Independent parts of the shuffle. A reading process serves whole lanes, so the number of reading
            processes (ranks times workers) should divide it.
        block_size: Consecutive samples that one lane reads at once; None chooses for good mixing.
        scale_samples: Samples that `scale_norm` measures, drawn with a fixed seed; None measures all of them up to
            16 GiB of activations, and of more 262,144.

    Raises:
        ConfigError: A field has a bad value (it is a `ValueError`).
    """

    shards: Path = dataclasses.field(default_factory=_default_shards)
    tokens: TokenKind = "content"
    layer: LayerSpec = -1
    batch_size: int = 1024 * 16
    drop_last: bool = False
    scale_norm: bool = False
    ignore_labels: Sequence[int] = dataclasses.field(default_factory=list)
    n_threads: int = 4
    buffer_size: int = 64
    min_buffer_fill: float = 0.0
    batch_timeout_s: float = 30.0
    seed: int = 17
    debug: bool = False
    log_every_s: float = 30.0
    use_tmpdir: bool = False
    n_lanes: int = 8
    block_size: int | None = None
    scale_samples: int | None = None

    def __post_init__(self) -> None:
        _check_selection(self)
        _check_int(self, "batch_size", 1, 2**31 - 1)
        _check_int(self, "n_threads", 1, 1024)
        _check_int(self, "buffer_size", 1, 2**31 - 1)
        _check_int(self, "seed", None)
        _check_int(self, "n_lanes", 1, 4096)
        if self.block_size is not None:
            _check_int(self, "block_size", 1, 2**31 - 1)
        if self.scale_samples is not None:
            _check_int(self, "scale_samples", 1, 2**31 - 1)
        _check_number(self, "min_buffer_fill", within=(0.0, 1.0))
        _check_number(self, "batch_timeout_s", above=0.0)
        _check_number(self, "log_every_s", above=0.0)
        _check_bool(self, "drop_last", "scale_norm", "debug", "use_tmpdir")
        labels = self.ignore_labels
        if isinstance(labels, str | bytes) or not isinstance(labels, Sequence):
            raise _refuse(self, "ignore_labels", "a list of integers from 0 to 255")
        for label in labels:
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= 255:
                raise _refuse(self, "ignore_labels", "a list of integers from 0 to 255")
        # A copy of our own: the caller's list may change after it was checked.
        object.__setattr__(self, "ignore_labels", list(labels))
        if self.ignore_labels and self.tokens == "special":
            raise ConfigError(
                "ShuffledConfig.ignore_labels: expected an empty list with tokens='special', "
                f"got {self.ignore_labels!r}; special tokens have no label, use tokens='content' or 'all'."
            )


def make_ordered_config(shuffled_cfg: ShuffledConfig, **overrides: Any) -> OrderedConfig:
    """Make the config that reads the same samples in file order.

    Args:
        shuffled_cfg: Where to take the fields from that both configs have.
        **overrides: Fields of `OrderedConfig` to set differently.

    Returns:
        An `OrderedConfig`.

    Raises:
        ConfigError: A field has a bad value.
        TypeError: `overrides` names a field that `OrderedConfig` does not have.
    """
    names = {field.name for field in dataclasses.fields(OrderedConfig)}
    shared = {f.name: getattr(shuffled_cfg, f.name) for f in dataclasses.fields(shuffled_cfg) if f.name in names}
    return OrderedConfig(**{**shared, **overrides})
