"""The bounds of kernel logs: bytes of the ring, records a second and at once.

A container's are its parent's to set (`nsfs.log`), and recorded before they are so.  The host's
root may give one at the top up to what the configuration lets be; one that is nested in another
gets no more than that one has, since what a log takes is the host's memory.
"""

from __future__ import annotations

import os
from typing import Any

from nsfs.attribute import flat_keyed, invalid, out_of_range
from nsfs.build import LogLimits
from nsfs.container import Container
from nsfs.limits import parse_number
from nsfs.logring import Limit
from nsfs.logstream import Log
from nsfs.store import map_new

BYTES_MIN = 4096
RATE_MAX = 10**9
"""Also of `burst`; as in the configuration."""


def limit(rate: int | None, burst: int | None) -> Limit | None:
    """As a ring takes it: without a rate, or with any number at once, there is none."""
    return None if rate is None or burst is None else Limit(rate, burst)


def limits_of(container: Container) -> LogLimits:
    """Those of a container's own log."""
    settings = container.world.config.log
    own = container.log_limits
    return own or LogLimits(settings.bytes, settings.rate, settings.burst)


def most(parent: Container) -> LogLimits:
    """What a container nested in this one may be given."""
    if parent.parent is None:
        settings = parent.world.config.log
        return LogLimits(max(settings.bytes, settings.bytes_max), None, None)
    return limits_of(parent)


def default(container: Container) -> LogLimits:
    """What `defaults/log` of a container says: its own word or an ancestor's, the configuration's
    in the end."""
    for each in container.lineage():
        if "log" in each.defaults:
            return LogLimits(*each.defaults["log"])
    return limits_of(container.world.root)


def _smaller(one: int | None, other: int | None) -> int | None:
    return min((each for each in (one, other) if each is not None), default=None)


def for_child(parent: Container) -> LogLimits:
    """What mkdir gives a container nested in this one."""
    wanted, bound = default(parent), most(parent)
    return LogLimits(
        min(wanted.bytes, bound.bytes),
        _smaller(wanted.rate, bound.rate),
        _smaller(wanted.burst, bound.burst),
    )


def format_limits(limits: LogLimits) -> str:
    """Flat-keyed; `max` for no limit."""
    return flat_keyed((k, "max" if v is None else v) for k, v in limits._asdict().items())


def parse_limits(value: str, before: LogLimits, bound: LogLimits) -> LogLimits:
    """Lines KEY VALUE; keys that are left out stay as they were, bytes may have a suffix.

    EINVAL for another key, one that comes twice, or what is no number; ERANGE for less than
    4096 bytes, a rate or burst of 0, and for more than `bound`.
    """
    found: dict[str, Any] = {}
    for line in value.splitlines():
        words = line.split()
        if len(words) != 2 or words[0] not in LogLimits._fields or words[0] in found:
            raise invalid(line)
        key, text = words
        top: int | None = getattr(bound, key)
        if key == "bytes":
            found[key] = parse_number(text, BYTES_MIN, bound.bytes, "KMG")
        elif text != "max":
            found[key] = parse_number(text, 1, RATE_MAX if top is None else top)
        elif top is None:
            found[key] = None
        else:
            raise out_of_range(line)
    if not found:
        raise invalid(value)
    return before._replace(**found)


def resize(container: Container, log: Log, size: int) -> None:
    """Give an open log a ring of another size, with the newest records that fit."""
    store = container.world.store
    path, new = store.log_path(container.number, "log"), f"{store.directory}/log.new"
    log.ring = log.ring.copy_into(map_new(new, size))
    os.rename(new, path)


def change(container: Container, limits: LogLimits) -> None:
    """Set those of a container's own log, at once."""
    log = container.log
    container.log_limits = limits
    container.save()
    if log.ring.buffer_size != limits.bytes:
        resize(container, log, limits.bytes)
    log.ring.set_limit(limit(limits.rate, limits.burst))
