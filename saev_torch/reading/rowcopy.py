"""Copies rows from mapped files in a loop of machine code, which outlives a file that becomes shorter meanwhile.

Two things make it fast: the processor is told ahead of time which pages follow, and rows go past the caches to where a
batch is. Of rows all over 10 GB, a core copied 14 GB/s this way, and 5 to 7 where the kernel copies them.

What reads behind the end of a mapped file, or where its disk fails, dies of SIGBUS. The signal is handled here, by
machine code, too: it puts memory of zeros where the mapping is, and takes down that it is broken; see `RowCopy.is_broken`. A signal
that is not about our mappings goes on to who handled it before.

llvmlite makes the code, within some milliseconds. It is an extra (`pip install 'saev_torch[fast]'`); without it the
kernel copies.
"""

import ctypes
import functools
import logging
import os
import platform
import signal
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.processes.locks import renewed

_Int64s = NDArray[np.int64]

_log = logging.getLogger("saev_torch")

# Mappings that are watched at a time; the kernel copies from others.
_MOST_WATCHED = 1 << 14
# A table of each: where it begins, where it ends, and whether it is broken.
_BEGIN, _END, _IS_BROKEN, _N_COLUMNS = 0, 1, 2, 3
_MACHINES = ("x86_64", "aarch64", "arm64")

# 64 bytes are a line of the caches, 4096 a page; the row that is fetched ahead is the eighth from here.
# 16434 is MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE; 1 is PROT_READ.
_CODE = """
@watched = global [MOST_WATCHED x [3 x i64]] zeroinitializer
@previous = global [256 x i8] zeroinitializer

declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare ptr @mmap(ptr, i64, i32, i32, i32, i64)
declare i32 @sigaction(i32, ptr, ptr)
declare i32 @raise(i32)

; Copy n rows of nbytes each, from the addresses in sources, to target and what is behind it.
define void @copy_rows(ptr %sources, i64 %n, ptr %target, i64 %nbytes, i64 %is_past_caches) {
begin:
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
  %ahead_at = getelementptr i64, ptr %sources, i64 %ahead
  %ahead_address = load i64, ptr %ahead_at
  %ahead_row = inttoptr i64 %ahead_address to ptr
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
  %source_at = getelementptr i64, ptr %sources, i64 %i
  %address = load i64, ptr %source_at
  %source = inttoptr i64 %address to ptr
  %offset = mul i64 %i, %nbytes
  %place = getelementptr i8, ptr %target, i64 %offset
  ; What goes past the caches goes to whole lines; what is before the first goes there as ever.
  %place_address = ptrtoint ptr %place to i64
  %minus_address = sub i64 0, %place_address
  %to_line = and i64 %minus_address, 63
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
row_end:
  %next_i = add i64 %i, 1
  br label %row
end:
  fence seq_cst
  ret void
}

; Handle SIGBUS: where it is about a watched mapping, note that this is broken, and put zeros there.
define void @on_bus_error(i32 %number, ptr %info, ptr %context) {
begin:
  %code_at = getelementptr i8, ptr %info, i64 8
  %code = load i32, ptr %code_at
  %address_at = getelementptr i8, ptr %info, i64 16
  %address = load i64, ptr %address_at
  ; Else somebody sent it.
  %is_fault = icmp sgt i32 %code, 0
  br i1 %is_fault, label %look, label %not_ours
look:
  %i = phi i64 [0, %begin], [%next_i, %look_on]
  %begin_at = getelementptr [3 x i64], ptr @watched, i64 %i, i64 0
  %end_at = getelementptr [3 x i64], ptr @watched, i64 %i, i64 1
  %broken_at = getelementptr [3 x i64], ptr @watched, i64 %i, i64 2
  %first = load volatile i64, ptr %begin_at
  %last = load volatile i64, ptr %end_at
  %is_behind = icmp uge i64 %address, %first
  %is_before = icmp ult i64 %address, %last
  %is_inside = and i1 %is_behind, %is_before
  br i1 %is_inside, label %found, label %look_on
look_on:
  %next_i = add i64 %i, 1
  %is_more = icmp slt i64 %next_i, MOST_WATCHED
  br i1 %is_more, label %look, label %not_ours
found:
  store volatile i64 1, ptr %broken_at
  fence seq_cst
  %mapping = inttoptr i64 %first to ptr
  %nbytes = sub i64 %last, %first
  %got = call ptr @mmap(ptr %mapping, i64 %nbytes, i32 1, i32 16434, i32 -1, i64 0)
  %is_done = icmp eq ptr %got, %mapping
  br i1 %is_done, label %end, label %not_ours
not_ours:
  %restored = call i32 @sigaction(i32 %number, ptr @previous, ptr null)
  ; What was a fault is one again after this.
  br i1 %is_fault, label %end, label %send
send:
  %sent = call i32 @raise(i32 %number)
  br label %end
end:
  ret void
}

!0 = !{i32 1}
""".replace("MOST_WATCHED", str(_MOST_WATCHED))


