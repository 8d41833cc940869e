"""Entries, one after the other: they leave no descriptor, process, group or memory behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nsfs.spawner import LIBEXEC

from .conftest import SLOWNESS, Container, Instance, wait_until

ENTER = str(LIBEXEC / "nsfs-enter")
ROUNDS = 4
GROWTH_KB = 256
"""What a process may grow by in one of the rounds: in the first ones the heap gets its size, which
is that of as many as are under way at a time.  A quarter of a kilobyte for each would be seen."""


def by_program(tree: Path, web: Container) -> None:
    subprocess.run([ENTER, str(web.path), "--", "/bin/true"], check=True)


def by_ln(tree: Path, web: Container, name: str = "") -> None:
    words = ["ln", str(tree / "procs/self"), f"{web.path}/procs/{name}"]
    env = {**os.environ, "SHELL": "/bin/true"}
    subprocess.run(words, stdin=subprocess.DEVNULL, env=env, check=True)


def in_part(tree: Path, web: Container) -> None:
    by_ln(tree, web, "self:net")


def in_place(tree: Path, web: Container) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        own = tree / f"procs/{process.pid}"
        try:
            subprocess.run(["ln", own, web / f"procs/{process.pid}:net,uts"], check=True)
        finally:
            process.kill()


def refused(tree: Path, web: Container) -> None:
    """What fails is to leave nothing, either."""
    for name in ("self:user", f"{os.getpid()}:net,pid"):
        source = tree / "procs" / name.partition(":")[0]
        done = subprocess.run(["ln", source, web / f"procs/{name}"], stderr=subprocess.DEVNULL)
        assert done.returncode == 1
    done = subprocess.run([ENTER, str(web.path), "--", "/no/such"], stderr=subprocess.DEVNULL)
    assert done.returncode == 127


def descendants(pid: int) -> list[int]:
    """A process and all that it has started."""
    children: dict[int, list[int]] = {}
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if each.name.isdigit():
                parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(each.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def status(pid: int, key: str) -> str:
    """A field of /proc/PID/status; empty when it has ended."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        return text.partition(f"{key}:")[2].partition("\n")[0].strip()
    return ""


def strays() -> list[str]:
    """Programs of sessions in our mount namespace."""
    ours = os.readlink("/proc/self/ns/mnt")
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            comm = (each / "comm").read_text().strip() if each.name.isdigit() else ""
            session = comm in ("nsfs-enter", "nsfs-terminal", "nsfs-relay")
            if session and os.readlink(each / "ns/mnt") == ours:
                found.append(f"{each.name} {comm}")
    return found


class Counted:
    """What there is now."""

    def __init__(self, instance: Instance, web: Container) -> None:
        supervisor = instance.status()["supervisor"]
        # The program that waits for the tracer's next request is a new one each time.
        servers = [pid for pid in descendants(supervisor) if status(pid, "Name")]
        self.processes = len(servers)
        lasting = [instance.daemon(), web.init]
        lasting += [
            pid
            for pid in servers
            if status(pid, "Name") in ("nsfs-tracer", "nsfs-spawner")
            and status(pid, "PPid") == str(instance.daemon())
        ]
        self.descriptors = {pid: sorted(os.listdir(f"/proc/{pid}/fd"), key=int) for pid in lasting}
        self.memory_kb = {pid: int(status(pid, "VmRSS").split()[0]) for pid in lasting}

    def is_no_more_than(self, before: Counted) -> bool:
        return self.processes <= before.processes and all(
            len(fds) <= len(before.descriptors[pid]) for pid, fds in self.descriptors.items()
        )

    def __repr__(self) -> str:
        return f"{self.processes} {self.descriptors} {self.memory_kb}"


@pytest.mark.parametrize(
    ("way", "count"),
    [
        (by_program, 1000),
        (by_ln, 1000),
        *((way, 250) for way in (in_part, in_place, refused)),
        *(pytest.param(way, 1000, marks=pytest.mark.slow) for way in (in_part, in_place, refused)),
    ],
)
def test_entries_leave_nothing(
    instance: Instance,
    tree: Path,
    web: Container,
    way: Callable[[Path, Container], None],
    count: int,
) -> None:
    payload = groups_of(instance)
    count //= SLOWNESS

    def settled() -> bool:
        return (
            not strays()
            and not [name for name in os.listdir(payload) if name.startswith("nsfs.")]
            and web.state()["procs"] == "0"
        )

    for _ in range(count // 10):
        way(tree, web)
    wait_until(settled, "nothing is left of the first")
    before = Counted(instance, web)
    grown = 0
    for _ in range(ROUNDS):
        at_first = Counted(instance, web).memory_kb
        for _ in range(count):
            way(tree, web)
        wait_until(settled, f"nothing is left: {strays()} {os.listdir(payload)}")
        wait_until(
            lambda: Counted(instance, web).is_no_more_than(before),
            f"{before!r} {Counted(instance, web)!r}",
        )
        after = Counted(instance, web).memory_kb
        grown = max(after[pid] - at_first[pid] for pid in after)
        if grown <= GROWTH_KB:
            return
    pytest.fail(f"{count} entries take {grown} kB, however many there were before")


def groups_of(instance: Instance) -> Path:
    """The members' group of the one container that there is."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, directory, kind, _ = line.split(" ", 3)
        if kind == "cgroup2":
            found = list(Path(directory, instance.group).glob("*/payload"))
            # Not that of one made in advance.
            found = [path for path in found if path.parent.name in instance.groups()]
            if found:
                return found[0]
    raise AssertionError("no group")
