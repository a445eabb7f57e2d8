"""Train with Lightning Fabric, which takes our loader as it is.

    python examples/with_fabric.py SHARDS --layer 11
    torchrun --nproc-per-node=2 examples/with_fabric.py SHARDS --layer 11

The same command goes on from the last checkpoint, also in the middle of an epoch.
"""

import os

import torch
from common import make_sae, parse
from lightning import Fabric

from saev_torch import ShuffledDataLoader


def main() -> None:
    args = parse(__doc__)
    n_ranks = int(os.environ.get("WORLD_SIZE", 1))
    fabric = Fabric(devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)), strategy="ddp" if n_ranks > 1 else "auto")
    fabric.launch()
    sae = make_sae(args.cfg)
    model, optimizer = fabric.setup(sae, torch.optim.Adam(sae.parameters(), lr=args.lr))
    loader = ShuffledDataLoader(args.cfg, num_workers=args.workers)
    batches = fabric.setup_dataloaders(loader)
    state = {"model": model, "optimizer": optimizer, "loader": {}, "step": 0}
    checkpoint = args.out / "fabric.ckpt"
    if checkpoint.exists():
        fabric.load(checkpoint, state)
        loader.load_state_dict(state["loader"])

    while state["step"] < args.epochs * len(loader) and state["step"] != args.stop:
        for batch in batches:
            x = sae.normalise(batch["act"])
            loss = (x - model(x)).square().mean()
            optimizer.zero_grad()
            fabric.backward(loss)
            sae.project_gradient()
            optimizer.step()
            sae.normalise_decoder()
            state["step"] += 1
            if state["step"] % args.save_every == 0 or state["step"] == args.stop:
                state["loader"] = loader.state_dict()
                fabric.save(checkpoint, state)
            if state["step"] == args.stop:
                break
        print(f"rank {fabric.global_rank}, step {state['step']}: loss {loss.item():.4f}; digest {loader.digest}")
    loader.shutdown()


if __name__ == "__main__":
    main()
