"""Make room for `/sys/namespaces`: sysfs lets nobody make a directory.

A tmpfs over /sys binds every entry of the real one, with all that is mounted below, plus the new
directory.  It is built aside and then bound over /sys whole, so nobody ever sees half of it.

An overmounted sysfs would forbid every new user namespace a sysfs of its own (mount_too_revealing()
in fs/namespace.c wants an unobstructed one to be visible), so one more is mounted at a quiet place,
below the run directory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from nsfs import syscalls
from nsfs.attribute import unescape
from nsfs.syscalls import MNT_DETACH, MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC

SYS = "/sys"


def quiet_path(run_dir: str) -> str:
    """Where the unobstructed sysfs is."""
    return f"{run_dir}/sys"


def needed(directory: str) -> bool:
    """Whether that mount point can only be made by a graft."""
    return os.path.dirname(directory) == SYS and not os.path.isdir(directory)


def graft(directory: str, run_dir: str) -> list[str]:
    """Make `directory`, an entry of /sys; returns what to unmount, in that order, to undo it.

    On an error nothing is left mounted.
    """
    name = os.path.basename(directory)
    quiet, build = quiet_path(run_dir), f"{run_dir}/graft"
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    with contextlib.ExitStack() as undo:
        os.makedirs(quiet, exist_ok=True)
        syscalls.mount("sysfs", quiet, "sysfs", flags)
        undo.callback(syscalls.umount, quiet, MNT_DETACH)
        os.makedirs(build, exist_ok=True)
        syscalls.mount("tmpfs", build, "tmpfs", flags, "mode=0755,size=64k")
        with contextlib.ExitStack() as aside:
            aside.callback(os.rmdir, build)
            aside.callback(syscalls.umount, build, MNT_DETACH)
            # Or the binds would show up in every mount namespace that follows this one, twice.
            syscalls.mount("none", build, None, MS_PRIVATE)
            for entry in os.scandir(SYS):
                target = f"{build}/{entry.name}"
                if entry.is_symlink():
                    os.symlink(os.readlink(entry.path), target)
                elif entry.is_dir():
                    os.mkdir(target)
                    syscalls.mount(entry.path, target, None, MS_BIND | MS_REC)
                else:
                    os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
                    syscalls.mount(entry.path, target, None, MS_BIND)
            os.mkdir(f"{build}/{name}")
            syscalls.mount(build, SYS, None, MS_BIND | MS_REC)
        undo.pop_all()
    return [SYS, quiet]


def undo(unmount: list[str]) -> None:
    """Undo a graft that the supervisor did not get to undo."""
    for path in unmount:
        kinds = [kind for point, kind, _ in mounts() if point == path]
        # Below the tmpfs is the real sysfs, which stays.
        if kinds and kinds[-1] == ("tmpfs" if path == SYS else "sysfs"):
            syscalls.umount(path, MNT_DETACH)


def take_down(directory: str, run_dir: str) -> None:
    """Unmount what an instance that has ended left: the tree, and the graft if it made one."""
    if served(directory) == run_dir:
        syscalls.umount(directory, MNT_DETACH)
    if any(point == quiet_path(run_dir) for point, _, _ in mounts()):
        undo([SYS, quiet_path(run_dir)])


def mounts() -> Iterator[tuple[str, str, str]]:
    """This process's mounts: (mount point, type, source)."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, source = after.split()[:2]
            yield unescape(before.split()[4]), kind, unescape(source)


def served(directory: str) -> str | None:
    """The run directory of the instance that serves a tree there, or None."""
    found = None
    for point, kind, source in mounts():
        if point == directory:
            found = source if kind == "fuse.namespaces" else None
    return found


def device_numbers(directory: str) -> tuple[int, int]:
    """The major and minor number of what is mounted there, without a look at the mount itself."""
    found = (0, 0)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            if unescape(fields[4]) == directory:
                major, _, minor = fields[2].partition(":")
                found = int(major), int(minor)
    return found
