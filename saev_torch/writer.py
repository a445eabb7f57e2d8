"""Writing shard directories: data first under hidden names, metadata.json last, so that what loads is complete."""

import contextlib
import operator
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from saev_torch.errors import WriteError
from saev_torch.files import short, sync_dir, write_atomic, writing
from saev_torch.metadata import METADATA_NAME, Metadata
from saev_torch.ranges import Ranges
from saev_torch.shards import (
    LABELS_NAME,
    MAX_SHARDS,
    SHARDS_NAME,
    Shard,
    ShardInfo,
    labels_nbytes,
    shard_name,
    shard_nbytes,
)

__all__ = ["ShardWriter"]

_CLAIM_NAME = ".unfinished"  # There as long as somebody writes, or has been killed while writing.
_MAX_PWRITE_BYTES = 1 << 30  # The kernel takes at most 2 GiB less a page in one call.


class ShardWriter:
    """Write activations into `<shards_root>/<hash>`, published when the `with` block ends without an exception.

    Batches may come in any order; at the end each example must have been written exactly once. Until then the
    directory has no metadata.json, and readers refuse it. After an exception all that was written is removed.

        with ShardWriter(shards_root, md) as writer:
            for start_idx, activations in batches:
                writer.write_batch(activations, start_idx)

    Attributes:
        md: The metadata that was announced.
        shards_dir: The directory, `<shards_root>/<hash>`.

    Raises:
        WriteError: The metadata is of an older protocol, which is only read, or asks for too many files.
    """

    def __init__(self, shards_root: Path, md: Metadata) -> None:
        if md.n_shards >= MAX_SHARDS:
            raise WriteError(
                f"max_tokens_per_shard: expected less than {MAX_SHARDS} files, got {md.n_shards}; raise it"
            )
        self.md = md
        self.shards_dir = Path(shards_root) / md.hash
        self._metadata_json = md.to_json()
        self._written = Ranges()
        self._has_labels: bool | None = None
        self._fds: dict[str, int] = {}
        self._created: list[str] = []
        self._made_dir = self._is_open = False

    def __enter__(self) -> Self:
        """Make the directory and claim it.

        Raises:
            WriteError: It holds a data set already, or an unfinished one, or the system refused.
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
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Publish the directory; after an exception remove what was written.

        Raises:
            WriteError: Examples are missing, or the system refused; nothing is published.
        """
        self._is_open = False
        published = False
        try:
            if exc_type is None:
                self._publish()
                published = True
        finally:
            self._close()
            if not published:
                self._discard()

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
        acts = self._check_activations(activations)
        start = self._check_range(start_idx, len(acts))
        labels = None if patch_labels is None else self._check_labels(patch_labels, len(acts))
        if len(acts) == 0:
            return
        if self._has_labels is (labels is None):
            got = "without" if labels is None else "with"
            raise WriteError(f"patch_labels: expected them for all batches or for none, got a batch {got} them")
        done = 0
        while done < len(acts):
            shard_idx, row = divmod(start + done, self.md.examples_per_shard)
            n_fit = min(self.md.examples_per_shard - row, len(acts) - done)
            self._pwrite(shard_name(shard_idx), acts[done : done + n_fit], shard_nbytes(self.md, row))
            done += n_fit
        if labels is not None:
            self._pwrite(LABELS_NAME, labels, start * self.md.content_tokens_per_example)
        # Only now, so that a batch that failed on the way can be written again.
        self._written.add(start, start + len(acts))
        self._has_labels = labels is not None

    def _claim(self) -> None:
        """Make this the only writer of the directory, which must be vacant."""
        self._require_vacant(set())
        os.close(os.open(self.shards_dir / _CLAIM_NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        try:
            # Once more: another writer may have come and finished in between.
            self._require_vacant({_CLAIM_NAME})
            (self.shards_dir / METADATA_NAME).unlink(missing_ok=True)
        except BaseException:
            (self.shards_dir / _CLAIM_NAME).unlink()
            raise

    def _require_vacant(self, ours: set[str]) -> None:
        names = set(os.listdir(self.shards_dir)) - ours
        # Users of saev call Metadata.dump first. To readers metadata.json says that all is written, so it will go.
        path = self.shards_dir / METADATA_NAME
        if not names or (names == {METADATA_NAME} and path.read_bytes() == self._metadata_json):
            return
        if {METADATA_NAME, SHARDS_NAME} <= names:
            raise WriteError(
                f"{self.shards_dir}: expected no data set, got a finished one with this metadata; "
                "read it, or delete the directory to write it again"
            )
        raise WriteError(
            f"{self.shards_dir}: expected an empty directory, got {short(sorted(names))}, as an unfinished "
            "write leaves it; if no other process is writing there, delete the directory"
        )

    def _check_activations(self, activations: torch.Tensor | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not isinstance(activations, torch.Tensor | np.ndarray):
            raise WriteError(f"activations: expected a tensor or an array, got {type(activations).__name__}")
        if activations.dtype not in (torch.float32, np.dtype(np.float32)):
            raise WriteError(f"activations: expected float32, got {activations.dtype}; convert it, as with .float()")
        shape = (self.md.n_layers, self.md.tokens_per_example, self.md.d_model)
        if tuple(activations.shape[1:]) != shape:
            raise WriteError(
                f"activations: expected shape [batch, n_layers, tokens_per_example, d_model] = [batch, {shape[0]}, "
                f"{shape[1]}, {shape[2]}], got {list(activations.shape)}"
            )
        if isinstance(activations, torch.Tensor):
            activations = activations.detach().cpu().numpy()
        return np.ascontiguousarray(activations, dtype="<f4")

    def _check_range(self, start_idx: int, batch: int) -> int:
        try:
            start = operator.index(start_idx)
        except TypeError as err:
            raise WriteError(f"start_idx: expected an integer, got {short(start_idx)}") from err
        stop = start + batch
        if start < 0 or stop > self.md.n_examples:
            raise WriteError(
                f"start_idx: expected examples in 0..{self.md.n_examples} (end excluded), as announced, "
                f"got {start}..{stop}"
            )
        overlap = self._written.overlap(start, stop)
        if overlap is not None:
            raise WriteError(
                f"start_idx: expected each example once, got {start}..{stop}, of which {overlap[0]}..{overlap[1]} "
                "(end excluded) were written before"
            )
        return start

    def _check_labels(self, patch_labels: torch.Tensor | npt.ArrayLike, batch: int) -> npt.NDArray[np.uint8]:
        if isinstance(patch_labels, torch.Tensor):
            patch_labels = patch_labels.detach().cpu()
        try:
            labels = np.asarray(patch_labels)
        except (TypeError, ValueError, RuntimeError) as err:
            raise WriteError(f"patch_labels: expected an array of integers, got {short(patch_labels)}") from err
        shape = (batch, self.md.content_tokens_per_example)
        if labels.shape != shape:
            raise WriteError(
                f"patch_labels: expected shape [batch, content_tokens_per_example] = {list(shape)}, "
                f"got {list(labels.shape)}"
            )
        if labels.dtype.kind not in "iu":
            raise WriteError(f"patch_labels: expected integers in 0..255, got {labels.dtype}")
        if labels.size and not 0 <= labels.min() <= labels.max() <= 255:
            raise WriteError(f"patch_labels: expected integers in 0..255, got {labels.min()}..{labels.max()}")
        return np.ascontiguousarray(labels, dtype=np.uint8)

    def _pwrite(self, name: str, rows: npt.NDArray[Any], offset: int) -> None:
        with writing(self.shards_dir / name):
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
        fd = os.open(self._part(name), flags, 0o666)
        if name not in self._created:
            self._created.append(name)
        try:
            # Full size at once, zeros where nothing is written: saev's files are preallocated, the last one too.
            full = shard_nbytes(self.md, self.md.examples_per_shard)
            os.ftruncate(fd, labels_nbytes(self.md) if name == LABELS_NAME else full)
        except BaseException:
            os.close(fd)
            raise
        self._fds[name] = fd
        return fd

    def _part(self, name: str) -> Path:
        return self.shards_dir / f".{name}.part"

    def _publish(self) -> None:
        missing = list(self._written.gaps(self.md.n_examples))
        if missing:
            n_missing = sum(stop - start for start, stop in missing)
            raise WriteError(
                f"{self.shards_dir}: expected {self.md.n_examples} examples, as announced, {n_missing} are missing: "
                f"{short(missing)} (ends excluded); nothing was published"
            )
        n_full, n_rest = divmod(self.md.n_examples, self.md.examples_per_shard)
        # saev opens the next file when one is full, so an exact multiple is followed by a file without examples.
        info = ShardInfo([Shard(shard_name(i), self.md.examples_per_shard) for i in range(n_full)])
        info.append(Shard(shard_name(n_full), n_rest))
        names = [shard.name for shard in info] + ([LABELS_NAME] if self._has_labels else [])
        for name in names:
            with writing(self.shards_dir / name):
                os.fsync(self._fd(name))
        for name in names:
            with writing(self.shards_dir / name):
                os.rename(self._part(name), self.shards_dir / name)
        with writing(self.shards_dir):
            # From here on the files themselves keep other writers out.
            os.unlink(self.shards_dir / _CLAIM_NAME)
        # Dumping it makes the renames before it last, too; metadata.json comes when all else is sure to be there.
        info.dump(self.shards_dir)
        write_atomic(self.shards_dir / METADATA_NAME, self._metadata_json)
        if self._made_dir:
            with writing(self.shards_dir):
                sync_dir(self.shards_dir.parent)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _discard(self) -> None:
        # metadata.json first, lest a directory look complete and not be; last what keeps other writers out.
        names = [METADATA_NAME, SHARDS_NAME, *(self._part(name).name for name in self._created), *self._created]
        for name in [*names, _CLAIM_NAME]:
            with contextlib.suppress(OSError):
                os.unlink(self.shards_dir / name)
        self._remove_dir()

    def _remove_dir(self) -> None:
        if self._made_dir:
            with contextlib.suppress(OSError):
                self.shards_dir.rmdir()
