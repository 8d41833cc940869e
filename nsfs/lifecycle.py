"""The life of a container: make, rebuild, rename, kill, remove.

What is done to the kernel is recorded first.  Removing never waits for processes to end: the
caller's rmdir(2) holds the lock of the directory above, and one of those processes may be waiting
for just that lock.  So all of it is killed and detached, the request is answered, and a task in the
background sees the last one out and takes down the groups.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import trio

from nsfs import cgroup, console, idmap, loglimits, namespaces, pods
from nsfs.attribute import Caller
from nsfs.authority import (
    check_mapped,
    check_number,
    check_ranges,
    check_rootfs,
    check_tree,
    namespace_owner,
    rootfs_map,
)
from nsfs.container import (
    Build,
    Container,
    Phase,
    check_name,
    overflow_hostname,
    reserved,
)
from nsfs.limits import DEVICES, find, key, merged, no_limit, parse
from nsfs.network import connect as connected
from nsfs.network import opened
from nsfs.spawner import Recipe
from nsfs.view import in_thread
from nsfs.world import World

log = logging.getLogger(__name__)

KILL_AGAIN_S = 0.1
"""How long what was killed may take to go before it is killed again."""
FROZEN_LOOK_S = 0.1
"""How often it is looked whether what is to be built is still suspended."""
_limiting = trio.CapacityLimiter(16)


async def make(
    parent: Container,
    name: str,
    caller: Caller,
    *,
    mode: int = 0o755,
    request: int = 0,
    build: Build | None = None,
) -> Container:
    """Make a container that is ready when this returns.

    Raises FileExistsError, EINVAL for a name that cannot be, ENODEV or ENOENT when the parent is
    dead or being removed, and whatever the kernel says to its parts (ENOSPC for a limit of
    namespaces). Nothing is left behind by a failure.  `request` names the FUSE request: the same
    one again, asked of the next daemon, finds its work done.
    """
    check_name(name)
    if not parent.settled.is_set():
        await parent.settled.wait()
    # From here on nothing is waited for until the name is taken: two faces of a directory have no
    # lock in common, so the same name may be asked for twice at once.
    existing = parent.children.get(name)
    if existing is not None and request and existing.request == request:
        return existing
    if existing is not None or reserved(name):
        raise OSError(errno.EEXIST, "the name is taken", name)
    if parent.dying:
        raise OSError(errno.ENOENT, "the parent is being removed", parent.name)
    parent.check_alive()
    check_number(parent, caller)
    with parent.starting_in_it():
        return await _make(parent, name, caller, mode, request, build)


async def _make(
    parent: Container, name: str, caller: Caller, mode: int, request: int, build: Build | None
) -> Container:
    world = parent.world
    build = build or parent.child_build()
    spare = world.claim(parent, build, caller)
    each = spare or world.new_container(parent, build)
    each.name, each.request, each.since = name, request, time.time()
    each.uid, each.gid, each.mode = caller.uid, caller.gid, mode
    each.log_limits = loglimits.for_child(parent)
    parent.children[name] = each
    try:
        _give_address(each)
        if spare is None:
            await construct(each)
        else:
            each.phase = Phase.MAKING
            each.save()
            await world.spawner.set_hostname(each.init_pid, overflow_hostname(name))
        await _connect(each)
        _run(each)
        if not world.ready.put(each.number, 1):
            each.save()
    except BaseException:
        undo(each)
        raise
    parent.tell()
    return each


async def construct(container: Container) -> None:
    """Make what a container that has its numbers consists of: IDs, record, groups, init."""
    _give_ids(container)
    container.save()
    trees = await _trees(container, container.build)
    try:
        _make_groups(container)
        await _set_limits(container)
        await _start(container, trees)
    finally:
        trees.close()


def undo(container: Container) -> None:
    """Remove, in the background, a container that nobody was told of."""
    _detach(container)
    _begin_end(container)


def _run(container: Container) -> None:
    """It is ready: from now on it runs."""
    if container.dying:
        # Killed while it was being made, with what it is in.
        raise OSError(errno.ENOENT, "it was removed", container.name)
    container.phase = Phase.RUNNING
    container.world.watch(container)


def _give_address(container: Container) -> None:
    """Choose its address, if its construction asks for one; ENOSPC when all are taken."""
    build = container.build
    wanted = build.network == "veth" and "net" in build.types
    if wanted != bool(container.address):
        container.address = container.world.addresses.take() if wanted else ""


async def _connect(container: Container) -> None:
    """Give it the interface that its construction asks for."""
    address, pid, name = container.address, container.init_pid, container.name
    if not address:
        return
    assert container.parent is not None
    world, parent = container.world, container.parent.holder("net")
    parent_pid = None if parent.parent is None else parent.init_pid
    stale = {i for number, i in world.stale_ends if number == parent.number}

    def connect() -> int:
        with opened(pid) as here, opened(parent_pid) as there:
            return connected(here, there, name, address, stale)

    world.add_end(container, parent, await in_thread(connect))


def _give_ids(container: Container) -> None:
    """Choose the IDs of its user namespace; the map in the host's IDs is kept with it."""
    parent, text = container.parent, container.build.idmap
    assert parent is not None
    container.range, container.slice = None, 0
    if "user" not in container.build.types:
        container.map = parent.map
        return
    if text == "auto":
        _give_own_ids(container, parent)
        return
    if text == "host":
        lines: idmap.Map = tuple((inside, inside, count) for inside, _, count in parent.map)
    else:
        lines = idmap.parse(text)
    container.map = idmap.compose(parent.map, lines)


