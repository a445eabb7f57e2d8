"""`python -m saev_torch repack DIR ROOT`: fewer layers, another shard size or type, a subset of the examples."""

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from saev_torch.errors import ConfigError, FormatError
from saev_torch.format.checksums import CHECKSUMS_NAME, Checksums, block_checksums
from saev_torch.format.dtypes import DTYPES, FLOAT32
from saev_torch.format.examples import Examples
from saev_torch.format.files import short
from saev_torch.format.metadata import Metadata
from saev_torch.format.protocols import PROTOCOL
from saev_torch.format.sidecars import SIDECARS
from saev_torch.order.examples import make_subset
from saev_torch.reading.extents import make_extents
from saev_torch.reading.mask import open_sidecar
from saev_torch.reading.source import Source
from saev_torch.reading.store import ShardStore
from saev_torch.tools.arguments import at_least, integers, positions
from saev_torch.tools.rounding import Rounding, RoundingMeter
from saev_torch.writing.incoming import check_dtype, check_stored
from saev_torch.writing.narrowing import Given, as_tensor
from saev_torch.writing.progress import Progress
from saev_torch.writing.writer import ShardWriter

_BATCH_NBYTES = 32 << 20


def repack(
    shards_dir: Path | str,
    shards_root: Path | str,
    *,
    layers: Sequence[int] | None = None,
    examples: Sequence[int] | Examples | None = None,
    max_tokens_per_shard: int | None = None,
    dtype: str | None = None,
    on_overflow: str = "refuse",
    preallocate: bool | None = None,
    report: Callable[[Rounding], None] | None = None,
    progress: bool | None = False,
) -> Path:
    """Write a shard directory again, with less in it, cut into other files, or with values of another type.

    The source is read-only. Where it has checksums they are compared on the way, so damage is not carried over. The
    new metadata differs from the old in the fields that had to change; examples are numbered anew, in the order given.

    Args:
        shards_dir: The source, of any protocol.
        shards_root: Where the new directory `<hash>` is made.
        layers: Recorded layers to keep, by value, in the new order; all by default.
        examples: Examples to keep, in the new order; or an `Examples`, as configs have it; all by default.
        max_tokens_per_shard: Activations (token x layer) in a file; as in the source by default.
        dtype: Type of the new values: "float32", "float16" or "bfloat16"; as in the source by default.
        on_overflow: "refuse" values that are too large for it, or "clip" them.
        preallocate: See `ShardWriter`; by default where 16 bits become float32, as readers of saev map whole files.
        report: Called at the end where the type changes, with what became of the values.
        progress: Draw a progress bar; None for where stderr is a terminal, and elsewhere a line a minute.

    Returns:
        The new directory.

    Raises:
        ConfigError: There is no such layer, example or type, or nothing would change.
        FormatError: The source does not follow the format, or a checksum does not fit.
        WriteError: The target is there already, could not be written, or cannot hold a value.
    """
    store = ShardStore(Path(shards_dir))
    old = store.metadata
    dtype = old.dtype if dtype is None else check_dtype(dtype)
    numbers = _numbers(old, examples)
    changes: dict[str, Any] = {"layers": _layers(old, layers), "n_examples": len(numbers), "dtype": dtype}
    changes |= {"data": _describe(old, numbers, dtype), "protocol": PROTOCOL}
    changes |= {"max_tokens_per_shard": max_tokens_per_shard} if max_tokens_per_shard else {}
    new = dataclasses.replace(old, **changes)
    if new.hash == old.hash:
        raise ConfigError("layers, examples, max_tokens_per_shard, dtype: expected a change, got what the source has.")
    preallocate = old.dtype != dtype == FLOAT32.name if preallocate is None else preallocate
    meter = RoundingMeter(old.dtype, dtype)
    with (
        contextlib.closing(store),
        Progress(new.n_examples * new.example_nbytes, "repacking", "B", progress) as bar,
        ShardWriter(Path(shards_root), new, on_overflow=on_overflow, preallocate=preallocate) as writer,
    ):
        _copy(store, writer, numbers, bar, meter)
    if report is not None and dtype != old.dtype:
        report(meter.read())
    return writer.shards_dir


