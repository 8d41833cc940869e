"""The tree of containers: what each one is, its faces, its record.

A *container* has a parent, children, a construction (`Build`), an init and its groups.  A *face* is
a container as one viewpoint shows it, a *viewpoint* being a container whose members look (0, the
root, is the host).  PIDs, owners and modes belong to the face, so they never depend on who asks and
the kernel may cache them.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trio import Event, Lock
from trio.lowlevel import ParkingLot

from nsfs import cgroup, idmap, namespaces
from nsfs.attribute import FOUND, NOT_ON_ROOT, PARENTS, Entry, TagType, Watchers, one_line
from nsfs.build import BUILD, BUILD_FIELDS, NO_CONSOLE, ORIGINS, Build, Console, LogLimits, Origin
from nsfs.bytelog import ByteLog
from nsfs.cgroup import Group
from nsfs.logstream import Log

if TYPE_CHECKING:
    from nsfs.world import World

ROOT = 0
"""The number of the root container and of its face."""
HOSTNAME_MAX = 64


class Phase(enum.Enum):
    """Where a container is in its life."""

    SPARE = "spare"
    """Being made, or ready, without a name: for a mkdir to come (see `spare`)."""
    MAKING = "making"
    """Also, in its record, for as long as it runs: `World.ready` tells of those that are ready."""
    RUNNING = "running"
    REBUILDING = "rebuilding"
    DEAD = "dead"
    """Its init has ended; the name and the log stay until it is removed."""
    GONE = "gone"
    """Removed from the tree; the last of its processes may still be on their way out."""


class Face:
    """A container as one viewpoint shows it.  `number` is the upper part of its inodes' numbers."""

    __slots__ = ("__weakref__", "container", "number", "viewpoint")

    def __init__(self, number: int, viewpoint: Container, container: Container) -> None:
        self.number = number
        self.viewpoint = viewpoint
        self.container = container

    @property
    def world(self) -> World:
        """The world that it is part of."""
        return self.container.world

    @property
    def inner(self) -> bool:
        """Whether this is a container's own view of itself."""
        return self.viewpoint is self.container and self.container.parent is not None

    def has(self, entry: Entry) -> bool:
        """Whether the entry makes sense here."""
        if self.container.is_found:
            return FOUND in entry.flags
        return NOT_ON_ROOT not in entry.flags or self.container.parent is not None

    def owner(self, entry: Entry | None, number: int = 0) -> tuple[int, int]:
        """The host IDs of the owner of an entry (with its number); None asks for the directory
        itself.

        From inside, everything is its root's.  From outside, what contains the container is the
        parent's to change, the rest is its own owner's.
        """
        container = self.container
        if self.inner:
            return container.root_uid, container.root_gid
        if entry is not None and PARENTS in entry.flags and container.parent is not None:
            uid, gid = container.parent.owner_seen(self.viewpoint)
        else:
            uid, gid = container.owner_seen(self.viewpoint)
        override = container.overrides.get(number)
        if override is not None:
            uid = uid if override[1] < 0 else override[1]
            gid = gid if override[2] < 0 else override[2]
        # What somebody outside made in a container is its root's as well, who may kill it.
        table = self.viewpoint.map
        if idmap.to_inside(table, uid) is None:
            uid = self.viewpoint.root_uid
        if idmap.to_inside(table, gid) is None:
            gid = self.viewpoint.root_gid
        return uid, gid

    def mode(self, entry: Entry, number: int = 0) -> int:
        """st_mode of an entry, which has that number."""
        override = None if self.inner else self.container.overrides.get(number)
        mode = entry.mode
        if self.container.is_found and isinstance(entry, TagType):
            # The kernel lets nobody else join the namespaces to look.
            mode &= ~0o077
        if override is not None and override[0] >= 0:
            mode = stat.S_IFMT(mode) | override[0]
        fixed = self.inner or self.container.is_found
        if fixed and PARENTS in entry.flags and not stat.S_ISDIR(mode):
            mode &= ~0o222
        return mode

    def directory_mode(self) -> int:
        """st_mode of the container's directory."""
        return stat.S_IFDIR | (0o755 if self.inner else self.container.mode)

    def of(self, container: Container) -> Face:
        """Another container as the same viewpoint shows it."""
        return self.world.face(self.viewpoint, container)

    def path_to(self, other: Container) -> str:
        """The relative path from this container's directory to another's."""
        up: list[Container] = list(self.container.lineage())
        down: list[str] = []
        each: Container | None = other
        while each is not None and each not in up:
            down.append(each.name)
            each = each.parent
        steps = up.index(each) if each is not None else 0
        return "/".join([".."] * steps + down[::-1]) or "."


