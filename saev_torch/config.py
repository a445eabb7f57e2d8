"""The three configs: what to read, in which order, with how much memory.

Field names, defaults and meanings are those of the published `saev.data` API; fields of our own stand behind them.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from saev_torch.errors import ConfigError

TokenKind: TypeAlias = Literal["special", "content", "all"]
"""Which tokens of an example are samples: [CLS] only, the content tokens, or both."""

LayerSpec: TypeAlias = int | Literal["all"] | tuple[int, ...]
"""One layer, every layer as samples of their own ("all"), or several layers side by side in each sample."""


def is_integer(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether a value is an integer in these bounds; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_layer(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) > 0 and all(map(is_integer, value)) and len(set(value)) == len(value)
    return value == "all" or is_integer(value)


def _is_labels(value: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return is_list and all(is_integer(label, 0, 255) for label in value)


_Rule = tuple[str, Callable[[Any], bool]]
"""What is expected of a field, and whether a value is that."""


def _count(most: int = 2**31 - 1) -> _Rule:
    return f"an integer of at least 1 and at most {most}", lambda value: is_integer(value, 1, most)


_FLAG: _Rule = "True or False", lambda value: isinstance(value, bool)
_SECONDS: _Rule = "a number above 0.0", lambda value: _is_number(value) and value > 0
# By the name of the field, which means the same in every config.
_RULES: dict[str, _Rule] = {
    "tokens": ("'special', 'content' or 'all'", lambda value: value in ("special", "content", "all")),
    "layer": ("an integer, 'all', or a tuple of distinct integers", _is_layer),
    "batch_size": _count(),
    "buffer_size": _count(),
    "n_threads": _count(1024),
    "n_lanes": _count(4096),
    "block_size": _count(),
    "scale_samples": _count(),
    "seed": ("an integer", is_integer),
    "min_buffer_fill": ("a number from 0.0 to 1.0", lambda value: _is_number(value) and 0 <= value <= 1),
    "batch_timeout_s": _SECONDS,
    "log_every_s": _SECONDS,
    "drop_last": _FLAG,
    "scale_norm": _FLAG,
    "debug": _FLAG,
    "use_tmpdir": _FLAG,
    "ignore_labels": ("a list of integers from 0 to 255", _is_labels),
}


@dataclasses.dataclass(frozen=True)
class _Config:
    """The fields that every config begins with; all fields are checked when it is made."""

    shards: Path = Path("$SAEV_SCRATCH/saev/shards/abcdefg")
    tokens: TokenKind = "content"
    layer: LayerSpec = -2

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", self._expand_shards())
        if isinstance(self.layer, list):
            object.__setattr__(self, "layer", tuple(self.layer))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _RULES and not (value is None and field.default is None):
                expected, is_right = _RULES[field.name]
                if not is_right(value):
                    raise self._refuse(field.name, expected)

    def _expand_shards(self) -> Path:
        if isinstance(self.shards, str | os.PathLike) and os.fspath(self.shards):
            expanded = os.path.expandvars(os.fspath(self.shards))
            if isinstance(expanded, str) and "\0" not in expanded:
                return Path(expanded).expanduser()
        raise self._refuse("shards", "a path")

    def _refuse(self, field: str, expected: str) -> ConfigError:
        got = getattr(self, field)
        return ConfigError(f"{type(self).__name__}.{field}: expected {expected}, got {got!r}; change that field.")


@dataclasses.dataclass(frozen=True)
class IndexedConfig(_Config):
    """Random access by sample number; see `IndexedDataset`.

    Attributes:
        shards: Directory with `metadata.json` and the shards. `$VARS` and `~` are expanded.
        tokens: "special" ([CLS] only), "content", or "all".
        layer: A recorded layer, "all", or a tuple of layers that each sample holds side by side.
        debug: Log what is opened and read.

    Raises:
        ConfigError: A field has a bad value (it is a `ValueError`).
    """

    debug: bool = False


@dataclasses.dataclass(frozen=True)
class OrderedConfig(_Config):
    """Batches in file order; see `OrderedActivations`.

    Attributes:
        shards, tokens, layer: What to read; see `IndexedConfig`.
        buffer_size: Batches that may be read ahead by the whole job.
        batch_size, batch_timeout_s, drop_last, debug, log_every_s: As in `ShuffledConfig`.

    Errors are those of `IndexedConfig`.
    """

    batch_size: int = 1024 * 16
    batch_timeout_s: float = 30.0
    drop_last: bool = False
    buffer_size: int = 64
    debug: bool = False
    log_every_s: float = 30.0


@dataclasses.dataclass(frozen=True)
class ShuffledConfig(_Config):
    """Batches in a seeded random order; see `ShuffledActivations`.

    Attributes:
        shards, tokens, layer: What to read; see `IndexedConfig`. The default layer, -1, must be changed unless a layer
            -1 is recorded.
        batch_size: Samples in a batch.
        drop_last: Leave out the last batch where it is not full.
        scale_norm: Scale by one number so that the mean L2 norm of the selected samples is sqrt(d_model).
        ignore_labels: Content tokens with these labels (0..255) are left out.
        n_threads: Reading threads per process.
        buffer_size: Batches held for shuffling by the whole job, however many workers and ranks it has.
        min_buffer_fill: Share of its buffer (0.0 to 1.0) that a process loads before its first batch.
        batch_timeout_s: Seconds without a batch, and without a read that finishes, before `StalledReadError`.
        seed: Seed of the order.
        debug: Log what is opened and read.
        log_every_s: Seconds between two lines of progress in the log, with `debug`; and between two warnings while a
            batch is waited for so long.
        use_tmpdir: Read from a copy under `$TMPDIR`, made once per machine; without `$TMPDIR` warn, and read in place.
        n_lanes: Independent parts of the shuffle. A reading process serves whole lanes, so the number of reading
            processes (ranks times workers) should divide it.
        block_size: Consecutive samples that one lane reads at once; None chooses for good mixing.
        scale_samples: Samples that `scale_norm` measures, drawn with a fixed seed; None measures all of them up to
            16 GiB of activations, and of more 262,144.

    Errors are those of `IndexedConfig`.
    """

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
        super().__post_init__()
        # A copy of our own: the caller's list may change after it was checked.
        object.__setattr__(self, "ignore_labels", list(self.ignore_labels))
        if self.ignore_labels and self.tokens == "special":
            raise ConfigError(
                "ShuffledConfig.ignore_labels: expected an empty list with tokens='special', "
                f"got {self.ignore_labels!r}; special tokens have no label, use tokens='content' or 'all'."
            )


BatchConfig: TypeAlias = OrderedConfig | ShuffledConfig
"""The config of a data set of batches."""


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
