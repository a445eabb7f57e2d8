import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saev_torch.order.permute import Bijection, make_key, shuffled


def chi_square(counts: np.ndarray, n_cells: int) -> float:
    """How far counts are from uniform, in standard deviations (Wilson and Hilferty's cube root of the statistic)."""
    expected = counts.sum() / n_cells
    assert expected > 5
    statistic = ((counts - expected) ** 2).sum() / expected + (n_cells - len(counts)) * expected
    variance = 2 / (9 * (n_cells - 1))
    return ((statistic / (n_cells - 1)) ** (1 / 3) - 1 + variance) / math.sqrt(variance)


# The order of batches rests on these: a change would silently turn every resumed run into another one.


def test_golden_keys():
    assert make_key() == 0x6E789E6AA1B965F4
    assert make_key(0) == 0x7F46A57C92DBEE5F
    assert make_key(17, 0, 1) == 0xBE2A96D2002E58AA
    assert make_key(-5, 2**64 - 1) == 0x01227C841D105279


def test_golden_shuffles():
    assert shuffled(8, make_key(17)).tolist() == [2, 5, 4, 7, 6, 3, 0, 1]
    assert shuffled(16384, make_key(17))[:6].tolist() == [16168, 4371, 11598, 12574, 11914, 7991]


def test_golden_bijections():
    assert Bijection(10, make_key(17))(np.arange(10)).tolist() == [2, 6, 3, 5, 7, 4, 0, 1, 8, 9]
    images = Bijection(10**12, make_key(17))(np.arange(5)).tolist()
    assert images == [714654276558, 718514783837, 421474301508, 775435740948, 198957332732]


integers = st.integers(-(2**130), 2**130)


@given(st.lists(integers, max_size=4), st.lists(integers, max_size=4))
def test_keys_differ(a, b):
    assert 0 <= make_key(*a) < 2**64
    assert (make_key(*a) == make_key(*b)) == (a == b)


@pytest.mark.parametrize("part", [0, 1, 17, 2**63, 2**64 - 1, 2**64, 2**128, -1, -(2**64), -(2**128)])
def test_keys_of_near_and_wrapped_integers_differ(part):
    near = {part, -part, part + 2**64, part - 2**64, part ^ 2**64, part + 2**128, part + 1, part - 1}
    assert len({make_key(x) for x in near}) == len(near)


def test_keys_depend_on_order_and_number():
    drawn = [make_key(*parts) for n in range(5) for parts in itertools.product((0, 1, 2), repeat=n)]
    assert len(set(drawn)) == len(drawn)


def test_keys_are_spread():
    """Neighbouring integers have keys that differ in about half of their bits."""
    flipped = [(make_key(i, 5) ^ make_key(i + 1, 5)).bit_count() for i in range(1000)]
    assert min(flipped) > 10
    assert 31 < np.mean(flipped) < 33


@pytest.mark.parametrize("n", [*range(70), 255, 256, 257, 1000, 65536, 65537])
def test_shuffled_is_a_permutation(n):
    drawn = shuffled(n, make_key(n))
    assert drawn.dtype == np.int64
    assert np.array_equal(np.sort(drawn), np.arange(n))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_shuffled_is_uniform(n):
    drawn = [tuple(shuffled(n, make_key(17, i)).tolist()) for i in range(math.factorial(n) * 100)]
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert abs(chi_square(counts, math.factorial(n))) < 4


def test_shuffled_places_are_uniform():
    n = 50
    drawn = np.stack([shuffled(n, make_key(i)) for i in range(4000)])
    for place in (0, 1, 24, 49):
        assert abs(chi_square(np.bincount(drawn[:, place], minlength=n), n)) < 4
    # Where one goes says nothing about where its neighbour goes.
    steps = np.argsort(drawn, axis=1)
    apart = (steps[:, 1] - steps[:, 0]) % n
    assert abs(chi_square(np.bincount(apart, minlength=n)[1:], n - 1)) < 4


@pytest.mark.parametrize("key", [0, make_key(17), 2**64 - 1])
@pytest.mark.parametrize("n", [0, *range(1, 40), 99, 100, 101, 255, 256, 257, 1000, 10_007])
def test_bijection_is_one(n, key):
    permute, x = Bijection(n, key), np.arange(n)
    images = permute(x)
    assert images.dtype == np.int64
    assert np.array_equal(np.sort(images), x)
    assert np.array_equal(permute.inverse(images), x)
    assert np.array_equal(permute(permute.inverse(x)), x)


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_bijection_of_large_ranges(n, key, data):
    x = np.array(data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=20)), dtype=np.int64)
    permute = Bijection(n, key)
    images = permute(x)
    assert ((images >= 0) & (images < n)).all()
    assert len(np.unique(images)) == len(x)
    assert np.array_equal(permute.inverse(images), x)


def test_bijection_maps_one_index_as_it_maps_many():
    permute = Bijection(1000, make_key(3))
    images = permute(np.arange(1000))
    assert [int(permute(np.array([i]))[0]) for i in (999, 0, 500)] == images[[999, 0, 500]].tolist()


def test_bijection_leaves_its_argument():
    x = np.arange(100)
    Bijection(100, 5)(x)
    assert np.array_equal(x, np.arange(100))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9, 10, 30])
def test_bijection_is_uniform(n):
    """Each index, and each pair of neighbours, goes to all places equally often; parity is not looked at."""
    drawn = np.stack([Bijection(n, make_key(17, i))(np.arange(n)) for i in range(n * 200)])
    for i in (0, n // 2, n - 1):
        assert abs(chi_square(np.bincount(drawn[:, i], minlength=n), n)) < 4
    apart = (drawn[:, 1] - drawn[:, 0]) % n
    if n > 2:
        assert abs(chi_square(np.bincount(apart, minlength=n)[1:], n - 1)) < 4


@pytest.mark.parametrize("n", [1000, 10_100, 10**6 + 3])
def test_bijection_is_unordered(n):
    """Neither neighbours nor whole stretches stay together, nor does the grid of the construction show."""
    images = Bijection(n, make_key(5))(np.arange(n))
    n_cells = 20
    early = images[: n // 5]
    assert chi_square(np.bincount(early * n_cells // n, minlength=n_cells), n_cells) < 4
    apart = np.diff(images) % n
    assert abs(chi_square(np.bincount(apart * n_cells // n, minlength=n_cells), n_cells)) < 4
    assert (images == np.arange(n)).sum() <= 8
    assert (np.diff(images) == 1).sum() <= 8


def test_bijections_of_neighbouring_keys_are_unrelated():
    one, other = (Bijection(10_000, make_key(17, epoch))(np.arange(10_000)) for epoch in (0, 1))
    assert (one == other).sum() <= 8
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
