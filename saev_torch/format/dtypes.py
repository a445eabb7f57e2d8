"""What a stored value is: how many bytes it has, and how numpy and torch name its type. Nothing else knows."""

from typing import NamedTuple


class ValueType(NamedTuple):
    """A type of stored values.

    Attributes:
        name: What metadata.json calls it, and torch, too: `getattr(torch, name)`.
        storage: What numpy calls the bytes of a file, little-endian.
        nbytes: Bytes of one value.
    """

    name: str
    storage: str
    nbytes: int


DTYPES = {"float32": ValueType("float32", "<f4", 4)}
"""Types by their name in metadata.json."""
