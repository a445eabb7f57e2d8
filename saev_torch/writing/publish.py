"""From an unfinished directory to a published one, by whichever writer finishes last."""

import os
from collections.abc import Iterator
from pathlib import Path

from saev_torch.errors import WriteError
from saev_torch.format.checksums import ALGORITHM, CHECKSUMS_NAME, Checksums
from saev_torch.format.files import short, sync_dir, write_atomic, writing
from saev_torch.format.metadata import METADATA_NAME, Metadata
from saev_torch.format.shards import (
    LABELS_NAME,
    SHARDS_NAME,
    Shard,
    ShardInfo,
    labels_nbytes,
    shard_name,
    shard_nbytes,
)
from saev_torch.writing.journal import CLAIM_NAME, Record, journal_ranges, read_records
from saev_torch.writing.ranges import Ranges

__all__ = [
    "is_published",
    "part_name",
    "publish",
    "read_progress",
    "refuse_missing",
    "remove_claim",
    "strangers",
]


def part_name(name: str) -> str:
    """Name of a file for as long as it is not published."""
    return f".{name}.part"


def make_shard_info(md: Metadata) -> ShardInfo:
    """Make the table of shards.json that saev's writer would leave."""
    n_full, n_rest = divmod(md.n_examples, md.examples_per_shard)
    # saev opens the next file when one is full, so an exact multiple is followed by a file without examples.
    info = ShardInfo([Shard(shard_name(i), md.examples_per_shard) for i in range(n_full)])
    info.append(Shard(shard_name(n_full), n_rest))
    return info


def is_published(shards_dir: Path, metadata_json: bytes) -> bool:
    """Whether a directory is complete: shards.json is written after all data, and metadata.json after that.

    Raises:
        OSError: metadata.json could not be read.
    """
    if not (shards_dir / SHARDS_NAME).is_file():
        return False
    path = shards_dir / METADATA_NAME
    return path.is_file() and path.read_bytes() == metadata_json


def strangers(md: Metadata, shards_dir: Path, names: set[str], metadata_json: bytes) -> set[str]:
    """Pick the names that no writer of this metadata leaves in an unfinished directory.

    Raises:
        OSError: metadata.json could not be read.
    """
    unknown = names - {CLAIM_NAME} - set(journal_ranges(names))
    if METADATA_NAME in unknown and (shards_dir / METADATA_NAME).read_bytes() == metadata_json:
        unknown.discard(METADATA_NAME)
    # Without the claim there was no writer of ours, and so nothing of ours.
    if CLAIM_NAME in names:
        ours = {shard.name for shard in make_shard_info(md)} | {LABELS_NAME}
        unknown -= ours | set(map(part_name, ours)) | {SHARDS_NAME, CHECKSUMS_NAME}
        unknown = {name for name in unknown if not _is_temporary(name)}
    return unknown


def _is_temporary(name: str) -> bool:
    return name.endswith(".tmp") and name.startswith(
        tuple(f".{x}." for x in (METADATA_NAME, SHARDS_NAME, CHECKSUMS_NAME))
    )


def read_progress(md: Metadata, shards_dir: Path) -> tuple[Ranges, bool | None]:
    """Read all journals of a directory, which stays claimed meanwhile.

    Returns:
        The examples that are on disk, and whether they have labels (None where there are none yet).

    Raises:
        WriteError: The journals contradict the metadata or each other.
    """
    done, has_labels = Ranges(), None
    for name in journal_ranges(os.listdir(shards_dir)):
        for record in _usable_records(shards_dir, name):
            n_sums = (record.stop - record.start) * (md.n_layers + record.has_labels)
            is_fit = 0 <= record.start < record.stop <= md.n_examples and len(record.checksums) == 4 * n_sums
            if not is_fit or has_labels is (not record.has_labels):
                raise WriteError(
                    f"{shards_dir / name}: expected labels for all examples or for none, and examples of this data "
                    f"set, got {record.start}..{record.stop}; delete the directory and write it again"
                )
            has_labels = record.has_labels
            for low, high in list(done.gaps(record.stop, record.start)):
                done.add(low, high)
    return done, has_labels


def _usable_records(shards_dir: Path, name: str) -> Iterator[Record]:
    """Leave out what a process without the package xxhash has written, or one with it: that is written again."""
    return (record for record in read_records(shards_dir, name) if record.algorithm == ALGORITHM)


def refuse_missing(
    md: Metadata, shards_dir: Path, missing: list[tuple[int, int]], example_range: tuple[int, int]
) -> None:
    """Raise if a writer has not written all that it is for.

    Raises:
        WriteError: Examples are missing.
    """
    if missing:
        n_missing = sum(stop - start for start, stop in missing)
        raise WriteError(
            f"{shards_dir}: expected {example_range[1] - example_range[0]} examples, as announced, {n_missing} are "
            f"missing: {short(missing)} (ends excluded); nothing was published"
        )


def publish(md: Metadata, shards_dir: Path, metadata_json: bytes) -> bool:
    """Publish a directory, which stays claimed meanwhile, if all of its examples are on disk.

    Every step may have been done before, by a writer that was killed at it.

    Returns:
        Whether it is published now.

    Raises:
        WriteError: A file is missing or of another size.
        OSError: The system refused.
    """
    if is_published(shards_dir, metadata_json):
        remove_claim(shards_dir)
        return True
    done, has_labels = read_progress(md, shards_dir)
    if list(done.gaps(md.n_examples)):
        return False
    checksums = Checksums.make(md, bool(has_labels))
    for name in journal_ranges(os.listdir(shards_dir)):
        for record in _usable_records(shards_dir, name):
            checksums.fill(record.start, record.stop, record.checksums)
    info = make_shard_info(md)
    sizes = {shard.name: shard_nbytes(md, md.examples_per_shard) for shard in info}
    if has_labels:
        sizes[LABELS_NAME] = labels_nbytes(md)
    if info[-1].n_examples == 0:
        _make_empty(shards_dir, info[-1].name, sizes[info[-1].name])
    for name, nbytes in sizes.items():
        _reveal(shards_dir, name, nbytes)
    # Dumping these makes the renames before them last, too; metadata.json comes when all else is sure to be there.
    info.dump(shards_dir)
    checksums.add_files(shards_dir, metadata_json)
    checksums.dump(shards_dir)
    write_atomic(shards_dir / METADATA_NAME, metadata_json)
    sync_dir(shards_dir.parent)
    remove_claim(shards_dir)
    return True


def _make_empty(shards_dir: Path, name: str, nbytes: int) -> None:
    if (shards_dir / name).exists():
        return
    with writing(shards_dir / name):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(shards_dir / part_name(name), flags, 0o666)
        try:
            os.ftruncate(fd, nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)


def _reveal(shards_dir: Path, name: str, nbytes: int) -> None:
    path, part = shards_dir / name, shards_dir / part_name(name)
    with writing(path):
        if part.exists():
            os.rename(part, path)
        found = path.stat().st_size
    if found != nbytes:
        raise WriteError(
            f"{path}: expected {nbytes} bytes, got {found}: it was changed; delete the directory and write it again"
        )


def remove_claim(shards_dir: Path) -> None:
    """Remove what only an unfinished directory has; the claim last, as it says that the rest may be there.

    Raises:
        OSError: The system refused.
    """
    names = os.listdir(shards_dir)
    for name in [*journal_ranges(names), *(name for name in names if _is_temporary(name)), CLAIM_NAME]:
        (shards_dir / name).unlink(missing_ok=True)
