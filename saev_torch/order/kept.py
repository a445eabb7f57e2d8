"""Which content tokens labels and a mask leave, and how many of each example: arithmetic on what others read."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import FormatError

_Int64s = NDArray[np.int64]
_Rows = NDArray[np.bool_]

LabelRows = Callable[[_Int64s], NDArray[np.uint8]]
"""Reads the labels of examples: `[m] int64` example numbers to `[m, content_tokens_per_example] uint8`."""

MaskRows = Callable[[_Int64s], _Rows]
"""Reads which tokens of examples stay: `[m] int64` example numbers to `[m, content_tokens_per_example] bool`."""

# So many tokens at a time, so that memory does not follow the data.
_TOKENS_AT_ONCE = 4 << 20


@dataclasses.dataclass(frozen=True)
class Filter:
    """Leaves out content tokens with ignored labels, and those that a mask drops; either may be missing.

    Attributes:
        ignore_labels: Labels that are left out.
        read_labels, read_mask: How to read both; None where there is no such thing.
    """

    ignore_labels: Sequence[int] = ()
    read_labels: LabelRows | None = None
    read_mask: MaskRows | None = None

    def parts(self, examples: _Int64s) -> list[_Rows]:
        """What labels, and then what the mask leave of examples: `[m, content_tokens_per_example] bool` each."""
        found = []
        if self.ignore_labels and self.read_labels is not None:
            keep = np.ones(256, dtype=np.bool_)
            keep[list(self.ignore_labels)] = False
            found.append(keep[self.read_labels(examples)])
        if self.read_mask is not None:
            found.append(self.read_mask(examples))
        return found

    def rows(self, examples: _Int64s) -> _Rows:
        """What both leave of examples: `[m, content_tokens_per_example] bool`."""
        first, *others = self.parts(examples)
        for other in others:
            first = first & other
        return first

    def count(self, n: int, n_tokens: int, members: Callable[[_Int64s], _Int64s]) -> tuple[_Int64s, list[str]]:
        """Count the content tokens that are left of each of `n` examples, `[n] int64`.

        Also digest which are left, by the labels and by the mask: 16 hex digits each. `members` says which examples.
        """
        counts, digests = np.empty(n, dtype=np.int64), [hashlib.sha256() for _ in self.parts(np.empty(0, np.int64))]
        step = max(1, _TOKENS_AT_ONCE // n_tokens)
        for start in range(0, n, step):
            ordinals = np.arange(start, min(n, start + step), dtype=np.int64)
            parts = self.parts(members(ordinals))
            for digest, part in zip(digests, parts, strict=True):
                digest.update(np.packbits(part).tobytes())
            counts[ordinals] = np.logical_and.reduce(parts).sum(axis=1)
        return counts, [digest.hexdigest()[:16] for digest in digests]

    def reading_with(self, read_labels: LabelRows) -> "Filter":
        """The same, which reads labels with another function."""
        return dataclasses.replace(self, read_labels=read_labels)


def labels_changed(path: object = "labels.bin") -> FormatError:
    """The error where labels select other samples than those that were counted."""
    return FormatError(
        f"{path}: expected the labels that ignore_labels selected by, got others: it was written while it was in use; "
        "start again, so that samples are counted anew."
    )


def mask_changed(path: object = "mask") -> FormatError:
    """The error where a mask selects other samples than those that were counted."""
    return FormatError(
        f"{path}: expected the mask that samples were selected by, got another: it was written while it was in use; "
        "start again, so that samples are counted anew."
    )
