"""Which samples a config selects, and how they are numbered: integer arithmetic only.

A *cell* is a position on the grid (example, layer, stored token) that a config looks at; a *sample* is a selected
cell. Samples are numbered 0..n-1 in the order of the bytes on disk. With one layer (or several side by side) the
grid has one layer; with `layer="all"` it has all of them.

    cell = (example_idx * n_grid_layers + layer_idx) * tokens_per_example + token
"""

import copy
import dataclasses
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import ConfigError, LabelsNotFoundError
from saev_torch.format.dtypes import loaded_type
from saev_torch.format.examples import Examples
from saev_torch.format.metadata import Metadata
from saev_torch.format.rules import ActDtype, LayerSpec, TokenKind
from saev_torch.order.examples import make_subset
from saev_torch.order.kept import Filter, LabelRows, MaskRows, labels_changed, mask_changed
from saev_torch.order.permute import divide
from saev_torch.order.runs import expand_runs

_Int64s = NDArray[np.int64]


def resolve_layers(md: Metadata, layer: LayerSpec) -> tuple[int, ...]:
    """Find the positions of layers in `md.layers`: by value, else a negative one counts from the end of that list."""
    if layer == "all":
        return tuple(range(len(md.layers)))
    wanted: Sequence[object] = layer if isinstance(layer, tuple | list) else (layer,)
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


