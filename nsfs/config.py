"""The administrator's configuration: /etc/nsfs.conf, see FILES in nsfs(8).

The file has sections in brackets and lines ``key = value``; a value goes on in the indented lines
that follow. ``#`` or ``;`` begins a line that is a comment. Every key may be left out, and so may
the whole file. What is wrong in it is reported at once and all together, with file, line and key.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from nsfs import limits, namespaces

PATH = Path("/etc/nsfs.conf")
DEFAULT_DIR = PurePosixPath("/sys/namespaces")

# The kernel's eight (namespaces(7)), and the one that nsfs provides.
TYPES = (*namespaces.SORTED, namespaces.SYSLOG)
# `none` is a loopback interface only, `host` the parent's network namespace, `veth` an interface
# whose other end is the parent's.
NETWORKS = ("none", "host", "veth")
# Of syslog(2): it acts on the container's log, or it fails.
SECCOMP = ("notify", "deny")

# What one user namespace wants to hold the IDs of an ordinary system (nobody is 65534).
ID_RANGE = 65536
# (uid_t)-1 means "none" to the kernel, (uid16_t)-1 to old programs, so the last range is not used.
LAST_ID = 0xFFFF_0000 - 1

# Of the private addresses (RFC 1918), a part that few have heard of.
PREFIX = ipaddress.IPv4Network("10.213.0.0/16")
BIND_MODES = ("ro", "rw", "ro,idmap", "rw,idmap")

T = TypeVar("T")


class ConfigError(ValueError):
    """The file is not valid; `errors` has one line for each reason, ``FILE:LINE: KEY: REASON``."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


class Line(NamedTuple):
    """One line of a value, and where it stands (from 1)."""

    number: int
    text: str


class _BadValueError(Exception):
    """What is wrong with a value, and in which line of it."""

    def __init__(self, line: Line, reason: str) -> None:
        super().__init__(reason)
        self.line = line.number


Parser = Callable[[list[Line]], T]


def _one(lines: list[Line]) -> Line:
    """The only line of a value that has to have just one."""
    if len(lines) > 1:
        raise _BadValueError(lines[1], "takes one line only")
    if not lines[0].text:
        raise _BadValueError(lines[0], "has no value")
    return lines[0]


def _rows(lines: list[Line]) -> list[Line]:
    """The lines of a value that may have several: the first may be empty."""
    return [line for line in lines if line.text]


def _size(line: Line, text: str, *, suffixes: str = "") -> int:
    """A decimal or 0x number; with `suffixes`, one of these letters multiplies by 1024 or more."""
    # At most as many digits as 2**64 has: int() refuses thousands of them with its own error.
    match = re.fullmatch(r"(0x[0-9a-fA-F]{1,16}|[0-9]{1,20})([a-zA-Z]?)", text, re.ASCII)
    suffix = match[2].upper() if match else ""
    if not match or suffix not in suffixes:
        raise _BadValueError(line, f"not a number: {text!r}")
    number = int(match[1], 16 if match[1].startswith("0x") else 10)
    return number << 10 * (1 + suffixes.index(suffix)) if suffix else number


def _in_range(line: Line, number: int | float, low: int | float, high: int | float) -> None:
    if not low <= number <= high:
        raise _BadValueError(line, f"out of range: {line.text!r} ({low} to {high})")


def _number(low: int, high: int, *, multiple: int = 1, suffixes: str = "") -> Parser[int]:
    def parse(lines: list[Line]) -> int:
        line = _one(lines)
        number = _size(line, line.text, suffixes=suffixes)
        _in_range(line, number, low, high)
        if number % multiple:
            raise _BadValueError(line, f"not a multiple of {multiple}: {line.text!r}")
        return number

    return parse


def _number_or_max(low: int, high: int) -> Parser[int | None]:
    number = _number(low, high)

    def parse(lines: list[Line]) -> int | None:
        return None if _one(lines).text == "max" else number(lines)

    return parse


