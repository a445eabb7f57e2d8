"""Loops that touch each value once where numpy needs several passes, compiled by numba where that is installed.

numba is an extra (`pip install 'saev_torch[fast]'`). Without it the callers take the longer way to the same values;
only sums may differ, in their last bits. Compiling takes some tenths of a second for each process, and 130 MB that
forked workers share; nothing is kept on disk. A compiled loop does not hold the interpreter lock.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Float32s = NDArray[np.float32]
_Float64s = NDArray[np.float64]

_log = logging.getLogger("saev_torch")

# Sums of more terms than this are sums of sums, so that rounding errors do not grow with the number of vectors.
_N_SUMMED = 256


@functools.cache
def find_sum_kernel() -> Callable[..., None] | None:
    """Compile `sum_vectors(vectors, sums, squares, squared_norms, lows, highs)`; None without numba.

    It adds `[n, d_model] float32` vectors and their squares to `[d_model] float64` sums, lowers and raises
    `[d_model] float32` bounds, and sets `[n] float64` squared L2 norms, which are not finite where a value is not.
    """
    numba = find_numba()
    if numba is None:
        return None
    signature = "void(float32[:, ::1], float64[::1], float64[::1], float64[::1], float32[::1], float32[::1])"
    # Free to add in any order, which vector instructions need; what is not a number stays so.
    compiled: Callable[..., None] = numba.njit(signature, nogil=True, fastmath={"reassoc", "contract"})(_sum_vectors)
    return compiled


@functools.cache
def find_numba() -> Any:
    """The module, or None where it is not to be had."""
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
