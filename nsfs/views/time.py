"""`time/`: a time namespace as a tagged view (time_namespaces(7)).

monotonic boottime   0644: by how much that clock differs from the host's, as SECONDS NANOSECONDS;
                     written (the nanoseconds may be left out) they rebuild the container, which
                     must be idle
"""

from __future__ import annotations

import dataclasses
import errno

from nsfs.attribute import FOUND, PARENTS, Attribute, Caller, TagType, invalid, parse_int
from nsfs.container import Container, Face
from nsfs.kernfs import read
from nsfs.rebuild import rebuild
from nsfs.view import tag

CLOCKS = ("monotonic", "boottime")
SECONDS_MAX = 2**63 // 10**9
"""What a time in the kernel can be (KTIME_SEC_MAX); of an offset it takes half (ERANGE)."""


def offsets(container: Container) -> tuple[tuple[int, int], tuple[int, int]]:
    """Both, by the kernel's word."""
    if container.parent is None:
        return (0, 0), (0, 0)
    found = {}
    for line in read(f"/proc/{container.init_pid}/timens_offsets").splitlines():
        name, seconds, nanoseconds = line.split()
        found[name] = (int(seconds), int(nanoseconds))
    return found["monotonic"], found["boottime"]


def parse_offset(value: str) -> tuple[int, int]:
    """SECONDS [NANOSECONDS]; the nanoseconds are added, whatever the sign of the seconds."""
    words = value.split()
    if not 1 <= len(words) <= 2:
        raise invalid(value)
    nanoseconds = parse_int(words[1], 0, 10**9 - 1) if len(words) > 1 else 0
    return parse_int(words[0], -SECONDS_MAX, SECONDS_MAX), nanoseconds


def _clock(index: int) -> Attribute:
    def show(face: Face) -> str:
        return "{} {}\n".format(*offsets(tag(face, VIEW))[index])

    async def store(face: Face, value: str, caller: Caller) -> None:
        container = face.container
        wanted = parse_offset(value)
        if container.parent is None or not container.own("time"):
            raise OSError(errno.EOPNOTSUPP, "no time namespace of its own", container.name)
        both = offsets(container)
        clocks = (wanted, both[1]) if index == 0 else (both[0], wanted)
        if clocks != both:
            build = dataclasses.replace(container.build, clocks=clocks)
            await rebuild(container, build)

    return Attribute(CLOCKS[index], show=show, store=store, flags=PARENTS | FOUND)


VIEW = TagType("time", entries=(_clock(0), _clock(1)), flags=FOUND)
FILES = (VIEW,)
