"""labels.bin is replaced or rewritten while a data set selects by it: right batches, or an error of ours."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import contracts
import numpy as np
import pytest
from factory import Spec, oracle_labels
from torch.utils.data import DataLoader

from saev_torch import FormatError, ShuffledActivations, ShuffledConfig
from saev_torch.reading import columns

SPEC = Spec(n_examples=40, content_tokens=6, examples_per_shard=7)
MESSAGE = r"labels\.bin: expected the (file|labels) .*start again"


def _other() -> np.ndarray:
    """Labels of which other tokens are left, and another number of them, than of those that the factory writes."""
    return np.roll(oracle_labels(SPEC), 1, axis=1) // 2


def _same_counts() -> np.ndarray:
    """In each example as many tokens are left, but others."""
    return np.flip(oracle_labels(SPEC), axis=1)


def _rename(path: Path, new: np.ndarray) -> None:
    new.tofile(path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def _rewrite(path: Path, new: np.ndarray) -> None:
    with path.open("r+b") as file:
        file.write(new.tobytes())
    # The clock of a file system may tick every 10 ms only.
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Path, np.ndarray], None], Callable[[], np.ndarray]]] = {
    "renamed": (_rename, _other),
    "rewritten": (_rewrite, _other),
    "renamed, same counts": (_rename, _same_counts),
    "rewritten, same counts": (_rewrite, _same_counts),
}


def _change(cfg: ShuffledConfig, how: str) -> None:
    change, make = CHANGES[how]
    change(cfg.shards / "labels.bin", make())


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What follows may be refused, with the right error."""
    messages = []
    try:
        yield
    except FormatError as err:
        messages.append(str(err))
    assert all(re.search(MESSAGE, message) for message in messages)


@pytest.fixture
def cfg(make_shards: Callable[..., Path]) -> ShuffledConfig:
    return ShuffledConfig(shards=make_shards(SPEC), layer=3, batch_size=8, buffer_size=8, ignore_labels=[0, 1, 2])


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "large":
        monkeypatch.setattr(columns, "_MAX_KEPT_NBYTES", 0)
    return str(request.param)


@pytest.mark.parametrize("how", CHANGES)
def test_before_an_iteration(cfg: ShuffledConfig, how: str, size: str) -> None:
    data_set = ShuffledActivations(cfg)
    _change(cfg, how)
    with pytest.raises(FormatError, match=MESSAGE):
        list(data_set)


@pytest.mark.parametrize("how", CHANGES)
def test_within_an_iteration(cfg: ShuffledConfig, how: str, size: str) -> None:
    """What is in memory, or open, is what it was; what is not is refused."""
    batches = iter(ShuffledActivations(cfg))
    found = [next(batches)]
    _change(cfg, how)
    with _refusing():
        found += list(batches)
        contracts.check_epoch(found, SPEC, cfg)


@pytest.mark.parametrize("how", CHANGES)
def test_before_samples_are_located(cfg: ShuffledConfig, how: str, size: str) -> None:
    data_set = ShuffledActivations(cfg)
    wanted = data_set.locate(3)
    _change(cfg, how)
    with _refusing():
        found = data_set.locate(3)
        assert all(found[key].equal(wanted[key]) for key in wanted)


@pytest.mark.parametrize("how", ["renamed", "rewritten", "rewritten, same counts"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_before_workers_start(cfg: ShuffledConfig, how: str, method: str) -> None:
    loader = contracts.make_ready(cfg, num_workers=1, multiprocessing_context=method)
    _change(cfg, how)
    with pytest.raises(FormatError, match=MESSAGE):
        list(loader)


@pytest.mark.parametrize("how", ["renamed", "rewritten", "rewritten, same counts"])
def test_before_forked_workers_read_what_is_large(
    cfg: ShuffledConfig, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_MAX_KEPT_NBYTES", 0)
    test_before_workers_start(cfg, how, "fork")


def test_touched(cfg: ShuffledConfig, size: str) -> None:
    """The time alone proves nothing."""
    data_set = ShuffledActivations(cfg)
    os.utime(cfg.shards / "labels.bin", ns=(1, 1))
    contracts.check_epoch(list(data_set), SPEC, cfg)
    contracts.check_epoch(list(DataLoader(data_set, num_workers=1, multiprocessing_context="fork")), SPEC, cfg)


def test_appeared(make_shards: Callable[..., Path]) -> None:
    """Labels that come when a data set is open are not read: the next one has them."""
    cfg = ShuffledConfig(shards=make_shards(SPEC, labels=False), layer=3, batch_size=8, buffer_size=8)
    data_set = ShuffledActivations(cfg)
    oracle_labels(SPEC).tofile(cfg.shards / "labels.bin")
    for batch in (next(iter(data_set)), next(iter(DataLoader(data_set, num_workers=1)))):
        assert "token_labels" not in batch


def test_gone(cfg: ShuffledConfig) -> None:
    sources = ShuffledActivations(cfg), contracts.make_ready(cfg, num_workers=1, multiprocessing_context="spawn")
    os.unlink(cfg.shards / "labels.bin")
    for source in sources:
        with pytest.raises(FileNotFoundError, match=r"labels\.bin"):
            list(source)
