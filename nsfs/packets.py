"""Packets of NFLOG groups become lines of a container's log, in the form of LOG."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time

import trio

from nsfs import namespaces, nflog
from nsfs.container import Container
from nsfs.marker import Marker
from nsfs.world import World

log = logging.getLogger(__name__)


class Subscriptions:
    """The groups that containers have asked for."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.marker: Marker | None = None
        self._nflog: dict[int, tuple[trio.CancelScope, trio.Event]] = {}
        """What reads the groups of a container, by its number."""

    async def resume(self, container: Container) -> None:
        """A container runs: get what it has asked for before."""
        if container.own("net") and container.nflog and container.number not in self._nflog:
            await self.subscribe(container, container.nflog)

    def cancel(self, container: Container) -> None:
        """It does not run any more."""
        if container.number in self._nflog:
            self._nflog[container.number][0].cancel()

    async def subscribe(self, container: Container, groups: tuple[int, ...]) -> None:
        """Make the packets of these NFLOG groups of its network lines of its log, and no others.

        EBUSY: another has one of the groups.  EOPNOTSUPP: there is no nsfs-marker.
        """
        if self.marker is None:
            raise OSError(errno.EOPNOTSUPP, "kernel lines are not routed", container.name)
        if container.number in self._nflog:
            scope, closed = self._nflog[container.number]
            scope.cancel()
            # The same groups cannot be bound before its socket is closed.
            await closed.wait()
        if not groups:
            return
        path = f"/proc/{container.init_pid}/ns/net"
        net_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fd = await self.marker.netfilter_socket(net_fd)
        except BaseException:
            os.close(net_fd)
            raise
        netlink = socket.socket(fileno=fd)
        try:
            for group in groups:
                for message in nflog.bind_messages(group):
                    netlink.send(message)
                    # The kernel has answered when send(2) returns.
                    for answer in nflog.parse(netlink.recv(65536)):
                        if answer == errno.EPERM:
                            # nfulnl_recv_config(): it is bound to another socket.
                            raise OSError(errno.EBUSY, "another program has it", f"group {group}")
                        if isinstance(answer, int) and answer:
                            raise OSError(answer, os.strerror(answer), f"NFLOG group {group}")
        except BaseException:
            netlink.close()
            os.close(net_fd)
            raise
        self._nflog[container.number] = (trio.CancelScope(), trio.Event())
        self.world.start(self._read_nflog, container, netlink, net_fd)

    async def _read_nflog(self, container: Container, netlink: socket.socket, net_fd: int) -> None:
        scope, closed = self._nflog[container.number]
        names: dict[int, str] = {}
        with scope:
            try:
                while True:
                    await trio.lowlevel.wait_readable(netlink)
                    try:
                        data = netlink.recv(1 << 18)
                    except OSError as error:
                        # ENOBUFS: some were lost.
                        if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                            continue
                        raise
                    for each in nflog.parse(data):
                        if isinstance(each, int):
                            continue
                        wanted = {each.incoming, each.outgoing} - {0}
                        if not wanted <= names.keys() and self.marker is not None:
                            _, rows = await self.marker.describe(net_fd)
                            names = {int(n): name for kind, name, n in rows if kind == "index"}
                        log_ = container.holder(namespaces.SYSLOG)
                        log_.log.append(nflog.line(each, names), level=4, facility=0)
                        log_.log_changed_ns = time.time_ns()
            except OSError as error:
                log.info("NFLOG of %s: %s", container.name, error)
            finally:
                os.close(net_fd)
                netlink.close()
                del self._nflog[container.number]
                closed.set()
