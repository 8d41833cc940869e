"""Ranges of user and group IDs: what a container's user namespace maps (user_namespaces(7)).

A map is lines of (inside, outside, count), `outside` being IDs of the parent's user namespace.  The
same map serves users and groups.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from itertools import pairwise

from nsfs.attribute import invalid, out_of_range

IDS = 65536
"""What one container needs: the IDs that distributions use, `nobody` (65534) included."""
SLICES = 16
"""Ranges of `IDS` that a container at the top gets: its own, and one for each of 15 nested ones."""
LINES_MAX = 340
"""The kernel's limit of lines in a map (since Linux 4.15)."""
ID_MAX = 2**32 - 2

Map = tuple[tuple[int, int, int], ...]

HOST: Map = ((0, 0, ID_MAX + 1),)
"""The initial user namespace's map."""


def parse(text: str) -> Map:
    """Lines `INSIDE OUTSIDE COUNT`; EINVAL for other syntax or lines that overlap, ERANGE for IDs
    that cannot be."""
    result = []
    for line in text.splitlines():
        words = line.split()
        if len(words) != 3 or not all(word.isascii() and word.isdigit() for word in words):
            raise invalid(line)
        inside, outside, count = map(int, words)
        if not count or inside + count - 1 > ID_MAX or outside + count - 1 > ID_MAX:
            raise out_of_range(line)
        result.append((inside, outside, count))
    if not 1 <= len(result) <= LINES_MAX:
        raise invalid(text)
    for column in (0, 1):
        spans = sorted((line[column], line[column] + line[2]) for line in result)
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise invalid(text)
    return tuple(result)


def to_outside(table: Map, ident: int) -> int | None:
    """What an ID of the inside is outside, or None when it is not mapped."""
    for inside, outside, count in table:
        if inside <= ident < inside + count:
            return outside + ident - inside
    return None


def to_inside(table: Map, ident: int) -> int | None:
    """What an ID of the outside is inside, or None when it is not mapped."""
    for inside, outside, count in table:
        if outside <= ident < outside + count:
            return inside + ident - outside
    return None


def compose(parent: Map, child: Map) -> Map:
    """The child's map with `outside` in the host's IDs, given the parent's of the same form.

    A child's line that the parent does not map whole is EPERM, as it is for the kernel.
    """
    result: list[tuple[int, int, int]] = []
    for inside, outside, count in child:
        while count:
            for p_inside, p_outside, p_count in parent:
                if p_inside <= outside < p_inside + p_count:
                    take = min(count, p_inside + p_count - outside)
                    result.append((inside, p_outside + outside - p_inside, take))
                    inside, outside, count = inside + take, outside + take, count - take
                    break
            else:
                raise PermissionError(
                    errno.EPERM, "IDs that the parent does not have", str(outside)
                )
    return tuple(result)


class Ranges:
    """The host's IDs from `first` to `last`, both included, in ranges of `size` for containers at
    the top.

    A range that came back is given out again as late as possible: files may have been left with its
    IDs.
    """

    def __init__(self, first: int, last: int, size: int = IDS * SLICES) -> None:
        self.first = first
        self.size = size
        self._count = (last + 1 - first) // size
        self._next = 0
        self._used: set[int] = set()

    def take(self) -> int:
        """The start of a range that nobody has; ENOSPC when there is none."""
        for _ in range(self._count):
            start = self.first + self._next * self.size
            self._next = (self._next + 1) % self._count
            if start not in self._used:
                self._used.add(start)
                return start
        raise OSError(errno.ENOSPC, "all ranges of user IDs are taken")

    @property
    def free(self) -> int:
        """How many are left."""
        return self._count - len(self._used)

    def claim(self, start: int) -> None:
        """A range is used, as is known from a record."""
        self._used.add(start)

    def give_back(self, start: int) -> None:
        """Nobody has it any more."""
        self._used.discard(start)


def slice_for(parent: Map, used: Iterable[int]) -> int | None:
    """The number of a free slice (1 to 15) of a parent's IDs, or None when they did not last."""
    taken = set(used)
    for number in range(1, SLICES):
        start = number * IDS
        if number not in taken and all(
            to_outside(parent, i) is not None for i in (start, start + IDS - 1)
        ):
            return number
    return None
