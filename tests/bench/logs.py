"""Benchmarks of kernel logs: how fast one is, what a flood of one container costs others, whose the
lines of the host's log are, what marks cost a packet, and a call of syslog(2).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fuse_requests import counting
from measure import read, run, wait_until

if TYPE_CHECKING:
    from cases import Bench

TOP = Path(__file__).parents[2]

WRITE = """
import os, sys
fd = os.open('/dev/kmsg', os.O_WRONLY)
for i in range(int(sys.argv[1])):
    os.write(fd, b'record %d' % i)
"""
READ = """
import os, sys, time
fd = os.open('/dev/kmsg', os.O_RDONLY)
print('ready', flush=True)
begin = None
for i in range(int(sys.argv[1])):
    os.read(fd, 8192)
    begin = begin or time.monotonic()
print('took', time.monotonic() - begin, flush=True)
"""
FLOOD = """
import os
for _ in range(7):
    if not os.fork():
        break
fd = os.open('/dev/kmsg', os.O_WRONLY)
while True:
    os.write(fd, b'flood')
"""


def _container(bench: Bench) -> Path:
    path = bench.nsfs.path()
    os.mkdir(path)
    (path / "nsfs.log").write_text("bytes 16777216\nrate max\nburst max")
    return path


def _execute(path: Path, code: str, *arguments: str) -> None:
    words = ["python3", "-c", code, *arguments]
    quoted = ("'" + word.replace("'", "'\\''") + "'" for word in words)
    (path / "exec").write_text(" ".join(quoted))


def _took(path: Path, count: int, readers: int = 1) -> float:
    """Have so many records written and read inside; seconds from the first to the last."""
    before = read(path / "output").count("took")
    for _ in range(readers):
        _execute(path, READ, str(count))
    wait_until(lambda: read(path / "output").count("ready") >= before + readers, "readers wait")
    time.sleep(0.2)
    _execute(path, WRITE, str(count))
    wait_until(lambda: read(path / "output").count("took") >= before + readers, "all is read")
    return max(float(x.split()[1]) for x in read(path / "output").splitlines() if x[:4] == "took")


def log(bench: Bench) -> None:
    """Records written and read through one ring, requests for each, and others' share of a flood."""
    instance, report = bench.nsfs, bench.report
    count = 20_000 if bench.runs > 5 else 2_000
    for _ in range(max(3, bench.runs // 6)):
        path = _container(bench)
        report.add("log: one record written and read", _took(path, count) / count)
        run(["rm", "-rf", str(path)])
    report.want(
        "a record written and read (5,000 a second)", "log: one record written and read", 2e-4
    )
    if bench.have("strace"):
        path, few = _container(bench), 500
        with counting(instance.pid("daemon")) as found:
            _took(path, few)
        for name in ("WRITE", "READ"):
            report.add(f"requests: {name} for each record", found[name] / few, "requests")
        report.opcodes["requests: a record written and read"] = dict(sorted(found.items()))
        run(["rm", "-rf", str(path)])
    _flood(bench)


def _latencies(path: Path, seconds: float) -> list[float]:
    found = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        # Its attributes are asked for each time, since it grows.
        os.stat(path / "kmsg")
        found.append(time.perf_counter() - start)
        time.sleep(0.002)
    return found


def _flood(bench: Bench) -> None:
    noisy, other = bench.nsfs.path(), bench.nsfs.path()
    for path in (noisy, other):
        os.mkdir(path)
    seconds = 5.0 if bench.runs > 5 else 1.0
    for name, flooded in (("alone", False), ("beside a flood", True)):
        if flooded:
            _execute(noisy, FLOOD)
            time.sleep(0.5)
        found = _latencies(other, seconds)
        bench.report.add(f"flood: stat(2) {name}, median", statistics.median(found))
        bench.report.add(f"flood: stat(2) {name}, 99 %", statistics.quantiles(found, n=100)[98])
    records = _stat(noisy)
    start = time.monotonic()
    time.sleep(seconds)
    rate = (_stat(noisy) - records) / (time.monotonic() - start)
    bench.report.add("flood: records a second, kept or dropped", rate, "records")
    bench.report.want(
        "stat(2) beside a flood of 8 processes, of one alone",
        "flood: stat(2) beside a flood, median",
        10,
        "flood: stat(2) alone, median",
    )
    run(["rm", "-rf", str(noisy), str(other)])
    bench.nsfs.settle(0)


def _stat(path: Path) -> int:
    values = dict(line.split() for line in read(path / "stat").splitlines())
    return int(values["log.records"]) + int(values["log.dropped"])


def _program(module: str, *arguments: str) -> str:
    """Run one of the programs that measure with an instance of their own; what it printed."""
    words = [sys.executable, "-m", f"tests.bench.{module}", *arguments]
    done = subprocess.run(words, cwd=TOP, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout


def attribution(bench: Bench) -> None:
    """LOG lines of four network namespaces with equal addresses: whose they are taken for."""
    lines = "15000" if bench.runs > 5 else "1000"
    for text in _program("kernlog", lines, "exact", "context").splitlines():
        found = json.loads(text)
        tier = found["tier"]
        bench.report.add(f"attribution: {tier}, lines of containers", found["own"], "lines")
        bench.report.add(f"attribution: {tier}, delivered", found["delivered"], "lines")
        bench.report.add(f"attribution: {tier}, to a wrong container", found["wrong"], "lines")
        missing = 100 - found["percent"]
        bench.report.add(f"attribution: {tier}, not delivered", missing, "per cent")
        bench.report.want(f"{tier}: wrong", f"attribution: {tier}, to a wrong container", 0)
    bench.report.want("exact: not delivered", "attribution: exact, not delivered", 0.1)


def marks(bench: Bench) -> None:
    """What the marks of the exact tier cost a packet."""
    found = json.loads(_program("kernlog_cost", "100000" if bench.runs > 5 else "5000"))["us"]
    for way in ("in", "forward"):
        for tier in ("exact", "own"):
            bench.report.add(f"marks: a packet {way}, {tier}", found[tier][way] / 1e6)
        cost = max(found["exact"][way] - found["own"][way], 0.0) / 1e6
        bench.report.add(f"marks: their cost, {way}", cost)
        bench.report.want(f"marks of a packet, {way}", f"marks: their cost, {way}", 5e-6)


def syslog(bench: Bench) -> None:
    """A call of syslog(2) inside, which the daemon answers, beside one on the host."""
    many = bench.runs > 5
    found = json.loads(_program("syslog_cost", *(("3000", "300") if many else ("500", "10"))))
    for call in ("size", "unread", "read all"):
        for where in ("inside", "host"):
            took = found[where][call]["median_us"] / 1e6
            bench.report.add(f"syslog(2): {call}, {where}", took)
    bench.report.want("a call of syslog(2) inside", "syslog(2): size, inside", 60e-6)
