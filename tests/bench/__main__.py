"""Benchmarks of nsfs beside other ways to make and kill containers; `scripts/bench` runs them.

All that a ratio is made of is measured in turn in one run, on one machine.  A time never fails the
run: it fails when something cannot be measured, or when something is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import CASES, Bench
from instance import Instance
from measure import Late, Report, Series, deadline, machine, wait_until
from others import BareGroup, Clone3, Runc, compile_program

from nsfs.cgroup import Hierarchies

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CASE_S = 600
"""No case takes longer."""
SIZES, TREE_SIZE, RUNS = (1, 100, 1000), 1000, 30
QUICK_SIZES, QUICK_TREE_SIZE, QUICK_RUNS = (1, 10, 100), 100, 5


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--runs", type=int, metavar="N", help=f"of each series; default: {RUNS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--quick", action="store_true", help="fewer runs, smaller numbers")
    args = parser.parse_args()
    for name in args.names:
        if name not in CASES:
            parser.error(f"no benchmark is called {name}: there are {', '.join(CASES)}")
    if args.runs is not None and not 1 <= args.runs <= 1000:
        parser.error("--runs takes 1 to 1000")
    return args


@contextlib.contextmanager
def prepared(args: argparse.Namespace, report: Report) -> Iterator[Bench]:
    """All that the cases need; nothing of it is left afterwards."""
    hierarchy = Hierarchies.detect().v2
    with contextlib.ExitStack() as stack:
        base = Path(tempfile.mkdtemp(prefix="nsfs-bench-"))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        # As /run is: on a disk every record of nsfs and runc would wait for ext4's journal.
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "mode=755", "nsfs-bench", str(base)], check=True
        )
        stack.callback(subprocess.run, ["umount", "-l", str(base)], check=False)
        clone3 = Clone3(compile_program("clone3", base))
        stack.callback(clone3.close)
        runc = None
        if shutil.which("runc") and shutil.which("busybox"):
            runc = Runc(base)
            stack.callback(runc.close)
        else:
            report.failed.append("runc or busybox is not installed")
        instance = _mounted(stack, Instance(base, hierarchy), report)
        no_spare = Instance(base, hierarchy, "-no-spare", "[make]\nspare = 0\n")
        yield Bench(
            report=report,
            base=base,
            runs=args.runs or (QUICK_RUNS if args.quick else RUNS),
            sizes=QUICK_SIZES if args.quick else SIZES,
            tree_size=QUICK_TREE_SIZE if args.quick else TREE_SIZE,
            instance=instance,
            no_spare=_mounted(stack, no_spare, report),
            clone3=clone3,
            runc=runc,
            forktree=compile_program("forktree", base),
            group=BareGroup(hierarchy),
        )


def _mounted(stack: contextlib.ExitStack, instance: Instance, report: Report) -> Instance | None:
    try:
        instance.mount()
    except RuntimeError as error:
        report.failed.append(f"nsfs: {error}")
        instance.umount()
        return None
    stack.callback(_umount, instance, report)
    return instance


def _umount(instance: Instance, report: Report) -> None:
    log = instance.run_dir / "log"
    for line in log.read_text(errors="replace").splitlines():
        if " ERROR " in line or " WARNING " in line:
            report.failed.append(f"the daemon's log: {line}")
    if wrong := instance.umount():
        report.failed.append(wrong)


def left_behind() -> list[str]:
    """What this run has left, of which there must be nothing."""
    mark = f"nsfs-bench-{os.getpid()}"
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, directory, kind, _ = line.split(" ", 3)
        if kind in ("cgroup", "cgroup2"):
            with contextlib.suppress(OSError), os.scandir(directory) as entries:
                found += [f"cgroup {e.path}" for e in entries if e.name.startswith(mark)]
        elif "nsfs-bench-" in directory:
            found.append(f"mount {directory}")
    found += [f"process {pid}" for pid in _children(os.getpid())]
    return found


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


# --- the table ---


def shown(value: float, unit: str) -> str:
    """A value in a unit that suits it."""
    if unit == "s":
        return f"{value * 1000:.3f} ms" if value < 1 else f"{value:.3f} s"
    if unit == "B":
        return f"{value / 1e6:.2f} MB" if abs(value) >= 1e6 else f"{value / 1e3:.1f} kB"
    return f"{value:g}"


def print_table(record: dict[str, Any], series: dict[str, Series], opcodes: Any) -> None:
    """What a reader wants to see."""
    print(
        f"Linux {record['kernel']} on {record['cpus']} CPUs ({record['processor']}), "
        f"load {record['load'][0]:.1f}, {record['runs']} runs\n"
    )
    width = max((len(name) for name in series), default=0)
    print(f"{'':{width}} {'n':>5} {'median':>11} {'min':>11} {'q1':>11} {'q3':>11}")
    for name, each in series.items():
        facts = each.summary()
        row = " ".join(f"{shown(facts[k], each.unit):>11}" for k in ("median", "min", "q1", "q3"))
        print(f"{name:{width}} {facts['n']:>5} {row}")
    for name, counts in opcodes.items():
        print(f"{name}: {' '.join(f'{key} {value}' for key, value in counts.items())}")
    print(f"\n{'wanted at most':{width}} {'wanted':>11} {'reached':>11}")
    for goal in record["goals"]:
        known = series.get(goal["series"])
        unit = known.unit if known else ""
        wanted, reached = (
            "-" if value is None else f"{value:.2f} x" if goal["over"] else shown(value, unit)
            for value in (goal["wanted"], goal["reached"])
        )
        word = {True: "", False: "missed", None: "not measured"}[goal["met"]]
        print(f"{goal['what']:{width}} {wanted:>11} {reached:>11}  {word}".rstrip())


def _interrupted(number: int, frame: object) -> None:
    # One is enough, and what is undone from here on is not to be interrupted by another.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    """The program."""
    args = arguments()
    if os.geteuid() != 0:
        print("scripts/bench: only root can do this: run it with sudo", file=sys.stderr)
        return 1
    for each in SIGNALS:
        signal.signal(each, _interrupted)
    report = Report()
    facts = machine()
    start = time.monotonic()
    with prepared(args, report) as bench:
        for name, case in CASES.items():
            if args.names and name not in args.names:
                continue
            print(f"{name}: {(case.__doc__ or '').splitlines()[0]}", file=sys.stderr)
            try:
                with deadline(CASE_S, name):
                    case(bench)
            except (OSError, Late, RuntimeError) as error:
                report.failed.append(f"{name}: {error}")
        runs = bench.runs
    with contextlib.suppress(Late):
        wait_until(lambda: not left_behind(), "nothing is left", pause_s=0.05)
    report.failed += [f"left behind: {each}" for each in left_behind()]
    record = report.record(**facts, runs=runs, quick=args.quick, took_s=time.monotonic() - start)
    print_table(record, report.series, report.opcodes)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    for failure in report.failed:
        print(f"scripts/bench: {failure}", file=sys.stderr)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
