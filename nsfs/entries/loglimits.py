"""`nsfs.log`: the bounds of a container's kernel log; `defaults/log` of those to be made in it.

bytes  of the ring, with K, M or G of 1024 if wanted, a record taking 32 and its text; the oldest
       records make room
rate   records a second that are let in, `max` for no limit
burst  records that are let in at once, `max` for no limit

Writing takes some or all of these lines.  ERANGE beyond what the container's parent has (at the
top: `bytes_max` of the configuration), EOPNOTSUPP for one without a log of its own.
"""

from __future__ import annotations

import errno

from nsfs import loglimits, namespaces
from nsfs.attribute import NOT_ON_ROOT, PARENTS, Attribute, Caller
from nsfs.container import Face


def log_show(face: Face) -> str:
    """Those of the log that `kmsg` shows."""
    holder = face.container.holder(namespaces.SYSLOG)
    return loglimits.format_limits(loglimits.limits_of(holder))


def log_store(face: Face, value: str, caller: Caller) -> None:
    """Takes effect at once; the newest records that fit are kept."""
    container = face.container
    parent = container.parent
    assert parent is not None
    before = loglimits.limits_of(container)
    limits = loglimits.parse_limits(value, before, loglimits.most(parent))
    if not container.own(namespaces.SYSLOG):
        raise OSError(errno.EOPNOTSUPP, "its log is another's", container.name)
    loglimits.change(container, limits)


def default_show(face: Face) -> str:
    """What mkdir gives."""
    return loglimits.format_limits(loglimits.default(face.container))


def default_store(face: Face, value: str, caller: Caller) -> None:
    """An empty value takes back what was written."""
    container = face.container
    container.check_alive()
    if value.strip():
        before = loglimits.default(container)
        bound = loglimits.most(container)
        container.defaults["log"] = list(loglimits.parse_limits(value, before, bound))
    else:
        container.defaults.pop("log", None)
    container.save()


DEFAULT = Attribute("log", show=default_show, store=default_store)
FILES = (Attribute("nsfs.log", show=log_show, store=log_store, flags=NOT_ON_ROOT | PARENTS),)
