"""The operations called directly, on a world whose groups are plain files and that has no inits."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio

from nsfs import lifecycle
from nsfs.attribute import Attribute, Directory, OpenFile
from nsfs.cgroup import Hierarchies
from nsfs.config import Config
from nsfs.container import Container, Face
from nsfs.daemon import tables
from nsfs.fs import Operations
from nsfs.store import Store
from nsfs.world import World


class Context:
    """Who asks: this process, as another user or as root."""

    def __init__(self, uid: int = 0) -> None:
        self.pid = os.getpid()
        self.uid = self.gid = uid


class Device:
    generation = 1

    def __init__(self) -> None:
        self.unique = 0
        self.nodeid = 1

    def current(self) -> tuple[int, int, int, bool]:
        self.unique += 1
        return self.unique, self.nodeid, 0, False

    def caller(self) -> tuple[int, int, int]:
        return 1, 0, 0

    def fills_page(self) -> bool:
        return False


class Spawner:
    """Makes containers whose init is this process."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.error: OSError | None = None

    async def make(self, recipe: Any) -> int:
        await trio.lowlevel.checkpoint()
        if self.error:
            raise self.error
        self.made.append(recipe)
        fill_group(recipe.cgroup)
        return os.getpid()


def fill_group(path: str) -> None:
    for part, populated in (("", 1), ("/payload", 0), ("/init", 1)):
        Path(f"{path}{part}/cgroup.events").write_text(f"populated {populated}\nfrozen 0\n")


class Parked(OpenFile):
    """A file whose read waits for ever."""

    async def read(self, offset: int, size: int, request: int) -> bytes:
        await trio.sleep_forever()
        return b""


def broken_show(face: Face) -> str:
    raise KeyError("a defect")


def full_show(face: Face) -> str:
    raise OSError(errno.EMFILE, "the daemon has too many open")


EXTRA = (
    Attribute("parked", stream=Parked, mode=0o644),
    Attribute("broken", show=broken_show),
    Attribute("full", show=full_show),
)
CTX: Any = Context()


@pytest.fixture
def ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operations]:
    top = tmp_path / "cgroup"
    top.mkdir()
    for name in ("cgroup.controllers", "cgroup.kill", "cgroup.procs"):
        (top / name).touch()
    world = World(
        store=Store(str(tmp_path / "run")),
        hierarchies=Hierarchies(str(top), {}, frozenset()),
        config=Config(),
    )
    monkeypatch.setattr("nsfs.cgroup.Group.kill", lambda self, part="": None)
    monkeypatch.setattr("nsfs.cgroup.write", lambda path, value: None)
    monkeypatch.setattr("os.chown", lambda *args: None)
    monkeypatch.setattr(World, "start", lambda self, function, *args: None)
    world.spawner = Spawner()  # type: ignore[assignment]
    world.root.group.create_top()
    yield Operations(world, (*tables(), *EXTRA), Device())
    world.inotify.close()


async def mkdir(ops: Operations, parent: int, name: str) -> int:
    return (await ops.mkdir(parent, name.encode(), 0o755, CTX)).st_ino


async def fails(number: int, function: Any, *args: Any) -> None:
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await function(*args)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]


async def names(ops: Operations, inode: int) -> list[str]:
    return [name for _, name, _ in await ops.nodes.rows(await ops.nodes.node(inode))]


async def test_the_root_is_inode_1(ops: Operations) -> None:
    assert (await ops.getattr(1, CTX)).st_ino == 1
    assert "kill" not in await names(ops, 1)
    await fails(errno.ENOENT, ops.lookup, 1, b"kill", CTX)
    # The directory of a container that is gone.
    assert (await ops.getattr(999 << 33 | 1, CTX)).st_nlink == 0
    await fails(errno.ESTALE, ops.opendir, 999 << 33 | 1, CTX)
    await fails(errno.ENOENT, ops.lookup, 999 << 33 | 1, b"kmsg", CTX)


async def test_a_container_has_what_its_listing_says(ops: Operations) -> None:
    web = await mkdir(ops, 1, "web")
    assert "web" in await names(ops, 1)
    assert (await names(ops, 1))[-1] == "procs"
    for name in await names(ops, web):
        found = await ops.lookup(web, name.encode(), CTX)
        assert (await ops.getattr(found.st_ino, CTX)).st_ino == found.st_ino
    for hidden in (b"nsfs.dev", b"nsfs.proc", b".f"):
        await fails(errno.ENOENT, ops.lookup, web, hidden, CTX)


async def test_offsets_of_a_listing_never_repeat_and_grow(ops: Operations) -> None:
    for number in range(3):
        await mkdir(ops, 1, f"c{number}")
    cookies = [cookie for cookie, _, _ in await ops.nodes.rows(await ops.nodes.node(1))]
    assert cookies == sorted(set(cookies))


async def test_a_failed_make_leaves_nothing(ops: Operations) -> None:
    ops.world.spawner.error = OSError(errno.ENOSPC, "a limit")  # type: ignore[attr-defined]
    await fails(errno.ENOSPC, ops.mkdir, 1, b"web", 0o755, CTX)
    assert "web" not in await names(ops, 1)
    assert ops.world.root.reason == "web: a limit"


async def test_the_same_request_again_finds_its_work_done(ops: Operations) -> None:
    root = ops.world.root
    first = await lifecycle.make(root, "web", _caller(), request=77)
    assert await lifecycle.make(root, "web", _caller(), request=77) is first
    with pytest.raises(FileExistsError):
        await lifecycle.make(root, "web", _caller(), request=78)


