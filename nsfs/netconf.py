"""Addresses and routes as text, in the forms of ip-address(8) and ip-route(8), and how a set of
them takes the place of another.

What the kernel made by itself is shown, with `proto`, but never written: such lines are ignored and
what they say stays.  Of the rest, what is missing is added, then what is too much is deleted; when
something of it fails, what was done is undone, and the kernel's error is the write's.

The functions that ask the kernel may block: they are for threads.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace

from nsfs.attribute import invalid, one_line, out_of_range, unescape
from nsfs.rtnetlink import (
    IP,
    KINDS,
    METRIC_V6,
    PROTO_BOOT,
    PROTO_KERNEL,
    PROTO_RA,
    PROTO_REDIRECT,
    SCOPE_GLOBAL,
    SCOPE_HOST,
    SCOPE_LINK,
    SCOPE_SITE,
    UNICAST,
    Address,
    Nexthop,
    Route,
    Rtnetlink,
)

ADDRESS_PROTOS = {1: "kernel_lo", 2: "kernel_ra", 3: "kernel_ll"}
"""Who made an address (linux/if_addr.h, IFAPROT_*), in the words of ip-address(8)."""
ROUTE_PROTOS = {PROTO_REDIRECT: "redirect", PROTO_KERNEL: "kernel", 4: "static", PROTO_RA: "ra"} | {
    11: "zebra",
    12: "bird",
    16: "dhcp",
    42: "babel",
    186: "bgp",
    187: "isis",
    188: "ospf",
    189: "rip",
}
"""Who made a route (linux/rtnetlink.h, RTPROT_*); other numbers stand for themselves."""
KERNELS_PROTOS = frozenset((PROTO_REDIRECT, PROTO_KERNEL, PROTO_RA))
SCOPES = {SCOPE_GLOBAL: "global", SCOPE_SITE: "site", SCOPE_LINK: "link", SCOPE_HOST: "host"}
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


# --- addresses ---------------------------------------------------------------------------------


def format_address(address: Address) -> str:
    """`LOCAL/PREFIX`, or `LOCAL peer PEER/PREFIX`; `proto` behind the kernel's own."""
    where = f"{address.local}/{address.prefix}"
    if address.peer is not None:
        where = f"{address.local} peer {address.peer}/{address.prefix}"
    proto = ADDRESS_PROTOS.get(address.proto)
    return f"{where} proto {proto}" if proto else where


def parse_addresses(text: str) -> list[Address]:
    """The addresses of a value, those left out that are the kernel's; EINVAL for what is no
    address or named twice."""
    found: list[Address] = []
    for line in text.split("\n"):
        words = _words(line)
        if words[-2:-1] == ["proto"] and words[-1] in ADDRESS_PROTOS.values():
            continue
        if words:
            found.append(_parse_address(line, words))
    if len({(each.local, each.prefix, each.peer) for each in found}) != len(found):
        raise invalid("an address stands there twice")
    return found


def _words(line: str) -> list[str]:
    """The words of a line.  Names of interfaces may have what only Unicode calls a blank."""
    return re.findall(r"[^ \t\r]+", line)


def _parse_address(line: str, words: list[str]) -> Address:
    if len(words) not in (1, 3) or words[1:2] not in ([], ["peer"]):
        raise invalid(line)
    far, prefix = _parse_prefix(line, words[-1])
    if len(words) == 1:
        return Address(far, prefix)
    near = _parse_ip(line, words[0])
    if near.version != far.version:
        raise invalid(line)
    return Address(near, prefix, None if near == far else far)


def _parse_ip(line: str, word: str) -> IP:
    try:
        address = ipaddress.ip_address(word)
    except ValueError as error:
        raise invalid(line) from error
    if getattr(address, "scope_id", None):
        raise invalid(line)
    return address


def _parse_prefix(line: str, word: str) -> tuple[IP, int]:
    host, slash, length = word.partition("/")
    address = _parse_ip(line, host)
    if not slash:
        return address, address.max_prefixlen
    if not (length.isascii() and length.isdigit()):
        raise invalid(line)
    if int(length) > address.max_prefixlen:
        raise out_of_range(line)
    return address, int(length)


def set_addresses(asked: Rtnetlink, index: int, wanted: list[Address]) -> None:
    """Make these the addresses of an interface, beside those that the kernel gave it."""
    before = asked.addresses(index)
    known = {each.local for each in before if each.proto}
    # One that the kernel made may be named as if it were another's.
    wanted = [each for each in wanted if each.local not in known]
    old = [each for each in before if not each.proto and each not in wanted]
    new = [each for each in wanted if each not in before]
    # Of IPv6 an interface has each address once, whatever the prefix.
    first = [each for each in old if any(_same_v6(each, other) for other in new)]
    with _Undo() as undo:
        for each in first:
            asked.delete_address(index, each)
            undo.push(asked.add_address, index, each)
        for each in new:
            asked.add_address(index, each)
            undo.push(asked.delete_address, index, each)
        for each in old:
            if each not in first and each in asked.addresses(index):
                asked.delete_address(index, each)
                undo.push(asked.add_address, index, each)
        # With the first address of an IPv4 network go the others of that network, unless
        # net.ipv4.conf.*.promote_secondaries.
        left = set(asked.addresses(index))
        for each in wanted:
            if each not in left:
                asked.add_address(index, each)


