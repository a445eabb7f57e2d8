"""What the blocks of any transformer put out for the batches of a loader, by their numbers: only what is missing."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from saev_torch.errors import ConfigError
from saev_torch.format.files import short
from saev_torch.format.plain import as_plain
from saev_torch.writing.tokens import Recorded, Tokens


class Batches:
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

    def touching(self, numbers: Iterable[int], ranges: list[tuple[int, int]]) -> list[int]:
        """Pick the batches with examples in these ranges."""
        spans = {i: self.span(i) for i in numbers}
        return [i for i, span in spans.items() if any(span[0] < stop and start < span[1] for start, stop in ranges)]

    def load(self, numbers: Sequence[int]) -> Iterator[Any]:
        """Yield the batches of these numbers."""
        old = self._loader
        # One batch is not worth starting workers for.
        workers = old.num_workers if len(numbers) > 1 else 0
        names = ("multiprocessing_context", "prefetch_factor", "timeout", "worker_init_fn") if workers else ()
        options: dict[str, Any] = {name: getattr(old, name) for name in ("collate_fn", "pin_memory", *names)}
        batches = [list(range(*self.span(i))) for i in numbers]
        return iter(DataLoader(old.dataset, batch_sampler=batches, num_workers=workers, **options))


def find_blocks(model: nn.Module, blocks: str | None = None) -> list[str]:
    """Return the names of the blocks of a transformer, in order.

    They are the members of the `ModuleList` or `Sequential` named `blocks`, by default of the longest one whose members
    are all of one class, and of those the one with most parameters.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    if blocks is None:
        alike = [name for name, members in lists.items() if len({type(member) for member in members}) == 1]
        if not alike:
            raise ConfigError(
                f"blocks: expected a list of blocks in the model, found none in {type(model).__name__}; "
                "name the modules, as in layers={6: 'encoder.layers.6'}."
            )
        blocks = max(alike, key=lambda name: (len(lists[name]), sum(p.numel() for p in lists[name].parameters())))
    elif blocks not in lists:
        raise ConfigError(f"blocks: expected the name of a ModuleList or Sequential of the model, got {blocks!r}.")
    return [f"{blocks}.{member}" if blocks else member for member, _ in lists[blocks].named_children()]


def _names(model: nn.Module, layers: Sequence[int] | Mapping[int, str], blocks: str | None) -> list[str]:
    if not layers:
        raise ConfigError("layers: expected one or more, got none.")
    if isinstance(layers, Mapping):
        modules = dict(model.named_modules())
        for name in layers.values():
            if name not in modules:
                raise ConfigError(f"layers: expected names of modules of the model, got {short(name)}.")
        return list(layers.values())
    names = find_blocks(model, blocks)
    for layer in layers:
        if not -len(names) <= layer < len(names):
            raise ConfigError(
                f"layers: expected numbers of blocks in -{len(names)}..{len(names) - 1}, got {layer}; "
                f"the blocks are {names[0]} to {names[-1]}."
            )
    chosen = [names[layer] for layer in layers]
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"layers: expected each block once, got {list(layers)} of {len(names)} blocks.")
    return chosen


class _Enough(BaseException):
    """Ends a forward pass when all that is recorded has been put out. No `Exception`, which models may catch."""


# Modules that must not be left in the middle: they would be compiled anew, or stay as they are in it.
_WHOLE = {"OptimizedModule", "ScriptModule", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}


def _may_leave(model: nn.Module) -> bool:
    return not any(
        module._compiled_call_impl is not None or _WHOLE & {base.__name__ for base in type(module).__mro__}
        for module in model.modules()
    )


