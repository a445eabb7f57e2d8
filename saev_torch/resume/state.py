"""What is kept of an iteration: a place, a digest of what came before it, and the small dict that says both."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from saev_torch.config import BatchConfig, ShuffledConfig
from saev_torch.errors import StateError
from saev_torch.format.checksums import checksums_digest
from saev_torch.format.files import short
from saev_torch.format.metadata import Metadata
from saev_torch.format.rules import is_integer
from saev_torch.order.selection import Selection
from saev_torch.reading.store import ShardStore

MAX_COUNT = (1 << 62) - 1
VERSION = 1
"""Of states."""

_MODULUS = 1 << 64
_SCALED_BY = "scaled_by"
_DIGESTED = "example_idx", "token_idx", "layer", "source"
PLACE = "epoch", "batch", "digest", "rank", "world_size"
"""Keys of a state that say where it stands."""

_OF_BUFFER = "buffer_size", "n_lanes", "block_size"


def batch_digest(batch: Mapping[str, torch.Tensor]) -> int:
    """Digest which samples a batch holds, and in which rows, as an integer in [0, 2**64).

    It is the first 8 bytes of SHA-256 over `example_idx`, `token_idx` and, where there are such, `layer` and `source`.
    """
    return digest_columns({key: batch[key].numpy(force=True) for key in _DIGESTED if key in batch})


def digest_columns(columns: Mapping[str, NDArray[np.int64]]) -> int:
    """As `batch_digest`, of columns that are no tensors; those that do not count are left out."""
    digest = hashlib.sha256()
    for key in _DIGESTED:
        if key in columns:
            digest.update(np.ascontiguousarray(columns[key], dtype="<i8").data)
    return int.from_bytes(digest.digest()[:8], "little")


@dataclasses.dataclass(frozen=True)
class StreamDigest:
    """Sum of the digests of batches, each mixed with its place (epoch, number of the batch).

    Two runs that saw the same batches at the same places have the same digest. The digests of ranks, or of the parts of
    a run before and after a resume, add up to the digest of the whole.

    Attributes:
        value: The sum, an integer in [0, 2**64).
        n_batches: Number of batches in it.
    """

    value: int = 0
    n_batches: int = 0

    def including(self, epoch: int, batch_idx: int, digest: int) -> "StreamDigest":
        """Include one batch.

        Args:
            epoch: Its epoch.
            batch_idx: Its number in the sequence of all ranks.
            digest: Its `batch_digest`.
        """
        place = b"".join(x.to_bytes(8, "little") for x in (epoch, batch_idx, digest))
        mixed = int.from_bytes(hashlib.sha256(place).digest()[:8], "little")
        return StreamDigest((self.value + mixed) % _MODULUS, self.n_batches + 1)

    def __add__(self, other: "StreamDigest") -> "StreamDigest":
        return StreamDigest((self.value + other.value) % _MODULUS, self.n_batches + other.n_batches)

    def __str__(self) -> str:
        return f"{self.value:016x}-{self.n_batches}"

    @classmethod
    def parse(cls, text: str) -> "StreamDigest":
        """Read what `str` wrote.

        Raises:
            ValueError: It is something else.
        """
        value, sep, n_batches = text.partition("-")
        if not sep or len(value) != 16 or not n_batches.isascii() or not n_batches.isdigit() or len(n_batches) > 18:
            raise ValueError(text)
        return cls(int(value, 16), int(n_batches))


@dataclasses.dataclass(frozen=True)
class Position:
    """A place in the sequence of batches.

    `batch` counts the batches of the epoch, over all ranks, that came before; `digest` is that of the batches that
    `rank` yielded; activations are multiplied with `scale`, None for nothing.
    """

    epoch: int
    batch: int
    digest: StreamDigest = dataclasses.field(default_factory=StreamDigest)
    rank: int = 0
    world_size: int = 1
    scale: float | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and batch."""
        return self.epoch, self.batch

    def next_start(self) -> "Position":
        """The start of the next epoch; this place, if it is the start of one."""
        return dataclasses.replace(self, epoch=self.epoch + 1, batch=0) if self.batch else self


