"""Client of the spawner, which makes containers; that of their inits is `init`.

Messages are those of csrc/protocol.h.  Errors are OSError with the errno that the system call gave
and, as strerror, the words for the step that failed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trio

from nsfs.init import Init
from nsfs.protocol import failure, rights

LIBEXEC = Path(__file__).parent / "libexec"

CLONE_NEW = {
    "time": 0x00000080,
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
"""The types of namespace and their clone flags (linux/sched.h)."""

_REQUEST = struct.Struct("=QIIIIiiIIIIIIQII")
_EXTENT = struct.Struct("=III")
_REPLY = struct.Struct("=QiIiI128s")
_MESSAGE_MAX = 65536
_SOCKET_FD = 3
_BINDS_MAX = 64

# enum spawner_op
_MAKE, _HOSTNAME, _SET_HOSTNAME, _TREE, _PIN, _BIND, _UNBIND, _OUTPUT, _FEATURES = range(1, 10)
_SYSCTL, _IDMAP_TREE, _OPEN_TTY, _SHOW, _LOG = 10, 11, 12, 13, 14
_ASIDE = {_TREE, _PIN, _BIND, _UNBIND, _SYSCTL, _IDMAP_TREE, _OPEN_TTY, _SHOW}
"""What may take as long as others' filesystems and processes like, up to the spawner's deadline."""
_ASIDE_MAX = 32
"""How many of these may be under way, of the spawner's 128 jobs (JOBS_MAX in spawner.c)."""
_MADE_ASIDE_MAX = 64
"""How many containers may be being made that others have a hand in (others_have_a_hand() in
spawner.c): so all other ones can be made whatever these wait for."""
_MADE_IN_ONE_MAX = 4
"""How many of these in one container at the top: whoever is root there can stop what makes them."""
_SYSCTLS_MAX = 4
"""How many may be under way on one account: whoever is root there can stop the child."""

# enum spawner_flag
_ROOTFS, _IDMAP, _READ_ONLY, _CLOCKS, _SLAVE, _SYSLOG = 1, 2, 4, 8, 16, 32
SYSLOG_FD = 7
"""INIT_SYSLOG_FD."""

FEATURES = {1: "idmapped_root", 2: "remapped_root"}
"""What the spawner found out by trying: whether the host's root filesystem can be shown without
IDs, and whether a root that has an idmap can (then no socket in it can be connected to)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a container is made of."""

    face: int
    """The number of its inner face, `.f/FACE` of the mount."""
    hostname: str
    unshare: frozenset[str]
    """The types of namespace that are its own; the others are its parent's."""
    parent_pid: int | None
    """The host's PID of the parent's init; None when the parent is the host."""
    owner_uid: int
    owner_gid: int
    """Host IDs; they own the user namespace, so they may join."""
    uid_map: tuple[tuple[int, int, int], ...]
    gid_map: tuple[tuple[int, int, int], ...]
    """(inside, the parent's ID, count)."""
    root_uid: int
    """The host's ID of the container's root."""
    cgroup: str
    """Its v2 directory, in which are `init` and `payload`."""
    v1: tuple[str, ...]
    """v1 directories to join."""
    rootfs_fd: int | None
    """A detached tree to be the root, or None for the parent's, read-only."""
    idmap_rootfs: bool
    binds: tuple[tuple[str, int, bool], ...]
    """(target, detached tree, read-only)."""
    listen_fd: int
    """Where the init listens: a SOCK_SEQPACKET socket."""
    filter: bool = True
    """Whether the system-call denylist is installed."""
    joins: tuple[tuple[int | str, str], ...] = ()
    """(process, type): whose namespace is joined instead of the parent's, by the host's PID."""
    slave: bool = False
    """Whether what the host mounts later in the original of a tree is seen in it."""
    clocks: str = ""
    """What is written to the time namespace's timens_offsets (time_namespaces(7)), if anything."""
    syslog: bool = False
    """Whether its calls of syslog(2) come to a listener, the init's descriptor `SYSLOG_FD`; else it
    is denied."""
    top: int = 0
    """The number of the container at the top that it is in, or is."""
    root_pid: int | None = None
    """Whose root filesystem is shown where there is no rootfs_fd: the host's PID of the init of the
    nearest container above that was given one; None for the parent's or the host's."""


