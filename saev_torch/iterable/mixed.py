"""Batches that are mixed of several directories, in exact shares."""

import dataclasses
import math
import operator
import typing
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from saev_torch.batch import ActivationBatch, make_batch
from saev_torch.config import ShuffledConfig
from saev_torch.errors import ConfigError
from saev_torch.format.plain import as_plain
from saev_torch.format.rules import is_integer
from saev_torch.iterable.activations import Activations, ShuffledActivations
from saev_torch.order.joint import JointSelection
from saev_torch.order.mixture import MixedSource, MixturePlan, Until, Weights
from saev_torch.order.permute import make_key
from saev_torch.order.shuffle import ShufflePlan
from saev_torch.order.steps import Plan, Share
from saev_torch.processes.counters import Counters
from saev_torch.processes.world import Rank
from saev_torch.reading.feeds import JointFeed
from saev_torch.reading.slots import OpenBatch
from saev_torch.resume.cursor import Cursor
from saev_torch.resume.mixed import Recorded, dump_mixed, load_mixed
from saev_torch.resume.state import Position

Weighted = tuple[ShuffledConfig, float]
"""What to read, and its weight."""


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What a mixture was made of, and how it reads: where the configs of its sources differ, as the largest says.

    Attributes:
        sources, batch_size, until, seed: As given to `MixedActivations`.
        shares: The part of each source, in lowest terms.
    """

    sources: tuple[ShuffledConfig, ...]
    shares: tuple[Fraction, ...]
    batch_size: int
    until: Until
    seed: int

    @property
    def shards(self) -> str:
        """The directories, for messages."""
        return " + ".join(str(cfg.shards) for cfg in self.sources)

    @property
    def drop_last(self) -> bool:
        """Whether a last batch that is not full is left out: all sources say the same."""
        return self.sources[0].drop_last

    @property
    def buffer_size(self) -> int:
        """Batches of the mixture that are held for shuffling by the whole job."""
        return max(cfg.buffer_size for cfg in self.sources)

    @property
    def n_threads(self) -> int:
        """Reading threads per process."""
        return max(cfg.n_threads for cfg in self.sources)

    @property
    def min_buffer_fill(self) -> float:
        """Share of its buffer that a process loads before its first batch."""
        return max(cfg.min_buffer_fill for cfg in self.sources)

    @property
    def batch_timeout_s(self) -> float:
        """Seconds without a batch and without a read that finishes."""
        return max(cfg.batch_timeout_s for cfg in self.sources)

    @property
    def debug(self) -> bool:
        """Whether to log what is opened and read."""
        return any(cfg.debug for cfg in self.sources)

    @property
    def log_every_s(self) -> float:
        """Seconds between two lines in the log."""
        return min(cfg.log_every_s for cfg in self.sources)


def _make_mixing(sources: Any, batch_size: Any, until: Any, seed: Any) -> Mixing:
    batch_size, seed = as_plain(batch_size), as_plain(seed)
    for name, value, expected, is_right in (
        ("batch_size", batch_size, "an integer from 1 to 2147483647", is_integer(batch_size, 1, 2**31 - 1)),
        ("until", until, "'shortest' or 'longest'", until in typing.get_args(Until)),
        ("seed", seed, "an integer", is_integer(seed)),
    ):
        if not is_right:
            raise ConfigError(f"MixedActivations.{name}: expected {expected}, got {value!r}; change it.")
    if isinstance(sources, str) or not isinstance(sources, Sequence) or not sources:
        raise ConfigError(
            f"MixedActivations.sources: expected a list of (ShuffledConfig, weight), got {sources!r}; give it one or "
            "more."
        )
    pairs = [_check_source(i, source) for i, source in enumerate(sources)]
    whole = sum((weight for _, weight in pairs), Fraction(0))
    # What is left of a decimal fraction in binary is rounded away.
    shares = tuple((weight / whole).limit_denominator(1 << 30) for _, weight in pairs)
    starved = shares.index(0) if 0 in shares else Weights.of(shares).starved
    if starved is not None:
        raise ConfigError(
            f"MixedActivations.sources[{starved}]: expected a weight that is not below a billionth of the others, got "
            f"{sources[starved][1]!r}; leave that source out."
        )
    configs = tuple(cfg for cfg, _ in pairs)
    for i, cfg in enumerate(configs):
        if cfg.drop_last != configs[0].drop_last:
            raise ConfigError(
                f"MixedActivations.sources[{i}].drop_last: expected {configs[0].drop_last} as of sources[0], got "
                f"{cfg.drop_last}; a mixture has one last batch, so let all say the same."
            )
    return Mixing(configs, shares, batch_size, until, seed)


def _check_source(i: int, source: Any) -> tuple[ShuffledConfig, Fraction]:
    name = f"MixedActivations.sources[{i}]"
    if not isinstance(source, tuple | list) or len(source) != 2 or not isinstance(source[0], ShuffledConfig):
        raise ConfigError(f"{name}: expected (ShuffledConfig, weight), got {source!r}; give it a config and a weight.")
    cfg, weight = source[0], as_plain(source[1])
    is_number = isinstance(weight, int | float | Fraction) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < math.inf:
        raise ConfigError(f"{name}: expected a finite weight above 0, got {weight!r}; change it, or leave it out.")
    return cfg, Fraction(weight)


class MixedActivations(Activations):
    """Whole batches mixed of several directories, each in a random order of its own; see `saev_torch.order.mixture`.

    Of all rows up to any one, each source has its weight's share, rounded: what a batch cannot hold of it the next ones
    do, so that shares are exact in the long run. Rows of the sources take turns. Batches have one column more, `source`
    `[batch] int64`, the number of each row's source. Where any source has labels there is `token_labels`, which is -1
    for the rows of a source that has none, and `token_ids` likewise; where any has `layer="all"`, `layer` says which
    one each row is of.

    An epoch of a mixture begins each source anew. With `until="shortest"` it ends before a sample would come twice: of
    each source but the shortest there is a random part, another one in each epoch. With "longest" it ends when each
    sample has come: those of the longest source once, while the others begin their next order whenever they are over.

    The configs say what to read and how to mix it: `shards`, `tokens`, `layer`, `examples`, `mask`, `ignore_labels`,
    `scale_norm`, `order`, `n_lanes`, `block_size`, `seed` and `act_dtype` count for each source alone. `batch_size` is
    that of the mixture. A mixture has one buffer, of batches of its own: `buffer_size`, and likewise `n_threads`,
    `min_buffer_fill` and `batch_timeout_s`, are the largest that any source names.

    Args:
        sources: What to read, and the weight of each: any finite numbers above 0.
        batch_size: Samples in a batch.
        until: "shortest" or "longest", see above.
        seed: Seed of the order; those of the sources count, too.
        rank, world_size: As of `OrderedActivations`.

    Attributes:
        cfg: What it was made of.
        sources: A data set for each source, for its `metadata`, `n_samples` and `scale`.
        metadata: Metadata of the first source; all have its `d_model`.
        n_samples: Rows in an epoch.

    Raises:
        ConfigError: A bad value, or sources whose samples differ in shape or type.
        ShardsNotFoundError, FormatError: As of `OrderedActivations`.
    """

    cfg: Mixing  # type: ignore[assignment]

    def __init__(
        self,
        sources: Sequence[Weighted],
        batch_size: int,
        until: Until = "shortest",
        seed: int = 17,
        *,
        rank: Rank = None,
        world_size: int | None = None,
    ) -> None:
        self.cfg = cfg = _make_mixing(sources, batch_size, until, seed)
        self._weights = Weights.of(cfg.shares)
        self.pools = {}
        n_rows = [max(1, round(share * cfg.batch_size)) for share in cfg.shares]
        self.sources = tuple(
            ShuffledActivations(dataclasses.replace(own, batch_size=n))
            for own, n in zip(cfg.sources, n_rows, strict=True)
        )
        self.metadata = self.sources[0].metadata
        self._require_alike()
        self.n_samples = self._weights.n_rows([source.n_samples for source in self.sources], cfg.until)
        self.cursor = Cursor(self.n_batches, self.drop_last, rank, world_size)
        self.counters = Counters()

    def _require_alike(self) -> None:
        """Make sure that rows of all sources fit into one batch."""
        seen = [_describe(source) for source in self.sources]
        for i, found in enumerate(seen):
            for key, value in found.items():
                if value != seen[0][key]:
                    raise ConfigError(
                        f"MixedActivations.sources[{i}]: expected {key} {seen[0][key]} as of sources[0] "
                        f"({self.sources[0].cfg.shards}), got {value} ({self.sources[i].cfg.shards}); the rows of a "
                        "batch must be alike, so mix others, or change the configs."
                    )

    def __repr__(self) -> str:
        parts = ", ".join(f"{share} {own.shards}" for share, own in zip(self.cfg.shares, self.cfg.sources, strict=True))
        try:
            world = f"{len(self)} of them for {self.cursor.world}"
        except ConfigError as err:
            world = str(err)
        return f"<{type(self).__name__} of {parts}: {self.n_batches} batches of {self.batch_size}, {world}>"

    @property
    def scale(self) -> None:
        """None: each source has a scale of its own, `sources[i].scale`."""

    def _selected(self) -> JointSelection:
        return JointSelection([source._own_selection() for source in self.sources])

    def _plan(self, epoch: int | None) -> MixturePlan:
        epoch = self.cursor.epoch if epoch is None else operator.index(epoch)
        orders = []
        for i, source in enumerate(self.sources):
            own, key = source.cfg, make_key(self.cfg.seed, i, source.cfg.seed)
            sizes = own.buffer_size, own.n_lanes, own.block_size
            orders.append(MixedSource(source.n_samples, own.batch_size, own.order, *sizes, key))
        return MixturePlan(self.n_samples, self.batch_size, self._weights, tuple(orders), epoch)

    def _engine_options(self, plan: Plan, share: Share) -> dict[str, Any]:
        n_own, n_fills = len(range(share.first, share.stop, share.stride)), 0
        for made in plan.first_passes() if isinstance(plan, MixturePlan) else ():
            # What comes later is not waited for.
            n_lanes = made.plan.n_lanes if isinstance(made.plan, ShufflePlan) and made.first == 0 else 0
            lanes_here = min(n_own, n_lanes // math.gcd(share.stride, n_lanes or 1))
            n_fills += math.ceil(self.cfg.min_buffer_fill * lanes_here)
        return {"n_threads": self.cfg.n_threads, "n_fills": n_fills}

    def _open_feed(self, plan: Plan, scale: float | None) -> JointFeed:
        repeats = [
            source.cfg.order == "uniform" or (isinstance(plan, MixturePlan) and plan.n_passes(i) > 1)
            for i, source in enumerate(self.sources)
        ]
        return JointFeed([source.open_own(source.scale) for source in self.sources], repeats)

    def _make_batch(self, opened: OpenBatch) -> ActivationBatch:
        batch, stores = make_batch(opened), [source._store for source in self.sources]
        for key, have in (
            ("token_labels", [store.has_labels for store in stores]),
            ("token_ids", [store.has_token_ids for store in stores]),
        ):
            if key in batch and not all(have):
                batch[key][~torch.tensor(have)[batch["source"]]] = -1
        return batch

    def find(
        self, example_idx: int, token_idx: int, layer: int | None = None, epoch: int | None = None, source: int = 0
    ) -> tuple[int, int]:
        """Tell in which batch a sample of a source comes first; see `OrderedActivations.find`.

        Args:
            example_idx: Number of the example in its directory.
            token_idx: Content token, from 0; -1 for the special token.
            layer: Recorded layer, where the source has `layer="all"`.
            epoch: Number of the epoch; left out, the latest.
            source: Number of the source.

        Returns:
            Number of the batch in the sequence of all ranks, and the row in it.

        Raises:
            IndexError: The selection has no such sample, or it does not come in this epoch.
        """
        if not 0 <= source < len(self.sources):
            raise IndexError(f"source {source} is out of range: there are {len(self.sources)}, from 0.")
        layer = None if layer is None else operator.index(layer)
        sample = self._selected().find(source, operator.index(example_idx), operator.index(token_idx), layer)
        return self._plan(epoch).find(sample)

    def _recorded(self) -> list[Recorded]:
        return [Recorded(source.metadata, source.recording, source.cfg) for source in self.sources]

    def _mixing(self) -> dict[str, Any]:
        """What decides the order, beside the sources."""
        decisive = {name: getattr(self.cfg, name) for name in ("until", "batch_size", "seed")}
        return {"order": "mixture", "weights": [str(share) for share in self.cfg.shares], **decisive}

    def _dump(self, position: Position) -> dict[str, Any]:
        return dump_mixed(self._mixing(), self._recorded(), [source.scale for source in self.sources], position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where a state was taken, with any number of workers and ranks.

        Args:
            state: What `state_dict` returned.

        Raises:
            StateError: It is no state, of a newer version, or of other data, weights or configs.
        """
        sizes = self.n_samples, self.batch_size
        position, scales = load_mixed(self._mixing(), self._recorded(), state, *sizes)
        for source, scale in zip(self.sources, scales, strict=True):
            source.cursor.scale = scale
        self.cursor.load(position)


def _describe(source: ShuffledActivations) -> dict[str, Any]:
    """What the samples of all sources must share, by its name for a person."""
    selection = source._own_selection()
    shape = (selection.n_parts, source.d_model) if selection.has_parts else (source.d_model,)
    return {"d_model": source.d_model, "samples of shape": shape, "activations of type": selection.act_type.name}
