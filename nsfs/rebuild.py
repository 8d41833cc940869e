"""Building an idle container anew, in the place of what it was."""

from __future__ import annotations

import errno
import logging

import trio

from nsfs import console, idmap, pods
from nsfs.authority import namespace_owner
from nsfs.build import Build
from nsfs.construct import begin_running, connect, give_address, make_groups, start
from nsfs.container import Container, Phase
from nsfs.grouplimits import set_limits
from nsfs.ids import give_ids
from nsfs.trees import Trees, open_trees

log = logging.getLogger(__name__)

FROZEN_LOOK_S = 0.1
"""How often it is looked whether what is to be built is still suspended."""


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
        trees = await open_trees(container, build)
        with trio.CancelScope(shield=True):
            try:
                container.build = build
                give_ids(container)
                give_address(container)
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
    make_groups(container)
    await start(container, trees)
    # Not before: they may have been set to less than an init needs to start, since it had.
    await set_limits(container, gone=(errno.ENODEV,))
    await connect(container)
    begin_running(container)
    container.save()
    # It may have a log of its own again.
    console.attach(container)


async def _build_again(container: Container) -> None:
    """Build it as it is recorded; when that cannot be, it is dead."""
    try:
        while container.suspended():  # noqa: ASYNC110 - nothing tells of all that it is in
            await trio.sleep(FROZEN_LOOK_S)
        with container.starting_in_it():
            trees = await open_trees(container, container.build)
            try:
                await _exchange(container, trees)
            finally:
                trees.close()
    except OSError as error:
        log.warning("%s could not be built again: %s", container.name, error)
        container.group.kill()
        container.phase = Phase.DEAD
        container.save()


async def finish_rebuild(container: Container) -> None:
    """The daemon died while it rebuilt this one."""
    try:
        await _build_again(container)
    finally:
        container.settled.set()
    container.world.look_at(container)
