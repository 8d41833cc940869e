"""Names of interfaces, and the addresses of `network veth`."""

from __future__ import annotations

import errno
import ipaddress
import itertools

import pytest

from nsfs import network
from nsfs.rtnetlink import Link


def names(name: str, count: int) -> list[tuple[str, str | None]]:
    return list(itertools.islice(network.candidates(name), count))


def test_what_fits_is_the_name() -> None:
    assert names("web", 2) == [("web", None), ("web~1", None)]
    assert names("a" * 15, 2) == [("a" * 15, None), ("a" * 13 + "~1", None)]


def test_what_does_not_fit_is_an_alternative_name() -> None:
    long = "front-of-the-house"
    assert names(long, 3) == [
        ("front-of-the-ho", long),
        ("front-of-the-~1", f"{long}~1"),
        ("front-of-the-~2", f"{long}~2"),
    ]


def test_no_character_is_broken() -> None:
    assert names("é" * 8, 1) == [("é" * 7, "é" * 8)]
    (found,) = names("x" * 126 + "éé", 1)
    assert found[1] == "x" * 126


@pytest.mark.parametrize(
    ("name", "found"),
    [("a b:c%d", "a_b_c_d"), ("..", "_.."), ("à", "_"), ("\x01\u2003", "\x01\u2003")],
)
def test_what_the_kernel_does_not_take(name: str, found: str) -> None:
    assert names(name, 1) == [(found, None)]


def test_an_interface_is_shown_by_the_name_that_it_is_the_beginning_of() -> None:
    long = "front of the house"

    def shown(name: str, *altnames: str) -> str:
        return network.shown(Link(1, name, altnames, "veth", False))

    assert shown("front_of_the_ho", "enp0s1", long) == long
    assert shown("front_of_the_~1", f"{long}~1") == f"{long}~1"
    assert shown("front_of_the_~1", long) == long
    # As udev gives them, and what could not be a name in a directory.
    assert shown("eth0", "enx0123456789abcdef") == "eth0"
    assert shown("enp0s31f6abcd", "eno1", "enx0123456789ab") == "enp0s31f6abcd"
    assert shown("front_of_the_ho", "front of the house/garden") == "front_of_the_ho"


def test_addresses_are_pairs_and_come_back_last() -> None:
    pool = network.Addresses(ipaddress.IPv4Network("10.0.0.0/29"))
    taken = [pool.take() for _ in range(3)]
    assert taken == ["10.0.0.3", "10.0.0.5", "10.0.0.7"]
    with pytest.raises(OSError, match=rf"\[Errno {errno.ENOSPC}\]"):
        pool.take()
    pool.give_back("10.0.0.5")
    pool.give_back("10.0.0.3")
    assert pool.take() == "10.0.0.3"
    assert pool.take() == "10.0.0.5"


def test_addresses_of_earlier_daemons_are_taken() -> None:
    pool = network.Addresses(ipaddress.IPv4Network("10.0.0.0/31"))
    pool.claim("10.9.9.9")
    assert pool.take() == "10.0.0.1"
    with pytest.raises(OSError, match=rf"\[Errno {errno.ENOSPC}\]"):
        pool.take()
