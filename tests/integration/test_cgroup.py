"""`cgroup/`: limits hold and are read as written, on whichever hierarchies the host has; what they
stop is told; `stat` agrees with the kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nsfs import limits
from nsfs.cgroup import Group, Hierarchies

from .conftest import DEADLINE_S, NSFS, Container, Instance, group_of, refused, serving, wait_until

HIERARCHIES = Hierarchies.detect()
HOG = "head -c 100000000 /dev/zero | tail -c 90000000 > /dev/null"
"""Wants 90 MB of memory."""
BOMB = """
import os, time
for i in range({count}):
    try:
        if not os.fork():
            time.sleep(1000)
            os._exit(0)
    except BlockingIOError:
        print("stopped at", i, flush=True)
        break
time.sleep({sleep})
"""
"""Forks as long as it can, but not longer than that."""


def by_v1(name: str) -> bool:
    """Whether a v1 controller has it here."""
    return name.partition(".")[0] not in HIERARCHIES.controllers


def keyed(text: str) -> dict[str, int]:
    """Flat-keyed numbers."""
    return {key: int(value) for key, value in (line.split() for line in text.splitlines())}


def directory_of(container: Container) -> str:
    """The container's group in the cgroup2 hierarchy."""
    return f"{HIERARCHIES.v2}{group_of(container.init).removesuffix('/init')}"


