"""Adding and removing binds of a container that runs."""

from __future__ import annotations

import contextlib
import errno
import logging
from dataclasses import replace

import trio

from nsfs.build import Build
from nsfs.container import Container
from nsfs.trees import Trees, map_binds, open_trees, read_only

log = logging.getLogger(__name__)


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
    trees = await open_trees(container, replace(build, rootfs="host", binds=tuple(added)))
    old = Trees()
    try:
        container.settled = trio.Event()
        container.binding = tuple(line[0] for line in added)
        container.save()
        try:
            with trio.CancelScope(shield=True):
                await map_binds(container, trees, build)
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


async def undo_binding(container: Container) -> None:
    """The daemon died while it added binds: whoever asked for them asks again."""
    for target in container.binding:
        with contextlib.suppress(OSError):
            await container.world.spawner.unbind(container.init_pid, target)
    container.binding = ()
    container.save()
