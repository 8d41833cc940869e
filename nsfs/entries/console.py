"""`console`: where lines of a container's kernel log are echoed.

none           nowhere, at first
parent LEVEL   into the parent's kernel log, each line tagged with the container's name
PATH LEVEL     a terminal, by an absolute path; blanks in it as \\040

Only records of a level below LEVEL (1 to 8), and below the container's own console level, which
syslog(2) sets inside, are echoed.  EINVAL for another syntax, ERANGE for another level, ENOTTY for
what is no terminal, ENXIO for /dev/tty, EOPNOTSUPP for a container without a log of its own.
"""

from __future__ import annotations

import errno
import os

from nsfs import namespaces
from nsfs.attribute import (
    NOT_ON_ROOT,
    PARENTS,
    Attribute,
    Caller,
    invalid,
    one_line,
    parse_int,
    unescape,
)
from nsfs.build import NO_CONSOLE, Console, Origin
from nsfs.console import LEVEL_MAX, LEVEL_MIN, set_console
from nsfs.container import Face


def console_show(face: Face) -> str:
    """As it is written."""
    console = face.container.console
    if console.target == "none":
        return "none\n"
    return f"{one_line(console.target)} {console.level}\n"


def _parse(value: str, origin: Origin) -> Console:
    words = value.split()
    if words == ["none"]:
        return NO_CONSOLE
    if len(words) != 2:
        raise invalid(value)
    target = unescape(words[0])
    if target != "parent":
        if not target.startswith("/") or "\0" in target or ".." in target.split("/"):
            raise invalid(value)
        target = os.path.normpath(target)
    return Console(target, parse_int(words[1], LEVEL_MIN, LEVEL_MAX), origin)


async def console_store(face: Face, value: str, caller: Caller) -> None:
    """What was written before is not echoed."""
    container = face.container
    container.check_alive()
    console = _parse(value, Origin(face.viewpoint.number, caller.uid, caller.gid))
    if not container.own(namespaces.SYSLOG):
        if console is NO_CONSOLE:
            # Of the time when it had a log.
            container.console = console
            container.save()
            return
        raise OSError(errno.EOPNOTSUPP, "its log is another's", container.name)
    await set_console(container, console)


FILES = (Attribute("console", show=console_show, store=console_store, flags=NOT_ON_ROOT | PARENTS),)
