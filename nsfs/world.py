"""What one instance of nsfs knows: its containers and faces, where they are kept, and what watches
them.

The world starts from the run directory: a container that was being made when the last daemon died
is undone, one that was being removed is removed to the end, all others are taken up as they are.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import trio

from nsfs import idmap, loglimits, namespaces, pods
from nsfs.attribute import Caller
from nsfs.build import BUILD_FIELDS, Build, Origin
from nsfs.bytelog import ByteLog
from nsfs.cgroup import Group, Hierarchies
from nsfs.config import Config
from nsfs.container import ROOT, Container, Face, Phase
from nsfs.found import Found, numbers_of
from nsfs.init import Init
from nsfs.logring import LogRing
from nsfs.logstream import Log
from nsfs.network import Addresses
from nsfs.notices import Notices
from nsfs.processes import process_lives
from nsfs.spawner import Spawner
from nsfs.store import Slots, Store, map_file
from nsfs.syscalls import Inotify
from nsfs.tree import FACE_SHIFT, Marks
from nsfs.view import Views

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 0.1
"""How long to wait for the event that a group is empty before it is looked at anyway."""
HOUSEKEEPING_S = 10.0
FAILED_EXEC_MS = 100
"""How long the process of a command that could not be executed may take to go."""
UNFINISHED = (Phase.SPARE, Phase.MAKING, Phase.GONE)
"""Of what a record says: nobody was told that it is there, or it was being removed."""
STALE_MAX = 4096
"""How many ends of interfaces are remembered whose other end is gone."""
NO_FACE = 0xFFFFFFFF
"""A face that never is: the numbers end before."""
OUTPUT_BYTES = 65536
"""What is kept of the output of a container's `exec`."""


class Part(NamedTuple):
    """What the members of one group below a `payload` are in in part; see `leaf`."""

    holder: int
    """The number of the container in whose `payload` it is."""
    home: int
    """That of the one whose whole members they are."""
    types: str
    """The types of namespace that they have of the holder's."""
    others: tuple[tuple[int, str], ...]
    """Further containers, and the types that they have of these."""

    def name(self, pid: int) -> str:
        """Of a group for that process."""
        others = "".join(f".{number}:{types}" for number, types in self.others)
        return f"nsfs.{self.home}.{pid}.{self.types}{others}"

    @classmethod
    def parse(cls, holder: int, name: str) -> Part | None:
        """The inverse; None for another name."""
        words = name.split(".")
        if len(words) < 4 or words[0] != "nsfs" or not words[1].isdigit():
            return None
        others = [word.partition(":") for word in words[4:]]
        if not all(number.isdigit() and types for number, _, types in others):
            return None
        pairs = tuple((int(number), types) for number, _, types in others)
        return cls(holder, int(words[1]), words[3], pairs)


