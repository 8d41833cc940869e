"""An instance of nsfs for the benchmarks: its own tree, run directory and cgroup."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from measure import WAIT_S, read, wait_readable, wait_until

NSFS = [sys.executable, "-P", "-m", "nsfs.cli"]


class Instance:
    """One mounted tree; the mount namespace is private already."""

    def __init__(self, base: Path, hierarchy: str, name: str = "", config: str = "") -> None:
        self.tree = base / f"tree{name}"
        self.run_dir = base / f"run{name}"
        self.config = base / f"conf{name}"
        self.config.write_text(config)
        self.group = f"nsfs-bench-{os.getpid()}{name}"
        self.groups_dir = Path(hierarchy, self.group)
        self._serial = 0

    def mount(self) -> None:
        """Serve the tree; RuntimeError tells why not."""
        self.tree.mkdir()
        words = ["mount", str(self.tree), "--run-dir", str(self.run_dir), "--cgroup", self.group]
        words += ["--config", str(self.config)]
        try:
            done = subprocess.run(
                [*NSFS, *words], capture_output=True, text=True, timeout=WAIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError("nsfs mount does not end") from None
        if done.returncode:
            raise RuntimeError(done.stderr.strip() or f"nsfs mount: exit {done.returncode}")

    def umount(self) -> str:
        """End it with whatever is in it; what went wrong, or ""."""
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            done = subprocess.run(
                [*NSFS, "umount", str(self.tree), "--kill"],
                capture_output=True,
                text=True,
                timeout=WAIT_S * 1.5,
                check=False,
            )
            if not done.returncode:
                return ""
        self._end_by_force()
        return "nsfs umount failed; the instance was killed"

    def _end_by_force(self) -> None:
        # The supervisor first: it would start the daemon again.
        for name in ("supervisor", "daemon"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(self.pid(name), signal.SIGKILL)
        subprocess.run(["umount", "-l", str(self.tree)], check=False, capture_output=True)
        with contextlib.suppress(OSError):
            (self.groups_dir / "cgroup.kill").write_text("1")
        time.sleep(0.5)
        for directory in (str(self.groups_dir.parent), *version_1().values()):
            for path, _, _ in os.walk(f"{directory}/{self.group}", topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(path)

    def pid(self, name: str) -> int:
        """The PID of the supervisor or the daemon."""
        return int(read(self.run_dir / f"{name}.pid"))

    def spawner(self) -> int:
        """The PID of the spawner, the daemon's child of that name; 0 when there is none."""
        daemon = self.pid("daemon")
        for child in read(f"/proc/{daemon}/task/{daemon}/children").split():
            if "spawner" in read(f"/proc/{child}/comm"):
                return int(child)
        return 0

    # --- containers ---

    def path(self) -> Path:
        """A name that was never used in the tree."""
        self._serial += 1
        return self.tree / f"b{self._serial}"

    def init(self, container: Path) -> int:
        """The PID of a container's init."""
        return int(read(container / "init"))

    def member_groups(self, container: Path) -> list[str]:
        """What makes a process a member: the cgroup2 directory, the `tasks` of version 1 groups."""
        tops = version_1()
        found: list[str] = []
        for line in read(f"/proc/{self.init(container)}/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                relative = path.strip("/").removesuffix("/init")
                found.insert(0, f"{self.groups_dir.parent}/{relative}/payload")
            elif path.startswith(f"/{self.group}/") and controllers.split(",")[0] in tops:
                found.append(f"{tops[controllers.split(',')[0]]}{path}/tasks")
        return found

    def groups(self) -> list[str]:
        """The groups of containers that there are, removed ones still on their way out as well.

        Those made in advance are not counted.
        """
        with contextlib.suppress(FileNotFoundError):
            found = [entry.name for entry in os.scandir(self.groups_dir) if entry.is_dir()]
            return [name for name in found if not self._is_spare(name)]
        return []

    def _is_spare(self, number: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return bool(json.loads(read(self.run_dir / f"c/{number}.json"))["phase"] == "spare")
        return False

    def settle(self, count: int) -> None:
        """Wait until there are only so many groups: what was removed is wholly gone."""
        wait_until(lambda: len(self.groups()) <= count, f"{count} groups are left")


def version_1() -> dict[str, str]:
    """Where the version 1 hierarchies are mounted, by controller."""
    tops: dict[str, str] = {}
    for line in read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup":
            tops.update(dict.fromkeys(after.split()[2].split(","), before.split()[4]))
    return tops


def wait_gone(pid_fds: list[int]) -> float:
    """Wait until processes have ended; the time then, by time.perf_counter().

    Raises RuntimeError when one does not.
    """
    for fd in pid_fds:
        if not wait_readable(fd):
            raise RuntimeError("a killed process does not end")
    return time.perf_counter()
