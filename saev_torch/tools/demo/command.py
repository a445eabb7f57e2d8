"""`python -m saev_torch demo`: from a real model to a sparse autoencoder and a figure, in a minute or two.

Records MiniLM's residual stream over Python's own help texts into shards of bfloat16, trains a TopK autoencoder on
`DataLoader(ShuffledActivations(cfg))`, and follows `example_idx` and `token_idx` back to the text to show what single
latents mean. Needs the `demo` extra.
"""

import argparse
import contextlib
import importlib
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from saev_torch.batch import ActivationBatch
from saev_torch.config import OrderedConfig, ShuffledConfig, make_ordered_config
from saev_torch.errors import ConfigError
from saev_torch.format.dtypes import DTYPES, FLOAT32
from saev_torch.iterable.activations import OrderedActivations, ShuffledActivations
from saev_torch.tools.arguments import at_least
from saev_torch.tools.demo.corpus import LAYERS, N_CONTENT, make_corpus, record_corpora, split
from saev_torch.tools.demo.meanings import Firings, find_meanings
from saev_torch.tools.demo.sae import Recipe, TopKSAE, TrainingStep, explained_variance, train

_N_WORKERS = 2
_BATCH_SIZE = 2048
_EVALUATE_EVERY = 20
_N_TIMED_EPOCHS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to its parser."""
    parser.add_argument("--out", type=Path, default=Path("saev_torch_demo.png"), help="figure (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the shards under this folder")
    dtype = "type of the values that are stored and trained on (default: %(default)s)"
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help=dtype)
    parser.add_argument("--layer", type=int, choices=LAYERS, default=LAYERS[-1], help="layer to train on")
    parser.add_argument(
        "--windows", type=at_least(1), default=800, help="windows of text at most (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=at_least(1), default=Recipe.n_epochs, help="epochs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and the weights (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the demo, and return 0."""
    started = time.perf_counter()
    # Now, and not after all the work; to ask for --help does not take them.
    for name in ("tqdm", "matplotlib", "tokenizers", "transformers"):
        importlib.import_module(name)
    from saev_torch.tools.demo.figure import draw

    if not args.out.absolute().parent.is_dir():
        raise ConfigError(f"--out: expected a file in a folder that exists, got {args.out}; make the folder first")
    corpus, held_out_corpus = split(make_corpus(args.windows))
    keep, prefix = args.keep, "saev_torch_demo_"
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix=prefix) as root:
        shards = record_corpora(Path(root), {"train": corpus, "held-out": held_out_corpus}, args.dtype)
        n_bytes = sum(path.stat().st_size for folder in shards.values() for path in folder.glob("*.bin"))
        print(f"shards: {n_bytes / 1e6:.0f} MB of {args.dtype}, layers {LAYERS[0]} and {LAYERS[1]} of {root}")
        cfg = ShuffledConfig(shards=shards["train"], layer=args.layer, batch_size=_BATCH_SIZE, seed=args.seed)
        held_out = _read_all(make_ordered_config(cfg, shards=shards["held-out"]))
        exact = held_out
        if args.dtype != FLOAT32.name:
            # What was rounded away is seen only where it is still there.
            exact_shards = record_corpora(Path(root), {"held-out": held_out_corpus})["held-out"]
            exact = _read_all(make_ordered_config(cfg, shards=exact_shards))
        recipe = Recipe(n_epochs=args.epochs, seed=args.seed)

        loader = DataLoader(ShuffledActivations(cfg), num_workers=_N_WORKERS, persistent_workers=True)
        example_batch = _print_rate(loader)
        sae = TopKSAE(example_batch, recipe)
        losses, curve = _train(sae, loader, recipe, held_out)
        # Ends its workers: the files are removed next.
        del loader
        firings = _find_firings(sae, make_ordered_config(cfg))
    n_dead = int((firings.frequencies == 0).sum())
    variance = curve[-1][1]
    print(f"loss: {losses[0]:.3f} -> {losses[-1]:.3f} (squared error per dimension, 1 is the data's variance)")
    print(f"explained variance on held-out activations: {variance:.3f}  (1 - sum ||x - x_hat||^2 / sum ||x - mean||^2)")
    if args.dtype != FLOAT32.name:
        before = explained_variance(sae, exact)
        print(
            f"rounding to {args.dtype} cost {before - variance:+.4f} of it: {before:.4f} as float32, on the same text"
        )
    of = f"{firings.n_latents:,}" + (f" ({n_dead / firings.n_latents:.1%})" if n_dead else "")
    print(f"dead latents, which fire on none of the {firings.n_tokens:,} tokens: {n_dead:,} of {of}")
    draw(
        args.out,
        title=f"A sparse autoencoder explains {100 * variance:.0f} % of the variance of MiniLM's layer {args.layer}",
        subtitle=f"{recipe.n_latents:,} latents, {recipe.k} active per token; trained {recipe.n_epochs} epochs on "
        f"{firings.n_tokens:,} tokens of Python's help texts, scored on {len(held_out):,} others",
        losses=losses,
        curve=curve,
        frequencies=firings.frequencies,
        meanings=find_meanings(firings, corpus),
    )
    print(f"figure: {args.out}")
    if args.dtype != FLOAT32.name:
        as_float32 = n_bytes * FLOAT32.nbytes / DTYPES[args.dtype].nbytes
        print(f"{args.dtype} saved {(as_float32 - n_bytes) / 1e6:.0f} of {as_float32 / 1e6:.0f} MB")
    print(f"done in {time.perf_counter() - started:.0f} s")
    return 0


