"""The spawner and the init, on the real kernel, without the daemon.

The filesystem that containers get bound inside is a tmpfs here which has the same few names.  Each
test has its own spawner, cgroup and directories; afterwards no process, mount or cgroup is left.
"""

# ruff: noqa: ASYNC110, ASYNC221, ASYNC230, ASYNC240 (these files are not slow, and none is an event)

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from nsfs.init import Command, Init
from nsfs.spawner import CLONE_NEW, LIBEXEC, Recipe, Spawner
from tests.integration.conftest import SLOWNESS
from tests.programs import program

ALL = frozenset(CLONE_NEW)
FIRST_ID = 0x70000000
IDS = 16 * 65536
ENV = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin",)
DEADLINE_S = 20 * SLOWNESS
NS_GET_OWNER_UID = 0xB704
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
PRIVATE = ("home", "mnt", "root", "run", "srv", "tmp", "var")


def hierarchy(kind: str, controller: str = "") -> Path | None:
    """Where a cgroup hierarchy is mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, each, options = line.split()[:4]
        if each == kind and (not controller or controller in options.split(",")):
            return Path(path)
    return None


@pytest.fixture(scope="module", autouse=True)
def private_mounts() -> None:
    """Mounts made here reach nobody."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEW["mnt"]) or libc.mount(None, b"/", None, 0x44000, None):
        raise OSError(ctypes.get_errno(), "unshare")


@dataclass
class Made:
    """A container of the test."""

    number: int
    pid: int
    init: Init
    group: Path
    first_id: int
    rig: Rig

    async def start(self, argv: Sequence[str], *fds: int, **options: Any) -> Command:
        """Start a command; descriptors that are not given are /dev/null."""
        with open(os.devnull, "r+b") as null:
            given = (*fds, *(null.fileno(),) * (3 - len(fds)))
            return await self.init.execute(argv, options.pop("env", ENV), given, **options)

    async def run(
        self, script: str | Sequence[str], *more_fds: int, **options: Any
    ) -> tuple[int, str]:
        """Run a shell script, or a command; returns its exit status and output, errors included."""
        argv = ("sh", "-c", script) if isinstance(script, str) else script
        read_fd, write_fd = os.pipe()
        os.set_blocking(read_fd, False)
        with open(os.devnull, "rb") as null:
            try:
                command = await self.start(
                    argv, null.fileno(), write_fd, write_fd, *more_fds, **options
                )
            except OSError:
                os.close(read_fd)
                raise
            finally:
                os.close(write_fd)
        async with trio.lowlevel.FdStream(read_fd) as stream:
            output = b"".join([part async for part in stream])
        return await command.wait(), output.decode()

    async def says(self, script: str, **options: Any) -> str:
        """What a script that succeeds prints."""
        status, output = await self.run(script, **options)
        assert status == 0, output
        return output

    def kill(self) -> None:
        """Kill all that is in it."""
        (self.group / "cgroup.kill").write_text("1")


class Rig:
    """A spawner with all that it needs."""

    def __init__(self, top: Path, group: Path, v1: Sequence[Path], root: Path) -> None:
        self.top, self.group, self.v1 = top, group, v1
        self.root = root
        """Where the root filesystem is mounted that the spawner takes for the host's."""
        self.tree = top / "tree"
        self.numbers = itertools.count(1)
        self.spawner: Spawner

    def face(self, number: int) -> None:
        """What the filesystem has for a container."""
        (self.tree / ".f" / str(number)).mkdir()
        (self.tree / ".f" / str(number) / "state").write_text("populated 0\n")
        for name in ("kmsg", "pkmsg", "output"):
            (self.tree / ".f" / f"{number}.{name}").write_text(f"{name} {number}\n")

    def groups(self, number: int, uid: int, parent: Made | None) -> Path:
        """The cgroups, as the daemon makes them."""
        path = (parent.group / "sub" if parent else self.group) / str(number)
        for each in (path / "payload", path / "init"):
            each.mkdir(parents=True)
        for each in (
            path / "cgroup.procs",
            path / "payload",
            path / "payload/cgroup.procs",
            path / "payload/cgroup.threads",
            path / "payload/cgroup.subtree_control",
        ):
            os.chown(each, uid, uid)
        return path

    @contextlib.contextmanager
    def recipe(
        self, parent: Made | None = None, first_id: int | None = None, **changes: Any
    ) -> Iterator[Recipe]:
        """A container of the default kind, but for the changes."""
        number = next(self.numbers)
        types = changes.get("unshare", ALL)
        if first_id is None:
            first_id = FIRST_ID if parent is None else parent.first_id
            if "user" not in types and parent is None:
                first_id = 0
        if parent is None:
            id_map = ((0, first_id, IDS),)
        else:
            id_map = ((0, first_id - parent.first_id, 65536),)
        self.face(number)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self.top / f"{number}.sock"))
            listener.listen(64)
            recipe = Recipe(
                face=number,
                hostname=f"c{number}",
                unshare=ALL,
                parent_pid=parent.pid if parent else None,
                owner_uid=0,
                owner_gid=0,
                uid_map=id_map,
                gid_map=id_map,
                root_uid=first_id,
                cgroup=str(self.groups(number, first_id, parent)),
                v1=tuple(map(str, self.v1)),
                rootfs_fd=None,
                idmap_rootfs=True,
                binds=(),
                listen_fd=listener.fileno(),
            )
            yield replace(recipe, **changes)

    async def make(self, parent: Made | None = None, **changes: Any) -> Made:
        """Make a container."""
        with self.recipe(parent, **changes) as recipe, trio.fail_after(DEADLINE_S):
            pid = await self.spawner.make(recipe)
        return Made(
            recipe.face,
            pid,
            Init(str(self.top / f"{recipe.face}.sock")),
            Path(recipe.cgroup),
            recipe.root_uid,
            self,
        )

    async def emptied(self) -> None:
        """Wait until no process is in any group."""
        with trio.fail_after(DEADLINE_S):
            while "populated 1" in (self.group / "cgroup.events").read_text():
                await trio.sleep(0.005)


NO_OPEN_TREE_ATTR = f"""\
#!{sys.executable} -I
import ctypes, os, struct, sys
rows = (0x20, 0, 0, 0), (0x15, 0, 1, 467), (0x06, 0, 0, 0x50000 | {errno.ENOSYS}), (0x06, 0, 0, 0x7fff0000)
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))
prog = ctypes.create_string_buffer(struct.pack("@HP", len(rows), ctypes.addressof(code)))
if ctypes.CDLL(None).prctl(22, 2, prog):
    sys.exit("PR_SET_SECCOMP")
os.execv("{LIBEXEC}/nsfs-spawner", sys.argv)
"""
"""Linux before 6.15 cannot replace an idmap."""
ON_OVERLAYFS = """\
#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin exec unshare -m --propagation private sh -ec '
    cd {root}
    for each in dev proc sys; do mount --rbind /$each $each; done
    for each in {libexec} "$2"; do
        mkdir -p .$each
        mount --bind $each .$each
    done
    pivot_root . mnt
    umount -l /mnt
    exec {libexec}/nsfs-spawner "$@"' sh "$@"
"""
"""Nothing on overlayfs can be idmapped."""


