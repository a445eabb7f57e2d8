"""`python -m saev_torch bench`: how fast the loaders are here, held against what the machine can do."""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saev_torch.bench.data import BenchData, choose_ignored, example_nbytes, make
from saev_torch.bench.doctor import describe, examine
from saev_torch.bench.epochs import EpochTable, run_epochs
from saev_torch.bench.machine import NOT_COLD, Machine, look
from saev_torch.bench.measuring import first_batch_s, measure_memory
from saev_torch.bench.raw import WINDOW_NBYTES
from saev_torch.bench.rounds import Settings, Spread, run_cold, run_rounds, run_warm, warm_up
from saev_torch.bench.shapes import run_shapes
from saev_torch.bench.sides import FAMILIES, Side, make_sides
from saev_torch.config import ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.dtypes import DTYPES, FLOAT32
from saev_torch.tools.arguments import above_zero, at_least, check_new_file, integers
from saev_torch.writing.progress import Progress

_OTHERS = {
    "epochs": "shuffled, whole epochs beside the steady state, and the limits of memory and disk",
    "statistics": "a full pass of compute_statistics",
    "first": "time from iter() to the first batch, warm, 0 workers",
    "memory": "proportional set sizes over an epoch of ten buffers",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to its parser."""
    names = "; ".join(f"{name}: {what}" for name, what in {**FAMILIES, **_OTHERS}.items())
    parser.epilog = f"Sides, each also by its full name as in shuffled-2: {names}."
    add = parser.add_argument
    add("shards", type=Path, nargs="?", metavar="SHARDS", help="shard directory; or give --make-gb")
    add("--make-gb", type=above_zero, metavar="GB", help="make data of this size per layer, removed afterwards")
    add("--dtype", choices=list(DTYPES), help="with --make-gb: type of the data (default: float32)")
    add("--folder", type=Path, help="where to make data (default: the system's folder for temporary files)")
    several = "with --make-gb: also make data of N recorded layers and read one; 0 for none (default: 6)"
    add("--layers", type=at_least(0), default=6, metavar="N", help=several)
    add("--layers-shards", type=Path, metavar="DIR", help="shard directory of several layers, instead of --layers")
    add("--layer", type=int, help="recorded layer of SHARDS (default: the one in the middle)")
    add("--batch-size", type=at_least(1), default=16384, help="samples in a batch (default: %(default)s)")
    add("--buffer-size", type=at_least(1), default=64, help="batches of buffer (default: %(default)s)")
    add("--act-dtype", default="float32", choices=["float32", "stored"], help="of activations (default: %(default)s)")
    add("--workers", type=integers(0), default=(0, 1, 2), metavar="N,...", help="numbers of workers (default: 0,1,2)")
    add("--rounds", type=at_least(1), default=5, help="rounds (default: %(default)s)")
    add("--seconds", type=above_zero, default=2.0, help="time of a warm side in a round (default: %(default)s)")
    add("--only", type=_names, default=(), metavar="NAME,...", help="run some sides only; the limits always run")
    add("--cold", action="store_true", help="also measure whole epochs after dropping the page cache")
    add("--no-warm", action="store_true", help="leave out all that is measured warm")
    limit = "stop a cold epoch, or a pass of statistics, after this time (default: %(default)s)"
    add("--cold-limit-s", type=above_zero, default=120.0, metavar="S", help=limit)
    add("--touch", action="store_true", help="add up the activations of each batch; else nothing looks at them")
    add("--json", type=Path, metavar="FILE", help="write all figures to a file, too")
    add("--plot", type=Path, metavar="FILE", help="also draw epochs, steady state and limits into this file")
    add("--quick", action="store_true", help="two short rounds, to see that it runs")
    add("--shapes", action="store_true", help="with --make-gb: measure other shapes of data and batches only")
    add("--doctor", action="store_true", help="look at machine and disk instead, and recommend options")


def _names(text: str) -> tuple[str, ...]:
    known = {**FAMILIES, **_OTHERS}
    names = tuple(filter(None, text.split(",")))
    for name in names:
        if name.partition("-")[0] not in known:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {name}")
    return names


def _is_wanted(name: str, only: Sequence[str]) -> bool:
    return not only or name in only or name.partition("-")[0] in only


def _wants_layers(only: Sequence[str]) -> bool:
    return not only or any(name.partition("-")[0] == "layers" for name in only)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, or the doctor; returns 0, or raises SaevTorchError where data or options are no good."""
    # Now, and not after all the work; to ask for --help does not take it.
    importlib.import_module("psutil")
    if (args.shards is None) == (args.make_gb is None):
        raise ConfigError("SHARDS: expected either a shard directory or --make-gb, got both or neither; give one.")
    if args.dtype is not None and args.make_gb is None:
        raise ConfigError("--dtype: expected --make-gb with it, got SHARDS, which have a type; see `repack --dtype`.")
    if args.no_warm and not args.cold:
        raise ConfigError("--no-warm: expected --cold with it, got nothing left to measure; leave it out.")
    if args.plot is not None:
        importlib.import_module("matplotlib")
        if args.doctor or args.shapes or args.no_warm or not _is_wanted("epochs", args.only):
            raise ConfigError("--plot: expected epochs to be measured, got options that leave them out; add them.")
    check_new_file("--json", args.json)
    check_new_file("--plot", args.plot)
    if args.folder is not None and not args.folder.is_dir():
        raise ConfigError(f"--folder: expected a folder that exists, got {args.folder}; make it first.")
    report = _shapes(args) if args.shapes else _on_data(args)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _shapes(args: argparse.Namespace) -> dict[str, Any]:
    if args.make_gb is None or args.doctor:
        raise ConfigError("--shapes: expected --make-gb, and not --doctor, with it, got others; it makes its own data.")
    table = run_shapes(1 if args.quick else args.rounds, args.make_gb, args.buffer_size, args.folder)
    print(f"later epochs from the page cache, whole\n{table}")
    return {"shapes": table.to_json()}


def _on_data(args: argparse.Namespace) -> dict[str, Any]:
    with _data(args) as (data, layers_data):
        if args.doctor:
            findings = examine(data, data.config(args.batch_size, args.buffer_size, args.act_dtype), args.quick)
            print(describe(findings))
            if args.make_gb is not None:
                print("  (these data are removed now: give it shards of your own)")
            report = findings.to_json()
        else:
            report = _bench(args, data, layers_data)
    return report


@contextlib.contextmanager
def _data(args: argparse.Namespace) -> Iterator[tuple[BenchData, BenchData | None]]:
    """Open the data, or make them and remove them afterwards, and statistics that are kept on the way in any case."""
    shards, layers_shards = args.shards, None if args.doctor else args.layers_shards
    before = os.environ.copy()
    with tempfile.TemporaryDirectory(prefix="saev_torch_bench_", dir=args.folder) as folder:
        if args.make_gb is not None:
            dtype = args.dtype or FLOAT32.name
            n_examples = max(1, round(args.make_gb * 1e9 / example_nbytes(dtype)))
            wants_layers = not args.doctor and _wants_layers(args.only)
            makes_layers = wants_layers and args.layers > 1 and layers_shards is None
            with Progress(n_examples * (1 + makes_layers), "making data", "examples") as progress:
                shards = make(Path(folder), n_examples, 1, progress.update, dtype)
                if makes_layers:
                    layers_shards = make(Path(folder), n_examples, args.layers, progress.update, dtype)
        data = BenchData.open(shards, args.layer)
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield data, None if layers_shards is None else BenchData.open(layers_shards, None)
        finally:
            del os.environ["XDG_CACHE_HOME"]
            os.environ.update(before)


def _bench(args: argparse.Namespace, data: BenchData, layers_data: BenchData | None) -> dict[str, Any]:
    n_rounds, seconds = (2, 0.05) if args.quick else (args.rounds, args.seconds)
    window_nbytes, memory_workers = (WINDOW_NBYTES // 50, (0, 1)) if args.quick else (WINDOW_NBYTES, (0, 1, 4))
    statistics, limit_s = _is_wanted("statistics", args.only), args.cold_limit_s
    settings = Settings(n_rounds, seconds, limit_s, args.touch, window_nbytes, memory_workers, statistics)
    machine = look()
    ignored, ignored_share = choose_ignored(data.store)
    n_batches = -(-data.n_samples // args.batch_size)
    about = {"n_samples": data.n_samples, "nbytes": data.nbytes, "layer": data.layer, "batch_size": args.batch_size}
    about |= {"buffer_size": args.buffer_size, "n_batches": n_batches, "ignored_share": ignored_share}
    _print_headline(machine, data, about)
    about_machine = {**dataclasses.asdict(machine), "cores": machine.cores}
    report = {"machine": about_machine, "data": about, "settings": dataclasses.asdict(settings)}
    cfg = data.config(args.batch_size, args.buffer_size, args.act_dtype)
    sides = make_sides(data, layers_data, cfg, sorted(set(args.workers)), ignored)
    sides = [side for side in sides if _is_wanted(side.name, args.only)]
    if not args.no_warm:
        warm_up(data, layers_data)
        if _is_wanted("epochs", args.only):
            table = run_epochs(1 if args.quick else n_rounds, data, cfg, sorted(set(args.workers)))
            report["epochs"] = table.to_json()
            print(f"\nwhole epochs and the steady state, GB/s (of the limit)\n{table}")
            if args.plot is not None:
                _draw(table, args.plot)
            warm_up(data, None)
        warm = run_warm(settings, machine.cores, data, args.batch_size, sides)
        report["warm"] = warm.to_json()
        title = f"warm, steady state, {settings.n_rounds} rounds; {_where_timed(sides)}"
        print("\n" + warm.to_table(title, f"{machine.cores:g} cores / (1/read + 1/gather)"))
        report |= _bench_others(args.only, settings, cfg)
    if args.cold:
        cold, cached = run_cold(settings, data, layers_data, sides)
        report["cold"] = {**cold.to_json(), "cached_share": cached}
        print("\n" + cold.to_table(f"cold, whole epochs, {settings.n_rounds} rounds", "best raw read"))
        if cached > NOT_COLD:
            print(f"note: up to {cached:.0%} of the pages stayed in the page cache, so this was not quite cold")
    return report


def _draw(table: EpochTable, path: Path) -> None:
    # Imported only here: matplotlib is an extra.
    from saev_torch.bench.figure import draw_epochs
    from saev_torch.tools.style import save

    save(draw_epochs(table), path)
    print(f"figure: {path}")


def _bench_others(only: Sequence[str], settings: Settings, cfg: ShuffledConfig) -> dict[str, Any]:
    report: dict[str, Any] = {}
    if _is_wanted("first", only):
        # The first time finds nothing prepared, as in a process that has just begun.
        first = Spread(tuple(first_batch_s(cfg) for _ in range(1 + settings.n_rounds))[1:])
        report["first_batch_s"] = first.to_json()
        print(f"\nfirst batch: {first} s after iter(), warm, 0 workers")
    if _is_wanted("memory", only):
        sides = {f"{n} workers": functools.partial(measure_memory, cfg, n) for n in settings.memory_workers}
        uses = [use for (use,) in run_rounds("memory", 1, sides).values()]
        report["memory"] = [use.to_json() for use in uses]
        print("\nmemory: sum of proportional set sizes over all processes, in GB, medians of tenths of an epoch")
        print(*uses, sep="\n")
    return report


def _where_timed(sides: Sequence[Side]) -> str:
    long = {side.is_long for side in sides if side.has_buffer}
    return {
        frozenset(): "no side has a buffer",
        frozenset({True}): "timed within an epoch, the buffer full",
        frozenset({False}): "whole epochs, as they are short, with the filling of the buffer",
    }.get(frozenset(long), "whole epochs where they are short, with the filling of the buffer; else within an epoch")


def _print_headline(machine: Machine, data: BenchData, about: dict[str, Any]) -> None:
    md, available = data.store.metadata, machine.available_nbytes
    print(f"machine: {machine.cores:g} cores, {available / 1e9:.1f} GB of memory available; {machine.system}")
    print(
        f"data: {data.nbytes / 1e9:.2f} GB in {data.n_samples:,} samples of {md.d_model} {md.dtype}, layer "
        f"{data.layer} of {list(md.layers)}; {about['n_batches']} batches of {about['batch_size']}, buffer of "
        f"{about['buffer_size']}"
    )
    if about["ignored_share"]:
        print(f"labels: those that are ignored stand on {about['ignored_share']:.2f} of the tokens")
    if about["n_batches"] <= about["buffer_size"]:
        print("note: all data fit into the buffer, which is no test of a loader; take more, or a smaller --buffer-size")
    if data.nbytes > available:
        print("note: the data do not fit into memory, so nothing here is really warm")