def v1_of(container: Container, controller: str) -> str:
    """The container's group in a v1 hierarchy."""
    for line in Path(f"/proc/{container.init}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return f"{HIERARCHIES.v1[controller]}{path}"
    raise AssertionError(controller)


def kernels(container: Container, name: str, v1_name: str) -> str:
    """What the kernel's own file says."""
    controller = name.partition(".")[0].replace("io", "blkio")
    if by_v1(name):
        return Path(v1_of(container, controller), v1_name).read_text().strip()
    return Path(directory_of(container), name).read_text().strip()


def nested(container: Container, *names: str) -> list[Container]:
    """Containers in it."""
    for name in names:
        os.mkdir(container / name)
    return [Container(container / name) for name in names]


def device_of(path: Path) -> str:
    """The number of the disk that a file is on; "" when it is on none."""
    number = path.stat().st_dev
    found = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not found.exists():
        return ""
    whole = found.resolve().parent if (found / "partition").exists() else found
    return (whole / "dev").read_text().strip()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk, to which all can write."""
    place = next(path for path in (tmp_path, Path("/var/tmp"), Path("/root")) if device_of(path))
    found = place / f"nsfs-test-{os.getpid()}"
    found.mkdir()
    found.chmod(0o777)
    yield found
    subprocess.run(["rm", "-rf", str(found)], check=True)


def disk() -> str:
    """The number of a disk, MAJOR:MINOR."""
    for each in sorted(Path("/sys/block").iterdir()):
        if (each / "device").exists() and int((each / "size").read_text()):
            return (each / "dev").read_text().strip()
    raise AssertionError("no disk")


@contextlib.contextmanager
def told(path: Path) -> Iterator[Callable[[], bool]]:
    """Call it once something has happened: whether poll(2) of a file, read now, tells of it.

    The kernel is asked to tell from the beginning.
    """
    fd = os.open(path, os.O_RDONLY)
    found: list[list[tuple[int, int]]] = []
    try:
        os.read(fd, 4096)
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        assert not poll.poll(0)
        thread = threading.Thread(target=lambda: found.append(poll.poll(20_000)))
        thread.start()

        def woken() -> bool:
            thread.join(25)
            return bool(found and found[0] and found[0][0][1] & select.POLLPRI)

        yield woken
        thread.join(25)
    finally:
        os.close(fd)


def eventfds(instance: Instance) -> int:
    """How many groups tell the daemon of OOMs."""
    directory = f"/proc/{instance.daemon()}/fd"
    found = 0
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            found += "eventfd" in os.readlink(f"{directory}/{name}")
    return found


# --- what is there ---


def test_each_file_is_read_or_no_controller_has_it(instance: Instance, web: Container) -> None:
    for directory in (web.path, instance.tree):
        names = os.listdir(directory / "cgroup")
        assert {"cpu.stat", "io.stat", "memory.stat"} <= set(names)
        for name in names:
            try:
                (directory / "cgroup" / name).read_text()
            except OSError as error:
                assert error.errno == errno.EOPNOTSUPP, name
    here = os.listdir(web / "cgroup")
    assert set(limits.NAMES) <= set(here)
    assert not set(limits.NAMES) & set(os.listdir(instance.tree / "cgroup"))
    for name in here:
        # As the inner face has it: no name is writable there.
        code, out = web.run_code(f"echo 100 > /sys/namespaces/cgroup/{name}")
        assert code != 0, out
        assert "Permission denied" in out or "Invalid argument" in out, out


@pytest.mark.parametrize(
    ("name", "written", "read"),
    [
        ("cpu.max", "max", "max 100000"),
        ("cpu.max", "50000 200000", "50000 200000"),
        ("cpu.max", "30000", "30000 100000"),
        ("cpu.weight", "1", "1"),
        ("cpu.weight", "77", "77"),
        ("cpu.weight", "10000", "10000"),
        ("io.weight", "default 777", "default 777"),
        ("io.weight", "50", "default 50"),
        ("memory.high", "64M", str(64 << 20)),
        ("memory.low", "1G", str(1 << 30)),
        ("memory.max", "64M", str(64 << 20)),
        ("memory.max", "100000001", "100000001"),
        ("memory.max", "max", "max"),
        ("memory.swap.max", "1000001", "1000001"),
        ("memory.swap.max", "0", "0"),
        ("pids.max", "50", "50"),
        ("pids.max", "max", "max"),
    ],
)
def test_what_is_read_is_what_was_written(
    web: Container, name: str, written: str, read: str
) -> None:
    path = f"cgroup/{name}"
    try:
        web.write(path, written)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        refused(errno.EOPNOTSUPP, web.read, path)
        return
    assert web.read(path) == f"{read}\n"
    assert web.run(f"cat /sys/namespaces/{path}") == f"{read}\n"
    web.write(path, read)
    assert web.read(path) == f"{read}\n"


def test_the_kernel_has_it(web: Container) -> None:
    web.write("cgroup/pids.max", "123")
    assert kernels(web, "pids.max", "pids.max") == "123"
    web.write("cgroup/memory.max", "64M")
    assert kernels(web, "memory.max", "memory.limit_in_bytes") == str(64 << 20)
    web.write("cgroup/cpu.weight", "200")
    assert kernels(web, "cpu.weight", "cpu.shares") == ("2048" if by_v1("cpu.weight") else "200")
    web.write("cgroup/cpu.max", "20000 50000")
    has = kernels(web, "cpu.max", "cpu.cfs_quota_us")
    assert has == ("20000" if by_v1("cpu.max") else "20000 50000")
    web.write("cgroup/memory.swap.max", "16M")
    if by_v1("memory.swap.max"):
        both = "memory.memsw.limit_in_bytes"
        assert kernels(web, "memory.swap.max", both) == str(80 << 20)
        web.write("cgroup/memory.max", "32M")
        assert kernels(web, "memory.swap.max", both) == str(48 << 20)
        assert web.read("cgroup/memory.swap.max") == f"{16 << 20}\n"


def test_a_limit_of_a_disk(web: Container) -> None:
    device = disk()
    web.write("cgroup/io.max", f"{device} rbps=10M wiops=1000")
    assert web.read("cgroup/io.max") == f"{device} rbps={10 << 20} wbps=max riops=max wiops=1000\n"
    web.write("cgroup/io.max", f"{device} wbps=20M")
    line = f"{device} rbps={10 << 20} wbps={20 << 20} riops=max wiops=1000\n"
    assert web.read("cgroup/io.max") == line
    assert str(20 << 20) in kernels(web, "io.max", "blkio.throttle.write_bps_device")
    web.write("rootfs", "host")
    web.write("unshare", "cgroup ipc mnt net pid user uts syslog")
    assert web.read("cgroup/io.max") == line
    web.write("cgroup/io.max", f"{device} rbps=max wbps=max wiops=max")
    assert web.read("cgroup/io.max") == ""
    for value, number in (
        ("999:999 rbps=1", errno.ENODEV),
        (f"{device} rbps=0", errno.ERANGE),
        (f"{device} speed=1", errno.EINVAL),
        (device, errno.EINVAL),
        (f"{device} rbps=5M\n999:999 rbps=1", errno.ENODEV),
    ):
        refused(number, web.write, "cgroup/io.max", value)
    assert web.read("cgroup/io.max") == ""


@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("pids.max", "many", errno.EINVAL),
        ("pids.max", "", errno.EINVAL),
        ("pids.max", "1 2", errno.EINVAL),
        ("pids.max", "0", errno.ERANGE),
        ("pids.max", "-1", errno.ERANGE),
        ("pids.max", "99999999", errno.ERANGE),
        ("memory.max", "-1", errno.ERANGE),
        ("memory.max", "64X", errno.EINVAL),
        ("cpu.max", "5", errno.ERANGE),
        ("cpu.max", "50000 5", errno.ERANGE),
        ("cpu.max", "a b c", errno.EINVAL),
        ("cpu.weight", "0", errno.ERANGE),
        ("cpu.weight", "max", errno.EINVAL),
    ],
)
def test_what_cannot_be_changes_nothing(web: Container, name: str, value: str, number: int) -> None:
    before = web.read(f"cgroup/{name}")
    refused(number, web.write, f"cgroup/{name}", value)
    assert web.read(f"cgroup/{name}") == before
    assert f"reason {name}: " in web.read("state")


def test_a_dead_container_has_none(web: Container) -> None:
    fd = os.open(web / "cgroup/pids.max", os.O_RDWR)
    os.kill(web.init, 9)
    wait_until(lambda: not Path(web / "cgroup/pids.max").exists(), "it is dead")
    refused(errno.ENODEV, os.write, fd, b"5")
    refused(errno.ENODEV, os.read, fd, 100)
    os.close(fd)
    assert "oom_kill 0" in web.read("state")


# --- what holds ---


def test_a_fork_bomb_stays_within(web: Container) -> None:
    web.write("cgroup/pids.max", "50")
    (db,) = nested(web, "db")
    assert db.read("cgroup/pids.max") == "4096\n"
    before = keyed(web.read("cgroup/pids.events"))["max"]
    with contextlib.ExitStack() as stack:
        # v1 does not tell.
        waits = not by_v1("pids.max")
        woken = stack.enter_context(told(web / "cgroup/pids.events")) if waits else None
        web.start("python3", "-c", BOMB.format(count=30, sleep=1000))
        db.start("python3", "-c", BOMB.format(count=100, sleep=1000))
        wait_until(lambda: "stopped" in db.read("output"), "the bomb is stopped")
        assert woken is None or woken()
    assert keyed(web.read("cgroup/pids.events"))["max"] > before
    # Inits count.
    assert int(web.read("cgroup/pids.current")) <= 50
    assert 30 < int(web.state()["procs"]) < 50
    assert int(web.read("cgroup/pids.current")) == int(kernels(web, "pids.current", "pids.current"))


def test_memory_of_nested_ones_together(web: Container) -> None:
    web.write("cgroup/memory.max", "64M")
    alone = int(web.read("cgroup/pids.current"))
    db, dc = nested(web, "db", "dc")
    # Either may, both may not.
    for each in (db, dc):
        each.start("python3", "-S", "-c", "x = bytearray(40000000); import time; time.sleep(1000)")
    wait_until(lambda: int(web.state()["oom_kill"]), "one is killed")
    wait_until(lambda: web.state()["procs"] == "1", "it is gone")
    assert int(web.read("cgroup/memory.peak")) <= 64 << 20
    assert int(web.read("cgroup/memory.current")) <= 64 << 20
    killed = [keyed(each.read("cgroup/memory.events"))["oom_kill"] for each in (web, db, dc)]
    assert killed[0] == sum(killed[1:])
    assert killed[0] == int(web.state()["oom_kill"])
    assert keyed(web.read("cgroup/memory.events"))["max"]
    # What is gone has been counted.
    for each in (db, dc):
        subprocess.run(["rm", "-rf", str(each.path)], check=True)
    wait_until(lambda: int(web.read("cgroup/pids.current")) <= alone, "their groups are empty")
    now = [int(web.state()["oom_kill"]) for _ in range(3)]
    assert now == [killed[0]] * 3


def test_a_memory_hog_is_killed_and_that_is_told(instance: Instance, web: Container) -> None:
    web.write("cgroup/memory.max", "32M")
    (db,) = nested(web, "db")
    assert web.state()["oom_kill"] == "0"
    with (
        told(web / "state") as outer,
        told(db / "state") as inner,
        told(web / "cgroup/memory.events") as events,
    ):
        code, _ = db.run_code(HOG)
        assert code != 0
        assert outer()
        assert inner()
        assert events()
    assert int(web.state()["oom_kill"]) == int(db.state()["oom_kill"]) >= 1
    assert keyed(web.read("cgroup/memory.events"))["oom_kill"] >= 1
    assert db.run("echo lives") == "lives\n"
    # One that was made since somebody waits.
    (dc,) = nested(web, "dc")
    with told(web / "state") as again:
        dc.run_code(HOG)
        assert again()
    if by_v1("memory.events"):
        assert eventfds(instance) == 3
        subprocess.run(["rm", "-rf", str(db.path)], check=True)
        wait_until(lambda: eventfds(instance) == 2, "it is not watched any more")
        (db,) = nested(web, "db")
        db.run_code(HOG)
    instance.kill_daemon()
    assert int(web.state()["oom_kill"]) >= 2
    assert int(dc.state()["oom_kill"]) >= 1


def test_limits_are_kept(instance: Instance, web: Container) -> None:
    wanted = {"pids.max": "77", "memory.max": "100000001", "cpu.weight": "33"}
    for name, value in {**wanted, "cpu.max": "70000"}.items():
        web.write(f"cgroup/{name}", value)
    wanted["cpu.max"] = "70000 100000"

    def has() -> dict[str, str]:
        return {name: web.read(f"cgroup/{name}").strip() for name in wanted}

    instance.kill_daemon()
    assert has() == wanted
    init = web.init
    web.write("unshare", "cgroup ipc mnt net pid user uts syslog")
    assert web.init != init
    assert has() == wanted
    assert kernels(web, "pids.max", "pids.max") == "77"
    assert "pids.max 4096" in web.read("defaults/limits")
    subprocess.run(["mv", str(web.path), f"{web.path}2"], check=True)
    web.path = Path(f"{web.path}2")
    assert has() == wanted


def test_limits_that_no_init_could_start_with_are_kept(web: Container) -> None:
    web.write("cgroup/pids.max", "1")
    web.write("cgroup/cpu.max", "1000 1000000")
    init = web.init
    web.write("unshare", "cgroup ipc mnt net pid user uts syslog")
    assert web.init != init
    assert web.read("cgroup/pids.max") == "1\n"
    with pytest.raises(BlockingIOError):
        web.start("true")


def test_they_are_the_parents_to_change(web: Container) -> None:
    web.run("mkdir /sys/namespaces/db; echo 20 > /sys/namespaces/db/cgroup/pids.max")
    assert Container(web / "db").read("cgroup/pids.max") == "20\n"
    os.chown(web.path, 1000, 1000)
    as_user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "sh", "-c"]
    script = "mkdir mine && echo 30 > mine/cgroup/pids.max && cat mine/cgroup/pids.max"
    done = subprocess.run([*as_user, script], cwd=web.path, capture_output=True, text=True)
    assert done.stdout == "30\n", done
    done = subprocess.run(
        [*as_user, "echo max > cgroup/pids.max"], cwd=web.path, capture_output=True, text=True
    )
    assert "Permission denied" in done.stderr
    assert web.read("cgroup/pids.max") == "4096\n"


def test_they_hold_for_who_enters_in_place(instance: Instance, web: Container) -> None:
    code = BOMB.format(count=60, sleep=1000)
    words = ["python3", "-S", "-c", f"input()\n{code}"]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as entrant:
        try:
            os.link(instance.tree / f"procs/{entrant.pid}", web / f"procs/{entrant.pid}:uts")
            web.write("cgroup/pids.max", "20")
            assert entrant.stdin is not None
            assert entrant.stdout is not None
            entrant.stdin.write("\n")
            entrant.stdin.flush()
            assert re.fullmatch(r"stopped at 1\d\n", entrant.stdout.readline())
        finally:
            subprocess.run(["rm", "-rf", str(web.path)], check=True)
            entrant.wait(DEADLINE_S)


def test_cpu_time_nested(web: Container) -> None:
    db, dc = nested(web, "db", "dc")
    db.write("cgroup/cpu.max", "80000")
    dc.write("cgroup/cpu.max", "5000")
    # Less than that of one in it, and than another's.
    web.write("cgroup/cpu.max", "10000")
    shown = [each.read("cgroup/cpu.max") for each in (web, db, dc)]
    assert shown == ["10000 100000\n", "80000 100000\n", "5000 100000\n"]
    db.write("cgroup/cpu.max", "90000")
    (deep,) = nested(db, "deep")
    deep.write("cgroup/cpu.max", "20000 50000")
    assert db.read("cgroup/cpu.max") == "90000 100000\n"
    assert deep.read("cgroup/cpu.max") == "20000 50000\n"
    db.start("sh", "-c", "while :; do :; done")
    wait_until(lambda: keyed(web.read("cgroup/cpu.stat"))["nr_throttled"] > 3, "it is throttled")
    used = keyed(web.read("cgroup/cpu.stat"))["usage_usec"]
    # And lifted, so that what was asked for below holds.
    web.write("cgroup/cpu.max", "max")
    if by_v1("cpu.max"):
        assert kernels(db, "cpu.max", "cpu.cfs_quota_us") == "90000"
    assert db.read("cgroup/cpu.max") == "90000 100000\n"
    wait_until(
        lambda: keyed(web.read("cgroup/cpu.stat"))["usage_usec"] > used + 100_000, "it goes on"
    )


def test_removal_is_not_throttled(web: Container) -> None:
    (db,) = nested(web, "db")
    for _ in range(20):
        db.start("sh", "-c", "while :; do :; done")
    web.write("cgroup/cpu.max", "1000 1000000")
    db.write("cgroup/cpu.max", "1000 1000000")
    init = db.init
    subprocess.run(["rm", "-rf", str(web.path)], check=True, timeout=DEADLINE_S)
    # 20 of them would want some seconds of their millisecond a second.
    wait_until(lambda: not Path(f"/proc/{init}").exists(), "it is gone", 5)


def test_removal_is_not_held_back_with_io(web: Container, directory: Path) -> None:
    web.write("binds", f"/mnt {directory} rw")
    web.write("cgroup/io.max", f"{device_of(directory)} wbps=1000")
    web.start("dd", "if=/dev/zero", "of=/mnt/file", "bs=1M", "count=1", "oflag=direct")
    (pid,) = (int(x) for x in os.listdir(web / "procs"))

    def waits() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"

    wait_until(waits, "it waits for the disk")
    subprocess.run(["rm", "-rf", str(web.path)], check=True, timeout=DEADLINE_S)
    # That would take a quarter of an hour.
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "it is gone", 10)


def test_less_memory_than_there_is_in_use(web: Container) -> None:
    web.run("head -c 20000000 /dev/zero > /tmp/file")
    assert int(web.read("cgroup/memory.current")) > 20_000_000
    if by_v1("memory.max"):
        refused(errno.EBUSY, web.write, "cgroup/memory.max", "8M")
        assert web.read("cgroup/memory.max") == "max\n"
    web.run("rm /tmp/file")
    web.write("cgroup/memory.max", "8M")
    assert web.read("cgroup/memory.max") == f"{8 << 20}\n"


def test_defaults_take_every_limit(web: Container) -> None:
    wanted = {
        name: value
        for name, value in (
            ("cpu.max", "50000 100000"),
            ("cpu.weight", "50"),
            ("io.weight", "default 200"),
            ("memory.high", str(48 << 20)),
            ("memory.low", str(1 << 20)),
            ("memory.max", str(64 << 20)),
            ("memory.swap.max", "0"),
            ("pids.max", "60"),
        )
        if HIERARCHIES.has(name)
        and (name != "io.weight" or os.path.exists(Path(web / "cgroup/io.weight")))
    }
    try:
        web.read("cgroup/io.weight")
    except OSError:
        wanted.pop("io.weight", None)
    text = "".join(f"{name} {value}\n" for name, value in wanted.items())
    web.write("defaults/limits", text.replace(str(64 << 20), "64M"))
    assert web.read("defaults/limits") == text
    (db,) = nested(web, "db")
    assert {name: db.read(f"cgroup/{name}").strip() for name in wanted} == wanted
    for value, number in (
        ("memory.max -5", errno.ERANGE),
        ("pids.max 5\npids.max 6", errno.EINVAL),
        ("memory.most 5", errno.EINVAL),
    ):
        refused(number, web.write, "defaults/limits", value)
    if by_v1("memory.high"):
        refused(errno.EOPNOTSUPP, web.write, "defaults/limits", "memory.high 1M")
    assert web.read("defaults/limits") == text


def test_the_configuration_takes_them(tmp_path: Path) -> None:
    config = tmp_path / "nsfs.conf"
    config.write_text("[defaults]\nlimits =\n  memory.max 96M\n  cpu.weight 20\n  pids.max 40\n")
    with serving(tmp_path, ["--config", str(config)]) as other:
        os.mkdir(other.tree / "web")
        web = Container(other.tree / "web")
        assert web.read("cgroup/memory.max") == f"{96 << 20}\n"
        assert web.read("cgroup/cpu.weight") == "20\n"
        assert web.read("cgroup/pids.max") == "40\n"
        os.rmdir(web.path)


# --- nsfs run --limit ---


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """`nsfs run`."""
    return subprocess.run([*NSFS, "run", *args], capture_output=True, text=True, timeout=DEADLINE_S)


def test_run_with_limits(tree: Path) -> None:
    words = ["--limit", "memory.max=64M", "--limit", "pids.max=50", str(tree / "job"), "--"]
    done = run(*words, "sh", "-c", "cd /sys/namespaces/cgroup; cat memory.max pids.max")
    assert (done.returncode, done.stdout) == (0, f"{64 << 20}\n50\n"), done
    done = run(*words, "sh", "-c", HOG + "; exit 5")
    assert done.returncode == 5, done
    done = run(*words, "python3", "-c", BOMB.format(count=100, sleep=0) + "\nos._exit(9)")
    assert done.returncode == 9, done
    assert "stopped at" in done.stdout
    assert not (tree / "job").exists()


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ("memory.max", "--limit memory.max: not NAME=VALUE"),
        ("memory.max=much", "--limit memory.max=much: not a number: 'much'"),
        ("memory.max=-1", "--limit memory.max=-1: out of range: '-1' (0 to 9223372036854775807)"),
        ("../state=1", "--limit ../state=1: not a limit: '../state' ("),
    ],
)
def test_a_wrong_limit_is_told_before_anything_is_made(
    tree: Path, limit: str, sentence: str
) -> None:
    done = run("--limit", limit, str(tree / "job"), "--", "true")
    assert done.returncode == 125
    assert done.stderr.startswith(f"nsfs: {tree}/job: {sentence}"), done.stderr
    assert not (tree / "job").exists()
    twice = run("--limit", "pids.max=5", "--limit", "pids.max=6", str(tree / "job"), "--", "true")
    assert twice.returncode == 125
    assert "a second pids.max" in twice.stderr
    if by_v1("memory.high"):
        done = run("--limit", "memory.high=1M", str(tree / "job"), "--", "true")
        assert done.returncode == 125
        assert "no controller of this host has it" in done.stderr
    assert run("--limit", limit, str(tree / "none/job"), "--", "true").returncode == 125


# --- stat ---


def stat(container: Container) -> dict[str, int]:
    """`stat`."""
    return keyed(container.read("stat"))


def test_stat_is_the_kernels(web: Container, tmp_path: Path) -> None:
    (db,) = nested(web, "db")
    before = stat(web)
    db.run(
        "head -c 8000000 /dev/zero > /tmp/file; i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done"
    )
    web.start("sleep", "1000")
    db.start("sleep", "1000")
    low = keyed(Path(directory_of(web), "cpu.stat").read_text())
    found = stat(web)
    high = keyed(Path(directory_of(web), "cpu.stat").read_text())
    for key in ("usage_usec", "user_usec", "system_usec"):
        assert low[key] <= found[f"cpu.{key}"] <= high[key]
    # The loop alone takes some 30 ms.
    assert found["cpu.usage_usec"] - before["cpu.usage_usec"] > 5_000
    assert found["cpu.usage_usec"] >= stat(db)["cpu.usage_usec"]
    assert found["memory.current"] - before["memory.current"] > 7_900_000
    kernel = int(kernels(web, "memory.current", "memory.usage_in_bytes"))
    assert abs(stat(web)["memory.current"] - kernel) < 1 << 20
    assert found["procs"] == 2
    assert stat(db)["procs"] == 1


def test_stat_of_io(web: Container, directory: Path) -> None:
    alone = int(web.read("cgroup/pids.current"))
    (db,) = nested(web, "db")
    db.write("binds", f"/mnt {directory} rw")
    before = stat(web)
    db.run("dd if=/dev/zero of=/mnt/file bs=65536 count=32 oflag=direct 2>&1")
    db.run("dd if=/mnt/file of=/dev/null bs=65536 iflag=direct 2>&1")
    found = stat(web)
    size = 32 * 65536
    assert size <= found["io.wbytes"] - before["io.wbytes"] < 3 * size
    assert size <= found["io.rbytes"] - before["io.rbytes"] < 3 * size
    assert found["io.wios"] - before["io.wios"] >= 2
    assert found["io.rios"] - before["io.rios"] >= 2
    lines = [line.split() for line in web.read("cgroup/io.stat").splitlines()]
    total = sum(int(word[7:]) for line in lines for word in line if word.startswith("wbytes="))
    assert total == stat(web)["io.wbytes"]
    text = kernels(web, "io.stat", "blkio.throttle.io_service_bytes_recursive")
    assert str(total) in text
    # What one counted that is gone is not lost.
    subprocess.run(["rm", "-rf", str(web / "db")], check=True)
    wait_until(lambda: int(web.read("cgroup/pids.current")) <= alone, "it is gone")
    assert stat(web)["io.wbytes"] >= total


def test_stat_of_the_network(web: Container) -> None:
    (db,) = nested(web, "db")
    for each in (web, db):
        each.run(
            "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up;"
            "ip address add 10.9.9.1/24 dev v0; bash -c 'echo x > /dev/udp/10.9.9.2/9'"
        )
    # Somebody is asked for, whom nobody is.
    wait_until(lambda: stat(db)["net.tx_bytes"] > 0, "something was sent")

    def sums() -> tuple[int, int]:
        received = sent = 0
        for each in (web, db):
            for line in Path(f"/proc/{each.init}/net/dev").read_text().splitlines()[2:]:
                name, _, rest = line.partition(":")
                if name.strip() != "lo":
                    received += int(rest.split()[0])
                    sent += int(rest.split()[8])
        return received, sent

    for _ in range(50):
        low, found, high = sums(), stat(web), sums()
        assert low[0] <= found["net.rx_bytes"] <= high[0]
        assert low[1] <= found["net.tx_bytes"] <= high[1]


def test_stat_of_the_log(web: Container) -> None:
    before = stat(web)["log.records"]
    web.run("for i in 1 2 3 4 5; do echo line > /dev/kmsg; done")
    assert stat(web)["log.records"] - before == 5


def test_stat_of_the_host(instance: Instance) -> None:
    host = Group.host(HIERARCHIES)
    low = host.cpu_usec()["usage_usec"]
    found = keyed((instance.tree / "stat").read_text())
    assert low <= found["cpu.usage_usec"] <= host.cpu_usec()["usage_usec"]
    assert found["procs"] > 1
    state = dict(x.split(" ", 1) for x in (instance.tree / "state").read_text().splitlines())
    assert f"oom_kill {state['oom_kill']}\n" in Path("/proc/vmstat").read_text()
