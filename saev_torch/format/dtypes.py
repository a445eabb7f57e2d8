"""What a stored value is: how many bytes it has, and how numpy and torch name its type. Nothing else knows."""

from typing import NamedTuple


class ValueType(NamedTuple):
    """A type of values: its name, also in torch, what numpy calls its little-endian bytes, and how many they are."""

    name: str
    storage: str
    nbytes: int


DTYPES = {"float32": ValueType("float32", "<f4", 4)}
"""Types by their name in metadata.json."""
