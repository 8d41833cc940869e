"""Who may do what: every user, from outside and from inside, against every entry of the tables.

The entries are those of the product's tables; what is expected of each is said by RULES here, and
follows from nothing else.  So a new control file is in the matrix by itself, and fails until it is
said whose it is.  Everything is tried by real processes with real credentials.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from nsfs.attribute import Directory
from nsfs.daemon import tables
from nsfs.tree import Names, Tables, kind_of

from .conftest import Container

ALICE, BOB, INSIDER = 4001, 4002, 1000
TABLES = Tables(Directory("", entries=tables()), Names())

# A pattern of paths within a container's directory: whose the entry is (of the container's owner or
# its parent's), its mode, and what is special about it: `stream` (a log: what is written to it is a
# record), `hidden` (there is no such name), `not root` (the host has none).
RULES: dict[str, tuple[str, int, str]] = {
    "": ("owner", 0o755, ""),
    "binds": ("parent", 0o644, "not root"),
    "cgroup": ("owner", 0o755, ""),
    "cgroup/*": ("parent", 0o644, "not root"),
    "cgroup/*.current": ("owner", 0o444, "not root"),
    "cgroup/*.events": ("owner", 0o444, "not root"),
    "cgroup/*.peak": ("owner", 0o444, "not root"),
    "cgroup/*.pressure": ("owner", 0o444, ""),
    "cgroup/*.stat": ("owner", 0o444, ""),
    "console": ("parent", 0o644, "not root"),
    "defaults": ("owner", 0o755, ""),
    "defaults/*": ("owner", 0o644, ""),
    "exec": ("owner", 0o200, "not root"),
    "freeze": ("parent", 0o644, "not root"),
    "idmap": ("parent", 0o644, "not root"),
    "ipc": ("owner", 0o755, ""),
    "ipc/*": ("owner", 0o444, ""),
    "init": ("owner", 0o444, ""),
    "kill": ("owner", 0o200, "not root"),
    "kmsg": ("owner", 0o640, "stream"),
    "mnt": ("owner", 0o755, ""),
    "mnt/mounts": ("owner", 0o444, ""),
    "mnt/propagation": ("parent", 0o644, "not root"),
    "mnt/root": ("owner", 0o777, ""),
    "namespaces": ("parent", 0o644, ""),
    "net": ("owner", 0o755, ""),
    "net/*": ("owner", 0o644, ""),
    "network": ("parent", 0o644, "not root"),
    "nflog": ("owner", 0o644, "not root"),
    "nsfs.log": ("parent", 0o644, "not root"),
    "nsfs.dev": ("owner", 0o644, "hidden"),
    "nsfs.proc": ("owner", 0o400, "hidden"),
    "nsproxy": ("owner", 0o755, ""),
    "nsproxy/*": ("owner", 0o777, ""),
    "output": ("owner", 0o440, "stream not root"),
    "pid": ("owner", 0o755, ""),
    "pid/*": ("owner", 0o444, ""),
    "pid/max": ("owner", 0o644, ""),
    "procs": ("owner", 0o755, ""),
    "rootfs": ("parent", 0o644, "not root"),
    "seccomp": ("parent", 0o644, "not root"),
    "stat": ("owner", 0o444, ""),
    "state": ("owner", 0o444, ""),
    "time": ("owner", 0o755, ""),
    "time/*": ("parent", 0o644, ""),
    "unshare": ("parent", 0o644, "not root"),
    "user": ("owner", 0o755, ""),
    "user/*": ("owner", 0o444, ""),
    "uts": ("owner", 0o755, ""),
    "uts/*": ("owner", 0o644, ""),
}


def rule(path: str) -> tuple[str, int, str]:
    """The rule for an entry: the longest pattern that matches it."""
    found = [each for each in RULES if fnmatchcase(path, each)]
    assert found, f"{path}: say in RULES whose it is, its mode, and what is special about it"
    return RULES[max(found, key=len)]


# Every directory that is looked at, in the tree of the host, and in that inside of two containers:
# the user who owns it there, and who owns that which it is in; None where there is no such thing to
# be changed.
OBJECTS: dict[str, dict[str, tuple[int, int | None]]] = {
    "": {
        ".": (0, None),
        "alice": (ALICE, 0),
        "alice/web": (ALICE, ALICE),
        "alice/roots": (0, ALICE),
        "bob": (BOB, 0),
    },
    "alice": {".": (0, None), "web": (0, 0), "db": (INSIDER, 0)},
    "alice/web": {".": (0, None)},
}
# Where each user looks from.  Root last: what it changes and takes back is a word of its own.
USERS = [
    *(("", uid) for uid in (ALICE, BOB)),
    *((place, uid) for place in ("alice", "alice/web") for uid in (INSIDER, 7)),
    *((place, 0) for place in ("alice/web", "alice", "")),
]
STRANGER = 7


@dataclass(frozen=True)
class Entry:
    """An entry of one of the objects."""

    place: str
    object: str
    path: str
    kind: str

    @property
    def inner(self) -> bool:
        """Whether it is a container's own view of itself."""
        return bool(self.place) and self.object == "."


