"""Inode numbers, names and marks, without a mount."""

from dataclasses import dataclass

import pytest

from nsfs.attribute import HIDDEN, NOT_ON_ROOT, Attribute, Directory, Entry
from nsfs.tree import KEYED, Marks, Names, Tables, ino, split


@dataclass
class Face:
    number: int
    root: bool = False

    def has(self, entry: Entry) -> bool:
        return not (self.root and NOT_ON_ROOT in entry.flags)


def show(face: object) -> str:
    return ""


PROCESS = Attribute("PID", show=show)
ROOT = Directory(
    "",
    entries=(
        Attribute("a", show=show, flags=NOT_ON_ROOT),
        Directory("d", entries=(Attribute("a", show=show),)),
        Attribute("hidden", show=show, flags=HIDDEN),
        Directory("procs", member=PROCESS),
    ),
)


def test_an_inode_number_says_all() -> None:
    tables = Tables(ROOT, Names())
    face = Face(7)
    root = tables.of(face, ROOT)
    assert root.ino == ino(7, 1)
    a, inner = tables.child(root, "a"), tables.child(root, "d")
    assert a is not None
    assert inner is not None
    deep = tables.child(inner, "a")
    assert deep is not None
    assert len({root.ino, a.ino, inner.ino, deep.ino}) == 4
    for node in (root, a, inner, deep):
        number = split(node.ino)[1]
        assert tables.node(face, number) == node
    process = tables.of(face, PROCESS, 4242)
    assert split(process.ino) == (7, KEYED + 4242)
    assert tables.node(face, KEYED + 4242) == process


def test_the_root_of_all_is_inode_1() -> None:
    assert Tables(ROOT, Names()).of(Face(0), ROOT).ino == 1


def test_hidden_entries_are_neither_listed_nor_found() -> None:
    tables = Tables(ROOT, Names())
    root = tables.of(Face(3), ROOT)
    assert tables.child(root, "hidden") is None
    assert [n.entry.name for n in tables.children(root)] == ["a", "d", "procs"]
    host = tables.of(Face(0, root=True), ROOT)
    assert [n.entry.name for n in tables.children(host)] == ["d", "procs"]
    with pytest.raises(FileNotFoundError):
        tables.node(Face(0, root=True), Tables(ROOT, Names()).child(root, "a").ino & 0xFFFF)  # type: ignore[union-attr]


def test_numbers_survive_and_new_names_come_after() -> None:
    kept: list[str] = []
    first = Names((), kept.append)
    numbers = {path: first.number(path) for path in ("", "b", "c")}
    again = Names(kept, kept.append)
    assert again.number("new") == max(numbers.values()) + 1
    assert {path: again.number(path) for path in numbers} == numbers
    assert kept == ["b", "c", "new"]


def test_two_entries_of_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two entries"):
        Tables(Directory("", entries=(Attribute("a"), Attribute("a"))), Names())


def test_marks_of_living_processes_add_up() -> None:
    living = {(1, 10), (2, 20)}
    marks = Marks(living.__contains__)
    marks.add((1, 10), 5, "a")
    marks.add((2, 20), 5, "b")
    marks.add((2, 20), 6, "c")
    assert marks.union(5) == {"a", "b"}
    living.discard((2, 20))
    assert marks.union(5) == {"a"}
    assert marks.union(6) == set()
    living.clear()
    assert marks.union(5) == set()


def test_marks_of_a_face_that_is_gone_are_forgotten() -> None:
    marks = Marks(lambda process: True)
    marks.add((1, 1), ino(7, 1), "a")
    marks.add((1, 1), ino(8, 1), "a")
    marks.forget(7)
    assert marks.union(ino(7, 1)) == set()
    assert marks.union(ino(8, 1)) == {"a"}
