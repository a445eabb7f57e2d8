"""Random access to samples, as a plain map-style `torch` data set."""

import logging
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from saev_torch.batch import Sample, Samples, describe, make_batch
from saev_torch.config import IndexedConfig
from saev_torch.errors import ConfigError, StateError
from saev_torch.format.files import short
from saev_torch.format.metadata import Described
from saev_torch.format.plain import as_plain
from saev_torch.format.rules import is_integer
from saev_torch.format.sidecars import TOKEN_IDS
from saev_torch.order.selection import IndexMap
from saev_torch.order.steps import slot_nbytes
from saev_torch.order.uniform import UniformPlan
from saev_torch.order.weighted import WeightedDraw
from saev_torch.processes.counters import log_to_stderr
from saev_torch.processes.leaving import come_by
from saev_torch.reading.columns import Column
from saev_torch.reading.labels import Labels
from saev_torch.reading.many import ManyReader, are_many
from saev_torch.reading.selecting import open_store, select, tell_counted_layers
from saev_torch.reading.single import SingleReader
from saev_torch.reading.slots import OpenBatch, Slot, SlotPool, can_share
from saev_torch.reading.source import Source
from saev_torch.resume.cursor import Cursor
from saev_torch.resume.state import MAX_COUNT, Position

_log = logging.getLogger("saev_torch")

_N_SLOTS = 4
# What a copy in another process makes for itself.
_OF_PROCESS = ("_labels", "_token_ids", "_source", "_pool", "_many", "_single")


