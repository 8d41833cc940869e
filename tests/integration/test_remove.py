"""rm -rf in all its spellings: silent, exit 0, no survivor, whatever goes on inside."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, SLOWNESS, Container, Instance, refused, wait_until

GONE_S = 10.0 * SLOWNESS


def remove_with(*words: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        done = subprocess.run(
            [*words[:-1], *([str(path)] if words[-1] == "PATH" else [words[-1]])],
            check=False,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    return remove


def remove_with_find(path: Path) -> None:
    done = subprocess.run(
        ["find", str(path), "-delete"],
        check=False,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")


SPELLINGS = {
    "gnu": remove_with("rm", "-rf", "PATH"),
    "busybox": remove_with("busybox", "rm", "-rf", "PATH"),
    "find": remove_with_find,
    "shutil": shutil.rmtree,
}


def processes_of(instance: Instance, path: Path) -> list[int]:
    """Every process in the groups of a container, its inits too."""
    init = int((path / "init").read_text())
    group = Path(f"/proc/{init}/cgroup").read_text().split("0::", 1)[1].split("\n")[0]
    mount = next(
        line.split()[1]
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if line.split()[2] == "cgroup2"
    )
    top = Path(mount + os.path.dirname(group))
    return [int(pid) for file in top.rglob("cgroup.procs") for pid in file.read_text().split()]


def all_gone(pids: list[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_kills_everything_that_is_nested(
    spelling: str, tree: Path, web: Container, instance: Instance
) -> None:
    os.makedirs(web / "db" / "deep")
    os.mkdir(web / "cache")
    for each in (web, Container(web / "db"), Container(web / "db" / "deep")):
        each.start("sleep", "1000")
        each.start("sh", "-c", "trap '' TERM INT HUP; while :; do sleep 0.01; done")
    wait_until(lambda: int(web.state()["procs"]) >= 6, "everything runs")
    pids = processes_of(instance, web.path)
    assert len(pids) >= 10
    SPELLINGS[spelling](web.path)
    assert not web.path.exists()
    wait_until(lambda: all_gone(pids), "no survivor", GONE_S)
    instance.settled()
    web.path.mkdir()
    assert web.run("echo again") == "again\n"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_while_members_fork(spelling: str, web: Container, instance: Instance) -> None:
    # Each lives a moment and forks again: about a hundred at any time, new PIDs all the while.
    for _ in range(4):
        web.start("sh", "-c", "while :; do for i in 1 2 3 4 5; do sleep 0.01 & done; wait; done")
    wait_until(lambda: int(web.state()["procs"]) >= 8, "it forks")
    SPELLINGS[spelling](web.path)
    assert not web.path.exists()
    instance.settled()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_while_somebody_makes_containers_inside(
    spelling: str, web: Container, instance: Instance
) -> None:
    stop = threading.Event()
    made = 0

    def make() -> None:
        nonlocal made
        number = 0
        while not stop.is_set() and number < 2000:
            number += 1
            try:
                os.mkdir(web / f"c{number}")
                made += 1
            except OSError:
                if not web.path.exists():
                    return

    makers = [threading.Thread(target=make) for _ in range(2)]
    for each in makers:
        each.start()
    try:
        wait_until(lambda: made > 5, "containers are made")
        SPELLINGS[spelling](web.path)
    finally:
        stop.set()
        for each in makers:
            each.join()
    assert not web.path.exists()
    instance.settled()


@pytest.mark.long_in_vm
def test_two_at_once(tree: Path, web: Container, instance: Instance) -> None:
    for round_number in range(5):
        top = tree / f"r{round_number}"
        for name in ("a", "b", "c"):
            os.makedirs(top / name / "d")
            Container(top / name).start("sleep", "1000")
        both = [
            subprocess.Popen(["rm", "-rf", top], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for _ in range(2)
        ]
        for each in both:
            out, _ = each.communicate(timeout=2 * DEADLINE_S)
            assert (each.returncode, out) == (0, b"")
        assert not top.exists()
    os.rmdir(web.path)
    instance.settled()


def test_while_a_member_is_stopped(web: Container, instance: Instance) -> None:
    web.start("sleep", "1000")
    pid = int(wait_until(lambda: os.listdir(web / "procs"), "sleep runs")[0])
    os.kill(pid, signal.SIGSTOP)
    SPELLINGS["gnu"](web.path)
    wait_until(lambda: all_gone([pid]), "it is gone", GONE_S)
    instance.settled()


def test_while_a_member_is_frozen(web: Container, instance: Instance) -> None:
    web.start("sleep", "1000")
    wait_until(lambda: os.listdir(web / "procs"), "sleep runs")
    web.write("freeze", "1")
    wait_until(lambda: web.state()["frozen"] == "1", "frozen")
    pids = processes_of(instance, web.path)
    SPELLINGS["gnu"](web.path)
    wait_until(lambda: all_gone(pids), "they are gone", GONE_S)
    instance.settled()


def test_while_a_member_is_traced(web: Container, instance: Instance) -> None:
    web.start("sleep", "1000")
    pid = int(wait_until(lambda: os.listdir(web / "procs"), "sleep runs")[0])
    with subprocess.Popen(
        ["strace", "-p", str(pid)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as tracer:
        wait_until(
            lambda: "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text(), "it is traced"
        )
        SPELLINGS["gnu"](web.path)
        wait_until(lambda: all_gone([pid]), "it is gone", GONE_S)
        tracer.wait(timeout=DEADLINE_S)
    instance.settled()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_while_a_member_waits_in_a_read_of_nsfs(
    spelling: str, web: Container, instance: Instance
) -> None:
    web.start("cat", "/dev/kmsg")
    web.start("cat", "/proc/kmsg")
    wait_until(lambda: int(web.state()["procs"]) == 2, "both read")
    time.sleep(0.1)
    pids = processes_of(instance, web.path)
    SPELLINGS[spelling](web.path)
    wait_until(lambda: all_gone(pids), "they are gone", GONE_S)
    instance.settled()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_while_members_are_stopped_traced_and_frozen(
    spelling: str, web: Container, instance: Instance
) -> None:
    """The frozen one by a group of its own, and all of them in a container that is frozen."""
    os.mkdir(web / "db")
    db = Container(web / "db")
    db.run(
        "mkdir /tmp/cg; mount -t cgroup2 none /tmp/cg; mkdir /tmp/cg/own; sleep 1000 >/dev/null &\n"
        "echo $! > /tmp/cg/own/cgroup.procs; echo 1 > /tmp/cg/own/cgroup.freeze"
    )
    for _ in range(2):
        db.start("sleep", "1000")
    found = wait_until(lambda: len(names := os.listdir(db / "procs")) == 3 and names, "they run")
    pids = [int(name) for name in found]
    in_own = [pid for pid in pids if "/own\n" in Path(f"/proc/{pid}/cgroup").read_text()]
    assert len(in_own) == 1
    stopped, traced = (pid for pid in pids if pid not in in_own)
    os.kill(stopped, signal.SIGSTOP)
    words = ["strace", "-p", str(traced)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as tracer:
        status = Path(f"/proc/{traced}/status")
        wait_until(lambda: "TracerPid:\t0\n" not in status.read_text(), "it is traced")
        web.write("freeze", "1")
        SPELLINGS[spelling](web.path)
        wait_until(lambda: all_gone(pids), "they are gone", GONE_S)
        tracer.wait(timeout=DEADLINE_S)
    instance.settled()


def test_namespaces_and_mounts_go_too(web: Container, instance: Instance) -> None:
    def mounts() -> int:
        return Path(f"/proc/{instance.daemon()}/mountinfo").read_text().count("\n")

    before = mounts()
    os.mkdir(web / "db")
    # A namespace that is gone takes its end of a pair with it.
    os.mkdir(web / "db/net/eth0")
    Container(web / "db").start("sleep", "1000")
    assert (web / "net/db").exists()
    os.stat(web / "db/nsproxy/net")
    SPELLINGS["gnu"](web / "db")
    wait_until(lambda: not (web / "net/db").exists(), "the network namespace is gone")
    wait_until(lambda: mounts() <= before, "no mount is left")


def test_rm_of_a_file_or_of_what_is_in_it_harms_nothing(web: Container) -> None:
    web.start("sleep", "1000")
    os.mkdir(web / "db")
    wait_until(lambda: web.state()["populated"] == "1", "sleep runs")
    subprocess.run(["rm", "-f", web / "kmsg", web / "state"], check=True)
    assert "populated 1" in web.read("state")
    # A child container goes, the container itself stays.
    done = subprocess.run(f"rm -rf {web.path}/*", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (web / "db").exists()
    assert web.state()["populated"] == "1"
    assert sorted(os.listdir(web / "nsproxy"))
    with pytest.raises(OSError, match="busy"):
        os.rmdir(web.path)
    with pytest.raises(OSError, match=r".") as caught:
        os.rmdir(web / "nsproxy")
    assert caught.value.errno == errno.ENOTEMPTY


def test_a_directory_removed_by_an_interrupted_removal_is_still_there(
    web: Container, instance: Instance
) -> None:
    """Although somebody has it open: the kernel finds nothing in that inode any more."""
    for name in ("defaults", "nsproxy", "uts", "procs"):
        before = sorted(os.listdir(web / name))
        fd = os.open(web / name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for _ in range(2):
                for entry in before:
                    os.unlink(web / name / entry)
                os.rmdir(web / name)
                assert sorted(os.listdir(web / name)) == before
            instance.kill_daemon()
            assert sorted(os.listdir(web / name)) == before
        finally:
            os.close(fd)
    assert web.read("defaults/unshare").split()
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)


def test_gone_from_inside_for_who_is_removing_it_outside(
    web: Container, instance: Instance
) -> None:
    """What the kernel still believes of its names misleads nobody: what is gone cannot be opened, and
    then there is no such directory to unlink(2) either.  A name given anew leads to what has it
    now."""
    os.mkdir(web / "db")
    fd, log_fd = (os.open(web / f"db{name}", os.O_RDONLY) for name in ("", "/kmsg"))
    directory_fd = os.open("cgroup", os.O_RDONLY, dir_fd=fd)
    try:
        # Its attributes, but not its name, are to be asked for again.
        assert os.listdir(directory_fd)
        web.run("rmdir /sys/namespaces/db")
        wait_until(
            lambda: "db" not in [each["name"] for each in instance.records().values()],
            "nothing is left of it",
        )
        refused(errno.ENOENT, lambda: os.open("cgroup", os.O_RDONLY, dir_fd=fd))
        refused(errno.ENOENT, lambda: os.unlink("cgroup", dir_fd=fd))
        refused(errno.ENOENT, lambda: os.rmdir("cgroup", dir_fd=fd))
        refused(errno.ENOENT, lambda: os.open("kmsg", os.O_RDONLY, dir_fd=fd))
        refused(errno.ESTALE, os.open, f"/proc/self/fd/{log_fd}", os.O_RDONLY)
        assert os.fstat(log_fd).st_nlink == os.fstat(directory_fd).st_nlink == 0
        assert os.listdir(fd) == os.listdir(directory_fd) == []
        web.run("mkdir /sys/namespaces/db")
        assert os.stat(web / "db").st_ino != os.fstat(fd).st_ino
        assert Container(web / "db").state()["populated"] == "0"
    finally:
        for each in (fd, log_fd, directory_fd):
            os.close(each)


def test_what_is_nested_goes_with_what_it_is_in(tree: Path, web: Container) -> None:
    """Once its files are removed, what is nested is shown empty, and as it was listed: whoever
    makes, renames or removes containers inside is in nobody's way."""
    for name in ("db", "db/deep", "cache"):
        os.mkdir(web / name)
    Container(web / "db").start("sleep", "1000")
    wait_until(lambda: web.state()["procs"] == "1", "it runs")
    listed = sorted(os.listdir(web.path))
    web.run("rmdir /sys/namespaces/cache")
    files = [name for name in listed if (web / name).is_file()]
    for name in files[:-1]:
        os.unlink(web / name)
    # It may be the files alone that are removed.
    assert "deep" in os.listdir(web / "db")
    refused(errno.ENOENT, os.stat, web / "cache")
    os.unlink(web / files[-1])
    assert os.listdir(web / "db") == os.listdir(web / "cache") == []
    refused(errno.ENOENT, os.mkdir, web / "new")
    refused(errno.ENOENT, os.mkdir, web / "db/deep/new")
    refused(errno.ENOENT, os.rename, web / "db", web / "bd")
    for words, why in (
        ("mkdir new", "No such file"),
        ("mv -T db bd", "No such file"),
        ("rmdir db/deep", "busy"),
    ):
        code, said = web.run_code(f"cd /sys/namespaces && {words}")
        assert code == 1
        assert why in said
    # Who did not list it finds nothing.
    assert subprocess.run(["test", "-e", web / "cache"], check=False).returncode == 1
    os.rmdir(web / "cache")
    os.rmdir(web / "db")
    assert web.state()["containers"] == "0"
    assert sorted(os.listdir(web.path)) == sorted(set(listed) - {"cache", "db"})
    shutil.rmtree(web.path)


