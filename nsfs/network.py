"""What containers' networks are made of: pairs of interfaces (veth(4)), VLANs, interfaces that are
renamed and moved; and the addresses of `network veth`.

Interfaces have names of any length up to 127 bytes here.  The kernel knows one that is longer than
15 by its beginning and has the whole as an alternative name (ip-link(8), altname), which it keeps
wherever it is moved.

What ends in RTNL waits for it: the functions from `opened` on are for threads.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from nsfs import namespaces
from nsfs.rtnetlink import ALTNAME_MAX, NAME_MAX, Address, Link, Nexthop, Route, Rtnetlink

TRIES = 10
"""How often a name is chosen anew that others have taken meanwhile."""
SHORTEST_CUT = NAME_MAX - 3
"""What is left of a longer name at least: it is cut between characters of UTF-8."""
INTERFACE = "eth0"
"""The interface that `network veth` gives."""
NOT_ALLOWED = frozenset(b"\t\n\v\f\r /:%\xa0")
PAIR = 2
"""Addresses of a link between two (RFC 3021): the parent's, then the container's."""


# --- the addresses of `network veth` -----------------------------------------------------------


class Addresses:
    """The addresses of a prefix, in pairs: the parent's end has the one before the container's.

    One that came back is given out again as late as possible: others may still believe it to be its
    last holder's.
    """

    def __init__(self, prefix: ipaddress.IPv4Network) -> None:
        self._first = int(prefix.network_address)
        self._count = prefix.num_addresses // PAIR
        # The network's own address is none for a host, to some programs.
        self._next = 1 if self._count > 1 else 0
        self._used: set[str] = set()

    def take(self) -> str:
        """An address that no container has; ENOSPC when there is none."""
        for _ in range(self._count):
            number = self._next
            self._next = (number + 1) % self._count
            address = str(ipaddress.IPv4Address(self._first + number * PAIR + 1))
            if address not in self._used and (number or self._count == 1):
                self._used.add(address)
                return address
        raise OSError(errno.ENOSPC, "all addresses of the prefix are taken")

    def claim(self, address: str) -> None:
        """An address is used, as is known from a record."""
        self._used.add(address)

    def give_back(self, address: str) -> None:
        """Nobody has it any more."""
        self._used.discard(address)


# --- names -------------------------------------------------------------------------------------


def cut(name: str, most: int) -> str:
    """A name's first bytes, no character of UTF-8 broken."""
    raw = os.fsencode(name)
    if len(raw) <= most:
        return name
    while most and raw[most] & 0xC0 == 0x80:
        most -= 1
    return os.fsdecode(raw[:most])


def allowed(name: str) -> str:
    """A name without what the kernel does not take in an interface's (dev_valid_name(), to which a
    byte 0xa0 is a blank)."""
    text = "".join("_" if NOT_ALLOWED.intersection(os.fsencode(each)) else each for each in name)
    return f"_{text}" if text in (".", "..") else text


def candidates(name: str) -> Iterator[tuple[str, str | None]]:
    """The kernel's name for an interface that is to be called so, and its alternative name if it
    needs one; then the same with ~1, ~2 and so on."""
    for number in range(1000):
        tail = f"~{number}" if number else ""
        short = cut(allowed(name), NAME_MAX - len(tail)) + tail
        needs = len(os.fsencode(name)) > NAME_MAX
        yield short, cut(name, ALTNAME_MAX - len(tail)) + tail if needs else None


def may_be_cut(name: str) -> bool:
    """Whether the kernel's name of an interface may be the beginning of a longer one."""
    return len(os.fsencode(name)) >= SHORTEST_CUT


def shown(link: Link) -> str:
    """The name by which an interface is listed: the alternative one that its own is the beginning
    of, if it has such a one."""
    if may_be_cut(link.name):
        stem = re.sub(r"~\d+$", "", link.name)
        for each in link.altnames:
            fits = "/" not in each and allowed(each).startswith(stem)
            if fits and len(os.fsencode(each)) > NAME_MAX:
                return each
    return link.name