def _seconds(low: float, high: float) -> Parser[float]:
    def parse(lines: list[Line]) -> float:
        line = _one(lines)
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", line.text, re.ASCII):
            raise _BadValueError(line, f"not a number of seconds: {line.text!r}")
        _in_range(line, float(line.text), low, high)
        return float(line.text)

    return parse


def _word(*words: str) -> Parser[str]:
    def parse(lines: list[Line]) -> str:
        line = _one(lines)
        if line.text not in words:
            raise _BadValueError(line, f"not one of {', '.join(words)}: {line.text!r}")
        return line.text

    return parse


def _switch(lines: list[Line]) -> bool:
    return _word("on", "off")(lines) == "on"


def _path(line: Line, text: str) -> PurePosixPath:
    path = PurePosixPath(text)
    if not path.is_absolute() or ".." in path.parts or "\0" in text:
        raise _BadValueError(line, f"not an absolute path without '..': {text!r}")
    # Two slashes at the beginning are one to Linux, but not to pathlib.
    return PurePosixPath("/" + text.lstrip("/"))


def _directory(lines: list[Line]) -> PurePosixPath:
    line = _one(lines)
    path = _path(line, line.text)
    if path == PurePosixPath("/"):
        raise _BadValueError(line, "the root directory cannot be the mount point")
    return path


def _rootfs(lines: list[Line]) -> str:
    line = _one(lines)
    return line.text if line.text == "host" else str(_path(line, line.text))


def _paths(lines: list[Line]) -> tuple[PurePosixPath, ...]:
    found = tuple(_path(line, line.text) for line in _rows(lines))
    for line, path in zip(_rows(lines), found, strict=True):
        if found.count(path) > 1:
            raise _BadValueError(line, f"it is named twice: {line.text!r}")
    return found


def _types(lines: list[Line]) -> tuple[str, ...]:
    chosen: set[str] = set()
    for line in _rows(lines):
        for word in line.text.split():
            if word not in TYPES:
                raise _BadValueError(line, f"not a namespace type: {word!r} ({' '.join(TYPES)})")
            chosen.add(word)
    return tuple(kind for kind in TYPES if kind in chosen)


def _binds(lines: list[Line]) -> tuple[tuple[str, str, str], ...]:
    binds: dict[str, tuple[str, str, str]] = {}
    for line in _rows(lines):
        words = line.text.split()
        if len(words) != 3 or words[2] not in BIND_MODES:
            raise _BadValueError(line, f"not TARGET SOURCE ro|rw: {line.text!r}")
        target, source = (str(_path(line, word)) for word in words[:2])
        if target == "/":
            raise _BadValueError(line, "a bind over the root: that is rootfs")
        if target in binds:
            raise _BadValueError(line, f"a second bind at {target!r}")
        binds[target] = (target, source, words[2])
    return tuple(binds.values())


def _prefix(lines: list[Line]) -> ipaddress.IPv4Network:
    line = _one(lines)
    try:
        prefix = ipaddress.IPv4Network(line.text)
    except ValueError:
        raise _BadValueError(line, f"not a prefix of IPv4: {line.text!r}") from None
    if prefix.prefixlen > 31 or "/" not in line.text:
        raise _BadValueError(line, f"not a prefix with room for two addresses: {line.text!r}")
    return prefix


def _limits(lines: list[Line]) -> limits.Limits:
    chosen: dict[tuple[str, str], tuple[str, str]] = {}
    for line in _rows(lines):
        try:
            name, value = limits.parse_line(line.text)
        except OSError as error:
            raise _BadValueError(line, str(error.strerror)) from None
        if limits.key(name, value) in chosen:
            raise _BadValueError(line, f"a second {name}")
        chosen[limits.key(name, value)] = name, value
    return tuple(chosen.values())


# A section each; a key's annotation has, behind its type, what makes a value of lines of the file.


@dataclass(frozen=True)
class Mount:
    """[mount]: where the tree is served."""

    dir: Annotated[PurePosixPath, _directory] = DEFAULT_DIR
    graft: Annotated[bool, _switch] = True


