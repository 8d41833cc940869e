"""Found containers: namespaces that nsfs did not make, for as long as a process is in them.

One is a set of namespaces (an *nsproxy*) that differs from that of the container which it was made
in; `discovery` looks for them.  It has no init, no group, no inner face and no log, and nothing of
it is held open: what is known are the inode numbers and IDs of its namespaces, and PIDs.  So
whoever wants to look into it asks first whether one of its processes is still there (`confirmed`),
and what joins a namespace checks that it is the one that was meant (`namespaces.within`).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from signal import SIGKILL, Signals, pidfd_send_signal
from typing import Any, ClassVar

import trio

from nsfs import namespaces
from nsfs.attribute import Answer, Caller
from nsfs.container import Container, Face, Phase, reserved
from nsfs.processes import start_time
from nsfs.syscalls import NS_GET_PARENT, NS_GET_USERNS, namespace_numbers

Numbers = tuple[int, ...]
"""The inode numbers of a set of namespaces, in the order of `namespaces.TYPES`."""
Witness = tuple[int, int]
"""A process by PID and start time."""

WITNESSES = 8
"""Of how many of its processes the start time is known, so that no other is taken for them."""
KILL_AGAIN_S = 0.01
KILL_S = 2.0
"""How long processes that fork faster than they are found are killed again."""


def numbers_of(pid: int) -> Numbers | None:
    """The namespaces that a process is in; None when it has ended or nobody may look."""
    try:
        return namespace_numbers(pid)
    except OSError:
        return None


@dataclass(eq=False, slots=True)
class Found(Container):
    """A container that was found.  `init_pid` is one of its processes, the last one that was seen
    in it, and 0 when only those nested in it are left."""

    is_found: ClassVar[bool] = True
    numbers: Numbers = ()
    idents: tuple[int, ...] = ()
    """What identifies them for ever (NS_GET_ID, Linux 6.18); inode numbers are used again."""
    pids: tuple[int, ...] = ()
    """Its processes when it was last looked for them."""
    witnesses: tuple[Witness, ...] = ()
    held: frozenset[str] = field(default_factory=frozenset)
    """The types of which its namespace is another one than that of the container around it."""

    @property
    def maker(self) -> Container:
        """The container, one that nsfs made or the host, that it was made in."""
        each = self.parent
        while isinstance(each, Found):
            each = each.parent
        assert each is not None
        return each

    @property
    def adopted(self) -> bool:
        """Whether somebody has given it a name."""
        return not reserved(self.name)

    def number_of(self, kind: str) -> int:
        """The inode number of its namespace of a type."""
        return self.numbers[namespaces.TYPES.index(kind)]

    def own(self, kind: str) -> bool:
        """Whether its namespace of that type is another one than that of the container around
        it."""
        return kind in self.held

    def holder(self, kind: str) -> Container:
        """Itself, or the container that nsfs made: not one that was found, whose processes may be
        gone before."""
        return self if kind in self.held else self.maker.holder(kind)

    def nested(self) -> Iterator[Found]:
        """Itself and those found in it."""
        yield self
        for each in list(self.found.values()):
            assert isinstance(each, Found)
            yield from each.nested()

    # --- whether it is still there ---

    def check(self) -> bool:
        """Whether one of its processes that are known, or of those nested in it, is still there."""
        if self.phase is Phase.GONE:
            return False
        if self._witnessed():
            self.phase = Phase.RUNNING
            return True
        self.init_pid = 0
        if any(each._witnessed() for each in self.nested() if each is not self):
            self.phase = Phase.DEAD
            return True
        return False

    def _witnessed(self) -> bool:
        for pid, start in self.witnesses:
            if numbers_of(pid) != self.numbers:
                continue
            try:
                if start_time(pid) != start:
                    continue
            except OSError:
                continue
            self.init_pid = pid
            return True
        return False

    def confirmed(self) -> Answer[None]:
        """FileNotFoundError when no process is in it any more.

        Those that are known may have left children: then all processes are looked at.
        """
        return None if self.check() else self._looked_for()

    async def _looked_for(self) -> None:
        if self.phase is not Phase.GONE:
            await self.world.look(0.0)
        if self.phase is Phase.GONE:
            raise FileNotFoundError(errno.ENOENT, "the namespaces are dead", self.name)

    def lives(self) -> bool:
        """Whether a process that is known holds its namespaces."""
        return self.phase is Phase.RUNNING and numbers_of(self.init_pid) == self.numbers

    # --- its processes ---

    def host_pids(self) -> Iterator[int]:
        """Host PIDs, those of found ones nested in it included, as of the last look."""
        for each in self.nested():
            yield from each.pids

    def member(self, pid: int) -> Found | None:
        """The one, this or nested in it, that a process is in now."""
        numbers = numbers_of(pid)
        return next((each for each in self.nested() if each.numbers == numbers), None)

    def check_may_be_killed(self) -> None:
        """EPERM at the root, unless somebody has named it or what it is in: else whoever cleans up
        there would end the system's own services."""
        for each in self.lineage():
            if isinstance(each, Found) and each.adopted:
                return
        if self.maker.parent is None:
            raise PermissionError(errno.EPERM, "it has no name: nsfs did not make it", self.name)

    def send(self, number: Signals) -> int:
        """A signal to each process that was in it, or in one nested in it, when it was last looked
        for them, and still is; how many there were."""
        sent = 0
        for each in self.nested():
            sent += sum(_send(pid, each.numbers, number) for pid in each.pids)
        return sent

    async def signal(self, number: Signals) -> None:
        """The same, of all that are there now.  SIGKILL is repeated until none is left; EBUSY when
        new ones come faster."""
        with trio.move_on_after(KILL_S):
            while True:
                await self.world.look(0.0)
                if not self.send(number) or number != SIGKILL:
                    return
                await trio.sleep(KILL_AGAIN_S)
        raise OSError(errno.EBUSY, "processes are made faster than they end", self.name)

    # --- the record ---

    def save(self) -> None:
        """Write the record."""
        if self.number not in self.world.found or self.phase is Phase.GONE:
            return
        assert self.parent is not None
        self.world.store.save_found(
            self.number,
            {
                "name": self.name,
                "parent": self.parent.number,
                "owner": [self.uid, self.gid],
                "since": self.since,
                "faces": self.faces,
                "numbers": self.numbers,
                "idents": self.idents,
                "pids": self.pids,
                "witnesses": self.witnesses,
                "held": sorted(self.held),
                "map": self.map,
            },
        )

    @classmethod
    def from_found(cls, parent: Container, number: int, record: dict[str, Any]) -> Found:
        """The inverse."""
        found = cls(parent.world, number, record["name"], parent, parent.group.child(number))
        found.uid, found.gid = record["owner"]
        found.since = record["since"]
        found.faces = {int(k): v for k, v in record["faces"].items()}
        found.numbers = tuple(record["numbers"])
        found.idents = tuple(record["idents"])
        found.pids = tuple(record["pids"])
        found.witnesses = tuple((pid, start) for pid, start in record["witnesses"])
        found.held = frozenset(record["held"])
        found.map = tuple((i, o, n) for i, o, n in record["map"])
        found.phase = Phase.DEAD
        return found


