"""Open control files and open directories."""

from __future__ import annotations

import errno
import os
import select
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from nsfs import members
from nsfs.attribute import (
    PARENTS,
    VALUE_MAX,
    Answer,
    Attribute,
    Caller,
    Directory,
    OpenFile,
    Watchers,
    awaited,
    then,
)
from nsfs.authority import check_mode
from nsfs.container import Container, Phase
from nsfs.found import Found
from nsfs.nodes import Nodes, Row
from nsfs.processes import Process, thread_group
from nsfs.tree import KEYED, NUMBER_MASK, SELF, SHOWN, Node
from nsfs.view import check_write, lives, tag

NOBODY = 65534
GONE = (FileNotFoundError, ProcessLookupError)
KEPT_SMALL = 4096
"""Bytes: what an open file costs anyway."""
KEPT_MAX = 1 << 26
"""Bytes of all that is longer together."""
ROW_SIZE = 512
"""Bytes that an entry of a listing takes, about."""


class Kept:
    """What open files keep of long texts and listings, which a container can make as long as it
    likes.

    What was not looked at for longest is dropped when all together takes too much: who reads on
    there gets what is there by then.
    """

    def __init__(self) -> None:
        self._sizes: OrderedDict[Value | Listing, int] = OrderedDict()
        self._size = 0

    def keep(self, owner: Value | Listing, size: int) -> None:
        """An open file keeps so many bytes now."""
        if self._sizes:
            self.drop(owner)
        if size <= KEPT_SMALL:
            return
        self._sizes[owner] = size
        self._size += size
        while self._size > KEPT_MAX:
            oldest = next(iter(self._sizes))
            self.drop(oldest)
            oldest.let_go()

    def drop(self, owner: Value | Listing) -> None:
        """An open file keeps nothing any more."""
        self._size -= self._sizes.pop(owner, 0)


_kept = Kept()


