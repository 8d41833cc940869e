"""rtnetlink(7): the interfaces, addresses and routes of one network namespace.

A socket belongs to the namespace that the thread was in which opened it, from wherever it is used,
and keeps that namespace alive: so it is closed after each use.  Every call may wait for the
kernel's RTNL lock: only threads make them.

Constants and layouts are those of linux/netlink.h, linux/rtnetlink.h, linux/if_link.h,
linux/if_addr.h.  Only what nsfs needs is here: pyroute2, which has all of it, would cost the daemon
another 25 MB.  What the kernel says about an error (NETLINK_EXT_ACK) is the error's text.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Self

NAME_MAX = 15
"""The longest name of an interface in bytes (IFNAMSIZ, less the NUL)."""
ALTNAME_MAX = 127
"""The longest alternative name (ALTIFNAMSIZ)."""

_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_NEWLINKPROP, _DELLINKPROP = 108, 109
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP_INTERRUPTED = 0x1, 0x4, 0x10
_DUMP = 0x300
_REPLACE, _EXCLUSIVE, _CREATE = 0x100, 0x200, 0x400
_CAPPED, _ACK_TLVS = 0x100, 0x200
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF
_SOL_NETLINK = 270
_CAP_ACK, _EXT_ACK, _STRICT_CHECK = 10, 11, 12
_RECEIVED_MAX = 1 << 17
_TRIES = 5
DUMP_MAX = 65536
"""How much of something is looked at: of routes there may be millions."""

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEXTHOP = struct.Struct("=HBBi")
_U32 = struct.Struct("=I")

_IFLA_IFNAME, _IFLA_LINK, _IFLA_LINKINFO = 3, 5, 18
_IFLA_NET_NS_FD, _IFLA_EXT_MASK, _IFLA_PROP_LIST, _IFLA_ALT_IFNAME = 28, 29, 52, 53
_INFO_KIND, _INFO_DATA, _VETH_PEER, _VLAN_ID = 1, 2, 1, 1
_SKIP_STATISTICS = 8
_IFF_UP = 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS, _IFA_PROTO = 1, 2, 8, 11
_IFA_F_TEMPORARY = 1
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA, _RTA_PREF = 9, 15, 18, 20
_RTA_CACHEINFO = 12
_READ_ATTRIBUTES = frozenset(
    (_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_MULTIPATH)
) | {_RTA_TABLE, _RTA_VIA, _RTA_PREF, _RTA_CACHEINFO}
_LO, _LOOPBACK = 1, bytes((127, 0, 0, 1))
_TABLE_MAIN = 254
_RTNH_F_ONLINK = 4

UNICAST, BLACKHOLE, UNREACHABLE, PROHIBIT, THROW = 1, 6, 7, 8, 9
SCOPE_GLOBAL, SCOPE_SITE, SCOPE_LINK, SCOPE_HOST = 0, 200, 253, 254
PROTO_REDIRECT, PROTO_KERNEL, PROTO_BOOT, PROTO_RA = 1, 2, 3, 9
METRIC_V6 = 1024
"""What the kernel gives an IPv6 route that has none (IP6_RT_PRIO_USER)."""

IP = ipaddress.IPv4Address | ipaddress.IPv6Address


class Link(NamedTuple):
    """An interface."""

    ifindex: int
    name: str
    altnames: tuple[str, ...]
    kind: str
    """`veth`, `vlan`...; "" for one that has no type of link."""
    up: bool


@dataclass(frozen=True, slots=True)
class Address:
    """An address of an interface; `proto` is that of the kernel's own (IFAPROT_*), else 0."""

    local: IP
    prefix: int
    peer: IP | None = None
    proto: int = 0


