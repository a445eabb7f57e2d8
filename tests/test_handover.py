"""Batches reach a parent that may not look into its workers, as torch's own data do."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import contracts
import pytest
from conftest import wait_until
from torch.utils.data import DataLoader

from saev_torch import OrderedActivations, OrderedConfig

ROOT = Path(__file__).parents[1]

# Nobody may look into this process, and those that it forks; it has no privilege to look into others.
SECRETIVE = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
header, caps = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
assert libc.capget(header, caps) == 0
words = [word & ~(1 << 19) for word in struct.unpack("6I", caps.raw)]
assert libc.capset(header, struct.pack("6I", *words)) == 0
assert libc.prctl(4, 0, 0, 0, 0) == 0
pid = os.fork()
if not pid:
    import time
    time.sleep(60)
    os._exit(0)
try:
    os.readlink(f"/proc/{pid}/fd/1")
except PermissionError:
    pass
else:
    sys.exit("may look")
finally:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""
NO_MEMFD = """
import os
del os.memfd_create
"""
READ = """
import multiprocessing, os, sys, tempfile
import contracts
from torch.utils.data import DataLoader
from saev_torch import IndexedConfig, IndexedDataset, OrderedActivations, OrderedConfig
from saev_torch.reading import received
def is_shared(batch):
    return type(batch.memory).__name__ == "ndarray"
def main():
    path, method, wants_shared = sys.argv[1], sys.argv[2], sys.argv[3] == "shared"
    data_set = OrderedActivations(OrderedConfig(shards=path, layer=3, batch_size=64))
    loader = DataLoader(data_set, num_workers=1, multiprocessing_context=method, persistent_workers=True)
    for epoch in range(2):
        kept = list(loader)
        print(contracts.digest(kept))
        assert {is_shared(batch) for batch in kept} == {wants_shared}
    if wants_shared:
        assert all(len(regions) <= 6 for regions in received._regions.values()), received._regions
    indexed = IndexedDataset(IndexedConfig(shards=path, layer=3))
    loader = DataLoader(indexed, batch_size=600, num_workers=1, multiprocessing_context=method)
    print(contracts.digest(list(loader)))
    del loader, kept
    print(sorted(name for name in os.listdir(tempfile.gettempdir()) if not name.startswith("pymp-")))
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def shards(make_shards):
    return make_shards(n_examples=60, content_tokens=30, layers=(3,), d_model=16, examples_per_shard=37)


def digests(shards):
    from saev_torch import IndexedConfig, IndexedDataset

    whole = contracts.digest(list(OrderedActivations(OrderedConfig(shards=shards, layer=3, batch_size=64))))
    indexed = IndexedDataset(IndexedConfig(shards=shards, layer=3))
    return [whole] * 2 + [contracts.digest(list(DataLoader(indexed, batch_size=600)))]


def run(tmp_path, code, shards, *args, wrap=()):
    script = tmp_path / "script.py"
    script.write_text(code)
    before = {name for name in os.listdir("/dev/shm") if "saev" in name}
    # Names of sockets may have 107 letters.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*wrap, sys.executable, str(script), str(shards), *args], capture_output=True, text=True, check=False,
            timeout=200, env={**os.environ, "TMPDIR": folder},
        )  # fmt: skip
    # Others may have to say something about a system like that.
    assert done.returncode == 0, done.stderr
    *found, left = done.stdout.splitlines()
    assert left == "[]"
    # Another process of tests may be at the same.
    wait_until(lambda: {name for name in os.listdir("/dev/shm") if "saev" in name} <= before)
    return found


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_parent_that_may_not_look_into_its_workers(tmp_path, shards, method):
    # A process that is spawned begins with SECRETIVE, too, as far as the script is run there.
    assert run(tmp_path, SECRETIVE + READ, shards, method, "shared") == digests(shards)


def test_a_system_without_memfd(tmp_path, shards):
    """The batches go through the pipe."""
    assert run(tmp_path, NO_MEMFD + READ, shards, "fork", "copied") == digests(shards)


def test_a_system_without_proc(tmp_path, shards):
    wrap = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs /proc && exec "$@"', "sh"]
    if subprocess.run([*wrap, "true"], capture_output=True, check=False).returncode:
        pytest.skip("hiding /proc is not allowed here")
    assert run(tmp_path, READ, shards, "fork", "shared", wrap=wrap) == digests(shards)


OTHER_USER = """
import multiprocessing, os, sys
import contracts
from torch.utils.data import DataLoader
from saev_torch import OrderedActivations, OrderedConfig
data_set = OrderedActivations(OrderedConfig(shards=sys.argv[1], layer=3, batch_size=64))
changed = multiprocessing.Event()
loader = iter(DataLoader(data_set, num_workers=2, worker_init_fn=lambda worker: changed.wait()))
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
changed.set()
print(contracts.digest(list(loader)))
print([])
"""


def test_a_parent_that_becomes_another_user(tmp_path, shards):
    if os.getuid():
        pytest.skip("only root can become another user")
    assert run(tmp_path, OTHER_USER, shards) == digests(shards)[:1]
