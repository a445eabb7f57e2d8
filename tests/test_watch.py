"""What happens to a mapped file while it is read does not end the process; what it is not about goes where it went."""

import itertools
import mmap
import os
import signal
import subprocess
import sys
import weakref

import contracts
import numpy as np
import pytest
from conftest import wait_until
from factory import Spec
from torch.utils.data import DataLoader

from saev_torch import IndexedConfig, IndexedDataset, ReadError, ShuffledActivations, ShuffledConfig
from saev_torch.reading import gather, mapping, rowcopy, watch
from saev_torch.reading.mapping import Pages

N_PAGES = 40
WIDE = Spec(n_examples=12, content_tokens=50, cls=False, layers=(0,), d_model=256, examples_per_shard=6, labels=False)

# A file of pages whose bytes are their numbers, mapped and watched in a process of its own.
PROGRAM = """
import ctypes, faulthandler, mmap, os, signal, sys
import numpy as np
from saev_torch.reading import mapping, rowcopy, watch

fd = os.open(sys.argv[1], os.O_RDWR)
nbytes = os.fstat(fd).st_size
watched = watch.find_watch()

def map_file(is_watched):
    address = mapping._libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    number = watched.add(address, nbytes) if is_watched else None
    return address, number

def copy(address):
    memory = np.empty(nbytes, dtype=np.uint8)
    rowcopy.find_row_copy()(address + np.arange(nbytes // 4096) * 4096, memory.ctypes.data, 4096, 4096)
    return memory
"""


# Each program in a child of its own, of a process that imports torch once, which takes seconds.
SERVER = """
import gc, os, sys, traceback
from pathlib import Path
from saev_torch.reading import mapping, rowcopy, watch

gc.freeze()
for folder in map(Path, sys.argv[1:]):
    pid = os.fork()
    if pid == 0:
        for name, fd in ("stdout", 1), ("stderr", 2):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), fd)
        sys.argv[1] = str(folder / "pages")
        try:
            exec((folder / "program").read_text(), {})
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (folder / "code").write_text(str(code))
"""


def write_pages(path):
    path.write_bytes(b"".join(bytes([number]) * mmap.PAGESIZE for number in range(N_PAGES)))
    return path


@pytest.fixture
def pages(tmp_path):
    return write_pages(tmp_path / "pages")


def start(*arguments):
    return subprocess.run([sys.executable, "-c", *map(str, arguments)], capture_output=True, text=True)


def run(code, pages):
    return start(PROGRAM + code, pages)


def test_a_file_that_became_shorter_is_zeros_and_broken(pages):
    """All of it, so that the system need not tell more than once; another mapping is as it was."""
    done = run(
        """
assert watched.is_on and watched.is_on
(one, first), (other, second) = map_file(True), map_file(True)
before = copy(one)
assert before[::4096].tolist() == list(range(40)) and not watched.is_broken(first)
os.ftruncate(fd, 10 * 4096)
after = copy(one)
assert watched.is_broken(first) and not watched.is_broken(second)
assert after[: 10 * 4096].tolist() == before[: 10 * 4096].tolist() and not after[10 * 4096 :].any()
assert not copy(one).any()
os.ftruncate(fd, nbytes)
assert copy(other)[::4096].tolist() == [*range(10), *[0] * 30] and not watched.is_broken(second)
""",
        pages,
    )
    assert done.returncode == 0, done.stderr


NOT_OURS = {
    # What other code reads from a mapping of its own.
    "fault": "os.ftruncate(fd, 4096); copy(map_file(False)[0])",
    # What somebody sends.
    "sent": "os.kill(os.getpid(), signal.SIGBUS)",
    # What was watched, and is not any more.
    "removed": "address, number = map_file(True); watched.remove(number); os.ftruncate(fd, 4096); copy(address)",
}


BEFORE = ["", "faulthandler.enable(); ", "signal.signal(signal.SIGBUS, signal.SIG_DFL); "]


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """The folder of each program: how it ended, and what it said."""
    folders = {}
    for what, before, is_late in itertools.product(NOT_OURS, BEFORE, [False, True]):
        on = "assert watched.is_on; map_file(True); "
        code = (on + before if is_late else before + on) + NOT_OURS[what] + "\nprint('still here')"
        folders[what, before, is_late] = folder = tmp_path_factory.mktemp("ending")
        write_pages(folder / "pages")
        (folder / "program").write_text(PROGRAM + code)
    done = start(SERVER, *folders.values())
    assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("what", NOT_OURS)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("is_late", [False, True])
def test_another_signal_ends_the_process_as_ever(endings, what, before, is_late):
    """Who handled it before us handles it, and who took it later does."""
    stdout, stderr, code = [
        (endings[what, before, is_late] / name).read_text() for name in ("stdout", "stderr", "code")
    ]
    assert int(code) == -signal.SIGBUS, stderr
    assert stdout == ""
    assert ("Fatal Python error: Bus error" in stderr) == ("faulthandler" in before)


