"""checksums.json: a sidecar that other readers ignore, one checksum for each (example, layer) of the shards.

    {"version": 1, "algorithm": "xxh3" (its low 32 bits) or "crc32",
     "acts": "<8 hex digits for each example and layer, in the order of the bytes>",
     "labels": "<8 hex digits for each example>" or null,
     "token_ids", "attention_mask": the same, only where there are such,
     "files": {"metadata.json": "<CRC-32>", "shards.json": "<CRC-32>"},
     "crc32": "<of this object without this key, as compact JSON with sorted keys>"}

A block is one layer of one example, so that a fault can be named, and so that ranks and resumed writers, whatever
batches they wrote, leave the same file. xxh3 is computed by the package `xxhash`, as fast as memory is read; without it
zlib's CRC-32 takes its place, at 4 to 7 GB/s a core where it was measured.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from saev_torch.errors import ConfigError, FormatError, SaevTorchError
from saev_torch.format.files import open_regular, read_json, short, write_atomic
from saev_torch.format.metadata import METADATA_NAME, Metadata
from saev_torch.format.shards import SHARDS_NAME
from saev_torch.format.sidecars import LABELS, SIDECARS, Sidecar

try:
    from xxhash import xxh3_64_intdigest
except ImportError:
    xxh3_64_intdigest = None  # type: ignore[assignment]

CHECKSUMS_NAME = "checksums.json"
ALGORITHM = "crc32" if xxh3_64_intdigest is None else "xxh3"
_VERSION = 1
_END_NBYTES = 64
_KEYS = {"version", "algorithm", "acts", LABELS.key, "files", "crc32"}
_ALL_KEYS = _KEYS | {sidecar.key for sidecar in SIDECARS}


def find_algorithm(name: str) -> Callable[[memoryview], int]:
    """Find the function for "crc32" or "xxh3", from bytes to 32 bits; `ConfigError` if `xxhash` is missing."""
    if name == "crc32":
        return zlib.crc32
    if xxh3_64_intdigest is None:
        raise ConfigError(
            "checksums.json: expected the package xxhash, because the checksums are xxh3, got none; "
            "pip install 'saev_torch[checksums]'."
        )
    return lambda block: xxh3_64_intdigest(block) & 0xFFFFFFFF


def block_checksums(
    acts: npt.NDArray[Any], beside: Iterable[npt.NDArray[Any]] = (), algorithm: str = ALGORITHM
) -> bytes:
    """Compute the checksums of examples, packed as big-endian 32-bit numbers: of all layers, then of each sidecar.

    `acts` are `[batch, n_layers, tokens_per_example, d_model]`, the values of each sidecar, in the order of `SIDECARS`,
    `[batch, content_tokens_per_example]`, all contiguous: batch x n_layers numbers, and batch more for each sidecar.
    """
    blocks = acts.reshape(acts.shape[0] * acts.shape[1], -1)
    checksum = find_algorithm(algorithm)
    sums = [checksum(block.data) for block in blocks]
    for values in beside:
        sums += [checksum(row.data) for row in values]
    return np.array(sums, dtype=">u4").tobytes()


@dataclasses.dataclass
class Checksums:
    """The checksums of a directory: `acts` `[n_examples, n_layers]`, of sidecars `[n_examples]`, CRC-32 of `files`."""

    acts: npt.NDArray[np.uint32]
    beside: dict[Sidecar, npt.NDArray[np.uint32]]
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    algorithm: str = ALGORITHM

    @classmethod
    def make(cls, md: Metadata, sidecars: Iterable[Sidecar]) -> "Checksums":
        """Make those of a directory, all zero yet."""
        acts = np.zeros((md.n_examples, md.n_layers), dtype=np.uint32)
        return cls(acts, {sidecar: np.zeros(md.n_examples, dtype=np.uint32) for sidecar in sidecars})

    def fill(self, start: int, stop: int, packed: bytes) -> None:
        """Fill in examples `start..stop` from what `block_checksums` returned for them."""
        sums = np.frombuffer(packed, dtype=">u4")
        n, at = stop - start, (stop - start) * self.acts.shape[1]
        self.acts[start:stop] = sums[:at].reshape(n, -1)
        for found in self.beside.values():
            found[start:stop] = sums[at : at + n]
            at += n

    def dump(self, shards_dir: Path, metadata_json: bytes) -> None:
        """Write checksums.json, with those of shards.json, which is there, and of metadata.json, which will be."""
        files = {METADATA_NAME: metadata_json, SHARDS_NAME: (shards_dir / SHARDS_NAME).read_bytes()}
        obj: dict[str, Any] = {
            "version": _VERSION,
            "algorithm": self.algorithm,
            "acts": _to_hex(self.acts),
            LABELS.key: None,
            **{sidecar.key: _to_hex(sums) for sidecar, sums in self.beside.items()},
            "files": {name: f"{zlib.crc32(data):08x}" for name, data in files.items()},
        }
        obj["crc32"] = _own_crc(obj)
        write_atomic(shards_dir / CHECKSUMS_NAME, json.dumps(obj, indent=2).encode())

    @classmethod
    def load(cls, shards_dir: Path, md: Metadata, allow_links: bool = False) -> "Checksums":
        """Load them; `FormatError` if they are damaged, of another version, or not for this metadata."""
        path = shards_dir / CHECKSUMS_NAME
        n_blocks = md.n_examples * (md.n_layers + len(SIDECARS))
        obj = read_json(shards_dir, CHECKSUMS_NAME, max_bytes=8 * n_blocks + 4096, allow_links=allow_links)
        if not isinstance(obj, dict) or not _KEYS <= set(obj) <= _ALL_KEYS or obj["crc32"] != _own_crc(obj):
            raise FormatError(f"{path}: expected what the writer left, got a file that was changed; copy it again")
        if obj["version"] != _VERSION or obj["algorithm"] not in ("crc32", "xxh3"):
            got = short((obj["version"], obj["algorithm"]))
            raise FormatError(f"{path}: expected version {_VERSION} with crc32 or xxh3, got {got}; update saev_torch")
        try:
            acts = _from_hex(obj["acts"]).reshape(md.n_examples, md.n_layers)
            given = {sidecar: obj[sidecar.key] for sidecar in SIDECARS if obj.get(sidecar.key) is not None}
            beside = {sidecar: _from_hex(text).reshape(md.n_examples) for sidecar, text in given.items()}
            files = {name: int(crc, 16) for name, crc in obj["files"].items()}
        except (ValueError, TypeError, AttributeError) as err:
            raise FormatError(
                f"{path}: expected checksums of {md.n_examples} examples x {md.n_layers} layers, got others; "
                "it is of another data set"
            ) from err
        return cls(acts, beside, files, obj["algorithm"])


def checksums_digest(shards_dir: Path, allow_links: bool = False) -> str | None:
    """Digest checksums.json, in 16 hex digits, without reading all of it; None where there is none that can be read."""
    try:
        fd = open_regular(shards_dir, CHECKSUMS_NAME, allow_links)
    except SaevTorchError:
        return None
    try:
        nbytes = os.fstat(fd).st_size
        # The checksum of the rest comes last.
        end = os.pread(fd, _END_NBYTES, max(0, nbytes - _END_NBYTES))
    except OSError:
        return None
    finally:
        os.close(fd)
    return hashlib.sha256(b"%d\0%b" % (nbytes, end)).hexdigest()[:16]


def _own_crc(obj: dict[str, Any]) -> str:
    rest = {key: value for key, value in obj.items() if key != "crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _to_hex(sums: npt.NDArray[np.uint32]) -> str:
    return sums.astype(">u4").tobytes().hex()


def _from_hex(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(bytes.fromhex(text), dtype=">u4").astype(np.uint32)
