"""What commands ask of their arguments: types for `argparse`, and checks that come before all the work."""

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path

from saev_torch.errors import ConfigError
from saev_torch.format.examples import Examples


def at_least(least: int) -> Callable[[str], int]:
    """Make the type of an argument: an integer of at least `least`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text}")

    return parse


def integers(least: float = -math.inf) -> Callable[[str], list[int]]:
    """Make the type of an argument: a list of integers of at least `least`, as in 0,1,2."""

    def parse(text: str) -> list[int]:
        with contextlib.suppress(ValueError):
            numbers = [int(part) for part in text.split(",")]
            if min(numbers) >= least:
                return numbers
        bound = "" if least == -math.inf else f" of at least {least}"
        raise argparse.ArgumentTypeError(
            f"expected integers{bound} with commas between them, as in 0,1,2, got {text!r}"
        )

    return parse


EXAMPLES_HELP = "examples: start:stop, a list 3,5,8, or a share by hash 0.0:0.9"


def examples(text: str) -> Examples:
    """The type of an argument: start:stop or start:, a list of integers, or a share drawn by hash, as in 0.0:0.9."""
    low, colon, high = text.partition(":")
    with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
        if "." in text:
            return Examples.fraction(float(low), float(high))
        if colon:
            return Examples.span(int(low or 0), int(high) if high else None)
        return Examples.only(integers(0)(text))
    raise argparse.ArgumentTypeError(f"expected start:stop, a list as in 3,5,8, or a share as in 0.0:0.9, got {text!r}")


def positions(text: str) -> slice | list[int] | Examples:
    """The type of an argument: start:stop, start:stop:step, a list of integers from 0 on, or a share as in 0.0:0.9."""
    if "." in text:
        return examples(text)
    if ":" in text:
        with contextlib.suppress(ValueError):
            parts = [int(part) if part else None for part in text.split(":")]
            if len(parts) <= 3 and parts[2:] != [0]:
                return slice(*parts)
    else:
        with contextlib.suppress(argparse.ArgumentTypeError):
            return integers(0)(text)
    raise argparse.ArgumentTypeError(f"expected start:stop, start:stop:step, or a list as in 3,5,8, got {text!r}")


def above_zero(text: str) -> float:
    """The type of an argument: a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")


def check_new_file(option: str, path: Path | None) -> None:
    """Refuse a file that has no folder now, and not after all the work."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: expected a file in a folder that exists, got {path}; make the folder first.")
