"""shards.json and the shard files it names: how many examples each holds, and how large it must be."""

import ctypes
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import orjson
from numpy.typing import NDArray

from saev_torch.errors import EmptyShardError, FormatError
from saev_torch.format.files import check_name, first_repeated, open_regular, read_json, short, write_atomic
from saev_torch.format.metadata import METADATA_NAME, Metadata
from saev_torch.format.protocols import COUNT_NAMES
from saev_torch.format.sidecars import SIDECARS, sidecar_idx

SHARDS_NAME = "shards.json"

MAX_SHARDS = 40_000
"""Most files that may be written to one directory: their shards.json stays below what `read_json` accepts."""


def shard_name(shard_idx: int) -> str:
    """Name of a shard file, as saev's own writer numbers them."""
    return f"acts{shard_idx:06}.bin"


def shard_nbytes(md: Metadata, n_examples: int) -> int:
    """Size in bytes of `n_examples` examples in a shard file."""
    return n_examples * md.example_nbytes


def check_nbytes(path: Path, md: Metadata, n_examples: int, nbytes: int) -> None:
    """Refuse a size of a shard file that is neither exactly its examples, nor that of a full shard, preallocated."""
    exact, full = shard_nbytes(md, n_examples), shard_nbytes(md, md.examples_per_shard)
    if nbytes in (exact, full):
        return
    expected = f"{exact} bytes" if exact == full else f"{exact} bytes (or {full}, preallocated)"
    what = "truncated" if nbytes < exact else "not of this data set, or damaged"
    error = FormatError if nbytes else EmptyShardError
    raise error(
        f"{path}: expected {expected} for {n_examples} examples, got {nbytes}: it is {what}; copy or write it again"
    )


@dataclasses.dataclass(frozen=True)
class Shard:
    """One entry of shards.json.

    Attributes:
        name: Plain file name, for instance "acts000000.bin".
        n_examples: Examples in the file; rows behind them are padding.

    Raises:
        FormatError: The name is no plain file name, or the count is no integer from 0.
    """

    name: str
    n_examples: int

    def __post_init__(self) -> None:
        check_name(self.name)
        if isinstance(self.n_examples, bool) or not isinstance(self.n_examples, int) or self.n_examples < 0:
            raise FormatError(f"n_examples: expected an integer from 0 on, got {short(self.n_examples)}")