def starter(top: Path, host: str) -> tuple[Path, Path]:
    """For a host of that kind: the directory of a spawner, and where its root filesystem is."""
    if not host:
        return LIBEXEC, Path("/")
    libexec, root = top / "libexec", Path("/")
    script = NO_OPEN_TREE_ATTR
    if host == "on overlayfs":
        subprocess.run(["mount", "-t", "tmpfs", "none", top / "layers"], check=True)
        for name in ("upper", "made", "root"):
            (top / "layers" / name).mkdir()
        root = top / "layers/root"
        layers = f"lowerdir=/,upperdir={top}/layers/upper,workdir={top}/layers/made"
        subprocess.run(["mount", "-t", "overlay", "-o", layers, "none", root], check=True)
        script = ON_OVERLAYFS.format(root=root, libexec=LIBEXEC)
    libexec.mkdir()
    (libexec / "nsfs-spawner").write_text(script)
    (libexec / "nsfs-spawner").chmod(0o755)
    return libexec, root


@pytest.fixture
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """On the host as it is, or with a parameter on one of that kind."""
    v2 = hierarchy("cgroup2")
    assert v2, "no cgroup2 hierarchy is mounted"
    name = f"nsfs-test-{os.getpid()}-spawner"
    v1 = [
        path / name for path in (hierarchy("cgroup", each) for each in ("pids", "memory")) if path
    ]
    top = Path(tempfile.mkdtemp(prefix="nsfs-spawner-"))
    (top / "layers").mkdir()
    libexec, root = starter(top, getattr(request, "param", ""))
    made = Rig(top, v2 / name, v1, root)
    made.tree.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", made.tree], check=True)
    (made.tree / ".f").mkdir(mode=0o700)
    for path in (made.group, *v1):
        path.mkdir()
    try:
        async with trio.open_nursery() as nursery:
            made.spawner = await Spawner.start(nursery, str(made.tree), libexec)
            with trio.fail_after(2 * DEADLINE_S):
                yield made
            await made.spawner.aclose()
    finally:
        with trio.CancelScope(shield=True):
            (made.group / "cgroup.kill").write_text("1")
            await made.emptied()
            for path in (made.group, *v1):
                # A process that has left its group may still hold it for a moment.
                for each in sorted((*path.rglob("*/"), path), reverse=True):
                    if each.is_dir():
                        await _removed(each)
            subprocess.run(["umount", made.tree], check=True)
            if root != Path("/"):
                subprocess.run(["umount", root, top / "layers"], check=True)
            shutil.rmtree(top)


async def _removed(group: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        while True:
            try:
                group.rmdir()
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                await trio.sleep(0.005)


def fds_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def children_of(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def mount_points(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines]


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], int]:
    """Compile a C program; returns a descriptor by which it can be executed inside."""
    directory = tmp_path_factory.mktemp("probe")

    def compiled(source: str) -> int:
        (directory / "probe.c").write_text(source)
        subprocess.run(
            ["gcc", "-O1", "-static", "-o", directory / "probe", directory / "probe.c"], check=True
        )
        return os.open(directory / "probe", os.O_PATH)

    return compiled


# --- what the default isolation is ---


async def test_mounts_are_ours_alone(rig: Rig) -> None:
    made = await rig.make()
    entries = [e.name for e in os.scandir("/sys") if e.is_dir()]
    # Over each private directory of the root filesystem is an empty one that nobody can take away.
    expected = ["/", *(f"/{name}" for name in PRIVATE), *(f"/{name}" for name in PRIVATE)]
    expected += ["/dev", "/dev/kmsg", "/dev/mqueue", "/dev/pts", *(f"/dev/{d}" for d in DEVICES)]
    expected += ["/dev/.nsfs/proc", "/dev/.nsfs/sys", "/proc", "/proc/kmsg", "/sys"]
    expected += [f"/sys/{name}" for name in {*entries, "namespaces"}]
    assert sorted(mount_points(made.pid)) == sorted(expected)


async def test_directories_are_private_and_empty(rig: Rig) -> None:
    made = await rig.make()
    for name in ("srv", "mnt", "home", "root", "tmp"):
        assert await made.says(f"ls -A /{name}") == ""
    assert (await made.says("cd /var; find . -type d | sort")).split() == [
        ".",
        "./cache",
        "./lib",
        "./log",
        "./tmp",
    ]
    assert await made.says("stat -c %a%u /tmp /var/tmp /run/lock /var /root") == (
        "17770\n17770\n17770\n7550\n7000\n"
    )
    assert await made.says("cd /var/run && pwd -P; cd /var/lock && pwd -P") == "/run\n/run/lock\n"
    for name in PRIVATE:
        await made.says(f"touch /{name}/here")
        assert not Path(f"/{name}/here").exists()
    other = await rig.make(first_id=FIRST_ID + IDS)
    assert (await other.run("ls /tmp/here"))[0] != 0


async def test_root_is_read_only_for_good(rig: Rig) -> None:
    made = await rig.make()
    assert (await made.run("touch /usr/nsfs-test"))[0] != 0
    assert not Path("/usr/nsfs-test").exists()
    for flags in ("rw", "ro,suid", "ro,dev"):
        status, output = await made.run(f"mount -o remount,bind,{flags} /")
        assert status != 0, output
    # In a mount namespace of their own they cannot either.
    assert (await made.run("unshare -Urm mount -o remount,bind,rw /"))[0] != 0


async def test_what_private_directories_hide_stays_hidden(rig: Rig, on_root: Path) -> None:
    made = await rig.make()
    for name in PRIVATE:
        for command in (
            f"umount -l /{name} && umount -l /{name}",
            "umount -l /; mount --bind / /mnt",
        ):
            await made.run(f"cd /; {command}")
            assert await made.says(f"ls -A /{name} /mnt/{name} 2>/dev/null | grep -v :; true") in (
                "",
                "\n",
            )


async def test_host_files_are_read_as_other(rig: Rig, on_root: Path) -> None:
    for mode in (0o644, 0o640, 0o600, 0o4755):
        path = on_root / f"{mode:o}"
        path.write_text(f"{mode:o}\n")
        path.chmod(mode)
    made = await rig.make()
    assert await made.says(f"cat {on_root}/644") == "644\n"
    for name in ("640", "600"):
        status, output = await made.run(f"cat {on_root}/{name}")
        assert status != 0, output
        assert "Permission denied" in output
    # Whose they are is not to be seen.
    assert await made.says(f"stat -c '%u %g' {on_root}/644") == "65534 65534\n"
    # Other users see as little as the container's root.
    assert (await made.run(f"cat {on_root}/640", uid=1000, gid=1000))[0] != 0


CONNECT = """
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
int main(int argc, char **argv)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    strncpy(a.sun_path, argv[1], sizeof(a.sun_path) - 1);
    int s = socket(AF_UNIX, argc > 2 ? SOCK_SEQPACKET : SOCK_STREAM, 0);
    errno = 0;
    connect(s, (struct sockaddr *)&a, sizeof(a));
    printf("%d ", errno);
    errno = 0;
    open(argv[1], O_WRONLY | O_NONBLOCK);
    printf("%d\\n", errno);
}
"""


@pytest.mark.parametrize("rig", ["", "on overlayfs"], indirect=True)
async def test_host_sockets_are_out_of_reach(
    rig: Rig, on_root: Path, probe: Callable[[str], int]
) -> None:
    """Where the root filesystem can be idmapped; else their modes say who may connect to them."""
    mapped = "idmapped_root" in await rig.spawner.features()
    assert not mapped or rig.root == Path("/")
    connect_fd = probe(CONNECT)
    made = await rig.make()
    inner = await rig.make(made)
    place = rig.root / on_root.relative_to("/")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place / "socket"))
        server.listen()
        os.mkfifo(place / "fifo")
        for mode, denied in ((0o777, mapped), (0o700, True)):
            for each in (made, inner):
                for name in ("socket", "fifo"):
                    os.chmod(place / name, mode)
                    command = ("/proc/self/fd/3", str(on_root / name))
                    status, output = await each.run(command, connect_fd)
                    assert status == 0
                    connected, opened = map(int, output.split())
                    assert opened == (errno.EACCES if denied else errno.ENXIO)
                    if name == "socket":
                        assert connected == (errno.EACCES if denied else 0)
    os.close(connect_fd)


