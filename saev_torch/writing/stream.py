"""Writes batches in a thread, one behind the model."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from saev_torch.errors import ConfigError
from saev_torch.stats.outliers import NormMeter
from saev_torch.writing.tokens import Recorded
from saev_torch.writing.writer import ShardWriter


class Stream:
    """Writes batches in a thread, one behind the model; all of one type, unless that is None. `norms` measures them."""

    def __init__(self, writer: ShardWriter, device: torch.device, dtype: torch.dtype | None) -> None:
        self._writer, self._dtype = writer, dtype
        self.norms = NormMeter(writer.md.n_layers)
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pinned = torch.empty(0)
        self._writing: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="record")

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        try:
            if self._writing is not None and exc_type is None:
                self._writing.result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, batch: Recorded, span: tuple[int, int]) -> None:
        """Begin to write a batch, which holds the examples of a span, when the one before is written."""
        acts = batch.acts
        if len(acts) != span[1] - span[0]:
            raise ConfigError(f"model: expected {span[1] - span[0]} examples from a batch, got {len(acts)}.")
        if self._dtype not in (None, acts.dtype):
            raise ConfigError(
                f"dtype: expected blocks that put out {self._dtype}, as in the first batch, got {acts.dtype} in that "
                f"of example {span[0]}; give the dtype to store."
            )
        # The one before was written while this one was computed; the host holds no third.
        if self._writing is not None:
            self._writing.result()
        self._writing = self._pool.submit(self._write, self._to_host(acts), span[0], batch[1:])

    def _to_host(self, acts: torch.Tensor) -> torch.Tensor:
        if self._copying is None:
            return acts.cpu().contiguous()
        acts = acts.contiguous()
        if len(self._pinned) < len(acts) or self._pinned.dtype != acts.dtype:
            self._pinned = torch.empty(acts.shape, dtype=acts.dtype, pin_memory=True)
        # What it held is written: that has been waited for.
        host = self._pinned[: len(acts)]
        self._copying.wait_stream(torch.cuda.current_stream(acts.device))
        with torch.cuda.stream(self._copying):
            host.copy_(acts, non_blocking=True)
        # The allocator must not hand this memory to the next forward pass while it is still being copied.
        acts.record_stream(self._copying)
        return host

    def _write(self, host: torch.Tensor, start: int, beside: tuple[torch.Tensor | None, ...]) -> None:
        # This batch is all that is copied now: the next one waits until it is written.
        if self._copying is not None:
            self._copying.synchronize()
        self._writer.write_batch(host, start, *beside)
        # Of content tokens: a mask leaves the special one alone.
        self.norms.add(host[:, :, int(self._writer.md.cls_token) :])
