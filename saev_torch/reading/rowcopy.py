"""Copies rows from mappings that are watched, in a loop of machine code, and widens or multiplies them on the way.

Two things make it fast. The processor is told ahead of time which pages come next; and rows go past the caches to where
a batch is. Of rows of 3 KB all over 10 GB, a core copied 14 GB/s so, and 5 to 7 by way of the kernel.
"""

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.format.dtypes import FLOAT32, ValueType
from saev_torch.reading.machinecode import converts_float16, make_code

_Int64s = NDArray[np.int64]

# 4096 bytes are a page, and 64 a line of the caches. The row that is fetched ahead is the eighth from here.
_LOOP = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define void @copy_rows(ptr %sources, ptr %numbers, i64 %n, ptr %target, i64 %nbytes, i64 %stride, i64 %is_past_caches,
                       float %by) {
begin:
  %has_numbers = icmp ne ptr %numbers, null
  %last_byte = sub i64 %nbytes, 1
  %is_past = icmp ne i64 %is_past_caches, 0
  br label %row
row:
  %i = phi i64 [0, %begin], [%next_i, %row_end]
  %is_row = icmp slt i64 %i, %n
  br i1 %is_row, label %look_ahead, label %end
look_ahead:
  %ahead = add i64 %i, 8
  %has_ahead = icmp slt i64 %ahead, %n
  br i1 %has_ahead, label %fetch_first, label %copy
fetch_first:
  %ahead_at = getelementptr ptr, ptr %sources, i64 %ahead
  %ahead_row = load ptr, ptr %ahead_at
  %ahead_end = getelementptr i8, ptr %ahead_row, i64 %last_byte
  call void @llvm.prefetch.p0(ptr %ahead_end, i32 0, i32 3, i32 1)
  br label %fetch
fetch:
  %page = phi i64 [0, %fetch_first], [%next_page, %fetch]
  %page_at = getelementptr i8, ptr %ahead_row, i64 %page
  call void @llvm.prefetch.p0(ptr %page_at, i32 0, i32 3, i32 1)
  %next_page = add i64 %page, 4096
  %is_page = icmp slt i64 %next_page, %nbytes
  br i1 %is_page, label %fetch, label %copy
copy:
  %source_at = getelementptr ptr, ptr %sources, i64 %i
  %source = load ptr, ptr %source_at
  br i1 %has_numbers, label %find_number, label %numbered
find_number:
  %number_at = getelementptr i64, ptr %numbers, i64 %i
  %found_number = load i64, ptr %number_at
  br label %numbered
numbered:
  %number = phi i64 [%i, %copy], [%found_number, %find_number]
  %offset = mul i64 %number, %stride
  %place = getelementptr i8, ptr %target, i64 %offset
  %place_address = ptrtoint ptr %place to i64
  %minus_address = sub i64 0, %place_address
  ; How many bytes are before the first whole line.
  %to_line = and i64 %minus_address, 63
  BODY
row_end:
  %next_i = add i64 %i, 1
  br label %row
end:
  fence seq_cst
  ret void
}

!0 = !{i32 1}
"""

_COPY = """
  %before = select i1 %is_past, i64 %to_line, i64 %nbytes
  %is_short = icmp sgt i64 %before, %nbytes
  %first = select i1 %is_short, i64 %nbytes, i64 %before
  %has_first = icmp ne i64 %first, 0
  br i1 %has_first, label %copy_first, label %lines
copy_first:
  call void @llvm.memcpy.p0.p0.i64(ptr %place, ptr %source, i64 %first, i1 false)
  br label %lines
lines:
  %behind_first = sub i64 %nbytes, %first
  %in_lines = and i64 %behind_first, -64
  %lines_end = add i64 %first, %in_lines
  br label %line
line:
  %k = phi i64 [%first, %lines], [%next_k, %copy_line]
  %is_line = icmp slt i64 %k, %lines_end
  br i1 %is_line, label %copy_line, label %rest
copy_line:
  %from = getelementptr i8, ptr %source, i64 %k
  %to = getelementptr i8, ptr %place, i64 %k
  %line_bytes = load <64 x i8>, ptr %from, align 1
  store <64 x i8> %line_bytes, ptr %to, align 64, !nontemporal !0
  %next_k = add i64 %k, 64
  br label %line
rest:
  %n_rest = sub i64 %nbytes, %lines_end
  %has_rest = icmp ne i64 %n_rest, 0
  br i1 %has_rest, label %copy_rest, label %row_end
copy_rest:
  %rest_from = getelementptr i8, ptr %source, i64 %lines_end
  %rest_to = getelementptr i8, ptr %place, i64 %lines_end
  call void @llvm.memcpy.p0.p0.i64(ptr %rest_to, ptr %rest_from, i64 %n_rest, i1 false)
  br label %row_end
