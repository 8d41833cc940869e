"""What open files keep altogether."""

from __future__ import annotations

from nsfs.openfile import KEPT_MAX, KEPT_SMALL, Kept, Listing
from nsfs.tree import Node


def listing() -> Listing:
    made = Listing(Node(None, None, 0, 1), None)  # type: ignore[arg-type]
    made.rows = [(1, "x", made.node)]
    return made


def test_the_oldest_gives_way() -> None:
    kept, half = Kept(), KEPT_MAX // 2
    first, second, third = listing(), listing(), listing()
    kept.keep(first, half)
    kept.keep(second, half)
    assert first.rows
    # Looked at again: it is the youngest.
    kept.keep(first, half)
    kept.keep(third, half)
    assert (bool(first.rows), bool(second.rows), bool(third.rows)) == (True, False, True)
    kept.drop(first)
    kept.keep(second, half)
    assert third.rows


def test_what_is_short_is_not_counted() -> None:
    kept, small = Kept(), [listing() for _ in range(10)]
    for each in small:
        kept.keep(each, KEPT_SMALL)
    kept.keep(listing(), KEPT_MAX)
    assert all(each.rows for each in small)


def test_what_is_too_long_alone() -> None:
    kept, one = Kept(), listing()
    kept.keep(one, KEPT_MAX + 1)
    assert not one.rows
