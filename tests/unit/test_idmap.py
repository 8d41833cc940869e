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
    ranges = idmap.Ranges(1 << 20, (4 << 20) - 1)
    used: list[int] = []
    for _ in range(3):
        used.append(ranges.take(used))
    assert len(set(used)) == 3
    with pytest.raises(OSError, match="taken") as caught:
        ranges.take(used)
    assert caught.value.errno == errno.ENOSPC
    assert ranges.take(used[:1] + used[2:]) == used[1]


def test_slices_last_for_fifteen() -> None:
    whole = ((0, 0, idmap.IDS * idmap.SLICES),)
    used: list[int] = []
    while (number := idmap.slice_for(whole, used)) is not None:
        used.append(number)
    assert used == list(range(1, 16))
    assert idmap.slice_for(((0, 0, idmap.IDS),), []) is None