class Nexthop(NamedTuple):
    """Where a route leads to: `weight` counts in comparison with the route's others."""

    gateway: IP | None = None
    ifindex: int = 0
    weight: int = 1
    onlink: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the main table.  `strange` ones have what is not read here."""

    family: int
    destination: IP
    prefix: int
    kind: int = UNICAST
    nexthops: tuple[Nexthop, ...] = ()
    source: IP | None = None
    metric: int = 0
    proto: int = PROTO_BOOT
    scope: int = SCOPE_GLOBAL
    strange: bool = False


class Rtnetlink:
    """A socket in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        for option in (_CAP_ACK, _EXT_ACK, _STRICT_CHECK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    # --- interfaces ---

    def links(self) -> list[Link]:
        """All interfaces."""
        body = _LINK.pack(0, 0, 0, 0, 0) + _pack(_IFLA_EXT_MASK, _U32.pack(_SKIP_STATISTICS))
        return [_read_link(each) for each in self._dump(_GETLINK, body)]

    def link(self, name: str) -> Link:
        """The interface of that name, alternative ones included; ENODEV when there is none."""
        raw = os.fsencode(name)
        kind = _IFLA_IFNAME if len(raw) <= NAME_MAX else _IFLA_ALT_IFNAME
        if len(raw) > ALTNAME_MAX:
            raise OSError(errno.ENODEV, "no such interface", name)
        body = _LINK.pack(0, 0, 0, 0, 0) + _pack(kind, raw + b"\0")
        body += _pack(_IFLA_EXT_MASK, _U32.pack(_SKIP_STATISTICS))
        (found,) = self._ask(_GETLINK, body, 0, name)
        return _read_link(found)

    def make_veth(self, name: str, ns_fd: int, peer: str, peer_ns_fd: int) -> None:
        """A pair of interfaces, each in a namespace; EEXIST when a name is taken there."""
        other = _LINK.pack(0, 0, 0, 0, 0) + _name(peer)
        other += _pack(_IFLA_NET_NS_FD, _U32.pack(peer_ns_fd))
        info = _pack(_INFO_KIND, b"veth")
        info += _pack(_INFO_DATA | _NESTED, _pack(_VETH_PEER | _NESTED, other))
        body = _LINK.pack(0, 0, 0, 0, 0) + _name(name)
        body += _pack(_IFLA_NET_NS_FD, _U32.pack(ns_fd)) + _pack(_IFLA_LINKINFO | _NESTED, info)
        self._ask(_NEWLINK, body, _CREATE | _EXCLUSIVE, name)

    def make_vlan(self, name: str, index: int, tag: int) -> None:
        """A VLAN on an interface; EOPNOTSUPP when the kernel has none."""
        info = _pack(_INFO_KIND, b"vlan")
        info += _pack(_INFO_DATA | _NESTED, _pack(_VLAN_ID, struct.pack("=H", tag)))
        body = _LINK.pack(0, 0, 0, 0, 0) + _name(name) + _pack(_IFLA_LINK, _U32.pack(index))
        body += _pack(_IFLA_LINKINFO | _NESTED, info)
        self._ask(_NEWLINK, body, _CREATE | _EXCLUSIVE, name)

    def delete_link(self, index: int) -> None:
        """Delete an interface; EOPNOTSUPP for one that cannot be, as the loopback."""
        self._ask(_DELLINK, _LINK.pack(0, 0, index, 0, 0))

    def rename_link(self, index: int, name: str, ns_fd: int | None = None) -> None:
        """Give an interface another name, in another namespace if one is given.

        EEXIST when it is taken there.  The kernel first moves it under the name that it has, if
        that is free there, so with a namespace it may have been moved all the same.
        """
        body = _LINK.pack(0, 0, index, 0, 0) + _name(name)
        if ns_fd is not None:
            body += _pack(_IFLA_NET_NS_FD, _U32.pack(ns_fd))
        self._ask(_SETLINK, body, 0, name)

    def set_up(self, index: int) -> None:
        """Set an interface up."""
        self._ask(_SETLINK, _LINK.pack(0, 0, index, _IFF_UP, _IFF_UP))

    def add_altname(self, index: int, name: str) -> None:
        """Give an interface an alternative name; EEXIST when it is taken."""
        self._altname(_NEWLINKPROP, _CREATE | _EXCLUSIVE, index, name)

    def delete_altname(self, index: int, name: str) -> None:
        """Take it back."""
        self._altname(_DELLINKPROP, 0, index, name)

    def _altname(self, kind: int, flags: int, index: int, name: str) -> None:
        one = _pack(_IFLA_ALT_IFNAME, os.fsencode(name) + b"\0")
        body = _LINK.pack(0, 0, index, 0, 0) + _pack(_IFLA_PROP_LIST | _NESTED, one)
        self._ask(kind, body, flags, name)

    # --- addresses ---

    def addresses(self, index: int) -> list[Address]:
        """The addresses of an interface, in the kernel's order; IPv4 first."""
        return [
            found
            for family in (socket.AF_INET, socket.AF_INET6)
            for body in self._dump(_GETADDR, _ADDRESS.pack(family, 0, 0, 0, index))
            if (found := _read_address(body, index)) is not None
        ]

    def add_address(self, index: int, address: Address) -> None:
        """Give an interface an address; EEXIST when it has it."""
        self._ask(_NEWADDR, _write_address(index, address), _CREATE | _EXCLUSIVE)

    def delete_address(self, index: int, address: Address) -> None:
        """Take it away; EADDRNOTAVAIL when it has it not."""
        self._ask(_DELADDR, _write_address(index, address))

    # --- routes ---

    def routes(self) -> list[Route]:
        """The main tables; IPv4 first."""
        return [
            found
            for family in (socket.AF_INET, socket.AF_INET6)
            for body in self._dump(
                _GETROUTE, _ROUTE.pack(family, 0, 0, 0, _TABLE_MAIN, 0, 0, 0, 0), (errno.ENOENT,)
            )
            if (found := _read_route(body)) is not None
        ]

    def add_route(self, route: Route) -> None:
        """Add a route; EEXIST when there is one to that destination with that metric."""
        self._ask(_NEWROUTE, _write_route(route), _CREATE | _EXCLUSIVE)

    def replace_route(self, route: Route) -> None:
        """Have it in the place of the one with that destination and metric."""
        self._ask(_NEWROUTE, _write_route(route), _CREATE | _REPLACE)

    def delete_route(self, route: Route) -> None:
        """Delete a route; ESRCH when there is none like it."""
        self._ask(_DELROUTE, _write_route(route))

    # --- messages ---

    def _ask(self, kind: int, body: bytes, flags: int = 0, about: str = "") -> list[bytes]:
        """Send one request; what came back before its acknowledgement."""
        self._send(kind, _REQUEST | _ACK | flags, body)
        found: list[bytes] = []
        while True:
            for answer, answer_flags, payload in self._receive():
                if answer == _ERROR:
                    _check(answer_flags, payload, about)
                    return found
                found.append(payload)

    def _dump(self, kind: int, body: bytes, none: tuple[int, ...] = ()) -> list[bytes]:
        """All of something; again when it changed meanwhile.  The errors in `none` are nothing."""
        for _ in range(_TRIES):
            found, whole = self._dump_once(kind, body, none)
            if whole:
                break
        return found

    def _dump_once(self, kind: int, body: bytes, none: tuple[int, ...]) -> tuple[list[bytes], bool]:
        self._send(kind, _REQUEST | _DUMP, body)
        found: list[bytes] = []
        whole = True
        while True:
            for answer, flags, payload in self._receive():
                whole = whole and not flags & _DUMP_INTERRUPTED
                if answer in (_ERROR, _DONE):
                    code = -struct.unpack_from("=i", payload)[0] if payload else 0
                    if code and code not in none:
                        raise OSError(code, f"rtnetlink: {os.strerror(code)}")
                    return found, whole
                found.append(payload)
                if len(found) > DUMP_MAX:
                    raise OSError(errno.EFBIG, "rtnetlink: more than is looked at")

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0)
        self._socket.send(header + body)

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        data = self._socket.recv(_RECEIVED_MAX)
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            if sequence == self._sequence:
                yield kind, flags, data[offset + _HEADER.size : offset + length]
            offset += (length + 3) & ~3


