"""The FUSE operations: inodes and handles in, errno out.  This is the only error boundary.

Whatever is below raises OSError; here that becomes its errno, anything else a logged traceback and
EIO.  An exception that is not FUSEError would end the whole session, so nothing escapes.

Each request may wait, and none may be waited for in vain: the interposer tells of every INTERRUPT,
which cancels the handler of that request, whatever it waits for, and answers EINTR.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import select
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from nsfs import lifecycle, members, takeover
from nsfs.attribute import (
    FILE_SIZE,
    HIDDEN,
    PARENTS,
    VALUE_MAX,
    Attribute,
    Caller,
    Contents,
    Directory,
    Entry,
    Link,
    OpenFile,
    TagType,
    Watchers,
)
from nsfs.authority import check_mode, check_seen_once
from nsfs.container import Container, Face, Phase
from nsfs.entry import ENTER_ATTRIBUTE, enter_program, revoke
from nsfs.processes import Process, Processes, process_lives, thread_group
from nsfs.tree import KEYED, NUMBER_MASK, ROOT_NUMBER, SELF, SHOWN, Names, Node, Paths, Tables, ino
from nsfs.view import check_write, entry_of, lives, names_of, tag
from nsfs.world import World

log = logging.getLogger(__name__)

TIMEOUT_S = 1.0
"""How long the kernel may believe an entry and its attributes; what changes before is
invalidated."""
FOREVER_S = 3600.0
"""The same for what never changes."""
DIRECTORY_COOKIE = 1 << 32
"""Where the directory offsets of the tables' directories begin: after those of all files."""
CHILD_COOKIE = 1 << 40
"""Where the directory offsets of children begin, past those of the static entries."""
SEARCHED_MAX = 100_000
"""How many names of a view are looked through for one that an earlier daemon gave a number."""
CHANGED_S = 2 * TIMEOUT_S
"""For how long after a change of owners and modes it is asked again whether they allow a request:
an answer to the kernel that was under way at that moment may have told it the old ones."""
GIVING_WAY_S = 1.0
"""How long a container that is being removed may take to be."""
GIVING_WAY_MARKS = 3
"""How many files removed look like that."""
NOBODY = 65534
ACCESS = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK, os.O_RDWR: os.R_OK | os.W_OK}
LAST_COOKIE = 1 << 62
"""The directory offset of the entry that is listed last."""

T = TypeVar("T")
P = ParamSpec("P")
Method = Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]]


def boundary(method: Method[P, T]) -> Method[P, T]:
    """Turn whatever a handler raises into a FUSEError."""

    @functools.wraps(method)
    async def wrapper(self: Operations, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(self, *args, **kwargs)
        except FUSEError:
            raise
        except OSError as error:
            if error.errno is None:
                log.exception("%s failed", method.__name__)
            raise FUSEError(error.errno or errno.EIO) from error
        except Exception:
            log.exception("%s failed", method.__name__)
            raise FUSEError(errno.EIO) from None

    return wrapper  # type: ignore[return-value]


def waiting(method: Method[P, T]) -> Method[P, T]:
    """A boundary for a handler that may wait: an INTERRUPT of its request cancels it.

    (The others are done before the kernel could send one.)
    """

    @functools.wraps(method)
    async def wrapper(self: Operations, *args: P.args, **kwargs: P.kwargs) -> T:
        unique = self.request()
        scope = self.running[unique] = trio.CancelScope()
        try:
            with scope:
                return await method(self, *args, **kwargs)
        finally:
            del self.running[unique]
        # Only the cancellation leads here.
        raise FUSEError(errno.EINTR)

    return boundary(wrapper)  # type: ignore[arg-type]


class Value(OpenFile):
    """An open control file: a snapshot for whoever reads, a value from whoever writes."""

    def __init__(
        self, node: Node, token: int, flags: int, caller: Caller, tree: Operations
    ) -> None:
        super().__init__(node.face, token, flags, False)
        self.node = node
        self.tree = tree
        self.view = tree.tables.view(node)
        self.entry: Attribute = node.entry  # type: ignore[assignment]
        self.contents: Contents | None = None
        if self.view is not None and node.path:
            self.contents = self.face.world.views.opened(self.face, self.view)
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

    async def _show(self) -> bytes:
        if self.entry.show is None:
            raise OSError(errno.EINVAL, "cannot be read", self.entry.name)
        if self.watchers is not None:
            self.version = self.watchers.version
        keyed = (self.node.key,) if KEYED <= self.node.ino & NUMBER_MASK < SHOWN else ()
        await self._look_again()
        assert self.entry.show is not None
        text: Any = self.entry.show(self.face, *keyed)
        if not isinstance(text, str | bytes):
            text = await text
        return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)

    async def _look_again(self) -> None:
        """See whether what a view showed here is still there: ENODEV when it is not.

        Of what is in a view that is open all the time, show and store will say so.
        """
        if self.view is None:
            return
        if not self.node.path:
            if not lives(tag(self.face, self.view)):
                raise OSError(errno.ENODEV, "the namespace is dead", self.entry.name)
            return
        try:
            contents = await self.face.world.views.of(self.face, self.view)
            if contents is self.contents:
                return
            # It was closed, having been idle, and is open again.
            found = (await self.tree.node(self.node.ino)).entry
        except FileNotFoundError as error:
            raise OSError(errno.ENODEV, "it is gone", self.entry.name) from error
        if isinstance(found, Attribute):
            self.entry = found
            self.contents = contents

    async def read(self, offset: int, size: int, request: int) -> bytes:
        """A part of the snapshot that the read at offset 0 took."""
        if not offset or not self.snapshot:
            self.snapshot = await self._show()
        return self.snapshot[offset : offset + size]

    async def write(self, offset: int, data: bytes, request: int) -> int:
        """One value, whatever the offset (`>>` writes at st_size); of lines, all that were written
        one after another."""
        # Rights are the opener's, what a path leads to is the writer's.
        caller = replace(self.caller, writer=self.writer)
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
            if self.view is not None:
                await self._look_again()
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
        self.face.world.opens.drop(self.token)


