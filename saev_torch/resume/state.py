"""A state: a small dict, versioned, that says where an iteration stands and what it belongs to."""

import hashlib
import math
from typing import Any

from saev_torch.config import OrderedConfig, ShuffledConfig, is_integer
from saev_torch.errors import StateError
from saev_torch.format.files import short
from saev_torch.format.metadata import Metadata
from saev_torch.resume.cursor import MAX_COUNT, Position
from saev_torch.resume.digest import StreamDigest

_VERSION = 1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fingerprint(md: Metadata, cfg: OrderedConfig | ShuffledConfig) -> dict[str, Any]:
    """What decides the order of samples."""
    names = ["tokens", "layer", "batch_size"]
    if isinstance(cfg, ShuffledConfig):
        names += ["seed", "buffer_size", "n_lanes", "block_size"]
    fields = {name: getattr(cfg, name) for name in names}
    if isinstance(cfg.layer, tuple):
        layers = list(cfg.layer)
        fields["layer"] = _digest(repr(layers)) if len(layers) > 16 else layers
    if isinstance(cfg, ShuffledConfig):
        fields["ignore_labels"] = f"{sum(1 << label for label in set(cfg.ignore_labels)):x}"
    return {
        "order": "shuffled" if isinstance(cfg, ShuffledConfig) else "ordered",
        "data": _digest(md.hash),
        **fields,
    }


def dump_state(md: Metadata, cfg: OrderedConfig | ShuffledConfig, position: Position) -> dict[str, Any]:
    """Make a state: under 1 KB, of JSON's types only."""
    return {"version": _VERSION, **_fingerprint(md, cfg), **vars(position), "digest": str(position.digest)}


def load_state(md: Metadata, cfg: OrderedConfig | ShuffledConfig, state: Any) -> Position:
    """Check a state against data and config, and find the place that it names; the `StateError` says what differs."""
    if not isinstance(state, dict) or "version" not in state:
        raise StateError(f"state: expected a dict with a version, as state_dict() makes it, got {short(state)}.")
    version = state["version"]
    if not is_integer(version, 1):
        raise StateError(f"state: version: expected {_VERSION}, got {short(version)}; it is no state of saev_torch.")
    if version > _VERSION:
        raise StateError(f"state: version: expected at most {_VERSION}, got {version}; use a newer saev_torch.")
    expected = _fingerprint(md, cfg)
    missing = [key for key in (*expected, "epoch", "batch", "digest", "rank", "world_size") if key not in state]
    if missing:
        raise StateError(f"state: expected the keys {missing}, got none of them; it is incomplete.")
    # True == 1 in Python.
    different = [key for key in expected if type(state[key]) is not type(expected[key]) or state[key] != expected[key]]
    if different:
        lines = ", ".join(f"{key}: expected {short(expected[key])}, got {short(state[key])}" for key in different)
        raise StateError(
            f"state: it belongs to other data or another config: {lines}. Use the config that it was saved with, or "
            "start anew."
        )
    counts = {key: state[key] for key in ("epoch", "batch", "rank", "world_size")}
    for key, value in counts.items():
        if not is_integer(value, 0, MAX_COUNT):
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
