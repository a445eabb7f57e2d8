"""The three configs: what to read, in which order, with how much memory.

Field names, defaults and meanings are those of the published `saev.data` API; fields of our own stand behind them.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

from saev_torch.errors import ConfigError
from saev_torch.format import plain
from saev_torch.format.examples import Examples
from saev_torch.format.rules import (
    RULES,
    SECONDS,
    ActDtype,
    OrderKind,
    ScaleNorm,
    TokenKind,
)

_log = logging.getLogger("saev_torch")

_SHARDS = Path("$SAEV_SCRATCH/saev/shards/abcdefg")


@plain.told_simply
@dataclasses.dataclass(frozen=True, eq=False)
class _Config:
    """The fields that every config begins with; all fields are checked when it is made."""

    shards: plain.GivenPath = _SHARDS  # type: ignore[assignment]
    tokens: TokenKind = "content"
    layer: plain.GivenLayer = -2  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", self._expand("shards"))
        # These stand behind the published fields of each config.
        if getattr(self, "mask", None) is not None:
            object.__setattr__(self, "mask", self._expand("mask"))
        if isinstance(examples := getattr(self, "examples", None), Mapping):
            object.__setattr__(self, "examples", Examples.from_dict(examples))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in RULES and not (value is None and field.default is None):
                expected, is_right = RULES[field.name]
                value = plain.as_plain(value)
                if not is_right(value):
                    raise self._refuse(field.name, expected)
                # A list is a copy of our own: the caller's may change after it was checked.
                is_several = field.name == "layer" and isinstance(value, list)
                object.__setattr__(self, field.name, tuple(value) if is_several else value)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields with JSON's types only, for `from_dict`: a path as a string, infinity as "inf"."""
        return {field.name: plain.as_json(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Make a config from what `to_dict` returned; what is left out has its default.

        Raises:
            ConfigError: There is another key than the fields, or a field has a bad value.
        """
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{cls.__name__}.from_dict: expected a dict of fields, got {type(fields).__name__}.")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [plain.name_unknown(key, names) for key in fields if key not in names]
        if unknown:
            raise ConfigError(
                f"{cls.__name__}.from_dict: expected the fields of {cls.__name__}, got unknown {', '.join(unknown)}; "
                "rename or remove them."
            )
        return cls(**{key: _from_json(key, value) for key, value in fields.items()})

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(tuple(value) if isinstance(value, list) else value for value in values)

    def _expand(self, field: str) -> Path:
        value = getattr(self, field)
        if isinstance(value, str | os.PathLike) and os.fspath(value):
            expanded = os.path.expandvars(os.fspath(value))
            if isinstance(expanded, str) and "\0" not in expanded:
                try:
                    return Path(expanded).expanduser()
                except RuntimeError as err:
                    raise ConfigError(
                        f"{type(self).__name__}.{field}: expected a path, got {expanded!r}, whose ~ stands for no home "
                        "directory: HOME is not set, or there is no such user; set HOME, or write the path in full."
                    ) from err
        raise self._refuse(field, "a path")

    def _refuse(self, field: str, expected: str) -> ConfigError:
        got = getattr(self, field)
        return ConfigError(f"{type(self).__name__}.{field}: expected {expected}, got {got!r}; change that field.")


def _from_json(field: str, value: Any) -> Any:
    return math.inf if value == "inf" and RULES.get(field) is SECONDS else value


@plain.told_simply
@dataclasses.dataclass(frozen=True, eq=False)
class IndexedConfig(_Config):
    """Random access by sample number; see `IndexedDataset`.

    Attributes:
        shards: Directory with `metadata.json` and the shards. `$VARS` and `~` are expanded.
        tokens: "special" ([CLS] only), "content", or "all".
        layer: A recorded layer, "all", or a tuple of layers that each sample holds side by side.
        debug: Log what is opened and read.
        act_dtype: "float32", or "stored" for activations of the type that the shards have.
        examples: Which examples to use; None for all. Their numbers in batches stay those of the directory.
        mask: A `.npy` file of bool `[n_examples, content_tokens_per_example]`: content tokens that are False are left
            out. `$VARS` and `~` are expanded; None for no mask.
        allow_links: Follow symbolic links in the directory to regular files, wherever they lead; else they are refused.

    Raises:
        ConfigError: A field has a bad value (it is a `ValueError`).
    """

    # Declared again, because mypy takes an inherited field for what it takes, not for what it holds.
    shards: plain.GivenPath = _SHARDS  # type: ignore[assignment]
    layer: plain.GivenLayer = -2  # type: ignore[assignment]
    debug: bool = False
    act_dtype: ActDtype = "float32"
    examples: Examples | None = None
    mask: plain.GivenPathOrNone = None  # type: ignore[assignment]
    allow_links: bool = False


@plain.told_simply
@dataclasses.dataclass(frozen=True, eq=False)
class OrderedConfig(_Config):
    """Batches in file order; see `OrderedActivations`.

    Attributes:
        shards, tokens, layer, act_dtype, examples, mask: What to read; see `IndexedConfig`.
        buffer_size: Batches that may be read ahead by the whole job.
        batch_size, batch_timeout_s, drop_last, debug, log_every_s: As in `ShuffledConfig`.
        allow_links: As in `IndexedConfig`.
        scale: As in `ShuffledConfig`.

    Errors are those of `IndexedConfig`.
    """

    shards: plain.GivenPath = _SHARDS  # type: ignore[assignment]
    layer: plain.GivenLayer = -2  # type: ignore[assignment]
    batch_size: int = 1024 * 16
    batch_timeout_s: float = 30.0
    drop_last: bool = False
    buffer_size: int = 64
    debug: bool = False
    log_every_s: float = 30.0
    act_dtype: ActDtype = "float32"
    examples: Examples | None = None
    mask: plain.GivenPathOrNone = None  # type: ignore[assignment]
    allow_links: bool = False
    scale: float | None = None


@plain.told_simply
@dataclasses.dataclass(frozen=True, eq=False)
class ShuffledConfig(_Config):
    """Batches in a seeded random order; see `ShuffledActivations`.

    Attributes:
        shards, tokens, layer: What to read; see `IndexedConfig`. The default layer, -1, must be changed unless a layer
            -1 is recorded.
        batch_size: Samples in a batch.
        drop_last: Leave out the last batch where it is not full.
        scale_norm: Scale by one number so that the mean L2 norm of the selected samples is sqrt(d_model); with "median"
            the median norm, to 0.1%, which a few huge norms do not move. `dataset.scale` is the number.
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
        order: "blocks" reads blocks of samples, and mixes them in a buffer. "uniform" draws one permutation of all
            samples, and reads each sample alone: perfect mixing without a buffer, fast where memory holds the data.
            Then `buffer_size`, `n_lanes` and `block_size` do not matter.
        act_dtype: "float32", or "stored" for the type that the shards have: 16 bits take half the memory.
        examples, mask: Which examples and tokens to use; see `IndexedConfig`. With `ignore_labels` both must keep it.
        allow_links: As in `IndexedConfig`.
        scale: Multiply activations with this number, rounded to float32, and measure none: `dataset.scale` of another
            run, so that held-out data are scaled as training was. None for what `scale_norm` says.

    Errors are those of `IndexedConfig`.
    """

    shards: plain.GivenPath = _SHARDS  # type: ignore[assignment]
    layer: plain.GivenLayer = -1  # type: ignore[assignment]
    batch_size: int = 1024 * 16
    drop_last: bool = False
    scale_norm: ScaleNorm = False
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
    order: OrderKind = "blocks"
    act_dtype: ActDtype = "float32"
    examples: Examples | None = None
    mask: plain.GivenPathOrNone = None  # type: ignore[assignment]
    allow_links: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and self.scale_norm:
            raise ConfigError(
                f"ShuffledConfig.scale: expected None with scale_norm={self.scale_norm!r}, which measures a number of "
                f"its own, got {self.scale!r}; set scale_norm=False to scale by that number."
            )
        if self.ignore_labels and self.tokens == "special":
            raise ConfigError(
                "ShuffledConfig.ignore_labels: expected an empty list with tokens='special', "
                f"got {self.ignore_labels!r}; special tokens have no label, use tokens='content' or 'all'."
            )


BatchConfig: TypeAlias = OrderedConfig | ShuffledConfig
"""The config of a data set of batches."""


def make_ordered_config(shuffled_cfg: ShuffledConfig, **overrides: Any) -> OrderedConfig:
    """Make the config that reads the same samples in file order.

    A `scale` goes with it. What `scale_norm` measures is known to the data set only, so give its number:
    `make_ordered_config(cfg, scale=dataset.scale)`, for held-out data too; without it activations are not scaled, and a
    line of the log says so.

    Args:
        shuffled_cfg: Where to take the fields from that both configs have.
        **overrides: Fields of `OrderedConfig` to set differently.

    Returns:
        An `OrderedConfig`.

    Raises:
        ConfigError: A field has a bad value.
        TypeError: `overrides` names a field that `OrderedConfig` does not have.
    """
    if not isinstance(shuffled_cfg, ShuffledConfig):
        got = f"an object of type {type(shuffled_cfg).__name__}"
        raise ConfigError(f"make_ordered_config: expected a config of type ShuffledConfig, got {got}; give it one.")
    names = {field.name for field in dataclasses.fields(OrderedConfig)}
    shared = {f.name: getattr(shuffled_cfg, f.name) for f in dataclasses.fields(shuffled_cfg) if f.name in names}
    if shuffled_cfg.scale_norm and "scale" not in overrides:
        _log.warning(
            "make_ordered_config: expected scale= for a config with scale_norm=%r, got none, so activations are not "
            "scaled; give it the number of the data set: make_ordered_config(cfg, scale=dataset.scale)",
            shuffled_cfg.scale_norm,
        )
    return OrderedConfig(**{**shared, **overrides})
