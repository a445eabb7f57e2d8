"""What `test_accelerate.py` starts in two processes: the examples and tokens that a rank sees, in a file.

accelerate_script.py '{"shards": ..., "out": ..., "cases": [{"make": "plain", "dispatch_batches": null, ...}]}', with
the variables of a launcher.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from saev_torch import ShuffledActivations, ShuffledConfig, ShuffledDataLoader
from saev_torch.pipes import ActivationsPipe, StatefulPipe


def _make(make: str, cfg: ShuffledConfig, workers: int) -> "DataLoader[Any]":
    if make == "ready-made":
        return ShuffledDataLoader(cfg, num_workers=workers)
    if make == "pipe":
        return DataLoader(StatefulPipe(ActivationsPipe(ShuffledActivations(cfg))), num_workers=workers)
    alone = {"rank": 0, "world_size": 1} if make == "alone" else {}
    return DataLoader(ShuffledActivations(cfg, **alone), num_workers=workers)


def _run(shards: str, make: str, workers: int = 0, **options: Any) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    found: dict[str, Any] = {"n_processes": accelerator.num_processes, "seen": [], "error": None}
    try:
        cfg = ShuffledConfig(shards=Path(shards), layer=3, batch_size=16, buffer_size=8)
        loader = accelerator.prepare(_make(make, cfg, workers))
        for batch in loader:
            found["seen"].append(torch.stack([batch["example_idx"], batch["token_idx"]], dim=1).tolist())
    except (ValueError, TypeError, RuntimeError) as err:
        found["error"] = f"{type(err).__name__}: {err}"
    accelerator.wait_for_everyone()
    return found


def _main(shards: str, out: str, cases: list[dict[str, Any]]) -> None:
    found = [_run(shards, **case) for case in cases]
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    Accelerator().end_training()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _main(**json.loads(sys.argv[1]))
