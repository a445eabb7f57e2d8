import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saev_torch.format.metadata import PixelAgg
from saev_torch.writing.labels import pixel_to_token_labels


def brute_force(mask, rows, columns, agg, bg_label):
    """Pixel by pixel, as `PixelAgg` is documented."""
    labels = []
    height, width = len(mask) // rows, len(mask[0]) // columns
    for row in range(rows):
        for column in range(columns):
            pixels = [
                mask[row * height + y][column * width + x] for y in range(height) for x in range(width)
            ]  # fmt: skip
            wanted = [p for p in pixels if p != bg_label] if agg is PixelAgg.PREFER_FG else pixels
            labels.append(min(set(wanted or pixels), key=lambda label: (-pixels.count(label), label)))
    return labels


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_against_brute_force(data):
    """Few labels and few pixels, so that ties are common; grids and tokens need not be square."""
    rows, columns, height, width = (data.draw(st.integers(1, 4)) for _ in range(4))
    palette = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**32))
    bg_label = data.draw(st.sampled_from([0, 255, *palette]))
    masks = np.random.default_rng(seed).choice(palette, size=(3, rows * height, columns * width))
    for agg in PixelAgg:
        found = pixel_to_token_labels(torch.from_numpy(masks), (rows, columns), agg, bg_label)
        assert found.dtype == torch.uint8
        assert found.tolist() == [brute_force(mask.tolist(), rows, columns, agg, bg_label) for mask in masks]
        assert pixel_to_token_labels(masks[0].astype(np.uint8), (rows, columns), agg, bg_label).equal(found[0])


def test_many_masks_in_turn(monkeypatch):
    masks = np.random.default_rng(0).integers(0, 3, size=(2, 5, 8, 12))
    whole = pixel_to_token_labels(masks, (4, 3))
    monkeypatch.setattr("saev_torch.writing.labels._PIXELS_AT_ONCE", 7000)
    assert pixel_to_token_labels(masks, (4, 3)).equal(whole)
    assert whole.shape == (2, 5, 12)


def test_documented_ties():
    assert pixel_to_token_labels([[7, 3, 0, 0], [3, 7, 0, 0]], (1, 2)).tolist() == [3, 0]
    assert pixel_to_token_labels([[0, 0, 9, 4]], (1, 1), PixelAgg.PREFER_FG).tolist() == [4]
    assert pixel_to_token_labels([[0, 5]], (1, 1), PixelAgg.PREFER_FG, bg_label=5).tolist() == [0]


@pytest.mark.parametrize(
    ("mask", "grid", "bg_label", "message"),
    [
        (np.zeros((4, 6), int), (3, 3), 0, r"grid 3 x 3 for a mask of shape \[4, 6\]"),
        (np.zeros((4, 6), int), (2, 4), 0, r"expected rows and columns that divide"),
        (np.zeros((4, 6), int), (0, 3), 0, r"expected rows and columns that divide"),
        (np.zeros(6, int), (1, 1), 0, r"expected rows and columns that divide"),
        (np.zeros((4, 6)), (2, 2), 0, r"expected integers in 0\.\.255, got float64"),
        (np.full((4, 6), 256), (2, 2), 0, r"expected integers in 0\.\.255"),
        (np.full((4, 6), -1), (2, 2), 0, r"expected integers in 0\.\.255"),
        (np.zeros((4, 6), int), (2, 2), 256, r"^bg_label: expected"),
    ],
)
def test_refused(mask, grid, bg_label, message):
    with pytest.raises(ValueError, match=message):
        pixel_to_token_labels(mask, grid, bg_label=bg_label)
