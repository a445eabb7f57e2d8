"""Train with Accelerate, which leaves our loader as it is, and keeps its state in checkpoints.

    python examples/with_accelerate.py SHARDS --layer 11
    accelerate launch --num-processes 2 examples/with_accelerate.py SHARDS --layer 11

The same command goes on from the last checkpoint, also in the middle of an epoch.
"""

import torch
from accelerate import Accelerator
from common import make_sae, parse

from saev_torch import DevicePrefetcher, ShuffledDataLoader


class Steps:
    """Counts steps, also in checkpoints."""

    n = 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


def main() -> None:
    args, accelerator, steps = parse(__doc__), Accelerator(), Steps()
    sae = make_sae(args.cfg).to(accelerator.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr)
    loader = ShuffledDataLoader(args.cfg, num_workers=args.workers)
    model, optimizer, loader = accelerator.prepare(sae, optimizer, loader)
    accelerator.register_for_checkpointing(steps)
    if (args.out / "accelerate").exists():
        accelerator.load_state(args.out / "accelerate")

    while steps.n < args.epochs * len(loader) and steps.n != args.stop:
        for batch in DevicePrefetcher(loader, accelerator.device):
            x = sae.normalise(batch["act"])
            loss = (x - model(x)).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            sae.project_gradient()
            optimizer.step()
            sae.normalise_decoder()
            steps.n += 1
            if steps.n % args.save_every == 0 or steps.n == args.stop:
                accelerator.save_state(args.out / "accelerate")
            if steps.n == args.stop:
                break
        print(f"rank {accelerator.process_index}, step {steps.n}: loss {loss.item():.4f}; digest {loader.digest}")
    loader.shutdown()


if __name__ == "__main__":
    main()
