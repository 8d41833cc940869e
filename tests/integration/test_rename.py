"""`mv` is O(1): what it takes is counted, with little and with much around it and in it."""

from __future__ import annotations

import collections
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Container, Instance, wait_until

MANY = 60
TRIES = 5
"""A name that was looked up longer than a second ago the kernel looks up again, and once in a while
the daemon does something of its own: so the least is taken."""
WAITING = (
    "epoll_wait",
    "epoll_ctl",
    "futex",
    "restart_syscall",
    "clock_nanosleep",
    "clock_gettime",
)
"""To ask for the time is no system call where the vDSO knows it (vdso(7))."""
CALL = re.compile(r"^\d+ +(\w+)\(")


def system_calls(pids: list[int], old: Path, new: Path, log: Path) -> collections.Counter[str]:
    """What processes do while a container gets another name, waiting aside."""
    words = ["strace", "-f", "-o", str(log), *(f"-p{pid}" for pid in pids)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as tracer:
        traced = [Path(f"/proc/{pid}/status") for pid in pids]
        wait_until(
            lambda: not any("TracerPid:\t0\n" in each.read_text() for each in traced),
            "they are traced",
        )
        os.stat(old)
        before = log.stat().st_size
        os.rename(old, new)
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=30)
    with open(log, errors="replace") as file:
        file.seek(before)
        calls = [found[1] for line in file if (found := CALL.match(line))]
    return collections.Counter(name for name in calls if name not in WAITING)


def least(instance: Instance, inits: list[int], tree: Path, log: Path) -> dict[str, int]:
    """What renaming web takes of daemon, spawner and inits."""
    daemon = instance.daemon()
    children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    pids = [daemon, *map(int, children), *inits]
    found = []
    for _ in range(TRIES):
        for old, new in (("web", "shop"), ("shop", "web")):
            found.append(system_calls(pids, tree / old, tree / new, log))
    return dict(min(found, key=lambda calls: (sum(calls.values()), sorted(calls))))


@pytest.fixture
def crowd(instance: Instance, tree: Path) -> Iterator[None]:
    """Many containers beside, all removed at once."""
    for number in range(MANY):
        os.mkdir(tree / f"n{number}")
    yield
    subprocess.run(f"rm -rf {tree}/n*", shell=True, check=True, timeout=120)


def test_it_takes_the_same_whatever_there_is(
    instance: Instance, tree: Path, web: Container, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    log = tmp_path / "strace"
    alone = least(instance, [web.init], tree, log)
    # Two requests (the name is looked up, then given), and the record is written anew; no group,
    # no mount, and nothing of the spawner's or the inits'.
    assert alone == {"read": 2, "writev": 2, "openat": 1, "write": 1, "close": 1, "rename": 1}

    request.getfixturevalue("crowd")
    web.start("sh", "-c", f"for i in $(seq {MANY}); do sleep 1000 & done; wait")
    for number in range(MANY // 10):
        os.mkdir(web / f"db{number}")
    wait_until(lambda: int(web.state()["procs"]) > MANY, "its members run")
    names = ("kmsg", "state", "output", "stat")
    fds = [os.open(web / name, os.O_RDONLY) for name in names for _ in range(MANY // 4)]
    inside = f"/proc/{web.init}/root/sys/namespaces"
    fds += [os.open(f"{inside}/{name}", os.O_RDONLY) for name in ("kmsg", "db0/state", "procs")]
    try:
        before = os.listdir(inside)
        assert least(instance, [web.init], tree, log) == alone
        assert os.listdir(inside) == before
        assert web.run("hostname") == "web\n"
        for fd in fds[:-1]:
            os.pread(fd, 4096, 0)
    finally:
        for fd in fds:
            os.close(fd)
