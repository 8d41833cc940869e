"""Whoever waits for nsfs can be killed and interrupted, wherever it waits.

A FUSE request that its server has taken is waited for by the kernel without heeding any signal, so
it is nsfs that has to let go.  How long that takes is printed (pytest -s): some milliseconds, were
it not for the load of this machine.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, SLOWNESS, Container, Instance, holding, wait_until, write

# What a test fails on is not how fast it is, but that it does not happen.
GONE_S = 5.0 * SLOWNESS
SIGNALS = (signal.SIGKILL, signal.SIGINT)
PYTHON = "/usr/bin/python3"


def asleep(pid: int) -> bool:
    """Whether it waits, now and a moment later.  AssertionError when it has ended."""
    for _ in range(2):
        time.sleep(0.02)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        assert state not in "ZX", "it does not wait, it has ended"
        if state not in "SD":
            return False
    return True


def ends(pid: int, number: int, gone: Callable[[], bool]) -> float:
    """Send a signal and wait until the process is gone; how long that took, in seconds."""
    begin = time.monotonic()
    os.kill(pid, number)
    while not gone():
        assert time.monotonic() - begin < GONE_S, f"{signal.Signals(number).name} ends it"
        time.sleep(0.001)
    return time.monotonic() - begin


def waits(action: Callable[[], object]) -> int:
    """The PID of a child of this process that is doing that, and waits."""
    ready, begun = os.pipe()
    pid = os.fork()
    if not pid:
        code = 99
        try:
            for each in SIGNALS[1:]:
                signal.signal(each, signal.SIG_DFL)
            os.write(begun, b"x")
            action()
            code = 0
        except OSError as error:
            code = error.errno or 99
        finally:
            os._exit(code)
    os.close(begun)
    assert os.read(ready, 1)
    os.close(ready)
    try:
        wait_until(lambda: asleep(pid), "it waits")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print(f"it ended with {os.waitstatus_to_exitcode(status)}")
        raise
    return pid


def ends_by_each(action: Callable[[], object], what: str) -> None:
    """What does that can be ended by each of the signals while it waits."""
    for number in SIGNALS:
        pid = waits(action)
        took_s = ends(pid, number, lambda pid=pid: bool(os.waitpid(pid, os.WNOHANG)[0]))
        print(f"{what}: {number.name} {took_s * 1000:.0f} ms")


# --- inside ---

# What a process does that has the kernel's log open, and the tree.
INSIDE = {
    "read-kmsg": "last('/dev/kmsg'); os.read(fd, 8192)",
    "read-pkmsg": "last('/proc/kmsg'); os.read(fd, 8192); os.read(fd, 8192)",
    "syslog": "[libc.klogctl(2, buf, 4096) for _ in range(2)]",
    "poll-kmsg": "last('/dev/kmsg'); poll(select.POLLIN)",
    "select-kmsg": "last('/dev/kmsg'); select.select([fd], [], [])",
    "epoll-kmsg": "last('/dev/kmsg'); epoll(select.EPOLLIN)",
    "poll-state": "[poll(select.POLLPRI) for _ in snapshots('state')]",
    "select-state": "[select.select([], [], [fd]) for _ in snapshots('state')]",
    "poll-output": "[poll(select.POLLIN) for _ in snapshots('db/output')]",
    "poll-nested": "[poll(select.POLLPRI) for _ in snapshots('db/state')]",
}
PROGRAM = f"""
import ctypes, os, select, signal, time
libc = ctypes.CDLL(None)
buf = ctypes.create_string_buffer(4096)
def last(path):
    global fd
    fd = os.open(path, os.O_RDONLY)
    if path == '/dev/kmsg':
        os.lseek(fd, 0, os.SEEK_END)
def snapshots(name):
    global fd
    fd = os.open('/sys/namespaces/' + name, os.O_RDONLY)
    # What was under way changes it once more.
    while True:
        os.lseek(fd, 0, os.SEEK_SET)
        while os.read(fd, 4096): pass
        yield
def poll(events):
    each = select.poll(); each.register(fd, events); each.poll()
def epoll(events):
    each = select.epoll(); each.register(fd, events); each.poll()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for name, action in {INSIDE!r}.items():
    if not os.fork():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        libc.prctl(15, name.encode())
        exec(action)
        os._exit(1)
