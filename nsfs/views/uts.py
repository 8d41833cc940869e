"""`uts/`: the UTS namespace as a tagged view (uts_namespaces(7)).

hostname     0644: what gethostname(2) answers inside; written, at most 64 bytes of printable
             characters
domainname   0644: the NIS domain name (getdomainname(2)), likewise; `(none)` when there is none
"""

from __future__ import annotations

import os
import select
from collections.abc import Awaitable, Callable

from nsfs.attribute import FOUND, Answer, Attribute, Caller, TagType, invalid, out_of_range
from nsfs.container import HOSTNAME_MAX, Container, Face
from nsfs.view import inside, tag

HOSTNAME = "/proc/sys/kernel/hostname"
DOMAINNAME = "/proc/sys/kernel/domainname"
"""Of the UTS namespace of whoever reads or writes it, whoever opened it."""
KNOWN_MAX = 256


class Name:
    """A name, as many namespaces have it.

    To ask for one takes a process or a thread that joins its namespace.  So what was told is
    remembered until poll(2) of the file tells that one was changed, of whichever namespace
    (proc_sys_poll(), uts_proc_notify() in the kernel): before whoever did that goes on.
    """

    def __init__(self, path: str, ask: Callable[[Container], Awaitable[str]]) -> None:
        self._path = path
        self._ask = ask
        self._poll: select.poll | None = None
        self._known: dict[tuple[int, int], str] = {}

    def show(self, face: Face) -> Answer[str]:
        """The name, as the namespace has it now."""
        container = tag(face, VIEW)
        if self._changed() or len(self._known) >= KNOWN_MAX:
            self._known = {}
        known = self._known.get((container.number, container.init_pid))
        return known if known is not None else self._tell(container)

    async def _tell(self, container: Container) -> str:
        # Should one change meanwhile, this is not the table that is looked at from then on.
        table, key = self._known, (container.number, container.init_pid)
        name = table[key] = await self._ask(container)
        return name

    def _changed(self) -> bool:
        if self._poll is None:
            # It stays open: one for all containers.
            self._poll = select.poll()
            self._poll.register(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC), select.POLLPRI)
        return bool(self._poll.poll(0))


def _has_init(container: Container) -> bool:
    """Whether the spawner knows a process in it: that of the host may not be looked at."""
    return container.parent is not None and not container.is_found


async def _hostname(container: Container) -> str:
    if not _has_init(container):
        return await _read_there(container, HOSTNAME)
    name: str = await container.world.spawner.hostname(container.init_pid)
    return name + "\n"


async def _domainname(container: Container) -> str:
    return await _read_there(container, DOMAINNAME)


async def _read_there(container: Container, path: str) -> str:
    name = await inside(container, ("uts",), lambda: _read(path))
    return name.decode("utf-8", "surrogateescape")


async def hostname_store(face: Face, value: str, caller: Caller) -> None:
    """Set it; EINVAL for characters that are no part of a name, ERANGE when it is too long."""
    container, name = tag(face, VIEW), _name(value)
    if _has_init(container):
        await face.world.spawner.set_hostname(container.init_pid, name)
    else:
        await inside(container, ("uts",), lambda: _write(HOSTNAME, name))


async def domainname_store(face: Face, value: str, caller: Caller) -> None:
    """Set it, with the errors of `hostname`."""
    name = _name(value)
    await inside(tag(face, VIEW), ("uts",), lambda: _write(DOMAINNAME, name))


def _name(value: str) -> str:
    name = value.strip()
    if not name or not name.isprintable() or any(c.isspace() for c in name):
        raise invalid(value)
    if len(name.encode()) > HOSTNAME_MAX:
        raise out_of_range(value)
    return name


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _write(path: str, name: str) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(name.encode() + b"\n")


VIEW = TagType(
    "uts",
    entries=(
        Attribute(
            "hostname", show=Name(HOSTNAME, _hostname).show, store=hostname_store, flags=FOUND
        ),
        Attribute(
            "domainname",
            show=Name(DOMAINNAME, _domainname).show,
            store=domainname_store,
            flags=FOUND,
        ),
    ),
    flags=FOUND,
)
FILES = (VIEW,)
