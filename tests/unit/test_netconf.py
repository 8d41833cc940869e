"""Addresses and routes as text: what is read is what can be written."""

from __future__ import annotations

import errno
import ipaddress
import re

import pytest

from nsfs import netconf
from nsfs.rtnetlink import PROTO_KERNEL, SCOPE_LINK, Address, Nexthop, Route

NAMES = {1: "lo", 2: "eth0", 3: "odd\\name\x7f"}


def index_of(name: str) -> int:
    found = {text: number for number, text in NAMES.items()}.get(name)
    if found is None:
        raise OSError(errno.ENODEV, "no such interface", name)
    return found


def parse(text: str) -> list[Route]:
    return netconf.parse_routes(text, index_of)


@pytest.mark.parametrize(
    "line",
    [
        "default via 10.0.0.1 dev eth0",
        "default dev eth0",
        "default via fd00::1 dev eth0",
        "::/0 dev eth0",
        "10.0.0.0/24 dev eth0",
        "10.0.0.5 dev eth0",
        "fd00::5 dev eth0",
        "10.0.0.0/24 via 10.1.1.1 dev eth0 proto static src 10.1.1.2 metric 7",
        "10.0.0.0/24 via 10.1.1.1 dev eth0 onlink",
        "10.0.0.0/24 via inet6 fe80::1 dev eth0",
        "default via inet6 fe80::1 dev eth0",
        "10.0.0.0/24 via 10.1.1.1 dev eth0 proto 77 scope site",
        "10.0.0.0/24 dev eth0 scope global",
        "fd00::/8 dev eth0 metric 5",
        "blackhole 10.0.0.0/8",
        "unreachable default",
        "prohibit fd00::/8",
        "throw 10.0.0.0/8 metric 3",
        "10.9.0.0/16 nexthop via 10.1.1.1 dev eth0 weight 2 nexthop dev lo weight 1",
        "default dev odd\\134name\\177",
    ],
)
def test_a_route_is_read_as_it_was_written(line: str) -> None:
    (route,) = parse(line)
    assert netconf.format_route(route, NAMES) == line


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "10.0.0.0/24",
        "10.0.0.1/24 dev eth0",
        "10.0.0.0/x dev eth0",
        "default via 10.0.0.1 dev",
        "default via 10.0.0.1 via 10.0.0.2",
        "default via 10.0.0.1 dev eth0 metric many",
        "default via 10.0.0.1 dev eth0 metric 1 metric 2",
        "default via 10.0.0.1 colour red",
        "fd00::/8 via 10.0.0.1 dev eth0",
        "blackhole 10.0.0.0/8 via 10.0.0.1",
        "10.0.0.0/8 via 10.0.0.1 nexthop via 10.0.0.2 dev eth0",
        "unreachable",
        "10.0.0.0/8 dev eth0\n10.0.0.0/8 dev lo",
    ],
)
def test_what_is_no_route(line: str) -> None:
    with pytest.raises(OSError, match=re.escape(f"[Errno {errno.EINVAL}]")):
        parse(line)


@pytest.mark.parametrize("line", ["10.0.0.0/33 dev eth0", "10.0.0.0/8 dev eth0 metric 4294967296"])
def test_a_number_that_cannot_be(line: str) -> None:
    with pytest.raises(OSError, match=re.escape(f"[Errno {errno.ERANGE}]")):
        parse(line)


def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(OSError, match=re.escape(f"[Errno {errno.ENODEV}]")):
        parse("default dev eth9")


def test_what_is_the_kernels_is_shown_and_ignored() -> None:
    text = "10.0.0.0/24 dev eth0 proto kernel scope link src 10.0.0.1"
    assert parse(f"{text}\n# 10.5.0.0/16 dev eth0\n\n") == []
    route = Route(
        family=2,
        destination=ipaddress.ip_address("10.0.0.0"),
        prefix=24,
        nexthops=(Nexthop(None, 2),),
        source=ipaddress.ip_address("10.0.0.1"),
        proto=PROTO_KERNEL,
        scope=SCOPE_LINK,
    )
    assert netconf.format_route(route, NAMES) == text


@pytest.mark.parametrize(
    "line", ["10.0.0.1/24", "10.0.0.1 peer 10.0.0.2/32", "fd00::1/64", "fd00::1 peer fd00::2/128"]
)
def test_an_address_is_read_as_it_was_written(line: str) -> None:
    (address,) = netconf.parse_addresses(line)
    assert netconf.format_address(address) == line


def test_an_address_without_a_length_is_one_alone() -> None:
    assert netconf.parse_addresses("10.0.0.1\nfd00::1") == [
        Address(ipaddress.ip_address("10.0.0.1"), 32),
        Address(ipaddress.ip_address("fd00::1"), 128),
    ]


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("10.0.0.1/33", errno.ERANGE),
        ("10.0.0.256/24", errno.EINVAL),
        ("10.0.0.1/", errno.EINVAL),
        ("10.0.0.1/24 10.0.0.2/24", errno.EINVAL),
        ("10.0.0.1 peer fd00::1/64", errno.EINVAL),
        ("fe80::1%eth0/64", errno.EINVAL),
        ("10.0.0.1/24\n10.0.0.1/24", errno.EINVAL),
    ],
)
def test_what_is_no_address(line: str, number: int) -> None:
    with pytest.raises(OSError, match=re.escape(f"[Errno {number}]")):
        netconf.parse_addresses(line)


def test_addresses_of_the_kernels_are_ignored() -> None:
    assert netconf.parse_addresses("fe80::1/64 proto kernel_ll\n::1/128 proto kernel_lo") == []
