import itertools
import pickle

import numpy as np
import pytest
from contracts import expected, positions, selections, specs
from factory import Spec, oracle_labels
from hypothesis import given, settings
from hypothesis import strategies as st

from saev_torch import ConfigError, IndexMap, Metadata
from saev_torch.order.selection import Selection, resolve_layers

many = settings(deadline=None, max_examples=150)


def select(spec, tokens="content", layer=3, ignore_labels=()):
    labels = oracle_labels(spec)
    return Selection(Metadata(**spec.metadata()), tokens, layer, ignore_labels, lambda examples: labels[examples])


def grid(spec, layer):
    """Every cell in order, as (example, position of the layer, stored token)."""
    n_layers = len(spec.layers) if layer == "all" else 1
    return np.array(list(itertools.product(range(spec.n_examples), range(n_layers), range(spec.tokens_per_example))))


@st.composite
def cases(draw):
    spec = draw(specs())
    fields = draw(selections(spec))
    if fields["tokens"] != "special":
        ignored = draw(st.lists(st.integers(0, 8), max_size=8))
        # What leaves nothing is refused.
        if len(expected(spec, **fields, ignore_labels=ignored)):
            fields["ignore_labels"] = ignored
    return spec, fields


@many
@given(cases(), st.randoms(use_true_random=False))
def test_every_sample_is_where_a_loop_finds_it(case, random):
    spec, fields = case
    selection = select(spec, **fields)
    wanted = expected(spec, **fields)
    assert selection.n_samples == len(wanted)
    samples = np.arange(selection.n_samples)
    cells = selection.cells(samples)
    example, layer, token = selection.split(cells)
    assert example.tolist() == wanted.columns["example_idx"].tolist()
    assert (token - spec.cls_token).clip(-1).tolist() == wanted.columns["token_idx"].tolist()
    if fields["layer"] == "all":
        assert np.array(spec.layers)[layer].tolist() == wanted.columns["layer"].tolist()
    # Any samples in any order, not only all of them.
    some = np.array(random.sample(samples.tolist(), min(9, len(samples))), dtype=np.int64)
    assert selection.cells(some).tolist() == cells[some].tolist()


@many
@given(cases())
def test_samples_is_the_inverse(case):
    spec, fields = case
    selection = select(spec, **fields)
    cells = selection.cells(np.arange(selection.n_samples))
    wanted = np.full(len(grid(spec, fields["layer"])), -1)
    wanted[cells] = np.arange(selection.n_samples)
    assert selection.samples(np.arange(len(wanted))).tolist() == wanted.tolist()


