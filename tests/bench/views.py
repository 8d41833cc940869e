"""Tagged views: an attribute through one beside other files, the first look, many, and what open
ones weigh."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from instance import Instance
from measure import Report, read, run

AT_ONCE = 200
"""How often a file is read for one value: a single time is mostly noise."""
ATTRIBUTES = ("mtu", "statistics/rx_bytes")
LIKE_A_CONTROL_FILE = (
    *(f"net/lo/{name}" for name in ATTRIBUTES),
    *("net/sysctl/ipv4/ip_forward", "ipc/sysctl/kernel/shmmax"),
    *("uts/hostname", "cgroup/memory.current", "user/owner"),
)
OTHERS = ("net/lo/inet", "net/lo/threaded", "net/routes", "ipc/shm", "mnt/mounts", "pid/last")
"""What takes a thread, or the spawner: a lock in the kernel, a namespace to join, a long text."""


def measure(instance: Instance, report: Report, runs: int, size: int) -> None:
    """All of it, with `size` containers at the end."""
    web = instance.path()
    os.mkdir(web)
    names = {
        "a control file": web / "idmap",
        "freeze, which asks the kernel": web / "freeze",
        **{name: web / name for name in (*LIKE_A_CONTROL_FILE, *OTHERS)},
        **{f"/sys/class/net/lo/{name}": Path("/sys/class/net/lo", name) for name in ATTRIBUTES},
    }
    report.interleave(
        {
            name: lambda name=name, path=path: {  # type: ignore[misc]
                f"views: open, read, close of {name}": _each(path)
            }
            for name, path in names.items()
        },
        runs,
    )
    for name in LIKE_A_CONTROL_FILE:
        report.want(
            f"{name}, of a control file's",
            f"views: open, read, close of {name}",
            1.5,
            "views: open, read, close of a control file",
        )
    run(["rm", "-rf", str(web)])
    report.interleave({"first": lambda: _first(instance)}, runs)
    report.want("the first look, above the next", "views: first look, above the next", 0.001)
    _many(instance, report, size)


def _each(path: Path) -> float:
    start = time.perf_counter()
    for _ in range(AT_ONCE):
        fd = os.open(path, os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)
    return (time.perf_counter() - start) / AT_ONCE


def _look(path: Path) -> float:
    start = time.perf_counter()
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 4096)
    os.close(fd)
    return time.perf_counter() - start


def _first(instance: Instance) -> Mapping[str, float]:
    path = instance.path()
    os.mkdir(path)
    # What names cost is not the view's.
    os.stat(path / "net")
    first_s, next_s = _look(path / "net/lo/mtu"), _look(path / "net/lo/mtu")
    run(["rm", "-rf", str(path)])
    instance.settle(0)
    return {"views: first look": first_s, "views: first look, above the next": first_s - next_s}


def _many(instance: Instance, report: Report, size: int) -> None:
    paths = [instance.path() for _ in range(size)]
    for path in paths:
        os.mkdir(path)
    time.sleep(1)
    before, kernel = _pss(instance), _slab()
    command = f"cd {instance.tree} && grep . b*/net/*/statistics/rx_bytes"
    for name in ("first", "again"):
        start = time.perf_counter()
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True
        )
        report.add(f"views: grep of {size} net/*/statistics/rx_bytes, {name}", _since(start))
        if len(done.stdout.splitlines()) != size:
            report.failed.append(f"grep found {len(done.stdout.splitlines())} of {size}")
    report.add("views: daemon, PSS for each open view", (_pss(instance) - before) / size, "B")
    # An estimate: everything else on the machine is in it, too.
    report.add("views: slab for each open view, about", (_slab() - kernel) / size, "B")
    run(["rm", "-rf", *map(str, paths)])
    instance.settle(0)


def _since(start: float) -> float:
    return time.perf_counter() - start


def _pss(instance: Instance) -> float:
    rollup = read(f"/proc/{instance.pid('daemon')}/smaps_rollup")
    return next(int(x.split()[1]) * 1024.0 for x in rollup.splitlines() if x.startswith("Pss:"))


def _slab() -> float:
    return next(
        int(x.split()[1]) * 1024.0
        for x in read("/proc/meminfo").splitlines()
        if x.startswith("Slab:")
    )
