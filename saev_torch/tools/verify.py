"""`python -m saev_torch verify DIR`: are all bytes there, and are they those that were written."""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saev_torch.errors import FormatError, ShardsNotFoundError
from saev_torch.format.checksums import CHECKSUMS_NAME, Checksums, find_algorithm
from saev_torch.format.files import counted, read_regular
from saev_torch.format.metadata import METADATA_NAME, Metadata
from saev_torch.format.shards import SHARDS_NAME, ShardInfo, check_nbytes, stat_regular
from saev_torch.format.sidecars import ATTENTION_MASK, SIDECARS, sidecar_idx
from saev_torch.processes.locks import renewed
from saev_torch.processes.world import count_cores
from saev_torch.reading.crew import Task, run_tasks
from saev_torch.reading.mask import Mask
from saev_torch.reading.reader import CallReader, Pace, Reader
from saev_torch.reading.store import ShardStore
from saev_torch.writing.progress import Progress

_PIECE_NBYTES = 1 << 20  # Read and checked while it is still in the cache of the core.
_N_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        file: Name of the file.
        what: What was expected, and what was found.
        example: The example, where one is to blame.
        layer: The recorded layer, where one is to blame.
        offset: First byte of the block in the file, where one is to blame.
    """

    file: str
    what: str
    example: int | None = None
    layer: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        where = [f"{name} {at}" for name, at in (("example", self.example), ("layer", self.layer)) if at is not None]
        at = [] if self.offset is None else [f"block at byte {self.offset}"]
        return f"{', '.join([self.file, *where, *at])}: {self.what}"


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        faults: What is wrong, in the order of files and bytes; empty if all is well.
        nbytes: Bytes that were read.
        n_blocks: Blocks (a layer of an example, or its labels, token ids or mask) whose checksum was compared.
        has_checksums: Whether there is a checksums.json that can be used.
    """

    faults: list[Fault]
    nbytes: int
    n_blocks: int
    has_checksums: bool

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


class _File(NamedTuple):
    """A file that can be read: its number, below 0 for a sidecar, and the layers of its blocks, None for those."""

    idx: int
    name: str
    layers: tuple[int | None, ...]
    first: int
    n_examples: int
    nbytes: int


class _Piece(NamedTuple):
    """Some examples of a file, the first of them by its number in the data set; or padding, without examples."""

    file: _File
    first: int
    n_examples: int
    offset: int
    nbytes: int


def verify(
    shards_dir: Path | str, *, finite: bool = False, progress: bool | None = False, n_threads: int | None = None
) -> VerifyReport:
    """Check a shard directory: sizes always, checksums where there are some, and values on request.

    Args:
        shards_dir: The directory.
        finite: Also look for NaN and infinity.
        progress: Draw a progress bar; None for where stderr is a terminal, and elsewhere a line a minute.
        n_threads: Reading threads; as many as there are cores by default, but 4 to 8, as disks want several.

    Returns:
        What was found; damage is no exception.

    Raises:
        ShardsNotFoundError: There is no such directory, or it has no metadata.json.
        ReadError: A file could not be read.
    """
    return _Verification(Path(shards_dir), finite).run(progress, n_threads or min(8, max(4, os.cpu_count() or 1)))


