"""`cgroup/`: limits and accounting by cgroup v2's names, whichever hierarchies the host runs
(Documentation/admin-guide/cgroup-v2.rst).

cpu.max cpu.weight io.max io.weight memory.high memory.low memory.max memory.swap.max pids.max
    0644: limits of the container with all that is nested in it; kept for as long as it is there.
    EOPNOTSUPP: no controller of this host has it.
memory.current memory.peak memory.swap.current memory.events pids.current pids.peak pids.events
cpu.stat io.stat memory.stat cpu.pressure io.pressure memory.pressure
    0444: accounting, nested containers included.  poll(2) tells of changes of the events.
"""

from __future__ import annotations

import functools

from nsfs.attribute import NOT_ON_ROOT, PARENTS, Attribute, Caller, Flags, TagType, Watchers
from nsfs.cgroup import Group
from nsfs.container import Container, Face
from nsfs.grouplimits import limit
from nsfs.limits import DEVICES, NAMES

NOTIFYING = ("memory.events", "pids.events")
ACCOUNTS = ("memory.current", "memory.peak", "memory.swap.current", "pids.current", "pids.peak")
HOSTS = ("cpu.stat", "io.stat", "memory.stat", "cpu.pressure", "io.pressure", "memory.pressure")
"""Accounts that the host has too."""


def _group(container: Container) -> Group:
    if container.parent is None:
        return Group.host(container.world.hierarchies)
    container.check_alive()
    return container.group


def _show(name: str, face: Face) -> str:
    text = _group(face.container).get(name)
    return f"{text}\n" if text else ""


def _limit_show(name: str, face: Face) -> str:
    group = _group(face.container)
    text = group.get(name) if name in DEVICES else group.shown(name, face.container.build.limits)
    return f"{text}\n" if text else ""


async def _limit_store(name: str, face: Face, value: str, caller: Caller) -> None:
    """A line for each device, where there are several; else one value."""
    container = face.container
    container.check_alive()
    lines = value.splitlines() if name in DEVICES and value else [value]
    await limit(container, name, lines)


def _watch(name: str, face: Face) -> Watchers:
    return face.world.notices.of(face.container, name)


def _account(name: str, flags: Flags) -> Attribute:
    return Attribute(
        name,
        show=functools.partial(_show, name),
        watch=functools.partial(_watch, name) if name in NOTIFYING else None,
        flags=flags,
    )


FILES = (
    TagType(
        "cgroup",
        # Limits are the container's, whichever cgroup namespace it is in.
        tag=lambda face: face.container,
        entries=(
            *(
                Attribute(
                    name,
                    show=functools.partial(_limit_show, name),
                    store=functools.partial(_limit_store, name),
                    flags=NOT_ON_ROOT | PARENTS,
                )
                for name in NAMES
            ),
            *(_account(name, NOT_ON_ROOT) for name in (*ACCOUNTS, *NOTIFYING)),
            *(_account(name, Flags.NONE) for name in HOSTS),
        ),
    ),
)
