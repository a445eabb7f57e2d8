"""What a loader does, in figures for a logger: rates, fill of the buffer, and what was waited for."""

import time

from saev_torch.board import Board

__all__ = ["Meter"]

_WAITS = {"wait_disk": "disk_s", "wait_plan": "plan_s", "wait_consumer": "consumer_s"}


class Meter:
    """Turns the sums of a board into rates since the last look, or since the iteration began.

    Args:
        board: Where the readers count.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._last: tuple[float, dict[str, float]] | None = None

    def read(self, rank: int) -> dict[str, float]:
        """Look.

        Args:
            rank: Whose readers.

        Returns:
            `loader/samples_per_s` and `loader/bytes_per_s` (of activations), as the readers finish batches;
            `loader/read_mb`, all megabytes so far, and `loader/read_mb_s`, as `saev` has them; `loader/buffer_fill`,
            the share of the batches that may be open that are; `loader/wait_disk`, `loader/wait_plan` and
            `loader/wait_consumer`, the share of the readers' time in which a batch was awaited from the disk or from
            planning, or nothing was left to read until the consumer took one; `loader/n_readers`, those at work.
        """
        now, sums = time.monotonic(), self._board.sums(rank)
        then, before = self._last or (min(now, sums["began"]), dict.fromkeys(sums, 0.0))
        self._last = now, sums
        spent = max(now - then, 1e-9)
        n_readers = max(1.0, sums["n_active"])
        found = {
            "loader/samples_per_s": (sums["n_samples"] - before["n_samples"]) / spent,
            "loader/bytes_per_s": (sums["nbytes"] - before["nbytes"]) / spent,
            "loader/read_mb": sums["nbytes"] / 1e6,
            "loader/read_mb_s": (sums["nbytes"] - before["nbytes"]) / spent / 1e6,
            "loader/buffer_fill": sums["fill"],
            "loader/n_readers": sums["n_active"],
        }
        for name, key in _WAITS.items():
            found[f"loader/{name}"] = min(1.0, (sums[key] - before[key]) / spent / n_readers)
        return found
