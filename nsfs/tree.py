"""Generic virtual files: inode numbers, nodes, open files and removal marks.

This is the kernfs of the project; it knows nothing of containers.  A *face* is anything with a
number that shows the entries of the tables; a *node* is one entry of one face.  Nodes are made when
they are asked for and never kept: an inode number says all there is to say about one,

    bits 33..62   the face's number
    bits  0..32   below 2**24 the entry's place in the table of names, from there on 2**24 + the key
                  of an entry that comes and goes (a process: its PID), from 2**25 on a hash of the
                  path of what a view shows (see `Paths`)

so a thousand containers cost no node, and the next daemon finds each inode that the kernel still
holds.  The name table is persistent, and only grows.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

from nsfs.attribute import HIDDEN, Attribute, Contents, Directory, Entry, Link, TagType

FACE_SHIFT = 33
NUMBER_MASK = (1 << FACE_SHIFT) - 1
KEYED = 1 << 24
SHOWN = 1 << 25
"""Where the numbers of what views show begin."""
SELF = 0
"""The key of what is another for each who looks: the viewer's own entry."""
RECENT = 1024
"""How many numbers of paths are kept at hand."""
ROOT_NUMBER = 1
"""Of a face's own directory.  The root face is 0, so the root's inode is FUSE_ROOT_ID, 1."""


class Face(Protocol):
    """What the tree asks of a face."""

    number: int

    def has(self, entry: Entry) -> bool:
        """Whether this face shows that entry."""


class Node(NamedTuple):
    """One entry as one face shows it."""

    face: Any
    entry: Entry
    key: int
    ino: int
    path: tuple[str, ...] = ()
    """Of what a view shows: the view's name, and the names below."""
    contents: Contents | None = None
    """Where that was found."""


def ino(face_number: int, number: int) -> int:
    """The inode number of a face's file."""
    return face_number << FACE_SHIFT | number


def split(inode: int) -> tuple[int, int]:
    """The inverse of `ino`."""
    return inode >> FACE_SHIFT, inode & NUMBER_MASK


class Names:
    """The numbers of the entries of all tables, by path within a face; a number is for ever.

    `known` is what earlier daemons gave out; `record(path)` makes a new one persistent before it is
    used.
    """

    def __init__(
        self, known: Iterable[str] = (), record: Callable[[str], None] | None = None
    ) -> None:
        self._numbers: dict[str, int] = {"": ROOT_NUMBER}
        self._record = record
        for path in known:
            self._numbers.setdefault(path, ROOT_NUMBER + len(self._numbers))

    def number(self, path: str) -> int:
        """The number of a path, given out now if it is new."""
        found = self._numbers.get(path)
        if found is None:
            if self._record:
                self._record(path)
            found = self._numbers[path] = ROOT_NUMBER + len(self._numbers)
            if found >= KEYED:
                raise OSError(errno.ENOSPC, "the table of names is full")
        return found


