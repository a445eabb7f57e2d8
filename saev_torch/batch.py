"""A batch of activations: a dict of tensors that may live in reusable memory; and the samples of one."""

import math
import os
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from saev_torch.errors import ConfigError, ReadError
from saev_torch.format.dtypes import DTYPES
from saev_torch.order.joint import AnySelection
from saev_torch.order.steps import ALIGN
from saev_torch.processes.leaving import come_by
from saev_torch.reading.leases import Lease
from saev_torch.reading.received import attach
from saev_torch.reading.regions import Name
from saev_torch.reading.slots import Field, OpenBatch, Slot
from saev_torch.resume.state import batch_digest, digest_columns

_copies: set[tuple[torch.cuda.Event, int, tuple[torch.Tensor, ...]]] = set()
"""Copies to a GPU that may not have finished: an event behind each, the process that made it, and what is copied."""


class ActivationBatch(dict[str, torch.Tensor]):
    """A batch, as every loader yields it.

    Keys:
        act: `[batch, d_model]` (`[batch, n_layers, d_model]` with a tuple of layers), float32, or with
            `act_dtype="stored"` what the shards have.
        example_idx: `[batch] int64`.
        token_idx: `[batch] int64`, content token from 0; -1 for a special token.
        token_labels: `[batch] int64`, where the shards have labels; -1 for a special token.
        token_ids: `[batch] int64`, index in the model's vocabulary, where the shards have them; -1 for a special token.
        layer: `[batch] int64`, the recorded layer, with `layer="all"`.
        source: `[batch] int64`, the number of the source, of `MixedActivations`.

    Its tensors are valid and unchanged for as long as somebody holds them. `len(batch)` is the number of keys.
    """

    _slot: Slot | None = None
    _fields: tuple[Field, ...] = ()
    _tensors: tuple[torch.Tensor, ...] = ()
    _digest: int | None = None

    number: int | None = None
    """Its number in the sequence of batches of all ranks; it goes where the batch goes."""

    memory: NDArray[np.uint8] | None = None
    """The memory that the tensors are in, where it is reused; it outlives this batch."""

    @property
    def digest(self) -> int:
        """Which samples the batch holds; see `batch_digest`."""
        if self._digest is None:
            self._digest = batch_digest(self)
        return self._digest

    def to(
        self,
        device: torch.device | str | int | torch.dtype | torch.Tensor | None = None,
        dtype: torch.dtype | bool | None = None,
        non_blocking: bool = False,
    ) -> Self:
        """Copy the tensors to a device, cast the activations, or both, with the arguments of `torch.nn.Module.to`.

        What is no floating point number, such as the number of an example, is never cast. With `non_blocking`, the
        batch may be dropped at once: its memory is not reused before the copy has finished.
        """
        if isinstance(dtype, bool):
            return self.to(device, None, dtype)
        if isinstance(device, torch.Tensor):
            return self.to(device.device, device.dtype, non_blocking)
        if isinstance(device, torch.dtype):
            return self.to(None, device, non_blocking)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"ActivationBatch.to: expected a floating point dtype, got {dtype}; cast tensors by name.")

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking)

        moved = self._with({key: convert(tensor) for key, tensor in self.items()})
        if non_blocking:
            _keep_until_copied(self, moved)
        return moved

    def pin_memory(self) -> Self:
        """Copy the tensors to page-locked memory; see `torch.Tensor.pin_memory`."""
        return self._with({k: v.pin_memory() for k, v in self.items()})

    def _with(self, tensors: dict[str, torch.Tensor]) -> Self:
        other = type(self)(tensors)
        other.number = self.number
        return other

    def __copy__(self) -> Self:
        other = type(self)(self)
        other.__dict__.update(self.__dict__)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),), {"number": self.number}


def _keep_until_copied(batch: ActivationBatch, moved: ActivationBatch) -> None:
    release_copied()
    # From other memory CUDA returns once it has read all.
    kept = tuple(tensor for key, tensor in batch.items() if moved[key].is_cuda and tensor.is_pinned())
    if kept:
        device = next(tensor.device for tensor in moved.values() if tensor.is_cuda)
        _copies.add((torch.cuda.current_stream(device).record_event(), os.getpid(), kept))


def release_copied() -> None:
    """Let go of the memory of copies to a GPU that have finished; done whenever a batch is made or copied."""
    for copy in tuple(_copies):
        event, pid, _ = copy
        # A forked child has these too, and cannot ask CUDA.
        if pid == os.getpid() and event.query():  # type: ignore[no-untyped-call]
            _copies.discard(copy)


def _from_memory(lease: Lease, fields: tuple[Field, ...]) -> ActivationBatch:
    if _copies:
        release_copied()
    batch = _make_tensors(lease.array(), fields)
    batch.memory = lease.owner
    return batch


def _make_tensors(memory: NDArray[np.uint8], fields: tuple[Field, ...]) -> ActivationBatch:
    batch = ActivationBatch()
    for key, dtype, offset, shape in fields:
        wanted, storage = getattr(torch, dtype), DTYPES[dtype].storage if dtype in DTYPES else dtype
        nbytes = math.prod(shape) * np.dtype(storage).itemsize
        tensor = torch.from_numpy(memory[offset : offset + nbytes].view(storage).reshape(shape))
        # Only what numpy has no name for is of another type by now: a view lets other threads have the interpreter, and
        # beside those that read it takes 0.2 ms to get it back.
        batch[key] = tensor if tensor.dtype == wanted else tensor.view(wanted)
    return batch


