"""Memory that processes share: the same for those that are started, a copy for all others, and gone with the last."""

import copy
import gc
import multiprocessing
import os
import pickle

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
    fd, rows = page.fd, page.fields["rows"]
    write(page, 0.5)
    os.fstat(fd)
    del page
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert rows[2] == 0.5