def _caller() -> Any:
    from nsfs.attribute import Caller

    return Caller(os.getpid(), 0, 0)


async def test_rmdir_removes_when_everything_was_unlinked(ops: Operations) -> None:
    web = await mkdir(ops, 1, "web")
    await mkdir(ops, web, "db")
    await fails(errno.ENOTEMPTY, ops.rmdir, 1, b"web", CTX)
    await remove_all(ops, web)
    assert "db" in await names(ops, web)
    # Whoever makes containers inside meanwhile is late.
    await fails(errno.ENOENT, ops.mkdir, web, b"late", 0o755, CTX)
    await ops.rmdir(1, b"web", CTX)
    assert "web" not in await names(ops, 1)


async def remove_all(ops: Operations, directory: int) -> None:
    found = list(ops.tables.children(await ops.nodes.node(directory)))
    # In the order in which they are listed.
    for node in sorted(found, key=lambda each: isinstance(each.entry, Directory)):
        name = node.entry.name.encode()
        if isinstance(node.entry, Directory):
            await ops.rmdir(directory, name, CTX)
        else:
            await ops.unlink(directory, name, CTX)


async def test_directories_are_empty_once_all_files_are_unlinked(ops: Operations) -> None:
    web = await mkdir(ops, 1, "web")
    await mkdir(ops, web, "db")
    defaults = (await ops.lookup(web, b"defaults", CTX)).st_ino
    files = [
        node.entry.name.encode()
        for node in ops.tables.children(await ops.nodes.node(web))
        if not isinstance(node.entry, Directory)
    ]
    for name in files:
        assert "limits" in await names(ops, defaults)
        await fails(errno.ENOTEMPTY, ops.rmdir, web, b"defaults", CTX)
        await ops.unlink(web, name, CTX)
    assert set(await names(ops, defaults)) <= {".", ".."}
    assert "defaults" in await names(ops, web)
    await ops.rmdir(web, b"defaults", CTX)
    # That has only marked it: it is there, and the container is not to be removed yet.
    await fails(errno.ENOTEMPTY, ops.rmdir, 1, b"web", CTX)
    assert (await ops.lookup(defaults, b"limits", CTX)).st_ino
    await remove_all(ops, web)
    await ops.rmdir(1, b"web", CTX)


async def test_an_interrupt_answers_eintr(ops: Operations, autojump_clock: object) -> None:
    found = await ops.lookup(1, b"parked", CTX)
    info = await ops.open(found.st_ino, os.O_RDONLY, CTX)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fails, errno.EINTR, ops.read, info.fh, 0, 10)
        await trio.testing.wait_all_tasks_blocked()
        (unique,) = ops.running
        ops.interrupt(unique + 1000)
        await trio.testing.wait_all_tasks_blocked()
        assert ops.running
        ops.interrupt(unique)
    assert not ops.running


@pytest.mark.expected_log("read failed")
async def test_a_defect_is_eio_and_logged(ops: Operations) -> None:
    found = await ops.lookup(1, b"broken", CTX)
    info = await ops.open(found.st_ino, os.O_RDONLY, CTX)
    await fails(errno.EIO, ops.read, info.fh, 0, 10)


async def test_that_the_daemon_may_open_no_more_files_is_not_the_callers_doing(
    ops: Operations,
) -> None:
    found = await ops.lookup(1, b"full", CTX)
    info = await ops.open(found.st_ino, os.O_RDONLY, CTX)
    await fails(errno.ENFILE, ops.read, info.fh, 0, 10)


async def test_an_open_file_of_another_daemon_is_made_again(ops: Operations) -> None:
    web = await mkdir(ops, 1, "web")
    found = await ops.lookup(web, b"unshare", CTX)
    ops.device.nodeid = found.st_ino
    text = await ops.read(123456789, 0, 4096)
    assert text.decode().split() == sorted(Config().defaults.unshare)
    assert await ops.read(123456789, 7, 3) == text[7:10]


async def test_inside_the_parents_files_are_read_only_for_its_root_too(ops: Operations) -> None:
    await mkdir(ops, 1, "web")
    web: Container = ops.world.root.children["web"]
    inner = ops.nodes.directory(web, web)
    found = await ops.lookup(inner.ino, b"rootfs", CTX)
    assert found.st_mode & 0o777 == 0o444
    await fails(errno.EACCES, ops.open, found.st_ino, os.O_WRONLY, CTX)
    fields: Any = type("Fields", (), dict.fromkeys(
        ("update_mode", "update_uid", "update_gid", "update_size"), True))()  # fmt: skip
    await fails(errno.EPERM, ops.setattr, found.st_ino, found, fields, None, CTX)
    db = await mkdir(ops, inner.ino, "db")
    assert db != (await ops.lookup((await ops.lookup(1, b"web", CTX)).st_ino, b"db", CTX)).st_ino


async def test_two_faces_of_a_container_have_owners_of_their_own(ops: Operations) -> None:
    outer = await mkdir(ops, 1, "web")
    web: Container = ops.world.root.children["web"]
    inner = ops.nodes.directory(web, web).ino
    assert (await ops.getattr(outer, CTX)).st_uid == 0
    assert (await ops.getattr(inner, CTX)).st_uid == web.root_uid >= 0x70000000
