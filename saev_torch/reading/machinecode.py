"""Machine code from the text of LLVM, made within some milliseconds where llvmlite is installed; numba brings it."""

import functools
import logging
import platform
import sys
import threading
from typing import Any

from saev_torch.processes.locks import renewed

_log = logging.getLogger("saev_torch")

# Their C structures are as our code takes them to be.
_MACHINES = ("x86_64", "aarch64", "arm64")

_making = renewed(threading.Lock())


def make_code(text: str) -> Any | None:
    """Make the functions in a text, once in a process and for those that it forks; None where that is not possible.

    Returns llvmlite's engine, which is asked for addresses, and is to be kept as long as these are used.
    """
    # Else two threads might have variables of their own.
    with _making:
        return _make(text)


@functools.cache
def _make(text: str) -> Any | None:
    target = _find_target()
    if target is None:
        return None
    llvm, machine = target
    code = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
    code.finalize_object()
    return code


@functools.cache
def _find_target() -> tuple[Any, Any] | None:
    is_known = sys.platform.startswith("linux") and platform.machine() in _MACHINES and sys.maxsize > 1 << 32
    if not is_known:
        return None
    try:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features().flatten()
        machine = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, opt=2)
        # An older one knows pointers of other names.
        llvm.parse_assembly("declare void @any(ptr)")
    except ModuleNotFoundError:
        return None
    except Exception as err:  # noqa: BLE001 -- an installation that is broken raises whatever it likes
        _log.warning("llvmlite is installed, but cannot be used: %s. Reading takes longer without it.", err)
        return None
    return llvm, machine


def converts_float16() -> bool:
    """Whether the processor converts float16 by itself."""
    target = _find_target()
    if target is None or platform.machine() != "x86_64":
        return target is not None
    return bool(target[0].get_host_cpu_features().get("f16c"))
