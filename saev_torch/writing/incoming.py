"""What callers hand to the writer, checked and as arrays that can be written as they are.

Each check raises a `WriteError` that says what was expected and what came.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from saev_torch.errors import ConfigError, WriteError
from saev_torch.format.dtypes import DTYPES, ValueType
from saev_torch.format.files import short
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import shard_name, shard_nbytes
from saev_torch.format.sidecars import ATTENTION_MASK, LABELS, TOKEN_IDS, Sidecar
from saev_torch.writing.narrowing import FLOATS, Given, Stored, as_tensor, to_stored

_N_LOOKED_AT = 1 << 20  # Values looked at together, so that the mask stays small and in the cache.
_ROUNDING = 0.05  # Relative error of an example. One model in bfloat16 on two GPUs stays well below, other data above.


def check_activations(md: Metadata, activations: torch.Tensor | npt.NDArray[Any]) -> Given:
    """Return activations of any float type on the host."""
    if not isinstance(activations, torch.Tensor | np.ndarray):
        raise WriteError(f"activations: expected a tensor or an array, got {type(activations).__name__}")
    _require_values("activations", activations)
    dtype = activations.dtype
    if dtype not in FLOATS if isinstance(dtype, torch.dtype) else dtype.kind != "f":
        raise WriteError(f"activations: expected values of a float type, got {dtype}; convert it, as with .float()")
    shape = (md.n_layers, md.tokens_per_example, md.d_model)
    if activations.shape[1:] != shape:
        raise WriteError(
            f"activations: expected shape [batch, n_layers, tokens_per_example, d_model] = [batch, {shape[0]}, "
            f"{shape[1]}, {shape[2]}], got {list(activations.shape)}"
        )
    if not isinstance(activations, torch.Tensor):
        return Given.of_array(activations)
    with _plain("activations", activations):
        return Given.of_tensor(activations)


def check_dtype(dtype: str) -> str:
    """Return the name of a type that can be stored."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {list(DTYPES)}, or None, got {short(dtype)}.")
    return dtype


def check_on_overflow(on_overflow: str) -> str:
    """Return what to do with values that are too large."""
    if on_overflow not in ("refuse", "clip"):
        raise ConfigError(f"on_overflow: expected 'refuse' or 'clip', got {short(on_overflow)}.")
    return on_overflow


def check_stored(given: Given, md: Metadata, examples: Sequence[int], on_overflow: str) -> Stored:
    """Return activations as they are stored; values that are too large are refused, or clipped.

    `examples` are their numbers, for the message.
    """
    stored = to_stored(given, md.value_type)
    if stored.first_overflow is not None and on_overflow == "refuse":
        number, value = stored.first_overflow
        raise WriteError(
            f"activations: expected values that {md.dtype} holds, up to {_largest(md.value_type):g}, got {value:g} in "
            f"{_place(md, examples, number)}; {_WIDER[md.dtype]}, or clip such values with on_overflow='clip'"
        )
    return stored


_WIDER = {
    "float16": "use bfloat16",
    "bfloat16": "use float32",
    "float32": "scale them down",
}


def _largest(value_type: ValueType) -> float:
    return float(torch.finfo(getattr(torch, value_type.name)).max)


def _place(md: Metadata, examples: Sequence[int], number: int) -> str:
    """Say where a value is, by its number among those of a batch."""
    shape = (len(examples), md.n_layers, md.tokens_per_example, md.d_model)
    i, layer_idx, token, dim = (int(i) for i in np.unravel_index(number, shape))
    return f"example {examples[i]}, layer {md.layers[layer_idx]}, stored token {token}, dimension {dim}"


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


@contextlib.contextmanager
def _plain(name: str, tensor: torch.Tensor) -> Iterator[None]:
    """Refuse a tensor of which torch says here that it has no plain values."""
    try:
        yield
    except (RuntimeError, TypeError, NotImplementedError) as err:
        raise WriteError(
            f"{name}: expected a tensor of plain values, got {type(tensor).__name__} of {tensor.dtype} ({err}); "
            "convert it first"
        ) from err


def check_finite(acts: npt.NDArray[Any], md: Metadata, start: int) -> None:
    """Refuse NaN and infinity in a contiguous batch of stored values, of which `start` is the first example."""
    flat = acts.reshape(-1)
    for at in range(0, len(flat), _N_LOOKED_AT):
        some = flat[at : at + _N_LOOKED_AT]
        is_bad = md.value_type.is_nonfinite(some)
        if is_bad.any():
            i = int(np.argmax(is_bad))
            value = as_tensor(some[i : i + 1], md.value_type).item()
            raise WriteError(
                f"activations: expected finite values, got {value} in "
                f"{_place(md, range(start, start + len(acts)), at + i)}; mend the model, or write with "
                "check_finite=False"
            )