class _SignalAction(ctypes.Structure):
    """What Linux's `sigaction` takes, on the machines in `_MACHINES`."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_libc: Any = ctypes.CDLL(None, use_errno=True)


class RowCopy:
    """The code, and the mappings that it may read from. There is one in a process; see `find_row_copy`."""

    def __init__(self, machine_code: Any) -> None:
        # Kept, as the code lives as long.
        self._machine_code = machine_code
        self._previous = machine_code.get_global_value_address("previous")
        self._handler = machine_code.get_function_address("on_bus_error")
        integer = ctypes.c_int64
        self._copy = ctypes.CFUNCTYPE(None, integer, integer, integer, integer, integer)(
            machine_code.get_function_address("copy_rows")
        )
        table = (integer * (_MOST_WATCHED * _N_COLUMNS)).from_address(machine_code.get_global_value_address("watched"))
        self._watched: _Int64s = np.frombuffer(table, dtype=np.int64).reshape(_MOST_WATCHED, _N_COLUMNS)
        self._unused = list(reversed(range(_MOST_WATCHED)))
        self._handles_signal = False
        self._lock = renewed(threading.Lock())
        os.register_at_fork(after_in_child=self._forget_signal)

    def _forget_signal(self) -> None:
        # Workers of torch have handlers of their own.
        self._handles_signal = False

    def watch(self, address: int, nbytes: int) -> int | None:
        """Watch a mapping, which is to be unwatched before it is gone: its number; None where there are too many."""
        with self._lock:
            if not self._unused:
                return None
            number = self._unused.pop()
        self._watched[number] = address, address + nbytes, 0
        return number

    def unwatch(self, number: int) -> None:
        """Watch a mapping no longer."""
        self._watched[number] = 0
        # The lock may be held by who is collecting garbage; this needs none.
        self._unused.append(number)

    def is_broken(self, number: int) -> bool:
        """Whether a mapping has been replaced by zeros since it is watched: it is of no use any more."""
        return bool(self._watched[number, _IS_BROKEN])

    def can_copy(self) -> bool:
        """Whether the signal is ours; not where somebody took it since. The first time it is taken from whom it was."""
        now = _SignalAction()
        _libc.sigaction(signal.SIGBUS, None, ctypes.byref(now))
        if now.handler == self._handler:
            return True
        with self._lock:
            if self._handles_signal:
                return False
            ours = _SignalAction(handler=self._handler, flags=_SA_SIGINFO | _SA_ONSTACK)
            failed = _libc.sigaction(signal.SIGBUS, ctypes.byref(ours), ctypes.c_void_p(self._previous))
            self._handles_signal = True
            return not failed

    def copy(self, sources: _Int64s, target: int, nbytes: int, is_past_caches: bool) -> None:
        """Copy rows of `nbytes` bytes to a place, one behind the other.

        `sources` are `[n] int64`, addresses in mappings that are watched. What is in a mapping that is broken then is
        not what was copied from it. The interpreter lock is not held.
        """
        self._copy(sources.ctypes.data, len(sources), target, nbytes, is_past_caches)


_finding = renewed(threading.Lock())


def find_row_copy() -> RowCopy | None:
    """Make the code, once in a process and for those that it forks; None where that is not possible."""
    with _finding:
        return _find()


@functools.cache
def _find() -> RowCopy | None:
    if not sys.platform.startswith("linux") or platform.machine() not in _MACHINES:
        return None
    try:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(_CODE)
        features = llvm.get_host_cpu_features().flatten()
        target = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, opt=2)
        machine_code = llvm.create_mcjit_compiler(module, target)
        machine_code.finalize_object()
    except ModuleNotFoundError:
        return None
    except Exception as err:  # noqa: BLE001 -- an installation that is broken raises whatever it likes
        _log.warning("llvmlite is installed, but cannot be used: %s. Reading takes longer without it.", err)
        return None
    return RowCopy(machine_code)
