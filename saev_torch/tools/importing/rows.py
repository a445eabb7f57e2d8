"""What all sources are to the importer: pieces, one behind the other, each a run of rows `[n, d_model]`."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from saev_torch.errors import ConfigError, FormatError

MAX_EXAMPLE_NBYTES = 1 << 30
"""An example is held in memory as a whole."""


class Piece(Protocol):
    """One array of a source.

    Attributes:
        where: The file, and the array's name in it, for messages.
        shape: `(examples, tokens, d_model)` or `(rows, d_model)`.
        dtype: Of its values.
        n_together: Rows that are decoded together, so that reading fewer takes as long.
    """

    where: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    n_together: int

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows `start..stop`, `[n, d_model]`, in memory that the next call may use again."""
        ...

    def close(self) -> None:
        """Let go of what is open; reading again opens it again."""
        ...


class Joined:
    """The rows of all pieces of a source, which must fit each other.

    Attributes:
        tokens_per_example: Rows of an example, one behind the other.
        d_model: Width of a row.
        dtype: Of the values; None where pieces differ.
        n_examples: Examples in all pieces.
        n_together: Examples that are decoded together.

    Raises:
        FormatError: A piece has another shape than it should have.
        ConfigError: `tokens_per_example` does not fit the source.
    """

    def __init__(self, pieces: Sequence[Piece], tokens_per_example: int | None) -> None:
        for piece in pieces:
            if len(piece.shape) not in (2, 3) or not all(piece.shape[1:]):
                raise FormatError(
                    f"{piece.where}: expected an array [examples, tokens, d_model] or [rows, d_model], got "
                    f"{list(piece.shape)}; give it another shape, or choose another array"
                )
        first = pieces[0]
        self.d_model = first.shape[-1]
        self.tokens_per_example = _choose_tokens(first, tokens_per_example)
        for piece in pieces:
            if piece.shape[1:] != first.shape[1:]:
                raise FormatError(
                    f"{piece.where}: expected {_free(first.shape)}, as in {first.where}, got {list(piece.shape)}; "
                    "import files of one shape at a time"
                )
        dtypes = {piece.dtype for piece in pieces}
        self.dtype = first.dtype if len(dtypes) == 1 else None
        self._pieces = [piece for piece in pieces if piece.shape[0]]
        self._starts = [0]
        for piece in self._pieces:
            self._starts.append(self._starts[-1] + math.prod(piece.shape[:-1]))
        self.n_examples, n_over = divmod(self._starts[-1], self.tokens_per_example)
        if not self.n_examples or n_over:
            raise FormatError(
                f"{first.where}: expected one or more examples of {self.tokens_per_example} rows in all files, got "
                f"{self._starts[-1]} rows; give another tokens_per_example, or leave out the last {n_over} rows"
            )
        self.n_together = -(-max(piece.n_together for piece in self._pieces) // self.tokens_per_example)
        self._at = 0

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read examples, `[n, 1, tokens_per_example, d_model]`, in memory that the next call may use again."""
        low, high = start * self.tokens_per_example, stop * self.tokens_per_example
        parts = []
        while low < high:
            piece = self._go_to(low)
            offset = self._starts[self._at]
            until = min(high, self._starts[self._at + 1])
            part = piece.read(low - offset, until - offset)
            # The next piece may be of the kind that uses the memory again, but it is another one.
            parts.append(part)
            low = until
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows.view(stop - start, 1, self.tokens_per_example, self.d_model)

    def _go_to(self, row: int) -> Piece:
        """Return the piece that has a row; of all pieces one is open."""
        while not self._starts[self._at] <= row < self._starts[self._at + 1]:
            self._pieces[self._at].close()
            self._at += 1 if row >= self._starts[self._at + 1] else -1
        return self._pieces[self._at]

    def close(self) -> None:
        """Let go of what is open."""
        for piece in self._pieces:
            piece.close()


def _choose_tokens(first: Piece, tokens_per_example: int | None) -> int:
    stored = first.shape[1] if len(first.shape) == 3 else None
    if None not in (stored, tokens_per_example) and stored != tokens_per_example:
        raise ConfigError(
            f"tokens_per_example: expected {stored}, as {first.where} has {list(first.shape)}, got "
            f"{tokens_per_example}; leave it out."
        )
    chosen = stored or (1 if tokens_per_example is None else tokens_per_example)
    if chosen < 1:
        raise ConfigError(f"tokens_per_example: expected at least 1, got {chosen}.")
    return chosen


def _free(shape: tuple[int, ...]) -> str:
    return f"[any, {', '.join(map(str, shape[1:]))}]"
