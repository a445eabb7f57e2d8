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
from typing import Any

import numpy as np

from saev_torch.errors import FormatError, ShardsNotFoundError
from saev_torch.format.checksums import CHECKSUMS_NAME, Checksums, find_algorithm
from saev_torch.format.files import open_regular
from saev_torch.format.metadata import METADATA_NAME, Metadata
from saev_torch.format.shards import LABELS_NAME, SHARDS_NAME, ShardInfo, check_nbytes, labels_nbytes
from saev_torch.processes.world import count_cores
from saev_torch.reading.crew import Task, run_tasks
from saev_torch.reading.extents import Extents
from saev_torch.reading.pace import Pace
from saev_torch.reading.reader import Reader
from saev_torch.reading.source import Source
from saev_torch.reading.store import LABELS_IDX, ShardStore
from saev_torch.writing.progress import Progress

__all__ = ["Fault", "VerifyReport", "add_arguments", "run", "verify"]

EXIT_FAULTS = 1
_PIECE_NBYTES = 1 << 20  # Read and checked while it is still in the cache of the core.
_N_AT_ONCE = 16


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
        n_blocks: Blocks (example x layer, and the labels of an example) whose checksum was compared.
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


@dataclasses.dataclass(frozen=True)
class _Piece:
    file_idx: int
    name: str
    first: int  # Example in the data set; for padding the offset in the file.
    n: int  # Examples; 0 for padding.
    offset: int
    nbytes: int


