"""Train a sparse autoencoder in a plain loop, on a GPU where there is one.

    python examples/plain.py SHARDS --layer 11

Stop it at any time. The same command goes on with the batch after the last one that a checkpoint has seen.
"""

import torch
from common import make_sae, parse

from saev_torch import DevicePrefetcher, ShuffledDataLoader


def main() -> None:
    args = parse(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = make_sae(args.cfg).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr)
    loader = ShuffledDataLoader(args.cfg, num_workers=args.workers)
    batches = DevicePrefetcher(loader, device)
    step, checkpoint = 0, args.out / "plain.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        sae.load_state_dict(saved["sae"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.load_state_dict(saved["batches"])
        step = saved["step"]

    while step < args.epochs * len(loader) and step != args.stop:
        for batch in batches:  # an epoch, or what is left of the one that was begun
            x = sae.normalise(batch["act"])
            loss = (x - sae(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            sae.project_gradient()
            optimizer.step()
            sae.normalise_decoder()
            step += 1
            if step % args.save_every == 0 or step == args.stop:
                saved = {"sae": sae.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**saved, "batches": batches.state_dict(), "step": step}, checkpoint)
            if step == args.stop:
                break
        print(f"step {step}: loss {loss.item():.4f}; digest {loader.digest}")
    loader.shutdown()


if __name__ == "__main__":
    main()