@pytest.mark.parametrize("rig", ["", "no open_tree_attr"], indirect=True)
async def test_what_the_kernel_has_is_found(rig: Rig, request: pytest.FixtureRequest) -> None:
    """On the filesystems that hosts have, but for those of containers."""
    kind = subprocess.check_output(["stat", "-fc", "%T", "/"], text=True).strip()
    expected = {"idmapped_root"} if kind in ("ext2/ext3", "xfs", "btrfs") else set()
    version = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2]))
    if expected and version >= (6, 15) and "no open_tree_attr" not in request.node.name:
        expected.add("remapped_root")
    assert await rig.spawner.features() == expected


@pytest.mark.parametrize("rig", ["", "on overlayfs"], indirect=True)
async def test_nobodys_files_by_the_idmap_alone(rig: Rig, on_root: Path) -> None:
    """Without what else makes a container somebody else: no file is its root's, by whatever IDs."""
    mapped = "idmapped_root" in await rig.spawner.features()
    for name, uid in (("hosts", 0), ("its", FIRST_ID)):
        (on_root / name).write_text("secret\n")
        (on_root / name).chmod(0o600)
        os.chown(on_root / name, uid, uid)
    for made, name in (
        (await rig.make(), "its"),
        (await rig.make(unshare=ALL - {"user"}), "hosts"),
    ):
        assert await made.says(f"stat -c %u {on_root}/{name}") == ("65534\n" if mapped else "0\n")
        assert ((await made.run(f"cat {on_root}/{name}"))[0] == 0) != mapped


@pytest.mark.parametrize("rig", ["on overlayfs"], indirect=True)
async def test_setuid_programs_by_nosuid_alone(
    rig: Rig, on_root: Path, probe: Callable[[str], int]
) -> None:
    """Where nothing is idmapped a program of the host's may belong to the container's root."""
    source = '#include <stdio.h>\n#include <unistd.h>\nint main() { printf("%d", geteuid()); }\n'
    program_fd = probe(source)
    shutil.copy(f"/proc/self/fd/{program_fd}", on_root / "program")
    os.close(program_fd)
    os.chown(on_root / "program", FIRST_ID, FIRST_ID)
    (on_root / "program").chmod(0o4755)
    made = await rig.make()
    assert await made.says(f"stat -c %u:%a {on_root}/program") == "0:4755\n"
    assert await made.says(f"{on_root}/program", uid=1000, gid=1000) == "1000"


@pytest.mark.parametrize("rig", ["on overlayfs"], indirect=True)
async def test_where_nothing_can_be_idmapped(rig: Rig, on_root: Path) -> None:
    """The root is read-only for good, and read as whom the container's IDs are: nobody else's."""
    assert await rig.spawner.features() == set()
    (on_root / "open").write_text("open\n")
    (on_root / "secret").write_text("secret\n")
    (on_root / "secret").chmod(0o600)
    made = await rig.make()
    for each in (made, await rig.make(made)):
        assert await each.says(f"cat {on_root}/open; stat -c %u {on_root}/open") == "open\n65534\n"
        assert (await each.run(f"cat {on_root}/secret"))[0] != 0
        for command in (f"touch {on_root}/x", "mount -o remount,bind,rw /", "touch /usr/x"):
            assert (await each.run(command))[0] != 0, command


async def test_devices(rig: Rig) -> None:
    made = await rig.make()
    assert await made.says("echo x > /dev/null; head -c 4 /dev/zero | od -An -tx1") == (
        " 00 00 00 00\n"
    )
    assert "No space left" in (await made.run("cat /etc/hostname > /dev/full"))[1]
    assert len(await made.says("head -c 8 /dev/urandom | od -An -tx1")) > 8
    assert await made.says("readlink /dev/fd /dev/stdin /dev/ptmx") == (
        "/proc/self/fd\n/proc/self/fd/0\npts/ptmx\n"
    )
    assert (await made.run("mknod /tmp/sda b 8 0 && cat /tmp/sda"))[0] != 0
    names = set((await made.says("ls -A /dev")).split())
    assert names == {
        *DEVICES,
        *("fd", "stdin", "stdout", "stderr", "ptmx", "core"),
        *("pts", "shm", "mqueue", "kmsg", ".nsfs"),
    }
    await made.says("touch /dev/shm/x /dev/mqueue/y /dev/log")
    # script(1) makes a pty; gid 5 is what its slave has.
    assert (await made.says("script -qc 'stat -c %g%a $(tty)' /dev/null")).strip() == "5620"


async def test_the_files_of_the_mount_are_inside(rig: Rig) -> None:
    made = await rig.make()
    assert await made.says("cat /dev/kmsg") == f"kmsg {made.number}\n"
    assert await made.says("cat /proc/kmsg") == f"pkmsg {made.number}\n"
    assert await made.says("cat /sys/namespaces/state") == "populated 0\n"
    # Of the rest of it nothing is to be seen.
    assert (await made.run("ls /sys/namespaces/../.f"))[0] != 0


async def test_proc_and_sys_are_its_own(rig: Rig) -> None:
    made = await rig.make()
    assert (await made.says("ls /sys/class/net")).split() == ["lo"]
    assert set((await made.says("ls /proc | grep '^[0-9]'")).split()) >= {"1"}
    assert await made.says("cat /proc/1/comm") == "nsfs-init\n"
    # Files of its own network namespace are its own, also those of `lo`, there from the start.
    assert await made.says("stat -c %u /sys/class/net/lo/mtu /proc/sys/net/ipv4/ip_forward") == (
        "0\n0\n"
    )
    await made.says("echo 1400 > /sys/class/net/lo/mtu; echo 1 > /proc/sys/net/ipv4/ip_forward")
    assert (await made.run("echo 1 > /proc/sys/kernel/panic"))[0] != 0


async def test_nested_user_namespaces_can_mount_proc_and_sysfs(rig: Rig) -> None:
    for made in (outer := await rig.make(), await rig.make(outer)):
        await made.says("unshare -Urmpf --mount-proc true")
        await made.says("unshare -Urnm mount -t sysfs none /sys")
        # As an ordinary user too.
        await made.says("unshare -Urmpf --mount-proc true", uid=1000, gid=1000)


async def test_init_cannot_be_traced_or_inspected(rig: Rig) -> None:
    made = await rig.make()
    for file in ("fd", "fdinfo", "ns", "map_files", "task/1/fd"):
        assert "Permission denied" in (await made.run(f"ls /proc/1/{file}/"))[1], file
    for file in ("environ", "mem", "maps", "smaps", "syscall", "stack", "auxv", "io"):
        assert (await made.run(f"head -c 1 /proc/1/{file}"))[1].strip("\0") in (
            f"head: cannot open '/proc/1/{file}' for reading: Permission denied\n",
            f"head: error reading '/proc/1/{file}': Permission denied\n",
            f"head: error reading '/proc/1/{file}': Operation not permitted\n",
        ), file
    for link in ("exe", "cwd", "root", "ns/net"):
        assert (await made.run(f"readlink /proc/1/{link}"))[0] != 0, link
    assert (await made.run("ls /proc/1/root/"))[0] != 0