def _read_all(cfg: OrderedConfig) -> torch.Tensor:
    return torch.cat([batch["act"] for batch in DataLoader(OrderedActivations(cfg))])


def _print_rate(loader: "DataLoader[ActivationBatch]") -> torch.Tensor:
    """Iterate the loader without training, and return the first activations."""
    started = time.perf_counter()
    batches = iter(loader)
    act: torch.Tensor = next(batches)["act"]
    first_s = time.perf_counter() - started
    for _ in batches:
        pass
    # Only now: the first epoch also starts the workers.
    started = time.perf_counter()
    n_samples = sum(len(batch["act"]) for _ in range(_N_TIMED_EPOCHS) for batch in loader)
    rate = n_samples / (time.perf_counter() - started)
    gigabytes = rate * act.shape[1] * act.element_size() / 1e9
    print(
        f"loader alone: {rate:,.0f} samples/s, {gigabytes:.2f} GB/s with {loader.num_workers} workers; "
        f"first batch after {first_s:.2f} s"
    )
    return act


def _train(
    sae: TopKSAE, loader: "DataLoader[ActivationBatch]", recipe: Recipe, held_out: torch.Tensor
) -> tuple[list[float], list[tuple[int, float]]]:
    from tqdm import tqdm

    losses: list[float] = []
    curve: list[tuple[int, float]] = [(0, explained_variance(sae, held_out))]
    n_steps = recipe.n_epochs * len(loader)
    with tqdm(total=n_steps, desc="training", unit=" steps") as bar:

        def on_step(step: TrainingStep) -> None:
            losses.append(step.loss)
            if step.step % _EVALUATE_EVERY == 0 or step.step == n_steps:
                curve.append((step.step, explained_variance(sae, held_out)))
            bar.set_postfix_str(
                f"loss {step.loss:.3f}, explained {curve[-1][1]:.3f}, {step.samples_per_s:,.0f} samples/s, "
                f"{100 * step.wait_share:.0f} % waiting for data",
                refresh=False,
            )
            bar.update()

        train(sae, loader, recipe, on_step)
    return losses, curve


@torch.no_grad()
def _find_firings(sae: TopKSAE, cfg: OrderedConfig) -> Firings:
    """Encode the data in order; `example_idx` and `token_idx` say which token of the text each firing is on."""
    latents, values, positions, n_tokens = [], [], [], 0
    for batch in DataLoader(OrderedActivations(cfg)):
        strengths, which = sae.encode(sae.normalise(batch["act"]))
        position = batch["example_idx"] * N_CONTENT + batch["token_idx"]
        fires = strengths > 0
        latents.append(which[fires])
        values.append(strengths[fires])
        positions.append(position[:, None].expand_as(which)[fires])
        n_tokens += len(position)
    latent, value, position = (torch.cat(parts).numpy() for parts in (latents, values, positions))
    order = np.lexsort((-value, latent))
    return Firings(latent[order], value[order], position[order], n_tokens, len(sae.decoder))
