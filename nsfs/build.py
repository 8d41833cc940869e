"""The record of a construction: what a container is built of, and on whose word."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from nsfs import namespaces


class Origin(NamedTuple):
    """Whose word a path is: it is resolved in that viewpoint's mount namespace (by the container's
    number, 0 the host's) and with that user's rights (the host's IDs), whoever makes the container.
    """

    viewpoint: int
    uid: int
    gid: int


HOST_ORIGIN = Origin(0, 0, 0)


class Console(NamedTuple):
    """Where records of a container's log are echoed, those of a level below `level`."""

    target: str = "none"
    """`none`, `parent`, or the path of a terminal."""
    level: int = 0
    origin: Origin = HOST_ORIGIN
    device: tuple[int, ...] = ()
    """Of the terminal: st_dev, st_rdev, st_uid."""


NO_CONSOLE = Console()


class LogLimits(NamedTuple):
    """Of a container's kernel log: bytes, records a second and at once (None: no limit)."""

    bytes: int
    rate: int | None
    burst: int | None


@dataclass(frozen=True, slots=True)
class Build:
    """How a container is built: what `defaults/` gives to a child and its own files can change.

    `rootfs` is a path, or "host" for the parent's root filesystem alone; `idmap` is "auto", "host"
    or lines of a map; `binds` are lines (target, source, "ro" or "rw"); `seccomp` is what becomes
    of syslog(2), "notify" or "deny"; `limits` are cgroup v2's names.
    """

    unshare: tuple[str, ...] = (*namespaces.SORTED, namespaces.SYSLOG)
    rootfs: str = "host"
    rootfs_origin: Origin = HOST_ORIGIN
    idmap: str = "auto"
    binds: tuple[tuple[str, str, str], ...] = ()
    binds_origin: Origin = HOST_ORIGIN
    network: str = "none"
    seccomp: str = "notify"
    limits: tuple[tuple[str, str], ...] = (("pids.max", "4096"),)
    shared: tuple[tuple[str, int], ...] = ()
    """Types whose namespace is that of another container, which it is not in, and its number."""
    propagation: str = "private"
    """Whether what the host mounts later below a tree of its is seen in it: "slave", or not."""
    clocks: tuple[tuple[int, int], tuple[int, int]] | None = None
    """The offsets of CLOCK_MONOTONIC and CLOCK_BOOTTIME in its time namespace, from the host's, in
    seconds and nanoseconds; None: those of the parent's."""

    @property
    def types(self) -> frozenset[str]:
        """The kernel's namespace types that it gets of its own."""
        return _types(self.unshare, self.network, self.shared)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Build:
        """The inverse of `record`."""
        return cls(
            unshare=tuple(record["unshare"]),
            rootfs=record["rootfs"],
            rootfs_origin=Origin(*record["rootfs_origin"]),
            idmap=record["idmap"],
            binds=tuple((t, s, m) for t, s, m in record["binds"]),
            binds_origin=Origin(*record["binds_origin"]),
            network=record["network"],
            seccomp=record.get("seccomp", "deny"),
            limits=tuple((k, v) for k, v in record["limits"]),
            shared=tuple((kind, number) for kind, number in record.get("shared", ())),
            propagation=record.get("propagation", "private"),
            clocks=clocks_from_record(record.get("clocks")),
        )

    def record(self) -> dict[str, Any]:
        """As JSON can have it."""
        return {name: getattr(self, name) for name in BUILD_FIELDS}


def clocks_from_record(record: Any) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """What JSON made of `Build.clocks`."""
    if record is None:
        return None
    (s1, n1), (s2, n2) = record
    return (s1, n1), (s2, n2)


BUILD = Build()
"""What is so where nobody says otherwise."""


@functools.lru_cache(256)
def _types(
    unshare: tuple[str, ...], network: str, shared: tuple[tuple[str, int], ...]
) -> frozenset[str]:
    own = set(unshare)
    if network == "host":
        own.discard("net")
    own.difference_update(kind for kind, _ in shared)
    return frozenset(own & namespaces.ALL)


BUILD_FIELDS: tuple[str, ...] = tuple(Build.__dataclass_fields__)
ORIGINS = ("rootfs_origin", "binds_origin")
