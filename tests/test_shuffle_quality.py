"""How well the shuffle mixes, at the defaults and a realistic size: sparse files have the sizes and cost no disk."""

import itertools
import json
import os

import numpy as np
import pytest
from factory import Spec
from torch.utils.data import DataLoader

from saev_torch import ShuffledActivations, ShuffledConfig

N_EXAMPLES = 100_000
BATCH_SIZE = 16_384

# What the published loader reaches: its reservoir of 64 batches of 16,384 holds 5,350 examples of 196 tokens.
N_DISTINCT = 5_100


def make_sparse(root, n_tokens, **fields):
    spec = Spec(
        n_examples=N_EXAMPLES, content_tokens=n_tokens, layers=(3,), d_model=1, examples_per_shard=3000, labels=False,
        preallocate_last=False, **fields,
    )  # fmt: skip
    (root / "metadata.json").write_text(json.dumps(spec.metadata()))
    entries = [{"name": name, "n_examples": n_examples} for name, n_examples in spec.shards()]
    (root / "shards.json").write_text(json.dumps(entries))
    for name, n_examples in spec.shards():
        (root / name).touch()
        os.truncate(root / name, n_examples * spec.tokens_per_example * 4)
    return root


@pytest.fixture(scope="module", params=[196, 256, 64])
def data(request, tmp_path_factory):
    """A shard directory, its number of tokens, and the distinct examples that a batch must have."""
    n_tokens = request.param
    # As many as of 196 tokens, in proportion to the examples that the buffer can hold, were they all different.
    least = N_DISTINCT * 196 // n_tokens if n_tokens > 196 else N_DISTINCT
    return make_sparse(tmp_path_factory.mktemp(f"tokens{n_tokens}"), n_tokens), n_tokens, least


def seek(shards, batch, epoch=0, **fields):
    """A data set that begins in the middle of an epoch."""
    data_set = ShuffledActivations(ShuffledConfig(shards=shards, layer=3, **fields))
    data_set.load_state_dict(data_set.state_dict(n_batches=batch, epoch=epoch))
    return data_set


def take(loader, n):
    iterator = iter(loader)
    return [
        (batch["example_idx"].numpy().copy(), batch["token_idx"].numpy().copy())
        for batch in itertools.islice(iterator, n)
    ]


@pytest.mark.parametrize("place", ["start", "middle", "end"])
@pytest.mark.parametrize("min_buffer_fill", [0.0, 1.0])
def test_every_batch_is_mixed(data, place, min_buffer_fill):
    """The first ones, too, and those at the end of an epoch."""
    shards, n_tokens, least = data
    n_batches = N_EXAMPLES * n_tokens // BATCH_SIZE
    first = {"start": 0, "middle": n_batches // 2, "end": n_batches - 6}[place]
    batches = take(seek(shards, first, min_buffer_fill=min_buffer_fill), 6)
    assert len(batches) == 6
    for examples, tokens in batches:
        assert len(examples) == BATCH_SIZE
        assert len(np.unique(examples)) >= least
        assert len(np.unique(tokens)) == n_tokens
        # Token positions as often as chance has them.
        counts = np.bincount(tokens, minlength=n_tokens)
        assert counts.max() < 2.2 * BATCH_SIZE / n_tokens + 20


def test_batches_span_the_data(data):
    """Examples from everywhere, not from a stretch of it."""
    shards, n_tokens, _ = data
    for examples, _ in take(seek(shards, 300 if n_tokens > 64 else 0), 4):
        counts, _ = np.histogram(examples, bins=20, range=(0, N_EXAMPLES))
        assert counts.min() > 0.8 * BATCH_SIZE / 20
        assert counts.max() < 1.2 * BATCH_SIZE / 20


def test_rows_are_in_no_order(data):
    """Any part of a batch is mixed like the whole, as gradient accumulation over parts needs it."""
    shards, n_tokens, _ = data
    for examples, tokens in take(seek(shards, 100), 2):
        ids = examples * n_tokens + tokens
        assert abs(np.corrcoef(ids, np.arange(len(ids)))[0, 1]) < 0.05
        assert (np.diff(ids) == 1).mean() < 0.05
        for part in np.array_split(examples, 4):
            assert abs(part.mean() - N_EXAMPLES / 2) < 0.05 * N_EXAMPLES


def test_batches_that_follow_have_different_samples(data):
    """And different neighbours: what is together in one epoch is not in the next."""
    shards, n_tokens, _ = data
    epochs = [
        np.concatenate([examples * n_tokens + tokens for examples, tokens in take(seek(shards, 50, epoch), 3)])
        for epoch in (0, 1)
    ]
    for ids in epochs:
        assert len(np.unique(ids)) == 3 * BATCH_SIZE
    # Of the samples of three batches as many are in the other three as chance has it, within a factor.
    expected = (3 * BATCH_SIZE) ** 2 / (N_EXAMPLES * n_tokens)
    assert len(np.intersect1d(*epochs)) < 2 * expected + 10 * expected**0.5


def test_workers_and_lanes_do_not_matter_for_the_mixing(data):
    shards, n_tokens, least = data
    loader = DataLoader(ShuffledActivations(ShuffledConfig(shards=shards, layer=3)), num_workers=2)
    for examples, tokens in take(loader, 3):
        assert len(np.unique(examples)) >= least
        assert len(np.unique(tokens)) == n_tokens
