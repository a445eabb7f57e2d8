"""The demo's second half: a small TopK sparse autoencoder (Gao et al. 2024, arXiv:2406.04093) and its training.

x_hat = decode(topk(encode(x))) on activations that were centred and scaled by constants of one batch, so that the mean
norm is sqrt(d_model) and one learning rate suits every layer of every model.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sized
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_N_WARMUP = 20
_DECAY_SHARE = 0.25
_CHUNK = 4096


class Loader(Sized, Iterable[dict[str, Tensor]], Protocol):
    """What `train` iterates: each iteration is an epoch of batches with "act" [batch, d_model] float32."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the autoencoder is made and trained."""

    n_latents: int = 2048  # Width of the dictionary.
    k: int = 16  # Latents that may be active for one sample.
    lr: float = 2e-3  # Peak learning rate of Adam.
    n_epochs: int = 10  # Passes over the training activations.
    seed: int = 0  # Seed of the initial weights.


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """One training step, as it was."""

    step: int  # Counted from 1.
    loss: float  # ||x - x_hat||^2 / d_model in normalised units, mean over the batch.
    samples_per_s: float  # Training rate since the first step.
    wait_share: float  # Share of the time since then that was spent waiting for the loader.


class TopKSAE(nn.Module):
    """A dictionary of `n_latents` directions, of which the `k` strongest describe a sample.

    The centre and the scale of the data are taken from an example batch, [batch, d_model] float32.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, example_batch: Tensor, recipe: Recipe) -> None:
        super().__init__()
        d_model = example_batch.shape[1]
        mean = example_batch.mean(dim=0)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", d_model**0.5 / (example_batch - mean).norm(dim=1).mean())
        generator = torch.Generator().manual_seed(recipe.seed)
        directions = F.normalize(torch.randn(recipe.n_latents, d_model, generator=generator), dim=1)
        self.k = recipe.k
        self.decoder = nn.Parameter(directions)
        # Tied at the start only: a latent first reads the direction that it writes.
        self.encoder = nn.Parameter(directions.clone())
        self.bias = nn.Parameter(torch.zeros(recipe.n_latents))
        self.decoder_bias = nn.Parameter(torch.zeros(d_model))

    def normalise(self, act: Tensor) -> Tensor:
        """Centre and scale [batch, d_model] activations."""
        return (act - self.mean) * self.scale

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values [batch, k] float32, zero where off, and the latents [batch, k] int64 of normalised `x`."""
        values, latents = F.linear(x - self.decoder_bias, self.encoder, self.bias).topk(self.k, dim=1, sorted=False)
        return values.relu(), latents

    def decode(self, values: Tensor, latents: Tensor) -> Tensor:
        """Return the reconstruction [batch, d_model] in normalised units, by k rows of the decoder a sample."""
        rows = F.embedding_bag(latents, self.decoder, per_sample_weights=values, mode="sum")
        return rows + self.decoder_bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x_hat for normalised `x`, both [batch, d_model]."""
        return self.decode(*self.encode(x))

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take away what of the decoder's gradient would only change the length of its rows."""
        if self.decoder.grad is not None:
            along = (self.decoder.grad * self.decoder).sum(dim=1, keepdim=True)
            self.decoder.grad -= along * self.decoder

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every row of the decoder length 1; else the values of latents could not be compared."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))


@torch.no_grad()
def explained_variance(sae: TopKSAE, act: Tensor) -> float:
    """Return 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2 over [n_samples, d_model] activations."""
    x = sae.normalise(act)
    residual = sum(float((part - sae(part)).square().sum()) for part in torch.split(x, _CHUNK))
    return 1.0 - residual / float((x - x.mean(dim=0)).square().sum())


def train(sae: TopKSAE, loader: Loader, recipe: Recipe, on_step: Callable[[TrainingStep], None]) -> None:
    """Train an autoencoder in place; `on_step` is called after each step, and its time is not counted in the rates."""
    n_steps = recipe.n_epochs * len(loader)
    optimizer = torch.optim.Adam(sae.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n_done: _lr_factor(n_done, n_steps))
    step, n_samples, waited_s, spent_s = 0, 0, 0.0, 0.0
    for _ in range(recipe.n_epochs):
        batches = iter(loader)
        asked = time.perf_counter()
        for batch in batches:
            got = time.perf_counter()
            x = sae.normalise(batch["act"])
            loss = (x - sae(x)).square().sum(dim=1).mean() / x.shape[1]
            optimizer.zero_grad()
            loss.backward()
            sae.project_gradient()
            optimizer.step()
            sae.normalise_decoder()
            schedule.step()
            step += 1
            n_samples += len(x)
            waited_s += got - asked
            spent_s += time.perf_counter() - asked
            on_step(TrainingStep(step, loss.item(), n_samples / spent_s, waited_s / spent_s))
            asked = time.perf_counter()


def _lr_factor(n_done: int, n_steps: int) -> float:
    left = (n_steps - n_done) / (n_steps * _DECAY_SHARE)
    return max(0.0, min(1.0, (n_done + 1) / _N_WARMUP, left))
