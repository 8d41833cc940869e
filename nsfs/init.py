"""Client of a container's init, which starts commands in it.

Messages are those of csrc/protocol.h.  Errors are OSError with the errno that the system call gave
and, as strerror, the words for the step that failed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import trio

from nsfs.protocol import failure, rights

_INIT_REQUEST = struct.Struct("=IIQIIIIII")
_INIT_REPLY = struct.Struct("=IiIi")
_UCRED = struct.Struct("=iII")

# enum init_op, enum init_flag, enum init_reply_op
_EXEC, _WAIT, _PROVE, _GIVE, _REVOKE = 1, 2, 3, 5, 6
_KEEP_STATUS, _TERMINAL, _SAME_SESSION = 1, 2, 4
_STARTED, _FAILED, _EXITED = 1, 2, 3

LOOK_S = 0.01
"""How often it is looked whether an init that does not answer is suspended."""
_STARTED_SIZES = (_INIT_REPLY.size, socket.CMSG_SPACE(_UCRED.size))
_PROVE_REQUEST = _INIT_REQUEST.pack(_PROVE, 0, 0, 0, 0, 0, 0, 0, 0)
_GIVE_REQUEST = _INIT_REQUEST.pack(_GIVE, 0, 0, 0, 0, 0, 0, 0, 0)
_REVOKE_REQUEST = _INIT_REQUEST.pack(_REVOKE, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Command:
    """A command that was started in a container."""

    pid: int
    """The host's."""
    token: int
    init: Init

    async def wait(self) -> int:
        """How it ended, as os.waitstatus_to_exitcode() has it; can be asked once."""
        return await self.init.wait(self.token)


class Init:
    """The init of a container; each request is a connection of its own, so none is kept."""

    def __init__(self, socket_path: str) -> None:
        self.socket_path = socket_path

    async def execute(
        self,
        argv: Sequence[str],
        env: Sequence[str],
        fds: Sequence[int],
        *,
        cwd: str = "/",
        uid: int = 0,
        gid: int = 0,
        groups: Sequence[int] = (),
        terminal: bool = False,
        new_session: bool = True,
        keep_status: bool = True,
        suspended: Callable[[], bool] = lambda: False,
    ) -> Command:
        """Start a command whose descriptors 0, 1, ... are `fds`; it has no other.

        `env` is of the form NAME=VALUE, its PATH finds the program; IDs are the container's; with
        `terminal` descriptor 0 becomes the controlling terminal.  EBUSY when `suspended` comes true
        before it was started: it will not be.  After that nothing more is waited for.
        """
        if not argv or any("\0" in word for word in (*argv, *env, cwd)):
            raise OSError(errno.EINVAL, "no command, or a NUL in it")
        token = secrets.randbits(63) + 1
        flags = (
            (_KEEP_STATUS if keep_status else 0)
            | (_TERMINAL if terminal else 0)
            | (0 if new_session else _SAME_SESSION)
        )
        message = b"".join(
            (
                _INIT_REQUEST.pack(
                    _EXEC, flags, token, uid, gid, len(groups), len(argv), len(env), 0
                ),
                *(group.to_bytes(4, "little") for group in groups),
                *(os.fsencode(string) + b"\0" for string in (cwd, *argv, *env)),
            )
        )
        with await self._connect(suspended) as sock:
            # Who sends, by the kernel's word and in our numbers.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            try:
                await sock.sendmsg([message], rights(fds))
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    raise OSError(errno.E2BIG, "arguments and environment are too long") from error
                if isinstance(error, ConnectionError):
                    raise OSError(errno.ENODEV, "the container is dead") from error
                raise
            pid = 0
            while True:
                data = b""
                control: list[tuple[int, int, bytes]] = []
                given_up = False
                with contextlib.suppress(ConnectionResetError), trio.move_on_after(LOOK_S) as scope:
                    data, control, _, _ = await sock.recvmsg(*_STARTED_SIZES)
                if scope.cancelled_caught:
                    if not suspended():
                        continue
                    if pid:
                        return Command(pid, token, self)
                    # From here on it cannot tell that it begins, and so does not; unless it has.
                    sock.shutdown(socket.SHUT_RD)
                    given_up = True
                    # At once: what came before, or the end-of-file.
                    data, control, _, _ = await sock.recvmsg(*_STARTED_SIZES)
                if not data and given_up:
                    raise OSError(errno.EBUSY, "the container is frozen")
                if not data and not pid:
                    raise OSError(errno.ENODEV, "the container is dead")
                if not data:
                    # Its copy of the connection was closed by exec.
                    return Command(pid, token, self)
                op, number, step, _ = _INIT_REPLY.unpack(data)
                if op == _FAILED:
                    raise failure(number, step)
                for level, kind, payload in control:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                        pid = _UCRED.unpack(payload)[0]

    async def wait(self, token: int) -> int:
        """Wait for a command's end; ProcessLookupError for one that is not known (any more)."""
        with await self._connect() as sock:
            try:
                await sock.sendmsg([_INIT_REQUEST.pack(_WAIT, 0, token, 0, 0, 0, 0, 0, 0)])
                data = await sock.recv(_INIT_REPLY.size)
            except ConnectionError:
                data = b""
        if not data:
            raise OSError(errno.ENODEV, "the container is dead")
        op, number, step, status = _INIT_REPLY.unpack(data)
        if op == _FAILED:
            raise failure(number, step)
        return os.waitstatus_to_exitcode(status)

    async def hand_over(self, proven: bool = False) -> socket.socket:
        """A connection to be given to a session program: one command is taken from it, unless
        `revoke` came before; without `proven` only when the kernel vouches for the sender as one
        who may be the container's root."""
        given = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            with _short(self.socket_path) as path:
                while True:
                    try:
                        given.connect(path)
                        break
                    except BlockingIOError:
                        await trio.sleep(0.01)
                    except (ConnectionRefusedError, FileNotFoundError) as error:
                        raise OSError(errno.ENODEV, "the container is dead") from error
            given.send(_GIVE_REQUEST if proven else _PROVE_REQUEST)
            given.setblocking(True)
        except BaseException:
            given.close()
            raise
        return given

    async def revoke(self) -> None:
        """Close the connections that were handed over and have not been used."""
        with await self._connect() as sock, contextlib.suppress(ConnectionError):
            await sock.sendmsg([_REVOKE_REQUEST])
            # It closes this one as well, when it is done.
            await sock.recv(1)

    async def _connect(
        self, suspended: Callable[[], bool] = lambda: False
    ) -> trio.socket.SocketType:
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with _short(self.socket_path) as path:
                while True:
                    try:
                        await sock.connect(path)
                        return sock
                    except BlockingIOError:
                        # More wait already than its backlog holds.
                        if suspended():
                            raise OSError(errno.EBUSY, "the container is frozen") from None
                        await trio.sleep(LOOK_S)
                    except (ConnectionRefusedError, FileNotFoundError) as error:
                        raise OSError(errno.ENODEV, "the container is dead") from error
        except BaseException:
            sock.close()
            raise


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """The same path with at most 107 bytes, as unix(7) wants it."""
    if len(os.fsencode(path)) < 108:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