def _same_v6(one: Address, other: Address) -> bool:
    return one.local.version == 6 and one.local == other.local


class _Undo:
    """What was done, undone in reverse order should something fail."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> _Undo:
        return self

    def push(self, function: Callable[..., object], *args: object) -> None:
        """Call that when something fails later on."""
        self._stack.callback(_try, function, *args)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._stack.close()


def _try(function: Callable[..., object], *args: object) -> None:
    try:
        function(*args)
    except OSError:
        # It went with another one, or the interface is gone: there is nothing more to undo.
        return


# --- routes ------------------------------------------------------------------------------------


def format_route(route: Route, names: Mapping[int, str]) -> str:
    """A route in one line; behind a # if it has what is not written here."""
    words = [] if route.kind == UNICAST else [KINDS.get(route.kind, f"type {route.kind}")]
    words.append(_destination(route))
    many = len(route.nexthops) > 1
    if not many:
        for hop in route.nexthops:
            words += _hop_words(route, hop, names)
    if route.proto != PROTO_BOOT:
        words += ["proto", ROUTE_PROTOS.get(route.proto, str(route.proto))]
    kernels = route.proto in KERNELS_PROTOS and route.scope != SCOPE_GLOBAL
    if kernels or route.scope != _usual_scope(route):
        words += ["scope", SCOPES.get(route.scope, str(route.scope))]
    if route.source is not None:
        words += ["src", str(route.source)]
    if route.metric != _usual_metric(route):
        words += ["metric", str(route.metric)]
    if many:
        for hop in route.nexthops:
            words += ["nexthop", *_hop_words(route, hop, names), "weight", str(hop.weight)]
    return ("# " if route.strange else "") + " ".join(words)


def _destination(route: Route) -> str:
    length = route.destination.max_prefixlen
    if route.prefix == length:
        return str(route.destination)
    gateways = {hop.gateway.version for hop in route.nexthops if hop.gateway is not None}
    if not route.prefix and (route.family == socket.AF_INET or gateways == {6}):
        return "default"
    return f"{route.destination}/{route.prefix}"


def _hop_words(route: Route, hop: Nexthop, names: Mapping[int, str]) -> list[str]:
    words: list[str] = []
    if hop.gateway is not None:
        other = _FAMILY[hop.gateway.version] != route.family
        words += ["via", *(["inet6"] if other else []), str(hop.gateway)]
    if hop.ifindex:
        words += ["dev", one_line(names.get(hop.ifindex, f"if{hop.ifindex}"))]
    return words + (["onlink"] if hop.onlink else [])


def _usual_scope(route: Route) -> int:
    """What ip-route(8) gives a route of which nothing is said."""
    if route.family == socket.AF_INET6 or route.kind != UNICAST:
        return SCOPE_GLOBAL
    return SCOPE_GLOBAL if any(hop.gateway for hop in route.nexthops) else SCOPE_LINK


def _usual_metric(route: Route) -> int:
    return METRIC_V6 if route.family == socket.AF_INET6 else 0


def parse_routes(text: str, index_of: Callable[[str], int]) -> list[Route]:
    """The routes of a value, without those that are the kernel's or stand behind a #.

    EINVAL for what is no route, or a second one to the same destination with the same metric.
    """
    found: list[Route] = []
    for line in text.split("\n"):
        words = [unescape(word) for word in _words(line)]
        if words and not line.lstrip().startswith("#"):
            route = _RouteLine(line, words, index_of).parse()
            if route.proto not in KERNELS_PROTOS:
                found.append(route)
    again = Counter(map(_key, found))
    if again and max(again.values()) > 1:
        raise invalid("a destination stands there twice, with the same metric")
    return found


def _key(route: Route) -> tuple[int, IP, int, int]:
    return route.family, route.destination, route.prefix, route.metric