def check_name(name: str) -> None:
    """Whether an interface can be given that name, as far as the kernel would not say so."""
    raw = os.fsencode(name)
    if len(raw) > ALTNAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "the name is longer than 127 bytes", name)
    # The kernel would put a number in the place of %d.
    if b"%" in raw:
        raise OSError(errno.EINVAL, "% cannot be in an interface's name", name)


# --- in threads --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Space:
    """A network namespace, held open for a moment."""

    rtnl: Rtnetlink
    fd: int

    def taken(self) -> dict[str, Link]:
        """Its interfaces by all their names."""
        return {name: link for link in self.rtnl.links() for name in (link.name, *link.altnames)}

    def find(self, name: str) -> Link:
        """An interface; ENOENT when there is none of that name."""
        try:
            return self.rtnl.link(name)
        except OSError as error:
            if error.errno not in (errno.ENODEV, errno.EINVAL):
                raise
            raise FileNotFoundError(errno.ENOENT, "no such interface", name) from error


@contextlib.contextmanager
def opened(pid: int | None, numbers: tuple[int, ...] = ()) -> Iterator[Space]:
    """A process's network namespace, the host's for None; ENODEV when the process is gone, or not
    in the namespaces with these inode numbers (see `namespaces.within`)."""
    try:
        fd = os.open(f"/proc/{pid or 'self'}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespaces.check("net", fd, numbers)
            rtnl = (
                Rtnetlink() if pid is None else namespaces.within(pid, ("net",), Rtnetlink, numbers)
            )
            with rtnl:
                yield Space(rtnl, fd)
        finally:
            os.close(fd)
    except (ProcessLookupError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and error.filename != f"/proc/{pid}/ns/net":
            raise
        raise OSError(errno.ENODEV, "the network namespace is dead", str(pid)) from error


def _undoing(undo: contextlib.ExitStack, function: Callable[..., object], *args: object) -> None:
    """Call that should something fail later, whatever becomes of it."""

    def call() -> None:
        with contextlib.suppress(OSError):
            function(*args)

    undo.callback(call)


def _asked(taken: Collection[str], name: str) -> tuple[str, str | None]:
    """The kernel's and the alternative name for just that name; EEXIST when it is taken."""
    if name not in taken:
        if len(os.fsencode(name)) <= NAME_MAX:
            return name, None
        for short, _ in candidates(name):
            if short not in taken:
                return short, name
    raise OSError(errno.EEXIST, "the name is taken", name)


def _free(taken: Collection[str], name: str) -> tuple[str, str | None]:
    """The same for that name or the next one that is free."""
    for short, long in candidates(name):
        if short not in taken and (long is None or long not in taken):
            return short, long
    raise OSError(errno.EEXIST, "all such names are taken", name)


def make_pair(
    here: Space, there: Space, name: str, peer: str, stale: Collection[int] = ()
) -> tuple[int, int]:
    """A pair of interfaces: `name` here, and one there that is called `peer`, or, when that is
    taken, by the next free name; their indices.

    What has an index in `stale` there is on its way out: its name is free.
    """
    for last in range(TRIES - 1, -1, -1):
        ours, our_long = _asked(here.taken(), name)
        taken = there.taken()
        leaving = taken.get(next(candidates(peer))[0])
        if leaving is not None and leaving.kind == "veth" and leaving.ifindex in stale:
            with contextlib.suppress(OSError):
                there.rtnl.delete_link(leaving.ifindex)
            taken = there.taken()
        theirs, their_long = _free(taken, peer)
        try:
            there.rtnl.make_veth(ours, here.fd, theirs, there.fd)
            break
        except OSError as error:
            if error.errno != errno.EEXIST or not last:
                raise
    index, far = here.rtnl.link(ours).ifindex, there.rtnl.link(theirs).ifindex
    with contextlib.ExitStack() as undo:
        _undoing(undo, here.rtnl.delete_link, index)
        if our_long is not None:
            here.rtnl.add_altname(index, our_long)
        if their_long is not None:
            there.rtnl.add_altname(far, their_long)
        undo.pop_all()
    return index, far


def make_vlan(here: Space, name: str, base: Link, number: int) -> None:
    """A VLAN on an interface; ERANGE for what is no VLAN's number (IEEE 802.1Q)."""
    if not 1 <= number <= 4094:
        raise OSError(errno.ERANGE, "a VLAN's number is 1 to 4094", name)
    short, long = _asked(here.taken(), name)
    here.rtnl.make_vlan(short, base.ifindex, number)
    if long is not None:
        index = here.rtnl.link(short).ifindex
        with contextlib.ExitStack() as undo:
            _undoing(undo, here.rtnl.delete_link, index)
            here.rtnl.add_altname(index, long)
            undo.pop_all()


def rename(here: Space, old: str, new: str) -> None:
    """Give an interface another name; EEXIST when that is taken."""
    link = here.find(old)
    taken = {name for name, other in here.taken().items() if other.ifindex != link.ifindex}
    short, long = _asked(taken, new)
    before = shown(link)
    with contextlib.ExitStack() as undo:
        if long is not None and long not in link.altnames:
            here.rtnl.add_altname(link.ifindex, long)
            _undoing(undo, here.rtnl.delete_altname, link.ifindex, long)
        if short in link.altnames:
            here.rtnl.delete_altname(link.ifindex, short)
            _undoing(undo, here.rtnl.add_altname, link.ifindex, short)
        if short != link.name:
            here.rtnl.rename_link(link.ifindex, short)
        undo.pop_all()
    if before not in (link.name, long):
        here.rtnl.delete_altname(link.ifindex, before)


def move(here: Space, there: Space, old: str, new: str) -> None:
    """Move an interface to another namespace, under a name; EEXIST when that is taken there."""
    link = here.find(old)
    short, long = _asked(there.taken(), new)
    before = shown(link)
    with contextlib.ExitStack() as undo:
        if before not in (link.name, long):
            # There it may be another's.
            here.rtnl.delete_altname(link.ifindex, before)
            _undoing(undo, _name_again, here, link.name, before)
        try:
            here.rtnl.rename_link(link.ifindex, short, there.fd)
        except OSError:
            # It may be there under its old name, the new one having been taken meanwhile.
            if not _is_there(here, link):
                moved = there.find(link.name)
                there.rtnl.rename_link(moved.ifindex, link.name, here.fd)
            raise
        if long is not None and long not in link.altnames:
            moved = there.find(short)
            _undoing(undo, there.rtnl.rename_link, moved.ifindex, link.name, here.fd)
            there.rtnl.add_altname(moved.ifindex, long)
        undo.pop_all()


def _name_again(space: Space, name: str, altname: str) -> None:
    space.rtnl.add_altname(space.rtnl.link(name).ifindex, altname)


def _is_there(space: Space, link: Link) -> bool:
    return any(each.ifindex == link.ifindex for each in space.rtnl.links())


def connect(here: Space, there: Space, peer: str, address: str, stale: Collection[int]) -> int:
    """Give a new container's namespace an interface, an address and a default route; `there` is its
    parent's.  Returns the index of the other end."""
    own = ipaddress.IPv4Address(address)
    gateway = own - 1
    index, far = make_pair(here, there, INTERFACE, peer, stale)
    with contextlib.ExitStack() as undo:
        _undoing(undo, there.rtnl.delete_link, far)
        there.rtnl.add_address(far, Address(gateway, 31))
        there.rtnl.set_up(far)
        here.rtnl.add_address(index, Address(own, 31))
        here.rtnl.set_up(index)
        here.rtnl.add_route(
            Route(
                socket.AF_INET,
                ipaddress.IPv4Address(0),
                0,
                nexthops=(Nexthop(gateway, index),),
            )
        )
        undo.pop_all()
    return far
