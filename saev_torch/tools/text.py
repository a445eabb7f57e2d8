"""The text of examples, from their token ids and the tokenizer that made them."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from saev_torch.errors import ConfigError
from saev_torch.format.files import short
from saev_torch.format.sidecars import ATTENTION_MASK, TOKEN_IDS
from saev_torch.reading.columns import Column
from saev_torch.reading.store import ShardStore

_EXTRA = "demo"


def show_text(store: ShardStore, tokenizer: str, example: int) -> str:
    """Decode the content tokens of an example, but for padding.

    Args:
        store: The shards.
        tokenizer: A name or folder for `AutoTokenizer` of transformers, or a tokenizer.json.
        example: Number of the example.

    Raises:
        ConfigError: There are no token ids, no such example or tokenizer, or the extra is not installed.
    """
    n_examples = store.metadata.n_examples
    if not store.has_token_ids:
        raise ConfigError(
            f"--tokenizer: expected shards with {TOKEN_IDS.name}, got {store.shards_dir} without; record them anew, "
            "with input_ids in the batches or token_ids=."
        )
    if not 0 <= example < n_examples:
        raise ConfigError(f"--example: expected an integer from 0 to {n_examples - 1}, got {example}.")
    decode = _load(tokenizer)
    with contextlib.closing(store.clone()) as opened:
        ids = Column(opened, TOKEN_IDS).of_examples(np.array([example]))[0]
        if ATTENTION_MASK in store.sidecars:
            ids = ids[Column(opened, ATTENTION_MASK).of_examples(np.array([example]))[0].view(np.uint8) != 0]
    try:
        return decode(ids.tolist())
    except (OverflowError, TypeError, IndexError) as err:
        raise ConfigError(
            f"--tokenizer: expected one that knows the token ids of example {example}, from {ids.min()} to "
            f"{ids.max()}, got {short(tokenizer)}; give that of the model."
        ) from err


def _load(tokenizer: str) -> Callable[[list[int]], str]:
    """Load what decodes token ids; no code that comes with a tokenizer is run."""
    try:
        if Path(tokenizer).is_file():
            from tokenizers import Tokenizer

            decode: Callable[[list[int]], str] = Tokenizer.from_file(tokenizer).decode
        else:
            from transformers import AutoTokenizer

            is_local = os.path.isdir(tokenizer)
            decode = AutoTokenizer.from_pretrained(tokenizer, local_files_only=is_local, trust_remote_code=False).decode
    except ImportError as err:
        raise ConfigError(
            f"--tokenizer: expected the package {err.name}, got none; pip install 'saev_torch[{_EXTRA}]'."
        ) from err
    except Exception as err:
        # The packages raise nothing more special.
        raise ConfigError(
            f"--tokenizer: expected a tokenizer of transformers or a tokenizer.json, got {short(tokenizer)} ({err})."
        ) from err
    return decode
