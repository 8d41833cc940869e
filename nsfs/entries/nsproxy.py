"""`nsproxy/` and `namespaces`: the namespaces that a container consists of.

nsproxy/TYPE   a link for each of the kernel's eight types to what can be opened and given to
               setns(2)
namespaces     0644, a line for each type, `syslog` among them: `TYPE ID own`, or `TYPE ID PATH`
               where it is another container's, PATH leading there from this directory.  ID is the
               inode number that lsns(8) prints; for `syslog` it is nsfs's own number.
"""

from __future__ import annotations

import errno

from nsfs import members, namespaces
from nsfs.attribute import Attribute, Directory, Link, lines
from nsfs.container import Face


def namespaces_show(face: Face) -> str:
    """A line for each type, in the order of names."""
    container = face.container
    container.check_alive()
    rows = []
    pid = "self" if container.parent is None else container.init_pid
    for kind in sorted((*namespaces.SORTED, namespaces.SYSLOG)):
        holder = container.holder(kind)
        where = "own" if holder is container else face.path_to(holder)
        try:
            ident = holder.number if kind == namespaces.SYSLOG else namespaces.identity(pid, kind)
        except FileNotFoundError as error:
            raise OSError(errno.ENODEV, "the container is dead", container.name) from error
        rows.append(f"{kind} {ident} {where}")
    return lines(rows)


def _target(kind: str) -> Link:
    async def target(face: Face) -> str:
        container = face.container
        if face.inner or container.parent is None:
            # The viewer is in it: its own are the container's.  (The init's cannot be opened from
            # inside.)
            return f"/proc/self/ns/{kind}"
        container.check_alive()
        depth = members.level(face.viewpoint)
        if not depth:
            return f"/proc/{container.init_pid}/ns/{kind}"
        try:
            pinned: str = await container.world.pin(face, kind)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            # A mount namespace can be held by a mount in an older one only, and Linux 6.18, which
            # numbers them for each CPU, does not always know which that is.
            return f"/proc/{members.seen_pid(container.init_pid, depth)}/ns/{kind}"
        return pinned

    return Link(kind, target=target)


FILES = (
    Directory("nsproxy", entries=tuple(_target(kind) for kind in namespaces.SORTED), mode=0o755),
    Attribute("namespaces", show=namespaces_show),
)