class _RouteLine:
    """The words of one line."""

    def __init__(self, line: str, words: list[str], index_of: Callable[[str], int]) -> None:
        self._line = line
        self._words = words
        self._index_of = index_of

    def parse(self) -> Route:
        """The route; EINVAL, ENODEV for an interface that is not there."""
        kinds = {word: kind for kind, word in KINDS.items()}
        kind = kinds[self._words.pop(0)] if self._words[0] in kinds else UNICAST
        target = self._word()
        keys: dict[str, str] = {}
        hops = [self._hop(keys)]
        while self._words:
            # All of the rest is `nexthop ...`.
            self._words.pop(0)
            hops.append(self._hop(None))
        if len(hops) > 1:
            if hops[0] != Nexthop():
                raise invalid(self._line)
            del hops[0]
        elif kind != UNICAST:
            if hops != [Nexthop()]:
                raise invalid(self._line)
            hops = []
        if any(hop.gateway is None and not hop.ifindex for hop in hops):
            raise invalid(self._line)
        return self._route(kind, target, tuple(hops), keys)

    def _route(
        self, kind: int, target: str, hops: tuple[Nexthop, ...], keys: Mapping[str, str]
    ) -> Route:
        if target == "default":
            six = bool(hops) and all(hop.gateway and hop.gateway.version == 6 for hop in hops)
            # `via inet6` makes it one of IPv4.
            six = six and "inet6" not in keys
            destination, prefix = ipaddress.ip_address("::" if six else "0.0.0.0"), 0
        else:
            destination, prefix = _parse_prefix(self._line, target)
        network = ipaddress.ip_network((destination, prefix), strict=False)
        if network.network_address != destination:
            raise invalid(self._line)
        route = Route(_FAMILY[destination.version], destination, prefix, kind, hops)
        if route.family == socket.AF_INET6 and any(
            hop.gateway is not None and hop.gateway.version == 4 for hop in hops
        ):
            raise invalid(self._line)
        source = _parse_ip(self._line, keys["src"]) if "src" in keys else None
        return replace(
            route,
            source=source,
            metric=self._number(keys, "metric", {}, 2**32 - 1, _usual_metric(route)),
            proto=self._number(keys, "proto", ROUTE_PROTOS | {PROTO_BOOT: "boot"}, 255, PROTO_BOOT),
            scope=self._number(keys, "scope", SCOPES, 255, _usual_scope(route)),
        )

    def _number(
        self, keys: Mapping[str, str], name: str, words: Mapping[int, str], most: int, usual: int
    ) -> int:
        if name not in keys:
            return usual
        for number, word in words.items():
            if word == keys[name]:
                return number
        if not re.fullmatch("[0-9]+", keys[name]):
            raise invalid(self._line)
        if int(keys[name]) > most:
            raise out_of_range(self._line)
        return int(keys[name])

    def _hop(self, keys: dict[str, str] | None) -> Nexthop:
        """A nexthop up to the next one; other words go to `keys`."""
        hop = Nexthop()
        while self._words and self._words[0] != "nexthop":
            word = self._words.pop(0)
            if word == "via" and hop.gateway is None:
                if self._words[:1] == ["inet6"]:
                    self._words.pop(0)
                    if keys is not None:
                        keys["inet6"] = ""
                hop = hop._replace(gateway=_parse_ip(self._line, self._word()))
            elif word == "dev" and not hop.ifindex:
                hop = hop._replace(ifindex=self._index_of(self._word()))
            elif word == "onlink":
                hop = hop._replace(onlink=True)
            elif word == "weight" and keys is None:
                weight = self._number({word: self._word()}, word, {}, 256, 1)
                hop = hop._replace(weight=max(weight, 1))
            elif word in ("proto", "scope", "src", "metric") and keys is not None:
                if word in keys:
                    raise invalid(self._line)
                keys[word] = self._word()
            else:
                raise invalid(self._line)
        return hop

    def _word(self) -> str:
        if not self._words:
            raise invalid(self._line)
        return self._words.pop(0)


def set_routes(asked: Rtnetlink, wanted: Iterable[Route]) -> None:
    """Make these the routes of the namespace, beside the kernel's own and the strange ones."""
    wanted = list(wanted)
    before = [
        each for each in asked.routes() if not each.strange and each.proto not in KERNELS_PROTOS
    ]
    old = [each for each in before if not _among(each, wanted)]
    with _Undo() as undo:
        for each in wanted:
            if _among(each, before):
                continue
            other = next((one for one in old if _key(one) == _key(each)), None)
            if other is not None:
                old.remove(other)
                asked.replace_route(each)
                undo.push(asked.replace_route, other)
            else:
                asked.add_route(each)
                undo.push(asked.delete_route, each)
        for each in reversed(old):
            try:
                asked.delete_route(each)
            except OSError as error:
                # It went with another one.
                if error.errno != errno.ESRCH:
                    raise
            undo.push(asked.add_route, each)


def _among(route: Route, others: Iterable[Route]) -> bool:
    """Whether it is one of them; where nothing is said of the interface, any will do."""
    return any(
        route == other
        or (
            replace(route, nexthops=()) == replace(other, nexthops=())
            and len(route.nexthops) == len(other.nexthops)
            and all(map(_same_hop, route.nexthops, other.nexthops))
        )
        for other in others
    )


def _same_hop(one: Nexthop, other: Nexthop) -> bool:
    return one._replace(ifindex=0) == other._replace(ifindex=0) and (
        one.ifindex == other.ifindex or 0 in (one.ifindex, other.ifindex)
    )
