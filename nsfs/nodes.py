"""Finding nodes: by inode number, by name, and what a directory lists."""

from __future__ import annotations

import contextlib
import errno
import time
from collections import OrderedDict
from collections.abc import Iterator

import trio

from nsfs.attribute import (
    FOUND,
    HIDDEN,
    Answer,
    Attribute,
    Caller,
    Contents,
    Directory,
    Entry,
    TagType,
    awaited,
    then,
)
from nsfs.container import Container, Face, Phase
from nsfs.found import Found
from nsfs.processes import Process, Processes, process_lives
from nsfs.removal import EMPTY, Removal
from nsfs.tree import NUMBER_MASK, SHOWN, Names, Node, Paths, Tables, ino
from nsfs.world import World

DIRECTORY_COOKIE = 1 << 32
"""Where the directory offsets of the tables' directories begin: after those of all files."""
CHILD_COOKIE = 1 << 40
"""Where the directory offsets of children begin, past those of the static entries."""
LAST_COOKIE = 1 << 62
"""The directory offset of the entry that is listed last."""
SEARCHED_MAX = 100_000
"""How many names of a view are looked through for one that an earlier daemon gave a number."""
BELIEVED_S = 1.0
"""For how long: as long as the kernel believes names (`fs.TIMEOUT_S`)."""
LOOKED_UP_MAX = 1024
"""How much of what views showed is kept at hand."""
LOOK_AGAIN_S = 0.2
"""How old what is listed of found containers may be, in seconds."""
CHECKED_MAX = 64
"""Up to how many of them it is made sure of each that it is still there."""
GONE = ".gone"
"""Where names are that somebody removes who has listed them, and that are gone by then."""
REMEMBERED_MAX = 32
"""Of how many processes it is remembered what they have listed, before it is looked which of them
still are."""
DEPTH_MAX = 64
"""In how many directories, the last ones, each has."""
LISTED_AT_ONCE = 64
"""How many names of a view are listed before others have their turn."""

Row = tuple[int, str, Node]
"""Offset, name and node of what a directory lists."""


