"""Sequences and states that the code of November 2026 gave: what somebody trained with must stay what it was.

`golden.json` was written by that code, `python tests/test_golden.py` writes it again. Do so only with a new version of
the plan, which old states must be refused by.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import contracts
import factory
import pytest
from contracts import Config

from saev_torch import OrderedConfig, ShuffledConfig
from saev_torch.reading import gather
from saev_torch.reading.rowcopy import RowCopy

GOLDEN = Path(__file__).parent / "golden.json"
N_EPOCHS = 3

_SMALL = {"n_examples": 40, "content_tokens": 6, "examples_per_shard": 7, "layers": (3, 7), "d_model": 4}
_WIDE = {"n_examples": 150, "content_tokens": 12, "examples_per_shard": 32, "layers": (-2, 5, 9), "d_model": 2}
_PLAIN = {"n_examples": 200, "content_tokens": 9, "examples_per_shard": 50, "layers": (1,), "cls": False, "d_model": 3}

# Fields of `factory.Spec`, fields of the config (with `buffer_size` and `seed` it is a shuffled one), number of ranks.
CASES: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    (_SMALL, {"layer": 3, "batch_size": 16, "buffer_size": 8, "seed": 17}, 1),
    (_SMALL, {"layer": 7, "batch_size": 16, "buffer_size": 8, "seed": 17, "tokens": "all"}, 1),
    (_SMALL, {"layer": 7, "batch_size": 5, "buffer_size": 8, "seed": 17, "tokens": "special"}, 2),
    (_SMALL, {"layer": "all", "batch_size": 16, "buffer_size": 8, "seed": 3}, 1),
    (_SMALL, {"layer": "all", "batch_size": 16, "buffer_size": 16, "seed": 3, "tokens": "all"}, 2),
    (_SMALL, {"layer": "all", "batch_size": 7, "buffer_size": 4, "seed": 3, "tokens": "special"}, 1),
    (_SMALL, {"layer": (7, 3), "batch_size": 16, "buffer_size": 8, "seed": 0}, 1),
    (_SMALL, {"layer": (3,), "batch_size": 16, "buffer_size": 8, "seed": 0, "tokens": "all"}, 3),
    (_SMALL, {"layer": 3, "batch_size": 16, "buffer_size": 8, "seed": 17, "ignore_labels": [0, 3]}, 1),
    (_SMALL, {"layer": "all", "batch_size": 16, "buffer_size": 8, "seed": 17, "ignore_labels": [1, 2, 6]}, 2),
    (_SMALL, {"layer": 3, "batch_size": 9, "buffer_size": 8, "seed": 17, "ignore_labels": [5], "tokens": "all"}, 4),
    (_SMALL, {"layer": 3, "batch_size": 16, "buffer_size": 64, "seed": -1}, 1),
    (_SMALL, {"layer": 3, "batch_size": 1000, "buffer_size": 64, "seed": 2**70}, 2),
    (_WIDE, {"layer": 5, "batch_size": 32, "buffer_size": 32, "seed": 17}, 1),
    (_WIDE, {"layer": 5, "batch_size": 32, "buffer_size": 32, "seed": 17, "drop_last": True}, 2),
    (_WIDE, {"layer": 5, "batch_size": 32, "buffer_size": 32, "seed": 17, "n_lanes": 1}, 1),
    (_WIDE, {"layer": 5, "batch_size": 32, "buffer_size": 12, "seed": 17, "n_lanes": 3}, 2),
    (_WIDE, {"layer": 5, "batch_size": 32, "buffer_size": 24, "seed": 17, "n_lanes": 12}, 3),
    (_WIDE, {"layer": 5, "batch_size": 32, "buffer_size": 16, "seed": 17, "block_size": 1}, 1),
    (_WIDE, {"layer": 5, "batch_size": 32, "buffer_size": 16, "seed": 17, "block_size": 100}, 1),
    (_WIDE, {"layer": "all", "batch_size": 100, "buffer_size": 16, "seed": 17, "tokens": "all", "n_lanes": 2}, 4),
    (_WIDE, {"layer": (9, -2), "batch_size": 64, "buffer_size": 8, "seed": 5, "drop_last": True}, 1),
    (_PLAIN, {"layer": 1, "batch_size": 20, "buffer_size": 40, "seed": 17}, 1),
    (_PLAIN, {"layer": 1, "batch_size": 19, "buffer_size": 8, "seed": 17, "n_lanes": 4}, 2),
    (_PLAIN, {"layer": 1, "batch_size": 50, "buffer_size": 8, "seed": 17, "n_threads": 1, "min_buffer_fill": 1.0}, 1),
    (_PLAIN, {"layer": -1, "batch_size": 64}, 1),
    (_PLAIN, {"layer": "all", "batch_size": 64, "drop_last": True}, 3),
    (_SMALL, {"layer": -2, "batch_size": 16, "tokens": "all"}, 2),
    (_SMALL, {"layer": "all", "batch_size": 16, "tokens": "content"}, 1),
    (_SMALL, {"layer": (3, 7), "batch_size": 13, "tokens": "special"}, 1),
    (_WIDE, {"layer": 9, "batch_size": 77, "tokens": "all"}, 4),
]


def _make(root: Path, case: int) -> tuple[Config, int]:
    spec, fields, n_ranks = CASES[case]
    kind = ShuffledConfig if "seed" in fields else OrderedConfig
    return kind(shards=factory.make_shards(root, factory.Spec(**spec)), **fields), n_ranks


def _sequence(cfg: Config, rank: int, n_ranks: int, **options: Any) -> list[str]:
    loader = contracts.make_ready(cfg, rank=rank, world_size=n_ranks, **options)
    return [contracts.digest(loader)[:16] for _ in range(N_EPOCHS)]


def _cut(cfg: Config, n_ranks: int) -> tuple[dict[str, Any], str]:
    """A state of the last rank in the middle of the second epoch, and what follows it."""
    loader = contracts.make_ready(cfg, rank=n_ranks - 1, world_size=n_ranks)
    loader.set_epoch(1)
    batches = iter(loader)
    for _ in range(len(loader) // 2):
        next(batches)
    return loader.state_dict(), contracts.digest(batches)[:16]


GOLD = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []


def test_every_case_is_there() -> None:
    assert len(GOLD) == len(CASES) >= 30


# With a buffer; without one, where the kernel copies rows, or where they are copied here.
HOW = [(case, "buffer") for case in range(len(CASES))]
HOW += [(case, ("kernel", "here")[case % 2]) for case, (_, fields, _) in enumerate(CASES) if "seed" in fields]


@pytest.mark.parametrize(("case", "way"), HOW)
def test_sequences_are_what_they_were(case: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "buffer":
        contracts.save_buffers(monkeypatch, copies_here=way == "here")
    cfg, n_ranks = _make(tmp_path, case)
    # The digest is of every bit, so that the number of workers shows, too.
    options = {"num_workers": 2} if case % 10 == 0 else {}
    assert [_sequence(cfg, rank, n_ranks, **options) for rank in range(n_ranks)] == GOLD[case]["sequences"]


@pytest.mark.parametrize(("case", "way"), HOW)
def test_states_of_before_load(case: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    if way != "buffer":
        contracts.save_buffers(monkeypatch, copies_here=way == "here")
        in_kernel, here = gather._copy_in_kernel, RowCopy.__call__
        monkeypatch.setattr(gather, "_copy_in_kernel", lambda *args: (copied.append("kernel"), in_kernel(*args))[1])
        monkeypatch.setattr(RowCopy, "__call__", lambda *args, **k: (copied.append("here"), here(*args, **k))[1])
    cfg, n_ranks = _make(tmp_path, case)
    loader = contracts.make_ready(cfg, rank=n_ranks - 1, world_size=n_ranks)
    loader.load_state_dict(GOLD[case]["state"])
    assert contracts.digest(iter(loader))[:16] == GOLD[case]["rest"]
    # And what is saved today is what was saved then.
    state, rest = _cut(cfg, n_ranks)
    assert rest == GOLD[case]["rest"]
    assert {key: state[key] for key in GOLD[case]["state"]} == GOLD[case]["state"]
    # A buffer that must be full before the first batch is there for that.
    assert set(copied) == (set() if way == "buffer" or "min_buffer_fill" in CASES[case][1] else {way})


def _write() -> None:
    found = []
    for case in range(len(CASES)):
        with tempfile.TemporaryDirectory() as root:
            cfg, n_ranks = _make(Path(root), case)
            state, rest = _cut(cfg, n_ranks)
            sequences = [_sequence(cfg, rank, n_ranks) for rank in range(n_ranks)]
            found.append({"sequences": sequences, "state": state, "rest": rest})
    lines = ",\n".join(json.dumps(one) for one in found)
    GOLDEN.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    _write()
