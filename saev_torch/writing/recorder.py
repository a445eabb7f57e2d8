"""From a model and a data set to shards: `record`."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from saev_torch.errors import ConfigError
from saev_torch.format.metadata import Metadata, PixelAgg
from saev_torch.processes.world import find_world
from saev_torch.writing.progress import Progress
from saev_torch.writing.taps import Taps
from saev_torch.writing.writer import ShardWriter

__all__ = ["record", "token_windows"]


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
    progress: bool | None = None,
) -> Path:
    """Run a model over a data set and write what its blocks put out.

    Layer i is the output of block i, from 0: what transformers calls `hidden_states[i + 1]`. Example i is `dataset[i]`
    of the loader's data set, so the loader must not shuffle. Writing a batch overlaps with computing the next one; two
    batches are held on the host. The model is in evaluation mode meanwhile, and builds no graph.

    Under torchrun each rank records its share of the batches, and the last one to finish publishes. Put each rank's
    model on its device beforehand.

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
        resume: Continue a recording that was killed; batches that are on disk are not computed again.
        check_finite: Refuse NaN and infinity.
        progress: Draw a progress bar; None for where stderr is a terminal, in the first rank.

    Returns:
        The shard directory.

    Raises:
        ConfigError: The layers, the loader or the tokens do not fit the model.
        WriteError: The shards are there already, or could not be written.
    """
    world = find_world(None, None)
    loader = _Batches(dataloader)
    mine = range(len(loader) * world.rank // world.world_size, len(loader) * (world.rank + 1) // world.world_size)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    first = (int(cls_token) if first_content_token is None else first_content_token, content_tokens_per_example)
    taps = Taps(model, layers, blocks, batch_dim)

    def compute(batch: Any) -> torch.Tensor:
        batch = _to(batch, device)
        taps.expect()
        _run(model, batch, forward)
        acts = taps.take()
        tokens = _choose_tokens(acts.shape[2], cls_token, *first)
        _refuse_padding(batch, tokens)
        return acts[:, :, tokens] if len(tokens) < acts.shape[2] else acts

    with _evaluating(model), torch.inference_mode(), taps:
        # The first batch also tells the shapes; a rank without any batch looks at the first of all.
        (probe_batch,) = loader.load([mine.start if mine else 0])
        probe = compute(probe_batch)
        md = Metadata(
            family=family,
            ckpt=ckpt,
            layers=taps.layers,
            content_tokens_per_example=probe.shape[2] - int(cls_token),
            cls_token=cls_token,
            d_model=probe.shape[3],
            n_examples=loader.n_examples,
            max_tokens_per_shard=max_tokens_per_shard,
            data=data,
            dataset=Path(dataset),
            pixel_agg=pixel_agg,
        )
        if not mine:
            return Path(shards_root) / md.hash
        bounds = (loader.span(mine[0])[0], loader.span(mine[-1])[1])
        options: dict[str, Any] = {"check_finite": check_finite}
        if world.world_size > 1:
            options["example_range"] = bounds
        with ShardWriter(Path(shards_root), md, resume, **options) as writer:
            todo = [i for i in mine if _intersects(loader.span(i), writer.missing())]
            done = bounds[1] - bounds[0] - sum(stop - start for start, stop in map(loader.span, todo))
            shown = progress if progress is not None or world.rank == 0 else False
            with (
                _Stream(writer, device) as stream,
                Progress(bounds[1] - bounds[0], "recording", "examples", shown, done) as bar,
            ):
                rest = todo[1:] if todo[:1] == [mine.start] else todo
                batches: Iterable[Any] = loader.load(rest)
                if rest != todo:
                    stream.write(probe, loader.span(mine.start), None if labels is None else labels(probe_batch))
                    bar.update(len(probe))
                del probe, probe_batch
                for i, batch in zip(rest, batches, strict=True):
                    acts = compute(batch)
                    stream.write(acts, loader.span(i), None if labels is None else labels(batch))
                    bar.update(len(acts))
    return writer.shards_dir


class _Batches:
    """The batches of a loader by number, so that ranks and resumed runs load only their own."""

    def __init__(self, dataloader: "DataLoader[Any]") -> None:
        if not isinstance(dataloader, DataLoader) or isinstance(dataloader.dataset, IterableDataset):
            raise ConfigError("dataloader: expected a DataLoader on a data set with len() and [i], got something else.")
        if not isinstance(dataloader.sampler, SequentialSampler) or dataloader.batch_size is None:
            raise ConfigError(
                "dataloader: expected batches in the order of the data set, got another sampler; use "
                "DataLoader(dataset, batch_size=...) without shuffle, which is what example_idx refers to."
            )
        self._loader = dataloader
        self._batch_size: int = dataloader.batch_size
        self.n_examples = len(dataloader.dataset)  # type: ignore[arg-type]
        if not self.n_examples:
            raise ConfigError("dataloader: expected at least one example, got an empty data set.")

    def __len__(self) -> int:
        return -(-self.n_examples // self._batch_size)

    def span(self, i: int) -> tuple[int, int]:
        """Return the first example of a batch, and the one behind its last."""
        return i * self._batch_size, min((i + 1) * self._batch_size, self.n_examples)

    def load(self, numbers: Sequence[int]) -> Iterator[Any]:
        """Yield the batches of these numbers."""
        old = self._loader
        # One batch is not worth starting workers for.
        workers = old.num_workers if len(numbers) > 1 else 0
        options: dict[str, Any] = {} if not workers else {
            "multiprocessing_context": old.multiprocessing_context,
            "prefetch_factor": old.prefetch_factor,
            "timeout": old.timeout,
            "worker_init_fn": old.worker_init_fn,
        }  # fmt: skip
        return iter(
            DataLoader(
                old.dataset,
                batch_sampler=[list(range(*self.span(i))) for i in numbers],
                num_workers=workers,
                collate_fn=old.collate_fn,
                pin_memory=old.pin_memory,
                **options,
            )
        )


class _Stream:
    """Writes batches in a thread, one behind the model: two are held on the host."""

    def __init__(self, writer: ShardWriter, device: torch.device) -> None:
        self._writer = writer
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._hosts: list[torch.Tensor] = []
        self._futures: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="record")

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        try:
            for future in self._futures if exc_type is None else []:
                future.result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, acts: torch.Tensor, span: tuple[int, int], labels: torch.Tensor | None) -> None:
        if len(acts) != span[1] - span[0]:
            raise ConfigError(f"model: expected {span[1] - span[0]} examples from a batch, got {len(acts)}.")
        # The one before was written while this one was computed; the host holds no third.
        while self._futures:
            self._futures.pop(0).result()
        host, ready = self._to_host(acts)
        self._futures.append(self._pool.submit(self._write, host, ready, span[0], labels))

    def _to_host(self, acts: torch.Tensor) -> tuple[torch.Tensor, "torch.cuda.Event | None"]:
        if self._copying is None:
            return acts.cpu().contiguous(), None
        acts = acts.contiguous()
        if len(self._hosts) < 2 or self._hosts[0].shape[0] < len(acts):
            self._hosts.append(torch.empty(acts.shape, dtype=torch.float32, pin_memory=True))
        else:
            # The one that was written longest ago; its write has been waited for.
            self._hosts.append(self._hosts.pop(0))
        host = self._hosts[-1][: len(acts)]
        self._copying.wait_stream(torch.cuda.current_stream(acts.device))
        with torch.cuda.stream(self._copying):
            host.copy_(acts, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(self._copying)
        # The allocator must not hand this memory to the next forward pass while it is still being copied.
        acts.record_stream(self._copying)
        return host, ready

    def _write(
        self, host: torch.Tensor, ready: "torch.cuda.Event | None", start: int, labels: torch.Tensor | None
    ) -> None:
        if ready is not None:
            ready.synchronize()
        self._writer.write_batch(host, start, labels)


def _choose_tokens(n_tokens: int, cls_token: bool, first: int, n_content: int | None) -> list[int]:
    n_content = n_tokens - first if n_content is None else n_content
    if n_content < 1 or first < int(cls_token) or first + n_content > n_tokens:
        raise ConfigError(
            f"content_tokens_per_example: expected content tokens {first}..{first + n_content} among the {n_tokens} "
            "that the blocks put out; give content_tokens_per_example and first_content_token."
        )
    return [0] * cls_token + list(range(first, first + n_content))


def _refuse_padding(batch: Any, tokens: list[int]) -> None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, tokens].all()):
        raise ConfigError(
            "dataloader: expected tokens only, got padding among those to record (attention_mask is 0); cut the text "
            "into windows of one length, see token_windows."
        )


def _intersects(span: tuple[int, int], ranges: list[tuple[int, int]]) -> bool:
    return any(span[0] < stop and start < span[1] for start, stop in ranges)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_to(value, device) for value in batch]
    return batch


def _run(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], object] | None) -> None:
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, list) else batch)


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
        ConfigError: There is less text than one window.
    """
    joined = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    n_windows = len(joined) // n_content if n_content > 0 else 0
    if not n_windows:
        raise ConfigError(f"texts: expected at least one window of {n_content} tokens, got {len(joined)} tokens.")
    content = joined[: n_windows * n_content].reshape(n_windows, n_content)
    ends = [torch.tensor(list(end), dtype=torch.int64).expand(n_windows, len(end)) for end in (prefix, suffix)]
    return torch.cat([ends[0], content, ends[1]], dim=1)
