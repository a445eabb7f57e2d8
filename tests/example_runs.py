"""Runs files of `examples/` in turn, as they are; under torchrun each rank writes what its model was trained on.

torchrun ... example_runs.py '{"runs": {"a name": ["plain.py", "SHARDS", "--layer=7", ...]}, "out": ...}'
"""

import contextlib
import io
import json
import logging
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from saev_torch.tools.demo.sae import TopKSAE

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: str) -> dict[str, Any]:
    """Run one, and return the first value of each sample that it was trained on, by step, and the last line it said."""
    trained: list[list[float]] = []

    def normalise(self: TopKSAE, act: torch.Tensor) -> torch.Tensor:
        trained.append(act[:, 0].tolist())
        return original(self, act)

    original, TopKSAE.normalise = TopKSAE.normalise, normalise  # type: ignore[method-assign]
    argv, sys.argv = sys.argv, [script, *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        sys.argv, TopKSAE.normalise = argv, original  # type: ignore[method-assign]
    return {"trained": trained, "said": said.getvalue().splitlines()}


def _main(runs: dict[str, list[str]], out: str) -> None:
    sys.path.insert(0, str(EXAMPLES))
    # One group for all of them: what torchrun has told these processes makes one.
    end, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    begin = dist.init_process_group
    dist.init_process_group = lambda *args, **options: None if dist.is_initialized() else begin(*args, **options)
    found = {name: run(*arguments) for name, arguments in runs.items()}
    Path(out, f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        end()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    _main(**json.loads(sys.argv[1]))
