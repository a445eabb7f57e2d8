"""Shard directories whose values say where they come from, written without any code of the package.

`act[e, l, t, k] = 1000*e + 100*l + t + k/64` for example `e`, layer index `l`, stored token `t` (0 is [CLS] where there
is one) and dimension `k`; `label[e, c] = (3*e + 5*c) % 7` for content token `c`. Values of 16 bits cannot hold that:
their bits follow from their place, see `oracle_bits`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# The content tokens of an example, the examples, and the budget of a shard.
_NAMES = {
    "patches": ("patches_per_ex", "n_ex", "patches_per_shard"),
    "n_content": ("n_content_tokens_per_example", "n_examples", "max_tokens_per_shard"),
    "today": ("content_tokens_per_example", "n_examples", "max_tokens_per_shard"),
}


class Geometry(Protocol):
    """What `oracle` needs to know; `Spec` and `saev_torch.Metadata` both have it."""

    @property
    def n_examples(self) -> int: ...
    @property
    def layers(self) -> Sequence[int]: ...
    @property
    def content_tokens_per_example(self) -> int: ...
    @property
    def cls_token(self) -> bool: ...
    @property
    def d_model(self) -> int: ...
    @property
    def dtype(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """One shard directory to make. The defaults: several layers and shards, [CLS], labels, a padded last file."""

    n_examples: int = 11
    content_tokens: int = 6
    cls: bool = True
    layers: tuple[int, ...] = (3, 7)
    d_model: int = 8
    examples_per_shard: int = 4
    labels: bool = True
    preallocate_last: bool = True
    """The last file has room for `examples_per_shard` examples, zeros behind its own; else just its examples."""
    trailing_empty: bool | None = None
    """A file without examples follows. None: exactly where saev's writer leaves one, behind an exact multiple."""
    protocol: str = "2.1"
    dtype: str = "float32"
    data: Any = None
    """The value of the key `data` in metadata.json; None for one that suits the protocol."""
    names: str = "today"
    """How protocol 2.0 calls its fields: "patches", "n_content" or "today"."""
    pixel_agg: str | None = "majority"
    """From protocol 2.0 on; "" for no such key."""
    has_dataset: bool = True
    """From protocol 2.0 on, whether there is that key."""

    @property
    def content_tokens_per_example(self) -> int:
        return self.content_tokens

    @property
    def cls_token(self) -> bool:
        return self.cls

    @property
    def tokens_per_example(self) -> int:
        return self.content_tokens + self.cls

    @property
    def max_tokens_per_shard(self) -> int:
        # One short of what another example would take, so that the division has to round down.
        return (self.examples_per_shard + 1) * self.tokens_per_example * len(self.layers) - 1

    def metadata(self) -> dict[str, Any]:
        """Return the object of metadata.json, keys in the order in which saev writes them."""
        if self.protocol[0] == "2":
            content, examples, budget = _NAMES[self.names]
            data = "b3BhcXVl" if self.protocol == "2.1" else {"root": "/data", "__class__": "ImgFolder"}
            obj = {
                "family": "clip",
                "ckpt": "ViT-B-16/openai",
                "layers": list(self.layers),
                content: self.content_tokens,
                "cls_token": self.cls,
                "d_model": self.d_model,
                examples: self.n_examples,
                budget: self.max_tokens_per_shard,
                "data": data if self.data is None else self.data,
                "dataset": "/data/images",
                "pixel_agg": self.pixel_agg,
                "dtype": self.dtype,
                "protocol": self.protocol,
            }
            lacks = ["dataset"] * (not self.has_dataset) + ["pixel_agg"] * (self.pixel_agg == "")
            return {key: value for key, value in obj.items() if key not in lacks}
        data = "Imagenet(name='x')" if self.protocol == "1.0.0" else {"root": "/data", "__class__": "ImageFolder"}
        return {
            "vit_family": "clip",
            "vit_ckpt": "ViT-B-32/openai",
            "layers": list(self.layers),
            "n_patches_per_img": self.content_tokens,
            "cls_token": self.cls,
            "d_vit": self.d_model,
            "n_imgs": self.n_examples,
            "max_patches_per_shard": self.max_tokens_per_shard,
            "data": data if self.data is None else self.data,
            "dtype": "float32",
            "protocol": self.protocol,
        }

    def hash(self) -> str:
        """Return the directory's name: 2.1 hashes the keys as they are ordered, the older ones sort them."""
        is_old = self.protocol != "2.1"
        raw = json.dumps(self.metadata(), separators=(",", ":"), sort_keys=is_old, ensure_ascii=is_old)
        digest = hashlib.sha256(raw.encode()).hexdigest()
        # The first days of 2.1 had no pixel_agg but for segmented images, and names of full length.
        return digest if is_old or not self.pixel_agg else digest[:8]

    def shards(self) -> list[tuple[str, int]]:
        """Return the table of shards.json as (name, examples)."""
        counts = [
            min(self.examples_per_shard, self.n_examples - start)
            for start in range(0, self.n_examples, self.examples_per_shard)
        ]
        is_multiple = self.n_examples % self.examples_per_shard == 0
        if is_multiple if self.trailing_empty is None else self.trailing_empty:
            counts.append(0)
        return [(f"acts{i:06d}.bin", count) for i, count in enumerate(counts)]


