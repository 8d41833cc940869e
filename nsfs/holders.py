"""Who owns what a line of the host's kernel log is about: tasks, cgroups, network namespaces.

What `klines` asks (`Owners`), as it is known here: the kernel's bookkeeping of the moment, never
the text.  None is for what is the host's, or nobody's, or not certain.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from nsfs import klines, members, namespaces
from nsfs.container import Container, Phase
from nsfs.klines import Event, Packet
from nsfs.marker import Marker, Tier
from nsfs.processes import start_time
from nsfs.world import World

LOOK_S = 1.0
"""How often network namespaces are looked for that members made."""
MEMBERS_AT_ONCE = 1000
"""How many processes are looked at for that, each time."""
NS_GET_USERNS = 0xB701
"""ioctl_ns(2)."""


@dataclass(slots=True)
class Network:
    """A network namespace and the names in it; `container` None: nobody's here."""

    cookie: int
    container: Container | None
    links: dict[str, str] = field(default_factory=dict)
    addresses: set[tuple[str, bytes]] = field(default_factory=set)


@dataclass(slots=True)
class Task:
    """A member, as it was when it was looked at."""

    container: Container
    net: int
    """Inode number of its network namespace; 0: it has none any more."""
    begun_ns: int
    looked_ns: int


class Holders:
    """What is known of containers for as long as one nsfs-marker lives."""

    def __init__(self, world: World, marker: Marker, hooks: Callable[[], bool]) -> None:
        """`hooks`: whether LOG rules print in namespaces other than the host's."""
        self.world = world
        self.looks = 0
        """How often namespaces were looked for."""
        self._marker = marker
        self._hooks = hooks
        self._networks: dict[int, Network] = {}
        """By cookie."""
        self._made: dict[int, int] = {}
        """Namespaces that members made: inode number to cookie."""
        self._groups: dict[int, Container] = {}
        """By the ID of the v2 group of its members."""
        self._tasks: dict[int, Task] = {}

    @property
    def networks(self) -> int:
        """Network namespaces of containers that are known."""
        return sum(each.container is not None for each in self._networks.values())

    # --- coming and going ---

    async def add(self, container: Container) -> None:
        """A container runs, or has died: then it has no namespaces any more.

        Marks are made in its network namespace from now on, not only when there is a LOG rule: its
        root can add one at any moment, what nf_tables tells of that it tells after the commit, and
        of iptables-legacy nothing tells.  So the first line would be missed.
        """
        with contextlib.suppress(FileNotFoundError):
            self._groups[os.stat(container.group.payload).st_ino] = container
        if container.own("net") and container.init_pid:
            await self._attach(f"/proc/{container.init_pid}/ns/net", container)

    async def remove(self, container: Container) -> None:
        """It does not any more."""
        for ident in [i for i, each in self._groups.items() if each is container]:
            del self._groups[ident]
        for cookie in [n.cookie for n in self._networks.values() if n.container is container]:
            await self._detach(cookie)

    async def _attach(self, path: str, container: Container | None) -> int:
        marker = self._marker
        if marker.tier is Tier.OWN:
            return 0
        net_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            cookie = 0
            if marker.tier is Tier.EXACT:
                cookie = await marker.attach(net_fd, self._hooks())
                self._networks[cookie] = Network(cookie, container)
            else:
                cookie, rows = await marker.describe(net_fd)
                self._networks[cookie] = _network(cookie, container, rows)
            return cookie
        finally:
            os.close(net_fd)

    async def _detach(self, cookie: int) -> None:
        self._networks.pop(cookie, None)
        for inode in [i for i, each in self._made.items() if each == cookie]:
            del self._made[inode]
        if self._marker.tier is Tier.EXACT:
            await self._marker.detach(cookie)

    async def look(self) -> None:
        """Find the network namespaces that members made, or (in the tier CONTEXT) the names in
        all; for ever."""
        while True:
            await trio.sleep(LOOK_S)
            with contextlib.suppress(OSError):
                if self._marker.tier is Tier.EXACT:
                    await self._look_for_made()
                elif self._marker.tier is Tier.CONTEXT:
                    await self._describe_all()
            self.looks += 1

    async def _look_for_made(self) -> None:
        owners = {}
        known = set()
        for each in list(self.world.containers.values()):
            if each.parent is None or each.phase is not Phase.RUNNING:
                continue
            with contextlib.suppress(OSError):
                if each.own("user"):
                    owners[namespaces.identity(each.init_pid, "user")] = each
                known.add(namespaces.identity(each.init_pid, "net"))
        if not owners:
            return
        known.add(namespaces.identity("self", "net"))
        seen: dict[int, str] = {}
        for pid in _pids(owners.values()):
            with contextlib.suppress(OSError):
                inode = namespaces.identity(pid, "net")
                if inode not in known:
                    seen[inode] = f"/proc/{pid}/ns/net"
        for inode in [i for i in self._made if i not in seen]:
            await self._detach(self._made[inode])
        for inode, path in seen.items():
            if inode in self._made:
                continue
            with contextlib.suppress(OSError):
                owner = _owner(path, owners)
                if owner is not None:
                    self._made[inode] = await self._attach(path, owner)

    async def _describe_all(self) -> None:
        """Every namespace that a process is in: whose names could be mistaken for a container's."""
        found: dict[int, str] = {}
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    found.setdefault(namespaces.identity(name, "net"), f"/proc/{name}/ns/net")
        holders = {}
        for each in self.world.containers.values():
            if each.parent is not None and each.own("net") and each.phase is Phase.RUNNING:
                with contextlib.suppress(OSError):
                    holders[namespaces.identity(each.init_pid, "net")] = each
        networks = {}
        for inode, path in found.items():
            try:
                net_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                cookie, rows = await self._marker.describe(net_fd)
            finally:
                os.close(net_fd)
            networks[cookie] = _network(cookie, holders.get(inode), rows)
        self._networks = networks

    # --- for Judge ---

    def of_task(self, event: Event) -> Container | None:
        """By the groups that the kernel noted; by PID where it did not, if that is certain."""
        if event.groups:
            for ident in reversed(event.groups):
                if ident in self._groups:
                    return self._groups[ident]
            return None
        known = self._tasks.get(event.tid)
        if known is None or not known.begun_ns <= event.time_ns <= known.looked_ns:
            known = self._look_at_task(event.tid)
            if known is None or event.time_ns < known.begun_ns:
                # Another's PID before: the process that printed has ended.
                return None
            self._tasks.pop(event.tid, None)
            self._tasks[event.tid] = known
            if len(self._tasks) > 1024:
                del self._tasks[next(iter(self._tasks))]
        return known.container

    def _look_at_task(self, tid: int) -> Task | None:
        try:
            found = members.container_of(self.world.root, tid)
            if found is None or found.parent is None:
                return None
            net = 0
            # One that has ended, and was not reaped, has no namespaces.
            with contextlib.suppress(FileNotFoundError):
                net = namespaces.identity(tid, "net")
            # In whole ticks, so it may have begun a tick later than this says.
            ticks = start_time(tid)
        except (OSError, IndexError):
            return None
        asleep_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        begun_ns = ticks * 1_000_000_000 // members.CLOCK_TICKS - asleep_ns
        return Task(found, net, begun_ns, time.monotonic_ns())

    def of_net(self, cookie: int) -> Container | None:
        """The container that holds it."""
        network = self._networks.get(cookie)
        return None if network is None else network.container

    def of_group(self, path: bytes) -> Container | None:
        """The innermost container whose group, of whichever hierarchy, that path is in."""
        text = path.decode("utf-8", "surrogateescape") + "/"
        best, length = None, 0
        for each in self.world.containers.values():
            if each.parent is None:
                continue
            for prefix in _group_paths(each):
                if text.startswith(prefix + "/") and len(prefix) > length:
                    best, length = each, len(prefix)
        return best

    def of_packet(self, event: Event, packet: Packet) -> Container | None:
        """Without marks.  What a task of the container itself sends; what came to an interface of
        its own, known by its MAC address."""
        if packet.incoming and not packet.outgoing:
            return self._receiver(packet)
        if event.interrupt or packet.incoming or not packet.outgoing:
            return None
        if self.of_task(event) is None:
            return None
        task = self._tasks[event.tid]
        owner = task.container.holder("net")
        name = packet.outgoing.decode("utf-8", "surrogateescape")
        for network in self._networks.values():
            if network.container is owner and (name, packet.source) in network.addresses:
                try:
                    return owner if task.net == namespaces.identity(owner.init_pid, "net") else None
                except OSError:
                    return None
        return None

    def _receiver(self, packet: Packet) -> Container | None:
        mac = packet.mac.decode("ascii", "replace")
        name = packet.incoming.decode("utf-8", "surrogateescape")
        # The receiver's address, the sender's, the protocol; the loopback's are zero.
        if len(mac) != 14 * 3 - 1 or int(mac[:2], 16) & 1 or not mac[:17].strip("0:"):
            return None
        # The same address on another name would be as possible: whoever has it may rename it.
        meant = [n for n in self._networks.values() if mac[:17] in n.links.values()]
        if len(meant) != 1 or meant[0].links.get(name) != mac[:17]:
            return None
        return meant[0].container

    def within(self, inner: Container, outer: Container) -> bool:
        """Whether the one is the other or nested in it."""
        return outer in inner.lineage()


