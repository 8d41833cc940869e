"""Who may do what to what, where the modes of the tree cannot say it.

The permission model is the kernel's: plain owners and modes, checked by it (`default_permissions`).
Here is only what concerns things outside of the tree: which directory of the host may become a root
filesystem.
"""

from __future__ import annotations

import errno
import os
import stat

from nsfs.attribute import Caller
from nsfs.container import Container


def check_rootfs(tree_fd: int, path: str, caller: Caller, container: Container) -> None:
    """Whether a caller may make that tree a container's root filesystem; EPERM when not.

    Idmapped from uid 0, its files belong on disk to the host's users: a member that is root inside
    could leave a setuid program of the host's root there.  So the host's root may name such a tree
    only where other users of the host cannot reach it: below a directory that they cannot search.
    Anybody else may name a tree of their own.
    """
    found = os.fstat(tree_fd)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "the root filesystem is no directory", path)
    if caller.uid != 0:
        if found.st_uid != caller.uid:
            raise PermissionError(errno.EPERM, "the tree belongs to somebody else", path)
        return
    if "user" not in container.build.types:
        return
    if not _hidden_from_others(caller.tid, path):
        raise PermissionError(
            errno.EPERM,
            "others can search every directory above it, and so run setuid programs left there",
            path,
        )


def _hidden_from_others(tid: int, path: str) -> bool:
    """Whether the tree or a directory above it lets no `other` pass, as that process sees the
    path."""
    root = f"/proc/{tid}/root"
    real = os.path.normpath(path)
    while True:
        if not os.stat(root + real).st_mode & stat.S_IXOTH:
            return True
        if real == "/":
            return False
        real = os.path.dirname(real)
