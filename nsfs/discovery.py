"""Discovery: containers that nobody named, because nsfs did not make them.

All processes are looked at, again and again, since of unshare(2) and setns(2) nothing tells: the
eight links /proc/PID/ns of each (namespaces(7)), some 5 us a process.  None can be left out, since
any type may be the one that a process has made; kernel threads are told from others only when they
are in namespaces of their own.  A thread does that, at most for a fiftieth of the time unless it
has been asked for.  Only leaders of thread groups are looked at.

A container is *found* when a process is in a set of namespaces that is neither the host's nor a
container's of nsfs.  It is in the container whose cgroup its oldest process is in, or whose PID
namespace, if its user namespace is that one's or below, or else in the root container; and in the
found one there which has the closest PID and user namespaces that are its own or above its own, if
these are not the container's.

What nsfs itself does in others' namespaces is none: the daemon's children, inits, and processes
that have entered by way of nsfs.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import trio

from nsfs import cgroup, idmap, members, namespaces
from nsfs.container import Container, Phase
from nsfs.found import WITNESSES, Found, Numbers, Witness, chain, numbers_of
from nsfs.kernfs import read_once
from nsfs.processes import start_time
from nsfs.syscalls import NS_GET_OWNER_UID, NS_GET_PARENT
from nsfs.world import World

log = logging.getLogger(__name__)

SHARE = 50
"""One part in so many of the time may be spent on it."""
INTERVAL_MAX_S = 2.0
"""However long it takes, it is done again after that: then it is more."""
ASKED_SHARE = 4
"""The same while somebody asks for it all the time."""
EACH_MAX = 512
HOST_MAX = 4096
"""How many are shown in one container, and in the root container, at any depth: members can make as
many as they like."""
NEW_MAX = 256
"""How many are described by one look: the next one goes on."""
LOOKED_AT_MAX = 64
"""Of how many processes of a new one it is asked whether they are nsfs's own."""
NS_GET_ID = 0x8008B70D
"""ioctl_nsfs(2): what identifies a namespace for ever (Linux 6.18)."""
PF_KTHREAD = 0x00200000

USER, PID = namespaces.TYPES.index("user"), namespaces.TYPES.index("pid")


