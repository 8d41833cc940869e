"""A process that is in two containers side by side: whole in one, in part in the other."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, Container, Instance, wait_until

UNSHARE = "cgroup ipc mnt net pid syslog time uts"


def link(tree: Path, pid: int, container: Container, types: str) -> None:
    done = subprocess.run(
        ["ln", tree / f"procs/{pid}", container / f"procs/{pid}:{types}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, ""), done


def names(container: Container) -> list[str]:
    return sorted(os.listdir(container / "procs"))


def pids(container: Container) -> list[str]:
    return sorted(name.partition(":")[0] for name in names(container))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def waits(pid: int) -> bool:
    """Whether it is suspended: then SIGTERM, which ends it, is pending for ever."""
    group = next(
        line[3:]
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        if line.startswith("0::")
    )
    (top,) = (
        line.split()[1]
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if line.split()[2] == "cgroup2"
    )
    return "frozen 1" in Path(f"{top}{group}/cgroup.events").read_text()


class Pod:
    """db, web and shop, of one user namespace, and a process of db's that is in web:net too."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.all = Container(tree / "pod")
        self.all.path.mkdir()
        self.all.write("defaults/unshare", UNSHARE)
        for name in ("db", "web", "shop"):
            (self.all / name).mkdir()
        self.db, self.web, self.shop = (Container(self.all / n) for n in ("db", "web", "shop"))
        self.db.start("sh", "-c", "while :; do sleep 1000; done")
        self.pid = min(int(name) for name in wait_until(lambda: names(self.db), "it runs"))
        link(tree, self.pid, self.web, "net")


@pytest.fixture
def pod(tree: Path) -> Pod:
    return Pod(tree)


def test_it_is_listed_and_counted_in_both(pod: Pod) -> None:
    assert os.readlink(f"/proc/{pod.pid}/ns/net") == os.readlink(f"/proc/{pod.web.init}/ns/net")
    assert str(pod.pid) in names(pod.db)
    assert names(pod.web) == [f"{pod.pid}:net"]
    for container, count in ((pod.db, "2"), (pod.web, "1"), (pod.all, "2"), (pod.shop, "0")):
        state = container.state()
        assert (state["procs"], state["populated"]) == (count, str(int(count != "0")))
    # Of what is around both it is a member as any other.
    assert str(pod.pid) in names(pod.all)
    assert "container .\n" in (pod.db / f"procs/{pod.pid}").read_text()
    assert "command sh -c" in (pod.web / f"procs/{pod.pid}:net").read_text()
    # Inside, too, where it has a PID.
    assert pod.web.run("ls /sys/namespaces/procs | grep -c net || true") == "0\n"
    out = pod.db.run("cat /sys/namespaces/procs/*")
    assert "while" in out
    for container in (pod.db, pod.web):
        assert subprocess.call(["rmdir", container.path], stderr=subprocess.DEVNULL) == 1


def test_its_children_are_in_both(pod: Pod) -> None:
    (child,) = {int(p) for p in pids(pod.db)} - {pod.pid}
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: len(names(pod.web)) == 2, "the next is in both")
    assert sorted(pids(pod.web)) == sorted(pids(pod.db))
    assert all(name.endswith(":net") for name in names(pod.web))


@pytest.mark.parametrize("which", ["db", "web", "all"])
def test_freeze_of_either(pod: Pod, which: str) -> None:
    container: Container = getattr(pod, which)
    container.write("freeze", "1")
    wait_until(lambda: waits(pod.pid), "suspended")
    container.write("freeze", "0")
    wait_until(lambda: not waits(pod.pid), "resumed")


def test_freeze_of_both(pod: Pod) -> None:
    for container in (pod.db, pod.web):
        container.write("freeze", "1")
    wait_until(lambda: waits(pod.pid), "suspended")
    pod.db.write("freeze", "0")
    assert waits(pod.pid)
    pod.db.write("freeze", "1")
    pod.web.write("freeze", "0")
    assert waits(pod.pid)
    pod.db.write("freeze", "0")
    wait_until(lambda: not waits(pod.pid), "resumed")


@pytest.mark.parametrize("which", ["db", "web"])
@pytest.mark.parametrize("word", ["TERM", "KILL"])
def test_kill_of_either(pod: Pod, which: str, word: str) -> None:
    getattr(pod, which).write("kill", word)
    wait_until(lambda: not alive(pod.pid), "it has ended")
    for container in (pod.db, pod.web):
        wait_until(lambda c=container: str(pod.pid) not in pids(c), "it is in neither")


@pytest.mark.parametrize("which", ["db", "web"])
def test_end_of_either(pod: Pod, which: str) -> None:
    other = pod.web if which == "db" else pod.db
    subprocess.run(["rm", "-rf", getattr(pod, which).path], check=True)
    wait_until(lambda: not alive(pod.pid), "it has ended")
    # What is in the other only stays.
    wait_until(lambda: str(pod.pid) not in pids(other), "it is in the other no more")
    assert other.run("hostname") == ("web\n" if which == "db" else "db\n")


def test_the_end_of_its_init(pod: Pod) -> None:
    os.kill(pod.db.init, signal.SIGKILL)
    wait_until(lambda: not alive(pod.pid), "it has ended")
    wait_until(lambda: pod.web.state()["populated"] == "0", "web is empty")
    subprocess.run(["rmdir", pod.web.path], check=True)


def test_in_three_at_once(pod: Pod) -> None:
    link(pod.tree, pod.pid, pod.shop, "ipc")
    assert names(pod.web) == [f"{pod.pid}:net"]
    assert names(pod.shop) == [f"{pod.pid}:ipc"]
    assert str(pod.pid) in names(pod.db)
    pod.web.write("freeze", "1")
    wait_until(lambda: waits(pod.pid), "suspended")
    pod.web.write("freeze", "0")
    subprocess.run(["rm", "-rf", pod.web.path], check=True)
    wait_until(lambda: not alive(pod.pid), "it has ended")
    wait_until(lambda: pod.shop.state()["procs"] == "0", "it is in none")


def test_the_next_daemon_knows(instance: Instance, pod: Pod) -> None:
    instance.kill_daemon()
    assert names(pod.web) == [f"{pod.pid}:net"]
    assert str(pod.pid) in names(pod.db)
    pod.db.write("freeze", "1")
    wait_until(lambda: waits(pod.pid), "suspended")
    subprocess.run(["rm", "-rf", pod.db.path], check=True)
    wait_until(lambda: not alive(pod.pid), "it has ended")


def test_whole_in_two_is_refused(pod: Pod) -> None:
    done = subprocess.run(
        ["ln", pod.tree / f"procs/{pod.pid}", pod.shop / f"procs/{pod.pid}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert "not permitted" in done.stderr


def test_whole_in_a_nested_one_changes_nothing_for_its_members(pod: Pod) -> None:
    pod.all.start("sleep", "2000")
    pid = next(p for p in names(pod.all) if "2000" in (pod.all / f"procs/{p}").read_text())
    done = subprocess.run(
        ["ln", pod.tree / f"procs/{pid}", pod.db / f"procs/{pid}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert pid in names(pod.db)
    assert pid in names(pod.all)
    assert len(names(pod.db)) == 3
    assert "command sleep 1000" in pod.db.run("cat /sys/namespaces/procs/*")
