"""The sysctls of a namespace, as directories of its view.

Which of /proc/sys a process sees is decided by its own namespaces whenever it looks a name up
(`ctl_table_root.lookup` in fs/proc/proc_sysctl.c).  So a thread that has joined them does.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from nsfs.attribute import Attribute, Caller, Contents, Directory, Entry
from nsfs.container import Container, Face
from nsfs.view import inside

LISTED_S = 1.0
"""How long a listing is believed: as long as the kernel believes names."""
VALUE_SIZE = 65536


class Sysctls(Contents):
    """Below /proc/sys, as seen from a container's namespaces of the types `kinds`.

    `known` is the names that are a namespace's own, as paths below /proc/sys: of a directory that
    is, all is shown.
    """

    def __init__(
        self, container: Container, kinds: tuple[str, ...], known: tuple[tuple[str, ...], ...]
    ) -> None:
        self._container = container
        self._kinds = kinds
        self._known = known
        self._listed: dict[tuple[str, ...], tuple[float, dict[str, int]]] = {}

    def close(self) -> None:
        """Forget the listings."""
        self._listed.clear()

    async def names(self, path: tuple[str, ...]) -> list[str]:
        """The names in a directory."""
        return list(await self._list(path))

    async def entry(self, path: tuple[str, ...]) -> Entry:
        """A directory or a sysctl."""
        if not path:
            return Directory("sysctl")
        mode = (await self._list(path[:-1])).get(path[-1])
        if mode is None:
            raise FileNotFoundError(errno.ENOENT, "no such sysctl", "/".join(path))
        if stat.S_ISDIR(mode):
            return Directory(path[-1])
        where = "/".join(path)

        async def show(face: Face) -> bytes:
            return await inside(self._container, self._kinds, lambda: _read(where))

        async def store(face: Face, value: str, caller: Caller) -> None:
            await write(self._container, self._kinds, where, value)

        return Attribute(
            path[-1],
            mode=stat.S_IMODE(mode),
            show=show if mode & 0o444 else None,
            store=store if mode & 0o222 else None,
        )

    async def _list(self, path: tuple[str, ...]) -> dict[str, int]:
        """What is in a directory: name to mode."""
        known = self._listed.get(path)
        if known is not None and time.monotonic() - known[0] < LISTED_S:
            return known[1]
        found = await inside(self._container, self._kinds, lambda: _scan("/".join(path)))
        shown = {
            name: mode
            for name, mode in found.items()
            if any(_related((*path, name), each) for each in self._known)
        }
        if len(self._listed) > 256:
            self._listed.clear()
        self._listed[path] = (time.monotonic(), shown)
        return shown


def _related(path: tuple[str, ...], known: tuple[str, ...]) -> bool:
    """Whether one leads to the other."""
    length = min(len(path), len(known))
    return path[:length] == known[:length]


def _scan(path: str) -> dict[str, int]:
    with os.scandir(f"/proc/sys/{path}") as found:
        return {each.name: each.stat(follow_symlinks=False).st_mode for each in found}


def _read(where: str) -> bytes:
    fd = os.open(f"/proc/sys/{where}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, VALUE_SIZE)
    finally:
        os.close(fd)


async def read(container: Container, kinds: tuple[str, ...], where: str) -> bytes:
    """A sysctl of a PID namespace, too, which a thread cannot join."""
    if container.parent is None:
        return _read(where)
    return await container.world.spawner.sysctl(container.init_pid, kinds, where)


async def write(container: Container, kinds: tuple[str, ...], where: str, value: str) -> None:
    """Set a sysctl, as the container's root: so the kernel decides which are its."""
    if container.parent is not None:
        await container.world.spawner.set_sysctl(container.init_pid, kinds, where, value)
        return
    fd = os.open(f"/proc/sys/{where}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, os.fsencode(value))
    finally:
        os.close(fd)
