"""nsfs.spare: when containers are made in advance, and for how long they are kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from nsfs import lifecycle, spare
from nsfs.attribute import Caller
from nsfs.build import Build
from nsfs.container import Phase
from nsfs.idmap import Ranges
from nsfs.spare import AGE_S, QUIET_S, Spares

ROOT = Caller(1, 0, 0)


class World:
    """What of the world the spares use; what is made is only noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
        self.config = SimpleNamespace(make=SimpleNamespace(spare=count))
        self.ranges = Ranges(0, 100 * 65536 - 1, 65536)
        self.build = Build()
        self.root = SimpleNamespace(parent=None, child_build=lambda: self.build)
        self.made_at: list[float] = []
        self.removed: list[Any] = []
        self.fails: OSError | None = None
        monkeypatch.setattr(spare, "construct", self.construct)
        monkeypatch.setattr(lifecycle, "undo", self.removed.append)

    def new_container(self, parent: Any, build: Build) -> Any:
        group = SimpleNamespace(events=lambda part: {"populated": 1})
        # Not a SimpleNamespace: those are equal when what they hold is.
        return type("Made", (), {"build": build, "group": group, "phase": Phase.MAKING})()

    async def construct(self, container: Any) -> None:
        assert container.phase is Phase.SPARE
        await trio.sleep(0.001)
        if self.fails:
            raise self.fails
        self.made_at.append(trio.current_time())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


async def test_made_when_it_is_quiet_and_removed_when_nobody_wants_it(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    spares = Spares(world)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spares.run)
        await trio.sleep(1)
        assert not world.made_at
        last = 0.0
        for _ in range(5):
            assert spares.claim(world.root, world.build, ROOT) is None  # type: ignore[arg-type]
            last = trio.current_time()
            await trio.sleep(QUIET_S * 0.9)
        await trio.sleep(1)
        assert world.made_at == [pytest.approx(last + QUIET_S + 0.001)]
        (one,) = spares.ready
        await trio.sleep(AGE_S - 2)
        assert list(spares.ready) == [one]
        await trio.sleep(2)
        assert world.removed == [one]
        await trio.sleep(10 * AGE_S)
        assert len(world.made_at) == 1
        spares.close()
    assert not spares.ready


async def test_one_that_is_old_is_not_given_away(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    spares = Spares(world)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spares.run)
        spares.claim(world.root, world.build, ROOT)  # type: ignore[arg-type]
        await trio.sleep(1)
        (one,) = spares.ready
        # Of others' mkdirs there are enough that it never is quiet for so long.
        for _ in range(int(AGE_S)):
            await trio.sleep(1)
            assert spares.claim(world.root, world.build, Caller(1, 5, 5)) is None  # type: ignore[arg-type]
        await trio.sleep(1)
        assert world.removed == [one]
        (other,) = spares.ready
        assert spares.claim(world.root, world.build, ROOT) is other  # type: ignore[arg-type]
        spares.close()


async def test_the_end_removes_what_is_ready_and_what_is_being_made(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    world.config.make.spare = 2
    spares = Spares(world)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spares.run)
        await trio.testing.wait_all_tasks_blocked()
        spares.claim(world.root, world.build, ROOT)  # type: ignore[arg-type]
        await trio.sleep(QUIET_S + 0.0015)
        assert len(world.made_at) == len(spares.ready) == 1
        spares.close()
    assert len(world.removed) == 2
    assert not spares.ready


async def test_a_failure_is_not_repeated_before_the_next_mkdir(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    spares = Spares(world)  # type: ignore[arg-type]
    world.fails = OSError(28, "no space")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spares.run)
        spares.claim(world.root, world.build, ROOT)  # type: ignore[arg-type]
        await trio.sleep(3 * AGE_S)
        assert len(world.removed) == 1
        world.fails = None
        spares.claim(world.root, world.build, ROOT)  # type: ignore[arg-type]
        await trio.sleep(1)
        assert len(spares.ready) == 1
        spares.close()


@pytest.mark.parametrize(
    "build",
    [Build(rootfs="/usr"), Build(binds=(("/a", "/b", "ro"),)), Build(shared=(("net", 7),))],
    ids=["rootfs", "binds", "shared"],
)
async def test_none_of_a_construction_that_names_something(
    world: World, build: Build, autojump_clock: trio.testing.MockClock
) -> None:
    spares = Spares(world)  # type: ignore[arg-type]
    world.build = build
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spares.run)
        spares.claim(world.root, build, ROOT)  # type: ignore[arg-type]
        await trio.sleep(1)
        assert not world.made_at
        spares.close()


async def test_none_while_ids_are_scarce(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    spares = Spares(world)  # type: ignore[arg-type]
    while world.ranges.free > spare.RANGES_LEFT:
        world.ranges.take()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spares.run)
        spares.claim(world.root, world.build, ROOT)  # type: ignore[arg-type]
        await trio.sleep(1)
        assert not world.made_at
        spares.close()