Row = tuple[int, str, Node]
"""Offset, name and node of what a directory lists."""


class Listing:
    """An open directory: what it lists, by offset."""

    __slots__ = ("cookies", "node", "process", "rows")

    def __init__(self, node: Node, process: Process | None) -> None:
        self.node = node
        self.process = process
        self.cookies: list[int] = []
        self.rows: list[Row] = []


class Operations(pyfuse3.Operations):
    """The tree, as the kernel asks for it."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        world: World,
        entries: tuple[Entry, ...],
        device: Any,
    ) -> None:
        super().__init__()
        self.world = world
        self.device = device
        self.faces = Directory(".f", flags=HIDDEN, mode=0o700)
        root = Directory("", entries=(*entries, self.faces))
        names = Names(world.store.names(), world.store.add_name)
        self.tables = Tables(root, names)
        self.paths = Paths(world.store.secret())
        world.changed = self.changed
        self.processes = Processes()
        self.running: dict[int, trio.CancelScope] = {}
        self.open_files: dict[int, OpenFile] = {}
        self.listings: dict[int, Listing] = {}
        self.giving_way: set[Container] = set()
        # What a process has seen listed in procs/ it may remove, although the processes have ended
        # meanwhile.
        self.listed: dict[tuple[int, int], set[int]] = {}
        self._token: int = device.generation << 40
        self.changed_at = 0.0
        """When owners or modes last changed (CLOCK_MONOTONIC)."""
        self.bound_files = {e.bound: e for e in entries if isinstance(e, Attribute) and e.bound}

    # --- requests ---

    def request(self) -> int:
        """What names the request being dispatched: the same number, should it be asked again."""
        unique: int = self.device.current()[0]
        return unique

    def init(self) -> None:
        """The session has begun."""

    def replayed(self) -> bool:
        """Whether an earlier daemon may have carried out the request being dispatched."""
        again: bool = self.device.current()[3]
        return again

    def interrupt(self, unique: int) -> None:
        """The kernel no longer waits for that request: a signal came for its caller."""
        scope = self.running.get(unique)
        if scope is not None:
            scope.cancel()

    def _new_token(self) -> int:
        self._token += 1
        return self._token

    # --- nodes ---

    async def node(self, inode: int) -> Node:
        """The node of an inode number."""
        face = self.world.face_numbered(inode >> 33)
        number = inode & NUMBER_MASK
        if number < SHOWN:
            return self.tables.node(face, number)
        return await self._shown(face, await self._path(face, number), number)

    async def _path(self, face: Face, number: int) -> tuple[str, ...]:
        """The path of what a view shows."""
        return self.paths.path(face.number, number) or await self._search(face, number)

    async def _shown(self, face: Face, path: tuple[str, ...], number: int = 0) -> Node:
        """What a view shows at a path, which has that number if one is given; FileNotFoundError
        when that is nothing."""
        top = self.tables.child(self.tables.of(face, self.tables.root), path[0])
        if top is None or not isinstance(top.entry, TagType):
            raise FileNotFoundError(errno.ENOENT, "no such view", path[0])
        contents = await self.world.views.of(face, top.entry)
        entry = await entry_of(contents, path[1:])
        number = number or self.paths.number(face.number, path)
        return Node(face, entry, 0, ino(face.number, number), path)

    async def _search(self, face: Face, number: int) -> tuple[str, ...]:
        """The path that an earlier daemon gave a number, or that was forgotten."""
        left = SEARCHED_MAX
        for view in self.tables.views():
            if not face.has(view) or view.contents is None:
                continue
            try:
                contents = await self.world.views.of(face, view)
            except OSError:
                continue
            directories: list[tuple[str, ...]] = [()]
            for directory in directories:
                with contextlib.suppress(OSError):
                    for name in await names_of(contents, directory):
                        path = (view.name, *directory, name)
                        if number in self.paths.numbers(path):
                            return path
                        if isinstance(await entry_of(contents, path[1:]), Directory):
                            directories.append(path[1:])
                        left -= 1
                        if not left:
                            break
                await trio.lowlevel.checkpoint()
        raise FileNotFoundError(errno.ENOENT, "nothing has that number any more", str(number))

    def directory(self, container: Container, viewpoint: Container) -> Node:
        """A container's directory as a viewpoint sees it."""
        return self.tables.of(self.world.face(viewpoint, container), self.tables.root)

    async def find(self, parent: Node, name: str, caller: Caller) -> Node:
        """A name in a directory; FileNotFoundError when it has none of that name."""
        entry = parent.entry
        if not isinstance(entry, Directory):
            raise NotADirectoryError(errno.ENOTDIR, "no directory", name)
        if parent.path:
            return await self._shown(parent.face, (*parent.path, name))
        found = self.tables.child(parent, name)
        if isinstance(entry, TagType):
            if found is None:
                return await self._shown(parent.face, (entry.name, name))
            if not lives(tag(parent.face, entry)):
                raise FileNotFoundError(errno.ENOENT, "the namespace is dead", name)
        if found is not None:
            return found
        if entry is self.tables.root:
            child = parent.face.container.children.get(name)
            if child is not None and child.phase not in (Phase.MAKING, Phase.GONE):
                return self.directory(child, parent.face.viewpoint)
            if name == ".f" and parent.face.number == 0:
                return self.tables.of(parent.face, self.faces)
        elif entry is self.faces:
            return self._bound(name)
        elif entry.find is not None:
            key = self._find_keyed(entry, parent, name, caller)
            return self.tables.of(parent.face, entry.member or entry, key)
        raise FileNotFoundError(errno.ENOENT, "no such file or directory", name)

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

    def attributes(self, node: Node) -> EntryAttributes:
        """What stat(2) says of a node."""
        face: Face = node.face
        entry = node.entry
        container = face.container
        attr = EntryAttributes()
        attr.st_ino = pyfuse3.InodeT(node.ino)
        attr.generation = self.world.generation(node.ino)
        attr.entry_timeout = attr.attr_timeout = TIMEOUT_S
        number = node.ino & NUMBER_MASK
        mtime_ns = int(container.since * 1e9)
        if entry is self.tables.root:
            mode = face.directory_mode()
            uid, gid = face.owner(None)
        elif number == KEYED + SELF:
            # One file for all who look, so that the kernel may keep it; and where nobody is not a
            # member, its name as well.
            mode = entry.mode | 0o666
            uid, gid = face.viewpoint.root_uid, face.viewpoint.root_gid
            if face.number == 0:
                attr.entry_timeout = attr.attr_timeout = FOREVER_S
            elif not face.inner:
                attr.entry_timeout = 0
        elif KEYED <= number < SHOWN:
            mode = entry.mode
            uid, gid = self._process_owner(node)
            attr.entry_timeout = attr.attr_timeout = 0
        else:
            mode = face.mode(entry, number)
            uid, gid = face.owner(entry, number)
            if isinstance(entry, Attribute) and entry.mtime is not None:
                mtime_ns = max(mtime_ns, entry.mtime(face))
                attr.attr_timeout = 0
            if entry is self.faces:
                uid = gid = 0
            view = self.tables.view(node)
            deep = len(node.path) > 2 and not isinstance(entry, Link)
            if view is not None and entry is not view and not deep:
                # Looked up each time, so that it is gone as soon as its namespace is, or it itself.
                attr.entry_timeout = 0
        attr.st_mode = pyfuse3.ModeT(mode)
        attr.st_nlink = 1
        attr.st_uid, attr.st_gid = uid, gid
        attr.st_rdev = 0
        attr.st_size = 0 if stat.S_ISDIR(mode) else FILE_SIZE
        if isinstance(entry, Attribute) and entry.size is not None:
            attr.st_size = entry.size(face)
        attr.st_blksize = 4096
        attr.st_blocks = 0
        attr.st_atime_ns = attr.st_ctime_ns = attr.st_mtime_ns = mtime_ns
        return attr

    def _process_owner(self, node: Node) -> tuple[int, int]:
        try:
            return members.owner(members.host_pid(node.face, node.key))
        except OSError:
            owner: tuple[int, int] = node.face.owner(None)
            return owner

    @waiting
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> EntryAttributes:
        """FUSE_LOOKUP."""
        number = parent_inode & NUMBER_MASK
        if number < SHOWN:
            parent = await self.node(parent_inode)
            return self.attributes(await self.find(parent, os.fsdecode(name), _caller(ctx)))
        # What is in it is not there either when it is not.
        face = self.world.face_numbered(parent_inode >> 33)
        path = await self._path(face, number)
        return self.attributes(await self._shown(face, (*path, os.fsdecode(name))))

    async def forget(self, inode_list: Any) -> None:
        """FUSE_FORGET: nodes are not kept, so there is nothing to forget."""

    @waiting
    async def getattr(self, inode: int, ctx: Any) -> EntryAttributes:
        """FUSE_GETATTR."""
        return self.attributes(await self.node(inode))

    @waiting
    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any
    ) -> EntryAttributes:
        """FUSE_SETATTR: chmod and chown change authority, truncation is the file's own; times are
        accepted and nothing comes of them."""
        node = await self.node(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            await self._change_owner(node, attr, fields)
        if fields.update_size and isinstance(node.entry, Attribute):
            self._check_writable(node)
            if node.entry.truncate is not None:
                node.entry.truncate(node.face, _caller(ctx))
        return self.attributes(node)

    async def _change_owner(self, node: Node, attr: Any, fields: Any) -> None:
        face, container = node.face, node.face.container
        number = node.ino & NUMBER_MASK
        if face.inner or number >= KEYED or node.entry is self.faces:
            raise PermissionError(errno.EPERM, "its owner is not to be changed", node.entry.name)
        # What is no permission (set-user-ID, sticky) means nothing here.
        mode = attr.st_mode & 0o777 if fields.update_mode else -1
        uid = attr.st_uid if fields.update_uid else -1
        gid = attr.st_gid if fields.update_gid else -1
        if node.entry is self.tables.root:
            with container.telling_why("chown"):
                await lifecycle.give(container, mode, uid, gid)
        else:
            old = container.overrides.get(number, (-1, -1, -1))
            new = (mode, uid, gid)
            merged = (was if now < 0 else now for was, now in zip(old, new, strict=True))
            container.overrides[number] = (next(merged), next(merged), next(merged))
            container.changes += 1
            container.save()
        if container.suspended():
            # Its init answers later, and starts nothing before.
            self.world.start(revoke, container)
        else:
            await revoke(container)
        self.changed_at = time.monotonic()
        if node.entry is self.tables.root:
            for each in (container, *container.descendants()):
                self.changed(each)
            return
        for other in self.world.known_faces(container):
            if other is not face:
                self._invalidate_inode(self.tables.of(other, node.entry).ino)

    def _check_now(self, node: Node, caller: Caller, wanted: int = os.W_OK) -> None:
        """EACCES for what the kernel let pass by what was true a moment ago."""
        number = node.ino & NUMBER_MASK
        if time.monotonic() - self.changed_at < CHANGED_S and number < KEYED:
            entry = None if node.entry is self.tables.root else node.entry
            check_mode(node.face, entry, number, caller, wanted)

    def changed(self, container: Container) -> None:
        """What stat(2) says of a container's files has changed, other than by stat's own."""
        for face in self.world.known_faces(container):
            for _, entry in self.tables.paths():
                if face.has(entry):
                    self._invalidate_inode(self.tables.of(face, entry).ino)
            self._invalidate_inode(self.tables.of(face, self.tables.root).ino)
            for number in self.paths.known(face.number):
                self._invalidate_inode(ino(face.number, number))

    def _invalidate_inode(self, inode: int) -> None:
        try:
            pyfuse3.invalidate_inode(pyfuse3.InodeT(inode), attr_only=True)
        except OSError as error:
            # The kernel does not know the inode: then it has nothing old of it.
            if error.errno != errno.ENOENT:
                raise

    @waiting
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        """FUSE_READLINK."""
        node = await self.node(inode)
        if not isinstance(node.entry, Link):
            raise OSError(errno.EINVAL, "no link", node.entry.name)
        target = node.entry.target(node.face)
        return os.fsencode(target if isinstance(target, str) else await target)

    # --- directories ---

    async def rows(self, node: Node, asking: Process | None = None) -> list[Row]:
        """What a directory lists to a process: (offset, name, node), in the order of offsets.

        Offsets depend on the entry alone, so a listing goes on rightly whatever comes and goes
        meanwhile, and whoever the daemon is.
        """
        if node.path or isinstance(node.entry, TagType):
            return await self._view_rows(node, asking)
        if node.entry is not self.tables.root and self._files_removed(node.face, asking):
            return []
        return sorted(self._rows(node), key=lambda row: row[0])

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
        elif isinstance(entry, Directory) and entry.names is not None and entry.member is not None:
            for name, key in sorted(entry.names(node.face), key=lambda pair: pair[1]):
                yield CHILD_COOKIE + key, name, self.tables.of(node.face, entry.member, key)

    async def _view_rows(self, node: Node, asking: Process | None) -> list[Row]:
        face = node.face
        if self._files_removed(face, asking):
            return []
        view = self.tables.view(node)
        assert view is not None
        try:
            contents = await self.world.views.of(face, view)
        except FileNotFoundError:
            # The namespace is dead: so is all that it showed.
            return []
        rows = []
        if not node.path:
            children = enumerate(self.tables.children(node), 1)
            rows = [(index, child.entry.name, child) for index, child in children]
        path = node.path or (view.name,)
        for name in await names_of(contents, path[1:]):
            # It may have gone meanwhile.
            with contextlib.suppress(FileNotFoundError):
                entry = await entry_of(contents, (*path[1:], name))
                number = self.paths.number(face.number, (*path, name))
                child = Node(face, entry, 0, ino(face.number, number), (*path, name))
                rows.append((CHILD_COOKIE + number, name, child))
        return sorted(rows, key=lambda row: row[0])

    def _files_removed(self, face: Face, asking: Process | None) -> bool:
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

    def _all_but_removed(self, node: Node, asking: Process | None) -> bool:
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

    @waiting
    async def opendir(self, inode: int, ctx: Any) -> int:
        """FUSE_OPENDIR."""
        node = await self.node(inode)
        token = self._new_token()
        self.listings[token] = Listing(node, self.processes.of(ctx.pid))
        return token

    @waiting
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """FUSE_READDIRPLUS."""
        inode = self.device.current()[1]
        listing = self.listings.get(fh)
        if listing is None:
            # Opened with an earlier daemon.
            listing = self.listings[fh] = Listing(await self.node(inode), None)
        if not start_id or not listing.rows:
            asking, entry = listing.process, listing.node.entry
            keyed = isinstance(entry, Directory) and entry.member is not None
            gone = keyed and self._all_but_removed(listing.node, asking)
            listing.rows = [] if gone else await self.rows(listing.node, asking)
            listing.cookies = [row[0] for row in listing.rows]
            if keyed and listing.process is not None:
                for process in [p for p in self.listed if not process_lives(p)]:
                    del self.listed[process]
                seen = self.listed.setdefault(listing.process, set())
                seen.update(row[2].ino for row in listing.rows)
        for row in listing.rows[bisect_right(listing.cookies, start_id) :]:
            cookie, name, node = row
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self.attributes(node), cookie):
                break

    @boundary
    async def releasedir(self, fh: int) -> None:
        """FUSE_RELEASEDIR."""
        self.listings.pop(fh, None)

    @waiting
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> EntryAttributes:
        """FUSE_MKDIR: make a container."""
        unique = self.request()
        parent = await self.node(parent_inode)
        text = os.fsdecode(name)
        if isinstance(parent.entry, Directory) and parent.entry.make is not None:
            # What the daemon before this one made is there by now.
            if not (self.replayed() and await self._is_there(parent, text, _caller(ctx))):
                with self._changing(parent, text, _caller(ctx)):
                    await parent.entry.make(parent.face, text, _caller(ctx))
            return self.attributes(await self.find(parent, text, _caller(ctx)))
        if parent.entry is not self.tables.root:
            raise PermissionError(
                errno.EPERM, "containers are made in containers", parent.entry.name
            )
        if self.tables.reserved(text):
            raise OSError(errno.EEXIST, "the name is taken", text)
        self._check_not_being_removed(parent.face.container, text)
        self._check_now(parent, _caller(ctx))
        if not self.world.primed:
            # Whoever is so early has not waited for the mount to be ready.
            raise OSError(errno.EAGAIN, "nothing can be made before all is ready", text)
        above: Container = parent.face.container
        with above.telling_why(text):
            made = await lifecycle.make(
                above, text, _caller(ctx), request=unique, mode=mode & 0o777
            )
        return self.attributes(self.directory(made, parent.face.viewpoint))

    @waiting
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """FUSE_RMDIR: remove an idle container, or one whose entries have all been removed, with
        all in it."""
        replayed = self.replayed()
        parent = await self.node(parent_inode)
        text = os.fsdecode(name)
        try:
            node = await self.find(parent, text, _caller(ctx))
        except FileNotFoundError:
            if replayed:
                # The daemon before this one did it, and did not get to say so.
                return
            raise
        if node.entry is not self.tables.root:
            if not isinstance(node.entry, Directory):
                raise NotADirectoryError(errno.ENOTDIR, "no directory", text)
            asking = self.processes.of(ctx.pid)
            emptied = self._fully_marked(node, asking) or await self._shows_nothing(node, asking)
            if not emptied and isinstance(parent.entry, Directory) and parent.entry.remove:
                with self._changing(parent, text, _caller(ctx)):
                    await parent.entry.remove(parent.face, text, _caller(ctx))
                return
            if node.entry.member is None and not emptied:
                raise OSError(errno.ENOTEMPTY, "only rm -rf of the container removes it", text)
            self.world.marks.add(self.processes.of(ctx.pid), parent.ino, text)
            self.world.bury(node.ino)
            return
        self._check_now(parent, _caller(ctx))
        container = node.face.container
        # A moment, when it is being rebuilt.
        await container.settled.wait()
        with container.telling_why("rmdir"):
            check_seen_once(ctx.pid, self.world.device_numbers, node.face.viewpoint.number)
            if self._fully_marked(node, self.processes.of(ctx.pid)):
                lifecycle.end(container)
            else:
                lifecycle.remove_idle(container)
        self.forget_name(parent, container, text)

    async def _is_there(self, parent: Node, name: str, caller: Caller) -> bool:
        """Whether a directory has that name."""
        try:
            await self.find(parent, name, caller)
        except FileNotFoundError:
            return False
        return True

    def forget_name(self, parent: Node, container: Container, name: str) -> None:
        """Have the kernel drop a container's name wherever else it is seen."""
        for face in self.world.known_faces(parent.face.container):
            if face is not parent.face:
                directory = self.tables.of(face, self.tables.root).ino
                inode = self.directory(container, face.viewpoint).ino
                self.world.start(_forget_entry, directory, os.fsencode(name), inode)

    def _fully_marked(self, node: Node, asking: Process) -> bool:
        """Whether living processes have removed all static entries of a directory; in a view, that
        they have begun to."""
        marked = self.world.marks.union(node.ino, asking)
        in_view = node.path or isinstance(node.entry, TagType)
        if marked and (in_view or all(c.entry.name in marked for c in self.tables.children(node))):
            return True
        return node.entry is not self.tables.root and self._files_removed(node.face, asking)

    async def _shows_nothing(self, node: Node, asking: Process) -> bool:
        """Whether it is a directory in a view that has nothing in it."""
        return bool(node.path) and not await self._view_rows(node, asking)

    @contextlib.contextmanager
    def _changing(self, directory: Node, name: str, caller: Caller) -> Iterator[None]:
        """Something in a view is made, removed or renamed: whether that is the caller's to do, and
        what `state` says when it fails."""
        view = self.tables.view(directory)
        with directory.face.container.telling_why(name):
            self._check_now(directory, caller)
            if view is not None:
                check_write(directory.face, view, caller)
            yield

    def _check_not_being_removed(self, container: Container, name: str) -> None:
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

    @waiting
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """FUSE_UNLINK: accepted, but only noted; see `tree.Marks`."""
        parent = await self.node(parent_inode)
        text = os.fsdecode(name)
        node = await self.find(parent, text, _caller(ctx))
        if isinstance(node.entry, Directory):
            raise IsADirectoryError(errno.EISDIR, "a directory", text)
        if parent.entry is self.faces:
            raise PermissionError(errno.EPERM, "not to be removed", text)
        self.world.marks.add(self.processes.of(ctx.pid), parent.ino, text)
        container = parent.face.container
        if parent.entry is self.tables.root and container.parent is not None:
            self._let_give_way(container, parent, self.processes.of(ctx.pid))

    def _let_give_way(self, container: Container, directory: Node, asking: Process) -> None:
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

    @waiting
    async def rename(
        self, old_parent: int, old: bytes, new_parent: int, new: bytes, flags: int, ctx: Any
    ) -> None:
        """FUSE_RENAME: give a container another name."""
        if flags & ~int(pyfuse3.RENAME_NOREPLACE):
            raise OSError(errno.EINVAL, "containers cannot change places", os.fsdecode(old))
        replayed = self.replayed()
        source, target = await self.node(old_parent), await self.node(new_parent)
        old_name, new_name = os.fsdecode(old), os.fsdecode(new)
        known = source.face.container.children
        if replayed and old_name not in known and new_name in known:
            # The daemon before this one did it, and did not get to say so.
            return
        if replayed and not await self._is_there(source, old_name, _caller(ctx)):
            # Likewise of what is in a view.
            await self.find(target, new_name, _caller(ctx))
            return
        node = await self.find(source, old_name, _caller(ctx))
        if isinstance(source.entry, Directory) and source.entry.rename is not None:
            if not isinstance(node.entry, Directory) or self.tables.child(source, old_name):
                raise PermissionError(errno.EPERM, "it has no other name", old_name)
            if await self._is_there(target, new_name, _caller(ctx)):
                raise OSError(errno.EEXIST, "the name is taken", new_name)
            if not isinstance(target.entry, Directory):
                raise NotADirectoryError(errno.ENOTDIR, "no directory", new_name)
            with (
                self._changing(source, old_name, _caller(ctx)),
                self._changing(target, new_name, _caller(ctx)),
            ):
                await source.entry.rename(
                    source.face, old_name, target.face, target.entry, new_name, _caller(ctx)
                )
            return
        if node.entry is not self.tables.root or target.entry is not self.tables.root:
            raise PermissionError(errno.EPERM, "only containers are renamed", old_name)
        if source.face.container is not target.face.container:
            # Not EXDEV: mv(1) would then copy and delete.
            raise PermissionError(errno.EPERM, "namespaces cannot be re-nested", old_name)
        if self.tables.reserved(new_name):
            raise OSError(errno.EEXIST, "the name is taken", new_name)
        self._check_not_being_removed(source.face.container, new_name)
        self._check_now(source, _caller(ctx))
        lifecycle.rename(source.face.container, old_name, new_name)
        self.forget_name(source, node.face.container, old_name)

    @waiting
    async def link(self, inode: int, new_parent: int, new: bytes, ctx: Any) -> EntryAttributes:
        """FUSE_LINK: enter a container."""
        source, target = await self.node(inode), await self.node(new_parent)
        entry = target.entry
        keyed = KEYED <= source.ino & NUMBER_MASK < SHOWN
        name = os.fsdecode(new)
        if not isinstance(entry, Directory) or entry.link is None or not keyed:
            raise PermissionError(errno.EPERM, "only processes are linked", name)
        self._check_now(target, _caller(ctx))
        await entry.link(target.face, name, source.face, source.key, _caller(ctx))
        attr = self.attributes(source)
        # There is no such name: what came of it is in the directory under its own.
        attr.entry_timeout = 0
        return attr

    @boundary
    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        """FUSE_CREATE: there are no files but the control files."""
        raise PermissionError(errno.EPERM, "no files are made here", os.fsdecode(name))

    @boundary
    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        """FUSE_MKNOD: likewise."""
        raise PermissionError(errno.EPERM, "no files are made here", os.fsdecode(name))

    @boundary
    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: Any) -> Any:
        """FUSE_SYMLINK: likewise."""
        raise PermissionError(errno.EPERM, "no files are made here", os.fsdecode(name))

    # --- files ---

    def _check_writable(self, node: Node) -> None:
        # Inside, root has CAP_DAC_OVERRIDE over files that are its own: the mode alone does not
        # stop it.
        if node.face.inner and PARENTS in node.entry.flags:
            raise PermissionError(errno.EACCES, "it is the parent's to change", node.entry.name)

    @waiting
    async def open(self, inode: int, flags: int, ctx: Any) -> FileInfo:
        """FUSE_OPEN."""
        node = await self.node(inode)
        self._check_now(node, _caller(ctx), ACCESS[flags & os.O_ACCMODE])
        token = self._new_token()
        opened = self._open(node, token, flags, _caller(ctx))
        if flags & os.O_TRUNC and isinstance(node.entry, Attribute) and node.entry.truncate:
            try:
                node.entry.truncate(node.face, _caller(ctx))
            except OSError:
                opened.release()
                raise
        self.open_files[token] = opened
        return FileInfo(fh=pyfuse3.FileHandleT(token), direct_io=True)

    def _own(self, node: Node, caller: Caller) -> Node:
        """What `procs/self` is to that caller."""
        pid = thread_group(caller.tid)
        if members.container_of(node.face.container, pid) is None:
            raise members.no_process("self")
        key = members.seen_pid(pid, members.level(node.face.viewpoint))
        return self.tables.of(node.face, node.entry, key)

    def _open(self, node: Node, token: int, flags: int, caller: Caller) -> OpenFile:
        own = node.ino & NUMBER_MASK == KEYED + SELF
        if own:
            node = self._own(node, caller)
        entry = node.entry
        if not isinstance(entry, Attribute):
            raise OSError(errno.EINVAL, "no file", entry.name)
        access = flags & os.O_ACCMODE
        if access != os.O_RDONLY:
            self._check_writable(node)
        if entry.stream is not None:
            return entry.stream(node.face, token, flags, False)
        # As kernfs_fop_open() has it: what no show or store is for cannot be opened for it, by root
        # neither.
        if (access != os.O_WRONLY and entry.show is None) or (
            access != os.O_RDONLY and entry.store is None and not entry.mode & 0o200
        ):
            raise OSError(errno.EINVAL, "not for that", entry.name)
        view = self.tables.view(node)
        # What has a path was found there a moment ago.
        if view is not None and not node.path and not lives(tag(node.face, view)):
            raise FileNotFoundError(errno.ENOENT, "the namespace is dead", entry.name)
        if own:
            # The next daemon has to know whose.
            self.world.opens.put(token, caller.uid, caller.gid, caller.tid)
        return Value(node, token, flags, caller, self)

    def _reopen(self, node: Node, token: int) -> OpenFile:
        """Make an open file of an earlier daemon again."""
        entry = node.entry
        assert isinstance(entry, Attribute)
        if entry.stream is not None:
            return entry.stream(node.face, token, 0, True)
        known = self.world.opens.get(token)
        # That of a file opened only to be read was not kept: it is nobody's to write.
        caller = Caller(known[2], known[0], known[1]) if known else Caller(0, NOBODY, NOBODY)
        if known and node.ino & NUMBER_MASK == KEYED + SELF:
            node = self._own(node, caller)
        value = Value(node, token, 0, caller, self)
        if known:
            value.generation = known[3]
        # What changed while there was no daemon is told, even if that was nothing.
        value.version = -1
        return value

    async def _opened(self, fh: int) -> OpenFile:
        """An open file; one that an earlier daemon opened is made again from the inode of the
        request."""
        inode = self.device.current()[1]
        found = self.open_files.get(fh)
        if found is None:
            try:
                node = await self.node(inode)
            except FileNotFoundError:
                raise OSError(errno.ENODEV, "the container is gone", str(fh)) from None
            found = self.open_files.get(fh) or self._reopen(node, fh)
            self.open_files[fh] = found
        return found

    @waiting
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """FUSE_READ."""
        unique, _, opcode, _ = self.device.current()
        opened = await self._opened(fh)
        if opcode == takeover.LSEEK:
            return takeover.sought(opened.seek(*takeover.seek(off)))
        return await opened.read(off, size, unique)

    @waiting
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """FUSE_WRITE."""
        unique, writer = self.request(), self.device.caller()[0]
        opened = await self._opened(fh)
        opened.writer = writer
        return await opened.write(off, buf, unique)

    @boundary
    async def release(self, fh: int) -> None:
        """FUSE_RELEASE."""
        found = self.open_files.pop(fh, None)
        if found is None:
            self.world.opens.drop(fh)
        else:
            found.release()

    @waiting
    async def poll(self, inode: int, fh: int, handle: Any, ctx: Any) -> int:
        """FUSE_POLL."""
        return (await self._opened(fh)).poll(None if handle is None else handle.notify)

    @boundary
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        """FUSE_STATFS: nothing is stored here."""
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = 0
        data.f_files = data.f_ffree = data.f_favail = 0
        data.f_namemax = 255
        return data

    async def flush(self, fh: int) -> None:
        """FUSE_FLUSH: ENOSYS, once, spares a request for each close(2)."""
        raise FUSEError(errno.ENOSYS)

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        """FUSE_GETXATTR: ENOSYS, once, likewise for each `ls -l`."""
        raise FUSEError(errno.ENOSYS)

    async def listxattr(self, inode: int, ctx: Any) -> Any:
        """FUSE_LISTXATTR: likewise."""
        raise FUSEError(errno.ENOSYS)

    @boundary
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        """FUSE_SETXATTR: the session program asks to enter.

        Not ENOSYS for all others: that would be the last request of this kind.
        """
        node = await self.node(inode)
        entry = node.entry
        if name != ENTER_ATTRIBUTE or not isinstance(entry, Directory) or entry.link is None:
            raise OSError(errno.EOPNOTSUPP, "no such attribute", entry.name)
        self._check_now(node, _caller(ctx))
        await enter_program(node.face, os.fsdecode(value), _caller(ctx))

    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        """FUSE_REMOVEXATTR: likewise."""
        raise FUSEError(errno.ENOSYS)

    async def fsync(self, fh: int, datasync: bool) -> None:
        """FUSE_FSYNC: likewise."""
        raise FUSEError(errno.ENOSYS)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """FUSE_FSYNCDIR: likewise."""
        raise FUSEError(errno.ENOSYS)


async def _forget_entry(directory: int, name: bytes, inode: int) -> None:
    """Have the kernel drop a name; in a thread, since it waits for the directory's lock."""
    await trio.to_thread.run_sync(_invalidate_entry, directory, name, inode, limiter=_forgetters)


def _invalidate_entry(directory: int, name: bytes, inode: int) -> None:
    # As deleted, so that inotify(7) tells; that is refused while the kernel knows of something in
    # it or has it mounted on.
    for deleted in (inode, 0):
        try:
            pyfuse3.invalidate_entry(
                pyfuse3.InodeT(directory), pyfuse3.FileNameT(name), pyfuse3.InodeT(deleted)
            )
            return
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno not in (errno.ENOTEMPTY, errno.EBUSY) or not deleted:
                raise


_forgetters = trio.CapacityLimiter(8)


def _caller(ctx: Any) -> Caller:
    return Caller(ctx.pid, ctx.uid, ctx.gid)


assert ROOT_NUMBER == pyfuse3.ROOT_INODE
