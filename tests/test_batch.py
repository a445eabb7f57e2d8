import copy
import io
import multiprocessing
import pickle

import contracts
import numpy as np
import pytest
import torch
from factory import Spec
from torch.utils.data import DataLoader, IterableDataset, default_collate

from saev_torch import (
    ActivationBatch,
    OrderedActivations,
    OrderedConfig,
    ReadError,
    ShuffledActivations,
    ShuffledConfig,
)
from saev_torch.reading.slots import Slot


@pytest.fixture
def cfg(make_shards):
    return OrderedConfig(shards=make_shards(Spec(n_examples=40)), tokens="all", layer=3, batch_size=16)


@pytest.fixture
def batch(cfg):
    return next(iter(OrderedActivations(cfg)))


def same(a, b):
    assert type(a) is type(b)
    contracts.assert_same([a], [b])


def test_it_is_a_dict(batch):
    assert isinstance(batch, dict)
    assert list(batch) == ["act", "example_idx", "token_idx", "token_labels"]
    assert len(batch) == 4
    assert {**batch}.keys() == batch.keys()
    assert batch.get("layer") is None
    with pytest.raises(KeyError):
        batch["layer"]


@pytest.mark.parametrize(
    ("spec", "fields", "keys"),
    [
        (Spec(), {}, ["act", "example_idx", "token_idx", "token_labels"]),
        (Spec(labels=False), {}, ["act", "example_idx", "token_idx"]),
        (Spec(), {"layer": "all"}, ["act", "example_idx", "token_idx", "token_labels", "layer"]),
        (Spec(labels=False), {"layer": "all"}, ["act", "example_idx", "token_idx", "layer"]),
        (Spec(), {"layer": (7, 3)}, ["act", "example_idx", "token_idx", "token_labels"]),
    ],
)
def test_keys(make_shards, spec, fields, keys):
    cfg = ShuffledConfig(**{"shards": make_shards(spec), "layer": 3, "batch_size": 8, **fields})
    for n_workers in (0, 1):
        for batch in DataLoader(ShuffledActivations(cfg), num_workers=n_workers):
            assert list(batch) == keys


def test_special_tokens(make_shards):
    cfg = OrderedConfig(shards=make_shards(Spec(n_examples=2)), tokens="all", layer=3, batch_size=7)
    batch = next(iter(OrderedActivations(cfg)))
    assert batch["token_idx"].tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert batch["token_labels"].tolist() == [-1, 0, 5, 3, 1, 6, 4]


def test_side_by_side(make_shards):
    """One example and token, several layers, in the order that was asked for; also for one layer."""
    shards = make_shards(Spec())
    one, other, both, alone = (
        next(iter(OrderedActivations(OrderedConfig(shards=shards, layer=layer, batch_size=5))))["act"]
        for layer in (3, 7, (7, 3), (7,))
    )
    assert both.shape == (5, 2, 8)
    assert torch.equal(both[:, 0], other)
    assert torch.equal(both[:, 1], one)
    assert alone.shape == (5, 1, 8)
    assert torch.equal(alone[:, 0], other)


# Copies


def test_to(batch):
    """The device `meta` stands for an accelerator: nothing but the shapes arrive there."""
    moved = batch.to("meta")
    assert type(moved) is ActivationBatch
    assert list(moved) == list(batch)
    assert all(tensor.device.type == "meta" for tensor in moved.values())
    assert all(tensor.device.type == "cpu" for tensor in batch.values())
    same(batch.to("cpu"), batch)
    same(batch.to(torch.device("cpu"), non_blocking=True), batch)


