"""Take something away from this process and its children, then go through the package; see test_systems.py.

    python lacking.py '[{"lacks": ["sendfile.absent"], "cache": "folder", "tour": {...}, "out": "result.json"}, ...]'

forks one process for each, before the package is imported there, so that torch is imported once. What is taken away is
absent as it is on other systems: names are deleted from Python's modules and from what ctypes finds, the kernel refuses
system calls by a filter of its own (seccomp), /proc is another mount. Spawned workers, too, inherit it: the filter and
the mount anyway, and names because sitecustomize.py beside this, in a folder of its own, calls `take_away` there.
"""

import ctypes
import errno
import gc
import json
import mmap
import os
import platform
import re
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "SAEV_TORCH_TEST_LACKS"

_NUMBERS = {
    "x86_64": {"fcntl": 72, "flock": 73, "madvise": 28, "mincore": 27, "sendfile": 40, "memfd_create": 319,
               "fadvise": 221, "sched_getaffinity": 204, "io_uring_setup": 425, "arch": 0xC000003E},
    "aarch64": {"fcntl": 25, "flock": 32, "madvise": 233, "mincore": 232, "sendfile": 71, "memfd_create": 279,
                "fadvise": 223, "sched_getaffinity": 123, "io_uring_setup": 425, "arch": 0xC00000B7},
}  # fmt: skip
_F_SETFL = 4


def refuse(name: str, code: int, *arguments: int) -> None:
    """Let the kernel refuse a system call with an error; only where its last arguments are these, if any are given.

    `arguments` are those from the second on, as numbers of 32 bits.
    """
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None or not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, f"{sys.platform} on {platform.machine()}: system calls cannot be refused here")
    load, equal, give = 0x20, 0x15, 0x06
    # struct seccomp_data: the number, the architecture, the instruction pointer, six arguments of 64 bits.
    checks = [(4, numbers["arch"]), (0, numbers[name]), *((16 + 8 * i, x) for i, x in enumerate(arguments, start=1))]
    program = []
    for i, (offset, value) in enumerate(checks):
        left = 2 * (len(checks) - i) - 1
        program += [(load, 0, 0, offset), (equal, 0, left, value)]
    program += [(give, 0, 0, 0x00050000 | code), (give, 0, 0, 0x7FFF0000)]
    raw = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filters = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(raw))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.c_char_p(filters), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def hide(module: Any, *patterns: str) -> None:
    """Delete names from a module."""
    for name in [name for name in vars(module) if any(re.fullmatch(pattern, name) for pattern in patterns)]:
        delattr(module, name)


_hidden: set[str] = set()


def hide_symbols(*names: str) -> None:
    """Let ctypes not find these functions of the C library."""
    if not _hidden:
        found = ctypes.CDLL.__getitem__

        def find(library: ctypes.CDLL, name: str) -> Any:
            if name in _hidden:
                raise AttributeError(f"undefined symbol: {name}")
            return found(library, name)

        ctypes.CDLL.__getitem__ = find  # type: ignore[method-assign,assignment]
    _hidden.update(names)


def _hide_madvise() -> None:
    hide(mmap, "MADV_.*")
    hide_symbols("madvise")

    class Mmap(mmap.mmap):
        @property
        def madvise(self) -> Any:  # type: ignore[override]
            raise AttributeError("madvise")

    mmap.mmap = Mmap  # type: ignore[misc]


def _hide_descriptors() -> None:
    real = os.open

    def open_other(path: Any, *args: Any, **kwargs: Any) -> int:
        if isinstance(path, str) and re.match(r"/proc/\d+/fd", path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **kwargs)

    os.open = open_other


