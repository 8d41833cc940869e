"""`exec` and `output`: start a command inside, and what such commands print.

exec    0200, one command a write: words split as a shell splits them, nothing expanded; started as
        the container's root, cwd /, no terminal, output to `output`.  A command that cannot start
        is an error of the write (ENOENT, EACCES, ENOEXEC, ...); EPERM for who may not have the
        container's IDs.
output  0440: a bounded log of what those commands print; ends at EOF.
"""

from __future__ import annotations

import errno
import select
import shlex
import time
from collections.abc import Callable

from nsfs.attribute import NOT_ON_ROOT, Attribute, Caller, OpenFile, invalid
from nsfs.authority import check_ids
from nsfs.bytelog import ByteLog
from nsfs.container import Face

READABLE = select.POLLIN | select.POLLRDNORM
WRITABLE = select.POLLOUT | select.POLLWRNORM
ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "USER=root",
    "LOGNAME=root",
    "SHELL=/bin/sh",
    "container=nsfs",
)
"""What a command finds in its environment: nothing of the host's."""


async def exec_store(face: Face, value: str, caller: Caller) -> None:
    """Split and start; the write returns when the command runs."""
    try:
        words = shlex.split(value)
    except ValueError:
        raise invalid(value) from None
    if not words or any("\0" in word for word in words):
        raise invalid(value)
    container = face.container
    container.check_alive()
    check_ids(face, caller)
    if container.suspended():
        raise OSError(errno.EBUSY, "the container is frozen", container.name)
    await container.world.execute(container, words, ENVIRONMENT)


class OutputFile(OpenFile):
    """An open `output`.

    Read, it gives all from the oldest byte that is kept, to EOF; what comes later is read from
    there on.  Written, it appends: the commands have it as standard output and error.  (The same
    inode for both, so that a `grep -r` of the tree knows the file that it prints into.)

    st_size is how many bytes were ever written, so it grows, and a seek to the end leads to where
    the next byte will be.  A read at 0 gives the oldest byte that is kept, and the reads that
    follow it what follows that.  So `base` is the position of offset 0: that of the oldest byte
    after a read at 0, and 0 after a seek past what was read.  It moves, too, when bytes were
    overwritten before they were read.
    """

    def __init__(self, face: Face, token: int, flags: int, reopened: bool) -> None:
        super().__init__(face, token, flags, reopened)
        known = face.world.opens.get(token) if reopened else None
        self.base, self.next = known[:2] if known else (0, 0)

    def size(self) -> int:
        """How many bytes were ever written."""
        return output_size(self.face)

    async def read(self, offset: int, size: int, request: int) -> bytes:
        """Bytes at that offset; b"" at the end."""
        log: ByteLog = self.face.container.output
        if not offset:
            self.base = log.start
        elif offset > self.next:
            self.base = 0
        position, data = log.read(self.base + offset, size)
        if position - offset != self.base:
            self.base = position - offset
        self.next = offset + len(data)
        # Modulo 2**64: more may have been overwritten than the offset is.
        self.face.world.opens.put(self.token, self.base & (1 << 64) - 1, self.next)
        return data

    async def write(self, offset: int, data: bytes, request: int) -> int:
        """Append, whatever the offset."""
        self.face.container.output.write(data, time.time_ns())
        self.face.container.printed.tell()
        return len(data)

    def poll(self, notify: Callable[[], None] | None) -> int:
        """Writable, and readable when there is more than was read."""
        container = self.face.container
        if notify is not None:
            container.printed.add(self, notify)
        more = container.output.end > self.base + self.next
        return WRITABLE | (READABLE if more else 0)

    def release(self) -> None:
        """Forget the position."""
        self.face.container.printed.drop(self)
        self.face.world.opens.drop(self.token)


def output_size(face: Face) -> int:
    """How many bytes were ever printed."""
    size: int = face.container.output.end
    return size


def output_mtime(face: Face) -> int:
    """When something was last printed."""
    mtime_ns: int = face.container.output.mtime_ns
    return mtime_ns


FILES = (
    Attribute("exec", store=exec_store, flags=NOT_ON_ROOT),
    Attribute(
        "output",
        stream=OutputFile,
        bound="output",
        mode=0o440,
        flags=NOT_ON_ROOT,
        mtime=output_mtime,
        size=output_size,
    ),
)
