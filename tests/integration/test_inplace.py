"""`ln procs/PID C/procs/PID:TYPES`: a running process moved in place, which goes on as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nsfs.cgroup import Hierarchies
from nsfs.spawner import CLONE_NEW

from .conftest import SLOWNESS, Container, group_of, wait_until
from .terminal import terminal

DEADLINE_S = 20.0 * SLOWNESS


def namespace(pid: int | str, kind: str) -> str:
    """The namespace of a process."""
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def move(tree: Path, pid: int, container: Container, types: str = "net,uts") -> None:
    """ln, which has to succeed."""
    name = f"{pid}:{types}" if types else str(pid)
    done = try_move(tree, pid, container, name)
    assert (done.returncode, done.stderr) == (0, ""), done


def try_move(
    tree: Path, pid: int, container: Container, name: str
) -> subprocess.CompletedProcess[str]:
    """ln of a process into a container."""
    return subprocess.run(
        ["ln", str(tree / "procs" / str(pid)), str(container / "procs" / name)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@contextmanager
def running(*words: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process that has said `ready`."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, **options) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.05)
            yield process
        finally:
            process.kill()


@contextmanager
def sleeping() -> Iterator[subprocess.Popen[str]]:
    """A process that does nothing."""
    with running("sh", "-c", "echo ready; exec sleep 1000") as process:
        yield process


def check_moved(pid: int, container: Container, types: str = "net,uts") -> None:
    """It has these namespaces of the container's and no other."""
    for kind in CLONE_NEW:
        inside = namespace(container.init, kind)
        assert (namespace(pid, kind) == inside) == (kind in types.split(",")), kind


# --- what is true afterwards ---


def test_it_is_in_both_and_counted(tree: Path, web: Container) -> None:
    with sleeping() as process:
        move(tree, process.pid, web)
        check_moved(process.pid, web)
        assert os.listdir(web / "procs") == [f"{process.pid}:net,uts"]
        assert str(process.pid) in os.listdir(tree / "procs")
        assert web.state()["procs"] == "1"
        assert web.state()["populated"] == "1"
        text = (web / f"procs/{process.pid}:net,uts").read_text()
        assert "command sleep 1000" in text
        # By another process: who has listed a name may go on using it for a while.
        for name in (f"{process.pid}", f"{process.pid}:net"):
            assert subprocess.call(["test", "-e", str(web / "procs" / name)]) == 1
    wait_until(lambda: web.state()["procs"] == "0", "it has ended")


def test_its_children_are_in_too(tree: Path, web: Container) -> None:
    with running("sh", "-c", "echo ready; read x; sleep 1000 & wait", stdin=subprocess.PIPE) as sh:
        move(tree, sh.pid, web)
        assert sh.stdin is not None
        sh.stdin.write("\n")
        sh.stdin.flush()
        names = wait_until(lambda: len(found := os.listdir(web / "procs")) == 2 and found, "two")
        assert all(name.endswith(":net,uts") for name in names)
        web.write("kill", "1")
        assert sh.wait(DEADLINE_S) == -signal.SIGKILL


def test_it_dies_and_freezes_with_the_container(tree: Path, web: Container) -> None:
    with sleeping() as process:
        move(tree, process.pid, web)
        web.write("freeze", "1")
        state = Path(f"{Hierarchies.detect().v2}{group_of(process.pid)}/cgroup.events")
        wait_until(lambda: "frozen 1" in state.read_text(), "frozen")
        web.write("freeze", "0")
        web.write("kill", "TERM")
        assert process.wait(DEADLINE_S) == -signal.SIGTERM
    with sleeping() as process:
        move(tree, process.pid, web)
        subprocess.run(["rm", "-rf", str(web.path)], check=True)
        assert process.wait(DEADLINE_S) == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["cgroup", "ipc", "mnt", "net", "time", "uts"])
def test_each_type(tree: Path, web: Container, kind: str) -> None:
    with sleeping() as process:
        move(tree, process.pid, web, kind)
        check_moved(process.pid, web, kind)


def test_whole_where_the_ids_are_the_containers(tree: Path, web: Container) -> None:
    with sleeping() as process:
        # Root of the host is nobody in there.
        done = try_move(tree, process.pid, web, str(process.pid))
        assert done.returncode == 1
        assert "not permitted" in done.stderr
        check_moved(process.pid, web, "")
        for types in ("user", "pid", "net,user", "pid,uts"):
            assert try_move(tree, process.pid, web, f"{process.pid}:{types}").returncode == 1
        check_moved(process.pid, web, "")
        web.write("idmap", "host")
        move(tree, process.pid, web, "")
        for kind in ("net", "user", "uts", "mnt", "ipc"):
            assert namespace(process.pid, kind) == namespace(web.init, kind)
        assert os.listdir(web / "procs") == [str(process.pid)]
        assert os.readlink(f"/proc/{process.pid}/root") == "/"


# --- it goes on as it was ---