TRACE = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
int main(void)
{
    char byte;
    struct iovec here = { &byte, 1 };
    struct iovec there = { (void *)0x400000, 1 };
    long fd = syscall(SYS_pidfd_open, 1, 0);

    for (int i = 0; i < 5; i++) {
        errno = 0;
        switch (i) {
        case 0: ptrace(PTRACE_ATTACH, 1, 0, 0); break;
        case 1: ptrace(PTRACE_SEIZE, 1, 0, 0); break;
        case 2: syscall(SYS_process_vm_readv, 1, &here, 1, &there, 1, 0); break;
        case 3: syscall(438 /* pidfd_getfd */, fd, 3, 0); break;
        case 4: syscall(SYS_kcmp, 1, getpid(), 0, 0, 0); break;
        }
        printf("%d ", errno);
    }
}
"""


async def test_init_is_closed_to_system_calls(rig: Rig, probe: Callable[[str], int]) -> None:
    program = probe(TRACE)
    for made in (outer := await rig.make(), await rig.make(outer)):
        status, output = await made.run(("/proc/self/fd/3",), program)
        assert status == 0
        assert output.split() == [str(errno.EPERM)] * 5
        # No signal does anything to it.
        await made.says("for s in $(seq 1 64); do kill -$s 1 2>/dev/null; done; sleep 0.05; true")
        assert await made.says("echo lives") == "lives\n"
    # The parent's root cannot either, which sees it as one of its processes.
    pids = (await outer.says("grep -l nsfs-init /proc/[0-9]*/comm")).split()
    (nested,) = {path.split("/")[2] for path in pids} - {"1"}
    assert (await outer.run(f"ls /proc/{nested}/fd/"))[0] != 0
    os.close(program)


DENIED = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
static long i386(long number, long a, long b)
{
    long result = 0;
#ifdef __x86_64__
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b) : "memory");
#endif
    return -result;
}
#define TRY(...) (errno = 0, syscall(__VA_ARGS__), errno)
int main(void)
{
    printf("%d %d %d %d %d %d", TRY(SYS_init_module, 0, 0, 0), TRY(SYS_finit_module, -1, 0, 0),
           TRY(SYS_delete_module, 0, 0), TRY(SYS_kexec_load, 0, 0, 0, 0),
           TRY(SYS_kexec_file_load, -1, -1, 0, 0, 0), TRY(SYS_open_by_handle_at, -1, 0, 0));
    printf(" %d %d %d", TRY(SYS_umount2, "/nowhere", 1), TRY(SYS_umount2, "/nowhere", 2),
           TRY(SYS_getuid) ? -1 : 0);
    /* delete_module, finit_module, umount2 with and without force, getpid */
    printf(" %ld %ld %ld %ld", i386(129, 0, 0), i386(350, -1, 0), i386(52, 0, 1), i386(52, 0, 2));
#ifdef __x86_64__
    printf(" %d %d", TRY(0x40000000 | 176, 0, 0), TRY(0x40000000 | 528, 0, 0));
#endif
}
"""


async def test_denylist(rig: Rig, probe: Callable[[str], int]) -> None:
    program = probe(DENIED)
    made = await rig.make()
    status, output = await made.run(("/proc/self/fd/3",), program)
    assert status == 0
    results = list(map(int, output.split()))
    assert results[:6] == [errno.EPERM] * 6
    assert results[6:9] == [errno.EACCES, errno.ENOENT, 0]
    if os.uname().machine == "x86_64":
        assert results[9:13] == [errno.EPERM, errno.EPERM, errno.EACCES, errno.EFAULT]
        # A kernel without x32 does not know the number at all; either way it is not executed.
        assert set(results[13:]) <= {errno.EPERM, errno.ENOSYS}
    assert "NoNewPrivs:\t0\nSeccomp:\t2\n" in await made.says("cat /proc/self/status")
    inner = await rig.make(made)
    # The denylist and one for syslog(2), which is not the parent's.
    assert "Seccomp_filters:\t2\n" in await inner.says("cat /proc/self/status")
    open_to_all = await rig.make(filter=False, first_id=FIRST_ID + IDS)
    assert "Seccomp:\t0\n" in await open_to_all.says("cat /proc/self/status")
    # For want of the capability, not of the system call.
    status, output = await open_to_all.run(("/proc/self/fd/3",), program)
    assert output.split()[6] == str(errno.ENOENT)
    os.close(program)


async def test_cgroups(rig: Rig) -> None:
    made = await rig.make()
    assert "0::/\n" in await made.says("cat /proc/self/cgroup")
    assert (made.group / "init/cgroup.procs").read_text() == f"{made.pid}\n"
    command = await made.start(("sleep", "60"))
    assert (made.group / "payload/cgroup.procs").read_text() == f"{command.pid}\n"
    for group in rig.v1:
        assert {str(made.pid), str(command.pid)} <= set((group / "tasks").read_text().split())
    # Every type is its own, and the commands are in the same as the init.
    for name in CLONE_NEW:
        links = [os.readlink(f"/proc/{pid}/ns/{name}") for pid in ("self", made.pid, command.pid)]
        assert links[0] != links[1], name
        assert links[1] == links[2], name
    # The group is delegated: members may make groups of their own in it.
    await made.says(
        "mount -t cgroup2 none /mnt && mkdir /mnt/a && echo $$ > /mnt/a/cgroup.procs &&"
        "grep -q ::/a /proc/self/cgroup && ls -d /mnt/payload 2>/dev/null; test $? = 2"
    )
    # And there is no way up from it.
    assert await made.says("ls -d /mnt/../init 2>/dev/null || true") == ""


async def test_identity(rig: Rig) -> None:
    made = await rig.make(owner_uid=4711, owner_gid=4712, hostname="h" * 64)
    assert await made.says("hostname") == "h" * 64 + "\n"
    assert (await made.says("cat /proc/self/uid_map")).split() == ["0", str(FIRST_ID), str(IDS)]
    assert (await made.says("cat /proc/self/gid_map")).split() == ["0", str(FIRST_ID), str(IDS)]
    assert await made.says("id -u; id -g; id -G; umask") == "0\n0\n0\n0022\n"
    assert (
        await made.says("ip -o link show lo | grep -c ,UP,; ping -c1 -W1 127.0.0.1 | wc -l") > "1"
    )
    # Who owns the user namespace may join it.
    ns_fd = os.open(f"/proc/{made.pid}/ns/user", os.O_RDONLY)
    owner = fcntl.ioctl(ns_fd, NS_GET_OWNER_UID, b"\0\0\0\0")
    os.close(ns_fd)
    assert int.from_bytes(owner, "little") == 4711
    status = Path(f"/proc/{made.pid}/status").read_text()
    assert f"Uid:\t{FIRST_ID}\t{FIRST_ID}\t{FIRST_ID}\t{FIRST_ID}\n" in status
    assert "Groups:\t \n" in status
    assert await made.says("ulimit -n; ulimit -c; cat /proc/self/oom_score_adj") == "1024\n0\n0\n"


async def test_init_holds_nothing_of_the_spawner(rig: Rig) -> None:
    made = await rig.make()
    with trio.fail_after(DEADLINE_S):
        # The one by which it says that it is ready is closed right after that.
        while Path(f"/proc/{made.pid}/fd/5").is_symlink():
            await trio.sleep(0.001)
    links = {name: os.readlink(f"/proc/{made.pid}/fd/{name}") for name in "0123467"}
    assert set(os.listdir(f"/proc/{made.pid}/fd")) == set(links)
    assert {links[n] for n in "012"} == {"/dev/null"}
    assert links["3"].startswith("socket:")
    assert links["4"] == f"{made.group}/payload"
    assert links["6"] == os.readlink(f"/proc/{made.pid}/ns/cgroup")
    assert links["7"] == "anon_inode:[signalfd]"
    assert Path(f"/proc/{made.pid}/environ").read_bytes() == b""
    assert os.readlink(f"/proc/{made.pid}/root") == "/"