def test_to_a_dtype(batch):
    """Only activations are cast: bfloat16 would make 964 of example 965."""
    batch["example_idx"] += 965
    arguments = [((torch.bfloat16,), {}), (("cpu", torch.bfloat16), {}), (("cpu",), {"dtype": torch.bfloat16})]
    arguments += [((), {"dtype": torch.bfloat16, "non_blocking": True}), (("cpu", torch.bfloat16, True), {})]
    arguments += [((torch.bfloat16, True), {}), ((torch.zeros(1, dtype=torch.bfloat16),), {})]
    for args, kwargs in arguments:
        cast = batch.to(*args, **kwargs)
        assert type(cast) is ActivationBatch
        assert torch.equal(cast["act"], batch["act"].bfloat16())
        same(ActivationBatch({**cast, "act": batch["act"]}), batch)
    moved = batch.to("meta", torch.float16, non_blocking=True)
    assert [str(tensor.device) for tensor in moved.values()] == ["meta"] * 4
    assert [tensor.dtype for tensor in moved.values()] == [torch.float16] + [torch.int64] * 3
    for dtype in (torch.int32, torch.complex64):
        with pytest.raises(TypeError, match=f"expected a floating point dtype, got {dtype}"):
            batch.to(dtype)
    same(batch.to("cpu", True), batch)  # non_blocking, as it always was
    same(batch.to(device="cpu"), batch)
    same(batch.to(torch.float32, True), batch)


@pytest.mark.usefixtures("cuda")
def test_pin_memory(batch):
    if not torch.accelerator.is_available():
        # Without an accelerator there is nothing to pin for; torch says so, and the data set is not in the way.
        with pytest.raises(RuntimeError):
            batch.pin_memory()
        return
    pinned = batch.pin_memory()
    assert all(tensor.is_pinned() for tensor in pinned.values())
    same(pinned, batch)


