"""What nsfs is measured beside: the bare system calls, and programs that do something like it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import WAIT_S, Late, run, wait_readable, wait_until

HERE = Path(__file__).parent
CFLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-static"]
ID_BASE = 0x6FFF0000
"""Host IDs of runc's container: 65,536 below nsfs's own range."""

TRUE = "/bin/true"
UNSHARE = [
    *("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc"),
    *("--net", "--ipc", "--uts", "--cgroup", "--time", TRUE),
]
"""All eight namespaces, a /proc, /bin/true."""
BWRAP = [
    *("bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"),
    *("--mqueue", "/dev/mqueue", "--ro-bind", "/sys", "/sys", "--tmpfs", "/tmp", "--tmpfs", "/run"),
    *("--tmpfs", "/var", "--tmpfs", "/srv", "--tmpfs", "/mnt", "--tmpfs", "/home"),
    *("--tmpfs", "/root", TRUE),
]
"""All but a time namespace, which it has no option for; the mounts that nsfs makes, /bin/true."""


def compile_program(name: str, directory: Path) -> str:
    """Compile one of the C files beside this one; its path."""
    target = directory / name
    words = ["gcc", *CFLAGS, "-o", str(target), str(HERE / f"{name}.c")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=WAIT_S)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return str(target)


class Clone3:
    """clone3.c: it lives on, and does one thing at a time as it is told."""

    def __init__(self, program: str) -> None:
        self.process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def once(self, command: str) -> float:
        """Obey one command of clone3.c; seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command.encode())
        self.process.stdin.flush()
        if not wait_readable(self.process.stdout.fileno()):
            raise Late("clone3")
        result = int(self.process.stdout.readline())
        if result < 0:
            raise OSError(-result, os.strerror(-result), "clone3")
        return result / 1e9

    def close(self) -> None:
        """End it and what it holds."""
        self.process.kill()
        self.process.communicate()


class Runc:
    """runc with a minimal bundle: busybox, the same namespaces (it has none for time)."""

    def __init__(self, base: Path) -> None:
        self.root = base / "runc"
        self._serial = 0
        self.bundles = {
            "true": self._bundle(base / "bundle-true", ["/bin/busybox", "true"]),
            "idle": self._bundle(base / "bundle-idle", ["/bin/busybox", "sleep", "600"]),
        }

    def _bundle(self, directory: Path, words: list[str]) -> Path:
        root = directory / "rootfs"
        for name in ("bin", "dev", "proc", "sys", "tmp"):
            (root / name).mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin/busybox")
        subprocess.run(
            ["runc", "spec"], cwd=directory, check=True, timeout=WAIT_S, capture_output=True
        )
        path = directory / "config.json"
        spec = json.loads(path.read_text())
        spec["process"].update(terminal=False, args=words)
        types = ("cgroup", "ipc", "mount", "network", "pid", "user", "uts")
        ids = [{"containerID": 0, "hostID": ID_BASE, "size": 65536}]
        spec["linux"].update(
            namespaces=[{"type": kind} for kind in types], uidMappings=ids, gidMappings=ids
        )
        path.write_text(json.dumps(spec))
        return directory

    def _words(self, *words: str) -> list[str]:
        return ["runc", "--root", str(self.root), *words]

    def _name(self) -> str:
        self._serial += 1
        return f"nsfs-bench-{os.getpid()}-{self._serial}"

    def foreground(self) -> float:
        """`runc run` of /bin/true: made, run, removed."""
        return run(self._words("run", "--bundle", str(self.bundles["true"]), self._name()))

    def start(self) -> tuple[str, float]:
        """`runc run -d`: a container that stays; its name, and how long it took."""
        name = self._name()
        took_s = run(self._words("run", "-d", "--bundle", str(self.bundles["idle"]), name))
        return name, took_s

    def delete(self, name: str) -> float:
        """`runc delete -f`."""
        return run(self._words("delete", "-f", name))

    def close(self) -> None:
        """Remove whatever is left."""
        if not self.root.is_dir():
            return
        for name in os.listdir(self.root):
            with contextlib.suppress(RuntimeError, Late):
                self.delete(name)


class Tree:
    """forktree.c: so many processes, and a pipe whose end-of-file is the end of the last one.

    `groups` are a cgroup2 directory and `tasks` files of version 1 groups.
    """

    def __init__(
        self, program: str, where: str, groups: Sequence[str], count: int, mode: str
    ) -> None:
        self.pid = 0
        self._fd, write_fd = os.pipe()
        try:
            words = [program, where, groups[0], str(count), mode, *groups[1:]]
            self._process = subprocess.Popen(words, stdout=write_fd)
            os.close(write_fd)
            write_fd = -1
            self._wait_ready(expect_pid=not where.isdigit())
        except BaseException:
            os.close(self._fd)
            raise
        finally:
            if write_fd >= 0:
                os.close(write_fd)

    def _wait_ready(self, expect_pid: bool) -> None:
        text = b""
        while b"ready\n" not in text or (expect_pid and text.count(b"\n") < 2):
            if not wait_readable(self._fd):
                raise Late("forktree")
            got = os.read(self._fd, 4096)
            if not got:
                raise RuntimeError("forktree failed")
            text += got
        for line in text.splitlines():
            if line.isdigit():
                self.pid = int(line)

    def wait_gone(self) -> float:
        """Wait until the last one has ended; the time then, by time.perf_counter()."""
        try:
            while True:
                if not wait_readable(self._fd):
                    raise RuntimeError("killed processes do not end")
                if not os.read(self._fd, 4096):
                    end = time.perf_counter()
                    break
        finally:
            os.close(self._fd)
        self._process.wait(WAIT_S)
        return end


class BareGroup:
    """A plain group of the cgroup2 hierarchy."""

    def __init__(self, hierarchy: str) -> None:
        self.path = f"{hierarchy}/nsfs-bench-{os.getpid()}-plain"

    @contextlib.contextmanager
    def made(self) -> Iterator[str]:
        """The group, which is empty and gone afterwards."""
        os.mkdir(self.path)
        try:
            yield self.path
        finally:
            self.kill()
            wait_until(self._removed, f"{self.path} is empty")

    def kill(self) -> None:
        """The bare write."""
        fd = os.open(f"{self.path}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)

    def _removed(self) -> bool:
        with contextlib.suppress(OSError):
            os.rmdir(self.path)
            return True
        return False


@contextlib.contextmanager
def empty_files(directory: Path, count: int) -> Iterator[Path]:
    """The example filesystem, mounted."""
    directory.mkdir()
    words = [sys.executable, "-P", str(HERE / "emptyfiles.py"), str(directory), str(count)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], WAIT_S)
        if not ready or process.stdout.readline() != b"ready\n":
            raise RuntimeError("the example filesystem cannot be mounted")
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=False, capture_output=True)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
