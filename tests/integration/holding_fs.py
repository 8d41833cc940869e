"""A filesystem whose file `held` is opened, but what is in it never comes: holding_fs.py MOUNTPOINT.

The file `direct` is the same, but opened for direct I/O: who maps it while a page of it is awaited
waits with the lock of his memory (mmap_lock) held.  In the directory `dir`, which cannot be listed,
every file is like `held`, and a program.  Once a line was written to its standard input, `dir`
cannot be looked up any more: who tries waits; after the line "within" it can, but nothing in it.
Nobody who waits heeds signals, SIGKILL included, as with any FUSE server that does not.

It tells by a line when it is mounted, and ends when its standard input does.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

HELD = 2
DIRECTORY = 3
DIRECT = 4


class HoldingFS(pyfuse3.Operations):
    gone = within = False
    """Whether lookups of the directory wait; or those of what is in it."""

    def attributes(self, inode: int) -> EntryAttributes:
        attributes = EntryAttributes()
        attributes.st_ino = inode
        attributes.st_nlink = 1
        attributes.st_size = 1 << 20
        attributes.st_mode = (
            stat.S_IFREG | 0o777 if inode in (HELD, DIRECT) else stat.S_IFDIR | 0o755
        )
        attributes.entry_timeout = 0
        return attributes

    async def getattr(self, inode: int, ctx: Any = None) -> EntryAttributes:
        return self.attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> EntryAttributes:
        if self.within and parent_inode == DIRECTORY:
            await trio.sleep_forever()
        if parent_inode == DIRECTORY or name == b"held":
            return self.attributes(HELD)
        if name == b"direct":
            return self.attributes(DIRECT)
        if name != b"dir":
            raise FUSEError(errno.ENOENT)
        if self.gone:
            await trio.sleep_forever()
        return self.attributes(DIRECTORY)

    async def opendir(self, inode: int, ctx: Any) -> int:
        await trio.sleep_forever()

    async def open(self, inode: int, flags: int, ctx: Any) -> FileInfo:
        return FileInfo(fh=inode, keep_cache=True, direct_io=inode == DIRECT)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await trio.sleep_forever()


async def main(mountpoint: str) -> None:
    filesystem = HoldingFS()
    pyfuse3.init(filesystem, mountpoint, {"fsname=holding", "allow_other"})
    print("mounted", flush=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        await trio.lowlevel.wait_readable(sys.stdin)
        while line := os.read(0, 100):
            filesystem.within = line == b"within\n"
            filesystem.gone = not filesystem.within
            print("gone", flush=True)
            await trio.lowlevel.wait_readable(sys.stdin)
        # Aborts the connection: what waits fails, as it does when such a server dies.
        os._exit(0)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
