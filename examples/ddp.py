"""Train on several GPUs, or on several CPU processes, with DistributedDataParallel.

    torchrun --nproc-per-node=2 examples/ddp.py SHARDS --layer 11

Rank r of R gets the batches r, r + R, r + 2 R, ... of the one sequence. The same command goes on from the last
checkpoint, on any number of ranks.
"""

import os

import torch
import torch.distributed as dist
from common import make_sae, parse
from torch.nn.parallel import DistributedDataParallel

from saev_torch import DevicePrefetcher, ShuffledDataLoader


def main() -> None:
    args = parse(__doc__)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if has_gpu else "gloo")
    sae = make_sae(args.cfg).to(device)
    model = DistributedDataParallel(sae)
    optimizer = torch.optim.Adam(sae.parameters(), lr=args.lr)
    loader = ShuffledDataLoader(args.cfg, num_workers=args.workers)  # finds its rank by itself
    batches = DevicePrefetcher(loader, device)
    step, checkpoint = 0, args.out / "ddp.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        sae.load_state_dict(saved["sae"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.load_state_dict(saved["batches"])
        step = saved["step"]

    while step < args.epochs * len(loader) and step != args.stop:
        for batch in batches:
            x = sae.normalise(batch["act"])
            loss = (x - model(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            sae.project_gradient()
            optimizer.step()
            sae.normalise_decoder()
            step += 1
            if dist.get_rank() == 0 and (step % args.save_every == 0 or step == args.stop):
                saved = {"sae": sae.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**saved, "batches": batches.state_dict(), "step": step}, checkpoint)
            if step == args.stop:
                break
        print(f"rank {dist.get_rank()}, step {step}: loss {loss.item():.4f}; digest {loader.digest}")
    loader.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