class Nodes:
    """The nodes of all faces; they are made when they are asked for, and none is kept."""

    def __init__(self, world: World, entries: tuple[Entry, ...]) -> None:
        self.world = world
        self.faces = Directory(".f", flags=HIDDEN, mode=0o700)
        root = Directory("", entries=(*entries, self.faces), flags=FOUND)
        names = Names(world.store.names(), world.store.add_name)
        self.tables = Tables(root, names)
        self.paths = Paths(world.store.secret())
        self.bound_files = {e.bound: e for e in entries if isinstance(e, Attribute) and e.bound}
        self.removal = Removal(world, self.tables)
        self.processes = Processes()
        self._looked_up: dict[int, tuple[float, Node]] = {}
        # What a process has seen listed in procs/ it may remove, although the processes have ended
        # meanwhile.
        self.listed: dict[Process, set[int]] = {}
        # The same of containers, by the inode number of the directory and the name, while it
        # removes what they were in: as a directory that is empty.
        self.listed_names: dict[Process, OrderedDict[int, frozenset[str]]] = {}
        self.gone = Directory(GONE, mode=0o755)

    async def node(self, inode: int) -> Node:
        """The node of an inode number."""
        return await awaited(self.numbered(inode))

    def numbered(self, inode: int) -> Answer[Node]:
        """The same, without waiting where there is nothing to wait for."""
        return then(self.face(inode >> 33), lambda face: self._numbered(face, inode & NUMBER_MASK))

    def _numbered(self, face: Face, number: int) -> Answer[Node]:
        if number < SHOWN:
            return self.tables.node(face, number)
        known = self.paths.path(face.number, number) or self._search(face, number)
        return then(known, lambda path: self._shown(face, path, number))

    def face(self, number: int) -> Answer[Face]:
        """The face of a number; FileNotFoundError when what it shows is gone."""
        face = self.world.face_numbered(number)
        if isinstance(face.container, Found):
            return then(face.container.confirmed(), lambda _: face)
        return face

    def to_open(self, inode: int) -> Answer[Node]:
        """The same for open(2), which has just walked the path: what a view showed at a lookup is
        believed for as long as the kernel does, if the namespace lives.  Should it be gone, whoever
        reads or writes will see."""
        known = self._looked_up.get(inode)
        if known is not None and time.monotonic() - known[0] < BELIEVED_S:
            node = known[1]
            if node.face.container.is_found:
                return self.numbered(inode)
            view = self.tables.view_called(node.path[0], node.face)
            if self.world.views.opened(node.face, view) is node.contents:
                return node
        return self.numbered(inode)

    def looked_up(self, node: Node) -> None:
        """The kernel is told of what a view shows, and will believe that it is there."""
        if len(self._looked_up) >= LOOKED_UP_MAX:
            self._looked_up.clear()
        self._looked_up[node.ino] = time.monotonic(), node

    def child(self, directory: int, name: str, caller: Caller) -> Answer[Node]:
        """A name in the directory with an inode number; FileNotFoundError when it has none of that
        name."""
        return then(
            self.face(directory >> 33),
            lambda face: self._child(face, directory & NUMBER_MASK, name, caller),
        )

    def _child(self, face: Face, number: int, name: str, caller: Caller) -> Answer[Node]:
        if number < SHOWN:
            return self._find(self.tables.node(face, number), name, caller)
        # What is in it is not there either when it is not.
        known = self.paths.path(face.number, number) or self._search(face, number)
        return then(known, lambda path: self._shown(face, (*path, name)))

    def _shown(self, face: Face, path: tuple[str, ...], number: int = 0) -> Answer[Node]:
        """What a view shows at a path, which has that number if one is given; FileNotFoundError
        when that is nothing."""
        if path[0] == GONE and len(path) == 2:
            number = number or self.paths.number(face.number, path)
            return Node(face, self.gone, 0, ino(face.number, number), path)
        view = self.tables.view_called(path[0], face)
        contents = self.world.views.of(face, view)
        return then(contents, lambda opened: self._shown_in(opened, face, path, number))

    def _shown_in(
        self, contents: Contents, face: Face, path: tuple[str, ...], number: int
    ) -> Answer[Node]:
        def node(entry: Entry) -> Node:
            known = number or self.paths.number(face.number, path)
            return Node(face, entry, 0, ino(face.number, known), path, contents)

        return then(contents.entry(path[1:]), node)

    async def _search(self, face: Face, number: int) -> tuple[str, ...]:
        """The path that an earlier daemon gave a number, or that was forgotten."""
        left = SEARCHED_MAX
        for view in self.tables.views():
            if not face.has(view) or view.contents is None:
                continue
            try:
                contents = await awaited(self.world.views.of(face, view))
            except OSError:
                continue
            directories: list[tuple[str, ...]] = [()]
            for directory in directories:
                with contextlib.suppress(OSError):
                    for name in await awaited(contents.names(directory)):
                        path = (view.name, *directory, name)
                        if number in self.paths.numbers(path):
                            return path
                        if isinstance(await awaited(contents.entry(path[1:])), Directory):
                            directories.append(path[1:])
                        left -= 1
                        if left <= 0:
                            break
                await trio.lowlevel.checkpoint()
        raise FileNotFoundError(errno.ENOENT, "nothing has that number any more", str(number))

    def directory(self, container: Container, viewpoint: Container) -> Node:
        """A container's directory as a viewpoint sees it."""
        return self.tables.of(self.world.face(viewpoint, container), self.tables.root)

    async def find(self, parent: Node, name: str, caller: Caller) -> Node:
        """A name in a directory; FileNotFoundError when it has none of that name."""
        return await awaited(self._find(parent, name, caller))

    def _find(self, parent: Node, name: str, caller: Caller) -> Answer[Node]:
        entry = parent.entry
        if not isinstance(entry, Directory):
            raise NotADirectoryError(errno.ENOTDIR, "no directory", name)
        if parent.path:
            return self._shown(parent.face, (*parent.path, name))
        found = self.tables.child(parent, name)
        if isinstance(entry, TagType):
            if found is None:
                return self._shown(parent.face, (entry.name, name))
            # Which says whether the namespace lives.
            self.world.views.opened(parent.face, entry)
        if found is not None:
            return found
        if entry is self.tables.root:
            child = parent.face.container.children.get(name)
            if child is not None and child.phase not in (Phase.MAKING, Phase.GONE):
                return self.directory(child, parent.face.viewpoint)
            found_one = parent.face.container.found.get(name)
            if isinstance(found_one, Found):
                if found_one.check():
                    return self.directory(found_one, parent.face.viewpoint)
                return self._find_found(found_one, parent, caller)
            if name == ".f" and parent.face.number == 0:
                return self.tables.of(parent.face, self.faces)
            if self._has_listed(parent, name, caller):
                return self._shown(parent.face, (GONE, name))
        elif entry is self.faces:
            return self._bound(name)
        elif entry.find is not None:
            key = self._find_keyed(entry, parent, name, caller)
            return self.tables.of(parent.face, entry.member or entry, key)
        raise FileNotFoundError(errno.ENOENT, "no such file or directory", name)

    async def _find_found(self, found: Found, parent: Node, caller: Caller) -> Node:
        name = found.name
        try:
            await awaited(found.confirmed())
        except FileNotFoundError:
            if self._has_listed(parent, name, caller):
                return await awaited(self._shown(parent.face, (GONE, name)))
            raise
        return self.directory(found, parent.face.viewpoint)

    def _find_keyed(self, entry: Directory, parent: Node, name: str, caller: Caller) -> int:
        assert entry.find is not None
        try:
            return entry.find(parent.face, name, caller)
        except FileNotFoundError:
            # rm and find remove what they have listed, and take it ill when it is gone by then.
            pid = name.partition(":")[0]
            if pid.isdigit() and self.listed:
                inode = self.tables.of(parent.face, entry.member or entry, int(pid)).ino
                if inode in self.listed.get(self.processes.of(caller.tid), ()):
                    return int(pid)
            raise

    def _has_listed(self, parent: Node, name: str, caller: Caller) -> bool:
        """Whether a process has listed that name in a container that it removes."""
        if not self.world.marks:
            return False
        process = self.processes.of(caller.tid)
        known = self.listed_names.get(process)
        return (
            known is not None
            and name in known.get(parent.ino, ())
            and self.removal.under_way(parent.face.container, parent.face.viewpoint, process)
        )

    def _bound(self, name: str) -> Node:
        """What nsfs binds into containers: `.f/FACE`, or one of its files `.f/FACE.SUFFIX`."""
        number, _, suffix = name.partition(".")
        if not number.isdigit():
            raise FileNotFoundError(errno.ENOENT, "no such face", name)
        face = self.world.face_numbered(int(number))
        if not suffix:
            return self.tables.of(face, self.tables.root)
        entry = self.bound_files.get(suffix)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "no such face", name)
        return self.tables.of(face, entry)

    async def rows(self, node: Node, asking: Process | None = None) -> list[Row]:
        """What a directory lists to a process: (offset, name, node), in the order of offsets.

        Offsets depend on the entry alone, so a listing goes on rightly whatever comes and goes
        meanwhile, and whoever the daemon is.
        """
        if node.entry is self.gone or self.removal.shown_empty(node.face, asking):
            return []
        if node.path or isinstance(node.entry, TagType):
            return await self._view_rows(node, asking)
        if node.entry is self.tables.root or node.face.container.is_found:
            await self._look_for_found(node.face.container)
        if node.entry is not self.tables.root and self.removal.files_removed(node.face, asking):
            return []
        return sorted(self._rows(node), key=lambda row: row[0])

    async def _look_for_found(self, container: Container) -> None:
        """Have what was made elsewhere known, and what is dead forgotten."""
        await self.world.look(LOOK_AGAIN_S)
        known = [each for each in container.found.values() if isinstance(each, Found)]
        if len(known) <= CHECKED_MAX and not all(each.check() for each in known):
            await self.world.look(0.0)

    def remember(self, process: Process, node: Node, rows: list[Row]) -> None:
        """That a process has seen that listed."""
        entry = node.entry
        keyed = isinstance(entry, Directory) and entry.member is not None
        nested = entry is self.tables.root and node.face.container.parent is not None
        if not (keyed or nested):
            return
        if len(self.listed) + len(self.listed_names) >= REMEMBERED_MAX:
            for each in {*self.listed, *self.listed_names}:
                if not process_lives(each):
                    self.listed.pop(each, None)
                    self.listed_names.pop(each, None)
        if keyed:
            self.listed.setdefault(process, set()).update(row[2].ino for row in rows)
        elif not rows:
            self.world.marks.add(process, node.ino, EMPTY)
        elif names := frozenset(name for at, name, _ in rows if CHILD_COOKIE <= at < LAST_COOKIE):
            known = self.listed_names.setdefault(process, OrderedDict())
            known[node.ino] = names
            known.move_to_end(node.ino)
            if len(known) > DEPTH_MAX:
                known.popitem(last=False)

    def _rows(self, node: Node) -> Iterator[Row]:
        # Files come first, so that who removes a container comes to its views, and to what comes
        # and goes by itself, last.
        entry = node.entry
        for index, child in enumerate(self.tables.children(node), 1):
            first = 0
            if isinstance(child.entry, Directory):
                first = DIRECTORY_COOKIE if child.entry.member is None else LAST_COOKIE
            yield first + index, child.entry.name, child
        if entry is self.tables.root:
            viewpoint = node.face.viewpoint
            for each in sorted(node.face.container.children.values(), key=lambda c: c.number):
                if each.phase not in (Phase.MAKING, Phase.GONE):
                    yield CHILD_COOKIE + each.number, each.name, self.directory(each, viewpoint)
            for each in node.face.container.found.values():
                yield CHILD_COOKIE + each.number, each.name, self.directory(each, viewpoint)
        elif isinstance(entry, Directory) and entry.names is not None and entry.member is not None:
            for name, key in sorted(entry.names(node.face), key=lambda pair: pair[1]):
                yield CHILD_COOKIE + key, name, self.tables.of(node.face, entry.member, key)

    async def _view_rows(self, node: Node, asking: Process | None) -> list[Row]:
        face = node.face
        if self.removal.files_removed(face, asking):
            return []
        view = self.tables.view(node)
        assert view is not None
        try:
            contents = await awaited(self.world.views.of(face, view))
        except FileNotFoundError:
            # The namespace is dead: so is all that it showed.
            return []
        rows = []
        if not node.path:
            children = enumerate(self.tables.children(node), 1)
            rows = [(index, child.entry.name, child) for index, child in children]
        path = node.path or (view.name,)
        for count, name in enumerate(await awaited(contents.names(path[1:]))):
            if count % LISTED_AT_ONCE == LISTED_AT_ONCE - 1:
                await trio.lowlevel.checkpoint()
            # It may have gone meanwhile.
            with contextlib.suppress(FileNotFoundError):
                entry = await awaited(contents.entry((*path[1:], name)))
                number = self.paths.number(face.number, (*path, name))
                inode = ino(face.number, number)
                child = Node(face, entry, 0, inode, (*path, name), contents)
                rows.append((CHILD_COOKIE + number, name, child))
        return sorted(rows, key=lambda row: row[0])

    async def is_there(self, parent: Node, name: str, caller: Caller) -> bool:
        """Whether a directory has that name."""
        try:
            await self.find(parent, name, caller)
        except FileNotFoundError:
            return False
        return True

    async def shows_nothing(self, node: Node, asking: Process) -> bool:
        """Whether it is a directory in a view that has nothing in it."""
        return bool(node.path) and not await self._view_rows(node, asking)
