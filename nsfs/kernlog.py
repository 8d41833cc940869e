"""The router: which lines of the host's kernel log belong to containers.

nsfs-marker reads the log and what tells whose its lines are, `klines` decides with what `holders`
knows, and here they are delivered: a container's line to its `kmsg` (the owner of a network
namespace is who holds it), all others to that of the root, which so is the host's log without the
lines of containers.  What was delivered is never taken from the host's /dev/kmsg.

A line is delivered once, also where a daemon dies: the number of the next line is kept in the run
directory (`kmsg`), and the token of each record is the line's number.  Lines printed while there is
no daemon stay with the host.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass

import trio

from nsfs import klines, namespaces
from nsfs.container import Container, Phase
from nsfs.firewall import NOTE, FirewallLog, Rate
from nsfs.holders import Holders
from nsfs.klines import Event, Packet
from nsfs.linejoin import Joiner, Judge, Waiting
from nsfs.marker import Frame, Marker, Tier
from nsfs.packets import Subscriptions
from nsfs.store import map_file
from nsfs.world import World

log = logging.getLogger(__name__)

AGAIN_S = 2.0
"""How long after nsfs-marker has failed another is started."""
TOKEN = 1 << 62
"""Above every number of a FUSE request."""
CONT = 8


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


class Router:
    """Reads the host's log and delivers its lines; `run` for ever."""

    def __init__(self, world: World, note: str = NOTE) -> None:
        settings = world.config.log
        self.world = world
        self.tier: Tier | None = None
        self.counts = Counts()
        self.firewall_log: FirewallLog | None = None
        self._note = note
        self._best = Tier[settings.kernel_lines.upper()]
        self._wanted = settings.firewall_log
        self._rate = settings.firewall_rate
        self._pause_s = settings.firewall_pause_s
        self._holders: Holders | None = None
        self._packets = Subscriptions(world)
        path = os.path.join(world.store.directory, "kmsg")
        self._position = memoryview(map_file(path, 4096)).cast("Q")
        if not world.root.log.ring.next_seq:
            # Of another instance, before.
            self._position[0] = 0
        self._recent = Rate()
        self._concerned: set[int] = set()
        self._changes, self._todo = trio.open_memory_channel[tuple[Container, bool]](100_000)
        world.started.append(self._started)
        world.ended.append(self._ended)
        world.inherited.append(self._inherited)
        world.firewall_stat = self._firewall_stat
        world.subscribe = self._packets.subscribe

    # --- containers come and go ---

    def _started(self, container: Container) -> None:
        self._changes.send_nowait((container, True))

    def _ended(self, container: Container) -> None:
        self._changes.send_nowait((container, False))

    def _inherited(self, container: Container) -> None:
        # Whose namespaces are whose is looked at again.
        self._ended(container)
        self._started(container)

    async def _follow(self) -> None:
        """Attach to containers that come, detach from those that go; for ever."""
        async for container, came in self._todo:
            holders = self._holders
            if holders is None:
                continue
            try:
                if not came:
                    self._packets.cancel(container)
                    await holders.remove(container)
                elif container.phase in (Phase.RUNNING, Phase.DEAD):
                    # Of a dead one, what its processes printed may still be on its way.
                    await holders.add(container)
                    if container.init_pid:
                        await self._packets.resume(container)
            except (OSError, trio.ClosedResourceError, trio.BrokenResourceError) as error:
                # It may have ended already; or nsfs-marker has, and the next one is told anew.
                log.debug("network of %s: %s", container.name, error)

    def _hooks(self) -> bool:
        """Whether LOG rules of containers may print."""
        return self._wanted or (self.firewall_log is not None and self.firewall_log.on)

    # --- lines ---

    async def run(self) -> None:
        """Route, for ever; what it has switched on is switched off at the end."""
        # The same for the next daemon, should this one be killed.
        digest = hashlib.sha256(self.world.store.directory.encode()).hexdigest()[:16]
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow)
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
            joiner = Joiner(has_events=marker.tier is not Tier.OWN)
            self._packets.marker = marker
            self._holders = Holders(self.world, marker, self._hooks)
            for each in list(self.world.containers.values()):
                if each.parent is not None:
                    self._started(each)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._holders.look)
                await self._route(marker, joiner, Judge(self._holders))
                nursery.cancel_scope.cancel()
            log.warning("nsfs-marker has ended; kernel lines stay with the host for a moment")
        finally:
            self._packets.marker = self._holders = None
            await marker.aclose()

    async def _route(self, marker: Marker, joiner: Joiner, judge: Judge[Container]) -> None:
        rest = b""
        while True:
            due_s = joiner.due_s()
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
                            _take(joiner, klines.parse_trace(line))
                    else:
                        self._take_frame(joiner, kind, data, now_s)
            for each in joiner.ready(time.monotonic()):
                self._deliver(each, judge.owner(each))

    def _take_frame(self, joiner: Joiner, kind: int, data: bytes, now_s: float) -> None:
        if kind == Frame.EVENT:
            _take(joiner, klines.parse_event(data))
        elif kind == Frame.RECORD:
            record = klines.parse_record(data)
            if record is not None and record.seq >= self._position[0]:
                joiner.add_record(record, now_s)
        elif kind == Frame.OVERRUN:
            self.counts.overruns += 1
        elif kind == Frame.LOST:
            self.counts.lost += int.from_bytes(data, "little")

    def _deliver(self, each: Waiting, owner: Container | None) -> None:
        record, event = each.record, each.event
        self.counts.lines += 1
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
        if not self._recent.count(each.record.usec / 1e6):
            return
        self.counts.firewall += 1
        if owner is not None:
            self._concerned.add(owner.number)
        elif each.event is not None and each.event.marks:
            self.counts.uncertain += 1

    async def _break(self) -> None:
        """Switch LOG lines off for a while when too many come; for ever."""
        while True:
            await trio.sleep(0.1)
            switch = self.firewall_log
            if switch is None:
                continue
            if self._rate is not None and len(self._recent) > self._rate and not switch.paused:
                switch.pause(self._pause_s)
                self.counts.pauses += 1
                text = f"nsfs: more than {self._rate} LOG lines a second: off for "
                text += f"{self._pause_s:g} s"
                log.warning("%s", text)
                self._say(text)
            if switch.paused:
                # Or a daemon, or another instance, that may be no more, has switched them off.
                await trio.sleep(switch.paused)
                self._recent.clear()
                switch.resume()
                self._say("nsfs: LOG lines are on again")
                self._concerned.clear()
            elif self._recent.quiet:
                self._concerned.clear()

    def _say(self, text: str) -> None:
        """To the host's log and to those containers that had LOG lines lately."""
        concerned = [self.world.containers.get(number) for number in self._concerned]
        for each in {self.world.root, *(c.holder(namespaces.SYSLOG) for c in concerned if c)}:
            each.log.append(text.encode(), level=4, facility=3, limited=False)
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
            "networks": self._holders.networks if self._holders else 0,
            "looks": self._holders.looks if self._holders else 0,
        }


def _take(joiner: Joiner, event: Event | klines.Follower | None) -> None:
    if event is not None:
        joiner.add_event(event)
