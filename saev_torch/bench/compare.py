"""`python -m saev_torch compare`: the figures of README's chart, and the chart, from one run.

Every side once in each round, each round in another order, warm and cold, on data that are made for it. The figures are
medians over the rounds; beside them stands what the machine can do at most, measured in the same rounds.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch

from saev_torch.bench.data import BenchData, example_nbytes, make
from saev_torch.bench.machine import drop_cache, look
from saev_torch.bench.measuring import Measured, measure_cold, measure_warm, running
from saev_torch.bench.others import PACKAGES, make_other_sides, write_litdata
from saev_torch.bench.raw import layer_pieces, read_rate
from saev_torch.bench.rounds import Spread, compare_cold, compare_one_pass, run_rounds, warm_up
from saev_torch.bench.sides import Side, make_side, make_sides
from saev_torch.config import ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.files import write_atomic
from saev_torch.reading.store import advise
from saev_torch.tools.arguments import above_zero, at_least, check_new_file
from saev_torch.writing.progress import Progress

REFERENCE = 25_000
"""Samples/s of saev's own shuffled loader, measured apart on a machine of this kind, warm; cold it has 24,000."""

LABELS = {
    "shuffled": "saev_torch",
    "uniform": 'saev_torch, order="uniform"',
    "memmap": "np.memmap in a DataLoader",
    "torchdata": "torchdata.nodes on np.memmap",
    "spdl": "SPDL on np.memmap",
    "litdata": "LitData, with a window",
}
_BEGIN, _END = "<!-- figures -->", "<!-- /figures -->"
_N_LOOKED_AT = 3
_COLD_THREADS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the comparison's options to its parser."""
    # In a checkout the files of the repository are made anew, elsewhere new ones.
    docs = Path("docs") if Path("docs", "figures.json").exists() else Path()
    pages = [page for page in (Path("README.md"), docs / "benchmarks.md") if docs.name and page.exists()]
    add = parser.add_argument
    add("--make-gb", type=above_zero, default=8.0, metavar="GB", help="size of the data (default: %(default)s)")
    add("--data", type=Path, metavar="FOLDER", help="make them there, or take those that are there, and keep them")
    add("--batch-size", type=at_least(1), default=16384, help="samples in a batch (default: %(default)s)")
    add("--buffer-size", type=at_least(1), default=64, help="batches of our buffer (default: %(default)s)")
    add("--rounds", type=at_least(1), default=5, help="rounds (default: %(default)s)")
    add("--seconds", type=above_zero, default=1.0, help="time of a warm side in a round (default: %(default)s)")
    limit = "stop a cold epoch after this time (default: %(default)s)"
    add("--cold-limit-s", type=above_zero, default=20.0, metavar="S", help=limit)
    add("--json", type=Path, default=docs / "figures.json", help="the figures (default: %(default)s)")
    add("--plot", type=Path, default=docs / "figures.svg", metavar="FILE", help="the chart (default: %(default)s)")
    about = "pages whose table is to be written anew (default: those of a checkout)"
    add("--pages", type=Path, nargs="*", default=pages, help=about)
    add("--draw-only", action="store_true", help="measure nothing: draw the figures that --json has")


def run(args: argparse.Namespace) -> int:
    """Measure, write the figures and draw them; returns 0."""
    # Now, and not after all the work; to ask for --help does not take them.
    for name in ("matplotlib", *(() if args.draw_only else ("psutil",))):
        importlib.import_module(name)
    from saev_torch.bench.figure import draw_comparison
    from saev_torch.tools.style import save

    check_new_file("--json", args.json)
    check_new_file("--plot", args.plot)
    if args.draw_only and not args.json.is_file():
        raise ConfigError(f"--draw-only: expected the figures of a run, got no file {args.json}; measure first.")
    if not args.draw_only:
        made = tempfile.TemporaryDirectory(prefix="saev_torch_compare_")
        with contextlib.nullcontext(args.data) if args.data else made as folder:
            report = _measure(args, Path(folder))
        write_atomic(args.json, (json.dumps(report, indent=1) + "\n").encode())
    report = json.loads(args.json.read_text())
    save(draw_comparison(report), args.plot)
    for page in args.pages:
        before, begin, rest = page.read_text().partition(_BEGIN)
        _, end, after = rest.partition(_END)
        write_atomic(page, f"{before}{begin}\n{table(report)}\n{end}{after}".encode())
    print(table(report))
    return 0


def table(report: dict[str, Any]) -> str:
    """The figures as a table for a page, and a line that says what they are of."""
    data, limits, sides = report["data"], report["limits"], report["sides"].values()
    rows = [
        "| thousand samples/s | in the page cache | from disk | distinct examples in a batch |",
        "|---|---:|---:|---:|",
    ]
    for side in sorted(sides, key=lambda side: -float(side["warm"]["median"])):
        rates = " | ".join(f"{side[kind]['median'] / 1e3:,.0f}" for kind in ("warm", "cold"))
        rows.append(f"| {side['label']} | {rates} | {side['distinct_examples']:,} |")
    most = " | ".join(f"*{limits[kind] / 1e3:,.0f}*" for kind in ("warm", "cold"))
    rows.append(f"| *the machine, at most* | {most} | *{data['distinct_in_a_uniform_draw']:,}* |")
    n_cores, buffer_size = report["machine"]["cores"], data["buffer_size"]
    about = (
        f"Measured on {data['nbytes'] / 1e9:.1f} GB, which memory holds, with {n_cores:g} cores: vectors of "
        f"{data['d_model']} float32 values, batches of {data['batch_size']:,}, a buffer of {buffer_size} batches. Each "
        f"figure is the median of {report['rounds']} rounds, in which the loaders take turns ({report['date']}). *In "
        "the page cache* is the steady state. *From disk* is a first epoch, start of workers included, whose pages "
        "were dropped from the page cache before. *The machine, at most* copies each byte once from the page cache, in "
        "the order of the files; from disk it only reads. The more distinct examples, the better mixed is a batch."
    )
    return "\n".join([*rows, "", textwrap.fill(about, 124)])


