"""One rank, started by torchrun: `rank_writes.py ROOT` writes its share of the formula of factory.py."""

import os
import sys
from pathlib import Path

import factory

from saev_torch.format.metadata import Metadata
from saev_torch.writing.writer import ShardWriter

SPEC = factory.Spec(n_examples=121, examples_per_shard=17, d_model=16)


def main(root: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    md = Metadata(**SPEC.metadata())
    acts, labels = factory.oracle(SPEC), factory.oracle_labels(SPEC)
    bounds = [md.n_examples * i // world_size for i in range(world_size + 1)]
    with ShardWriter(root, md, example_range=(bounds[rank], bounds[rank + 1])) as writer:
        for at in range(*writer.example_range, 5):
            rows = slice(at, min(writer.example_range[1], at + 5))
            writer.write_batch(acts[rows], at, labels[rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
