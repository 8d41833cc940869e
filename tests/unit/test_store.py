"""The run directory: what one daemon writes the next one reads."""

import contextlib
from pathlib import Path

import pytest

from nsfs.store import RESERVED_AT_ONCE, Slots, Store


def test_a_number_is_never_given_out_twice(tmp_path: Path) -> None:
    seen: set[int] = set()
    for _ in range(4):
        store = Store(str(tmp_path))
        fresh = {store.number() for _ in range(RESERVED_AT_ONCE // 2 + 1)}
        assert len(fresh) == RESERVED_AT_ONCE // 2 + 1
        assert not fresh & seen
        seen |= fresh


def test_records_come_back_oldest_first_until_dropped(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for ident in (10, 9, 11):
        store.save(ident, {"name": f"c{ident}"})
    store.save(9, {"name": "new"})
    Path(store.log_path(9, "log")).touch()
    assert list(Store(str(tmp_path)).load()) == [
        (9, {"name": "new"}),
        (10, {"name": "c10"}),
        (11, {"name": "c11"}),
    ]
    store.drop(9)
    store.drop(9)
    assert [ident for ident, _ in store.load()] == [10, 11]
    assert not Path(store.log_path(9, "log")).exists()


def test_slots_survive(tmp_path: Path) -> None:
    path = str(tmp_path / "opens")
    slots = Slots(path)
    slots.put(77, 1, 2, 3, 4)
    slots.put(78, 4, 5, 6)
    slots.put(77, 7, 8, 9, 2**64 - 1)
    slots.drop(78)
    again = Slots(path)
    assert again.get(77) == (7, 8, 9, 2**64 - 1)
    assert again.get(78) is None
    assert again.put(79, 1)
    assert Slots(path).get(79) == (1, 0, 0, 0)


class Torn(Exception):
    """The daemon was killed here."""


class TornWords:
    """Words of which only so many are stored."""

    def __init__(self, words: memoryview, stores: int) -> None:
        self.words = words
        self.left = stores

    def __getitem__(self, at: int) -> int:
        return int(self.words[at])

    def __setitem__(self, at: int, value: int) -> None:
        if not self.left:
            raise Torn
        self.left -= 1
        self.words[at] = value


@pytest.mark.parametrize("stores", range(7))
def test_a_slot_is_never_half_written(tmp_path: Path, stores: int) -> None:
    path = str(tmp_path / "opens")
    slots = Slots(path)
    slots.put(5, 1, 1, 1, 1)
    slots._words = TornWords(slots._words, stores)  # type: ignore[assignment]
    with contextlib.suppress(Torn):
        slots.put(5, 2, 2, 2, 2)
        slots.put(6, 3, 3, 3, 3)
    again = Slots(path)
    assert again.get(5) in ((1, 1, 1, 1), (2, 2, 2, 2))
    assert again.get(6) in (None, (3, 3, 3, 3))


def test_marks_survive_until_cleared(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.add_mark((5, 100), 7 << 33 | 1, "a name\n")
    store.add_mark((6, 200), 7 << 33 | 1, "b")
    assert Store(str(tmp_path)).marks() == [
        ((5, 100), 7 << 33 | 1, "a name\n"),
        ((6, 200), 7 << 33 | 1, "b"),
    ]
    store.clear_marks()
    assert store.marks() == []
