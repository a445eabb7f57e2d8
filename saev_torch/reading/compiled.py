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

from saev_torch.format.dtypes import DTYPES

ScaleKernels = tuple[Callable[..., None], Callable[..., None]]
_Int64s = NDArray[np.int64]
_Float32s = NDArray[np.float32]
_Float64s = NDArray[np.float64]

_log = logging.getLogger("saev_torch")

# Addresses are integers here: a pointer of ctypes is none to the compiler.
_preadv = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int32, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64)(
    ("preadv", ctypes.CDLL(None))
)

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
def find_scale_kernels() -> ScaleKernels | None:
    """Compile `scale_places` and `read_and_scale`; None without numba.

    `scale_places(vectors, trash, by)` multiplies the float32 values at `[n, 2] int64` places, address and size in
    bytes, by a float32, but for places at the address `trash`, whose values would shrink or grow without end.
    `read_and_scale(fds, vectors, firsts, counts, offsets, nbytes, got, trash, by)` reads extents, one `preadv` each
    from the file descriptor in `fds`, sets what was returned in `got`, and scales the places of those that are
    complete; see `reading.Extents` for the others, all of them `[n] int64`.
    """
    numba = _find_numba()
    if numba is None:
        return None

    def make_pointer(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return numba.types.CPointer(numba.types.float32)(address), generate

    pointer = numba.extending.intrinsic(make_pointer)

    value_nbytes = DTYPES["float32"].nbytes

    def scale_places(vectors: _Int64s, trash: int, by: np.float32) -> None:
        for i in range(len(vectors)):
            if vectors[i, 0] == trash:
                continue
            values = numba.carray(pointer(vectors[i, 0]), vectors[i, 1] // value_nbytes)
            for j in range(len(values)):
                values[j] *= by

    scale = numba.njit("void(int64[:, ::1], int64, float32)", nogil=True)(scale_places)

    def read_and_scale(
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
                scale(places, trash, by)

    int64s = "int64[::1]"
    signature = f"void({int64s}, int64[:, ::1], {int64s}, {int64s}, {int64s}, {int64s}, {int64s}, int64, float32)"
    return scale, numba.njit(signature, nogil=True)(read_and_scale)


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
