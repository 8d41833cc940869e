"""A small filesystem for test_takeover.py, started by nsfs-supervisor: parked_fs.py STATE.

    park    a read blocks until STATE/release exists or its caller gets a signal
    data    the file STATE/data
    number  the number of the daemon, from 1
    caller  thread ID, uid and gid of who reads it
    seen    is there as long as the process STATE/holder and the symbolic link STATE/link are; its
            size is how often it was looked up here

and directories, which are symlinks STATE/dirs/NAME to the unique of the mkdir that made them: so
one that is replayed is recognised.  STATE/journal has a line for each mkdir carried out,
STATE/replayed for each that was, or read of park, STATE/starts for each start.  STATE/fault says
how this daemon shall fail (see `fail`); while there is STATE/deaf it ignores interrupts.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from nsfs.syscalls import forget_answers, keep_answer
from nsfs.takeover import Device

FILES = {b"park": 2, b"data": 3, b"number": 4, b"caller": 5, b"seen": 6}
FIRST_DIRECTORY = 1000


class ParkedFS(pyfuse3.Operations):
    def __init__(self, device: Device, state: Path) -> None:
        super().__init__()
        self.device = device
        self.state = state
        self.data_fd = os.open(state / "data", os.O_RDWR | os.O_CREAT)
        self.journal_fd = os.open(state / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.replayed_fd = os.open(state / "replayed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.released = trio.Event()
        self.parked: dict[int, trio.CancelScope] = {}
        self.state_fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
        self.lookups = 0
        self.mode = 0o666

    def init(self) -> None:
        if self.device.generation == 1 and fault(self.state) == "stop in":
            os.kill(os.getpid(), signal.SIGSTOP)

    def note(self, unique: int, replayed: bool) -> None:
        if replayed:
            os.write(self.replayed_fd, b"%d\n" % unique)

    def attributes(self, inode: int) -> EntryAttributes:
        attributes = EntryAttributes()
        attributes.st_ino = inode
        attributes.st_size = 4096
        attributes.st_nlink = 1
        directory = inode == pyfuse3.ROOT_INODE or inode >= FIRST_DIRECTORY
        attributes.st_mode = stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | self.mode
        if inode == FILES[b"seen"]:
            attributes.st_size = self.lookups
        attributes.attr_timeout = attributes.entry_timeout = 0
        return attributes

    def directory(self, name: bytes) -> int:
        try:
            return FIRST_DIRECTORY + os.lstat(self.state / "dirs" / os.fsdecode(name)).st_ino
        except FileNotFoundError:
            raise FUSEError(errno.ENOENT) from None

    async def getattr(self, inode: int, ctx: Any = None) -> EntryAttributes:
        return self.attributes(inode)

    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any
    ) -> EntryAttributes:
        if fields.update_mode:
            self.mode = stat.S_IMODE(attr.st_mode)
            forget_answers()
        return self.attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> EntryAttributes:
        if parent_inode != pyfuse3.ROOT_INODE:
            raise FUSEError(errno.ENOENT)
        if name == b"seen":
            self.look()
        return self.attributes(FILES.get(name) or self.directory(name))

    def look(self) -> None:
        self.lookups += 1
        holder = int((self.state / "holder").read_text())
        try:
            os.kill(holder, 0)
            os.readlink("link", dir_fd=self.state_fd)
        except OSError:
            raise FUSEError(errno.ENOENT) from None
        keep_answer(self.device.current()[0], holder, self.state_fd, "link")

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> EntryAttributes:
        unique, parent, opcode, replayed = self.device.current()
        self.note(unique, replayed)
        assert (parent, opcode) == (parent_inode, 9)
        assert self.device.caller() == (ctx.pid, ctx.uid, ctx.gid)
        if name == b"abort":
            os.abort()
        record = self.state / "dirs" / os.fsdecode(name)
        try:
            os.symlink(str(unique), record)
        except FileExistsError:
            if not replayed or os.readlink(record) != str(unique):
                raise FUSEError(errno.EEXIST) from None
        else:
            os.write(self.journal_fd, name + b"\n")
        await trio.sleep(0.001)  # a moment to be killed at
        return self.attributes(self.directory(name))

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def open(self, inode: int, flags: int, ctx: Any) -> FileInfo:
        return FileInfo(fh=inode, direct_io=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh == FILES[b"park"]:
            return await self.park()
        if fh == FILES[b"data"]:
            return os.pread(self.data_fd, size, off)
        if fh == FILES[b"caller"]:
            return b"%d %d %d\n"[off:] % self.device.caller() if off == 0 else b""
        return (b"%d\n" % self.device.generation)[off:]

    async def park(self) -> bytes:
        unique, _, _, replayed = self.device.current()
        self.note(unique, replayed)
        with trio.CancelScope() as scope:
            self.parked[unique] = scope
            try:
                await self.released.wait()
            finally:
                del self.parked[unique]
            return b"released\n"
        raise FUSEError(errno.EINTR)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return os.pwrite(self.data_fd, buf, off)

    async def cancel_interrupted(self) -> None:
        while (self.state / "deaf").exists():  # noqa: ASYNC110 (a file is no event)
            await trio.sleep(0.02)
        async for unique in self.device.interrupts():
            if unique in self.parked:
                self.parked[unique].cancel()

    async def watch_release(self) -> None:
        while not (self.state / "release").exists():  # noqa: ASYNC110 (a file is no event)
            await trio.sleep(0.02)
        self.released.set()

    async def stop_on_sigterm(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                for scope in self.parked.values():
                    scope.cancel()
                pyfuse3.terminate()


def fault(state: Path) -> str:
    try:
        return (state / "fault").read_text()
    except FileNotFoundError:
        return ""


def fail(state: Path, generation: int) -> None:
    """Die as STATE/fault says: "exit N", "signal N", "later N" (by signal N, but the first not).

    Or stop: "stop before" the kernel's INIT is read, "stop in" its operation.
    """
    kind, _, number = fault(state).partition(" ")
    if kind == "exit":
        sys.exit(int(number))
    if kind == "signal" or (kind == "later" and generation > 1):
        os.kill(os.getpid(), int(number))


async def serve(device: Device, state: Path) -> None:
    filesystem = ParkedFS(device, state)
    pyfuse3.init(filesystem, device.path, {"default_permissions"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(filesystem.stop_on_sigterm)
        nursery.start_soon(filesystem.cancel_interrupted)
        nursery.start_soon(filesystem.watch_release)
        device.ready()
        if device.generation == 1 and fault(state) == "stop before":
            os.kill(os.getpid(), signal.SIGSTOP)
        await pyfuse3.main(max_tasks=100000)
        nursery.cancel_scope.cancel()
    pyfuse3.close(unmount=False)


def main(state: Path) -> None:
    device = Device.from_environment()
    assert "LD_PRELOAD" not in os.environ
    with open(state / "starts", "a") as starts:
        starts.write(f"{time.monotonic()}\n")
    fail(state, device.generation)
    (state / "dirs").mkdir(exist_ok=True)
    trio.run(serve, device, state)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
