"""What callers hand to the writer, checked and as arrays that can be written as they are.

Each check raises a `WriteError` that says what was expected and what came.
"""

import operator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from saev_torch.errors import WriteError
from saev_torch.format.files import short
from saev_torch.format.metadata import Metadata

_N_LOOKED_AT = 1 << 20  # Values looked at together, so that the mask stays small and in the cache.
_ROUNDING = 0.05  # Relative error of an example. One model in bfloat16 on two GPUs stays well below, other data above.


def check_activations(md: Metadata, activations: torch.Tensor | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return activations as a contiguous little-endian array on the host."""
    if not isinstance(activations, torch.Tensor | np.ndarray):
        raise WriteError(f"activations: expected a tensor or an array, got {type(activations).__name__}")
    if md.dtype != "float32":
        raise WriteError(f"dtype: expected float32, all that is written so far, got {md.dtype}")
    _require_values("activations", activations)
    if activations.dtype not in (torch.float32, np.dtype(np.float32)):
        raise WriteError(f"activations: expected float32, got {activations.dtype}; convert it, as with .float()")
    shape = (md.n_layers, md.tokens_per_example, md.d_model)
    if activations.shape[1:] != shape:
        raise WriteError(
            f"activations: expected shape [batch, n_layers, tokens_per_example, d_model] = [batch, {shape[0]}, "
            f"{shape[1]}, {shape[2]}], got {list(activations.shape)}"
        )
    if isinstance(activations, torch.Tensor):
        activations = _to_numpy("activations", activations)
    return np.ascontiguousarray(activations, dtype=md.value_type.storage)


def _require_values(name: str, given: torch.Tensor | npt.NDArray[Any]) -> None:
    """Refuse tensors and arrays that do not hold a value at each place."""
    if isinstance(given, np.ndarray):
        if np.ma.is_masked(given):
            raise WriteError(f"{name}: expected a value at each place, got masked ones; fill them, as with .filled(0)")
    elif given.is_nested or given.layout != torch.strided:
        got = "a nested one" if given.is_nested else f"{given.layout}"
        raise WriteError(f"{name}: expected a dense tensor, got {got}; convert it, as with .to_dense()")
    elif given.is_meta:
        raise WriteError(
            f"{name}: expected a tensor with values, got one on the device 'meta'; load the model's weights"
        )


def _to_numpy(name: str, tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Copy a tensor to the host if need be, with what is pending on it: a negation, a conjugation."""
    try:
        return tensor.numpy(force=True)
    except (RuntimeError, TypeError, NotImplementedError) as err:
        raise WriteError(
            f"{name}: expected a tensor of plain values, got {type(tensor).__name__} of {tensor.dtype} ({err}); "
            "convert it first"
        ) from err


def check_finite(acts: npt.NDArray[np.float32], md: Metadata, start: int) -> None:
    """Refuse NaN and infinity in a contiguous batch, of which `start` is the first example."""
    flat = acts.reshape(-1)
    for at in range(0, len(flat), _N_LOOKED_AT):
        is_finite = np.isfinite(flat[at : at + _N_LOOKED_AT])
        if not is_finite.all():
            bad = at + int(np.argmin(is_finite))
            e, layer_idx, token, dim = (int(i) for i in np.unravel_index(bad, acts.shape))
            raise WriteError(
                f"activations: expected finite values, got {flat[bad]} in example {start + e}, layer "
                f"{md.layers[layer_idx]}, stored token {token}, dimension {dim}; mend the model, or write with "
                "check_finite=False"
            )


def check_labels(md: Metadata, patch_labels: torch.Tensor | npt.ArrayLike, batch: int) -> npt.NDArray[np.uint8]:
    """Return labels as a contiguous [batch, content_tokens_per_example] uint8 array."""
    if isinstance(patch_labels, torch.Tensor | np.ndarray):
        _require_values("patch_labels", patch_labels)
    try:
        if isinstance(patch_labels, torch.Tensor):
            patch_labels = _to_numpy("patch_labels", patch_labels)
        labels = np.asarray(patch_labels)
    except (TypeError, ValueError, RuntimeError) as err:
        raise WriteError(f"patch_labels: expected an array of integers, got {short(patch_labels)}") from err
    shape = [batch, md.content_tokens_per_example]
    if list(labels.shape) != shape:
        raise WriteError(
            f"patch_labels: expected shape [batch, content_tokens_per_example] = {shape}, got {list(labels.shape)}"
        )
    if labels.dtype.kind not in "iu":
        raise WriteError(f"patch_labels: expected integers in 0..255, got {labels.dtype}")
    if labels.size and not 0 <= labels.min() <= labels.max() <= 255:
        raise WriteError(f"patch_labels: expected integers in 0..255, got {labels.min()}..{labels.max()}")
    return np.ascontiguousarray(labels, dtype=np.uint8)


def is_same(given: npt.NDArray[np.float32], stored: npt.NDArray[np.float32]) -> bool:
    """Whether activations of an example are those that are stored, but for rounding, as on another machine."""
    if given.tobytes() == stored.tobytes():
        return True
    # What is not finite on both sides is the same, too.
    one, other = (np.nan_to_num(acts.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) for acts in (given, stored))
    return bool(np.linalg.norm(one - other) <= _ROUNDING * np.linalg.norm(other))


def check_start(start_idx: int, batch: int, bounds: tuple[int, int]) -> int:
    """Return the first of `batch` examples as an int; all of them must be in `bounds`, the second excluded."""
    try:
        start = operator.index(start_idx)
    except TypeError as err:
        raise WriteError(f"start_idx: expected an integer, got {short(start_idx)}") from err
    if start < bounds[0] or start + batch > bounds[1]:
        raise WriteError(
            f"start_idx: expected examples in {bounds[0]}..{bounds[1]} (end excluded), as announced, "
            f"got {start}..{start + batch}"
        )
    return start


def check_example_range(md: Metadata, example_range: tuple[int, int] | None) -> tuple[int, int]:
    """Return the examples that a writer is for; all of them by default."""
    if example_range is None:
        return 0, md.n_examples
    try:
        start, stop = (operator.index(x) for x in example_range)
    except (TypeError, ValueError) as err:
        raise WriteError(f"example_range: expected (start, stop), got {short(example_range)}") from err
    if not 0 <= start < stop <= md.n_examples:
        raise WriteError(f"example_range: expected 0 <= start < stop <= {md.n_examples}, got {start}..{stop}")
    return start, stop
