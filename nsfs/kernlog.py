"""The router: which lines of the host's kernel log belong to containers.

nsfs-marker reads the log and what tells whose its lines are, `klines` decides, and here they are
delivered: a container's line to its `kmsg` (the owner of a network namespace is who holds it), all
others to that of the root, which so is the host's log without the lines of containers.  What was
delivered is never taken from the host's /dev/kmsg.

A line is delivered once, also where a daemon dies: the number of the next line is kept in the run
directory (`kmsg`), and the token of each record is the line's number.  Lines printed while there is
no daemon stay with the host.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from nsfs import klines, members, namespaces, nflog
from nsfs.container import Container, Phase
from nsfs.klines import Event, Joiner, Judge, Packet, Waiting
from nsfs.marker import Frame, Marker, Tier
from nsfs.store import map_file
from nsfs.world import World, start_time

log = logging.getLogger(__name__)

AGAIN_S = 2.0
"""How long after nsfs-marker has failed another is started."""
LOOK_S = 1.0
"""How often network namespaces are looked for that members made."""
MEMBERS_AT_ONCE = 1000
"""How many processes are looked at for that, each time."""
TOKEN = 1 << 62
"""Above every number of a FUSE request."""
ALL_NETNS = "/proc/sys/net/netfilter/nf_log_all_netns"
PAUSE_S = 10.0
"""How long the breaker keeps LOG lines off."""
OLD_S = 5.0
"""Older LOG lines do not make the breaker act."""
CONT = 8
NS_GET_USERNS = 0xB701
"""ioctl_ns(2)."""


@dataclass(slots=True)
class Counts:
    """Since the daemon began."""

    lines: int = 0
    """Records of the host's log."""
    delivered: int = 0
    firewall: int = 0
    """LOG lines among all."""
    uncertain: int = 0
    """LOG lines that stayed with the host although a container's packet was being handled."""
    overruns: int = 0
    """How often the log was overwritten before it was read."""
    lost: int = 0
    """Events that found their buffer full."""
    pauses: int = 0


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