def _mount_nothing(at: str, *options: str) -> None:
    """In a mount namespace of this process and its children, put an empty file system over a folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, new_mounts, new_user = os.getuid(), 0x20000, 0x10000000
    if libc.unshare(new_mounts):
        group = os.getgid()
        if libc.unshare(new_mounts | new_user):
            raise OSError(ctypes.get_errno(), "there are no mount namespaces here")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    flags = 1 if "ro" in options else 0
    if libc.mount(b"none", b"/", None, 0x44000, None) or libc.mount(b"none", at.encode(), b"tmpfs", flags, None):
        raise OSError(ctypes.get_errno(), f"{at}: could not be mounted on")


def _forget_home() -> None:
    import pwd

    def find(*args: Any) -> Any:
        raise KeyError("getpwuid(): uid not found")

    pwd.getpwuid = pwd.getpwnam = find
    os.environ.pop("HOME", None)


def _use_read_only_cache() -> None:
    cache = Path(os.environ["XDG_CACHE_HOME"])
    cache.mkdir(parents=True, exist_ok=True)
    _mount_nothing(str(cache), "ro")


def _refused(name: str, code: int) -> Callable[[], None]:
    return lambda: refuse(name, code)


_O_DIRECT = getattr(os, "O_DIRECT", 0)

# By what is lacking, how: absent from Python and from the C library, or refused by the system.
WAYS: dict[str, Callable[[], None]] = {
    "memfd_create.absent": lambda: (hide(os, "memfd_create", "MFD_.*"), hide_symbols("memfd_create"))[0],
    "memfd_create.ENOSYS": _refused("memfd_create", errno.ENOSYS),
    "io_uring.absent": lambda: hide_symbols("syscall"),
    "io_uring.EPERM": _refused("io_uring_setup", errno.EPERM),
    "io_uring.ENOSYS": _refused("io_uring_setup", errno.ENOSYS),
    "O_DIRECT.absent": lambda: hide(os, "O_DIRECT"),
    "O_DIRECT.EINVAL": lambda: refuse("fcntl", errno.EINVAL, _F_SETFL, _O_DIRECT),
    "madvise.absent": _hide_madvise,
    "madvise.ENOSYS": _refused("madvise", errno.ENOSYS),
    "posix_fadvise.absent": lambda: (hide(os, "posix_fadvise", "POSIX_FADV_.*"), hide_symbols("posix_fadvise"))[0],
    "posix_fadvise.ENOSYS": _refused("fadvise", errno.ENOSYS),
    "/proc/<pid>/fd.EACCES": _hide_descriptors,
    "sendfile.absent": lambda: hide(os, "sendfile"),
    "sendfile.ENOSYS": _refused("sendfile", errno.ENOSYS),
    "flock.ENOSYS": _refused("flock", errno.ENOSYS),
    "flock.ENOLCK": _refused("flock", errno.ENOLCK),
    "sched_getaffinity.absent": lambda: hide(os, "sched_.*"),
    "sched_getaffinity.ENOSYS": _refused("sched_getaffinity", errno.ENOSYS),
    "HOME.absent": _forget_home,
    "cache folder.EROFS": _use_read_only_cache,
    "mincore.absent": lambda: hide_symbols("mincore"),
    "mincore.ENOSYS": _refused("mincore", errno.ENOSYS),
    "/proc.absent": lambda: _mount_nothing("/proc"),
}
# Without all that a Mac has not, and what a cluster takes away besides.
EVERYTHING = [way for way in WAYS if way.endswith(".absent") or way in ("flock.ENOSYS", "cache folder.EROFS")]
_MOUNTS = ("/proc.absent", "cache folder.EROFS")


def take_away(ways: list[str]) -> None:
    """Take away, here and in processes that this one starts."""
    # First what needs /proc, then /proc; a process that is started has the mounts already.
    for way in sorted(ways, key=lambda way: (way not in _MOUNTS, _MOUNTS.index(way) * -1 if way in _MOUNTS else 0)):
        WAYS[way]()
    os.environ[VARIABLE] = json.dumps([way for way in ways if way not in _MOUNTS])


def _run(job: dict[str, Any]) -> dict[str, Any]:
    os.environ.pop("XDG_CACHE_HOME", None)
    if job["cache"]:
        os.environ["XDG_CACHE_HOME"] = job["cache"]
    try:
        take_away(job["lacks"])
    except OSError as err:
        return {"impossible": str(err)}
    import touring

    return touring.tour(**job["tour"])


def main() -> None:
    import torch.utils.data  # noqa: F401 -- once for all

    # What is imported need not be looked at by each garbage collection of each process.
    gc.freeze()

    for job in json.loads(sys.argv[1]):
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            continue
        code = 1
        try:
            Path(job["out"]).write_text(json.dumps(_run(job)))
            code = 0
        except BaseException:  # noqa: BLE001 -- told to the test
            Path(job["out"]).write_text(json.dumps({"failed": traceback.format_exc()}))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    main()