def _give_own_ids(container: Container, parent: Container) -> None:
    """IDs that no other container has: of the host's, or of those of the container whose the
    parent's are; the parent's when there are none left."""
    world, holder = container.world, parent.holder_of_ids()
    if holder.parent is None:
        check_ranges(container)
        start = world.ranges.take()
        if _has(parent.map, start, world.ranges.size):
            container.range = start
            container.map = ((0, start, world.ranges.size),)
            return
        world.ranges.give_back(start)
    else:
        number = idmap.slice_for(holder.map, (each.slice for each in _slices(holder)))
        start = idmap.to_outside(holder.map, (number or 0) * idmap.IDS) or 0
        if number and _has(parent.map, start, idmap.IDS):
            container.slice = number
            container.map = ((0, start, idmap.IDS),)
            return
    lines = ((0, 0, min(_own_range(parent.map), idmap.IDS)),)
    container.map = idmap.compose(parent.map, lines)


def _slices(holder: Container) -> Iterator[Container]:
    """The containers that may have slices of a container's IDs."""
    for each in holder.descendants():
        if each.parent is not None and each.parent.holder_of_ids() is holder:
            yield each


def _has(table: idmap.Map, start: int, count: int) -> bool:
    """Whether all these IDs of the host are mapped, in one piece."""
    return any(
        outside <= start and start + count <= outside + length for _, outside, length in table
    )


def _own_range(table: idmap.Map) -> int:
    """How many IDs from 0 on are mapped without a gap."""
    end = 0
    for inside, _, count in sorted(table):
        if inside > end:
            break
        end = max(end, inside + count)
    return end


def _map_in_parent(container: Container) -> idmap.Map:
    """The container's map in its parent's IDs, as uid_map takes it when the parent writes it."""
    assert container.parent is not None
    result = []
    for inside, outside, count in container.map:
        mapped = idmap.to_inside(container.parent.map, outside)
        if mapped is None:
            raise PermissionError(errno.EPERM, "IDs that the parent does not have", str(outside))
        result.append((inside, mapped, count))
    return tuple(result)


def _make_groups(container: Container) -> None:
    assert container.parent is not None
    if container.parent.parent is not None:
        container.parent.group.create_sub()
    container.group.create(container.root_uid, container.root_gid)


async def _set_limits(container: Container, gone: tuple[int, ...] = ()) -> None:
    limits = container.build.limits
    for name, value in limits:
        if name.startswith("io."):
            try:
                # The device may not answer.
                await trio.to_thread.run_sync(
                    container.group.set, name, value, limits, abandon_on_cancel=True
                )
            except OSError as error:
                # A disk may have been taken away since.
                if error.errno not in gone:
                    raise
        else:
            container.group.set(name, value, limits)


@contextlib.contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    """The socket on which the init listens from its first instruction on."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as listener:
        listener.bind(path)
        listener.listen(64)
        yield listener


@dataclass
class Trees:
    """What a construction's paths lead to: detached mounts."""

    rootfs_fd: int | None = None
    binds: list[tuple[str, int, bool]] = field(default_factory=list)
    mapped: list[int] = field(default_factory=list)
    """Those of the binds whose files get the container's IDs."""

    def close(self) -> None:
        """Let go of them; what was mounted stays."""
        for fd in (*(fd for _, fd, _ in self.binds), self.rootfs_fd):
            if fd is not None:
                os.close(fd)


