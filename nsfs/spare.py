"""Containers made in advance, so that a mkdir has little left to do.

A spare is a container like any other but for its name: `mkdir` at the top by the host's root, of
the default construction, claims it, and then only the name, the hostname and the record are
written.  Until then it is in no directory and in no count.  It is made when the daemon has had
nothing to make for a moment, so a series of mkdirs is not slowed down; nothing is made before the
first mkdir.

A spare is to be just what a mkdir at that time would make.  So one whose construction is not
what `defaults/` says now is removed, as is one that nobody wanted for a while: what a
namespace copies from the host's (domain name, sysctls of networking) is no older than that.
Constructions that name a path or another container get none: what that leads to is decided by the
mkdir.

The next daemon removes what it finds of them.
"""

from __future__ import annotations

import logging
import math

import trio

from nsfs import lifecycle
from nsfs.attribute import Caller
from nsfs.build import Build
from nsfs.construct import construct
from nsfs.container import Container, Phase
from nsfs.world import World

log = logging.getLogger(__name__)

QUIET_S = 0.01
"""How long after the last mkdir one is made."""
AGE_S = 60.0
"""How long it is kept."""
RANGES_LEFT = 16
"""No spare takes one of the last ranges of IDs: a mkdir of another construction may want it."""


class Spares:
    """The spares of a world; `World.claim` is theirs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ready: dict[Container, float] = {}
        """Those that can be had, and when they were made, by trio's clock."""
        self._asked = trio.Event()
        self._last_s = 0.0
        self._scope = trio.CancelScope()
        world.claim = self.claim

    def claim(self, parent: Container, build: Build, caller: Caller) -> Container | None:
        """Take the one that fits a mkdir, if there is one; there shall be another soon."""
        if parent.parent is not None:
            return None
        self._last_s = trio.current_time()
        self._asked.set()
        # The user namespace belongs to whoever makes it.
        if (caller.uid, caller.gid) != (0, 0):
            return None
        found = next((each for each in self.ready if self._fits(each, build)), None)
        if found is not None:
            del self.ready[found]
        return found

    def _fits(self, spare: Container, build: Build) -> bool:
        """Whether it is what a mkdir of that construction would make now."""
        return (
            spare.build == build
            and trio.current_time() - self.ready[spare] < AGE_S
            and self.world.ranges.free >= RANGES_LEFT
            and bool(spare.group.events("init")["populated"])
        )

    async def run(self) -> None:
        """Make them when there is time, remove those that nobody wanted; until `close`."""
        count = self.world.config.make.spare
        with self._scope:
            while count:
                with trio.move_on_after(AGE_S if self.ready else math.inf):
                    await self._asked.wait()
                asked, self._asked = self._asked.is_set(), trio.Event()
                self._remove(unfit_for=self.world.root.child_build())
                while asked and len(self.ready) < count and await self._make():
                    pass
        # Not when the daemon fails: the next one does it.
        if self._scope.cancel_called:
            self._remove()

    def close(self) -> None:
        """Have all of them removed, and make no more."""
        self._scope.cancel()

    def _remove(self, unfit_for: Build | None = None) -> None:
        for each in list(self.ready):
            if unfit_for is None or not self._fits(each, unfit_for):
                del self.ready[each]
                lifecycle.undo(each)

    async def _make(self) -> bool:
        while (quiet_s := self._last_s + QUIET_S) > trio.current_time():  # noqa: ASYNC110 - it moves
            await trio.sleep_until(quiet_s)
        world = self.world
        build = world.root.child_build()
        if build.rootfs != "host" or build.binds or build.shared:
            return False
        if world.ranges.free <= RANGES_LEFT:
            return False
        each = world.new_container(world.root, build)
        each.phase = Phase.SPARE
        try:
            await construct(each)
        except BaseException as error:
            lifecycle.undo(each)
            if not isinstance(error, OSError):
                raise
            # The next mkdir meets it again, and tells.
            log.info("no spare container: %s", error)
            return False
        self.ready[each] = trio.current_time()
        return True
