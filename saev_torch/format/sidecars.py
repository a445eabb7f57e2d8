"""Files beside the shards that hold one value for each content token; who does not know one leaves it alone.

    labels.bin          uint8, the label of each token
    token_ids.bin       int32, little-endian, the vocabulary index of each token
    attention_mask.npy  bool, False for padding: a mask, as `mask=` of the configs takes it

Each is `[n_examples, content_tokens_per_example]`, in C order.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saev_torch.errors import FormatError
from saev_torch.format.metadata import Metadata


class Sidecar(NamedTuple):
    """One kind of such a file.

    Attributes:
        name: Its name in a shard directory.
        key: What its values are called in checksums.json and in messages.
        storage: As what numpy reads a value.
    """

    name: str
    key: str
    storage: str

    def header(self, md: Metadata) -> bytes:
        """What stands in front of the values."""
        file = io.BytesIO()
        if self.name.endswith(".npy"):
            descr = {"descr": self.storage, "fortran_order": False, "shape": _shape(md)}
            np.lib.format.write_array_header_1_0(file, descr)
        return file.getvalue()

    def row_nbytes(self, md: Metadata) -> int:
        """Size of the values of one example, in bytes."""
        return md.content_tokens_per_example * np.dtype(self.storage).itemsize

    def offset(self, md: Metadata, example: int) -> int:
        """Where the values of an example begin, in bytes."""
        return len(self.header(md)) + example * self.row_nbytes(md)

    def nbytes(self, md: Metadata) -> int:
        """Size of the file in bytes."""
        return self.offset(md, md.n_examples)

    def check(self, shards_dir: Path, md: Metadata, nbytes: int) -> None:
        """Refuse a file of another size."""
        expected = self.nbytes(md)
        if nbytes != expected:
            raise FormatError(
                f"{shards_dir / self.name}: expected {expected} bytes ({md.n_examples} examples x "
                f"{md.content_tokens_per_example} content tokens), got {nbytes}; copy or write it again"
            )


def _shape(md: Metadata) -> tuple[int, int]:
    return md.n_examples, md.content_tokens_per_example


LABELS = Sidecar("labels.bin", "labels", "|u1")
TOKEN_IDS = Sidecar("token_ids.bin", "token_ids", "<i4")
ATTENTION_MASK = Sidecar("attention_mask.npy", "attention_mask", "|b1")

SIDECARS = (LABELS, TOKEN_IDS, ATTENTION_MASK)
"""All kinds, in the order of their numbers: -1, -2, ... where the number of a shard is expected."""


def sidecar_idx(sidecar: Sidecar) -> int:
    """The number of a sidecar where that of a shard is expected."""
    return -1 - SIDECARS.index(sidecar)