async def _trees(container: Container, build: Build) -> Trees:
    """Resolve the paths of a construction, as those who named them see them.

    This may take as long as a filesystem that is involved likes, so nothing was done yet.
    """
    world, trees = container.world, Trees()
    try:
        if build.rootfs != "host":
            origin = build.rootfs_origin
            trees.rootfs_fd = await world.tree(origin, build.rootfs)
            await check_rootfs(trees.rootfs_fd, build, container)
        origin = build.binds_origin
        for target, source, mode in build.binds:
            fd = await world.tree(origin, source)
            trees.binds.append((target, fd, read_only(mode)))
            if is_mapped(mode) and "user" in build.types:
                trees.mapped.append(fd)
                await check_tree(
                    fd, source, origin, container, mapped=True, hidden=not read_only(mode)
                )
    except BaseException:
        trees.close()
        raise
    return trees


async def _map_binds(container: Container, trees: Trees, build: Build) -> None:
    """Idmap what is to be: to its root what is his whose word it was, or is the host root's."""
    table = rootfs_map(container, build.binds_origin) or container.map if trees.mapped else ()
    while trees.mapped:
        await container.world.spawner.idmap(trees.mapped[-1], table)
        if build.binds_origin.uid:
            check_mapped(trees.mapped[-1], container)
        trees.mapped.pop()


async def _start(container: Container, trees: Trees) -> None:
    """Start the init in groups that are there; it is ready when this returns."""
    world, build, parent = container.world, container.build, container.parent
    assert parent is not None
    owner_uid, owner_gid = namespace_owner(container)
    disk = None
    if trees.rootfs_fd is not None and "user" in build.types:
        disk = rootfs_map(container, build.rootfs_origin)
    if trees.rootfs_fd is not None and disk is not None:
        await world.spawner.idmap(trees.rootfs_fd, disk)
        check_mapped(trees.rootfs_fd, container)
    await _map_binds(container, trees, build)
    with _listening(world.store.socket_path(container.number)) as listener:
        container.init_pid = await world.spawner.make(
            Recipe(
                face=container.number,
                hostname=overflow_hostname(container.name),
                unshare=build.types,
                parent_pid=None if parent.parent is None else parent.init_pid,
                root_pid=next(
                    (
                        c.init_pid
                        for c in parent.lineage()
                        if c.own("mnt") and c.build.rootfs != "host"
                    ),
                    None,
                ),
                owner_uid=owner_uid,
                owner_gid=owner_gid,
                uid_map=_map_in_parent(container) if "user" in build.types else (),
                gid_map=_map_in_parent(container) if "user" in build.types else (),
                root_uid=container.root_uid,
                cgroup=container.group.path,
                v1=container.group.v1_paths,
                rootfs_fd=trees.rootfs_fd,
                idmap_rootfs="user" in build.types and disk is None,
                binds=tuple(trees.binds),
                listen_fd=listener.fileno(),
                clocks=_clocks(build),
                slave=build.propagation == "slave",
                syslog=build.seccomp == "notify",
                joins=tuple(pods.joins(container)),
            )
        )
    if _clocks(build) and not namespaces.joined_by_exec(container.init_pid):
        raise OSError(errno.EOPNOTSUPP, "this kernel does not join a time namespace by exec")


def _clocks(build: Build) -> str:
    """The text of timens_offsets (time_namespaces(7)); "" when the parent's are right."""
    if build.clocks is None or "time" not in build.types:
        return ""
    names = ("monotonic", "boottime")
    return "".join(
        f"{name} {seconds} {nanoseconds}\n"
        for name, (seconds, nanoseconds) in zip(names, build.clocks, strict=True)
    )


async def give(container: Container, mode: int, uid: int, gid: int) -> None:
    """chmod(2) and chown(2) of its directory; -1 leaves as it is.

    The kernel's owner of a user namespace is who made it, for ever.  So an idle container whose
    owner that would not be any more is built anew.  On any error it is as it was.
    """
    await container.settled.wait()
    before = container.mode, container.uid, container.gid
    owner = _kernel_owner(container)
    container.mode = before[0] if mode < 0 else mode
    container.uid = before[1] if uid < 0 else uid
    container.gid = before[2] if gid < 0 else gid
    if (
        container.phase is Phase.RUNNING
        and "user" in container.build.types
        and _kernel_owner(container) != owner
        and not (container.children or container.populated())
    ):
        try:
            await rebuild(container, container.build)
        except BaseException:
            container.mode, container.uid, container.gid = before
            raise
    container.changes += 1
    container.save()