def _set_event() -> Event:
    event = Event()
    event.set()
    return event


@dataclass(eq=False, slots=True)
class Container:
    """One container; the root container, which is the host, has no parent."""

    is_found: ClassVar[bool] = False
    """Whether nsfs did not make it (see `found`)."""
    world: World
    number: int
    name: str
    parent: Container | None
    group: Group
    build: Build = field(default_factory=Build)
    uid: int = 0
    gid: int = 0
    mode: int = 0o755
    defaults: dict[str, Any] = field(default_factory=dict)
    overrides: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Number of an entry to mode, owner and group, where chmod(2) or chown(2) set them; -1 where
    they did not."""
    changes: int = 0
    """How often chown(2) or chmod(2) changed who may do what: descriptors opened before are old."""
    phase: Phase = Phase.MAKING
    init_pid: int = 0
    map: idmap.Map = idmap.HOST
    """Its user namespace's map in the host's IDs."""
    slice: int = 0
    """Which slice of its parent's IDs it has; 0: the parent's own range, or one of the host's."""
    range: int | None = None
    """The start of the host's range that was set aside for it."""
    address: str = ""
    """Its address, where its network is `veth`."""
    request: int = 0
    """The FUSE request that made it, by which a repeated one is recognised."""
    since: float = 0.0
    reason: str = ""
    nflog: tuple[int, ...] = ()
    """NFLOG groups whose packets are lines of its log."""
    console: Console = NO_CONSOLE
    inherited_log: int = 0
    """The ID of its syslog namespace, if that was made with another container; else 0."""
    log_from: int = 0
    """The number of the container whose log is to become its own, as long as it has not."""
    log_limits: LogLimits | None = None
    """None: what the configuration says."""
    children: dict[str, Container] = field(default_factory=dict)
    found: dict[str, Container] = field(default_factory=dict)
    """Namespaces that were made in it, and not by nsfs, by their names."""
    faces: dict[int, int] = field(default_factory=dict)
    """Viewpoint's number to face's number."""
    seen: tuple[int, int, Phase] = (0, 0, Phase.RUNNING)
    """populated, frozen and phase when somebody was last told."""
    dying: bool = False
    settled: Event = field(default_factory=_set_event)
    starting: int = 0
    """How many inits in it, at any depth, are being started."""
    still: ParkingLot = field(default_factory=ParkingLot)
    """Where those wait who want none to be."""
    freezing: int = 0
    """How many are about to suspend it."""
    """It is not being rebuilt."""
    binding: tuple[str, ...] = ()
    """Targets of binds that are being added while it runs."""
    limiting: Lock = field(default_factory=Lock)
    """Held while a limit is set."""
    pins: list[tuple[int, str]] = field(default_factory=list)
    """(viewpoint's number, path there) of what holds its namespaces open for `nsproxy/`."""
    ends: list[tuple[int, int]] = field(default_factory=list)
    """Of its interfaces' other ends: (number of the container in whose network namespace it was
    made, index there)."""
    watches: list[int] = field(default_factory=list)
    changed: Watchers = field(default_factory=Watchers)
    own_log: Log | None = None
    log_changed_ns: int = 0
    """When its log last changed through this daemon, in ns since the Epoch."""
    own_output: ByteLog | None = None
    printed: Watchers = field(default_factory=Watchers)
    """Told when a command of its `exec` printed something."""

    @property
    def root_uid(self) -> int:
        """The host's ID of its root; the overflow ID when its map has none."""
        found = idmap.to_outside(self.map, 0)
        return 65534 if found is None else found

    @property
    def root_gid(self) -> int:
        """The same for groups: the map serves both."""
        return self.root_uid

    def lineage(self) -> Iterator[Container]:
        """Itself, its parent, and so on to the root."""
        each: Container | None = self
        while each is not None:
            yield each
            each = each.parent

    def descendants(self) -> Iterator[Container]:
        """All that are nested in it, parents before children."""
        for child in list(self.children.values()):
            yield child
            yield from child.descendants()

    def own(self, kind: str) -> bool:
        """Whether it has a namespace of that type of its own."""
        if self.parent is None:
            return True
        if kind == namespaces.SYSLOG:
            return kind in self.build.unshare and kind not in dict(self.build.shared)
        return kind in self.build.types

    def holder(self, kind: str) -> Container:
        """The container whose namespace of that type it is in: itself, an ancestor, or one that it
        or an ancestor shares it with."""
        if self.own(kind):
            return self
        for each in self.lineage():
            if each.own(kind):
                return each
            other = dict(each.build.shared).get(kind)
            if other is not None and other in self.world.containers:
                return self.world.containers[other].holder(kind)
        raise AssertionError("the root container has all of its own")

    def holder_of_ids(self) -> Container:
        """The container whose IDs it has: those of a range or a slice are its own, all others an
        ancestor's.  The root container stands for the host's IDs."""
        if self.parent is None or self.range is not None:
            return self
        above = self.parent.holder_of_ids()
        return self if self.slice and above.parent is not None else above

    def owner_seen(self, viewpoint: Container) -> tuple[int, int]:
        """The host IDs of its owner as a viewpoint shows it."""
        if self.parent is None:
            return self.uid, self.gid
        return self.parent.whose(self.uid, self.gid, viewpoint)

    def whose(self, uid: int, gid: int, viewpoint: Container) -> tuple[int, int]:
        """Whose is what these IDs made in this container, as a viewpoint shows it.

        What was made inside, by an ID that a container has to itself, is outside of that container
        its owner's: so an owner can remove all that is below, and answers for it.
        """
        for each in self.lineage():
            if each.parent is None or each is viewpoint:
                break
            if each.holder_of_ids() is each:
                uid = uid if idmap.to_inside(each.map, uid) is None else each.uid
                gid = gid if idmap.to_inside(each.map, gid) is None else each.gid
        return uid, gid

    def generation(self) -> int:
        """A number that grows when it changes who may do what with it."""
        return sum(each.changes for each in self.lineage())

    def default(self, name: str) -> Any:
        """What a child gets for a part of its construction: its own word or an ancestor's."""
        for each in self.lineage():
            if name in each.defaults:
                return each.defaults[name]
        return getattr(BUILD, name)

    def child_build(self) -> Build:
        """How a child of it is built."""
        return Build(**{name: self.default(name) for name in BUILD_FIELDS})

    def alive(self) -> bool:
        """Whether there is an init to work with."""
        return self.parent is None or self.phase in (Phase.RUNNING, Phase.REBUILDING)

    def check_alive(self) -> None:
        """ENODEV when it is dead."""
        if not self.alive():
            raise OSError(errno.ENODEV, "the container is dead", self.name)

    def populated(self) -> bool:
        """Whether it has a member besides its init, nested containers aside."""
        return bool(self.group.events("payload")["populated"]) or self.populated_away()

    def populated_away(self) -> bool:
        """Whether it has a member in another container's part of the hierarchy."""
        return any(cgroup.pids_of(path) for path in self.world.away(self, nested=False))

    def suspended(self) -> bool:
        """Whether `freeze` was written to it or to one that it is in."""
        return any(
            c.freezing or c.group.frozen_by_itself() for c in self.lineage() if c.parent is not None
        )

    @contextlib.contextmanager
    def starting_in_it(self) -> Iterator[None]:
        """While an init is started: nothing that it is in is suspended, for the spawner would wait
        for it, and everybody for the spawner.  EBUSY when something is already."""
        if self.suspended():
            raise OSError(errno.EBUSY, "the container is frozen", self.name)
        lineage = list(self.lineage())
        for each in lineage:
            each.starting += 1
        try:
            yield
        finally:
            for each in lineage:
                each.starting -= 1
                if not each.starting:
                    each.still.unpark_all()

    async def suspend(self) -> None:
        """Write `freeze`, once no init is being started in it; meanwhile none begins to."""
        self.freezing += 1
        try:
            while self.starting:
                await self.still.park()
            self.group.freeze(True)
        finally:
            self.freezing -= 1

    def check_idle(self) -> None:
        """EBUSY unless it has no child and no member but the init."""
        if self.children or self.populated() or not self.settled.is_set():
            raise OSError(errno.EBUSY, "the container is not idle", self.name)

    def log_size(self) -> int:
        """Bytes of its kernel log as text; without mapping a log that has nothing."""
        owner = self.holder(namespaces.SYSLOG)
        path = self.world.store.log_path(owner.number, "log")
        return self.log.text_size() if owner.own_log or os.path.exists(path) else 0

    @property
    def log(self) -> Log:
        """Its kernel log; an ancestor's where it shares that."""
        owner = self.holder(namespaces.SYSLOG)
        if owner.own_log is None:
            owner.own_log = self.world.open_log(owner)
        return owner.own_log

    @property
    def log_number(self) -> int:
        """The ID of the syslog namespace that it holds: the number of the container that this was
        made with, whoever holds it now."""
        return self.inherited_log or self.number

    @property
    def console_level(self) -> int:
        """console_loglevel of its kernel log, as syslog(2) sets it: 1 to 8.

        It is in the log itself, so it is kept.
        """
        return self.log.ring.console_level

    @property
    def output(self) -> ByteLog:
        """What the commands of its `exec` printed."""
        if self.own_output is None:
            self.own_output = self.world.open_output(self)
        return self.own_output

    @contextlib.contextmanager
    def telling_why(self, what: str) -> Iterator[None]:
        """An operation on it: should it fail, `state` says why."""
        try:
            yield
        except OSError as error:
            about = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
            self.reason = one_line(f"{what}: {about}").replace("\\040", " ")
            raise
        self.reason = ""

    def tell(self) -> None:
        """Its state has changed, and so the state of all that it is in."""
        for each in self.lineage():
            each.changed.tell()

    # --- the record ---

    def save(self) -> None:
        """Write the record; what it says is done only afterwards."""
        if self.number not in self.world.containers:
            # Nothing is left of it, whoever still holds it: nothing is to name it again.
            return
        self.world.store.save(
            self.number,
            {
                "name": self.name,
                "parent": None if self.parent is None else self.parent.number,
                "build": self.build.record(),
                "owner": [self.uid, self.gid, self.mode],
                "defaults": self.defaults,
                "overrides": self.overrides,
                "phase": self.phase.value,
                "map": self.map,
                "slice": self.slice,
                "range": self.range,
                "request": self.request,
                "since": self.since,
                "nflog": self.nflog,
                "changes": self.changes,
                "binding": self.binding,
                "console": self.console,
                "log_limits": self.log_limits,
                "inherited_log": self.inherited_log,
                "log_from": self.log_from,
                "faces": self.faces,
                "pins": self.pins,
                "past": self.group.past,
                "ends": self.ends,
                "address": self.address,
            },
        )

    @classmethod
    def from_record(
        cls, world: World, number: int, parent: Container, record: dict[str, Any]
    ) -> Container:
        """The inverse of `save`."""
        each = cls(
            world=world,
            number=number,
            name=record["name"],
            parent=parent,
            group=parent.group.child(number),
        )
        each.restore(record)
        return each

    def restore(self, record: dict[str, Any]) -> None:
        """Take over what a record says, but for name and parent."""
        defaults = dict(record["defaults"])
        for name in ("unshare",):
            if name in defaults:
                defaults[name] = tuple(defaults[name])
        for name in ("binds", "limits"):
            if name in defaults:
                defaults[name] = tuple(tuple(line) for line in defaults[name])
        for name in ORIGINS:
            if name in defaults:
                defaults[name] = Origin(*defaults[name])
        self.build = Build.from_record(record["build"])
        self.uid, self.gid, self.mode = record["owner"]
        self.defaults = defaults
        self.overrides = {int(k): (m, u, g) for k, (m, u, g) in record["overrides"].items()}
        self.phase = Phase(record["phase"])
        # The kernel knows it best, and the init is alone there.
        self.init_pid = 1 if self.parent is None else next(iter(self.group.pids("init")), 0)
        self.map = tuple((i, o, n) for i, o, n in record["map"])
        self.slice = record["slice"]
        self.range = record["range"]
        self.request = record["request"]
        self.since = record["since"]
        self.nflog = tuple(record.get("nflog", ()))
        self.changes = record.get("changes", 0)
        self.binding = tuple(record.get("binding", ()))
        target, level, origin, device = record.get("console", NO_CONSOLE)
        self.console = Console(target, level, Origin(*origin), tuple(device))
        limits = record.get("log_limits")
        self.log_limits = LogLimits(*limits) if limits else None
        self.pins = [(v, p) for v, p in record["pins"]]
        self.group.past = record.get("past", {})
        self.inherited_log = record.get("inherited_log", 0)
        self.log_from = record.get("log_from", 0)
        self.address = record.get("address", "")
        self.ends = [(n, i) for n, i in record.get("ends", ())]
        self.faces = {int(k): v for k, v in record["faces"].items()}


def check_name(name: str) -> None:
    """EINVAL for a name that no container can have: empty, control characters, no UTF-8."""
    if not name or name in (".", "..") or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise OSError(errno.EINVAL, "not a name for a container", name)
    try:
        raw = name.encode()
    except UnicodeEncodeError as error:
        raise OSError(errno.EINVAL, "not a name for a container", ascii(name)) from error
    if len(raw) > 255:
        raise OSError(errno.ENAMETOOLONG, "name too long", name)


def reserved(name: str) -> bool:
    """Whether nsfs keeps the name for itself, control files aside."""
    return (
        name == ".f"
        or name.startswith("nsfs.")
        or (name.startswith("unnamed") and name[7:].isdigit())
    )


def overflow_hostname(name: str) -> str:
    """A container's hostname: its name, cut to what sethostname(2) takes (64 bytes)."""
    return os.fsencode(name)[:HOSTNAME_MAX].decode("utf-8", "ignore")
