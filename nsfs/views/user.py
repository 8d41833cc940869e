"""`user/`: a user namespace as a tagged view (user_namespaces(7)).

uid_map gid_map   0444: lines `INSIDE OUTSIDE COUNT`; OUTSIDE is in the viewer's own IDs, and for a
                  viewer inside, as in its /proc/self/uid_map, in those of the parent
owner             0444: the user whose namespace it is, in the same IDs
uids/UID/         a directory for each user inside who has processes (the number is the user's
                  inside)
    procs         0444: how many
    cpu           0444: the CPU time that these have used, in microseconds
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator

from nsfs import idmap, members
from nsfs.attribute import FOUND, Attribute, Contents, Directory, Entry, TagType, lines
from nsfs.container import Container, Face
from nsfs.kernfs import read
from nsfs.view import PROC, in_thread, tag

FILES_OF_A_USER = ("procs", "cpu")
LISTED_S = 1.0
"""How long a user that was listed is believed to be there: as long as the kernel believes names."""
NS_GET_OWNER_UID = 0xB704
"""ioctl_nsfs(2): the user whose user namespace it is."""


def _table(name: str) -> Attribute:
    def show(face: Face) -> str:
        container = tag(face, VIEW)
        text = read(f"/proc/{_process(container)}/{name}")
        rows = [tuple(map(int, line.split())) for line in text.splitlines()]
        return lines(
            f"{inside:>10} {_seen(face, outside):>10} {count:>10}"
            for inside, outside, count in rows
        )

    return Attribute(name, show=show, flags=FOUND)


def owner_show(face: Face) -> str:
    """The kernel's own word."""
    answer = bytearray(4)
    fd = os.open(f"/proc/{_process(tag(face, VIEW))}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, NS_GET_OWNER_UID, answer)
    finally:
        os.close(fd)
    return f"{_seen(face, struct.unpack('=I', answer)[0])}\n"


def _process(container: Container) -> int | str:
    return "self" if container.parent is None else container.init_pid


def _seen(face: Face, uid: int) -> int:
    """A user of the host, by the number that the viewer has for it: 65534 when it has none."""
    container, viewpoint = tag(face, VIEW), face.viewpoint
    if container is viewpoint and container.parent is not None:
        viewpoint = container.parent
    found = idmap.to_inside(viewpoint.map, uid)
    return 65534 if found is None else found


class Users(Contents):
    """`uids/`: the users who have processes."""

    def __init__(self, container: Container) -> None:
        self._container = container
        self._listed: tuple[float, frozenset[int]] = (0.0, frozenset())

    async def names(self, path: tuple[str, ...]) -> list[str]:
        """`uids`, the users, or the files of one."""
        if not path:
            return ["uids"]
        if len(path) == 1:
            return [str(uid) for uid in sorted(await self._count())]
        return list(FILES_OF_A_USER)

    def depends_on(self, path: tuple[str, ...]) -> tuple[int, str]:
        """The directory is always there."""
        return -1, ""

    async def entry(self, path: tuple[str, ...]) -> Entry:
        """A directory, or a file of a user."""
        if path == ("uids",):
            return Directory("uids")
        if path[0] != "uids" or len(path) > 3:
            raise FileNotFoundError(errno.ENOENT, "no such file", path[-1])
        word = path[1]
        uid = int(word) if word.isascii() and word.isdigit() and len(word) < 11 else -1
        if str(uid) != word or not await self._has(uid):
            raise FileNotFoundError(errno.ENOENT, "no such user has processes", word)
        if len(path) == 2:
            return Directory(word)
        if path[2] not in FILES_OF_A_USER:
            raise FileNotFoundError(errno.ENOENT, "no such file", path[2])
        at = FILES_OF_A_USER.index(path[2])

        async def show(face: Face) -> str:
            return f"{(await self._count()).get(uid, (0, 0))[at]}\n"

        return Attribute(path[2], show=show)

    async def _has(self, uid: int) -> bool:
        """Whether a user has processes.  To count them all for each name that was just listed would
        take the square of their number."""
        listed_at, users = self._listed
        if time.monotonic() - listed_at < LISTED_S and uid in users:
            return True
        return uid in await self._count()

    async def _count(self) -> dict[int, tuple[int, int]]:
        """Users inside to (processes, microseconds)."""
        container = self._container
        pids = list(members.host_pids(container))
        if container.parent is not None and not container.is_found:
            pids.append(container.init_pid)
        found = await in_thread(lambda: list(_usage(pids)), PROC, container)
        result: dict[int, tuple[int, int]] = {}
        for uid, usec in found:
            inside = idmap.to_inside(container.map, uid)
            if inside is not None:
                procs, cpu = result.get(inside, (0, 0))
                result[inside] = (procs + 1, cpu + usec)
        self._listed = (time.monotonic(), frozenset(result))
        return result


def _usage(pids: list[int]) -> Iterator[tuple[int, int]]:
    """The real user of each process that is still there, and its CPU time in microseconds."""
    for pid in pids:
        try:
            uid = members.owner(pid)[0]
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield uid, (int(fields[11]) + int(fields[12])) * 1_000_000 // members.CLOCK_TICKS


async def users(container: Container) -> Users:
    """The users of a container's user namespace."""
    return Users(container)


VIEW = TagType(
    "user",
    entries=(
        *map(_table, ("uid_map", "gid_map")),
        Attribute("owner", show=owner_show, flags=FOUND),
    ),
    flags=FOUND,
    contents=users,
)
FILES = (VIEW,)
