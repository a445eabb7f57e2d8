"""`python -m saev_torch inspect DIR`: say what is in a shard directory."""

import argparse
from pathlib import Path

import numpy as np

from saev_torch.tools.arguments import check_new_file
from saev_torch.tools.overview import Overview, overlook

_N_LABELS_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("dir", type=Path, help="shard directory, <shards_root>/<hash>")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw norms and labels into this file")


def run(args: argparse.Namespace) -> int:
    """Print what is in a directory.

    Returns:
        0.

    Raises:
        SaevTorchError: It is no shard directory, or the figure has no folder.
    """
    check_new_file("--plot", args.plot)
    overview = overlook(args.dir)
    print("\n".join(_lines(args.dir, overview)))
    if args.plot is not None:
        # Imported only here: matplotlib is an extra.
        from saev_torch.tools.figure import draw_overview, save

        save(draw_overview(overview), args.plot)
        print(f"figure       {args.plot}")
    return 0


def _lines(shards_dir: Path, overview: Overview) -> list[str]:
    md = overview.metadata
    kind = "with [CLS]" if md.cls_token else "no [CLS]"
    lines = [
        f"directory    {shards_dir} (protocol {md.protocol}, hash {md.hash})",
        f"model        {md.family}, {md.ckpt}",
        f"data         {md.dataset}",
        f"examples     {md.n_examples:,} x {md.content_tokens_per_example} content tokens, {kind}",
        f"layers       {', '.join(map(str, md.layers))}; d_model {md.d_model}, {md.dtype}",
        f"files        {overview.n_files} of up to {md.examples_per_shard:,} examples, {overview.nbytes / 1e6:,.1f} MB",
        f"checksums    {'yes' if overview.has_checksums else 'none'}",
    ]
    for sample in overview.layers:
        bad = f", {sample.n_not_finite} VALUES NOT FINITE" if sample.n_not_finite else ""
        lines.append(
            f"layer {sample.layer:<6} norm {sample.norms.mean():.4g} (from {sample.norms.min():.4g} to "
            f"{sample.norms.max():.4g}), values {sample.mean:.4g} +- {sample.std:.4g}, {len(sample.norms)} tokens{bad}"
        )
    if overview.labels is None:
        return [*lines, "labels       none"]
    order = np.argsort(-overview.labels, kind="stable")[: np.count_nonzero(overview.labels)]
    lines.append(f"labels       {len(order)} of 0..255, {md.pixel_agg.value}")
    for label in order[:_N_LABELS_SHOWN]:
        share = overview.labels[label] / overview.labels.sum()
        lines.append(f"  {label:>3} {overview.labels[label]:>12,} {100 * share:5.1f} % {'#' * round(40 * share)}")
    if len(order) > _N_LABELS_SHOWN:
        lines.append(f"  and {len(order) - _N_LABELS_SHOWN} more")
    return lines
