"""The benchmarks, in the order in which they run.

Each takes a `Bench` and adds to its report; CASES at the bottom names them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import logs
import views
from fuse_requests import counting
from instance import Instance, wait_gone
from measure import Contender, Report, read, run
from others import BWRAP, UNSHARE, BareGroup, Clone3, Runc, Tree, empty_files


@dataclass
class Bench:
    """What the benchmarks have in common."""

    report: Report
    base: Path
    runs: int
    sizes: tuple[int, ...]
    tree_size: int
    instance: Instance | None
    no_spare: Instance | None
    """One that makes no container in advance."""
    clone3: Clone3
    runc: Runc | None
    forktree: str
    group: BareGroup

    @property
    def nsfs(self) -> Instance:
        """The instance; RuntimeError when there is none."""
        if self.instance is None:
            raise RuntimeError("nsfs is not mounted")
        return self.instance

    def have(self, program: str) -> bool:
        """Whether a program is installed; the report says when not."""
        if shutil.which(program):
            return True
        note = f"{program} is not installed"
        if note not in self.report.failed:
            self.report.failed.append(note)
        return False


def timed(function: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@contextlib.contextmanager
def pid_fds(pids: list[int]) -> Iterator[list[int]]:
    """Descriptors of processes, closed afterwards."""
    fds = [os.pidfd_open(pid) for pid in pids]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


# --- make: one ready container, and its end ---


def make(bench: Bench) -> None:
    """mkdir(2) of a ready container, and `rm -rf` of an idle one, beside what others take."""
    contenders: dict[str, Contender] = {
        "clone3": lambda: {
            "make: clone3, child exits": bench.clone3.once("x"),
            "make: clone3, child runs": bench.clone3.once("r"),
        },
        "/bin/true": lambda: {"make: /bin/true alone": run(["true"])},
        "unshare": lambda: {"make: unshare": run(UNSHARE)},
    }
    if bench.have("bwrap"):
        contenders["bwrap"] = lambda: {"make: bwrap": run(BWRAP)}
    if bench.instance:
        contenders["mkdir(2)"] = lambda: _mkdir_and_rm(bench.nsfs)
        contenders["/bin/mkdir"] = lambda: _bin_mkdir(bench.nsfs)
    no_spare = bench.no_spare
    if no_spare:
        contenders["mkdir(2), no spare"] = lambda: {
            "make: mkdir(2), no spare": _mkdir_and_rm(no_spare)["make: mkdir(2)"]
        }
    bench.report.interleave(contenders, bench.runs)
    runc = bench.runc
    if runc:
        # In rounds of its own: runc(8) sleeps for 100 ms before it looks whether a process has
        # ended, and what it leaves to the kernel to do must not be in others' figures.
        slow: dict[str, Contender] = {
            "runc run": lambda: {"make: runc run, to its end": runc.foreground()},
            "runc run -d": lambda: _runc(runc),
        }
        if bench.instance:
            slow["mkdir(2)"] = lambda: _beside_runc(bench.nsfs)
        if no_spare:
            slow["mkdir(2), no spare"] = lambda: {
                "make: mkdir(2), no spare, beside runc": _mkdir_and_rm(no_spare)["make: mkdir(2)"]
            }
        bench.report.interleave(slow, max(3, bench.runs // 3))
    want = bench.report.want
    for which in ("mkdir(2)", "mkdir(2), no spare"):
        beside = f"make: {which}, beside runc"
        want(f"{which}, of bwrap", f"make: {which}", 0.5, "make: bwrap")
        want(f"{which}, of runc run", beside, 0.1, "make: runc run, to its end")
        want(f"{which}, of runc run -d", beside, 0.1, "make: runc run -d")
        want(f"{which}, of a bare clone3", f"make: {which}", 4, "make: clone3, child exits")
    want("rm -rf, of runc delete -f", "end: rm -rf, beside runc", 0.1, "end: runc delete -f")


def _mkdir_and_rm(instance: Instance) -> Mapping[str, float]:
    path = instance.path()
    made_s = timed(lambda: os.mkdir(path))
    with pid_fds([instance.init(path)]) as fds:
        start = time.perf_counter()
        removed_s = run(["rm", "-rf", str(path)])
        gone_s = wait_gone(fds) - start
    instance.settle(0)
    return {
        "make: mkdir(2)": made_s,
        "end: rm -rf": removed_s,
        "end: rm -rf, until the init is gone": gone_s,
    }


def _bin_mkdir(instance: Instance) -> Mapping[str, float]:
    path = instance.path()
    made_s = run(["mkdir", str(path)])
    run(["rm", "-rf", str(path)])
    instance.settle(0)
    return {"make: /bin/mkdir": made_s}


def _runc(runc: Runc) -> Mapping[str, float]:
    name, made_s = runc.start()
    return {"make: runc run -d": made_s, "end: runc delete -f": runc.delete(name)}


def _beside_runc(instance: Instance) -> Mapping[str, float]:
    found = _mkdir_and_rm(instance)
    return {
        "make: mkdir(2), beside runc": found["make: mkdir(2)"],
        "end: rm -rf, beside runc": found["end: rm -rf"],
    }


# --- kill: many processes in one ---


def kill(bench: Bench) -> None:
    """Until the last process is gone: rm -rf of a container full of them, a bare cgroup.kill."""
    many, runs = bench.tree_size, max(3, bench.runs // 2)
    for mode, what in (("still", f"{many} processes"), ("bomb", f"fork bomb of {many}")):
        contenders: dict[str, Contender] = {
            "plain": partial(_kill_bare, bench, "plain", mode, what),
            "bare": partial(_kill_bare, bench, "bare", mode, what),
        }
        if bench.instance:
            contenders["rm -rf"] = partial(_kill_nsfs, bench, mode, what)
        bench.report.interleave(contenders, runs)
        bench.report.want(
            f"rm -rf of {what}, of a bare cgroup.kill",
            f"kill: {what}, rm -rf",
            1.5 if mode == "still" else 2,
            f"kill: {what}, cgroup.kill",
        )


def _kill_bare(bench: Bench, where: str, mode: str, what: str) -> Mapping[str, float]:
    with bench.group.made() as group:
        tree = Tree(bench.forktree, where, [group], bench.tree_size, mode)
        with pid_fds([tree.pid]) as fds:
            start = time.perf_counter()
            bench.group.kill()
            end = max(tree.wait_gone(), wait_gone(fds))
    own = ", PID namespace and all" if where == "bare" else ""
    return {f"kill: {what}, cgroup.kill{own}": end - start}


def _kill_nsfs(bench: Bench, mode: str, what: str) -> Mapping[str, float]:
    instance = bench.nsfs
    path = instance.path()
    os.mkdir(path)
    init = instance.init(path)
    groups = instance.member_groups(path)
    tree = Tree(bench.forktree, str(init), groups, bench.tree_size, mode)
    with pid_fds([init]) as fds:
        start = time.perf_counter()
        answered_s = run(["rm", "-rf", str(path)])
        end = max(tree.wait_gone(), wait_gone(fds))
    instance.settle(0)
    return {f"kill: {what}, rm -rf": end - start, f"kill: {what}, rm -rf answered": answered_s}


# --- many: growth ---


def many(bench: Bench) -> None:
    """Make 1, 100, 1,000 and kill them; at each number, what making, renaming and listing cost."""
    report = bench.report
    first, last = bench.sizes[0], bench.sizes[-1]
    for size in bench.sizes:
        _many_bare(bench, size)
    if bench.instance:
        with empty_files(bench.base / "empty", last) as example:
            for size in bench.sizes:
                _many(bench, size, example if size == last else None)
    report.want(
        f"mkdir(2) at {last}, of that at {first}",
        f"many: mkdir(2) at {last}",
        2.5,
        f"many: mkdir(2) at {first}",
    )
    report.want(
        f"next mkdir(2) at {last}, of that at {first}",
        f"many: next mkdir(2) at {last}",
        2.5,
        f"many: next mkdir(2) at {first}",
    )
    for size in bench.sizes:
        report.want(f"mv at {size}", f"many: rename(2) at {size}", 0.002)
    for text in ("ls", "ls -l"):
        report.want(
            f"{text} of {last}, of empty files'",
            f"list: {text} of {last}",
            3,
            f"list: {text} of {last} empty files",
        )
    report.want(f"grep . */stat of {last}", f"list: grep . of {last} stat", 1)
    report.want(f"daemon at {last}, PSS", f"memory: daemon, PSS at {last}", 80e6)
    report.want("an init, PSS", "memory: an init, PSS", 60e3)
    report.want(f"supervisor at {last}, RSS", f"memory: supervisor, RSS at {last}", 2e6)


def _many_bare(bench: Bench, size: int) -> None:
    """The limit: as many bare clone3, of which nothing is asked but to be there."""
    report, clone3 = bench.report, bench.clone3
    made_s = timed(lambda: [clone3.once("h") for _ in range(size)])
    report.add(f"many: {size} bare clone3, all of them", made_s)
    for _ in range(bench.runs):
        report.add(f"many: clone3 at {size}", clone3.once("x"))
    report.add(f"many: {size} bare clone3 killed and waited for", clone3.once("k"))
    # The kernel takes network namespaces down in the background.
    time.sleep(0.2 + size / 500)


def _many(bench: Bench, size: int, example: Path | None) -> None:
    instance, report = bench.nsfs, bench.report
    before = _memory(instance)
    containers = [instance.path() for _ in range(size)]
    start = time.perf_counter()
    for path in containers:
        os.mkdir(path)
    made_s = time.perf_counter() - start
    report.add(f"many: {size} mkdir(2) in a row, all of them", made_s)
    report.add(f"many: {size} mkdir(2) in a row, each", made_s / size)
    _at(bench, size, containers)
    if example:
        _list(bench, size, example)
        _weigh(bench, containers, before)
    start = time.perf_counter()
    run(["rm", "-rf", *map(str, containers)])
    report.add(f"many: {size} removed by one rm -rf", time.perf_counter() - start)
    instance.settle(0)
    report.add(f"many: {size} removed, until all is gone", time.perf_counter() - start)
    time.sleep(0.2 + size / 500)


def _at(bench: Bench, size: int, containers: list[Path]) -> None:
    instance = bench.nsfs

    def one_more() -> Mapping[str, float]:
        path = instance.path()
        next_path = instance.path()
        made_s = timed(lambda: os.mkdir(path))
        # There has been no time to make one in advance.
        next_s = timed(lambda: os.mkdir(next_path))
        removed_s = run(["rm", "-rf", str(path)])
        run(["rm", "-rf", str(next_path)])
        instance.settle(size)
        return {
            f"many: mkdir(2) at {size}": made_s,
            f"many: next mkdir(2) at {size}": next_s,
            f"many: rm -rf at {size}": removed_s,
        }

    def renamed() -> Mapping[str, float]:
        new = instance.path()
        took_s = timed(lambda: os.rename(containers[-1], new))
        containers[-1] = new
        return {f"many: rename(2) at {size}": took_s}

    def moved() -> Mapping[str, float]:
        new = instance.path()
        took_s = run(["mv", str(containers[-1]), str(new)])
        containers[-1] = new
        return {f"many: mv(1) at {size}": took_s}

    bench.report.interleave(
        {
            "one more": one_more,
            "rename(2)": renamed,
            "mv(1)": moved,
        },
        bench.runs,
    )


def _list(bench: Bench, size: int, example: Path) -> None:
    for words in (["ls"], ["ls", "-l"]):
        text = " ".join(words)

        def ours(words: list[str] = words, text: str = text) -> Mapping[str, float]:
            return {f"list: {text} of {size}": run([*words, str(bench.nsfs.tree)])}

        def theirs(words: list[str] = words, text: str = text) -> Mapping[str, float]:
            return {f"list: {text} of {size} empty files": run([*words, str(example)])}

        bench.report.interleave({"ls": ours, "ls of empty files": theirs}, bench.runs)
    # Not into /dev/null, where GNU grep is content with one line.
    grep = ["sh", "-c", "cd $0 && grep . */stat | tail -n 1", str(bench.nsfs.tree)]
    bench.report.interleave(
        {"grep": lambda: {f"list: grep . of {size} stat": run(grep)}}, bench.runs
    )


# --- memory ---

CACHE_S = 1.1
"""Longer than the kernel believes names and attributes of the tree."""
SYSTEM = ("Slab", "PageTables", "KernelStack", "Percpu")
"""Of /proc/meminfo, see proc_meminfo(5)."""


def _pss(pid: int) -> dict[str, float]:
    found = {}
    for line in read(f"/proc/{pid}/smaps_rollup").splitlines():
        key, _, value = line.partition(":")
        if key in ("Rss", "Pss"):
            found[key] = int(value.split()[0]) * 1024.0
    return found


def _memory(instance: Instance) -> dict[str, float]:
    """Bytes of the instance's own processes and of the kernel's structures."""
    found = {}
    pids = {name: instance.pid(name) for name in ("supervisor", "daemon")}
    if spawner := instance.spawner():
        pids["spawner"] = spawner
    for name, pid in pids.items():
        for kind, size in _pss(pid).items():
            found[f"memory: {name}, {kind.upper()}"] = size
    for line in read("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key in SYSTEM:
            found[key] = int(value.split()[0]) * 1024.0
    return found


def _weigh(bench: Bench, containers: list[Path], before: Mapping[str, float]) -> None:
    report, count = bench.report, len(containers)
    held = _memory(bench.nsfs)
    for name, value in before.items():
        if name.startswith("memory: "):
            report.add(f"{name} at 0", value, "B")
            report.add(f"{name} at {count}", held[name], "B")
    # An estimate: everything else on the machine is in these figures, too.
    grown = {name: (held[name] - before[name]) / count for name in SYSTEM}
    for name, value in grown.items():
        report.add(f"memory: {name} for each container, about", value, "B")
    report.add("memory: kernel for each container, about", sum(grown.values()), "B")
    for path in containers[: min(count, 100)]:
        report.add("memory: an init, PSS", _pss(bench.nsfs.init(path))["Pss"], "B")


# --- requests ---


def requests(bench: Bench) -> None:
    """FUSE requests, counted."""
    instance = bench.nsfs
    if not bench.have("strace"):
        return

    def make_one() -> Path:
        path = instance.path()
        os.mkdir(path)
        time.sleep(CACHE_S)
        return path

    def count(name: str, function: Callable[[], object]) -> None:
        with counting(instance.pid("daemon")) as found:
            function()
        series = f"requests: {name}"
        bench.report.add(series, found.waited_for, "requests")
        bench.report.opcodes[series] = dict(sorted(found.items()))

    for words in (["rm", "-rf"], ["busybox", "rm", "-rf"], ["find", "PATH", "-delete"]):
        if bench.have(words[0]):
            path = make_one()
            command = [str(path) if word == "PATH" else word for word in words]
            if "PATH" not in words:
                command.append(str(path))
            count(f"{' '.join(words[:2])} of one", partial(run, command))
            instance.settle(0)
    path = make_one()
    count("shutil.rmtree of one", lambda: shutil.rmtree(path))
    instance.settle(0)
    path = instance.path()
    count("mkdir(2)", lambda: os.mkdir(path))
    time.sleep(CACHE_S)
    count("ls -l of one", lambda: run(["ls", "-l", str(path)]))
    time.sleep(CACHE_S)
    count("cat state", lambda: run(["cat", f"{path}/state"]))
    time.sleep(CACHE_S)
    new = instance.path()
    count("rename(2)", lambda: os.rename(path, new))
    run(["rm", "-rf", str(new)])
    instance.settle(0)
    # Listing many: what the number does to it.
    size = min(100, bench.sizes[-1])
    paths = [instance.path() for _ in range(size)]
    for path in paths:
        os.mkdir(path)
    time.sleep(CACHE_S)
    count(f"ls of {size}", lambda: run(["ls", str(instance.tree)]))
    time.sleep(CACHE_S)
    count(f"ls -l of {size}", lambda: run(["ls", "-l", str(instance.tree)]))
    run(["rm", "-rf", *map(str, paths)])
    instance.settle(0)


def tagged_views(bench: Bench) -> None:
    """An attribute through a view, the first look at one, many, and what open ones weigh."""
    views.measure(bench.nsfs, bench.report, bench.runs, bench.sizes[-1])


CASES: dict[str, Callable[[Bench], None]] = {
    "make": make,
    "kill": kill,
    "many": many,
    "requests": requests,
    "views": tagged_views,
    "log": logs.log,
    "attribution": logs.attribution,
    "marks": logs.marks,
    "syslog": logs.syslog,
}