async def test_memory_of_an_init(rig: Rig) -> None:
    some = [await rig.make() for _ in range(4)]
    for made in some:
        await made.says("true")
        rollup = Path(f"/proc/{made.pid}/smaps_rollup").read_text().splitlines()
        (pss,) = (int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
        assert pss < 60


# --- nesting ---


async def test_nested_three_deep(rig: Rig) -> None:
    chain: list[Made] = []
    for depth in range(3):
        chain.append(
            await rig.make(chain[-1] if chain else None, first_id=FIRST_ID + (depth > 0) * 65536)
        )
        made = chain[-1]
        assert (await made.says("hostname")).strip() == f"c{made.number}"
        assert (await made.says("ls /sys/class/net")).split() == ["lo"]
        assert "0::/\n" in await made.says("cat /proc/self/cgroup")
        assert await made.says("cat /sys/namespaces/state /dev/kmsg") == (
            f"populated 0\nkmsg {made.number}\n"
        )
        assert (await made.run("touch /usr/x"))[0] != 0
        await made.says("touch /tmp/here /var/here")
        assert await made.says("id -u") == "0\n"
        assert len(mount_points(made.pid)) == len(mount_points(chain[0].pid))
    assert [int(line.split()[-1]) for line in (await chain[0].says("pgrep -c init")).split()]
    # The parent sees the nested one's processes, and not the other way round.
    assert len((await chain[0].says("pgrep nsfs-init")).split()) == 3
    assert len((await chain[2].says("pgrep nsfs-init")).split()) == 1
    # When an init dies, so do all that are nested in it.
    os.kill(chain[0].pid, signal.SIGKILL)
    await rig.emptied()


async def test_nested_to_the_kernels_limit(rig: Rig) -> None:
    made = await rig.make()
    depth = 1
    caught = None
    while caught is None and depth < 40:
        with contextlib.suppress(OSError):
            made, depth = await rig.make(made), depth + 1
            continue
        with pytest.raises(OSError, match="clone") as caught:
            await rig.make(made)
    assert caught is not None
    assert caught.value.errno in (errno.ENOSPC, errno.EUSERS)
    assert depth == 32
    assert await made.says("echo deep; id -u") == "deep\n0\n"
    assert (await made.run("touch /usr/x"))[0] != 0


@pytest.mark.parametrize("rig", ["", "no open_tree_attr"], indirect=True)
async def test_parents_tree_is_not_the_childs_to_use(
    rig: Rig, rootfs: Path, probe: Callable[[str], int]
) -> None:
    """The parent's own root filesystem is shown to a nested container read-only, and nobody's where
    an idmap can be replaced; else it has the IDs of the parent's."""
    remapped = "remapped_root" in await rig.spawner.features()
    parent = await rig.make(rootfs_fd=await rig.spawner.tree(0, str(rootfs)))
    await parent.says("echo secret > /etc/secret; chmod 600 /etc/secret; mkdir /var /srv /opt")
    await parent.says("echo open > /opt/open; mkfifo /opt/fifo; chmod 666 /opt/fifo")
    # The same IDs, as when slices did not last.
    child = await rig.make(parent)
    assert await child.says("cat /opt/open") == "open\n"
    assert (await child.run("cat /etc/secret"))[0] == (1 if remapped else 0)
    assert (await child.run("echo x > /opt/open"))[0] != 0
    assert (await child.run("mount -o remount,bind,rw /"))[0] != 0
    connect_fd = probe(CONNECT)
    _, output = await child.run(("/proc/self/fd/3", "/opt/fifo"), connect_fd)
    assert int(output.split()[1]) == (errno.EACCES if remapped else errno.ENXIO)
    os.close(connect_fd)


async def test_hostile_parent(rig: Rig, rootfs: Path) -> None:
    """A parent that replaced directories by links out of its tree gains nothing by it."""
    for name in ("dev", "sys", "var", "run"):
        (rootfs / name).rmdir() if (rootfs / name).exists() else None
        (rootfs / name).symlink_to("/../../../../fuse/.f")
    parent_root = await rig.spawner.tree(0, str(rootfs))
    (rootfs / "dev").unlink()
    (rootfs / "dev").mkdir()
    (rootfs / "sys").unlink()
    (rootfs / "sys").mkdir()
    parent = await rig.make(rootfs_fd=parent_root)
    (rootfs / "proc").rename(rootfs / "other")
    (rootfs / "proc").symlink_to("/etc")
    try:
        child = await rig.make(parent)
    except OSError as error:
        assert error.errno in (errno.EINVAL, errno.ENOTDIR)
    else:
        points = mount_points(child.pid)
        assert all(p == "/" or p.startswith(("/dev", "/sys", "/tmp")) for p in points), points
    assert list((rig.tree / ".f").glob("*/state"))


# --- a root filesystem of its own ---


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A small Linux, as it would be unpacked by root."""
    top = tmp_path / "rootfs"
    for name in ("bin", "etc", "dev", "proc", "sys", "run", "tmp"):
        (top / name).mkdir(parents=True)
    shutil.copy(program("busybox"), top / "bin/busybox")
    for applet in (
        "sh",
        "cat",
        "ls",
        "id",
        "stat",
        "touch",
        "mount",
        "mkdir",
        "mkfifo",
        "chmod",
        "head",
    ):
        (top / "bin" / applet).symlink_to("busybox")
    (top / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (top / "etc/shadow").write_text("secret\n")
    (top / "etc/shadow").chmod(0o600)
    (top / "etc/users").write_text("1000\n")
    os.chown(top / "etc/users", 1000, 1000)
    (top / "tmp/kept").write_text("kept\n")
    os.mknod(top / "bin/disk", 0o600 | 0o060000, os.makedev(8, 0))
    return top


async def test_rootfs(rig: Rig, rootfs: Path) -> None:
    tree_fd = await rig.spawner.tree(0, str(rootfs))
    made = await rig.make(rootfs_fd=tree_fd)
    os.close(tree_fd)
    assert set((await made.says("ls /")).split()) == {
        "bin", "etc", "dev", "proc", "sys", "run", "tmp",
    }  # fmt: skip
    assert await made.says("cat /etc/shadow") == "secret\n"
    assert await made.says("stat -c %u /etc/shadow /etc/users") == "0\n1000\n"
    assert await made.says("cat /tmp/kept") == "kept\n"
    await made.says("touch /etc/new; mkdir /srv; echo x > /run/y")
    assert (rootfs / "etc/new").stat().st_uid == 0
    # A device in the tree cannot be opened, and the flag that says so not be taken away.
    assert (await made.run("cat /bin/disk"))[0] != 0
    assert (await made.run("mount -o remount,bind,dev /"))[0] != 0
    assert (await made.run("cat /bin/disk"))[0] != 0
    assert await made.says("cat /dev/kmsg; ls /sys/namespaces") == f"kmsg {made.number}\nstate\n"
    points = [p for p in mount_points(made.pid) if not p.startswith(("/dev", "/proc", "/sys"))]
    assert points == ["/"]
    # The same tree may be the root of another at the same time.
    tree_fd = await rig.spawner.tree(0, str(rootfs))
    other = await rig.make(rootfs_fd=tree_fd, first_id=FIRST_ID + IDS)
    os.close(tree_fd)
    assert await other.says("cat /etc/shadow") == "secret\n"


async def test_nested_rootfs(rig: Rig, rootfs: Path) -> None:
    parent = await rig.make()
    tree_fd = await rig.spawner.tree(0, str(rootfs))
    made = await rig.make(parent, rootfs_fd=tree_fd, first_id=FIRST_ID + 65536)
    os.close(tree_fd)
    assert await made.says("stat -c %u /etc/shadow; cat /etc/shadow") == "0\nsecret\n"
    await made.says("touch /etc/nested")
    assert (rootfs / "etc/nested").stat().st_uid == 0


async def test_binds(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("a\n")
    (tmp_path / "a").chmod(0o777)
    (tmp_path / "b").write_text("b\n")
    directory = await rig.spawner.tree(0, str(tmp_path / "a"))
    again = await rig.spawner.tree(0, str(tmp_path / "a"))
    file = await rig.spawner.tree(0, str(tmp_path / "b"))
    made = await rig.make(
        binds=(
            ("/srv/deep/er", directory, True),
            ("/mnt", again, False),
            ("/run/b", file, True),
        )
    )
    for fd in (directory, again, file):
        os.close(fd)
    assert await made.says("cat /srv/deep/er/file /mnt/file /run/b") == "a\na\nb\n"
    await made.says("touch /mnt/new")
    assert (await made.run("touch /srv/deep/er/new2"))[0] != 0
    # Read-only is for good.
    for path in ("/srv/deep/er", "/run/b"):
        assert (await made.run(f"mount -o remount,bind,rw {path}"))[0] != 0


# --- any set of namespaces ---


def subsets() -> list[frozenset[str]]:
    """None, each alone, each left out, and some more."""
    chooser = random.Random(20)
    some = [frozenset(name for name in sorted(ALL) if chooser.random() < 0.5) for _ in range(16)]
    return [
        frozenset(),
        *(frozenset({name}) for name in sorted(ALL)),
        *(ALL - {name} for name in sorted(ALL)),
        *some,
    ]


async def check_subset(made: Made, types: frozenset[str], parent: Made | None) -> None:
    above = str(parent.pid) if parent else "self"
    command = await made.start(("sleep", "60"))
    for name in CLONE_NEW:
        outside, init, member = (
            os.readlink(f"/proc/{pid}/ns/{name}") for pid in (above, made.pid, command.pid)
        )
        assert (init != outside) == (name in types), name
        assert init == member, name
    os.kill(command.pid, signal.SIGKILL)
    assert await command.wait() == -signal.SIGKILL
    assert (await made.says("id -u; echo $(readlink /proc/self/ns/net)")).split() == [
        "0",
        os.readlink(f"/proc/{made.pid}/ns/net"),
    ]
    if "mnt" in types:
        assert await made.says("cat /dev/kmsg; touch /tmp/x") == f"kmsg {made.number}\n"
        shown = (await made.says("ls /sys/class/net")).split()
        real = subprocess.run(
            ["nsenter", f"--net=/proc/{made.pid}/ns/net", "ip", "-br", "link"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert sorted(shown) == sorted(
            line.split()[0].split("@")[0] for line in real.stdout.splitlines()
        )
    if "uts" in types:
        assert (await made.says("hostname")).strip() == f"c{made.number}"
    # Orphans are the init's to reap.
    await made.says("(sh -c 'sleep 0.01' &)")
    with trio.fail_after(DEADLINE_S):
        while (made.group / "payload/cgroup.procs").read_text():
            await trio.sleep(0.005)


@contextlib.contextmanager
def expect_unsupported(types: frozenset[str]) -> Iterator[None]:
    """What cannot be, and is said so: the parent's cgroup namespace where it bounds delegation."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    if "cgroup" not in types and any("cgroup2" in x and "nsdelegate" in x for x in lines):
        with pytest.raises(OSError, match="cgroups") as caught:
            yield
        assert caught.value.errno == errno.EOPNOTSUPP
    else:
        yield


@pytest.mark.parametrize("types", subsets(), ids=lambda s: "+".join(sorted(s)) or "none")
async def test_subset(rig: Rig, types: frozenset[str]) -> None:
    made = await rig.make(unshare=types)
    await check_subset(made, types, None)
    # Any set in any other: all of them in this one, and this set in one that has all.
    full = await rig.make(made)
    await check_subset(full, ALL, made)
    outer = await rig.make(first_id=FIRST_ID + IDS)
    with expect_unsupported(types):
        inner = await rig.make(outer, unshare=types)
        await check_subset(inner, types, outer)


async def test_without_user_namespace_dangerous_capabilities_are_gone(rig: Rig) -> None:
    made = await rig.make(unshare=ALL - {"user"})
    status = Path(f"/proc/{made.pid}/status").read_text()
    (bounding,) = (int(line.split()[1], 16) for line in status.splitlines() if "CapBnd" in line)
    gone = {"sys_module": 16, "sys_rawio": 17, "sys_time": 25, "mknod": 27, "mac_override": 32}
    gone |= {"mac_admin": 33, "syslog": 34, "bpf": 39}
    for name, number in gone.items():
        assert not bounding >> number & 1, name
    assert bounding >> 12 & 1, "net_admin"
    assert (await made.run("echo 1 > /proc/sys/kernel/panic; mknod /tmp/x b 8 0"))[0] != 0
    # In a user namespace that it makes for itself it cannot get them back.
    assert (await made.run("mount -o remount,bind,rw / && touch /usr/nsfs-test"))[0] != 0


# --- what fails ---


async def fails(
    rig: Rig, number: int, words: str, parent: Made | None = None, **changes: Any
) -> None:
    """A make that fails so, and leaves nothing."""
    await rig.spawner.features()
    fds, children = fds_of(rig.spawner.pid), children_of(rig.spawner.pid)
    mounts = Path(f"/proc/{rig.spawner.pid}/mountinfo").read_text()
    with rig.recipe(parent, **changes) as recipe:
        with pytest.raises(OSError, match=words) as caught:
            await rig.spawner.make(recipe)
        assert caught.value.errno == number
        assert "populated 0" in (Path(recipe.cgroup) / "cgroup.events").read_text()
    await rig.spawner.features()
    assert children_of(rig.spawner.pid) == children
    assert fds_of(rig.spawner.pid) == fds
    assert Path(f"/proc/{rig.spawner.pid}/mountinfo").read_text() == mounts


async def test_failures_leave_nothing(rig: Rig, tmp_path: Path) -> None:
    parent = await rig.make()
    overlapping = ((0, FIRST_ID, 10), (5, FIRST_ID + 20, 10))
    for above in (None, parent):
        await fails(rig, errno.EINVAL, "ID maps", above, uid_map=overlapping)
        await fails(rig, errno.EINVAL, "ID maps", above, gid_map=((0, 0, 0),))
        await fails(rig, errno.EINVAL, "becoming root", above, uid_map=())
        await fails(rig, errno.EINVAL, "hostname", above, hostname="h" * 65)
        await fails(rig, errno.ENOENT, "files of the mount", above, face=999)
        tree_fd = await rig.spawner.tree(0, str(tmp_path))
        binds = (("/usr/not/there", tree_fd, False),)
        await fails(rig, errno.EROFS, "binds", above, binds=binds)
        # What was sent along is used up.
        await fails(rig, errno.EINVAL, "binds", above, binds=binds)
        os.close(tree_fd)
        await fails(rig, errno.EBADF, "clone", above, cgroup=str(tmp_path / "groups"))
    # IDs that the parent does not have
    await fails(rig, errno.EPERM, "ID maps", parent, uid_map=((0, IDS, 1),))
    await fails(rig, errno.ESRCH, "dead", None, parent_pid=2**22 - 1)
    # A tree that is attached somewhere already
    attached = os.open("/", os.O_PATH)
    for unshare in (ALL, ALL - {"user"}):
        await fails(rig, errno.EINVAL, "root", None, rootfs_fd=attached, unshare=unshare)
    os.close(attached)
    await made_after_failures(rig)


async def made_after_failures(rig: Rig) -> None:
    made = await rig.make(first_id=FIRST_ID + IDS)
    assert await made.says("echo ok") == "ok\n"


@pytest.fixture(autouse=True)
def not_groups(tmp_path: Path) -> None:
    """Directories that are not cgroups, to be taken for some."""
    for name in ("init", "payload"):
        (tmp_path / "groups" / name).mkdir(parents=True)
    (tmp_path / "groups/cgroup.events").write_text("populated 0\n")


async def test_group_that_is_not_delegated(rig: Rig) -> None:
    made = await rig.make()
    os.chown(made.group / "payload/cgroup.procs", 0, 0)
    with pytest.raises(PermissionError, match="clone"):
        await made.start(("true",))


@pytest.mark.parametrize("limit", ["user", "pid", "net", "mnt", "uts", "ipc", "cgroup", "time"])
async def test_namespace_limit(rig: Rig, limit: str) -> None:
    """ENOSPC is what the kernel says beyond max_TYPE_namespaces; here the parent's are used up."""
    parent = await rig.make()
    # A limit of its own user namespace, which nested ones count against.
    await parent.says(f"echo 0 > /proc/sys/user/max_{limit}_namespaces")
    await fails(rig, errno.ENOSPC, "clone|network|cgroup|root", parent)


async def test_killed_in_the_middle(rig: Rig) -> None:
    """cgroup.kill at any moment of the making: an error, or a container that is dead at once."""
    for delay_s in (0.0, 0.0002, 0.0005, 0.001, 0.002):
        with rig.recipe() as recipe:

            async def kill(group: str = recipe.cgroup, delay_s: float = delay_s) -> None:
                await trio.sleep(delay_s)
                Path(f"{group}/cgroup.kill").write_text("1")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill)
                with contextlib.suppress(OSError):
                    await rig.spawner.make(recipe)
            # It may have come before there was anything to kill.
            await kill(delay_s=0.0)
        await rig.emptied()
    await made_after_failures(rig)