class IndexedDataset(Described, Dataset[dict[str, Any]]):
    """Random access to samples by number, in the order of the bytes on disk.

    `ds[i]` is a dict of `act` (`[d_model]`, as in a batch), `example_idx`, `token_idx`, and where a batch has such a
    column `token_label` and `token_ids` (-1 for a special token) and `layer`. `DataLoader(ds, batch_size=16384,
    shuffle=True)` reads a whole batch at once through `__getitems__`.

    Args:
        cfg: What to read.

    Attributes:
        cfg: The config.
        metadata: Metadata of the shards.
        index_map: Numbers of samples, and where they are.

    Errors are those of `OrderedActivations`.
    """

    Example = Sample

    def __init__(self, cfg: IndexedConfig) -> None:
        self.cfg = cfg
        self._store = open_store("IndexedDataset", cfg, IndexedConfig)
        self.metadata = self._store.metadata
        self._selection = select(self._store, cfg)
        self.index_map = IndexMap(self.metadata, cfg.tokens, cfg.layer)
        tell_counted_layers(cfg, self.metadata.layers)
        self._begin()
        if cfg.debug:
            log_to_stderr()
            _log.debug("%s: %d samples", cfg.shards, len(self))

    def _begin(self) -> None:
        self._source = Source(self._store, loaded=self._selection.act_type, gathers=True)
        self._labels, self._token_ids = Labels(self._store), Column(self._store, TOKEN_IDS)
        self._pool: SlotPool | None = None
        self._many = ManyReader(self._source, self._selection)
        self._single = SingleReader(self._labels, self._token_ids, self._selection)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OF_PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        return self._selection.n_samples

    def transform(self, act: np.ndarray[Any, np.dtype[np.float32]]) -> torch.Tensor:
        """Make the `act` of a sample of what was read, `[d_model] float32` whatever is stored: here a copy.

        A subclass may make something else of it. Then it is called for each sample, which takes much longer than a
        batch at once; where it is not overridden, it is not called at all.
        """
        return torch.from_numpy(act.copy())

    def __repr__(self) -> str:
        cfg = self.cfg
        return (
            f"<IndexedDataset of {cfg.shards}: tokens={cfg.tokens!r}, layer={cfg.layer!r}, {len(self)} samples, "
            "whatever the rank>"
        )

    def __getitem__(self, i: int) -> dict[str, Any]:
        # `bool` is none of these.
        is_plain = (type(i) is int or isinstance(i, np.integer)) and 0 <= i < len(self)
        sample = self._read_one(int(i)) if is_plain else None
        return self._transformed(self._read(self._check([i])))[0] if sample is None else sample

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        """Read many samples at once.

        Args:
            indices: Numbers of samples.

        Returns:
            The samples, in that order.

        Raises:
            IndexError: A number is negative or not below `len(self)`.
            TypeError: A number is no integer.
            ReadError: Reading failed.
        """
        return self._transformed(self._read(self._check(indices)))

    def _check(self, indices: Any) -> NDArray[np.int64]:
        """Return numbers of samples as an array; the integers may be of any type and size."""
        try:
            numbers = np.asarray(indices)
            if numbers.ndim == 1 and numbers.dtype.kind in "Of":
                # Integers beyond 64 bits, or such beyond 63 beside others; and what is none.
                numbers = np.array([operator.index(i) for i in indices], dtype=object)
        except (TypeError, ValueError, RuntimeError):
            numbers = np.array(None)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuO":
            raise TypeError(
                f"indices: expected integers, numbers of samples from 0, got {short(indices)}; for a range of samples "
                "take __getitems__(range(start, stop))."
            )
        wrong = (numbers < 0) | (numbers >= len(self))
        if wrong.any():
            raise IndexError(f"sample {short(int(numbers[wrong][0]))} is out of range: there are {len(self)}, from 0.")
        return numbers.astype(np.int64)

    def _transformed(self, samples: Samples) -> Sequence[dict[str, Any]]:
        return samples if self._is_plain else [self._transform(sample) for sample in samples]

    @property
    def _is_plain(self) -> bool:
        return type(self).transform is IndexedDataset.transform

    def _transform(self, sample: Sample) -> Sample:
        # numpy has no bfloat16.
        return Sample(sample, act=self.transform(sample["act"].float().numpy()))

    @property
    def has_labels(self) -> bool:
        """Whether there are labels."""
        return self._store.has_labels

    def labels_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read the labels of samples `[m] int64`: `[m] int64`, -1 for special tokens."""
        order = np.argsort(samples)
        cells = self._selection.cells(samples[order])
        labels = np.empty(len(samples), dtype=np.int64)
        labels[order] = self._labels.of_cells(self._selection, cells)
        labels[order[self._selection.split(cells)[2] < self._selection.n_special]] = -1
        return labels

    def _read_one(self, i: int) -> Sample | None:
        """Read one sample in the short way; None where that needs patience, or will be an error."""
        come_by()
        found = self._single.read(i)
        if found is None:
            return None
        sample = Sample(found)
        return sample if self._is_plain else self._transform(sample)

    def _read(self, samples: np.ndarray[Any, np.dtype[np.int64]]) -> Samples:
        come_by()
        n, selection = len(samples), self._selection
        slot = self._acquire(n)
        try:
            order = np.argsort(samples)
            cells = selection.cells(samples[order])
            back = np.empty_like(order)
            back[order] = np.arange(n)
            finish = self._many.read(cells, order, slot)
            labels = self._labels.of_cells(selection, cells)[back] if self._store.has_labels else None
            token_ids = self._token_ids.of_cells(selection, cells)[back] if self._store.has_token_ids else None
        except BaseException:
            # Threads that were not waited for may still read to it: the memory lives as long as their tasks.
            if self._pool is not None:
                self._pool.forget(slot)
            raise
        opened = OpenBatch(slot, n, cells[back], labels, token_ids)
        describe(opened, selection, label_key="token_label", digests=False)
        batch = make_batch(opened)
        finish(batch["act"])
        return Samples(batch)

    def _acquire(self, n: int) -> Slot:
        nbytes = slot_nbytes(n, self._selection.act_nbytes)
        if not are_many(n):
            return Slot(nbytes, shared=False)
        # Another thread may put a pool of smaller slots in its place.
        pool = self._pool
        # A worker that was forked inherits one whose memory its parent cannot see.
        if pool is None or pool.nbytes < nbytes or not pool.is_own:
            pool = self._pool = SlotPool(nbytes, shared=can_share())
        return pool.acquire(_N_SLOTS)


class UniformBatches(Sampler[NDArray[np.int64]]):
    """Numbers of samples, batch by batch, in a uniformly random order: a batch sampler in constant memory.

    `DataLoader(ds, batch_sampler=UniformBatches(len(ds), 16384))` is what `shuffle=True` is, but with an order that
    is seeded, is another one in each epoch, is shared among ranks as that of `ShuffledActivations` is, and resumes.
    torch's own sampler makes a list of all numbers first. Each batch is `[batch] int64`.

    With `label_weights` samples are drawn with replacement instead, each in proportion to the weight of its label:
    of 1.0 unless another is named, and -1 stands for special tokens. There are as many batches as without.

    Args:
        n: Number of samples; with `label_weights` the data set, whose labels are read.
        batch_size: Samples in a batch.
        seed: Seed of the order.
        drop_last: Leave out the last batch where it is not full.
        label_weights: Weights by label; see above.

    Raises:
        ConfigError: A bad value, or no labels where they are asked for.
    """

    def __init__(
        self,
        n: "int | IndexedDataset",
        batch_size: int,
        seed: int = 17,
        drop_last: bool = False,
        label_weights: Mapping[int, float] | None = None,
    ) -> None:
        size = len(n) if isinstance(n, IndexedDataset) else as_plain(n)
        batch_size, seed = as_plain(batch_size), as_plain(seed)
        bounds = (
            ("n", size, 1, 1 << 62),
            ("batch_size", batch_size, 1, 2**31 - 1),
            ("seed", seed, -math.inf, math.inf),
        )
        for name, value, least, most in bounds:
            if not is_integer(value, least, most):
                raise ConfigError(f"{name}: expected an integer from {least} to {most}, got {value!r}.")
        if not isinstance(drop_last, bool):
            raise ConfigError(f"drop_last: expected True or False, got {drop_last!r}.")
        self.n, self.batch_size, self.seed, self.drop_last = size, batch_size, seed, drop_last
        self._draw = None if label_weights is None else _weighted(n, label_weights)
        self._cursor = Cursor(size // batch_size if drop_last else -(-size // batch_size), drop_last)

    def __len__(self) -> int:
        return self._cursor.end() // self._cursor.world.world_size

    # Arrays of int64, which torch's own annotations do not expect of a batch sampler.
    def __iter__(self) -> Iterator[Any]:
        # With the first batch, because `DataLoader` with workers makes two iterators and asks only one.
        iteration = self._cursor.begin()
        plan, share = UniformPlan(self.n, self.batch_size, self.seed, iteration.start.epoch), iteration.share
        for number in range(share.first, share.stop, share.stride):
            batch = number % plan.n_batches
            samples = plan.locate(batch) if self._draw is None else self._draw(plan, batch)
            iteration.count(None)
            yield samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the ones after it count on from there."""
        self._cursor.set_epoch(epoch)

    def _identity(self) -> dict[str, Any]:
        weights = None if self._draw is None else self._draw.digest
        sizes = {"n": self.n, "batch_size": self.batch_size, "seed": self.seed, "label_weights": weights}
        return {"version": 1, "order": "uniform batches", **sizes}

    def state_dict(self, n_batches: int | None = None) -> dict[str, Any]:
        """Where this sampler stands, as a small dict of JSON's types; behind the last batch, at the next epoch.

        Args:
            n_batches: Batches that this rank has taken since the latest iteration began. To be given where workers
                read them: the sampler is asked ahead of what they read. Left out, it is what was asked of it.
        """
        here = self._cursor.position() if n_batches is None else self._cursor.position_after(n_batches)
        return {**self._identity(), "epoch": here.epoch, "batch": here.batch, "world_size": here.world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where a state was taken, with any number of ranks.

        Raises:
            StateError: It is no state, or of other samples, another batch size or seed.
        """
        expected = self._identity()
        if not isinstance(state, dict) or not {*expected, "epoch", "batch"} <= state.keys():
            raise StateError(f"state: expected what UniformBatches.state_dict() returned, got {short(state)}.")
        for key, value in expected.items():
            if type(state[key]) is not type(value) or state[key] != value:
                raise StateError(
                    f"state: {key}: expected {short(value)}, got {short(state[key])}; use the same sampler."
                )
        for key, most in (("epoch", MAX_COUNT), ("batch", -(-self.n // self.batch_size) + (1 << 20))):
            if not is_integer(state[key], 0, most):
                raise StateError(f"state: {key}: expected an integer from 0 to {most}, got {short(state[key])}.")
        self._cursor.load(Position(state["epoch"], state["batch"]))


def _weighted(data_set: "int | IndexedDataset", weights: Mapping[int, float]) -> WeightedDraw:
    if not isinstance(data_set, IndexedDataset):
        raise ConfigError(f"n: expected the IndexedDataset, because of label_weights, got {data_set!r}; give it.")
    if not data_set.has_labels:
        raise ConfigError(f"label_weights: expected labels, got {data_set.cfg.shards} without; leave it out.")
    return WeightedDraw(weights, data_set.labels_of)
