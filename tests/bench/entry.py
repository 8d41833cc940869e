"""How long it takes to enter a container and run /bin/true there, beside nsenter(1) and runc(8).

    unshare -m --propagation private python -m tests.bench.entry [COUNT]

And for how long a process that is moved in place is stopped.  Prints JSON: for each way the median
and the 10th and 90th percentile, in milliseconds.

On an idle machine with two processors at which `nsenter -a` takes 0.58 ms and nsfs-enter 0.48, `ln`
takes 0.95.  That is 0.21 of ln's own beginning and end, 0.20 of the command's, and, in between,

* 0.13: two lookups, which the kernel makes whatever it has cached, since link(2) asks for a new
  name (LOOKUP_EXCL);
* 0.16: the daemon's part of link(2): who it is, and what it takes to enter;
* 0.05: until it is interrupted, answered and stopped;
* 0.06: two injected calls, which give it the program and the channel, and the third, execveat(2);
* 0.08: exec of the program and its start;
* 0.06: fork by the init, and pipes.

What the daemon does is Python that wakes up four times: by it alone `ln` is slower than nsenter(1).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from nsfs import entry
from nsfs.spawner import CLONE_NEW, LIBEXEC
from tests.integration.conftest import serving


def measure(words: list[str], count: int, env: dict[str, str]) -> dict[str, float]:
    """Run a command again and again."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        subprocess.run(words, check=True, stdin=subprocess.DEVNULL, env=env)
        found.append((time.perf_counter() - start) * 1e3)
    return summary(found)


def libraries(program: str) -> list[str]:
    """The shared libraries of a program."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return [w for line in done.stdout.splitlines() for w in line.split() if w.startswith("/")]


def runc(directory: Path) -> tuple[list[str], Callable[[], object]] | None:
    """A container of runc's that sleeps; how to enter it, and how to end it."""
    if not shutil.which("runc"):
        return None
    root = directory / "bundle"
    (root / "rootfs/bin").mkdir(parents=True)
    # Of its own: a bind of the host's would be in the way of removing the directory.
    for name in ("busybox", "true", "sleep"):
        shutil.copy(shutil.which("busybox") or "busybox", root / "rootfs/bin" / name)
    for library in libraries(shutil.which("busybox") or "busybox"):
        target = root / "rootfs" / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    subprocess.run(["runc", "spec"], cwd=root, check=True)
    spec = json.loads((root / "config.json").read_text())
    spec["process"].update(args=["sleep", "1000"], terminal=False)
    # Its groups cannot be mounted on a hybrid host; they have no part in this.
    spec["mounts"] = [each for each in spec["mounts"] if each["type"] != "cgroup"]
    spec["linux"].pop("resources", None)
    (root / "config.json").write_text(json.dumps(spec))
    name = f"nsfs-bench-{os.getpid()}"
    begun = subprocess.run(
        ["runc", "run", "-d", name], cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    if begun.returncode:
        return None
    end = ["runc", "delete", "-f", name]
    return ["runc", "exec", name, "/bin/true"], lambda: subprocess.run(end, check=True)


async def stopped(init: int, count: int) -> list[float]:
    """For how long a process moved into two namespaces is stopped, in milliseconds."""
    found = []
    types = CLONE_NEW["net"] | CLONE_NEW["uts"]

    class World:
        """Somebody to have a tracer."""

    world: Any = World()
    for _ in range(count):
        with subprocess.Popen(["sleep", "1000"]) as process:  # noqa: ASYNC220
            request = entry._TRACE_REQUEST.pack(2, process.pid, os.getpid(), init, types, 0)
            found.append(await entry.Tracer.ask(world, request, ()) / 1e3)
            process.kill()
    entry.Tracer.of(world).close()
    return found


def summary(found: list[float]) -> dict[str, float]:
    """Median and percentiles of times in milliseconds."""
    cuts = statistics.quantiles(found, n=10)
    return {
        "median_ms": round(statistics.median(found), 3),
        "p10_ms": round(cuts[0], 3),
        "p90_ms": round(cuts[-1], 3),
    }


def main() -> None:
    """Measure all."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    env = {**os.environ, "SHELL": "/bin/true"}
    result = {}
    with tempfile.TemporaryDirectory() as base, serving(Path(base)) as instance:
        web = instance.tree / "web"
        web.mkdir()
        init = (web / "init").read_text().strip()
        ways = {
            "true": ["/bin/true"],
            "nsenter -a": ["nsenter", "-a", "-t", init, "/bin/true"],
            "nsfs-enter": [str(LIBEXEC / "nsfs-enter"), str(web), "--", "/bin/true"],
            "ln": ["/usr/bin/ln", str(instance.tree / "procs/self"), f"{web}/procs/"],
        }
        # In turns, so that what else the machine does meets all of them.
        for _ in range(2):
            for name, words in ways.items():
                result[name] = measure(words, count, env)
        result["in place, stopped"] = summary(trio.run(stopped, int(init), max(count // 4, 10)))
        other = runc(Path(base))
        if other:
            try:
                result["runc exec"] = measure(other[0], max(count // 10, 10), env)
            finally:
                other[1]()
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
