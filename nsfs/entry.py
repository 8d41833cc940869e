"""Entry: how a process comes to be in a further container.

There are three ways, all of them by way of a container's `procs/`:

* the session program (csrc/enter.c) sets the attribute ENTER_ATTRIBUTE of the directory to the
  number of a descriptor, one end of a socketpair: that end, the channel, is taken from it, and what
  entering needs is sent by that.  (A link(2) would be two requests.);
* an ln(1) that links `procs/self` becomes the session program;
* any other process that is linked is moved in place.

The caller was allowed by the kernel to write to the directory.  That lets him be forked inside as
the container's root, if he may have its IDs (`authority.check_ids`).  When he joins namespaces
himself or is moved, it is the kernel that decides whether he is privileged over them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import socket
import struct
import weakref
from collections.abc import Sequence
from typing import ClassVar

import trio

from nsfs import cgroup, foreign, idmap, kernfs, leaf, members, namespaces
from nsfs.attribute import Caller
from nsfs.authority import check_ids
from nsfs.container import Container, Face, Phase
from nsfs.init import Init
from nsfs.processes import thread_group
from nsfs.protocol import STEPS
from nsfs.spawner import CLONE_NEW, LIBEXEC
from nsfs.tree import SELF
from nsfs.world import World

log = logging.getLogger(__name__)

ENTER_ATTRIBUTE = b"user.nsfs.enter"
"""The extended attribute of `procs/` by which the session program asks."""
REVOKE_WAIT_S = 5.0
"""How long an init may take to close what was handed over; it is never that busy."""
LN = frozenset(("ln", "gln"))
MULTI_CALL = re.compile(r"(busybox|toybox|coreutils)([.-].*)?")

_OFFER = struct.Struct("=iIIIQ")
_NO_PROOF = 0xFFFFFFFF
_SYSLOG = 1
_TRACE_REQUEST = struct.Struct("=IiiiII")
_TRACE_REPLY = struct.Struct("=iIII")
_TRACE_SESSION, _TRACE_MOVE = 1, 2
_TRACE_INTERRUPTED = b"\1"
_UCRED = struct.Struct("=iII")
_TRACER_SOCKET_FD = 3
OFFER_WAIT_S = 1.0
"""How long an init with more connections than it takes may keep an ln(1) from being killed."""
UNIX_PATH_MAX = 107
"""Bytes of a socket's path (unix(7))."""
_MFD_EXEC = 0x10  # Linux 6.3


def parse_types(text: str) -> frozenset[str]:
    """Types of namespaces, separated by commas; EINVAL for anything else."""
    words = text.split(",")
    known = namespaces.ALL | {namespaces.SYSLOG}
    if len(set(words)) != len(words) or not known.issuperset(words):
        raise OSError(errno.EINVAL, "not a list of namespace types", text)
    return frozenset(words)


def check_open(container: Container) -> None:
    """Whether anybody can enter now: EPERM for the host, EOPNOTSUPP for a found container, ENODEV
    for a dead one, EBUSY for a frozen one."""
    if container.parent is None:
        raise PermissionError(errno.EPERM, "everybody is in the root container", "")
    if container.is_found:
        raise OSError(errno.EOPNOTSUPP, "it has no init of nsfs: nsenter(1) by nsproxy/", "")
    container.check_alive()
    # Not `frozen` of cgroup.events: that comes when the last process has stopped.
    frozen = any(each.group.frozen_by_itself() for each in container.lineage() if each.parent)
    if frozen or container.phase is Phase.REBUILDING:
        raise OSError(errno.EBUSY, "the container is frozen", container.name)


def bits(types: frozenset[str]) -> int:
    """Their clone flags, and that of ours."""
    return sum(CLONE_NEW.get(kind, _SYSLOG) for kind in types)


# --- sessions ---


def is_proven(face: Face, caller: Caller) -> bool:
    """Whether the directory's word is enough for a caller to have the container's IDs: not of the
    root who may have others'."""
    shared = face.container.holder_of_ids() is not face.container
    return not (shared and caller.uid == face.viewpoint.root_uid)