@dataclass(frozen=True)
class Ids:
    """[ids]: the host's UIDs and GIDs, `first` to `last` inclusive, that containers are given.

    `per_container` of them go to each container at the top, with those that are nested in it.
    """

    first: Annotated[int, _number(ID_RANGE, LAST_ID, multiple=ID_RANGE)] = 0x7000_0000
    last: Annotated[int, _number(ID_RANGE, LAST_ID)] = LAST_ID
    per_container: Annotated[int, _number(ID_RANGE, LAST_ID, multiple=ID_RANGE)] = 16 * ID_RANGE


@dataclass(frozen=True)
class Defaults:
    """[defaults]: what the files of the root's defaults/ hold when nsfs starts.

    `rootfs` is a path, or "host" for the host's root filesystem alone, read-only; `binds` are
    (target, source, "ro" or "rw"), `limits` (name, value).
    """

    unshare: Annotated[tuple[str, ...], _types] = TYPES
    rootfs: Annotated[str, _rootfs] = "host"
    idmap: Annotated[str, _word("auto", "host")] = "auto"
    binds: Annotated[tuple[tuple[str, str, str], ...], _binds] = ()
    network: Annotated[str, _word(*NETWORKS)] = "none"
    seccomp: Annotated[str, _word(*SECCOMP)] = "notify"
    limits: Annotated[tuple[tuple[str, str], ...], _limits] = (("pids.max", "4096"),)


@dataclass(frozen=True)
class Make:
    """[make]: how many containers are kept ready in advance for mkdir."""

    spare: Annotated[int, _number(0, 2)] = 1


@dataclass(frozen=True)
class Network:
    """[network]: the addresses of `network veth`, two for each container."""

    prefix: Annotated[ipaddress.IPv4Network, _prefix] = PREFIX


@dataclass(frozen=True)
class Log:
    """[log]: `bytes` of each ring, `bytes_max` that one may be given; records a second and at once,
    None for no limit.

    `firewall_rate` is LOG lines a second, of the whole host, that the breaker lets be, and
    `firewall_pause_s` for how long it switches them off;
    `kernel_lines` the best way of attributing them that is tried.
    """

    bytes: Annotated[int, _number(4096, 2**30, suffixes="KMG")] = 256 * 1024
    bytes_max: Annotated[int, _number(4096, 2**30, suffixes="KMG")] = 16 * 1024 * 1024
    rate: Annotated[int | None, _number_or_max(1, 10**9)] = 1000
    burst: Annotated[int | None, _number_or_max(1, 10**9)] = 5000
    firewall_log: Annotated[bool, _switch] = True
    firewall_rate: Annotated[int | None, _number_or_max(1, 10**9)] = 2000
    firewall_pause_s: Annotated[float, _seconds(0.1, 3600)] = 10.0
    kernel_lines: Annotated[str, _word("exact", "context", "own")] = "exact"


@dataclass(frozen=True)
class Discovery:
    """[discovery]: whether, and how often, namespaces that nobody named are looked for."""

    enabled: Annotated[bool, _switch] = True
    interval_s: Annotated[float, _seconds(0.1, 3600)] = 1.0


@dataclass(frozen=True)
class Views:
    """[views]: files of Python that each declare further views in a table, FILES."""

    modules: Annotated[tuple[PurePosixPath, ...], _paths] = ()


@dataclass(frozen=True)
class Limits:
    """[limits]: what one user of the host may have; None for no limit. Root has none.

    `ranges_per_user`: of his containers, those that have a range of the host's IDs.
    """

    containers_per_user: Annotated[int | None, _number_or_max(0, 10**6)] = 256
    ranges_per_user: Annotated[int | None, _number_or_max(0, 10**6)] = 64


