"""The supervisor and the interposer, with parked_fs.py as the daemon.

Each test runs a function of this file as a program of its own in a new mount namespace.  If it does
not end in time its FUSE connection is aborted, so nothing stays behind in an uninterruptible wait.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from nsfs import takeover
from tests.integration.conftest import SLOWNESS

TOP = Path(__file__).parents[2]
SUPERVISOR = TOP / "nsfs/libexec/nsfs-supervisor"
DEADLINE_S = 45 * SLOWNESS
WAIT_S = 10 * SLOWNESS
MKDIR, READ, INTERRUPT, FORGET = 9, 15, 36, 2
INIT = 32 + 40  # struct inflight_head
LANDING = takeover._FIRST_SLOT - takeover._SLOT_BYTES
PR_SET_CHILD_SUBREAPER = 36


@pytest.mark.parametrize(
    "scenario",
    [
        "parked_readers_die_of_signals",
        "many_parked_readers",
        pytest.param("more_readers_than_slots", marks=pytest.mark.slow),
        "full_interrupt_pipe",
        "daemon_killed_in_a_loop",
        "parked_reader_outlives_the_daemon",
        "signal_is_not_lost_at_takeover",
        "killed_before_the_request_was_recorded",
        "killed_while_the_request_was_recorded",
        "killed_after_the_reply",
        "killed_with_what_needs_no_reply",
        "killed_around_init stop_before",
        "killed_around_init stop_in",
        "killed_around_init stop_in unrecorded",
        "lookups_are_answered_again",
        "large_requests",
        "clean_end",
        "stop_of_a_stuck_daemon",
        "first_daemon_fails exit_3 3",
        "first_daemon_fails exit_0 1",
        "first_daemon_fails signal_6 134",
        "back_off",
        "request_that_kills_daemons",
        "parent_is_killed",
        "foreground_notifies_systemd",
        "supervisor_is_killed",
        "unmounted_by_hand",
        "log_is_limited",
        "joins_nothing_else",
        "supervisor_is_small",
    ],
)
def test_scenario(scenario: str, tmp_path: Path) -> None:
    name, *arguments = scenario.split()
    command = ["unshare", "-m", "--propagation", "private", sys.executable, "-X", "dev"]
    done = subprocess.run(
        [*command, __file__, name, str(tmp_path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S + 10,
        env=os.environ | {"PYTHONPATH": str(TOP)},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout.splitlines()[-1:]


def test_without_the_interposer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NSFS_FUSE_FD", "NSFS_INFLIGHT_FD", "NSFS_SUPERVISOR_FD"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OSError, match="not started by nsfs-supervisor"):
        takeover.Device.from_environment()
    image = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(image, 1 << 20)
    with pytest.raises(OSError, match="LD_PRELOAD"):
        takeover.Device(-1, image, -1)
    os.close(image)


# --- what runs in the mount namespace ---


class Mounted:
    """A directory of one scenario, and the supervisor that serves DIRECTORY/mnt."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "mnt"
        self.run = directory / "run"
        self.state = directory / "state"
        for path in (self.root, self.state):
            path.mkdir()
        (self.state / "data").write_bytes(b"data\n")

    def command(self, *options: str) -> list[str]:
        directories = ["--dir", str(self.root), "--run-dir", str(self.run)]
        daemon = [sys.executable, str(TOP / "tests/fault/parked_fs.py"), str(self.state)]
        return [str(SUPERVISOR), *directories, *options, "--", *daemon]

    def start(self) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.command(), timeout=WAIT_S)

    def pid(self, name: str) -> int:
        return int((self.run / f"{name}.pid").read_text())

    def log(self) -> str:
        return (self.run / "log").read_text()

    def wait_for_daemon(self, number: int) -> None:
        until(lambda: f"(number {number}) is ready" in self.log())

    def kill_daemon(self) -> None:
        os.kill(self.pid("daemon"), signal.SIGKILL)

    def number(self) -> int:
        return int((self.root / "number").read_text())

    def replayed(self) -> list[int]:
        return [int(line) for line in (self.state / "replayed").read_text().split()]

    @contextmanager
    def memfd(self) -> Iterator[int]:
        fds = Path(f"/proc/{self.pid('supervisor')}/fd")
        fd = os.open(next(x for x in fds.iterdir() if "nsfs-inflight" in os.readlink(x)), os.O_RDWR)
        try:
            yield fd
        finally:
            os.close(fd)

    def parked(self) -> list[int]:
        """The uniques of the reads in flight; a moment longer than their callers wait."""
        with self.memfd() as fd:
            return [request.unique for request in takeover.in_flight(fd) if request.opcode == READ]

    @contextmanager
    def between_daemons(self) -> Iterator[int]:
        """The daemon was killed and the next is not started yet; the memfd."""
        supervisor, daemon = self.pid("supervisor"), self.pid("daemon")
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(daemon, signal.SIGKILL)
        until(lambda: state_of(daemon) == "Z")
        with self.memfd() as fd:
            yield fd
        os.kill(supervisor, signal.SIGCONT)

    def is_mounted(self) -> bool:
        return f" {self.root} " in Path("/proc/self/mountinfo").read_text()

    def abort(self) -> None:
        """End every request of our mount with an error, whatever state the daemon is in."""
        control = self.state / "fusectl"
        control.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if f" {self.root} " in line:
                minor = line.split()[2].split(":")[1]
                (control / minor / "abort").write_text("1")
        subprocess.run(["umount", control], check=True)

    def give_up(self) -> None:
        """Say where the main thread hangs, and end whatever it may be waiting for."""
        faulthandler.dump_traceback()
        self.clean_up()

    def clean_up(self) -> None:
        for name in ("supervisor", "daemon"):
            with suppress(FileNotFoundError, ProcessLookupError, ChildProcessError):
                pid = self.pid(name)
                os.kill(pid, signal.SIGKILL)
                # Ours, as the nearest subreaper.
                until(lambda pid=pid: os.waitpid(pid, os.WNOHANG)[0] == pid)  # type: ignore[misc]
        if self.is_mounted():
            self.abort()
            subprocess.run(["umount", "-l", self.root], check=True)


