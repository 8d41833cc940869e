"""What the entries of a container's directory are: files, links and directories, declared in
tables.

A module of `nsfs.entries` or `nsfs.views` ends in a table::

    FILES = (
        Attribute("freeze", show=freeze_show, store=freeze_store, flags=NOT_ON_ROOT),
        Attribute("state", show=state_show, poll=state_poll),
    )

`show(face)` returns the text of the file, `store(face, value, caller)` takes what was written;
either may be a coroutine function.  The mode follows from which of them there are.  A *face* is a
container as one viewpoint shows it; this module only passes it on.  What every control file has in
common is the core's: one snapshot for each open, one value a write, at most 4096 bytes, one
trailing newline stripped, direct I/O.

Values are parsed and formatted here as cgroup v2 does it (Documentation/admin-guide/cgroup-v2.rst,
"Interface Files"): one value, or flat-keyed lines; `max` means no limit.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from types import CoroutineType
from typing import Any, NamedTuple, TypeAlias, TypeVar

FILE_SIZE = 4096
"""st_size of a file that has no other: 0 would read as empty with sendfile(2) and busybox."""
VALUE_MAX = 4096
"""The longest value that a control file takes, in bytes."""

S = TypeVar("S")
T = TypeVar("T")
Answer: TypeAlias = T | Coroutine[Any, Any, T]
"""What can be told at once, or a coroutine that waits for it.  To wait is dear: a coroutine for
each layer, and a cancel scope in case that nobody wants the answer any more."""


def then(found: Answer[S], do: Callable[[S], Answer[T]]) -> Answer[T]:
    """What follows from an answer: at once, where that is there."""
    if isinstance(found, CoroutineType):
        return _afterwards(found, do)
    return do(found)  # type: ignore[arg-type]


async def awaited(found: Answer[T]) -> T:
    """An answer, waited for if need be."""
    return await found if isinstance(found, CoroutineType) else found  # type: ignore[return-value]


async def _afterwards(found: Coroutine[Any, Any, S], do: Callable[[S], Answer[T]]) -> T:
    return await awaited(do(await found))


class Flags(enum.Flag):
    """Where an entry exists, and whose it is."""

    NONE = 0
    NOT_ON_ROOT = enum.auto()
    """The root of a viewpoint's tree that is the host itself does not have it."""
    PARENTS = enum.auto()
    """The parent's to change: the inner face shows it read-only."""
    HIDDEN = enum.auto()
    """Neither listed nor found by name: nsfs binds it somewhere else."""
    FOUND = enum.auto()
    """Containers that nsfs found have it, too; what is PARENTS is read-only there."""


NOT_ON_ROOT = Flags.NOT_ON_ROOT
PARENTS = Flags.PARENTS
HIDDEN = Flags.HIDDEN
FOUND = Flags.FOUND


class Caller(NamedTuple):
    """The process that makes a request: `tid` as the host numbers it, and its fsuid and fsgid."""

    tid: int
    uid: int
    gid: int
    writer: int = 0
    """Of what is written: the thread that does, which need not be the one that opened the file."""


class OpenFile:
    """An open file that is a stream rather than a value.

    `token` names the open file for ever: the next daemon, asked about an open file it has never
    seen, makes it again with `reopened` true.
    """

    waits = False
    """Whether a read may wait for as long as nobody writes."""
    writer = 0
    """The thread whose write(2) is being dispatched, as the host numbers it."""

    def __init__(self, face: Any, token: int, flags: int, reopened: bool) -> None:
        self.face = face
        self.token = token
        self.flags = flags

    def read(self, offset: int, size: int, request: int) -> Answer[bytes]:
        """Up to `size` bytes; b"" is the end.  May wait: a signal of the caller cancels it.

        `request` names the request: one with the same number is the same one again.
        """
        raise OSError(errno.EINVAL, "not open for reading")

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE, the only ones that a filesystem is asked about: a
        file without holes.  Returns the new offset; ENXIO beyond the end."""
        size = self.size()
        if offset >= size:
            raise OSError(errno.ENXIO, "beyond the end")
        return offset if whence == os.SEEK_DATA else size

    def size(self) -> int:
        """The file's st_size."""
        return FILE_SIZE

    async def write(self, offset: int, data: bytes, request: int) -> int:
        """Take `data`; returns how many bytes were taken."""
        raise OSError(errno.EINVAL, "not open for writing")

    def poll(self, notify: Callable[[], None] | None) -> int:
        """The events that hold now, as poll(2) names them; `notify` is called when that changes."""
        return select.POLLIN | select.POLLOUT

    def release(self) -> None:
        """The last descriptor of it was closed."""


