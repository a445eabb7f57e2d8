"""The cursor by itself: who is told, who is asked, and where an epoch ends."""

import copy
import pickle
from typing import Any

import pytest

from saev_torch import ConfigError, SaevTorchError, StateError, StreamDigest
from saev_torch.order.steps import Share
from saev_torch.resume.cursor import Cursor, Iteration, Position


def make(rank: int = 0, world_size: int = 1, drop_last: bool = False, n_batches: int = 5) -> Cursor:
    return Cursor(n_batches, drop_last, rank, world_size)


def place(at: Cursor | Iteration) -> tuple[int, int]:
    position = at.position() if isinstance(at, Cursor) else at.position
    return position.epoch, position.batch


def take(iteration: Iteration, n: int) -> list[tuple[int, int]]:
    """Places behind each of the next batches."""
    found = []
    for _ in range(n):
        iteration.count(7)
        found.append(place(iteration))
    return found


# Where an epoch ends


@pytest.mark.parametrize(
    ("world_size", "drop_last", "places"),
    [
        (1, False, [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]),
        (2, False, [(0, 2), (0, 4), (1, 0)]),
        (2, True, [(0, 2), (1, 0)]),
        (5, True, [(1, 0)]),
        (8, False, [(1, 0)]),
    ],
)
def test_behind_the_last_batch_is_the_next_epoch(
    world_size: int, drop_last: bool, places: list[tuple[int, int]]
) -> None:
    for rank in range(world_size):
        cursor = make(rank, world_size, drop_last)
        iteration = cursor.begin()
        assert iteration.share == Share(rank, world_size, len(places) * world_size)
        assert take(iteration, len(places)) == places
        assert place(cursor) == places[-1]
        assert place(cursor.begin()) == (1, 0)


@pytest.mark.parametrize("empty", [make(n_batches=0), make(0, 6, drop_last=True)])
def test_an_epoch_without_batches_stays_where_it_is(empty: Cursor) -> None:
    for epoch in range(3):
        iteration = empty.begin()
        assert iteration.share.first >= iteration.share.stop
        assert place(empty) == (epoch, 0)
    empty.load(empty.position())
    assert place(empty.begin()) == (2, 0)


@pytest.mark.parametrize(
    ("batch", "world_size", "drop_last", "wanted"),
    [
        (3, 1, False, (2, 3)),
        (5, 1, False, (3, 0)),
        (9, 1, False, (3, 0)),
        (4, 2, False, (2, 4)),
        (4, 2, True, (3, 0)),
        (0, 2, True, (2, 0)),
    ],
)
def test_a_loaded_place_is_never_an_end(batch: int, world_size: int, drop_last: bool, wanted: tuple[int, int]) -> None:
    cursor = make(0, world_size, drop_last)
    cursor.load(Position(2, batch, world_size=world_size))
    assert place(cursor) == wanted
    assert place(cursor.begin()) == wanted
    assert place(cursor) == wanted


def test_a_count_is_never_an_end() -> None:
    cursor = make(0, 2)
    cursor.load(Position(3, 2, world_size=2))
    cursor.begin()
    assert [cursor.position_after(n).batch for n in (0, 1)] == [2, 4]
    assert (cursor.position_after(2).epoch, cursor.position_after(2).batch) == (4, 0)
    assert (cursor.position_after(2, epoch=7).epoch, cursor.position_after(2, epoch=7).batch) == (7, 4)
    assert (cursor.position_after(3, epoch=7).epoch, cursor.position_after(3, epoch=7).batch) == (8, 0)


def test_a_part_of_an_epoch_does_not_know_of_the_others() -> None:
    part = Iteration(Position(0, 0), Share(1, 2, 5), is_part=True)
    assert take(part, 3) == [(0, 2), (0, 4), (0, 6)]


def test_next_start() -> None:
    assert Position(3, 1).next_start() == Position(4, 0)
    assert Position(3, 0).next_start() == Position(3, 0)


# Who is told


def test_begun_chosen_loaded() -> None:
    cursor = make()
    assert (place(cursor), cursor.epoch) == ((0, 0), 0)
    take(cursor.begin(), 2)
    assert place(cursor) == (0, 2)
    cursor.begin()
    assert (place(cursor), cursor.epoch) == ((1, 0), 1)
    cursor.set_epoch(4)
    assert (place(cursor), cursor.epoch) == ((4, 0), 4)
    cursor.load(Position(2, 3))
    assert (place(cursor), cursor.epoch) == ((2, 3), 2)
    cursor.set_epoch(6)
    assert [place(cursor.begin()) for _ in range(2)] == [(6, 0), (7, 0)]


def test_only_the_latest_iteration_moves_it() -> None:
    cursor = make()
    first, second = cursor.begin(), cursor.begin()
    take(second, 1)
    take(first, 4)
    assert (place(cursor), place(first)) == ((1, 1), (0, 4))
    cursor.follow(first)
    assert place(cursor) == (0, 4)


