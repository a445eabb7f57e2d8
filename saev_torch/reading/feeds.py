"""What an engine reads from: one directory, or several as if they were one."""

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.format.sidecars import SIDECARS
from saev_torch.order.joint import AnySelection, JointSelection, divide
from saev_torch.order.selection import Selection
from saev_torch.reading.columns import Column
from saev_torch.reading.direct import fits_page_cache, reads_past_cache
from saev_torch.reading.extents import Extents
from saev_torch.reading.gather import Found, Gather
from saev_torch.reading.labels import Labels
from saev_torch.reading.mapping import Mapping as FileMapping
from saev_torch.reading.reader import Pace, Reader, Spot
from saev_torch.reading.source import Source, open_plain, past_cache_of
from saev_torch.reading.store import ShardStore

_Int64s = NDArray[np.int64]
_Values = TypeVar("_Values", NDArray[np.uint8], NDArray[np.int32])


@dataclasses.dataclass(frozen=True)
class Feed:
    """A directory to read from, and what of it: its source, its labels and its token ids have one store."""

    source: Source
    labels: Labels
    token_ids: Column
    selection: Selection

    @property
    def store(self) -> ShardStore:
        """Its store, with descriptors of its own."""
        return self.source.store

    def choose(self, is_only: bool, spot: Spot) -> None:
        """Choose whether to read past the page cache; see `reads_past_cache`."""
        self.source.past_cache = reads_past_cache(self.store, self.selection, is_only, spot)

    def labels_of(self, cells: _Int64s, spot: Spot) -> NDArray[np.uint8]:
        """Read the labels of cells; see `Labels.of_cells`."""
        return self.labels.of_cells(self.selection, cells, spot)

    def token_ids_of(self, cells: _Int64s, spot: Spot) -> NDArray[np.int32]:
        """Read the token ids of cells; see `Column.of_cells`."""
        return self.token_ids.of_cells(self.selection, cells, spot)

    def open_reader(self, pace: Pace | None = None) -> Reader:
        """Make a reader for one thread; see `Source`."""
        return self.source.open_reader(pace)

    def open_gather(self) -> Gather | None:
        """Make what gathers single rows from the page cache; see `Gather.open`."""
        return Gather.open(self.source)

    def finish(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Convert the activations of a batch, unless the readers did."""
        self.source.finish(batch["act"])


class JointStore:
    """Stores one behind the other: their shards are numbered on, and their sidecars likewise, down from -1."""

    def __init__(self, stores: Sequence[ShardStore]) -> None:
        self.stores = tuple(stores)
        self.shards_dir, self.allow_links = stores[0].shards_dir, False
        self.has_labels = any(store.has_labels for store in stores)
        self.has_token_ids = any(store.has_token_ids for store in stores)
        self._firsts = list(itertools.accumulate((store.metadata.n_shards for store in stores[:-1]), initial=0))

    def number(self, shard_idx: int) -> int:
        """The number of the store that a shard is in."""
        return bisect_right(self._firsts, shard_idx) - 1 if shard_idx >= 0 else (-1 - shard_idx) // len(SIDECARS)

    def firsts(self, number: int) -> tuple[int, int]:
        """What the numbers of a store's shards, and those of its sidecars, are counted from."""
        return self._firsts[number], -number * len(SIDECARS)

    def _find(self, shard_idx: int) -> tuple[ShardStore, int]:
        number = self.number(shard_idx)
        return self.stores[number], shard_idx - self.firsts(number)[shard_idx < 0]

    def path(self, shard_idx: int) -> Path:
        """As of a store."""
        store, local = self._find(shard_idx)
        return store.path(local)

    def opened(self, shard_idx: int, direct: bool = False) -> AbstractContextManager[int]:
        """As of a store."""
        store, local = self._find(shard_idx)
        return store.opened(local, direct)

    def mapped(self, shard_idx: int) -> FileMapping | None:
        """As of a store."""
        store, local = self._find(shard_idx)
        return store.mapped(local)

    def drop(self, shard_idx: int) -> None:
        """As of a store."""
        store, local = self._find(shard_idx)
        store.drop(local)

    def may_pass(self, path: Path, offset: int | None, code: int | None, tries: int) -> bool:
        """As of a store."""
        return self.stores[0].may_pass(path, offset, code, tries)

    @property
    def answers_short(self) -> bool:
        """Whether any of them does."""
        return any(store.answers_short for store in self.stores)

    def close(self) -> None:
        """Close all."""
        for store in self.stores:
            store.close()


class _OwnSpot(Spot):
    """Where a thread reads from one of several stores, whose shards and sidecars begin at these numbers of all."""

    def __init__(self, spot: Spot, first_shard: int, first_sidecar: int) -> None:
        super().__init__()
        self._spot, self._firsts = spot, (first_shard, first_sidecar)

    def set(self, where: Callable[[], tuple[int, int]], count: Callable[[], int] | None = None) -> None:
        def find() -> tuple[int, int]:
            idx, offset = where()
            return self._firsts[idx < 0] + idx, offset

        self._spot.set(find, count)

    def clear(self) -> None:
        self._spot.clear()


class JointReader(Reader):
    """Reads each range of extents, which are of one store, as that store wants it."""

    def __init__(self, store: JointStore, readers: Sequence[Reader]) -> None:
        super().__init__(store, readers[0].pace, readers[0].spot)
        self._number, self._readers = store.number, tuple(readers)

    def _of(self, extents: Extents, start: int) -> Reader:
        return self._readers[self._number(int(extents.shards[start]))]

    def announce(self, extents: Extents, start: int, stop: int) -> None:
        """Let that reader announce."""
        self._of(extents, start).announce(extents, start, stop)

    def _read(self, extents: Extents, start: int, stop: int) -> None:
        self._of(extents, start)._read(extents, start, stop)


class JointGather:
    """Gathers rows of several sources, each to where it belongs in a batch; as `Gather`, which copies them."""

    is_fast = True

    def __init__(self, gathers: Sequence[Gather]) -> None:
        self._gathers = tuple(gathers)

    @property
    def is_refused(self) -> bool:
        """Whether the system has refused to map a file, or machine code cannot copy any more."""
        return any(gather.is_refused or not gather.copies_anywhere for gather in self._gathers)

    def find(self, selection: AnySelection, cells: _Int64s, spot: Spot, numbers: _Int64s | None) -> list[Found] | None:
        """As `Gather.find`; None where rows of any source are not in memory."""
        numbers, found = np.arange(len(cells)) if numbers is None else numbers, []
        for one in divide(selection, cells):
            gather = self._gathers[one.number]
            rows = gather.find_some(one.selection, one.cells, spot, numbers[one.at])
            if rows is None:
                return None
            found.append((gather, rows))
        return found


class JointFeed:
    """Several feeds as one, of which a thread reads with one reader.

    Attributes:
        store, selection: Those of all feeds.
    """

    def __init__(self, feeds: Sequence[Feed], repeats: Sequence[bool]) -> None:
        """`repeats` says of each whether it is read more than once in an epoch, so that it is to stay in memory."""
        self._feeds, self._repeats = tuple(feeds), tuple(repeats)
        self.store = JointStore([feed.store for feed in feeds])
        self.selection = JointSelection([feed.selection for feed in feeds])

    def choose(self, is_only: bool, spot: Spot) -> None:
        """Choose for each whether to read past the page cache; see `reads_past_cache`."""
        # What memory could hold of each alone, it may not hold of all.
        fits = fits_page_cache(sum(feed.selection.n_samples * feed.selection.sample_nbytes for feed in self._feeds))
        for number, (feed, repeats) in enumerate(zip(self._feeds, self._repeats, strict=True)):
            feed.choose(is_only and not repeats, self._spot_of(number, spot))
            feed.source.past_cache = feed.source.past_cache or not fits

    def _spot_of(self, number: int, spot: Spot) -> Spot:
        return _OwnSpot(spot, *self.store.firsts(number))

    def labels_of(self, cells: _Int64s, spot: Spot) -> NDArray[np.uint8]:
        """Read the labels of cells `[n]`, `[n] uint8`; 0 for those of a feed that has none."""
        have = [feed.labels_of if feed.store.has_labels else None for feed in self._feeds]
        return self._gather(np.zeros(len(cells), dtype=np.uint8), cells, have, spot)

    def token_ids_of(self, cells: _Int64s, spot: Spot) -> NDArray[np.int32]:
        """Read the token ids of cells `[n]`, `[n] int32`; 0 for those of a feed that has none."""
        have = [feed.token_ids_of if feed.store.has_token_ids else None for feed in self._feeds]
        return self._gather(np.zeros(len(cells), dtype=np.int32), cells, have, spot)

    def _gather(
        self, found: _Values, cells: _Int64s, have: Sequence[Callable[[_Int64s, Spot], _Values] | None], spot: Spot
    ) -> _Values:
        """Read values of cells from those feeds that have them; the others leave `found` as it is."""
        for one in self.selection.divide(cells):
            read = have[one.number]
            if read is not None:
                found[one.at] = read(one.cells, self._spot_of(one.number, spot))
        return found

    def open_reader(self, pace: Pace | None = None) -> Reader:
        """Make a reader for one thread."""
        sources, plain = [feed.source for feed in self._feeds], open_plain(self.store, pace)
        direct = past_cache_of(plain) if any(source.past_cache for source in sources) else plain
        readers = [source.wrap(direct if source.past_cache else plain) for source in sources]
        return JointReader(self.store, readers)

    def open_gather(self) -> JointGather | None:
        """Make what gathers single rows from the page cache; None where rows of any source are to be read otherwise."""
        gathers = [
            Gather.open(feed.source, self.store, self.store.firsts(number)[0])
            for number, feed in enumerate(self._feeds)
        ]
        able = [gather for gather in gathers if gather is not None and gather.copies_anywhere]
        # While rows are gathered, the files of all sources are open.
        n_shards, most = sum(len(store.shards) for store in self.store.stores), self.store.stores[0].most_open
        return JointGather(able) if len(able) == len(gathers) and n_shards <= most else None

    def finish(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Convert the activations of a batch that the readers did not."""
        act = batch["act"]
        for number, feed in enumerate(self._feeds):
            if feed.source.is_unfinished:
                (at,) = torch.nonzero(batch["source"] == number, as_tuple=True)
                rows = act[at]
                feed.source.convert(rows)
                act[at] = rows


AnyGather: TypeAlias = Gather | JointGather
"""What gathers rows of a feed."""

AnyFeed: TypeAlias = Feed | JointFeed
"""What an engine reads from."""
