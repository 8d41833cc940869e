"""Consoles: the records of a container's kernel log that are echoed elsewhere.

As the kernel's console, an echo goes through the log record by record, from the place where the
last daemon was (`LogRing.console_seq`), and passes on those of a level below a limit: to the
parent's log, or to a terminal.

In the parent's log each line begins with a tag, the container's name in brackets.  Where that log
is echoed on in its turn, names are joined: `[web/db] text`.  Which text has a tag is known by the
record's flag ECHO, never by the text, that members write.  Blanks in names are escaped, so a tag
ends at the first blank.  An echo goes to a log further up, or to that of another one of a pod which
the parent is in; since a container is idle when it enters a pod, no echo ever comes back.

A terminal makes nobody wait: it is non-blocking, and what it does not take waits in the ring.  What
is overwritten there meanwhile is dropped, counted and told, in the kernel's words.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from typing import TYPE_CHECKING

import trio

from nsfs import namespaces
from nsfs.attribute import one_line
from nsfs.build import NO_CONSOLE, Console
from nsfs.container import ROOT, Container, Phase
from nsfs.logring import ECHO, LogRing, Overrun, Record, escape

if TYPE_CHECKING:
    from nsfs.world import World

log = logging.getLogger(__name__)

LEVEL_MIN, LEVEL_MAX = 1, 8
"""Of console_loglevel in syslog(2): 8 lets all through."""
PAUSE_S = 0.01
"""How long a terminal that was full is left alone."""
AGAIN_S = 2.0
"""How often a terminal that has hung up is opened again."""
TOKEN = 1 << 63
"""Above every number of a FUSE request and every line of the host's log."""
UNIX98_PTY_SLAVES = range(136, 144)
"""Major numbers (Documentation/admin-guide/devices.txt)."""


