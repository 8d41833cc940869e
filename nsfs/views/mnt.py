"""`mnt/`: a mount namespace as a tagged view (mount_namespaces(7)).

mounts        0444: its mounts as its init sees them, in the form of proc_pid_mounts(5); EFBIG
              when that is longer than 16 MiB
propagation   0644: whether what the host mounts later below a bind's source, or below `rootfs`, is
              seen inside: `private` or `slave` (mount_namespaces(7)); written while idle, it
              rebuilds the container
root          a link to its root directory, for whoever the kernel lets look (ptrace(2))
"""

from __future__ import annotations

import dataclasses
import errno
import os

from nsfs import members
from nsfs.attribute import FOUND, NOT_ON_ROOT, PARENTS, Attribute, Caller, Link, TagType, invalid
from nsfs.container import Face
from nsfs.rebuild import rebuild
from nsfs.view import PROC, in_thread, tag

MOUNTS_SIZE_MAX = 1 << 24
"""Bytes: there may be 100,000 mounts (sysctl fs.mount-max), each at a path of any length."""


async def mounts_show(face: Face) -> bytes:
    """The kernel's own table."""
    container = tag(face, VIEW)
    pid = "self" if container.parent is None else container.init_pid
    return await in_thread(lambda: _read(f"/proc/{pid}/mounts"), PROC, container)


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = bytearray()
        while part := os.read(fd, 65536):
            text += part
            if len(text) > MOUNTS_SIZE_MAX:
                raise OSError(errno.EFBIG, "the table of mounts is too long", path)
        return bytes(text)
    finally:
        os.close(fd)


def root_target(face: Face) -> str:
    """The root of the init; of who looks, when that is in the same mount namespace."""
    container = tag(face, VIEW)
    if container.parent is None or container in face.viewpoint.lineage():
        return "/"
    return f"/proc/{members.seen_pid(container.init_pid, members.level(face.viewpoint))}/root"


def propagation_show(face: Face) -> str:
    """`private` or `slave`; the host's own is its administrator's affair."""
    return f"{tag(face, VIEW).build.propagation}\n"


async def propagation_store(face: Face, value: str, caller: Caller) -> None:
    """EINVAL for another word, EOPNOTSUPP without a mount namespace of its own."""
    container = face.container
    if value not in ("private", "slave"):
        raise invalid(value)
    if container.parent is None or not container.own("mnt"):
        raise OSError(errno.EOPNOTSUPP, "no mount namespace of its own", container.name)
    if value != container.build.propagation:
        await rebuild(container, dataclasses.replace(container.build, propagation=value))


VIEW = TagType(
    "mnt",
    entries=(
        Attribute("mounts", show=mounts_show, flags=FOUND),
        Attribute(
            "propagation",
            show=propagation_show,
            store=propagation_store,
            flags=PARENTS | NOT_ON_ROOT,
        ),
        Link("root", target=root_target, flags=FOUND),
    ),
    flags=FOUND,
)
FILES = (VIEW,)
