"""`python -m saev_torch inspect DIR`: say what is in a shard directory."""

import argparse
import contextlib
import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate

from saev_torch.config import IndexedConfig
from saev_torch.errors import ConfigError
from saev_torch.format.checksums import CHECKSUMS_NAME
from saev_torch.format.files import counted
from saev_torch.format.metadata import Metadata
from saev_torch.format.sidecars import ATTENTION_MASK
from saev_torch.indexed import IndexedDataset
from saev_torch.reading.labels import Labels
from saev_torch.reading.store import ShardStore
from saev_torch.stats.outliers import advise_mask
from saev_torch.tools.arguments import EXAMPLES_HELP, at_least, check_new_file, examples
from saev_torch.tools.text import show_text

_N_SAMPLED = 512
# Some megabytes of each layer.
_N_RUNS, _MAX_RUN = 16, 256
# With these all fits a screen of 24 lines.
_N_LAYERS_SHOWN, _N_LABELS_SHOWN = 4, 7
_N_LAYERS_NAMED = 12
_EXAMPLES_PER_READ = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("dir", type=Path, help="shard directory, <shards_root>/<hash>")
    shown = "also show the text of an example, with a tokenizer of transformers: a name, a folder, or a tokenizer.json"
    parser.add_argument("--tokenizer", metavar="NAME_OR_PATH", help=shown)
    parser.add_argument("--example", type=at_least(0), metavar="N", help="which (default: 0)")
    parser.add_argument("--examples", type=examples, metavar="A:B", help=EXAMPLES_HELP)
    parser.add_argument("--mask", type=Path, metavar="MASK.npy", help="look at tokens only that a mask keeps")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw norms and labels into this file")


def run(args: argparse.Namespace) -> int:
    """Print what is in a directory: all labels, and a few hundred activations of each layer."""
    check_new_file("--plot", args.plot)
    store = ShardStore(args.dir)
    if args.example is not None and args.tokenizer is None:
        raise ConfigError("--tokenizer: expected the one of the model, because of --example, got none; give it.")
    example = args.example or 0
    text = None if args.tokenizer is None else show_text(store, args.tokenizer, example)
    md = store.metadata
    norms, lines = {}, _describe(store)
    chosen = {"examples": args.examples, "mask": args.mask}
    lines += _describe_chosen(md, IndexedConfig(args.dir, layer=md.layers[0], **chosen))
    # The figure has all layers.
    layers = md.layers if args.plot is not None else md.layers[:_N_LAYERS_SHOWN]
    for layer in layers:
        # Padding is no token, whoever asks.
        sampled = IndexedConfig(args.dir, layer=layer, **{**chosen, "mask": args.mask or _mask(store)})
        norms[layer], found = _sample(sampled, layer)
        lines += found if len(norms) <= _N_LAYERS_SHOWN else []
    if md.n_layers > _N_LAYERS_SHOWN:
        lines.append(f"  and {md.n_layers - _N_LAYERS_SHOWN} more")
    labels = count_labels(store) if store.has_labels else None
    lines += ["labels       none"] if labels is None else _describe_labels(md, labels)
    lines.append(f"token ids    {'yes' if store.has_token_ids else 'none'}")
    if ATTENTION_MASK in store.sidecars:
        lines.append(f"padding      left out with mask={str(_mask(store))!r}")
    lines += _describe_next(args.dir, md)
    lines += [] if text is None else [f"text         example {example}", *textwrap.indent(text, "  ").splitlines()]
    print("\n".join(lines))
    if args.plot is not None:
        # Imported only here: matplotlib is an extra.
        from saev_torch.tools.figure import draw_overview
        from saev_torch.tools.style import save

        save(draw_overview(md, norms, labels), args.plot)
        print(f"figure       {args.plot}")
    return 0


def count_labels(store: ShardStore) -> npt.NDArray[np.int64]:
    """Count the content tokens of each label, `[256] int64`, with descriptors that are closed again."""
    counts = np.zeros(256, dtype=np.int64)
    n_examples = store.metadata.n_examples
    with contextlib.closing(store.clone()) as opened:
        labels = Labels(opened)
        for start in range(0, n_examples, _EXAMPLES_PER_READ):
            examples = np.arange(start, min(n_examples, start + _EXAMPLES_PER_READ), dtype=np.int64)
            counts += np.bincount(labels.of_examples(examples).ravel(), minlength=256)
    return counts


