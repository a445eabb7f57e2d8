"""Which samples a config selects, and how they are numbered: integer arithmetic only.

A *cell* is a position on the grid (example, layer, stored token) that a config looks at; a *sample* is a selected
cell. Samples are numbered 0..n-1 in the order of the bytes on disk. With one layer (or several side by side) the
grid has one layer; with `layer="all"` it has all of them.

    cell = (example_idx * n_grid_layers + layer_idx) * tokens_per_example + token
"""

import copy
import dataclasses
import hashlib
import operator
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from saev_torch.config import ActDtype, LayerSpec, TokenKind
from saev_torch.errors import ConfigError, FormatError
from saev_torch.format.dtypes import loaded_type
from saev_torch.format.metadata import Metadata
from saev_torch.order.runs import expand_runs

_Int64s = NDArray[np.int64]

LabelRows = Callable[[_Int64s], NDArray[np.uint8]]
"""Reads the labels of examples: `[m] int64` example numbers to `[m, content_tokens_per_example] uint8`."""


def resolve_layers(md: Metadata, layer: LayerSpec) -> tuple[int, ...]:
    """Find the positions of layers in `md.layers`: by value, else a negative one counts from the end of that list."""
    if layer == "all":
        return tuple(range(len(md.layers)))
    wanted = layer if isinstance(layer, tuple) else (layer,)
    found = []
    for one in wanted:
        if one in md.layers:
            found.append(md.layers.index(one))
        elif isinstance(one, int) and -len(md.layers) <= one < 0:
            found.append(len(md.layers) + one)
        else:
            raise ConfigError(f"layer: expected one of the recorded layers {list(md.layers)}, got {one!r}; choose one.")
    if len(set(found)) != len(found):
        raise ConfigError(f"layer: {layer!r} names one of the recorded layers {list(md.layers)} twice; name each once.")
    return tuple(found)