def describe(opened: OpenBatch, selection: AnySelection, label_key: str = "token_labels", digests: bool = True) -> None:
    """Write which samples a batch has to its slot, behind the activations, and digest that if it is to be."""
    n, md = opened.size, selection.md
    found = selection.columns(opened.cells)
    columns: dict[str, NDArray[Any]] = {key: found.pop(key) for key in ("example_idx", "token_idx")}
    beside = {label_key: opened.labels, "token_ids": opened.token_ids}
    of_content = {key: column for key, column in beside.items() if column is not None}
    columns |= of_content | found
    shape = (n, selection.n_parts, md.d_model) if selection.has_parts else (n, md.d_model)
    nbytes = n * selection.act_nbytes
    first = nbytes + -nbytes % ALIGN
    fields: list[Field] = [("act", selection.act_type.name, 0, shape)]
    fields += [(key, "int64", first + i * 8 * n, (n,)) for i, key in enumerate(columns)]
    written = opened.slot.first(first + 8 * n * len(columns))[first:].view(np.int64).reshape(len(columns), n)
    is_special = columns["token_idx"] < 0 if of_content else np.empty(0, dtype=np.bool_)
    for row, (key, column) in zip(written, columns.items(), strict=True):
        row[:] = column
        if key in of_content and is_special.any():
            row[is_special] = -1
    opened.fields, opened.digest = tuple(fields), digest_columns(columns) if digests else None


def make_batch(opened: OpenBatch) -> ActivationBatch:
    """Make the tensors of a batch that has been read and described, and lease its slot to them."""
    batch = _from_memory(opened.slot.lease(), opened.fields)
    batch._slot, batch._fields, batch._tensors = opened.slot, opened.fields, tuple(batch.values())
    batch._digest = opened.digest
    return batch


def _receive(name: Name, fields: tuple[Field, ...], digest: int | None, number: int | None) -> ActivationBatch:
    come_by()
    batch = _from_memory(attach(*name), fields)
    batch._digest, batch.number = digest, number
    return batch


def _receive_copy(
    memory: NDArray[np.uint8], fields: tuple[Field, ...], digest: int | None, number: int | None
) -> ActivationBatch:
    batch = _make_tensors(memory, fields)
    batch._digest, batch.number = digest, number
    return batch


def _is_untouched(batch: ActivationBatch, slot: Slot) -> bool:
    """Whether the tensors are those that were made in the slot; a wrapper of the data set may have put in others."""
    # The same tensor may have been changed in place to show other memory, or the same in another way.
    return list(batch) == [field[0] for field in batch._fields] and all(
        now is then
        and now.data_ptr() == slot.address + offset
        and tuple(now.shape) == shape
        and now.is_contiguous()
        and not now.requires_grad
        for now, then, (_, _, offset, shape) in zip(batch.values(), batch._tensors, batch._fields, strict=True)
    )


def _tell(message: str) -> None:
    raise ReadError(message)


def _send(batch: ActivationBatch) -> tuple[Any, ...]:
    """Reduce a batch for another process. What goes wrong in a worker is raised there, which else waits for ever."""
    try:
        return _reduce(batch)
    except Exception as err:
        if get_worker_info() is None:
            raise
        return _tell, (f"batch {batch.number}: expected to send it from worker process {os.getpid()}, got: {err!r}",)


def _reduce(batch: ActivationBatch) -> tuple[Any, ...]:
    """As the name of its memory, if the tensors are still those of its slot, else as what they hold."""
    slot = batch._slot
    if slot is None or get_worker_info() is None or not _is_untouched(batch, slot):
        return batch.__reduce__()
    name = slot.send() if slot.is_own else None
    if name is None:
        # Through the pipe: torch would copy to /dev/shm, which may be too small, and take a descriptor for each tensor.
        key, _, offset, _ = batch._fields[-1]
        memory = slot.first(offset + batch[key].nbytes)
        return _receive_copy, (memory, batch._fields, batch._digest, batch.number)
    return _receive, (name, batch._fields, batch._digest, batch.number)


ForkingPickler.register(ActivationBatch, _send)


def _collate(batches: list[ActivationBatch], *, collate_fn_map: Any = None) -> ActivationBatch:
    # `DataLoader(data_set)` means batch_size=1: a list of one batch, which is what the user wants.
    if len(batches) != 1:
        raise ValueError(
            f"DataLoader(batch_size): expected 1 (the default) or None, got {len(batches)}: the data set yields whole "
            "batches; set batch_size in its config instead."
        )
    return batches[0]


default_collate_fn_map[ActivationBatch] = _collate


class Sample(dict[str, Any]):
    """One sample of `IndexedDataset`; lists of them are collated at once."""


class Samples(Sequence[Sample]):
    """The samples of one call, made when they are looked at; `DataLoader` collates them without looking."""

    def __init__(self, batch: ActivationBatch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["act"])

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        sample = Sample(act=self.batch["act"][i])
        for key, column in self.batch.items():
            if key != "act":
                sample[key] = int(column[i])
        return sample


def _collate_samples(samples: Any, *, collate_fn_map: Any = None) -> Any:
    if isinstance(samples, Samples):
        return samples.batch
    # torch takes the keys of the first sample: the others would lose theirs.
    keys = [set(sample) for sample in samples]
    partial = set().union(*keys) - keys[0].intersection(*keys)
    if partial:
        raise ConfigError(
            f"IndexedDataset: expected samples with the same keys, got {sorted(partial)} only in some; join data sets "
            "of one kind, or give a collate_fn that says what to do"
        )
    return torch.utils.data.default_collate([dict(sample) for sample in samples])


default_collate_fn_map[Sample] = _collate_samples
