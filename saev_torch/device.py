"""Batches on the device before the training step asks for them.

A batch is copied from the memory that it was read into: its slot is page-locked in place, once an epoch, and reused, so
no byte crosses the host's memory again. The slot is kept until the copy on the side stream has finished.
"""

import collections
import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from saev_torch.batch import ActivationBatch, release_copied
from saev_torch.errors import ConfigError
from saev_torch.format.rules import is_integer

_Lock: TypeAlias = "weakref.finalize[..., Any]"

_locked: set[int] = set()
"""Addresses of memory that is page-locked."""

_orphans: list[Any] = []
"""What a forked child keeps of its parent's iterators: dropping a CUDA event there would abort the process."""


def _succeeded(code: Any) -> bool:
    """Whether a call of CUDA's did, by what it returned; if not, the error ends here."""
    if int(code) == 0:
        return True
    # CUDA remembers a refusal, and torch would blame the next kernel for it: one of no account takes it.
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    return False


def _unlock(address: int, pid: int) -> None:
    # A forked child drops its copies of arrays too; it locked nothing itself, and cannot call CUDA.
    if os.getpid() == pid:
        _locked.discard(address)
        _succeeded(torch.cuda.cudart().cudaHostUnregister(address))  # type: ignore[no-untyped-call]


def _page_lock(memory: NDArray[np.uint8], locks: list[_Lock]) -> bool:
    """Page-lock memory until it is gone, or until its lock, which goes to `locks`, is called; whether it is locked."""
    address = int(memory.ctypes.data)
    if address in _locked:
        return True
    if not _succeeded(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)):  # type: ignore[no-untyped-call]
        return False
    _locked.add(address)
    # Runs before the memory is unmapped, because it belongs to the array that owns the mapping.
    lock = weakref.finalize(memory, _unlock, address, os.getpid())
    lock.atexit = False
    locks.append(lock)
    return True


def _locked_batch(batch: Mapping[str, torch.Tensor], locks: list[_Lock]) -> ActivationBatch:
    if isinstance(batch, ActivationBatch) and batch.memory is not None and _page_lock(batch.memory, locks):
        return batch
    return ActivationBatch({k: v if v.is_pinned() else v.pin_memory() for k, v in batch.items()})


class DevicePrefetcher:
    """Iterates over a loader, with the next batches copied to a device while the step runs.

    Works for any loader of dicts of tensors, and makes each an `ActivationBatch`. On the CPU it copies nothing.
    While it iterates, what the loader yields is page-locked: to copy that yourself, use `batch.to`, which keeps its
    memory.

    Args:
        loader: What to iterate over. Do not set `pin_memory` there: that would be one more copy.
        device: Where batches go.
        n_ahead: Batches on the device, or on their way, beyond the one in use.
        dtype: What floating point numbers become, on the device: with `act_dtype="stored"` and 16 bits on disk, half
            the bytes are copied. None leaves them as they come.

    Raises:
        ConfigError: `n_ahead` is no integer from 1 on, or `dtype` no floating point dtype.
    """

    def __init__(
        self,
        loader: Iterable[Mapping[str, torch.Tensor]],
        device: torch.device | str | int,
        n_ahead: int = 2,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not is_integer(n_ahead, 1):
            raise ConfigError(f"DevicePrefetcher.n_ahead: expected an integer from 1 on, got {n_ahead!r}.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(
                f"DevicePrefetcher.dtype: expected a floating point dtype as torch.float32, got {dtype!r}."
            )
        self.loader = loader
        self.device = torch.device(device)
        self.n_ahead = n_ahead
        self.dtype = dtype
        self._state: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Batches in an epoch, if the loader knows."""
        return len(self.loader)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The loader's state after the batches that were handed out, not those that were fetched."""
        state: dict[str, Any] = self.loader.state_dict() if self._state is None else self._state  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the loader continue where a state was taken."""
        self._state = None
        self.loader.load_state_dict(state)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[ActivationBatch]:
        self._state = None
        if self.device.type != "cuda":
            for batch in self.loader:
                own = batch if isinstance(batch, ActivationBatch) else ActivationBatch(batch)
                yield self._convert(own if self.device.type == "cpu" else own.to(self.device))
        else:
            yield from self._iterate_cuda()
            self._state = None

    def _iterate_cuda(self) -> Iterator[ActivationBatch]:
        has_state = hasattr(self.loader, "state_dict")
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        ready: collections.deque[tuple[torch.cuda.Event, ActivationBatch, Any]] = collections.deque()
        locks: list[_Lock] = []
        pid = os.getpid()
        try:
            for batch in self.loader:
                state = self.loader.state_dict() if has_state else None  # type: ignore[attr-defined]
                with torch.cuda.device(self.device), torch.cuda.stream(stream):
                    # Converted only there: to do both at once, torch converts first.
                    copy = self._convert(_locked_batch(batch, locks).to(self.device, non_blocking=True))
                    ready.append((stream.record_event(), copy, state))
                del batch, copy
                if len(ready) > self.n_ahead:
                    yield self._hand_out(*ready.popleft())
            while ready:
                yield self._hand_out(*ready.popleft())
        finally:
            # A forked child ends its copy of this iterator, too, and cannot call CUDA.
            if os.getpid() != pid:
                _orphans.append(ready)
            else:
                torch.cuda.synchronize(self.device)
                release_copied()
                # From memory that stayed locked, a user's own `tensor.to(device, non_blocking=True)` would return at
                # once, and read what the next batch has put there: nobody else waits for it.
                for lock in locks:
                    lock()

    def _convert(self, batch: ActivationBatch) -> ActivationBatch:
        return batch if self.dtype is None else batch.to(self.dtype)

    def _hand_out(self, event: torch.cuda.Event, copy: ActivationBatch, state: Any) -> ActivationBatch:
        self._state = state
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for tensor in copy.values():
            # Its memory was allocated on the side stream; the allocator must know who else uses it.
            tensor.record_stream(current)
        return copy
