"""kill -9 of the daemon at any moment, of the spawner, and the orderly ways to end an instance.

Nothing happens to any container, and nobody who uses the tree sees an error: requests wait and are
answered by the next daemon.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nsfs.processes import process_lives, start_time
from tests.integration.conftest import (
    DEADLINE_S,
    Container,
    Instance,
    readable,
    serving,
    wait_until,
)

SEED = int(os.environ.get("NSFS_TEST_SEED", random.SystemRandom().randrange(1 << 32)))


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """One instance for the module."""
    with serving(tmp_path_factory.mktemp("restart")) as found:
        yield found


@pytest.fixture
def tree(instance: Instance) -> Iterator[Path]:
    """The mount point; afterwards nothing is in it."""
    yield instance.tree
    for path in instance.tree.iterdir():
        if (path / "exec").exists():
            subprocess.run(["rm", "-rf", path], check=False, timeout=DEADLINE_S)
    instance.settled()


@pytest.fixture
def web(tree: Path) -> Container:
    """A container called web."""
    (tree / "web").mkdir()
    return Container(tree / "web")


def facts(container: Container) -> dict[str, object]:
    """All that must not change."""
    found: dict[str, object] = {
        "inode": os.stat(container.path).st_ino,
        "state": container.read("state"),
        "init": container.init,
        "names": sorted(os.listdir(container.path)),
        "procs": sorted(os.listdir(container / "procs")),
        "kmsg": container.read("kmsg"),
        "output": container.read("output"),
        "owner": (os.stat(container.path).st_uid, os.stat(container.path).st_mode),
    }
    for name in ("rootfs", "idmap", "unshare", "binds", "namespaces", "defaults/limits", "freeze"):
        found[name] = container.read(name)
        found[f"inode of {name}"] = os.stat(container / name).st_ino
    return found


# --- what is there stays there ---


def test_nothing_of_a_container_changes(instance: Instance, tree: Path, web: Container) -> None:
    os.makedirs(web / "db" / "deep")
    os.mkdir(tree / "other")
    db, other = Container(web / "db"), Container(tree / "other")
    db.start("sleep", "1000")
    other.start("sleep", "1000")
    web.run("for i in 1 2 3; do echo line $i > /dev/kmsg; done")
    web.write("defaults/limits", "pids.max 100")
    os.chown(other.path, 1000, 1000)
    os.chmod(other.path, 0o700)
    os.rename(other.path, tree / "renamed")
    other = Container(tree / "renamed")
    other.write("freeze", "1")
    wait_until(lambda: other.state()["frozen"] == "1", "frozen")
    wait_until(lambda: web.state()["procs"] == "1", "only the sleep is left")
    everything = [web, db, Container(web / "db" / "deep"), other]
    before = [facts(each) for each in everything]
    for _ in range(3):
        instance.kill_daemon()
        assert [facts(each) for each in everything] == before
    assert web.run("echo still here") == "still here\n"
    web.run("echo line 4 > /dev/kmsg")
    sequence = [int(line.split(",")[1]) for line in web.read("kmsg").splitlines()]
    assert sequence == list(range(sequence[0], sequence[0] + 4))
    other.write("freeze", "0")
    assert other.run("echo thawed") == "thawed\n"
    os.mkdir(web / "db" / "new")
    assert Container(web / "db" / "new").run("hostname") == "new\n"


def test_a_text_reader_goes_on_in_the_middle_of_a_line(instance: Instance, web: Container) -> None:
    web.run("for i in 1 2 3 4 5; do echo this is line $i > /dev/kmsg; done")
    whole = (web / "kmsg").read_bytes()
    fd = os.open(web / "kmsg", os.O_RDONLY)
    try:
        parts = b""
        while len(parts) < len(whole):
            parts += os.read(fd, 17)
            if len(parts) % 3 == 0:
                instance.kill_daemon()
        assert parts == whole
        assert os.read(fd, 100) == b""
        web.run("echo this is line 6 > /dev/kmsg")
        assert b"line 6" in os.read(fd, 100)
    finally:
        os.close(fd)


def test_blocked_readers_stay_blocked_and_are_woken(instance: Instance, web: Container) -> None:
    web.run("echo one > /dev/kmsg")
    web.start("sh", "-c", "cat /dev/kmsg")
    wait_until(lambda: ";one" in web.read("output"), "it reads")
    pids = sorted(os.listdir(web / "procs"))
    for number in range(3):
        instance.kill_daemon()
        web.run(f"echo after{number} > /dev/kmsg")
        wait_until(lambda n=number: f";after{n}" in web.read("output"), "the reader was woken")
    text = web.read("output")
    for word in (";one", ";after0", ";after1", ";after2"):
        assert text.count(word) == 1
    assert "error" not in text.lower()
    assert sorted(os.listdir(web / "procs")) == pids
    instance.kill_daemon()
    os.kill(int(pids[-1]), signal.SIGINT)
    wait_until(lambda: len(os.listdir(web / "procs")) < len(pids), "a signal still ends it")


def test_one_that_does_not_block_does_not_block_afterwards(
    instance: Instance, web: Container
) -> None:
    web.start(
        "sh",
        "-c",
        "exec 3</dev/kmsg; dd if=/dev/kmsg iflag=nonblock bs=8192 of=/dev/null 2>/dev/null; "
        'exec /usr/bin/perl -e \'$|=1; use Fcntl; sysopen(F, "/dev/kmsg", O_RDONLY|O_NONBLOCK) or die; '
        'while (1) { my $n = sysread(F, my $b, 8192); print defined $n ? "got $n\n" : "$!\n"; '
        'last if -e "/tmp/stop"; select(undef, undef, undef, 0.1) }\'',
    )
    wait_until(lambda: "temporarily unavailable" in web.read("output"), "it finds nothing")
    instance.kill_daemon()
    count = web.read("output").count("unavailable")
    wait_until(lambda: web.read("output").count("unavailable") > count + 2, "nor afterwards")
    web.run("echo news > /dev/kmsg; sleep 0.3; touch /tmp/stop")
    wait_until(lambda: "got " in web.read("output"), "but then it does")


def test_state_polled_across(instance: Instance, web: Container) -> None:
    fd = os.open(web / "state", os.O_RDONLY)
    try:
        assert b"populated 0" in os.read(fd, 4096)
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        instance.kill_daemon()
        web.start("sleep", "1000")
        wait_until(lambda: b"populated 1" in os.pread(fd, 4096, 0), "it is read anew")
        web.write("kill", "1")
        assert poll.poll(10_000)
        wait_until(lambda: b"populated 0" in os.pread(fd, 4096, 0), "it has ended")
    finally:
        os.close(fd)


def test_a_change_that_no_daemon_saw_is_told(instance: Instance, web: Container) -> None:
    web.start("sleep", "1000")
    fd = os.open(web / "state", os.O_RDONLY)
    supervisor = int((instance.run_dir / "supervisor.pid").read_text())
    try:
        wait_until(lambda: b"populated 1" in os.pread(fd, 4096, 0), "it sleeps")
        (member,) = os.listdir(web / "procs")
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        poll.poll(0)
        os.kill(supervisor, signal.SIGSTOP)
        os.kill(instance.daemon(), signal.SIGKILL)
        os.kill(int(member), signal.SIGKILL)
        os.kill(supervisor, signal.SIGCONT)
        assert poll.poll(10_000)
        wait_until(lambda: b"populated 0" in os.pread(fd, 4096, 0), "it has ended")
    finally:
        os.kill(supervisor, signal.SIGCONT)
        os.close(fd)


def test_kmsg_polled_across(instance: Instance, web: Container) -> None:
    fd = os.open(web / "kmsg", os.O_RDONLY)
    try:
        assert os.read(fd, 4096) == b""
        assert not readable(fd, 0.05)
        got: list[bool] = []
        waiter = threading.Thread(target=lambda: got.append(readable(fd, 15)))
        waiter.start()
        time.sleep(0.1)
        instance.kill_daemon()
        web.run("echo news > /dev/kmsg")
        waiter.join()
        # Whom the old daemon would have told is told by the new one.
        assert got == [True]
        assert b";news" in os.read(fd, 4096)
    finally:
        os.close(fd)


def test_a_directory_stream_goes_on(instance: Instance, tree: Path) -> None:
    # So many that the C library has to ask more than once.
    names = {
        f"a-container-with-a-rather-long-name-that-fills-the-buffer-{n:04}" for n in range(250)
    }
    for name in names:
        os.mkdir(tree / name)
    seen: list[str] = []
    with os.scandir(tree) as stream:
        for entry in stream:
            seen.append(entry.name)
            if len(seen) in (40, 150):
                instance.kill_daemon()
    assert len(seen) == len(set(seen))
    assert names <= set(seen)
    subprocess.run(f"rm -rf {tree}/a-container*", shell=True, check=True, timeout=2 * DEADLINE_S)


def test_values_open_inside_can_be_read_on(instance: Instance, web: Container) -> None:
    names = ("rootfs", "unshare", "binds", "freeze", "state", "namespaces", "defaults/limits")
    opens = "; ".join(f"exec {n}</sys/namespaces/{name}" for n, name in enumerate(names, 3))
    reads = "; ".join(f"cat <&{n} || echo FAILED" for n in range(3, 3 + len(names)))
    waits = "while [ ! -e /tmp/go ]; do sleep 0.05; done"
    web.start("sh", "-c", f"{opens}; echo open; {waits}; {reads}; echo end")
    wait_until(lambda: "open\n" in web.read("output"), "they are open")
    instance.kill_daemon()
    web.start("touch", "/tmp/go")
    wait_until(lambda: web.read("output").endswith("end\n"), "they are read")
    assert "FAILED" not in web.read("output")
    assert "denied" not in web.read("output")
    assert "host\n" in web.read("output")


def test_what_a_member_has_open_is_still_the_members(
    instance: Instance, web: Container, tmp_path: Path
) -> None:
    """A path written after a restart is not the host's because the opener was forgotten."""
    (tmp_path / "key").write_text("secret")
    os.chmod(tmp_path, 0o755)
    web.start(
        "sh",
        "-c",
        f"mkdir /sys/namespaces/db; exec 3>/sys/namespaces/db/binds; echo open; "
        f"while [ ! -e /tmp/go ]; do sleep 0.05; done; echo '/mnt {tmp_path} ro' >&3; echo end",
    )
    wait_until(lambda: "open\n" in web.read("output"), "it is open")
    instance.kill_daemon()
    web.start("touch", "/tmp/go")
    wait_until(lambda: web.read("output").endswith("end\n"), "it is written")
    assert "secret" not in Container(web / "db").run_code("cat /mnt/key")[1]


