"""The run directory: what one daemon writes the next one reads."""

from pathlib import Path

from nsfs.store import RESERVED_AT_ONCE, Positions, Store


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


def test_positions_survive(tmp_path: Path) -> None:
    path = str(tmp_path / "opens")
    positions = Positions(path)
    positions.put(77, 1, 2, 3)
    positions.put(78, 4, 5, 6)
    positions.put(77, 7, 8, 9)
    positions.drop(78)
    again = Positions(path)
    assert again.get(77) == (7, 8, 9)
    assert again.get(78) is None
    again.put(79, 1, 1, 1)
    assert Positions(path).get(79) == (1, 1, 1)