@dataclass(frozen=True, slots=True)
class Known:
    """What the last look has seen of one."""

    idents: tuple[int, ...]
    witnesses: tuple[Witness, ...]
    pids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a look has to know; it is in a thread, so all of it is copied."""

    inits: Mapping[int, int]
    """Of running containers: the init's PID to the number."""
    known: Mapping[Numbers, Known]
    prefix: str
    """Of the paths of our groups."""
    parts: frozenset[str]
    """The groups of members in part, likewise."""
    daemon: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A set of namespaces that is known, still there."""

    pids: tuple[int, ...]
    witnesses: tuple[Witness, ...]


@dataclass(frozen=True, slots=True)
class New:
    """One that was not known."""

    numbers: Numbers
    seen: Seen
    idents: tuple[int, ...]
    home: int
    """The number of the container that it is in."""
    users: tuple[int, ...]
    """Its user namespace and those above it."""
    pid_spaces: tuple[int, ...]
    uid: int
    """Of the owner of its user namespace."""
    since: float
    mixed: bool
    """Whether nsfs knows all of its namespaces, each from another container."""


@dataclass(slots=True)
class Sight:
    """What was seen in one look."""

    host: Numbers
    made: dict[int, Numbers] = field(default_factory=dict)
    known: dict[Numbers, Seen] = field(default_factory=dict)
    new: list[New] = field(default_factory=list)


# --- in a thread -------------------------------------------------------------------------------


def look(asked: Asked) -> Sight:
    """Look at all processes."""
    sets: dict[Numbers, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            numbers = numbers_of(int(name))
            if numbers is not None:
                sets.setdefault(numbers, []).append(int(name))
    host = numbers_of(os.getpid())
    assert host is not None
    sight = Sight(host)
    for numbers, pids in sets.items():
        sight.made.update((asked.inits[pid], numbers) for pid in pids if pid in asked.inits)
    # Others than the daemon's own, should it have been started with some of its own.
    hosts = {host, *filter(None, map(numbers_of, (1, *_first_kernel_thread())))}
    ours = hosts | set(sight.made.values())
    numbers_of_ours = {number for each in ours for number in each}
    fresh = []
    for numbers, pids in sets.items():
        if numbers in ours:
            continue
        known = asked.known.get(numbers)
        seen = _again(numbers, sorted(pids), known) if known else None
        if seen is not None:
            sight.known[numbers] = seen
        else:
            fresh.append((numbers, sorted(pids)))
    # What was made first is found first, so that others can be found in it.
    fresh.sort(key=lambda pair: _started(pair[1][0]) or 0)
    for numbers, pids in fresh:
        with contextlib.suppress(OSError, ValueError):
            each = _describe(numbers, pids, asked, sight, numbers_of_ours)
            if each is not None:
                sight.new.append(each)
        if len(sight.new) >= NEW_MAX:
            break
    return sight


def _first_kernel_thread() -> Iterable[int]:
    with contextlib.suppress(OSError):
        if _is_kernel_thread(_stat(2)):
            return (2,)
    return ()


def _stat(pid: int) -> list[bytes]:
    """The fields of proc_pid_stat(5) from the third on."""
    return read_once(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def _is_kernel_thread(fields: list[bytes]) -> bool:
    return bool(int(fields[6]) & PF_KTHREAD)


def _started(pid: int) -> int | None:
    try:
        return start_time(pid)
    except (OSError, IndexError, ValueError):
        return None


def _witnesses(pids: Iterable[int], old: tuple[Witness, ...] = ()) -> tuple[Witness, ...]:
    """Some processes with their start times: those of the old ones that are still there, and
    others."""
    here = set(pids)
    found = {pid: start for pid, start in old if pid in here and _started(pid) == start}
    for pid in pids:
        if len(found) >= WITNESSES:
            break
        if pid not in found:
            start = _started(pid)
            if start is not None:
                found[pid] = start
    return tuple(found.items())


def _again(numbers: Numbers, pids: list[int], known: Known) -> Seen | None:
    """What has the inode numbers of a known one; None if it is another.

    They are used again at once when a namespace has died.  It is the same if a process is still
    there that was in it, or if the IDs are the same.
    """
    witnesses = _witnesses(pids, known.witnesses)
    same = bool(set(witnesses) & set(known.witnesses))
    if not same and known.idents:
        same = _idents(pids[0], numbers) == known.idents
    elif not same:
        same = not known.pids.isdisjoint(pids)
    return Seen(tuple(pids), witnesses) if same else None


def _idents(pid: int, numbers: Numbers) -> tuple[int, ...]:
    """The IDs of a process's namespaces; () where the kernel has none or it has gone elsewhere."""
    found = []
    for kind, number in zip(namespaces.TYPES, numbers, strict=True):
        answer = bytearray(8)
        try:
            fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_ino != number:
                    return ()
                fcntl.ioctl(fd, NS_GET_ID, answer)
            finally:
                os.close(fd)
        except OSError:
            return ()
        found.append(struct.unpack("=Q", answer)[0])
    return tuple(found)


def _describe(
    numbers: Numbers, pids: list[int], asked: Asked, sight: Sight, ours: set[int]
) -> New | None:
    """What is to be known of a set of namespaces; None when it is not one that was found."""
    mixed = ours.issuperset(numbers)
    for pid in pids[:LOOKED_AT_MAX]:
        home = _home(pid, asked)
        if home is None or (home and home not in sight.made):
            continue
        # Who is a member, and in namespaces of others, has entered in place.
        if home and mixed:
            continue
        if not home and _is_nsfs(pid, asked.daemon):
            continue
        user_fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        uid = _owner(user_fd)
        users = tuple(chain(user_fd, NS_GET_PARENT))
        pid_fd = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        pid_spaces = tuple(chain(pid_fd, NS_GET_PARENT))
        idents = _idents(pid, numbers)
        witnesses = _witnesses([pid, *(each for each in pids if each != pid)])
        since = members.started(pid)
        if numbers_of(pid) != numbers or not witnesses:
            return None
        if not home:
            home = _home_by_pid_space(pid_spaces, sight)
        # Else those who are root in it would come to have power over what is above it.
        if home and sight.made[home][USER] not in users:
            home = 0
        seen = Seen(tuple(pids), witnesses)
        return New(numbers, seen, idents, home, users, pid_spaces, uid, since, mixed)
    return None