class _Waiter:
    """A request whose reply is to come; without data when none came."""

    __slots__ = ("data", "fd", "told")

    def __init__(self) -> None:
        self.told = trio.Event()
        self.data = b""
        self.fd: int | None = None


class Spawner:
    """The spawner process.  Any number of requests may be under way.

    A request that is cancelled may be carried out all the same.
    """

    def __init__(self, nursery: trio.Nursery, tree: str, libexec: Path, no_filter: bool) -> None:
        self.died = trio.Event()
        """Set when the process is gone; every request then raises BrokenPipeError."""
        self._nursery, self._tree, self._libexec = nursery, tree, libexec
        self._filter = not no_filter
        self._other: Spawner | None = None
        self._other_lock = trio.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Neither of the interposer nor of anything else of our environment shall it know.
            self.pid = os.posix_spawn(
                libexec / "nsfs-spawner",
                ["nsfs-spawner", "--tree", tree, *(["--no-filter"] if no_filter else [])],
                {},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), _SOCKET_FD)],
            )
        self._pid_fd = os.pidfd_open(self.pid)
        self._plain, self._socket = ours, trio.socket.from_stdlib_socket(ours)
        self._send_lock = trio.Lock()
        self._last_id = 0
        self._waiting: dict[int, _Waiter] = {}
        self._asides = trio.Semaphore(_ASIDE_MAX)
        self._under_way: dict[int, tuple[int, int]] = {}
        """What may take long, whether somebody waits for it or not: operation, and for whom it is
        counted, by request."""
        self._one_less = trio.lowlevel.ParkingLot()

    # --- the process ---

    @classmethod
    async def start(
        cls, nursery: trio.Nursery, tree: str, libexec: Path = LIBEXEC, *, no_filter: bool = False
    ) -> Self:
        """Start it; `tree` is where the filesystem is mounted, of which nothing is read.

        Returns when it is ready to make containers.  `aclose` ends it, as does cancelling the
        nursery.
        """
        self = cls(nursery, tree, libexec, no_filter)
        nursery.start_soon(self._receive)
        await self.features()
        return self

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, tree: str, libexec: Path = LIBEXEC) -> AsyncIterator[Self]:
        """A spawner for the time of an `async with`."""
        async with trio.open_nursery() as nursery:
            spawner = await cls.start(nursery, tree, libexec)
            try:
                yield spawner
            finally:
                await spawner.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the process and see it gone; containers go on."""
        if self._other is not None:
            await self._other.aclose()
        if self.died.is_set():
            return
        # Not close(): the task that receives is to see the end.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with trio.CancelScope(shield=True):
            await self.died.wait()

    async def _unfiltered(self) -> Spawner:
        """The one for containers without the denylist: it has none that they could inherit."""
        async with self._other_lock:
            if self._other is None or self._other.died.is_set():
                self._other = await Spawner.start(
                    self._nursery, self._tree, self._libexec, no_filter=True
                )
            return self._other

    async def _receive(self) -> None:
        try:
            while True:
                try:
                    data, control, _, _ = await self._socket.recvmsg(
                        _REPLY.size, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
                    )
                except ConnectionError:
                    return
                if len(data) != _REPLY.size:
                    return
                fd = None
                for level, kind, payload in control:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        (fd,) = struct.unpack("i", payload)
                number = int.from_bytes(data[:8], "little")
                self._has_ended(number)
                waiter = self._waiting.get(number)
                if waiter is not None:
                    waiter.data, waiter.fd = data, fd
                    waiter.told.set()
                elif fd is not None:
                    os.close(fd)
        finally:
            self._socket.close()
            for waiter in self._waiting.values():
                waiter.told.set()
            with trio.CancelScope(shield=True):
                await trio.lowlevel.wait_readable(self._pid_fd)
            os.waitpid(self.pid, 0)  # noqa: ASYNC222 - it has ended
            os.close(self._pid_fd)
            self.died.set()

    async def _call(
        self,
        op: int,
        *,
        flags: int = 0,
        unshare: int = 0,
        face: int = 0,
        pid: int = 0,
        target_pid: int = 0,
        owner: tuple[int, int] = (0, 0),
        maps: tuple[Sequence[tuple[int, int, int]], Sequence[tuple[int, int, int]]] = ((), ()),
        v1_groups: int = 0,
        binds: int = 0,
        read_only: int = 0,
        strings: Sequence[str] = (),
        fds: Sequence[int] = (),
        joins: int = 0,
        account: int = 0,
        top: int | None = None,
    ) -> tuple[int, int, str, int | None]:
        """One request; returns pid, value, text and descriptor of the reply.

        `top` is of what is made aside.
        """
        self._last_id += 1
        number = self._last_id
        message = b"".join(
            (
                _REQUEST.pack(
                    number,
                    op,
                    flags,
                    unshare,
                    face,
                    pid,
                    target_pid,
                    *owner,
                    len(maps[0]),
                    len(maps[1]),
                    v1_groups,
                    binds,
                    read_only,
                    len(strings),
                    joins,
                ),
                *(_EXTENT.pack(*extent) for extents in maps for extent in extents),
                *(os.fsencode(string) + b"\0" for string in strings),
            )
        )
        if any("\0" in string for string in strings):
            raise OSError(errno.EINVAL, "a NUL in a string")
        if len(message) >= _MESSAGE_MAX:
            raise OSError(errno.E2BIG, "the request is too long")
        if op in _ASIDE:
            await self._begin(number, op, account)
        elif top is not None:
            await self._begin_to_make(number, top)
        waiter = self._waiting[number] = _Waiter()
        sent = False
        try:
            if self._socket.fileno() >= 0:
                await self._send(message, fds)
                sent = True
                await waiter.told.wait()
        except (trio.ClosedResourceError, ConnectionError):
            waiter.data = b""
        except BaseException:
            if waiter.fd is not None:
                os.close(waiter.fd)
            raise
        finally:
            del self._waiting[number]
            if not sent:
                self._has_ended(number)
        data, fd = waiter.data, waiter.fd
        if not data:
            raise BrokenPipeError(errno.EPIPE, "the spawner has died")
        _, error, step, pid, value, text = _REPLY.unpack(data)
        if error:
            if fd is not None:
                os.close(fd)
            raise failure(error, step)
        return pid, value, os.fsdecode(text.rstrip(b"\0")), fd

    async def _begin(self, number: int, op: int, account: int) -> None:
        """Wait for one's turn with what may take long; EAGAIN when too many sysctls hang there."""
        if op == _SYSCTL and list(self._under_way.values()).count((op, account)) >= _SYSCTLS_MAX:
            raise OSError(errno.EAGAIN, "others wait for such a namespace", str(account))
        await self._asides.acquire()
        self._under_way[number] = op, account

    async def _begin_to_make(self, number: int, top: int) -> None:
        """Wait for one's turn with a container that is made aside."""
        while True:
            made = [whose for op, whose in self._under_way.values() if op == _MAKE]
            if len(made) < _MADE_ASIDE_MAX and made.count(top) < _MADE_IN_ONE_MAX:
                break
            await self._one_less.park()
        self._under_way[number] = _MAKE, top

    def _has_ended(self, number: int) -> None:
        op, _ = self._under_way.pop(number, (0, 0))
        if op == _MAKE:
            self._one_less.unpark_all()
        elif op:
            self._asides.release()

    async def _send(self, message: bytes, fds: Sequence[int]) -> None:
        # At once where there is room, as there always is but in a storm: trio would first see what
        # else is to be done.  A packet is whole, and in what order they come is all the same.
        try:
            self._plain.sendmsg([message], rights(fds))
        except BlockingIOError:
            async with self._send_lock:
                await self._socket.sendmsg([message], rights(fds))

    # --- containers ---

    async def make(self, recipe: Recipe) -> int:
        """Make a container; returns the host's PID of its init, which is ready.

        The cgroup directories must be there, `payload` delegated to the container's root, and the
        cgroup.procs of the one above it too.  On an error nothing is left behind, but after
        ETIMEDOUT there may be in these groups.
        """
        if not recipe.filter and self._filter:
            return await (await self._unfiltered()).make(recipe)
        flags = (
            (_ROOTFS if recipe.rootfs_fd is not None else 0)
            | (_IDMAP if recipe.idmap_rootfs and "user" in recipe.unshare else 0)
            | (_SYSLOG if recipe.syslog else 0)
        )
        if recipe.clocks and "time" in recipe.unshare:
            flags |= _CLOCKS
        if recipe.slave:
            flags |= _SLAVE
        aside = (
            recipe.parent_pid is not None
            or recipe.rootfs_fd is not None
            or bool(recipe.joins or recipe.binds)
            or "mnt" not in recipe.unshare
        )
        if len(recipe.binds) > _BINDS_MAX:
            raise OSError(errno.E2BIG, f"more than {_BINDS_MAX} binds")
        with contextlib.ExitStack() as stack:

            def opened(path: str, how: int) -> int:
                fd = os.open(path, how | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                return fd

            fds = [
                recipe.listen_fd,
                opened(f"{recipe.cgroup}/init", os.O_PATH | os.O_DIRECTORY),
                opened(f"{recipe.cgroup}/payload", os.O_PATH | os.O_DIRECTORY),
                *(opened(f"{path}/tasks", os.O_WRONLY) for path in recipe.v1),
                *([] if recipe.rootfs_fd is None else [recipe.rootfs_fd]),
                *(fd for _, fd, _ in recipe.binds),
                *(opened(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for pid, kind in recipe.joins),
            ]
            pid, _, _, _ = await self._call(
                _MAKE,
                flags=flags,
                unshare=sum(CLONE_NEW[name] for name in recipe.unshare),
                face=recipe.face,
                pid=recipe.parent_pid or 0,
                target_pid=recipe.root_pid or 0,
                owner=_owner(recipe),
                maps=(recipe.uid_map, recipe.gid_map) if "user" in recipe.unshare else ((), ()),
                v1_groups=len(recipe.v1),
                binds=len(recipe.binds),
                read_only=sum(1 << n for n, (_, _, ro) in enumerate(recipe.binds) if ro),
                strings=(
                    recipe.hostname,
                    *(target for target, _, _ in recipe.binds),
                    *([recipe.clocks] if flags & _CLOCKS else []),
                ),
                fds=fds,
                joins=len(recipe.joins),
                top=recipe.top if aside else None,
            )
        return pid

    async def execute(
        self, face: int, socket_path: str, argv: Sequence[str], env: Sequence[str]
    ) -> int:
        """Start a command in a container, in `/`, its output going to the container's `output`.

        `env` is of the form NAME=VALUE.  Returns the host's PID; a command that cannot be executed
        is an error.
        """
        output_fd = await self.output(face)
        try:
            null_fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            try:
                command = await Init(socket_path).execute(
                    argv, env, (null_fd, output_fd, output_fd), keep_status=False
                )
            finally:
                os.close(null_fd)
        finally:
            os.close(output_fd)
        return command.pid

    async def output(self, face: int) -> int:
        """`.f/FACE.output` of the mount, open for appending: a new descriptor."""
        return _fd(await self._call(_OUTPUT, face=face))

    async def log(self, face: int, name: str) -> int:
        """A detached mount of `.f/FACE.NAME`, which is `kmsg` or `pkmsg`: a new descriptor."""
        return _fd(await self._call(_LOG, face=face, strings=(name,)))

    # --- acting in others' namespaces ---

    async def hostname(self, pid: int) -> str:
        """The hostname in the UTS namespace of a process."""
        return (await self._call(_HOSTNAME, pid=pid))[2]

    async def set_hostname(self, pid: int, name: str) -> None:
        """Set it, as sethostname(2) would: EINVAL beyond 64 bytes."""
        await self._call(_SET_HOSTNAME, pid=pid, strings=(name,))

    async def sysctl(self, pid: int, kinds: tuple[str, ...], path: str, account: int = 0) -> bytes:
        """What is read in a file below /proc/sys from a process's namespaces of some types.

        Those are net, ipc and pid.  `account` is who may have _SYSCTLS_MAX under way.
        """
        types = sum(CLONE_NEW[kind] for kind in kinds)
        fd = _fd(
            await self._call(_SYSCTL, pid=pid, unshare=types, strings=(path,), account=account)
        )
        try:
            return os.read(fd, 4096)
        finally:
            os.close(fd)

    async def set_sysctl(
        self, pid: int, kinds: tuple[str, ...], path: str, value: str, account: int = 0
    ) -> None:
        """Write it there, as the root of the process's user namespace."""
        types = sum(CLONE_NEW[kind] for kind in kinds)
        await self._call(_SYSCTL, pid=pid, unshare=types, strings=(path, value), account=account)

    async def tree(self, pid: int, path: str, uid: int = 0, gid: int = 0, seen_by: int = 0) -> int:
        """A detached clone of the tree at a path, as process `pid` sees it (0: the host).

        open_tree(2) with OPEN_TREE_CLONE, not recursive; a new descriptor.  EXDEV when thread
        `seen_by` sees something else there, or the same mounted with other flags.
        """
        return _fd(
            await self._call(_TREE, pid=pid, target_pid=seen_by, owner=(uid, gid), strings=(path,))
        )

    async def idmap(self, tree_fd: int, table: Sequence[tuple[int, int, int]]) -> None:
        """Idmap a detached tree: lines of (ID on disk, the host's ID, count).

        EINVAL where the filesystem cannot, EPERM where it is idmapped and the kernel cannot replace
        that.
        """
        await self._call(_IDMAP_TREE, maps=(table, table), fds=(tree_fd,))

    async def terminal(self, pid: int, path: str, uid: int, gid: int) -> int:
        """A terminal for writing, non-blocking: opened by its path as process `pid` sees it (0: the
        host), and with the rights of that user and group.  A new descriptor; ENOTTY."""
        return _fd(await self._call(_OPEN_TTY, pid=pid, owner=(uid, gid), strings=(path,)))

    async def namespace(self, pid: int, kind: str) -> int:
        """A detached mount of a namespace of a process, which it holds open: a new descriptor."""
        return _fd(await self._call(_PIN, pid=pid, strings=(kind,)))

    async def pin(self, pid: int, kind: str, viewer_pid: int, path: str) -> None:
        """Bind a namespace of a process at an absolute path in the mount namespace of another.

        0 is the host.  The file is made.
        """
        await self._call(_PIN, pid=pid, target_pid=viewer_pid, strings=(kind, path))

    async def bind(
        self, pid: int, target: str, tree_fd: int, read_only: bool = False, slave: bool = False
    ) -> None:
        """Attach a detached tree at an absolute path in the mount namespace of a process.

        The mount point is made where that is possible.
        """
        flags = (_READ_ONLY if read_only else 0) | (_SLAVE if slave else 0)
        await self._call(_BIND, flags=flags, pid=pid, strings=(target,), fds=(tree_fd,))

    async def unbind(self, pid: int, target: str) -> None:
        """Detach what is mounted there; EINVAL when nothing is."""
        await self._call(_UNBIND, pid=pid, strings=(target,))

    async def show(self, pid: int, face: int) -> None:
        """Put the files of the mount in the place of those that a container with that init has."""
        await self._call(_SHOW, pid=pid, face=face)

    async def features(self) -> frozenset[str]:
        """Of FEATURES, what this host has."""
        value = (await self._call(_FEATURES))[1]
        return frozenset(name for bit, name in FEATURES.items() if value & bit)


def _owner(recipe: Recipe) -> tuple[int, int]:
    """Whose the user namespace is to be: the parent's root when the owner has no ID in the parent.

    The kernel allows no other owner (clone(2): EPERM).
    """
    if recipe.parent_pid is None or "user" not in recipe.unshare:
        return recipe.owner_uid, recipe.owner_gid
    return (
        _mapped(recipe.parent_pid, "uid_map", recipe.owner_uid),
        _mapped(recipe.parent_pid, "gid_map", recipe.owner_gid),
    )


def _mapped(pid: int, file: str, wanted: int) -> int:
    root = wanted
    try:
        with open(f"/proc/{pid}/{file}", encoding="ascii") as lines:
            for inside, outside, count in (map(int, line.split()) for line in lines):
                if outside <= wanted < outside + count:
                    return wanted
                if inside == 0:
                    root = outside
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, "the parent is dead") from error
    return root


def _fd(reply: tuple[int, int, str, int | None]) -> int:
    fd = reply[3]
    if fd is None:
        raise OSError(errno.EPROTO, "no descriptor in the spawner's reply")
    return fd