@dataclass(frozen=True)
class Config:
    """The whole file: a section each."""

    mount: Mount = field(default_factory=Mount)
    ids: Ids = field(default_factory=Ids)
    defaults: Defaults = field(default_factory=Defaults)
    make: Make = field(default_factory=Make)
    network: Network = field(default_factory=Network)
    log: Log = field(default_factory=Log)
    discovery: Discovery = field(default_factory=Discovery)
    limits: Limits = field(default_factory=Limits)
    views: Views = field(default_factory=Views)


SECTIONS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "mount": Mount,
        "ids": Ids,
        "defaults": Defaults,
        "make": Make,
        "network": Network,
        "log": Log,
        "discovery": Discovery,
        "limits": Limits,
        "views": Views,
    }
)
KEYS: Mapping[str, Parser[Any]] = MappingProxyType(
    {
        f"{name}.{key}": hint.__metadata__[0]
        for name, section in SECTIONS.items()
        for key, hint in get_type_hints(section, include_extras=True).items()
    }
)


def _read_lines(text: str, fail: Callable[[int, str], None]) -> dict[str, list[Line]]:
    """The lines of each known key, named ``section.key``; what is not one goes to `fail`."""
    values: dict[str, list[Line]] = {}
    section: str | None = None
    # Where indented lines go. A key that was refused takes its own with it, as does an unknown
    # section its keys: one error for one mistake.
    current: list[Line] | None = None
    # Not splitlines(), which ends lines at characters that no editor does.
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip(" \t\r")
        if not line or line[0] in "#;":
            continue
        if raw[0] in " \t":
            if current is None:
                fail(number, f"an indented line that continues nothing: {line!r}")
            else:
                current.append(Line(number, line))
        elif line[0] == "[":
            current, section = None, line[1:-1].strip(" \t")
            if line[-1] != "]":
                fail(number, f"a section without ']': {line!r}")
            elif section not in SECTIONS:
                fail(number, f"no such section: [{section}]")
        elif "=" not in line:
            current = []
            fail(number, f"neither [section] nor key = value: {line!r}")
        else:
            key, value = (part.strip(" \t") for part in line.split("=", 1))
            current = [Line(number, value)]
            if section is None:
                fail(number, f"{key}: stands before any [section]")
            elif section in SECTIONS:
                name = f"{section}.{key}"
                if name not in KEYS:
                    fail(number, f"{name}: no such key")
                elif name in values:
                    fail(number, f"{name}: set before, in line {values[name][0].number}")
                else:
                    values[name] = current
    return values


def parse(text: str, name: str) -> Config:
    """Make a Config of a file's text; `name` is what errors call the file.

    Raises ConfigError with every error that is in it, in the order of lines.
    """
    errors: list[tuple[int, str]] = []

    def fail(number: int, reason: str) -> None:
        errors.append((number, f"{name}:{number}: {reason}"))

    lines = _read_lines(text, fail)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for full, rows in lines.items():
        section, key = full.split(".", 1)
        try:
            values[section][key] = KEYS[full](rows)
        except _BadValueError as error:
            fail(error.line, f"{full}: {error}")

    config = Config(**{section: SECTIONS[section](**keys) for section, keys in values.items()})
    ids = config.ids
    if not errors and ids.last - ids.first + 1 < ids.per_container:
        # Whichever key was set last made it so.
        number, full = max((lines[key][0].number, key) for key in lines if key.startswith("ids."))
        fail(number, f"{full}: {ids.first} to {ids.last} has no room for {ids.per_container} IDs")

    if errors:
        raise ConfigError([error for _, error in sorted(errors)])
    return config


def load(path: Path | None = None) -> Config:
    """Read the configuration from `path`, or from /etc/nsfs.conf, which need not exist.

    Raises ConfigError for what is wrong in it, OSError when it cannot be read (ENOENT only for a
    `path` that was given).
    """
    try:
        data = (path or PATH).read_bytes()
    except FileNotFoundError:
        if path is not None:
            raise
        return Config()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise ConfigError([f"{path or PATH}:{number}: not UTF-8"]) from error
    return parse(text, str(path or PATH))