async def send_offer(
    face: Face, types: frozenset[str], caller: Caller, channel: socket.socket
) -> None:
    """Give a session program what it takes to enter the container, or some of its namespaces.

    Whole, it is forked inside as the container's root, and brings nothing along.  So where the
    caller may have the container's IDs, the directory's word is enough; that he is the root who may
    have others', the init asks the kernel.
    """
    container = face.container
    if not types:
        check_ids(face, caller)
    proven = is_proven(face, caller)
    with contextlib.ExitStack() as stack:

        def namespace(kind: str) -> int:
            path = f"/proc/{container.init_pid}/ns/{kind}"
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        if types:
            # Before it can answer: `admit` asks who it is.
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            kernels = types - {namespaces.SYSLOG}
            fds = [namespace(kind) for kind in sorted(kernels, key=lambda kind: CLONE_NEW[kind])]
            if kernels != types:
                for name in ("kmsg", "pkmsg"):
                    fds.append(await container.world.spawner.log(container.number, name))
                    stack.callback(os.close, fds[-1])
        else:
            init = Init(container.world.store.socket_path(container.number))
            connections = [stack.enter_context(await init.hand_over(proven)) for _ in range(2)]
            # Without need a user namespace is given to nobody, who could keep it for ever.
            first = container.world.null_fd if proven else namespace("user")
            fds = [first, *(each.fileno() for each in connections)]
        socket.send_fds(
            channel,
            [
                _OFFER.pack(
                    0,
                    bits(types),
                    _NO_PROOF if proven else container.root_uid,
                    _NO_PROOF if proven else container.root_gid,
                    0,
                )
                + os.fsencode(container.name)
            ],
            fds,
            socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
        )


async def revoke(container: Container) -> None:
    """Take back what was given to session programs that have not begun: who may enter has
    changed."""
    if container.parent is None or not container.alive():
        return
    with contextlib.suppress(OSError), trio.move_on_after(REVOKE_WAIT_S):
        await Init(container.world.store.socket_path(container.number)).revoke()


def check_part(types: frozenset[str]) -> None:
    """EPERM for what would put a process with the host's files in sight of the members."""
    if "user" in types and "mnt" not in types:
        raise PermissionError(errno.EPERM, "user is joined with mnt only", "user")


async def admit(
    container: Container, types: frozenset[str], fd: int, account: foreign.Account
) -> None:
    """Wait for a process that has joined some of the namespaces, and count it among the members.

    `fd` is the channel, which is let go of afterwards.
    """
    channel = socket.socket(fileno=fd)
    taken = [fd]
    try:
        await _admit(container, types, channel, taken)
    except OSError:
        log.debug("a session in part of %s has ended early", container.name)
    finally:
        channel.detach()
        foreign.let_go(container.world, account, taken)


async def _admit(
    container: Container,
    types: frozenset[str],
    channel: socket.socket,
    taken: list[int],
) -> None:
    room = socket.CMSG_SPACE(_UCRED.size)
    if namespaces.SYSLOG in types:
        room += socket.CMSG_SPACE(4)
    data, control = await foreign.receive(channel, room)
    fds = list(foreign.received(control))
    taken += fds
    pid = next(
        (
            _UCRED.unpack(payload)[0]
            for level, kind, payload in control
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        ),
        0,
    )
    if not data or not pid:
        return
    error = 0
    try:
        check_open(container)
        for kind in types - {"pid", namespaces.SYSLOG}:
            inside = namespaces.identity(container.init_pid, kind)
            if namespaces.identity(pid, kind) != inside:
                raise PermissionError(errno.EPERM, "it has not joined", kind)
        if any(foreign.kind(fd) != foreign.LISTENER for fd in fds):
            raise OSError(errno.EINVAL, "not a listener", container.name)
        group = leaf.Leaf(container, home_of(container, pid), pid, shown(types))
        group.take()
        for fd in fds[:1]:
            container.world.listen(container, pid, fd)
        container.world.start(group.watch)
        container.tell()
    except OSError as reason:
        error = -(reason.errno or errno.EIO)
    channel.send(_OFFER.pack(error, 0, 0, 0, 0), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def shown(types: frozenset[str]) -> str:
    """A list of types as it is shown."""
    return ",".join(sorted(types))


async def enter_program(face: Face, name: str, caller: Caller) -> None:
    """The session program asks to enter: `name` is FD or FD:TYPES."""
    number, _, part = name.partition(":")
    if not (number.isascii() and number.isdigit() and len(number) < 8):
        raise OSError(errno.EINVAL, "not the number of a descriptor", name)
    types = parse_types(part) if part else frozenset()
    container = face.container
    check_open(container)
    check_part(types)
    world = container.world
    account = members.account_of(world.root, caller.tid)
    foreign.hold(account)
    taken: list[int] = []
    begun = False
    try:
        channel = foreign.take_channel(caller.tid, int(number), taken)
        try:
            await send_offer(face, types, caller, channel)
        finally:
            channel.detach()
        if types:
            world.start(admit, container, types, taken.pop(), account)
            begun = True
    finally:
        if not begun:
            foreign.let_go(world, account, taken)


# --- the tracer ---


class Tracer:
    """The program that changes running processes; started when it is first needed."""

    _known: ClassVar[weakref.WeakKeyDictionary[World, Tracer]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            os.posix_spawn(
                LIBEXEC / "nsfs-tracer",
                ["nsfs-tracer"],
                {},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), _TRACER_SOCKET_FD)],
            )
        self.socket = ours
        self.program_fd = sealed_program()

    @classmethod
    def of(cls, world: World) -> Tracer:
        """The tracer of a world."""
        found = cls._known.get(world)
        if found is None:
            found = cls._known[world] = cls()
        return found

    def close(self) -> None:
        """End it."""
        self.socket.close()
        os.close(self.program_fd)

    @classmethod
    def send(cls, world: World, request: bytes, fds: Sequence[int]) -> socket.socket:
        """Have a request carried out; what is returned is where the reply comes."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(cls.of(world).socket, [request], [*fds, theirs.fileno()])
            except BrokenPipeError:
                # It was killed; another can do it as well.
                cls._known.pop(world).close()
                socket.send_fds(cls.of(world).socket, [request], [*fds, theirs.fileno()])
        return ours

    @staticmethod
    async def reply(sock: socket.socket) -> int:
        """For how many microseconds the target was stopped, 0 for one that is about to be.

        An OSError when it was not done.
        """
        with trio.socket.from_stdlib_socket(sock) as waiting:
            data = await waiting.recv(_TRACE_REPLY.size)
        if data == _TRACE_INTERRUPTED:
            return 0
        if len(data) != _TRACE_REPLY.size:
            raise OSError(errno.EIO, "the tracer has died")
        error, step, stopped_us, _ = _TRACE_REPLY.unpack(data)
        if error:
            raise OSError(-error, f"{STEPS[step]}: {os.strerror(-error)}")
        return int(stopped_us)

    @classmethod
    async def ask(cls, world: World, request: bytes, fds: Sequence[int]) -> int:
        """Have a request carried out; returns for how many microseconds the target was stopped."""
        return await cls.reply(cls.send(world, request, fds))


def sealed_program() -> int:
    """The session program in memory: executable by whoever is given it, wherever he is, and never
    to be written to (CVE-2019-5736)."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("nsfs-enter", flags | _MFD_EXEC)
    except OSError:
        fd = os.memfd_create("nsfs-enter", flags)
    with open(LIBEXEC / "nsfs-enter", "rb") as file:
        os.write(fd, file.read())
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


