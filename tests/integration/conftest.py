"""A real instance for tests: the real daemon on the real kernel, in a mount namespace of its own.

The whole run is in a private mount namespace (scripts/test), so mounts reach nobody.  One instance
serves a module; every test is to leave it without containers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nsfs.cli import ask
from nsfs.spawner import LIBEXEC

NSFS = [sys.executable, "-P", "-m", "nsfs.cli"]
# On a machine that is emulated everything takes some 20 times as long.
SLOWNESS = 5 if os.environ.get("NSFS_VM") == "1" else 1
DEADLINE_S = 30.0 * SLOWNESS
EXACT = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 4)
"""Whether this kernel has what the exact tier of kernel lines needs; then it must be there."""
collect_ignore = [] if EXACT else ["test_firewall_lines.py"]
_serial = itertools.count(1)


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Look until a condition holds and return what it gave."""
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, f"never came true: {what}"
        time.sleep(0.005)
    return found


@contextlib.contextmanager
def holding(mountpoint: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A filesystem that does not answer (holding_fs.py) at that directory, which is made."""
    mountpoint.mkdir()
    words = [sys.executable, "-P", Path(__file__).with_name("holding_fs.py"), mountpoint]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"mounted\n"
            yield server
        finally:
            server.kill()
            subprocess.run(["umount", "-l", mountpoint], check=True)


class Instance:
    """One mounted tree."""

    def __init__(self, base: Path, options: list[str] | None = None) -> None:
        self.base = base
        self.tree = base / "tree"
        self.run_dir = base / "run"
        self.group = f"nsfs-test-{os.getpid()}-{next(_serial)}"
        self.options = list(options or [])

    def command(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run nsfs(8)."""
        return subprocess.run(
            [*NSFS, *args], check=check, capture_output=True, text=True, timeout=DEADLINE_S * 2
        )

    def mount(self) -> None:
        """Serve the tree."""
        # With exist_ok it is looked at, which fails where what was mounted there is dead.
        with contextlib.suppress(FileExistsError):
            self.tree.mkdir()
        if "--config" not in self.options:
            self.options += ["--config", str(self.base / "nsfs-test.conf")]
        # What else runs on this machine is found only by tests that ask for it.
        config = Path(self.options[self.options.index("--config") + 1])
        text = config.read_text() if config.exists() else ""
        if "[discovery]" not in text:
            config.write_text(f"{text}\n[discovery]\nenabled = off\n")
        done = self.command(
            "mount",
            str(self.tree),
            "--run-dir",
            str(self.run_dir),
            "--cgroup",
            self.group,
            *self.options,
            check=False,
        )
        assert done.returncode == 0, done.stderr + self.log()

    def umount(self) -> None:
        """End it, with whatever is in it."""
        done = self.command("umount", str(self.tree), "--kill", check=False)
        assert done.returncode == 0, done.stderr + self.log()

    def log(self) -> str:
        """The daemon's log."""
        path = self.run_dir / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def status(self) -> dict[str, Any]:
        """`nsfs status --json`."""
        found: dict[str, Any] = json.loads(self.command("status", str(self.tree), "--json").stdout)
        return found

    def daemon(self) -> int:
        """The daemon's PID."""
        return int((self.run_dir / "daemon.pid").read_text())

    def kill_daemon(self) -> None:
        """kill -9; returns when the next daemon has a PID."""
        old = self.daemon()
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: self.daemon() != old, "the supervisor starts a new daemon")

    def groups(self) -> list[str]:
        """Names of the groups of containers, but for those made in advance."""
        found = []
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, directory, kind, _ = line.split(" ", 3)
            top = Path(directory, self.group)
            if kind == "cgroup2" and top.is_dir():
                found += [p.name for p in top.iterdir() if p.is_dir()]
        spares = self.spares()
        return [name for name in found if name not in spares]

    def spares(self) -> list[str]:
        """The numbers of containers that were made in advance, or just are."""
        return [n for n, record in self.records().items() if record["phase"] == "spare"]

    def ready_spares(self, count: int = 1) -> list[str]:
        """Wait until so many of them are ready; their numbers."""

        def found() -> list[str]:
            ready = ask(str(self.run_dir), {"do": "status"})["spare"]
            spares = self.spares()
            return spares if len(spares) == ready == count else []

        numbers: list[str] = wait_until(found, f"{count} spare")
        return numbers

    def records(self) -> dict[str, dict[str, Any]]:
        """What the run directory has of each container, by its number."""
        found = {}
        for path in (self.run_dir / "c").glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                found[path.stem] = json.loads(path.read_text())
        return found

    def settled(self) -> None:
        """Wait until nothing is left of containers that were removed."""

        def left() -> list[str]:
            # 0 is the root's.
            kept = {"0", *self.spares()}
            files = [p.name for p in (self.run_dir / "c").iterdir()]
            return self.groups() + [name for name in files if name.split(".")[0] not in kept]

        wait_until(lambda: not left(), f"nothing is left behind: {left()}")


