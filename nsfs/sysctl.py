"""The sysctls of a namespace, as directories of its view.

Which of /proc/sys a process sees is decided by its own namespaces whenever it looks a name up
(`ctl_table_root.lookup` in fs/proc/proc_sysctl.c).  So a thread that has joined them does.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time

from nsfs.accounts import top_of
from nsfs.attribute import Answer, Attribute, Caller, Contents, Directory, Entry
from nsfs.container import Container, Face
from nsfs.view import files_are_scarce, inside

LISTED_S = 1.0
"""How long a listing is believed: as long as the kernel believes names."""
VALUE_SIZE = 65536
OPEN_MAX = 256
"""How many sysctls of all containers together are kept open."""
SLOW = frozenset(("addr_gen_mode", "stable_secret"))
"""Sysctls of net/ipv6 whose reading takes a lock."""


class Sysctls(Contents):
    """Below /proc/sys, as seen from a container's namespaces of the types `kinds`.

    `known` is the names that are a namespace's own, as paths below /proc/sys: of a directory that
    is, all is shown.

    Whose a file is was decided when it was opened; it does not keep the namespace alive.  So some
    that were read are kept open: to read them again takes no thread.
    """

    _open = 0
    """How many are, of all containers."""
    _lock = threading.Lock()

    def __init__(
        self, container: Container, kinds: tuple[str, ...], known: tuple[tuple[str, ...], ...]
    ) -> None:
        self._container = container
        self._kinds = kinds
        self._known = known
        self._listed: dict[tuple[str, ...], tuple[float, dict[str, int]]] = {}
        self._kept: dict[str, tuple[int, Attribute]] = {}
        """Those that are open, by their paths."""
        self._closed = False

    def close(self) -> None:
        """Forget the listings, close the files."""
        self._listed.clear()
        with Sysctls._lock:
            self._closed = True
        for where in list(self._kept):
            self._drop(where)

    async def names(self, path: tuple[str, ...]) -> list[str]:
        """The names in a directory."""
        return list(await self._list(path))

    def entry(self, path: tuple[str, ...]) -> Answer[Entry]:
        """A directory or a sysctl."""
        if not path:
            return Directory("sysctl")
        where = "/".join(path)
        known = self._kept.get(where)
        if known is not None and self._read_again(where) is not None:
            return known[1]
        return self._find(path)

    async def _find(self, path: tuple[str, ...]) -> Entry:
        mode = (await self._list(path[:-1])).get(path[-1])
        if mode is None:
            raise FileNotFoundError(errno.ENOENT, "no such sysctl", "/".join(path))
        if stat.S_ISDIR(mode):
            return Directory(path[-1])
        where = "/".join(path)

        def show(face: Face) -> Answer[bytes]:
            value = self._read_again(where)
            return value if value is not None else inside(self._container, self._kinds, read_it)

        def read_it() -> bytes:
            return self._read_and_keep(where, made) if self._quick(path) else _read(where)

        async def store(face: Face, value: str, caller: Caller) -> None:
            await write(self._container, self._kinds, where, value)

        made = Attribute(
            path[-1],
            mode=stat.S_IMODE(mode),
            show=show if mode & 0o444 else None,
            store=store if mode & 0o222 else None,
        )
        return made

    def _quick(self, path: tuple[str, ...]) -> bool:
        """Whether one can be read without a wait, and by a file that is open."""
        if self._kinds == ("net",):
            return path[1] in ("ipv4", "ipv6") and path[-1] not in SLOW
        return BY_OPENER

    def _read_and_keep(self, where: str, made: Attribute) -> bytes:
        """In a thread: read a sysctl, and leave it open."""
        fd = os.open(f"/proc/sys/{where}", os.O_RDONLY | os.O_CLOEXEC)
        kept = False
        try:
            value = os.read(fd, VALUE_SIZE)
            scarce = files_are_scarce()
            with Sysctls._lock:
                room = Sysctls._open < OPEN_MAX and not scarce
                if room and not self._closed and where not in self._kept:
                    self._kept[where] = fd, made
                    Sysctls._open += 1
                    kept = True
        finally:
            if not kept:
                os.close(fd)
        return value

    def _read_again(self, where: str) -> bytes | None:
        """What one is that is open; None if it is not."""
        kept = self._kept.get(where)
        if kept is None:
            return None
        try:
            return os.pread(kept[0], VALUE_SIZE, 0)
        except FileNotFoundError:
            # Its interface is gone, or has another name; there may be one of this name.
            self._drop(where)
            return None

    def _drop(self, where: str) -> None:
        os.close(self._kept.pop(where)[0])
        with Sysctls._lock:
            Sysctls._open -= 1

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


def _by_opener() -> bool:
    """Whether sysctls of an IPC namespace are those of whoever opened them, as all others: since
    Linux 5.19.  Before, they were those of whoever reads."""
    release = os.uname().release.split(".")
    return (int(release[0]), int(release[1].partition("-")[0])) >= (5, 19)


BY_OPENER = _by_opener()


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
    return await container.world.spawner.sysctl(
        container.init_pid, kinds, where, account=top_of(container)
    )


async def write(container: Container, kinds: tuple[str, ...], where: str, value: str) -> None:
    """Set a sysctl, as the container's root: so the kernel decides which are its."""
    if container.is_found and "pid" not in kinds:
        await inside(container, kinds, lambda: _write(where, value))
        return
    if container.parent is not None:
        await container.world.spawner.set_sysctl(
            container.init_pid, kinds, where, value, account=top_of(container)
        )
        return
    _write(where, value)


def _write(where: str, value: str) -> None:
    fd = os.open(f"/proc/sys/{where}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, os.fsencode(value))
    finally:
        os.close(fd)