# --- commands ---


async def test_exit_statuses(rig: Rig) -> None:
    made = await rig.make()
    assert (await made.run("exit 7"))[0] == 7
    assert (await made.run("kill -TERM $$"))[0] == -signal.SIGTERM
    late = await made.start(("true",))
    await made.says("sleep 0.05")
    assert await late.wait() == 0
    with pytest.raises(ProcessLookupError):
        await late.wait()
    # Who did not ask for it to be kept
    forgotten = await made.start(("true",), keep_status=False)
    with pytest.raises(ProcessLookupError):
        await forgotten.wait()


async def test_commands_that_cannot_start(rig: Rig) -> None:
    made = await rig.make()
    for argv, number in (
        (("not-there",), errno.ENOENT),
        (("/etc/passwd",), errno.EACCES),
        (("/",), errno.EACCES),
        (("",), errno.ENOENT),
    ):
        with pytest.raises(OSError, match="exec") as caught:
            await made.start(argv)
        assert caught.value.errno == number
    with pytest.raises(FileNotFoundError, match="directory"):
        await made.start(("true",), cwd="/not/there")
    with pytest.raises(OSError, match="becoming root") as caught:
        await made.start(("true",), uid=IDS + 5)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="too long") as caught:
        await made.start(("true", "x" * 300_000))
    assert caught.value.errno == errno.E2BIG
    with pytest.raises(OSError, match="terminal"):
        await made.start(("true",), terminal=True)
    assert await made.says("echo ok") == "ok\n"


