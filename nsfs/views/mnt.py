"""`mnt/`: a mount namespace as a tagged view (mount_namespaces(7)).

mounts        0444: its mounts as its init sees them, in the form of proc_pid_mounts(5)
root          a link to its root directory, for whoever the kernel lets look (ptrace(2))
"""

from __future__ import annotations

import os

from nsfs import members
from nsfs.attribute import Attribute, Link, TagType
from nsfs.container import Face
from nsfs.view import in_thread, tag


async def mounts_show(face: Face) -> bytes:
    """The kernel's own table."""
    container = tag(face, VIEW)
    pid = "self" if container.parent is None else container.init_pid
    return await in_thread(lambda: _read(f"/proc/{pid}/mounts"))


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def root_target(face: Face) -> str:
    """The root of the init; of who looks, when that is in the same mount namespace."""
    container = tag(face, VIEW)
    if container.parent is None or container in face.viewpoint.lineage():
        return "/"
    return f"/proc/{members.seen_pid(container.init_pid, members.level(face.viewpoint))}/root"


VIEW = TagType(
    "mnt", entries=(Attribute("mounts", show=mounts_show), Link("root", target=root_target))
)
FILES = (VIEW,)
