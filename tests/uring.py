"""Whether this process may use io_uring, asked of the kernel without the package.

Tests that need it skip only where the kernel says no: where the package does not find it and the kernel would give it,
they fail.
"""

import ctypes
import os
import platform
import re
import sys

import pytest

_SETUP, _PARAMS_NBYTES = 425, 120
_LEAST = (5, 10)


def refusal() -> str | None:
    """Why there is no io_uring here; None where there is."""
    if not sys.platform.startswith("linux"):
        return f"io_uring: {sys.platform} has none"
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    if found is None or (int(found[1]), int(found[2])) < _LEAST:
        return f"io_uring: Linux {platform.release()} is too old"
    params = ctypes.create_string_buffer(_PARAMS_NBYTES)
    syscall = getattr(ctypes.CDLL(None, use_errno=True), "syscall", None)
    if syscall is None:
        return "io_uring: the C library has no `syscall`"
    fd = syscall(_SETUP, 1, params)
    if fd < 0:
        return f"io_uring is not allowed here: {os.strerror(ctypes.get_errno())}"
    os.close(fd)
    return None


needed = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))
"""Marks tests that need io_uring."""
