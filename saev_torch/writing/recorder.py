"""From a model and a data set to shards: `record`."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from saev_torch.format.sidecars import ATTENTION_MASK, TOKEN_IDS
from saev_torch.processes.launchers import announce
from saev_torch.processes.notices import Notices
from saev_torch.processes.world import find_world
from saev_torch.writing.incoming import check_dtype, check_on_overflow
from saev_torch.writing.progress import Progress
from saev_torch.writing.source import Batches, Source, Taps
from saev_torch.writing.stream import Stream
from saev_torch.writing.tokens import TokenIds, Tokens
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
    token_ids: TokenIds = None,
    padding: str = "refuse",
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
    set, so the loader must not shuffle. Writing a batch overlaps with computing the next one; two batches are held on
    the host. The model is in evaluation mode meanwhile, and builds no graph. From the second batch on a forward pass
    ends behind the last layer that is recorded, so that early layers of large models cost little; of the first one all
    blocks run. Compiled models, and such that are sharded over devices, run as a whole.

    Under torchrun each rank records its share of the batches, and the last one to finish publishes. Put each rank's
    model on its device beforehand.

    Where a few content tokens have norms of more than 20 medians, a warning names the mask that leaves them out.

    Args:
        model: Any module whose blocks put out [batch, tokens, d_model].
        dataloader: Yields what the model takes: a tensor, a mapping (passed as keywords), or a sequence of which the
            first is passed. Where a mapping has an `attention_mask`, it is 0 for padding.
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
        forward: Called with model and batch instead of the model itself. What it does behind the model's pass is not
            done where that ends early.
        labels: Gives [batch, content_tokens_per_example] integers for a batch, see `pixel_to_token_labels`.
        token_ids: Where the vocabulary indices of the recorded tokens come from, which are kept in token_ids.bin, and
            become the column `token_ids`: a key of the batches, where [batch, n_tokens] integers are; or a function
            that gives [batch, content_tokens_per_example] for a batch. None takes "input_ids" where there are such,
            False leaves them out.
        padding: What to do with padding among the tokens to record: "refuse" it, or "drop" it. Then zeros are stored
            for it, so that all examples have as many tokens, and attention_mask.npy in the directory tells it from
            tokens: give that as `mask=` to the configs. A warning says its path, and how much is padding.
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
    tokens = Tokens(cls_token, first, content_tokens_per_example, padding, token_ids, labels)
    source = Source(model, loader, taps, forward, tokens)
    start, stop = (loader.span(mine[0])[0], loader.span(mine[-1])[1]) if mine else (0, 0)
    shown = progress if progress is not None or world.rank == 0 else False
    # All the time: the first batch and publishing may take minutes, too.
    bar = Progress(stop - start, "recording", "examples", shown)
    with _evaluating(model), torch.inference_mode(), taps, bar:
        # A rank without any batch looks at the first of all, as it must know the directory's name.
        began = time.monotonic()
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
            if token_ids is None and writer.sidecars is not None and TOKEN_IDS not in writer.sidecars:
                # What is on disk was begun without them.
                tokens.token_ids = False
            todo = loader.touching(mine, writer.missing())
            # The first is computed already, and the writer looks whether what it has on disk is of these data.
            todo = todo if todo[:1] == [mine[0]] else [mine[0], *todo]
            bar.skip(stop - start - sum(high - low for low, high in map(loader.span, todo)))
            with Stream(writer, source.device, found if dtype is None else None) as stream:
                for i, recorded in source.compute(todo):
                    stream.write(recorded, loader.span(i))
                    bar.update(len(recorded.acts))
        bar.conclude(_overhead(time.monotonic() - began, source.clock.read()))
    if tokens.n_content:
        share, path = tokens.n_padding / tokens.n_content, writer.shards_dir / ATTENTION_MASK.name
        _log.warning("%.1f %% of the content tokens are padding; leave them out with mask=%r", 100 * share, str(path))
    if world.rank == 0:
        for line in stream.norms.advise(writer.shards_dir, md.layers):
            _log.warning("%s", line)
    return writer.shards_dir


def _overhead(spent_s: float, forward_s: float) -> str:
    """Say how long recording took, beside the forward passes that were run for it."""
    share = max(0.0, spent_s / max(forward_s, 1e-9) - 1)
    return f"{spent_s:.1f} s, {share:.0%} over the forward passes"


def _own_dtype(found: torch.dtype) -> str:
    """What is stored of a type that blocks put out, if nobody says."""
    name = str(found).removeprefix("torch.")
    return name if name in DTYPES else FLOAT32.name


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