def entries(place: str) -> Iterator[Entry]:
    for each in OBJECTS[place]:
        yield Entry(place, each, "", "directory")
        for path, entry in TABLES.paths():
            yield Entry(place, each, path, kind_of(entry))


# --- what is expected ---


def name_of(code: int) -> str:
    return errno.errorcode[code] if code else "done"


class Expected:
    """By the rules, what each operation of a user comes to."""

    def __init__(self, entry: Entry, uid: int) -> None:
        self.entry, self.uid = entry, uid
        whose, self.mode, self.special = rule(entry.path)
        owner, parent = OBJECTS[entry.place][entry.object]
        self.directory_owner, self.parent = owner, parent
        self.parents = whose == "parent"
        self.owner = parent if self.parents and parent is not None else owner
        self.root = uid == 0
        self.directory = entry.kind == "directory"

    def allowed(self, bit: int) -> bool:
        """Whether the mode allows it (4: read, 2: write)."""
        if bit == 2 and self.parents and self.entry.inner:
            return False
        if self.root:
            return True
        return bool(self.mode >> (6 if self.uid == self.owner else 0) & bit)

    def in_directory(self, allowed: int) -> int:
        """What comes of it where the directory that the entry is in is to be written."""
        owner = self.directory_owner if self.entry.path else self.parent
        return allowed if self.root or self.uid == owner else errno.EACCES

    def read(self) -> int:
        if not self.allowed(4):
            return errno.EACCES
        # As sysfs has it, what cannot be read cannot be opened for it by root either.
        return 0 if self.mode & 0o444 else errno.EINVAL

    def write(self) -> int:
        if not self.allowed(2):
            return errno.EACCES
        return 0 if self.mode & 0o222 or "stream" in self.special else errno.EINVAL

    def truncate(self) -> int:
        return 0 if self.allowed(2) else errno.EACCES

    def chmod(self) -> int:
        return 0 if (self.root or self.uid == self.owner) and not self.entry.inner else errno.EPERM

    def chown(self) -> int:
        return 0 if self.root and not self.entry.inner else errno.EPERM

    def enter(self) -> int:
        """By the attribute that the session program sets, without the descriptor that it names."""
        if not self.allowed(2):
            return errno.EACCES
        return errno.EINVAL if self.entry.path == "procs" else errno.EOPNOTSUPP

    def mkdir(self) -> int:
        if not self.allowed(2):
            return errno.EACCES
        if self.entry.path == "net":
            # An interface, whose other end is in the parent's network.
            above = self.entry.object != "." and (self.root or self.uid == self.parent)
            return 0 if above else errno.EPERM
        return errno.EPERM if self.entry.path else 0

    def rmdir(self) -> int:
        if not self.directory:
            return self.in_directory(errno.ENOTDIR)
        if not self.entry.path:
            # There is a member in each, a container in some.
            nested = any(o.startswith(f"{self.entry.object}/") for o in OBJECTS[self.entry.place])
            nested |= f"{self.entry.place}/{self.entry.object}".strip("/") in ("alice",)
            return self.in_directory(errno.ENOTEMPTY if nested else errno.EBUSY)
        return self.in_directory(0 if self.entry.path == "procs" else errno.ENOTEMPTY)

    def rename(self) -> int:
        return self.in_directory(errno.EPERM if self.entry.path else 0)

    def unlink(self) -> int:
        return self.in_directory(errno.EISDIR if self.directory else 0)


# --- what is tried ---


def code_of(function: Callable[..., object], *args: object) -> int:
    try:
        function(*args)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def try_write(path: str, value: bool) -> None:
    """Open it, and write what no file takes."""
    fd = os.open(path, os.O_WRONLY)
    try:
        if value:
            code = code_of(os.write, fd, b"\0")
            if code != errno.EINVAL:
                raise OSError(code or errno.EIO, "not what was to be")
    finally:
        os.close(fd)


