"""Go through the package, and through the help of all commands, where nothing is installed that it can do without.

    python bare.py '{"shards": ..., "place": ..., "packages": [...]}'

prints, as JSON, what failed by step, and the help of each command by its name and the width of the terminal.
"""

import contextlib
import io
import json
import os
import sys
from typing import Any


def _help(name: str, width: int) -> str:
    from saev_torch.__main__ import main

    os.environ["COLUMNS"] = str(width)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([name, "--help"])
    return out.getvalue()


def _main(shards: str, place: str, packages: list[str]) -> dict[str, Any]:
    for package in packages:
        sys.modules[package] = None  # type: ignore[assignment]
    import touring

    from saev_torch.__main__ import COMMANDS

    steps = touring.tour(shards, place, [0], [""])["steps"]
    shown = {f"{name} {width}": _help(name, width) for name in COMMANDS for width in (80, 100, 300)}
    return {"steps": steps, "help": shown}


if __name__ == "__main__":
    print(json.dumps(_main(**json.loads(sys.argv[1]))))