class Value(OpenFile):
    """An open control file: a snapshot for whoever reads, a value from whoever writes."""

    def __init__(self, node: Node, token: int, flags: int, caller: Caller, nodes: Nodes) -> None:
        super().__init__(node.face, token, flags, False)
        self.node = node
        self.nodes = nodes
        self.view = nodes.tables.view(node)
        self.entry: Attribute = node.entry  # type: ignore[assignment]
        self.contents = node.contents
        self.caller = caller
        self.snapshot = b""
        self.generation = 0
        """Of the container, when it was opened to be written."""
        self.written = b""
        """The value that the next write goes on with, and where that would be."""
        self.end = 0
        self.watchers: Watchers | None = self.entry.watch(self.face) if self.entry.watch else None
        self.version = self.watchers.version if self.watchers else 0
        if self.entry.store is not None and flags & os.O_ACCMODE != os.O_RDONLY:
            # Authority is the opener's, also with the next daemon.
            self.generation = self.face.container.generation()
            self.face.world.opens.put(token, caller.uid, caller.gid, caller.tid, self.generation)

    def _show(self, looked: None = None) -> Answer[bytes]:
        show = self.entry.show
        assert show is not None
        keyed = (self.node.key,) if KEYED <= self.node.ino & NUMBER_MASK < SHOWN else ()
        try:
            text = show(self.face, *keyed)
        except GONE as error:
            if self.view is None:
                raise
            raise self._gone() from error
        return _encoded(text) if isinstance(text, str | bytes) else self._when_shown(text)

    async def _when_shown(self, text: Coroutine[Any, Any, str | bytes]) -> bytes:
        try:
            return _encoded(await text)
        except GONE as error:
            if self.view is None:
                raise
            raise self._gone() from error

    def _gone(self) -> OSError:
        """What is in a view is not there any more.  It may go between two looks; an init that has
        ended may not have been reaped yet."""
        return OSError(errno.ENODEV, "it is gone", self.entry.name)

    def _look_again(self) -> Answer[None]:
        """See whether what a view showed here is still there: ENODEV when it is not.

        Of what is in a view that is open all the time, show and store will say so.
        """
        if self.view is None:
            return None
        if not self.node.path:
            if not lives(tag(self.face, self.view)):
                raise self._gone()
            return None
        try:
            contents = self.face.world.views.opened(self.face, self.view)
        except FileNotFoundError as error:
            raise self._gone() from error
        return None if contents is self.contents else self._find_again()

    def _confirmed(self) -> Answer[None]:
        """ENODEV when no process is in a found container any more."""
        container = self.face.container
        if not isinstance(container, Found) or container.check():
            return None
        return self._confirm(container)

    async def _confirm(self, container: Found) -> None:
        try:
            await awaited(container.confirmed())
        except FileNotFoundError as error:
            raise self._gone() from error

    async def _find_again(self) -> None:
        # The view was closed, having been idle.
        try:
            node = await self.nodes.node(self.node.ino)
        except FileNotFoundError as error:
            raise self._gone() from error
        if isinstance(node.entry, Attribute):
            self.entry = node.entry
            self.contents = node.contents

    def read(self, offset: int, size: int, request: int) -> Answer[bytes]:
        """A part of the snapshot that the read at offset 0 took."""
        if offset and self.snapshot:
            return self.snapshot[offset : offset + size]

        if self.entry.show is None:
            raise OSError(errno.EINVAL, "cannot be read", self.entry.name)
        if self.face.container.phase is Phase.GONE:
            raise OSError(errno.ENODEV, "the container was removed", self.entry.name)
        if self.watchers is not None:
            self.version = self.watchers.version
        there = then(self._confirmed(), lambda _: self._look_again())
        shown = then(there, self._show)
        return then(shown, lambda whole: self._part(whole, offset, size))

    def _part(self, whole: bytes, offset: int, size: int) -> bytes:
        self.snapshot = whole
        _kept.keep(self, len(whole))
        return whole[offset : offset + size]

    def let_go(self) -> None:
        """Take a new snapshot when it is read again."""
        self.snapshot = b""

    async def write(self, offset: int, data: bytes, request: int) -> int:
        """One value, whatever the offset (`>>` writes at st_size); of lines, all that were written
        one after another."""
        # Rights are the opener's, what a path leads to is the writer's.
        caller = self.caller._replace(writer=self.writer)
        if self.entry.store is None:
            raise OSError(errno.EINVAL, "cannot be written", self.entry.name)
        before = self.written if self.entry.lines and offset == self.end else b""
        self.written, self.end = b"", 0
        if len(before) + len(data) > VALUE_MAX:
            raise OSError(errno.E2BIG, "value too long", self.entry.name)
        value = (before + data).removesuffix(b"\n")
        if b"\0" in value:
            raise OSError(errno.EINVAL, "NUL in a value", self.entry.name)
        container: Container = self.face.container
        if self.generation != container.generation():
            # Somebody may have taken it back.
            number = self.node.ino & NUMBER_MASK
            check_mode(self.face, self.entry, number, self.caller, os.W_OK)
        with container.telling_why(self.entry.name):
            await awaited(self._confirmed())
            if self.view is not None:
                await awaited(self._look_again())
                check_write(self.face, self.view, self.caller)
            result = self.entry.store(self.face, os.fsdecode(value), caller)
            if result is not None:
                await result
        if data.endswith(b"\n"):
            self.written, self.end = before + data, offset + len(data)
        return len(data)

    def poll(self, notify: Callable[[], None] | None) -> int:
        """Readable and writable; POLLPRI and POLLERR when it changed since it was read, as kernfs
        has it."""
        ready = select.POLLIN | select.POLLRDNORM | select.POLLOUT | select.POLLWRNORM
        if self.watchers is None:
            return ready
        if notify is not None:
            self.watchers.add(self, notify)
        if self.version != self.watchers.version:
            return ready | select.POLLPRI | select.POLLERR
        return ready

    def release(self) -> None:
        """Nobody polls it any more."""
        if self.watchers is not None:
            self.watchers.drop(self)
        _kept.drop(self)
        self.face.world.opens.drop(self.token)


