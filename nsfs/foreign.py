"""Descriptors that others have made: the ends of channels, and what comes in these.

What is done to such a one may last as long as its maker likes: a close(2) of a file of a FUSE
server of his waits for an answer, that of the last descriptor of a socket lets go of what lies in
it, which may be a connection that lingers (SO_LINGER of socket(7)).  So nothing is taken that does
not have to be, it is closed by a thread, and of each account there are so many at most.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import trio

from nsfs.processes import thread_group

if TYPE_CHECKING:
    from nsfs.world import World

HELD_MAX = 256
"""How many channels there may be of one account (`members.account_of`): further entries fail with
EBUSY, since what setxattr(2) makes of EAGAIN is EOPNOTSUPP."""
TOGETHER_S = 0.01
"""How long a descriptor may wait for others that are to be closed as well."""
SOCKET = "socket:"
LISTENER = "anon_inode:seccomp notify"

Account = tuple[bool, int]

_SYS_PIDFD_GETFD = 438  # the same on every architecture
_libc = ctypes.CDLL(None, use_errno=True)
_held: Counter[Account] = Counter()
_due: dict[Account, list[Sequence[int]]] = {}
_closing = trio.CapacityLimiter(1000)


def hold(account: Account) -> None:
    """There is to be one more channel of that account; EBUSY when there are too many."""
    if _held[account] >= HELD_MAX:
        raise OSError(errno.EBUSY, "too many entries have been begun", str(account[1]))
    _held[account] += 1


def let_go(world: World, account: Account, fds: Sequence[int]) -> None:
    """Close a channel and what came in it; it counts until that has been done.

    Those of an account and a moment are closed together, since to start a thread for each would
    take a fifth of the time of entering.
    """
    due = _due.get(account)
    if due is None:
        due = _due[account] = []
        world.start(_let_go, account, due)
    due.append(fds)


async def _let_go(account: Account, due: list[Sequence[int]]) -> None:
    try:
        await trio.sleep(TOGETHER_S)
    finally:
        del _due[account]
    try:
        await trio.to_thread.run_sync(_close, due, abandon_on_cancel=True, limiter=_closing)
    finally:
        _held[account] -= len(due)
        if not _held[account]:
            del _held[account]


def _close(due: list[Sequence[int]]) -> None:
    for fds in due:
        for fd in fds:
            os.close(fd)


def kind(fd: int) -> str:
    """What a descriptor of ours is, of which nothing is asked but its name."""
    return os.readlink(f"/proc/self/fd/{fd}")


def take_channel(tid: int, number: int, taken: list[int]) -> socket.socket:
    """A duplicate of a thread's descriptor, which is to be a socket of type SOCK_SEQPACKET: EBADF
    when it has none such, EINVAL when it is something else.  What was taken is in `taken`."""
    try:
        its = os.readlink(f"/proc/{tid}/fd/{number}")
    except OSError as error:
        raise OSError(errno.EBADF, "no such descriptor", str(number)) from error
    if its.startswith(SOCKET):
        taken.append(_take(tid, number))
        # It may be another one by now.
        if kind(taken[-1]).startswith(SOCKET):
            channel = socket.socket(fileno=taken[-1])
            if (channel.family, channel.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET):
                return channel
            channel.detach()
    raise OSError(errno.EINVAL, "not a channel", str(number))


def _take(tid: int, number: int) -> int:
    """pidfd_getfd(2)."""
    try:
        pid_fd = os.pidfd_open(tid)
    except OSError as error:
        # A thread that does not lead its group.
        if error.errno != errno.EINVAL:
            raise
        pid_fd = os.pidfd_open(thread_group(tid))
    try:
        fd = int(_libc.syscall(_SYS_PIDFD_GETFD, pid_fd, number, 0))
    finally:
        os.close(pid_fd)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd: {os.strerror(number)}", str(tid))
    return fd


async def receive(channel: socket.socket, room: int) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    """Wait for the one byte that comes in a channel, and what comes with it.

    Descriptors that there is no room for are let go of by whoever receives: so that is a thread.
    """
    await trio.lowlevel.wait_readable(channel)
    data, control, _, _ = await trio.to_thread.run_sync(
        lambda: channel.recvmsg(16, room, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT),
        abandon_on_cancel=True,
        limiter=_closing,
    )
    return data, control


def received(control: list[tuple[int, int, bytes]]) -> Iterator[int]:
    """The descriptors that came with a message."""
    for level, type_, payload in control:
        if (level, type_) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds = array.array("i")
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
            yield from fds
