"""Many epochs with random breaks, resumes, worker counts and configs; order, values and resources watched all along.

python tests/soak.py --minutes 30
"""

import argparse
import dataclasses
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contracts
import factory
import numpy as np

from saev_torch import OrderedConfig, ShuffledConfig

SPEC = factory.Spec(
    n_examples=120, content_tokens=16, cls=True, layers=(3, 7), d_model=64, examples_per_shard=17, labels=True
)
CONFIGS: tuple[tuple[type[Any], dict[str, Any]], ...] = (
    (ShuffledConfig, {"layer": 7, "batch_size": 64, "buffer_size": 8}),
    (ShuffledConfig, {"layer": "all", "tokens": "all", "batch_size": 100, "buffer_size": 4, "n_threads": 2}),
    (ShuffledConfig, {"layer": 3, "batch_size": 48, "ignore_labels": [0, 5], "drop_last": True, "n_lanes": 3}),
    (OrderedConfig, {"layer": 3, "batch_size": 80, "tokens": "all"}),
)
SETTLE_S = 60.0
# However slow the machine: of fewer, halves say nothing.
N_MEASURED = 12


@dataclasses.dataclass
class Figures:
    """What a run did, and the most that it held."""

    iterations: int = 0
    batches: int = 0
    breaks: int = 0
    resumes: int = 0
    whole_epochs: int = 0
    workers: int = 0
    seconds: float = 0.0
    descriptors: list[int] = dataclasses.field(default_factory=list)
    threads: list[int] = dataclasses.field(default_factory=list)
    pss_mb: list[float] = dataclasses.field(default_factory=list)


class Reference:
    """Digest of every batch of an epoch, made without workers, checked against numpy; the latest few are kept."""

    def __init__(self, cfg: contracts.Config) -> None:
        self.cfg = cfg
        self._known: dict[int, list[str]] = {}

    def batches(self, epoch: int) -> list[str]:
        if epoch not in self._known:
            data_set = contracts.make_data_set(self.cfg)
            data_set.set_epoch(epoch)
            batches = list(data_set)
            contracts.check_epoch(batches, SPEC, self.cfg)
            if len(self._known) > 8:
                self._known.clear()
            self._known[epoch] = [contracts.digest([batch]) for batch in batches]
        return self._known[epoch]


def measure() -> tuple[int, int, float]:
    """Descriptors, threads and proportional memory of this process, after what is ending has ended."""
    gc.collect()
    deadline = time.monotonic() + SETTLE_S
    while any(thread.name.startswith(("saev_torch", "QueueFeeder")) for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    pss = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
    return len(os.listdir("/proc/self/fd")), threading.active_count(), int(pss.split()[1]) / 1024


def soak(shards: Path, seconds: float, seed: int = 0, log: Callable[[str], None] = str) -> Figures:
    """Run for some time, and until enough was measured; `log` gets a line now and then.

    Raises:
        AssertionError: A batch is not the one that has its turn, or an epoch has too few.
    """
    rng = random.Random(seed)
    references = [Reference(kind(shards=shards, **fields)) for kind, fields in CONFIGS]
    states: list[dict[str, Any] | None] = [None] * len(CONFIGS)
    figures, began, measured = Figures(), time.monotonic(), 0.0
    while time.monotonic() - began < seconds or len(figures.descriptors) < N_MEASURED:
        which = rng.randrange(len(CONFIGS))
        reference, state = references[which], states[which]
        workers = rng.choice([0, 0, 0, 1, 2, 3])
        loader = contracts.make_ready(
            reference.cfg, num_workers=workers, persistent_workers=workers > 0 and rng.random() < 0.3
        )
        if state is not None and rng.random() < 0.9:
            # Through JSON, as a checkpoint would.
            loader.load_state_dict(json.loads(json.dumps(state)))
            figures.resumes += 1
        else:
            loader.set_epoch(rng.randrange(1000))
        figures.workers += workers
        for _ in range(rng.choice([1, 1, 2, 3])):
            position = loader.state_dict()
            epoch, first = position["epoch"], position["batch"]
            wanted = reference.batches(epoch)
            last = rng.choice([len(wanted), len(wanted), rng.randrange(len(wanted) + 1)])
            at = first
            for batch in loader:
                assert contracts.digest([batch]) == wanted[at], (which, epoch, at, workers)
                at += 1
                if at >= max(last, first + 1) and at < len(wanted):
                    break
            figures.iterations += 1
            figures.batches += at - first
            if at == len(wanted):
                figures.whole_epochs += 1
                assert loader.state_dict()["epoch"] == epoch + 1
            else:
                figures.breaks += 1
                assert loader.state_dict()["batch"] == at
                break
        states[which] = loader.state_dict()
        if rng.random() < 0.5:
            loader.shutdown()
        del loader, batch
        if time.monotonic() - began > measured:
            measured += seconds / 30
            for values, value in zip((figures.descriptors, figures.threads, figures.pss_mb), measure(), strict=True):
                values.append(value)
            held = figures.descriptors[-1], figures.threads[-1], round(figures.pss_mb[-1])
            log(f"{time.monotonic() - began:.0f} s: {figures.iterations} iterations, holding {held}")
    figures.seconds = time.monotonic() - began
    return figures


def check_steady(figures: Figures) -> None:
    """Check that the second half of a run held no more than the first, but for noise."""
    half = len(figures.descriptors) // 2
    assert max(figures.descriptors[half:]) <= max(figures.descriptors[:half]) + 2, figures.descriptors
    assert max(figures.threads[half:]) <= max(figures.threads[:half]), figures.threads
    assert np.median(figures.pss_mb[half:]) <= np.median(figures.pss_mb[1:half]) + 24, figures.pss_mb


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "This DataLoader will create")
    with tempfile.TemporaryDirectory() as root:
        figures = soak(factory.make_shards(Path(root), SPEC), 60 * args.minutes, args.seed, progress)
    print(json.dumps(dataclasses.asdict(figures)))
    check_steady(figures)
    print("steady", file=sys.stderr)


if __name__ == "__main__":
    main()