def test_a_handler_in_python_hears_what_is_sent(pages):
    code = """
heard = []
signal.signal(signal.SIGBUS, lambda *args: heard.append(args[0]))
assert watched.is_on
os.kill(os.getpid(), signal.SIGBUS)
assert heard == [signal.SIGBUS]
# It has the signal now, and keeps it.
assert not watched.is_on
"""
    done = run(code, pages)
    assert done.returncode == 0, done.stderr


def test_who_takes_the_signal_later_keeps_it(pages):
    """And a child that is forked, whose handlers are others, begins anew."""
    code = """
assert watched.is_on
faulthandler.enable()
assert not watched.is_on and not watched.is_on
pid = os.fork()
if not pid:
    address, number = map_file(True)
    is_on = watched.is_on
    os.ftruncate(fd, 4096)
    copy(address)
    os._exit(is_on and watched.is_broken(number))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
"""
    done = run(code, pages)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("when", ["before", "in the child"])
def test_two_handlers_do_not_send_a_signal_to_each_other_for_ever(pages, when):
    """Each has the other as the one before it: faulthandler in the parent after us, or in the child."""
    code = """
assert watched.is_on
WHEN == "before" and faulthandler.enable()
pid = os.fork()
if not pid:
    assert watched.is_on
    WHEN == "before" or faulthandler.enable()
    assert watched.is_on == (WHEN == "before")
    os.kill(os.getpid(), signal.SIGBUS)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGBUS
"""
    done = run(f"WHEN = {when!r}" + code, pages)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Fatal Python error: Bus error") == 1


def test_a_child_asks_whom_its_parent_had_asked(pages):
    """Also where the parent sent a signal on before."""
    code = """
heard = []
signal.signal(signal.SIGBUS, lambda *args: heard.append(args[0]))
assert watched.is_on
os.kill(os.getpid(), signal.SIGBUS)
pid = os.fork()
if not pid:
    assert watched.is_on
    os.kill(os.getpid(), signal.SIGBUS)
    os._exit(len(heard))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
"""
    done = run(code, pages)
    assert done.returncode == 0, done.stderr


def test_a_thread_that_blocks_the_signal_leaves_it_to_the_kernel(pages):
    """Blocked, it would end the process, whoever handles it. Others are as they were."""
    code = """
import threading
def ask():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    found.append(watched.is_on)
found = []
assert watched.is_on
thread = threading.Thread(target=ask)
thread.start()
thread.join()
assert found == [False] and watched.is_on
"""
    done = run(code, pages)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def made(make_shards):
    contracts.copy_here()
    return make_shards(WIDE)


def uniform(shards):
    return ShuffledConfig(shards=shards, layer=0, batch_size=100, order="uniform")


def copies_here(monkeypatch):
    counts = {"here": 0, "kernel": 0}
    here, kernel = rowcopy.RowCopy.__call__, gather._copy_in_kernel

    def copying(self, sources, *args, **kwargs):
        counts["here"] += len(sources)
        here(self, sources, *args, **kwargs)

    def copying_in_kernel(sources, *args):
        counts["kernel"] += len(sources)
        return kernel(sources, *args)

    monkeypatch.setattr(rowcopy.RowCopy, "__call__", copying)
    monkeypatch.setattr(gather, "_copy_in_kernel", copying_in_kernel)
    return counts


@pytest.mark.parametrize("why", ["", "no machine code", "signal is taken", "too many mappings"])
def test_the_kernel_copies_where_it_must(made, monkeypatch, why):
    if why == "no machine code":
        for module in (gather, mapping):
            monkeypatch.setattr(module, "find_watch", lambda: None)
        monkeypatch.setattr(gather, "find_row_copy", lambda *args: None)
        monkeypatch.setattr("saev_torch.reading.source.find_row_copy", lambda *args: None)
    elif why == "signal is taken":
        monkeypatch.setattr(watch.Watch, "is_on", False)
    elif why == "too many mappings":
        monkeypatch.setattr(watch.find_watch(), "_unused", [3])
    assert gather._can_gather()
    counts = copies_here(monkeypatch)
    wanted = np.sort(np.concatenate([batch["act"].numpy() for batch in ShuffledActivations(uniform(made))]), axis=0)
    assert counts == ({"here": 0, "kernel": 600} if why else {"here": 600, "kernel": 0})
    indexed = IndexedDataset(IndexedConfig(shards=made, layer=0))
    act = np.stack([sample["act"].numpy() for sample in indexed.__getitems__(list(range(600)))])
    assert np.array_equal(np.sort(act, axis=0), wanted)


@pytest.mark.parametrize("is_read_before", [False, True])
def test_a_file_that_became_shorter_before_it_was_mapped(made, is_read_before):
    """Behind the end of its mapping there is another one, or none: as often as somebody tries."""
    indexed = IndexedDataset(IndexedConfig(shards=made, layer=0))
    assert len(indexed.__getitems__(list(range(600)) if is_read_before else [0, 300])) > 0
    path = made / "acts000001.bin"
    data = path.read_bytes()
    os.truncate(path, 5000)
    for _ in range(3):
        with pytest.raises(ReadError, match=r"acts000001.bin: expected .* the file became shorter while it was in use"):
            indexed.__getitems__(list(range(600)))
    with path.open("r+b") as file:
        file.write(data)
    wanted = np.fromfile(made / "acts000000.bin", dtype=np.float32, count=300 * 256).reshape(300, 256)
    found = indexed.__getitems__(list(range(600)))
    assert np.array_equal(np.stack([sample["act"].numpy() for sample in found[:300]]), wanted)


