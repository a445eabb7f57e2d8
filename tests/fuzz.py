"""Hostile directories and states: a strange file may be refused, and nothing else may happen.

python tests/fuzz.py --n 100000
"""

import argparse
import copy
import dataclasses
import json
import os
import pickle
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contracts
import factory

from saev_torch import (
    IndexedConfig,
    IndexedDataset,
    OrderedActivations,
    OrderedConfig,
    SaevTorchError,
    ShuffledActivations,
    ShuffledConfig,
)
from saev_torch.format.rules import ActDtype
from saev_torch.reading.kernels import find_convert_kernels

SPEC = factory.Spec(n_examples=5, content_tokens=3, cls=True, layers=(3, 7), d_model=4, examples_per_shard=2)
OLD = dataclasses.replace(SPEC, protocol="1.1")
HALF = dataclasses.replace(SPEC, dtype="bfloat16")
MAX_S = 1.0
MAX_WALL_S = 60.0
MAX_NBYTES = 100 << 20

_opened: list[str] = []


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "saev_torch-fuzz-unpickled"),)


def listen() -> None:
    """Note every path that is opened from now on, as Python's audit sees it, and refuse to unpickle."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and _watching[0]:
            _opened.append(os.fspath(args[0]) if not isinstance(args[0], int) else "")
        elif event == "pickle.find_class" and _watching[0]:
            raise AssertionError(f"unpickled: {args}")

    sys.addaudithook(hook)


_watching = [False]

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 5, 7, 2**31, 2**31 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**4000,
    1.0, 0.5, 1e308, -0.0, True, False,
)  # fmt: skip
STRINGS = (
    "", ".", "..", "/", "../acts000000.bin", "/etc/passwd", "/dev/zero", "a/b", "a\0b", "x" * 300, "\ud800", "é" * 200,
    "float16", "bfloat16",
    "2.1", "1.1", "1.0.0", "float32", "float64", "majority", "acts000000.bin", "metadata.json", "labels.bin", "~",
)  # fmt: skip
RAW = (
    b"", b"{", b"NaN", b"null", b"[]", b"{}", b"\xff\xfe", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1, "a": 2}',
    b"[" * 5000, b'{"a":' * 3000, b"[" * 900 + b"]" * 900, b'"\xed\xa0\x80"', b"1" * 5000, b"1e999", b"[1e999]",
    b"\xef\xbb\xbf{}", b"\0" * 100, b'"\\ud800"', pickle.dumps(Bomb()),
)  # fmt: skip


def any_value(rng: random.Random, depth: int = 0) -> Any:
    pick = rng.randrange(8 if depth < 3 else 5)
    if pick < 2:
        return rng.choice(NUMBERS)
    if pick < 4:
        return rng.choice(STRINGS)
    if pick == 4:
        return None
    if pick == 5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if pick == 6:
        return {rng.choice(STRINGS): any_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    value: Any = rng.choice(NUMBERS)
    for _ in range(rng.choice([10, 200, 2000])):
        value = [value]
    return value


def dump(value: Any, rng: random.Random) -> bytes:
    """JSON, a little damaged now and then."""
    try:
        # A lone surrogate stays an escape, or becomes bytes that are no UTF-8.
        raw = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        raw = b"[" * 3000
    if rng.random() < 0.15:
        at = rng.randrange(len(raw) + 1)
        noise = rng.choice([b"", b"\xff", b"NaN", b"{", b"]", b",", b"1e999", rng.randbytes(3)])
        raw = raw[:at] + noise + raw[at + rng.randrange(3) :]
    if rng.random() < 0.05 and raw[:1] == b"{" and len(raw) > 2:
        raw = raw[:-1] + b"," + raw[1:]
    return raw


def change_object(obj: dict[str, Any], rng: random.Random) -> None:
    """Change an object of JSON in place, mostly where it has an entry."""
    key = rng.choice(list(obj) or ["x"])
    pick = rng.randrange(5)
    if pick == 0:
        obj.pop(key, None)
    elif pick == 1:
        obj[rng.choice(STRINGS)] = any_value(rng)
    elif pick == 2 and isinstance(obj.get(key), int):
        obj[key] = rng.choice([obj[key] - 1, obj[key] + 1, -obj[key], obj[key] * 2**40, obj[key] * 1000])
    else:
        obj[key] = any_value(rng)


def mutate_metadata(path: Path, rng: random.Random) -> None:
    obj = json.loads((path / "metadata.json").read_bytes())
    for _ in range(rng.randrange(1, 4)):
        change_object(obj, rng)
    (path / "metadata.json").write_bytes(dump(obj if rng.random() < 0.95 else any_value(rng), rng))


def mutate_shards(path: Path, rng: random.Random) -> None:
    entries: list[Any] = json.loads((path / "shards.json").read_bytes())
    for _ in range(rng.randrange(1, 3)):
        i = rng.randrange(len(entries)) if entries else 0
        pick = rng.randrange(6)
        if pick == 0 and entries:
            entries.pop(i)
        elif pick == 1 and entries:
            entries.insert(i, copy.deepcopy(entries[i]))
        elif pick == 2:
            rng.shuffle(entries)
        elif pick == 3 and entries:
            entries[i] = any_value(rng)
        elif entries and isinstance(entries[i], dict):
            change_object(entries[i], rng)
    (path / "shards.json").write_bytes(dump(entries if rng.random() < 0.95 else any_value(rng), rng))


def mutate_raw(path: Path, rng: random.Random) -> None:
    (path / rng.choice(["metadata.json", "shards.json"])).write_bytes(rng.choice(RAW))


def mutate_bytes(path: Path, rng: random.Random) -> None:
    target = path / rng.choice(["metadata.json", "shards.json"])
    raw = bytearray(target.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    target.write_bytes(bytes(raw))


def mutate_size(path: Path, rng: random.Random) -> None:
    target = path / rng.choice(["acts000000.bin", "acts000001.bin", "acts000002.bin", "labels.bin"])
    n = target.stat().st_size
    os.truncate(target, rng.choice([0, 1, n - 1, n + 1, n // 2, 2 * n, 1 << 40]))


def mutate_kind(path: Path, rng: random.Random) -> None:
    """Something else than a file in a file's place."""
    target = path / rng.choice(["metadata.json", "shards.json", "acts000000.bin", "acts000002.bin", "labels.bin"])
    target.unlink()
    pick = rng.randrange(9)
    if pick == 0:
        os.mkfifo(target)
    elif pick == 1:
        target.symlink_to("../other.bin")
    elif pick == 2:
        target.symlink_to("/dev/null")
    elif pick == 3:
        target.symlink_to(target.name)
    elif pick == 4:
        target.mkdir()
    elif pick == 5 and os.geteuid() == 0:
        os.mknod(target, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero
    elif pick == 6:
        with socket.socket(socket.AF_UNIX) as sock:
            here = os.getcwd()
            os.chdir(path)  # the path of a socket is short
            try:
                sock.bind(target.name)
            finally:
                os.chdir(here)
    elif pick == 7:
        target.symlink_to("../outside.bin")


def mutate_large(path: Path, rng: random.Random) -> None:
    """JSON of gigabytes, most of them holes."""
    target = path / rng.choice(["metadata.json", "shards.json"])
    if rng.random() < 0.5:
        os.truncate(target, rng.choice([4 << 20, 1 << 30, 1 << 40]))
    else:
        target.write_bytes(b"[" + b"0," * (1 << 20) + b"0]")


MUTATIONS: tuple[tuple[Callable[[Path, random.Random], None], int], ...] = (
    (mutate_metadata, 36), (mutate_shards, 24), (mutate_raw, 8), (mutate_bytes, 14), (mutate_size, 8),
    (mutate_large, 1), (mutate_kind, 9),
)  # fmt: skip
_MUTATORS = [mutate for mutate, _ in MUTATIONS]
_WEIGHTS = [weight for _, weight in MUTATIONS]


def open_all(path: Path, act_dtype: ActDtype = "float32") -> bool:
    """Open a directory through all data sets, and read from it where it opens; whether it was refused."""
    refused = False
    few: dict[str, Any] = {"batch_size": 8, "buffer_size": 2, "act_dtype": act_dtype}
    openers: tuple[Callable[[], Any], ...] = (
        lambda: IndexedDataset(IndexedConfig(path, tokens="all", layer="all", act_dtype=act_dtype)),
        lambda: OrderedActivations(OrderedConfig(path, tokens="all", layer="all", **few)),
        lambda: ShuffledActivations(ShuffledConfig(path, layer="all", ignore_labels=[1], **few)),
    )
    for opener in openers:
        try:
            data_set = opener()
            if isinstance(data_set, IndexedDataset):
                _ = data_set[len(data_set) - 1] if len(data_set) else None
                _ = data_set[0] if len(data_set) else None
            else:
                iterator = iter(data_set)
                next(iterator, None)
                iterator.close()
        except SaevTorchError as err:
            refused = True
            # A message must be one that a terminal can show.
            str(err).encode("utf-8", "surrogateescape")
    return refused


class Directories:
    """Fuzzes shard directories in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("outside.bin", "other.bin"):
            (root / name).write_bytes(bytes(4096))
        self.goods = [factory.make_shards(root / f"good{i}", spec) for i, spec in enumerate((SPEC, OLD, HALF))]
        # The first time it imports a compiler, which opens files of its own.
        find_convert_kernels(HALF.dtype, "float32", False)

    def one(self, seed: int) -> bool:
        """Make, open and delete a directory; whether it was refused.

        Raises:
            AssertionError: Something was opened outside, or unpickled.
            Exception: What is not ours.
        """
        rng = random.Random(seed)
        path = self.root / "hostile"
        if path.is_symlink() or path.exists():
            shutil.rmtree(path)
        shutil.copytree(rng.choice(self.goods), path)
        chosen = set(rng.choices(_MUTATORS, _WEIGHTS, k=rng.choice([1, 1, 1, 2])))
        # In the order of the table: what makes links, FIFOs and holes comes last, so that nobody writes through them.
        for mutate in [mutate for mutate in _MUTATORS if mutate in chosen]:
            try:
                mutate(path, rng)
            except (ValueError, IndexError, AttributeError, TypeError, RecursionError):
                continue  # a second mutation of what is no longer JSON
            if mutate is mutate_large:
                break
        _opened.clear()
        _watching[0] = True
        try:
            refused = open_all(path, rng.choice(["float32", "stored"]))
        finally:
            _watching[0] = False
        outside = [name for name in _opened if not is_inside(name, path)]
        assert not outside, outside
        return refused


def is_inside(name: str, path: Path) -> bool:
    # What the interpreter itself opens: modules on first use, and its own tables.
    if name.endswith((".py", ".pyc", ".so")) or name.startswith(("/proc/self", "/proc/meminfo", "/sys/")) or name == "":
        return True
    return os.path.dirname(os.path.abspath(name)) == str(path) and not os.path.islink(name)


class States:
    """Fuzzes states."""

    def __init__(self, root: Path) -> None:
        shards = factory.make_shards(root / "states", SPEC)
        self.data_sets = [
            contracts.make_data_set(ShuffledConfig(shards, layer=3, batch_size=8, ignore_labels=[1])),
            contracts.make_data_set(OrderedConfig(shards, layer="all", batch_size=8)),
        ]
        self.good = [data_set.state_dict() for data_set in self.data_sets]

    def one(self, seed: int) -> bool:
        """Load one state; whether it was refused. One that was taken must lead somewhere."""
        rng = random.Random(seed)
        which = rng.randrange(len(self.good))
        state: Any = dict(self.good[which])
        for _ in range(rng.randrange(1, 4)):
            change_object(state, rng)
        if rng.random() < 0.3:
            # Plausible numbers.
            for key in ("epoch", "batch", "rank", "world_size"):
                state[key] = rng.choice([0, 1, 2, 5, 10**6, 2**62 - 1, 2**62, 2**63, -1])
            state["digest"] = rng.choice(["0" * 16 + "-0", "f" * 16 + "-9", "x", 7, "0" * 16 + "-" + "9" * 30])
        if rng.random() < 0.05:
            state = any_value(rng)
        _watching[0] = True
        try:
            data_set = self.data_sets[which]
            data_set.load_state_dict(state)
            if rng.random() < 0.2:
                iterator = iter(data_set)
                next(iterator, None)
                iterator.close()
            data_set.state_dict()
        except SaevTorchError as err:
            str(err).encode("utf-8", "surrogateescape")
            return True
        finally:
            _watching[0] = False
        return False


@dataclasses.dataclass
class Figures:
    """What a campaign saw."""

    n: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    slowest_seed: int = -1
    slowest_wall_s: float = 0.0
    peak_nbytes: int = 0


def memory(field: str) -> int:
    """Resident memory of this process in bytes, now (`VmRSS`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def campaign(one: Callable[[int], bool], seeds: range, log_every: int = 0) -> Figures:
    """Run seeds.

    Raises:
        AssertionError: One took too long, or all together too much memory.
    """
    figures = Figures()
    # From here on the high-water mark is that of the campaign.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    for seed in seeds:
        began, began_wall = time.thread_time(), time.monotonic()
        try:
            refused = one(seed)
        except BaseException as err:
            err.add_note(f"seed {seed} of {getattr(one, '__qualname__', one)}")
            raise
        # Of this thread: a busy machine is not the directory's fault. What hangs takes no time of a thread, however.
        seconds = time.thread_time() - began
        figures.slowest_wall_s = max(figures.slowest_wall_s, time.monotonic() - began_wall)
        figures.n += 1
        figures.refused += refused
        if seconds > figures.slowest_s:
            figures.slowest_s, figures.slowest_seed = seconds, seed
        assert seconds < MAX_S, (seed, seconds)
        assert figures.slowest_wall_s < MAX_WALL_S, (seed, figures)
        if log_every and figures.n % log_every == 0:
            print(figures, flush=True)
    figures.peak_nbytes = memory("VmHWM") - before
    assert figures.peak_nbytes < MAX_NBYTES, figures
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["directories", "states"])
    args = parser.parse_args()
    listen()
    bomb = Path(tempfile.gettempdir()) / "saev_torch-fuzz-unpickled"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        for fuzzed in (States, Directories):
            name = fuzzed.__name__.lower()
            if args.only in (None, name):
                began = time.monotonic()
                one = fuzzed(Path(root)).one
                figures = campaign(one, range(args.seed, args.seed + args.n), 20_000)
                print(f"{name}: {figures}, {time.monotonic() - began:.0f} s")
    assert not bomb.exists()


if __name__ == "__main__":
    main()
