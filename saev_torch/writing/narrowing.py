"""Values of any float type, made to what is stored: exact where that holds them, else rounded once, to nearest even."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from saev_torch.format.dtypes import DTYPES, FLOAT32, ValueType

FLOATS = {torch.float64, *(getattr(torch, name) for name in DTYPES)}
FLOATS |= {getattr(torch, name) for name in dir(torch) if name.startswith("float8_")}
"""Types that values may have; float64 holds all of their values."""

_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Values at a time: they stay in the cache of the core. For less than 32,768 torch starts no threads, which a forked
# child would wait for in vain. A multiple of 64, which is as many as a processor converts at a time: of one that is
# left over torch may make another NaN.
_N_TOGETHER = 64
_N_AT_ONCE = 511 * _N_TOGETHER

# What is not a number is stored as this where a type does not hold it as it is: the same on every machine.
_NAN_BITS = {"float16": 0x7E00, "bfloat16": 0x7FC0}


class Given(NamedTuple):
    """Values as they came: their bits, in a contiguous array on the host, and the type that they are of."""

    bits: npt.NDArray[Any]
    dtype: torch.dtype

    @classmethod
    def of_array(cls, array: npt.NDArray[Any]) -> "Given":
        """Take an array of any float type and byte order; copied only where that has to be."""
        native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
        if native.dtype.itemsize > 8:
            native = _round_to_odd(native, np.dtype(np.float64))
        return cls(native, getattr(torch, native.dtype.name))

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> "Given":
        """Take a tensor on any device, with what is pending on it: a negation, a conjugation, zeros without memory.

        Raises what torch raises of one that is not of plain values.
        """
        host = tensor.detach().cpu().resolve_conj().resolve_neg()
        if host._is_zerotensor():
            host = torch.zeros(host.shape, dtype=host.dtype)
        return cls(host.contiguous().view(_INTS[host.element_size()]).numpy(), host.dtype)


class Overflow(NamedTuple):
    """A finite value that is infinite in the type that it should have, and its number among all."""

    number: int
    value: float


class Stored(NamedTuple):
    """Values as they are stored, in the shape that they came in; the first that is too large, and how many are."""

    values: npt.NDArray[Any]
    first_overflow: Overflow | None
    n_overflowed: int


def to_stored(given: Given, value_type: ValueType) -> Stored:
    """Make values to what is stored. Those that are too large become the largest that there is."""
    dtype = getattr(torch, value_type.name)
    if given.dtype == dtype:
        return Stored(_of_type(given.bits, value_type), None, 0)
    bits = given.bits.reshape(-1)
    out = np.empty(bits.shape, dtype=f"i{value_type.nbytes}")
    first, n_overflowed = None, 0
    room = np.zeros(min(_N_AT_ONCE, _rounded_up(len(bits))), dtype=bits.dtype)
    for start in range(0, len(bits), _N_AT_ONCE):
        some = bits[start : start + _N_AT_ONCE]
        # Copied, because the values may be in memory that torch must not have, as it is read-only.
        room[: len(some)] = some
        values = torch.from_numpy(room[: _rounded_up(len(some))]).view(given.dtype)
        found, overflowed = _convert(values, value_type)
        out[start : start + len(some)] = found[: len(some)].numpy()
        overflowed = overflowed[: len(some)]
        if bool(overflowed.any()):
            if first is None:
                i = int(overflowed.nonzero()[0])
                first = Overflow(start + i, values[i].item())
            n_overflowed += int(overflowed.sum())
    return Stored(_of_type(out.reshape(given.bits.shape), value_type), first, n_overflowed)


def _rounded_up(n: int) -> int:
    return -(-n // _N_TOGETHER) * _N_TOGETHER


def _convert(values: torch.Tensor, value_type: ValueType) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bits of values in another type, and which were too large, if any: else an empty tensor."""
    wide = values
    if values.dtype == torch.float64 and value_type != FLOAT32:
        # Torch would round twice, to float32 first.
        wide = torch.from_numpy(_round_to_odd(values.numpy(), np.dtype(np.float32)))
    found = wide.to(getattr(torch, value_type.name))
    bits = found.view(_INTS[value_type.nbytes])
    magnitude = (1 << 8 * value_type.nbytes - 1) - 1
    if int((bits & magnitude).max()) < value_type.exponent:
        return bits, torch.empty(0, dtype=torch.bool)
    # Rarely, and so without haste.
    exact = values.double()
    if value_type.name in _NAN_BITS:
        bits.masked_fill_(exact.isnan(), _NAN_BITS[value_type.name])
    overflowed = found.isinf() & exact.isfinite()
    # Before infinity comes the largest number, of either sign.
    bits -= overflowed.to(bits.dtype)
    return bits, overflowed


def _round_to_odd(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Round to a smaller type so that rounding the result again is as rounding the values at once.

    What the type does not hold becomes that neighbour of its two whose last bit is set: no tie for a type that has two
    bits less, and on the same side of each (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    with np.errstate(all="ignore"):
        found = values.astype(dtype)
    back = found.astype(values.dtype)
    bits = found.view(f"i{dtype.itemsize}")
    bits -= np.abs(back) > np.abs(values)
    bits |= back != values
    return found


def _of_type(bits: npt.NDArray[Any], value_type: ValueType) -> npt.NDArray[Any]:
    storage = np.dtype(value_type.storage)
    return bits.view(storage.newbyteorder("=")).astype(storage, copy=False)


def as_tensor(values: npt.NDArray[Any], value_type: ValueType) -> torch.Tensor:
    """Return stored values as a tensor, on the same memory where torch may have that."""
    bits = values.astype(values.dtype.newbyteorder("="), copy=not values.flags.writeable)
    bits = bits.view(f"i{value_type.nbytes}")
    return torch.from_numpy(bits).view(getattr(torch, value_type.name))
