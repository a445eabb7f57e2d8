"""The protocols of metadata.json that are read, and the names that older ones have for the fields of today's.

    1.0.0, 1.1   names of images and patches; no dataset
    2.0          October 2025, with one of three sets of names for three of the fields; the earliest has no dataset
    2.1          today's; for a few days `pixel_agg` was left out, or null

The hash that names a directory covers the JSON object as it was written, with the names of its time.
"""

import hashlib
import json
from typing import Any

import orjson

from saev_torch.errors import FormatError
from saev_torch.format.files import short

PROTOCOL = "2.1"
PROTOCOLS = ("1.0.0", "1.1", "2.0", PROTOCOL)

# Today's, in their order.
_FIELDS = (
    "family",
    "ckpt",
    "layers",
    "content_tokens_per_example",
    "cls_token",
    "d_model",
    "n_examples",
    "max_tokens_per_shard",
    "data",
    "dataset",
    "pixel_agg",
    "dtype",
    "protocol",
)
# By today's name.
_NAMES_1 = {
    "family": "vit_family",
    "ckpt": "vit_ckpt",
    "content_tokens_per_example": "n_patches_per_img",
    "d_model": "d_vit",
    "n_examples": "n_imgs",
    "max_tokens_per_shard": "max_patches_per_shard",
}
_NAMES_2: tuple[dict[str, str], ...] = (
    {},
    {"content_tokens_per_example": "n_content_tokens_per_example"},
    {
        "content_tokens_per_example": "patches_per_ex",
        "n_examples": "n_ex",
        "max_tokens_per_shard": "patches_per_shard",
    },
)
COUNT_NAMES = ("n_examples", "n_imgs", "n_ex")
"""What an entry of shards.json may call the number of examples."""


def read_fields(obj: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Read the object of a metadata.json.

    Returns the fields under today's names, those that their protocol lacks left out, and the hash, where it is not that
    of these fields. Raises `FormatError`, where a key is missing or unknown.
    """
    is_oldest = "protocol" not in obj and "vit_family" in obj
    protocol = check_protocol("1.0.0" if is_oldest else _require(obj, {"protocol": "protocol"})["protocol"])
    if protocol == PROTOCOL:
        return _read_today(obj)
    lacks = {"dtype", "protocol", "dataset", "pixel_agg"} if protocol[0] == "1" else {"dataset", "pixel_agg"}
    names = _names_of(protocol, obj)
    has = [field for field in _FIELDS if field not in lacks or names.get(field, field) in obj]
    fields = _require(obj, {field: names.get(field, field) for field in has})
    if isinstance(fields["data"], dict):
        fields["data"] = json.dumps(fields["data"], separators=(",", ":"), ensure_ascii=False)
    if fields.get("pixel_agg", "") is None:
        del fields["pixel_agg"]
    return fields | {"protocol": protocol}, _sorted_hash(obj)


def _read_today(obj: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    unknown = sorted(set(obj) - set(_FIELDS))
    if unknown:
        raise FormatError(f"expected the keys of protocol 2.1, got unknown {short(unknown)}; remove them")
    is_early = obj.get("pixel_agg") is None
    fields = _require(obj, {field: field for field in _FIELDS if not (is_early and field == "pixel_agg")})
    if not is_early:
        return fields, None
    try:
        return fields, _hash_in_order({field: obj[field] for field in _FIELDS if field in obj})
    except TypeError:
        # Values that no metadata have, which are refused with their names.
        return fields, None


def _names_of(protocol: str, obj: dict[str, Any]) -> dict[str, str]:
    """The names of a protocol where they are not today's: of several sets, the one of which most are there."""
    if protocol[0] == "1":
        return _NAMES_1
    return max(_NAMES_2, key=lambda names: sum(name in obj for name in names.values()))


def name_of_directory(obj: dict[str, Any]) -> str:
    """The hash of metadata with these values under today's names: 8 hex digits, 64 of an older protocol."""
    if obj["protocol"] == PROTOCOL:
        # saev asks orjson to sort keys, but orjson sorts no dataclass fields: every directory in the world is named by
        # the fields in the order of their declaration.
        return _hash_in_order(obj)[:8]
    if obj["protocol"] == "2.0":
        return _sorted_hash(obj)
    return _sorted_hash({_NAMES_1.get(key, key): obj[key] for key in obj if key not in ("dataset", "pixel_agg")})


def _hash_in_order(obj: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(obj)).hexdigest()


def _sorted_hash(obj: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(obj, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _require(obj: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The values under these fields' names; `FormatError` where one is missing."""
    missing = [name for name in names.values() if name not in obj]
    if missing:
        raise FormatError(f"expected the key {missing[0]!r}, got none (missing: {', '.join(missing)})")
    return {field: obj[name] for field, name in names.items()}


def check_protocol(value: object) -> str:
    """Refuse a protocol that is not read, with a `FormatError`."""
    if not isinstance(value, str) or value not in PROTOCOLS:
        raise FormatError(f"protocol: expected one of {list(PROTOCOLS)}, got {short(value)}; is there a newer version?")
    return value