class World:
    """All containers of one instance."""

    def __init__(
        self, *, store: Store, hierarchies: Hierarchies, config: Config, group: str = "nsfs"
    ) -> None:
        self.store = store
        self.config = config
        self.hierarchies = hierarchies
        self.addresses = Addresses(config.network.prefix)
        self.ranges = idmap.Ranges(config.ids.first, config.ids.last, config.ids.per_container)
        self.opens = Slots(os.path.join(store.directory, "opens"), 65536)
        """Open files' tokens to what the next daemon needs to go on with them."""
        self.ready = Slots(os.path.join(store.directory, "ready"))
        """The containers whose init has said that it is ready."""
        self.views = Views()
        self.texts = Slots(os.path.join(store.directory, "texts"))
        """What `Log.text_size` has counted, by the container's number + 1 (the root's is 0)."""
        self._buried = Slots(os.path.join(store.directory, "buried"))
        self._generations: dict[int, dict[int, int]] = {}
        for inode in self._buried.keys():  # noqa: SIM118
            self._keep_generation(inode, (self._buried.get(inode) or (0,))[0])
        self.marks = Marks(process_lives, store.marks(), store.add_mark)
        self.containers: dict[int, Container] = {}
        self.found: dict[int, Found] = {}
        """Those that nsfs did not make."""
        self.stale_ends: dict[tuple[int, int], None] = {}
        """(number of the container whose namespace it is in, index there)."""
        self.faces: dict[int, tuple[int, int]] = {}
        """Face's number to (viewpoint's, container's) number."""
        self._faces: dict[tuple[int, int], Face] = {}
        self.parts: dict[str, Part] = {}
        """The groups of members in part, by their paths."""
        self.null_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.inotify = Inotify()
        self.notices = Notices(self)
        self.primed = True
        """Whether a container can be made at the root: before `prime` it cannot."""
        self._empty = trio.lowlevel.ParkingLot()
        self._watched: dict[int, Callable[[], object]] = {}
        self.spawner: Spawner = None  # type: ignore[assignment]
        self.nursery: trio.Nursery | None = None
        self.started: list[Callable[[Container], None]] = []
        """To be called when a container runs."""
        self.ended: list[Callable[[Container], None]] = []
        """When it does not any more."""
        self.inherited: list[Callable[[Container], None]] = []
        """When it holds a namespace that another one held, or its init has died and it holds none
        any more."""
        self.listen: Callable[[Container, int, int], None] = lambda *_: None
        """Answer the calls of syslog(2) of a process, and its children, that has entered a
        container in part; the listener is a descriptor of the caller's."""
        self.claim: Callable[[Container, Build, Caller], Container | None] = lambda *_: None
        """A container that was made in advance, without a name, for such a mkdir (`spare`)."""
        self.subscribe: Callable[[Container, tuple[int, ...]], Awaitable[None]]
        """Make the packets of these NFLOG groups lines of a container's log."""
        self.firewall_stat: Callable[[], tuple[int, int, int]] = lambda: (0, 0, 0)
        """LOG lines that were printed, whether they are off now, how often they were."""
        self.look: Callable[[float], Awaitable[None]] = _nothing_to_find
        """Look what was made elsewhere (`discovery`), unless that was done so many seconds ago at
        most."""
        self.device_numbers = (0, 0)
        """Of the mount: major and minor."""
        self.changed: Callable[[Container], None] = lambda container: None
        """Tell the kernel that owners and modes of a container's files are others now."""
        top = Group.top(hierarchies, group)
        self.root = Container(self, ROOT, "", None, top, phase=Phase.RUNNING, init_pid=1)
        self.root.faces[ROOT] = ROOT
        self.root.since = time.time()
        self.root.defaults = config_defaults(config, hierarchies)
        self._register(self.root)

    # --- containers ---

    def _register(self, container: Container) -> None:
        self.containers[container.number] = container
        if container.range is not None:
            self.ranges.claim(container.range)
        if container.address:
            self.addresses.claim(container.address)
        for viewpoint, number in container.faces.items():
            self.faces[number] = (viewpoint, container.number)

    def new_container(self, parent: Container, build: Build) -> Container:
        """A container with its numbers, without a name, and not in the tree yet."""
        number = self.store.number()
        each = Container(self, number, "", parent, parent.group.child(number), build)
        each.faces[number] = number
        each.faces[ROOT] = self.store.number()
        self._register(each)
        return each

    def forget(self, container: Container) -> None:
        """Nothing of the container is left: drop what is known of it.

        Once: its IDs may be another's by the second time.
        """
        if self.containers.pop(container.number, None) is None:
            return
        self.store.drop(container.number)
        self.texts.drop(container.number + 1)
        if container.own_log is not None and container.own_log.echo is not None:
            container.own_log.echo.close()
        self.ready.drop(container.number)
        self.notices.forget(container)
        for found in list(container.found.values()):
            self.lose(found)
        if container.range is not None:
            self.ranges.give_back(container.range)
        if container.address:
            self.addresses.give_back(container.address)
        self._forget_faces(container)
        if len(self.containers) == 1:
            self._empty.unpark_all()

    def _forget_faces(self, container: Container) -> None:
        for viewpoint, number in container.faces.items():
            self.faces.pop(number, None)
            self._faces.pop((viewpoint, container.number), None)
            self.marks.forget(number)
            for inode in self._generations.pop(number, ()):
                self._buried.drop(inode)

    # --- containers that were found ---

    def meet(self, found: Any) -> None:
        """A found container is there; each who can see it gets a face of it."""
        assert isinstance(found, Found)
        assert found.parent is not None
        for each in found.maker.lineage():
            if each.number not in found.faces:
                found.faces[each.number] = self.store.number()
        self.found[found.number] = found
        found.parent.found[found.name] = found
        for viewpoint, number in found.faces.items():
            self.faces[number] = (viewpoint, found.number)
        found.save()

    def remove_found(self, found: Found) -> None:
        """Take it, with what was found in it, out of the tree; its processes may be on their way
        out."""
        assert found.parent is not None
        if found.parent.found.get(found.name) is found:
            del found.parent.found[found.name]
        for each in found.nested():
            each.phase = Phase.GONE
            self.store.drop_found(each.number)
            self._forget_faces(each)
            self.views.ended(each)
            each.changed.tell()

    def lose(self, found: Container) -> None:
        """It is not there any more, nor what was found in it."""
        assert isinstance(found, Found)
        self.remove_found(found)
        for each in found.nested():
            self.found.pop(each.number, None)

    def found_with(self, pid: int) -> Found | None:
        """The found container that a process is in now, by its namespaces."""
        if not self.found:
            return None
        numbers = numbers_of(pid)
        each = next((each for each in self.found.values() if each.numbers == numbers), None)
        return None if each is None or each.phase is Phase.GONE else each

    def who_has(self, found: Found, kind: str) -> Container:
        """Whose a namespace of a found container is: that of the container around it, or another
        one's that nsfs made, or else of the oldest found one that is in it."""
        if not found.own(kind):
            return found.holder(kind)
        number = found.number_of(kind)
        for each in self.containers.values():
            if each.phase is Phase.RUNNING and each.parent is not None and each.own(kind):
                with contextlib.suppress(OSError):
                    if namespaces.identity(each.init_pid, kind) == number:
                        return each
        return next(
            each
            for each in self.found.values()
            if each is found or (each.phase is Phase.RUNNING and each.number_of(kind) == number)
        )

    def load_found(self) -> None:
        """Take up what the last daemon had found; whether it is still there is to be seen."""
        for number, record in list(self.store.load_found()):
            parent = self.containers.get(record["parent"]) or self.found.get(record["parent"])
            if parent is None or parent.phase is Phase.GONE:
                self.store.drop_found(number)
            else:
                self.meet(Found.from_found(parent, number, record))

    # --- ends of pairs of interfaces ---

    def add_end(self, container: Container, parent: Container, ifindex: int) -> None:
        """The other end of an interface of its is in the parent's namespace, by that index."""
        container.ends.append((parent.number, ifindex))
        container.save()

    def retire_ends(self, container: Container) -> None:
        """Its namespace is dead: the kernel takes the other ends down in its own time, and until
        then their names are free for who wants them."""
        self.stale_ends = {e: None for e in self.stale_ends if e[0] != container.number}
        self.stale_ends.update(dict.fromkeys(container.ends))
        container.ends.clear()
        while len(self.stale_ends) > STALE_MAX:
            del self.stale_ends[next(iter(self.stale_ends))]

    async def emptied(self) -> None:
        """Wait until nothing is left of any container but the root."""
        while len(self.containers) > 1:
            await self._empty.park()

    def load(self) -> tuple[list[Container], list[Container]]:
        """Take up what the run directory has: (containers to undo or remove, the others)."""
        doomed, kept = [], []
        for number, record in self.store.load():
            if number == ROOT:
                self.root.restore(record)
                continue
            parent = self.containers.get(record["parent"])
            if parent is None:
                log.warning("the record of container %d has no parent; dropped", number)
                self.store.drop(number)
                continue
            each = Container.from_record(self, number, parent, record)
            self._register(each)
            if each.log_from:
                # The last daemon died between recording it and doing so.
                self.store.move_log(each.log_from, number)
                each.log_from = 0
                each.save()
            if each.phase is Phase.MAKING and self.ready.get(number):
                each.phase = Phase.RUNNING
            if each.phase in UNFINISHED or parent.phase is Phase.GONE:
                each.phase = Phase.GONE
                self.retire_ends(each)
                doomed.append(each)
            else:
                parent.children[each.name] = each
                kept.append(each)
        return doomed, kept

    # --- members in part ---

    def part(self, place: str) -> Part | None:
        """What the processes at a place of the v2 hierarchy are in in part, if anything."""
        return self.parts.get(f"{self.hierarchies.v2}{place}") if self.parts else None

    def containers_of(self, part: Part) -> list[Container]:
        """The containers that the processes of such a group are in, the whole one last."""
        numbers = (part.holder, *(number for number, _ in part.others), part.home)
        return [self.containers[n] for n in numbers if n in self.containers]

    def types_in(self, part: Part, container: Container) -> str:
        """The types by which they are in a container in part; "" when they are whole or not at
        all."""
        home = self.containers.get(part.home)
        if home is not None and container in home.lineage():
            return ""
        for number, types in (*part.others, (part.holder, part.types)):
            each = self.containers.get(number)
            if each is not None and container in each.lineage():
                return types
        return ""

    def away(self, container: Container, nested: bool = True) -> list[str]:
        """The groups with members of a container, or of one nested in it, that are in another's
        part of the hierarchy."""
        found = []
        for path, part in self.parts.items():
            holder, *others = self.containers_of(part) or (None,)
            if holder is None or holder.number != part.holder or container in holder.lineage():
                continue
            if any(container in (o.lineage() if nested else (o,)) for o in others):
                found.append(path)
        return found

    # --- faces ---

    def face(self, viewpoint: Container, container: Container) -> Face:
        """The face of a container from a viewpoint; made, and recorded, when first asked for."""
        key = (viewpoint.number, container.number)
        found = self._faces.get(key)
        if found is None:
            number = container.faces.get(viewpoint.number)
            if number is None:
                number = container.faces[viewpoint.number] = self.store.number()
                container.save()
                self.faces[number] = key
            found = self._faces[key] = Face(number, viewpoint, container)
        return found

    def face_numbered(self, number: int) -> Face:
        """The face that inode numbers name; FileNotFoundError when its container is gone."""
        key = self.faces.get(number)
        if key is not None:
            found = self._faces.get(key)
            if found is not None:
                return found
            viewpoint = self.containers.get(key[0])
            container = self.containers.get(key[1]) or self.found.get(key[1])
            if viewpoint is not None and container is not None:
                return self.face(viewpoint, container)
        raise FileNotFoundError(errno.ENOENT, "the container is gone", str(number))

    def known_faces(self, container: Container) -> list[Face]:
        """Every face of it that was ever looked at."""
        return [
            self.face(self.containers[viewpoint], container)
            for viewpoint in container.faces
            if viewpoint in self.containers
        ]

    def bury(self, inode: int) -> None:
        """An rmdir(2) of a directory of control files was accepted, although it stays.

        The kernel lets nothing be found in that inode any more (S_DEAD), and keeps it as long as
        anybody has it open.  So it must be told of another one, should the directory be looked up
        again: what differs is the generation.
        """
        generation = self.generation(inode) + 1
        self._keep_generation(inode, generation)
        self._buried.put(inode, generation)

    def _keep_generation(self, inode: int, generation: int) -> None:
        self._generations.setdefault(inode >> FACE_SHIFT, {})[inode] = generation

    def generation(self, inode: int) -> int:
        """How often that inode was buried."""
        return self._generations.get(inode >> FACE_SHIFT, {}).get(inode, 0)

    # --- logs ---

    def _check_known(self, container: Container) -> None:
        """Whoever still has it open: a file that was made now nobody would remove."""
        if container.number not in self.containers:
            raise OSError(errno.ENODEV, "the container is gone", container.name)

    def open_log(self, container: Container) -> Log:
        """Map a container's kernel log.  ENODEV when nothing is left of the container."""
        self._check_known(container)
        path = self.store.log_path(container.number, "log")
        size, rate, burst = loglimits.limits_of(container)
        # The root's number is 0, and no key is.
        known = self.texts.get(container.number + 1)
        found = Log(
            LogRing(map_file(path, size), limit=loglimits.limit(rate, burst)),
            known[:3] if known else None,
            functools.partial(self.texts.put, container.number + 1),
        )
        if container.parent is not None and found.ring.buffer_size != size:
            # The last daemon died between recording another size and doing so.
            loglimits.resize(container, found, size)
        return found

    def open_output(self, container: Container) -> ByteLog:
        """Map what a container's commands printed.  ENODEV as above."""
        self._check_known(container)
        path = self.store.log_path(container.number, "output")
        return ByteLog(memoryview(map_file(path, OUTPUT_BYTES)))

    # --- the spawner ---

    def _viewpoint_pid(self, origin: Origin, path: str) -> int:
        if origin.viewpoint == ROOT:
            return 0
        viewpoint = self.containers.get(origin.viewpoint)
        if viewpoint is None or not viewpoint.alive():
            raise FileNotFoundError(errno.ENOENT, "whose path it is is gone", path)
        return viewpoint.init_pid

    async def tree(self, origin: Origin, path: str) -> int:
        """A detached clone of the tree at a path, as its origin sees it; a new descriptor."""
        pid = self._viewpoint_pid(origin, path)
        return await self.spawner.tree(pid, path, origin.uid, origin.gid)

    async def check_view(self, origin: Origin, paths: Sequence[str], tid: int) -> None:
        """EXDEV unless paths lead the thread that wrote them to what they lead their origin to.

        They are resolved in the viewpoint's mount namespace whenever they are used, which may be
        when the writer and its mounts are gone.  So a writer with a mount namespace or root
        directory of its own may name only what is the same there.
        """
        for path in paths:
            pid = self._viewpoint_pid(origin, path)
            try:
                ours, its = (os.stat(f"/proc/{who or 'self'}/ns/mnt").st_ino for who in (pid, tid))
                if ours == its and os.readlink(f"/proc/{tid}/root") == "/":
                    return
            except FileNotFoundError as error:
                raise ProcessLookupError(errno.ESRCH, "the writer is gone", path) from error
            os.close(await self.spawner.tree(pid, path, origin.uid, origin.gid, seen_by=tid))

    async def execute(
        self, container: Container, words: Sequence[str], environment: Sequence[str]
    ) -> int:
        """Start a command in a container, its output going to `output`; returns the host's PID."""
        output_fd = await self.spawner.output(container.number)
        try:
            init = Init(self.store.socket_path(container.number))
            fds = (self.null_fd, output_fd, output_fd)
            command = await init.execute(
                words, environment, fds, keep_status=False, suspended=container.suspended
            )
        except OSError:
            # What could not be executed is to be gone when that is told: it counts as a member.
            for _ in range(FAILED_EXEC_MS):
                if not container.populated():
                    break
                await trio.sleep(0.001)
            raise
        finally:
            # It is a file of our own mount: its close is a request, which we are to answer.
            await trio.to_thread.run_sync(os.close, output_fd)
        return command.pid

    async def prime(self) -> None:
        """Have the spawner look `.f` up while nobody holds the root directory's lock.

        A mkdir(2) at the root does, and waits for the spawner, which then must not need it.
        """
        with contextlib.suppress(FileNotFoundError):
            await self.spawner.output(NO_FACE)
        self.primed = True

    async def pin(self, face: Face, kind: str) -> str:
        """A path in the viewpoint's mount namespace that holds a container's namespace open."""
        container = face.container
        path = f"/dev/.nsfs/ns/{face.number}/{kind}"
        pin = (face.viewpoint.number, path)
        if pin not in container.pins:
            container.pins.append(pin)
            container.save()
            try:
                await self.spawner.pin(container.init_pid, kind, face.viewpoint.init_pid, path)
            except BaseException:
                # It may have been let go of meanwhile, with all others.
                if pin in container.pins:
                    container.pins.remove(pin)
                raise
        return path

    async def unpin(self, container: Container) -> None:
        """Let go of what was pinned of a container that has ended or is being rebuilt."""
        for viewpoint, path in list(container.pins):
            viewer = self.containers.get(viewpoint)
            if viewer is not None and viewer.phase is Phase.RUNNING:
                # Whoever is root there may have been quicker.
                with contextlib.suppress(OSError):
                    await self.spawner.unbind(viewer.init_pid, path)
        container.pins.clear()

    # --- what happens to containers ---

    def watch(self, container: Container) -> None:
        """Be told when its members or its init come or go, or it freezes."""
        for part in ("payload", "init"):
            with contextlib.suppress(FileNotFoundError):
                watch = self.inotify.add(f"{container.group.path}/{part}/cgroup.events")
                container.watches.append(watch)
                self._watched[watch] = functools.partial(self.look_at, container)
        self.notices.started(container)
        for tell in self.started:
            tell(container)

    def unwatch(self, container: Container) -> None:
        """The inverse."""
        for watch in container.watches:
            self.inotify.remove(watch)
            self._watched.pop(watch, None)
        container.watches.clear()
        self.views.ended(container)
        self.notices.ended(container)
        for tell in self.ended:
            tell(container)

    def watch_file(self, path: str, tell: Callable[[], object]) -> int:
        """Be told of changes of a file that the kernel tells of (cgroup_file_notify()); for
        `unwatch_file`."""
        watch = self.inotify.add(path)
        self._watched[watch] = tell
        return watch

    def unwatch_file(self, watch: int) -> None:
        """The inverse."""
        self.inotify.remove(watch)
        self._watched.pop(watch, None)

    async def watch_events(self) -> None:
        """Pass on what the groups' events say; for ever."""
        while True:
            await trio.lowlevel.wait_readable(self.inotify.fd)
            for tell in {self._watched.get(watch) for watch, _ in self.inotify.events()}:
                if tell is not None:
                    tell()

    async def depopulated(self, container: Container) -> None:
        """Wait until nothing is in a container's groups any more."""
        parked = trio.lowlevel.ParkingLot()
        try:
            watch = self.inotify.add(f"{container.group.path}/cgroup.events")
        except FileNotFoundError:
            return
        self._watched[watch] = parked.unpark_all
        try:
            while container.group.events()["populated"]:
                # The kernel tells at most each 10 ms (CGROUP_FILE_NOTIFY_MIN_INTV) and may tell of
                # something else, so look again.
                with trio.move_on_after(LOOK_AGAIN_S):
                    await parked.park()
        finally:
            # Two may wait for the same (one is removed while it is being rebuilt): then the watch
            # was one as well, and who comes second looks again anyway.
            self.inotify.remove(watch)
            self._watched.pop(watch, None)

    async def housekeeping(self) -> None:
        """Now and then drop the marks of processes that have ended, and have each log that refused
        records say so; for ever."""
        while True:
            await trio.sleep(HOUSEKEEPING_S)
            if self.marks.sweep():
                self.store.clear_marks()
            self.views.close_idle()
            for each in self.containers.values():
                if each.own_log is not None:
                    each.own_log.report_suppressed()

    def look_at(self, container: Container) -> None:
        """See what has become of a container and tell who waits, if anything has; not while it is
        being rebuilt or removed."""
        if not container.settled.is_set() or container.phase is Phase.GONE:
            return
        whole, members = container.group.events(), container.group.events("payload")
        if container.phase is Phase.RUNNING and not container.group.events("init")["populated"]:
            container.phase = Phase.DEAD
            container.init_pid = 0
            self.ready.drop(container.number)
            container.save()
            self.views.ended(container)
            pods.hand_over(container)
            log.info("the init of %s has ended", container.name)
        seen = (members["populated"], whole["frozen"], container.phase)
        if seen != container.seen:
            container.seen = seen
            container.tell()

    def start(self, function: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Run something in the background; a defect in it is logged and harms nothing else."""
        assert self.nursery is not None
        self.nursery.start_soon(_guarded, function, *args)


async def _nothing_to_find(age_s: float) -> None:
    """What a world without `discovery` has of it."""


async def _guarded(function: Callable[..., Awaitable[None]], *args: Any) -> None:
    try:
        await function(*args)
    except Exception:
        log.exception("%s failed", getattr(function, "__name__", function))


def config_defaults(config: Config, hierarchies: Hierarchies) -> dict[str, Any]:
    """The root's `defaults/` as the administrator's configuration has them.

    A limit that this host has no controller for is left out: nobody asked for just that one.
    """
    chosen = {n: getattr(config.defaults, n) for n in BUILD_FIELDS if hasattr(config.defaults, n)}
    chosen["unshare"] = tuple(sorted(chosen["unshare"]))
    chosen["limits"] = tuple(x for x in chosen["limits"] if hierarchies.has(x[0]))
    return chosen
