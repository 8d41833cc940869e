"""Limits by cgroup v2's names: what may be written, and the form in which it is kept and shown.

The forms are those of Documentation/admin-guide/cgroup-v2.rst.  Numbers of bytes may have a suffix
K, M, G or T, which is resolved here.  EINVAL is a wrong syntax, ERANGE a value that cannot be; the
text of the error is one sentence for whoever wrote it.  Nothing here asks the kernel.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

Limits = tuple[tuple[str, str], ...]
"""(name, value) pairs, a name once, but for those of `DEVICES`: once a device."""

NO_LIMIT = "max"
BYTES_MAX = 2**63 - 1
PIDS_MAX = 4 * 1024 * 1024
"""PID_MAX_LIMIT of 64-bit machines."""
PERIOD_USEC = 100_000
"""The period of cpu.max when none was ever written."""
IO_KEYS = ("rbps", "wbps", "riops", "wiops")
_SUFFIXES = "KMGT"


def _invalid(reason: str) -> OSError:
    return OSError(errno.EINVAL, reason)


def parse_number(word: str, low: int, high: int, suffixes: str = "") -> int:
    """A decimal or 0x number, which one of the letters of `suffixes` multiplies by 1024 or more;
    EINVAL for what is none, ERANGE beyond the bounds."""
    # At most as many digits as 2**64 has: int() refuses thousands of them with its own error.
    match = re.fullmatch(r"(-?)(0x[0-9a-fA-F]{1,16}|[0-9]{1,20})([a-zA-Z]?)", word, re.ASCII)
    suffix = match[3].upper() if match else ""
    if not match or suffix not in suffixes:
        raise _invalid(f"not a number: {word!r}")
    number = int(match[2], 16 if match[2].startswith("0x") else 10)
    if suffix:
        number <<= 10 * (1 + suffixes.index(suffix))
    if match[1] or not low <= number <= high:
        raise OSError(errno.ERANGE, f"out of range: {word!r} ({low} to {high})")
    return number


def _only(name: str, value: str) -> str:
    words = value.split()
    if len(words) != 1:
        raise _invalid(f"{name} takes one value: {value.strip()!r}")
    return words[0]


def _count(low: int, high: int, suffixes: str = "") -> Callable[[str, str, str], str]:
    def parse(name: str, value: str, now: str) -> str:
        word = _only(name, value)
        return word if word == NO_LIMIT else str(parse_number(word, low, high, suffixes))

    return parse


def _cpu_max(name: str, value: str, now: str) -> str:
    words = value.split()
    if not 1 <= len(words) <= 2:
        raise _invalid("cpu.max takes MAX and PERIOD, in microseconds")
    # The bounds are the kernel's: kernel/sched/core.c, tg_set_cfs_bandwidth().
    quota = words[0]
    if quota != NO_LIMIT:
        quota = str(parse_number(quota, 1_000, 2**44))
    # Without one the period stays what it is, as cpu_period_quota_parse() has it.
    period = now.split()[1] if now else PERIOD_USEC
    if len(words) == 2:
        period = parse_number(words[1], 1_000, 1_000_000)
    return f"{quota} {period}"


def _cpu_weight(name: str, value: str, now: str) -> str:
    return str(parse_number(_only(name, value), 1, 10_000))


def _io_weight(name: str, value: str, now: str) -> str:
    return f"default {parse_number(_only(name, value.strip().removeprefix('default ')), 1, 10_000)}"


def _device(word: str) -> str:
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,8})", word, re.ASCII)
    if not match:
        raise _invalid(f"not a device MAJOR:MINOR: {word!r}")
    return f"{int(match[1])}:{int(match[2])}"


def _io_max(name: str, value: str, now: str) -> str:
    device, *pairs = value.split() or [""]
    device = _device(device)
    chosen = dict(pair.split("=") for pair in now.split()[1:])
    for pair in pairs:
        key, equals, word = pair.partition("=")
        if key not in IO_KEYS or not equals:
            raise _invalid(f"not {'=, '.join(IO_KEYS)}=: {pair!r}")
        suffixes = _SUFFIXES if key.endswith("bps") else ""
        chosen[key] = word if word == NO_LIMIT else str(parse_number(word, 1, 2**63 - 1, suffixes))
    if not pairs:
        raise _invalid(f"no limit of {device}")
    return f"{device} " + " ".join(f"{key}={chosen.get(key, NO_LIMIT)}" for key in IO_KEYS)


_BYTES = _count(0, BYTES_MAX, _SUFFIXES)

_PARSERS: Mapping[str, Callable[[str, str, str], str]] = MappingProxyType(
    {
        "cpu.max": _cpu_max,
        "cpu.weight": _cpu_weight,
        "io.max": _io_max,
        "io.weight": _io_weight,
        "memory.high": _BYTES,
        "memory.low": _BYTES,
        "memory.max": _BYTES,
        "memory.swap.max": _BYTES,
        # A container needs one for its init.
        "pids.max": _count(1, PIDS_MAX),
    }
)
NAMES = tuple(_PARSERS)
DEVICES = frozenset({"io.max"})
"""Those that are a line for each device, which is the first word of the value."""


def parse(name: str, value: str, now: str = "") -> str:
    """A limit's value in the form in which it is read back.

    `now` is the value that it has, from which what was not written is taken (a period, the other
    limits of a device).
    """
    if name not in _PARSERS:
        raise _invalid(f"not a limit: {name!r} ({' '.join(NAMES)})")
    if not value.strip():
        raise _invalid(f"{name} has no value")
    return _PARSERS[name](name, value, now)


def no_limit(device: str) -> str:
    """io.max of a device that has none."""
    return f"{device} " + " ".join(f"{key}={NO_LIMIT}" for key in IO_KEYS)


def key(name: str, value: str) -> tuple[str, str]:
    """What there is one limit of: a name, and with `DEVICES` the device."""
    return name, value.split()[0] if name in DEVICES else ""


def parse_line(line: str) -> tuple[str, str]:
    """`NAME VALUE`."""
    name, *rest = line.split(None, 1) or [""]
    return name, parse(name, *rest or [""])


def parse_lines(lines: Iterable[str]) -> Limits:
    """Lines `NAME VALUE`, none twice."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for line in lines:
        name, value = parse_line(line)
        if key(name, value) in found:
            raise _invalid(f"a second {name}")
        found[key(name, value)] = name, value
    return tuple(found.values())


def merged(limits: Limits, name: str, value: str) -> Limits:
    """The same limits with one more, or one of them changed."""
    found = {key(n, v): (n, v) for n, v in limits}
    found[key(name, value)] = name, value
    return tuple(found.values())


def find(limits: Limits, name: str, device: str = "") -> str:
    """A limit's value; "" when there is none."""
    return next((v for n, v in limits if key(n, v) == (name, device)), "")


# --- what the kernel makes of it ---

PAGE = os.sysconf("SC_PAGE_SIZE")


def to_pages(value: str) -> str:
    """A number of bytes as page_counter_memparse() keeps it: in whole pages."""
    if not value.isdigit():
        return value
    number = int(value) // PAGE * PAGE
    # PAGE_COUNTER_MAX
    return NO_LIMIT if number >= 2**63 - PAGE else str(number)
