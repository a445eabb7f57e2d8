"""A short soak; `python tests/soak.py --minutes 30` is the long one."""

import factory
import pytest
import soak

SECONDS = 15


@pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes in total:UserWarning")
def test_breaks_resumes_and_worker_counts_leave_order_and_resources_alone(tmp_path):
    figures = soak.soak(factory.make_shards(tmp_path, soak.SPEC), SECONDS, seed=1)
    assert figures.iterations > 3
    assert figures.breaks
    assert figures.resumes
    assert figures.whole_epochs
    soak.check_steady(figures)
