"""Entry: how a process comes to be in a further container.

There are three ways, all of them by way of a container's `procs/`:

* the session program (csrc/enter.c) sets the attribute ENTER_ATTRIBUTE of the directory to the
  number of a descriptor, one end of a socketpair: that end, the channel, is taken from it, and what
  entering needs is sent by that.  (A link(2) would be two requests.);
* an ln(1) that links `procs/self` becomes the session program;
* any other process that is linked is moved in place.

The caller was allowed by the kernel to write to the directory; that alone lets nobody in.  Whether
it is privileged over the container's namespaces the kernel decides when they are joined, or when
the caller claims to be the container's root (`Init.hand_over`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct

from nsfs import namespaces
from nsfs.attribute import Caller
from nsfs.container import Container, Face, Phase
from nsfs.spawner import Init
from nsfs.world import process_of

ENTER_ATTRIBUTE = b"user.nsfs.enter"
"""The extended attribute of `procs/` by which the session program asks."""

_OFFER = struct.Struct("=iIII")
_SYS_PIDFD_GETFD = 438  # the same on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def take_fd(pid: int, number: int) -> int:
    """A duplicate of the descriptor of a thread (pidfd_getfd(2)): EBADF when it has none such."""
    try:
        pid_fd = os.pidfd_open(pid)
    except OSError as error:
        # A thread that does not lead its group.
        if error.errno != errno.EINVAL:
            raise
        pid_fd = os.pidfd_open(process_of(pid)[0])
    try:
        fd = int(_libc.syscall(_SYS_PIDFD_GETFD, pid_fd, number, 0))
    finally:
        os.close(pid_fd)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd: {os.strerror(number)}", str(pid))
    return fd


def parse_types(text: str) -> frozenset[str]:
    """Types of namespaces, separated by commas; EINVAL for anything else."""
    words = text.split(",")
    if len(set(words)) != len(words) or not namespaces.ALL.issuperset(words):
        raise OSError(errno.EINVAL, "not a list of namespace types", text)
    return frozenset(words)


def check_open(container: Container) -> None:
    """Whether anybody can enter now: EPERM for the host, ENODEV for a dead container, EBUSY for a
    frozen one."""
    if container.parent is None:
        raise PermissionError(errno.EPERM, "everybody is in the root container", "")
    container.check_alive()
    if container.phase is Phase.REBUILDING or container.group.events()["frozen"]:
        raise OSError(errno.EBUSY, "the container is frozen", container.name)


async def send_offer(container: Container, channel: socket.socket) -> None:
    """Give a session program what it takes to enter the whole container."""
    with contextlib.ExitStack() as stack:
        user_fd = os.open(f"/proc/{container.init_pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, user_fd)
        init = Init(container.world.store.socket_path(container.number))
        connections = [stack.enter_context(await init.hand_over()) for _ in range(2)]
        offer = _OFFER.pack(0, 0, container.root_uid, container.root_gid)
        socket.send_fds(
            channel,
            [offer + os.fsencode(container.name)],
            [user_fd, *(each.fileno() for each in connections)],
            socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL,
        )


async def enter_program(face: Face, name: str, caller: Caller) -> None:
    """The session program asks to enter: `name` is FD or FD:TYPES."""
    number, _, types = name.partition(":")
    if not (number.isascii() and number.isdigit() and len(number) < 8):
        raise OSError(errno.EINVAL, "not the number of a descriptor", name)
    check_open(face.container)
    with socket.socket(fileno=take_fd(caller.tid, int(number))) as channel:
        if (channel.family, channel.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            raise OSError(errno.EINVAL, "not a channel", name)
        if types:
            raise OSError(errno.EOPNOTSUPP, "in part", name)
        await send_offer(face.container, channel)


async def link(face: Face, name: str, source: Face, key: int, caller: Caller) -> None:
    """link(2) into `procs/`: `key` is the PID that `source` knows the process by, 0 when what is
    linked is no process."""
    raise PermissionError(errno.EPERM, "not yet", name)