def oracle(md: Geometry) -> npt.NDArray[np.float32]:
    """Return every activation, [n_examples, n_layers, tokens_per_example, d_model], by the formula, as float32."""
    if md.dtype != "float32":
        return to_float32(oracle_bits(md), md.dtype)
    shape = _shape(md)
    e, layer, t, k = np.ogrid[tuple(slice(n) for n in shape)]
    acts = 1000 * e + 100 * layer + t + k / 64
    exact: npt.NDArray[np.float32] = acts.astype(np.float32)
    if not np.array_equal(exact, acts):
        raise ValueError(f"float32 cannot hold the formula at shape {shape}; use fewer examples (262 are safe)")
    return exact


def _shape(md: Geometry) -> tuple[int, int, int, int]:
    return md.n_examples, len(md.layers), md.content_tokens_per_example + md.cls_token, md.d_model


def oracle_bits(md: Geometry) -> npt.NDArray[np.uint16]:
    """Return every activation of a 16-bit type as its bits: normal numbers of both signs, others in each row."""
    shape = _shape(md)
    mixed = np.arange(np.prod(shape, dtype=np.int64)) * 9973
    bits: npt.NDArray[np.uint16] = (0x3000 + mixed % 0x2000 | (mixed >> 13 & 1) << 15).astype("<u2")
    return bits.reshape(shape)


def to_float32(bits: npt.NDArray[np.uint16], dtype: str) -> npt.NDArray[np.float32]:
    """Return the values that bits of a 16-bit type stand for, by numpy alone."""
    values: npt.NDArray[np.float32]
    values = bits.view("<f2").astype("<f4") if dtype == "float16" else (bits.astype("<u4") << 16).view("<f4")
    return values


def oracle_labels(md: Geometry) -> npt.NDArray[np.uint8]:
    """Return every label, [n_examples, content_tokens_per_example] uint8, by the formula."""
    e, c = np.ogrid[: md.n_examples, : md.content_tokens_per_example]
    labels: npt.NDArray[np.uint8] = ((3 * e + 5 * c) % 7).astype(np.uint8)
    return labels


def make_shards(root: Path, spec: Spec | None = None, **fields: Any) -> Path:
    """Write the directory `root/<hash>` for a spec, or for the fields of one, and return it."""
    spec = dataclasses.replace(spec or Spec(), **fields)
    shards_dir = root / spec.hash()
    shards_dir.mkdir(parents=True)
    # saev wrote metadata.json with an indent of 4 before protocol 2.1.
    indent = 2 if spec.protocol == "2.1" else 4
    (shards_dir / "metadata.json").write_text(json.dumps(spec.metadata(), indent=indent))
    key = _NAMES[spec.names][1] if spec.protocol[0] == "2" else "n_imgs"
    entries = [{"name": name, key: n_examples} for name, n_examples in spec.shards()]
    (shards_dir / "shards.json").write_text(json.dumps(entries, indent=2))
    acts = oracle(spec) if spec.dtype == "float32" else oracle_bits(spec)
    start = 0
    for name, n_examples in spec.shards():
        is_full_size = spec.preallocate_last or n_examples == spec.examples_per_shard
        rows = np.zeros((spec.examples_per_shard if is_full_size else n_examples, *acts.shape[1:]), acts.dtype)
        rows[:n_examples] = acts[start : start + n_examples]
        rows.tofile(shards_dir / name)
        start += n_examples
    if spec.labels:
        oracle_labels(spec).tofile(shards_dir / "labels.bin")
    return shards_dir


def write_acts(shards_dir: Path, acts: npt.NDArray[Any]) -> None:
    """Replace the activations of a directory by `[n_examples, n_layers, tokens_per_example, d_model]` others.

    They are of the type that is stored, as float32 or as bits.
    """
    start = 0
    for shard in json.loads((shards_dir / "shards.json").read_text()):
        path = shards_dir / shard["name"]
        rows = np.fromfile(path, acts.dtype).reshape(-1, *acts.shape[1:])
        rows[: shard["n_examples"]] = acts[start : start + shard["n_examples"]]
        rows.tofile(path)
        start += shard["n_examples"]
