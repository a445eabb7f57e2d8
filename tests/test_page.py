"""Memory that processes share: the same for those that are started, a copy for all others, and gone with the last."""

import copy
import functools
import gc
import multiprocessing
import os
import pickle
from typing import Any

import numpy as np
import pytest

from saev_torch.processes.page import SharedPage

DTYPE = np.dtype([("count", np.int64), ("rows", np.float64, (3,))])


def write(page: SharedPage, value: float) -> None:
    page.fields["count"] += 1
    page.fields["rows"][2] = value


def test_it_begins_at_0_and_keeps_what_is_written() -> None:
    page = SharedPage(DTYPE)
    assert (page.fields["count"], page.fields["rows"].tolist()) == (0, [0, 0, 0])
    rows = page.fields["rows"]
    write(page, 0.5)
    assert (page.fields["count"], rows.tolist()) == (1, [0, 0, 0.5])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_process_that_is_started_shares_it(method: str) -> None:
    page = SharedPage(DTYPE)
    write(page, 0.25)
    child = multiprocessing.get_context(method).Process(target=write, args=(page, 0.5))
    child.start()
    child.join()
    assert child.exitcode == 0
    child.close()
    assert (page.fields["count"], page.fields["rows"][2]) == (2, 0.5)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda page: pickle.loads(pickle.dumps(page))])
def test_a_copy_has_the_value_and_memory_of_its_own(copied) -> None:
    page = SharedPage(DTYPE)
    write(page, 0.5)
    other = copied(page)
    assert (other.fields["count"], other.fields["rows"][2]) == (1, 0.5)
    write(other, 0.75)
    assert (page.fields["count"], page.fields["rows"][2]) == (1, 0.5)
    write(page, 1.0)
    assert (other.fields["count"], other.fields["rows"][2]) == (2, 0.75)


def test_the_memory_outlives_the_page_for_those_who_look_at_it() -> None:
    page = SharedPage(DTYPE)
    rows = page.fields["rows"]
    write(page, 0.5)
    del page
    gc.collect()
    others = [SharedPage(DTYPE) for _ in range(100)]
    for other in others:
        write(other, 0.75)
    assert rows[2] == 0.5


def n_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_many_pages_take_few_descriptors() -> None:
    gc.collect()
    before, pages = n_descriptors(), [SharedPage(np.dtype([("word", np.int64, 3000)])) for _ in range(600)]
    assert n_descriptors() - before <= 2 * 16
    for i, page in enumerate(pages):
        page.fields["word"][:] = i
    assert [set(page.fields["word"].tolist()) for page in pages] == [{i} for i in range(600)]
    del page, pages
    gc.collect()
    assert n_descriptors() == before


def test_a_page_that_is_large() -> None:
    page = SharedPage(np.dtype([("word", np.int64, 1 << 18)]))
    page.fields["word"][-1] = 7
    assert page.fields["word"].sum() == 7


def write_many(pages: list[SharedPage]) -> None:
    for i, page in enumerate(pages):
        page.while_locked(functools.partial(write, page, float(i)))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_many_pages_go_to_a_process_that_is_started(method: str) -> None:
    pages = [SharedPage(DTYPE) for _ in range(20)]
    child = multiprocessing.get_context(method).Process(target=write_many, args=(pages,))
    child.start()
    child.join()
    assert child.exitcode == 0
    child.close()
    assert [page.fields["rows"][2] for page in pages] == list(range(20))


def hold(pages: list[SharedPage], said: Any, go_on: Any) -> None:
    def work() -> None:
        said.set()
        go_on.wait()
        pages[0].fields["count"] = 1

    pages[0].while_locked(work)


def test_a_lock_is_for_one_page() -> None:
    context = multiprocessing.get_context("fork")
    pages, said, go_on = [SharedPage(DTYPE), SharedPage(DTYPE)], context.Event(), context.Event()
    child = context.Process(target=hold, args=(pages, said, go_on))
    child.start()
    said.wait()
    assert pages[1].while_locked(lambda: int(pages[0].fields["count"])) == 0
    go_on.set()
    assert pages[0].while_locked(lambda: int(pages[0].fields["count"])) == 1
    child.join()
    child.close()


def test_a_forked_child_makes_pages_of_its_own() -> None:
    before = SharedPage(DTYPE)
    pid = os.fork()
    if not pid:
        write(SharedPage(DTYPE), 3.0)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    after = SharedPage(DTYPE)
    assert (before.fields["count"], after.fields["count"]) == (0, 0)
