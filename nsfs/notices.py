"""What the memory and pids controllers tell of: OOM kills, limits that were reached.

cgroup v2 tells by inotify on memory.events and pids.events, in every group above as well.  v1 tells
of an OOM by an eventfd (Documentation/admin-guide/cgroup-v1/memory.rst, section 9), in the group
whose limit it was and in those below, before anything is killed.  Of a rejected fork either told,
before Linux 6.11, in the group of the process only; since then v1 does not.  So of a container that
somebody waits for, those nested in it are watched as well.

Nothing is watched before somebody waits.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from nsfs.attribute import Watchers
from nsfs.kernfs import pairs, read

if TYPE_CHECKING:
    from nsfs.container import Container
    from nsfs.world import World

FILES = ("memory.events", "pids.events")
LOOKS_S = (0.001, 0.002, 0.004, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""When to look, after v1 has told of an OOM, whether anything was killed."""

Seen = dict[str, dict[str, int]]


def oom_kills(container: Container) -> int:
    """How many processes of it, or of those nested in it, the OOM killer has killed; at the root,
    how many of the host (proc_vmstat(5))."""
    if container.parent is None:
        return pairs(read("/proc/vmstat")).get("oom_kill", 0)
    try:
        return container.group.counters("memory.events").get("oom_kill", 0)
    except OSError:
        return 0


class Notices:
    """Who waits for such events, and what they are told."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._epoll = select.epoll()
        self._watchers: dict[tuple[int, str], Watchers] = {}
        self._wanted: set[int] = set()
        """Numbers of the containers that somebody has waited for."""
        self._watches: dict[int, list[int]] = {}
        self._eventfds: dict[int, Container] = {}
        self._seen: dict[int, Seen] = {}
        self._looking: set[int] = set()

    def of(self, container: Container, file: str) -> Watchers:
        """Who is told of changes of memory.events or pids.events."""
        key = (container.number, file)
        if key not in self._watchers:
            self._watchers[key] = Watchers(functools.partial(self.begin, container))
        return self._watchers[key]

    def begin(self, container: Container) -> None:
        """Somebody waits for what happens to a container, from what was seen of it last."""
        if container.parent is None:
            return
        if container.number not in self._wanted:
            self._wanted.add(container.number)
            for each in (container, *container.descendants()):
                self._watch(each)
        self._look(container)

    def started(self, container: Container) -> None:
        """It has groups, new ones."""
        if self._wanted and any(each.number in self._wanted for each in container.lineage()):
            self._watch(container)

    def ended(self, container: Container) -> None:
        """Its groups are about to go."""
        for watch in self._watches.pop(container.number, ()):
            self._world.unwatch_file(watch)
        for fd in [fd for fd, each in self._eventfds.items() if each is container]:
            del self._eventfds[fd]
            self._epoll.unregister(fd)
            # Which ends the kernel's side too.
            os.close(fd)

    def forget(self, container: Container) -> None:
        """Nothing is left of it."""
        self._wanted.discard(container.number)
        self._seen.pop(container.number, None)
        for file in FILES:
            self._watchers.pop((container.number, file), None)

    def _watch(self, container: Container) -> None:
        if container.number in self._watches or not container.alive():
            return
        group = container.group
        watches = self._watches[container.number] = []
        tell = functools.partial(self._look, container)
        for file in FILES:
            for path in group.notifying(file):
                with contextlib.suppress(OSError):
                    watches.append(self._world.watch_file(path, tell))
        if "memory" in group.v1:
            with contextlib.suppress(OSError):
                self._watch_oom(container, group.v1["memory"])

    def _watch_oom(self, container: Container, path: str) -> None:
        event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with open(f"{path}/memory.oom_control", "rb") as file:
                control_fd = os.open(f"{path}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(control_fd, f"{event_fd} {file.fileno()}".encode())
                finally:
                    os.close(control_fd)
            self._epoll.register(event_fd, select.EPOLLIN)
        except OSError:
            os.close(event_fd)
            raise
        self._eventfds[event_fd] = container

    async def run(self) -> None:
        """Pass on what eventfds tell; for ever."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, _ in self._epoll.poll(0):
                container = self._eventfds.get(fd)
                with contextlib.suppress(OSError):
                    os.eventfd_read(fd)
                if container is not None and container.number not in self._looking:
                    self._looking.add(container.number)
                    self._world.start(self._look_for_kill, container)

    async def _look_for_kill(self, container: Container) -> None:
        try:
            for pause_s in LOOKS_S:
                await trio.sleep(pause_s)
                if self._look(container):
                    return
        finally:
            self._looking.discard(container.number)

    def _look(self, container: Container) -> bool:
        """Tell who waits for it, or for what it is in, if the counts have changed."""
        changed = False
        for each in container.lineage():
            if each.number not in self._wanted:
                continue
            now, before = dict(_counts(each)), self._seen.get(each.number, {})
            self._seen[each.number] = now
            for file in FILES:
                if now.get(file, {}) != before.get(file, dict.fromkeys(now.get(file, {}), 0)):
                    self.of(each, file).tell()
                    changed = True
            if _killed(now) != _killed(before):
                each.changed.tell()
                changed = True
        return changed


def _counts(container: Container) -> Iterator[tuple[str, dict[str, int]]]:
    for file in FILES:
        with contextlib.suppress(OSError):
            yield file, container.group.counters(file)


def _killed(seen: Seen) -> int:
    return seen.get("memory.events", {}).get("oom_kill", 0)
