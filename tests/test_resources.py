"""What a loader takes from the machine: bounded while it runs, nothing after it."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from saev_torch import ShuffledActivations, ShuffledConfig

SMALL_SHM = """
import sys
from torch.utils.data import DataLoader
from saev_torch import ShuffledActivations, ShuffledConfig
cfg = ShuffledConfig(shards=sys.argv[1], layer=0, batch_size=4096, buffer_size=16)
kept = []
n = 0
for batch in DataLoader(ShuffledActivations(cfg), num_workers=2):
    # Far more than 64 MB of batches alive at a time.
    kept.append(batch)
    n += len(batch["act"])
print(n, len({int(b["example_idx"][0]) for b in kept}) > 1)
"""


@pytest.fixture
def shards(make_shards):
    return make_shards(n_examples=60, content_tokens=5, cls=False, layers=(0,), d_model=8, examples_per_shard=25)


def count_descriptors():
    return len(os.listdir("/proc/self/fd"))


def anonymous_kb():
    # Not all of it: the share of a library depends on who else uses it.
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss_Anon:")))


def test_200_epochs_take_no_more_than_a_few(shards):
    data_set = ShuffledActivations(ShuffledConfig(shards=shards, layer=0, batch_size=16, buffer_size=16))

    def epochs(n):
        for _ in range(n):
            assert sum(len(batch["act"]) for batch in data_set) == 300
        gc.collect()
        return count_descriptors(), threading.active_count(), anonymous_kb()

    before = epochs(10)
    after = epochs(200)
    assert (after[0] <= before[0], after[1] <= before[1]) == (True, True), (before, after)
    assert after[2] - before[2] < 8 << 10


def test_epochs_with_persistent_workers_take_no_more(shards):
    data_set = ShuffledActivations(ShuffledConfig(shards=shards, layer=0, batch_size=16, buffer_size=16))
    loader = DataLoader(data_set, num_workers=2, persistent_workers=True)
    seen = []
    for _ in range(40):
        assert sum(len(batch["act"]) for batch in loader) == 300
        workers = [worker.pid for worker in loader._iterator._workers]
        seen.append((count_descriptors(), [len(os.listdir(f"/proc/{pid}/fd")) for pid in workers]))
    assert max(seen[20:]) <= max(seen[:20])


def test_a_container_size_dev_shm_is_enough(make_shards, tmp_path):
    shards = make_shards(
        n_examples=250, content_tokens=200, cls=False, layers=(0,), d_model=512, examples_per_shard=100
    )
    script = tmp_path / "run.py"
    script.write_text(SMALL_SHM)
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small /dev/shm is not allowed here")
    done = subprocess.run(
        [*command, sys.executable, "-W", "error", str(script), str(shards)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("50000 True\n", "")


MANY_DATA_SETS = """
import os, sys
from saev_torch import IndexedConfig, IndexedDataset, OrderedActivations, OrderedConfig, ShuffledConfig
from saev_torch import ShuffledDataLoader
shards, kinds = sys.argv[1], []
kinds.append(lambda: IndexedDataset(IndexedConfig(shards=shards, layer=0)))
kinds.append(lambda: OrderedActivations(OrderedConfig(shards=shards, layer=0, batch_size=100)))
kinds.append(lambda: ShuffledDataLoader(ShuffledConfig(shards=shards, layer=0, batch_size=100, buffer_size=2)))
kept = []
for i in range(600):
    data_set = kinds[i % 3]()
    if i % 3 == 0:
        # Each from other files.
        found = [data_set[j * 25 % 300]["example_idx"] for j in range(12)]
        assert found == [j * 25 % 300 // 5 for j in range(12)], found
    elif i % 60 < 3:
        assert sum(len(batch["act"]) for batch in data_set) == 300
    kept.append(data_set)
print(len(os.listdir("/proc/self/fd")))
assert [int(data_set[7]["example_idx"]) for data_set in kept[::3]] == [1] * 200
"""


def test_600_data_sets_in_one_process(shards):
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", sys.executable, "-c", MANY_DATA_SETS, str(shards)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 128


KEEP_ALL = """
import os, sys
from torch.utils.data import DataLoader
from saev_torch import ShuffledActivations, ShuffledConfig
cfg = ShuffledConfig(shards=sys.argv[1], layer=0, batch_size=8, buffer_size=600)
loader = DataLoader(ShuffledActivations(cfg), num_workers=1, persistent_workers=True)
kept = []
for epoch in range(2):
    kept.append(list(loader))
for batches in kept:
    found = sorted(int(x) for batch in batches for x in batch["act"][:, 0])
    print(len(batches), found == sorted(1000 * example + token for example in range(250) for token in range(24)))
fds = [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), loader._iterator._workers[0].pid)]
print(max(fds) < 100)
"""


def test_all_batches_are_kept_with_few_descriptors(make_shards):
    """1,500 of them, of which 600 are open at a time in the worker; 256 descriptors would do for none of the two."""
    shards = make_shards(n_examples=250, content_tokens=24, cls=False, layers=(0,), d_model=8, examples_per_shard=99)
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 256 && exec "$@"', "sh", sys.executable, "-c", KEEP_ALL, str(shards)],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("750 True\n750 True\nTrue\n", "")