time.sleep(1000)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_members_wherever_they_wait(number: signal.Signals, web: Container) -> None:
    os.mkdir(web / "db")
    web.start(PYTHON, "-c", PROGRAM)

    def found() -> dict[str, int]:
        names = {}
        for name in os.listdir(web / "procs"):
            with contextlib.suppress(OSError):
                names[Path(f"/proc/{name}/comm").read_text().strip()] = int(name)
        return names

    wait_until(lambda: set(INSIDE) <= set(found()), f"all have begun: {web.read('output')}")
    for what, pid in found().items():
        if what in INSIDE:
            assert os.path.exists(f"/proc/{pid}"), f"{what} has ended: {web.read('output')}"
            wait_until(lambda pid=pid: asleep(pid), f"{what} waits")
    for what, pid in found().items():
        if what in INSIDE:
            took_s = ends(pid, number, lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
            print(f"{what}: {number.name} {took_s * 1000:.0f} ms")


# --- outside ---


def polling(path: Path, how: str, events: int) -> Callable[[], object]:
    """What waits for something to happen to a file that was read."""

    def action() -> None:
        fd = os.open(path, os.O_RDONLY)
        # What was under way changes it once more.
        while True:
            os.lseek(fd, 0, os.SEEK_SET)
            while os.read(fd, 65536):
                pass
            if how == "select":
                select.select([fd] if events == select.POLLIN else [], [], [fd])
            else:
                each = select.poll() if how == "poll" else select.epoll()
                each.register(fd, events)
                each.poll()

    return action


def test_who_waits_for_output_is_told(web: Container) -> None:
    web.run("echo before")
    fd = os.open(web / "output", os.O_RDONLY)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(0)
        while os.read(fd, 4096):
            pass
        assert not poll.poll(50)
        timer = threading.Timer(0.05, web.start, ("echo", "news"))
        timer.start()
        assert poll.poll(GONE_S * 1000)
        timer.join()
        assert os.read(fd, 4096) == b"news\n"
        assert not poll.poll(0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("how", ["poll", "select", "epoll"])
def test_who_waits_for_a_change(how: str, web: Container) -> None:
    for name, events in (
        ("state", select.POLLPRI),
        ("kmsg", select.POLLIN),
        ("output", select.POLLIN),
        ("cgroup/memory.events", select.POLLPRI),
    ):
        try:
            web.read(name)
        except OSError:
            # This host has no such controller.
            assert name.startswith("cgroup/")
            continue
        ends_by_each(polling(web / name, how, events), f"{how} of {name}")


class Held:
    """A filesystem that does not answer (holding_fs.py)."""

    def __init__(self, mountpoint: Path, server: subprocess.Popen[bytes]) -> None:
        self.file = mountpoint / "held"
        self.directory = mountpoint / "dir"
        self.server = server

    def hold(self, how: bytes = b"hold") -> None:
        """From now on the directory cannot be looked up; or nothing in it."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(how + b"\n")
        self.server.stdin.flush()
        assert self.server.stdout.readline() == b"gone\n"


@pytest.fixture
def held(tmp_path: Path, web: Container) -> Iterator[Held]:
    """A filesystem that does not answer, until after the test."""
    with holding(tmp_path / "holding") as server:
        try:
            yield Held(tmp_path / "holding", server)
        finally:
            # What waits for it fails then, so that it can be taken back.
            server.kill()
            with contextlib.suppress(FileNotFoundError):
                web.write("defaults/binds", "")
                web.write("defaults/rootfs", "host")


def defaults_on(held: Held, what: str, web: Container) -> None:
    """What is made in web hangs: with the path of a bind, of its root filesystem, or when it looks
    for names in that."""
    if what == "bind":
        web.write("defaults/binds", f"/mnt {held.directory} ro")
    else:
        # A FUSE filesystem cannot be idmapped.
        web.write("defaults/unshare", "ipc mnt pid uts")
        web.write("defaults/rootfs", str(held.directory))
    held.hold(b"within" if what == "root" else b"hold")


HANGING = ("bind", "rootfs", "root")


@pytest.mark.parametrize("what", HANGING)
def test_mkdir_with_a_filesystem_that_does_not_answer(
    what: str, tree: Path, web: Container, held: Held
) -> None:
    defaults_on(held, what, web)
    ends_by_each(lambda: os.mkdir(web / "db"), f"mkdir, a {what}")
    assert not (web / "db").exists()
    web.write("defaults/binds", "")
    web.write("defaults/rootfs", "host")
    os.mkdir(web / "db")
    assert Container(web / "db").run("echo works") == "works\n"
    # Nor does anybody else wait.
    os.mkdir(tree / "other")
    os.mkdir(tree / "other/db")
    subprocess.run(["rm", "-rf", tree / "other"], check=True, timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("what", HANGING)
def test_mkdir_does_not_wait_for_ever(
    what: str, tree: Path, web: Container, held: Held, instance: Instance
) -> None:
    defaults_on(held, what, web)
    with pytest.raises(TimeoutError):
        os.mkdir(web / "db")
    assert "timed out" in web.state()["reason"]
    assert not (web / "db").exists()
    # Nobody waits for what cannot be killed.
    os.mkdir(tree / "other")
    os.mkdir(tree / "other/db")
    subprocess.run(["rm", "-rf", tree / "other"], check=True, timeout=30)
    held.server.kill()
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=30)
    instance.settled()


@pytest.mark.parametrize("name", ["rootfs", "binds"])
def test_a_path_on_a_filesystem_that_does_not_answer(name: str, web: Container, held: Held) -> None:
    before = web.read(name)
    held.hold()
    line = f"/mnt {held.directory} ro" if name == "binds" else str(held.directory)
    ends_by_each(lambda: write(web / name, line), f"write to {name}")
    assert web.read(name) == before
    assert web.run("echo works") == "works\n"


@pytest.mark.parametrize(
    ("name", "value"), [("namespaces", "uts own"), ("unshare", "cgroup ipc mnt net pid user uts")]
)
def test_a_rebuild_with_a_filesystem_that_does_not_answer(
    name: str, value: str, web: Container, held: Held
) -> None:
    web.write("unshare", "cgroup ipc mnt net pid syslog time user")
    web.write("binds", f"/mnt {held.directory} ro")
    before = web.read("unshare")
    held.hold()
    ends_by_each(lambda: write(web / name, value), f"write to {name}")
    assert web.read("unshare") == before


def test_a_command_that_does_not_answer(web: Container, held: Held) -> None:
    """execve(2) waits for the program's file."""
    web.write("binds", f"/mnt {held.directory} ro")
    ends_by_each(lambda: write(web / "exec", "/mnt/program"), "write to exec")
    assert web.run("echo works") == "works\n"


def test_a_member_that_cannot_be_killed(
    tree: Path, web: Container, held: Held, instance: Instance
) -> None:
    """It waits for a filesystem that heeds no signal, so it can be neither suspended nor killed."""
    web.write("binds", f"/mnt {held.directory} ro")
    web.start("ls", "/mnt")
    (pid,) = map(int, wait_until(lambda: os.listdir(web / "procs"), "it runs"))
    wait_until(lambda: asleep(pid), "it waits")
    for name, value in (("freeze", "1"), ("kill", "TERM"), ("kill", "1"), ("freeze", "0")):
        process = os.fork()
        if not process:
            with contextlib.suppress(OSError):
                write(web / name, value)
            os._exit(0)
        time.sleep(0.05)
        took_s = ends(process, signal.SIGKILL, lambda p=process: bool(os.waitpid(p, os.WNOHANG)[0]))
        print(f"{name} {value}: {took_s * 1000:.0f} ms")
    # Others are served, and removal does not wait for it.
    assert "populated 1" in web.read("state")
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    assert not web.path.exists()
    assert os.path.exists(f"/proc/{pid}")
    held.server.kill()
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "it ends when that filesystem does")
    instance.settled()


# --- link(2) ---


def test_who_moves_a_process_that_does_not_stop(tree: Path, web: Container) -> None:
    """nsfs waits a second for it to stop, as while it is in vfork(2)."""
    text = (
        "import ctypes,signal\nlib=ctypes.CDLL(None)\nprint('ready',flush=True)\n"
        "if not lib.vfork(): lib.prctl(1, 9); lib.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        wait_until(lambda: asleep(process.pid), "it is in vfork(2)")
        source, target = tree / f"procs/{process.pid}", web / f"procs/{process.pid}:net"
        try:
            for number in SIGNALS:
                pid = waits(lambda: os.link(source, target))
                took_s = ends(pid, number, lambda p=pid: bool(os.waitpid(p, os.WNOHANG)[0]))
                print(f"link: {number.name} {took_s * 1000:.0f} ms")
                status = Path(f"/proc/{process.pid}/status")
                wait_until(lambda: "TracerPid:\t0\n" in status.read_text(), "it is let go")
            assert os.listdir(web / "procs") == []
        finally:
            process.kill()


# --- what is never long, at any moment ---

LOOPS = {
    "interfaces": "mkdir {web}/net/x; mv {web}/net/x {web}/net/y; rmdir {web}/net/y",
    "addresses": "echo 10.0.0.1/24 > {web}/net/lo/inet; cat {web}/net/routes; echo > {web}/net/lo/inet",
    "namespaces": "echo 'net ..' > {web}/namespaces; echo 'net own' > {web}/namespaces",
    "binds": "echo '/mnt /etc ro' > {web}/binds; echo > {web}/binds",
    "commands": "echo true > {web}/exec; echo 1 > {web}/kill; echo 1 > {web}/freeze; echo 0 > {web}/freeze",
    "containers": "mkdir {web}/c; mv {web}/c {web}/d; rm -rf {web}/d",
    "sessions": "ln {web}/../procs/self {web}/procs/ < /dev/null",
}


def living(group: int) -> bool:
    """Whether a process group has a member that has not ended (be it reaped or not)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(") ")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                return True
    return False


@pytest.mark.parametrize("what", LOOPS)
def test_at_any_moment(what: str, web: Container, instance: Instance) -> None:
    script = f"while :; do {LOOPS[what].format(web=web.path)}; done 2>/dev/null"
    for number in SIGNALS:
        # A group, as what the terminal's Ctrl-C goes to.
        process = subprocess.Popen(["sh", "-c", script], process_group=0, stdout=subprocess.DEVNULL)
        group = process.pid
        time.sleep(0.15)
        begin = time.monotonic()
        os.killpg(group, number)
        process.wait(GONE_S)
        # The shell's last command may outlive it.
        while living(group):
            assert time.monotonic() - begin < GONE_S, what
        print(f"{what}: {number.name} {(time.monotonic() - begin) * 1000:.0f} ms")
    web.write("freeze", "0")
    wait_until(lambda: web.state()["procs"] == "0", "nobody is in it")
    assert web.run("echo works") == "works\n"
