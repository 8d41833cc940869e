"""Removing: what the marks of `rm -rf` say about containers and their directories.

Unlinking only marks (see `tree.Marks`), so what is being removed is known from what was marked.
"""

from __future__ import annotations

import errno

import trio

from nsfs.attribute import Directory, TagType
from nsfs.container import Container, Face
from nsfs.processes import Process
from nsfs.tree import Node, Tables
from nsfs.world import World

GIVING_WAY_S = 1.0
"""How long a container that is being removed may take to be."""
GIVING_WAY_MARKS = 3
"""How many files removed look like that."""


class Removal:
    """What is being removed."""

    def __init__(self, world: World, tables: Tables) -> None:
        self.world = world
        self.tables = tables
        self.giving_way: set[Container] = set()

    def files_removed(self, face: Face, asking: Process | None) -> bool:
        """Whether living processes have removed every file of a container's directory.

        Files are listed first: so the container itself is being removed, and nothing is served by
        removing all that its other directories show one by one; they are shown as empty.
        """
        top = self.tables.of(face, self.tables.root)
        marked = self.world.marks.union(top.ino, asking)
        return bool(marked) and all(
            child.entry.name in marked
            for child in self.tables.children(top)
            if not isinstance(child.entry, Directory)
        )

    def all_but_removed(self, node: Node, asking: Process | None) -> bool:
        """Whether everything beside this directory has been removed by living processes.

        Then this one, which is listed last, is about to be: what comes and goes in it is shown as
        gone, for nothing is served by removing a thousand processes' names before the processes.
        """
        above = self.tables.of(node.face, self.tables.root)
        marked = self.world.marks.union(above.ino, asking)
        return bool(marked) and all(
            each.entry is node.entry or each.entry.name in marked
            for each in self.tables.children(above)
        )

    def fully_marked(self, node: Node, asking: Process) -> bool:
        """Whether living processes have removed all static entries of a directory; in a view, that
        they have begun to."""
        marked = self.world.marks.union(node.ino, asking)
        in_view = node.path or isinstance(node.entry, TagType)
        if marked and (in_view or all(c.entry.name in marked for c in self.tables.children(node))):
            return True
        return node.entry is not self.tables.root and self.files_removed(node.face, asking)

    def check_not_being_removed(self, container: Container, name: str) -> None:
        """ENOENT when a removal of it, or of what it is in, has come to the nested containers.

        It goes by the names that it has listed: were others given to them meanwhile, from inside
        for instance, it would fail with ENOTEMPTY.  They are listed after everything else but
        procs/.
        """
        for each in container.lineage():
            if each.parent is None:
                return
            for face in self.world.known_faces(each):
                marked = self.world.marks.union(self.tables.of(face, self.tables.root).ino)
                if marked and all(
                    child.entry.name in marked
                    for child in self.tables.children(self.tables.of(face, self.tables.root))
                    if not (isinstance(child.entry, Directory) and child.entry.member is not None)
                ):
                    raise FileNotFoundError(errno.ENOENT, "it is being removed", name)

    def let_give_way(self, container: Container, directory: Node, asking: Process) -> None:
        """Several files of it are marked, so it may be being removed: let its processes not be in
        the way of that, until it is or it turns out that it is not."""
        if container in self.giving_way:
            return
        if len(self.world.marks.union(directory.ino, asking)) >= GIVING_WAY_MARKS:
            self.giving_way.add(container)
            container.group.give_way(True)
            self.world.start(self._end_giving_way, container)

    async def _end_giving_way(self, container: Container) -> None:
        await trio.sleep(GIVING_WAY_S)
        self.giving_way.discard(container)
        if not container.dying:
            container.group.give_way(False)
