"""What a stored value is: how many bytes it has, and how numpy and torch name its type. Nothing else knows."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class ValueType(NamedTuple):
    """A type of values.

    Attributes:
        name: In metadata.json and in torch, as `getattr(torch, name)`.
        storage: As what numpy reads its little-endian bytes. It has no bfloat16: those are their bits, `<u2`.
        nbytes: Bytes of a value.
        exponent: Bits that are all set in a value that is not finite, and in no other.
    """

    name: str
    storage: str
    nbytes: int
    exponent: int

    def is_nonfinite(self, values: Any) -> NDArray[np.bool_]:
        """Tell which of stored values, in an array or a buffer, are not finite: `[n] bool`."""
        bits: NDArray[Any] = np.frombuffer(values, f"<u{self.nbytes}")
        found: NDArray[np.bool_] = (bits & self.exponent) == self.exponent
        return found

    def as_text(self, values: Any, at: int) -> str:
        """One of stored values that is not finite, as "nan", "inf" or "-inf"."""
        bits = int(np.frombuffer(values, f"<u{self.nbytes}")[at])
        sign = 1 << (8 * self.nbytes - 1)
        is_nan = (bits & (sign - 1)) != self.exponent
        return "nan" if is_nan else "-inf" if bits & sign else "inf"


DTYPES = {
    "float32": ValueType("float32", "<f4", 4, 0x7F800000),
    "float16": ValueType("float16", "<f2", 2, 0x7C00),
    "bfloat16": ValueType("bfloat16", "<u2", 2, 0x7F80),
}
"""Types by their name in metadata.json."""

FLOAT32 = DTYPES["float32"]
"""What all protocols before 2.1 store, and what a training step expects unless it asks for what is stored."""


def loaded_type(stored: ValueType, act_dtype: str) -> ValueType:
    """The type that values have in memory, of a directory that stores `stored`: with "stored" the same."""
    return stored if act_dtype == "stored" else DTYPES[act_dtype]
