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
import stat
import time
from collections.abc import Callable, Coroutine, Iterator
from types import CoroutineType
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from nsfs import lifecycle, members, takeover
from nsfs.accounts import Account, Bound, account_of
from nsfs.attribute import (
    FILE_SIZE,
    Answer,
    Attribute,
    Caller,
    Directory,
    Entry,
    Link,
    OpenFile,
    then,
)
from nsfs.authority import check_mode, check_seen_once, mounts_of
from nsfs.container import Container, Face, Phase
from nsfs.entry import ENTER_ATTRIBUTE, enter_program, revoke
from nsfs.found import Found
from nsfs.nodes import Nodes
from nsfs.openfile import Listing, check_writable, open_file, reopen
from nsfs.rebuild import give
from nsfs.syscalls import forget_answers, keep_answer
from nsfs.tree import KEYED, NUMBER_MASK, ROOT_NUMBER, SELF, SHOWN, Node, ino
from nsfs.view import PROC, check_write, in_thread, life, tag
from nsfs.world import World

log = logging.getLogger(__name__)

TIMEOUT_S = 1.0
"""How long the kernel may believe an entry and its attributes; what changes before is
invalidated."""
FOREVER_S = 3600.0
"""The same for what never changes."""
CHANGED_S = 2 * TIMEOUT_S
"""For how long after a change of owners and modes it is asked again whether they allow a request:
an answer to the kernel that was under way at that moment may have told it the old ones."""
OTHERS = {errno.EMFILE: errno.ENFILE}
"""Errors that would say of the caller what is so of the daemon."""
FILES_MAX = 8192
"""Open files and directories of one account: each takes some kilobytes, and the place of those
whose position the next daemon has to know (`World.opens`)."""
MOUNTS_AT_ONCE = 1 << 16
"""Bytes of a mountinfo that are read in no time."""
MOUNTS_SIZE_MAX = 1 << 24
"""Bytes of one that is looked through at all."""
READS_MAX = 512
"""Reads of one account that may wait, of the 15,360 that may in all."""
ACCESS = {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK, os.O_RDWR: os.R_OK | os.W_OK}

T = TypeVar("T")
P = ParamSpec("P")
Method = Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]]