async def test_what_a_command_has(rig: Rig) -> None:
    made = await rig.make()
    env = (*ENV, "A=b c", "EMPTY=")
    assert sorted((await made.says("exec env", env=env, cwd="/usr")).splitlines()) == sorted(
        (*env, "PWD=/usr")
    )
    # No descriptor but the given ones: the last is of the listing itself.
    assert (await made.says("ls /proc/self/fd")).split() == ["0", "1", "2", "3"]
    status = await made.says("cat /proc/self/status")
    for line in ("SigBlk", "SigIgn", "SigCgt"):
        assert f"{line}:\t0000000000000000\n" in status
    assert await made.says("id -u; id -g; id -G", uid=1000, gid=1001, groups=(7, 8)) == (
        "1000\n1001\n1001 7 8\n"
    )
    assert "CapEff:\t0000000000000000" in await made.says("cat /proc/self/status", uid=1000)
    # A session of its own
    pid, session = (await made.says("echo $$ $(cut -d' ' -f6 /proc/$$/stat)")).split()
    assert pid == session
    long = "x" * 100_000
    assert await made.says(f"echo {long} | wc -c") == "100001\n"


async def test_terminal(rig: Rig) -> None:
    made = await rig.make()
    ours, theirs = os.openpty()
    command = await made.start(
        ("sh", "-c", "tty; ps -o tty= -p $$"), theirs, theirs, theirs, terminal=True
    )
    os.close(theirs)
    assert await command.wait() == 0
    # The pty is the host's, so it has no name inside; but it is the controlling one.
    assert b"not a tty" in os.read(ours, 1000)
    command = await made.start(("sleep", "60"))
    os.close(ours)
    os.kill(command.pid, signal.SIGKILL)
    assert await command.wait() == -signal.SIGKILL


async def test_pid_is_the_hosts(rig: Rig) -> None:
    outer = await rig.make()
    inner = await rig.make(outer)
    for made in (outer, inner):
        command = await made.start(("sleep", "60"))
        status = Path(f"/proc/{command.pid}/status").read_text()
        assert "Name:\tsleep\n" in status
        assert f"PPid:\t{made.pid}\n" in status


async def test_output_and_execute(rig: Rig) -> None:
    made = await rig.make()
    pid = await rig.spawner.execute(
        made.number, made.init.socket_path, ("sh", "-c", "echo out; echo err >&2"), ENV
    )
    with trio.fail_after(DEADLINE_S):
        while Path(f"/proc/{pid}").exists():
            await trio.sleep(0.005)
    output = rig.tree / ".f" / f"{made.number}.output"
    assert output.read_text() == f"output {made.number}\nout\nerr\n"
    with pytest.raises(FileNotFoundError):
        await rig.spawner.execute(made.number, made.init.socket_path, ("not-there",), ENV)
    with pytest.raises(FileNotFoundError, match="output"):
        await rig.spawner.execute(999, made.init.socket_path, ("true",), ENV)


async def test_commands_survive_who_started_them(rig: Rig) -> None:
    made = await rig.make()
    command = await made.start(("sleep", "60"))
    await rig.spawner.aclose()
    assert Path(f"/proc/{command.pid}").exists()
    assert await made.says("echo lives") == "lives\n"
    with pytest.raises(BrokenPipeError):
        await rig.spawner.hostname(made.pid)


async def test_init_reaps(rig: Rig) -> None:
    made = await rig.make()
    await made.says("for i in $(seq 50); do (sleep 0 &); done")
    with trio.fail_after(DEADLINE_S):
        while (await made.says("ps -eo stat= | grep -c ^Z || true")).strip() != "0":
            await trio.sleep(0.01)


