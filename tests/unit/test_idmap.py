"""Ranges of IDs: what is given to whom, and that no two get the same."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsfs import idmap


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", errno.EINVAL),
        ("0 0", errno.EINVAL),
        ("0 x 1", errno.EINVAL),
        ("0 0 0", errno.ERANGE),
        ("0 4294967295 1", errno.ERANGE),
        ("0 100 10\n5 200 10", errno.EINVAL),
        ("0 100 10\n10 105 10", errno.EINVAL),
    ],
)
def test_a_map_that_the_kernel_would_refuse_is_refused(text: str, number: int) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        idmap.parse(text)
    assert caught.value.errno == number


def test_a_map_of_several_lines() -> None:
    table = idmap.parse("0 1000 1\n1 100000 65535\n")
    assert table == ((0, 1000, 1), (1, 100000, 65535))
    assert idmap.to_outside(table, 0) == 1000
    assert idmap.to_outside(table, 65536) is None
    assert idmap.to_inside(table, 100000) == 1
    assert idmap.to_inside(table, 1001) is None


def test_nested_maps_are_composed_and_split() -> None:
    parent = ((0, 1000, 10), (10, 5000, 10))
    assert idmap.compose(parent, ((0, 5, 10),)) == ((0, 1005, 5), (5, 5000, 5))
    with pytest.raises(PermissionError):
        idmap.compose(parent, ((0, 15, 10),))


@given(st.integers(0, 2**20 - 1), st.integers(1, 15))
def test_a_slice_is_the_parents_own(ident: int, number: int) -> None:
    parent = ((0, 1 << 20, 1 << 20),)
    child = idmap.compose(parent, ((0, number * idmap.IDS, idmap.IDS),))
    outside = idmap.to_outside(child, ident)
    assert (outside is None) == (ident >= idmap.IDS)
    if outside is not None:
        assert idmap.to_inside(parent, outside) == number * idmap.IDS + ident


def test_ranges_are_taken_until_there_are_no_more() -> None:
    ranges = idmap.Ranges(1 << 20, (5 << 20) - 1)
    ranges.claim(2 << 20)
    taken = [ranges.take() for _ in range(3)]
    assert taken == [1 << 20, 3 << 20, 4 << 20]
    with pytest.raises(OSError, match="taken") as caught:
        ranges.take()
    assert caught.value.errno == errno.ENOSPC
    ranges.give_back(3 << 20)
    assert ranges.take() == 3 << 20


def test_a_range_that_came_back_is_given_out_last() -> None:
    ranges = idmap.Ranges(0, (4 << 20) - 1)
    ranges.give_back(ranges.take())
    assert [ranges.take() for _ in range(4)] == [1 << 20, 2 << 20, 3 << 20, 0]


def test_slices_last_for_fifteen() -> None:
    whole = ((0, 0, idmap.IDS * idmap.SLICES),)
    used: list[int] = []
    while (number := idmap.slice_for(whole, used)) is not None:
        used.append(number)
    assert used == list(range(1, 16))
    assert idmap.slice_for(((0, 0, idmap.IDS),), []) is None