def count_kept(md: Metadata, ignore_labels: Sequence[int], read: LabelRows) -> tuple[_Int64s, str]:
    """Count the content tokens that are left of each example, `[n_examples]`, and digest which: 16 hex digits."""
    keep, digest = _keep(ignore_labels), hashlib.sha256()
    counts = np.empty(md.n_examples, dtype=np.int64)
    # 4 MB of labels at a time, so that memory does not follow the data.
    step = max(1, (4 << 20) // md.content_tokens_per_example)
    for start in range(0, md.n_examples, step):
        examples = np.arange(start, min(md.n_examples, start + step), dtype=np.int64)
        is_kept = keep[read(examples)]
        counts[examples] = is_kept.sum(axis=1)
        digest.update(np.packbits(is_kept).tobytes())
    return counts, digest.hexdigest()[:16]


def _keep(ignore_labels: Sequence[int]) -> NDArray[np.bool_]:
    keep = np.ones(256, dtype=np.bool_)
    keep[list(ignore_labels)] = False
    return keep


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What `ignore_labels` leaves: labels, `[256] bool`, and how many samples are before each example, and in all."""

    keep: NDArray[np.bool_]
    first_sample: _Int64s
    read: LabelRows


class Selection:
    """The samples that (tokens, layer, ignored labels) select. A `ConfigError` names what was not recorded.

    Attributes:
        layer_idxs: Positions in `md.layers` of the layers that are read.
        layer_is_all: Whether every layer is a sample of its own.
        n_parts: Rows on disk that make one sample: the number of layers side by side, else 1.
        sample_nbytes: Bytes of one sample's activations on disk.
        act_type, act_nbytes: Type of the values in memory, and bytes of one sample's activations there.
        has_parts: Whether layers are side by side in a sample, be it only one: then its parts are an axis of it.
        kept_digest: Digest of which content tokens are left of each example; None where no labels are ignored.
    """

    def __init__(
        self,
        md: Metadata,
        tokens: TokenKind,
        layer: LayerSpec,
        ignore_labels: Sequence[int] = (),
        read_labels: LabelRows | None = None,
        act_dtype: ActDtype = "float32",
    ) -> None:
        self.md, self.tokens, self.ignore_labels = md, tokens, ignore_labels
        self.layer_idxs = resolve_layers(md, layer)
        self.layer_is_all = layer == "all"
        self.n_grid_layers = len(self.layer_idxs) if layer == "all" else 1
        self.n_parts = 1 if layer == "all" else len(self.layer_idxs)
        self.has_parts = isinstance(layer, tuple)
        self.sample_nbytes = self.n_parts * md.row_nbytes
        self.act_type = loaded_type(md.value_type, act_dtype)
        self.act_nbytes = self.n_parts * md.loaded_row_nbytes(act_dtype)
        self.n_special = int(md.cls_token)
        if tokens == "special" and not md.cls_token:
            raise ConfigError(
                "tokens: expected 'content' or 'all' for shards without a [CLS] token, got 'special'; "
                "metadata.json has cls_token = false."
            )
        self._first_token = self.n_special if tokens == "content" else 0
        n_tokens = {"special": 1, "content": md.content_tokens_per_example, "all": md.tokens_per_example}
        self._n_tokens = n_tokens[tokens]
        self.n_samples = md.n_examples * self.n_grid_layers * self._n_tokens
        self.kept_digest: str | None = None
        self._kept: _Kept | None = None
        if ignore_labels:
            if read_labels is None:
                raise ConfigError("ignore_labels: expected labels.bin with the shards, got none; leave it empty.")
            counts, self.kept_digest = count_kept(md, ignore_labels, read_labels)
            counts += self.n_special if tokens == "all" else 0
            first_sample = np.append(0, np.cumsum(counts)) * self.n_grid_layers
            self._kept = _Kept(_keep(ignore_labels), first_sample, read_labels)
            self.n_samples = int(first_sample[-1])
            if not self.n_samples:
                raise ConfigError(
                    f"ignore_labels: expected that samples are left, got {sorted(set(ignore_labels))}, which are the "
                    "labels of all tokens; ignore fewer."
                )

    def reading_with(self, read_labels: LabelRows) -> "Selection":
        """The same selection, which reads labels with another function."""
        other = copy.copy(self)
        if self._kept is not None:
            other._kept = dataclasses.replace(self._kept, read=read_labels)
        return other

    def cells(self, samples: _Int64s) -> _Int64s:
        """Map sample numbers `[m]` to cells `[m]`.

        With ignored labels this reads the labels of the examples concerned, once for each run of samples that stay
        in one example, so samples in blocks are cheap.
        """
        if self._kept is not None:
            return self._kept_cells(self._kept, samples)
        if self._n_tokens == self.md.tokens_per_example:
            return samples
        rows = samples // self._n_tokens
        return samples + rows * (self.md.tokens_per_example - self._n_tokens) + self._first_token

    def _kept_cells(self, kept: _Kept, samples: _Int64s) -> _Int64s:
        if not len(samples):
            return samples
        n_layers, width = self.n_grid_layers, self.md.tokens_per_example
        heads = np.flatnonzero(np.diff(samples, prepend=samples[0] - 2) != 1)
        starts = samples[heads]
        stops = starts + np.diff(np.append(heads, len(samples)))
        # Each run of samples is cut where another page, one layer of one example, begins.
        first_page, last_page = self._pages(kept, starts), self._pages(kept, stops - 1)
        n_pages = last_page - first_page + 1
        pages = expand_runs(first_page, n_pages)
        examples, layers = np.divmod(pages, n_layers)
        group_starts = np.flatnonzero(np.diff(examples, prepend=-1))
        mask = self._mask(kept, examples[group_starts])
        tokens = np.flatnonzero(mask)
        per_group = mask.sum(axis=1)
        n_examples = np.diff(np.append(group_starts, len(pages)))
        group_first = np.repeat(np.cumsum(per_group) - per_group, n_examples)
        per_page = np.repeat(per_group, n_examples)
        first = kept.first_sample[examples] + layers * per_page
        start = np.maximum(first, np.repeat(starts, n_pages))
        length = np.minimum(first + per_page, np.repeat(stops, n_pages)) - start
        # `tokens` counts on from group to group, cells from page to page.
        shift = (pages - np.repeat(np.arange(len(group_starts)), n_examples)) * width
        cells: _Int64s = tokens[expand_runs(group_first + start - first, length)] + np.repeat(shift, length)
        return cells

    def _pages(self, kept: _Kept, samples: _Int64s) -> _Int64s:
        """The page, `example * n_grid_layers + layer`, that each sample is on."""
        examples = np.searchsorted(kept.first_sample, samples, side="right") - 1
        if self.n_grid_layers == 1:
            return examples
        first = kept.first_sample[examples]
        per_page = (kept.first_sample[examples + 1] - first) // self.n_grid_layers
        return examples * self.n_grid_layers + (samples - first) // per_page

    def _mask(self, kept: _Kept, examples: _Int64s) -> NDArray[np.bool_]:
        """Which stored tokens of these examples are selected: `[m, tokens_per_example] bool`."""
        mask = np.zeros((len(examples), self.md.tokens_per_example), dtype=np.bool_)
        mask[:, self.n_special :] = kept.keep[kept.read(examples)]
        mask[:, : self.n_special] = self.tokens == "all"
        counted = kept.first_sample[examples + 1] - kept.first_sample[examples]
        if not np.array_equal(mask.sum(axis=1) * self.n_grid_layers, counted):
            raise labels_changed()
        return mask

    def samples(self, cells: _Int64s) -> _Int64s:
        """Map cells `[m] int64` back to sample numbers `[m] int64`; -1 where a cell is not selected."""
        example, layer, token = self.split(cells)
        if self._kept is None:
            offset = token - self._first_token
            found = (example * self.n_grid_layers + layer) * self._n_tokens + offset
            return np.where((offset >= 0) & (offset < self._n_tokens), found, -1)
        mask = self._mask(self._kept, example)
        rank = np.cumsum(mask, axis=1)
        at = np.arange(len(cells))
        found = self._kept.first_sample[example] + layer * rank[:, -1] + rank[at, token] - 1
        return np.where(mask[at, token], found, -1)

    def split(self, cells: _Int64s) -> tuple[_Int64s, _Int64s, _Int64s]:
        """Split cells `[m]` into example numbers, grid layers and stored tokens (0 is [CLS] if there is one)."""
        width = self.md.tokens_per_example
        rows = cells // width
        tokens = cells - rows * width
        if self.n_grid_layers == 1:
            return rows, np.zeros_like(rows), tokens
        examples = rows // self.n_grid_layers
        return examples, rows - examples * self.n_grid_layers, tokens

    def columns(self, cells: _Int64s) -> dict[str, _Int64s]:
        """What a batch says of cells `[m]`: `example_idx`, `token_idx` and, if each is a sample of its own, `layer`."""
        examples, layers, tokens = self.split(cells)
        found = {"example_idx": examples, "token_idx": tokens - self.n_special}
        if self.layer_is_all:
            found["layer"] = np.array(self.md.layers, dtype=np.int64)[layers]
        return found

    def find(self, example_idx: int, token_idx: int, layer: int | None) -> int:
        """Number of the sample of which a batch says this.

        Raises:
            IndexError: There is no such sample.
        """
        md, token, layer_idx = self.md, token_idx + self.n_special, 0
        if self.layer_is_all:
            layer_idx = md.layers.index(layer) if layer in md.layers else -1
        inside = 0 <= example_idx < md.n_examples and 0 <= token < md.tokens_per_example and layer_idx >= 0
        cell = (example_idx * self.n_grid_layers + layer_idx) * md.tokens_per_example + token
        sample = int(self.samples(np.array([cell], dtype=np.int64))[0]) if inside else -1
        if sample < 0:
            raise IndexError(
                f"example {example_idx}, token {token_idx}, layer {layer}: this selection has no such sample."
            )
        return sample

    def disk_rows(self, cells: _Int64s) -> tuple[_Int64s, _Int64s]:
        """Where the first part of each sample is: shard numbers `[m]` and rows of `d_model` values in the shard `[m]`.

        Part p of a sample is `(layer_idxs[p] - layer_idxs[0]) * tokens_per_example` rows further on.
        """
        examples, layers, tokens = self.split(cells)
        per_shard = self.md.examples_per_shard
        shards = examples // per_shard
        in_shard = examples - shards * per_shard
        if not self.layer_is_all:
            layers = layers + self.layer_idxs[0]
        return shards, (in_shard * len(self.md.layers) + layers) * self.md.tokens_per_example + tokens


def labels_changed(path: object = "labels.bin") -> FormatError:
    """The error where labels select other samples than those that were counted."""
    return FormatError(
        f"{path}: expected the labels that ignore_labels selected by, got others: it was written while it was in use; "
        "start again, so that samples are counted anew."
    )


@dataclasses.dataclass(frozen=True)
class Index:
    """Where one sample is.

    Attributes:
        idx: Number of the sample.
        example_idx: Number of the example in the data set.
        content_token_idx: Content token, from 0; -1 for a special token.
        shard_idx: Number of the shard.
        example_idx_in_shard: Number of the example in the shard.
        layer_idx_in_shard: Position of the layer in `Metadata.layers`.
        token_idx_in_shard: Stored token, where 0 is [CLS] if there is one.
    """

    idx: int
    example_idx: int
    content_token_idx: int
    shard_idx: int
    example_idx_in_shard: int
    layer_idx_in_shard: int
    token_idx_in_shard: int


class IndexMap:
    """Numbers the samples of a selection, and finds each on disk.

    Args:
        md: Metadata of the shards.
        tokens: "special", "content" or "all".
        layer: A layer, "all", or a tuple of layers (the index then names the first).

    Raises:
        ConfigError: The layer was not recorded, or special tokens are asked for and none were recorded.
    """

    def __init__(self, md: Metadata, tokens: TokenKind, layer: LayerSpec) -> None:
        if tokens not in ("special", "content", "all"):
            raise ConfigError(f"tokens: expected 'special', 'content' or 'all', got {tokens!r}; choose one of them.")
        self.md, self.tokens, self.layer = md, tokens, layer
        self._selection = Selection(md, tokens, layer)

    def __len__(self) -> int:
        return self._selection.n_samples

    def from_global(self, i: int) -> Index:
        """Find sample `i`.

        Raises:
            IndexError: `i` is negative or not below `len(self)`.
        """
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} is out of range: this selection has {len(self)} samples, from 0.")
        selection = self._selection
        cells = selection.cells(np.array([i], dtype=np.int64))
        example, layer, token = (int(x[0]) for x in selection.split(cells))
        shard, in_shard = divmod(example, self.md.examples_per_shard)
        return Index(i, example, token - selection.n_special, shard, in_shard, selection.layer_idxs[layer], token)