class Paths:
    """The numbers of what views show, by face and path.

    Whoever is inside a container chooses names there (of interfaces), as many as they like, so no
    table may only grow.  A number is a keyed hash of the path: the next daemon, and one that has
    forgotten, find what a number means by looking through the view for a path that has it.  Two
    paths of one face with the same hash (one in 2**33) get different numbers as long as the first
    one is remembered.
    """

    TRIES = 3

    def __init__(self, secret: bytes, remembered: int = 65536) -> None:
        self._secret = secret
        self._remembered = remembered
        self._known: OrderedDict[tuple[int, int], tuple[str, ...]] = OrderedDict()
        self._numbers: dict[tuple[int, tuple[str, ...]], int] = {}
        """Of the last ones that were asked for: a hash takes longer."""

    def numbers(self, path: tuple[str, ...]) -> list[int]:
        """The numbers that a path may have, the likeliest first."""
        digest = blake2b(
            os.fsencode("/".join(path)), digest_size=8 * self.TRIES, key=self._secret
        ).digest()
        room = (1 << FACE_SHIFT) - SHOWN
        return [
            SHOWN + int.from_bytes(digest[at : at + 8], "little") % room
            for at in range(0, 8 * self.TRIES, 8)
        ]

    def number(self, face_number: int, path: tuple[str, ...]) -> int:
        """The number of a path, remembered."""
        found = self._numbers.get((face_number, path))
        if found is not None and (face_number, found) in self._known:
            return found
        for number in self.numbers(path):
            key = (face_number, number)
            if self._known.setdefault(key, path) == path:
                self._known.move_to_end(key)
                if len(self._known) > self._remembered:
                    self._known.popitem(last=False)
                if len(self._numbers) >= RECENT:
                    self._numbers.clear()
                self._numbers[face_number, path] = number
                return number
        raise OSError(errno.EOVERFLOW, "no inode number is free for it", path[-1])

    def path(self, face_number: int, number: int) -> tuple[str, ...] | None:
        """What has that number, as far as is remembered."""
        return self._known.get((face_number, number))

    def known(self, face_number: int) -> list[int]:
        """The numbers that are remembered of a face."""
        return [number for face, number in self._known if face == face_number]


class Tables:
    """Every entry of every table, by inode number and by name."""

    def __init__(self, root: Directory, names: Names) -> None:
        self.root = root
        self._by_number: dict[int, Entry] = {}
        self._numbers: dict[int, int] = {}
        self._children: dict[int, dict[str, Entry]] = {}
        self._keyed: list[Directory] = []
        self._views: dict[int, TagType] = {}
        self._add(root, "", names, None)

    def _add(self, entry: Entry, path: str, names: Names, view: TagType | None) -> None:
        number = names.number(path)
        self._by_number[number] = entry
        self._numbers[id(entry)] = number
        if isinstance(entry, TagType):
            if view is not None or "/" in path:
                raise ValueError(f"{path}: a view stands in a container's directory, in no other")
            view = entry
        if view is not None:
            self._views[id(entry)] = view
        if isinstance(entry, Directory):
            children = self._children[id(entry)] = {}
            for child in entry.entries:
                if child.name in children:
                    raise ValueError(f"two entries are called {path}/{child.name}")
                children[child.name] = child
                self._add(child, f"{path}/{child.name}" if path else child.name, names, view)
            if entry.member is not None:
                self._keyed.append(entry)
        if len(self._keyed) > 1:
            raise ValueError(
                "one kind of entry that comes and goes is all that the numbers have room for"
            )

    def entry(self, number: int) -> Entry | None:
        """What has that number on every face that has it; None for what comes and goes."""
        return self._by_number.get(number)

    def node(self, face: Any, number: int) -> Node:
        """The node of a number; FileNotFoundError when no table has it (any more)."""
        if number >= KEYED:
            entry: Entry | None = self._keyed[0].member if self._keyed else None
            key = number - KEYED
        else:
            entry = self._by_number.get(number)
            key = 0
        if entry is None or not face.has(entry):
            raise FileNotFoundError(errno.ENOENT, "no such file in this tree", str(number))
        return Node(face, entry, key, ino(face.number, number))

    def of(self, face: Any, entry: Entry, key: int | None = None) -> Node:
        """The node of an entry."""
        number = self._numbers[id(entry)] if key is None else KEYED + key
        return Node(face, entry, key or 0, ino(face.number, number))

    def child(self, node: Node, name: str) -> Node | None:
        """The static entry of that name, or None."""
        entry = self._children[id(node.entry)].get(name)
        if entry is None or HIDDEN in entry.flags or not node.face.has(entry):
            return None
        return self.of(node.face, entry)

    def view(self, node: Node) -> TagType | None:
        """The tagged directory that a node is, or is in."""
        if node.path:
            found = self._children[id(self.root)].get(node.path[0])
            return found if isinstance(found, TagType) else None
        return self._views.get(id(node.entry))

    def view_called(self, name: str, face: Any) -> TagType:
        """A face's tagged directory of that name; FileNotFoundError when it has none."""
        found = self._children[id(self.root)].get(name)
        if not isinstance(found, TagType) or HIDDEN in found.flags or not face.has(found):
            raise FileNotFoundError(errno.ENOENT, "no such view", name)
        return found

    def views(self) -> Iterator[TagType]:
        """Every tagged directory."""
        return (e for e in self._children[id(self.root)].values() if isinstance(e, TagType))

    def reserved(self, name: str) -> bool:
        """Whether a table has an entry of that name in a face's own directory, shown or not."""
        return name in self._children[id(self.root)]

    def children(self, node: Node) -> Iterator[Node]:
        """The static entries that this face lists, in the order of the tables."""
        for entry in self._children[id(node.entry)].values():
            if HIDDEN not in entry.flags and node.face.has(entry):
                yield self.of(node.face, entry)

    def paths(self) -> Iterator[tuple[str, Entry]]:
        """Every entry with its path within a face, for what documents or tests them."""

        def walk(entry: Directory, prefix: str) -> Iterator[tuple[str, Entry]]:
            for child in entry.entries:
                yield prefix + child.name, child
                if isinstance(child, Directory):
                    yield from walk(child, f"{prefix}{child.name}/")

        yield from walk(self.root, "")