def _kernel_owner(container: Container) -> int:
    """As the spawner chooses it: one whom the parent's user namespace maps."""
    uid, _ = namespace_owner(container)
    parent = container.parent
    if parent is None or idmap.to_inside(parent.map, uid) is not None:
        return uid
    return parent.root_uid


async def rebuild(container: Container, build: Build) -> None:
    """Build an idle container anew.  EBUSY when it is not idle; on any error it is as it was.

    The old init is gone before the new one starts: they would share the groups.  Should the new one
    not start, the old construction is started again.  From the moment when the old one is killed
    nothing interrupts this (it takes some milliseconds), but the death of the daemon; the next one
    then finds in the record what is to be built.
    """
    container.check_alive()
    container.check_idle()
    if pods.sharers(container):
        raise OSError(errno.EBUSY, "others share its namespaces", container.name)
    with container.starting_in_it():
        await _rebuild(container, build)
    container.world.changed(container)
    container.world.look_at(container)


async def _rebuild(container: Container, build: Build) -> None:
    world, before = container.world, container.build
    before_ids = (container.map, container.range, container.slice)
    before_address = container.address
    container.settled = trio.Event()
    try:
        trees = await _trees(container, build)
        with trio.CancelScope(shield=True):
            try:
                container.build = build
                _give_ids(container)
                _give_address(container)
                await _exchange(container, trees)
            except OSError:
                if container.address != before_address:
                    world.addresses.give_back(container.address)
                    container.address = before_address
                if container.range is not None and container.range != before_ids[1]:
                    world.ranges.give_back(container.range)
                container.build = before
                container.map, container.range, container.slice = before_ids
                if container.phase is Phase.REBUILDING:
                    await _build_again(container)
                raise
            finally:
                trees.close()
        if before_ids[1] is not None and before_ids[1] != container.range:
            world.ranges.give_back(before_ids[1])
        if before_address != container.address:
            world.addresses.give_back(before_address)
    finally:
        container.settled.set()


async def rebind(container: Container, build: Build) -> None:
    """Add and remove binds of a container that may have members; on any error nothing has changed.

    EOPNOTSUPP when it has no mount namespace of its own.  What its root has unmounted is gone
    already.
    """
    container.check_alive()
    await container.settled.wait()
    if "mnt" not in container.build.types:
        raise OSError(errno.EOPNOTSUPP, "no mount namespace of its own", container.name)
    before = {line[0]: line for line in container.build.binds}
    after = {line[0]: line for line in build.binds}
    removed = [line for line in before.values() if after.get(line[0]) != line]
    added = [line for line in after.values() if before.get(line[0]) != line]
    trees = await _trees(container, replace(build, rootfs="host", binds=tuple(added)))
    old = Trees()
    try:
        container.settled = trio.Event()
        container.binding = tuple(line[0] for line in added)
        container.save()
        try:
            with trio.CancelScope(shield=True):
                await _map_binds(container, trees, build)
                await _take(container, removed, old)
                await _put(container, trees)
        except OSError:
            with trio.CancelScope(shield=True):
                await _take_back(container, old)
            raise
        # Its limits may have been changed meanwhile.
        container.build = replace(
            container.build, binds=build.binds, binds_origin=build.binds_origin
        )
    finally:
        container.binding = ()
        container.save()
        container.settled.set()
        trees.close()
        old.close()


def read_only(mode: str) -> bool:
    """Of the last word of a line of `binds`."""
    return mode.startswith("ro")


def is_mapped(mode: str) -> bool:
    """Whether the files have the container's IDs."""
    return mode.endswith(",idmap")


async def _take(container: Container, lines: list[tuple[str, str, str]], old: Trees) -> None:
    """Unmount binds, and keep them in `old`."""
    spawner = container.world.spawner
    for target, _, mode in lines:
        try:
            fd = await spawner.tree(container.init_pid, target)
            old.binds.append((target, fd, read_only(mode)))
            await spawner.unbind(container.init_pid, target)
        except OSError as error:
            # Its root was quicker.
            if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                raise


async def _put(container: Container, trees: Trees) -> None:
    """Mount binds: all of them, or none."""
    spawner, done = container.world.spawner, []
    slave = container.build.propagation == "slave"
    try:
        for target, fd, only_read in trees.binds:
            await spawner.bind(container.init_pid, target, fd, only_read, slave)
            done.append(target)
    except OSError:
        for target in reversed(done):
            await spawner.unbind(container.init_pid, target)
        raise


