"""Pods: containers that share a namespace although neither is in the other.

One of them *holds* it, as far as the tree is concerned; for the kernel they are equals, and the
namespace lives as long as any is in it.  So when the holder ends another one takes its place.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Iterator

from nsfs import console, namespaces
from nsfs.attribute import Caller, invalid
from nsfs.authority import check_mode
from nsfs.build import Build
from nsfs.container import Container, Face, Phase

SHARED = ("ipc", "net", "pid", "time", "uts", namespaces.SYSLOG)
"""What can be shared so.  The others follow from where a container is: its IDs, its groups, and the
mounts that belong to its IDs."""


def sharers(container: Container) -> list[Container]:
    """The containers that share a namespace which this one holds, oldest first."""
    found = [
        each
        for each in container.world.containers.values()
        if each.build.shared and container.number in dict(each.build.shared).values()
        if each.phase is not Phase.GONE
    ]
    # Not by their numbers: one that was made in advance had its own before it had a name.
    return sorted(found, key=lambda each: (each.since, each.number))


def joins(container: Container) -> Iterator[tuple[int | str, str]]:
    """The kernel's namespaces that it is to join: a process in each, by the host's PID, and the
    type.  ENODEV when the container whose it is has ended."""
    for kind, number in container.build.shared:
        if kind == namespaces.SYSLOG:
            continue
        holder = container.world.containers.get(number)
        if holder is None or not holder.alive():
            raise OSError(errno.ENODEV, f"the container whose {kind} it shares is dead")
        yield ("self" if holder.parent is None else holder.init_pid), kind


def hand_over(container: Container) -> None:
    """A container has ended: what it held and others are in is the oldest one's of these now."""
    world = container.world
    if container.phase is Phase.DEAD:
        # Its init has died: what it held is let go of before another is told to hold it.
        for tell in world.inherited:
            tell(container)
    heirs: dict[str, Container] = {}
    for each in sharers(container):
        left = []
        for kind, number in each.build.shared:
            if number != container.number:
                left.append((kind, number))
            elif kind in heirs:
                left.append((kind, heirs[kind].number))
            else:
                heirs[kind] = each
                if kind == namespaces.SYSLOG:
                    each.inherited_log = container.log_number
                    each.log_from = container.number
        each.build = dataclasses.replace(each.build, shared=tuple(left))
        each.save()
    for kind, heir in heirs.items():
        if kind == namespaces.SYSLOG:
            world.store.move_log(container.number, heir.number)
            heir.log_from = 0
            heir.own_log, container.own_log = container.own_log, None
            # Built anew it would have another one.
            container.inherited_log = world.store.number()
            container.save()
            console.inherit(heir, container)
        if kind == "net":
            # The interfaces and their addresses stay.
            heir.ends, container.ends = [*heir.ends, *container.ends], []
            heir.address, container.address = container.address or heir.address, ""
            heir.save()
        if heir.phase is Phase.RUNNING:
            for tell in world.inherited:
                tell(heir)
        heir.tell()


# --- `namespaces` ---


def parse(face: Face, value: str, caller: Caller) -> Build:
    """The construction that lines `TYPE own` or `TYPE PATH` say, PATH being relative to the
    container's directory; what is not named stays as it is.

    The lines that are read, `TYPE ID ...`, are taken as well.  EINVAL for another syntax or for a
    circle, ENOENT for a path that leads to no container, EPERM or EACCES without authority over it,
    EOPNOTSUPP for a type that cannot be shared so.
    """
    container = face.container
    build = container.build
    seen = set()
    for line in value.splitlines():
        words = line.split(maxsplit=2)
        if len(words) == 3 and words[1].isdigit():
            del words[1]
        if len(words) != 2 or words[0] not in (*namespaces.TYPES, namespaces.SYSLOG):
            raise invalid(line)
        kind, path = words[0], words[1].strip()
        if kind in seen:
            raise invalid(line)
        seen.add(kind)
        own = set(build.unshare)
        shared = {k: n for k, n in build.shared if k != kind}
        if path == "own":
            own.add(kind)
        else:
            holder = _target(face, path).holder(kind)
            assert container.parent is not None
            if holder is container:
                raise invalid(line)
            if holder is container.parent.holder(kind):
                own.discard(kind)
            else:
                _check(face, holder, kind, caller)
                own.add(kind)
                shared[kind] = holder.number
        build = dataclasses.replace(
            build, unshare=tuple(sorted(own)), shared=tuple(sorted(shared.items()))
        )
        if kind == "net" and path == "own" and build.network == "host":
            build = dataclasses.replace(build, network="none")
    if not seen:
        raise invalid(value)
    return build


def _target(face: Face, path: str) -> Container:
    """The container that a path leads to, as the face shows it."""
    found = face.container
    for name in os.path.normpath(path).split("/"):
        if name == "..":
            if found is face.viewpoint or found.parent is None:
                raise FileNotFoundError(errno.ENOENT, "it leads out of the tree", path)
            found = found.parent
        elif name != ".":
            child = found.children.get(name)
            if child is None or child.phase in (Phase.MAKING, Phase.GONE):
                raise FileNotFoundError(errno.ENOENT, "no such container", path)
            found = child
    return found


def _check(face: Face, holder: Container, kind: str, caller: Caller) -> None:
    if kind not in SHARED:
        raise OSError(errno.EOPNOTSUPP, "it can be shared with what it is in only", kind)
    if face.viewpoint not in holder.lineage() or face.container in holder.lineage():
        raise PermissionError(errno.EPERM, f"its {kind} namespace is another's", holder.name)
    # The kernel asks for privilege over the namespace that is joined (setns(2)).
    check_mode(face.of(holder), None, 0, caller, os.W_OK)
    holder.check_alive()