@dataclasses.dataclass(frozen=True)
class Recording:
    """What tells data apart that have the same metadata.

    Attributes:
        n_samples: Samples in the selection.
        table: Digest of which files hold which examples.
        checksums: Digest of the checksums of all values; None where there are none.
        kept: Digest of which tokens `ignore_labels` leaves; None where it leaves all.
        mask: Digest of which tokens the mask leaves; None without one.
        examples: Digest of which examples are selected; None for all.
    """

    n_samples: int
    table: str
    checksums: str | None
    kept: str | None
    mask: str | None
    examples: str | None

    @classmethod
    def of(cls, store: ShardStore, selection: Selection) -> "Recording":
        """Describe what is selected of a store."""
        table = repr([(shard.name, shard.n_examples) for shard in store.shards if shard.n_examples])
        checksums = checksums_digest(store.shards_dir, store.allow_links)
        chosen = selection.examples
        examples = None if chosen is None else _digest(json.dumps(chosen.to_dict()))
        return cls(selection.n_samples, _digest(table), checksums, *selection.digests, examples)


_RECORDING = "n_samples", "table", "checksums", "kept"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(md: Metadata, cfg: BatchConfig) -> dict[str, Any]:
    """What decides the order of samples."""
    names = ["tokens", "layer", "batch_size"]
    if isinstance(cfg, ShuffledConfig):
        names += ["seed", *_OF_BUFFER]
    fields: dict[str, Any] = {"order": "ordered", "data": _digest(md.hash)}
    fields |= {name: getattr(cfg, name) for name in names}
    if isinstance(cfg.layer, tuple):
        layers = list(cfg.layer)
        fields["layer"] = _digest(repr(layers)) if len(layers) > 16 else layers
    if isinstance(cfg, ShuffledConfig):
        fields["order"] = "uniform" if cfg.order == "uniform" else "shuffled"
        if cfg.order == "uniform":
            # They do not matter, so other ones do not either.
            fields |= dict.fromkeys(_OF_BUFFER)
        fields["ignore_labels"] = f"{sum(1 << label for label in set(cfg.ignore_labels)):x}"
    return fields


def dump_state(md: Metadata, recording: Recording, cfg: BatchConfig, position: Position) -> dict[str, Any]:
    """Make a state: under 1 KB, of JSON's types only."""
    identity = fingerprint(md, cfg) | vars(recording)
    place = vars(position) | {"digest": str(position.digest)}
    return {"version": VERSION, **identity, **place, **dump_scale(cfg, position.scale)}


def dump_scale(cfg: BatchConfig, scale: float | None) -> dict[str, Any]:
    """What a state says of a scale."""
    way = _scaled_by(cfg)
    # Of before are states that know no other scale than that of the mean.
    return {"scale": scale} | ({} if way in (None, "mean") else {_SCALED_BY: way})


def load_state(md: Metadata, recording: Recording, cfg: BatchConfig, state: Any) -> Position:
    """Check a state against data and config, and find the place that it names; the `StateError` says what differs."""
    require_version(state)
    expected = fingerprint(md, cfg)
    # States of before do not say which recording they belong to, and there were no subsets.
    later = {"mask": recording.mask, "examples": recording.examples}
    expected |= vars(recording) if any(key in state for key in _RECORDING) else later
    state = dict.fromkeys(later) | state
    require_keys([*expected, *PLACE], state)
    require_same(differences(expected, state))
    position = load_position(state, recording.n_samples, cfg.batch_size)
    return dataclasses.replace(position, scale=load_scale(cfg, state))


def require_version(state: Any) -> None:
    """Make sure that a state is one that this version can read."""
    if not isinstance(state, dict) or "version" not in state:
        raise StateError(f"state: expected a dict with a version, as state_dict() makes it, got {short(state)}.")
    version = state["version"]
    if not is_integer(version, 1):
        raise StateError(f"state: version: expected {VERSION}, got {short(version)}; it is no state of saev_torch.")
    if version > VERSION:
        raise StateError(f"state: version: expected at most {VERSION}, got {version}; use a newer saev_torch.")