def verify(
    shards_dir: Path, *, finite: bool = False, progress: bool | None = False, n_threads: int | None = None
) -> VerifyReport:
    """Check a shard directory: sizes always, checksums where there are some, and values on request.

    Args:
        shards_dir: The directory.
        finite: Also look for NaN and infinity.
        progress: Draw a progress bar; None for where stderr is a terminal.
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
        self.faults: list[tuple[tuple[int, int], Fault]] = []
        self.checksums: Checksums | None = None
        self.info = ShardInfo()
        self.n_blocks = 0
        self.has_labels = False
        self._lock = threading.Lock()
        self._threads = threading.local()

    def run(self, progress: bool | None, n_threads: int) -> VerifyReport:
        try:
            self.md = Metadata.load(self.shards_dir)
        except FormatError as err:
            self._blame(METADATA_NAME, str(err))
            return self._report(0)
        self._load_checksums()
        try:
            self.info = ShardInfo.load(self.shards_dir)
            self.info.check(self.md)
        except (FormatError, ShardsNotFoundError) as err:
            self._blame(SHARDS_NAME, str(err))
            return self._report(0)
        files = list(self._plan_files())
        # Without checksums and without a question about values there is nothing to read.
        nbytes = sum(nbytes for _, _, _, nbytes in files) if self.checksums is not None or self.finite else 0
        if nbytes:
            self._read_all(files, nbytes, progress, n_threads)
        return self._report(nbytes)

    def _read_all(
        self, files: list[tuple[int, str, int, int]], nbytes: int, progress: bool | None, n_threads: int
    ) -> None:
        source, pieces = Source(ShardStore.of(self.shards_dir, self.md, self.info)), self._plan_pieces(files)
        self._largest = max(_PIECE_NBYTES, self.md.example_nbytes, self.md.content_tokens_per_example)
        batches = iter(lambda: list(itertools.islice(pieces, _N_AT_ONCE)), [])
        try:
            with Progress(nbytes, "verifying", "B", progress) as bar:
                tasks = (Task(functools.partial(self._read_and_check, batch, bar)) for batch in batches)
                run_tasks("saev_torch verify", n_threads, Pace(count_cores()), source.open_reader, tasks)
        finally:
            source.store.close()

    def _report(self, nbytes: int) -> VerifyReport:
        faults = [fault for _, fault in sorted(self.faults, key=lambda pair: pair[0])]
        return VerifyReport(faults, nbytes, self.n_blocks, self.checksums is not None)

    def _blame(self, file: str, what: str, file_idx: int = -2, offset: int = 0) -> None:
        self.faults.append(((file_idx, offset), Fault(file, what)))

    def _load_checksums(self) -> None:
        if not os.path.lexists(self.shards_dir / CHECKSUMS_NAME):
            return
        try:
            self.checksums = Checksums.load(self.shards_dir, self.md)
        except FormatError as err:
            self._blame(CHECKSUMS_NAME, str(err))
            return
        for name in (METADATA_NAME, SHARDS_NAME):
            expected = self.checksums.files.get(name)
            with contextlib.suppress(FileNotFoundError):  # Said by who needs it.
                got = zlib.crc32((self.shards_dir / name).read_bytes())
                if expected != got:
                    self._blame(name, _compare(expected or 0, got))

    def _plan_files(self) -> Iterator[tuple[int, str, int, int]]:
        """Yield number, name, examples and size of each file that can be read."""
        for shard_idx, shard in enumerate(self.info):
            try:
                nbytes = self._file_nbytes(shard.name)
                if shard.n_examples:
                    check_nbytes(self.shards_dir / shard.name, self.md, shard.n_examples, nbytes)
            except (FormatError, ShardsNotFoundError) as err:
                if shard.n_examples or isinstance(err, FormatError):
                    self._blame(shard.name, str(err), shard_idx)
                continue
            yield shard_idx, shard.name, shard.n_examples, nbytes
        is_expected = self.checksums is not None and self.checksums.labels is not None
        if os.path.lexists(self.shards_dir / LABELS_NAME) or is_expected:
            try:
                nbytes, expected = self._file_nbytes(LABELS_NAME), labels_nbytes(self.md)
            except (FormatError, ShardsNotFoundError) as err:
                self._blame(LABELS_NAME, str(err), len(self.info))
                return
            if nbytes != expected:
                self._blame(LABELS_NAME, f"expected {expected} bytes, got {nbytes}; copy it again", len(self.info))
            elif is_expected:
                yield LABELS_IDX, LABELS_NAME, self.md.n_examples, nbytes

    def _file_nbytes(self, name: str) -> int:
        fd = open_regular(self.shards_dir, name)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def _plan_pieces(self, files: list[tuple[int, str, int, int]]) -> Iterator[_Piece]:
        firsts = [0, *itertools.accumulate(shard.n_examples for shard in self.info)]
        for file_idx, name, n_examples, nbytes in files:
            width = self.md.content_tokens_per_example if file_idx == LABELS_IDX else self.md.example_nbytes
            first = 0 if file_idx == LABELS_IDX else firsts[file_idx]
            step = max(1, _PIECE_NBYTES // width)
            for at in range(0, n_examples, step):
                n = min(step, n_examples - at)
                yield _Piece(file_idx, name, first + at, n, at * width, n * width)
            for at in range(n_examples * width, nbytes, _PIECE_NBYTES):
                yield _Piece(file_idx, name, at, 0, at, min(_PIECE_NBYTES, nbytes - at))

    def _read_and_check(self, pieces: list[_Piece], bar: Progress, reader: Reader) -> None:
        """Read pieces one after the other to the same memory, and check each while it is in the cache of the core."""
        memory = self._threads.__dict__.setdefault("memory", np.empty(self._largest, dtype=np.uint8))
        extents = _to_extents(pieces, memory)
        for i, piece in enumerate(pieces):
            reader.read(extents, i, i + 1)
            found, n_blocks = self._check(piece, memory[: piece.nbytes].data)
            with self._lock:
                self.faults += found
                self.n_blocks += n_blocks
                bar.update(piece.nbytes)

    def _check(self, piece: _Piece, view: memoryview) -> tuple[list[tuple[tuple[int, int], Fault]], int]:
        order = len(self.info) if piece.file_idx == LABELS_IDX else piece.file_idx
        faults: list[tuple[tuple[int, int], Fault]] = []

        def blame(what: str, offset: int, example: int | None, layer: int | None = None) -> None:
            faults.append(((order, offset), Fault(piece.name, what, example, layer, offset)))

        if not piece.n:
            if self.checksums is not None and np.frombuffer(view, np.uint8).any():
                blame("expected zeros behind the last example, got others", piece.offset, None)
            return faults, 0
        n_parts = 1 if piece.file_idx == LABELS_IDX else self.md.n_layers
        width = piece.nbytes // (piece.n * n_parts)
        sums, checksum = None, find_algorithm("crc32")
        if self.checksums is not None:
            checksum = find_algorithm(self.checksums.algorithm)
            sums = self.checksums.labels if piece.file_idx == LABELS_IDX else self.checksums.acts
        for i in range(piece.n * n_parts):
            example, part = piece.first + i // n_parts, i % n_parts
            layer = None if piece.file_idx == LABELS_IDX else self.md.layers[part]
            block = view[i * width : (i + 1) * width]
            if sums is not None:
                expected, got = int(sums.flat[example * n_parts + part]), checksum(block)
                if expected != got:
                    blame(_compare(expected, got), piece.offset + i * width, example, layer)
            if self.finite and layer is not None:
                n_bad = int(np.count_nonzero(~np.isfinite(np.frombuffer(block, self.md.value_type.storage))))
                if n_bad:
                    blame(f"expected finite values, got {n_bad} that are not", piece.offset + i * width, example, layer)
        return faults, piece.n * n_parts if sums is not None else 0


def _to_extents(pieces: list[_Piece], memory: np.ndarray[Any, np.dtype[np.uint8]]) -> Extents:
    """Each piece as an extent of its own, to the same memory."""
    n, nbytes = len(pieces), np.array([piece.nbytes for piece in pieces])
    return Extents(
        vectors=np.stack((np.full(n, memory.ctypes.data), nbytes), axis=1),
        trash=memory[:0],
        shards=np.array([piece.file_idx for piece in pieces]),
        firsts=np.arange(n),
        counts=np.ones(n, dtype=np.int64),
        offsets=np.array([piece.offset for piece in pieces]),
        nbytes=nbytes,
    )


def _compare(expected: int, got: int) -> str:
    return f"expected checksum {expected:08x}, got {got:08x}: it was changed after it was written; copy it again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("dir", type=Path, help="shard directory, <shards_root>/<hash>")
    parser.add_argument("--finite", action="store_true", help="also look for NaN and infinity")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Verify a directory and say what is wrong.

    Returns:
        0 if all is well, 1 if something is wrong.

    Raises:
        SaevTorchError: It could not be read at all.
    """
    report = verify(args.dir, finite=args.finite, progress=False if args.quiet else None)
    for fault in report.faults:
        print(fault)
    what = f"{report.n_blocks:,} checksums" if report.has_checksums else "sizes only, as there is no checksums.json"
    if args.finite:
        what += ", values"
    print(f"{args.dir}: {'all is well' if report.ok else f'{len(report.faults)} faults'} ({what})")
    return 0 if report.ok else EXIT_FAULTS
