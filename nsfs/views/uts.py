"""`uts/`: the UTS namespace as a tagged view (uts_namespaces(7)).

hostname   0644: what gethostname(2) answers inside; written, at most 64 bytes of printable
           characters
"""

from __future__ import annotations

from nsfs.attribute import Attribute, Caller, TagType, invalid, out_of_range
from nsfs.container import HOSTNAME_MAX, Face


async def hostname_show(face: Face) -> str:
    """The name, as the namespace has it now."""
    name: str = await face.world.spawner.hostname(_tag(face))
    return name + "\n"


async def hostname_store(face: Face, value: str, caller: Caller) -> None:
    """Set it; EINVAL for characters that are no part of a name, ERANGE when it is too long."""
    name = value.strip()
    if not name or not name.isprintable() or any(c.isspace() for c in name):
        raise invalid(value)
    if len(name.encode()) > HOSTNAME_MAX:
        raise out_of_range(value)
    await face.world.spawner.set_hostname(_tag(face), name)


def _tag(face: Face) -> int:
    """A process in the container's UTS namespace, by the host's PID."""
    return face.container.init_pid


FILES = (
    TagType("uts", entries=(Attribute("hostname", show=hostname_show, store=hostname_store),)),
)