async def _take_back(container: Container, old: Trees) -> None:
    try:
        await _put(container, old)
    except OSError as error:
        log.warning("%s: what was bound could not be bound again: %s", container.name, error)


async def _undo_binding(container: Container) -> None:
    """The daemon died while it added binds: whoever asked for them asks again."""
    for target in container.binding:
        with contextlib.suppress(OSError):
            await container.world.spawner.unbind(container.init_pid, target)
    container.binding = ()
    container.save()


async def _exchange(container: Container, trees: Trees) -> None:
    """Put an init of the construction that the container now has in the place of what it had."""
    world = container.world
    container.phase = Phase.REBUILDING
    container.save()
    world.unwatch(container)
    container.group.kill()
    await world.depopulated(container)
    await world.unpin(container)
    world.retire_ends(container)
    container.group.remove()
    _make_groups(container)
    await _start(container, trees)
    # Not before: they may have been set to less than an init needs to start, since it had.
    await _set_limits(container, gone=(errno.ENODEV,))
    await _connect(container)
    _run(container)
    container.save()
    # It may have a log of its own again.
    console.attach(container)


async def _build_again(container: Container) -> None:
    """Build it as it is recorded; when that cannot be, it is dead."""
    try:
        while container.suspended():  # noqa: ASYNC110 - nothing tells of all that it is in
            await trio.sleep(FROZEN_LOOK_S)
        with container.starting_in_it():
            trees = await _trees(container, container.build)
            try:
                await _exchange(container, trees)
            finally:
                trees.close()
    except OSError as error:
        log.warning("%s could not be built again: %s", container.name, error)
        container.group.kill()
        container.phase = Phase.DEAD
        container.save()


async def _finish_rebuild(container: Container) -> None:
    """The daemon died while it rebuilt this one."""
    try:
        await _build_again(container)
    finally:
        container.settled.set()
    container.world.look_at(container)


async def limit(container: Container, name: str, values: Sequence[str]) -> None:
    """Set a limit of a container that runs, with `DEVICES` those of several; it is kept with its
    construction.

    EINVAL, ERANGE: the value; EOPNOTSUPP: no controller of this host has it; what the kernel says
    to it.  On an error nothing has changed.  The kernel may take long over it, as when memory has
    to be reclaimed: a thread waits.  When nobody waits for that any more, the limit holds
    nevertheless, as with cgroupfs itself.
    """
    for value in values:
        parse(name, value)
    async with container.limiting:
        before, done = container.build.limits, list[str]()
        try:
            for value in values:
                await _limit(container, name, value)
                done.append(value.split()[0])
        except OSError:
            for device in done:
                await _limit(container, name, find(before, name, device) or no_limit(device))
            raise


async def _limit(container: Container, name: str, value: str) -> None:
    while True:
        while not container.settled.is_set():
            await container.settled.wait()
        container.check_alive()
        group, limits = container.group, container.build.limits
        chosen = parse(name, value)
        now = find(limits, *key(name, chosen)) if name in DEVICES else group.shown(name, limits)
        chosen = parse(name, value, now)
        try:
            await trio.to_thread.run_sync(
                group.set, name, chosen, limits, abandon_on_cancel=True, limiter=_limiting
            )
        except trio.Cancelled:
            _keep(container, name, chosen)
            raise
        if container.settled.is_set():
            break
        # It is being built anew, with what was set before.
    _keep(container, name, chosen)


def _keep(container: Container, name: str, value: str) -> None:
    limits = merged(container.build.limits, name, value)
    container.build = replace(container.build, limits=limits)
    container.save()
    if name == "cpu.max" and "cpu" in container.group.v1:
        # A lesser one above is no longer, or newly is, what holds.
        for each in container.descendants():
            own = find(each.build.limits, name)
            if own:
                with contextlib.suppress(OSError):
                    each.group.set(name, own, each.build.limits)


def rename(parent: Container, old: str, new: str) -> Container:
    """Give a child another name: nothing but the name and its record changes."""
    each = parent.children.get(old)
    if each is None or each.phase is Phase.MAKING:
        raise FileNotFoundError(errno.ENOENT, "no such container", old)
    check_name(new)
    if new == old:
        return each
    if new in parent.children or reserved(new):
        raise OSError(errno.EEXIST, "the name is taken", new)
    each.name = new
    each.save()
    del parent.children[old]
    parent.children[new] = each
    parent.tell()
    return each


