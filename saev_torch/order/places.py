"""Which samples a batch holds, and which batch a sample is in: by selection and plan alone."""

import numpy as np
from numpy.typing import NDArray

from saev_torch.order.selection import Selection
from saev_torch.order.shuffle import OrderedPlan, ShufflePlan

__all__ = ["find_sample", "locate_batch"]


def locate_batch(selection: Selection, plan: OrderedPlan | ShufflePlan, batch_idx: int) -> dict[str, NDArray[np.int64]]:
    """Tell which samples a batch holds.

    Returns:
        `example_idx`, `token_idx` and, where each layer is a sample of its own, `layer`: `[batch] int64` each.
    """
    examples, layers, tokens = selection.split(selection.cells(plan.locate(batch_idx)))
    found = {"example_idx": examples, "token_idx": tokens - selection.n_special}
    if selection.layer_is_all:
        found["layer"] = np.array(selection.md.layers, dtype=np.int64)[layers]
    return found


def find_sample(
    selection: Selection, plan: OrderedPlan | ShufflePlan, example_idx: int, token_idx: int, layer: int | None
) -> tuple[int, int]:
    """Tell in which batch a sample is, and in which row of it.

    Raises:
        IndexError: The selection has no such sample.
    """
    md, token, layer_idx = selection.md, token_idx + selection.n_special, 0
    if selection.layer_is_all:
        layer_idx = md.layers.index(layer) if layer in md.layers else -1
    inside = 0 <= example_idx < md.n_examples and 0 <= token < md.tokens_per_example and layer_idx >= 0
    cell = (example_idx * selection.n_grid_layers + layer_idx) * md.tokens_per_example + token
    sample = int(selection.samples(np.array([cell], dtype=np.int64))[0]) if inside else -1
    if sample < 0:
        raise IndexError(f"example {example_idx}, token {token_idx}, layer {layer}: this selection has no such sample.")
    return plan.find(sample)
