"""`python -m saev_torch verify DIR`: are all bytes there, and are they those that were written."""

import argparse
import contextlib
import dataclasses
import itertools
import os
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from saev_torch.errors import FormatError, ReadError, ShardsNotFoundError
from saev_torch.format.checksums import CHECKSUMS_NAME, Checksums, find_algorithm
from saev_torch.format.files import open_regular
from saev_torch.format.metadata import METADATA_NAME, Metadata
from saev_torch.format.shards import LABELS_NAME, SHARDS_NAME, ShardInfo, check_nbytes, labels_nbytes
from saev_torch.writing.progress import Progress

__all__ = ["Fault", "VerifyReport", "add_arguments", "run", "verify"]

EXIT_FAULTS = 1
_PIECE_NBYTES = 1 << 20  # Read and checked while it is still in the cache of the core.
_LABELS = -1


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
        pieces = list(self._plan_files())
        # Without checksums and without a question about values there is nothing to read.
        nbytes = sum(nbytes for _, _, _, nbytes in pieces) if self.checksums is not None or self.finite else 0
        if nbytes:
            with Progress(nbytes, "verifying", "B", progress) as bar, ThreadPoolExecutor(n_threads) as pool:
                todo = self._plan_pieces(pieces)
                for done in [pool.submit(self._work, todo, bar) for _ in range(n_threads)]:
                    done.result()
        return self._report(nbytes)

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
                yield _LABELS, LABELS_NAME, self.md.n_examples, nbytes

    def _file_nbytes(self, name: str) -> int:
        fd = open_regular(self.shards_dir, name)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def _plan_pieces(self, files: list[tuple[int, str, int, int]]) -> Iterator[_Piece]:
        firsts = [0, *itertools.accumulate(shard.n_examples for shard in self.info)]
        for file_idx, name, n_examples, nbytes in files:
            width = self.md.content_tokens_per_example if file_idx == _LABELS else self.md.example_nbytes
            first = 0 if file_idx == _LABELS else firsts[file_idx]
            step = max(1, _PIECE_NBYTES // width)
            for at in range(0, n_examples, step):
                n = min(step, n_examples - at)
                yield _Piece(file_idx, name, first + at, n, at * width, n * width)
            for at in range(n_examples * width, nbytes, _PIECE_NBYTES):
                yield _Piece(file_idx, name, at, 0, at, min(_PIECE_NBYTES, nbytes - at))

    def _work(self, todo: Iterator[_Piece], bar: Progress) -> None:
        buffer = bytearray()
        fd, name = -1, ""
        try:
            while True:
                with self._lock:
                    piece = next(todo, None)
                if piece is None:
                    return
                if piece.name != name:
                    if fd >= 0:
                        os.close(fd)
                    fd, name = -1, piece.name
                    fd = open_regular(self.shards_dir, name)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                if len(buffer) < piece.nbytes:
                    buffer = bytearray(piece.nbytes)
                view = memoryview(buffer)[: piece.nbytes]
                self._read(fd, view, piece)
                found, n_blocks = self._check(piece, view)
                with self._lock:
                    self.faults += found
                    self.n_blocks += n_blocks
                    bar.update(piece.nbytes)
        finally:
            if fd >= 0:
                os.close(fd)

    def _read(self, fd: int, view: memoryview, piece: _Piece) -> None:
        path, done = self.shards_dir / piece.name, 0
        while done < len(view):
            try:
                n = os.preadv(fd, [view[done:]], piece.offset + done)
            except OSError as err:
                raise ReadError(f"{path}: reading at byte {piece.offset} failed: {err.strerror}") from err
            if n == 0:
                raise ReadError(f"{path}: expected {len(view)} bytes at {piece.offset}, got {done}: it became shorter")
            done += n

    def _check(self, piece: _Piece, view: memoryview) -> tuple[list[tuple[tuple[int, int], Fault]], int]:
        order = len(self.info) if piece.file_idx == _LABELS else piece.file_idx
        faults: list[tuple[tuple[int, int], Fault]] = []

        def blame(what: str, offset: int, example: int | None, layer: int | None = None) -> None:
            faults.append(((order, offset), Fault(piece.name, what, example, layer, offset)))

        if not piece.n:
            if self.checksums is not None and np.frombuffer(view, np.uint8).any():
                blame("expected zeros behind the last example, got others", piece.offset, None)
            return faults, 0
        n_parts = 1 if piece.file_idx == _LABELS else self.md.n_layers
        width = piece.nbytes // (piece.n * n_parts)
        sums, checksum = None, find_algorithm("crc32")
        if self.checksums is not None:
            checksum = find_algorithm(self.checksums.algorithm)
            sums = self.checksums.labels if piece.file_idx == _LABELS else self.checksums.acts
        for i in range(piece.n * n_parts):
            example, part = piece.first + i // n_parts, i % n_parts
            layer = None if piece.file_idx == _LABELS else self.md.layers[part]
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