class Taps:
    """Hooks that keep what some blocks put out during one forward pass; they are there while the `with` block runs.

    A pass ends when all of them have run, but the first one, which shows whether they run once. That one ends where
    the model of transformers without its head does, if there is such and they are in it.

    The arguments are those of `record`; `layers` are the numbers, in the order in which they are recorded.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] | Mapping[int, str], blocks: str | None, batch_dim: int
    ) -> None:
        layers = layers if isinstance(layers, Mapping) else as_plain(layers)
        self.layers = tuple(layers)
        self._batch_dim = batch_dim
        self._modules = [model.get_submodule(name) for name in _names(model, layers, blocks)]
        self._handles: list[Any] = []
        self._is_first, self._may_leave = True, _may_leave(model)
        base = getattr(model, "base_model", None) if hasattr(model, "get_output_embeddings") else None
        is_around = isinstance(base, nn.Module) and base is not model and {*self._modules} <= {*base.modules()}
        self._base = base if is_around else None
        self._found: list[torch.Tensor | None] = []

    def __enter__(self) -> Self:
        for i, module in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(lambda *args, i=i: self._keep(i, args[2])))
        if self._base is not None:
            self._handles.append(self._base.register_forward_hook(lambda *args: self._leave()))
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Forget what the last forward pass left, and end the next one, in the `with` block, early."""
        self._found = [None] * len(self._modules)
        with contextlib.suppress(_Enough):
            yield
        self._is_first = False

    def take(self) -> torch.Tensor:
        """Return what the blocks put out in that pass: [batch, n_layers, tokens, d_model], where they are.

        Their type is that of the blocks, or the smallest that holds what several of them are.
        """
        found, self._found = self._found, []
        outs = [out for out in found if out is not None]
        if len(outs) < len(found):
            layer = self.layers[found.index(None)]
            raise ConfigError(f"layers: expected layer {layer} to run in a forward pass, got none; name another.")
        if len({out.shape for out in outs}) > 1:
            shapes = {layer: list(out.shape) for layer, out in zip(self.layers, outs, strict=True)}
            raise ConfigError(f"layers: expected blocks of one shape, got {shapes}; record them one by one.")
        dtype = functools.reduce(torch.promote_types, [out.dtype for out in outs])
        return torch.stack([out.to(dtype) for out in outs], dim=1)

    def _keep(self, i: int, out: Any) -> None:
        out = getattr(out, "last_hidden_state", out)
        if isinstance(out, tuple | list) and out:
            out = out[0]
        if isinstance(out, torch.Tensor) and (out.is_nested or out.layout != torch.strided):
            kind = "nested ones" if out.is_nested else out.layout
            raise ConfigError(
                f"layers: expected blocks that put out dense tensors, got {kind}; nn.TransformerEncoder makes such of "
                "padded batches: build it with enable_nested_tensor=False."
            )
        if not isinstance(out, torch.Tensor) or out.ndim != 3:
            got = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ConfigError(f"layers: expected blocks that put out [batch, tokens, d_model], got {got}.")
        if self._found[i] is not None:
            raise ConfigError(f"layers: expected layer {self.layers[i]} to run once in a forward pass, got twice.")
        # A copy, because models may add the next block's output to this one in place.
        dtype = out.dtype if out.is_floating_point() else torch.float32
        self._found[i] = out.detach().transpose(0, self._batch_dim).to(dtype, copy=True)
        if not self._is_first:
            self._leave()

    def _leave(self) -> None:
        """End the forward pass if all has been put out, and the model can be left in the middle."""
        if self._may_leave and not any(found is None for found in self._found):
            raise _Enough


class Clock:
    """How long forward passes took, in seconds; on a GPU by its own clock."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda, self._total_s = device.type == "cuda", 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time what is done in the `with` block."""
        if not self._is_cuda:
            began = time.monotonic()
            try:
                yield
            finally:
                self._total_s += time.monotonic() - began
            return
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        try:
            yield
        finally:
            stop.record()
            self._events.append((start, stop))

    def read(self) -> float:
        """How long all of them took."""
        for start, stop in self._events:
            stop.synchronize()
            self._total_s += start.elapsed_time(stop) / 1000
        self._events.clear()
        return self._total_s


class Source:
    """What is recorded of batches by number; `clock` times the forward passes."""

    def __init__(
        self, model: nn.Module, loader: Batches, taps: Taps, forward: Callable[..., object] | None, tokens: Tokens
    ) -> None:
        self.device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self.clock = Clock(self.device)
        self._model, self._loader, self._taps, self._forward, self._tokens = model, loader, taps, forward, tokens
        self._peeked: list[tuple[int, Recorded]] = []

    def peek(self, i: int) -> tuple[torch.Size, torch.dtype]:
        """Return shape and type of the activations of a batch, which are kept: it need not be computed again."""
        (batch,) = self._loader.load([i])
        recorded = self._run(batch)
        self._peeked = [(i, recorded)]
        return recorded.acts.shape, recorded.acts.dtype

    def compute(self, numbers: list[int]) -> Iterator[tuple[int, Recorded]]:
        """Yield the number and what is recorded of each of these batches."""
        is_peeked = numbers[:1] == [i for i, _ in self._peeked]
        rest = numbers[is_peeked:]
        batches = self._loader.load(rest)
        if is_peeked:
            yield self._peeked.pop()
        self._peeked.clear()
        for i, batch in zip(rest, batches, strict=True):
            yield i, self._run(batch)

    def _run(self, given: Any) -> Recorded:
        batch = _to(given, self.device)
        with self._taps.expecting(), self.clock.running():
            if self._forward is not None:
                self._forward(self._model, batch)
            elif isinstance(batch, Mapping):
                self._model(**batch)
            else:
                self._model(batch[0] if isinstance(batch, list) else batch)
        return self._tokens.record(self._taps.take(), given)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_to(value, device) for value in batch]
    return batch