def test_readers_see_no_error(instance: Instance, tree: Path, web: Container) -> None:
    os.mkdir(web / "db")
    errors: list[str] = []
    rounds = [0] * 4
    stop = threading.Event()

    def read(index: int) -> None:
        while not stop.is_set():
            try:
                for path in (web.path, web / "db"):
                    for name in ("state", "kmsg", "init", "namespaces", "stat", "unshare"):
                        (path / name).read_text()
                    os.listdir(path / "procs")
                    os.stat(path / "exec")
                    os.readlink(path / "nsproxy" / "net")
                assert {"web", "procs"} <= set(os.listdir(tree))
            except Exception as error:
                errors.append(repr(error))
                return
            rounds[index] += 1

    readers = [threading.Thread(target=read, args=(n,)) for n in range(len(rounds))]
    for each in readers:
        each.start()
    try:
        for _ in range(6):
            time.sleep(0.1)
            instance.kill_daemon()
        before = list(rounds)
        wait_until(lambda: errors or all(a > b for a, b in zip(rounds, before, strict=True)), "on")
    finally:
        stop.set()
        for each in readers:
            each.join()
    assert not errors


# --- in the middle of something ---


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out


def begin(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def works(container: Container) -> None:
    """It is whole: an init in its group, and commands start."""
    assert container.run("echo works") == "works\n"
    assert "nsfs-init" in Path(f"/proc/{container.init}/comm").read_text()


@pytest.mark.parametrize("turn", range(2))
def test_killed_at_random(turn: int, instance: Instance, tree: Path) -> None:
    """Ten kills in each turn, each a moment after something has begun."""
    chance = random.Random(SEED + turn)
    one, two = tree / "one", tree / "two"

    def killing(*words: object, most_s: float) -> tuple[int, str]:
        process = begin(*words)
        time.sleep(chance.random() * most_s)
        instance.kill_daemon()
        return end_of(process)

    about = f"NSFS_TEST_SEED={SEED}"
    assert killing("mkdir", one, most_s=0.02) == (0, ""), about
    works(Container(one))
    assert killing("mkdir", one / "in", one / "in" / "deep", most_s=0.03) == (0, ""), about
    works(Container(one / "in" / "deep"))
    assert killing("mv", "-T", one, two, most_s=0.01) == (0, ""), about
    assert not one.exists()
    assert killing("mv", "-T", two / "in", two / "out", most_s=0.01) == (0, ""), about
    deep = Container(two / "out" / "deep")
    works(deep)
    wait_until(lambda: deep.state()["populated"] == "0", "it is idle")
    # Where cgroups are mounted with `nsdelegate` the cgroup namespace has to be its own.
    value = "cgroup " + chance.choice(["ipc mnt net pid user uts", "mnt pid time user uts"])
    wrote = killing("sh", "-c", f"echo {value} > {deep / 'unshare'}", most_s=0.03)
    assert wrote == (0, ""), about
    assert deep.read("unshare").split() == value.split()
    works(deep)
    wrote = killing("sh", "-c", f"echo sleep 1000 > {deep / 'exec'}", most_s=0.01)
    assert wrote[0] == 0, about
    assert killing("rmdir", two / "out", most_s=0.01)[0] == 1, about
    wait_until(lambda: deep.state()["populated"] == "1", "it sleeps")
    assert killing("cat", two / "state", most_s=0.005)[0] == 0, about
    words = chance.choice([("rm", "-rf"), ("busybox", "rm", "-rf"), ("find", "-delete")])
    words = ("find", two, "-delete") if words[0] == "find" else (*words, two)
    assert killing(*words, most_s=0.05) == (0, ""), about
    assert not two.exists()
    instance.settled()


def test_killed_twice_in_one_mkdir(instance: Instance, tree: Path) -> None:
    process = begin("mkdir", tree / "one")
    for _ in range(3):
        instance.kill_daemon()
    assert end_of(process) == (0, "")
    works(Container(tree / "one"))
    assert len(instance.groups()) == 1


KILLS = 12


def test_killed_while_many_are_made_and_removed(instance: Instance, tree: Path) -> None:
    script = 'for i in 1 2 3 4 5 6 7 8; do mkdir "$0-$i" && rmdir "$0-$i" || exit 1; done'
    makers = [begin("sh", "-c", script, tree / name) for name in "abcd"]
    for number in range(KILLS):
        # At another moment of its life each time; where the machine is busy, most do not get far.
        time.sleep(0.15 + number * 0.02)
        with contextlib.suppress(ProcessLookupError):
            instance.kill_daemon()
    assert [end_of(each) for each in makers] == [(0, "")] * 4
    instance.settled()


def test_an_init_that_ends_while_no_daemon_is_there(instance: Instance, web: Container) -> None:
    init, old = web.init, instance.daemon()
    supervisor = int((instance.run_dir / "supervisor.pid").read_text())
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(old, signal.SIGKILL)
        os.kill(init, signal.SIGKILL)
        time.sleep(0.1)
    finally:
        os.kill(supervisor, signal.SIGCONT)
    wait_until(lambda: instance.daemon() != old, "there is another daemon")

    def dead() -> bool:
        try:
            (web / "init").read_text()
        except OSError as error:
            return error.errno == errno.ENODEV
        return False

    wait_until(dead, "it is seen that it has ended")
    assert web.state()["populated"] == "0"
    os.rmdir(web.path)


@contextlib.contextmanager
def without_a_daemon(instance: Instance) -> Iterator[Path]:
    """The daemon has died, the next one comes afterwards; where the records are."""
    old = instance.daemon()
    process = old, start_time(old)
    supervisor = int((instance.run_dir / "supervisor.pid").read_text())
    os.kill(supervisor, signal.SIGSTOP)
    try:
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: not process_lives(process), "it has died")
        yield instance.run_dir / "c"
    finally:
        os.kill(supervisor, signal.SIGCONT)
    wait_until(lambda: instance.daemon() != old, "there is another daemon")