def _copy(
    store: ShardStore, writer: ShardWriter, numbers: npt.NDArray[np.int64], bar: Progress, meter: RoundingMeter
) -> None:
    """Write examples of a store, in the layers and the type that the writer is for."""
    old, new = store.metadata, writer.md
    source = _Examples(store, [old.layers.index(layer) for layer in new.layers])
    n_fit = max(1, _BATCH_NBYTES // max(old.example_nbytes, new.example_nbytes))
    for start in range(0, len(numbers), n_fit):
        some = numbers[start : start + n_fit]
        acts, beside = source.read(some)
        if new.dtype != old.dtype:
            # Not by the writer, which has another number for an example.
            acts = _convert(acts, new, some, writer.on_overflow, meter)
        writer.write_batch(acts, start, *beside)
        bar.update(len(some) * new.example_nbytes)


def _convert(
    old: torch.Tensor, md: Metadata, examples: npt.NDArray[np.int64], on_overflow: str, meter: RoundingMeter
) -> torch.Tensor:
    """Return activations of these examples in the type of the new metadata, and tell the meter."""
    stored = check_stored(Given.of_tensor(old), md, examples.tolist(), on_overflow)
    new = as_tensor(stored.values, md.value_type)
    meter.add(old, new, stored.n_overflowed)
    return new


def _layers(old: Metadata, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to keep."""
    kept = tuple(old.layers if layers is None else layers)
    if not kept or not set(kept) <= set(old.layers):
        raise ConfigError(f"layers: expected some of {list(old.layers)}, as recorded, got {list(kept)}.")
    return kept


def _numbers(old: Metadata, examples: Sequence[int] | Examples | None) -> npt.NDArray[np.int64]:
    """The examples to keep, as an array."""
    if isinstance(examples, Examples):
        subset = make_subset(examples, old.n_examples)
        return subset.members(np.arange(subset.n, dtype=np.int64))
    numbers = np.asarray(range(old.n_examples) if examples is None else examples)
    got = "none" if numbers.size == 0 else short(examples)
    if numbers.size and numbers.ndim == 1 and numbers.dtype.kind in "iu":
        outside = numbers[(numbers < 0) | (numbers >= old.n_examples)]
        if not len(outside):
            return numbers.astype(np.int64)
        got = f"{outside[0]}"
    raise ConfigError(f"examples: expected some of 0..{old.n_examples} (end excluded), got {got}; choose others.")


def _describe(old: Metadata, examples: npt.NDArray[np.int64], dtype: str) -> str:
    """The field `data`, and which examples of which directory were taken: the hash covers it, so the name tells.

    It stands behind the pickle that others go on reading. Nothing is added where all are taken, in their order, unless
    their values were rounded before, to another type than the new one: then they are not what the model put out, whose
    recording in that type has the name that the directory would have.
    """
    origin = f"\nrepacked from {old.hash}:"
    if old.dtype not in (FLOAT32.name, dtype):
        origin += f" values of {old.dtype}"
    if not np.array_equal(examples, np.arange(old.n_examples)):
        origin += f" examples {_name_examples(examples)}"
    if origin.endswith(":"):
        return old.data
    try:
        return base64.b64encode(base64.b64decode(old.data, validate=True) + origin.encode()).decode()
    except ValueError:
        # Older protocols describe their data in words.
        return old.data + origin


def _name_examples(examples: npt.NDArray[np.int64]) -> str:
    steps = np.unique(np.diff(examples))
    if len(steps) > 1 or steps[:1] <= 0:
        return f"{len(examples)} of SHA-256 {hashlib.sha256(examples.astype('<i8').tobytes()).hexdigest()[:16]}"
    return f"{examples[0]}:{examples[-1] + 1}" + (f":{steps[0]}" if steps[:1] > 1 else "")


class _Examples:
    """Examples of a store, some of their layers, read in any order and compared with their checksums, if any."""

    def __init__(self, store: ShardStore, layer_idxs: list[int]) -> None:
        self._store, self._md, self._layer_idxs = store, store.metadata, layer_idxs
        self._reader = Source(store).open_reader()
        self._columns = [open_sidecar(store, sidecar) if sidecar in store.sidecars else None for sidecar in SIDECARS]
        has_checksums = os.path.lexists(store.shards_dir / CHECKSUMS_NAME)
        self._checksums = Checksums.load(store.shards_dir, self._md) if has_checksums else None

    def read(self, examples: npt.NDArray[np.int64]) -> tuple[torch.Tensor, list[npt.NDArray[Any] | None]]:
        """Read the activations of examples, `[n, n_layers, tokens_per_example, d_model]`, and those of sidecars."""
        md = self._md
        shape = (len(examples), len(self._layer_idxs), md.tokens_per_example, md.d_model)
        acts = np.empty(shape, dtype=md.value_type.storage)
        # A row is one layer of one example.
        shards, firsts = np.divmod(examples, md.examples_per_shard)
        rows = (firsts[:, None] * md.n_layers + np.array(self._layer_idxs)).ravel()
        row_nbytes = md.example_nbytes // md.n_layers
        places = acts.ctypes.data + row_nbytes * np.arange(len(rows))
        extents = make_extents(np.repeat(shards, len(self._layer_idxs)), rows, places, row_nbytes)
        self._reader.read(extents, 0, len(extents.nbytes))
        if self._checksums is not None:
            self._compare(self._checksums, examples, acts)
        beside = [None if column is None else column.of_examples(examples) for column in self._columns]
        return as_tensor(acts, md.value_type), beside

    def _compare(self, checksums: Checksums, examples: npt.NDArray[np.int64], acts: npt.NDArray[Any]) -> None:
        expected = checksums.acts[examples][:, self._layer_idxs]
        got = np.frombuffer(block_checksums(acts, (), checksums.algorithm), ">u4").reshape(expected.shape)
        if (expected != got).any():
            i, j = (int(x) for x in np.argwhere(expected != got)[0])
            layer = self._md.layers[self._layer_idxs[j]]
            raise FormatError(
                f"{self._store.shards_dir}: expected example {examples[i]}, layer {layer} as it was written, got other "
                "bytes; copy it again, or see `python -m saev_torch verify`"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("dir", type=Path, help="shard directory to read")
    parser.add_argument("root", type=Path, help="where the new directory <hash> is made")
    parser.add_argument("--layers", type=integers(), metavar="A,B", help="layers to keep, for instance --layers=-2,11")
    kept = "examples to keep: start:stop[:step], a list 3,5,8, or a share by hash 0.0:0.9"
    parser.add_argument("--examples", type=positions, metavar="A:B", help=kept)
    most = "activations (token x layer) in a file"
    parser.add_argument("--max-tokens-per-shard", type=at_least(1), metavar="N", help=most)
    kept = "type of the values (default: as they are); says how far off they became"
    parser.add_argument("--dtype", choices=list(DTYPES), help=kept)
    too_large = "what to do with values that are too large for it (default: %(default)s)"
    parser.add_argument("--on-overflow", choices=["refuse", "clip"], default="refuse", help=too_large)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Repack a directory and print where the new one is."""
    examples = args.examples
    if isinstance(examples, slice):
        examples = range(Metadata.load(args.dir).n_examples)[examples]
    options = {name: getattr(args, name) for name in ("layers", "max_tokens_per_shard", "dtype", "on_overflow")}
    options |= {"report": print, "progress": False if args.quiet else None}
    print(repack(args.dir, args.root, examples=examples, **options))
    return 0
