"""Writing shard directories: data first under hidden names, metadata.json last, so that what loads is complete."""

import contextlib
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from saev_torch.errors import WriteError
from saev_torch.format.checksums import ALGORITHM, block_checksums
from saev_torch.format.files import sync_dir, writing
from saev_torch.format.metadata import METADATA_NAME, Metadata
from saev_torch.format.shards import LABELS_NAME, MAX_SHARDS, labels_nbytes, shard_name, shard_nbytes
from saev_torch.writing.incoming import check_activations, check_example_range, check_finite, check_labels, check_start
from saev_torch.writing.journal import CLAIM_NAME, Journal, Record, claimed, is_alive, journal_name, journal_ranges
from saev_torch.writing.publish import (
    is_published,
    part_name,
    publish,
    read_progress,
    refuse_missing,
    remove_claim,
    strangers,
)
from saev_torch.writing.ranges import Ranges

__all__ = ["ShardWriter"]

_MAX_PWRITE_BYTES = 1 << 30  # The kernel takes at most 2 GiB less a page in one call.
_SYNC_NBYTES = 256 << 20  # At most about so much is written again after a kill, or
_SYNC_S = 10.0  # what took so long.
_SMALL_NBYTES = 1 << 20  # Below this a thread for the checksums costs more than it saves.


