"""How long it takes to enter a container and run /bin/true there, beside nsenter(1) and runc(8).

    unshare -m --propagation private python -m tests.bench.entry [COUNT]

And for how long a process that is moved in place is stopped.  Prints JSON: for each way the median
and the 10th and 90th percentile, in milliseconds, and the 10th in parts of that of `nsenter -a`.
The ways take turns, so what else the machine does meets all of them.

On two processors that others use as well `ln` takes 1.4 to 1.65 times as long as `nsenter -a`; in
the same runs it took 1.7 to 2.0 times before the shell was begun while the ln becomes the session.
Of 1.1 ms, with tracing on, where `nsenter -a` takes 0.75,

* 0.35 are ln's own: fork, exec and its libraries, until its first request (`ln of a file` measures
  that), and 0.05 the end of the session after the command's;
* 0.2 are two lookups.  GNU ln first tries `procs` itself as the new name, and of a new name the
  kernel asks whatever it has cached (LOOKUP_EXCL); each wakes up Python, whose code by then is no
  longer in the processor's caches;
* 0.1 is the daemon's part of link(2): who it is, what is allowed;
* 0.1 is the tracer's, until the init has been asked for the shell;
* 0.3 are fork by the init, pipes, and the command (0.15 to 0.2 of them).  At the same time, if there
  is a processor for it, the ln is answered, stopped three times and executes nsfs-enter, in 0.2.

So the floor is at about 0.75 times what it takes now: all but the 0.3 of Python is ln's, the
kernel's and the command's, and `nsenter -a` makes no request of anybody.
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


def measure(
    ways: dict[str, list[str]], count: int, env: dict[str, str], new: Path
) -> dict[str, dict[str, float]]:
    """Run some commands in turns, again and again; `new` is what one of them makes."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(count):
        for name, words in ways.items():
            new.unlink(missing_ok=True)
            start = time.perf_counter()
            subprocess.run(words, check=True, stdin=subprocess.DEVNULL, env=env)
            found[name].append((time.perf_counter() - start) * 1e3)
    return {name: summary(times) for name, times in found.items()}


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
    with tempfile.TemporaryDirectory() as base, serving(Path(base)) as instance:
        web = instance.tree / "web"
        web.mkdir()
        init = (web / "init").read_text().strip()
        old, new = Path(base, "old"), Path(base, "new")
        old.touch()
        ways = {
            "true": ["/bin/true"],
            "ln of a file": ["/usr/bin/ln", str(old), str(new)],
            "nsenter -a": ["nsenter", "-a", "-t", init, "/bin/true"],
            "nsfs-enter": [str(LIBEXEC / "nsfs-enter"), str(web), "--", "/bin/true"],
            "ln": ["/usr/bin/ln", str(instance.tree / "procs/self"), f"{web}/procs/"],
        }
        measure(ways, 10, env, new)
        result = measure(ways, count, env, new)
        result["in place, stopped"] = summary(trio.run(stopped, int(init), max(count // 4, 10)))
        other = runc(Path(base))
        if other:
            try:
                runs = {"runc exec": other[0]}
                result |= measure(runs, max(count // 10, 10), env, new)
            finally:
                other[1]()
    for each in result.values():
        each["of_nsenter"] = round(each["p10_ms"] / result["nsenter -a"]["p10_ms"], 2)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