class _Verification:
    def __init__(self, shards_dir: Path, finite: bool) -> None:
        self.shards_dir, self.finite = shards_dir, finite
        self.faults: list[Fault] = []
        self.checksums: Checksums | None = None
        self.info = ShardInfo()
        self.n_blocks = 0
        self._lock = renewed(threading.Lock())

    def run(self, progress: bool | None, n_threads: int) -> VerifyReport:
        files = list(self._find_files()) if self._load_tables() else []
        # Without checksums and without a question about values there is nothing to read.
        nbytes = sum(file.nbytes for file in files) if self.checksums is not None or self.finite else 0
        if nbytes:
            self._read_all(files, nbytes, progress, n_threads)
        order = {name: i for i, name in enumerate([file.name for file in (*self.info, *SIDECARS)])}
        faults = sorted(self.faults, key=lambda fault: (order.get(fault.file, -1), fault.offset or 0))
        return VerifyReport(faults, nbytes, self.n_blocks, self.checksums is not None)

    @contextlib.contextmanager
    def _blaming(self, file: str) -> Iterator[None]:
        try:
            yield
        except (FormatError, ShardsNotFoundError) as err:
            self.faults.append(Fault(file, str(err)))

    def _load_tables(self) -> bool:
        """Load metadata, checksums and the table of shards; whether there is something to look for."""
        try:
            self.md = Metadata.load(self.shards_dir)
        except FormatError as err:
            self.faults.append(Fault(METADATA_NAME, str(err)))
            return False
        if os.path.lexists(self.shards_dir / CHECKSUMS_NAME):
            with self._blaming(CHECKSUMS_NAME):
                self.checksums = Checksums.load(self.shards_dir, self.md)
                self._check_tables(self.checksums.files)
        with self._blaming(SHARDS_NAME):
            info = ShardInfo.load(self.shards_dir)
            info.check(self.md)
            self.info = info
            return True
        return False

    def _check_tables(self, expected: dict[str, int]) -> None:
        for name in (METADATA_NAME, SHARDS_NAME):
            with contextlib.suppress(FormatError, ShardsNotFoundError):  # Said by who needs it.
                got = zlib.crc32(read_regular(self.shards_dir, name))
                if expected.get(name) != got:
                    self.faults.append(Fault(name, _compare(expected.get(name, 0), got)))

    def _find_files(self) -> Iterator[_File]:
        first = 0
        for idx, shard in enumerate(self.info):
            # A file without examples need not be there.
            if shard.n_examples or os.path.lexists(self.shards_dir / shard.name):
                with self._blaming(shard.name):
                    nbytes = stat_regular(self.shards_dir, shard.name).st_size
                    if shard.n_examples:
                        check_nbytes(self.shards_dir / shard.name, self.md, shard.n_examples, nbytes)
                    yield _File(idx, shard.name, self.md.layers, first, shard.n_examples, nbytes)
            first += shard.n_examples
        for sidecar in SIDECARS:
            has_sums = self.checksums is not None and sidecar in self.checksums.beside
            if has_sums or os.path.lexists(self.shards_dir / sidecar.name):
                with self._blaming(sidecar.name):
                    nbytes = stat_regular(self.shards_dir, sidecar.name).st_size
                    sidecar.check(self.shards_dir, self.md, nbytes)
                    if sidecar == ATTENTION_MASK:
                        # Of its header there is no checksum.
                        Mask(self.shards_dir / sidecar.name, self.md)
                    if has_sums:
                        yield _File(sidecar_idx(sidecar), sidecar.name, (None,), 0, self.md.n_examples, nbytes)

    def _read_all(self, files: list[_File], nbytes: int, progress: bool | None, n_threads: int) -> None:
        store = ShardStore(self.shards_dir, (self.md, self.info))
        store.advice = "SEQUENTIAL"
        with contextlib.closing(store), Progress(nbytes, "verifying", "B", progress) as bar:
            several = itertools.chain.from_iterable(map(self._cut, files))
            tasks = (Task(functools.partial(self._read_and_check, pieces, bar)) for pieces in several)
            run_tasks("saev_torch verify", n_threads, Pace(count_cores()), functools.partial(CallReader, store), tasks)

    def _cut(self, file: _File) -> Iterator[list[_Piece]]:
        sidecar = SIDECARS[-1 - file.idx] if file.idx < 0 else None
        width = self.md.example_nbytes if sidecar is None else sidecar.row_nbytes(self.md)
        begin = 0 if sidecar is None else sidecar.offset(self.md, 0)
        step, stop = max(1, _PIECE_NBYTES // width), begin + file.n_examples * width
        pieces = []
        for at in range(0, file.n_examples, step):
            n = min(step, file.n_examples - at)
            pieces.append(_Piece(file, file.first + at, n, begin + at * width, n * width))
        padding = range(stop, file.nbytes, _PIECE_NBYTES)
        pieces += [_Piece(file, 0, 0, at, min(_PIECE_NBYTES, file.nbytes - at)) for at in padding]
        for start in range(0, len(pieces), _N_AT_ONCE):
            yield pieces[start : start + _N_AT_ONCE]

    def _read_and_check(self, pieces: list[_Piece], bar: Progress, reader: Reader) -> None:
        """Read pieces of a file to the same memory, and check each while it is in the cache of the core."""
        memory = np.empty(max(piece.nbytes for piece in pieces), dtype=np.uint8)
        ranges = ((piece.offset, piece.nbytes) for piece in pieces)
        for piece, nbytes in zip(pieces, reader.read_ranges(memory, pieces[0].file.idx, ranges), strict=True):
            found = self._check(piece, memory[:nbytes].data)
            with self._lock:
                self.faults += found
                self.n_blocks += piece.n_examples * len(piece.file.layers) if self.checksums is not None else 0
                bar.update(piece.nbytes)

    def _check(self, piece: _Piece, view: memoryview) -> list[Fault]:
        """Compare the checksum of each block, a layer of an example or its row of a sidecar, and look at its values."""
        name, layers, n_layers = piece.file.name, piece.file.layers, len(piece.file.layers)
        if not piece.n_examples:
            is_bad = self.checksums is not None and bool(np.frombuffer(view, np.uint8).any())
            what = "expected zeros behind the last example, got others"
            return [Fault(name, what, offset=piece.offset)] if is_bad else []
        width = piece.nbytes // (piece.n_examples * n_layers)
        blocks = [view[at : at + width] for at in range(0, piece.nbytes, width)]
        bad: list[tuple[int, str]] = []
        if self.checksums is not None:
            sums, idx = self.checksums.acts, piece.file.idx
            if idx < 0:
                sums = self.checksums.beside[SIDECARS[-1 - idx]]
            expected = sums[piece.first : piece.first + piece.n_examples].ravel().tolist()
            got = list(map(find_algorithm(self.checksums.algorithm), blocks))
            if expected != got:
                bad += [
                    (i, _compare(*pair)) for i, pair in enumerate(zip(expected, got, strict=True)) if len({*pair}) > 1
                ]
        if self.finite and piece.file.idx >= 0:
            for i, block in enumerate(blocks):
                is_wrong = self.md.value_type.is_nonfinite(block)
                if n_wrong := np.count_nonzero(is_wrong):
                    at = int(is_wrong.argmax())
                    token, dimension = divmod(at, self.md.d_model)
                    first = self.md.value_type.as_text(block, at)
                    where = f"the first {first} in stored token {token}, dimension {dimension}"
                    bad.append((i, f"expected finite values, got {n_wrong} that are not, {where}"))
        return [
            Fault(name, what, piece.first + i // n_layers, layers[i % n_layers], piece.offset + i * width)
            for i, what in bad
        ]


def _compare(expected: int, got: int) -> str:
    return f"expected checksum {expected:08x}, got {got:08x}: it was changed after it was written; copy it again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("dir", type=Path, help="shard directory, <shards_root>/<hash>")
    parser.add_argument("--finite", action="store_true", help="also look for NaN and infinity")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Verify a directory and say what is wrong; 0 if all is well, 1 if something is wrong."""
    report = verify(args.dir, finite=args.finite, progress=False if args.quiet else None)
    for fault in report.faults:
        print(fault)
    what = counted(report.n_blocks, "checksum") if report.has_checksums else "sizes only, as there is no checksums.json"
    if args.finite:
        what += ", values"
    print(f"{args.dir}: {counted(len(report.faults), 'fault') if report.faults else 'all is well'} ({what})")
    return int(not report.ok)