class Container:
    """A container's directory, and what a test does with it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def read(self, name: str) -> str:
        """A control file's text."""
        return (self.path / name).read_text()

    def write(self, name: str, value: str) -> None:
        """Write a control file as echo(1) does."""
        write(self.path / name, value)

    def state(self) -> dict[str, str]:
        """`state` as a dict."""
        return dict(line.split(" ", 1) for line in self.read("state").splitlines())

    def runs(self, name: str) -> bool:
        """Whether one of its members is called that (comm)."""
        for each in os.listdir(self / "procs"):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{each.partition(':')[0]}/comm").read_text() == f"{name}\n":
                    return True
        return False

    @property
    def init(self) -> int:
        """The host's PID of the init."""
        return int(self.read("init"))

    def start(self, *words: str) -> None:
        """Start a command by `exec`."""
        self.write("exec", " ".join("'" + w.replace("'", "'\\''") + "'" for w in words))

    def run(self, script: str, deadline_s: float = DEADLINE_S) -> str:
        """Run a shell script inside by `exec` and return what it printed; fails when it does."""
        code, output = self.run_code(script, deadline_s)
        assert code == 0, f"{script}: exit {code}: {output}"
        return output

    def run_code(self, script: str, deadline_s: float = DEADLINE_S) -> tuple[int, str]:
        """The same; exit status and output."""
        number = f"{os.getpid()}-{next(_serial)}"
        mark = f"mark-{number}"
        # Put together inside: the script may print its own command line.
        shell = f"m=mark; echo $m-{number}-begin; (\n{script}\n) 2>&1; echo $m-{number}-end $?"
        self.start("sh", "-c", shell)
        text = ""

        def ended() -> bool:
            nonlocal text
            text = (self.path / "output").read_text(errors="replace")
            return f"{mark}-end" in text and text.endswith("\n")

        wait_until(ended, f"{script} ends: {text!r}", deadline_s)
        body = text.split(f"{mark}-begin\n", 1)[1]
        output, _, rest = body.rpartition(f"{mark}-end ")
        return int(rest.split()[0]), output


TYPES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


def namespaces_of(pid: int | str) -> dict[str, int]:
    """The inode number of each namespace of a process."""
    return {kind: os.stat(f"/proc/{pid}/ns/{kind}").st_ino for kind in TYPES}


def group_of(pid: int) -> str:
    """The path of a process's cgroup in the v2 hierarchy."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line[3:] for line in lines if line.startswith("0::"))


@contextlib.contextmanager
def session(container: Container, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A session that has begun, of a shell that waits for a program."""
    command = ["sh", "-c", "echo ready; sleep 1000; :"]
    with subprocess.Popen(
        [LIBEXEC / "nsfs-enter", *options, container.path, "--", *command],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def fails(number: int) -> Any:
    """To be entered: what is done in it fails with that errno."""
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def refused(number: int, function: Callable[..., object], *args: object) -> None:
    """It fails with that errno."""
    with pytest.raises(OSError, match=r".") as caught:
        function(*args)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


def write(path: Path, value: str) -> None:
    """One write(2) of a value with a newline."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, value.encode() + b"\n")
    finally:
        os.close(fd)


@contextlib.contextmanager
def serving(base: Path, options: list[str] | None = None) -> Iterator[Instance]:
    """An instance that is mounted, and afterwards leaves nothing behind."""
    instance = Instance(base, options)
    instance.mount()
    try:
        yield instance
    finally:
        instance.umount()
    assert not instance.groups()
    errors = [x for x in instance.log().splitlines() if " ERROR " in x or " WARNING " in x]
    assert not errors, "\n".join(errors) + "\n" + instance.log()[-4000:]


@pytest.fixture
def host_log() -> Iterator[None]:
    """One test at a time, of all runs on this machine: it makes the host's kernel print, and the
    kernel limits that for all network namespaces together."""
    path = Path(tempfile.gettempdir(), "nsfs-test-host-log.lock")
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    """One instance for a module, which other users can reach."""
    with tempfile.TemporaryDirectory(prefix="nsfs-", dir="/tmp") as base:
        os.chmod(base, 0o755)
        with serving(Path(base)) as found:
            yield found


@pytest.fixture
def tree(instance: Instance) -> Iterator[Path]:
    """The mount point; the test is to leave no container in it."""
    yield instance.tree
    left = [p.name for p in instance.tree.iterdir() if (p / "exec").exists()]
    for name in left:
        subprocess.run(["rm", "-rf", str(instance.tree / name)], check=False, timeout=DEADLINE_S)
    instance.settled()


@pytest.fixture
def web(tree: Path) -> Container:
    """A container called web."""
    path = tree / "web"
    path.mkdir()
    return Container(path)


@pytest.fixture
def on_root() -> Iterator[Path]:
    """A directory on the host's root filesystem that stays visible in containers."""
    places = ("/opt", "/usr/local", "/")
    place = next(each for each in places if os.stat(each).st_dev == os.stat("/").st_dev)
    with tempfile.TemporaryDirectory(prefix="nsfs-test-", dir=place) as path:
        os.chmod(path, 0o755)
        yield Path(path)


def readable(fd: int, timeout_s: float) -> bool:
    """Whether a descriptor becomes readable in time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
