"""`state`, `init`, `freeze` and `kill`: how a container is, and what becomes of its processes.

state   flat-keyed, 0444: `populated` (1 when it or a container in it has a member besides the
        inits), `frozen`, `procs` (members, those of nested containers included, no init among
        them), `containers` (nested in it), `oom_kill` (how many processes of it were killed for
        want of memory), `reason` (why the last operation on it failed, where
        errno says too little).  poll(2) tells of changes by POLLPRI.
init    the PID of its init as the viewer knows it, 0444; ENODEV when it is dead.
freeze  0 or 1, 0644: suspend or resume all of it.  What is suspended can still be killed.
kill    0200: 1 or a signal's name (TERM or SIGTERM), to every member but the inits; the container
        stays.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator

import trio

from nsfs import leaf, members, notices
from nsfs.attribute import (
    FOUND,
    NOT_ON_ROOT,
    PARENTS,
    Answer,
    Attribute,
    Caller,
    Watchers,
    flat_keyed,
    invalid,
    parse_bool,
)
from nsfs.container import Container, Face, Phase
from nsfs.found import Found


def populated(container: Container) -> bool:
    """Whether it or a container in it has a member besides the inits."""
    return any(_look(each)[0] or each.populated_away() for each in _all(container))


def _look(container: Container) -> tuple[int, int]:
    """`populated` and `frozen` by its own groups.

    What is shown is what was seen: so who polls is told of the next change, even if it is back at
    what it was before by the time that the kernel tells of it.
    """
    container.world.look_at(container)
    if container.settled.is_set() and container.phase is not Phase.GONE:
        return container.seen[:2]
    return container.group.events("payload")["populated"], container.group.events()["frozen"]


def _all(container: Container) -> Iterator[Container]:
    yield container
    yield from container.descendants()


async def _found_show(face: Face, found: Found) -> str:
    """What can be said of a container that nsfs did not make."""
    await face.world.look(0.0)
    return flat_keyed(
        (
            ("populated", int(any(found.host_pids()))),
            ("procs", members.count(found)),
            ("containers", sum(1 for _ in found.nested()) - 1),
            ("reason", found.reason or "-"),
        )
    )


def state_show(face: Face) -> Answer[str]:
    """Everything as it is now."""
    container = face.container
    if isinstance(container, Found):
        return _found_show(face, container)
    top = container.parent is None
    return flat_keyed(
        (
            ("populated", 1 if top else int(populated(container))),
            ("frozen", 0 if top else _look(container)[1]),
            ("procs", members.count(container)),
            ("containers", sum(1 for _ in container.descendants())),
            ("oom_kill", notices.oom_kills(container)),
            ("reason", container.reason or "-"),
        )
    )


def state_watch(face: Face) -> Watchers:
    """Where changes of the state are told."""
    container = face.container
    if container.is_found:
        return container.changed
    container.changed.begin = functools.partial(face.world.notices.begin, container)
    return container.changed


def init_show(face: Face) -> str:
    """The PID in the viewpoint's PID namespace; 0 when that namespace cannot name it."""
    container = face.container
    container.check_alive()
    return f"{members.seen_pid(container.init_pid, members.level(face.viewpoint))}\n"


def freeze_show(face: Face) -> str:
    """What was last written, whatever becomes of the ancestors."""
    return f"{int(face.container.group.frozen_by_itself())}\n"


async def freeze_store(face: Face, value: str, caller: Caller) -> None:
    """Suspend or resume."""
    on = parse_bool(value)
    face.container.check_alive()
    if on:
        await face.container.suspend()
    else:
        face.container.group.freeze(False)
    leaf.freeze_away(face.container)
    face.container.tell()


async def kill_store(face: Face, value: str, caller: Caller) -> None:
    """Send the signal; EINVAL for what is no signal's name."""
    word = value.strip().upper()
    if word == "1":
        word = "KILL"
    try:
        number = signal.Signals["SIG" + word.removeprefix("SIG")]
    except KeyError:
        raise invalid(value) from None
    container = face.container
    if isinstance(container, Found):
        container.check_may_be_killed()
        await container.signal(number)
        return
    container.check_alive()
    async with trio.open_nursery() as nursery:
        for each in (container, *container.descendants()):
            nursery.start_soon(each.group.signal, number)
        leaf.signal_away(container, number)


FILES = (
    Attribute("init", show=init_show),
    Attribute("state", show=state_show, watch=state_watch, flags=FOUND),
    Attribute("freeze", show=freeze_show, store=freeze_store, flags=NOT_ON_ROOT | PARENTS),
    Attribute("kill", store=kill_store, flags=NOT_ON_ROOT | FOUND),
)