def record_of(records: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The file of a container's record, and what is in it."""
    for path in records.glob("*.json"):
        record: dict[str, Any] = json.loads(path.read_text())
        if record["name"] == name:
            return path, record
    raise AssertionError(name)


def test_killed_before_the_log_of_a_pod_is_handed_over(
    instance: Instance, tree: Path, web: Container
) -> None:
    """Its heir is recorded, and its log was not moved yet."""
    (tree / "db").mkdir()
    db = Container(tree / "db")
    db.write("namespaces", "syslog ../web")
    web.run("echo from web > /dev/kmsg")
    with without_a_daemon(instance) as records:
        number = int(record_of(records, "web")[0].stem)
        path, record = record_of(records, "db")
        assert record["build"]["shared"] == [["syslog", number]]
        record["build"]["shared"] = []
        record["inherited_log"] = record["log_from"] = number
        path.write_text(json.dumps(record))
    assert "from web" in db.read("kmsg")
    assert "from web" not in web.read("kmsg")
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=30)
    instance.kill_daemon()
    assert "from web" in db.read("kmsg")


def test_killed_before_the_namespaces_of_a_pod_are_handed_over(
    instance: Instance, tree: Path, web: Container
) -> None:
    """The holder is recorded as dead, and no heir."""
    (tree / "db").mkdir()
    db = Container(tree / "db")
    db.write("namespaces", "net ../web")
    assert "net ../web" in re.sub(r" \d+ ", " ", db.read("namespaces"))
    init = web.init
    with without_a_daemon(instance) as records:
        os.kill(init, signal.SIGKILL)
        path, record = record_of(records, "web")
        record["phase"] = "dead"
        path.write_text(json.dumps(record))
    assert "net own" in re.sub(r" \d+ ", " ", db.read("namespaces"))
    db.write("net/lo/mtu", "1234")
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=30)
    assert db.read("net/lo/mtu") == "1234\n"