@dataclasses.dataclass
class ShardInfo(Sequence[Shard]):
    """The table of shards.json, a sequence of `Shard`.

    Attributes:
        shards: The entries, in the order of their examples.
    """

    shards: list[Shard] = dataclasses.field(default_factory=list)

    @overload
    def __getitem__(self, i: int) -> Shard: ...
    @overload
    def __getitem__(self, i: slice) -> list[Shard]: ...
    def __getitem__(self, i: int | slice) -> Shard | list[Shard]:
        return self.shards[i]

    def __len__(self) -> int:
        return len(self.shards)

    def append(self, shard: Shard) -> None:
        """Add the entry of the next file."""
        self.shards.append(shard)

    @classmethod
    def load(cls, shards_dir: Path, *, allow_links: bool = False) -> "ShardInfo":
        """Load the shards.json of a directory; older protocols count `n_imgs` or `n_ex`.

        Raises:
            ShardsNotFoundError: The directory or its shards.json does not exist.
            FormatError: shards.json does not follow the format.
            ReadError: It could not be read.
        """
        path = Path(shards_dir) / SHARDS_NAME
        entries = read_json(Path(shards_dir), SHARDS_NAME, allow_links=allow_links)
        if not isinstance(entries, list):
            raise FormatError(f"{path}: expected a list of shards, got {short(entries)}")
        info = cls()
        for i, entry in enumerate(entries):
            counts = [name for name in COUNT_NAMES if isinstance(entry, dict) and set(entry) == {"name", name}]
            if not counts:
                raise FormatError(
                    f"{path}: entry {i}: expected an object with the keys name and n_examples, got {short(entry)}"
                )
            try:
                info.append(Shard(entry["name"], entry[counts[0]]))
            except FormatError as err:
                raise FormatError(f"{path}: entry {i}: {err}") from err
        return info

    def dump(self, shards_dir: Path) -> Path:
        """Write shards.json into a directory, the same bytes as saev's own writer, and return its path.

        Raises:
            WriteError: The operating system refused.
        """
        path = Path(shards_dir) / SHARDS_NAME
        write_atomic(path, orjson.dumps(self.shards, option=orjson.OPT_INDENT_2))
        return path

    def check(self, md: Metadata, path: Path | str = SHARDS_NAME) -> None:
        """Check the table against the metadata, without looking at any shard file.

        Args:
            md: Metadata of the same directory.
            path: What to call the table in messages.

        Raises:
            FormatError: A repeated name, a shard that should be full and is not, or a wrong sum of examples.
        """
        repeated = first_repeated(shard.name for shard in self.shards)
        if repeated is not None:
            raise FormatError(f"{path}: expected each name once, got {short(repeated)} again; write shards.json again")
        # The file without examples that saev leaves behind an exact multiple.
        n_shards = len(self) - 1 if self.shards and self.shards[-1].n_examples == 0 else len(self)
        for i, shard in enumerate(self.shards[:n_shards]):
            is_last = i == n_shards - 1
            low = 1 if is_last else md.examples_per_shard
            if not low <= shard.n_examples <= md.examples_per_shard:
                expected = f"1 to {md.examples_per_shard}" if is_last else f"exactly {md.examples_per_shard}"
                raise FormatError(
                    f"{path}: entry {i} ({short(shard.name)}): expected n_examples of {expected}, as {METADATA_NAME} "
                    f"says, got {short(shard.n_examples)}; one of the two files is of another data set"
                )
        n_examples = sum(shard.n_examples for shard in self.shards)
        if n_examples != md.n_examples:
            raise FormatError(
                f"{path}: expected {md.n_examples} examples in all shards, as {METADATA_NAME} says, got {n_examples}; "
                "one of the two files is of another data set, or the list is cut short"
            )

    def validate(self, shards_dir: Path, *, allow_links: bool = False) -> None:
        """Check this table, and the presence and size of every file with data, in a directory.

        Looks at sizes, not at values. A file without examples is not looked at. With `allow_links` symbolic links to
        regular files are followed.

        Raises:
            ShardsNotFoundError: A file is missing.
            FormatError: The table does not fit the metadata, or a file is no regular file of the right size.
            ReadError: A file could not be opened.
        """
        self.check_files(Path(shards_dir), Metadata.load(shards_dir, allow_links=allow_links), allow_links)

    def check_files(self, shards_dir: Path, md: Metadata, allow_links: bool = False) -> NDArray[np.int64]:
        """Do what `validate` does, with metadata that were loaded before; links may be followed.

        Returns `[len(self) + len(SIDECARS), 2] int64`: what `identify` says of each file, of sidecars by their negative
        numbers; -1 where none is.
        """
        self.check(md, shards_dir / SHARDS_NAME)
        identities = np.full((len(self) + len(SIDECARS), 2), -1, dtype=np.int64)
        for i, shard in enumerate(self.shards):
            if shard.n_examples > 0:
                stat = stat_regular(shards_dir, shard.name, allow_links)
                check_nbytes(shards_dir / shard.name, md, shard.n_examples, stat.st_size)
                identities[i] = identify(stat)
        for sidecar in SIDECARS:
            if os.path.lexists(shards_dir / sidecar.name):
                stat = stat_regular(shards_dir, sidecar.name, allow_links)
                sidecar.check(shards_dir, md, stat.st_size)
                identities[sidecar_idx(sidecar)] = identify(stat)
        return identities


def stat_regular(directory: Path, name: str, allow_links: bool = False) -> os.stat_result:
    """Look at a regular file, see `open_regular`."""
    # Opened, not only looked at, so that a file that may not be read is found out here.
    fd = open_regular(directory, name, allow_links)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def identify(stat: os.stat_result) -> tuple[int, int]:
    """What tells a file from another one of the same name and size: its inode, and when it was written."""
    return ctypes.c_int64(stat.st_ino).value, ctypes.c_int64(stat.st_mtime_ns).value
