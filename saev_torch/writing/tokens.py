"""Which tokens of a batch are recorded, and what is written beside their activations: labels, token ids, padding."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from saev_torch.errors import ConfigError
from saev_torch.format.files import short

TokenIds = str | bool | Callable[[Any], torch.Tensor] | None
"""Where token ids come from: a key of a batch, a function of it; None for `input_ids` where there are such."""


class Recorded(NamedTuple):
    """What is recorded of a batch.

    Attributes:
        acts: [batch, n_layers, tokens, d_model], of the type that blocks put out, on the model's device.
        labels, token_ids, attention_mask: [batch, content_tokens_per_example] each, None where there are none.
    """

    acts: torch.Tensor
    labels: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None


@dataclasses.dataclass
class Tokens:
    """Which tokens of a block's output are recorded: the first if it is [CLS], and content from another one on.

    The arguments are those of `record`. `n_content` and `n_padding` count content tokens that were recorded, and those
    of them that are padding.
    """

    cls_token: bool
    first: int
    content_tokens_per_example: int | None = None
    padding: str = "refuse"
    token_ids: TokenIds = None
    labels: Callable[[Any], torch.Tensor] | None = None
    n_content: int = 0
    n_padding: int = 0

    def __post_init__(self) -> None:
        if self.padding not in ("refuse", "drop"):
            raise ConfigError(f"padding: expected 'refuse' or 'drop', got {short(self.padding)}.")
        is_known = self.token_ids is None or self.token_ids is False or isinstance(self.token_ids, str)
        if not is_known and not callable(self.token_ids):
            raise ConfigError(
                f"token_ids: expected a key of the batches, a function of a batch, None or False, got "
                f"{short(self.token_ids)}."
            )

    def record(self, acts: torch.Tensor, batch: Any) -> Recorded:
        """Choose from `[batch, n_layers, n_tokens, d_model]`, what blocks put out for a batch of the loader."""
        n_tokens = acts.shape[2]
        chosen = self._choose(n_tokens)
        mask = self._find_mask(n_tokens, chosen, batch)
        if len(chosen) < n_tokens:
            acts = acts[:, :, chosen]
        content = chosen[self.cls_token :]
        if mask is not None:
            # What a model puts out for padding means nothing, and may be no numbers at all.
            acts.masked_fill_(~mask.to(acts.device)[:, None, :, None], 0)
            mask = mask[:, self.cls_token :]
            self.n_content += mask.numel()
            self.n_padding += int((~mask).sum())
        labels = None if self.labels is None else self.labels(batch)
        return Recorded(acts, labels, self._find_ids(n_tokens, content, batch), mask)

    def _choose(self, n_tokens: int) -> list[int]:
        """The indices of the recorded tokens among those of a block's output."""
        n_content = n_tokens - self.first
        if self.content_tokens_per_example is not None:
            n_content = self.content_tokens_per_example
        stop = self.first + n_content
        if n_content < 1 or self.first < int(self.cls_token) or stop > n_tokens:
            raise ConfigError(
                f"content_tokens_per_example: expected content tokens {self.first}..{stop} among the {n_tokens} "
                "that the blocks put out; give content_tokens_per_example and first_content_token."
            )
        return [0] * self.cls_token + list(range(self.first, stop))

    def _find_mask(self, n_tokens: int, chosen: list[int], batch: Any) -> torch.Tensor | None:
        """Which recorded tokens are no padding, `[batch, tokens] bool`; None where there may be none."""
        mask = _look_up(batch, "attention_mask")
        if self.padding == "refuse":
            if mask is not None and not bool(mask[:, chosen].all()):
                raise ConfigError(
                    "dataloader: expected tokens only, got padding among those to record (attention_mask is 0); cut "
                    "the text into windows of one length, see token_windows, or record it with padding='drop'."
                )
            return None
        if mask is None or mask.shape[1] != n_tokens:
            got = "none" if mask is None else list(mask.shape)
            raise ConfigError(
                f"padding: expected batches with an attention_mask [batch, {n_tokens}], because of 'drop', got {got}; "
                "a tokenizer makes it with padding=True."
            )
        kept: torch.Tensor = mask[:, chosen].cpu() != 0
        if self.cls_token and not bool(kept[:, 0].all()):
            raise ConfigError(
                "padding: expected token 0 to be [CLS] in all examples, got padding there; pad behind the text, not in "
                "front (tokenizer.padding_side = 'right')."
            )
        return kept

    def _find_ids(self, n_tokens: int, content: list[int], batch: Any) -> torch.Tensor | None:
        where = self.token_ids
        if where is False:
            return None
        if callable(where):
            return where(batch)
        key = where if isinstance(where, str) else "input_ids"
        ids = _look_up(batch, key)
        if ids is not None and ids.shape[1] == n_tokens and not ids.is_floating_point():
            return ids[:, content]
        if where is None:
            # Of images, or of text that the model puts something in front of.
            return None
        got = "none" if ids is None else f"{ids.dtype} {list(ids.shape)}"
        raise ConfigError(f"token_ids: expected integers [batch, {n_tokens}] in batch[{short(key)}], got {got}.")


def _look_up(batch: Any, key: str) -> torch.Tensor | None:
    """The tensor of two dimensions that a batch has under a key, if there is such."""
    found = batch.get(key) if isinstance(batch, Mapping) else None
    return found if isinstance(found, torch.Tensor) and found.ndim == 2 else None