def test_pin_memory_is_asked_of_every_tensor(batch, monkeypatch):
    """What torch's pinning thread does with a batch: it calls its method, before it looks at it as a mapping."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())
    pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
    same(pinned, batch)
    assert all(pinned[key].data_ptr() != batch[key].data_ptr() for key in batch)


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda batch: pickle.loads(pickle.dumps(batch)),
        lambda batch: ActivationBatch(batch),
        lambda batch: torch.load(saved(batch), weights_only=False),
    ],
)
def test_copies(batch, copied):
    other = copied(batch)
    same(other, batch)
    other["new"] = other["act"]
    assert "new" not in batch


def saved(batch):
    file = io.BytesIO()
    torch.save(batch, file)
    file.seek(0)
    return file


def test_a_shallow_copy_keeps_the_memory(cfg):
    data_set = OrderedActivations(cfg)
    kept, wanted = [], []
    for batch in data_set:
        kept.append(copy.copy(batch))
        wanted.append(contracts.digest([batch]))
    del batch
    assert [contracts.digest([batch]) for batch in kept] == wanted


def test_digests_tell_batches_apart(cfg):
    digests = [batch.digest for batch in OrderedActivations(cfg)]
    assert len(set(digests)) == len(digests)
    assert [batch.digest for batch in DataLoader(OrderedActivations(cfg), num_workers=2)] == digests


# DataLoader


def test_only_whole_batches(cfg):
    """A batch of batches is what nobody wants; the message says what to change."""
    message = r"DataLoader\(batch_size\): expected 1 \(the default\) or None, got 4: .* set batch_size in its config"
    for n_workers in (0, 1):
        loader = DataLoader(OrderedActivations(cfg), batch_size=4, num_workers=n_workers)
        contracts.check_fails(loader, ValueError, message)


def test_collating_one_batch_is_that_batch(batch):
    assert default_collate([batch]) is batch


def test_the_way_through_a_data_loader_copies_nothing(cfg):
    for batch_size in (1, None):
        data_set = OrderedActivations(cfg)
        loader = DataLoader(data_set, batch_size=batch_size)
        for batch in loader:
            tensors = [tensor.data_ptr() for tensor in batch.values()]
            assert max(tensors) - min(tensors) < 64 + 16 * (8 * 4 + 4 * 8)


class Wrapper(IterableDataset):
    """A data set of a user, around ours, with something done to each batch in the worker."""

    def __init__(self, data_set, change):
        self.data_set, self.change = data_set, change

    def __iter__(self):
        for batch in self.data_set:
            yield self.change(batch)


def replace(batch):
    batch["act"] = batch["act"] * 2
    return batch


def in_place(batch):
    batch["act"].mul_(2)
    return batch


def add_key(batch):
    batch["extra"] = batch["example_idx"] + 1
    return batch


def remove_key(batch):
    del batch["token_labels"]
    return batch


def reorder(batch):
    batch["act"] = batch.pop("act")
    return batch


def transpose_in_place(batch):
    batch["act"].t_()
    return batch


def other_memory(batch):
    batch["act"].set_(batch["act"] * 2)
    return batch


def shared_memory(batch):
    batch["act"].share_memory_().mul_(2)
    return batch


def part(batch):
    return batch["act"][3:5]


def other_dict(batch):
    return {"x": batch["act"], "y": [batch["token_idx"], "text"]}


def twice(batch):
    return [batch, batch]


def half(batch):
    batch["act"] = batch["act"].half()
    return batch


def shallow(batch):
    other = copy.copy(batch)
    other["act"] = other["act"] + 1
    return {"old": batch, "new": other}


CHANGES = [
    replace, in_place, add_key, remove_key, reorder, transpose_in_place, other_memory, shared_memory, part, other_dict,
    twice, half, shallow,
]  # fmt: skip


def flat(value):
    if isinstance(value, torch.Tensor):
        return [(value.dtype, value.tolist())]
    if isinstance(value, dict):
        return [x for key in value for x in [key, *flat(value[key])]]
    return [x for item in value for x in flat(item)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("change", CHANGES)
def test_a_user_gets_what_he_made_of_a_batch(cfg, change):
    """In a worker as in the parent, kept to the end, and the batches after it are not concerned."""
    wanted = [flat(batch) for batch in DataLoader(Wrapper(OrderedActivations(cfg), change), batch_size=None)]
    for n_workers in (1, 2):
        loader = DataLoader(Wrapper(OrderedActivations(cfg), change), batch_size=None, num_workers=n_workers)
        if n_workers == 2:
            # The wrapper does not share out anything itself: our data set does.
            assert [flat(batch) for batch in loader] == wanted
        kept = list(loader)
        assert [flat(batch) for batch in kept] == wanted


def test_changes_are_what_they_seem(cfg):
    """The oracle of the test above, checked once: what arrives is not the batch as it was."""
    before = next(iter(OrderedActivations(cfg)))["act"].clone()
    for change in (replace, in_place, other_memory, shared_memory):
        assert torch.equal(change(next(iter(OrderedActivations(cfg))))["act"], before * 2)
    assert torch.equal(transpose_in_place(next(iter(OrderedActivations(cfg))))["act"], before.T)


def test_arrays_and_devices_see_the_memory_as_it_is(batch):
    assert batch["act"].numpy().flags["C_CONTIGUOUS"]
    assert batch["act"].data_ptr() % 64 == 0
    assert np.shares_memory(batch["act"].numpy(), batch["act"][:3].numpy())


def name_a_slot(found):
    found.put(Slot(64, shared=True).send())


def test_slots_of_processes_have_names_of_their_own():
    """A process id is used again, and what its last owner sent may be mapped still."""
    fork = multiprocessing.get_context("fork")
    found, numbers = fork.SimpleQueue(), []
    for _ in range(2):
        process = fork.Process(target=name_a_slot, args=(found,))
        process.start()
        numbers.append(found.get()[1])
        process.join()
        process.close()
    found.close()
    assert numbers[0] != numbers[1]


def test_what_keeps_a_worker_from_sending_is_raised_in_the_parent(make_shards, monkeypatch):
    """A queue of multiprocessing drops what cannot be pickled, and its reader would wait for ever."""
    cfg = ShuffledConfig(make_shards(), layer=3, batch_size=8)

    def fail(self):
        raise OSError("no memory")

    monkeypatch.setattr(Slot, "send", fail)
    loader = DataLoader(ShuffledActivations(cfg), num_workers=1, multiprocessing_context="fork", timeout=60)
    contracts.check_fails(loader, ReadError, r"batch 0: expected to send it from worker process \d+, got: OSError")