# --- the others ---


def children_of(pid: int, name: str) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().strip() == name:
            found.append(int(child))
    return found


def test_the_spawner_is_killed(tmp_path: Path) -> None:
    instance = Instance(tmp_path)
    instance.mount()
    try:
        os.mkdir(instance.tree / "web")
        web = Container(instance.tree / "web")
        for turn in range(3):
            (spawner,) = wait_until(
                lambda: children_of(instance.daemon(), "nsfs-spawner"), "there is a spawner"
            )
            process = begin("mkdir", instance.tree / f"c{turn}")
            time.sleep(0.002 * turn)
            os.kill(spawner, signal.SIGKILL)
            code, out = end_of(process)
            # Made, or refused and nothing of it there; afterwards it goes on.
            assert (code == 0) == (instance.tree / f"c{turn}").exists(), out

            def again(name: str = f"d{turn}") -> bool:
                with contextlib.suppress(OSError):
                    os.mkdir(instance.tree / name)
                    return True
                return False

            wait_until(again, "containers can be made again")
            works(Container(instance.tree / f"d{turn}"))
            works(web)
    finally:
        instance.umount()
    assert not instance.groups()


def mounted(path: Path) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(path) for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["supervisor", "daemon"])
def test_a_signal_ends_everything(whom: str, number: signal.Signals, tmp_path: Path) -> None:
    instance = Instance(tmp_path)
    instance.mount()
    os.mkdir(instance.tree / "web")
    web = Container(instance.tree / "web")
    os.mkdir(web / "db")
    Container(web / "db").start("sh", "-c", "trap '' TERM; while :; do sleep 0.01; done")
    supervisor = int((instance.run_dir / "supervisor.pid").read_text())
    init, daemon = web.init, instance.daemon()
    os.kill(supervisor if whom == "supervisor" else daemon, number)
    for pid in (supervisor, daemon, init):
        wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), f"{pid} has ended")
    assert not mounted(instance.tree)
    wait_until(lambda: not instance.groups(), "the groups are gone")
    errors = [x for x in instance.log().splitlines() if " ERROR " in x or " WARNING " in x]
    assert not errors
    # The run directory can be used again.
    instance.mount()
    assert not (instance.tree / "web").exists()
    instance.umount()


def test_umount_is_refused_while_there_are_containers(tmp_path: Path) -> None:
    with serving(tmp_path) as instance:
        os.mkdir(instance.tree / "web")
        done = instance.command("umount", str(instance.tree), check=False)
        assert done.returncode != 0
        assert "container" in done.stderr
        works(Container(instance.tree / "web"))
        os.rmdir(instance.tree / "web")
        # At once after a kill as well: it waits for the next daemon.
        os.kill(instance.daemon(), signal.SIGKILL)
        assert instance.command("umount", str(instance.tree), check=False).returncode == 0
        assert not mounted(instance.tree)
        instance.mount()
