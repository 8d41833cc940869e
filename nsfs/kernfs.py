"""Files of cgroupfs: read whole, written in one piece."""

from __future__ import annotations

import os
from collections.abc import Iterator


def read(path: str) -> str:
    """The text of a file."""
    # One system call fewer than open(): these are read in loops over containers.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while True:
            part = os.read(fd, 65536)
            parts.append(part)
            if len(part) < 4096:
                return b"".join(parts).decode()
    finally:
        os.close(fd)


def read_once(path: str) -> bytes:
    """At most 4096 bytes of a file of the kernel's, by one read(2)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def write(path: str, value: str) -> None:
    """One write(2)."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def pairs(text: str) -> dict[str, int]:
    """Flat-keyed lines of numbers."""
    return {key: int(value) for key, value in (line.split() for line in text.splitlines())}


def walk(path: str) -> Iterator[str]:
    """A group and all that are below it; what goes meanwhile is left out."""
    yield path
    try:
        # st_nlink counts the subdirectories: no listing for the usual group, which has none.
        if os.stat(path).st_nlink <= 2:
            return
        with os.scandir(path) as found:
            below = [e.path for e in found if e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for each in below:
        yield from walk(each)