def _send(pid: int, numbers: Numbers, number: Signals) -> bool:
    """A signal to a process if it is in just these namespaces."""
    try:
        pid_fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # By now the descriptor says which process; if the PID has become another's, it has ended.
        if numbers_of(pid) != numbers:
            return False
        pidfd_send_signal(pid_fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pid_fd)
    return True


# --- whose namespaces are ---


def chain(fd: int, up: int) -> Iterator[int]:
    """The inode numbers of a user or PID namespace, and of those above it as far as they can be
    seen; `fd` is closed.  `up` leads to the first (ioctl_nsfs(2))."""
    try:
        while True:
            yield os.fstat(fd).st_ino
            try:
                above = fcntl.ioctl(fd, up)
            except OSError:
                # EPERM: beyond the initial one, or what this process can see.
                return
            os.close(fd)
            fd, up = above, NS_GET_PARENT
    finally:
        os.close(fd)


def check_privilege(found: Found, face: Face, kind: str, caller: Caller) -> None:
    """Whether a caller whom the modes allow it may change a namespace of a found container, as the
    kernel would have it (user_namespaces(7)): the host's root may; the root of a container that
    looks, if the namespace is owned by its user namespace or one below; and who owns the found
    one's user namespace, likewise.  EPERM if not, ENODEV when it is dead."""
    viewpoint = face.viewpoint
    top = viewpoint.holder("user")
    if caller.uid == 0 and top.parent is None:
        return
    allowed = set()
    if caller.uid == viewpoint.root_uid and top.parent is not None:
        allowed.add(namespaces.identity(top.init_pid, "user"))
    if found.own("user") and caller.uid == found.uid:
        allowed.add(found.number_of("user"))
    try:
        fd = os.open(f"/proc/{found.init_pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(errno.ENODEV, "the namespace is dead", kind) from error
    above = list(chain(fd, NS_GET_PARENT if kind == "user" else NS_GET_USERNS))
    if above[0] != found.number_of(kind):
        raise OSError(errno.ENODEV, "the namespace is dead", kind)
    if allowed.isdisjoint(above):
        raise PermissionError(errno.EPERM, f"its {kind} namespace is another's", found.name)
