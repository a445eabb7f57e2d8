"""Rows that are gathered are found for some batches together, and no batch is lost by that."""

import time
import types

import contracts
import numpy as np
import pytest
from factory import Spec

from saev_torch import ReadError, ShuffledActivations, ShuffledConfig
from saev_torch.order.steps import Share, make_steps
from saev_torch.order.uniform import UniformPlan
from saev_torch.reading import ahead, engine
from saev_torch.reading.gather import Gather
from saev_torch.reading.reader import Pace, Spot

SELECTION = types.SimpleNamespace(cells=lambda samples: samples)


class Rows:
    """Those of a batch of 8, in shards of these numbers."""

    def __init__(self, shards):
        self.mappings = dict.fromkeys(shards)

    def __len__(self):
        return 8


@pytest.fixture(autouse=True)
def enough_time(monkeypatch):
    monkeypatch.setattr(ahead, "_SECONDS_TOGETHER", 1e9)


def look(n_batches, is_fast=True, missing=(), broken=None, shards_of=lambda number: [0]):
    """What happens, in order: batches that are found, as `+n`, and those that are handed out, as `n`."""
    seen = []

    def find(selection, cells, spot, numbers):
        number = sum(word.startswith("+") for word in seen)
        if number == broken:
            raise ReadError("broken")
        seen.append(f"+{number}")
        return None if number in missing else [(gather, Rows(shards_of(number)))]

    plan = UniformPlan(n_batches * 8, 8, 0, 0)
    gather = types.SimpleNamespace(is_refused=False, is_fast=is_fast, find=find)
    steps = make_steps(plan, Share(0, 1, n_batches))
    try:
        for step, found in ahead.look_ahead(steps, gather, SELECTION, Spot()):
            seen.append(str(step.batches[0]))
            assert (found is None) == (step.batches[0] in missing)
            assert found is None or np.array_equal(found[0], plan.locate(step.batches[0]))
    except ReadError:
        seen.append("error")
    return " ".join(seen)


def test_the_first_alone_then_some_together():
    assert look(9) == "+0 0 +1 +2 1 2 +3 +4 +5 +6 3 4 5 6 +7 +8 7 8"


def test_no_more_together_than_rows_allow(monkeypatch):
    monkeypatch.setattr(ahead, "_ROWS_TOGETHER", 16)
    assert look(6) == "+0 0 +1 +2 1 2 +3 +4 3 4 +5 5"
    monkeypatch.setattr(ahead, "_MOST_TOGETHER", 1)
    assert look(3) == "+0 0 +1 1 +2 2"


def test_no_more_together_than_the_consumer_may_wait_for(monkeypatch):
    monkeypatch.setattr(ahead, "_SECONDS_TOGETHER", 0.0)
    assert look(4) == "+0 0 +1 1 +2 2 +3 3"


def test_batches_that_hold_many_shards_together_are_found_alone(monkeypatch):
    monkeypatch.setattr(ahead, "_FEW_SHARDS", 4)
    two = [range(2 * number, 2 * number + 2) for number in range(8)]
    assert look(8, shards_of=two.__getitem__) == "+0 0 +1 +2 1 2 +3 +4 +5 3 4 5 +6 6 +7 7"
    # Few more than one of them: a lane goes on to the next shard now and then.
    assert look(9, shards_of=lambda number: range(number // 4, number // 4 + 10)) == look(9)
    other = [range(6 * number, 6 * number + 6) for number in range(5)]
    assert look(5, shards_of=other.__getitem__) == "+0 0 +1 +2 1 2 +3 3 +4 4"


def test_one_by_one_where_the_kernel_copies():
    assert look(4, is_fast=False) == "+0 0 +1 1 +2 2 +3 3"


def test_from_one_that_is_not_there_on_they_begin_anew():
    assert look(9, missing={4}) == "+0 0 +1 +2 1 2 +3 +4 3 4 +5 5 +6 +7 6 7 +8 8"


@pytest.mark.parametrize("broken", range(8))
def test_those_before_one_that_cannot_be_found_are_handed_out(broken):
    words = look(8, broken=broken).split()
    assert [word for word in words if word[0] != "+"] == [*map(str, range(broken)), "error"]


def config(make_shards, **options):
    shards = make_shards(Spec(n_examples=60, content_tokens=9))
    return ShuffledConfig(shards=shards, layer=3, batch_size=16, buffer_size=8, **options)


def take(cfg):
    """How many batches come, one after the other and not in haste, and what the error says that ends them."""
    got: list[int] = []
    with pytest.raises(ReadError) as caught:
        got.extend(time.sleep(0.002) or len(batch) for batch in ShuffledActivations(cfg))
    return len(got), str(caught.value)


@pytest.fixture(params=[1, 2])
def n_cores(request, monkeypatch):
    """Where there is one, the thread that opens batches reads them."""
    monkeypatch.setattr(engine, "count_own_cores", lambda: request.param)
    return request.param


@pytest.mark.usefixtures("n_cores")
@pytest.mark.parametrize("order", ["blocks", "uniform"])
@pytest.mark.parametrize("broken", [0, 1, 2, 5, 9])
def test_all_before_one_that_cannot_be_found_come_first(make_shards, monkeypatch, broken, order):
    contracts.save_buffers(monkeypatch, copies_here=True)
    found, find = [], Gather.find

    def finding(self, *args):
        found.append(len(found))
        if len(found) > broken:
            raise ReadError("this one is broken")
        return find(self, *args)

    monkeypatch.setattr(Gather, "find", finding)
    n, message = take(config(make_shards, order=order))
    assert message.startswith("this one is broken [")
    assert n == broken


@pytest.mark.parametrize(("n_cores", "broken"), [(1, 0), (1, 1), (1, 4), (2, 0)], indirect=["n_cores"])
def test_all_before_one_that_cannot_be_read_come_first(make_shards, monkeypatch, n_cores, broken):
    """Where the one behind it cannot be found, too, which is known before with two cores."""
    contracts.save_buffers(monkeypatch, copies_here=True)
    monkeypatch.setattr(ahead, "_MOST_TOGETHER", 1)
    read, found, gather, find = [], [], Gather.read, Gather.find

    def reading(self, rows, reader):
        read.append(len(rows))
        if len(read) == broken + 1:
            time.sleep(0.05)
            raise ReadError("it cannot be read")
        gather(self, rows, reader)

    def finding(self, *args):
        found.append(len(found))
        if len(found) > broken + 1:
            raise ReadError("it cannot be found")
        return find(self, *args)

    monkeypatch.setattr(Gather, "read", reading)
    monkeypatch.setattr(Gather, "find", finding)
    n, message = take(config(make_shards, order="uniform"))
    assert message.startswith("it cannot be read [")
    assert n == broken


def test_threads_that_may_help_a_late_read_do_not_count():
    """Who works out batches for a while would hand them to two threads that share a core."""
    pace = Pace(1)
    pace._done_at -= 1.0
    assert pace.wait_s(3) is None
    assert pace.count_working(4) == 1
    pace.is_slow = True
    assert pace.count_working(4) == 4


@pytest.mark.parametrize("layer", [3, "all"])
def test_labels_where_there_is_no_special_token(make_shards, layer):
    """A cell is then the place of its label, unless every layer is a sample of its own."""
    spec = Spec(n_examples=60, content_tokens=9, cls=False, layers=(3, 7))
    cfg = ShuffledConfig(shards=make_shards(spec), layer=layer, batch_size=16, order="uniform")
    contracts.check_epoch(list(ShuffledActivations(cfg)), spec, cfg)
