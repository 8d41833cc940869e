"""How a container is built: `rootfs`, `idmap`, `unshare`, `seccomp`, `binds`, and `defaults/` for
those made in it.

rootfs   0644: `host` (the parent's root filesystem alone, read-only) or an absolute path as the
         writer sees it
idmap    0644: `auto`, `host` (the parent's own IDs), or lines `INSIDE PARENT COUNT`
unshare  0644: the types that it has namespaces of its own of; `syslog` is one of them
binds    0644: lines `TARGET SOURCE ro` or `rw`, or with `,idmap`; blanks in paths as \\040
seccomp  0644: what becomes of syslog(2): `notify` (it acts on the container's log, by seccomp user
         notification) or `deny` (EPERM, and members may use such notification themselves)
network  0644: `none` (its own, with loopback up), `veth` (its own, with an interface that has an
         address and a default route to the parent) or `host` (the parent's)
limits   in `defaults/` only: lines `NAME VALUE`, named as in cgroup v2
log      in `defaults/` only: see `loglimits`

Written to a container they rebuild it, which must be idle (EBUSY); only `binds` is changed in one
that runs.  In `defaults/` they are what
mkdir gives to a child; what was never written there is inherited, and an empty value goes back to
that.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from typing import Any

from nsfs import idmap, limits, namespaces
from nsfs.attribute import (
    NOT_ON_ROOT,
    PARENTS,
    Attribute,
    Caller,
    Directory,
    flat_keyed,
    invalid,
    lines,
    one_line,
    parse_words,
    unescape,
)
from nsfs.build import ORIGINS, Origin
from nsfs.config import BIND_MODES, NETWORKS
from nsfs.container import Face
from nsfs.entries import loglimits
from nsfs.limits import Limits
from nsfs.rebind import rebind
from nsfs.rebuild import rebuild

OF_LINES = ("binds", "idmap", "limits")


def _absolute(path: str) -> str:
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise invalid(path)
    return os.path.normpath(path).replace("//", "/")


def parse_rootfs(value: str) -> str:
    """`host` or an absolute path."""
    return value if value == "host" else _absolute(value)


def format_rootfs(rootfs: str) -> str:
    """The inverse."""
    return f"{rootfs}\n"


def parse_idmap(value: str) -> str:
    """`auto`, `host` or lines of a map, which come back as they would be written."""
    if value in ("auto", "host"):
        return value
    return "\n".join(" ".join(map(str, line)) for line in idmap.parse(value))


def format_idmap(text: str) -> str:
    """The inverse."""
    return f"{text}\n"


def parse_unshare(value: str) -> tuple[str, ...]:
    """Names of types, in the order of names."""
    return tuple(sorted(parse_words(value, (*namespaces.TYPES, namespaces.SYSLOG))))


def format_unshare(types: tuple[str, ...]) -> str:
    """The inverse."""
    return " ".join(types) + "\n"


def parse_binds(value: str) -> tuple[tuple[str, str, str], ...]:
    """Lines TARGET SOURCE ro|rw[,idmap]."""
    result: dict[str, tuple[str, str, str]] = {}
    for line in value.splitlines():
        words = line.split()
        if len(words) != 3 or words[2] not in BIND_MODES:
            raise invalid(line)
        target, source = (_absolute(unescape(word)) for word in words[:2])
        if target == "/" or target in result:
            raise invalid(line)
        result[target] = (target, source, words[2])
    return tuple(result.values())


def format_binds(binds: tuple[tuple[str, str, str], ...]) -> str:
    """The inverse."""
    return lines(f"{one_line(target)} {one_line(source)} {mode}" for target, source, mode in binds)


def parse_network(value: str) -> str:
    """`none`, `host` or `veth`."""
    if value not in NETWORKS:
        raise invalid(value)
    return value


def format_network(network: str) -> str:
    """The inverse."""
    return f"{network}\n"


def parse_seccomp(value: str) -> str:
    """`notify` or `deny`."""
    if value not in ("notify", "deny"):
        raise invalid(value)
    return value


def format_seccomp(seccomp: str) -> str:
    """The inverse."""
    return f"{seccomp}\n"


def parse_limits(value: str) -> Limits:
    """Lines NAME VALUE; whether the kernel takes a value is seen when it is given to it."""
    return limits.parse_lines(line for line in value.splitlines() if line.strip())


def format_limits(chosen: Limits) -> str:
    """The inverse."""
    return flat_keyed(chosen)


def _check_limits(face: Face, chosen: Limits) -> None:
    for name, _ in chosen:
        if not face.world.hierarchies.has(name):
            raise OSError(errno.EOPNOTSUPP, "no controller of this host has it", name)


Parse = Callable[[str], Any]
Format = Callable[[Any], str]

PARTS: dict[str, tuple[Parse, Format]] = {
    "rootfs": (parse_rootfs, format_rootfs),
    "idmap": (parse_idmap, format_idmap),
    "unshare": (parse_unshare, format_unshare),
    "binds": (parse_binds, format_binds),
    "seccomp": (parse_seccomp, format_seccomp),
    "network": (parse_network, format_network),
    "limits": (parse_limits, format_limits),
}


def _origin(name: str, face: Face, caller: Caller) -> dict[str, Origin]:
    """Whose word the paths of a part are, where it has any."""
    if f"{name}_origin" not in ORIGINS:
        return {}
    return {f"{name}_origin": Origin(face.viewpoint.number, caller.uid, caller.gid)}


async def _check_view(name: str, changes: dict[str, Any], face: Face, caller: Caller) -> None:
    """EXDEV for a path that leads whoever writes it somewhere else; see `World.check_view`."""
    value, origin = changes[name], changes.get(f"{name}_origin")
    if origin is None or value == "host" or not caller.writer:
        return
    paths = [value] if name == "rootfs" else [source for _, source, *_ in value]
    await face.world.check_view(origin, paths, caller.writer)


def _own(name: str) -> Attribute:
    parse, form = PARTS[name]

    def show(face: Face) -> str:
        return form(getattr(face.container.build, name))

    async def store(face: Face, value: str, caller: Caller) -> None:
        container = face.container
        changes = {name: parse(value), **_origin(name, face, caller)}
        await _check_view(name, changes, face, caller)
        changed = dataclasses.replace(container.build, **changes)
        if changed.binds != container.build.binds:
            await rebind(container, changed)
        elif changed != container.build:
            await rebuild(container, changed)

    return Attribute(
        name, show=show, store=store, flags=NOT_ON_ROOT | PARENTS, lines=name in OF_LINES
    )


def _default(name: str) -> Attribute:
    parse, form = PARTS[name]

    def show(face: Face) -> str:
        return form(face.container.default(name))

    async def store(face: Face, value: str, caller: Caller) -> None:
        container = face.container
        container.check_alive()
        if not value.strip() and name not in ("binds", "unshare", "limits"):
            container.defaults.pop(name, None)
            container.defaults.pop(f"{name}_origin", None)
        else:
            parsed = parse(value)
            if name == "limits":
                _check_limits(face, parsed)
            changes = {name: parsed, **_origin(name, face, caller)}
            await _check_view(name, changes, face, caller)
            container.defaults.update(changes)
        container.save()

    return Attribute(name, show=show, store=store, lines=name in OF_LINES)


FILES = (
    *(_own(name) for name in ("rootfs", "idmap", "unshare", "seccomp", "binds", "network")),
    Directory("defaults", entries=(*(_default(name) for name in PARTS), loglimits.DEFAULT)),
)