def remove_idle(container: Container) -> None:
    """rmdir(2) of a container.  ENOTEMPTY when there are others in it, EBUSY when it has
    members."""
    if container.children:
        raise OSError(errno.ENOTEMPTY, "containers are nested in it", container.name)
    container.check_idle()
    end(container)


def end(container: Container) -> None:
    """Kill all that is in it and take it out of the tree.

    When this returns every process has its SIGKILL and nothing can fork out of it; the last ones
    leave in the background.
    """
    doomed = [*container.descendants(), container]
    parent = container.parent
    assert parent is not None
    for each in doomed:
        each.dying = True
    _detach(container)
    _begin_end(container)
    parent.tell()


def _detach(container: Container) -> None:
    parent = container.parent
    assert parent is not None
    if parent.children.get(container.name) is container:
        del parent.children[container.name]
    gone = [*container.descendants(), container]
    for each in gone:
        each.phase = Phase.GONE
        each.world.unwatch(each)
    for each in gone:
        pods.hand_over(each)
        each.world.retire_ends(each)
    with contextlib.suppress(OSError):
        container.save()


def _begin_end(container: Container) -> None:
    """Kill what is in the groups and leave the rest to the background."""
    world = container.world
    container.group.hurry()
    doomed = [*container.descendants(), container]
    for each in doomed:
        if find(each.build.limits, "cpu.max"):
            each.group.lift_quota()
    container.group.kill()
    for path in world.away(container):
        cgroup.kill_at(path)
    for each in doomed:
        each.tell()
    world.start(finish, container)


async def finish(container: Container) -> None:
    """See the last process out of a killed container and remove what is left of it."""
    world = container.world
    with trio.CancelScope(shield=True):
        await _lift_io(container)
        while True:
            with trio.move_on_after(KILL_AGAIN_S):
                await world.depopulated(container)
            counted = _counted(container)
            if container.group.remove():
                break
            # Something was still being cloned into it.
            container.group.kill()
            await trio.sleep(0.01)
        _leave_to_parent(container, counted)
        for each in [*container.descendants(), container]:
            await world.unpin(each)
            world.forget(each)


async def _lift_io(container: Container) -> None:
    """What is held back by io.max cannot be killed before it is let through."""
    for each in [*container.descendants(), container]:
        for name, value in each.build.limits:
            if name == "io.max":
                lifted = no_limit(value.split()[0])
                with contextlib.suppress(OSError):
                    await trio.to_thread.run_sync(each.group.set, name, lifted, limiter=_limiting)


def _counted(container: Container) -> dict[str, dict[str, int]]:
    """What its parent would lose with its groups."""
    found: dict[str, dict[str, int]] = {}
    if container.parent is None or container.parent.parent is None:
        return found
    for name in container.group.legacy():
        with contextlib.suppress(OSError):
            found[name] = container.group.counters(name)
            for each in container.descendants():
                for key, value in each.group.past.get(name, {}).items():
                    found[name][key] = found[name].get(key, 0) + value
    return found


def _leave_to_parent(container: Container, counted: dict[str, dict[str, int]]) -> None:
    if any(value for counters in counted.values() for value in counters.values()):
        assert container.parent is not None
        for name, counters in counted.items():
            container.parent.group.inherit(name, counters)
        container.parent.save()


async def resume(world: World) -> None:
    """Take up what the last daemon left: finish what was being undone or removed, watch the
    rest."""
    doomed, kept = world.load()
    for each in doomed:
        each.group.kill()
        world.start(finish, each)
    for each in kept:
        if each.phase is Phase.RUNNING:
            each.group.thaw_payload()
            each.group.give_way(False)
            # Its init may have ended while nobody looked.
            world.look_at(each)
        if each.phase is Phase.RUNNING:
            await _undo_binding(each)
            world.watch(each)
            world.look_at(each)
        elif each.phase is Phase.REBUILDING:
            each.settled = trio.Event()
            world.start(_finish_rebuild, each)


async def show_again(world: World) -> None:
    """Give the containers of an instance that was killed as a whole the files of the new mount.

    Those of the old one, which they still have, nobody serves any more.  What had one of these open
    gets ENOTCONN for ever.
    """
    for each in sorted(world.containers.values(), key=lambda c: c.number):
        if each.parent is None or each.phase is not Phase.RUNNING or not each.own("mnt"):
            continue
        try:
            await world.spawner.show(each.init_pid, each.number)
        except OSError as error:
            log.warning("%s does not get its files again: %s", each.name, error)
