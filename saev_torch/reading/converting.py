"""What `reading.kernels` does to values as they are read, done by torch to whole batches: the same bits, later."""

import math

import torch

from saev_torch.format.dtypes import FLOAT32, ValueType
from saev_torch.reading.kernels import NAN_BITS

# Values at a time: they stay in the cache of the core. For less than 32,768 torch starts no threads, which a forked
# child would wait for in vain; a worker has none anyway.
_N_AT_ONCE, _N_AT_ONCE_ALONE = (32 << 10) - 1, 128 << 10
# A processor converts so many at a time, or a divisor of it. Of one that is left over torch may make another NaN.
_N_TOGETHER = 64


def convert_batch(act: torch.Tensor, stored: ValueType, scale: float | None) -> None:
    """Convert activations in place, to the type of the tensor, and multiply them; None for nothing to multiply by.

    Args:
        act: `[..., d_model]`, contiguous. Where its type is wider than `stored`, the stored values of each row are in
            the back half of it.
        stored: What the values are.
        scale: A number that float32 holds.
    """
    rows = act.view(-1, act.shape[-1])
    if act.dtype == torch.float32 and stored != FLOAT32:
        _widen(rows, getattr(torch, stored.name), scale)
    elif scale is not None and stored == FLOAT32:
        for part in torch.split(rows.view(-1), _n_at_once()):
            part.mul_(scale)
    elif scale is not None:
        for part in torch.split(rows.view(-1), _n_at_once()):
            scaled = part.float().mul_(scale)
            part.copy_(scaled)
            # Which NaN a type has for others is not the same everywhere.
            part.view(torch.int16).masked_fill_(scaled.isnan(), NAN_BITS[stored.name])


def _widen(rows: torch.Tensor, dtype: torch.dtype, scale: float | None) -> None:
    """Widen rows, `[n, d_model] float32`, whose back halves are what is stored."""
    d_model = rows.shape[1]
    together = _N_TOGETHER // math.gcd(_N_TOGETHER, d_model)
    n_rows = max(1, _n_at_once() // d_model // together * together)
    # Copied first, because what is written begins before it, and ends behind.
    room = torch.zeros(-(-n_rows * d_model // _N_TOGETHER) * _N_TOGETHER, dtype=dtype, device="cpu")
    some = room[: n_rows * d_model].view(n_rows, d_model)
    halves = rows.view(dtype)[:, d_model:]
    for half, part in zip(torch.split(halves, n_rows), torch.split(rows, n_rows), strict=True):
        if len(half) != len(some):
            some = some[: len(half)]
        some.copy_(half)
        if some.numel() % _N_TOGETHER:
            part.copy_(room.float()[: some.numel()].view(part.shape))
        else:
            part.copy_(some)
        if scale is not None:
            part.mul_(scale)


def _n_at_once() -> int:
    return _N_AT_ONCE_ALONE if torch.get_num_threads() == 1 else _N_AT_ONCE
