"""Systems that lack something: the table in docs/systems.md, row by row, in processes from which that is taken away."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import factory
import lacking
import pytest
import uring

from saev_torch import Metadata, ShardWriter, WriteError, verify

ROOT = Path(__file__).parent.parent
# The same as in touring.py, which is not to be imported here.
SPEC = factory.Spec(n_examples=40, content_tokens=24, layers=(3, 7), d_model=16, examples_per_shard=13)
TIMEOUT_S = 600


class Row(NamedTuple):
    """A row of the table: what lacks, in which ways, and what is said."""

    name: str
    ways: list[str]
    text: str

    @property
    def messages(self) -> list[str]:
        """What is in backticks, and has spaces: those without are names."""
        return [text for text in re.findall(r"`([^`]*)`", self.text) if " " in text]


def _read_table() -> dict[str, Row]:
    text = (ROOT / "docs" / "systems.md").read_text()
    found = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    return {name: Row(name, how.split(", "), what) for name, how, what in found}


TABLE = _read_table()
CASES = [(row.name, way) for row in TABLE.values() for way in row.ways if row.name != "everything"]
# What reads data that are not in the page cache, where it is not the best there is.
READERS = {"io_uring": "CallReader", "O_DIRECT.absent": "RingReader", "everything": "CallReader"}


def _run(root: Path, cases: dict[str, list[str]], methods: list[str]) -> dict[str, Any]:
    """Go through the package without something; by the name of the case what `touring.tour` returned."""
    shards = factory.make_shards(root / "made", SPEC)
    jobs = []
    for i, lacks in enumerate(cases.values()):
        place = root / str(i)
        place.mkdir()
        # torch's own DataLoader cannot do with workers where that is refused.
        workers = [0] if "sched_getaffinity.ENOSYS" in lacks else [0, 2]
        tour = {"shards": str(shards), "place": str(place), "workers": workers, "methods": methods}
        cache = None if lacks == ["HOME.absent"] else str(root / f"cache{i}")
        jobs.append({"lacks": lacks, "cache": cache, "tour": tour, "out": str(root / f"{i}.json")})
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(here / "lacks"), os.environ["PYTHONPATH"]))}
    command = [sys.executable, str(here / "lacking.py"), json.dumps(jobs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return {name: json.loads(Path(job["out"]).read_text()) for name, job in zip(cases, jobs, strict=True)}


def _check(outcome: dict[str, Any], messages: list[str], reader: str) -> None:
    if "impossible" in outcome:
        pytest.skip(f"cannot be taken away here: {outcome['impossible']}")
    assert "failed" not in outcome, outcome["failed"]
    raised = [text for text in outcome["steps"].values() if text is not None]
    said = raised + [line for line in outcome["log"] if line.startswith("WARNING")]
    assert not [text for text in raised if text.startswith("RAW")]
    assert not [text for text in said if not any(message in text for message in messages)]
    assert not [message for message in messages if not any(message in text for text in said)]
    assert outcome["reader"] == (reader if uring.refusal() is None else "CallReader")
    assert outcome["has_ring"] == (reader != "CallReader" and uring.refusal() is None)
    assert outcome["is_alive"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {"nothing": []} | {f"{name}.{way}": [f"{name}.{way}"] for name, way in CASES}
    return _run(tmp_path_factory.mktemp("lacking"), cases, ["fork"])


def test_the_table_has_everything_that_is_taken_away() -> None:
    assert [f"{name}.{way}" for name, way in CASES] == list(lacking.WAYS)
    assert list(TABLE)[-1] == "everything"


def test_nothing_is_said_where_nothing_lacks(outcomes: dict[str, Any]) -> None:
    _check(outcomes["nothing"], [], "DirectReader")


@pytest.mark.parametrize(("name", "way"), CASES)
def test_without(outcomes: dict[str, Any], name: str, way: str) -> None:
    case = f"{name}.{way}"
    _check(outcomes[case], TABLE[name].messages, READERS.get(case) or READERS.get(name) or "DirectReader")


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("options", [{"resume": True}, {"example_range": (0, 9)}])
def test_a_writer_that_needs_locks_leaves_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    md = Metadata(**SPEC.metadata())
    with pytest.raises(WriteError, match="expected a file system with locks"), ShardWriter(tmp_path, md, **options):
        pytest.fail("opened")
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("no_locks")
def test_a_writer_without_locks_is_alone(tmp_path: Path) -> None:
    """Another one is refused as long as it writes, and when it has written."""
    md = Metadata(**SPEC.metadata())
    with ShardWriter(tmp_path, md) as writer:
        for options in ({}, {"resume": True}):
            with pytest.raises(WriteError, match="expected"), ShardWriter(tmp_path, md, **options):
                pytest.fail("opened")
        writer.write_batch(factory.oracle(md), 0)
    assert verify(writer.shards_dir).ok
    with pytest.raises(WriteError, match="got a finished one"), ShardWriter(tmp_path, md):
        pytest.fail("opened")
    with ShardWriter(tmp_path, md, resume=True) as again:
        assert again.missing() == []


def test_without_all_of_them(tmp_path: Path) -> None:
    found = _run(tmp_path, {"everything": lacking.EVERYTHING}, ["fork", "spawn"])["everything"]
    _check(found, TABLE["everything"].messages, READERS["everything"])
