"""Hostile directories and states, a few of them; `python tests/fuzz.py --n 100000` tries many."""

import json
import tempfile
from pathlib import Path

import factory
import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saev_torch import SaevTorchError

N_DIRECTORIES = 300
N_STATES = 1000


@pytest.fixture(scope="module", autouse=True)
def listening():
    fuzz.listen()
    yield
    assert not (Path(tempfile.gettempdir()) / "saev_torch-fuzz-unpickled").exists()


def test_hostile_directories(tmp_path):
    figures = fuzz.campaign(fuzz.Directories(tmp_path).one, range(N_DIRECTORIES))
    # Not all: where nothing opens, nothing behind the opening is tried.
    assert 0.8 * N_DIRECTORIES < figures.refused < N_DIRECTORIES


def test_hostile_states(tmp_path):
    figures = fuzz.campaign(fuzz.States(tmp_path).one, range(N_STATES))
    assert 0.8 * N_STATES < figures.refused < N_STATES


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
ONCE = settings(max_examples=100, deadline=None, suppress_health_check=SLOW)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return factory.make_shards(tmp_path_factory.mktemp("fuzz"), fuzz.SPEC)


@given(field=st.sampled_from(sorted(fuzz.SPEC.metadata())), value=JSON)
@ONCE
def test_any_field_of_metadata(directory, field, value):
    (directory / "metadata.json").write_text(json.dumps({**fuzz.SPEC.metadata(), field: value}))
    fuzz.open_all(directory)


@given(data=st.data())
@ONCE
def test_any_entry_of_a_state(states, data):
    data_set, good = states
    key = data.draw(st.sampled_from(sorted(good)))
    value = data.draw(JSON | st.binary(max_size=4) | st.floats() | st.tuples(JSON))
    try:
        data_set.load_state_dict({**good, key: value})
    except SaevTorchError:
        return
    # What was taken is of the same kind.
    assert type(value) is type(good[key]) or good[key] is None


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    states = fuzz.States(tmp_path_factory.mktemp("states"))
    return states.data_sets[0], states.good[0]
