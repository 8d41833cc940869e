"""`net/`: a network namespace as a tagged view (network_namespaces(7)).

net/routes      0644: its routes, a line each, in the form of ip-route(8); written, they take the
                place of those that are not the kernel's own
net/sysctl/     /proc/sys/net of that namespace, with the kernel's own modes, values and errors
net/IFACE/      the kernel's own /sys/class/net/IFACE of that namespace: its attributes, readable
                and writable with the kernel's own modes, values and errors
                (Documentation/ABI/testing/sysfs-class-net); links to other interfaces lead to their
                directories beside it, those that lead out of the namespace are left out
net/IFACE/inet  0644: its addresses, a line each, in the form of ip-address(8); written, they take
                the place of those that are not the kernel's own, and it is set up

mkdir makes an interface: a pair whose other end is in the parent's namespace, or, of a name like
eth0.100, a VLAN; rmdir deletes one; rename gives it another name or moves it to another namespace.
An interface whose name is longer than 15 bytes has it as an alternative name (see `network`).

The kernel's sysfs shows the network namespace that was current when it was mounted, and is mounted
nowhere here: a detached mount, which does not keep the namespace alive.  Nothing else is kept open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

from nsfs import netconf, network
from nsfs.attribute import (
    FOUND,
    Answer,
    Attribute,
    Caller,
    Contents,
    Directory,
    Entry,
    Link,
    TagType,
    lines,
)
from nsfs.authority import check_holder
from nsfs.container import Container, Face
from nsfs.rtnetlink import NAME_MAX, Address, Rtnetlink
from nsfs.syscalls import new_mount
from nsfs.sysctl import Sysctls
from nsfs.view import DUMPS, in_thread, inside, process_in, tag

SYSCTL = "sysctl"
ROUTES = "routes"
NOT_SHOWN = (ROUTES, SYSCTL)
"""Interfaces of these names are not shown."""
INET = "inet"
MADE_MAX = 256
"""How many attributes of a view are remembered."""
VALUE_SIZE = 4096
"""sysfs's own bound: a page."""
QUICK = frozenset(
    """
    addr_assign_type addr_len address broadcast carrier_changes carrier_down_count carrier_up_count
    dev_id dev_port dormant flags gro_flush_timeout group ifalias ifindex iflink link_mode mtu
    name_assign_type napi_defer_hard_irqs operstate proto_down testing tx_queue_len type uevent
    """.split()  # noqa: SIM905
)
"""Attributes whose show function takes no lock that others hold for long (net/core/net-sysfs.c);
those of `statistics` likewise.  All others take the RTNL or ask a driver: a thread reads them."""