class Selection:
    """The samples that (tokens, layer, ignored labels, examples, mask) select.

    A `ConfigError` names what was not recorded. Examples that are selected, *members*, are counted by *ordinals*.

    Attributes:
        n_examples: Examples that are selected.
        layer_idxs: Positions in `md.layers` of the layers that are read.
        layer_is_all: Whether every layer is a sample of its own.
        n_parts: Rows on disk that make one sample: the number of layers side by side, else 1.
        sample_nbytes: Bytes of one sample's activations on disk.
        act_type, act_nbytes: Type of the values in memory, and bytes of one sample's activations there.
        has_parts: Whether layers are side by side in a sample, be it only one: then its parts are an axis of it.
        kept_digest: Digest of which content tokens the labels leave of each example; None where none are ignored.
        mask_digest: The same of the mask; None without one.
    """

    def __init__(
        self,
        md: Metadata,
        tokens: TokenKind,
        layer: LayerSpec,
        ignore_labels: Sequence[int] = (),
        read_labels: LabelRows | None = None,
        act_dtype: ActDtype = "float32",
        examples: Examples | None = None,
        read_mask: MaskRows | None = None,
    ) -> None:
        self.md, self.tokens, self.ignore_labels, self.examples = md, tokens, ignore_labels, examples
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
        self._subset = None if examples is None else make_subset(examples, md.n_examples)
        self.n_examples = md.n_examples if self._subset is None else self._subset.n
        self.n_samples = self.n_examples * self.n_grid_layers * self._n_tokens
        self.kept_digest: str | None = None
        self.mask_digest: str | None = None
        self._filter: Filter | None = None
        # Samples before each member, and in all.
        self._first_sample = np.empty(0, dtype=np.int64)
        # Special tokens are left alone.
        read_mask = None if tokens == "special" else read_mask
        if ignore_labels and read_labels is None:
            raise LabelsNotFoundError("ignore_labels: expected labels.bin with the shards, got none; leave it empty")
        if ignore_labels or read_mask is not None:
            self._count(Filter(ignore_labels, read_labels, read_mask))

    def _count(self, found: Filter) -> None:
        counts, digests = found.count(self.n_examples, self.md.content_tokens_per_example, self._members)
        self.kept_digest = digests[0] if found.ignore_labels else None
        self.mask_digest = None if found.read_mask is None else digests[-1]
        counts += self.n_special if self.tokens == "all" else 0
        self._filter, self._first_sample = found, np.append(0, np.cumsum(counts)) * self.n_grid_layers
        self.n_samples = int(self._first_sample[-1])
        if not self.n_samples:
            if self.mask_digest is not None:
                raise ConfigError("mask: expected that samples are left, got a mask that drops all; make another.")
            raise ConfigError(
                f"ignore_labels: expected that samples are left, got {sorted(set(found.ignore_labels))}, which are the "
                "labels of all tokens; ignore fewer."
            )

    @property
    def digests(self) -> tuple[str | None, str | None]:
        """Of what labels and a mask leave."""
        return self.kept_digest, self.mask_digest

    def reading_with(self, read_labels: LabelRows) -> "Selection":
        """The same selection, which reads labels with another function."""
        other = copy.copy(self)
        if self._filter is not None:
            other._filter = self._filter.reading_with(read_labels)
        return other

    def digest_kept(self, read_labels: LabelRows) -> str:
        """Digest which content tokens these labels leave; see `kept_digest`."""
        by_labels = Filter(self.ignore_labels, read_labels)
        return by_labels.count(self.n_examples, self.md.content_tokens_per_example, self._members)[1][0]

    def _members(self, ordinals: _Int64s) -> _Int64s:
        """The examples of these ordinals, `[m] int64`; fastest where equal ones are neighbours."""
        if self._subset is None or not len(ordinals):
            return ordinals
        heads = np.flatnonzero(np.diff(ordinals, prepend=ordinals[0] - 1))
        return np.repeat(self._subset.members(ordinals[heads]), np.diff(np.append(heads, len(ordinals))))

    def cells(self, samples: _Int64s) -> _Int64s:
        """Map sample numbers `[m]` to cells `[m]`.

        With ignored labels this reads the labels of the examples concerned, once for each run of samples that stay
        in one example, so samples in blocks are cheap.
        """
        if self._filter is not None and len(samples):
            return self._kept_cells(self._filter, samples)
        width = self.md.tokens_per_example
        if self._subset is None and self._n_tokens == width:
            return samples
        pages = samples // self._n_tokens
        shift = pages * (width - self._n_tokens) + self._first_token
        if self._subset is not None:
            ordinals = pages // self.n_grid_layers
            shift += (self._members(ordinals) - ordinals) * (self.n_grid_layers * width)
        return samples + shift

    def _kept_cells(self, kept: Filter, samples: _Int64s) -> _Int64s:
        if (samples[1:] < samples[:-1]).any():
            # So that the labels of an example are read once.
            samples, at = np.unique(samples, return_inverse=True)
            return self._kept_cells(kept, samples)[at]
        n_layers, width = self.n_grid_layers, self.md.tokens_per_example
        heads = np.flatnonzero(np.diff(samples, prepend=samples[0] - 2) != 1)
        starts = samples[heads]
        stops = starts + np.diff(np.append(heads, len(samples)))
        # Each run of samples is cut where another page, one layer of one member, begins.
        first_page, last_page = self._pages(starts), self._pages(stops - 1)
        n_pages = last_page - first_page + 1
        pages = expand_runs(first_page, n_pages)
        ordinals, layers = np.divmod(pages, n_layers)
        group_starts = np.flatnonzero(np.diff(ordinals, prepend=-1))
        members = self._members(ordinals[group_starts])
        mask = self._mask(kept, ordinals[group_starts], members)
        tokens = np.flatnonzero(mask)
        per_group = mask.sum(axis=1)
        n_members = np.diff(np.append(group_starts, len(pages)))
        group_first = np.repeat(np.cumsum(per_group) - per_group, n_members)
        per_page = np.repeat(per_group, n_members)
        first = self._first_sample[ordinals] + layers * per_page
        start = np.maximum(first, np.repeat(starts, n_pages))
        length = np.minimum(first + per_page, np.repeat(stops, n_pages)) - start
        # `tokens` counts on from group to group, cells from page to page.
        groups = np.repeat(np.arange(len(group_starts)), n_members)
        shift = (np.repeat(members, n_members) * n_layers + layers - groups) * width
        cells: _Int64s = tokens[expand_runs(group_first + start - first, length)] + np.repeat(shift, length)
        return cells

    def _pages(self, samples: _Int64s) -> _Int64s:
        """The page, `ordinal * n_grid_layers + layer`, that each sample is on."""
        ordinals = np.searchsorted(self._first_sample, samples, side="right") - 1
        if self.n_grid_layers == 1:
            return ordinals
        first = self._first_sample[ordinals]
        per_page = (self._first_sample[ordinals + 1] - first) // self.n_grid_layers
        return ordinals * self.n_grid_layers + (samples - first) // per_page

    def _mask(self, kept: Filter, ordinals: _Int64s, members: _Int64s) -> NDArray[np.bool_]:
        """Which stored tokens of these members are selected: `[m, tokens_per_example] bool`."""
        mask = np.zeros((len(members), self.md.tokens_per_example), dtype=np.bool_)
        mask[:, self.n_special :] = kept.rows(members)
        mask[:, : self.n_special] = self.tokens == "all"
        counted = self._first_sample[ordinals + 1] - self._first_sample[ordinals]
        if not np.array_equal(mask.sum(axis=1) * self.n_grid_layers, counted):
            raise labels_changed() if kept.ignore_labels else mask_changed()
        return mask

    def samples(self, cells: _Int64s) -> _Int64s:
        """Map cells `[m] int64` back to sample numbers `[m] int64`; -1 where a cell is not selected."""
        example, layer, token = self.split(cells)
        ordinals = example if self._subset is None else self._subset.ordinals(example)
        found = np.full(len(cells), -1, dtype=np.int64)
        (is_in,) = np.nonzero(ordinals >= 0)
        ordinals, layer, token = ordinals[is_in], layer[is_in], token[is_in]
        if self._filter is None:
            offset = token - self._first_token
            number = (ordinals * self.n_grid_layers + layer) * self._n_tokens + offset
            found[is_in] = np.where((offset >= 0) & (offset < self._n_tokens), number, -1)
        else:
            mask = self._mask(self._filter, ordinals, example[is_in])
            rank = np.cumsum(mask, axis=1)
            at = np.arange(len(ordinals))
            number = self._first_sample[ordinals] + layer * rank[:, -1] + rank[at, token] - 1
            found[is_in] = np.where(mask[at, token], number, -1)
        return found

    def split(self, cells: _Int64s) -> tuple[_Int64s, _Int64s, _Int64s]:
        """Split cells `[m]` into example numbers, grid layers and stored tokens (0 is [CLS] if there is one)."""
        rows, tokens = divide(cells, self.md.tokens_per_example)
        if self.n_grid_layers == 1:
            return rows, np.zeros_like(rows), tokens
        return *divide(rows, self.n_grid_layers), tokens

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
        # Cells follow each other as rows do, but for what layers that are not selected have between.
        width, n_layers = self.md.tokens_per_example, len(self.md.layers)
        shards, rows = divide(cells, self.md.examples_per_shard * self.n_grid_layers * width)
        if self.n_grid_layers < n_layers:
            rows += (rows // width * (n_layers - 1) + self.layer_idxs[0]) * width
        return shards, rows


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

    Attributes:
        md, tokens, layer: As given.
        layer_idx_lookup: Position in a shard of each recorded layer.

    Raises:
        ConfigError: The layer was not recorded, or special tokens are asked for and none were recorded.
    """

    def __init__(self, md: Metadata, tokens: TokenKind, layer: LayerSpec) -> None:
        if tokens not in ("special", "content", "all"):
            raise ConfigError(f"tokens: expected 'special', 'content' or 'all', got {tokens!r}; choose one of them.")
        self.md, self.tokens, self.layer = md, tokens, layer
        self.layer_idx_lookup = {recorded: i for i, recorded in enumerate(md.layers)}
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
