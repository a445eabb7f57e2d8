"""Train with Lightning: the data module keeps in each checkpoint where the data stand.

    python examples/with_lightning.py SHARDS --layer 11
    torchrun --nproc-per-node=2 examples/with_lightning.py SHARDS --layer 11

The same command goes on from the last checkpoint, also in the middle of an epoch.
"""

import os

import torch
from common import make_sae, parse
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from saev_torch.lightning import ActivationsDataModule


class Module(LightningModule):
    def __init__(self, sae: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.sae, self.lr = sae, lr

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x = self.sae.normalise(batch["act"])
        return (x - self.sae(x)).square().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.sae.project_gradient()

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        self.sae.normalise_decoder()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def main() -> None:
    args = parse(__doc__)
    data = ActivationsDataModule(args.cfg, num_workers=args.workers)
    n_ranks = int(os.environ.get("WORLD_SIZE", 1))
    trainer = Trainer(
        max_epochs=args.epochs,
        max_steps=args.stop or -1,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy="ddp" if n_ranks > 1 else "auto",
        callbacks=[ModelCheckpoint(args.out, every_n_train_steps=args.save_every, save_last=True)],
        logger=False,
    )
    trainer.fit(Module(make_sae(args.cfg), args.lr), datamodule=data, ckpt_path="last")
    print(f"rank {trainer.global_rank}, step {trainer.global_step}: digest {data.digest}")


if __name__ == "__main__":
    main()
