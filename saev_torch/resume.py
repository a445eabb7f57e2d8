"""Where an iteration stands: a small dict, versioned, that says what it belongs to and what came before."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.errors import StateError
from saev_torch.format.files import short
from saev_torch.format.metadata import Metadata

__all__ = ["Position", "StreamDigest", "batch_digest", "dump_state", "load_state"]

_MODULUS = 1 << 64
_KEYS = ("example_idx", "token_idx", "layer")


def batch_digest(batch: Mapping[str, torch.Tensor]) -> int:
    """Digest which samples a batch holds, and in which rows: the first 8 bytes of SHA-256 over their numbers.

    Args:
        batch: A batch; `example_idx`, `token_idx` and, where there is one, `layer` are looked at.

    Returns:
        An integer in [0, 2**64).
    """
    digest = hashlib.sha256()
    for key in _KEYS:
        if key in batch:
            digest.update(batch[key].numpy(force=True).astype("<i8", copy=False).tobytes())
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


_VERSION = 1
_MAX_COUNT = 1 << 62


@dataclasses.dataclass(frozen=True)
class Position:
    """A place in the sequence of batches.

    Attributes:
        epoch: Number of the epoch.
        batch: Batches of the sequence, over all ranks, that came before.
        digest: Digest of the batches that `rank` yielded.
        rank: Rank whose digest it is.
        world_size: Number of ranks then.
        scale: What activations are multiplied with; None for nothing.
    """

    epoch: int
    batch: int
    digest: StreamDigest = dataclasses.field(default_factory=StreamDigest)
    rank: int = 0
    world_size: int = 1
    scale: float | None = None


def _fingerprint(md: Metadata, cfg: OrderedConfig | ShuffledConfig) -> dict[str, Any]:
    """What decides the order of samples."""
    names = ["tokens", "layer", "batch_size"]
    if isinstance(cfg, ShuffledConfig):
        names += ["seed", "buffer_size", "n_lanes", "block_size"]
    fields = {name: getattr(cfg, name) for name in names}
    fields["layer"] = list(fields["layer"]) if isinstance(fields["layer"], tuple) else fields["layer"]
    if isinstance(fields["layer"], list) and len(fields["layer"]) > 16:
        fields["layer"] = hashlib.sha256(repr(fields["layer"]).encode()).hexdigest()[:16]
    if isinstance(cfg, ShuffledConfig):
        fields["ignore_labels"] = f"{sum(1 << label for label in set(cfg.ignore_labels)):x}"
    return {
        "order": "shuffled" if isinstance(cfg, ShuffledConfig) else "ordered",
        "data": hashlib.sha256(md.hash.encode()).hexdigest()[:16],
        **fields,
    }


def dump_state(md: Metadata, cfg: OrderedConfig | ShuffledConfig, position: Position) -> dict[str, Any]:
    """Make a state: under 1 KB, of JSON's types only."""
    return {
        "version": _VERSION,
        **_fingerprint(md, cfg),
        "epoch": position.epoch,
        "batch": position.batch,
        "digest": str(position.digest),
        "rank": position.rank,
        "world_size": position.world_size,
        "scale": position.scale,
    }


def load_state(md: Metadata, cfg: OrderedConfig | ShuffledConfig, state: Any) -> Position:
    """Check a state against data and config.

    Args:
        md: Metadata of the shards.
        cfg: The config.
        state: What `dump_state` made.

    Returns:
        The place that it names.

    Raises:
        StateError: It is no state, of a newer version, or of other data or another config; the message says what
            differs.
    """
    if not isinstance(state, dict) or "version" not in state:
        raise StateError(f"state: expected a dict with a version, as state_dict() makes it, got {short(state)}.")
    version = state["version"]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise StateError(f"state: version: expected {_VERSION}, got {short(version)}; it is no state of saev_torch.")
    if version > _VERSION:
        raise StateError(f"state: version: expected at most {_VERSION}, got {version}; use a newer saev_torch.")
    expected = _fingerprint(md, cfg)
    missing = [key for key in (*expected, "epoch", "batch", "digest", "rank", "world_size") if key not in state]
    if missing:
        raise StateError(f"state: expected the keys {missing}, got none of them; it is incomplete.")
    different = [key for key in expected if not _same(state[key], expected[key])]
    if different:
        lines = ", ".join(f"{key}: expected {short(expected[key])}, got {short(state[key])}" for key in different)
        raise StateError(
            f"state: it belongs to other data or another config: {lines}. Use the config that it was saved with, or "
            "start anew."
        )
    counts = {key: state[key] for key in ("epoch", "batch", "rank", "world_size")}
    for key, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_COUNT:
            raise StateError(f"state: {key}: expected an integer from 0 on, got {short(value)}; it is damaged.")
    try:
        digest = StreamDigest.parse(state["digest"])
    except (ValueError, AttributeError, TypeError) as err:
        raise StateError(f"state: digest: expected 16 hex digits and a count, got {short(state['digest'])}.") from err
    return Position(digest=digest, scale=_load_scale(cfg, state.get("scale")), **counts)


def _load_scale(cfg: OrderedConfig | ShuffledConfig, scale: Any) -> float | None:
    wanted = isinstance(cfg, ShuffledConfig) and cfg.scale_norm
    if scale is not None and not (isinstance(scale, float) and 0 < scale < math.inf):
        raise StateError(f"state: scale: expected a number above 0, got {short(scale)}; it is damaged.")
    if wanted != (scale is not None):
        raise StateError(
            f"state: scale: expected {'a number' if wanted else 'none'} with scale_norm={wanted}, got {scale}; use the "
            "config that it was saved with, or start anew."
        )
    return scale


def _same(a: object, b: object) -> bool:
    # True == 1 in Python, and a tuple may have become a list on its way through JSON.
    if isinstance(a, tuple):
        a = list(a)
    return type(a) is type(b) and a == b