TARGET = r"""
import ctypes, os, select, signal, socket, sys, threading, time
mode = sys.argv[1]
WAIT_S = float(sys.argv[2])
WAIT = divmod(int(WAIT_S * 10**9), 10**9)
lib = ctypes.CDLL(None, use_errno=True)
errno = ctypes.get_errno
def later(action):
    if not os.fork():
        time.sleep(WAIT_S)
        action()
        os._exit(7)
def sleep(): time.sleep(WAIT_S)
def absolute():
    end = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(WAIT_S * 10**9)
    ts = (ctypes.c_long * 2)(*divmod(end, 10**9))
    assert lib.clock_nanosleep(time.CLOCK_MONOTONIC, 1, ts, None) == 0
def raw(): # without Python's own way of beginning again
    ts = (ctypes.c_long * 2)(*WAIT); left = (ctypes.c_long * 2)()
    assert lib.nanosleep(ts, left) == 0, errno()
def poll(): assert lib.poll(None, 0, int(WAIT_S * 1000)) == 0, errno()
def select_(): assert select.select([], [], [], WAIT_S) == ([], [], [])
def condition(): assert not threading.Event().wait(WAIT_S)
def epoll():
    e = select.epoll(); r, w = os.pipe(); e.register(r)
    later(lambda: os.write(w, b"x"))
    buf = ctypes.create_string_buffer(64)
    assert lib.epoll_wait(e.fileno(), buf, 1, -1) == 1, errno()
def compute():
    end = time.monotonic() + WAIT_S; a, b = 0, 1; n = 0
    while time.monotonic() < end:
        for _ in range(1000):
            a, b = b, (a + b) % 1000003; n += 1
    globals()["check"] = (n, a, b)
def read():
    r, w = os.pipe(); later(lambda: os.write(w, b"data")); os.close(w)
    buf = ctypes.create_string_buffer(64)
    assert lib.read(r, buf, 64) == 4 and buf.value == b"data", errno()
    os.close(r)
def wait():
    later(lambda: None)
    status = ctypes.c_int()
    assert lib.waitpid(-1, ctypes.byref(status), 0) > 0, errno()
    assert status.value == 7 << 8
def accept():
    s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen()
    later(lambda: socket.create_connection(s.getsockname()))
    assert lib.accept(s.fileno(), None, None) >= 0, errno()
def timer():
    count = [0]
    def tick(*a): count[0] += 1
    signal.signal(signal.SIGALRM, tick); signal.setitimer(signal.ITIMER_REAL, WAIT_S / 5, WAIT_S / 5)
    # For ever, were it lost.
    while count[0] < 5: signal.pause()
    signal.setitimer(signal.ITIMER_REAL, 0)
def sigwait():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    later(lambda: os.kill(os.getppid(), signal.SIGUSR1))
    mask = (ctypes.c_ulong * 16)(1 << 9)
    assert lib.sigwaitinfo(mask, None) == signal.SIGUSR1, errno()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
def state():
    return signal.pthread_sigmask(signal.SIG_BLOCK, []), os.listdir("/proc/self/fd")
before = state()
print("ready", flush=True)
start = time.monotonic()
{"select": select_}.get(mode, globals().get(mode))()
elapsed = time.monotonic() - start
if mode not in ("accept", "epoll"): # which open
    assert state() == before, (before, state())
if mode == "compute":
    x, y = 0, 1
    for _ in range(check[0]): x, y = y, (x + y) % 1000003
    assert (x, y) == check[1:]
print(start, elapsed)
"""
MODES = [
    *("sleep", "absolute", "raw", "poll", "select", "condition", "epoll", "compute"),
    *("read", "wait", "accept", "timer", "sigwait"),
]
TARGET_WAITS_S = 0.5 * SLOWNESS
ATTEMPTS = 10


@pytest.mark.parametrize("mode", MODES)
def test_it_goes_on_unharmed(tree: Path, web: Container, mode: str) -> None:
    # Nothing ends early.  Late it is on a busy machine, too, but not each time: what began its wait
    # anew is late by as long as it had waited before.
    for _ in range(ATTEMPTS):
        words = (sys.executable, "-c", TARGET, mode, str(TARGET_WAITS_S))
        with running(*words, stderr=subprocess.PIPE) as process:
            time.sleep(TARGET_WAITS_S / 2)
            moved_at = time.monotonic()
            move(tree, process.pid, web)
            check_moved(process.pid, web)
            output, errors = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, errors
        start, elapsed = map(float, output.split())
        assert elapsed > TARGET_WAITS_S * 0.99
        if elapsed < TARGET_WAITS_S + (moved_at - start) * 0.9:
            return
    pytest.fail(f"it began to wait anew: {elapsed} s")


def test_signals_meanwhile_are_not_lost(tree: Path, web: Container) -> None:
    # Python's own handlers count several signals as one; what this descriptor gets does not.
    text = (
        "import os,signal\n"
        "r, w = os.pipe()\n"
        "os.set_blocking(w, False)\n"
        "signal.set_wakeup_fd(w)\n"
        "signal.signal(signal.SIGRTMIN, lambda *a: None)\n"
        "print('ready', flush=True)\n"
        "n = 0\n"
        # For ever, should one be lost.
        "while n < 2000: n += os.read(r, 65536).count(signal.SIGRTMIN)\n"
        "os._exit(5)\n"
    )
    with running(sys.executable, "-c", text) as process:
        child = os.fork()
        if not child:
            try:
                for _ in range(2000):
                    os.kill(process.pid, signal.SIGRTMIN)
                    time.sleep(0.0001)
            finally:
                os._exit(0)
        move(tree, process.pid, web)
        os.waitpid(child, 0)
        assert process.wait(DEADLINE_S) == 5


