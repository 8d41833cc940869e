"""What a construction's paths lead to: trees of mounts, resolved before anything is done."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from nsfs.authority import check_mapped, check_rootfs, check_tree, rootfs_map
from nsfs.build import Build
from nsfs.container import Container


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


async def open_trees(container: Container, build: Build) -> Trees:
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


async def map_binds(container: Container, trees: Trees, build: Build) -> None:
    """Idmap what is to be: to its root what is his whose word it was, or is the host root's."""
    table = rootfs_map(container, build.binds_origin) or container.map if trees.mapped else ()
    while trees.mapped:
        await container.world.spawner.idmap(trees.mapped[-1], table)
        if build.binds_origin.uid:
            await check_mapped(trees.mapped[-1], container)
        trees.mapped.pop()


def read_only(mode: str) -> bool:
    """Of the last word of a line of `binds`."""
    return mode.startswith("ro")


def is_mapped(mode: str) -> bool:
    """Whether the files have the container's IDs."""
    return mode.endswith(",idmap")