def _home(pid: int, asked: Asked) -> int | None:
    """The number of the container whose member a process is by its group; None for one that is no
    member, or of which a member in part is known."""
    path = cgroup.membership(pid)
    if not path.startswith(asked.prefix):
        return 0
    if path in asked.parts:
        return None
    words = path.removeprefix(asked.prefix).split("/")
    number = 0
    while words and words[0].isdigit():
        number = int(words[0])
        if words[1:2] == ["payload"]:
            return number
        words = words[2:] if words[1:2] == ["sub"] else []
    return None


def _home_by_pid_space(spaces: tuple[int, ...], sight: Sight) -> int:
    """The container that has the closest of these PID namespaces; 0 for none."""
    holders: dict[int, int] = {}
    for number, each in sight.made.items():
        if each[PID] != sight.host[PID]:
            holders[each[PID]] = min(number, holders.get(each[PID], number))
    return next((holders[each] for each in spaces if each in holders), 0)


def _is_nsfs(pid: int, daemon: int) -> bool:
    """Whether it is a kernel thread, the daemon, or started by it, as is what acts in others'
    namespaces."""
    for _ in range(64):
        if pid == daemon:
            return True
        fields = _stat(pid)
        if _is_kernel_thread(fields):
            return True
        pid = int(fields[1])
        if pid <= 1:
            return False
    return False


def _owner(user_fd: int) -> int:
    answer = bytearray(4)
    fcntl.ioctl(user_fd, NS_GET_OWNER_UID, answer)
    return int(struct.unpack("=I", answer)[0])


# --- in the event loop -------------------------------------------------------------------------


