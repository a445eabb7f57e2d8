"""What a reader says while it reads: counts for `metrics`, lines in the log."""

import dataclasses
import logging
import time

from saev_torch.board import Board
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.engine import Waits
from saev_torch.schedule import Share
from saev_torch.state import Position

__all__ = ["Watch", "log_to_stderr"]

_log = logging.getLogger("saev_torch")


def log_to_stderr() -> None:
    """With `debug` and no logging set up, say it on stderr."""
    if not _log.handlers and not logging.getLogger().handlers:
        _log.addHandler(logging.StreamHandler())
    _log.setLevel(logging.DEBUG)


class Watch:
    """Counts what was done for `metrics`, and logs it every `log_every_s` seconds."""

    def __init__(self, cfg: OrderedConfig | ShuffledConfig, position: Position, share: Share, board: Board) -> None:
        self._row = board.begin(position.rank, share.first % share.stride)
        self._waits = Waits()
        self._every_s = cfg.log_every_s
        self._name = f"{cfg.shards}: epoch {position.epoch}, rank {position.rank}, reader {share.first}/{share.stride}"
        self._n_samples = 0
        self._began = self._logged = time.monotonic()
        if cfg.debug:
            log_to_stderr()
            _log.debug("%s: begins at batch %d of %d", self._name, position.batch, share.stop)

    def count(self, n_samples: int, waits: Waits, fill: float) -> None:
        """Count a batch that was made, with what was waited for since the iteration began."""
        self._n_samples += n_samples
        row, before = self._row, self._waits
        row["n_samples"] += n_samples
        row["nbytes"] += waits.nbytes - before.nbytes
        row["disk_s"] += waits.disk_s - before.disk_s
        row["plan_s"] += waits.plan_s - before.plan_s
        row["consumer_s"] += waits.consumer_s - before.consumer_s
        row["fill"] = fill
        self._waits = dataclasses.replace(waits)
        now = time.monotonic()
        if now - self._logged < self._every_s:
            return
        self._logged = now
        spent = now - self._began
        shares = {"disk": waits.disk_s, "planning": waits.plan_s, "the consumer": waits.consumer_s}
        _log.info(
            "%s: %.0f samples/s, %.2f GB/s; waited for %s",
            self._name, self._n_samples / spent, waits.nbytes / spent / 1e9,
            ", ".join(f"{name} {100 * seconds / spent:.0f}%" for name, seconds in shares.items()),
        )  # fmt: skip

    def stop(self) -> None:
        """The iteration ended."""
        self._row["is_active"] = 0