def begin_for_workers(cursor: Cursor) -> Iteration:
    """As a loader does, with an iteration that is told where to begin."""
    iteration = cursor.begin_elsewhere()
    with cursor.telling({"epoch": iteration.start.epoch, "start": iteration.start.batch}):
        assert cursor.begin().start == iteration.start
    cursor.follow(iteration)
    return iteration


@pytest.mark.parametrize("begin", [Cursor.begin, begin_for_workers])
def test_a_loaded_place_holds_until_a_batch_is_taken(begin: Any) -> None:
    cursor = make()
    cursor.load(Position(2, 3, StreamDigest(9, 3)))
    assert [place(begin(cursor)) for _ in range(3)] == [(2, 3)] * 3
    assert cursor.digest == StreamDigest(9, 3)
    take(begin(cursor), 1)
    assert [place(begin(cursor)) for _ in range(2)] == [(3, 0), (4, 0)]


def test_the_digest_runs_on() -> None:
    cursor = make()
    take(cursor.begin(), 2)
    cursor.begin().count(None)  # no batch any more
    cursor.set_epoch(5)
    earlier = StreamDigest().including(0, 0, 7).including(0, 1, 7)
    assert cursor.digest == earlier
    take(cursor.begin(), 1)
    assert (
        cursor.position().digest
        == cursor.digest
        == StreamDigest().including(0, 0, 7).including(0, 1, 7).including(5, 0, 7)
    )
    cursor.load(Position(0, 1, StreamDigest(3, 1)))
    assert cursor.digest == StreamDigest(3, 1)
    # That of another rank is not ours.
    cursor.load(Position(0, 1, StreamDigest(3, 1), rank=1, world_size=2))
    assert cursor.digest == StreamDigest()
    assert (cursor.position().rank, cursor.position().world_size) == (0, 1)


def test_the_scale_goes_with_a_place() -> None:
    cursor = make()
    cursor.scale = 0.5
    assert cursor.begin().start.scale == cursor.position_after(1).scale == 0.5
    cursor.load(Position(0, 1, scale=2.0))
    assert (cursor.scale, cursor.begin().position.scale) == (2.0, 2.0)
    cursor.load(Position(0, 1))
    assert cursor.scale is None


def test_where_workers_make_the_batches() -> None:
    """As a plain `DataLoader` does; the epoch is known here, and who counts knows the place."""
    cursor = make()
    take(cursor.begin(), 2)
    cursor._epochs.begin(cursor.world.pid, 1000, 0)
    with pytest.raises(StateError, match=r"state_dict\(n_batches=...\)"):
        cursor.position()
    assert (cursor.position_after(1).epoch, cursor.position_after(1).batch) == (1, 1)
    counted = begin_for_workers(cursor)
    assert place(cursor) == (2, 0)
    assert take(counted, 2) == [(2, 1), (2, 2)]
    assert place(cursor) == (2, 2)


@pytest.mark.parametrize("value", [-1, True, 1.0, "1", None, 2**62])
def test_numbers_that_make_no_sense(value: Any) -> None:
    cursor = make()
    take(cursor.begin(), 2)
    with pytest.raises(ConfigError, match="epoch: expected an integer from 0 on"):
        cursor.set_epoch(value)
    with pytest.raises(ConfigError, match="n_batches: expected an integer from 0 on"):
        cursor.position_after(value)
    assert place(cursor) == (0, 2)
    with pytest.raises(ConfigError, match="expected both or neither"):
        Cursor(5, False, rank=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cursor: pickle.loads(pickle.dumps(cursor))])
def test_a_copy_counts_on_by_itself(copied: Any) -> None:
    cursor = make()
    cursor.scale = 0.5
    take(cursor.begin(), 2)
    other = copied(cursor)
    assert place(other) == (1, 0)
    assert [place(other.begin()) for _ in range(2)] == [(1, 0), (2, 0)]
    other.scale = 2.0
    assert (place(cursor), cursor.scale) == ((0, 2), 0.5)
    assert place(cursor.begin()) == (1, 0)


def test_what_is_said_comes_once() -> None:
    assert [make().may_say("lanes") for _ in range(3)] == [True, False, False]
    assert make().may_say("ranks")


def test_errors_say_who_met_them() -> None:
    iteration = make(1, 2).begin()
    take(iteration, 1)
    wanted = r"gone \[rank 1 of 2, process \d+, epoch 0, after batch 2 of 6\]"
    with pytest.raises(StateError, match=wanted), iteration.naming():
        raise StateError("gone")
    with pytest.raises(KeyError, match=r"^'gone'$"), iteration.naming():
        raise KeyError("gone")
    assert issubclass(StateError, SaevTorchError)
