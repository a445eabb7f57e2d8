"""Hooks on the blocks of any transformer: what they put out, [CLS] and content tokens picked."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from saev_torch.errors import ConfigError
from saev_torch.format.files import short


def find_blocks(model: nn.Module, blocks: str | None = None) -> list[str]:
    """Find the blocks of a transformer, in order.

    Args:
        model: Any module.
        blocks: Name of the `ModuleList` or `Sequential` that holds them, for instance "visual.transformer.resblocks".
            By default the longest one whose members are all of one class, and of those the one with most parameters.

    Returns:
        Their names in `model.named_modules()`.

    Raises:
        ConfigError: There is none, or none of that name.
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


class Taps:
    """Hooks that keep what some blocks put out during one forward pass; they are there while the `with` block runs.

    Args:
        model: Any module.
        layers: Numbers of blocks, from 0, negative ones from the end; or names of modules by number.
        blocks: See `find_blocks`.
        batch_dim: Which dimension of a block's output is the batch, 0 or 1; the other one is tokens.

    Attributes:
        layers: The numbers, in the order in which they are recorded.

    Raises:
        ConfigError: There is no such block.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | Mapping[int, str],
        blocks: str | None = None,
        batch_dim: int = 0,
    ) -> None:
        self.layers = tuple(layers)
        self._batch_dim = batch_dim
        self._modules = [model.get_submodule(name) for name in _names(model, layers, blocks)]
        self._handles: list[Any] = []
        self._found: list[torch.Tensor | None] = []

    def __enter__(self) -> Self:
        """Put the hooks in."""
        for i, module in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(lambda *args, i=i: self._keep(i, args[2])))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the hooks out."""
        while self._handles:
            self._handles.pop().remove()

    def expect(self) -> None:
        """Forget what the last forward pass left."""
        self._found = [None] * len(self._modules)

    def take(self) -> torch.Tensor:
        """Return what the blocks put out since `expect`: [batch, n_layers, tokens, d_model] float32, on their device.

        Raises:
            ConfigError: A block did not run, or the blocks put out different shapes.
        """
        found, self._found = self._found, []
        outs = [out for out in found if out is not None]
        if len(outs) < len(found):
            layer = self.layers[found.index(None)]
            raise ConfigError(f"layers: expected layer {layer} to run in a forward pass, got none; name another.")
        if len({out.shape for out in outs}) > 1:
            shapes = {layer: list(out.shape) for layer, out in zip(self.layers, outs, strict=True)}
            raise ConfigError(f"layers: expected blocks of one shape, got {shapes}; record them one by one.")
        return torch.stack(outs, dim=1)

    def _keep(self, i: int, out: Any) -> None:
        out = getattr(out, "last_hidden_state", out)
        if isinstance(out, tuple | list) and out:
            out = out[0]
        if not isinstance(out, torch.Tensor) or out.ndim != 3:
            got = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ConfigError(f"layers: expected blocks that put out [batch, tokens, d_model], got {got}.")
        if self._found[i] is not None:
            raise ConfigError(f"layers: expected layer {self.layers[i]} to run once in a forward pass, got twice.")
        # A copy, because models may add the next block's output to this one in place.
        self._found[i] = out.detach().transpose(0, self._batch_dim).to(torch.float32, copy=True)


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