@pytest.mark.parametrize("shell", ["bash --norc --noprofile", "dash", "busybox sh", "zsh -f"])
def test_a_shell_moves_itself(tree: Path, web: Container, shell: str) -> None:
    with terminal(*shell.split(), env={"ENV": ""}) as outer:
        outer.expect("ready> ")
        time.sleep(0.2)
        outer.run("sleep 0.7 & hostname; trap 'echo tra''pped' USR1", r"ready> ")
        time.sleep(0.1)
        outer.run(f"ln {tree}/procs/$$ {web.path}/procs/$$:net,uts; echo code=$?", "code=0")
        outer.run("hostname", "web")
        outer.run("(exit 3); echo code=$?", "code=3")
        outer.run("kill -USR1 $$", "trapped")
        outer.run("wait; echo wai''ted; sleep 0.1 | cat; echo pi''ped", "waited")
        outer.expect("piped")
        outer.run("echo sle''eping; sleep 1000", "sleeping")
        time.sleep(0.2)
        outer.send("\x03")
        outer.expect("ready> ")
        outer.run("echo al''ive", "alive")
        check_moved(outer.pid, web)


def test_the_caller_itself(tree: Path, web: Container) -> None:
    text = (
        "import os,sys\n"
        "tree, web = sys.argv[1:]\n"
        "os.link(tree + '/procs/self', web + '/procs/self:uts,net')\n"
        "print(os.uname().nodename, os.listdir(web + '/procs') == [f'{os.getpid()}:net,uts'])\n"
        "try: os.link(tree + '/procs/self', web + '/procs/self:ipc')\n"
        "except FileExistsError: print('in already')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", text, str(tree), str(web.path)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.stdout, done.returncode) == ("web True\nin already\n", 0), done


# --- refused, and then not half done ---


def test_what_cannot_be_moved(tree: Path, web: Container) -> None:
    def refused(pid: int, name: str) -> str:
        before = [namespace(pid, kind) for kind in CLONE_NEW]
        group = group_of(pid)
        done = try_move(tree, pid, web, name)
        assert done.returncode == 1
        assert [namespace(pid, kind) for kind in CLONE_NEW] == before
        assert group_of(pid) == group
        assert os.listdir(web / "procs") == []
        return done.stderr

    text = (
        "import threading,time; threading.Thread(target=time.sleep,args=(9,)).start();"
        "print('ready', flush=True)"
    )
    with running(sys.executable, "-c", text) as process:
        assert "busy" in refused(process.pid, f"{process.pid}:net")
    with sleeping() as process:
        assert "Invalid" in refused(process.pid, f"{process.pid}:nets")
        assert "Invalid" in refused(process.pid, f"{process.pid}:net,net")
        assert "Invalid" in refused(process.pid, "4711:net")
        process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: ") T" in stat.read_text(), "it is stopped")
        assert "busy" in refused(process.pid, f"{process.pid}:net")
        process.send_signal(signal.SIGCONT)
    # Its parent is in vfork(2), which nothing stops.
    text = (
        "import ctypes,os\nlib=ctypes.CDLL(None)\nprint('ready',flush=True)\n"
        "if not lib.vfork(): lib.prctl(1, 9); lib.pause()"
    )
    with running(sys.executable, "-c", text) as process:
        assert "busy" in refused(process.pid, f"{process.pid}:net")


def test_only_whom_the_kernel_lets_trace(tree: Path, web: Container) -> None:
    os.chmod(tree, 0o777)
    user = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]
    try:
        subprocess.run([*user, "mkdir", "mine"], cwd=tree, check=True)
        mine = Container(tree / "mine")
        with sleeping() as theirs, running(*user, "sh", "-c", "echo ready; exec sleep 1000") as own:
            # Somebody else's process; the source of a link has to be the caller's, by default.
            done = subprocess.run(
                [*user, "ln", f"procs/{theirs.pid}", f"mine/procs/{theirs.pid}:net"],
                cwd=tree,
                capture_output=True,
                text=True,
            )
            assert "not permitted" in done.stderr
            # His own process has no right to join a network namespace, with his credentials.
            done = subprocess.run(
                [*user, "ln", f"procs/{own.pid}", f"mine/procs/{own.pid}:net"],
                cwd=tree,
                capture_output=True,
                text=True,
            )
            assert "not permitted" in done.stderr
            assert namespace(own.pid, "net") == namespace("self", "net")
            # Root may move it, but it joins with its own rights.
            done = try_move(tree, own.pid, mine, f"{own.pid}:net")
            assert "not permitted" in done.stderr
            done = try_move(tree, theirs.pid, mine, f"{theirs.pid}:net")
            assert done.returncode == 0
    finally:
        os.chmod(tree, 0o755)