class Discovery:
    """Finds them for a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.enabled = world.config.discovery.enabled
        self.cost_s = 0.0
        """What the last look took, of CPU time."""
        self.sight: Sight | None = None
        self._interval_s = world.config.discovery.interval_s
        self._lock = trio.Lock()
        self._thread = trio.CapacityLimiter(1)
        self._began_s = self._ended_s = -INTERVAL_MAX_S
        self._mixed: set[Numbers] = set()

    async def begin(self) -> None:
        """Take up what the last daemon had found, as far as it is still there."""
        self.world.load_found()
        if not self.enabled:
            for each in list(self.world.found.values()):
                self.world.lose(each)
            return
        self.world.look = self.look
        await self.look(0.0)

    def status(self) -> dict[str, object]:
        """For `nsfs status`: whether they are looked for, and how many there are."""
        return {
            "enabled": self.enabled,
            "found": len(self.world.found),
            "look_ms": round(self.cost_s * 1000, 1),
        }

    async def run(self) -> None:
        """Look again and again; for ever."""
        while self.enabled:
            paced_s = min(self.cost_s * SHARE, INTERVAL_MAX_S)
            await trio.sleep(max(self._interval_s, paced_s))
            await self.look(0.0)

    async def look(self, age_s: float) -> None:
        """Look now, unless that was begun at most so many seconds ago, or after this was asked.

        However many ask, it is done by one at a time, and most of the time by none.
        """
        asked_s = trio.current_time()
        async with self._lock:
            age_s = max(age_s, self.cost_s * ASKED_SHARE) if age_s else 0.0
            if self._began_s >= asked_s or self._began_s > asked_s - age_s:
                return
            await trio.sleep_until(self._ended_s + self.cost_s * (ASKED_SHARE - 1))
            self._began_s = trio.current_time()
            sight, self.cost_s = await trio.to_thread.run_sync(
                _timed, self._asked(), limiter=self._thread
            )
            self._ended_s = trio.current_time()
            self._take(sight)

    def _asked(self) -> Asked:
        world = self.world
        top = world.hierarchies.v2
        return Asked(
            inits={
                each.init_pid: each.number
                for each in world.containers.values()
                if each.parent is not None and each.phase is Phase.RUNNING and each.init_pid
            },
            known={
                each.numbers: Known(each.idents, each.witnesses, frozenset(each.pids))
                for each in world.found.values()
            },
            prefix=f"/{world.root.group.relative}/",
            parts=frozenset(path.removeprefix(top) for path in world.parts),
            daemon=os.getpid(),
        )

    def _take(self, sight: Sight) -> None:
        self.sight = sight
        by_numbers = {each.numbers: each for each in self.world.found.values()}
        for numbers, each in by_numbers.items():
            seen = sight.known.get(numbers)
            each.pids, each.witnesses = (seen.pids, seen.witnesses) if seen else ((), ())
        for each in by_numbers.values():
            if not each.pids and not any(other.pids for other in each.nested()):
                self.world.lose(each)
            elif each.phase is not Phase.GONE:
                each.phase = Phase.RUNNING if each.pids else Phase.DEAD
                each.init_pid = each.witnesses[0][0] if each.witnesses else 0
                if each.own("user") and not each.map:
                    each.map = _map_of(each.init_pid)
        mixed = {each.numbers for each in sight.new if each.mixed}
        counts: dict[Container, int] = {}
        for known in self.world.found.values():
            counts[known.maker] = counts.get(known.maker, 0) + 1
        for new in sight.new:
            # What has joined others' namespaces may be about to be a member in part.
            if new.mixed and new.numbers not in self._mixed:
                continue
            home = self.world.containers.get(new.home)
            if home is None or home.phase is not Phase.RUNNING or home.dying:
                continue
            if counts.get(home, 0) < (EACH_MAX if home.parent else HOST_MAX):
                counts[home] = counts.get(home, 0) + 1
                self._meet(new, home, sight)
        self._mixed = mixed

    def _meet(self, new: New, home: Container, sight: Sight) -> None:
        around = sight.host if home.parent is None else sight.made[home.number]
        parent = self._parent(new, home, around)
        number = self.world.store.number()
        name = f"unnamed{number}"
        found = Found(self.world, number, name, parent, parent.group.child(number))
        found.numbers, found.idents = new.numbers, new.idents
        found.pids, found.witnesses = new.seen.pids, new.seen.witnesses
        found.phase, found.init_pid = Phase.RUNNING, found.witnesses[0][0]
        found.since = new.since
        found.held = frozenset(
            kind
            for kind, ours, theirs in zip(namespaces.TYPES, new.numbers, around, strict=True)
            if ours != theirs
        )
        found.uid = new.uid if "user" in found.held else home.root_uid
        found.gid = home.root_gid
        found.map = _map_of(found.init_pid) if "user" in found.held else home.map
        self.world.meet(found)

    def _parent(self, new: New, home: Container, around: Numbers) -> Container:
        """What it is shown in; see above."""
        best: tuple[int, int, int] | None = None
        parent = home
        for each in self.world.found.values():
            user, pid = each.numbers[USER], each.numbers[PID]
            if each.maker is not home or each.phase is Phase.GONE:
                continue
            if (user, pid) == (around[USER], around[PID]):
                continue
            if user not in new.users or pid not in new.pid_spaces:
                continue
            distance = (new.pid_spaces.index(pid), new.users.index(user), each.number)
            if best is None or distance < best:
                best, parent = distance, each
        return parent


def _timed(asked: Asked) -> tuple[Sight, float]:
    begun_s = time.thread_time()
    sight = look(asked)
    return sight, time.thread_time() - begun_s


def _map_of(pid: int) -> idmap.Map:
    """The map of a process's user namespace, in the host's IDs; () when it has none yet."""
    try:
        with open(f"/proc/{pid}/uid_map", encoding="ascii") as file:
            rows = [tuple(map(int, line.split())) for line in file]
    except OSError:
        return ()
    return tuple((inside, outside, count) for inside, outside, count in rows)
