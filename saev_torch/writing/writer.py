"""Writing shard directories: data first under hidden names, metadata.json last, so that what loads is complete."""

import contextlib
import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy.typing as npt
import torch

from saev_torch.errors import WriteError
from saev_torch.format.checksums import ALGORITHM, block_checksums
from saev_torch.format.files import counted, short
from saev_torch.format.metadata import Metadata
from saev_torch.format.shards import MAX_SHARDS, shard_name, shard_nbytes
from saev_torch.format.sidecars import ATTENTION_MASK, LABELS, TOKEN_IDS
from saev_torch.processes.locks import renewed
from saev_torch.writing.checkpoints import Checkpoints
from saev_torch.writing.incoming import (
    Beside,
    check_activations,
    check_beside,
    check_example_range,
    check_finite,
    check_on_overflow,
    check_start,
    check_stored,
    require_same,
    require_sidecars,
)
from saev_torch.writing.journal import Entry, Ranges, Sidecars
from saev_torch.writing.unfinished import Unfinished

_log = logging.getLogger("saev_torch")

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
    written again, nor is it an error to give it again; `missing()` says what need not even be computed. The first batch
    that is given again is compared with what is there, as other data may have the same metadata. A finished directory
    is left as it is. Data is forced to disk every 256 MB or 10 s, in the background.

    Without `with`, the first batch opens the writer, and `close()` ends it as the end of the block would. What is there
    after an exception then stays until somebody removes it.

    Threads may share a writer: their batches are checked side by side, and written one after the other.

    Activations of any float type are stored as `md.dtype`: exact where that holds the value, else rounded to the
    nearest, of two as near to the even one. A finite value for which it has only infinity is refused, or clipped to the
    largest number. NaN stays NaN.

    Several processes may write one directory, each its own `example_range`; the last one to finish publishes. What is
    on disk in the end does not depend on how many there were.

    Args:
        shards_root: Where the directory is made.
        md: Metadata of the whole directory.
        resume: Continue what a killed writer, or one that raised, has left; start anew where there is nothing.
        example_range: Examples `start..stop` (end excluded) that this writer is for; default is all.
        check_finite: Refuse NaN and infinity.
        preallocate: Leave the last file at the size of a full one, with zeros behind its examples. Readers that map
            whole shards need that, as those of saev 0.1 do; by default it is cut to its examples.
        on_overflow: "refuse" values that are too large for `md.dtype`, as those from 65,520 on are for float16, or
            "clip" them.

    Attributes:
        md: The metadata that was announced.
        shards_dir: The directory, `<shards_root>/<hash>`.
        example_range: Examples that this writer is for.
        on_overflow: What is done with values that are too large.
        n_clipped: Values that were clipped; a warning says so at the end.
        sidecars: What is written beside the shards; None before anything is.

    Raises:
        ConfigError: `on_overflow` is neither.
        WriteError: The metadata is of an older protocol, which is only read, asks for too many files, or has no such
            examples.
    """

    def __init__(
        self,
        shards_root: Path | str,
        md: Metadata,
        resume: bool = False,
        *,
        example_range: tuple[int, int] | None = None,
        check_finite: bool = False,
        preallocate: bool = False,
        on_overflow: str = "refuse",
    ) -> None:
        if md.n_shards >= MAX_SHARDS:
            raise WriteError(
                f"max_tokens_per_shard: expected less than {MAX_SHARDS} files, got {md.n_shards}; raise it"
            )
        self.md = md
        self.shards_dir = Path(shards_root) / md.hash
        self.example_range = check_example_range(md, example_range)
        self._keeps = resume or example_range is not None
        self._unfinished = Unfinished(
            self.shards_dir, md, self.example_range, resume=resume, keeps=self._keeps, preallocate=preallocate
        )
        self._check_finite, self.on_overflow, self.n_clipped = check_finite, check_on_overflow(on_overflow), 0
        # What was given in this `with` block, and with it what was on disk before.
        self._given, self._done = Ranges(), Ranges()
        self.sidecars: Sidecars | None = None
        self._is_open, self._pid = False, 0
        self._was_opened, self._opening = False, renewed(threading.Lock())

    @property
    def published(self) -> bool:
        """Whether the directory is complete: after the `with` block, unless other writers have not finished."""
        return self._unfinished.published

    def __enter__(self) -> Self:
        """Make the directory and claim it.

        Raises:
            WriteError: It holds a data set already, or an unfinished one, another process is writing these examples,
                or the system refused.
        """
        if self._is_open:
            raise WriteError(f"{self.shards_dir}: expected one `with` block for a writer, got another inside it")
        self._done, self.sidecars = self._unfinished.open()
        self._given, self._is_compared = Ranges(), False
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="ShardWriter")
        self._checkpoints = Checkpoints(self._unfinished, self._threads)
        # Held while files and what is known of them change. A signal handler may ask for a checkpoint meanwhile.
        self._lock = renewed(threading.RLock())
        self._is_open, self._pid, self._was_opened = True, os.getpid(), True
        return self

    def _open_once(self) -> None:
        with self._opening:
            if not self._was_opened:
                self.__enter__()

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        """Publish the directory if all of it is there; after an exception remove or keep what was written.

        Raises:
            WriteError: Examples are missing, or the system refused; nothing is published.
        """
        if os.getpid() != self._pid or not self._is_open:
            # A forked child leaves the block, and all there is belongs to its parent; or it was closed inside.
            return
        with self._lock:
            self._is_open = False
            self._close(exc_type)

    def close(self) -> None:
        """Do what the end of a `with` block does; nothing, where the writer was closed before.

        Raises:
            WriteError: Examples are missing, or the system refused; nothing is published.
        """
        self._open_once()
        self.__exit__(None)

    def flush(self) -> None:
        """Force to disk what was written, and publish the directory if nothing is missing. May take seconds.

        Raises:
            WriteError: The writer is not open, or the system refused.
        """
        self.checkpoint()
        with self._lock:
            if not self.published and not self.missing():
                self._unfinished.publish()

    def _close(self, exc_type: type[BaseException] | None) -> None:
        if self.n_clipped:
            _warn_of_clipped(self)
        try:
            if exc_type is None and not self.published:
                missing = self.missing()
                if missing:
                    if self._keeps:
                        self._checkpoints.force()
                    raise _too_few(self.shards_dir, self.example_range, missing, self._keeps)
                self._checkpoints.force()
                self._unfinished.publish()
            elif exc_type is not None and self._keeps:
                with contextlib.suppress(OSError):
                    self._checkpoints.force()
        finally:
            self._threads.shutdown()
            self._unfinished.close()

    def missing(self) -> list[tuple[int, int]]:
        """Return the examples that are still to be written, as ranges `(start, stop)`, the second excluded."""
        start, stop = self.example_range
        # A child may have been forked while a thread held the lock.
        is_shared = self._is_open and os.getpid() == self._pid
        with self._lock if is_shared else contextlib.nullcontext():
            return list(self._done.gaps(stop, start))

    def write_batch(
        self,
        activations: torch.Tensor | npt.NDArray[Any],
        start_idx: int,
        patch_labels: torch.Tensor | npt.ArrayLike | None = None,
        token_ids: torch.Tensor | npt.ArrayLike | None = None,
        attention_mask: torch.Tensor | npt.ArrayLike | None = None,
    ) -> None:
        """Write consecutive examples. A batch that was refused has changed nothing, and may be mended and written.

        Args:
            activations: [batch, n_layers, tokens_per_example, d_model] of any float type, on any device.
            start_idx: Example that the first of the batch is.
            patch_labels: [batch, content_tokens_per_example] integers in 0..255; these three for all batches or none.
            token_ids: [batch, content_tokens_per_example] integers of 32 bits, places in the model's vocabulary.
            attention_mask: [batch, content_tokens_per_example] bool, or 1 and 0: False for padding.

        Raises:
            WriteError: Wrong shape, type or range, a value that is too large, an example that was written before, other
                values than those on disk that they should continue, or the system refused.
        """
        self._open_once()
        self._require_open()
        given = check_activations(self.md, activations)
        start = check_start(start_idx, len(given.bits), self.example_range)
        acts, _, n_clipped = check_stored(given, self.md, range(start, start + len(given.bits)), self.on_overflow)
        columns = {LABELS: patch_labels, TOKEN_IDS: token_ids, ATTENTION_MASK: attention_mask}
        beside = check_beside(self.md, columns, len(acts))
        if self._check_finite:
            check_finite(acts, self.md, start)
        with self._lock:
            # Another thread may have closed it meanwhile.
            self._require_open()
            self._add(acts, start, beside)
            self.n_clipped += n_clipped

    def _add(self, acts: "_Acts", start: int, beside: Beside) -> None:
        stop = start + len(acts)
        overlap = self._given.overlap(start, stop)
        if overlap is not None:
            raise _written_before(start, stop, overlap)
        if len(acts) == 0:
            return
        require_sidecars(self.sidecars, beside)
        self._checkpoints.raise_failed()
        if not self._is_compared:
            again = range(*(self._done.overlap(start, stop) or (0, 0)))
            require_same(self.shards_dir, self.md, self._unfinished.parts.read, again, acts, start, beside)
            self._is_compared = len(again) > 0
        entries = []
        for low, high in self._done.gaps(stop, start):
            rows = slice(low - start, high - start)
            some = {sidecar: values[rows] for sidecar, values in beside.items()}
            entries.append(_write(self._unfinished, self.md, self._threads, acts[rows], low, some))
        # Only now, so that a batch that failed on the way can be written again.
        self._given.add(start, stop)
        self._done.add(start, stop)
        self.sidecars = tuple(beside)
        self._checkpoints.add(entries, sum(shard_nbytes(self.md, entry.stop - entry.start) for entry in entries))

    def checkpoint(self) -> None:
        """Force to disk what was written, so that a resumed writer need not write it again; may take seconds.

        Raises:
            WriteError: The writer is not open, or the system refused.
        """
        self._require_open()
        with self._lock:
            self._require_open()
            self._checkpoints.force()

    def _require_open(self) -> None:
        if not self._is_open:
            remedy = "make another" if self._was_opened else "write a batch first, or use `with`"
            raise WriteError(f"{self.shards_dir}: expected an open writer, got one that is not: {remedy}")
        if os.getpid() != self._pid:
            raise WriteError(
                f"{self.shards_dir}: expected the process that opened the writer, got a child of it; open one there, "
                "with its own example_range"
            )


def _warn_of_clipped(writer: ShardWriter) -> None:
    what = counted(writer.n_clipped, "value")
    _log.warning("%s: clipped %s that %s does not hold", writer.shards_dir, what, writer.md.dtype)


def _written_before(start: int, stop: int, overlap: tuple[int, int]) -> WriteError:
    return WriteError(
        f"start_idx: expected each example once, got {start}..{stop}, of which {overlap[0]}..{overlap[1]} (end "
        "excluded) were written before"
    )


def _too_few(
    shards_dir: Path, example_range: tuple[int, int], missing: list[tuple[int, int]], keeps: bool
) -> WriteError:
    kept = (
        "what was written stays: write the rest with ShardWriter(..., resume=True)"
        if keeps
        else "what was written is removed: ShardWriter(..., resume=True) keeps it, to go on later"
    )
    n_missing = sum(stop - start for start, stop in missing)
    return WriteError(
        f"{shards_dir}: expected {example_range[1] - example_range[0]} examples, as announced, {n_missing} are missing"
        f": {short(missing)} (ends excluded); nothing was published, and {kept}"
    )


_Acts = npt.NDArray[Any]


def _write(
    unfinished: Unfinished, md: Metadata, threads: ThreadPoolExecutor, acts: _Acts, start: int, beside: Beside
) -> Entry:
    """Write consecutive examples from `start` on, and say what the journal is to say of them."""
    # The checksums are computed while the kernel copies: both let go of Python's lock.
    checksums: Future[bytes] | None = None
    if acts.nbytes >= _SMALL_NBYTES:
        checksums = threads.submit(block_checksums, acts, beside.values())
    done = 0
    while done < len(acts):
        shard_idx, row = divmod(start + done, md.examples_per_shard)
        n_fit = min(md.examples_per_shard - row, len(acts) - done)
        unfinished.parts.write(shard_name(shard_idx), acts[done : done + n_fit], shard_nbytes(md, row))
        done += n_fit
    for sidecar, values in beside.items():
        unfinished.parts.write(sidecar.name, values, sidecar.offset(md, start))
    packed = block_checksums(acts, beside.values()) if checksums is None else checksums.result()
    return Entry(start, start + len(acts), tuple(beside), ALGORITHM, packed)
