"""Where activations come from: which reader suits a store, decided in one place."""

import dataclasses

from saev_torch.reading.compiled import find_scale_kernels
from saev_torch.reading.direct import DirectReader
from saev_torch.reading.pace import Pace
from saev_torch.reading.reader import CallReader, Reader
from saev_torch.reading.ring import Ring, RingReader
from saev_torch.reading.scaling import ScalingReader
from saev_torch.reading.store import ShardStore


@dataclasses.dataclass
class Source:
    """A store, and how it is read.

    Attributes:
        store: The shards.
        past_cache: Whether to read past the page cache, where the system has the means.
        scale: What to multiply by; None for nothing.
    """

    store: ShardStore
    past_cache: bool = False
    scale: float | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether readers multiply. Without a compiler they do not: it is faster done later, for whole batches."""
        return self.scale is not None and find_scale_kernels() is not None

    def open_reader(self, pace: Pace | None = None) -> Reader:
        """Make a reader for one thread."""
        ring = Ring.open()
        reader: Reader = CallReader(self.store, pace) if ring is None else RingReader(ring, self.store, pace)
        if self.past_cache and isinstance(reader, RingReader):
            reader = DirectReader(reader)
        kernels = None if self.scale is None else find_scale_kernels()
        return reader if self.scale is None or kernels is None else ScalingReader(reader, self.scale, kernels)