Beside = dict[Sidecar, npt.NDArray[Any]]
"""Values of sidecars for some examples, `[batch, content_tokens_per_example]` each, in the order of `SIDECARS`."""


class _Kind(NamedTuple):
    """How values of a sidecar are called in `write_batch`, and which there may be."""

    argument: str
    what: str
    low: int
    high: int


_KINDS = {
    LABELS: _Kind("patch_labels", "integers in 0..255", 0, 255),
    TOKEN_IDS: _Kind("token_ids", "integers of 32 bits", -(1 << 31), (1 << 31) - 1),
    ATTENTION_MASK: _Kind("attention_mask", "True or False, or 1 or 0,", 0, 1),
}


def check_beside(md: Metadata, given: Mapping[Sidecar, torch.Tensor | npt.ArrayLike | None], batch: int) -> Beside:
    """Return the values of sidecars that are given as contiguous [batch, content_tokens_per_example] arrays."""
    return {
        sidecar: _check_values(md, _KINDS[sidecar], values, batch).astype(sidecar.storage, order="C", copy=False)
        for sidecar, values in given.items()
        if values is not None
    }


def _check_values(md: Metadata, kind: _Kind, given: torch.Tensor | npt.ArrayLike, batch: int) -> npt.NDArray[Any]:
    name = kind.argument
    if isinstance(given, torch.Tensor | np.ndarray):
        _require_values(name, given)
    try:
        if isinstance(given, torch.Tensor):
            with _plain(name, given):
                given = given.numpy(force=True)
        values = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as err:
        raise WriteError(f"{name}: expected an array of integers, got {short(given)}") from err
    shape = [batch, md.content_tokens_per_example]
    if list(values.shape) != shape:
        raise WriteError(
            f"{name}: expected shape [batch, content_tokens_per_example] = {shape}, got {list(values.shape)}"
        )
    if values.dtype.kind not in ("iu" if kind.high > 1 else "iub"):
        raise WriteError(f"{name}: expected {kind.what}, got {values.dtype}")
    if values.size and not kind.low <= values.min() <= values.max() <= kind.high:
        raise WriteError(f"{name}: expected {kind.what}, got {values.min()}..{values.max()}")
    return values


def require_sidecars(expected: tuple[Sidecar, ...] | None, beside: Beside) -> None:
    """Refuse a batch that has values of other sidecars than those before; None where there was none."""
    for sidecar, kind in _KINDS.items() if expected is not None else ():
        if (sidecar in beside) != (expected is not None and sidecar in expected):
            got = "with" if sidecar in beside else "without"
            raise WriteError(f"{kind.argument}: expected them for all batches or for none, got a batch {got} them")


def _is_same(given: npt.NDArray[Any], stored: npt.NDArray[Any], value_type: ValueType) -> bool:
    """Whether activations of an example are those that are stored, but for rounding, as on another machine."""
    if given.tobytes() == stored.tobytes():
        return True
    # What is not finite on both sides is the same, too.
    both = (as_tensor(acts, value_type).double().numpy() for acts in (given, stored))
    one, other = (np.nan_to_num(acts, nan=0.0, posinf=0.0, neginf=0.0) for acts in both)
    return bool(np.linalg.norm(one - other) <= _ROUNDING * np.linalg.norm(other))


def require_same(
    shards_dir: Path,
    md: Metadata,
    read: Callable[[str, int, int], bytes],
    again: range,
    acts: npt.NDArray[Any],
    start: int,
    beside: Beside,
) -> None:
    """Refuse to continue what was written of other data, by examples that are given again, those from `start` on."""
    for i in again:
        given, (shard_idx, row) = acts[i - start], divmod(i, md.examples_per_shard)
        raw = read(shard_name(shard_idx), md.example_nbytes, shard_nbytes(md, row))
        stored = np.frombuffer(raw, dtype=given.dtype).reshape(given.shape)
        wrong = None if _is_same(given, stored, md.value_type) else "values"
        for sidecar, values in beside.items() if wrong is None else ():
            on_disk = read(sidecar.name, sidecar.row_nbytes(md), sidecar.offset(md, i))
            if values[i - start].tobytes() != on_disk:
                wrong = sidecar.key
        if wrong is not None:
            raise WriteError(
                f"{shards_dir}: expected the {wrong} on disk to be given again, got others for example {i}: "
                "those are of other data or another model under the same names; give another ckpt, data or dataset, or "
                "delete the directory"
            )


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