class ShardWriter:
    """Write activations into `<shards_root>/<hash>`, published when the `with` block ends without an exception.

    Batches may come in any order; at the end each example must have been written exactly once. Until then the
    directory has no metadata.json, and readers refuse it. After an exception all that was written is removed, unless
    `resume` or `example_range` is given: those leave it to be continued.

        with ShardWriter(shards_root, md) as writer:
            for start_idx, activations in batches:
                writer.write_batch(activations, start_idx)

    With `resume=True` the same program, run again after it was killed, continues: what a journal says is on disk is not
    written again, nor is it an error to give it again; `missing()` says what need not even be computed. A finished
    directory is left as it is. Data is forced to disk every 256 MB or 10 s, in the background.

    Several processes may write one directory, each its own `example_range`; the last one to finish publishes. What is
    on disk in the end does not depend on how many there were.

    Args:
        shards_root: Where the directory is made.
        md: Metadata of the whole directory.
        resume: Continue what a killed writer, or one that raised, has left; start anew where there is nothing.
        example_range: Examples `start..stop` (end excluded) that this writer is for; default is all.
        check_finite: Refuse NaN and infinity.

    Attributes:
        md: The metadata that was announced.
        shards_dir: The directory, `<shards_root>/<hash>`.
        example_range: Examples that this writer is for.
        published: Whether the directory is complete. After the `with` block of one of several writers it is False as
            long as others have not finished.

    Raises:
        WriteError: The metadata is of an older protocol, which is only read, asks for too many files, or has no such
            examples.
    """

    def __init__(
        self,
        shards_root: Path,
        md: Metadata,
        resume: bool = False,
        *,
        example_range: tuple[int, int] | None = None,
        check_finite: bool = False,
    ) -> None:
        if md.n_shards >= MAX_SHARDS:
            raise WriteError(
                f"max_tokens_per_shard: expected less than {MAX_SHARDS} files, got {md.n_shards}; raise it"
            )
        self.md = md
        self.shards_dir = Path(shards_root) / md.hash
        self.example_range = check_example_range(md, example_range)
        self.published = False
        self._metadata_json = md.to_json()
        self._resume = resume
        self._keeps = resume or example_range is not None
        self._check_finite = check_finite
        self._earlier, self._written = Ranges(), Ranges()
        self._has_labels: bool | None = None
        self._fds: dict[str, int] = {}
        self._journal: Journal | None = None
        self._made_dir = self._is_open = False
        # What was written since the last checkpoint.
        self._dirty: set[str] = set()
        self._records: list[Record] = []
        self._n_pending, self._checkpointed_at = 0, 0.0
        self._threads: ThreadPoolExecutor | None = None
        self._checkpoint: Future[None] | None = None

    def __enter__(self) -> Self:
        """Make the directory and claim it.

        Raises:
            WriteError: It holds a data set already, or an unfinished one, another process is writing these examples,
                or the system refused.
        """
        if self._is_open:
            raise WriteError(f"{self.shards_dir}: expected one `with` block for a writer, got another inside it")
        with writing(self.shards_dir):
            self._made_dir = not self.shards_dir.exists()
            self.shards_dir.mkdir(parents=True, exist_ok=True)
            try:
                self._claim()
            except BaseException:
                self._remove_dir()
                raise
        self._is_open = True
        self._checkpointed_at = time.monotonic()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Publish the directory if all of it is there; after an exception remove or keep what was written.

        Raises:
            WriteError: Examples are missing, or the system refused; nothing is published.
        """
        self._is_open = False
        try:
            if self._journal is not None:
                if exc_type is None:
                    self._finish()
                elif self._keeps:
                    with contextlib.suppress(OSError):
                        self._join_checkpoint()
                        self._sync(*self._take_pending())
        finally:
            self._close()
            if not self.published and not self._keeps:
                self._discard()

    def missing(self) -> list[tuple[int, int]]:
        """Return the examples that are still to be written, as ranges `(start, stop)`, the second excluded."""
        start, stop = self.example_range
        done = Ranges()
        for ranges in (self._earlier, self._written):
            at = start
            for low, high in [*ranges.gaps(stop, start), (stop, stop)]:
                if at < low:
                    for piece in list(done.gaps(low, at)):
                        done.add(*piece)
                at = high
        return list(done.gaps(stop, start))

    def write_batch(
        self,
        activations: torch.Tensor | npt.NDArray[np.float32],
        start_idx: int,
        patch_labels: torch.Tensor | npt.ArrayLike | None = None,
    ) -> None:
        """Write consecutive examples. A batch that was refused has changed nothing, and may be mended and written.

        Args:
            activations: [batch, n_layers, tokens_per_example, d_model] float32, on any device.
            start_idx: Example that the first of the batch is.
            patch_labels: [batch, content_tokens_per_example] integers in 0..255; for all batches or for none.

        Raises:
            WriteError: Wrong shape, dtype or range, an example that was written before, or the system refused.
        """
        if not self._is_open:
            raise WriteError(f"{self.shards_dir}: expected an open writer; use `with ShardWriter(...) as writer:`")
        acts = check_activations(self.md, activations)
        start = check_start(start_idx, len(acts), self.example_range)
        overlap = self._written.overlap(start, start + len(acts))
        if overlap is not None:
            raise WriteError(
                f"start_idx: expected each example once, got {start}..{start + len(acts)}, of which "
                f"{overlap[0]}..{overlap[1]} (end excluded) were written before"
            )
        labels = None if patch_labels is None else check_labels(self.md, patch_labels, len(acts))
        if len(acts) == 0:
            return
        if self._has_labels is (labels is None):
            got = "without" if labels is None else "with"
            raise WriteError(f"patch_labels: expected them for all batches or for none, got a batch {got} them")
        if self._check_finite:
            check_finite(acts, self.md, start)
        self._raise_failed_checkpoint()
        new = list(self._earlier.gaps(start + len(acts), start))
        records = [
            self._write(
                acts[low - start : high - start], low, None if labels is None else labels[low - start : high - start]
            )
            for low, high in new
        ]
        # Only now, so that a batch that failed on the way can be written again.
        self._records += records
        self._written.add(start, start + len(acts))
        self._has_labels = labels is not None
        self._n_pending += sum(shard_nbytes(self.md, high - low) for low, high in new)
        if self._n_pending >= _SYNC_NBYTES or time.monotonic() - self._checkpointed_at >= _SYNC_S:
            self._start_checkpoint()

    def checkpoint(self) -> None:
        """Force to disk what was written, so that a resumed writer need not write it again; may take seconds.

        Raises:
            WriteError: The writer is not open, or the system refused.
        """
        if not self._is_open:
            raise WriteError(f"{self.shards_dir}: expected an open writer; use `with ShardWriter(...) as writer:`")
        self._join_checkpoint()
        self._sync(*self._take_pending())

    def _write(self, acts: npt.NDArray[np.float32], start: int, labels: npt.NDArray[np.uint8] | None) -> Record:
        # The checksums are computed while the kernel copies: both let go of Python's lock.
        checksums: Future[bytes] | None = None
        if acts.nbytes >= _SMALL_NBYTES:
            checksums = self._pool().submit(block_checksums, acts, labels)
        done = 0
        while done < len(acts):
            shard_idx, row = divmod(start + done, self.md.examples_per_shard)
            n_fit = min(self.md.examples_per_shard - row, len(acts) - done)
            self._pwrite(shard_name(shard_idx), acts[done : done + n_fit], shard_nbytes(self.md, row))
            done += n_fit
        if labels is not None:
            self._pwrite(LABELS_NAME, labels, start * self.md.content_tokens_per_example)
        packed = block_checksums(acts, labels) if checksums is None else checksums.result()
        return Record(start, start + len(acts), labels is not None, ALGORITHM, packed)

    def _claim(self) -> None:
        """Claim the examples of this writer, in a directory that must be vacant or, with `resume`, unfinished."""
        if self._is_finished():
            if (self.shards_dir / CLAIM_NAME).exists():
                # A writer was killed at its very last step.
                with claimed(self.shards_dir, self._metadata_json):
                    remove_claim(self.shards_dir)
            return
        self._require_vacant()
        with claimed(self.shards_dir, self._metadata_json) as is_new:
            try:
                # Once more: another writer may have come, and even finished, in between.
                if self._is_finished():
                    remove_claim(self.shards_dir)
                    return
                self._require_vacant(is_new)
                self._require_nobody()
                # To readers metadata.json says that all is written; users of saev call Metadata.dump first.
                (self.shards_dir / METADATA_NAME).unlink(missing_ok=True)
                self._journal = Journal(self.shards_dir, *self.example_range)
                self._earlier, self._has_labels = read_progress(self.md, self.shards_dir)
            except BaseException:
                if self._journal is not None:
                    self._journal.close()
                    self._journal = None
                if is_new:
                    (self.shards_dir / journal_name(*self.example_range)).unlink(missing_ok=True)
                raise

    def _is_finished(self) -> bool:
        if not is_published(self.shards_dir, self._metadata_json):
            return False
        if not self._resume:
            raise WriteError(
                f"{self.shards_dir}: expected no data set, got a finished one with this metadata; "
                "read it, or delete the directory to write it again"
            )
        self._earlier.add(0, self.md.n_examples)
        self.published = True
        return True

    def _require_vacant(self, is_new: bool = False) -> None:
        names = set(os.listdir(self.shards_dir)) - ({CLAIM_NAME} if is_new else set())
        unexpected = strangers(self.md, self.shards_dir, names, self._metadata_json)
        if not unexpected and not self._resume:
            start, stop = self.example_range
            ranges = journal_ranges(names)
            if self.example_range == (0, self.md.n_examples) and not self._keeps:
                unexpected = names - {METADATA_NAME}
            else:
                unexpected = {name for name, (low, high) in ranges.items() if low < stop and start < high}
        if unexpected:
            raise WriteError(
                f"{self.shards_dir}: expected an empty directory, got {sorted(unexpected)[:4]}, as an unfinished write "
                "leaves it; continue that with resume=True, or, if no other process is writing there, delete the "
                "directory"
            )

    def _require_nobody(self) -> None:
        start, stop = self.example_range
        for name, (low, high) in journal_ranges(os.listdir(self.shards_dir)).items():
            if low < stop and start < high and is_alive(self.shards_dir, name):
                raise WriteError(
                    f"{self.shards_dir}: expected to be the only writer of examples {start}..{stop}, got another "
                    f"process writing {low}..{high}; wait for it, or choose another example_range"
                )

    def _pwrite(self, name: str, rows: npt.NDArray[Any], offset: int) -> None:
        with writing(self.shards_dir / name):
            self._dirty.add(name)
            fd = self._fd(name)
            view = rows.data.cast("B")
            while view:
                n_bytes = os.pwrite(fd, view[:_MAX_PWRITE_BYTES], offset)
                view, offset = view[n_bytes:], offset + n_bytes

    def _fd(self, name: str) -> int:
        if name in self._fds:
            return self._fds[name]
        # Labels and one shard are all that batches in order need; many shards would run out of descriptors.
        for other in [other for other in self._fds if LABELS_NAME not in (name, other)]:
            os.close(self._fds.pop(other))
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.shards_dir / part_name(name), flags, 0o666)
        try:
            # Full size at once, zeros where nothing is written: saev's files are preallocated, the last one too.
            full = shard_nbytes(self.md, self.md.examples_per_shard)
            os.ftruncate(fd, labels_nbytes(self.md) if name == LABELS_NAME else full)
        except BaseException:
            os.close(fd)
            raise
        self._fds[name] = fd
        return fd

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(2, thread_name_prefix="ShardWriter")
        return self._threads

    def _take_pending(self) -> tuple[set[str], list[Record]]:
        pending = self._dirty, self._records
        self._dirty, self._records, self._n_pending = set(), [], 0
        self._checkpointed_at = time.monotonic()
        return pending

    def _start_checkpoint(self) -> None:
        is_busy = self._checkpoint is not None and not self._checkpoint.done()
        # Bounded, as what is not on disk yet would all have to be written again.
        if is_busy and self._n_pending < 4 * _SYNC_NBYTES:
            return
        self._join_checkpoint()
        self._checkpoint = self._pool().submit(self._sync, *self._take_pending())

    def _raise_failed_checkpoint(self) -> None:
        if self._checkpoint is not None and self._checkpoint.done():
            self._checkpoint.result()

    def _join_checkpoint(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.result()
            self._checkpoint = None

    def _sync(self, names: set[str], records: list[Record]) -> None:
        """Force files to disk, then say so in the journal."""
        for name in sorted(names):
            path = self.shards_dir / part_name(name)
            with writing(self.shards_dir / name):
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        if self._journal is not None and records:
            with writing(self.shards_dir):
                # The names, too, or a journal may speak of files that a power failure took away.
                sync_dir(self.shards_dir)
                self._journal.append(records)

    def _finish(self) -> None:
        refuse_missing(self.md, self.shards_dir, self.missing(), self.example_range)
        self._join_checkpoint()
        self._sync(*self._take_pending())
        with writing(self.shards_dir), claimed(self.shards_dir, self._metadata_json):
            self.published = publish(self.md, self.shards_dir, self._metadata_json)

    def _close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        if self._journal is not None:
            self._journal.close()
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _discard(self) -> None:
        # metadata.json first, lest a directory look complete and not be; last what keeps other writers out.
        with contextlib.suppress(OSError):
            names = set(os.listdir(self.shards_dir))
            ours = names - strangers(self.md, self.shards_dir, names, self._metadata_json)
            for name in [*sorted(ours - {CLAIM_NAME}, key=lambda name: name != METADATA_NAME), CLAIM_NAME]:
                with contextlib.suppress(OSError):
                    os.unlink(self.shards_dir / name)
        self._remove_dir()

    def _remove_dir(self) -> None:
        if self._made_dir:
            with contextlib.suppress(OSError):
                self.shards_dir.rmdir()