def _encoded(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


class Listing:
    """An open directory: what it lists, by offset."""

    __slots__ = ("cookies", "node", "process", "rows")

    def __init__(self, node: Node, process: Process | None) -> None:
        self.node = node
        self.process = process
        self.cookies: list[int] = []
        self.rows: list[Row] = []

    async def rows_after(self, offset: int, nodes: Nodes) -> list[Row]:
        """What is listed behind an offset: (offset, name, node); nothing of a container that is
        gone.  What the directory has is looked at again for the beginning."""
        number = self.node.face.container.number
        if number not in nodes.world.containers and number not in nodes.world.found:
            return []
        looked = not offset or not self.rows
        if looked:
            await self._look(nodes)
        rows = self.rows[bisect_right(self.cookies, offset) :]
        if looked:
            _kept.keep(self, len(self.rows) * ROW_SIZE)
        return rows

    def let_go(self) -> None:
        """Look again when it is read on."""
        self.rows, self.cookies = [], []

    def release(self) -> None:
        """It is closed."""
        _kept.drop(self)

    async def _look(self, nodes: Nodes) -> None:
        entry = self.node.entry
        keyed = isinstance(entry, Directory) and entry.member is not None
        gone = keyed and nodes.removal.all_but_removed(self.node, self.process)
        self.rows = [] if gone else await nodes.rows(self.node, self.process)
        self.cookies = [row[0] for row in self.rows]
        if self.process is not None:
            nodes.remember(self.process, self.node, self.rows)


def _own(nodes: Nodes, node: Node, caller: Caller) -> Node:
    """What `procs/self` is to that caller."""
    pid = thread_group(caller.tid)
    if members.container_of(node.face.container, pid) is None:
        raise members.no_process("self")
    key = members.seen_pid(pid, members.level(node.face.viewpoint))
    return nodes.tables.of(node.face, node.entry, key)


def open_file(nodes: Nodes, node: Node, token: int, flags: int, caller: Caller) -> OpenFile:
    """Open a control file; EINVAL for access that it has no use for."""
    own = node.ino & NUMBER_MASK == KEYED + SELF
    if own:
        node = _own(nodes, node, caller)
    entry = node.entry
    if not isinstance(entry, Attribute):
        raise OSError(errno.EINVAL, "no file", entry.name)
    access = flags & os.O_ACCMODE
    if access != os.O_RDONLY:
        check_writable(node)
    if entry.stream is not None:
        return entry.stream(node.face, token, flags, False)
    # As kernfs_fop_open() has it: what no show or store is for cannot be opened for it, by root
    # neither.
    if (access != os.O_WRONLY and entry.show is None) or (
        access != os.O_RDONLY and entry.store is None and not entry.mode & 0o200
    ):
        raise OSError(errno.EINVAL, "not for that", entry.name)
    view = nodes.tables.view(node)
    # What has a path was found there a moment ago.
    if view is not None and not node.path and not lives(tag(node.face, view)):
        raise FileNotFoundError(errno.ENOENT, "the namespace is dead", entry.name)
    if own:
        # The next daemon has to know whose.
        nodes.world.opens.put(token, caller.uid, caller.gid, caller.tid)
    return Value(node, token, flags, caller, nodes)


def reopen(nodes: Nodes, node: Node, token: int) -> OpenFile:
    """Make an open file of an earlier daemon again."""
    entry = node.entry
    assert isinstance(entry, Attribute)
    if entry.stream is not None:
        return entry.stream(node.face, token, 0, True)
    known = nodes.world.opens.get(token)
    # That of a file opened only to be read was not kept: it is nobody's to write.
    caller = Caller(known[2], known[0], known[1]) if known else Caller(0, NOBODY, NOBODY)
    if known and node.ino & NUMBER_MASK == KEYED + SELF:
        node = _own(nodes, node, caller)
    value = Value(node, token, 0, caller, nodes)
    if known:
        value.generation = known[3]
    # What changed while there was no daemon is told, even if that was nothing.
    value.version = -1
    return value


def check_writable(node: Node) -> None:
    """EACCES inside for what is the parent's to change."""
    # Inside, root has CAP_DAC_OVERRIDE over files that are its own: the mode alone does not
    # stop it.
    fixed = node.face.inner or node.face.container.is_found
    if fixed and PARENTS in node.entry.flags:
        raise PermissionError(errno.EACCES, "it is the parent's to change", node.entry.name)
