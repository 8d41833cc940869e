"""`pid/`: a PID namespace as a tagged view (pid_namespaces(7)).

tree   0444: its processes and those of the PID namespaces nested in it, one a line, children
       indented below their parents, from the 64th generation on no further: `PID COMMAND`, the PID
       being the viewer's
max    0644: the limit of its PIDs, which are below (Linux 6.14; before that there is one for all,
       which cannot be written here: EOPNOTSUPP)
last   0444: the last PID that was given out
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from nsfs import members, sysctl
from nsfs.attribute import FOUND, Attribute, Caller, TagType, parse_int
from nsfs.container import Container, Face
from nsfs.view import PROC, in_thread, tag

KIND = ("pid",)
INDENT_MAX = 64
"""Generations: a chain of all processes would else take the square of their number."""
PID_MAX_LIMIT = 4 * 1024 * 1024
"""Of the whole machine (linux/threads.h)."""


async def tree_show(face: Face) -> str:
    """The processes as they are now."""
    container = tag(face, VIEW)
    pids = set(members.host_pids(container))
    below = [each for each in container.descendants() if each.alive()]
    pids.update(each.init_pid for each in (container, *below) if each.init_pid)
    depth = members.level(face.viewpoint)
    return await in_thread(lambda: _drawn(pids, depth), PROC, container)


def _drawn(pids: Iterable[int], depth: int) -> str:
    children: dict[int, list[tuple[int, int, str]]] = {}
    known: set[int] = set()
    for pid in sorted(pids):
        try:
            parent, seen, command = members.family(pid, depth)
        except FileNotFoundError:
            continue
        if seen:
            known.add(pid)
            children.setdefault(parent, []).append((pid, seen, command))
    rows: list[str] = []
    tops = [row for parent in children if parent not in known for row in children[parent]]
    waiting = [(0, row) for row in sorted(tops, reverse=True)]
    while waiting:
        indent, (pid, seen, command) = waiting.pop()
        rows.append(f"{'  ' * min(indent, INDENT_MAX)}{seen} {command}\n")
        waiting += [(indent + 1, row) for row in sorted(children.get(pid, ()), reverse=True)]
    return "".join(rows)


async def max_show(face: Face) -> str:
    """`kernel.pid_max` as its processes see it."""
    return (await sysctl.read(tag(face, VIEW), KIND, "kernel/pid_max")).decode()


async def max_store(face: Face, value: str, caller: Caller) -> None:
    """Set it: EINVAL for what is no number or what the kernel does not take."""
    wanted = parse_int(value, 1, PID_MAX_LIMIT)
    container: Container = tag(face, VIEW)
    if container.parent is None:
        raise PermissionError(errno.EPERM, "the host's own limit is not nsfs's to change", "max")
    try:
        await sysctl.write(container, KIND, "kernel/pid_max", str(wanted))
    except PermissionError as error:
        # The file is then the host's, and the container's root may not write it.
        raise OSError(errno.EOPNOTSUPP, "this kernel has one limit for all", "max") from error


async def last_show(face: Face) -> str:
    """`kernel.ns_last_pid` as its processes see it."""
    return (await sysctl.read(tag(face, VIEW), KIND, "kernel/ns_last_pid")).decode()


VIEW = TagType(
    "pid",
    entries=(
        Attribute("tree", show=tree_show, flags=FOUND),
        Attribute("max", show=max_show, store=max_store, flags=FOUND),
        Attribute("last", show=last_show, flags=FOUND),
    ),
    flags=FOUND,
)
FILES = (VIEW,)
