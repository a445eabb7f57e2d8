"""`python -m saev_torch mask DIR -o keep.npy`: the content tokens to train on, by position, norm, label, token id."""

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.config import OrderedConfig
from saev_torch.errors import ConfigError
from saev_torch.format.files import replacing, short, writing
from saev_torch.format.rules import is_integer
from saev_torch.format.sidecars import ATTENTION_MASK, LABELS, TOKEN_IDS, Sidecar
from saev_torch.iterable.activations import OrderedActivations
from saev_torch.reading.mask import open_sidecar
from saev_torch.reading.store import ShardStore
from saev_torch.stats.statistics import compute_statistics
from saev_torch.tools.arguments import check_new_file
from saev_torch.writing.progress import Progress

_IN_MEDIANS = "x-median"
# So many give the median to some 0.2 %.
_N_SAMPLED = 1 << 18
_TOKENS_AT_ONCE = 1 << 14

_Hits = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class MaskReport:
    """What a mask drops.

    Attributes:
        path: The mask.
        n_tokens: Content tokens in all.
        n_dropped: Those that any rule drops.
        by_rule: Those that each rule drops, by what it says; several may drop the same.
        median_norm: Median norm of the content tokens that limits are multiples of; None where none is.
    """

    path: Path
    n_tokens: int
    n_dropped: int
    by_rule: dict[str, int]
    median_norm: float | None

    @property
    def share(self) -> float:
        """Share of the content tokens that is dropped."""
        return self.n_dropped / self.n_tokens

    def __str__(self) -> str:
        rules = "; ".join(f"{what}: {n / self.n_tokens:.3%}" for what, n in self.by_rule.items())
        median = "" if self.median_norm is None else f" The median norm is {self.median_norm:.4g}."
        return f"{self.path}: drops {self.n_dropped:,} of {self.n_tokens:,} tokens, {self.share:.3%} ({rules}).{median}"


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What is known of the content tokens of some examples, `[m, content_tokens_per_example]` each."""

    shape: tuple[int, int]
    norms: NDArray[np.float32]
    beside: dict[Sidecar, NDArray[Any]]


_Rules = dict[str, Callable[[_Rows], _Hits]]


def make_mask(
    shards: Path | str,
    path: Path | str,
    *,
    layer: int | None = None,
    positions: Sequence[int] = (),
    norm_above: float | str | None = None,
    norm_below: float | str | None = None,
    labels: Sequence[int] = (),
    token_ids: Sequence[int] = (),
    progress: bool | None = False,
) -> MaskReport:
    """Write a mask of content tokens, for `mask=` of the configs: what any of the rules names is dropped.

    Special tokens are left alone. Activations are read once, in file order, if there is a rule about norms. Where
    `record(padding="drop")` has left an attention_mask.npy, padding is dropped in any case.

    Args:
        shards: The shard directory.
        path: Where the mask goes, a `.npy` of bool `[n_examples, content_tokens_per_example]`; True stays. A file that
            is there is replaced.
        layer: The layer whose norms count; needed where several are recorded.
        positions: Content tokens to drop in every example, from 0; negative ones count from the end.
        norm_above: Drop tokens whose L2 norm is above a number; or above a multiple of the median, as "10x-median". The
            median is that of all content tokens, or of 262,144 that are drawn with a fixed seed.
        norm_below: The same for tokens whose norm is below.
        labels: Drop tokens with these labels.
        token_ids: Drop these tokens of the vocabulary.
        progress: Show progress; None for where stderr is a terminal.

    Returns:
        How much is dropped, and by which rule.

    Raises:
        ConfigError: A bad rule, or none; or the mask would drop all tokens.
        WriteError: The mask cannot be written.
        FormatError, ReadError, ShardsNotFoundError: The shards cannot be read.
    """
    path = Path(path)
    with contextlib.closing(ShardStore(Path(shards))) as store:
        md, width = store.metadata, store.metadata.content_tokens_per_example
        by_norm = {"above": norm_above, "below": norm_below}
        needs_norms = any(limit is not None for limit in by_norm.values())
        if needs_norms and layer is None and len(md.layers) > 1:
            raise ConfigError(f"layer: expected one of {list(md.layers)}, whose norms count, got none; choose one.")
        cfg = OrderedConfig(store.shards_dir, layer=md.layers[0] if layer is None else layer)
        text = store.shards_dir / ATTENTION_MASK.name if ATTENTION_MASK in store.sidecars else None
        counted = dataclasses.replace(cfg, mask=text)
        median = _find_median(counted) if any(str(limit).endswith(_IN_MEDIANS) for limit in by_norm.values()) else None
        rules = _position_rules(positions, width) | _norm_rules(by_norm, median) | _label_rules(labels, store)
        rules |= _token_id_rules(token_ids, store) | _padding_rules(store)
        if not rules:
            names = "positions, norm_above, norm_below, labels, token_ids"
            raise ConfigError(f"make_mask: expected a rule ({names}), got none.")
        asked = {LABELS: bool(len(labels)), TOKEN_IDS: bool(len(token_ids)), ATTENTION_MASK: True}
        beside = [sidecar for sidecar in store.sidecars if asked[sidecar]]
        counts, n_dropped = _write(path, store, _read(store, cfg, needs_norms, beside), rules, progress)
    return MaskReport(path, md.n_examples * width, n_dropped, counts, median)


def _write(
    path: Path, store: ShardStore, found: Iterable[_Rows], rules: _Rules, progress: bool | None
) -> tuple[dict[str, int], int]:
    """Write the mask; how much each rule drops, and all together."""
    counts, n_dropped, n_kept = dict.fromkeys(rules, 0), 0, 0
    n_examples, width = store.metadata.n_examples, store.metadata.content_tokens_per_example
    with (
        replacing(path) as file,
        Progress(n_examples, f"mask of {store.shards_dir.name}", "examples", progress) as shown,
    ):
        with writing(path):
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|b1", "fortran_order": False, "shape": (n_examples, width)}
            )
        for rows in found:
            dropped = np.zeros(rows.shape, dtype=np.bool_)
            for what, rule in rules.items():
                hits = np.broadcast_to(rule(rows), rows.shape)
                counts[what] += int(hits.sum())
                dropped |= hits
            n_dropped += int(dropped.sum())
            n_kept += int((~dropped).sum())
            with writing(path):
                file.write((~dropped).tobytes())
            shown.update(len(dropped))
        if not n_kept:
            raise ConfigError(f"make_mask: expected that tokens are left, got none by {list(rules)}; drop fewer.")
    return counts, n_dropped


def _position_rules(positions: Sequence[int], width: int) -> _Rules:
    if not all(is_integer(at, -width, width - 1) for at in positions):
        raise ConfigError(f"positions: expected integers from {-width} to {width - 1}, got {list(positions)}.")
    hits = np.isin(np.arange(width), [at % width for at in positions])
    return {f"positions {list(positions)}": lambda rows: hits} if len(positions) else {}


def _norm_rules(by_norm: dict[str, float | str | None], median: float | None) -> _Rules:
    rules: _Rules = {}
    for side, given in by_norm.items():
        if given is None:
            continue
        limit = math.nan
        with contextlib.suppress(ValueError, TypeError):
            is_multiple = isinstance(given, str) and given.endswith(_IN_MEDIANS)
            limit = float(str(given).removesuffix(_IN_MEDIANS)) * (median or 1.0 if is_multiple else 1.0)
        if not 0 <= limit < math.inf:
            raise ConfigError(f"norm_{side}: expected a number from 0 on, or one as '10x-median', got {given!r}.")
        # A norm that is not a number is on neither side, and is dropped by both.
        bound, is_above = np.float32(limit), side == "above"
        rules[f"norm {side} {given}"] = lambda rows, bound=bound, is_above=is_above: (
            ~(  # type: ignore[misc]
                rows.norms <= bound if is_above else rows.norms >= bound
            )
        )
    return rules


def _label_rules(labels: Sequence[int], store: ShardStore) -> _Rules:
    if not all(is_integer(label, 0, 255) for label in labels):
        raise ConfigError(f"labels: expected integers from 0 to 255, got {list(labels)}.")
    if len(labels) and not store.has_labels:
        raise ConfigError(f"labels: expected shards with labels.bin, got {store.shards_dir} without; leave them out.")
    return {f"labels {list(labels)}": lambda rows: np.isin(rows.beside[LABELS], list(labels))} if len(labels) else {}


def _token_id_rules(token_ids: Sequence[int], store: ShardStore) -> _Rules:
    ids = np.array(token_ids) if len(token_ids) else np.empty(0, dtype=np.int64)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise ConfigError(f"token_ids: expected integers, got {short(token_ids)}.")
    if len(ids) and not store.has_token_ids:
        raise ConfigError(
            f"token_ids: expected shards with {TOKEN_IDS.name}, got {store.shards_dir} without; record them anew, or "
            "leave them out."
        )
    return {f"token ids {ids.tolist()}": lambda rows: np.isin(rows.beside[TOKEN_IDS], ids)} if len(ids) else {}


def _padding_rules(store: ShardStore) -> _Rules:
    if ATTENTION_MASK not in store.sidecars:
        return {}
    return {"padding": lambda rows: ~rows.beside[ATTENTION_MASK]}


def _find_median(cfg: OrderedConfig) -> float:
    sampled = compute_statistics(cfg, n_sampled=_N_SAMPLED)
    return sampled.total.norm_quantiles[0.5]


def _read(store: ShardStore, cfg: OrderedConfig, norms: bool, beside: Sequence[Sidecar]) -> Iterator[_Rows]:
    """Read what rules look at, some whole examples at a time."""
    md, width = store.metadata, store.metadata.content_tokens_per_example
    step = max(1, _TOKENS_AT_ONCE // width)
    columns = {sidecar: open_sidecar(store, sidecar) for sidecar in beside}
    found = iter(OrderedActivations(dataclasses.replace(cfg, batch_size=step * width), rank=0, world_size=1))
    no_norms = np.empty((0, width), dtype=np.float32)
    for start in range(0, md.n_examples, step):
        examples = np.arange(start, min(md.n_examples, start + step), dtype=np.int64)
        shape = len(examples), width
        measured = torch.linalg.vector_norm(next(found)["act"], dim=1).numpy().reshape(shape) if norms else no_norms
        yield _Rows(shape, measured, {sidecar: column.of_examples(examples) for sidecar, column in columns.items()})


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("dir", type=Path, help="the shard directory")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="MASK.npy", help="where the mask goes")
    parser.add_argument("--layer", type=int, help="the layer whose norms count")
    parser.add_argument("--positions", type=int, nargs="+", default=[], help="content tokens to drop in every example")
    for side in ("above", "below"):
        parser.add_argument(
            f"--norm-{side}", metavar="NORM", help="drop tokens with such a norm; a number or 10x-median"
        )
    parser.add_argument("--labels", type=int, nargs="+", default=[], help="drop tokens with these labels")
    of_vocabulary = "drop these tokens of the vocabulary"
    parser.add_argument("--token-ids", type=int, nargs="+", default=[], help=of_vocabulary)


def run(args: argparse.Namespace) -> int:
    """Make the mask, and say what share it drops."""
    check_new_file("--out", args.out)
    report = make_mask(
        args.dir,
        args.out,
        layer=args.layer,
        positions=args.positions,
        norm_above=_number(args.norm_above),
        norm_below=_number(args.norm_below),
        labels=args.labels,
        token_ids=args.token_ids,
        progress=None,
    )
    print(report)
    return 0


def _number(text: str | None) -> float | str | None:
    with contextlib.suppress(ValueError):
        return None if text is None else float(text)
    return text
