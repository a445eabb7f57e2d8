"""What `test_ranks.py` starts under torchrun: an all-reduce for each batch, and the digests of the batches in a file.

torchrun ... torchrun_script.py '{"shards": ..., "fields": {...}, "workers": 1, "out": ..., "state": ..., "stop": 5}'
"""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import contracts
import torch
import torch.distributed as dist

from saev_torch import ShuffledConfig, ShuffledDataLoader


def _main(shards: str, fields: dict[str, Any], workers: int, out: str, state: Any, epochs: int, stop: int) -> None:
    # Made before the process group, as many scripts do: ranks must be looked up when iterating.
    loader = ShuffledDataLoader(ShuffledConfig(shards=Path(shards), **fields), num_workers=workers)
    # A rank that waits for another one at the end fails after this time.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=200))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if state is not None:
        loader.load_state_dict(state)
    digests: list[list[str]] = []
    for epoch in range(epochs):
        digests.append([])
        for batch in loader:
            n_ranks = torch.ones(())
            dist.all_reduce(n_ranks)
            assert n_ranks == world_size
            digests[-1].append(contracts.digest([batch]))
            if epoch == epochs - 1 and len(digests[-1]) == stop:
                break
    found = {"digests": digests, "state": loader.state_dict(), "len": len(loader), "digest": str(loader.digest)}
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    loader.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(**json.loads(sys.argv[1]))
