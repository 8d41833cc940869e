"""The eight namespace types of namespaces(7): their names, clone flags and identity."""

from __future__ import annotations

import os

# In the order in which setns(2) of several at once works for a process that enters: `user` first,
# since it gives the capabilities that the others ask for.
TYPES: tuple[str, ...] = ("user", "cgroup", "ipc", "mnt", "net", "pid", "time", "uts")
# As ls(1) and the files of the tree show them.
SORTED: tuple[str, ...] = tuple(sorted(TYPES))
# The one that the kernel never got: it is nsfs's own, a container's kernel log.
SYSLOG = "syslog"
ALL: frozenset[str] = frozenset(TYPES)


def identity(pid: int | str, kind: str) -> int:
    """The inode number that names a process's namespace, as lsns(8) prints it.

    `pid` is a PID of the host or "self".  Raises FileNotFoundError when there is no such process,
    PermissionError where ptrace(2)'s access check forbids to look.
    """
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino
