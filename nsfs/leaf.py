"""Members in part: processes that are in a container, but in some of its namespaces only.

Each has, with its children, a group of its own below the container's `payload`: so kill, freeze,
`populated` and accounting need nothing special there.  The group's name says what is to be known,

    nsfs.HOME.PID.TYPES[.OTHER:TYPES]...

HOME being the number of the container whose whole member the process is, TYPES the namespaces that
it has joined, and each OTHER a further container that it is in in part.  HOME and the others need
not be what the container is in: then their kill, freeze and `populated` have to reach the group,
which is *away* for them (`World.away`).  A process is in one place of the hierarchy; out of this no
member of these containers can take it.

The groups are root's, which tells them from what members make.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from signal import SIGKILL, Signals

import trio

from nsfs import cgroup
from nsfs.container import Container
from nsfs.kernfs import write
from nsfs.world import Part, World

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
        world, groups = container.world, cgroup.memberships(pid)
        place, hierarchies = groups[""], container.group.hierarchies
        before = world.part(place)
        others = () if before is None else ((before.holder, before.types), *before.others)
        self.part = Part(container.number, home.number, types, others)
        self.path = f"{container.group.payload}/{self.part.name(pid)}"
        self.before = f"{hierarchies.v2}{place}"
        self.limiting = [
            (f"{top}{groups.get(name, '/')}", container.group.v1[name])
            for name, top in hierarchies.v1.items()
        ]
        """The v1 groups that it was in, and the container's, whose limits shall hold for it."""
        self.pid = pid

    def take(self) -> None:
        """Make it and put the process into it."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path)
        self.note()
        try:
            move(self.pid, self.path)
            for _, path in self.limiting:
                # It has one thread; with `tasks` no lock of all process creation is taken.
                write(f"{path}/tasks", str(self.pid))
        except BaseException:
            self.undo()
            raise

    def note(self) -> None:
        """Those in it are members in part."""
        self.container.world.parts[self.path] = self.part

    def undo(self) -> None:
        """Put the process, and what it has forked meanwhile, back to where it was."""
        while pids := self.pids():
            for pid in pids:
                self.put_back(pid)
        self.remove()

    def put_back(self, pid: int) -> None:
        """Put a process to where this one was."""
        with contextlib.suppress(ProcessLookupError):
            move(pid, self.before)
            for path, _ in self.limiting:
                move(pid, path)

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
            pass
        except OSError:
            return False
        self.container.world.parts.pop(self.path, None)
        return True

    async def watch(self) -> None:
        """Remove it when the last has left."""
        # cgroup.events tells by inotify, but a watch for each that lives for days costs more.
        while not self.remove():  # noqa: ASYNC110
            await trio.sleep(LOOK_S)
        for each in self.container.world.containers_of(self.part):
            each.tell()


class Found(Leaf):
    """One that an earlier daemon has made."""

    def __init__(self, container: Container, path: str, part: Part) -> None:
        self.container, self.path, self.part = container, path, part


def resume(world: World) -> None:
    """Take up the groups that are there."""
    for container in list(world.containers.values()):
        for part, path in leaves(container):
            world.parts[path] = part
            world.start(Found(container, path, part).watch)


def leaves(container: Container) -> Iterator[tuple[Part, str]]:
    """The groups of one container's members in part, with their paths."""
    payload = container.group.payload
    try:
        # st_nlink counts the subdirectories.
        if container.parent is None or os.stat(payload).st_nlink <= 2:
            return
        found = [e for e in os.scandir(payload) if e.name.startswith(PREFIX)]
    except FileNotFoundError:
        return
    for each in found:
        part = Part.parse(container.number, each.name)
        with contextlib.suppress(FileNotFoundError):
            if part is not None and each.stat().st_uid == 0:
                yield part, each.path


def partial(container: Container) -> dict[int, str]:
    """The types of those members of a container, nested ones included, that are in it in part."""
    result: dict[int, str] = {}
    world = container.world
    for path, part in world.parts.items():
        types = world.types_in(part, container)
        if types:
            result.update((pid, types) for pid in cgroup.pids_of(path))
    return result


def freeze_away(container: Container) -> None:
    """Suspend or resume the members that are in a group away from the container's, as it, or
    another that they are in, is now."""
    world = container.world
    for path in world.away(container):
        frozen = any(each.suspended() for each in world.containers_of(world.parts[path]))
        with contextlib.suppress(FileNotFoundError):
            write(f"{path}/cgroup.freeze", "1" if frozen else "0")


def signal_away(container: Container, number: Signals) -> None:
    """A signal to the members that are in a group away from the container's."""
    for path in container.world.away(container):
        if number == SIGKILL:
            cgroup.kill_at(path)
        else:
            cgroup.signal_at(path, number)


class Whole(Leaf):
    """The members' own group, for one that enters in all: nothing is made or removed."""

    def __init__(self, container: Container, home: Container, pid: int, types: str) -> None:
        super().__init__(container, home, pid, types)
        self.path = container.group.payload

    def note(self) -> None:
        """They are members as any other."""

    def undo(self) -> None:
        """Only the process itself: who else is a member is not known here."""
        self.put_back(self.pid)

    def remove(self) -> bool:
        """It stays."""
        return True