class Watchers:
    """Who is to be told once when something changes, and how often it has."""

    __slots__ = ("_waiting", "begin", "version")

    def __init__(self, begin: Callable[[], None] | None = None) -> None:
        self.version = 0
        self.begin = begin
        """What has to be done before anybody waits; it may tell."""
        self._waiting: dict[object, Callable[[], None]] = {}

    def add(self, key: object, notify: Callable[[], None]) -> None:
        """Call `notify` at the next change, instead of what the same key had added."""
        if self.begin is not None:
            self.begin()
        self._waiting[key] = notify

    def drop(self, key: object) -> None:
        """Nobody waits under that key any more."""
        self._waiting.pop(key, None)

    def tell(self) -> None:
        """Something has changed."""
        self.version += 1
        waiting, self._waiting = self._waiting, {}
        for notify in waiting.values():
            notify()


Show = Callable[..., Answer[str | bytes]]
"""(face), and the key of an entry that comes and goes."""
Store = Callable[[Any, str, Caller], "Awaitable[None] | None"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """What every row of a table has: its name, its flags, its kind and mode."""

    name: str = field(kw_only=False)
    flags: Flags = Flags.NONE
    mode: int = 0
    """File type and permissions, as in st_mode; 0 lets the kind of entry decide."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attribute(Entry):
    """A control file."""

    show: Show | None = None
    store: Store | None = None
    stream: Callable[..., OpenFile] | None = None
    truncate: Callable[[Any, Caller], None] | None = None
    watch: Callable[[Any], Watchers] | None = None
    """Where its changes are told: poll(2) then gives POLLPRI as it does for cgroup.events."""
    lines: bool = False
    """Its value is lines: what one open file is written piece by piece is one value, since shells'
    echo and printf write each line by itself."""
    bound: str = ""
    """nsfs binds it elsewhere or opens it itself: it finds it as `.f/FACE.BOUND`."""
    mtime: Callable[[Any], int] | None = None
    """The time of the last change in ns, for files that tail(1) follows."""
    size: Callable[[Any], int] | None = None
    """st_size in bytes; FILE_SIZE without it.  It grows for files that tail(1) follows."""

    def __post_init__(self) -> None:
        if not self.mode:
            mode = (0o444 if self.show else 0) | (0o200 if self.store else 0)
            object.__setattr__(self, "mode", mode)
        if not stat.S_IFMT(self.mode):
            object.__setattr__(self, "mode", self.mode | stat.S_IFREG)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Link(Entry):
    """A symbolic link."""

    target: Callable[[Any], str | Awaitable[str]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", stat.S_IFLNK | 0o777)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Directory(Entry):
    """A directory: `entries` are always there; the rest is for what comes and goes.

    `names(face)` gives `(name, key)` pairs; `find(face, name)` one key, or raises
    FileNotFoundError.  Each such entry is of the kind `member` (a row of a table), and `key` (an
    integer below 2**32) is what tells one from another.
    """

    entries: tuple[Entry, ...] = ()
    names: Callable[[Any], Iterable[tuple[str, int]]] | None = None
    find: Callable[[Any, str, Caller], int] | None = None
    member: Entry | None = None
    link: Callable[..., Awaitable[Any]] | None = None
    """link(2) into it: (face, new name, source face, source entry, source key, caller)."""
    make: Callable[[Any, str, Caller], Awaitable[None]] | None = None
    """mkdir(2) in it: (face, name, caller)."""
    remove: Callable[[Any, str, Caller], Awaitable[None]] | None = None
    """rmdir(2) of a directory in it: (face, name, caller)."""
    rename: Callable[[Any, str, Any, Directory, str, Caller], Awaitable[None]] | None = None
    """rename(2) out of it: (face, name, new face, new directory, new name, caller)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", stat.S_IFDIR | (self.mode & 0o7777 or 0o755))


class Contents:
    """What a tagged directory shows of one namespace, beside the entries that are always there.

    A path is the names below the tagged directory; () is that directory itself.  Every call may
    find the namespace dead: what is not there any more is FileNotFoundError, and a file's show and
    store, which are called later, say ENODEV.  None may block; what has to wait is a coroutine.
    """

    def entry(self, path: tuple[str, ...]) -> Answer[Entry]:
        """What is at a path: a file, a link or a directory (whose `entries` do not count);
        FileNotFoundError when nothing is."""
        raise FileNotFoundError(errno.ENOENT, "no such file or directory", "/".join(path))

    def names(self, path: tuple[str, ...]) -> Answer[Iterable[str]]:
        """The names in the directory at a path, in any order."""
        return ()

    def depends_on(self, path: tuple[str, ...]) -> tuple[int, str] | None:
        """What has to be there for the directory of that path, which was found: a symbolic link,
        seen from the directory of a descriptor that stays open; (-1, "") where the namespace is
        enough.  None: who asks again is to be told by `entry` again."""
        return None

    def close(self) -> None:
        """Nobody has looked for a while, or the namespace is dead: let go of everything."""


def _holder(kind: str) -> Callable[[Any], Any]:
    return lambda face: face.container.holder(kind)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TagType(Directory):
    """A tagged directory, a *view*: it shows one namespace, and so does all that is below it.

    A directory has at most one type.  The name is the namespace's type, unless `kind` says another;
    `entries` are always there, `contents` opens the rest when it is first looked at.  What stands
    in a view is looked up anew each time, so when the namespace dies its entries are gone at once,
    and files that are open answer ENODEV.
    """

    kind: str = ""
    """The namespace type, or a word of its own for what is no namespace."""
    tag: Callable[[Any], Any] | None = None
    """Which container's the shown one is: (face).  Unless given, that of the container, or of the
    nearest one above with which it shares its namespace of that type."""
    contents: Callable[[Any], Awaitable[Contents]] | None = None
    """(container whose namespace it is): open what is shown of it.  It is closed when idle."""
    died: Callable[[Any], None] | None = None
    """(container): told when its namespace has died, after the contents were closed."""

    def __post_init__(self) -> None:
        # super() does not know the class that slots=True makes.
        Directory.__post_init__(self)
        if not self.kind:
            object.__setattr__(self, "kind", self.name)
        if self.tag is None:
            object.__setattr__(self, "tag", _holder(self.kind))


# --- values ------------------------------------------------------------------------------------


def invalid(about: str) -> OSError:
    """EINVAL: the syntax of a value is wrong."""
    return OSError(errno.EINVAL, f"invalid value: {about}")


def out_of_range(about: str) -> OSError:
    """ERANGE: the syntax is right, the value is not one that can be."""
    return OSError(errno.ERANGE, f"value out of range: {about}")


def parse_int(text: str, low: int, high: int) -> int:
    """One decimal number; EINVAL when it is none, ERANGE when it is below `low` or above `high`."""
    word = text.strip()
    if not (word.isascii() and word.removeprefix("-").isdigit()):
        raise invalid(text)
    value = int(word)
    if not low <= value <= high:
        raise out_of_range(text)
    return value


def parse_bool(text: str) -> bool:
    """0 or 1, as cgroup.freeze takes them."""
    return bool(parse_int(text, 0, 1))


def parse_words(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Words separated by blanks or commas, each one of `known`, none twice."""
    allowed = set(known)
    words = tuple(text.replace(",", " ").split())
    if len(set(words)) != len(words) or not allowed.issuperset(words):
        raise invalid(text)
    return words


def flat_keyed(values: Mapping[str, object] | Iterable[tuple[str, object]]) -> str:
    """`KEY VALUE` lines."""
    pairs = values.items() if isinstance(values, Mapping) else values
    return "".join(f"{key} {value}\n" for key, value in pairs)


def lines(values: Iterable[object]) -> str:
    """One value a line."""
    return "".join(f"{value}\n" for value in values)


def one_line(text: str) -> str:
    """A name as one word of a line: control characters, blanks and backslashes as \\ooo, as in
    /proc/mounts (getmntent(3))."""
    return (
        "".join(
            f"\\{byte:03o}" if byte <= 32 or byte in (92, 127) else chr(byte)
            for byte in os.fsencode(text)
        )
        .encode("latin-1")
        .decode("utf-8", "surrogateescape")
    )


def unescape(word: str) -> str:
    """The inverse of `one_line`."""
    out = bytearray()
    raw = os.fsencode(word)
    index = 0
    while index < len(raw):
        octal = raw[index + 1 : index + 4]
        if raw[index] == 92 and len(octal) == 3 and all(48 <= d <= 55 for d in octal):
            value = int(octal, 8)
            if value > 255:
                raise invalid(word)
            out.append(value)
            index += 4
        else:
            out.append(raw[index])
            index += 1
    return os.fsdecode(bytes(out))
