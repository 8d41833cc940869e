"""`uts/`: the UTS namespace as a tagged view (uts_namespaces(7)).

hostname     0644: what gethostname(2) answers inside; written, at most 64 bytes of printable
             characters
domainname   0644: the NIS domain name (getdomainname(2)), likewise; `(none)` when there is none
"""

from __future__ import annotations

from nsfs.attribute import Attribute, Caller, TagType, invalid, out_of_range
from nsfs.container import HOSTNAME_MAX, Face
from nsfs.view import inside, tag

DOMAINNAME = "/proc/sys/kernel/domainname"
"""Of the UTS namespace of whoever reads or writes it, whoever opened it."""


async def hostname_show(face: Face) -> str:
    """The name, as the namespace has it now."""
    name: str = await face.world.spawner.hostname(tag(face, VIEW).init_pid)
    return name + "\n"


async def hostname_store(face: Face, value: str, caller: Caller) -> None:
    """Set it; EINVAL for characters that are no part of a name, ERANGE when it is too long."""
    await face.world.spawner.set_hostname(tag(face, VIEW).init_pid, _name(value))


async def domainname_show(face: Face) -> bytes:
    """The name, as the namespace has it now."""
    return await inside(tag(face, VIEW), ("uts",), _read)


async def domainname_store(face: Face, value: str, caller: Caller) -> None:
    """Set it, with the errors of `hostname`."""
    name = _name(value).encode() + b"\n"
    await inside(tag(face, VIEW), ("uts",), lambda: _write(name))


def _name(value: str) -> str:
    name = value.strip()
    if not name or not name.isprintable() or any(c.isspace() for c in name):
        raise invalid(value)
    if len(name.encode()) > HOSTNAME_MAX:
        raise out_of_range(value)
    return name


def _read() -> bytes:
    with open(DOMAINNAME, "rb") as file:
        return file.read()


def _write(name: bytes) -> None:
    with open(DOMAINNAME, "wb", buffering=0) as file:
        file.write(name)


VIEW = TagType(
    "uts",
    entries=(
        Attribute("hostname", show=hostname_show, store=hostname_store),
        Attribute("domainname", show=domainname_show, store=domainname_store),
    ),
)
FILES = (VIEW,)
