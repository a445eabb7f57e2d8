"""Mappings that may be read here, and not by the kernel alone: what happens to their files does not end the process.

What reads behind the end of a mapped file, or where its disk fails, dies of SIGBUS. The signal is handled here, by
machine code: it puts memory of zeros where the mapping is, and notes that it is broken. Who read looks, and reads
otherwise. A signal that is not about mappings of ours goes on to who handled it before.
"""

import ctypes
import functools
import os
import signal
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.processes.locks import renewed
from saev_torch.reading.machinecode import make_code

_Int64s = NDArray[np.int64]

# Mappings that are watched at a time; the kernel reads from others.
_MOST = 1 << 14
# Of each: where it begins, where it ends, and whether it is broken.
_BEGIN, _END, _IS_BROKEN, _N_COLUMNS = range(4)
_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000

# Code and address stand at bytes 8 and 16 of what the kernel tells. What it did not send itself has no code above 0.
# 16434 is MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE, and 1 PROT_READ.
_CODE = """
@watched = global [MOST x [3 x i64]] zeroinitializer
@previous = global [256 x i8] zeroinitializer
@default = global [256 x i8] zeroinitializer
@is_sent_on = global i64 0

declare ptr @mmap(ptr, i64, i32, i32, i32, i64)
declare i32 @sigaction(i32, ptr, ptr)
declare i32 @raise(i32)

define void @on_bus_error(i32 %number, ptr %info, ptr %context) {
begin:
  %code_at = getelementptr i8, ptr %info, i64 8
  %code = load i32, ptr %code_at
  %address_at = getelementptr i8, ptr %info, i64 16
  %address = load i64, ptr %address_at
  %is_fault = icmp sgt i32 %code, 0
  br i1 %is_fault, label %look, label %not_ours
look:
  %i = phi i64 [0, %begin], [%next_i, %look_on]
  %first_at = getelementptr [3 x i64], ptr @watched, i64 %i, i64 0
  %end_at = getelementptr [3 x i64], ptr @watched, i64 %i, i64 1
  %broken_at = getelementptr [3 x i64], ptr @watched, i64 %i, i64 2
  %end = load atomic volatile i64, ptr %end_at seq_cst, align 8
  %first = load atomic volatile i64, ptr %first_at seq_cst, align 8
  %end_again = load atomic volatile i64, ptr %end_at seq_cst, align 8
  ; Where another thread takes an entry out, or puts one in, the end is 0 meanwhile.
  %is_one = icmp eq i64 %end, %end_again
  %is_behind = icmp uge i64 %address, %first
  %is_before = icmp ult i64 %address, %end
  %is_near = and i1 %is_behind, %is_before
  %is_inside = and i1 %is_near, %is_one
  br i1 %is_inside, label %found, label %look_on
look_on:
  %next_i = add i64 %i, 1
  %is_more = icmp slt i64 %next_i, MOST
  br i1 %is_more, label %look, label %not_ours
found:
  ; Noted first: who finds zeros there finds the note, too.
  store volatile i64 1, ptr %broken_at
  fence seq_cst
  %mapping = inttoptr i64 %first to ptr
  %nbytes = sub i64 %end, %first
  %got = call ptr @mmap(ptr %mapping, i64 %nbytes, i32 1, i32 16434, i32 -1, i64 0)
  %is_done = icmp eq ptr %got, %mapping
  br i1 %is_done, label %done, label %not_ours
not_ours:
  ; Who was before us may send it back here: then it is nobody's.
  %was_sent_on = load volatile i64, ptr @is_sent_on
  %is_back = icmp ne i64 %was_sent_on, 0
  %next_action = select i1 %is_back, ptr @default, ptr @previous
  store volatile i64 1, ptr @is_sent_on
  %failed = call i32 @sigaction(i32 %number, ptr %next_action, ptr null)
  ; The kernel sends what it sent once more, when the same instruction fails again.
  br i1 %is_fault, label %done, label %send
send:
  %sent = call i32 @raise(i32 %number)
  br label %done
done:
  ret void
}
""".replace("MOST", str(_MOST))


class _SignalAction(ctypes.Structure):
    """What `sigaction` takes."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_libc: Any = ctypes.CDLL(None, use_errno=True)


class Watch:
    """The mappings that are watched. There is one in a process; see `find_watch`."""

    def __init__(self, code: Any) -> None:
        # The machine code lives as long as this.
        self._code = code
        self._previous = code.get_global_value_address("previous")
        self._handler = code.get_function_address("on_bus_error")
        table = (ctypes.c_int64 * (_MOST * _N_COLUMNS)).from_address(code.get_global_value_address("watched"))
        self._watched: _Int64s = np.ctypeslib.as_array(table).reshape(_MOST, _N_COLUMNS)
        self._is_sent_on = ctypes.c_int64.from_address(code.get_global_value_address("is_sent_on"))
        self._unused = list(reversed(range(_MOST)))
        self._has_begun = False
        self._lock = renewed(threading.Lock())
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        # torch has a handler of its own in each worker.
        self._has_begun = False

    @property
    def is_on(self) -> bool:
        """Whether this thread's signals come here. They are asked for once in a process; others may have them since."""
        # One that a thread blocks ends the process, whoever handles it.
        if signal.SIGBUS in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
            return False
        now = _SignalAction()
        _libc.sigaction(signal.SIGBUS, None, ctypes.byref(now))
        if now.handler == self._handler:
            # A child that was forked may have it from its parent.
            self._has_begun = True
            return True
        with self._lock:
            if self._has_begun:
                return False
            self._has_begun, self._is_sent_on.value = True, 0
            ours = _SignalAction(handler=self._handler, flags=_SA_SIGINFO | _SA_ONSTACK)
            return not _libc.sigaction(signal.SIGBUS, ctypes.byref(ours), ctypes.c_void_p(self._previous))

    def add(self, address: int, nbytes: int) -> int | None:
        """Watch a mapping, until `remove` is called, and then it may go: its number; None where there are too many."""
        try:
            number = self._unused.pop()
        except IndexError:
            return None
        entry = self._watched[number]
        entry[_BEGIN], entry[_IS_BROKEN] = address, 0
        # Last, see the code.
        entry[_END] = address + nbytes
        return number

    def remove(self, number: int) -> None:
        """Watch a mapping no longer. It may be that a garbage collector calls, in any thread, so there is no lock."""
        self._watched[number, _END] = 0
        self._unused.append(number)

    def is_broken(self, number: int) -> bool:
        """Whether there are zeros where the mapping was."""
        return bool(self._watched[number, _IS_BROKEN])


@functools.cache
def _make_watch(code: Any) -> Watch:
    return Watch(code)


_finding = renewed(threading.Lock())


def find_watch() -> Watch | None:
    """The one of this process; None where there is no machine code."""
    code = make_code(_CODE)
    with _finding:
        return None if code is None else _make_watch(code)
