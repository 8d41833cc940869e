"""Series of values, the ratios wanted of them, and the bounded waits that they are measured with.

Every duration is in seconds here and in the JSON; only the table is in units for readers.
"""

from __future__ import annotations

import os
import platform
import select
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAIT_S = 60.0
"""No single wait is longer."""
REST_S = 0.02
"""Between two measurements: the kernel takes down namespaces and mounts in the background, which is
not to be in the figures of whoever comes next."""

Contender = Callable[[], Mapping[str, float]]
"""Does its thing once and tells series' names and values."""


class Late(Exception):
    """Something took longer than a benchmark may."""


@dataclass
class Series:
    """Values of one thing, in the order of measuring."""

    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    def summary(self) -> dict[str, Any]:
        """As it goes into the JSON."""
        quartiles = (
            statistics.quantiles(self.values, n=4, method="inclusive")
            if len(self.values) > 1
            else self.values * 3
        )
        return {
            "unit": self.unit,
            "n": len(self.values),
            "median": self.median,
            "min": min(self.values),
            "q1": quartiles[0],
            "q3": quartiles[2],
        }


@dataclass
class Goal:
    """A figure that is wanted: at most so much of one series' median, or so many times
    another's."""

    text: str
    series: str
    limit: float
    over: str | None = None

    def reached(self, series: Mapping[str, Series]) -> float | None:
        """The figure; None when it was not measured in this run."""
        one = series.get(self.series)
        other = series.get(self.over) if self.over else None
        if one is None or (self.over and (other is None or not other.median)):
            return None
        return one.median / other.median if other else one.median


class Report:
    """What one run has found."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.goals: list[Goal] = []
        self.failed: list[str] = []
        self.opcodes: dict[str, dict[str, int]] = {}
        """FUSE requests by opcode, by the series that has their sum."""

    def add(self, name: str, value: float, unit: str = "s") -> None:
        """One more value of a series."""
        self.series.setdefault(name, Series(unit)).values.append(value)

    def want(self, text: str, series: str, limit: float, over: str | None = None) -> None:
        """A figure that is wanted, whether or not this run gets to it."""
        self.goals.append(Goal(text, series, limit, over))

    def interleave(self, contenders: Mapping[str, Contender], runs: int) -> None:
        """Run them in turn, so that what else the machine does meets all of them alike.

        The first round warms caches and is not counted.  One that fails is left out from then on.
        """
        left = dict(contenders)
        for run in range(runs + 1):
            for name, once in list(left.items()):
                try:
                    found = once()
                except (OSError, Late, RuntimeError) as error:
                    self.failed.append(f"{name}: {error}")
                    del left[name]
                    continue
                time.sleep(REST_S)
                if run:
                    for series, value in found.items():
                        self.add(series, value)

    def record(self, **facts: Any) -> dict[str, Any]:
        """As JSON."""
        goals = []
        for goal in self.goals:
            reached = goal.reached(self.series)
            goals.append(
                {
                    "what": goal.text,
                    "series": goal.series,
                    "over": goal.over,
                    "wanted": goal.limit,
                    "reached": reached,
                    "met": None if reached is None else reached <= goal.limit,
                }
            )
        return {
            **facts,
            "series": {name: each.summary() for name, each in self.series.items()},
            "goals": goals,
            "opcodes": self.opcodes,
            "failed": self.failed,
        }


def machine() -> dict[str, Any]:
    """Where it ran."""
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return {
        "machine": platform.machine(),
        "processor": model,
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }


# --- doing and waiting ---

QUIET = [
    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
]


def run(words: Sequence[str]) -> float:
    """Run a command to its end; how long it took.

    posix_spawn(3) is a vfork: this process's size is not in the time.  Raises RuntimeError when the
    command fails, Late when it does not end.
    """
    start = time.perf_counter()
    pid = os.posix_spawnp(words[0], list(words), os.environ, file_actions=QUIET)
    fd = os.pidfd_open(pid)
    try:
        if not wait_readable(fd):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Late(" ".join(words[:4]))
    finally:
        os.close(fd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    took_s = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(words)[:200]}: exit {status}")
    return took_s


def wait_readable(fd: int, wait_s: float = WAIT_S) -> bool:
    """Whether it becomes readable (a pidfd: the process ends) in time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))


def wait_until(condition: Callable[[], Any], what: str, pause_s: float = 0.002) -> None:
    """Look until it holds; raises Late."""
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise Late(f"waited {WAIT_S:g} s in vain: {what}")
        time.sleep(pause_s)


@contextmanager
def deadline(seconds: int, what: str) -> Iterator[None]:
    """Interrupt whatever is done in it, a system call too, when it takes too long."""

    def expired(number: int, frame: object) -> None:
        raise Late(f"{what} took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(path: str | Path) -> str:
    """A file's text."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
