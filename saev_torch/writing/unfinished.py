"""A directory that is not finished: who writes there, what of it is on disk, and how it becomes a data set.

.unfinished              the claim, see journal.py
.journal-<start>-<stop>  what one writer has on disk
.<name>.part             acts000000.bin and its like, of full size until they are published
metadata.json            comes last, so that what loads is complete
"""

import contextlib
import os
from pathlib import Path

from saev_torch.errors import WriteError
from saev_torch.format.checksums import CHECKSUMS_NAME, Checksums
from saev_torch.format.files import sync_dir, write_atomic, writing
from saev_torch.format.metadata import METADATA_NAME, Metadata
from saev_torch.format.shards import SHARDS_NAME, Shard, ShardInfo, shard_name, shard_nbytes
from saev_torch.format.sidecars import SIDECARS
from saev_torch.writing.journal import (
    CLAIM_NAME,
    Entry,
    Journal,
    Ranges,
    Sidecars,
    claimed,
    journal_ranges,
    read_journals,
)
from saev_torch.writing.parts import Parts, part_name


class Unfinished:
    """The directory of a data set, from the claim to publishing, for the writer of `example_range` (end excluded).

    With `resume` it goes on with what is there. With `keeps`, what was written stays when it is closed unpublished.
    With `preallocate`, the last file keeps its full size. Where the system refuses, methods raise a `WriteError`.
    """

    def __init__(
        self,
        shards_dir: Path,
        md: Metadata,
        example_range: tuple[int, int],
        *,
        resume: bool,
        keeps: bool,
        preallocate: bool = False,
    ) -> None:
        self.published = False
        self.parts = Parts(shards_dir, md)
        self._shards_dir, self._md, self._metadata_json = shards_dir, md, md.to_json()
        self._example_range, self._resume, self._keeps = example_range, resume, keeps
        self._preallocate = preallocate
        self._is_made = False
        self._journal: Journal | None = None

    def open(self) -> tuple[Ranges, Sidecars | None]:
        """Make the directory, which must be vacant or, with `resume`, unfinished, and claim the examples.

        Returns the examples that are on disk, and which sidecars they have: None where that is not known yet.
        """
        with writing(self._shards_dir):
            self._is_made = not self._shards_dir.exists()
            self._shards_dir.mkdir(parents=True, exist_ok=True)
            try:
                return self._claim()
            except BaseException:
                self._remove_dir()
                raise

    def _claim(self) -> tuple[Ranges, Sidecars | None]:
        everything = Ranges()
        everything.add(0, self._md.n_examples)
        if self._is_finished():
            if (self._shards_dir / CLAIM_NAME).exists():
                # A writer was killed at its very last step.
                with self._claimed():
                    self._remove_claim()
            return everything, self._find_sidecars()
        self._require_vacant()
        with self._claimed() as is_new:
            try:
                # Once more: another writer may have come, and even finished, in between.
                if self._is_finished():
                    self._remove_claim()
                    return everything, self._find_sidecars()
                self._require_vacant(is_new)
                self._require_nobody()
                # To readers metadata.json says that all is written; users of saev call Metadata.dump first.
                (self._shards_dir / METADATA_NAME).unlink(missing_ok=True)
                self._journal = Journal(self._shards_dir, *self._example_range)
                return self._read_journals()
            except BaseException:
                self._close_journal()
                if is_new:
                    (self._shards_dir / Journal.name(*self._example_range)).unlink(missing_ok=True)
                raise

    def _claimed(self) -> contextlib.AbstractContextManager[bool]:
        return claimed(self._shards_dir, self._metadata_json, alone=not self._keeps)

    def _is_finished(self) -> bool:
        self.published = self._is_published()
        if self.published and not self._resume:
            raise WriteError(
                f"{self._shards_dir}: expected no data set, got a finished one with this metadata; "
                "read it, or delete the directory to write it again"
            )
        return self.published

    def _is_published(self) -> bool:
        # shards.json is written after all data, and metadata.json after that.
        shards, metadata = self._shards_dir / SHARDS_NAME, self._shards_dir / METADATA_NAME
        return shards.is_file() and metadata.is_file() and metadata.read_bytes() == self._metadata_json

    def _find_sidecars(self) -> Sidecars:
        return tuple(sidecar for sidecar in SIDECARS if (self._shards_dir / sidecar.name).is_file())

    def _require_vacant(self, is_new: bool = False) -> None:
        names = set(os.listdir(self._shards_dir)) - ({CLAIM_NAME} if is_new else set())
        unexpected = self._strangers(names)
        if not unexpected and not self._resume:
            unexpected = set(self._rivals()) if self._keeps else names - {METADATA_NAME}
        if unexpected:
            raise WriteError(
                f"{self._shards_dir}: expected an empty directory, got {sorted(unexpected)[:4]}, as an unfinished "
                "write leaves it; continue that with resume=True, or, if no other process is writing there, delete "
                "the directory"
            )

    def _require_nobody(self) -> None:
        start, stop = self._example_range
        for name, (low, high) in self._rivals().items():
            if Journal.is_alive(self._shards_dir, name):
                raise WriteError(
                    f"{self._shards_dir}: expected to be the only writer of examples {start}..{stop}, got another "
                    f"process writing {low}..{high}; wait for it, or choose another example_range"
                )

    def _rivals(self) -> dict[str, tuple[int, int]]:
        # Journals of writers of some of the same examples.
        start, stop = self._example_range
        ranges = journal_ranges(os.listdir(self._shards_dir))
        return {name: (low, high) for name, (low, high) in ranges.items() if low < stop and start < high}

    def _strangers(self, names: set[str]) -> set[str]:
        """Pick the names that no writer of this metadata leaves in an unfinished directory."""
        unknown = names - {CLAIM_NAME} - set(journal_ranges(names))
        if METADATA_NAME in unknown and (self._shards_dir / METADATA_NAME).read_bytes() == self._metadata_json:
            unknown.discard(METADATA_NAME)
        # Without the claim there was no writer of ours, and so nothing of ours.
        if CLAIM_NAME in names:
            ours = {file.name for file in (*_make_shard_info(self._md), *SIDECARS)}
            unknown -= ours | set(map(part_name, ours)) | {SHARDS_NAME, CHECKSUMS_NAME}
            unknown = {name for name in unknown if not _is_temporary(name)}
        return unknown

    def sync(self, names: set[str], entries: list[Entry]) -> None:
        """Force files to disk, then say in the journal what is there; may be called from another thread."""
        self.parts.sync(names)
        if self._journal is not None and entries:
            with writing(self._shards_dir):
                # The names, too, or a journal may speak of files that a power failure took away.
                sync_dir(self._shards_dir)
                self._journal.append(entries)

    def publish(self) -> None:
        """Publish the directory if all of its examples are on disk, those of other writers too.

        Every step may have been done before, by a writer that was killed at it.
        """
        with writing(self._shards_dir), self._claimed():
            if not self._is_published():
                done, sidecars = self._read_journals()
                if list(done.gaps(self._md.n_examples)):
                    return
                self._publish(sidecars or ())
            self._remove_claim()
            self.published = True

    def _publish(self, sidecars: Sidecars) -> None:
        checksums = Checksums.make(self._md, sidecars)
        for entry in read_journals(self._shards_dir, self._md):
            checksums.fill(entry.start, entry.stop, entry.checksums)
        info = _make_shard_info(self._md)
        if info[-1].n_examples == 0:
            self.parts.write_empty(info[-1].name)
        for shard in info:
            self.parts.reveal(shard.name, shard_nbytes(self._md, shard.n_examples), cut=not self._preallocate)
        for sidecar in sidecars:
            self.parts.reveal(sidecar.name, sidecar.nbytes(self._md))
        # Dumping these makes the renames before them last, too; metadata.json comes when all else is sure to be there.
        info.dump(self._shards_dir)
        checksums.dump(self._shards_dir, self._metadata_json)
        write_atomic(self._shards_dir / METADATA_NAME, self._metadata_json)
        sync_dir(self._shards_dir.parent)

    def _read_journals(self) -> tuple[Ranges, Sidecars | None]:
        """Return the examples that are on disk, and which sidecars they have; the directory stays claimed meanwhile."""
        done, sidecars = Ranges(), None
        for entry in read_journals(self._shards_dir, self._md):
            done.add(entry.start, entry.stop)
            sidecars = entry.sidecars
        return done, sidecars

    def _remove_claim(self) -> None:
        # The claim last, as it says that the rest may be there.
        names = os.listdir(self._shards_dir)
        for name in [*journal_ranges(names), *filter(_is_temporary, names), CLAIM_NAME]:
            (self._shards_dir / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of all files; unless the directory is published or kept, remove what is ours."""
        self._close_journal()
        self.parts.close()
        if self.published or self._keeps:
            return
        # metadata.json first, lest a directory look complete and not be; last what keeps other writers out.
        with contextlib.suppress(OSError):
            names = set(os.listdir(self._shards_dir))
            ours = names - self._strangers(names)
            for name in [*sorted(ours - {CLAIM_NAME}, key=lambda name: name != METADATA_NAME), CLAIM_NAME]:
                with contextlib.suppress(OSError):
                    os.unlink(self._shards_dir / name)
        self._remove_dir()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _remove_dir(self) -> None:
        if self._is_made:
            with contextlib.suppress(OSError):
                self._shards_dir.rmdir()


def _is_temporary(name: str) -> bool:
    return name.endswith(".tmp") and name.startswith(
        tuple(f".{x}." for x in (METADATA_NAME, SHARDS_NAME, CHECKSUMS_NAME))
    )


def _make_shard_info(md: Metadata) -> ShardInfo:
    # As saev, which opens the next file when one is full: an exact multiple is followed by a file without examples.
    n_full, n_rest = divmod(md.n_examples, md.examples_per_shard)
    sizes = [md.examples_per_shard] * n_full + [n_rest]
    return ShardInfo([Shard(shard_name(i), n_examples) for i, n_examples in enumerate(sizes)])
