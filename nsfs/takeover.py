"""The FUSE device as the supervisor hands it down, and what the interposer says about requests.

A daemon that dies leaves requests unanswered; the next one is given them again by its interposer
(``csrc/interposer.c``), before new ones.  Nothing in Python takes part in that, except that a
request which changes something must be recorded by its `unique` before it is carried out:
`Device.current` says that it is ``replayed`` when an earlier daemon may have begun with it.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import NamedTuple, cast

import trio

# csrc/inflight.h: struct inflight_head, and where the rest of the memfd lies.
_HEAD = struct.Struct("=IIIIIIiI")
_MAGIC = 0x3273666E
_SERVING = struct.Struct("=16xI")
_CURRENT = struct.Struct("=32xQQI12x?")
_CALLER = struct.Struct("=32x20xIII")
_FILLS_PAGE = 32 + 33
_SLOTS = 16384
_USED = 4096
_SLOT_BYTES = 65536 + 4096
_FIRST_SLOT = _USED + _SLOTS * 4 + _SLOT_BYTES
_IN_HEADER = struct.Struct("=4xIQQ8xI")

_VARIABLES = ("NSFS_FUSE_FD", "NSFS_INFLIGHT_FD", "NSFS_SUPERVISOR_FD")


LSEEK = 46
"""The opcode of an lseek(2) in the guise of a read; pyfuse3 knows no such request."""
_WHENCE_SHIFT = 56


def seek(offset: int) -> tuple[int, int]:
    """(offset, whence) of an lseek(2) from the offset of the read that the interposer makes of it.

    The answer to it is the new offset, as `sought` has it.
    """
    return offset & (1 << _WHENCE_SHIFT) - 1, offset >> _WHENCE_SHIFT & 7


def sought(offset: int) -> bytes:
    """The answer to an lseek(2): struct fuse_lseek_out."""
    return struct.pack("=Q", offset)


class Supervisor:
    """The process that started this daemon, and starts the next one."""

    def __init__(self, run_dir: str) -> None:
        parent = os.getppid()
        try:
            with open(f"{run_dir}/supervisor.pid", encoding="ascii") as file:
                # Another parent: it was killed before this was asked.
                self._pid_fd = os.pidfd_open(parent) if int(file.read()) == parent else -1
        except (OSError, ValueError):
            self._pid_fd = -1

    def lives(self) -> bool:
        """Whether it is still there."""
        return self._pid_fd >= 0 and not select.select([self._pid_fd], [], [], 0)[0]

    async def died(self) -> None:
        """Wait for its end."""
        if self._pid_fd >= 0:
            await trio.lowlevel.wait_readable(self._pid_fd)


class Request(NamedTuple):
    """A request that was read from the kernel and is not answered yet."""

    unique: int
    nodeid: int
    opcode: int
    pid: int  # a thread's ID, as the host knows it


class Device:
    """What this daemon was given by its supervisor.

    ``current()`` is the request being dispatched as ``(unique, nodeid, opcode, replayed)``.  It is
    right until the first await of an operation of `pyfuse3.Operations`: pyfuse3 awaits nothing
    between reading a request and that.  It costs 40 ns.
    """

    path: str  # the mountpoint to give to `pyfuse3.init`
    takeover: bool  # an earlier daemon served this mount
    generation: int  # the number of this daemon, from 1
    current: Callable[[], tuple[int, int, int, bool]]

    def __init__(self, fuse_fd: int, inflight_fd: int, supervisor_fd: int) -> None:
        """Use `from_environment`; the descriptors are taken over."""
        self._inflight_fd = inflight_fd
        self._supervisor_fd = supervisor_fd
        self._head = mmap.mmap(inflight_fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        magic, generation, _, attached, _, takeover, interrupt_fd, _ = _HEAD.unpack_from(self._head)
        if magic != _MAGIC or attached != os.getpid():
            raise OSError("the interposer is not loaded in this process (LD_PRELOAD)")
        self.path = f"/dev/fd/{fuse_fd}"
        self.takeover = bool(takeover)
        self.generation = generation
        self._interrupt_fd = interrupt_fd
        # Without a method of our own in between: this is called once for each request.
        self.current = cast(
            "Callable[[], tuple[int, int, int, bool]]", partial(_CURRENT.unpack_from, self._head)
        )

    @classmethod
    def from_environment(cls) -> Device:
        """Take what the supervisor gave out of the environment, so that no child gets it.

        Raises OSError if it gave nothing, or if the interposer is not loaded.
        """
        missing = [name for name in _VARIABLES if name not in os.environ]
        if missing:
            raise OSError(f"not started by nsfs-supervisor: no {', '.join(missing)}")
        fds = [int(os.environ.pop(name)) for name in _VARIABLES]
        os.environ.pop("LD_PRELOAD", None)
        for fd in fds:
            os.set_inheritable(fd, False)
        return cls(*fds)

    def caller(self) -> tuple[int, int, int]:
        """Thread ID, uid and gid (the host's) of who made the current request.

        For read, write and the like, whose operations get no `pyfuse3.RequestContext`.
        """
        caller: tuple[int, int, int] = _CALLER.unpack_from(self._head)
        return caller

    def fills_page(self) -> bool:
        """Whether the current request is a read for the page cache: of a private mapping, say.

        Until it is answered a page of the file is locked, and whoever opens or maps the file waits
        for it, whatever signals come.
        """
        return bool(self._head[_FILLS_PAGE])

    async def interrupts(self) -> AsyncIterator[int]:
        """The unique of each request whose caller got a signal, as the kernel reports them.

        The caller waits until its request is answered, even if it was killed: the operation is to
        be cancelled and to raise ``FUSEError(EINTR)``.  Requests that were interrupted before a
        takeover are reported again after it.
        """
        while True:
            await trio.lowlevel.wait_readable(self._interrupt_fd)
            for (unique,) in struct.iter_unpack("=Q", os.read(self._interrupt_fd, 4096)):
                yield unique

    def ready(self) -> None:
        """Tell the supervisor that the filesystem is served; once, after `pyfuse3.init`.

        Raises OSError if pyfuse3 does not go through the interposer.
        """
        (serving,) = _SERVING.unpack_from(self._head)
        if serving != os.getpid():
            raise OSError("pyfuse3 was not given this device by pyfuse3.init(operations, path)")
        os.write(self._supervisor_fd, b"ready\n")
        os.close(self._supervisor_fd)

    def in_flight(self) -> list[Request]:
        """The requests that are not answered yet, oldest first."""
        return in_flight(self._inflight_fd)


def in_flight(inflight_fd: int) -> list[Request]:
    """The requests recorded in a supervisor's memfd, oldest first."""
    used = struct.unpack(f"={_SLOTS}I", os.pread(inflight_fd, _SLOTS * 4, _USED))
    found = []
    for slot in (slot for slot, recorded in enumerate(used) if recorded):
        header = os.pread(inflight_fd, _IN_HEADER.size, _FIRST_SLOT + slot * _SLOT_BYTES)
        opcode, unique, nodeid, pid = _IN_HEADER.unpack(header)
        found.append(Request(unique, nodeid, opcode, pid))
    return sorted(found)