class Marks:
    """What processes have unlinked in directories that they may be about to remove.

    Unlinking a control file only marks it, for the process that did it, until that process ends.  A
    directory is *fully marked* when the marks of all living processes together cover its entries:
    then an rmdir of it means it.  So two `rm -rf` at once help rather than hinder each other, while
    the leftovers of an `rm C/kmsg` count for nothing a moment later.

    `known` is what an earlier daemon has noted, `record(process, directory, name)` makes a new mark
    persistent.  `alive(process)` tells whether a process still is; a process is a PID with its
    start time, since PIDs are used again.
    """

    def __init__(
        self,
        alive: Callable[[tuple[int, int]], bool],
        known: Iterable[tuple[tuple[int, int], int, str]] = (),
        record: Callable[[tuple[int, int], int, str], None] | None = None,
    ) -> None:
        self._alive = alive
        self._record: Callable[[tuple[int, int], int, str], None] | None = None
        self._marks: dict[int, dict[tuple[int, int], set[str]]] = {}
        for process, directory, name in known:
            self.add(process, directory, name)
        self._record = record
        self.sweep()

    def add(self, process: tuple[int, int], directory: int, name: str) -> None:
        """`process` has removed `name` in the directory with that inode number."""
        marked = self._marks.setdefault(directory, {}).setdefault(process, set())
        if name not in marked:
            marked.add(name)
            if self._record:
                self._record(process, directory, name)

    def union(self, directory: int, asking: tuple[int, int] | None = None) -> set[str]:
        """The names that living processes have removed there; the dead ones' marks are dropped.

        Who is asking lives.
        """
        by_process = self._marks.get(directory)
        if not by_process:
            return set()
        for process in [p for p in by_process if p != asking and not self._alive(p)]:
            del by_process[process]
        if not by_process:
            del self._marks[directory]
            return set()
        return set().union(*by_process.values())

    def __bool__(self) -> bool:
        return bool(self._marks)

    def forget(self, face_number: int) -> None:
        """Nothing of that face exists any more."""
        for directory in [d for d in self._marks if d >> FACE_SHIFT == face_number]:
            del self._marks[directory]

    def sweep(self) -> bool:
        """Drop the marks of processes that have ended; whether none is left."""
        for directory in list(self._marks):
            self.union(directory)
        return not self._marks


def kind_of(entry: Entry) -> str:
    """One word for messages and tables: file, link or directory."""
    if isinstance(entry, Attribute):
        return "file"
    return "link" if isinstance(entry, Link) else "directory"


def readable_name(raw: bytes) -> str:
    """A name as the kernel gave it; bytes that are no UTF-8 are kept as surrogates (PEP 383)."""
    return os.fsdecode(raw)
