"""Making what a container consists of: its groups, its init and namespaces, its interface."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

from nsfs import namespaces, pods
from nsfs.authority import check_mapped, namespace_owner, rootfs_map
from nsfs.build import Build
from nsfs.container import Container, Phase, overflow_hostname
from nsfs.grouplimits import set_limits
from nsfs.ids import give_ids, map_in_parent
from nsfs.network import connect as connected
from nsfs.network import opened
from nsfs.spawner import Recipe
from nsfs.trees import Trees, map_binds, open_trees
from nsfs.view import in_thread


async def construct(container: Container) -> None:
    """Make what a container that has its numbers consists of: IDs, record, groups, init."""
    give_ids(container)
    container.save()
    trees = await open_trees(container, container.build)
    try:
        make_groups(container)
        await set_limits(container)
        await start(container, trees)
    finally:
        trees.close()


def begin_running(container: Container) -> None:
    """It is ready: from now on it runs."""
    if container.dying:
        # Killed while it was being made, with what it is in.
        raise OSError(errno.ENOENT, "it was removed", container.name)
    container.phase = Phase.RUNNING
    container.world.watch(container)


def give_address(container: Container) -> None:
    """Choose its address, if its construction asks for one; ENOSPC when all are taken."""
    build = container.build
    wanted = build.network == "veth" and "net" in build.types
    if wanted != bool(container.address):
        container.address = container.world.addresses.take() if wanted else ""


async def connect(container: Container) -> None:
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


def make_groups(container: Container) -> None:
    """Make its control groups, which are delegated to its root."""
    assert container.parent is not None
    if container.parent.parent is not None:
        container.parent.group.create_sub()
    container.group.create(container.root_uid, container.root_gid)


@contextlib.contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    """The socket on which the init listens from its first instruction on."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as listener:
        listener.bind(path)
        listener.listen(64)
        yield listener


async def start(container: Container, trees: Trees) -> None:
    """Start the init in groups that are there; it is ready when this returns."""
    world, build, parent = container.world, container.build, container.parent
    assert parent is not None
    owner_uid, owner_gid = namespace_owner(container)
    disk = None
    if trees.rootfs_fd is not None and "user" in build.types:
        disk = rootfs_map(container, build.rootfs_origin)
    if trees.rootfs_fd is not None and disk is not None:
        await world.spawner.idmap(trees.rootfs_fd, disk)
        await check_mapped(trees.rootfs_fd, container)
    await map_binds(container, trees, build)
    with _listening(world.store.socket_path(container.number)) as listener:
        try:
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
                    top=[each.number for each in container.lineage()][-2],
                    owner_uid=owner_uid,
                    owner_gid=owner_gid,
                    uid_map=map_in_parent(container) if "user" in build.types else (),
                    gid_map=map_in_parent(container) if "user" in build.types else (),
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
        except OSError as error:
            if _clocks(build) and error.errno == errno.EINVAL:
                raise _no_clocks() from error
            raise
    if _clocks(build) and not namespaces.joined_by_exec(container.init_pid):
        raise _no_clocks()


def _no_clocks() -> OSError:
    # Before Linux 6.2 or so a process whose children shall be in another time namespace can neither
    # join that by exec nor clone one that shares its memory (EINVAL).
    return OSError(errno.EOPNOTSUPP, "this kernel does not join a time namespace by exec")


def _clocks(build: Build) -> str:
    """The text of timens_offsets (time_namespaces(7)); "" when the parent's are right."""
    if build.clocks is None or "time" not in build.types:
        return ""
    names = ("monotonic", "boottime")
    return "".join(
        f"{name} {seconds} {nanoseconds}\n"
        for name, (seconds, nanoseconds) in zip(names, build.clocks, strict=True)
    )