# --- link(2) ---


async def is_ln(root: Container, tid: int) -> bool:
    """Whether a program is an ln(1).

    Its file is called `ln` or `gln`; or it is called `busybox`, `toybox` or `coreutils`, with
    whatever follows a dot or a hyphen, and was started as `ln`, or as itself with `ln` (or
    `--coreutils-prog=ln`) as its first argument, or calls itself `ln` (comm): a busybox shell runs
    its ln without executing anything.  EBUSY when it does not let itself be looked at.
    """
    try:
        exe = os.path.basename(os.readlink(f"/proc/{tid}/exe")).removesuffix(" (deleted)")
        if exe in LN:
            return True
        if not MULTI_CALL.fullmatch(exe):
            return False
        comm = kernfs.read_once(f"/proc/{tid}/comm")
    except OSError:
        return False
    if comm == b"ln\n":
        return True
    words = [os.fsdecode(x) for x in (await members.command_line(root, tid)).split(b"\0")]
    called = os.path.basename(words[0])
    return called == "ln" or (
        bool(MULTI_CALL.fullmatch(called))
        and len(words) > 1
        and words[1] in ("ln", "--coreutils-prog=ln")
    )


def home_of(container: Container, pid: int, whole: bool = False) -> Container:
    """The container whose whole member a process is.

    EPERM for an init, and for who is to be `whole` in one that is not nested in that: nobody leaves
    a container, and two that are apart cannot both hold all of a process.
    """
    root = container.world.root
    part = container.world.part(cgroup.membership(pid))
    home = members.container_of(root, pid)
    if part is not None:
        home = container.world.containers.get(part.home)
    if home is None or (whole and (part or home not in container.lineage())):
        raise PermissionError(errno.EPERM, "it is in a container elsewhere", str(pid))
    return home


async def link(face: Face, name: str, source: Face, key: int, caller: Caller) -> None:
    """link(2) into `procs/`: `key` is the PID that `source` knows the process by, or SELF."""
    container = face.container
    own_pid = thread_group(caller.tid)
    pid = own_pid if key == SELF else members.host_pid(source, key)
    own = pid == own_pid
    base, colon, part = name.partition(":")
    if not (own and base == "self"):
        seen = key or members.seen_pid(pid, members.level(source.viewpoint))
        if base != str(seen):
            raise OSError(errno.EINVAL, "the name is PID or PID:TYPES", name)
    types = parse_types(part) if colon else frozenset()
    check_open(container)
    if members.container_of(container, pid) is not None:
        raise OSError(errno.EEXIST, "it is in the container already", name)
    if own and await is_ln(container.world.root, caller.tid):
        check_part(types)
        await become_session(face, types, caller)
    elif own:
        await in_caller(container, types, pid, caller)
    else:
        await move(container, types, pid, caller)


