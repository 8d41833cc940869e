"""Who may do what to what, where the modes of the tree cannot say it.

The permission model is the kernel's: plain owners and modes, checked by it (`default_permissions`).
Here is only what concerns things outside of the tree: which directory of the host may become a root
filesystem.
"""

from __future__ import annotations

import errno
import os
import stat

import trio

from nsfs.attribute import Caller
from nsfs.container import Build, Container, Face


async def check_rootfs(tree_fd: int, build: Build, container: Container) -> None:
    """Whether whoever named that tree may make it a container's root filesystem; EPERM when not.

    Idmapped from uid 0, its files belong on disk to the host's users: a member that is root inside
    could leave a setuid program of the host's root there.  So the host's root may name such a tree
    only where other users of the host cannot reach it: below a directory that they cannot search.
    Anybody else may name a tree of their own.

    The filesystem that it is on may be slow, broken, somebody's FUSE daemon or our own: a thread
    asks it.
    """
    # The thread may go on when nobody waits for it any more.
    fd = os.dup(tree_fd)
    await trio.to_thread.run_sync(_check_rootfs, fd, build, container, abandon_on_cancel=True)


def _check_rootfs(tree_fd: int, build: Build, container: Container) -> None:
    path, origin = build.rootfs, build.rootfs_origin
    try:
        found = os.fstat(tree_fd)
    finally:
        os.close(tree_fd)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "the root filesystem is no directory", path)
    if (os.major(found.st_dev), os.minor(found.st_dev)) == container.world.device_numbers:
        raise OSError(errno.EINVAL, "the tree is nsfs's own", path)
    if origin.uid != 0:
        if found.st_uid != origin.uid:
            raise PermissionError(errno.EPERM, "the tree belongs to somebody else", path)
    elif "user" in build.types and not _hidden_from_others(path):
        raise PermissionError(
            errno.EPERM,
            "others can search every directory above it, and so run setuid programs left there",
            path,
        )


def _hidden_from_others(path: str) -> bool:
    """Whether the host's tree or a directory above it lets no `other` pass."""
    real = os.path.realpath(path)
    while True:
        if not os.stat(real).st_mode & stat.S_IXOTH:
            return True
        if real == "/":
            return False
        real = os.path.dirname(real)


def check_namespace(face: Face, kind: str, caller: Caller) -> None:
    """Whether a caller may change the namespace of a type that a container is in; EPERM if not.

    The container may be sharing it with one that it is in: then it is that one's to change, and
    from inside, where nothing names an ancestor, nobody's.
    """
    holder = face.container.holder(kind)
    if holder is face.container:
        return
    inside = face.viewpoint in holder.lineage()
    may = {0, holder.uid} if face.viewpoint.parent is None else {face.viewpoint.root_uid}
    if not inside or caller.uid not in may:
        raise PermissionError(errno.EPERM, f"its {kind} namespace is another's", holder.name)


def check_seen_once(tid: int, device: tuple[int, int], viewpoint: int) -> None:
    """EPERM when the caller's mount namespace has the tree at more than one place.

    The mount is unbindable, so that `mount --rbind /sys chroot/sys` does not carry it along into a
    tree that somebody will `rm -rf`.  But a copy of the mount namespace is bindable again
    (clone_mnt() keeps no such flag).  There a removal may be meant for the copy, and what that
    would kill is the same.  Which of the two places a request came by cannot be seen.
    """
    root = "/" if not viewpoint else f"/.f/{viewpoint}"
    wanted = f"{device[0]}:{device[1]}"
    places = 0
    try:
        with open(f"/proc/{tid}/mountinfo", "rb") as file:
            for line in file.read().decode(errors="surrogateescape").splitlines():
                fields = line.split(" ", 5)
                places += fields[2] == wanted and fields[3] == root
    except (FileNotFoundError, ProcessLookupError):
        return
    if places > 1:
        raise PermissionError(
            errno.EPERM,
            f"the tree is mounted at {places} places there: which is meant is not clear",
        )
