"""What `saev.data.shards` has, but for what runs a model: `RecordedTransformer` and `worker_fn` are `record` here."""

import numpy as np
import numpy.typing as npt
import torch

from saev_torch.format.metadata import Metadata, PixelAgg
from saev_torch.format.shards import Shard, ShardInfo
from saev_torch.order.selection import Index, IndexMap
from saev_torch.writing.labels import pixel_to_token_labels
from saev_torch.writing.writer import ShardWriter

__all__ = [
    "Index",
    "IndexMap",
    "Metadata",
    "PixelAgg",
    "Shard",
    "ShardInfo",
    "ShardWriter",
    "pixel_to_patch_labels",
]


def pixel_to_patch_labels(
    seg: npt.ArrayLike, n_patches: int, patch_size: int, pixel_agg: PixelAgg = PixelAgg.MAJORITY, bg_label: int = 0
) -> torch.Tensor:
    """Give each patch of an image one label; see `pixel_to_token_labels`, which this calls.

    Args:
        seg: [height, width] integers in 0..255, an array or an image.
        n_patches: Number of patches that the image must have.
        patch_size: Height and width of a patch, in pixels.
        pixel_agg: `agg` there.
        bg_label: As there.

    Returns:
        [n_patches] uint8, row by row.

    Raises:
        ValueError: The image has another number of patches, or is no such image.
    """
    pixels = np.asarray(seg)
    grid = [size // patch_size for size in pixels.shape]
    if len(grid) != 2 or grid[0] * grid[1] != n_patches:
        raise ValueError(
            f"n_patches: expected as many as the image has, got {n_patches} for pixels {list(pixels.shape)} in patches "
            f"of {patch_size}; resize the mask as the image was resized"
        )
    return pixel_to_token_labels(pixels, (grid[0], grid[1]), pixel_agg, bg_label)