def _describe(store: ShardStore) -> list[str]:
    md = store.metadata
    kind = "with [CLS]" if md.cls_token else "no [CLS]"
    n_files, nbytes = sum(shard.n_examples > 0 for shard in store.shards), md.n_examples * md.example_nbytes
    has_checksums = os.path.lexists(store.shards_dir / CHECKSUMS_NAME)
    return [
        f"directory    {store.shards_dir} (protocol {md.protocol}, hash {md.hash})",
        f"model        {md.family}, {md.ckpt}",
        f"data         {md.dataset}",
        f"examples     {md.n_examples:,} x {md.content_tokens_per_example} content tokens, {kind}",
        f"layers       {_list(md.layers)}; d_model {md.d_model}, {md.dtype}",
        f"files        {n_files} of up to {md.examples_per_shard:,} examples, {nbytes / 1e6:,.1f} MB",
        f"checksums    {'yes' if has_checksums else 'none'}",
    ]


def _list(layers: tuple[int, ...]) -> str:
    if len(layers) <= _N_LAYERS_NAMED:
        return ", ".join(map(str, layers))
    first, last = layers[: _N_LAYERS_NAMED - 3], layers[-2:]
    return f"{', '.join(map(str, first))} ... {', '.join(map(str, last))} ({len(layers)})"


def _mask(store: ShardStore) -> Path | None:
    """The mask that tells tokens from padding, where there is one."""
    return store.shards_dir / ATTENTION_MASK.name if ATTENTION_MASK in store.sidecars else None


def _describe_chosen(md: Metadata, cfg: IndexedConfig) -> list[str]:
    """How many content tokens examples and a mask leave, where they are given."""
    if cfg.examples is None and cfg.mask is None:
        return []
    n_left, n_tokens = len(IndexedDataset(cfg)), md.n_examples * md.content_tokens_per_example
    return [f"chosen       {n_left:,} of {n_tokens:,} content tokens, {n_left / n_tokens:.3%}"]


def _sample(cfg: IndexedConfig, layer: int) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Norms of some content tokens of a layer, taken evenly from all that are selected, and what to say of them."""
    data = IndexedDataset(cfg)
    found = _read(data, np.linspace(0, len(data) - 1, min(_N_SAMPLED, len(data))).astype(np.int64)).numpy()
    n_bad = int(np.count_nonzero(~np.isfinite(found)))
    acts = np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
    norms = np.linalg.norm(acts, axis=1)
    spoilt = f", {counted(n_bad, 'VALUE')} NOT FINITE, see verify --finite" if n_bad else ""
    line = (
        f"layer {layer:<6} norm {norms.mean():.4g} (from {norms.min():.4g} to {norms.max():.4g}), "
        f"values {acts.mean():.4g} +- {acts.std():.4g}, {counted(len(norms), 'token')}{spoilt}"
    )
    in_runs = _measure_runs(data)
    largest = float(max(norms.max(), in_runs.max()))
    advice = advise_mask(cfg.shards, layer, float(np.median(in_runs)), largest)
    return norms, [line] if advice is None else [line, f"  {advice}"]


def _measure_runs(data: IndexedDataset) -> npt.NDArray[np.float32]:
    """Norms of runs of samples, each as long as an example: a token may be huge at one place only."""
    n_samples, length = len(data), min(data.metadata.content_tokens_per_example, len(data), _MAX_RUN)
    starts = np.linspace(0, n_samples - length, min(_N_RUNS, -(-n_samples // length))).astype(np.int64)
    runs = (_read(data, np.arange(start, start + length)) for start in starts)
    # What is not finite is told where it is found.
    return np.concatenate([torch.linalg.vector_norm(acts, dim=1).nan_to_num(0.0, 0.0).numpy() for acts in runs])


def _read(data: IndexedDataset, samples: npt.NDArray[np.int64]) -> torch.Tensor:
    found: Any = data.__getitems__(samples.tolist())
    # As a DataLoader does it: whole columns, and no sample on its own.
    acts: torch.Tensor = default_collate(found)["act"]
    return acts


def _describe_next(shards_dir: Path, md: Metadata) -> list[str]:
    """What people do with a directory that they have just been given."""
    shown, layer = shlex.quote(str(shards_dir)), f"--layer={md.layers[-1]}"
    return [
        f"next         are all bytes as written: python -m saev_torch verify {shown}",
        f"             which options to train with: python -m saev_torch plan {shown} {layer}",
    ]


def _describe_labels(md: Metadata, counts: npt.NDArray[np.int64]) -> list[str]:
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    lines = [f"labels       {len(order)} of 0..255, {md.pixel_agg.value}"]
    for label in order[:_N_LABELS_SHOWN]:
        share = counts[label] / counts.sum()
        lines.append(f"  {label:>3} {counts[label]:>12,} {100 * share:5.1f} % {'#' * round(40 * share)}")
    if len(order) > _N_LABELS_SHOWN:
        lines.append(f"  and {len(order) - _N_LABELS_SHOWN} more")
    return lines
