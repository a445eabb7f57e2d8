"""From a model and a data set to shards: `record`."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from saev_torch.errors import ConfigError
from saev_torch.format.dtypes import DTYPES, FLOAT32
from saev_torch.format.files import short
from saev_torch.format.metadata import Metadata, PixelAgg
from saev_torch.processes.launchers import announce
from saev_torch.processes.notices import Notices
from saev_torch.processes.world import find_world
from saev_torch.stats.outliers import NormMeter
from saev_torch.writing.incoming import check_dtype, check_on_overflow
from saev_torch.writing.progress import Progress
from saev_torch.writing.source import Batches, Source, Taps, Tokens
from saev_torch.writing.writer import ShardWriter

_log = logging.getLogger("saev_torch")


def record(
    model: nn.Module,
    dataloader: "DataLoader[Any]",
    *,
    layers: Sequence[int] | Mapping[int, str],
    shards_root: Path | str,
    family: str,
    ckpt: str,
    dataset: Path | str,
    cls_token: bool,
    content_tokens_per_example: int | None = None,
    first_content_token: int | None = None,
    data: str = "",
    pixel_agg: PixelAgg = PixelAgg.MAJORITY,
    max_tokens_per_shard: int = 2_400_000,
    blocks: str | None = None,
    batch_dim: int = 0,
    forward: Callable[[nn.Module, Any], object] | None = None,
    labels: Callable[[Any], torch.Tensor] | None = None,
    resume: bool = False,
    check_finite: bool = False,
    dtype: str | None = None,
    on_overflow: str = "refuse",
    progress: bool | None = None,
) -> Path:
    """Run a model over a data set and write what its blocks put out.

    Layer i is the output of block i, from 0, as the next block gets it. transformers calls it `hidden_states[i + 1]`,
    but for the last block: there it gives what comes out of the model's final norm, where there is one (Llama, GPT-2
    and most other language models), and recorded is what goes into it. Example i is `dataset[i]` of the loader's data
    set, so the loader must not shuffle. Writing a batch overlaps with computing the next one; two
    batches are held on the host. The model is in evaluation mode meanwhile, and builds no graph.

    Under torchrun each rank records its share of the batches, and the last one to finish publishes. Put each rank's
    model on its device beforehand.

    Where a few content tokens have norms of more than 20 medians, a warning names the mask that leaves them out.

    Args:
        model: Any module whose blocks put out [batch, tokens, d_model].
        dataloader: Yields what the model takes: a tensor, a mapping (passed as keywords), or a sequence of which the
            first is passed. Where a mapping has an `attention_mask`, it must be 1 for all tokens that are recorded.
        layers: Numbers of blocks, negative ones from the end, or names of modules by number: `{6: "encoder.layer.6"}`.
        shards_root: Where the directory `<hash>` is made.
        family: Transformer family, for the metadata.
        ckpt: Checkpoint, for the metadata.
        dataset: Root of the source data, for the metadata.
        cls_token: Whether token 0 is [CLS], and is recorded.
        content_tokens_per_example: Content tokens; by default all from the first one on.
        first_content_token: Index of the first content token, behind [CLS] and register tokens; by default 1 with
            `cls_token`, else 0.
        data: Opaque description of the data, for the metadata.
        pixel_agg: How pixel labels became token labels, for the metadata.
        max_tokens_per_shard: Activations (token x layer) in one file.
        blocks: Name of the list of blocks, where it is not the longest one of the model.
        batch_dim: Which dimension of a block's output is the batch, 0 or 1.
        forward: Called with model and batch instead of the model itself.
        labels: Gives [batch, content_tokens_per_example] integers for a batch, see `pixel_to_token_labels`.
        resume: Continue a recording that was killed; batches that are on disk are not computed again, but for the first
            one, which shows whether they are of the same data and model.
        check_finite: Refuse NaN and infinity.
        dtype: Type of the stored values: "float32", "float16" or "bfloat16". None is what the blocks put out, and
            float32 where that is another one. A line of the log says which it is.
        on_overflow: "refuse" values that are too large for that type, or "clip" them, see `ShardWriter`.
        progress: Show progress on stderr; None for the first rank only, and without a terminal a line a minute.

    Returns:
        The shard directory.

    Raises:
        ConfigError: The layers, the loader or the tokens do not fit the model, or its blocks put out another type than
            in the first batch.
        WriteError: The shards are there already, are of other data, or could not be written.
    """
    dtype = None if dtype is None else check_dtype(dtype)
    check_on_overflow(on_overflow)
    world, loader = find_world(None, None), Batches(dataloader)
    announce(world, Notices.of_process())
    mine = range(len(loader) * world.rank // world.world_size, len(loader) * (world.rank + 1) // world.world_size)
    taps = Taps(model, layers, blocks, batch_dim)
    first = int(cls_token) if first_content_token is None else first_content_token
    source = Source(model, loader, taps, forward, Tokens(cls_token, first, content_tokens_per_example))
    start, stop = (loader.span(mine[0])[0], loader.span(mine[-1])[1]) if mine else (0, 0)
    shown = progress if progress is not None or world.rank == 0 else False
    # All the time: the first batch and publishing may take minutes, too.
    bar = Progress(stop - start, "recording", "examples", shown)
    with _evaluating(model), torch.inference_mode(), taps, bar:
        # A rank without any batch looks at the first of all, as it must know the directory's name.
        shape, found = source.peek(mine.start if mine else 0)
        md = Metadata(
            family=family,
            ckpt=ckpt,
            layers=taps.layers,
            content_tokens_per_example=shape[2] - int(cls_token),
            cls_token=cls_token,
            d_model=shape[3],
            n_examples=loader.n_examples,
            max_tokens_per_shard=max_tokens_per_shard,
            data=data,
            dataset=Path(dataset),
            pixel_agg=pixel_agg,
            dtype=dtype or _own_dtype(found),
        )
        _log.info("recording %s; the blocks put out %s", md.dtype, found)
        if md.dtype != FLOAT32.name:
            bar.begin(f"recording {md.dtype}")
        if not mine:
            return Path(shards_root) / md.hash
        example_range = (start, stop) if world.world_size > 1 else None
        options: dict[str, Any] = {"check_finite": check_finite, "on_overflow": on_overflow}
        writer = ShardWriter(Path(shards_root), md, resume, example_range=example_range, **options)
        with writer:
            todo = loader.touching(mine, writer.missing())
            # The first is computed already, and the writer looks whether what it has on disk is of these data.
            todo = todo if todo[:1] == [mine[0]] else [mine[0], *todo]
            bar.skip(stop - start - sum(high - low for low, high in map(loader.span, todo)))
            with _Stream(writer, source.device, found if dtype is None else None) as stream:
                for i, batch, acts in source.compute(todo):
                    stream.write(acts, loader.span(i), None if labels is None else labels(batch))
                    bar.update(len(acts))
    if world.rank == 0:
        for line in stream.norms.advise(writer.shards_dir, md.layers):
            _log.warning("%s", line)
    return writer.shards_dir


def _own_dtype(found: torch.dtype) -> str:
    """What is stored of a type that blocks put out, if nobody says."""
    name = str(found).removeprefix("torch.")
    return name if name in DTYPES else FLOAT32.name


class _Stream:
    """Writes batches in a thread, one behind the model; all of one type, unless that is None. `norms` measures them."""

    def __init__(self, writer: ShardWriter, device: torch.device, dtype: torch.dtype | None) -> None:
        self._writer, self._dtype = writer, dtype
        self.norms = NormMeter(writer.md.n_layers)
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pinned = torch.empty(0)
        self._writing: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="record")

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        try:
            if self._writing is not None and exc_type is None:
                self._writing.result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, acts: torch.Tensor, span: tuple[int, int], labels: torch.Tensor | None) -> None:
        if len(acts) != span[1] - span[0]:
            raise ConfigError(f"model: expected {span[1] - span[0]} examples from a batch, got {len(acts)}.")
        if self._dtype not in (None, acts.dtype):
            raise ConfigError(
                f"dtype: expected blocks that put out {self._dtype}, as in the first batch, got {acts.dtype} in that "
                f"of example {span[0]}; give the dtype to store."
            )
        # The one before was written while this one was computed; the host holds no third.
        if self._writing is not None:
            self._writing.result()
        self._writing = self._pool.submit(self._write, self._to_host(acts), span[0], labels)

    def _to_host(self, acts: torch.Tensor) -> torch.Tensor:
        if self._copying is None:
            return acts.cpu().contiguous()
        acts = acts.contiguous()
        if len(self._pinned) < len(acts) or self._pinned.dtype != acts.dtype:
            self._pinned = torch.empty(acts.shape, dtype=acts.dtype, pin_memory=True)
        # What it held is written: that has been waited for.
        host = self._pinned[: len(acts)]
        self._copying.wait_stream(torch.cuda.current_stream(acts.device))
        with torch.cuda.stream(self._copying):
            host.copy_(acts, non_blocking=True)
        # The allocator must not hand this memory to the next forward pass while it is still being copied.
        acts.record_stream(self._copying)
        return host

    def _write(self, host: torch.Tensor, start: int, labels: torch.Tensor | None) -> None:
        # This batch is all that is copied now: the next one waits until it is written.
        if self._copying is not None:
            self._copying.synchronize()
        self._writer.write_batch(host, start, labels)
        # Of content tokens: a mask leaves the special one alone.
        self.norms.add(host[:, :, int(self._writer.md.cls_token) :])


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # One by one: `model.train()` would also wake parts that were frozen before.
        for module in training:
            module.training = True


def token_windows(
    texts: Iterable[Sequence[int]], n_content: int, *, prefix: Sequence[int] = (), suffix: Sequence[int] = ()
) -> torch.Tensor:
    """Cut tokenised texts of any length into windows of one length, so that no token is padding.

    The texts are joined, and what is left at the end is dropped.

    >>> token_windows([[5, 6, 7], [8, 9]], 2, prefix=[101], suffix=[102]).tolist()
    [[101, 5, 6, 102], [101, 7, 8, 102]]

    Args:
        texts: Vocabulary indices of each text.
        n_content: Tokens of the texts in one window: `content_tokens_per_example` of `record`.
        prefix: What the model expects in front of each window, for instance [CLS].
        suffix: What it expects behind each, for instance [SEP]; `record` leaves it out.

    Returns:
        [n_windows, len(prefix) + n_content + len(suffix)] int64.

    Raises:
        ConfigError: There is less text than one window, or something else than integers.
    """
    if not hasattr(n_content, "__index__") or n_content < 1:
        raise ConfigError(f"n_content: expected an integer of at least 1, got {short(n_content)}.")
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise _not_tokens("texts", texts)
    joined = torch.cat([torch.empty(0, dtype=torch.int64), *(_tokens("texts", text) for text in texts)])
    n_windows = len(joined) // n_content
    if not n_windows:
        raise ConfigError(f"texts: expected at least one window of {n_content} tokens, got {len(joined)} tokens.")
    content = joined[: n_windows * n_content].reshape(n_windows, n_content)
    ends = [_tokens(name, end).expand(n_windows, -1) for name, end in (("prefix", prefix), ("suffix", suffix))]
    return torch.cat([ends[0], content, ends[1]], dim=1)


def _tokens(name: str, text: Any) -> torch.Tensor:
    """One text as `[n] int64` vocabulary indices."""
    try:
        tokens = np.asarray(text.cpu() if isinstance(text, torch.Tensor) else text)
    except (TypeError, ValueError, RuntimeError) as err:
        raise _not_tokens(name, text) from err
    if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
        raise _not_tokens(name, text)
    return torch.from_numpy(tokens.astype(np.int64))


def _not_tokens(name: str, got: Any) -> ConfigError:
    return ConfigError(
        f"{name}: expected vocabulary indices, lists of integers, got {short(got)}; turn text into tokens first, as "
        "with tokenizer(texts)['input_ids']."
    )
