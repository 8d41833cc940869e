"""Writing into the memory of those who call syslog(2), by processes nsfs-uaccess (csrc/uaccess.c).

A page fault there may take as long as somebody likes, so calls take turns in lanes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import trio

from nsfs.container import Container
from nsfs.logstream import Log
from nsfs.spawner import LIBEXEC
from nsfs.syscalls import Notifications

if TYPE_CHECKING:
    from nsfs.syslog import Syslog

_REQUEST = struct.Struct("=QQqII")
_REPLY = struct.Struct("=i")
_SOCKET_FD, _DATA_FD = 3, 4
IDLE_S = 10.0
"""How long a lane has a process without anything to do."""


class Call(NamedTuple):
    """One syslog(2).  `ident` is the listener's name for it, `tid` the host's."""

    ident: int
    tid: int
    action: int
    length: int
    address: int


class Listener:
    """The calls of one container, or of one session in part of it."""

    __slots__ = ("calls", "container", "fd", "key", "lane", "slow_until", "stuck", "user_ino")

    def __init__(self, container: Container, key: int, fd: int, user_ino: int) -> None:
        self.container = container
        self.key = key
        """The container's number, or SESSION and a PID."""
        self.fd = fd
        self.user_ino = user_ino
        """The container's user namespace."""
        self.calls = Waiting()
        """Those that are to be given something."""
        self.lane: Lane | None = None
        """Where they have their turn."""
        self.stuck = False
        """A process that was killed because it waited for its memory has not ended yet."""
        self.slow_until = 0.0

    def is_valid(self, call: Call) -> bool:
        """Whether the call still waits."""
        return self.fd >= 0 and Notifications.is_valid(self.fd, call.ident)


class Waiting:
    """Calls that wait, the oldest first; of those that do not any more not many."""

    SWEEP_AT = 64

    def __init__(self) -> None:
        self._calls: deque[tuple[Listener, Call]] = deque()
        self._sweep_at = self.SWEEP_AT

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[tuple[Listener, Call]]:
        return iter(self._calls)

    def add(self, listener: Listener, call: Call) -> list[Call]:
        """Add one; returns those that were forgotten."""
        gone: list[Call] = []
        if len(self._calls) >= self._sweep_at:
            gone = self.sweep()
            self._sweep_at = max(self.SWEEP_AT, 2 * len(self._calls))
        self._calls.append((listener, call))
        return gone

    def add_first(self, listener: Listener, call: Call) -> None:
        """Add one that has been taken."""
        self._calls.appendleft((listener, call))

    def sweep(self) -> list[Call]:
        """Forget those that do not wait; returns them."""
        gone = [call for listener, call in self._calls if not listener.is_valid(call)]
        if gone:
            known = set(gone)
            self._calls = deque(each for each in self._calls if each[1] not in known)
        return gone

    def take(self) -> tuple[Listener, Call]:
        """The oldest."""
        return self._calls.popleft()


class Gift(NamedTuple):
    """What a call is to be given."""

    listener: Listener
    call: Call
    log: Log
    value: int
    data: bytes
    next_seq: int


class Writer:
    """A process nsfs-uaccess."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.data_fd = os.memfd_create("nsfs-uaccess", os.MFD_CLOEXEC)
        with theirs:
            self.pid = os.posix_spawn(
                LIBEXEC / "nsfs-uaccess",
                ["nsfs-uaccess"],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, theirs.fileno(), _SOCKET_FD),
                    (os.POSIX_SPAWN_DUP2, self.data_fd, _DATA_FD),
                ],
            )
        self.pid_fd = os.pidfd_open(self.pid)
        self.socket = ours
        ours.setblocking(False)

    def give(self, gift: Gift) -> None:
        """Have it done; a ConnectionError when the process has died."""
        os.pwrite(self.data_fd, gift.data, 0)
        call = gift.call
        request = _REQUEST.pack(
            call.ident, call.address, gift.value, call.tid & 0xFFFFFFFF, len(gift.data)
        )
        socket.send_fds(self.socket, [request], [gift.listener.fd], socket.MSG_NOSIGNAL)

    def result(self) -> int | None:
        """0 or an errno; None when there is no answer."""
        try:
            data = self.socket.recv(_REPLY.size)
        except OSError:
            return None
        return -int(_REPLY.unpack(data)[0]) if len(data) == _REPLY.size else None

    async def end(self) -> int | None:
        """Kill it and see it gone, which may take time; returns what it had said at last."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pid_fd, signal.SIGKILL)
        await trio.lowlevel.wait_readable(self.pid_fd)
        os.waitpid(self.pid, 0)  # noqa: ASYNC222 - it has ended
        said = self.result()
        self.close()
        return said

    def close(self) -> None:
        """It ends by itself."""
        self.socket.close()
        os.close(self.pid_fd)
        os.close(self.data_fd)


class Lane:
    """One process nsfs-uaccess, and whose calls it does in turn."""

    def __init__(self, syslog: Syslog, patience_s: float) -> None:
        self._syslog = syslog
        self.patience_s = patience_s
        self._turns: deque[Listener] = deque()
        self._current: Gift | None = None
        self._writer: Writer | None = None
        self._begun = trio.Event()

    def join(self, listener: Listener) -> None:
        """A listener has calls."""
        listener.lane = self
        self._turns.append(listener)
        self._next()

    def _next(self) -> None:
        """Begin with the next call that is to be given something."""
        while self._current is None and self._turns:
            listener = self._turns.popleft()
            gift = None
            if len(listener.calls):
                gift = self._syslog.prepare(*listener.calls.take())
            if len(listener.calls):
                self._turns.append(listener)
            elif gift is None:
                listener.lane = None
            if gift is not None:
                self._begin(gift)

    def _begin(self, gift: Gift) -> None:
        for _ in range(2):
            if self._writer is None:
                self._writer = Writer()
            try:
                self._writer.give(gift)
                break
            except ConnectionError:
                self._syslog.bury(self._writer)
                self._writer = None
        self._current = gift
        self._begun.set()

    async def run(self) -> None:
        """See what becomes of them, until there has been nothing to do for a while."""
        try:
            while True:
                if self._current is None:
                    self._begun = trio.Event()
                    with trio.move_on_after(IDLE_S):
                        await self._begun.wait()
                if self._current is None:
                    return
                if self._writer is None:
                    await self._give_up()
                    continue
                with trio.move_on_after(self.patience_s) as scope:
                    await trio.lowlevel.wait_readable(self._writer.socket)
                result = None if scope.cancelled_caught else self._writer.result()
                if result is None:
                    await self._give_up()
                else:
                    self._done(self._current, result)
        finally:
            if self._writer is not None:
                self._syslog.bury(self._writer)
                self._writer = None

    def _done(self, gift: Gift, error: int) -> None:
        self._current = None
        listener = gift.listener
        if listener.lane is self and listener not in self._turns:
            listener.lane = None
        self._syslog.finished(gift, error)
        self._next()

    async def _give_up(self) -> None:
        """The process waits for the caller's memory, or has been killed."""
        gift, writer = self._current, self._writer
        assert gift is not None
        self._current = self._writer = None
        with contextlib.suppress(ValueError):
            self._turns.remove(gift.listener)
        gift.listener.lane = None
        self._syslog.give_up(self, gift, writer)
        self._next()
        await trio.lowlevel.checkpoint()
