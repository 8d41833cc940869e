"""The supervisor killed with -9, the daemon that hangs or cannot start, and both gone at once.

Nothing hangs, what `nsfs mount`, `status` and `umount` say is true, and no container is lost that
could be kept.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nsfs import cli
from tests.integration.conftest import DEADLINE_S, NSFS, SLOWNESS, Container, Instance, wait_until

from .test_restart import facts, mounted, works


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Instance]:
    """An instance, which a test may kill; its log may have warnings."""
    found = Instance(tmp_path)
    found.mount()
    yield found
    if mounted(found.tree):
        found.umount()
    assert not mounted(found.tree)
    assert not found.groups()


@pytest.fixture
def web(instance: Instance) -> Container:
    """A container called web."""
    (instance.tree / "web").mkdir()
    return Container(instance.tree / "web")


def supervisor(instance: Instance) -> int:
    return int((instance.run_dir / "supervisor.pid").read_text())


def ended(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill_supervisor(instance: Instance) -> None:
    """kill -9; returns when another one has taken its place, with a daemon of its own."""
    old, daemon = supervisor(instance), instance.daemon()
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: supervisor(instance) != old, "there is another supervisor")
    wait_until(lambda: instance.daemon() != daemon, "it has a daemon")
    parent = Path(f"/proc/{instance.daemon()}/stat").read_text().rpartition(")")[2].split()[1]
    assert int(parent) == supervisor(instance)


def kill_all(instance: Instance) -> None:
    """kill -9 of both at once."""
    pids = [supervisor(instance), instance.daemon()]
    os.kill(pids[0], signal.SIGSTOP)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_until(lambda pid=pid: ended(pid), "it has ended")


def test_another_takes_its_place_and_nobody_notices(instance: Instance, web: Container) -> None:
    web.run("echo before > /dev/kmsg")
    web.start("sh", "-c", "cat /dev/kmsg")
    wait_until(lambda: ";before" in web.read("output"), "it reads")
    before = facts(web)
    with open(web / "kmsg") as kmsg:
        assert ";before" in kmsg.read()
        for turn in range(3):
            kill_supervisor(instance)
            assert facts(web) == before
            web.run(f"echo after{turn} > /dev/kmsg")
            assert f";after{turn}" in kmsg.read()
            wait_until(lambda n=turn: f";after{n}" in web.read("output"), "the reader is woken")
            before = facts(web)
    # It does what one does: starts daemons, and takes everything down.
    instance.kill_daemon()
    works(web)
    status = instance.status()
    assert status["supervisor"] == supervisor(instance)
    assert status["daemon"] == instance.daemon()
    assert instance.command("umount", str(instance.tree), check=False).returncode == 1
    assert instance.command("umount", str(instance.tree), "--kill").returncode == 0
    assert not mounted(instance.tree)


@pytest.fixture
def nsfs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """nsfs(8), which does not wait long for a daemon that does not answer."""
    monkeypatch.setattr(cli, "ASK_S", 2.0 * SLOWNESS)
    monkeypatch.setattr(cli, "START_S", DEADLINE_S)

    def command(*words: object) -> tuple[int, str, str]:
        code = cli.main(list(map(str, words)))
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_requests_under_way_are_answered(instance: Instance, web: Container) -> None:
    for turn in range(6):
        process = subprocess.Popen(["mkdir", web / f"c{turn}"])
        time.sleep(0.002 * turn)
        kill_supervisor(instance)
        assert process.wait(DEADLINE_S) == 0
        works(Container(web / f"c{turn}"))


def test_one_that_somebody_started_is_started_by_that(tmp_path: Path) -> None:
    """As systemd(1) does: nsfs mount --foreground again, and it goes on."""
    instance = Instance(tmp_path)
    instance.tree.mkdir()
    words = ["mount", str(instance.tree), "--run-dir", str(instance.run_dir)]
    words += ["--cgroup", instance.group, "--foreground"]

    def start(log: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / log, "wb") as file:
            return subprocess.Popen([*NSFS, *words], stderr=file, stdout=file)

    def ready(log: str) -> bool:
        return "is ready" in (tmp_path / log).read_text()

    first = start("first")
    try:
        wait_until(lambda: ready("first"), "it is served")
        (instance.tree / "web").mkdir()
        web = Container(instance.tree / "web")
        before = facts(web)
        first.kill()
        first.wait()
        # Meanwhile it is served, and said by whom.
        assert facts(web) == before
        status = instance.status()
        assert (status["supervisor"], status["daemon"]) == (0, instance.daemon())
        second = start("second")
        daemon = instance.daemon()
        wait_until(lambda: instance.daemon() != daemon, "there is another daemon")
        assert facts(web) == before
        assert instance.status()["supervisor"] == second.pid
        # And without one it can be ended.
        second.kill()
        second.wait()
        assert instance.command("umount", str(instance.tree), check=False).returncode == 1
        instance.umount()
        assert not mounted(instance.tree)
        assert not instance.groups()
        third = start("third")
        wait_until(lambda: ready("third"), "it is served")
        third.kill()
        third.wait()
        daemon = instance.daemon()
        os.kill(daemon, signal.SIGTERM)
        wait_until(lambda: ended(daemon), "the daemon ends")
        assert not mounted(instance.tree)
    finally:
        if mounted(instance.tree):
            instance.umount()


def test_a_run_directory_is_for_one_instance(instance: Instance, tmp_path: Path) -> None:
    before = (instance.run_dir / "command").read_text()
    (tmp_path / "other").mkdir()
    done = instance.command(
        "mount", str(tmp_path / "other"), "--run-dir", str(instance.run_dir), check=False
    )
    assert done.returncode == 1
    assert f"another instance is using {instance.run_dir}" in done.stderr
    assert (instance.run_dir / "command").read_text() == before


def test_a_daemon_that_hangs(
    instance: Instance, web: Container, nsfs: Callable[..., tuple[int, str, str]]
) -> None:
    os.kill(instance.daemon(), signal.SIGSTOP)
    code, out, err = nsfs("status", instance.tree)
    assert code == 1
    assert f"daemon {instance.daemon()}\n" in out
    assert "the daemon does not answer" in err
    # The supervisor is gone, too: there is no other then, but for nsfs mount.  (Nobody may look at
    # the tree meanwhile.)
    os.kill(supervisor(instance), signal.SIGKILL)
    wait_until(lambda: ended(supervisor(instance)), "it has ended")
    words = ("--run-dir", instance.run_dir, "--cgroup", instance.group)
    assert nsfs("mount", instance.tree, *words)[0] == 0
    works(web)
    assert instance.status()["supervisor"] == supervisor(instance)
    os.kill(instance.daemon(), signal.SIGSTOP)
    code, _, err = nsfs("umount", instance.tree)
    assert (code, "1 container" in err) == (1, True), err
    works(web)
    os.kill(instance.daemon(), signal.SIGSTOP)
    assert nsfs("umount", "--kill", instance.tree)[0] == 0
    assert not mounted(instance.tree)


def test_a_daemon_that_cannot_start(
    instance: Instance,
    web: Container,
    nsfs: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "START_S", 1.0)
    init = web.init
    (instance.run_dir / "c" / "1.json").write_text("not a record")
    os.kill(instance.daemon(), signal.SIGKILL)
    code, _, err = nsfs("status", instance.tree)
    assert code == 1
    code, _, err = nsfs("umount", "--kill", instance.tree)
    assert code == 1
    assert "no daemon of" in err
    assert "kill -9" in err
    os.kill(supervisor(instance), signal.SIGKILL)
    wait_until(lambda: ended(instance.daemon()), "nobody starts another one")
    assert nsfs("umount", "--kill", instance.tree)[0] == 0
    wait_until(lambda: ended(init), "its init is gone")


def test_both_are_killed_and_the_containers_are_taken_up_again(
    instance: Instance, web: Container
) -> None:
    (web / "db").mkdir()
    db = Container(web / "db")
    db.start("sleep", "1000")
    web.run("echo before > /dev/kmsg")
    init = web.init
    (pid,) = os.listdir(db / "procs")
    kill_all(instance)
    started_s = time.monotonic()
    for command in (["ls", instance.tree], ["mkdir", web / "x"], ["rm", "-rf", web.path]):
        subprocess.run(command, capture_output=True, check=False, timeout=DEADLINE_S)
    done = instance.command("status", str(instance.tree), check=False)
    assert done.returncode == 1
    assert "supervisor 0\ndaemon 0\n" in done.stdout
    assert "nobody serves it" in done.stderr
    done = instance.command("umount", str(instance.tree), check=False)
    assert done.returncode == 1
    assert "records of 2 containers" in done.stderr
    assert time.monotonic() - started_s < DEADLINE_S
    instance.mount()
    assert web.init == init
    assert os.listdir(db / "procs") == [pid]
    assert web.read("kmsg").count(";before") == 1
    for each in (web, db):
        said = each.run("echo said > /dev/kmsg && ls -d /sys/namespaces/procs && hostname")
        assert said.endswith(f"{each.path.name}\n")
        assert each.read("kmsg").count(";said") == 1
    assert web.run("test -c /dev/null && cat /sys/namespaces/db/state; mkdir /sys/namespaces/x")
    works(Container(web / "x"))
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)


def test_both_are_killed_and_umount_takes_down_what_is_left(
    instance: Instance, web: Container
) -> None:
    web.start("sleep", "1000")
    init = web.init
    (pid,) = os.listdir(web / "procs")
    kill_all(instance)
    instance.umount()
    assert not mounted(instance.tree)
    assert not instance.groups()
    assert ended(int(pid))
    assert ended(init)
    instance.mount()
    assert not (instance.tree / "web").exists()


def test_the_graft_is_taken_back_when_both_are_killed(tmp_path: Path) -> None:
    script = """
        set -e
        mount -t tmpfs none /run
        before=$(awk '{print $5, $9}' /proc/self/mountinfo | sort)
        "$@" mount --cgroup "$0" --run-dir /run/nsfs
        mkdir /sys/namespaces/web
        kill -STOP $(cat /run/nsfs/supervisor.pid)
        kill -9 $(cat /run/nsfs/daemon.pid) $(cat /run/nsfs/supervisor.pid)
        sleep 0.2
        ! "$@" umount
        "$@" umount --kill
        test "$before" = "$(awk '{print $5, $9}' /proc/self/mountinfo | sort)"
        test ! -e /sys/namespaces
        "$@" mount --cgroup "$0" --run-dir /run/nsfs
        ! test -e /sys/namespaces/web
        "$@" umount
        echo done
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, f"nsfs-test-{os.getpid()}-graft", *NSFS],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stdout + done.stderr
