"""One rank, started by torchrun: `rank_records.py ROOT` records its share of a small transformer."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from saev_torch.writing.recorder import record

N_EXAMPLES, N_TOKENS, D_MODEL = 22, 5, 16


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D_MODEL, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def make_data() -> "TensorDataset":
    return TensorDataset(torch.randn(N_EXAMPLES, N_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1)))


def main(root: Path, **options: Any) -> Path:
    torch.set_num_threads(1)
    options = {
        "layers": [0, -1], "family": "plain", "ckpt": "seed 0", "dataset": "noise", "cls_token": True,
        "max_tokens_per_shard": 50, **options,
    }  # fmt: skip
    return record(make_model(), DataLoader(make_data(), batch_size=4), shards_root=root, **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), progress=False)
