"""Everything at once: many who make, remove, rename, list and read; signals at any moment.

No deadlock (a deadline on everything), nothing left, and no traceback in the daemon's log, for which
`serving` looks.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import Container, Instance, serving, wait_until
from tests.integration.test_remove import SPELLINGS

SEED = int(os.environ.get("NSFS_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
STORM_S = float(os.environ.get("NSFS_TEST_STORM_S", "2"))
# What a command may say that comes second.
TOO_LATE = ("No such file", "not empty", "Is a directory")


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """One instance for the module, served by one daemon to the end."""
    with serving(tmp_path_factory.mktemp("storm")) as found:
        daemon = found.daemon()
        yield found
        assert found.daemon() == daemon, found.log()[-4000:]


def descriptors(instance: Instance) -> int:
    """How many the daemon has open, those of mapped logs aside."""
    count = 0
    directory = f"/proc/{instance.daemon()}/fd"
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            count += f"{instance.run_dir}/c/" not in os.readlink(f"{directory}/{name}")
    return count


def spawners_descriptors(instance: Instance) -> int:
    """How many the spawner has open."""
    daemon = instance.daemon()
    for child in Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text() == "nsfs-spawner\n":
            return len(os.listdir(f"/proc/{child}/fd"))
    raise AssertionError("no spawner")


@pytest.fixture
def tree(instance: Instance) -> Iterator[Path]:
    """The mount point; afterwards nothing is in it, and all is as before."""
    before, spawners = descriptors(instance), spawners_descriptors(instance)
    yield instance.tree
    for path in instance.tree.iterdir():
        if (path / "exec").exists():
            subprocess.run(["rm", "-rf", path], check=False, timeout=30)
    instance.settled()
    wait_until(lambda: descriptors(instance) <= before + 8, "descriptors are closed")
    wait_until(lambda: spawners_descriptors(instance) <= spawners, "the spawner's as well")
    (instance.tree / "probe").mkdir()
    assert Container(instance.tree / "probe").run("echo works") == "works\n"
    subprocess.run(["rm", "-rf", instance.tree / "probe"], check=True, timeout=30)
    instance.settled()


def worker(script: str, tree: Path, stop: Path) -> subprocess.Popen[bytes]:
    """A shell that repeats a script in the tree until the stop file is there."""
    return subprocess.Popen(
        ["sh", "-c", f"cd {tree}; while [ ! -e {stop} ]; do {script}; done"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def ended(workers: list[subprocess.Popen[bytes]]) -> None:
    """All of them end by themselves in time; the rest is killed."""
    hung = []
    deadline = time.monotonic() + 30
    for each in workers:
        try:
            each.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            hung.append(each.args)
            os.killpg(each.pid, signal.SIGKILL)
    assert not hung


SCRIPTS = (
    "mkdir a a/b a/b/c; rm -rf a",
    "mkdir b b/x; echo 'sleep 5' > b/exec; rm -rf b/x; mv -T b a; rm -rf a",
    "mkdir a c; mv -T a c; mv -T c d; mv -T d b/y; rm -rf d",
    "ls -lR . ; cat */state */*/state",
    "echo 'sh -c \"sleep 0.1 & sleep 0.1\"' > a/exec; cat a/procs/*; cat a/output",
    "echo 'mnt pid user uts' > a/unshare; echo 1 > a/freeze; echo 0 > a/freeze; echo 1 > a/kill",
    "find a -delete; find b -name kmsg; busybox rm -rf c",
    "timeout 0.02 mkdir c/z d/z; timeout 0.01 rm -rf c; timeout -s INT 0.01 cat a/kmsg b/kmsg",
)


def test_everything_at_once(tree: Path, tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    workers = [worker(script, tree, stop) for script in SCRIPTS]
    time.sleep(STORM_S)
    stop.touch()
    ended(workers)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_everything_at_once_within_a_container(spelling: str, tree: Path, tmp_path: Path) -> None:
    """The same from inside and outside, and then all of it is removed."""
    (tree / "web").mkdir()
    web = Container(tree / "web")
    stop = tmp_path / "stop"
    for script in SCRIPTS:
        web.start("sh", "-c", f"cd /sys/namespaces; while :; do {script}; done >/dev/null 2>&1")
    workers = [worker(script, web.path, stop) for script in SCRIPTS[:4]]
    time.sleep(STORM_S / 4)
    try:
        SPELLINGS[spelling](web.path)
    finally:
        stop.touch()
        ended(workers)
    assert not web.path.exists()


def test_two_removals_of_members_that_fork(tree: Path, instance: Instance) -> None:
    for _ in range(4):
        for name in ("web", "web/db", "web/db/deep"):
            (tree / name).mkdir()
            Container(tree / name).start(
                "sh", "-c", "while :; do for i in 1 2 3 4; do sleep 0.01 & done; wait; done"
            )
        wait_until(lambda: int(Container(tree / "web").state()["procs"]) > 6, "they fork")
        both = [
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for words in (
                ["rm", "-rf", tree / "web"],
                ["busybox", "rm", "-rf", tree / "web"],
                ["rm", "-rf", tree / "web" / "db"],
            )
        ]
        for each in both:
            out, _ = each.communicate(timeout=60)
            # Busybox tells of what was gone before it came.
            lines = [x for x in out.decode().splitlines() if not any(y in x for y in TOO_LATE)]
            assert not lines
        assert not (tree / "web").exists()
    instance.settled()


def test_made_in_one_that_is_being_removed(tree: Path, instance: Instance) -> None:
    for _ in range(8):
        (tree / "web").mkdir()
        made: list[str] = []
        errors: list[OSError] = []

        def make(made: list[str] = made, errors: list[OSError] = errors) -> None:
            for number in range(300):
                try:
                    os.mkdir(tree / "web" / f"n{number}")
                    made.append(f"n{number}")
                except OSError as error:
                    errors.append(error)
                    if not (tree / "web").exists():
                        return

        makers = [threading.Thread(target=make) for _ in range(3)]
        for each in makers:
            each.start()
        wait_until(lambda made=made: len(made) > 3, "some are made")
        done = subprocess.run(
            ["rm", "-rf", tree / "web"], capture_output=True, text=True, check=False, timeout=60
        )
        for each in makers:
            each.join()
        assert (done.returncode, done.stderr) == (0, "")
        assert not (tree / "web").exists()
        assert {error.strerror for error in errors} <= {
            "File exists",
            "No such file or directory",
            "No such device",
            "No such process",
        }
    instance.settled()


def interrupted(chance: random.Random, most_s: float, *words: object) -> int:
    """Run a command, a signal comes at any moment; its exit status."""
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(chance.random() * most_s)
    process.send_signal(chance.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL]))
    return process.wait(timeout=20)


def test_mkdir_interrupted_made_it_or_not(tree: Path, instance: Instance) -> None:
    chance = random.Random(SEED)
    (tree / "web").mkdir()
    for number in range(60):
        path = tree / "web" / f"n{number}"
        code = interrupted(chance, 0.008, "mkdir", path)
        if path.exists():
            assert Container(path).run("echo whole") == "whole\n", f"NSFS_TEST_SEED={SEED}"
            path_state = Container(path).state()
            assert path_state["containers"] == "0"
        else:
            assert code != 0
    left = sum(
        1
        for path in (tree / "web").iterdir()
        if path.name.startswith("n") and path.is_dir() and (path / "exec").exists()
    )
    wait_until(
        lambda: Container(tree / "web").state()["containers"] == str(left), "the rest is undone"
    )


def test_a_rebuild_interrupted_leaves_it_whole(tree: Path) -> None:
    chance = random.Random(SEED)
    (tree / "web").mkdir()
    web = Container(tree / "web")
    for number in range(40):
        value = ("mnt pid user uts", "ipc mnt net pid user uts")[number % 2]
        interrupted(chance, 0.012, "sh", "-c", f"echo {value} > {web / 'unshare'}")
        wait_until(lambda: web.state()["populated"] == "0", "it is idle")
        assert web.run("echo whole") == "whole\n", f"NSFS_TEST_SEED={SEED}"
        assert web.read("unshare").strip() in (
            "cgroup ipc mnt net pid syslog time user uts",
            "mnt pid user uts",
            "ipc mnt net pid user uts",
        )
        wait_until(lambda: web.state()["populated"] == "0", "it is idle")


def test_removal_interrupted_can_be_done_again(tree: Path, instance: Instance) -> None:
    chance = random.Random(SEED)
    for _ in range(15):
        (tree / "web").mkdir()
        (tree / "web" / "db").mkdir()
        Container(tree / "web").start("sleep", "1000")
        interrupted(chance, 0.02, "rm", "-rf", tree / "web")
        done = subprocess.run(
            ["rm", "-rf", tree / "web"], capture_output=True, text=True, check=False, timeout=30
        )
        assert (done.returncode, done.stderr) == (0, ""), f"NSFS_TEST_SEED={SEED}"
        assert not (tree / "web").exists()
    instance.settled()


def test_readers_and_commands_interrupted(tree: Path) -> None:
    chance = random.Random(SEED)
    (tree / "web").mkdir()
    web = Container(tree / "web")
    for number in range(40):
        web.start("sh", "-c", "cat /dev/kmsg & cat /proc/kmsg & wait")
        interrupted(chance, 0.01, "sh", "-c", f"echo 'sleep 1000' > {web / 'exec'}")
        if number % 4 == 3:
            wait_until(lambda: web.state()["populated"] == "1", "they read")
            web.write("kill", chance.choice(["INT", "TERM", "KILL"]))
    web.write("kill", "1")
    wait_until(lambda: web.state()["populated"] == "0", "all are gone", 10)


def test_rebuilt_while_others_meddle(tree: Path, tmp_path: Path, instance: Instance) -> None:
    """mkdir in it, commands, renames and removal of a container that is being rebuilt."""
    stop = tmp_path / "stop"
    (tree / "web").mkdir()
    workers = [
        worker(script, tree, stop)
        for script in (
            "echo 'mnt pid user uts' > web/unshare; echo 'ipc mnt net pid user uts' > web/unshare",
            "mkdir web/in; rmdir web/in",
            "echo true > web/exec; cat web/state",
            "mv -T web bew; mv -T bew web",
            "rm -rf web; mkdir web",
        )
    ]
    time.sleep(STORM_S / 2)
    stop.touch()
    ended(workers)
    for name in ("web", "bew"):
        if (tree / name).exists():
            web = Container(tree / name)
            wait_until(lambda w=web: w.state()["populated"] == "0", "it is idle")
            assert web.run("echo whole") == "whole\n"
            subprocess.run(["rm", "-rf", web.path], check=True, timeout=30)
    instance.settled()
