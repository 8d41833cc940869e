"""Client of nsfs-marker, which reads the host's kernel log and what tells whose its lines are.

It is in one of three tiers (`Tier`): by marks that a BPF program makes in the kernel, by the trace
of printk alone, or without either.  The messages are those of csrc/marker.c.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import trio

log = logging.getLogger(__name__)

LIBEXEC = Path(__file__).parent / "libexec"
PROGRAM = "nsfs-marker"
OBJECT = "mark.bpf.o"

READY_S = 10.0
"""How long the kernel may take to accept the BPF program."""
PIPE_BYTES = 1 << 20
CHUNK = 1 << 18

_FRAME = struct.Struct("=II")
_REQUEST = struct.Struct("=IIQ")
_REPLY = struct.Struct("=iIQ")
_REPLY_MAX = 65536
_ATTACH, _DETACH, _DESCRIBE, _NFLOG = range(1, 5)
_COMMAND_FD = 3


class Frame(enum.IntEnum):
    """What a frame holds."""

    READY = 0
    RECORD = 1
    EVENT = 2
    OVERRUN = 3
    TRACE = 4
    LOST = 5


class Tier(enum.IntEnum):
    """How well it is known whose a line is."""

    OWN = 0
    """Not at all: containers have their own writes only."""
    CONTEXT = 1
    """By the task that printed it; LOG lines where just one container can be meant."""
    EXACT = 2
    """By marks."""


class Marker:
    """The process."""

    def __init__(self, tier: Tier, instance: str, libexec: Path = LIBEXEC) -> None:
        """Start it for a tier; `instance` is a name for a tracefs instance that nobody else
        uses."""
        self.tier = tier
        arguments = {
            Tier.EXACT: ["--bpf", str(libexec / OBJECT)],
            Tier.CONTEXT: ["--trace", instance],
            Tier.OWN: [],
        }[tier]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pipe_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self.pid = os.posix_spawn(
                libexec / PROGRAM,
                [PROGRAM, *arguments],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, write_fd, 1),
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), _COMMAND_FD),
                ],
            )
        except BaseException:
            os.close(self._pipe_fd)
            ours.close()
            raise
        finally:
            os.close(write_fd)
            theirs.close()
        self._pid_fd = os.pidfd_open(self.pid)
        self._socket = trio.socket.from_stdlib_socket(ours)
        self._lock = trio.Lock()
        self._rest = b""
        self._early: list[tuple[int, bytes]] = []

    @classmethod
    async def start(cls, best: Tier, instance: str, libexec: Path = LIBEXEC) -> Marker:
        """The best tier, not above `best`, that this machine has."""
        for tier in sorted(Tier, reverse=True):
            if tier > best or (tier is Tier.EXACT and not (libexec / OBJECT).exists()):
                continue
            marker = cls(tier, instance, libexec)
            with trio.move_on_after(READY_S):
                frames = await marker.frames()
                if frames:
                    # The first one is Frame.READY.
                    marker._early = frames[1:]
                    return marker
            log.info("kernel lines: not in the tier %s here", tier.name.lower())
            await marker.aclose()
        raise OSError(errno.EOPNOTSUPP, "the host's kernel log cannot be read", "/dev/kmsg")

    async def aclose(self) -> None:
        """End it and see it gone, with its marks and its trace."""
        with trio.CancelScope(shield=True):
            self._socket.close()
            with trio.move_on_after(READY_S) as scope:
                await trio.lowlevel.wait_readable(self._pid_fd)
            if scope.cancelled_caught:
                os.kill(self.pid, 9)
                await trio.lowlevel.wait_readable(self._pid_fd)
            os.waitpid(self.pid, 0)  # noqa: ASYNC222 - it has ended
        os.close(self._pid_fd)
        os.close(self._pipe_fd)

    async def frames(self) -> list[tuple[int, bytes]]:
        """What has come, at least one frame; empty when the process has ended."""
        if self._early:
            early, self._early = self._early, []
            return early
        while True:
            await trio.lowlevel.wait_readable(self._pipe_fd)
            try:
                data = os.read(self._pipe_fd, CHUNK)
            except BlockingIOError:
                continue
            if not data:
                return []
            found = list(self._cut(self._rest + data))
            if found:
                return found

    def _cut(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        at = 0
        while at + _FRAME.size <= len(data):
            length, kind = _FRAME.unpack_from(data, at)
            end = at + _FRAME.size + length
            if end > len(data):
                break
            yield kind, data[at + _FRAME.size : end]
            at = end
        self._rest = data[at:]

    async def _ask(
        self, what: int, net_fd: int | None = None, cookie: int = 0, hooks: bool = False
    ) -> tuple[int, str, int | None]:
        """One request: returns cookie, text and descriptor of the answer."""
        message = [_REQUEST.pack(what, hooks, cookie)]
        control = []
        if net_fd is not None:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", net_fd))]
        # An answer to a request that was cancelled would be taken for the next one's.
        async with self._lock:
            with trio.CancelScope(shield=True):
                await self._socket.sendmsg(message, control)
                data, rights, _, _ = await self._socket.recvmsg(
                    _REPLY_MAX, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
                )
        if len(data) < _REPLY.size:
            raise BrokenPipeError(errno.EPIPE, "nsfs-marker has ended")
        error, _, found = _REPLY.unpack_from(data)
        fd: int | None = None
        for level, kind, payload in rights:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                (fd,) = struct.unpack("i", payload)
        if error:
            raise OSError(-error, os.strerror(-error), "network namespace")
        return found, data[_REPLY.size :].decode("utf-8", "surrogateescape"), fd

    async def attach(self, net_fd: int, hooks: bool) -> int:
        """Mark the packets of a network namespace from now on; returns its cookie.

        With `hooks` at every hook of netfilter, which is what LOG rules need.

        EOPNOTSUPP in another tier than EXACT.
        """
        return (await self._ask(_ATTACH, net_fd, hooks=hooks))[0]

    async def detach(self, cookie: int) -> None:
        """The inverse; ENOENT when it is not attached."""
        await self._ask(_DETACH, cookie=cookie)

    async def describe(self, net_fd: int) -> tuple[int, list[tuple[str, str, str]]]:
        """A network namespace's cookie and interfaces: ("link", name, MAC address), ("index",
        name, number) and ("addr", name, address)."""
        cookie, text, _ = await self._ask(_DESCRIBE, net_fd)
        rows = [line.split() for line in text.splitlines()]
        return cookie, [(row[0], row[1], row[2]) for row in rows if len(row) == 3]

    async def netfilter_socket(self, net_fd: int) -> int:
        """A descriptor of a NETLINK_NETFILTER socket of that namespace, non-blocking."""
        fd = (await self._ask(_NFLOG, net_fd))[2]
        if fd is None:
            raise OSError(errno.EIO, "no socket came", "nflog")
        return fd
