"""`python -m saev_torch import SOURCE ROOT`: shards of activations that others have written."""

import argparse
from pathlib import Path

from saev_torch.format.dtypes import DTYPES
from saev_torch.tools.arguments import at_least
from saev_torch.tools.importing.arrays import import_arrays


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    kinds = "a file or a folder of .npy, .npz, .safetensors or .pt, a saved Hugging Face data set, or a Zarr array"
    add("source", type=Path, metavar="SOURCE", help=kinds)
    add("root", type=Path, metavar="ROOT", help="where the new directory <hash> is made")
    add("--array", metavar="NAME", help="which array or column, where there are several")
    rows = "rows that are an example, where the source is [rows, d_model] (default: 1)"
    add("--tokens-per-example", type=at_least(1), metavar="N", help=rows)
    add("--cls-token", action="store_true", help="the first token of each example is [CLS]")
    add("--layer", type=int, default=0, help="number under which the layer is recorded (default: %(default)s)")
    add("--family", default="imported", help="family of the model, for the metadata (default: %(default)s)")
    add("--ckpt", help="checkpoint of the model, for the metadata (default: the source's name)")
    add("--dataset", type=Path, help="what the activations are of, for the metadata (default: the source)")
    most = "activations in a file (default: %(default)s)"
    add("--max-tokens-per-shard", type=at_least(1), default=2_400_000, metavar="N", help=most)
    add("--dtype", choices=list(DTYPES), help="type of the stored values (default: that of the source)")
    too_large = "what to do with values that are too large for it (default: %(default)s)"
    add("--on-overflow", choices=["refuse", "clip"], default="refuse", help=too_large)
    add("--check-finite", action="store_true", help="refuse NaN and infinity")
    add("--quiet", action="store_true", help="no progress bar")
    parser.epilog = "An import that was interrupted goes on where it was, when the same command is given again."


def run(args: argparse.Namespace) -> int:
    """Import a source, and print where the shards are."""
    names = ("array", "tokens_per_example", "cls_token", "layer", "family", "ckpt", "dataset", "dtype")
    options = {name: getattr(args, name) for name in (*names, "max_tokens_per_shard", "on_overflow", "check_finite")}
    print(import_arrays(args.source, args.root, **options, progress=False if args.quiet else None))
    return 0