async def become_session(face: Face, types: frozenset[str], caller: Caller) -> None:
    """Make the caller, which is an ln(1), the session program.

    It stops only when its link(2) is answered, which it never sees, so that is done as soon as the
    tracer has interrupted it; the kernel, too, asks for it then.  Once it is a session that can
    fail only as one fails.
    """
    container = face.container
    if not types:
        check_ids(face, caller)
    path = os.fsencode(container.world.store.socket_path(container.number))
    if types or len(path) > UNIX_PATH_MAX or not is_proven(face, caller):
        reply = await offer_to_ln(face, types, caller)
    else:
        request = session_request(container, caller) + b"\0" + path
        program_fd = Tracer.of(container.world).program_fd
        reply = Tracer.send(container.world, request, (program_fd,))
    await Tracer.reply(reply)
    # Not EINTR, after which the kernel would ask for the attributes of `self` anew.
    raise OSError(errno.ECANCELED, "it is a session", container.name)


def session_request(container: Container, caller: Caller) -> bytes:
    """What the tracer is asked."""
    name = os.fsencode(container.name)[:200]
    return _TRACE_REQUEST.pack(_TRACE_SESSION, caller.tid, 0, 0, 0, 0) + name


async def offer_to_ln(face: Face, types: frozenset[str], caller: Caller) -> socket.socket:
    """Have the tracer give it a channel by which it is offered what it takes to enter, as any
    session program is; returns where the tracer's reply comes."""
    container = face.container
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            fds = (Tracer.of(container.world).program_fd, theirs.fileno())
            reply = Tracer.send(container.world, session_request(container, caller), fds)
        try:
            with trio.move_on_after(OFFER_WAIT_S, shield=True) as waiting:
                await send_offer(face, types, caller, ours)
            if waiting.cancelled_caught:
                raise OSError(errno.EAGAIN, "the init answers nobody", container.name)
            if types:
                account = members.account_of(container.world.root, caller.tid)
                foreign.hold(account)
                container.world.start(admit, container, types, os.dup(ours.fileno()), account)
        except OSError as error:
            with contextlib.suppress(OSError):
                ours.send(_OFFER.pack(-(error.errno or errno.EIO), 0, 0, 0, 0), socket.MSG_NOSIGNAL)
    return reply


async def in_caller(container: Container, types: frozenset[str], pid: int, caller: Caller) -> None:
    """Move the caller itself: the result of its link(2) is set by the tracer."""
    done = trio.Event()
    failed: list[OSError] = []

    async def work() -> None:
        try:
            await move(container, types, pid, caller)
        except OSError as error:
            failed.append(error)
        finally:
            done.set()

    container.world.start(work)
    await done.wait()
    if failed:
        raise failed[0]


def _ids(pid: int) -> list[int]:
    """Every user and group ID of a process, the host's."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        fields = dict(line.split(":\t", 1) for line in file if ":\t" in line)
    return [int(x) for key in ("Uid", "Gid", "Groups") for x in fields[key].split()]


async def move(container: Container, types: frozenset[str], pid: int, caller: Caller) -> None:
    """Move a process in place: into all namespaces that are asked for, or none.

    EPERM for what the kernel refuses, for `user` and `pid` when its IDs are not the container's,
    for a program that is not of this architecture; EBUSY when it has several threads or does not
    stop.
    """
    if namespaces.SYSLOG in types:
        raise PermissionError(errno.EPERM, "what runs keeps the syslog(2) that it has", str(pid))
    home = home_of(container, pid, whole=not types)
    wanted = frozenset(
        kind
        for kind in types or namespaces.ALL
        if namespaces.identity(pid, kind) != namespaces.identity(container.init_pid, kind)
    )
    if wanted & {"user", "pid"} and any(
        idmap.to_inside(container.map, ident) is None for ident in _ids(pid)
    ):
        raise PermissionError(errno.EPERM, "its IDs are not the container's", str(pid))
    if types:
        group = leaf.Leaf(container, home, pid, shown(types))
    else:
        group = leaf.Whole(container, home, pid, "")
    group.take()
    try:
        own = pid == thread_group(caller.tid)
        request = _TRACE_REQUEST.pack(
            _TRACE_MOVE, pid, pid if own else caller.tid, container.init_pid, bits(wanted), 0
        )
        stopped_us = await Tracer.ask(container.world, request, ())
    except BaseException:
        group.undo()
        raise
    log.debug("%d was stopped for %d us", pid, stopped_us)
    if types:
        container.world.start(group.watch)
    for each in (container, home):
        each.tell()
