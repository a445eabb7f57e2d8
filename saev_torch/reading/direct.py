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
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saev_torch.errors import SaevTorchError
from saev_torch.order.selection import Selection
from saev_torch.processes.machine import memory
from saev_torch.reading.extents import Extents
from saev_torch.reading.reader import Reader, Spot
from saev_torch.reading.ring import RingReader
from saev_torch.reading.slots import Slot
from saev_torch.reading.store import ShardStore

_Int64s = NDArray[np.int64]

_mincore: Any = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
if _mincore is not None:
    _mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_ALIGN = 4096
_STAGE_NBYTES = 8 << 20
_N_PROBES, _CACHED_SHARE = 32, 0.2


def reads_past_cache(store: ShardStore, selection: Selection, is_only: bool, spot: Spot) -> bool:
    """Decide whether to read past the page cache; see the module. This opens some files, which may take its time.

    Data that `is_only` may not be read again: in a first epoch, or where somebody asks for statistics.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    nbytes = selection.n_samples * selection.sample_nbytes
    return not fits_page_cache(nbytes) or (is_only and not _is_cached(store, selection, spot))


def fits_page_cache(nbytes: int) -> bool:
    """Whether the page cache can hold so many bytes; True where nobody knows."""
    try:
        return nbytes <= memory()[1]
    except (OSError, KeyError, ValueError):
        return True


def _is_cached(store: ShardStore, selection: Selection, spot: Spot) -> bool:
    """Whether a part of the data worth speaking of is in the page cache, by samples from all over; True if unknown."""
    if _mincore is None:
        return True
    samples = np.linspace(0, selection.n_samples - 1, min(_N_PROBES, selection.n_samples)).astype(np.int64)
    n_cached, state = 0, ctypes.c_ubyte()
    try:
        shards, rows = selection.disk_rows(selection.cells(samples))
        offsets = rows * selection.md.row_nbytes // mmap.PAGESIZE * mmap.PAGESIZE
        for shard, offset in zip(shards.tolist(), offsets.tolist(), strict=True):
            # To ask by a read that must not wait would start one.
            spot.set(functools.partial(tuple[int, int], (shard, offset)))
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


class DirectReader(Reader):
    """Reads blocks past the page cache to memory of one thread, and from there to the places of their rows.

    It uses the ring of another reader, which reads what is too large here, or fails.
    """

    def __init__(self, ring_reader: RingReader) -> None:
        super().__init__(ring_reader.store, ring_reader.pace, ring_reader.spot)
        self._reader, self._ring = ring_reader, ring_reader.ring
        self._stage = Slot(_STAGE_NBYTES, shared=True)

    def announce(self, extents: Extents, start: int, stop: int) -> None:
        """Nothing to ask for: what the kernel reads ahead goes to the page cache."""

    def _read(self, extents: Extents, start: int, stop: int) -> None:
        lows = extents.offsets[start:stop] // _ALIGN * _ALIGN
        sizes = -(-(extents.offsets[start:stop] + extents.nbytes[start:stop]) // _ALIGN) * _ALIGN - lows
        ends = np.cumsum(sizes)
        first = 0
        while first < len(sizes):
            begin = int(ends[first] - sizes[first])
            most = int(np.searchsorted(ends, begin + _STAGE_NBYTES, side="right")) - first
            most = max(1, min(most, self._ring.n_entries))
            last = next(extents.split(start + first, stop, most))[1] - start
            if sizes[first] > _STAGE_NBYTES:
                self._reader._read(extents, start + first, start + last)
            else:
                self._fill_and_scatter(extents, start + first, lows[first:last], sizes[first:last])
            first = last

    def _fill_and_scatter(self, extents: Extents, first: int, lows: _Int64s, sizes: _Int64s) -> None:
        n = len(lows)
        part = slice(first, first + n)
        starts = np.cumsum(sizes) - sizes
        vectors = np.stack((starts + self._stage.address, sizes), axis=1)
        with self.opened(extents, first, first + n, direct=True) as fds:
            if self.store.answers_short:
                self._reader._read(extents, first, first + n)
                return
            self._reader.watch(extents, first, first + n)
            got = self._ring.read(fds, vectors, np.arange(n), np.ones(n, dtype=np.int64), lows)
        skipped = extents.offsets[part] - lows
        # A file may end before the last whole page.
        complete = got >= skipped + extents.nbytes[part]
        fds[:] = self._stage.fd
        offsets = np.where(complete, self._stage.file_offset + starts + skipped, 0)
        got = self._ring.read(fds, extents.vectors, extents.firsts[part], extents.counts[part], offsets)
        for i in np.flatnonzero(~complete | (got != extents.nbytes[part])).tolist():
            self._reader._read(extents, first + i, first + i + 1)
