"""The run directory: all that the next daemon needs to go on, on a tmpfs, readable by root alone.

    names              paths of entries, one a line: the number is the line's (see `tree.Names`)
    next               the first number that was never given out
    c/ID.json          a container's record, replaced atomically
    c/ID.sock          its init's listening socket
    c/ID.log           its kernel log (see `logring`)
    c/ID.output        what the commands of its `exec` print
    opens              positions of open log files (see `Positions`)

What is here is written before the kernel is asked to do what it says, so a daemon that dies at any
instruction leaves nothing that its successor cannot name, finish or undo.  Nothing survives a
reboot, so nothing is synced.
"""

from __future__ import annotations

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
        os.makedirs(os.path.join(directory, "c"), mode=0o700, exist_ok=True)
        self._next = self._reserved = self._read_number("next", 1)
        self._temporary = self._path("tmp")

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

    def record_path(self, ident: int) -> str:
        """Where a container's record is."""
        return f"{self.directory}/c/{ident}.json"

    def socket_path(self, ident: int) -> str:
        """Where a container's init listens."""
        return f"{self.directory}/c/{ident}.sock"

    def log_path(self, ident: int, kind: str) -> str:
        """Where a container's ring of that kind ("log" or "output") is."""
        return f"{self.directory}/c/{ident}.{kind}"

    def save(self, ident: int, record: dict[str, Any]) -> None:
        """Write a container's record."""
        self._replace(self.record_path(ident), json.dumps(record, separators=(",", ":")).encode())

    def load(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every container's record, oldest first."""
        folder = os.path.join(self.directory, "c")
        idents = sorted(int(n[:-5]) for n in os.listdir(folder) if n.endswith(".json"))
        for ident in idents:
            with open(self.record_path(ident), "rb") as file:
                yield ident, json.loads(file.read())

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


class Positions:
    """Where each open log file is, in shared memory: a slot of three numbers for each.

    Written with each read, so it must cost no system call; found again by the open file's token.

    A slot is eight words: the token, which of two copies counts, and the copies.  The words are
    stored one by one, each by one instruction (struct.pack_into() would clear them first), and
    what makes the others count is stored last: so a daemon may be killed at any of them.
    """

    SLOTS = 16384
    WORDS = 8

    def __init__(self, path: str) -> None:
        self._words = memoryview(map_file(path, self.SLOTS * self.WORDS * 8)).cast("Q")
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        # Sparse: the file's holes read as zero, and a token is never zero.
        for at in range(0, self.SLOTS * self.WORDS, self.WORDS):
            token = self._words[at]
            if token:
                self._slots[token] = at
            else:
                self._free.append(at)
        self._free.reverse()

    def get(self, token: int) -> tuple[int, int, int] | None:
        """What was last put for that open file, or None."""
        at = self._slots.get(token)
        if at is None:
            return None
        words = self._words
        copy = at + 2 + 3 * words[at + 1]
        return words[copy], words[copy + 1], words[copy + 2]

    def put(self, token: int, a: int, b: int, c: int) -> None:
        """Remember three numbers; with all slots taken the file starts anew after a restart."""
        words = self._words
        at = self._slots.get(token)
        new = at is None
        if at is None:
            if not self._free:
                return
            at = self._slots[token] = self._free.pop()
        other = 1 - words[at + 1]
        copy = at + 2 + 3 * other
        words[copy], words[copy + 1], words[copy + 2] = a, b, c
        words[at + 1] = other
        if new:
            words[at] = token

    def drop(self, token: int) -> None:
        """The file was closed."""
        at = self._slots.pop(token, None)
        if at is not None:
            self._words[at] = 0
            self._free.append(at)