def test_a_member_that_removes_what_it_sees_is_in_nobodys_way(web: Container) -> None:
    os.mkdir(web / "db")
    web.start(
        "python3",
        "-c",
        "import os, time; os.chdir('/sys/namespaces'); "
        "[os.unlink(n) for n in os.listdir() if os.path.isfile(n)]; print('done', flush=True); "
        "time.sleep(1000)",
    )
    wait_until(lambda: "done" in web.read("output"), "it has removed all files")
    os.mkdir(web / "new")
    os.rename(web / "new", web / "other")
    assert "kmsg" in os.listdir(web / "db")
    os.rmdir(web / "other")
    os.rmdir(web / "db")


def test_a_bounded_fork_bomb(tree: Path, web: Container, instance: Instance) -> None:
    web.write("defaults/limits", "pids.max 500")
    os.mkdir(web / "bomb")
    bomb = Container(web / "bomb")
    bomb.start("sh", "-c", "f() { f | f & f | f & wait; }; f 2>/dev/null")
    wait_until(lambda: int(bomb.state()["procs"]) > 200, "it forks")
    SPELLINGS["gnu"](web.path)
    instance.settled()


@pytest.mark.long_in_vm
def test_nothing_is_left_of_two_hundred(tree: Path, instance: Instance) -> None:
    for number in range(200):
        os.mkdir(tree / f"n{number}")
    subprocess.run(f"rm -rf {tree}/n*", shell=True, check=True, timeout=4 * DEADLINE_S)
    instance.settled()
    assert not [name for name in os.listdir(tree) if name.startswith("n") and name[1:].isdigit()]


def idle(web: Container) -> str:
    """What `cpu.idle` of its group is."""
    for row in Path(f"/proc/{web.init}/cgroup").read_text().splitlines():
        _, controllers, relative = row.split(":", 2)
        for mount in Path("/proc/self/mounts").read_text().splitlines():
            _, directory, kind, options = mount.split(" ")[:4]
            path = Path(f"{directory}{relative.removesuffix('/init')}/cpu.idle")
            named = "cpu" in controllers.split(",") and "cpu" in options.split(",")
            if path.exists() and (named or (kind == "cgroup2" and not controllers)):
                return path.read_text().strip()
    pytest.fail("no hierarchy has the cpu controller")


def test_it_gives_way_while_it_is_being_removed(web: Container, instance: Instance) -> None:
    for name in ("state", "kmsg"):
        os.unlink(web / name)
    assert idle(web) == "0"
    os.unlink(web / "stat")
    assert idle(web) == "1"
    wait_until(lambda: idle(web) == "0", "it was not removed after all")
    os.unlink(web / "init")
    assert idle(web) == "1"
    instance.kill_daemon()
    assert "populated" in web.read("state")
    assert idle(web) == "0"
