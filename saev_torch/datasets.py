"""The two iterable data sets: batches in file order, and in a seeded random order."""

import dataclasses
import math
from typing import Any

from saev_torch.activations import Activations
from saev_torch.compiled import find_scale_kernels
from saev_torch.config import OrderedConfig, ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.localcopy import local_copy
from saev_torch.metadata import Metadata
from saev_torch.plan import OrderedPlan, ShufflePlan
from saev_torch.schedule import Share
from saev_torch.stats.statistics import compute_scale

__all__ = ["OrderedActivations", "ShuffledActivations"]


class OrderedActivations(Activations):
    """Whole batches in file order.

    Args:
        cfg: What to read.
        rank: This rank; without it torch.distributed or the launcher's variables tell, when iterating.
        world_size: Number of ranks; given with `rank`.

    Attributes:
        cfg: The config.
        n_samples: Samples in the selection.

    Raises:
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
        ConfigError: The config asks for what these shards do not hold.
    """

    cfg: OrderedConfig

    def __init__(self, cfg: OrderedConfig, *, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__(cfg, cfg.shards, (), rank, world_size)

    def _plan(self, epoch: int) -> OrderedPlan:
        return OrderedPlan(self.n_samples, self.batch_size)


class ShuffledActivations(Activations):
    """Whole batches in a seeded random order, another in each epoch; see `saev_torch.plan`.

    Args:
        cfg: What to read.
        rank: This rank; without it torch.distributed or the launcher's variables tell, when iterating.
        world_size: Number of ranks; given with `rank`.

    Attributes:
        cfg: The config.
        n_samples: Samples in the selection.

    Raises:
        ShardsNotFoundError: The directory or one of its files is missing.
        FormatError: A file does not follow the format, or has the wrong size.
        ConfigError: The config asks for what these shards do not hold.
    """

    cfg: ShuffledConfig

    def __init__(self, cfg: ShuffledConfig, *, rank: int | None = None, world_size: int | None = None) -> None:
        recorded = Metadata.load(cfg.shards).layers
        if cfg.layer == -1 and -1 not in recorded:
            raise ConfigError(
                f"ShuffledConfig.layer: expected one of the recorded layers {list(recorded)}, got -1, the default, "
                "which must be changed; choose a layer."
            )
        shards_dir = local_copy(cfg.shards) if cfg.use_tmpdir else cfg.shards
        super().__init__(cfg, shards_dir, cfg.ignore_labels, rank, world_size)
        if cfg.scale_norm:
            # Here, because all workers and epochs must have the same number.
            self._board.scale = compute_scale(dataclasses.replace(cfg, shards=shards_dir))
            # Compiled here, for all workers that are forked.
            find_scale_kernels()

    def _plan(self, epoch: int) -> ShufflePlan:
        cfg = self.cfg
        return ShufflePlan.make(
            self.n_samples, cfg.batch_size, cfg.buffer_size, cfg.n_lanes, cfg.block_size, cfg.seed, epoch
        )

    def _engine_options(self, plan: OrderedPlan | ShufflePlan, share: Share) -> dict[str, Any]:
        n_lanes = plan.n_lanes if isinstance(plan, ShufflePlan) else 1
        lanes_here = n_lanes // math.gcd(share.stride, n_lanes)
        lanes_here = min(lanes_here, len(range(share.first, share.stop, share.stride)))
        return {"n_threads": self.cfg.n_threads, "n_fills": math.ceil(self.cfg.min_buffer_fill * lanes_here)}