def require_keys(keys: Iterable[str], state: Mapping[str, Any]) -> None:
    """Make sure that a state has these keys."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise StateError(f"state: expected the keys {missing}, got none of them; it is incomplete.")


def differences(expected: Mapping[str, Any], state: Mapping[str, Any], where: str = "") -> list[str]:
    """Say in which of the expected values a state differs, by names that begin with `where`."""
    # A copy may lack the checksums.
    known = [key for key in expected if key != "checksums" or None not in (expected[key], state[key])]
    # True == 1 in Python.
    different = [key for key in known if type(state[key]) is not type(expected[key]) or state[key] != expected[key]]
    return [f"{where}{key}: expected {short(expected[key])}, got {short(state[key])}" for key in different]


def require_same(different: list[str]) -> None:
    """Refuse a state that differs."""
    if different:
        raise StateError(
            f"state: it belongs to other data or another config: {', '.join(different)}. Use the config that it was "
            "saved with, or start anew."
        )


def load_position(state: Mapping[str, Any], n_samples: int, batch_size: int) -> Position:
    """Find the place that a state names, without a scale."""
    counts = {key: state[key] for key in ("epoch", "batch", "rank", "world_size")}
    for key, value in counts.items():
        if not is_integer(value, 0, MAX_COUNT):
            raise StateError(f"state: {key}: expected an integer from 0 on, got {short(value)}; it is damaged.")
    _check_place(-(-n_samples // batch_size), counts["batch"], counts["rank"], counts["world_size"])
    try:
        digest = StreamDigest.parse(state["digest"])
    except (ValueError, AttributeError, TypeError) as err:
        raise StateError(f"state: digest: expected 16 hex digits and a count, got {short(state['digest'])}.") from err
    return Position(digest=digest, **counts)


def _check_place(n_batches: int, batch: int, rank: int, world_size: int) -> None:
    if world_size < 1:
        raise StateError(f"state: world_size: expected an integer from 1 on, got {world_size}; it is damaged.")
    if rank >= world_size:
        raise StateError(f"state: rank: expected less than world_size, {world_size}, got {rank}; it is damaged.")
    # A worker stands where its next batch would be, which is behind those of all others.
    info = get_worker_info()
    most = n_batches + world_size * (1 if info is None else info.num_workers)
    if batch > most:
        raise StateError(f"state: batch: expected at most {most}, the end of an epoch, got {batch}; it is damaged.")


def _scaled_by(cfg: BatchConfig) -> str | None:
    """Where the scale of a config comes from; None where it has none."""
    if cfg.scale is not None:
        return "given"
    if not isinstance(cfg, ShuffledConfig) or not cfg.scale_norm:
        return None
    return "median" if cfg.scale_norm == "median" else "mean"


def load_scale(cfg: BatchConfig, state: Mapping[str, Any]) -> float | None:
    """Check the scale of a state."""
    scale, wanted = state.get("scale"), _scaled_by(cfg)
    if scale is not None and not (isinstance(scale, float) and 0 < scale < math.inf):
        raise StateError(f"state: scale: expected a number above 0, got {short(scale)}; it is damaged.")
    got = None if scale is None else state.get(_SCALED_BY, "mean")
    # Whoever gives the number that was found before goes on with it.
    given = None if cfg.scale is None else float(np.float32(cfg.scale))
    if wanted != got if given is None else scale != given:
        names = {
            None: "scale_norm=False",
            "mean": "scale_norm=True",
            "median": "scale_norm='median'",
            "given": "scale=",
        }
        amount = "none" if wanted is None else "a number" if given is None else f"{given}"
        of = short(got) if got is not None and got not in list(names) else names[got]
        raise StateError(
            f"state: scale: expected {amount} with {names[wanted]}, got {scale} with {of}; use the config that it was "
            "saved with, or start anew."
        )
    return scale
