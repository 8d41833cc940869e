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
EMPTY = "."
"""The mark of a container whose directory was listed as empty, see `Removal.under_way`."""


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
        if EMPTY in marked and self.shown_empty(node.face, asking):
            return True
        in_view = node.path or isinstance(node.entry, TagType)
        if marked and (in_view or all(c.entry.name in marked for c in self.tables.children(node))):
            return True
        return node.entry is not self.tables.root and (
            self.files_removed(node.face, asking) or self.shown_empty(node.face, asking)
        )

    def under_way(
        self,
        container: Container,
        viewpoint: Container,
        asking: Process | None = None,
        *,
        further_out: bool = False,
    ) -> bool:
        """Whether a container, or one that it is in, is being removed by somebody who looks from
        that viewpoint or from further out: then all that is nested in it goes with it.

        So nothing nested need be removed one by one, and each is shown as an empty directory.  And
        nobody who looks from that viewpoint, or from inside, makes or names anything in it any
        more.  Members that remove what they see of their own container do not count: they cannot
        remove it, and keep nobody outside from anything.
        """
        if not self.world.marks:
            return False
        viewpoints = set(viewpoint.lineage()) - ({viewpoint} if further_out else set())
        return any(
            face.viewpoint in viewpoints and not face.inner and self.files_removed(face, asking)
            for each in container.lineage()
            if each.parent is not None
            for face in self.world.known_faces(each)
        )

    def shown_empty(self, face: Face, asking: Process | None) -> bool:
        """Whether what a container is in is being removed."""
        above = face.container.parent
        return (
            above is not None and not face.inner and self.under_way(above, face.viewpoint, asking)
        )

    def check_not_being_removed(self, face: Face, name: str) -> None:
        """ENOENT when it is, or what it is in."""
        if self.under_way(face.container, face.viewpoint):
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
