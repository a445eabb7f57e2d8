"""What the fields of configs may be."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from saev_torch.format.examples import Examples

ActDtype: TypeAlias = Literal["float32", "stored"]
"""What activations are in memory: float32 whatever is stored, or what is stored."""

TokenKind: TypeAlias = Literal["special", "content", "all"]
"""Which tokens of an example are samples: [CLS] only, the content tokens, or both."""

LayerSpec: TypeAlias = int | Literal["all"] | Sequence[int]
"""One layer, every layer as samples of their own ("all"), or several layers side by side in each sample."""

OrderKind: TypeAlias = Literal["blocks", "uniform"]
"""How an epoch is shuffled: blocks of samples that a buffer mixes, or one permutation of all samples."""

ScaleNorm: TypeAlias = bool | Literal["median"]
"""What is scaled to sqrt(d_model): no norm, the mean norm (True), or the median norm."""


def is_integer(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether a value is an integer in these bounds; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_layer(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) > 0 and all(map(is_integer, value)) and len(set(value)) == len(value)
    return value == "all" or is_integer(value)


def _is_labels(value: Any) -> bool:
    return isinstance(value, list) and all(is_integer(label, 0, 255) for label in value)


Rule: TypeAlias = tuple[str, Callable[[Any], bool]]
"""What is expected of a field, and whether a value is that; it is asked of values as `plain.as_plain` returns them."""


def _count(most: int = 2**31 - 1) -> Rule:
    return f"an integer of at least 1 and at most {most}", lambda value: is_integer(value, 1, most)


_FLAG: Rule = "True or False", lambda value: isinstance(value, bool)
SECONDS: Rule = "a number above 0.0", lambda value: _is_number(value) and value > 0
# What float32 rounds to a normal number.
_SCALE: Rule = (
    "a number above 0.0 that float32 holds",
    lambda value: _is_number(value) and 2**-126 <= value < 2**128 - 2**103,
)
RULES: dict[str, Rule] = {
    "tokens": ("'special', 'content' or 'all'", lambda value: value in ("special", "content", "all")),
    "layer": ("an integer, 'all', or a sequence of distinct integers", _is_layer),
    "act_dtype": ("'float32' or 'stored'", lambda value: value in ("float32", "stored")),
    "batch_size": _count(),
    "buffer_size": _count(),
    "n_threads": _count(1024),
    "n_lanes": _count(4096),
    "block_size": _count(),
    "scale_samples": _count(),
    "seed": ("an integer", is_integer),
    "min_buffer_fill": ("a number from 0.0 to 1.0", lambda value: _is_number(value) and 0 <= value <= 1),
    "batch_timeout_s": SECONDS,
    "log_every_s": SECONDS,
    "drop_last": _FLAG,
    "scale": _SCALE,
    "scale_norm": ("True, False or 'median'", lambda value: isinstance(value, bool) or value == "median"),
    "debug": _FLAG,
    "use_tmpdir": _FLAG,
    "examples": ("Examples", lambda value: isinstance(value, Examples)),
    "order": ("'blocks' or 'uniform'", lambda value: value in ("blocks", "uniform")),
    "allow_links": _FLAG,
    "ignore_labels": ("a list of integers from 0 to 255", _is_labels),
}
"""By the name of the field, which means the same in every config."""
