"""The state of a mixture: what decides its order, that of each of its sources, and a place in it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saev_torch.config import ShuffledConfig
from saev_torch.errors import StateError
from saev_torch.format.files import short
from saev_torch.format.metadata import Metadata
from saev_torch.resume.state import (
    PLACE,
    VERSION,
    Position,
    Recording,
    differences,
    dump_scale,
    fingerprint,
    load_position,
    load_scale,
    require_keys,
    require_same,
    require_version,
)


class Recorded(NamedTuple):
    """A source: its metadata, what tells it apart from others with the same, and its config."""

    metadata: Metadata
    recording: Recording
    cfg: ShuffledConfig


def _identity(source: Recorded) -> dict[str, Any]:
    return fingerprint(source.metadata, source.cfg) | vars(source.recording)


def dump_mixed(
    mixing: Mapping[str, Any], sources: Sequence[Recorded], scales: Sequence[float | None], position: Position
) -> dict[str, Any]:
    """Make a state of JSON's types: under 1 KB, and as much for each source. `mixing` is what decides the order."""
    each = [_identity(source) | dump_scale(source.cfg, scale) for source, scale in zip(sources, scales, strict=True)]
    return {"version": VERSION, **mixing, "sources": each, **vars(position), "digest": str(position.digest)}


def load_mixed(
    mixing: Mapping[str, Any], sources: Sequence[Recorded], state: Any, n_samples: int, batch_size: int
) -> tuple[Position, list[float | None]]:
    """Check a state, and find the place that it names, and the scale of each source; see `load_state`."""
    require_version(state)
    require_keys([*mixing, "sources", *PLACE], state)
    different, found = differences(mixing, state), state["sources"]
    if not different and not (isinstance(found, list) and len(found) == len(sources)):
        raise StateError(f"state: sources: expected a list of {len(sources)}, got {short(found)}; it is damaged.")
    scales: list[float | None] = []
    for i, source in enumerate(sources if not different else ()):
        if not isinstance(found[i], dict):
            raise StateError(f"state: sources[{i}]: expected a dict, got {short(found[i])}; it is damaged.")
        expected = _identity(source)
        require_keys(expected, found[i])
        different += differences(expected, found[i], f"sources[{i}].")
        scales.append(None if different else load_scale(source.cfg, found[i]))
    require_same(different)
    return load_position(state, n_samples, batch_size), scales