class Interfaces(Contents):
    """The interfaces of one network namespace, by a detached sysfs, and its sysctls."""

    def __init__(self, container: Container, sysfs_fd: int) -> None:
        self._container = container
        self._fd = sysfs_fd
        self._known: dict[str, tuple[str, int]] = {}
        """Interfaces' longer names to the kernel's, and their indices."""
        self._made: dict[tuple[str, int], Attribute] = {}
        self._directories: dict[str, Directory] = {}
        self._sysctls = Sysctls(container, ("net",), (("net",),))

    def close(self) -> None:
        """The mount goes with its last descriptor."""
        fd, self._fd = self._fd, -1
        os.close(fd)
        self._made.clear()
        self._sysctls.close()

    def names(self, path: tuple[str, ...]) -> Answer[Iterable[str]]:
        """Interfaces and `sysctl`, or what the kernel shows of one."""
        if path[:1] == (SYSCTL,):
            return self._sysctls.names(("net", *path[1:]))
        if len(path) == 1:
            return [*self._names((self._kernels(path[0]),)), INET]
        if path:
            return self._names((self._kernels(path[0]), *path[1:]))
        names = [SYSCTL, *self._names(())]
        return self._listed(names) if any(map(network.may_be_cut, names)) else names

    async def _listed(self, names: list[str]) -> list[str]:
        """The interfaces by their longer names, where they have such."""

        def ask() -> dict[str, tuple[str, int]]:
            with Rtnetlink() as asked:
                return {network.shown(each): (each.name, each.ifindex) for each in asked.links()}

        known = await inside(self._container, ("net",), ask, DUMPS)
        self._known = {long: kernels for long, kernels in known.items() if long != kernels[0]}
        longer = {kernels[0]: long for long, kernels in self._known.items()}
        return [longer.get(name, name) for name in names]

    def _kernels(self, name: str) -> str:
        """The kernel's name of an interface, a longer name having been looked up."""
        return self._known.get(name, (name, 0))[0]

    def _names(self, path: tuple[str, ...]) -> Iterator[str]:
        with self._scan(path) as found:
            for each in found:
                if path and each.is_symlink() and self._beside(path, each.name) is None:
                    continue
                # `bonding_masters` stands beside the interfaces.
                if path or (each.is_symlink() and each.name not in NOT_SHOWN):
                    yield each.name

    def _scan(self, path: tuple[str, ...]) -> os._ScandirIterator[str]:
        fd = os.open(self._path(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return os.scandir(fd)
        finally:
            os.close(fd)

    def entry(self, path: tuple[str, ...]) -> Answer[Entry]:
        """An interface, a directory of one, an attribute, or a link to another interface; or a
        sysctl."""
        if path == (SYSCTL,):
            return Directory(SYSCTL)
        if path[0] == SYSCTL:
            # Others have at most the directories that the host has; to ask there takes no thread.
            if len(path) == 2 and not os.path.lexists(f"/proc/sys/net/{path[1]}"):
                raise FileNotFoundError(errno.ENOENT, "no such sysctl", path[1])
            return self._sysctls.entry(("net", *path[1:]))
        if len(path[0]) > NAME_MAX or len(os.fsencode(path[0])) > NAME_MAX:
            return self._long(path)
        return self._entry(path, path[0])

    def depends_on(self, path: tuple[str, ...]) -> tuple[int, str]:
        """An interface is there as long as the kernel has a link of that name."""
        return (-1, "") if path == (SYSCTL,) else (self._fd, self._path(path))

    async def _long(self, path: tuple[str, ...]) -> Entry:
        """What is at the path of an interface that is known by an alternative name."""
        name = path[0]
        kernels = self._known.get(name)
        if len(path) == 1 or kernels is None or not self._has(kernels):

            def ask() -> tuple[str, int]:
                with Rtnetlink() as asked:
                    link = asked.link(name)
                    return link.name, link.ifindex

            self._known.pop(name, None)
            try:
                kernels = self._known[name] = await inside(self._container, ("net",), ask)
            except OSError as error:
                raise FileNotFoundError(errno.ENOENT, "no such interface", name) from error
        return self._entry(path, kernels[0])

    def _has(self, kernels: tuple[str, int]) -> bool:
        """Whether the interface of a name is still the one with that index."""
        with contextlib.suppress(OSError):
            return int(self._read(self._path((kernels[0], "ifindex")))) == kernels[1]
        return False

    def _entry(self, path: tuple[str, ...], kernels: str) -> Entry:
        where = self._path((kernels, *path[1:]))
        if len(path) == 1:
            # The kernel has a link there, to wherever the device is.
            if not stat.S_ISDIR(os.stat(where, dir_fd=self._fd).st_mode):
                raise FileNotFoundError(errno.ENOENT, "no such interface", path[0])
            return self._directory(path[0])
        if path[1:] == (INET,):
            os.stat(self._path((kernels,)), dir_fd=self._fd)
            return self._inet(kernels)
        found = os.stat(where, dir_fd=self._fd, follow_symlinks=False).st_mode
        if stat.S_ISDIR(found):
            return self._directory(path[-1])
        if stat.S_ISLNK(found):
            target = self._beside((kernels, *path[1:-1]), path[-1])
            if target is None:
                raise FileNotFoundError(errno.ENOENT, "it leads out of the view", path[-1])
            return Link(path[-1], target=lambda face: target)
        return self._attribute(path, where, stat.S_IMODE(found))

    def _directory(self, name: str) -> Directory:
        if len(self._directories) > MADE_MAX:
            self._directories.clear()
        return self._directories.get(name) or self._directories.setdefault(name, Directory(name))

    def _attribute(self, path: tuple[str, ...], where: str, mode: int) -> Attribute:
        found = self._made.get((where, mode))
        if found is None:
            if len(self._made) > MADE_MAX:
                self._made.clear()
            found = self._made[where, mode] = self._make(path, where, mode)
        return found

    def _make(self, path: tuple[str, ...], where: str, mode: int) -> Attribute:
        quick = path[1] == "statistics" or (len(path) == 2 and path[1] in QUICK)

        def show(face: Face) -> Answer[bytes]:
            return self._read(where) if quick else in_thread(lambda: self._read(where))

        async def store(face: Face, value: str, caller: Caller) -> None:
            await in_thread(lambda: self._write(where, value))

        return Attribute(
            path[-1],
            mode=mode,
            show=show if mode & 0o444 else None,
            store=store if mode & 0o222 else None,
        )

    def _inet(self, kernels: str) -> Attribute:
        async def show(face: Face) -> str:
            return await inside(self._container, ("net",), lambda: _addresses(kernels), DUMPS)

        async def store(face: Face, value: str, caller: Caller) -> None:
            wanted = netconf.parse_addresses(value)
            await inside(self._container, ("net",), lambda: _set_addresses(kernels, wanted), DUMPS)

        return Attribute(INET, show=show, store=store, lines=True)

    def _read(self, where: str) -> bytes:
        fd = self._open(where, os.O_RDONLY)
        try:
            return os.read(fd, VALUE_SIZE)
        finally:
            os.close(fd)

    def _write(self, where: str, value: str) -> None:
        fd = self._open(where, os.O_WRONLY)
        try:
            os.write(fd, os.fsencode(value) + b"\n")
        finally:
            os.close(fd)

    def _open(self, where: str, flags: int) -> int:
        try:
            return os.open(where, flags | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError as error:
            # Gone between being looked up and this.
            raise OSError(errno.ENODEV, "the interface is gone", where) from error
        except OSError as error:
            if self._fd < 0:
                # Closed meanwhile, for want of them.
                raise OSError(errno.ENFILE, "too many views are open", where) from error
            raise

    def _path(self, path: tuple[str, ...]) -> str:
        return "/".join(("class/net", *path))

    def _beside(self, path: tuple[str, ...], name: str) -> str | None:
        """Where a symbolic link in an interface's directory leads, if to another interface."""
        if len(path) != 1:
            return None
        other = os.path.basename(os.readlink(self._path((*path, name)), dir_fd=self._fd))
        if name == "master" or name.startswith(("upper_", "lower_")):
            return f"../{other}"
        return None


async def interfaces(container: Container) -> Interfaces:
    """The interfaces of a container's network namespace."""
    return Interfaces(container, await inside(container, ("net",), lambda: new_mount("sysfs")))


# --- in threads, in the namespace ---


def _addresses(name: str) -> str:
    with Rtnetlink() as asked:
        found = asked.addresses(asked.link(name).ifindex)
    return lines(map(netconf.format_address, found))


def _set_addresses(name: str, wanted: list[Address]) -> None:
    with Rtnetlink() as asked:
        link = asked.link(name)
        netconf.set_addresses(asked, link.ifindex, wanted)
        if wanted and not link.up:
            asked.set_up(link.ifindex)


def _routes() -> str:
    with Rtnetlink() as asked:
        names = {each.ifindex: network.shown(each) for each in asked.links()}
        return lines(netconf.format_route(each, names) for each in asked.routes())


def _set_routes(value: str) -> None:
    with Rtnetlink() as asked:
        netconf.set_routes(
            asked, netconf.parse_routes(value, lambda name: asked.link(name).ifindex)
        )


# --- net/ ---


async def routes_show(face: Face) -> str:
    """The main tables of IPv4 and IPv6."""
    return await inside(tag(face, VIEW), ("net",), _routes, DUMPS)


async def routes_store(face: Face, value: str, caller: Caller) -> None:
    """Have these for those that are not the kernel's.  EINVAL for what is no route, ENODEV for an
    interface that is not there, and the kernel's own (ENETUNREACH, ENETDOWN)."""
    await inside(tag(face, VIEW), ("net",), lambda: _set_routes(value), DUMPS)


async def interface_make(face: Face, name: str, caller: Caller) -> None:
    """mkdir(2): a VLAN or a pair.

    EPERM where the other end would be in a namespace that is not the caller's; EOPNOTSUPP where the
    kernel has no VLANs; ERANGE for what is no VLAN's number.
    """
    _check_name(name)
    container = tag(face, VIEW)
    base, _, number = name.rpartition(".")
    if base and number.isascii() and number.isdigit():
        tag_number = int(number)
        if await in_thread(lambda: _make_vlan(container, name, base, tag_number)):
            return
    parent = _parent(face, container, caller)
    stale = {i for number, i in container.world.stale_ends if number == parent.number}
    end = await in_thread(lambda: _make_pair(container, parent, name, stale))
    container.world.add_end(container, parent, end)


def _check_name(name: str) -> None:
    if name in NOT_SHOWN:
        raise PermissionError(errno.EPERM, "it is no interface", name)
    network.check_name(name)


def _parent(face: Face, container: Container, caller: Caller) -> Container:
    """Whose namespace the other end of a pair goes to."""
    above = container.parent
    if above is None:
        raise PermissionError(errno.EPERM, "the other end would be in the parent's", "net")
    parent = above.holder("net")
    check_holder(face, parent, "net", caller)
    return parent


def _opened(container: Container) -> AbstractContextManager[network.Space]:
    if container.parent is None:
        return network.opened(None)
    return network.opened(*process_in(container))


def _make_vlan(container: Container, name: str, base: str, number: int) -> bool:
    with _opened(container) as here:
        try:
            link = here.find(base)
        except FileNotFoundError:
            # Then the name has a dot, and no more.
            return False
        network.make_vlan(here, name, link, number)
    return True


def _make_pair(container: Container, parent: Container, name: str, stale: set[int]) -> int:
    with _opened(container) as here, _opened(parent) as there:
        return network.make_pair(here, there, name, container.name, stale)[1]


async def interface_remove(face: Face, name: str, caller: Caller) -> None:
    """rmdir(2): delete an interface.  EOPNOTSUPP for one that is not made by software, as lo."""

    def remove() -> None:
        with _opened(container) as here:
            here.rtnl.delete_link(here.find(name).ifindex)

    _check_name(name)
    container = tag(face, VIEW)
    await in_thread(remove)


async def interface_rename(
    face: Face, old: str, new_face: Face, directory: Directory, new: str, caller: Caller
) -> None:
    """rename(2): another name, or another namespace.

    EEXIST when the name is taken, EINVAL for an interface that cannot be moved, as lo, EBUSY for
    one that is up before Linux 6.2.
    """
    if directory is not VIEW:
        raise PermissionError(errno.EPERM, "an interface is moved to another's net only", new)
    for name in (old, new):
        _check_name(name)
    source, target = tag(face, VIEW), tag(new_face, VIEW)

    def rename() -> None:
        with _opened(source) as here:
            if source is target:
                network.rename(here, old, new)
                return
            with _opened(target) as there:
                network.move(here, there, old, new)

    await in_thread(rename)


VIEW = TagType(
    "net",
    entries=(Attribute(ROUTES, show=routes_show, store=routes_store, lines=True, flags=FOUND),),
    contents=interfaces,
    make=interface_make,
    remove=interface_remove,
    rename=interface_rename,
    flags=FOUND,
)
FILES = (VIEW,)
