"""`net/`: a network namespace as a tagged view (network_namespaces(7)).

net/sysctl/  /proc/sys/net of that namespace, with the kernel's own modes, values and errors
net/IFACE/   the kernel's own /sys/class/net/IFACE of that namespace: its attributes, readable and
             writable with the kernel's own modes, values and errors
             (Documentation/ABI/testing/sysfs-class-net); links to other interfaces lead to their
             directories beside it, those that lead out of the namespace are left out

The kernel's sysfs shows the network namespace that was current when it was mounted, and is mounted
nowhere here: a detached mount, which does not keep the namespace alive.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Iterable, Iterator

from nsfs.attribute import Attribute, Caller, Contents, Directory, Entry, Link, TagType
from nsfs.container import Container, Face
from nsfs.syscalls import new_mount
from nsfs.sysctl import Sysctls
from nsfs.view import in_thread, inside

SYSCTL = "sysctl"
"""An interface of that name is not shown."""
VALUE_SIZE = 4096
"""sysfs's own bound: a page."""
QUICK = frozenset(
    """
    addr_assign_type addr_len address broadcast carrier_changes carrier_down_count carrier_up_count
    dev_id dev_port dormant flags gro_flush_timeout group ifalias ifindex iflink link_mode mtu
    name_assign_type napi_defer_hard_irqs operstate proto_down testing tx_queue_len type uevent
    """.split()  # noqa: SIM905
)
"""Attributes whose show function takes no lock that others hold for long (net/core/net-sysfs.c);
those of `statistics` likewise.  All others take the RTNL or ask a driver: a thread reads them."""


class Interfaces(Contents):
    """The interfaces of one network namespace, by a detached sysfs, and its sysctls."""

    def __init__(self, container: Container, sysfs_fd: int) -> None:
        self._fd = sysfs_fd
        self._sysctls = Sysctls(container, ("net",), (("net",),))

    def close(self) -> None:
        """The mount goes with its last descriptor."""
        fd, self._fd = self._fd, -1
        os.close(fd)
        self._sysctls.close()

    def names(self, path: tuple[str, ...]) -> Iterable[str] | Awaitable[Iterable[str]]:
        """Interfaces and `sysctl`, or what the kernel shows of one."""
        if path[:1] == (SYSCTL,):
            return self._sysctls.names(("net", *path[1:]))
        return [*self._names(path), *(() if path else (SYSCTL,))]

    def _names(self, path: tuple[str, ...]) -> Iterator[str]:
        with self._scan(path) as found:
            for each in found:
                if path and each.is_symlink() and self._beside(path, each.name) is None:
                    continue
                # `bonding_masters` stands beside the interfaces.
                if path or (each.is_symlink() and each.name != SYSCTL):
                    yield each.name

    def _scan(self, path: tuple[str, ...]) -> os._ScandirIterator[str]:
        fd = os.open(self._path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return os.scandir(fd)
        finally:
            os.close(fd)

    def entry(self, path: tuple[str, ...]) -> Entry | Awaitable[Entry]:
        """An interface, a directory of one, an attribute, or a link to another interface; or a
        sysctl."""
        if path == (SYSCTL,):
            return Directory(SYSCTL)
        if path[0] == SYSCTL:
            return self._sysctls.entry(("net", *path[1:]))
        where = self._path(path)
        if len(path) == 1:
            # The kernel has a link there, to wherever the device is.
            if not stat.S_ISDIR(os.stat(where, dir_fd=self._fd).st_mode):
                raise FileNotFoundError(errno.ENOENT, "no such interface", path[0])
            return Directory(path[0])
        found = os.stat(where, dir_fd=self._fd, follow_symlinks=False).st_mode
        if stat.S_ISDIR(found):
            return Directory(path[-1])
        if stat.S_ISLNK(found):
            target = self._beside(path[:-1], path[-1])
            if target is None:
                raise FileNotFoundError(errno.ENOENT, "it leads out of the view", path[-1])
            return Link(path[-1], target=lambda face: target)
        return self._attribute(path, where, stat.S_IMODE(found))

    def _attribute(self, path: tuple[str, ...], where: str, mode: int) -> Attribute:
        quick = path[1] == "statistics" or (len(path) == 2 and path[1] in QUICK)

        async def show(face: Face) -> bytes:
            return self._read(where) if quick else await in_thread(lambda: self._read(where))

        async def store(face: Face, value: str, caller: Caller) -> None:
            await in_thread(lambda: self._write(where, value))

        return Attribute(
            path[-1],
            mode=mode,
            show=show if mode & 0o444 else None,
            store=store if mode & 0o222 else None,
        )

    def _read(self, where: str) -> bytes:
        fd = self._open(where, os.O_RDONLY)
        try:
            return os.read(fd, VALUE_SIZE)
        finally:
            os.close(fd)

    def _write(self, where: str, value: str) -> None:
        fd = self._open(where, os.O_WRONLY)
        try:
            os.write(fd, os.fsencode(value) + b"\n")
        finally:
            os.close(fd)

    def _open(self, where: str, flags: int) -> int:
        try:
            return os.open(where, flags | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError as error:
            # Gone between being looked up and this.
            raise OSError(errno.ENODEV, "the interface is gone", where) from error

    def _path(self, path: tuple[str, ...]) -> str:
        return "/".join(("class/net", *path))

    def _beside(self, path: tuple[str, ...], name: str) -> str | None:
        """Where a symbolic link in an interface's directory leads, if to another interface."""
        if len(path) != 1:
            return None
        other = os.path.basename(os.readlink(self._path((*path, name)), dir_fd=self._fd))
        if name == "master" or name.startswith(("upper_", "lower_")):
            return f"../{other}"
        return None


async def interfaces(container: Container) -> Interfaces:
    """The interfaces of a container's network namespace."""
    return Interfaces(container, await inside(container, ("net",), lambda: new_mount("sysfs")))


FILES = (TagType("net", contents=interfaces),)
