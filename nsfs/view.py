"""Open views: what tagged directories show of namespaces beside the entries of their tables.

The idea is that of sysfs's tagged directories (E. Biederman, 2008; fs/sysfs and `kobj_ns_type_
operations` in the kernel): a directory has at most one type, what it shows depends on the tag, and
when the tag dies its entries vanish.  Here the tag is a container: the one whose namespace it is.

A view opens when it is first looked at and closes when nobody has for a while, so that what is idle
holds nothing.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from nsfs import namespaces
from nsfs.accounts import Turns
from nsfs.attribute import Answer, Attribute, Caller, Contents, Directory, TagType
from nsfs.authority import check_namespace
from nsfs.container import Container, Face, Phase
from nsfs.found import Found, check_privilege
from nsfs.syscalls import forget_answers

__all__ = ["Attribute", "Caller", "Contents", "Directory", "Face", "TagType", "Views", "inside"]

IDLE_S = 10.0
"""How long an open view is kept that nobody looks at."""

RESERVE = 32
"""How many files the daemon is to be able to open beside those of views."""

T = TypeVar("T")


class _Open:
    __slots__ = ("contents", "ready", "used")

    def __init__(self) -> None:
        self.ready = trio.Event()
        self.contents: Contents | None = None
        self.used = 0.0


class Views:
    """The views that are open, each once for all who look at it."""

    def __init__(self) -> None:
        self._open: dict[tuple[TagType, Container], _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, face: Face, view: TagType) -> Contents | None:
        """What a view shows on a face, if it is open; FileNotFoundError when its namespace is
        dead."""
        container = tag(face, view)
        if not lives(container) or face.container.phase is Phase.GONE:
            raise FileNotFoundError(errno.ENOENT, "the namespace is dead", view.name)
        if view.contents is None:
            return _NOTHING
        found = self._open.get((view, container))
        if found is None or found.contents is None:
            return None
        found.used = time.monotonic()
        return found.contents

    def of(self, face: Face, view: TagType) -> Answer[Contents]:
        """The same, opened if need be."""
        return self.opened(face, view) or self._opening(tag(face, view), view)

    async def _opening(self, container: Container, view: TagType) -> Contents:
        assert view.contents is not None
        key = (view, container)
        found = self._open.get(key)
        while found is not None:
            if found.contents is not None:
                found.used = time.monotonic()
                return found.contents
            await found.ready.wait()
            # Whoever opened it may have failed.
            found = self._open.get(key)
        found = self._open[key] = _Open()
        self._make_room()
        try:
            contents = await view.contents(container)
        except ProcessLookupError as error:
            raise FileNotFoundError(errno.ENOENT, "the namespace is dead", view.name) from error
        finally:
            found.ready.set()
            if self._open.get(key) is found:
                del self._open[key]
        if not lives(container):
            contents.close()
            raise FileNotFoundError(errno.ENOENT, "the namespace is dead", view.name)
        found.contents = contents
        found.used = time.monotonic()
        self._open[key] = found
        return contents

    def close_idle(self) -> None:
        """Close what nobody has looked at for IDLE_S."""
        before = time.monotonic() - IDLE_S
        for key, each in list(self._open.items()):
            if each.contents is not None and each.used < before:
                self._close(key)

    def _make_room(self) -> None:
        """Close those that nobody has looked at for longest, while the daemon may open only few
        more files: whoever looks there again has them opened again, and all else
        needs some, too."""
        opened = [key for key, each in self._open.items() if each.contents is not None]
        for key in sorted(opened, key=lambda key: self._open[key].used):
            if not files_are_scarce():
                return
            self._close(key)

    def _close(self, key: tuple[TagType, Container]) -> None:
        contents = self._open.pop(key).contents
        forget_answers()
        assert contents is not None
        contents.close()

    def ended(self, container: Container) -> None:
        """The container's namespaces are dead, or will be others."""
        forget_answers()
        for key in [key for key in self._open if key[1] is container]:
            each = self._open.pop(key)
            if each.contents is not None:
                each.contents.close()
            if key[0].died is not None:
                key[0].died(container)


def files_are_scarce() -> bool:
    """Whether fewer than RESERVE further files can be opened.  (To count those that are would take
    milliseconds where there are many.)"""
    fds: list[int] = []
    try:
        while len(fds) < RESERVE:
            fds.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return True
    finally:
        for fd in fds:
            os.close(fd)
    return False


_NOTHING = Contents()


def tag(face: Face, view: TagType) -> Container:
    """Whose namespace a view shows on a face."""
    assert view.tag is not None
    found: Container = view.tag(face)
    return found


def life(container: Container) -> int | None:
    """The process that its namespaces live as long as: its init, 0 for the host's, which live as
    long as anything does; None: they are dead."""
    if container.parent is None:
        return 0
    return container.init_pid or None if container.alive() else None


def lives(container: Container) -> bool:
    """Whether its namespaces are still held by its init."""
    if isinstance(container, Found):
        return container.lives()
    pid = life(container)
    if not pid:
        return pid is not None
    try:
        # A tenth of what a look into /proc costs.  What has ended and was reaped is not there any
        # more, although its death may not have been told yet.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def check_write(face: Face, view: TagType, caller: Caller) -> None:
    """Whether a caller whom the modes allow it may change what a view shows.

    ENODEV when the namespace is dead; EPERM when it is another container's, which is not the
    caller's to change.
    """
    container = tag(face, view)
    if not lives(container):
        raise OSError(errno.ENODEV, "the namespace is dead", view.name)
    if isinstance(container, Found):
        check_privilege(container, face, view.kind, caller)
    elif view.kind in namespaces.ALL and container is not face.container:
        check_namespace(face, view.kind, caller)


async def inside(
    container: Container, kinds: tuple[str, ...], work: Callable[[], T], turns: Turns | None = None
) -> T:
    """Run `work` in a thread that has joined a container's namespaces of some types.

    Only types that a thread can join by itself: net, ipc, uts and cgroup (setns(2)).  The thread
    ends with it, so it never has to come back.  ProcessLookupError when the namespaces are dead.
    """
    if container.parent is None:
        return await in_thread(work, turns, container)
    pid, numbers = process_in(container)
    return await in_thread(lambda: namespaces.within(pid, kinds, work, numbers), turns, container)


def process_in(container: Container) -> tuple[int, tuple[int, ...]]:
    """A process in a container's namespaces, and their inode numbers where it may leave them."""
    return container.init_pid, container.numbers if isinstance(container, Found) else ()


async def in_thread(
    work: Callable[[], T], turns: Turns | None = None, about: Container | None = None
) -> T:
    """Run what may block in a thread; a signal of whoever waits leaves it behind."""
    running: Awaitable[T] = trio.to_thread.run_sync(
        work, abandon_on_cancel=True, limiter=(turns or _threads).of(about)
    )
    return await running


_threads = Turns(64, 16)
PROC = Turns(2, 1)
"""Of what goes through as many processes, mounts or IPC objects as a container likes to have.  Such
threads compute: were there many, the event loop would seldom get the interpreter's lock."""
DUMPS = Turns(2, 1)
"""The same of interfaces, addresses and routes; others may have to wait for the RTNL."""