def test_rows_of_a_broken_mapping_are_read_otherwise(made, monkeypatch):
    """Where a disk failed for a moment the file is as long as it was: nothing else tells."""
    indexed = IndexedDataset(IndexedConfig(shards=made, layer=0))
    wanted = [sample["act"].numpy() for sample in indexed.__getitems__(list(range(600)))]
    copy, n_read = rowcopy.RowCopy.__call__, []

    def break_it(self, sources, target, *args, **kwargs):
        copy(self, sources, target, *args, **kwargs)
        number = indexed._store.mapped(1).pages._number
        watch.find_watch()._watched[number, watch._IS_BROKEN] = 1

    read = gather.ScatteredRows.read
    monkeypatch.setattr(
        gather.ScatteredRows, "read", lambda self, reader: (n_read.append(len(self)), read(self, reader))
    )
    with monkeypatch.context() as patch:
        patch.setattr(rowcopy.RowCopy, "__call__", break_it)
        found = [sample["act"].numpy() for sample in indexed.__getitems__(list(range(600)))]
    assert all(map(np.array_equal, found, wanted))
    assert sum(n_read) > 0


def test_a_mapping_that_broke_is_made_anew(made, monkeypatch):
    """What could not be read once may be there again."""
    monkeypatch.setattr(gather, "is_in_memory", lambda address: True)
    path = made / "acts000001.bin"
    data, stat = path.read_bytes(), path.stat()
    indexed = IndexedDataset(IndexedConfig(shards=made, layer=0))
    wanted = [sample["act"].numpy() for sample in indexed.__getitems__(list(range(600)))]
    pages = weakref.ref(indexed._store.mapped(1).pages)
    with path.open("r+b") as file:
        file.truncate(0)
        with pytest.raises(ReadError, match=r"acts000001.bin: expected .* the file became shorter while it was in use"):
            indexed.__getitems__(list(range(600)))
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found = [sample["act"].numpy() for sample in indexed.__getitems__(list(range(600)))]
    assert all(map(np.array_equal, found, wanted))
    wait_until(lambda: pages() is None)
    assert not indexed._store.mapped(1).pages.is_broken


@pytest.mark.parametrize("order", ["uniform", "blocks"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_lives_on_where_another_fails(make_shards, monkeypatch, order, workers):
    """Two data sets of one process: the file of one becomes shorter while both are read."""
    contracts.copy_here()
    monkeypatch.setattr("saev_torch.reading.engine._SMALL_NBYTES", 0)
    specs = [Spec(**{**WIDE.__dict__, "n_examples": 60 + 6 * i}) for i in range(2)]
    dirs = [make_shards(spec) for spec in specs]
    cfgs = [ShuffledConfig(shards=shards, layer=0, batch_size=100, order=order, buffer_size=8) for shards in dirs]
    wanted = [batch["act"] for batch in ShuffledActivations(cfgs[1])]
    loaders = [iter(DataLoader(ShuffledActivations(cfg), batch_size=None, num_workers=workers)) for cfg in cfgs]
    found = [next(loaders[1])["act"].clone()]
    next(loaders[0])
    os.truncate(dirs[0] / "acts000004.bin", 5000)
    with pytest.raises(ReadError, match=r"acts000004.bin: expected .* the file became shorter while it was in use"):
        list(loaders[0])
    found += [batch["act"] for batch in loaders[1]]
    assert len(found) == len(wanted)
    assert all(map(np.array_equal, found, wanted))


def test_numbers_are_used_again(pages):
    """As often as there are mappings, and none is lost."""
    watched = watch.find_watch()
    before = sorted(watched._unused)
    fd = os.open(pages, os.O_RDONLY)
    for _ in range(3):
        nbytes = N_PAGES * mmap.PAGESIZE
        made = [Pages(mapping._libc.mmap(None, nbytes, 1, 1, fd, 0), (0, i, nbytes)) for i in range(5)]
        assert len(watched._unused) == len(before) - 5
        assert all(page.is_watched and not page.is_broken for page in made)
        del made
    os.close(fd)
    assert sorted(watched._unused) == before
    assert not watched._watched[before, watch._END].any()


@pytest.mark.slow
def test_only_who_gathers_pays_for_machine_code(make_shards):
    shards = make_shards(Spec(n_examples=20, content_tokens=5, layers=(3,), examples_per_shard=9))
    code = f"""
import sys
from saev_torch import OrderedActivations, OrderedConfig, ShuffledActivations, ShuffledConfig, compute_statistics
ordered = OrderedConfig(shards={str(shards)!r}, layer=3)
list(OrderedActivations(ordered)), compute_statistics(ordered)
assert "llvmlite" not in sys.modules
ShuffledActivations(ShuffledConfig(shards={str(shards)!r}, layer=3))
assert "llvmlite" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
