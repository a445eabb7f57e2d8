"""300 random programs, and those that have found faults; `python tests/programs.py --n 10000` runs more."""

import itertools
from pathlib import Path
from typing import Any

import programs
import pytest

N = 300
_SHOWN = 3


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> programs.Environment:
    return programs.Environment.make(tmp_path_factory.mktemp("programs"))


def check(found: programs.Campaign, n: int) -> None:
    assert found.n_run == n
    assert found.failed == [], "\n".join(map(str, found.failed[:_SHOWN]))


@pytest.mark.timeout(1800)
def test_no_program_differs_from_the_model(tmp_path: Path) -> None:
    check(programs.campaign(tmp_path, seed=0, numbers=range(N)), N)


def interrupted_starts(delays_us: range) -> list[list[Any]]:
    steps = [[["iter", 0], ["interrupt", 0, 1, delay_us, False], ["drop_run", 0]] for delay_us in delays_us]
    return [["make", 3, "set", 0, False, 0], *itertools.chain(*steps)]


def interrupted(n_workers: int, delay_us: int) -> list[list[Any]]:
    first = [["make", 3, "ready", n_workers, False, 0], ["iter", -1], ["take", -1, 1, 0], ["pause", 20]]
    return [*first, ["interrupt", -1, 8, delay_us, False], ["take", -1, 6, 0]]


# Each was seen to differ before what it found was mended.
FOUND: dict[str, list[list[list[Any]]]] = {
    "a child began with the epoch that its parent chose after it was forked": [
        [
            ["make", 0, "set", 0, False, 0],
            ["set_epoch", -1, 2],
            ["fork", "process", [["pause", 100], ["epoch", 0, 2, 0, "hold"], ["save", 0]]],
            ["set_epoch", 0, 4],
        ]
    ],
    "a child took the place of its parent for that of its own workers": [
        [
            ["make", 1, "plain", 2, False, 0],
            ["iter", 0],
            ["copy", 1, "copy"],
            ["fork", "fork", [["iter", 2], ["save", 2]]],
        ]
    ],
    "a child that iterated an inherited loader with persistent workers hung": [
        [
            ["make", 2, "ready", 1, True, 0],
            ["iter", -1],
            ["take", -1, 1, 0],
            ["fork", "fork", [["iter", 0], ["take", 1, 3, 1]]],
            ["take", 0, 2, 0],
            ["join"],
            ["drain", 0, 0],
        ]
    ],
    "a child took the batches of its parent, and ended its workers": [
        [
            ["make", 2, "ready", 1, is_persistent, 0],
            ["iter", -1],
            ["take", -1, 1, 0],
            ["fork", "process", steps],
            ["join"],
            ["drain", 0, 0],
        ]
        for is_persistent in (False, True)
        for steps in ([["take", 0, 2, 0]], [["drop_run", 0], ["drop_source", 0]], [["shutdown", 0, False]])
    ],
    "behind an interrupt a batch was missing": [
        interrupted(n_workers, delay_us) for n_workers in (0, 2) for delay_us in range(20, 800, 60)
    ],
    "an interrupt while an engine started left its threads": [
        interrupted_starts(range(first, first + 300, 20)) for first in range(100, 2500, 300)
    ],
    "an interrupt left a lock held that workers wait for": [
        [["make", 0, "set", 0, False, 0], ["interrupt_state", -1, 100]]
    ],
    "an interrupt at the end of the start of workers left them, or pipes": [
        [
            ["make", 8, "ready", 3, is_persistent, 3],
            *(["interrupt_start", 0, delay_us, True] for delay_us in (750, 3000, 4899, 5500)),
            ["epoch", 0, 2, 0, "break"],
            ["shutdown", 0, False],
        ]
        for is_persistent in (False, True)
    ],
}


@pytest.mark.parametrize("fault", FOUND)
def test_what_programs_have_found(env: programs.Environment, fault: str) -> None:
    found = programs.Campaign(env)
    found.run([(fault, program) for program in FOUND[fault]])
    check(found, len(FOUND[fault]))