def _network(
    cookie: int, container: Container | None, rows: Iterable[tuple[str, str, str]]
) -> Network:
    network = Network(cookie, container)
    for kind, name, value in rows:
        if kind == "link":
            network.links[name] = value
        elif kind == "addr":
            network.addresses.add((name, klines.address(value)))
    return network


def _group_paths(container: Container) -> list[str]:
    """Its paths as the kernel names them, within their hierarchies."""
    group = container.group
    tops = group.hierarchies.v1
    return [f"/{group.relative}", *(path[len(tops[name]) :] for name, path in group.v1.items())]


def _pids(containers: Iterable[Container]) -> list[int]:
    found: list[int] = []
    for each in containers:
        with contextlib.suppress(OSError):
            found += each.group.pids()
        if len(found) > MEMBERS_AT_ONCE:
            break
    return found[:MEMBERS_AT_ONCE]


def _owner(path: str, owners: dict[int, Container]) -> Container | None:
    """The container in whose user namespace, or in one below it, a namespace was made."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            try:
                above = fcntl.ioctl(fd, NS_GET_USERNS)
            except OSError:
                return None
            os.close(fd)
            fd = above
            found = owners.get(os.fstat(fd).st_ino)
            if found is not None:
                return found
    finally:
        os.close(fd)
