"""`python -m saev_torch export DIR FILE`: one layer of a shard directory as a `.npy` file."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from saev_torch.config import OrderedConfig
from saev_torch.errors import ConfigError
from saev_torch.format.dtypes import FLOAT32
from saev_torch.format.examples import Examples
from saev_torch.format.files import replacing, writing
from saev_torch.format.metadata import Metadata
from saev_torch.format.rules import TokenKind
from saev_torch.iterable.activations import OrderedActivations
from saev_torch.tools.arguments import positions
from saev_torch.writing.progress import Progress

_BATCH_NBYTES = 4 << 20
_BUFFER_SIZE = 2
_NOT_IN_NUMPY = ("bfloat16",)


def export_array(
    shards_dir: Path | str,
    path: Path | str,
    *,
    layer: int | None = None,
    tokens: TokenKind = "content",
    examples: Examples | Sequence[int] | None = None,
    progress: bool | None = False,
) -> Path:
    """Write one layer as a `.npy` file, `[examples, tokens, d_model]`, which `np.load(path, mmap_mode="r")` maps.

    Values are those that are stored, float32 or float16; of bfloat16, which numpy does not have, the same as float32.
    Memory holds a few batches of 4 MB.

    Args:
        shards_dir: The shards.
        path: The new file; one that is there is replaced, when the new one is complete.
        layer: Recorded layer; by default the only one.
        tokens: "content", "special" ([CLS]) or "all" of them.
        examples: Which examples, in the order of the disk; all by default.
        progress: Draw a progress bar; None for where stderr is a terminal, and elsewhere a line a minute.

    Returns:
        The path of the new file.

    Raises:
        ConfigError: There is no such layer, token or example.
        FormatError, ReadError, ShardsNotFoundError: The shards cannot be read.
        WriteError: The file could not be written.
    """
    shards_dir, path = Path(shards_dir), Path(path)
    md = Metadata.load(shards_dir)
    if layer is None and len(md.layers) > 1:
        raise ConfigError(f"layer: expected one of {list(md.layers)}, as recorded, got none; name one.")
    if path.suffix != ".npy":
        raise ConfigError(f"path: expected a name that ends in .npy, got {path.name}; add it.")
    if examples is not None and not isinstance(examples, Examples):
        examples = Examples.only(examples)
    n_tokens = {"content": md.content_tokens_per_example, "special": 1}.get(tokens, md.tokens_per_example)
    cfg = OrderedConfig(
        shards=shards_dir,
        layer=md.layers[0] if layer is None else layer,
        tokens=tokens,
        examples=examples,
        batch_size=n_tokens * max(1, _BATCH_NBYTES // (n_tokens * md.row_nbytes)),
        buffer_size=_BUFFER_SIZE,
        act_dtype="stored",
    )
    # All of it, whatever rank this process has.
    loaded = OrderedActivations(cfg, rank=0, world_size=1)
    with replacing(path) as file, Progress(loaded.n_samples, "exporting", "activations", progress) as bar:
        _write(file, path, loaded, n_tokens, bar)
    return path


def _write(file: BinaryIO, path: Path, loaded: OrderedActivations, n_tokens: int, bar: Progress) -> None:
    md = loaded.metadata
    is_wide = md.dtype in _NOT_IN_NUMPY
    descr = FLOAT32.storage if is_wide else md.value_type.storage
    shape = (loaded.n_samples // n_tokens, n_tokens, md.d_model)
    with writing(path):
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    for batch in loaded:
        acts = batch["act"].float() if is_wide else batch["act"]
        with writing(path):
            file.write(acts.numpy().data)
        bar.update(len(acts))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR", help="shard directory, <shards_root>/<hash>")
    add("file", type=Path, metavar="FILE.npy", help="the new file, [examples, tokens, d_model]")
    add("--layer", type=int, help="recorded layer (default: the only one)")
    kept = "content tokens, the special one, or all (default: %(default)s)"
    add("--tokens", choices=["content", "special", "all"], default="content", help=kept)
    add("--examples", type=positions, metavar="A:B", help="examples: start:stop[:step], or a list 3,5,8 (default: all)")
    add("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Export a layer, and print where it is."""
    examples = args.examples
    if isinstance(examples, slice):
        examples = range(Metadata.load(args.dir).n_examples)[examples]
    options = {"layer": args.layer, "tokens": args.tokens, "examples": examples}
    print(export_array(args.dir, args.file, **options, progress=False if args.quiet else None))
    return 0