"""

# A line has 16 float32. `ONE` and `LINE` convert so many values from the one named on.
_CONVERT = """
  %by_first = insertelement <16 x float> poison, float %by, i64 0
  %by_16 = shufflevector <16 x float> %by_first, <16 x float> poison, <16 x i32> zeroinitializer
  %n_values = udiv i64 %nbytes, N_STORED
  %n_to_line = udiv i64 %to_line, 4
  %is_short = icmp sgt i64 %n_to_line, %n_values
  %first = select i1 %is_short, i64 %n_values, i64 %n_to_line
  %behind_first = sub i64 %n_values, %first
  %in_lines = and i64 %behind_first, -16
  %lines_end = add i64 %first, %in_lines
  br label %head
head:
  %h = phi i64 [0, %numbered], [%next_h, %convert_head]
  %is_head = icmp slt i64 %h, %first
  br i1 %is_head, label %convert_head, label %line
convert_head:
  ONE h
  %next_h = add i64 %h, 1
  br label %head
line:
  %k = phi i64 [%first, %head], [%next_k, %convert_line]
  %is_line = icmp slt i64 %k, %lines_end
  br i1 %is_line, label %convert_line, label %rest
convert_line:
  LINE k
  %next_k = add i64 %k, 16
  br label %line
rest:
  %r = phi i64 [%lines_end, %line], [%next_r, %convert_rest]
  %is_rest = icmp slt i64 %r, %n_values
  br i1 %is_rest, label %convert_rest, label %row_end
convert_rest:
  ONE r
  %next_r = add i64 %r, 1
  br label %rest
"""
_STORED = {"float32": "float", "float16": "half", "bfloat16": "i16"}


def _vector(kind: str, n: int) -> str:
    return kind if n == 1 else f"<{n} x {kind}>"


def _conversion(stored: ValueType, is_scaled: bool, at: str, n: int) -> str:
    """The text that converts `n` values from the one whose number is called `at` to float32."""
    kind, floats, ints = (_vector(kind, n) for kind in (_STORED[stored.name], "float", "i32"))
    lines = [
        f"%from_{at} = getelementptr {_STORED[stored.name]}, ptr %source, i64 %{at}",
        f"%to_{at} = getelementptr float, ptr %place, i64 %{at}",
        f"%stored_{at} = load {kind}, ptr %from_{at}, align {stored.nbytes}",
    ]
    value = f"%stored_{at}"
    if stored.name == "bfloat16":
        by = "16" if n == 1 else f"<{', '.join(['i32 16'] * n)}>"
        lines += [
            f"%wide_{at} = zext {kind} {value} to {ints}",
            f"%bits_{at} = shl {ints} %wide_{at}, {by}",
            f"%value_{at} = bitcast {ints} %bits_{at} to {floats}",
        ]
        value = f"%value_{at}"
    elif stored.name == "float16":
        lines.append(f"%value_{at} = fpext {kind} {value} to {floats}")
        value = f"%value_{at}"
    if is_scaled:
        lines.append(f"%scaled_{at} = fmul {floats} {value}, {'%by' if n == 1 else '%by_16'}")
        value = f"%scaled_{at}"
    where = "align 4" if n == 1 else "align 64, !nontemporal !0"
    return "\n  ".join([*lines, f"store {floats} {value}, ptr %to_{at}, {where}"])


def _converting(stored: ValueType, is_scaled: bool) -> str:
    text = _CONVERT.replace("N_STORED", str(stored.nbytes)).replace("LINE k", _conversion(stored, is_scaled, "k", 16))
    for at in "hr":
        text = text.replace(f"ONE {at}", _conversion(stored, is_scaled, at, 1))
    return text


class RowCopy:
    """Copies rows, and converts them if it was made for that; see `find_row_copy`."""

    def __init__(self, code: Any, by: float) -> None:
        # The machine code lives as long as this.
        self._code, self._by = code, by
        kinds: list[Any] = [ctypes.c_int64] * 7 + [ctypes.c_float]
        self._copy_rows = ctypes.CFUNCTYPE(None, *kinds)(code.get_function_address("copy_rows"))

    def __call__(
        self,
        sources: _Int64s,
        target: int,
        nbytes: int,
        stride: int,
        is_past_caches: bool = True,
        numbers: _Int64s | None = None,
    ) -> None:
        """Copy rows of `nbytes` bytes each to a place, `stride` bytes from one to the next.

        `sources` are `[n] int64`, addresses in mappings that are watched; `numbers` likewise, which row there each is,
        where that is not the order of the sources. What came from one that is broken by then is of no use. The
        interpreter lock is not held.
        """
        listed = 0 if numbers is None else numbers.ctypes.data
        self._copy_rows(sources.ctypes.data, listed, len(sources), target, nbytes, stride, is_past_caches, self._by)


@functools.cache
def find_row_copy(stored: ValueType = FLOAT32, loaded: ValueType = FLOAT32, by: float | None = None) -> RowCopy | None:
    """Make what copies rows, converts them from `stored` to `loaded`, and multiplies them; None where there is no way.

    What becomes float32 is multiplied as such: values are those of `reading.kernels`.
    """
    if loaded == stored and by is None:
        body = _COPY
    elif loaded != FLOAT32 or (stored.name == "float16" and not converts_float16()):
        return None
    else:
        body = _converting(stored, by is not None)
    code = make_code(_LOOP.replace("BODY", body))
    return None if code is None else RowCopy(code, by or 0.0)