def boundary(method: Method[P, T]) -> Method[P, T]:
    """Turn whatever a handler raises into a FUSEError."""

    @functools.wraps(method)
    async def wrapper(self: Operations, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            found: Any = method(self, *args, **kwargs)
            result: T = await found if isinstance(found, CoroutineType) else found
            return result
        except FUSEError:
            raise
        except OSError as error:
            if error.errno is None:
                log.exception("%s failed", method.__name__)
            number = error.errno or errno.EIO
            raise FUSEError(OTHERS.get(number, number)) from error
        except Exception:
            log.exception("%s failed", method.__name__)
            raise FUSEError(errno.EIO) from None

    return wrapper  # type: ignore[return-value]


def answering(method: Callable[Concatenate[Operations, P], Answer[T]]) -> Method[P, T]:
    """A boundary for a handler that has its answer at once or has to wait for it.

    An INTERRUPT of its request cancels one that waits.  What is done at once is done before the
    kernel could send any, and spared the cancel scope, which costs as much as all the rest of it.
    """

    @functools.wraps(method)
    def begin(self: Operations, *args: P.args, **kwargs: P.kwargs) -> Any:
        found = method(self, *args, **kwargs)
        if isinstance(found, CoroutineType):
            # It has not begun, so this is its request.
            return self.interruptible(self.request(), found)
        return found

    return boundary(begin)  # type: ignore[arg-type]


def waiting(method: Method[P, T]) -> Method[P, T]:
    """A boundary for a handler that may wait, with the same."""
    return answering(method)


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
        self.nodes = Nodes(world, entries)
        self.tables, self.processes = self.nodes.tables, self.nodes.processes
        self.removal = self.nodes.removal
        world.changed = self.changed
        self.running: dict[int, trio.CancelScope] = {}
        self.open_files: dict[int, OpenFile] = {}
        self.listings: dict[int, Listing] = {}
        self.accounts: dict[int, Account] = {}
        """On whose account an open file or directory is; those of an earlier daemon are on none."""
        self.files = Bound(FILES_MAX, errno.ENFILE, "too many open files")
        self.reads = Bound(READS_MAX, errno.EBUSY, "too many reads wait")
        self._token: int = device.generation << 40
        self.changed_at = 0.0
        """When owners or modes last changed (CLOCK_MONOTONIC)."""

    # --- requests ---

    async def interruptible(self, unique: int, answer: Coroutine[Any, Any, T]) -> T:
        """Wait for the answer to a request, unless its caller no longer does: EINTR."""
        scope = self.running[unique] = trio.CancelScope()
        try:
            with scope:
                return await answer
        finally:
            del self.running[unique]
        # Only the cancellation leads here.
        raise FUSEError(errno.EINTR)

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

    async def _addressed(self, inode: int) -> Node:
        """The node of an inode that the kernel has at hand; ESTALE when it is no more.

        Not ENOENT: on ESTALE the kernel looks the names of a path up once more.  Those that were
        removed by another face it would believe for a second otherwise: rm(1) would be told first
        that there is no such directory, and then by unlink(2) that it is one.
        """
        try:
            return await self.nodes.node(inode)
        except FileNotFoundError as error:
            raise _stale(error) from None

    def _new_token(self) -> int:
        self._token += 1
        return self._token

    def _charge(self, face: Face, uid: int) -> int:
        """The token of a file or directory that is being opened, which is on somebody's account;
        ENFILE when that has all that it may have."""
        account = account_of(face, uid)
        self.files.take(account)
        token = self._new_token()
        self.accounts[token] = account
        return token

    def _discharge(self, token: int) -> None:
        account = self.accounts.pop(token, None)
        if account is not None:
            self.files.give_back(account)

    # --- nodes ---

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
            if entry is self.nodes.faces:
                uid = gid = 0
            view = self.tables.view(node)
            if entry is self.nodes.gone:
                attr.entry_timeout = attr.attr_timeout = 0
            deep = len(node.path) > 2 and not isinstance(entry, Link)
            if view is not None and entry is not view and not deep:
                # Looked up each time, so that it is gone as soon as its namespace is, or it itself.
                attr.entry_timeout = 0
        if container.is_found:
            # Nothing tells of its end.
            attr.entry_timeout = attr.attr_timeout = 0
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

    def _removed_attributes(self, inode: int) -> EntryAttributes:
        """What stat(2) says of a file of a container that was removed, to who still has it open.

        It must say something: before the kernel looks for a name in a directory, if only to find
        that there is none, it asks who may.
        """
        entry = self.tables.entry(inode & NUMBER_MASK)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "it is gone", str(inode))
        attr = EntryAttributes()
        attr.st_ino = pyfuse3.InodeT(inode)
        attr.generation = self.world.generation(inode)
        attr.entry_timeout, attr.attr_timeout = 0, TIMEOUT_S
        permissions = 0o666 if isinstance(entry, Attribute) else 0o777
        attr.st_mode = pyfuse3.ModeT(stat.S_IFMT(entry.mode) | permissions)
        attr.st_nlink = attr.st_size = 0
        return attr

    def _process_owner(self, node: Node) -> tuple[int, int]:
        try:
            return members.owner(members.host_pid(node.face, node.key))
        except OSError:
            owner: tuple[int, int] = node.face.owner(None)
            return owner

    @answering
    def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> Answer[EntryAttributes]:
        """FUSE_LOOKUP."""
        found = self.nodes.child(parent_inode, os.fsdecode(name), _caller(ctx))
        if isinstance(found, Node):
            self._keep_answer(found)
        return then(found, self._told)

    def _told(self, node: Node) -> EntryAttributes:
        if node.path and isinstance(node.entry, Attribute):
            self.nodes.looked_up(node)
        return self.attributes(node)

    def _keep_answer(self, node: Node) -> None:
        """Have the interposer answer who looks up the same in a view, as long as it is there."""
        view = self.tables.view(node)
        if view is None or node.entry is view or len(node.path) > 2:
            return
        if node.face.container.is_found:
            # Its processes may leave it and live on.
            return
        pid = life(tag(node.face, view))
        needed = (-1, "") if node.contents is None else node.contents.depends_on(node.path[1:])
        if pid is not None and needed is not None:
            keep_answer(self.request(), pid, *needed)

    async def forget(self, inode_list: Any) -> None:
        """FUSE_FORGET: nodes are not kept, so there is nothing to forget."""

    @waiting
    async def getattr(self, inode: int, ctx: Any) -> EntryAttributes:
        """FUSE_GETATTR."""
        try:
            node = await self.nodes.node(inode)
        except FileNotFoundError:
            return self._removed_attributes(inode)
        return self.attributes(node)

    @waiting
    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any
    ) -> EntryAttributes:
        """FUSE_SETATTR: chmod and chown change authority, truncation is the file's own; times are
        accepted and nothing comes of them."""
        node = await self._addressed(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            await self._change_owner(node, attr, fields)
        if fields.update_size and isinstance(node.entry, Attribute):
            check_writable(node)
            if node.entry.truncate is not None:
                node.entry.truncate(node.face, _caller(ctx))
        return self.attributes(node)

    async def _change_owner(self, node: Node, attr: Any, fields: Any) -> None:
        face, container = node.face, node.face.container
        number = node.ino & NUMBER_MASK
        fixed = face.inner or container.is_found
        if fixed or number >= KEYED or node.entry is self.nodes.faces:
            raise PermissionError(errno.EPERM, "its owner is not to be changed", node.entry.name)
        # What is no permission (set-user-ID, sticky) means nothing here.
        mode = attr.st_mode & 0o777 if fields.update_mode else -1
        uid = attr.st_uid if fields.update_uid else -1
        gid = attr.st_gid if fields.update_gid else -1
        if node.entry is self.tables.root:
            with container.telling_why("chown"):
                await give(container, mode, uid, gid)
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
        forget_answers()
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
        forget_answers()
        for face in self.world.known_faces(container):
            for _, entry in self.tables.paths():
                if face.has(entry):
                    self._invalidate_inode(self.tables.of(face, entry).ino)
            self._invalidate_inode(self.tables.of(face, self.tables.root).ino)
            for number in self.nodes.paths.known(face.number):
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
        node = await self._addressed(inode)
        if not isinstance(node.entry, Link):
            raise OSError(errno.EINVAL, "no link", node.entry.name)
        target = node.entry.target(node.face)
        return os.fsencode(target if isinstance(target, str) else await target)

    # --- directories ---

    @waiting
    async def opendir(self, inode: int, ctx: Any) -> int:
        """FUSE_OPENDIR."""
        node = await self._addressed(inode)
        token = self._charge(node.face, ctx.uid)
        self.listings[token] = Listing(node, self.processes.of(ctx.pid))
        return token

    @waiting
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """FUSE_READDIRPLUS."""
        inode = self.device.current()[1]
        listing = self.listings.get(fh)
        if listing is None:
            # Opened with an earlier daemon.
            process = self.processes.of(self.device.caller()[0])
            listing = self.listings[fh] = Listing(await self.nodes.node(inode), process)
        for cookie, name, node in await listing.rows_after(start_id, self.nodes):
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self.attributes(node), cookie):
                break

    @boundary
    async def releasedir(self, fh: int) -> None:
        """FUSE_RELEASEDIR."""
        self._discharge(fh)
        listing = self.listings.pop(fh, None)
        if listing is not None:
            listing.release()

    @waiting
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> EntryAttributes:
        """FUSE_MKDIR: make a container."""
        unique = self.request()
        parent = await self.nodes.node(parent_inode)
        text = os.fsdecode(name)
        if isinstance(parent.entry, Directory) and parent.entry.make is not None:
            # What the daemon before this one made is there by now.
            if not (self.replayed() and await self.nodes.is_there(parent, text, _caller(ctx))):
                with self._changing(parent, text, _caller(ctx)):
                    await parent.entry.make(parent.face, text, _caller(ctx))
            return self.attributes(await self.nodes.find(parent, text, _caller(ctx)))
        if parent.entry is not self.tables.root or parent.face.container.is_found:
            raise PermissionError(
                errno.EPERM, "containers are made in containers that nsfs made", parent.entry.name
            )
        if self.tables.reserved(text):
            raise OSError(errno.EEXIST, "the name is taken", text)
        self.removal.check_not_being_removed(parent.face, text)
        self._check_now(parent, _caller(ctx))
        if not self.world.primed:
            # Whoever is so early has not waited for the mount to be ready.
            raise OSError(errno.EAGAIN, "nothing can be made before all is ready", text)
        above: Container = parent.face.container
        with above.telling_why(text):
            made = await lifecycle.make(
                above, text, _caller(ctx), request=unique, mode=mode & 0o777
            )
        return self.attributes(self.nodes.directory(made, parent.face.viewpoint))

    @waiting
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """FUSE_RMDIR: remove an idle container, or one whose entries have all been removed, with
        all in it."""
        replayed = self.replayed()
        parent = await self.nodes.node(parent_inode)
        text = os.fsdecode(name)
        try:
            node = await self.nodes.find(parent, text, _caller(ctx))
        except FileNotFoundError:
            if replayed:
                # The daemon before this one did it, and did not get to say so.
                return
            raise
        if node.entry is not self.tables.root:
            if not isinstance(node.entry, Directory):
                raise NotADirectoryError(errno.ENOTDIR, "no directory", text)
            asking = self.processes.of(ctx.pid)
            marked = self.removal.fully_marked(node, asking)
            emptied = marked or await self.nodes.shows_nothing(node, asking)
            if not emptied and isinstance(parent.entry, Directory) and parent.entry.remove:
                with self._changing(parent, text, _caller(ctx)):
                    await parent.entry.remove(parent.face, text, _caller(ctx))
                return
            if node.entry.member is None and not emptied:
                raise OSError(errno.ENOTEMPTY, "only rm -rf of the container removes it", text)
            self.world.marks.add(self.processes.of(ctx.pid), parent.ino, text)
            self.world.bury(node.ino)
            forget_answers()
            return
        self._check_now(parent, _caller(ctx))
        container = node.face.container
        above = parent.face.container
        if self.removal.under_way(above, parent.face.viewpoint, further_out=True):
            raise OSError(errno.EBUSY, "what it is in is being removed from outside", text)
        # A moment, when it is being rebuilt.
        await container.settled.wait()
        with container.telling_why("rmdir"):
            mounts = await self._mounts(ctx.pid, container)
            if container.phase is Phase.GONE:
                raise FileNotFoundError(errno.ENOENT, "no such container", text)
            check_seen_once(mounts, self.world.device_numbers, node.face.viewpoint.number)
            if isinstance(container, Found):
                container.check_may_be_killed()
            if self.removal.fully_marked(node, self.processes.of(ctx.pid)):
                await lifecycle.end_any(container)
            else:
                lifecycle.remove_idle(container)
        self.forget_name(parent, container, text)

    async def _mounts(self, tid: int, container: Container) -> bytes:
        """mountinfo of a caller, read by a thread where it is long."""
        try:
            return mounts_of(tid, MOUNTS_AT_ONCE)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
        return await in_thread(lambda: mounts_of(tid, MOUNTS_SIZE_MAX), PROC, container)

    def forget_name(self, parent: Node, container: Container, name: str) -> None:
        """Have the kernel drop a container's name wherever else it is seen."""
        for face in self.world.known_faces(parent.face.container):
            if face is not parent.face:
                directory = self.tables.of(face, self.tables.root).ino
                inode = self.nodes.directory(container, face.viewpoint).ino
                self.world.start(_forget_entry, directory, os.fsencode(name), inode)

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

    @waiting
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """FUSE_UNLINK: accepted, but only noted; see `tree.Marks`."""
        parent = await self.nodes.node(parent_inode)
        text = os.fsdecode(name)
        node = await self.nodes.find(parent, text, _caller(ctx))
        if isinstance(node.entry, Directory):
            raise IsADirectoryError(errno.EISDIR, "a directory", text)
        if parent.entry is self.nodes.faces:
            raise PermissionError(errno.EPERM, "not to be removed", text)
        self.world.marks.add(self.processes.of(ctx.pid), parent.ino, text)
        container = parent.face.container
        if parent.entry is self.tables.root and container.parent is not None:
            self.removal.let_give_way(container, parent, self.processes.of(ctx.pid))

    @waiting
    async def rename(
        self, old_parent: int, old: bytes, new_parent: int, new: bytes, flags: int, ctx: Any
    ) -> None:
        """FUSE_RENAME: give a container another name."""
        if flags & ~int(pyfuse3.RENAME_NOREPLACE):
            raise OSError(errno.EINVAL, "containers cannot change places", os.fsdecode(old))
        replayed = self.replayed()
        source, target = await self.nodes.node(old_parent), await self.nodes.node(new_parent)
        old_name, new_name = os.fsdecode(old), os.fsdecode(new)
        known = {**source.face.container.children, **source.face.container.found}
        if replayed and old_name not in known and new_name in known:
            # The daemon before this one did it, and did not get to say so.
            return
        if replayed and not await self.nodes.is_there(source, old_name, _caller(ctx)):
            # Likewise of what is in a view.
            await self.nodes.find(target, new_name, _caller(ctx))
            return
        node = await self.nodes.find(source, old_name, _caller(ctx))
        if isinstance(source.entry, Directory) and source.entry.rename is not None:
            if not isinstance(node.entry, Directory) or self.tables.child(source, old_name):
                raise PermissionError(errno.EPERM, "it has no other name", old_name)
            if await self.nodes.is_there(target, new_name, _caller(ctx)):
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
        self.removal.check_not_being_removed(source.face, new_name)
        self._check_now(source, _caller(ctx))
        lifecycle.rename(source.face.container, old_name, new_name)
        self.forget_name(source, node.face.container, old_name)

    @waiting
    async def link(self, inode: int, new_parent: int, new: bytes, ctx: Any) -> EntryAttributes:
        """FUSE_LINK: enter a container."""
        source, target = await self.nodes.node(inode), await self.nodes.node(new_parent)
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

    @answering
    def open(self, inode: int, flags: int, ctx: Any) -> Answer[FileInfo]:
        """FUSE_OPEN."""
        caller = _caller(ctx)
        try:
            found = self.nodes.to_open(inode)
        except FileNotFoundError as error:
            raise _stale(error) from None
        if isinstance(found, Node):
            return self._open(found, flags, caller)
        return self._open_when_found(found, flags, caller)

    async def _open_when_found(
        self, found: Coroutine[Any, Any, Node], flags: int, caller: Caller
    ) -> FileInfo:
        try:
            node = await found
        except FileNotFoundError as error:
            raise _stale(error) from None
        return self._open(node, flags, caller)

    def _open(self, node: Node, flags: int, caller: Caller) -> FileInfo:
        self._check_now(node, caller, ACCESS[flags & os.O_ACCMODE])
        token = self._charge(node.face, caller.uid)
        try:
            opened = open_file(self.nodes, node, token, flags, caller)
            if flags & os.O_TRUNC and isinstance(node.entry, Attribute) and node.entry.truncate:
                try:
                    node.entry.truncate(node.face, caller)
                except OSError:
                    opened.release()
                    raise
        except BaseException:
            self._discharge(token)
            raise
        self.open_files[token] = opened
        return FileInfo(fh=pyfuse3.FileHandleT(token), direct_io=True)

    async def _opened(self, fh: int) -> OpenFile:
        """An open file; one that an earlier daemon opened is made again from the inode of the
        request."""
        inode = self.device.current()[1]
        found = self.open_files.get(fh)
        if found is None:
            try:
                node = await self.nodes.node(inode)
            except FileNotFoundError:
                raise OSError(errno.ENODEV, "the container is gone", str(fh)) from None
            found = self.open_files.get(fh) or reopen(self.nodes, node, fh)
            self.open_files[fh] = found
        return found

    @answering
    def read(self, fh: int, off: int, size: int) -> Answer[bytes]:
        """FUSE_READ."""
        unique, _, opcode, _ = self.device.current()
        uid = self.device.caller()[1]
        fills_page = self.device.fills_page()

        def read(opened: OpenFile) -> Answer[bytes]:
            if fills_page and opened.waits:
                raise OSError(
                    errno.EINVAL, "no page of it is waited for", opened.face.container.name
                )
            if opcode == takeover.LSEEK:
                return takeover.sought(opened.seek(*takeover.seek(off)))
            found = opened.read(off, size, unique)
            if isinstance(found, CoroutineType):
                return self._when_read(account_of(opened.face, uid), found)
            return found

        return then(self.open_files.get(fh) or self._opened(fh), read)

    async def _when_read(self, account: Account, found: Coroutine[Any, Any, bytes]) -> bytes:
        try:
            self.reads.take(account)
        except OSError:
            found.close()
            raise
        try:
            return await found
        finally:
            self.reads.give_back(account)

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
        self._discharge(fh)
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
        node = await self._addressed(inode)
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


def _stale(error: FileNotFoundError) -> OSError:
    return OSError(errno.ESTALE, error.strerror, error.filename)


def _caller(ctx: Any) -> Caller:
    return Caller(ctx.pid, ctx.uid, ctx.gid)


assert ROOT_NUMBER == pyfuse3.ROOT_INODE
