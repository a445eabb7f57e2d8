"""metadata.json: what produced the activations of a shard directory, and the geometry of its files.

Protocols 1.0.0, 1.1, 2.0 and 2.1 are read; only 2.1 is written. The older ones have other names for the same fields,
see `protocols`, and a `Metadata` always has the names of 2.1.
"""

import dataclasses
import enum
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

import orjson

from saev_torch.errors import FormatError, ShardsNotFoundError, UntrustedError, WriteError
from saev_torch.format.dtypes import DTYPES, FLOAT32, ValueType, loaded_type
from saev_torch.format.files import NOT_SAVED, folders_with, read_json, short, write_atomic, writing
from saev_torch.format.plain import as_plain
from saev_torch.format.protocols import PROTOCOL, check_protocol, name_of_directory, read_fields

METADATA_NAME = "metadata.json"

MAX_NBYTES = 1 << 62
"""Bound of any size in bytes and of any count, so that no sum or product of offsets leaves int64."""


class PixelAgg(enum.Enum):
    """How the labels of an example's pixels became one label for each content token."""

    MAJORITY = "majority"
    PREFER_FG = "prefer-fg"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """Which activations a shard directory holds, and how they are laid out.

    Attributes:
        family: Transformer family, for instance "clip" or "dinov3".
        ckpt: Checkpoint of the transformer.
        layers: Recorded layers, in file order; may be negative.
        content_tokens_per_example: Tokens of an example, without [CLS].
        cls_token: Whether token 0 of each example is [CLS].
        d_model: Width of one activation.
        n_examples: Examples in all shards.
        max_tokens_per_shard: Budget of activations (token x layer) in one shard file.
        data: Opaque description of the source data set; carried, and never unpickled.
        dataset: Root of the source data set; `Path()` where the protocol has none.
        pixel_agg: How pixel labels became token labels.
        dtype: Type of the stored values, little-endian: "float32", "float16" or "bfloat16"; before protocol 2.1 always
            "float32".
        protocol: "1.0.0", "1.1", "2.0" or "2.1".

    Raises:
        FormatError: A field has another type, is out of range, or the fields do not fit each other.
    """

    family: str
    ckpt: str
    layers: tuple[int, ...]
    content_tokens_per_example: int
    cls_token: bool
    d_model: int
    n_examples: int
    max_tokens_per_shard: int
    data: str
    dataset: Path
    pixel_agg: PixelAgg = PixelAgg.MAJORITY
    dtype: str = "float32"
    protocol: str = PROTOCOL
    # Older hashes cover the JSON object as it was written, which these fields cannot give back. It is no field, so that
    # `replace` drops it, and `asdict` does not show it.
    _recorded_hash: ClassVar[str | None] = None

    if TYPE_CHECKING:
        # Fields take more than they hold.
        # fmt: off
        def __init__(
            self, *, family: str, ckpt: str, layers: Sequence[int], content_tokens_per_example: int, cls_token: bool,
            d_model: int, n_examples: int, max_tokens_per_shard: int, data: str, dataset: Path | str,
            pixel_agg: PixelAgg = PixelAgg.MAJORITY, dtype: str = "float32", protocol: str = PROTOCOL,
        ) -> None: ...
        # fmt: on

    def __post_init__(self) -> None:
        for field in ("family", "ckpt", "data"):
            _check_text(field, getattr(self, field))
        if not isinstance(self.dataset, str | os.PathLike):
            raise FormatError(f"dataset: expected a path, got {short(self.dataset)}")
        object.__setattr__(self, "dataset", Path(self.dataset))
        _check_text("dataset", str(self.dataset))
        for field in ("content_tokens_per_example", "d_model", "n_examples", "max_tokens_per_shard"):
            value = _check_int(field, getattr(self, field))
            if value < 1:
                raise FormatError(f"{field}: expected at least 1, got {value}")
            object.__setattr__(self, field, value)
        object.__setattr__(self, "cls_token", as_plain(self.cls_token))
        if not isinstance(self.cls_token, bool):
            raise FormatError(f"cls_token: expected true or false, got {short(self.cls_token)}")
        recorded = as_plain(self.layers)
        if not isinstance(recorded, list):
            raise FormatError(f"layers: expected a list of integers, got {short(self.layers)}")
        layers = tuple(_check_int("layers", layer) for layer in recorded)
        if not layers or len(set(layers)) < len(layers):
            raise FormatError(f"layers: expected one or more layers, each once, got {short(list(layers))}")
        object.__setattr__(self, "layers", layers)
        try:
            object.__setattr__(self, "pixel_agg", PixelAgg(self.pixel_agg))
        except ValueError as err:
            values = [agg.value for agg in PixelAgg]
            raise FormatError(f"pixel_agg: expected one of {values}, got {short(self.pixel_agg)}") from err
        check_protocol(self.protocol)
        _check_dtype(self.dtype, self.protocol)
        self._check_sizes()

    def _check_sizes(self) -> None:
        n_per_example = self.tokens_per_example * self.n_layers
        if self.examples_per_shard < 1:
            raise FormatError(
                f"max_tokens_per_shard: expected at least {n_per_example}, so that one example ({self.n_layers} layers "
                f"x {self.tokens_per_example} tokens) fits, got {self.max_tokens_per_shard}; raise it"
            )
        # One file more than n_shards, because an exact multiple is followed by a file without examples.
        n_bytes = (self.n_shards + 1) * self.examples_per_shard * self.example_nbytes
        if n_bytes >= MAX_NBYTES:
            raise FormatError(
                f"n_examples, layers, tokens and d_model: expected files of less than 2**62 bytes, got {n_bytes} bytes"
            )

    @classmethod
    def load(cls, shards_dir: Path | str, *, allow_links: bool = False) -> "Metadata":
        """Load the metadata of a shard directory of any protocol; the directory may have any name.

        With `allow_links`, metadata.json may be a symbolic link to a regular file.

        Raises:
            ShardsNotFoundError: The directory or its metadata.json does not exist, as after an unfinished write.
            FormatError: metadata.json does not follow the format.
            ReadError: It could not be read.
        """
        shards_dir = Path(shards_dir)
        path = shards_dir / METADATA_NAME
        try:
            obj = read_json(shards_dir, METADATA_NAME, allow_links=allow_links)
        except ShardsNotFoundError as err:
            if not shards_dir.is_dir() or path.is_symlink():
                raise
            inside = folders_with(METADATA_NAME, shards_dir)
            if inside:
                raise ShardsNotFoundError(
                    f"{NOT_SAVED} {shards_dir}: expected a shard directory, got a folder with {inside} in it; add "
                    "that name"
                ) from err
            raise ShardsNotFoundError(
                f"{NOT_SAVED} {path}: does not exist. It is written last, so either writing {shards_dir} was not "
                "finished (go on with ShardWriter(..., resume=True), or delete the directory and write it again), or "
                "this is not a shard directory (they are <shards_root>/<hash>)"
            ) from err
        try:
            return cls._from_json(obj)
        except FormatError as err:
            raise FormatError(f"{path}: {err}") from err
        except RecursionError as err:
            raise FormatError(f"{path}: data: expected a few levels, got an object nested too deeply") from err

    @classmethod
    def _from_json(cls, obj: object) -> "Metadata":
        if not isinstance(obj, dict):
            raise FormatError(f"expected a JSON object, got {short(obj)}")
        fields, recorded_hash = read_fields(obj)
        md = cls(**{"dataset": Path()} | fields)
        if recorded_hash is not None:
            object.__setattr__(md, "_recorded_hash", recorded_hash)
        return md

    def dump(self, shards_root: Path | str) -> Path:
        """Write metadata.json into `<shards_root>/<hash>`, creating the directory, and return that directory.

        Raises:
            WriteError: An older protocol, another metadata.json is there already, or the system refused.
        """
        shards_dir = Path(shards_root) / self.hash
        data = self.to_json()
        path = shards_dir / METADATA_NAME
        with writing(path):
            shards_dir.mkdir(parents=True, exist_ok=True)
            # A published directory is read-only: announcing the same metadata again must not touch it.
            if path.is_file() and path.read_bytes() == data:
                return shards_dir
        if path.exists() or path.is_symlink():
            raise WriteError(f"{path}: expected no file or this same metadata, got another file; move it away")
        write_atomic(path, data)
        return shards_dir

    def to_json(self) -> bytes:
        """Return the bytes of metadata.json, the same as saev's own writer's.

        Raises:
            WriteError: The protocol is an older one, which is only read.
        """
        if self.protocol != PROTOCOL or self._recorded_hash is not None:
            early = ", as it was without pixel_agg" if self.protocol == PROTOCOL else ""
            raise WriteError(
                f"protocol: expected {PROTOCOL!r}, the only one that is written, got {self.protocol!r}{early}; "
                "use dataclasses.replace(md, protocol='2.1', dataset=...)"
            )
        return orjson.dumps(self._json_object(), option=orjson.OPT_INDENT_2)

    def _json_object(self) -> dict[str, object]:
        obj = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return obj | {"dataset": str(self.dataset), "pixel_agg": self.pixel_agg.value}

    @property
    def hash(self) -> str:
        """Name of the directory: 8 hex digits of a SHA-256 (all 64 up to November 2025)."""
        return self._recorded_hash or name_of_directory(self._json_object())

    def make_data_cfg(self) -> NoReturn:
        """Refuse: in `saev` this unpickles `data`, which runs whatever code the writer of a directory put there.

        Raises:
            UntrustedError: Always; it says how to do so by hand.
        """
        if self.protocol == PROTOCOL:
            by_hand = (
                "if you trust who wrote this directory, and can import what is in it (saev.data.datasets), then: "
                "`import base64, pickle; cfg = pickle.loads(base64.b64decode(md.data))`"
            )
        else:
            by_hand = f"in protocol {self.protocol} it is no pickle: look at md.data, a text or JSON"
        raise UntrustedError(
            "Metadata.make_data_cfg: expected that `data` is only carried along, got a call to unpickle it, which runs "
            f"any code that was put there; {by_hand}."
        )

    @property
    def n_layers(self) -> int:
        """Recorded layers."""
        return len(self.layers)

    @property
    def tokens_per_example(self) -> int:
        """Stored tokens of an example, [CLS] included."""
        return self.content_tokens_per_example + int(self.cls_token)

    @property
    def examples_per_shard(self) -> int:
        """Examples that a full shard file holds."""
        return self.max_tokens_per_shard // (self.tokens_per_example * self.n_layers)

    @property
    def n_shards(self) -> int:
        """Shard files that hold examples."""
        return -(-self.n_examples // self.examples_per_shard)

    @property
    def value_type(self) -> ValueType:
        """What a stored value is."""
        return DTYPES[self.dtype]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one activation: an example's token in a layer."""
        return self.d_model * self.value_type.nbytes

    def loaded_row_nbytes(self, act_dtype: str) -> int:
        """Bytes of one activation in memory, where a config has this `act_dtype`."""
        return self.d_model * loaded_type(self.value_type, act_dtype).nbytes

    @property
    def example_nbytes(self) -> int:
        """Bytes of one example in a shard file: all layers, all tokens."""
        return self.n_layers * self.tokens_per_example * self.row_nbytes

    @property
    def shard_shape(self) -> tuple[int, int, int, int]:
        """Shape of a full shard file, [examples_per_shard, n_layers, tokens_per_example, d_model] values."""
        return (self.examples_per_shard, self.n_layers, self.tokens_per_example, self.d_model)


def _check_dtype(value: object, protocol: str) -> None:
    if not isinstance(value, str) or value not in DTYPES:
        raise FormatError(
            f"dtype: expected one of {list(DTYPES)}, got {short(value)}; read it with the version of saev_torch that "
            "wrote it, or a newer one, or write the activations again as one of these"
        )
    if protocol != PROTOCOL and value != FLOAT32.name:
        raise FormatError(
            f"dtype: expected {FLOAT32.name!r}, all that protocol {protocol} has, got {value!r}; protocol {PROTOCOL} "
            "has the others"
        )


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise FormatError(f"{field}: expected a string, got {short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise FormatError(f"{field}: expected text that UTF-8 can encode, got {short(value)}") from err


def _check_int(field: str, value: object) -> int:
    value = as_plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(f"{field}: expected an integer, got {short(value)}")
    if abs(value) >= MAX_NBYTES:
        raise FormatError(f"{field}: expected less than 2**62, got {short(value)}")
    return value


class Described:
    """What data sets say of their shards.

    Attributes:
        metadata: Metadata of the shards.
    """

    metadata: Metadata

    @property
    def md(self) -> Metadata:
        """Short for `metadata`."""
        return self.metadata

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.metadata.d_model
