"""What the examples share: their arguments, and the sparse autoencoder of `python -m saev_torch demo`."""

import argparse
from pathlib import Path

import torch

from saev_torch import IndexedConfig, IndexedDataset, ShuffledConfig
from saev_torch.tools.demo.sae import Recipe, TopKSAE


def parse(description: str) -> argparse.Namespace:
    """Read the command line. `args.cfg` says what to train on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="shard directory, <shards_root>/<hash>")
    parser.add_argument("--layer", type=int, required=True, help="a recorded layer")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--stop", type=int, help="end after so many steps, as if the job were preempted")
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder of checkpoints, to continue from")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.cfg = ShuffledConfig(args.shards, layer=args.layer, batch_size=args.batch_size)
    return args


def make_sae(cfg: ShuffledConfig) -> TopKSAE:
    """Make the autoencoder of the demo, centred and scaled by samples from all over the data."""
    data = IndexedDataset(IndexedConfig(cfg.shards, layer=cfg.layer))
    numbers = torch.linspace(0, len(data) - 1, min(2048, len(data))).long()
    acts = torch.stack([sample["act"] for sample in data.__getitems__(numbers.tolist())])
    return TopKSAE(acts, Recipe(n_latents=8 * data.d_model, k=min(16, data.d_model)))
