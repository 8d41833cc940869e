"""The run directory: all that the next daemon needs to go on, on a tmpfs, readable by root alone.

    names              paths of entries, one a line: the number is the line's (see `tree.Names`)
    next               the first number that was never given out
    secret             what the inode numbers of views' files are made with (see `tree.Paths`)
    c/ID.json          a container's record, replaced atomically
    c/ID.sock          its init's listening socket
    c/ID.log           its kernel log (see `logring`); log.new while one gets another size
    c/ID.output        what the commands of its `exec` print
    found/ID.json      the record of a container that was found
    opens              open files: positions in logs, who opened a control file (see `Slots`)
    ready              the containers that are ready
    syslog             calls of syslog(2) that wait for an answer
    syslog.landing     the call that is being received (see `syslog`)
    texts              sizes of kernel logs as text
    buried             directories that the kernel takes for removed, which are still there
    marks              what processes have unlinked, one a line

What is here is written before the kernel is asked to do what it says, so a daemon that dies at any
instruction leaves nothing that its successor cannot name, finish or undo.  Nothing survives a
reboot, so nothing is synced.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator
from typing import Any

RESERVED_AT_ONCE = 1000
"""Numbers reserved by one write of `next`; those that a daemon had left over are never used."""


class Store:
    """The files of one run directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        for name in ("c", "found"):
            os.makedirs(os.path.join(directory, name), mode=0o700, exist_ok=True)
        self._next = self._reserved = self._read_number("next", 1)
        self._temporary = self._path("tmp")
        self._marks_fd = -1

    def _path(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def _read_number(self, name: str, default: int) -> int:
        try:
            with open(self._path(name), encoding="ascii") as file:
                return int(file.read())
        except FileNotFoundError:
            return default

    def _replace(self, path: str, data: bytes) -> None:
        fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        os.rename(self._temporary, path)

    def number(self) -> int:
        """A number that was never given out before: for containers and faces."""
        if self._next >= self._reserved:
            self._reserved = self._next + RESERVED_AT_ONCE
            self._replace(self._path("next"), b"%d\n" % self._reserved)
        self._next += 1
        return self._next - 1

    def secret(self) -> bytes:
        """16 random bytes, the same for every daemon."""
        try:
            with open(self._path("secret"), "rb") as file:
                return file.read()
        except FileNotFoundError:
            found = os.urandom(16)
            self._replace(self._path("secret"), found)
            return found

    def names(self) -> list[str]:
        """The paths that have numbers, in their order."""
        try:
            with open(self._path("names"), encoding="utf-8") as file:
                return file.read().splitlines()
        except FileNotFoundError:
            return []

    def add_name(self, path: str) -> None:
        """Append a path to the table of names."""
        with open(self._path("names"), "a", encoding="utf-8") as file:
            file.write(f"{path}\n")

    def marks(self) -> list[tuple[tuple[int, int], int, str]]:
        """What was unlinked: (process, directory, name); see `tree.Marks`."""
        found = []
        with (
            contextlib.suppress(FileNotFoundError),
            open(self._path("marks"), encoding="ascii") as file,
        ):
            for line in file:
                pid, start, directory, name = line.split(" ", 3)
                found.append(((int(pid), int(start)), int(directory), json.loads(name)))
        return found

    def add_mark(self, process: tuple[int, int], directory: int, name: str) -> None:
        """Append to `marks`."""
        if self._marks_fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._marks_fd = os.open(self._path("marks"), flags, 0o600)
        line = f"{process[0]} {process[1]} {directory} {json.dumps(name)}\n"
        os.write(self._marks_fd, line.encode())

    def clear_marks(self) -> None:
        """No mark of a living process is left."""
        if self._marks_fd >= 0:
            os.ftruncate(self._marks_fd, 0)

    def record_path(self, ident: int) -> str:
        """Where a container's record is."""
        return f"{self.directory}/c/{ident}.json"

    def socket_path(self, ident: int) -> str:
        """Where a container's init listens."""
        return f"{self.directory}/c/{ident}.sock"

    def log_path(self, ident: int, kind: str) -> str:
        """Where a container's ring of that kind ("log" or "output") is."""
        return f"{self.directory}/c/{ident}.{kind}"

    def move_log(self, ident: int, to: int) -> None:
        """A container's kernel log becomes another's, instead of the one that has."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.log_path(ident, "log"), self.log_path(to, "log"))

    def save(self, ident: int, record: dict[str, Any]) -> None:
        """Write a container's record."""
        self._replace(self.record_path(ident), json.dumps(record, separators=(",", ":")).encode())

    def numbers(self) -> list[int]:
        """The containers that have records, oldest first."""
        folder = os.path.join(self.directory, "c")
        return sorted(int(n[:-5]) for n in os.listdir(folder) if n.endswith(".json"))

    def load(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every container's record, oldest first."""
        for ident in self.numbers():
            yield ident, self.read(ident)

    def read(self, ident: int) -> dict[str, Any]:
        """One container's record; ValueError when it is none."""
        with open(self.record_path(ident), "rb") as file:
            record: dict[str, Any] = json.loads(file.read())
        return record

    def save_found(self, ident: int, record: dict[str, Any]) -> None:
        """Write the record of a container that was found."""
        path = self._path(f"found/{ident}.json")
        self._replace(path, json.dumps(record, separators=(",", ":")).encode())

    def load_found(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every such record, oldest first."""
        for ident in sorted(int(n[:-5]) for n in os.listdir(self._path("found"))):
            with open(self._path(f"found/{ident}.json"), "rb") as file:
                yield ident, json.loads(file.read())

    def clear_found(self) -> None:
        """Nothing that was found is to be known by the next instance."""
        for ident, _ in list(self.load_found()):
            self.drop_found(ident)

    def drop_found(self, ident: int) -> None:
        """It is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(f"found/{ident}.json"))

    def drop(self, ident: int) -> None:
        """A container is gone: its files too, the record last, since it names the others."""
        for suffix in ("sock", "log", "output", "json"):
            try:
                os.unlink(f"{self.directory}/c/{ident}.{suffix}")
            except FileNotFoundError:
                continue


def map_file(path: str, size: int) -> mmap.mmap:
    """Map a file of the run directory for reading and writing; a new one is `size` bytes of zero,
    one that is there keeps its size."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not os.fstat(fd).st_size:
            os.ftruncate(fd, size)
        return mmap.mmap(fd, 0)
    finally:
        os.close(fd)


def map_new(path: str, size: int) -> mmap.mmap:
    """The same of a new file of zeros, whatever was there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return map_file(path, size)


class Slots:
    """Four numbers for each of many keys, in shared memory that the next daemon finds again.

    Written often (with each read of a log file), so it must cost no system call.  A slot is ten
    words: the key, which of two copies counts, and the copies.  The words are stored one by one,
    each by one instruction (struct.pack_into() would clear them first), and what makes the others
    count is stored last: so a daemon may be killed at any of them.
    """

    COUNT = 16384
    WORDS = 10

    def __init__(self, path: str, count: int = COUNT) -> None:
        self._words = memoryview(map_file(path, count * self.WORDS * 8)).cast("Q")
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        # Sparse: the file's holes read as zero, and a key is never zero.
        for at in range(0, len(self._words), self.WORDS):
            key = self._words[at]
            if key:
                self._slots[key] = at
            else:
                self._free.append(at)
        self._free.reverse()

    def get(self, key: int) -> tuple[int, int, int, int] | None:
        """What was last put for that key, or None."""
        at = self._slots.get(key)
        if at is None:
            return None
        words = self._words
        copy = at + 2 + 4 * words[at + 1]
        return words[copy], words[copy + 1], words[copy + 2], words[copy + 3]

    def put(self, key: int, a: int, b: int = 0, c: int = 0, d: int = 0) -> bool:
        """Remember four numbers; False when all slots are taken."""
        words = self._words
        at = self._slots.get(key)
        new = at is None
        if at is None:
            if not self._free:
                return False
            at = self._slots[key] = self._free.pop()
        other = 1 - words[at + 1]
        copy = at + 2 + 4 * other
        words[copy], words[copy + 1], words[copy + 2], words[copy + 3] = a, b, c, d
        words[at + 1] = other
        if new:
            words[at] = key
        return True

    def keys(self) -> list[int]:
        """All keys."""
        return list(self._slots)

    def drop(self, key: int) -> None:
        """The key is no more."""
        at = self._slots.pop(key, None)
        if at is not None:
            self._words[at] = 0
            self._free.append(at)
