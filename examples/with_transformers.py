"""Train with Hugging Face's Trainer, whose `get_train_dataloader` hands out our loader.

    python examples/with_transformers.py SHARDS --layer 11
    torchrun --nproc-per-node=2 examples/with_transformers.py SHARDS --layer 11

The same command goes on from the last checkpoint: the Trainer reads the epoch up to there, and trains on the rest.
"""

import torch
from common import make_sae, parse
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from saev_torch import ShuffledDataLoader


class Model(torch.nn.Module):
    def __init__(self, sae: torch.nn.Module) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, act: torch.Tensor, **others: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.sae.normalise(act)
        return {"loss": (x - self.sae(x)).square().mean()}


class Callback(TrainerCallback):
    def on_epoch_begin(self, args, state, control, train_dataloader, **others) -> None:
        train_dataloader.set_epoch(int(state.epoch))  # it resumes by counting, and the count is of this epoch

    def on_pre_optimizer_step(self, args, state, control, model, **others) -> None:
        model.sae.project_gradient()

    def on_step_end(self, args, state, control, model, **others) -> None:
        model.sae.normalise_decoder()


class ActivationsTrainer(Trainer):
    def get_train_dataloader(self) -> ShuffledDataLoader:
        return self.train_dataset


def main() -> None:
    args = parse(__doc__)
    loader = ShuffledDataLoader(args.cfg, num_workers=args.workers)
    options = {"num_train_epochs": args.epochs, "max_steps": args.stop or -1, "learning_rate": args.lr}
    options |= {"save_steps": args.save_every, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(args.out), **options)
    trainer = ActivationsTrainer(Model(make_sae(args.cfg)), arguments, train_dataset=loader, callbacks=[Callback()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out))
    loader.shutdown()


if __name__ == "__main__":
    main()
