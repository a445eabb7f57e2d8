"""From labels of pixels to labels of content tokens."""

import numpy as np
import numpy.typing as npt
import torch

from saev_torch.format.metadata import PixelAgg

_N_LABELS = 256
_PIXELS_AT_ONCE = 1 << 24  # Bounds the memory for many masks at once: 8 bytes a pixel.


def pixel_to_token_labels(
    mask: torch.Tensor | npt.ArrayLike,
    grid: tuple[int, int],
    agg: PixelAgg = PixelAgg.MAJORITY,
    bg_label: int = 0,
) -> torch.Tensor:
    """Give each token of a grid one label, from the pixels that it covers.

    >>> pixel_to_token_labels([[1, 1, 0, 0], [1, 2, 0, 3]], (1, 2)).tolist()
    [1, 0]
    >>> pixel_to_token_labels([[1, 1, 0, 0], [1, 2, 0, 3]], (1, 2), PixelAgg.PREFER_FG).tolist()
    [1, 3]

    Args:
        mask: [..., height, width] integers in 0..255, the label of each pixel.
        grid: Rows and columns of tokens; they must divide height and width.
        agg: `MAJORITY` takes the most common label. `PREFER_FG` takes the most common one that is not `bg_label`,
            however few pixels have it, and `bg_label` only where there is no other. Of equally common ones, both take
            the lowest.
        bg_label: The label of the background.

    Returns:
        [..., rows * columns] uint8, row by row: what `ShardWriter.write_batch` takes as `patch_labels`.

    Raises:
        ValueError: The mask has no such shape, the grid does not divide it, or a label is outside 0..255.
    """
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu()
    pixels = np.asarray(mask)
    rows, columns = grid
    if pixels.ndim < 2 or rows < 1 or columns < 1 or pixels.shape[-2] % rows or pixels.shape[-1] % columns:
        raise ValueError(
            f"grid: expected rows and columns that divide a mask [..., height, width], got grid {rows} x {columns} for "
            f"a mask of shape {list(pixels.shape)}; resize the mask as the image was resized"
        )
    if pixels.dtype.kind not in "iu" or (pixels.size and not 0 <= pixels.min() <= pixels.max() < _N_LABELS):
        raise ValueError(f"mask: expected integers in 0..255, got {pixels.dtype} of another range; renumber the labels")
    agg = PixelAgg(agg)
    if not 0 <= bg_label < _N_LABELS:
        raise ValueError(f"bg_label: expected an integer in 0..255, got {bg_label}")
    height, width = pixels.shape[-2:]
    masks = pixels.reshape(-1, height, width)
    labels = np.empty((len(masks), rows * columns), dtype=np.uint8)
    n_fit = max(1, _PIXELS_AT_ONCE // max(1, height * width, rows * columns * _N_LABELS))
    for start in range(0, len(masks), n_fit):
        labels[start : start + n_fit] = _aggregate(masks[start : start + n_fit], rows, columns, agg, bg_label)
    return torch.from_numpy(labels.reshape(*pixels.shape[:-2], rows * columns))


def _aggregate(
    masks: npt.NDArray[np.integer], rows: int, columns: int, agg: PixelAgg, bg_label: int
) -> npt.NDArray[np.intp]:
    n_masks, height, width = masks.shape
    tokens = masks.reshape(n_masks, rows, height // rows, columns, width // columns).transpose(0, 1, 3, 2, 4)
    tokens = tokens.reshape(n_masks * rows * columns, -1)
    bins = tokens.astype(np.int64) + _N_LABELS * np.arange(len(tokens))[:, None]
    counts = np.bincount(bins.ravel(), minlength=_N_LABELS * len(tokens)).reshape(-1, _N_LABELS)
    if agg is PixelAgg.PREFER_FG:
        # Less than any label that is there, more than one that is not: argmax takes it where there is no other.
        counts[:, bg_label] = np.minimum(counts[:, bg_label], 1)
        counts *= 2
        counts[:, bg_label] //= 2
    # argmax takes the first of equals: the lowest label.
    labels: npt.NDArray[np.intp] = counts.argmax(axis=1).reshape(n_masks, -1)
    return labels