@contextmanager
def cleaned_up(directory: Path) -> Iterator[Mounted]:
    """A directory to serve, which is not served any more afterwards, whatever happens."""
    mounted = Mounted(directory)
    overdue = threading.Timer(DEADLINE_S, mounted.give_up)
    overdue.daemon = True
    overdue.start()
    try:
        yield mounted
    finally:
        overdue.cancel()
        if (mounted.run / "log").exists():
            print(mounted.log())
        mounted.clean_up()


@contextmanager
def served(directory: Path) -> Iterator[Mounted]:
    with cleaned_up(directory) as mounted:
        assert mounted.start().returncode == 0
        yield mounted


def until(condition: Callable[[], object], seconds: float = WAIT_S) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it does not become true"
        time.sleep(0.002)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


READ_MANY = """\
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>
static int fd;
static void *one(void *none)
{
	char buffer[64];
	(void)!pread(fd, buffer, sizeof(buffer), 0);
	return none;
}
int main(int argc, char **argv)
{
	pthread_attr_t small;
	pthread_t thread;
	fd = open(argv[1], O_RDONLY);
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, PTHREAD_STACK_MIN);
	for (int i = atoi(argv[2]); i-- > 0;)
		if (pthread_create(&thread, &small, one, NULL))
			return 1;
	pause();
	return argc;
}
"""
"""Many threads, each blocked in one read."""


