"""The life of a container: make, rename, kill, remove.

What is done to the kernel is recorded first.  Removing never waits for processes to end: the
caller's rmdir(2) holds the lock of the directory above, and one of those processes may be waiting
for just that lock.  So all of it is killed and detached, the request is answered, and a task in the
background sees the last one out and takes down the groups.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from signal import SIGKILL

import trio

from nsfs import cgroup, loglimits, pods
from nsfs.attribute import Caller
from nsfs.authority import check_number
from nsfs.build import Build
from nsfs.construct import begin_running, connect, construct, give_address
from nsfs.container import Container, Phase, check_name, overflow_hostname, reserved
from nsfs.found import Found
from nsfs.grouplimits import lift_io
from nsfs.limits import find
from nsfs.rebind import undo_binding
from nsfs.rebuild import finish_rebuild
from nsfs.world import World

log = logging.getLogger(__name__)

KILL_AGAIN_S = 0.1
"""How long what was killed may take to go before it is killed again."""


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
    if existing is not None or name in parent.found or reserved(name):
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
        give_address(each)
        if spare is None:
            await construct(each)
        else:
            each.phase = Phase.MAKING
            each.save()
            await world.spawner.set_hostname(each.init_pid, overflow_hostname(name))
        await connect(each)
        begin_running(each)
        if not world.ready.put(each.number, 1):
            each.save()
    except BaseException:
        undo(each)
        raise
    parent.tell()
    return each


def undo(container: Container) -> None:
    """Remove, in the background, a container that nobody was told of."""
    _detach(container)
    _begin_end(container)


def rename(parent: Container, old: str, new: str) -> Container:
    """Give a child another name: nothing but the name and its record changes."""
    each = parent.children.get(old) or parent.found.get(old)
    if each is None or each.phase is Phase.MAKING:
        raise FileNotFoundError(errno.ENOENT, "no such container", old)
    check_name(new)
    if new == old:
        return each
    if new in parent.children or new in parent.found or reserved(new):
        raise OSError(errno.EEXIST, "the name is taken", new)
    each.name = new
    each.save()
    names = parent.found if isinstance(each, Found) else parent.children
    del names[old]
    names[new] = each
    parent.tell()
    return each


def remove_idle(container: Container) -> None:
    """rmdir(2) of a container.  ENOTEMPTY when there are others in it, EBUSY when it has
    members."""
    if container.is_found:
        raise OSError(errno.EBUSY, "it has members", container.name)
    if container.children:
        raise OSError(errno.ENOTEMPTY, "containers are nested in it", container.name)
    container.check_idle()
    end(container)


async def end_any(container: Container) -> None:
    """The same of a found one, whose processes nothing stops from forking but their death: until
    the last one has gone they are killed again in the background, for a while."""
    if not isinstance(container, Found):
        end(container)
        return
    await container.world.look(0.0)
    container.send(SIGKILL)
    parent = container.parent
    assert parent is not None
    container.world.remove_found(container)
    container.world.start(_finish_found, container)
    parent.tell()


async def _finish_found(found: Found) -> None:
    """What is left of it after that is found again."""
    with contextlib.suppress(OSError):
        await found.signal(SIGKILL)
    found.world.lose(found)


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
        for found in list(each.found.values()):
            each.world.lose(found)
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
        await lift_io(container)
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
            await undo_binding(each)
            world.watch(each)
            world.look_at(each)
        elif each.phase is Phase.REBUILDING:
            each.settled = trio.Event()
            world.start(finish_rebuild, each)
        elif each.phase is Phase.DEAD and pods.sharers(each):
            # The last daemon recorded its death, and no more.
            pods.hand_over(each)


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
