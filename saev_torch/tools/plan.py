"""`python -m saev_torch plan DIR`: what a configuration will do with a shard directory; reads its metadata only."""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

from saev_torch.config import ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.dtypes import DTYPES
from saev_torch.format.metadata import Metadata
from saev_torch.format.protocols import PROTOCOL
from saev_torch.format.rules import LayerSpec
from saev_torch.order.mixing import class_mixtures
from saev_torch.order.predict import MIN_READ_NBYTES, Prediction, find_best, find_smallest, predict
from saev_torch.order.selection import Selection
from saev_torch.reading.direct import fits_page_cache
from saev_torch.tools.arguments import EXAMPLES_HELP, above_zero, at_least, check_new_file, examples

_GIB = 1 << 30
_BUFFERS = (1, 2, 4, 8, 16, 32)
_BLOCKS = (1, 4, 16, 64, 256)
_N_CLASSES = 10
_OPTIONS = ("batch_size", "buffer_size", "n_lanes", "block_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    defaults = ShuffledConfig(layer=0)
    whole, least = at_least(1), MIN_READ_NBYTES / 1024
    parser.add_argument("shards", type=Path, metavar="DIR", help="shard directory")
    parser.add_argument("--layer", default=None, help="recorded layer, or all (default: the last recorded one)")
    parser.add_argument("--tokens", default=defaults.tokens, choices=["special", "content", "all"])
    parser.add_argument("--batch-size", type=whole, default=defaults.batch_size)
    parser.add_argument("--buffer-size", type=whole, default=defaults.buffer_size, help="batches held")
    parser.add_argument("--block-size", type=whole, default=None, help="samples read at once (default: chosen)")
    parser.add_argument("--lanes", dest="n_lanes", metavar="LANES", type=whole, default=defaults.n_lanes)
    orders = "blocks, or uniform: one permutation of all samples, for data that memory holds"
    parser.add_argument("--order", default=defaults.order, choices=["blocks", "uniform"], help=orders)
    parser.add_argument("--act-dtype", default=defaults.act_dtype, choices=["float32", "stored"], help="in memory")
    parser.add_argument("--dtype", choices=list(DTYPES), help="as if this were stored (default: what is)")
    parser.add_argument("--examples", type=examples, metavar="A:B", help=EXAMPLES_HELP)
    parser.add_argument("--readers", type=whole, default=1, help="ranks times workers (default: 1)")
    parser.add_argument("--quality", type=above_zero, help="find the smallest memory for this quality, 0 to 1")
    parser.add_argument("--memory-gib", type=above_zero, help="find the best quality in this memory")
    smallest = f"of what is found, the least mean read (default: {least:.0f}, or what reaches the quality)"
    parser.add_argument("--min-read-kib", type=above_zero, help=smallest)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw quality against memory to this file")
    parser.add_argument("--plot-classes", type=Path, metavar="FILE", help="draw how classes mix over an epoch")


def _layer(md: Metadata, text: str | None) -> LayerSpec:
    if text is None or text == "all":
        return "all" if text else md.layers[-1]
    try:
        return int(text)
    except ValueError as err:
        raise ConfigError(f"--layer: expected an integer or all, got {text!r}.") from err


def run(args: argparse.Namespace) -> int:
    """Print, and draw where asked to."""
    check_new_file("--plot", args.plot)
    check_new_file("--plot-classes", args.plot_classes)
    md = Metadata.load(args.shards)
    if args.dtype is not None:
        # Of an older protocol, too: only sizes are looked at.
        md = dataclasses.replace(md, dtype=args.dtype, protocol=PROTOCOL)
    options = {name: getattr(args, name) for name in ("shards", "tokens", "order", "act_dtype", "examples", *_OPTIONS)}
    cfg = ShuffledConfig(layer=_layer(md, args.layer), **options)
    least = MIN_READ_NBYTES if args.min_read_kib is None else args.min_read_kib * 1024
    if args.quality is not None and args.memory_gib is not None:
        raise ConfigError("--quality, --memory-gib: expected one of the two, got both.")
    if args.quality is not None:
        chosen = _find(md, cfg, args.quality, args.readers, least, args.min_read_kib is None)
    elif args.memory_gib is not None:
        chosen = find_best(md, cfg, int(args.memory_gib * _GIB), args.readers, least)
    else:
        chosen = predict(md, cfg, args.readers)
    mixtures = class_mixtures(md, chosen.cfg, min(_N_CLASSES, md.n_examples)) if args.plot_classes else []
    sys.stdout.write(_describe(chosen) + _describe_order(md, chosen))
    if args.plot or args.plot_classes:
        # Imported only here: matplotlib is an extra.
        from saev_torch.tools.figure import draw_mixtures, draw_plan
        from saev_torch.tools.style import save

        if args.plot:
            save(draw_plan(chosen, _others(md, cfg, args.readers)), args.plot)
        if args.plot_classes:
            save(draw_mixtures(mixtures), args.plot_classes)
    return 0


def _find(
    md: Metadata, cfg: ShuffledConfig, quality: float, n_readers: int, least: float, may_be_less: bool
) -> Prediction:
    """The smallest memory for a quality, with the largest reads that reach it: of a half, a quarter, ... of `least`."""
    while may_be_less and least > md.row_nbytes:
        with contextlib.suppress(ConfigError):
            return find_smallest(md, cfg, quality, n_readers, least)
        least /= 2
    given = predict(md, cfg, n_readers)
    if may_be_less and given.quality >= quality:
        return given
    return find_smallest(md, cfg, quality, n_readers, least)


def _others(md: Metadata, cfg: ShuffledConfig, n_readers: int) -> list[Prediction]:
    return [
        predict(md, dataclasses.replace(cfg, buffer_size=per_lane * cfg.n_lanes, block_size=block), n_readers)
        for per_lane in _BUFFERS
        for block in _BLOCKS
        if block <= cfg.batch_size
    ]


def _describe(found: Prediction) -> str:
    uniform = f"a uniform draw has {found.uniform_distinct:,.0f}: quality {found.quality:.3f}"
    rows = {
        "configuration": ", ".join(f"{name}={getattr(found.cfg, name)}" for name in _OPTIONS),
        "readers": f"{found.n_readers} (ranks x workers)",
        "distinct examples": f"{found.distinct_examples:,.0f} in a batch; {uniform}",
        "reads": f"{found.read_nbytes / 1024:,.3g} KiB on average; {found.read_per_byte:.2f} bytes for each one used",
        "memory": f"{found.memory_nbytes / _GIB:.2f} GiB of batches in all readers, besides what processes take",
    }
    return "".join(f"{name + ':':<19}{text}\n" for name, text in rows.items())


def _describe_order(md: Metadata, found: Prediction) -> str:
    """What order suits data of this size, on this machine."""
    cfg = found.cfg
    selection = Selection(md, cfg.tokens, cfg.layer, act_dtype=cfg.act_dtype)
    nbytes, is_uniform = selection.n_samples * selection.sample_nbytes, cfg.order == "uniform"
    data = f"{nbytes / _GIB:.3g} GiB of data"
    if fits_page_cache(nbytes):
        text = f"{data}, which the memory of this machine can hold: "
        text += "gathered from there" if is_uniform else "order='uniform' mixes them perfectly, with a few batches held"
    elif is_uniform:
        text = f"{data}, which the memory of this machine cannot hold: use order='blocks', which a disk reads faster"
    else:
        return ""
    return f"{'order:':<19}{text}\n"
