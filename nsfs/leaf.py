"""Members in part: processes that are in a container, but in some of its namespaces only.

Each has, with its children, a group of its own below the container's `payload`: so kill, freeze,
`populated` and accounting need nothing special.  The group's name says what is to be known,

    nsfs.HOME.PID.TYPES

HOME being the number of the container that the process was in before, and TYPES the namespaces that
it has joined; to HOME and whatever that is in, the process is a member as any other.  The groups
are root's, which tells them from what members make.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import trio

from nsfs import cgroup
from nsfs.container import Container

PREFIX = "nsfs."
LOOK_S = 1.0
"""How often it is looked whether the last process has left a group."""


def move(pid: int, path: str) -> None:
    """Put a process into a group (some 7 ms: cgroup_threadgroup_rwsem).

    ProcessLookupError when it has ended, EOPNOTSUPP when members have made the group threaded.
    """
    fd = os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(pid).encode())
    finally:
        os.close(fd)


class Leaf:
    """The group of one that enters in part."""

    def __init__(self, container: Container, home: Container, pid: int, types: str) -> None:
        self.container = container
        self.path = f"{container.group.payload}/{PREFIX}{home.number}.{pid}.{types}"
        self.before = f"{container.group.hierarchies.v2}{cgroup.membership(pid)}"
        self.pid = pid

    def take(self) -> None:
        """Make it and put the process into it."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path)
        try:
            move(self.pid, self.path)
        except BaseException:
            self.remove()
            raise

    def undo(self) -> None:
        """Put the process, and what it has forked meanwhile, back to where it was."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    move(pid, self.before)
        self.remove()

    def pids(self) -> list[int]:
        """The processes in it."""
        try:
            with open(f"{self.path}/cgroup.procs", encoding="ascii") as file:
                return [int(line) for line in file]
        except OSError:
            return []

    def remove(self) -> bool:
        """Whether it is gone: it is when nobody is in it."""
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    async def watch(self) -> None:
        """Remove it when the last has left."""
        # cgroup.events tells by inotify, but a watch for each that lives for days costs more.
        while not self.remove():  # noqa: ASYNC110
            await trio.sleep(LOOK_S)
        self.container.tell()


def leaves(container: Container) -> Iterator[tuple[int, str, str]]:
    """The groups of one container's members in part: (number of their home, types, path)."""
    payload = container.group.payload
    try:
        # st_nlink counts the subdirectories.
        if os.stat(payload).st_nlink <= 2:
            return
        found = [e for e in os.scandir(payload) if e.name.startswith(PREFIX)]
    except FileNotFoundError:
        return
    for each in found:
        words = each.name.split(".", 3)
        with contextlib.suppress(FileNotFoundError):
            if len(words) == 4 and words[1].isdigit() and each.stat().st_uid == 0:
                yield int(words[1]), words[3], each.path


def partial(container: Container) -> dict[int, str]:
    """The types of those members of a container, nested ones included, that are in it in part."""
    result: dict[int, str] = {}
    if container.parent is None:
        return result
    for each in (container, *container.descendants()):
        for number, types, path in leaves(each):
            home = container.world.containers.get(number)
            if home is not None and container in home.lineage():
                continue
            with (
                contextlib.suppress(OSError),
                open(f"{path}/cgroup.procs", encoding="ascii") as file,
            ):
                result.update((int(line), types) for line in file)
    return result


class Whole(Leaf):
    """The members' own group, for one that enters in all: nothing is made or removed."""

    def __init__(self, container: Container, home: Container, pid: int, types: str) -> None:
        super().__init__(container, home, pid, types)
        self.path = container.group.payload

    def undo(self) -> None:
        """Only the process itself: who else is a member is not known here."""
        with contextlib.suppress(ProcessLookupError):
            move(self.pid, self.before)

    def remove(self) -> bool:
        """It stays."""
        return True