class FirewallLog:
    """nf_log_all_netns, as long as somebody needs it on.

    Several instances of nsfs may: each holds a shared lock on a note, in which the first one writes
    down what there was before, and the last one puts that back.
    """

    def __init__(self, wanted: bool, note: str) -> None:
        self._note = note
        self._fd = self._note_fd = -1
        self.paused = False
        if not wanted:
            return
        try:
            self._fd = os.open(ALL_NETNS, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            log.info("LOG lines of containers cannot be switched on: %s", error)
            return
        while not self._hold():
            os.close(self._note_fd)
        self._write("1")

    def _hold(self) -> bool:
        """Take a share in the note; False when it was taken away meanwhile."""
        self._note_fd = os.open(self._note, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._note_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A daemon that was killed left its note, and the sysctl on.
            if not os.pread(self._note_fd, 16, 0):
                os.pwrite(self._note_fd, os.pread(self._fd, 16, 0), 0)
        except BlockingIOError:
            pass
        fcntl.flock(self._note_fd, fcntl.LOCK_SH)
        try:
            same = os.path.samestat(os.stat(self._note), os.fstat(self._note_fd))
        except FileNotFoundError:
            return False
        return same and bool(os.pread(self._note_fd, 16, 0))

    def _write(self, value: str) -> None:
        os.pwrite(self._fd, value.encode(), 0)

    @property
    def on(self) -> bool:
        """Whether LOG rules outside the host's own network namespace print."""
        try:
            with open(ALL_NETNS, encoding="ascii") as file:
                return file.read().strip() == "1"
        except OSError:
            return False

    def pause(self) -> None:
        """Switch it off for a while."""
        if self._fd >= 0:
            self.paused = True
            self._write("0")

    def resume(self) -> None:
        """On again."""
        if self._fd >= 0 and self.paused:
            self.paused = False
            self._write("1")

    def close(self) -> None:
        """Put back what there was, if nobody else needs it."""
        if self._fd < 0:
            return
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._note_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._write(os.pread(self._note_fd, 16, 0).decode())
            os.unlink(self._note)
        os.close(self._note_fd)
        os.close(self._fd)
        self._fd = -1


class Router:
    """Reads the host's log and delivers its lines; `run` for ever."""

    def __init__(self, world: World, note: str = "/run/nsfs.nf_log_all_netns") -> None:
        settings = world.config.log
        self.world = world
        self.tier: Tier | None = None
        self.counts = Counts()
        self.firewall_log: FirewallLog | None = None
        self._note = note
        self._best = Tier[settings.kernel_lines.upper()]
        self._wanted = settings.firewall_log
        self._rate = settings.firewall_rate
        self._marker: Marker | None = None
        self._joiner = Joiner()
        self._judge: Judge[Container] = Judge(self)
        path = os.path.join(world.store.directory, "kmsg")
        self._position = memoryview(map_file(path, 4096)).cast("Q")
        if not world.root.log.ring.next_seq:
            # Of another instance, before.
            self._position[0] = 0
        self._networks: dict[int, Network] = {}
        """By cookie."""
        self._made: dict[int, int] = {}
        """Namespaces that members made: inode number to cookie."""
        self._groups: dict[int, Container] = {}
        """By the ID of the v2 group of its members."""
        self._tasks: dict[int, Task] = {}
        self._nflog: dict[int, tuple[trio.CancelScope, trio.Event]] = {}
        """What reads the NFLOG groups of a container, by its number."""
        self._recent: deque[float] = deque()
        """When LOG lines came, in the last second."""
        self._concerned: set[int] = set()
        self._changes, self._todo = trio.open_memory_channel[tuple[Container, bool]](100_000)
        world.started = self._started
        world.ended = self._ended
        world.firewall_stat = self._firewall_stat
        world.subscribe = self.subscribe

    # --- what is known of containers ---

    def _started(self, container: Container) -> None:
        self._changes.send_nowait((container, True))

    def _ended(self, container: Container) -> None:
        self._changes.send_nowait((container, False))

    async def _follow(self) -> None:
        """Attach to containers that come, detach from those that go; for ever."""
        async for container, came in self._todo:
            try:
                if came:
                    await self._add(container)
                else:
                    await self._remove(container)
            except (OSError, trio.ClosedResourceError, trio.BrokenResourceError) as error:
                # It may have ended already; or nsfs-marker has, and the next one is told anew.
                log.debug("network of %s: %s", container.name, error)

    async def _add(self, container: Container) -> None:
        if container.phase is not Phase.RUNNING:
            return
        with contextlib.suppress(FileNotFoundError):
            self._groups[os.stat(container.group.payload).st_ino] = container
        if container.own("net"):
            await self._attach(f"/proc/{container.init_pid}/ns/net", container)
            if container.nflog and container.number not in self._nflog:
                await self.subscribe(container, container.nflog)

    async def _attach(self, path: str, container: Container | None) -> int:
        marker = self._marker
        if marker is None or marker.tier is Tier.OWN:
            return 0
        net_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            cookie = 0
            if marker.tier is Tier.EXACT:
                hooks = self._wanted or (self.firewall_log is not None and self.firewall_log.on)
                cookie = await marker.attach(net_fd, hooks)
                self._networks[cookie] = Network(cookie, container)
            else:
                cookie, rows = await marker.describe(net_fd)
                self._networks[cookie] = _network(cookie, container, rows)
            return cookie
        finally:
            os.close(net_fd)

    async def _remove(self, container: Container) -> None:
        if container.number in self._nflog:
            self._nflog[container.number][0].cancel()
        for ident in [i for i, each in self._groups.items() if each is container]:
            del self._groups[ident]
        for cookie in [n.cookie for n in self._networks.values() if n.container is container]:
            await self._detach(cookie)

    async def _detach(self, cookie: int) -> None:
        self._networks.pop(cookie, None)
        for inode in [i for i, each in self._made.items() if each == cookie]:
            del self._made[inode]
        if self._marker is not None and self._marker.tier is Tier.EXACT:
            await self._marker.detach(cookie)

    async def _look(self) -> None:
        """Find the network namespaces that members made, or (in the tier CONTEXT) the names in
        all; for ever."""
        while True:
            await trio.sleep(LOOK_S)
            if self._marker is None or self._marker.tier is Tier.OWN:
                continue
            with contextlib.suppress(OSError):
                if self._marker.tier is Tier.EXACT:
                    await self._look_for_made()
                else:
                    await self._describe_all()

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
        assert self._marker is not None
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

    # --- NFLOG ---

    async def subscribe(self, container: Container, groups: tuple[int, ...]) -> None:
        """Make the packets of these NFLOG groups of its network lines of its log, and no others.

        EBUSY: another has one of the groups.  EOPNOTSUPP: there is no nsfs-marker.
        """
        if self._marker is None:
            raise OSError(errno.EOPNOTSUPP, "kernel lines are not routed", container.name)
        if container.number in self._nflog:
            scope, closed = self._nflog[container.number]
            scope.cancel()
            # The same groups cannot be bound before its socket is closed.
            await closed.wait()
        if not groups:
            return
        path = f"/proc/{container.init_pid}/ns/net"
        net_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fd = await self._marker.netfilter_socket(net_fd)
        except BaseException:
            os.close(net_fd)
            raise
        netlink = socket.socket(fileno=fd)
        try:
            for group in groups:
                for message in nflog.bind_messages(group):
                    netlink.send(message)
                    # The kernel has answered when send(2) returns.
                    for answer in nflog.parse(netlink.recv(65536)):
                        if isinstance(answer, int) and answer:
                            raise OSError(answer, os.strerror(answer), f"NFLOG group {group}")
        except BaseException:
            netlink.close()
            os.close(net_fd)
            raise
        self._nflog[container.number] = (trio.CancelScope(), trio.Event())
        self.world.start(self._read_nflog, container, netlink, net_fd)

    async def _read_nflog(self, container: Container, netlink: socket.socket, net_fd: int) -> None:
        scope, closed = self._nflog[container.number]
        names: dict[int, str] = {}
        with scope:
            try:
                while True:
                    await trio.lowlevel.wait_readable(netlink)
                    try:
                        data = netlink.recv(1 << 18)
                    except OSError as error:
                        # ENOBUFS: some were lost.
                        if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                            continue
                        raise
                    for each in nflog.parse(data):
                        if isinstance(each, int):
                            continue
                        wanted = {each.incoming, each.outgoing} - {0}
                        if not wanted <= names.keys() and self._marker is not None:
                            _, rows = await self._marker.describe(net_fd)
                            names = {int(n): name for kind, name, n in rows if kind == "index"}
                        log_ = container.holder(namespaces.SYSLOG)
                        log_.log.append(nflog.line(each, names), level=4, facility=0)
                        log_.log_changed_ns = time.time_ns()
            except OSError as error:
                log.info("NFLOG of %s: %s", container.name, error)
            finally:
                os.close(net_fd)
                netlink.close()
                del self._nflog[container.number]
                closed.set()

    # --- Owners, for Judge ---

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

    # --- lines ---

    async def run(self) -> None:
        """Route, for ever; what it has switched on is switched off at the end."""
        # The same for the next daemon, should this one be killed.
        digest = hashlib.sha256(self.world.store.directory.encode()).hexdigest()[:16]
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow)
                nursery.start_soon(self._look)
                nursery.start_soon(self._break)
                while True:
                    await self._run_once(f"nsfs-{digest}")
                    await trio.sleep(AGAIN_S)
        except Exception:
            # Containers are to go on without their kernel lines.
            log.exception("kernel lines are not routed any more")
        finally:
            if self.firewall_log is not None:
                try:
                    self.firewall_log.close()
                except OSError:
                    log.exception("the firewall's log may be left on")

    async def _run_once(self, instance: str) -> None:
        """As long as one nsfs-marker lives."""
        try:
            marker = await Marker.start(self._best, instance)
        except OSError as error:
            log.info("kernel lines: %s", error)
            self.tier = None
            await trio.sleep_forever()
            return
        try:
            self.tier = marker.tier
            log.info("kernel lines: tier %s", marker.tier.name.lower())
            # Without a way to tell whose they are, LOG lines of containers are not asked for.
            if self.firewall_log is None and marker.tier is not Tier.OWN:
                self.firewall_log = FirewallLog(self._wanted, self._note)
            self._joiner = Joiner(has_events=marker.tier is not Tier.OWN)
            self._judge = Judge(self)
            self._networks, self._made, self._groups = {}, {}, {}
            self._marker = marker
            for each in list(self.world.containers.values()):
                if each.parent is not None:
                    self._started(each)
            await self._route(marker)
            log.warning("nsfs-marker has ended; kernel lines stay with the host for a moment")
        finally:
            self._marker = None
            await marker.aclose()

    async def _route(self, marker: Marker) -> None:
        rest = b""
        while True:
            due_s = self._joiner.due_s()
            left_s = 3600.0 if due_s is None else max(due_s - time.monotonic(), 0.001)
            with trio.move_on_after(left_s):
                frames = await marker.frames()
                if not frames:
                    return
                now_s = time.monotonic()
                for kind, data in frames:
                    if kind == Frame.TRACE:
                        *lines, rest = (rest + data).split(b"\n")
                        for line in lines:
                            self._take(klines.parse_trace(line))
                    else:
                        self._take_frame(kind, data, now_s)
            for each in self._joiner.ready(time.monotonic()):
                self._deliver(each)

    def _take(self, event: Event | klines.Follower | None) -> None:
        if event is not None:
            self._joiner.add_event(event)

    def _take_frame(self, kind: int, data: bytes, now_s: float) -> None:
        if kind == Frame.EVENT:
            self._take(klines.parse_event(data))
        elif kind == Frame.RECORD:
            record = klines.parse_record(data)
            if record is not None and record.seq >= self._position[0]:
                self._joiner.add_record(record, now_s)
        elif kind == Frame.OVERRUN:
            self.counts.overruns += 1
        elif kind == Frame.LOST:
            self.counts.lost += int.from_bytes(data, "little")

    def _deliver(self, each: Waiting) -> None:
        record, event = each.record, each.event
        self.counts.lines += 1
        owner = self._judge.owner(each)
        if isinstance(each.subject, Packet):
            self._count_firewall(owner, each)
        if owner is not None and owner.phase is not Phase.GONE:
            self.counts.delivered += 1
            holder = owner.holder(namespaces.SYSLOG)
            usec = event.time_ns // 1000 if event is not None else record.usec
        else:
            holder, usec = self.world.root, record.usec
        holder.log.append(
            record.text,
            level=record.level,
            facility=record.facility,
            flags=CONT if record.continued else 0,
            usec=usec,
            token=TOKEN | record.seq,
            # What stays with the host is in its log already.
            limited=holder is not self.world.root,
        )
        holder.log_changed_ns = time.time_ns()
        # One store, after what it says is so.
        self._position[0] = record.seq + 1

    # --- the breaker ---

    def _count_firewall(self, owner: Container | None, each: Waiting) -> None:
        printed_s = each.record.usec / 1e6
        # The log's own clock may be a little off; what was printed before we came does not count.
        if printed_s < time.monotonic() - OLD_S:
            return
        self.counts.firewall += 1
        if owner is not None:
            self._concerned.add(owner.number)
        elif each.event is not None and each.event.marks:
            self.counts.uncertain += 1
        self._recent.append(printed_s)
        while self._recent[0] < printed_s - 1.0:
            self._recent.popleft()

    async def _break(self) -> None:
        """Switch LOG lines off for a while when too many come; for ever."""
        while True:
            await trio.sleep(0.1)
            switch = self.firewall_log
            if switch is None or self._rate is None or len(self._recent) <= self._rate:
                if self._recent and self._recent[-1] < time.monotonic() - OLD_S:
                    self._concerned.clear()
                continue
            switch.pause()
            self.counts.pauses += 1
            text = f"nsfs: more than {self._rate} LOG lines a second: off for {PAUSE_S:.0f} s"
            log.warning("%s", text)
            self._say(text)
            await trio.sleep(PAUSE_S)
            self._recent.clear()
            switch.resume()
            self._say("nsfs: LOG lines are on again")
            self._concerned.clear()

    def _say(self, text: str) -> None:
        """To the host's log and to those containers that had LOG lines lately."""
        concerned = [self.world.containers.get(number) for number in self._concerned]
        for each in {self.world.root, *(c.holder(namespaces.SYSLOG) for c in concerned if c)}:
            each.log.append(text.encode(), level=4, facility=3)
            each.log_changed_ns = time.time_ns()

    # --- what is told of it ---

    def _firewall_stat(self) -> tuple[int, int, int]:
        paused = bool(self.firewall_log and self.firewall_log.paused)
        return self.counts.firewall, int(paused), self.counts.pauses

    def status(self) -> dict[str, object]:
        """For `nsfs status`."""
        counts = self.counts
        switch = self.firewall_log
        return {
            "tier": "none" if self.tier is None else self.tier.name.lower(),
            "firewall_log": "off" if switch is None or not switch.on else "on",
            "paused": bool(switch and switch.paused),
            "lines": counts.lines,
            "delivered": counts.delivered,
            "firewall_lines": counts.firewall,
            "uncertain": counts.uncertain,
            "overruns": counts.overruns,
            "lost": counts.lost,
            "pauses": counts.pauses,
        }


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
