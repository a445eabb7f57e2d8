"""Loops that touch each value once where numpy needs several passes, compiled by numba where that is installed.

numba is an extra (`pip install 'saev_torch[fast]'`). Without it the callers take the longer way to the same values;
only sums may differ, in their last bits. Compiling takes some tenths of a second for each process, and 130 MB that
forked workers share; nothing is kept on disk. A compiled loop does not hold the interpreter lock.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.format.dtypes import DTYPES, FLOAT32, ValueType

ConvertKernels = tuple[Callable[..., None], Callable[..., None]]
_Int64s = NDArray[np.int64]
_Halves = NDArray[np.uint16]
_Float32s = NDArray[np.float32]
_Float64s = NDArray[np.float64]

_log = logging.getLogger("saev_torch")

# Addresses are integers here: a pointer of ctypes is none to the compiler.
_preadv = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64)(
    ("preadv", ctypes.CDLL(None))
)

# Values that are converted at a time, few enough for the cache that is next to the core.
_N_CONVERTED = 2048

_NAN_FLOAT16, _NAN_BFLOAT16 = 0x7E00, 0x7FC0
NAN_BITS = {"float16": _NAN_FLOAT16, "bfloat16": _NAN_BFLOAT16}
"""What is not a number after it was multiplied and rounded, whatever it was before."""

# Sums of more terms than this are sums of sums, so that rounding errors do not grow with the number of vectors.
_N_SUMMED = 256


@functools.cache
def find_sum_kernel() -> Callable[..., None] | None:
    """Compile `sum_vectors(vectors, sums, squares, squared_norms, lows, highs)`; None without numba.

    It adds `[n, d_model] float32` vectors and their squares to `[d_model] float64` sums, lowers and raises
    `[d_model] float32` bounds, and sets `[n] float64` squared L2 norms, which are not finite where a value is not.
    """
    numba = _find_numba()
    if numba is None:
        return None
    signature = "void(float32[:, ::1], float64[::1], float64[::1], float64[::1], float32[::1], float32[::1])"
    # Free to add in any order, which vector instructions need; what is not a number stays so.
    compiled: Callable[..., None] = numba.njit(signature, nogil=True, fastmath={"reassoc", "contract"})(_sum_vectors)
    return compiled


@functools.cache
def find_convert_kernels(stored: str, loaded: str, is_scaled: bool) -> ConvertKernels | None:
    """Compile `convert_places` and `read_and_convert` for names of value types; None without numba.

    `convert_places(vectors, trash, by)` converts the stored values at `[n, 2] int64` places, address and size in bytes,
    where they are, and multiplies them by a float32 if `is_scaled`. A type that is wider begins as much before the
    address as it has more bytes: what was read to the back half of some memory fills all of it. Places at the address
    `trash` are left alone, whose values would change without end. Values are multiplied as float32, and rounded once,
    to the nearest, else to the even one.

    `read_and_convert(fds, vectors, firsts, counts, offsets, nbytes, got, trash, by)` reads extents, one `preadv` each
    from the file descriptor in `fds`, sets what was returned in `got`, and converts the places of those that are
    complete; see `reading.Extents` for the others, all of them `[n] int64`.
    """
    numba = _find_numba()
    if numba is None:
        return None
    convert = numba.njit("void(int64, int64, uint16[::1], float32)", nogil=True)(
        _make_convert(numba, DTYPES[stored], DTYPES[loaded], is_scaled)
    )

    def convert_places(vectors: _Int64s, trash: int, by: np.float32) -> None:
        some = np.empty(_N_CONVERTED, dtype=np.uint16)
        for i in range(len(vectors)):
            if vectors[i, 0] != trash:
                convert(vectors[i, 0], vectors[i, 1], some, by)

    convert_all = numba.njit("void(int64[:, ::1], int64, float32)", nogil=True)(convert_places)

    def read_and_convert(
        fds: _Int64s,
        vectors: _Int64s,
        firsts: _Int64s,
        counts: _Int64s,
        offsets: _Int64s,
        nbytes: _Int64s,
        got: _Int64s,
        trash: int,
        by: np.float32,
    ) -> None:
        for i in range(len(fds)):
            places = vectors[firsts[i] : firsts[i] + counts[i]]
            got[i] = _preadv(fds[i], places.ctypes.data, counts[i], offsets[i])
            if got[i] == nbytes[i]:
                convert_all(places, trash, by)

    int64s = "int64[::1]"
    signature = f"void({int64s}, int64[:, ::1], {int64s}, {int64s}, {int64s}, {int64s}, {int64s}, int64, float32)"
    return convert_all, numba.njit(signature, nogil=True)(read_and_convert)


def _make_convert(numba: Any, stored: ValueType, loaded: ValueType, is_scaled: bool) -> Callable[..., None]:
    """Make what converts one place: of an address, a size in bytes, memory for some values, and what to multiply by."""

    def make_pointer(values: Any) -> Any:
        def point(context: Any, address: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

            return numba.types.CPointer(values)(address), generate

        return numba.extending.intrinsic(point)

    floats, words = make_pointer(numba.types.float32), make_pointer(numba.types.uint32)
    halves, nbytes_each, wide_nbytes = make_pointer(numba.types.uint16), stored.nbytes, loaded.nbytes

    def scale_floats(address: int, nbytes: int, some: _Halves, by: np.float32) -> None:
        values = numba.carray(floats(address), nbytes // nbytes_each)
        for i in range(len(values)):
            values[i] *= by

    if stored == FLOAT32:
        return scale_floats
    widen, narrow = (numba.njit(inline="always")(function) for function in _CONVERSIONS[stored.name])

    def widen_values(address: int, nbytes: int, some: _Halves, by: np.float32) -> None:
        n = nbytes // nbytes_each
        for start in range(0, n, len(some)):
            n_now, place = min(n - start, len(some)), address - nbytes + start * wide_nbytes
            values, found = (
                numba.carray(halves(address + start * nbytes_each), n_now),
                numba.carray(words(place), n_now),
            )
            # Copied first: vector instructions need memory that what is written does not overlap.
            for i in range(n_now):
                some[i] = values[i]
            for i in range(n_now):
                found[i] = widen(some[i])
            if is_scaled:
                scaled = numba.carray(floats(place), n_now)
                for i in range(n_now):
                    scaled[i] *= by

    def scale_halves(address: int, nbytes: int, some: _Halves, by: np.float32) -> None:
        values = numba.carray(halves(address), nbytes // nbytes_each)
        for i in range(len(values)):
            values[i] = narrow(widen(values[i]).view(np.float32) * by)

    return scale_halves if loaded == stored else widen_values


def _widen_bfloat16(bits: np.uint16) -> np.uint32:
    return np.uint32(np.uint32(bits) << np.uint32(16))


def _widen_float16(bits: np.uint16) -> np.uint32:
    magnitude = np.uint32(bits & np.uint16(0x7FFF))
    # Exponent and mantissa where float32 has them, with another bias of the exponent.
    found = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(112 << 23))
    if magnitude >= np.uint32(0x7C00):
        # A NaN becomes a quiet one, as processors make it.
        found = np.uint32(found + np.uint32(112 << 23)) | np.uint32(0x400000 if magnitude > np.uint32(0x7C00) else 0)
    elif magnitude < np.uint32(0x0400):
        found = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    return np.uint32(found | np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16)))


def _narrow_bfloat16(value: np.float32) -> np.uint16:
    bits = np.float32(value).view(np.uint32)
    is_odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16))
    return np.uint16(rounded if value == value else np.uint32(_NAN_BFLOAT16))


def _narrow_float16(value: np.float32) -> np.uint16:
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    is_odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32(np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + is_odd) >> np.uint32(13))
    if magnitude < np.uint32(113 << 23):
        # The last bit of a half is what the last bit of a subnormal number is worth.
        half = np.float32(magnitude.view(np.float32) + np.float32(0.5))
        rounded = np.uint32(half.view(np.uint32) - np.uint32(126 << 23))
    elif magnitude >= np.uint32(143 << 23):
        rounded = np.uint32(0x7C00)
    rounded = np.uint32(rounded | np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000)))
    return np.uint16(rounded if value == value else np.uint32(_NAN_FLOAT16))


_CONVERSIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "bfloat16": (_widen_bfloat16, _narrow_bfloat16),
    "float16": (_widen_float16, _narrow_float16),
}


@functools.cache
def _find_numba() -> Any:
    try:
        import numba

        is_disabled = numba.config.DISABLE_JIT  # type: ignore[attr-defined]
    except ModuleNotFoundError:
        return None
    except Exception as err:  # noqa: BLE001 -- an installation that is broken raises whatever it likes
        _log.warning("numba is installed, but cannot be used: %s. Scaling and statistics take longer without it.", err)
        return None
    return None if is_disabled else numba


def _sum_vectors(
    vectors: _Float32s, sums: _Float64s, squares: _Float64s, squared_norms: _Float64s, lows: _Float32s, highs: _Float32s
) -> None:
    n, d_model = vectors.shape
    for start in range(0, n, _N_SUMMED):
        stop = min(n, start + _N_SUMMED)
        some, some_squares = np.zeros(d_model), np.zeros(d_model)
        # Two vectors at a time, because sums are in the cache and not in registers; the last of an odd number is its
        # own partner, and does not count then.
        for i in range(start, stop, 2):
            partner = min(i + 1, stop - 1)
            weight = np.float64(partner - i)
            vector_a, vector_b = vectors[i], vectors[partner]
            norm_a, norm_b = 0.0, 0.0
            for j in range(d_model):
                x, y = vector_a[j], vector_b[j]
                low, high = (x, y) if x < y else (y, x)
                lows[j] = low if low < lows[j] else lows[j]
                highs[j] = high if high > highs[j] else highs[j]
                a, b = np.float64(x), np.float64(y)
                some[j] += a + weight * b
                some_squares[j] += a * a + weight * (b * b)
                norm_a += a * a
                norm_b += b * b
            squared_norms[i], squared_norms[partner] = norm_a, norm_b
        for j in range(d_model):
            sums[j] += some[j]
            squares[j] += some_squares[j]