@contextmanager
def readers(mounted: Mounted, count: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose `count` threads are parked."""
    program = mounted.state / "read-many"
    source = program.with_suffix(".c")
    source.write_text(READ_MANY)
    subprocess.run(["gcc", "-O1", "-pthread", "-o", program, source], check=True)
    with subprocess.Popen([program, mounted.root / "park", str(count)]) as process:
        try:
            until(lambda: len(mounted.parked()) == count, DEADLINE_S / 2)
            yield process
        finally:
            process.kill()


@contextmanager
def reader(mounted: Mounted) -> Iterator[subprocess.Popen[bytes]]:
    """A cat(1) that is parked."""
    before = len(mounted.parked())
    command = ["cat", str(mounted.root / "park")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            until(lambda: len(mounted.parked()) == before + 1)
            yield process
        finally:
            process.kill()


def released(mounted: Mounted, process: subprocess.Popen[bytes]) -> None:
    """The parked reader can still be answered."""
    (mounted.state / "release").touch()
    # More than one line: cat reads until the end, which is a file that is always "released".
    assert process.stdout
    assert process.stdout.readline() == b"released\n"
    process.kill()
    process.wait(WAIT_S)
    until(lambda: not mounted.parked())


def parked_readers_die_of_signals(directory: Path) -> None:
    with served(directory) as mounted:
        for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
            with reader(mounted) as process:
                began = time.monotonic()
                process.send_signal(number)
                process.wait(WAIT_S)
                print(f"gone {1000 * (time.monotonic() - began):.1f} ms after signal {number}")
                assert process.returncode == -number
        until(lambda: not mounted.parked())


def many_parked_readers(directory: Path) -> None:
    with served(directory) as mounted, readers(mounted, 300) as process:
        began = time.monotonic()
        for _ in range(100):
            os.stat(mounted.root / "data")
        print(f"stat beside 300 parked: {(time.monotonic() - began) * 10000:.0f} us")
        mounted.kill_daemon()
        began = time.monotonic()
        os.stat(mounted.root / "data")
        print(f"stat across a takeover: {time.monotonic() - began:.3f} s")
        until(lambda: len(mounted.parked()) == 300)
        began = time.monotonic()
        process.kill()
        process.wait(WAIT_S)
        print(f"300 gone {1000 * (time.monotonic() - began):.0f} ms after SIGKILL")
        until(lambda: not mounted.parked())


def more_readers_than_slots(directory: Path) -> None:
    """What is no read, like all that is needed to end them, still has slots."""
    with served(directory) as mounted:
        with readers(mounted, 15360) as process:
            for _ in range(2):
                park = os.open(mounted.root / "park", os.O_RDONLY)
                with pytest.raises(OSError, match="busy"):
                    os.read(park, 4096)
                os.close(park)
            os.mkdir(mounted.root / "made")
            process.kill()
            process.wait(WAIT_S)
        until(lambda: not mounted.parked(), DEADLINE_S / 2)
        with reader(mounted) as cat:
            released(mounted, cat)


def full_interrupt_pipe(directory: Path) -> None:
    """INTERRUPTs that do not fit into it are sent by the kernel again."""
    with cleaned_up(directory) as mounted:
        (mounted.state / "deaf").touch()
        assert mounted.start().returncode == 0
        pid = mounted.pid("daemon")
        with mounted.memfd() as memfd:
            (interrupt_fd,) = struct.unpack("=24xi", os.pread(memfd, 28, 0))
        pipe_fd = os.open(f"/proc/{pid}/fd/{interrupt_fd}", os.O_RDONLY | os.O_NONBLOCK)
        assert fcntl.fcntl(pipe_fd, fcntl.F_SETPIPE_SZ, 4096) == 4096
        os.close(pipe_fd)
        with readers(mounted, 600) as process:
            process.kill()
            time.sleep(0.2)
            assert len(mounted.parked()) == 600
            (mounted.state / "deaf").unlink()
            process.wait(WAIT_S)
        until(lambda: not mounted.parked())


WORK = """
import os, sys
root, state, name = sys.argv[1:]
fd = os.open(f"{root}/data", os.O_RDWR)
count = 0
while not os.path.exists(f"{state}/stop"):
    os.stat(f"{root}/data")
    assert os.pread(fd, 5, 0) == b"data\\n"
    assert os.pwrite(fd, b"data\\n", 0) == 5
    os.mkdir(f"{root}/{name}-{count}")
    assert os.path.isdir(f"{root}/{name}-{count}")
    with open(f"{root}/number") as number:
        assert int(number.read()) >= 1
    count += 1
print(count)
"""


def daemon_killed_in_a_loop(directory: Path) -> None:
    kills = int(os.environ.get("NSFS_KILLS", "20"))
    with served(directory) as mounted:
        workers = [
            subprocess.Popen(
                [sys.executable, "-S", "-c", WORK, mounted.root, mounted.state, f"w{k}"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for k in range(4)
        ]
        held_fd = os.open(mounted.root / "data", os.O_RDWR)
        for _ in range(kills):
            # While it starts, while it replays, while it serves.
            time.sleep(random.choice([random.uniform(0, 0.15), random.uniform(0, 1.3)]))
            pid = mounted.pid("daemon")
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: mounted.pid("daemon") != pid)  # type: ignore[misc]
        assert os.pread(held_fd, 5, 0) == b"data\n"
        os.close(held_fd)
        (mounted.state / "stop").touch()
        made = []
        for k, worker in enumerate(workers):
            output, _ = worker.communicate(timeout=WAIT_S)
            assert worker.returncode == 0, f"worker {k}"
            made += [f"w{k}-{i}" for i in range(int(output))]
        assert sorted(os.listdir(mounted.state / "dirs")) == sorted(made)
        # A line may be missing (killed before it was written); one too many is a mkdir done twice.
        journal = (mounted.state / "journal").read_text().split()
        assert len(set(journal)) == len(journal)
        until(lambda: not mounted.parked())
        print(f"{len(made)} rounds and {len(mounted.replayed())} replayed mkdir in {kills} kills")


def parked_reader_outlives_the_daemon(directory: Path) -> None:
    with served(directory) as mounted, reader(mounted) as process:
        for number in (2, 3):
            mounted.kill_daemon()
            mounted.wait_for_daemon(number)
            assert mounted.number() == number
        released(mounted, process)


def signal_is_not_lost_at_takeover(directory: Path) -> None:
    """The daemon is killed with the INTERRUPT unread, and with it read but not acted upon."""
    with served(directory) as mounted:
        with reader(mounted) as process:
            daemon = mounted.pid("daemon")
            os.kill(daemon, signal.SIGSTOP)
            process.kill()
            os.kill(daemon, signal.SIGKILL)
            process.wait(WAIT_S)
        (mounted.state / "deaf").touch()
        mounted.kill_daemon()
        mounted.wait_for_daemon(3)
        with reader(mounted) as process:
            process.kill()
            time.sleep(0.1)
            assert len(mounted.parked()) == 1
            (mounted.state / "deaf").unlink()
            mounted.kill_daemon()
            process.wait(WAIT_S)
        until(lambda: not mounted.parked())


def move_to_landing(memfd: int, keep: bool) -> None:
    """What is in slot 0 is in the landing then, and in the slot as well if `keep`."""
    (size,) = struct.unpack("=I", os.pread(memfd, 4, takeover._USED))
    assert size
    os.pwrite(memfd, os.pread(memfd, size, takeover._FIRST_SLOT), LANDING)
    if not keep:
        os.pwrite(memfd, bytes(4), takeover._USED)


def killed_before_the_request_was_recorded(directory: Path, keep: bool = False) -> None:
    with served(directory) as mounted, reader(mounted) as process:
        uniques = mounted.parked()
        with mounted.between_daemons() as memfd:
            move_to_landing(memfd, keep)
        assert mounted.number() == 2
        until(lambda: mounted.parked() == uniques == mounted.replayed())
        released(mounted, process)


def killed_while_the_request_was_recorded(directory: Path) -> None:
    killed_before_the_request_was_recorded(directory, keep=True)


def killed_after_the_reply(directory: Path) -> None:
    with served(directory) as mounted:
        os.mkdir(mounted.root / "d")
        with mounted.between_daemons() as memfd:
            size, opcode = struct.unpack("=II", os.pread(memfd, 8, takeover._FIRST_SLOT))
            assert opcode == MKDIR
            os.pwrite(memfd, struct.pack("=I", size), takeover._USED)
        assert mounted.number() == 2
        assert mounted.replayed() == []


def killed_with_what_needs_no_reply(directory: Path) -> None:
    with served(directory) as mounted, reader(mounted) as process:
        (unique,) = mounted.parked()
        for number, opcode in enumerate((FORGET, INTERRUPT), start=2):
            request = struct.pack("=IIQQIIIIQ", 48, opcode, unique | 1, 1, 0, 0, 0, 0, unique)
            with mounted.between_daemons() as memfd:
                os.pwrite(memfd, request, LANDING)
            assert mounted.number() == number
            until(lambda: mounted.parked() == [unique])
        released(mounted, process)


def killed_around_init(directory: Path, fault: str, unrecorded: str = "") -> None:
    """The first daemon dies before the kernel's INIT is read, or answered."""
    with cleaned_up(directory) as mounted:
        (mounted.state / "fault").write_text(fault.replace("_", " "))
        assert mounted.start().returncode == 0
        until(lambda: state_of(mounted.pid("daemon")) == "T")
        with mounted.between_daemons() as memfd:
            (size,) = struct.unpack("=28xI", os.pread(memfd, 32, 0))
            assert (size == 0) == (fault == "stop_before")
            if unrecorded:
                os.pwrite(memfd, os.pread(memfd, size, INIT), LANDING)
                os.pwrite(memfd, bytes(4), 28)
        assert mounted.number() == 2
        mounted.kill_daemon()
        assert mounted.number() == 3


def lookups_are_answered_again(directory: Path) -> None:
    """As long as what the answer depends on is there, and for a second."""

    def gone() -> bool:
        try:
            (mounted.root / "seen").stat()
        except FileNotFoundError:
            return True
        return False

    with served(directory) as mounted, subprocess.Popen(["sleep", "1000"]) as holder:
        seen, link = mounted.root / "seen", mounted.state / "link"
        (mounted.state / "holder").write_text(str(holder.pid))
        link.symlink_to("nowhere")
        began = time.monotonic()
        for _ in range(1000):
            found = seen.stat()
        lookups = found.st_size
        print(f"{lookups} lookups for 1000 stat")
        assert lookups <= 2 + (time.monotonic() - began)
        until(lambda: seen.stat().st_size > lookups)
        # What the daemon says has changed.
        for mode in (0o600, 0o640):
            seen.chmod(mode)
            assert seen.stat().st_mode & 0o777 == mode
        # What it depends on is gone, at that moment.
        for _ in range(20):
            link.rename(f"{link}.gone")
            assert gone()
            Path(f"{link}.gone").rename(link)
            assert not gone()
        # The next daemon knows nothing of that.
        mounted.kill_daemon()
        assert not gone()
        assert seen.stat().st_size <= 2 + (time.monotonic() - began)
        holder.kill()
        holder.wait()
        assert gone()


def large_requests(directory: Path) -> None:
    content = os.urandom(1 << 20)
    with served(directory) as mounted:
        with open(mounted.root / "data", "r+b", buffering=0) as file:
            for at in range(0, len(content), 200_000):
                piece = content[at : at + 200_000]
                assert os.pwrite(file.fileno(), piece, at) == len(piece)
            mounted.kill_daemon()
            assert os.pread(file.fileno(), len(content), 0) == content
        assert (mounted.state / "data").read_bytes() == content
        with suppress(OSError):
            os.setxattr(mounted.root / "data", "user.large", b"x" * 65536)
        assert mounted.number() == 2


def clean_end(directory: Path) -> None:
    other = directory / "other"
    other.mkdir()
    with cleaned_up(directory) as mounted:
        subprocess.run(["mount", "-t", "tmpfs", "none", other], check=True)
        supervisor = subprocess.Popen(mounted.command("--foreground", "--unmount", str(other)))
        until((mounted.run / "daemon.pid").exists)
        assert mounted.number() == 1
        daemon = mounted.pid("daemon")
        with reader(mounted) as process:
            supervisor.terminate()
            assert supervisor.wait(WAIT_S) == 0
            process.wait(WAIT_S)
        mounts = Path("/proc/self/mountinfo").read_text()
        assert str(mounted.root) not in mounts
        assert str(other) not in mounts
        assert not Path(f"/proc/{daemon}").exists()
        assert list(mounted.run.iterdir()) == []
        # All is free for the next one, but not for two.
        assert mounted.start().returncode == 0
        assert mounted.start().returncode == 1
        pid = mounted.pid("supervisor")
        os.kill(pid, signal.SIGINT)
        assert os.waitpid(pid, 0)[1] == 0
        assert not mounted.is_mounted()
        assert [path.name for path in mounted.run.iterdir()] == ["log"]


def stop_of_a_stuck_daemon(directory: Path) -> None:
    with cleaned_up(directory) as mounted:
        supervisor = subprocess.Popen(mounted.command("--foreground"))
        until((mounted.run / "daemon.pid").exists)
        assert mounted.number() == 1
        with reader(mounted) as process:
            os.kill(mounted.pid("daemon"), signal.SIGSTOP)
            supervisor.terminate()
            with pytest.raises(subprocess.TimeoutExpired):
                supervisor.wait(0.3)
            supervisor.terminate()
            assert supervisor.wait(WAIT_S) == 1
            process.wait(WAIT_S)
        assert not mounted.is_mounted()


def first_daemon_fails(directory: Path, fault: str, status: str) -> None:
    with cleaned_up(directory) as mounted:
        (mounted.state / "fault").write_text(fault.replace("_", " "))
        assert mounted.start().returncode == int(status)
        assert not mounted.is_mounted()
        assert [path.name for path in mounted.run.iterdir()] == ["log"]
        foreground = subprocess.run(mounted.command("--foreground"), timeout=WAIT_S)
        assert foreground.returncode == int(status)
        assert not mounted.is_mounted()


def back_off(directory: Path) -> None:
    with served(directory) as mounted:
        (mounted.state / "fault").write_text(f"later {signal.SIGABRT:d}")
        starts = mounted.state / "starts"
        mounted.kill_daemon()
        until(lambda: len(starts.read_text().split()) >= 11, 2 * WAIT_S)
        times = [float(line) for line in starts.read_text().split()]
        said = re.findall(r"the next one starts in (\d+) ms", (mounted.run / "log").read_text())
        wanted_ms = [0, 0, 0, 50, 100, 200, 400, 800, 1000, 1000]
        assert [int(each) for each in said[:10]] == wanted_ms
        for (before, after), wait_ms in zip(pairwise(times), wanted_ms, strict=False):
            assert after - before >= wait_ms / 1000
        (mounted.state / "fault").unlink()
        assert mounted.number() == len(times) + 1


def request_that_kills_daemons(directory: Path) -> None:
    """Who made it gets an error, and the others are served."""
    with served(directory) as mounted, reader(mounted) as process:
        made = subprocess.run(["mkdir", mounted.root / "abort"], timeout=WAIT_S)
        assert made.returncode == 1
        assert (mounted.root / "data").read_bytes()
        assert mounted.log().count("signal 6") == 3
        released(mounted, process)


def parent_is_killed(directory: Path) -> None:
    """Who waits for the mount gives up: there is none then."""
    with cleaned_up(directory) as mounted:
        (mounted.state / "fault").write_text(f"signal {signal.SIGSTOP:d}")
        parent = subprocess.Popen(mounted.command())
        until((mounted.run / "daemon.pid").exists)
        supervisor, daemon = mounted.pid("supervisor"), mounted.pid("daemon")
        until(lambda: state_of(daemon) == "T")
        parent.kill()
        parent.wait()
        until(lambda: "the parent is gone" in mounted.log())
        os.kill(daemon, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(supervisor, 0)[1]) in (0, 1)
        assert not mounted.is_mounted()


def supervisor_is_killed(directory: Path) -> None:
    """The daemon goes on serving."""
    with served(directory) as mounted, reader(mounted) as process:
        supervisor = mounted.pid("supervisor")
        os.kill(supervisor, signal.SIGKILL)
        os.waitpid(supervisor, 0)
        assert mounted.number() == 1
        (mounted.state / "release").touch()
        assert process.stdout
        assert process.stdout.readline() == b"released\n"


def unmounted_by_hand(directory: Path) -> None:
    """The daemon sees the end of the session, which is a clean end."""
    with cleaned_up(directory) as mounted:
        supervisor = subprocess.Popen(mounted.command("--foreground"))
        until((mounted.run / "daemon.pid").exists)
        assert mounted.number() == 1
        subprocess.run(["umount", mounted.root], check=True)
        assert supervisor.wait(WAIT_S) == 0


def log_is_limited(directory: Path) -> None:
    with served(directory) as mounted:
        (mounted.run / "log").write_bytes(b"x" * 1100000)
        mounted.kill_daemon()
        mounted.wait_for_daemon(2)
        assert len(mounted.log()) < 1000
        assert (mounted.run / "log.old").stat().st_size >= 1100000


def foreground_notifies_systemd(directory: Path) -> None:
    abstract = f"\0nsfs-test-{os.getpid()}"
    with cleaned_up(directory) as mounted:
        for number, address in enumerate([abstract, str(directory / "notify")]):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
                heard.bind(address)
                heard.settimeout(WAIT_S)
                environment = os.environ | {"NOTIFY_SOCKET": address.replace("\0", "@")}
                supervisor = subprocess.Popen(mounted.command("--foreground"), env=environment)
                assert heard.recv(100) == b"READY=1"
                assert mounted.number() == 1
                mounted.kill_daemon()
                assert mounted.number() == 2
                supervisor.send_signal(signal.SIGINT if number else signal.SIGTERM)
                assert heard.recv(100) == b"STOPPING=1"
                assert supervisor.wait(WAIT_S) == 0


def joins_nothing_else(directory: Path) -> None:
    """Wrong arguments and a cgroup that is not there are errors before anything is mounted."""
    with cleaned_up(directory) as mounted:
        for options in (["--cgroup", str(directory)], ["--unmount", "relative"], ["--bogus"]):
            assert subprocess.run(mounted.command(*options), timeout=WAIT_S).returncode in (1, 2)
            assert not mounted.is_mounted()
        # A descriptor of the caller reaches neither the supervisor nor the daemon.
        stray_fd = os.open(directory, os.O_RDONLY)
        subprocess.run(mounted.command(), pass_fds=[stray_fd], check=True, timeout=WAIT_S)
        os.close(stray_fd)
        for name in ("supervisor", "daemon"):
            fds = Path(f"/proc/{mounted.pid(name)}/fd")
            assert str(directory) not in [os.readlink(fd) for fd in fds.iterdir()]
            assert os.readlink(f"/proc/{mounted.pid(name)}/cwd") == "/"


def supervisor_is_small(directory: Path) -> None:
    with served(directory) as mounted:
        rollup = Path(f"/proc/{mounted.pid('supervisor')}/smaps_rollup").read_text()
        (pss,) = (line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:"))
        print(f"PSS {pss} kB")
        assert int(pss) < 2048


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