@many
@given(cases())
def test_disk_rows(case):
    """Rows of d_model values in the shards, counted in the whole file tensor."""
    spec, fields = case
    selection = select(spec, **fields)
    cells = np.arange(len(grid(spec, fields["layer"])))
    example, layer, token = grid(spec, fields["layer"]).T
    shape = (spec.examples_per_shard, len(spec.layers), spec.tokens_per_example)
    shards, rows = selection.disk_rows(cells)
    assert shards.tolist() == (example // spec.examples_per_shard).tolist()
    first = layer if fields["layer"] == "all" else np.full_like(layer, selection.layer_idxs[0])
    assert rows.tolist() == np.ravel_multi_index((example % spec.examples_per_shard, first, token), shape).tolist()


def test_reading_with_other_labels():
    spec = Spec()
    selection = select(spec, ignore_labels=[0])
    calls = []

    def read(examples):
        calls.append(examples.tolist())
        return oracle_labels(spec)[examples]

    other = selection.reading_with(read)
    assert other.cells(np.arange(5)).tolist() == selection.cells(np.arange(5)).tolist()
    assert calls == [[0]]
    assert other.n_samples == selection.n_samples
    plain = select(spec)
    assert plain.reading_with(read).cells(np.arange(5)).tolist() == plain.cells(np.arange(5)).tolist()


def test_labels_of_an_example_are_read_once_for_a_run():
    spec = Spec(n_examples=20)
    calls = []

    def read(examples):
        calls.append(examples.tolist())
        return oracle_labels(spec)[examples]

    selection = select(spec, "all", 3, [1, 2]).reading_with(read)
    selection.cells(np.arange(selection.n_samples))
    assert calls == [list(range(20))]


def test_ignored_labels_without_a_reader():
    md = Metadata(**Spec().metadata())
    with pytest.raises(ConfigError, match=r"ignore_labels: expected labels\.bin .*got none"):
        Selection(md, "content", 3, [1])


def test_special_without_cls():
    with pytest.raises(ConfigError, match=r"tokens: .* without a \[CLS\] token, got 'special'"):
        select(Spec(cls=False), "special")


@pytest.mark.parametrize(
    ("layers", "asked", "found"),
    [
        ((3, 7), 3, (0,)),
        ((3, 7), 7, (1,)),
        ((3, 7), -1, (1,)),
        ((3, 7), -2, (0,)),
        ((3, 7), "all", (0, 1)),
        ((3, 7), (7, 3), (1, 0)),
        ((3, 7), (-1, 3), (1, 0)),
        # By value first: what is recorded as -2 is -2, wherever it stands.
        ((-2,), -2, (0,)),
        ((5, -1, -2), -2, (2,)),
        ((5, -1, -2), -1, (1,)),
        ((5, -1, -2), -3, (0,)),
        ((0, 4, 11), 0, (0,)),
    ],
)
def test_layers_are_found(layers, asked, found):
    assert resolve_layers(Metadata(**Spec(layers=layers).metadata()), asked) == found
    if not isinstance(asked, str):
        asked = asked if isinstance(asked, tuple) else (asked,)
        assert tuple(positions(layers, x) for x in asked) == found


@pytest.mark.parametrize(
    ("layers", "asked", "got"),
    [((3, 7), 4, "got 4"), ((3, 7), -3, "got -3"), ((3, 7), 0, "got 0"), ((3, 7), (3, 5), "got 5"), ((-2,), -3, "-3")],
)
def test_layers_that_were_not_recorded(layers, asked, got):
    with pytest.raises(ConfigError, match=rf"layer: expected one of the recorded layers \[{str(list(layers))[1:-1]}\]"):
        resolve_layers(Metadata(**Spec(layers=layers).metadata()), asked)
    with pytest.raises(ValueError, match=got):
        resolve_layers(Metadata(**Spec(layers=layers).metadata()), asked)


def test_one_layer_by_two_names():
    with pytest.raises(ConfigError, match=r"layer: \(3, -2\) names one of the recorded layers \[3, 7\] twice"):
        resolve_layers(Metadata(**Spec(layers=(3, 7)).metadata()), (3, -2))


# IndexMap


@many
@given(specs(), st.data())
def test_index_map(spec, data):
    fields = data.draw(selections(spec))
    index_map = IndexMap(Metadata(**spec.metadata()), **fields)
    wanted = expected(spec, **fields)
    assert len(index_map) == len(wanted)
    for i in {0, len(wanted) // 2, len(wanted) - 1}:
        index = index_map.from_global(i)
        assert index.idx == i
        assert index.example_idx == wanted.columns["example_idx"][i]
        assert index.content_token_idx == wanted.columns["token_idx"][i]
        assert index.token_idx_in_shard == wanted.columns["token_idx"][i] + spec.cls_token
        assert divmod(index.example_idx, spec.examples_per_shard) == (index.shard_idx, index.example_idx_in_shard)
        layer = fields["layer"]
        if layer == "all":
            assert spec.layers[index.layer_idx_in_shard] == wanted.columns["layer"][i]
        else:
            first = layer[0] if isinstance(layer, tuple) else layer
            assert index.layer_idx_in_shard == positions(spec.layers, first)
        assert all(type(value) is int for value in vars(index).values())


def test_index_map_range():
    index_map = IndexMap(Metadata(**Spec().metadata()), "content", 3)
    for i in (-1, len(index_map), 10**20):
        with pytest.raises(IndexError, match=rf"sample {i} is out of range: this selection has 66 samples"):
            index_map.from_global(i)


def test_index_map_refuses_unknown_tokens():
    with pytest.raises(ConfigError, match="tokens: expected 'special', 'content' or 'all', got 'cls'"):
        IndexMap(Metadata(**Spec().metadata()), "cls", 3)


def test_a_selection_pickles():
    selection = select(Spec())
    selection = pickle.loads(pickle.dumps(IndexMap(selection.md, "all", "all")))
    assert len(selection) == 11 * 2 * 7