class Echo:
    """What echoes a container's own log as its `console` says."""

    def __init__(self, container: Container, fd: int = -1) -> None:
        self.container = container
        self._fd = fd
        self._rest = b""
        """What the terminal has not taken yet of a line that was begun."""
        self._next = 0
        """The record after that line's."""
        self._waiting = False
        self._again_s = 0.0

    # --- records ---

    def flush(self) -> None:
        """Echo what was not echoed yet, as far as a terminal takes it."""
        container, ring = self.container, self.container.log.ring
        while container.log.echo is self and self._finish_line(ring):
            found = ring.read(ring.console_seq)
            if found is None:
                return
            if isinstance(found, Overrun):
                missed = found.oldest - ring.console_seq
                ring.count_console_dropped(missed)
                ring.set_console_seq(found.oldest)
                if container.console.target != "parent":
                    self._rest = b"** %d printk messages dropped **\r\n" % missed
            elif found.level >= min(container.console.level, ring.console_level):
                ring.set_console_seq(found.seq + 1)
            elif container.console.target == "parent":
                if not self._to_parent(found):
                    ring.count_console_dropped(1)
                ring.set_console_seq(found.seq + 1)
            else:
                self._next, self._rest = found.seq + 1, _line(found)

    def _finish_line(self, ring: LogRing) -> bool:
        """Whether another line can be begun."""
        if not self._rest:
            return True
        if self._fd < 0:
            # They wait in the ring until there is a terminal again.
            self._open_again()
            return False
        try:
            while self._rest:
                self._rest = self._rest[os.write(self._fd, self._rest) :]
        except BlockingIOError:
            if not self._waiting:
                self._waiting = True
                self.container.world.start(self._wait)
            return False
        except OSError:
            # EIO: the line is gone, or the other end of the pseudoterminal.
            self._hung_up()
            return False
        # Only now: a daemon that dies before shows it again rather than never.
        ring.set_console_seq(max(ring.console_seq, self._next))
        return True

    async def _wait(self) -> None:
        """Until the terminal has room."""
        # One byte may be room for poll(2) and not for a newline, which is two.
        await trio.sleep(PAUSE_S)
        try:
            await trio.lowlevel.wait_writable(self._fd)
        except (trio.ClosedResourceError, OSError, ValueError):
            return
        finally:
            self._waiting = False
        self.flush()

    def _to_parent(self, record: Record) -> bool:
        container = self.container
        assert container.parent is not None
        above = container.parent.holder(namespaces.SYSLOG)
        steps = []
        # A parent in a pod may have the log of one that it is not in.
        common = set(above.lineage())
        for each in container.lineage():
            if each in common:
                break
            steps.append(one_line(each.name))
        path = os.fsencode("/".join(reversed(steps)))
        if record.flags & ECHO:
            text = b"\n".join(b"[%s/%s" % (path, line[1:]) for line in record.text.split(b"\n"))
        else:
            text = b"\n".join(b"[%s] %s" % (path, line) for line in record.text.split(b"\n"))
        taken = above.log.append(
            text,
            level=record.level,
            facility=record.facility,
            flags=record.flags | ECHO,
            dictionary=record.dictionary,
            usec=record.usec,
            # Should the daemon die before the place in our log is stored: the same again.
            token=TOKEN | container.number << 32 | record.seq & 0xFFFFFFFF,
        )
        above.log_changed_ns = time.time_ns()
        return taken is not None

    # --- the terminal ---

    def _hung_up(self) -> None:
        log.info("the console of %s has hung up", self.container.name)
        self._close_terminal()
        self._forget_pty()

    def _close_terminal(self) -> None:
        fd, self._fd = self._fd, -1
        self._rest = b""
        if fd >= 0:
            trio.lowlevel.notify_closing(fd)
            # The last close of a serial line waits until it has sent all that it has, for 30 s.
            self.container.world.start(_close, fd)

    def _forget_pty(self) -> None:
        """A pseudoterminal never comes back, but its name does, for somebody else."""
        container = self.container
        if container.console.device and (
            os.major(container.console.device[1]) in UNIX98_PTY_SLAVES
        ):
            container.console = NO_CONSOLE
            container.save()
            self.close()

    def _open_again(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._again_s:
            self._again_s = now_s + AGAIN_S
            self.container.world.start(self.open)

    async def open(self) -> None:
        """Open the terminal that `console` names, if it is still the same."""
        container, console = self.container, self.container.console
        try:
            fd = await open_terminal(container, console)
        except OSError as error:
            log.info("the console of %s: %s", container.name, error)
            if container.log.echo is self and container.console is console:
                self._forget_pty()
            return
        if container.log.echo is not self or container.console is not console or self._fd >= 0:
            # Another one was chosen meanwhile.
            os.close(fd)
        elif device_of(fd) != console.device:
            log.info("the console of %s is another terminal now", container.name)
            os.close(fd)
            self._forget_pty()
        else:
            self._fd = fd
            self.flush()

    def close(self) -> None:
        """Echo no more."""
        if self.container.own_log is not None and self.container.own_log.echo is self:
            self.container.own_log.echo = None
        self._close_terminal()


async def _close(fd: int) -> None:
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(os.close, fd)


def _line(record: Record) -> bytes:
    """As the kernel's console has it, but nothing in it can steer the terminal."""
    stamp = b"[%5d.%06d] " % divmod(record.usec, 1_000_000)
    return stamp + escape(record.text) + b"\r\n"


def device_of(fd: int) -> tuple[int, ...]:
    """What tells a terminal from another one that has its path later."""
    found = os.fstat(fd)
    return found.st_dev, found.st_rdev, found.st_uid


async def open_terminal(container: Container, console: Console) -> int:
    """Its descriptor; opened as whoever wrote the path sees it, and with that user's rights.

    ENOTTY: it is no terminal, or the master of one; ENXIO: it is /dev/tty, which is nobody's here;
    and whatever open(2) says.
    """
    world, origin = container.world, console.origin
    pid = 0
    if origin.viewpoint != ROOT:
        viewpoint = world.containers.get(origin.viewpoint)
        if viewpoint is None or not viewpoint.alive():
            raise FileNotFoundError(errno.ENOENT, "whose path it is is gone", console.target)
        pid = viewpoint.init_pid
    fd = await world.spawner.terminal(pid, console.target, origin.uid, origin.gid)
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENOTTY, "no terminal", console.target)
    return fd


async def set_console(container: Container, console: Console) -> None:
    """Echo to there from now on, and nothing of what was before."""
    fd = -1
    if console.target not in ("none", "parent"):
        fd = await open_terminal(container, console)
        console = console._replace(device=device_of(fd))
    if container.phase is Phase.GONE:
        if fd >= 0:
            os.close(fd)
        raise OSError(errno.ENODEV, "the container is gone", container.name)
    own = container.log
    if own.echo is not None:
        own.echo.close()
    # The place first: what was before is not to be echoed by the next daemon either.
    own.ring.set_console_seq(own.ring.next_seq)
    container.console = console
    container.save()
    if console.target != "none":
        own.echo = Echo(container, fd)


def attach(container: Container) -> None:
    """Go on with the console that a container has, and with what was written meanwhile."""
    target = container.console.target
    if target == "none" or not container.own(namespaces.SYSLOG) or container.log.echo is not None:
        return
    echo = container.log.echo = Echo(container)
    if target == "parent":
        echo.flush()
    else:
        container.world.start(echo.open)


def inherit(heir: Container, of: Container) -> None:
    """A container has ended, and another one of its pod has its log now: with its bounds, and with
    the console of its own from here on."""
    heir.log_limits = of.log_limits
    heir.save()
    echo, heir.log.echo = heir.log.echo, None
    if echo is not None:
        echo.close()
    heir.log.ring.set_console_seq(heir.log.ring.next_seq)
    attach(heir)


def resume(world: World) -> None:
    """Go on with all consoles of an earlier daemon."""
    for container in list(world.containers.values()):
        if container.phase is not Phase.GONE:
            attach(container)
