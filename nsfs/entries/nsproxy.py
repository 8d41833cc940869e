"""`nsproxy/` and `namespaces`: the namespaces that a container consists of.

nsproxy/TYPE   a link for each of the kernel's eight types to what can be opened and given to
               setns(2)
namespaces     0644, a line for each type, `syslog` among them: `TYPE ID own`, or `TYPE ID PATH`
               where it is another container's, PATH leading there from this directory.  ID is the
               inode number that lsns(8) prints; for `syslog` it is nsfs's own number.  Lines
               `TYPE own` and `TYPE PATH` written while idle rebuild the container so
"""

from __future__ import annotations

import errno

from nsfs import members, namespaces, pods
from nsfs.attribute import FOUND, PARENTS, Attribute, Caller, Directory, Link, lines
from nsfs.container import Container, Face
from nsfs.found import Found
from nsfs.rebuild import rebuild


def namespaces_show(face: Face) -> str:
    """A line for each type, in the order of names."""
    container = face.container
    container.check_alive()
    if isinstance(container, Found):
        return _found_show(face, container)
    rows = []
    pid = "self" if container.parent is None else container.init_pid
    for kind in sorted((*namespaces.SORTED, namespaces.SYSLOG)):
        holder = container.holder(kind)
        where = "own" if holder is container else _path(face, holder)
        try:
            ident = (
                holder.log_number if kind == namespaces.SYSLOG else namespaces.identity(pid, kind)
            )
        except FileNotFoundError as error:
            raise OSError(errno.ENODEV, "the container is dead", container.name) from error
        rows.append(f"{kind} {ident} {where}")
    return lines(rows)


def _found_show(face: Face, found: Found) -> str:
    """The same of a found one, which may be in another's that is none around it."""
    rows = []
    for kind in sorted((*namespaces.SORTED, namespaces.SYSLOG)):
        if kind == namespaces.SYSLOG:
            ident = found.holder(kind).log_number
        else:
            ident = found.number_of(kind)
        holder = face.world.who_has(found, kind)
        rows.append(f"{kind} {ident} {'own' if holder is found else _path(face, holder)}")
    return lines(rows)


def _path(face: Face, holder: Container) -> str:
    """Where the holder of a namespace is, as far as the viewer can know of it: nothing inside names
    a container that it is not in the tree of."""
    if face.viewpoint in holder.lineage():
        return face.path_to(holder)
    return ".." if face.container is face.viewpoint else face.path_to(face.viewpoint)


async def namespaces_store(face: Face, value: str, caller: Caller) -> None:
    """Have namespaces of its own, or another container's; the errors of `pods.parse`, and EBUSY
    when it is not idle or others share what it holds."""
    container = face.container
    if container.parent is None:
        raise PermissionError(errno.EPERM, "the host has all of its own", "namespaces")
    build = pods.parse(face, value, caller)
    if build != container.build:
        await rebuild(container, build)


def _target(kind: str) -> Link:
    async def target(face: Face) -> str:
        container = face.container
        if face.inner or container.parent is None:
            # The viewer is in it: its own are the container's.  (The init's cannot be opened from
            # inside.)
            return f"/proc/self/ns/{kind}"
        container.check_alive()
        depth = members.level(face.viewpoint)
        if not depth or container.is_found:
            # What was found is not held.
            return f"/proc/{members.seen_pid(container.init_pid, depth)}/ns/{kind}"
        try:
            pinned: str = await container.world.pin(face, kind)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            # A mount namespace can be held by a mount in an older one only, and Linux 6.18, which
            # numbers them for each CPU, does not always know which that is.
            return f"/proc/{members.seen_pid(container.init_pid, depth)}/ns/{kind}"
        return pinned

    return Link(kind, target=target, flags=FOUND)


FILES = (
    Directory(
        "nsproxy",
        entries=tuple(_target(kind) for kind in namespaces.SORTED),
        mode=0o755,
        flags=FOUND,
    ),
    Attribute(
        "namespaces",
        show=namespaces_show,
        store=namespaces_store,
        flags=PARENTS | FOUND,
        lines=True,
    ),
)
