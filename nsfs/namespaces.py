"""The eight namespace types of namespaces(7): their names, clone flags and identity."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import TypeVar

from nsfs import syscalls

T = TypeVar("T")

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


def check(kind: str, fd: int, numbers: tuple[int, ...]) -> None:
    """ProcessLookupError if a namespace's inode number is not that which `numbers`, in the order
    of TYPES, has; () is for any."""
    if numbers and os.fstat(fd).st_ino != numbers[TYPES.index(kind)]:
        raise ProcessLookupError(errno.ESRCH, "the process has gone elsewhere", kind)


def joined_by_exec(pid: int) -> bool:
    """Whether a process is in the time namespace that it made for its children."""
    return identity(pid, "time") == identity(pid, "time_for_children")


def within(
    pid: int, kinds: tuple[str, ...], work: Callable[[], T], numbers: tuple[int, ...] = ()
) -> T:
    """Run `work` in a process's namespaces of some types; only in a thread of its own.

    `kinds` are such as a single thread can join: net, ipc, uts, cgroup.  The thread comes back to
    its own, whatever happens.  Raises ProcessLookupError when there is no such process, or when it
    is in others than those that `numbers` names (their inode numbers, in the order of TYPES).
    """
    with contextlib.ExitStack() as stack:

        def opened(path: str) -> int:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        back = [opened(f"/proc/thread-self/ns/{kind}") for kind in kinds]
        try:
            there = [opened(f"/proc/{pid}/ns/{kind}") for kind in kinds]
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, "the process is gone", str(pid)) from error
        for kind, fd in zip(kinds, there, strict=True):
            check(kind, fd, numbers)
        try:
            for fd in there:
                syscalls.setns(fd, 0)
            return work()
        finally:
            for fd in back:
                try:
                    syscalls.setns(fd, 0)
                except OSError:
                    # What runs next in this thread must not run there.
                    os.abort()