def try_read(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def try_list(path: str) -> None:
    os.listdir(path)


def there_and_back(there: Callable[[], object], back: Callable[[], object]) -> int:
    code = code_of(there)
    if not code:
        back()
    return code


def attempt(top: str, entry: Entry) -> dict[str, int]:
    """Try everything on an entry; what succeeds is undone."""
    directory = os.path.join(top, entry.object)
    path = os.path.join(directory, entry.path) if entry.path else directory
    found: dict[str, int] = {}
    if not os.path.lexists(path):
        return {"lookup": errno.ENOENT}
    stat_now = os.lstat(path)
    mode, uid = stat.S_IMODE(stat_now.st_mode), stat_now.st_uid
    special = rule(entry.path)[2]
    if entry.kind == "directory":
        found["enter"] = code_of(os.setxattr, path, "user.nsfs.enter", b"")
        found["read"] = code_of(try_list, path)
        new = f"{path}/new"
        found["mkdir"] = there_and_back(lambda: os.mkdir(new), lambda: os.rmdir(new))
    elif entry.kind == "file":
        found["read"] = code_of(try_read, path)
        found["write"] = code_of(try_write, path, "stream" not in special)
        found["truncate"] = code_of(os.truncate, path, 0)
    if entry.kind != "link":
        found["chmod"] = code_of(os.chmod, path, mode)
        found["chown"] = there_and_back(
            lambda: os.chown(path, STRANGER, -1), lambda: os.chown(path, uid, -1)
        )
    found["link"] = code_of(os.link, path, f"{path}.x")
    if entry.path or entry.object != ".":
        found["rmdir"] = code_of(os.rmdir, path)
        found["rename"] = there_and_back(
            lambda: os.rename(path, f"{path}.x"), lambda: os.rename(f"{path}.x", path)
        )
    return found


def attempt_all(top: str, place: str) -> list[dict[str, int]]:
    """Everything on every entry; first what a mark of removal would change."""
    rows = [(each, attempt(top, each)) for each in entries(place)]
    for each, found in rows:
        if each.path and "lookup" not in found:
            found["unlink"] = code_of(os.unlink, os.path.join(top, each.object, each.path))
    return [found for _, found in rows]


def as_user(init: int | None, top: str, place: str, uid: int) -> list[dict[str, int]]:
    """The same by a process that is that user there."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            if init is not None:
                libc = ctypes.CDLL(None, use_errno=True)
                # CLONE_NEWUSER and CLONE_NEWNS: of the process's own /proc nothing is read.
                if libc.setns(os.pidfd_open(init), 0x10000000 | 0x00020000):
                    raise OSError(ctypes.get_errno(), "setns")
            os.setgroups([])
            # Who has come in has all capabilities, and keeps them until root becomes another.
            os.setresuid(0, 0, 0)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.chdir("/")
            data = json.dumps(attempt_all(top, place)).encode()
            os.close(ours)
            with os.fdopen(theirs, "wb") as file:
                file.write(data)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        data = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    found: list[dict[str, int]] = json.loads(data)
    return found


@pytest.fixture
def inits(tree: Path) -> dict[str, int]:
    """The containers of OBJECTS, each with a member; the inits of those that are looked from."""
    for name, uid in (("alice", ALICE), ("bob", BOB), ("alice/web", ALICE), ("alice/roots", 0)):
        (tree / name).mkdir()
        Container(tree / name).start("sleep", "1000")
        os.chown(tree / name, uid, uid)
    alice = Container(tree / "alice")
    alice.run("mkdir /sys/namespaces/db; chown 1000:1000 /sys/namespaces/db")
    Container(alice / "db").start("sleep", "1000")
    return {name: Container(tree / name).init for name in ("alice", "alice/web")}


def test_everybody_against_everything(tree: Path, inits: dict[str, int]) -> None:
    wrong: list[str] = []
    tried = 0
    for place, uid in USERS:
        top = "/sys/namespaces" if place else str(tree)
        results = as_user(inits.get(place), top, place, uid)
        for entry, found in zip(entries(place), results, strict=True):
            expected = Expected(entry, uid)
            absent = "hidden" in expected.special or (
                not place and entry.object == "." and "not root" in expected.special
            )
            for operation, code in found.items():
                tried += 1
                if operation == "link":
                    right = code in (errno.EPERM, errno.EACCES)
                    wanted = "EPERM or EACCES"
                elif operation == "lookup":
                    right, wanted = absent, "found"
                else:
                    wanted = name_of(getattr(expected, operation)())
                    right = name_of(code) == wanted
                if not right:
                    where = f"{place or 'host'}:{entry.object}/{entry.path}"
                    wrong.append(f"{uid} {operation} {where}: {name_of(code)}, not {wanted}")
    assert not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(wrong)
    assert tried > 5000


def test_every_entry_has_a_rule_and_its_mode() -> None:
    for path, entry in TABLES.paths():
        whose, mode, _ = rule(path)
        assert (path, stat.S_IMODE(entry.mode)) == (path, mode)
        assert whose in ("owner", "parent")