def _check(flags: int, payload: bytes, about: str) -> None:
    """The error of an acknowledgement, in the kernel's words where it has any."""
    code = -struct.unpack_from("=i", payload)[0]
    if not code:
        return
    text = f"rtnetlink: {os.strerror(code)}"
    if flags & _ACK_TLVS:
        at = 4 + _HEADER.size
        if not flags & _CAPPED:
            at = 4 + struct.unpack_from("=I", payload, 4)[0]
        for kind, value in _unpack(payload[at:]):
            if kind == 1:
                text = value.rstrip(b"\0").decode(errors="replace")
    raise OSError(code, text, about)


def _pack(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def _unpack(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            return
        yield kind & _TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _name(name: str) -> bytes:
    raw = os.fsencode(name)
    if len(raw) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "an interface's name is at most 15 bytes", name)
    if b"%" in raw:
        # To the kernel that is a pattern: it would choose the number.
        raise OSError(errno.EINVAL, "% cannot be in an interface's name", name)
    return _pack(_IFLA_IFNAME, raw + b"\0")


def _text(value: bytes) -> str:
    return os.fsdecode(value.rstrip(b"\0"))


def _read_link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    name = kind = ""
    altnames: tuple[str, ...] = ()
    for each, value in _unpack(body[_LINK.size :]):
        if each == _IFLA_IFNAME:
            name = _text(value)
        elif each == _IFLA_PROP_LIST:
            altnames = tuple(_text(v) for k, v in _unpack(value) if k == _IFLA_ALT_IFNAME)
        elif each == _IFLA_LINKINFO:
            kind = next((_text(v) for k, v in _unpack(value) if k == _INFO_KIND), "")
    return Link(index, name, altnames, kind, bool(flags & _IFF_UP))


def _read_address(body: bytes, index: int) -> Address | None:
    family, prefix, flags, _, of = _ADDRESS.unpack_from(body)
    found = dict(_unpack(body[_ADDRESS.size :]))
    far = found.get(_IFA_ADDRESS)
    near = found.get(_IFA_LOCAL, far)
    if of != index or near is None:
        return None
    proto = found.get(_IFA_PROTO, b"\0")[0]
    if family == socket.AF_INET6 and not proto:
        if flags & _IFA_F_TEMPORARY:
            proto = 2
        elif near[:2] == b"\xfe\x80" and _IFA_PROTO not in found and not _tells_proto():
            proto = 3
    if near == _LOOPBACK and index == _LO:
        # The kernel gives it when the loopback goes up, and does not say so.
        proto = 1
    local = ipaddress.ip_address(near)
    peer = None if far is None or far == near else ipaddress.ip_address(far)
    return Address(local, prefix, peer, proto)


def _tells_proto() -> bool:
    """Whether the kernel says who made an address: since Linux 5.18."""
    release = os.uname().release.split(".")
    return (int(release[0]), int(release[1].partition("-")[0])) >= (5, 18)


def _write_address(index: int, address: Address) -> bytes:
    local = address.local.packed
    family = socket.AF_INET if len(local) == 4 else socket.AF_INET6
    peer = local if address.peer is None else address.peer.packed
    return (
        _ADDRESS.pack(family, address.prefix, 0, 0, index)
        + _pack(_IFA_LOCAL, local)
        + _pack(_IFA_ADDRESS, peer)
    )


def _read_route(body: bytes) -> Route | None:
    family, prefix, src_length, tos, table, proto, scope, kind, flags = _ROUTE.unpack_from(body)
    found = dict(_unpack(body[_ROUTE.size :]))
    if _RTA_TABLE in found:
        (table,) = _U32.unpack(found[_RTA_TABLE])
    if table != _TABLE_MAIN:
        return None
    size = 4 if family == socket.AF_INET else 16
    route = Route(
        family=family,
        destination=ipaddress.ip_address(found.get(_RTA_DST, bytes(size))),
        prefix=prefix,
        kind=kind,
        source=_optional(found.get(_RTA_PREFSRC)),
        metric=_U32.unpack(found[_RTA_PRIORITY])[0] if _RTA_PRIORITY in found else 0,
        proto=proto,
        scope=scope,
        strange=bool(
            src_length or tos or kind not in KINDS or not found.keys() <= _READ_ATTRIBUTES
        ),
    )
    if kind != UNICAST:
        # IPv6 has the loopback there.
        return route
    if _RTA_MULTIPATH in found:
        return replace(route, nexthops=tuple(_read_nexthops(found[_RTA_MULTIPATH])))
    index = _U32.unpack(found[_RTA_OIF])[0] if _RTA_OIF in found else 0
    hop = Nexthop(_gateway(found), index, 1, bool(flags & _RTNH_F_ONLINK))
    return replace(route, nexthops=(hop,))


def _read_nexthops(data: bytes) -> Iterator[Nexthop]:
    offset = 0
    while offset + _NEXTHOP.size <= len(data):
        length, flags, hops, index = _NEXTHOP.unpack_from(data, offset)
        found = dict(_unpack(data[offset + _NEXTHOP.size : offset + length]))
        yield Nexthop(_gateway(found), index, hops + 1, bool(flags & _RTNH_F_ONLINK))
        offset += (length + 3) & ~3


def _gateway(found: dict[int, bytes]) -> IP | None:
    if _RTA_VIA in found:
        return ipaddress.ip_address(found[_RTA_VIA][2:])
    return _optional(found.get(_RTA_GATEWAY))


def _optional(raw: bytes | None) -> IP | None:
    return None if raw is None else ipaddress.ip_address(raw)


KINDS = {
    UNICAST: "unicast",
    BLACKHOLE: "blackhole",
    UNREACHABLE: "unreachable",
    PROHIBIT: "prohibit",
    THROW: "throw",
}
"""The types of route that are read and written."""


def _write_gateway(family: int, hop: Nexthop) -> bytes:
    if hop.gateway is None:
        return b""
    packed = hop.gateway.packed
    if len(packed) == 16 and family == socket.AF_INET:
        return _pack(_RTA_VIA, struct.pack("=H", socket.AF_INET6) + packed)
    return _pack(_RTA_GATEWAY, packed)


def _write_route(route: Route) -> bytes:
    flags = 0
    attributes = _pack(_RTA_DST, route.destination.packed) if route.prefix else b""
    if route.source is not None:
        attributes += _pack(_RTA_PREFSRC, route.source.packed)
    if route.metric:
        attributes += _pack(_RTA_PRIORITY, _U32.pack(route.metric))
    if len(route.nexthops) == 1:
        (hop,) = route.nexthops
        flags = _RTNH_F_ONLINK if hop.onlink else 0
        attributes += _write_gateway(route.family, hop)
        if hop.ifindex:
            attributes += _pack(_RTA_OIF, _U32.pack(hop.ifindex))
    elif route.nexthops:
        rows = b""
        for hop in route.nexthops:
            via = _write_gateway(route.family, hop)
            bits = _RTNH_F_ONLINK if hop.onlink else 0
            rows += _NEXTHOP.pack(_NEXTHOP.size + len(via), bits, hop.weight - 1, hop.ifindex) + via
        attributes += _pack(_RTA_MULTIPATH, rows)
    header = _ROUTE.pack(
        route.family,
        route.prefix,
        0,
        0,
        _TABLE_MAIN,
        route.proto,
        route.scope,
        route.kind,
        flags,
    )
    return header + attributes
