"""Bounds of what all share, so that nobody uses it up: the daemon's memory, descriptors and
threads, the requests that may wait, the records of open files.

Each is counted on an account: that of a container at the top, for all who are in it at any depth;
or, for who looks at the tree from outside, that of a user.  The host's root has no bound.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

if TYPE_CHECKING:
    from nsfs.container import Container, Face


class Account(NamedTuple):
    """Whose account it is."""

    container: int
    """The number of a container at the top; 0: a user's of the host."""
    uid: int = 0


ROOTS = Account(0, 0)


def top_of(container: Container) -> int:
    """The number of the container at the top that a container is in, or is; 0: the root."""
    number = 0
    for each in container.lineage():
        if each.parent is not None:
            number = each.number
    return number


def account_of(face: Face, uid: int) -> Account:
    """The account of a user who looks at a face; `uid` is the host's.

    The host's root, as which the spawner opens what it hands to commands, is that wherever it
    looks.
    """
    if not uid:
        return ROOTS
    number = top_of(face.viewpoint)
    return Account(number) if number else Account(0, uid)


class Bound:
    """How much each account may have."""

    def __init__(self, most: int, error: int, what: str) -> None:
        self.most = most
        self._error = error
        self._what = what
        self._taken: Counter[Account] = Counter()

    def take(self, account: Account) -> None:
        """One more; an OSError when it has all that it may have."""
        if self._taken[account] >= self.most and account != ROOTS:
            raise OSError(self._error, os.strerror(self._error), self._what)
        self._taken[account] += 1

    def give_back(self, account: Account) -> None:
        """One less."""
        self._taken[account] -= 1
        if not self._taken[account]:
            del self._taken[account]

    @contextmanager
    def taken(self, account: Account) -> Iterator[None]:
        """One more for the time of a `with`."""
        self.take(account)
        try:
            yield
        finally:
            self.give_back(account)


class Turns:
    """A limiter of threads (trio.CapacityLimiter) of which one account may have a part.

    Whoever waits for more than that does so apart, and not before the others.
    """

    def __init__(self, total: int, part: int) -> None:
        self._all = trio.CapacityLimiter(total)
        self._part = part
        self._own: dict[int, trio.CapacityLimiter] = {}

    def of(self, container: Container | None) -> Any:
        """The limiter for what is done about a container; None is the root's."""
        return _Turn(self, 0 if container is None else top_of(container))

    async def acquire(self, number: int, borrower: object) -> None:
        """Wait for one's turn."""
        own = self._own.setdefault(number, trio.CapacityLimiter(self._part))
        await own.acquire_on_behalf_of(borrower)
        try:
            await self._all.acquire_on_behalf_of(borrower)
        except BaseException:
            self._release_own(number, borrower)
            raise

    def release(self, number: int, borrower: object) -> None:
        """The thread has ended."""
        self._all.release_on_behalf_of(borrower)
        self._release_own(number, borrower)

    def _release_own(self, number: int, borrower: object) -> None:
        own = self._own[number]
        own.release_on_behalf_of(borrower)
        if not own.borrowed_tokens and not own.statistics().tasks_waiting:
            del self._own[number]


class _Turn:
    """What to_thread.run_sync() asks of a limiter."""

    def __init__(self, turns: Turns, number: int) -> None:
        self._turns = turns
        self._number = number

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await self._turns.acquire(self._number, borrower)

    def release_on_behalf_of(self, borrower: object) -> None:
        self._turns.release(self._number, borrower)
