"""`import_arrays`: from activations that others have written to shards, a few megabytes at a time."""

import contextlib
import logging
import operator
from pathlib import Path
from typing import Any

from saev_torch.errors import ConfigError
from saev_torch.format.dtypes import DTYPES, FLOAT32
from saev_torch.format.files import short
from saev_torch.format.metadata import Metadata
from saev_torch.tools.importing.rows import MAX_EXAMPLE_NBYTES, Joined
from saev_torch.tools.importing.sources import open_source
from saev_torch.writing.incoming import check_dtype
from saev_torch.writing.progress import Progress
from saev_torch.writing.writer import ShardWriter

_log = logging.getLogger("saev_torch")

_BATCH_NBYTES = 4 << 20


def import_arrays(
    source: Path | str,
    shards_root: Path | str,
    *,
    array: str | None = None,
    tokens_per_example: int | None = None,
    cls_token: bool = False,
    layer: int = 0,
    family: str = "imported",
    ckpt: str | None = None,
    dataset: Path | str | None = None,
    data: str = "",
    max_tokens_per_shard: int = 2_400_000,
    dtype: str | None = None,
    on_overflow: str = "refuse",
    check_finite: bool = False,
    resume: bool = True,
    progress: bool | None = False,
) -> Path:
    """Write activations that lie in files of another kind as shards, in their order.

    A source is a `.npy`, `.npz`, `.safetensors` or `.pt` file, a folder of such files of one kind, a folder that
    `datasets.Dataset.save_to_disk` wrote (as SAELens caches activations; needs pyarrow), or a folder of a Zarr array
    (needs zarr). Arrays are [examples, tokens, d_model], or [rows, d_model], of which `tokens_per_example` rows are an
    example. Example i of the shards is example i of the source, over all its files. Sources are not trusted: nothing is
    unpickled, no link is followed, and sizes are compared with what is there.

    Memory holds a batch of 4 MB, and what is decoded together: a chunk of Zarr. `.pt` and Arrow files are mapped.

    Args:
        source: A file or a folder.
        shards_root: Where the directory `<hash>` is made.
        array: Name of the array in each file, of the column, or of the array in a Zarr group, where there are several.
        tokens_per_example: Rows of an example, [CLS] included, where the source does not say; by default 1.
        cls_token: Whether the first token of each example is [CLS].
        layer: Number under which the layer is recorded.
        family: Transformer family, for the metadata.
        ckpt: Checkpoint, for the metadata; the source's name by default.
        dataset: Root of the source data, for the metadata; the source's absolute path by default.
        data: Opaque description of the data, for the metadata.
        max_tokens_per_shard: Activations in one file.
        dtype: Type of the stored values: "float32", "float16" or "bfloat16". None is that of the source, and for
            float64 it is float32.
        on_overflow: "refuse" values that are too large for that type, or "clip" them, see `ShardWriter`.
        check_finite: Refuse NaN and infinity.
        resume: Continue an import that was killed, and leave a finished one as it is; the first examples are compared.
        progress: Draw a progress bar; None for where stderr is a terminal, and elsewhere a line a minute.

    Returns:
        The shard directory.

    Raises:
        ShardsNotFoundError: There is no such source.
        FormatError: A file is damaged, or its array has another shape or type than it should have.
        ConfigError: An option does not fit the source.
        WriteError: The shards could not be written, are there already (without `resume`), or cannot hold a value.
    """
    source = Path(source)
    dtype = None if dtype is None else check_dtype(dtype)
    tokens = None if tokens_per_example is None else _integer("tokens_per_example", tokens_per_example)
    with contextlib.closing(Joined(open_source(source, array), tokens)) as joined:
        md = Metadata(
            family=family,
            ckpt=source.name if ckpt is None else ckpt,
            layers=(_integer("layer", layer),),
            content_tokens_per_example=_n_content(joined, cls_token),
            cls_token=cls_token,
            d_model=joined.d_model,
            n_examples=joined.n_examples,
            max_tokens_per_shard=max_tokens_per_shard,
            data=data,
            dataset=source.absolute() if dataset is None else Path(dataset),
            dtype=_stored_as(joined) if dtype is None else dtype,
        )
        if md.example_nbytes > MAX_EXAMPLE_NBYTES:
            raise ConfigError(
                f"tokens_per_example: expected examples of at most 1 GiB, got {md.tokens_per_example} tokens of "
                f"{md.row_nbytes} bytes; give fewer."
            )
        _log.info("importing %s values of %s as %s", joined.dtype, source, md.dtype)
        options: dict[str, Any] = {"on_overflow": on_overflow, "check_finite": check_finite}
        writer = ShardWriter(Path(shards_root), md, resume, **options)
        bar = Progress(md.n_examples * md.example_nbytes, "importing", "B", progress)
        with bar, writer:
            _copy(joined, writer, bar)
    return writer.shards_dir


def _copy(joined: Joined, writer: ShardWriter, bar: Progress) -> None:
    md = writer.md
    n_fit = max(1, _BATCH_NBYTES // md.example_nbytes)
    n_fit = max(joined.n_together, n_fit // joined.n_together * joined.n_together)
    left = _count(writer.missing())
    bar.skip((md.n_examples - left) * md.example_nbytes)
    # The writer looks whether what it has on disk is of the same source, by the first examples.
    done = 0
    for low, high in [(0, min(n_fit, md.n_examples)), *writer.missing()]:
        start = max(low, done)
        while start < high:
            stop = min(high, start // n_fit * n_fit + n_fit)
            writer.write_batch(joined.read(start, stop), start)
            start = done = stop
            before, left = left, _count(writer.missing())
            bar.update((before - left) * md.example_nbytes)


def _count(ranges: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def _stored_as(joined: Joined) -> str:
    """The type of the source, if it can be stored."""
    if joined.dtype is None:
        raise ConfigError("dtype: expected files of one type, got several; say which to store.")
    name = str(joined.dtype).removeprefix("torch.")
    return name if name in DTYPES else FLOAT32.name


def _n_content(joined: Joined, cls_token: bool) -> int:
    n_content = joined.tokens_per_example - bool(cls_token)
    if n_content < 1:
        raise ConfigError("cls_token: expected two or more tokens in an example, got 1; leave it out.")
    return n_content


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as err:
        raise ConfigError(f"{name}: expected an integer, got {short(value)}.") from err