async def test_connections_that_say_nothing(rig: Rig) -> None:
    """They are heard out, and when there are too many of them the others wait."""
    made = await rig.make()
    silent = []
    for _ in range(127):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(made.init.socket_path)
        silent.append(sock)
        await trio.lowlevel.checkpoint()
    silent[0].send(b"nonsense")
    silent[1].send(b"\x07" * 40)
    assert await made.says("echo ok") == "ok\n"
    for sock in silent:
        sock.close()
    assert await made.says("echo ok") == "ok\n"


async def test_only_those_outside_are_heard(rig: Rig, probe: Callable[[str], int]) -> None:
    """A container that got hold of the socket is refused: here of its own, bound inside."""
    made = await rig.make()
    tree_fd = await rig.spawner.tree(0, str(rig.top))
    await rig.spawner.bind(made.pid, "/mnt", tree_fd)
    os.close(tree_fd)
    os.chmod(rig.top, 0o777)
    os.chmod(made.init.socket_path, 0o777)
    program = probe(
        CONNECT.replace('printf("%d ", errno);', 'char c; printf("%ld ", recv(s, &c, 1, 0));')
    )
    status, output = await made.run(
        ("/proc/self/fd/3", f"/mnt/{made.number}.sock", "seqpacket"), program
    )
    assert status == 0
    assert output.split()[0] in ("0", "-1")
    assert await made.says("echo ok") == "ok\n"
    os.close(program)


async def test_nothing_grows(rig: Rig) -> None:
    """200 containers made and killed, 300 commands: as many descriptors as before."""
    made = await rig.make()
    await made.says("true")
    before = fds_of(rig.spawner.pid), fds_of(made.pid)
    mounts = len(mount_points(rig.spawner.pid))

    async def one(n: int) -> None:
        each = await rig.make(first_id=FIRST_ID + (1 + n % 50) * IDS)
        each.kill()

    async def command() -> None:
        assert (await made.run("exit 3"))[0] == 3

    for _ in range(10):
        async with trio.open_nursery() as nursery:
            for n in range(20):
                nursery.start_soon(one, n)
            for _ in range(30):
                nursery.start_soon(command)
    await made.says("true")
    with trio.fail_after(DEADLINE_S):
        while (fds_of(rig.spawner.pid), fds_of(made.pid)) != before:
            await trio.sleep(0.01)
    assert len(mount_points(rig.spawner.pid)) == mounts


# --- acting in others' namespaces ---


async def test_hostname(rig: Rig) -> None:
    made = await rig.make()
    ours = os.uname().nodename
    assert await rig.spawner.hostname(made.pid) == f"c{made.number}"
    await rig.spawner.set_hostname(made.pid, "other")
    assert await made.says("hostname") == "other\n"
    with pytest.raises(OSError, match="hostname") as caught:
        await rig.spawner.set_hostname(made.pid, "h" * 65)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(ProcessLookupError):
        await rig.spawner.hostname(2**22 - 1)
    assert os.uname().nodename == ours


async def test_tree_is_what_the_process_sees(rig: Rig, tmp_path: Path) -> None:
    made = await rig.make()
    await made.says("mkdir -p /tmp/a/b; echo x > /tmp/a/b/file; ln -s /tmp/a /srv/link")
    tree_fd = await rig.spawner.tree(made.pid, "/srv/link/b")
    assert os.listdir(f"/proc/self/fd/{tree_fd}") == ["file"]
    os.close(tree_fd)
    # Links lead nowhere out of what the process sees.
    await made.says("ln -s ../../../../../../../../etc/shadow /srv/out")
    with pytest.raises(FileNotFoundError):
        await rig.spawner.tree(made.pid, "/tmp/../../nsfs-not-there")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/file").write_text("host\n")
    tree_fd = await rig.spawner.tree(os.getpid(), str(tmp_path / "b"))
    assert os.listdir(f"/proc/self/fd/{tree_fd}") == ["file"]
    os.close(tree_fd)
    with pytest.raises(ProcessLookupError):
        await rig.spawner.tree(2**22 - 1, "/")


async def test_pin(rig: Rig) -> None:
    made = await rig.make()
    viewer = await rig.make(first_id=FIRST_ID + IDS)
    path = "/dev/.nsfs/ns/7/net"
    await rig.spawner.pin(made.pid, "net", viewer.pid, path)
    inside = await viewer.says(f"stat -Lc %i {path}")
    assert inside.strip() in os.readlink(f"/proc/{made.pid}/ns/net")
    fd = await rig.spawner.namespace(made.pid, "uts")
    assert os.fstat(fd).st_ino == os.stat(f"/proc/{made.pid}/ns/uts").st_ino
    os.close(fd)
    with pytest.raises(FileNotFoundError):
        await rig.spawner.namespace(made.pid, "nothing")


async def test_bind_into_a_running_container(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x\n")
    tmp_path.chmod(0o777)
    for made in (outer := await rig.make(), await rig.make(outer)):
        mounts = mount_points(made.pid)
        for path in (tmp_path, tmp_path / "file"):
            for read_only in (False, True):
                tree_fd = await rig.spawner.tree(0, str(path))
                target = f"/srv/new/{path.name}"
                await rig.spawner.bind(made.pid, target, tree_fd, read_only)
                os.close(tree_fd)
                await made.says(f"cat {target} || cat {target}/file")
                for remount in ("true", f"mount -o remount,bind,rw {target}"):
                    status, output = await made.run(f"{remount} && echo x >> {target}")
                    if path.is_dir():
                        status, output = await made.run(
                            f"{remount} && touch {target}/{made.number}"
                        )
                        assert (status == 0) == (not read_only), output
                    else:
                        assert status != 0 or not read_only
                assert sorted(mount_points(made.pid)) == sorted((*mounts, target))
                await rig.spawner.unbind(made.pid, target)
                assert mount_points(made.pid) == mounts
        with pytest.raises(OSError, match="path") as caught:
            await rig.spawner.unbind(made.pid, "/usr")
        assert caught.value.errno == errno.EINVAL


async def test_hanging_filesystem_hangs_nobody_else(rig: Rig, tmp_path: Path) -> None:
    """A request whose child is blocked does not keep others from being served."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"nobody", os.fsencode(tmp_path), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    failed = []

    async def hang() -> None:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            await rig.spawner.tree(0, f"{tmp_path}/file")
        failed.append(caught.value.errno)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(hang)
        made = await rig.make()
        for _ in range(20):
            assert await rig.spawner.hostname(made.pid) == f"c{made.number}"
        assert not failed
        # Nobody ever answered; now nobody ever will.
        os.close(device)
    assert len(failed) == 5
    subprocess.run(["umount", "-l", tmp_path], check=True)


async def test_what_only_a_broken_daemon_would_ask(rig: Rig) -> None:
    call: Any = rig.spawner._call
    for op, options in (
        (99, {}),
        (1, {}),
        (4, {}),
        (6, {"strings": ("/x",)}),
        (4, {"strings": ("/",), "pid": -1}),
        (1, {"strings": ("x",), "binds": 65}),
    ):
        with pytest.raises(OSError, match="request"):
            await call(op, **options)
    assert await rig.spawner.features() >= set()


async def test_spawner_needs_its_init(tmp_path: Path) -> None:
    from nsfs.spawner import LIBEXEC

    shutil.copy(LIBEXEC / "nsfs-spawner", tmp_path)
    with pytest.RaisesGroup(pytest.RaisesExc(BrokenPipeError)):
        async with Spawner.running("/", tmp_path):
            pass
