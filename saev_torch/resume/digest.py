"""Digests of batches: which samples they hold, and in which order they came."""

import dataclasses
import hashlib
from collections.abc import Mapping

import torch

_MODULUS = 1 << 64
_KEYS = ("example_idx", "token_idx", "layer")


def batch_digest(batch: Mapping[str, torch.Tensor]) -> int:
    """Digest which samples a batch holds, and in which rows, as an integer in [0, 2**64).

    It is the first 8 bytes of SHA-256 over `example_idx`, `token_idx` and, where there is one, `layer`.
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
