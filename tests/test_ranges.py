from hypothesis import given
from hypothesis import strategies as st

from saev_torch.writing.journal import Ranges


def test_neighbours_become_one():
    ranges = Ranges()
    for start in (4, 0, 2, 6, 8):
        ranges.add(start, start + 2)
    assert (ranges._starts, ranges._stops) == ([0], [10])


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=20))
def test_against_a_set(given_ranges):
    ranges, seen = Ranges(), set()
    for start, n in given_ranges:
        new = set(range(start, start + n))
        overlap = ranges.overlap(start, start + n)
        assert (overlap is None) == new.isdisjoint(seen)
        if overlap is not None:
            assert set(range(*overlap)) <= new & seen
            assert overlap[0] == min(new & seen)
        if n > 0:
            ranges.add(start, start + n)
            seen |= new
        assert {i for gap in ranges.gaps(40) for i in range(*gap)} == set(range(40)) - seen
        # Sorted, disjoint, and never two that touch.
        edges = [edge for pair in zip(ranges._starts, ranges._stops, strict=True) for edge in pair]
        assert edges == sorted(set(edges))
