"""`kmsg`: the container's own kernel log.

Outside, a text file: the records, one a line, `prio,seq,usec,flag;text`, ending at EOF; a write
appends a record, `<N>` giving priority and facility; truncating it clears, as `dmesg -C` does.
poll(2) says when there is more.  Inside, the same ring is /dev/kmsg, as
Documentation/ABI/testing/dev-kmsg has it, and /proc/kmsg (proc_kmsg(5)).

A container that shares its parent's log (`unshare` without `syslog`) shows that one.  Where that is
the host's, and its user namespace is not, reading takes kernel.dmesg_restrict = 0, and nobody
inside can open /proc/kmsg (EPERM).

At the root it is the host's log without the lines that were attributed to containers; what is
written goes to the host's /dev/kmsg.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable
from typing import Any

from nsfs.attribute import HIDDEN, NOT_ON_ROOT, Attribute, Caller, OpenFile
from nsfs.authority import check_host_log, check_namespace
from nsfs.container import Face
from nsfs.logstream import DeviceReader, ProcReader, TextReader
from nsfs.namespaces import SYSLOG


class _LogFile(OpenFile):
    """What the three have in common: the log, and that a write is a record."""

    reader: Any
    takes = False
    """Whether what one reader gets the others do not."""

    def __init__(self, face: Face, token: int, flags: int, reopened: bool) -> None:
        super().__init__(face, token, flags, reopened)
        if flags & os.O_ACCMODE != os.O_WRONLY and not reopened:
            check_host_log(face.container, face.viewpoint, takes=self.takes)
        self.log = face.container.log
        known = face.world.opens.get(token) if reopened else None
        self.known = known[:3] if known else None
        if known:
            self.flags = known[3]
        elif flags & os.O_NONBLOCK:
            self.keep(self.log.ring.first_seq, 0, 0)
        self.nonblock = bool(self.flags & os.O_NONBLOCK)

    def keep(self, *state: int) -> None:
        """Put the position where the next daemon finds it."""
        self.face.world.opens.put(self.token, *state, self.flags)

    async def write(self, offset: int, data: bytes, request: int) -> int:
        """Append a record."""
        if self.face.container.parent is None:
            return _write_host(data)
        taken = self.log.write(data, request)
        self.face.container.log_changed_ns = time.time_ns()
        return taken

    def poll(self, notify: Callable[[], None] | None) -> int:
        """Whether there is something to read; it can always be written."""
        mask: int = self.reader.poll(notify)
        return mask | select.POLLOUT | select.POLLWRNORM

    def release(self) -> None:
        """Forget the position."""
        self.reader.close()
        self.face.world.opens.drop(self.token)


class TextFile(_LogFile):
    """An open `kmsg` of the tree."""

    def __init__(self, face: Face, token: int, flags: int, reopened: bool) -> None:
        super().__init__(face, token, flags, reopened)
        self.reader = TextReader(self.log, self.known, self.keep)

    def size(self) -> int:
        """Bytes of all lines since the log was cleared."""
        size: int = self.log.text_size()
        return size

    async def read(self, offset: int, size: int, request: int) -> bytes:
        """Whole lines or parts of them; never waits."""
        data: bytes = self.reader.read(size, offset)
        return data


class DeviceFile(_LogFile):
    """An open /dev/kmsg inside."""

    waits = True

    def __init__(self, face: Face, token: int, flags: int, reopened: bool) -> None:
        super().__init__(face, token, flags, reopened)
        self.reader = DeviceReader(self.log, self.known, self.keep)

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA 0: to the first record after the last clear; ESPIPE for an offset, EINVAL for
        another whence."""
        place: int = self.reader.seek(offset, whence)
        return place

    async def read(self, offset: int, size: int, request: int) -> bytes:
        """One record; waits for it unless the file was opened with O_NONBLOCK."""
        data: bytes = await self.reader.read(size, offset, nonblock=self.nonblock, token=request)
        return data


class ProcFile(_LogFile):
    """An open /proc/kmsg inside."""

    takes = waits = True

    def __init__(self, face: Face, token: int, flags: int, reopened: bool) -> None:
        super().__init__(face, token, flags, reopened)
        self.reader = ProcReader(self.log)

    async def read(self, offset: int, size: int, request: int) -> bytes:
        """What no other reader has got; waits for it."""
        data: bytes = await self.reader.read(size, nonblock=self.nonblock, token=request)
        return data

    async def write(self, offset: int, data: bytes, request: int) -> int:
        """EIO, as proc_reg_write() answers for a file without write operation."""
        raise OSError(errno.EIO, "cannot be written", "kmsg")


def _write_host(data: bytes) -> int:
    fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC)
    try:
        return os.write(fd, data)
    finally:
        os.close(fd)


def kmsg_truncate(face: Face, caller: Caller) -> None:
    """Clear: what is there now is no longer shown by `kmsg` and dmesg(1); EPERM when the log is
    another container's, which is not the caller's."""
    check_namespace(face, SYSLOG, caller)
    face.container.log.ring.clear()
    face.container.log_changed_ns = time.time_ns()


def kmsg_size(face: Face) -> int:
    """Bytes of all lines since it was cleared, also those that were overwritten."""
    size: int = face.container.log_size()
    return size


def kmsg_mtime(face: Face) -> int:
    """When the last record came, in ns since the Epoch."""
    return face.container.log_changed_ns


BOUND_ONLY = NOT_ON_ROOT | HIDDEN

FILES = (
    Attribute(
        "kmsg",
        stream=TextFile,
        truncate=kmsg_truncate,
        mode=0o640,
        mtime=kmsg_mtime,
        size=kmsg_size,
    ),
    Attribute("nsfs.dev", stream=DeviceFile, bound="kmsg", mode=0o644, flags=BOUND_ONLY),
    Attribute("nsfs.proc", stream=ProcFile, bound="pkmsg", mode=0o400, flags=BOUND_ONLY),
)
