"""The example that listings are compared with: a directory of so many empty files, by pyfuse3 and
nothing else.

    emptyfiles.py DIR COUNT     serves until it is unmounted or gets SIGTERM
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FUSEError

FIRST_FILE = 2


class EmptyFiles(pyfuse3.Operations):
    """Inode 1 is the directory, the rest are files."""

    supports_dot_lookup = False

    def __init__(self, count: int) -> None:
        super().__init__()
        names = [b"f%d" % number for number in range(count)]
        self.files = list(enumerate(names, FIRST_FILE))
        self.inodes = {name: inode for inode, name in self.files}

    def _attributes(self, inode: int) -> EntryAttributes:
        attr = EntryAttributes()
        directory = inode == pyfuse3.ROOT_INODE
        attr.st_ino = pyfuse3.InodeT(inode)
        attr.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o644)
        attr.st_nlink = 1
        attr.entry_timeout = attr.attr_timeout = 1.0
        return attr

    async def getattr(self, inode: int, ctx: Any) -> EntryAttributes:
        return self._attributes(inode)

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> EntryAttributes:
        inode = self.inodes.get(name)
        if inode is None:
            raise FUSEError(errno.ENOENT)
        return self._attributes(inode)

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        # An offset is the index of the entry that comes next.
        for offset, (inode, name) in enumerate(self.files[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self._attributes(inode), offset):
                break


async def serve() -> None:
    """Until it is unmounted."""
    await pyfuse3.main()


if __name__ == "__main__":
    pyfuse3.init(EmptyFiles(int(sys.argv[2])), sys.argv[1], {"fsname=emptyfiles"})
    os.write(1, b"ready\n")
    try:
        trio.run(serve)
    finally:
        pyfuse3.close(unmount=True)
