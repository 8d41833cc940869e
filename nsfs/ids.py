"""Which IDs a container's user namespace has."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from nsfs import idmap
from nsfs.authority import check_ranges
from nsfs.container import Container


def give_ids(container: Container) -> None:
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


def map_in_parent(container: Container) -> idmap.Map:
    """The container's map in its parent's IDs, as uid_map takes it when the parent writes it."""
    assert container.parent is not None
    result = []
    for inside, outside, count in container.map:
        mapped = idmap.to_inside(container.parent.map, outside)
        if mapped is None:
            raise PermissionError(errno.EPERM, "IDs that the parent does not have", str(outside))
        result.append((inside, mapped, count))
    return tuple(result)
