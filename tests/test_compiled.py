"""The compiled loops against numpy, and what is done where they are not to be had."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from saev_torch.reading.compiled import find_sum_kernel
from saev_torch.reading.kernels import find_convert_kernels

SCALE = ("float32", "float32", True)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 257, 770])
@pytest.mark.parametrize("d_model", [1, 7, 64])
def test_sums(n: int, d_model: int) -> None:
    rng = np.random.default_rng(n * 100 + d_model)
    x = (rng.standard_normal((n, d_model)) * rng.lognormal(0, 3, (1, d_model)) + 5).astype(np.float32)
    sums, squares, norms = rng.standard_normal(d_model), rng.standard_normal(d_model), np.empty(n)
    lows, highs = np.full(d_model, 5, np.float32), np.full(d_model, 5, np.float32)
    wanted_sums = sums + x.sum(axis=0, dtype=np.float64)
    wanted_squares = squares + np.square(x, dtype=np.float64).sum(axis=0)
    find_sum_kernel()(x, sums, squares, norms, lows, highs)
    np.testing.assert_allclose(sums, wanted_sums, rtol=0, atol=1e-14 * (1 + np.abs(x).sum(axis=0).max(initial=0)))
    np.testing.assert_allclose(squares, wanted_squares, rtol=1e-13)
    np.testing.assert_allclose(norms, np.square(x, dtype=np.float64).sum(axis=1), rtol=1e-14)
    np.testing.assert_array_equal(lows, x.min(axis=0, initial=5))
    np.testing.assert_array_equal(highs, x.max(axis=0, initial=5))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1, 4])
def test_a_value_that_is_not_finite_shows_in_its_norm_only(bad: float, row: int) -> None:
    x = np.ones((5, 16), dtype=np.float32)
    x[row, 3] = bad
    norms, columns = np.empty(5), [np.zeros(16) for _ in range(2)]
    find_sum_kernel()(x, *columns, norms, np.zeros(16, np.float32), np.zeros(16, np.float32))
    assert np.isfinite(norms).tolist() == [i != row for i in range(5)]


def test_many_small_values_beside_a_large_sum() -> None:
    """Rounding errors do not add up over a million vectors."""
    x = np.full((1 << 20, 1), 0.1, dtype=np.float32)
    sums, squares = np.zeros(1), np.zeros(1)
    find_sum_kernel()(x, sums, squares, np.empty(len(x)), np.zeros(1, np.float32), np.zeros(1, np.float32))
    assert sums[0] == pytest.approx(len(x) * float(x[0, 0]), rel=3e-14)
    assert squares[0] == pytest.approx(len(x) * float(x[0, 0]) ** 2, rel=3e-14)


def test_places_are_scaled_and_nothing_else() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    values[[11, 12]] = np.nan, np.inf
    wanted = values.copy()
    places = [(3, 1), (10, 100), (500, 7), (999, 1), (0, 0)]
    trash = (700, 20)
    for start, n in places:
        wanted[start : start + n] *= np.float32(1.7)
    vectors = np.array([(values.ctypes.data + 4 * start, 4 * n) for start, n in [*places, trash, trash]])
    convert_places, *_ = find_convert_kernels(*SCALE)
    convert_places(vectors, values.ctypes.data + 4 * 700, np.float32(1.7))
    np.testing.assert_array_equal(values, wanted)


def test_only_what_was_read_completely_is_scaled(tmp_path) -> None:
    stored = np.arange(100, dtype=np.float32)
    path = tmp_path / "values"
    path.write_bytes(stored.tobytes())
    values = np.full(100, -1, dtype=np.float32)
    address = values.ctypes.data
    # Two places of one read, a read beyond the end, and one of nothing that is open.
    vectors = np.array([(address, 40), (address + 80, 80), (address + 160, 80), (address + 240, 80)])
    fd = os.open(path, os.O_RDONLY)
    got = np.zeros(3, dtype=np.int64)
    _, read_and_convert, _ = find_convert_kernels(*SCALE)
    read_and_convert(
        np.array([fd, fd, -1]), vectors, np.array([0, 2, 3]), np.array([2, 1, 1]), np.array([40, 360, 0]), got,
        address + 80, np.float32(0.5), np.empty(1000, dtype=np.uint8),
    )  # fmt: skip
    os.close(fd)
    assert got.tolist() == [120, 0, -errno.EBADF]
    wanted = np.full(100, -1, dtype=np.float32)
    # The second place is for what is not wanted.
    wanted[:10] = stored[10:20] * 0.5
    np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize(
    ("before", "logged"),
    [
        ("sys.modules['numba'] = None", ""),
        ("os.environ['NUMBA_DISABLE_JIT'] = '1'", ""),
        (
            "open('numba.py', 'w').write('raise ImportError(\"numba needs another numpy\")'); sys.path.insert(0, '.')",
            "numba is installed, but cannot be used: numba needs another numpy.",
        ),
        (
            "open('numba.py', 'w').write('raise SystemError(\"no _internal\")'); sys.path.insert(0, '.')",
            "numba is installed, but cannot be used: no _internal.",
        ),
        ("sys.modules['numba'] = type(sys)('numba')", "numba is installed, but cannot be used: module 'numba' has no"),
    ],
)
def test_without_numba(tmp_path, before: str, logged: str) -> None:
    code = f"""
import os, sys
{before}
from saev_torch.reading.compiled import find_sum_kernel
from saev_torch.reading.kernels import find_convert_kernels
assert find_convert_kernels("float16", "float32", False) is None and find_sum_kernel() is None
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(logged)
    assert done.stderr.count("\n") == bool(logged)