def _measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    data, litdata = _make(args.make_gb, folder)
    n = max(1, round(look().cores))
    cfg = data.config(args.batch_size, args.buffer_size)
    sides = _sides(data, cfg, n, litdata)
    names = {side.name: side.name.partition("-")[0] for side in sides}
    warm_up(data, None)
    pieces, d_model = layer_pieces(data.store, data.layer), data.store.metadata.d_model
    buffer_nbytes = cfg.buffer_size * cfg.batch_size * data.sample_nbytes
    one_pass = functools.partial(
        read_rate, data.store, pieces, n_threads=n, repeat=False, memory_nbytes=min(data.nbytes, buffer_nbytes)
    )
    todo: dict[str, functools.partial[Measured]] = {"one-pass": one_pass}
    todo |= {side.name: functools.partial(measure_warm, side, args.seconds, False) for side in sides}
    warm = compare_one_pass(run_rounds("warm", args.rounds, todo))
    raw = functools.partial(read_rate, data.store, pieces, n_threads=_COLD_THREADS, repeat=False)
    emptied = {f"raw-{_COLD_THREADS}": functools.partial(_cold, data, litdata, raw)}
    for side in sides:
        epoch = functools.partial(measure_cold, side, args.cold_limit_s, False)
        emptied[side.name] = functools.partial(_cold, data, litdata, epoch)
    cold = compare_cold(run_rounds("cold", args.rounds, emptied))
    uniform_draw = _expected_distinct(data, args.batch_size)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"cores": look().cores, "system": look().system},
        "versions": {name: _version(name) for name in ("saev_torch", "torch", *PACKAGES.values())},
        "data": {
            "nbytes": data.nbytes,
            "n_samples": data.n_samples,
            "d_model": d_model,
            "batch_size": args.batch_size,
            "buffer_size": cfg.buffer_size,
            "tokens_per_example": data.store.metadata.content_tokens_per_example,
            "distinct_in_a_uniform_draw": round(uniform_draw),
        },
        "rounds": args.rounds,
        "reference": REFERENCE,
        "limits": {
            "warm": _samples(warm.limit, data),
            "cold": _samples(cold.limit, data),
        },
        "sides": {
            names[side.name]: {
                "label": LABELS[names[side.name]],
                "workers": side.n_workers,
                "warm": warm.sides[side.name]["samples_per_s"].to_json(),
                "cold": cold.sides[side.name]["samples_per_s"].to_json(),
                "distinct_examples": round(_distinct(side, data)),
            }
            for side in sides
        },
    }


def _make(gigabytes: float, folder: Path) -> tuple[BenchData, Path | None]:
    """Shards, and where it is installed the same for LitData."""
    root, litdata = folder / "shards", folder / "litdata"
    n_examples = max(1, round(gigabytes * 1e9 / example_nbytes("float32")))
    if not root.exists():
        root.mkdir(parents=True)
        with Progress(n_examples, "making data", "examples") as progress:
            make(root, n_examples, 1, progress.update)
    data = BenchData.open(next(root.iterdir()), None)
    if importlib.util.find_spec(PACKAGES["litdata"]) is None:
        return data, None
    if not litdata.exists():
        write_litdata(data, litdata)
    return data, litdata


def _sides(data: BenchData, cfg: ShuffledConfig, n: int, litdata: Path | None) -> list[Side]:
    uniform = dataclasses.replace(cfg, order="uniform")
    ours = [make_side(f"shuffled-{n}", cfg, n, data)]
    # It has no buffer that an epoch fills and empties.
    ours.append(dataclasses.replace(make_side(f"uniform-{n}", uniform, n, data), n_settle=2 * n + 2, n_lanes=0))
    memmap = [side for side in make_sides(data, None, cfg, [0], []) if side.name == "memmap-0"]
    return ours + memmap + make_other_sides(data, cfg.batch_size, n, litdata)


def _cold(data: BenchData, litdata: Path | None, measure: "functools.partial[Measured]") -> Measured:
    drop_cache([data.store])
    for path in litdata.iterdir() if litdata is not None else ():
        fd = os.open(path, os.O_RDONLY)
        try:
            advise(fd, "DONTNEED")
        finally:
            os.close(fd)
    return measure()


def _distinct(side: Side, data: BenchData) -> float:
    """Examples in a batch, on average over some, taken when the buffer is full."""
    width, found = data.store.metadata.content_tokens_per_example, []
    with running(side.make()) as loader:
        for i, batch in enumerate(loader):
            if i >= min(side.n_settle, side.n_batches - 1 - _N_LOOKED_AT):
                examples = batch["example_idx"] if "example_idx" in batch else batch["index"] // width
                found.append(len(torch.unique(examples)))
            if len(found) == _N_LOOKED_AT:
                break
    return sum(found) / len(found)


def _expected_distinct(data: BenchData, batch_size: int) -> float:
    n, width = data.store.metadata.n_examples, data.store.metadata.content_tokens_per_example
    size = min(batch_size, data.n_samples)
    # The chance that none of an example's tokens is drawn, to a part in a thousand.
    return float(n * (1 - (1 - size / data.n_samples) ** width))


def _samples(limit: Spread, data: BenchData) -> float:
    return float(limit.median * 1e9 / data.sample_nbytes)


def _version(package: str) -> str | None:
    for name in (package, f"{package}-core"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
