"""Reading past the page cache, for data that it could not hold until they are wanted again.

A page cache that is too small costs time and gives nothing back: of every page that is read, another one is thrown out,
and both are bookkeeping of about a microsecond per 4 KB. Direct reads leave that out, but a disk takes large pieces of
memory much better than many small ones (4 GB in blocks of 393 KB: 0.9 GB/s into single rows, 3.7 GB/s into one place).
So blocks are read as a whole into memory that a thread keeps for this, and from there to their final places by the same
scattered reads as from a file: it is one, in memory. Of 27 GB, on a machine with 24, threads that did nothing else got
1.8 GB/s through the page cache, and the loader 2.9 this way, with half the processor time.

Data that fit are read so, too, in an epoch that may be the only one, if they are not in the page cache already. When a
second epoch begins they will be wanted again, and go through the page cache.
"""

import ctypes
import functools
import mmap

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import SaevTorchError
from saev_torch.order.selection import Selection
from saev_torch.processes.machine import memory
from saev_torch.reading.extents import Extents, Note, opened_shards, read_extents, split_extents
from saev_torch.reading.ring import Ring
from saev_torch.reading.slots import Slot
from saev_torch.reading.store import ShardStore

__all__ = ["Stage", "reads_past_cache"]

_Int64s = NDArray[np.int64]

_mincore = ctypes.CDLL(None, use_errno=True).mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_ALIGN = 4096
_STAGE_NBYTES = 8 << 20
_N_PROBES, _CACHED_SHARE = 32, 0.2


def reads_past_cache(store: ShardStore, selection: Selection, is_only: bool, note: Note) -> bool:
    """Decide whether to read past the page cache; see the module. This opens some files, which may take its time.

    Args:
        store: Where to read from.
        selection: What is read.
        is_only: Whether the data may not be read again: in a first epoch, or where somebody asks for statistics.
        note: See `read_extents`.
    """
    nbytes = selection.n_samples * selection.sample_nbytes
    return not _fits_page_cache(nbytes) or (is_only and not _is_cached(store, selection, note))


def _fits_page_cache(nbytes: int) -> bool:
    try:
        return nbytes <= memory()[1]
    except (OSError, KeyError, ValueError):
        return True


def _is_cached(store: ShardStore, selection: Selection, note: Note) -> bool:
    """Whether a part of the data worth speaking of is in the page cache, by samples from all over; True if unknown."""
    samples = np.linspace(0, selection.n_samples - 1, min(_N_PROBES, selection.n_samples)).astype(np.int64)
    n_cached, state = 0, ctypes.c_ubyte()
    try:
        shards, rows = selection.disk_rows(selection.cells(samples))
        offsets = rows * selection.md.row_nbytes // mmap.PAGESIZE * mmap.PAGESIZE
        for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
            # To ask by a read that must not wait would start one.
            note(functools.partial(tuple[int, int], (shard, offset)))
            with store.opened(shard) as fd:
                page = np.frombuffer(mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ, offset=offset), dtype=np.uint8)
            failed = _mincore(page.ctypes.data, mmap.PAGESIZE, ctypes.byref(state))
            n_cached += bool(failed or state.value & 1)
    except (OSError, ValueError, SaevTorchError):
        # What is wrong will be told when it is read.
        return True
    # Files are opened, and checked once more, when they are read.
    for shard in set(shards.tolist()):
        store.drop(shard)
    return n_cached >= _CACHED_SHARE * len(samples)


class Stage:
    """Memory of one thread that blocks are read to before their rows go to their places.

    Args:
        ring: The thread's ring.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._slot = Slot(_STAGE_NBYTES, shared=True)

    def read(self, store: ShardStore, extents: Extents, start: int, stop: int, note: Note) -> None:
        """Read a range of extents to their places; see `read_extents`, which also reads what fails here.

        Args:
            store: Where to read from.
            extents: What to read.
            start: First extent.
            stop: One past the last extent.
            note: See `read_extents`.
        """
        lows = extents.offsets[start:stop] // _ALIGN * _ALIGN
        sizes = -(-(extents.offsets[start:stop] + extents.nbytes[start:stop]) // _ALIGN) * _ALIGN - lows
        ends = np.cumsum(sizes)
        first = 0
        while first < len(sizes):
            begin = int(ends[first] - sizes[first])
            most = int(np.searchsorted(ends, begin + _STAGE_NBYTES, side="right")) - first
            most = max(1, min(most, self._ring.n_entries))
            last = next(split_extents(extents, start + first, stop, most))[1] - start
            if sizes[first] > _STAGE_NBYTES:
                read_extents(store, extents, start + first, start + last, note, self._ring)
            else:
                part = slice(first, last)
                self._read(store, extents, start + first, lows[part], sizes[part], note)
            first = last

    def _read(self, store: ShardStore, extents: Extents, first: int, lows: _Int64s, sizes: _Int64s, note: Note) -> None:
        n = len(lows)
        part = slice(first, first + n)
        places = np.cumsum(sizes) - sizes
        vectors = np.stack((places + self._slot.address, sizes), axis=1)
        turns, ones = np.arange(n, dtype=np.int64), np.ones(n, dtype=np.int64)
        with opened_shards(store, extents, first, first + n, note, direct=True) as fds:
            note(functools.partial(extents.where_on_ring, first, first + n, self._ring))
            got = self._ring.read(fds, vectors, turns, ones, lows)
        skipped = extents.offsets[part] - lows
        # A file may end before the last whole page.
        complete = got >= skipped + extents.nbytes[part]
        fds[:] = self._slot.fd
        offsets = np.where(complete, self._slot.file_offset + places + skipped, 0)
        got = self._ring.read(fds, extents.vectors, extents.firsts[part], extents.counts[part], offsets)
        for i in np.flatnonzero(~complete | (got != extents.nbytes[part])).tolist():
            read_extents(store, extents, first + i, first + i + 1, note)
