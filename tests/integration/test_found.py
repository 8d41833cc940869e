"""Containers that nsfs did not make: they appear, show what they can, are adopted, and vanish."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nsfs.cli import ask
from nsfs.discovery import NS_GET_ID

from .conftest import NSFS, Container, Instance, fails, serving, wait_until, write

ENTRIES = [
    *("ipc", "kill", "mnt", "namespaces", "net", "nsproxy", "pid", "procs", "state"),
    *("time", "user", "uts"),
]
USER = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
OTHER = ["setpriv", "--reuid=1001", "--regid=1001", "--clear-groups"]
MANY = """
import os, signal, sys
for _ in range({count}):
    if not os.fork():
        libc.unshare(0x04000000)
        signal.pause()
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    with tempfile.TemporaryDirectory(prefix="nsfs-", dir="/tmp") as base:
        os.chmod(base, 0o755)
        config = Path(base, "conf")
        config.write_text("[discovery]\nenabled = on\n")
        with serving(Path(base), ["--config", str(config)]) as found:
            yield found


class Process:
    """A process in namespaces of its own."""

    def __init__(self, words: Sequence[str], name: str = "sleep") -> None:
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self.pid = self.process.pid
        comm = Path(f"/proc/{self.pid}/comm")
        wait_until(lambda: comm.read_text() == f"{name}\n", f"{name} runs")

    def end(self) -> None:
        """Kill it; when this returns it has been reaped."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(*words: str, name: str = "sleep") -> Iterator[Process]:
    process = Process(words, name)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.end()


def those_in(directory: Path) -> list[Path]:
    return sorted(directory / n for n in os.listdir(directory) if re.fullmatch(r"unnamed\d+", n))


def has(directory: Path, pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return str(pid) in os.listdir(directory / "procs")
    return False


def found_in(directory: Path, pid: int) -> Container:
    """The found container in a directory that a process is in, or in one nested in it."""

    def look() -> Container | None:
        return next((Container(p) for p in those_in(directory) if has(p, pid)), None)

    found: Container = wait_until(look, f"{pid} is found in {directory}")
    return found


def types(found: Container) -> dict[str, tuple[int, str]]:
    rows = (line.split() for line in found.read("namespaces").splitlines())
    return {kind: (int(ident), where) for kind, ident, where in rows}


def namespaces_have_ids() -> bool:
    """Whether the kernel tells one from another that has its inode number later."""
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        fcntl.ioctl(fd, NS_GET_ID, bytearray(8))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def run_as(user: list[str], script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*user, "bash", "-c", script], capture_output=True, text=True, check=False, timeout=30
    )


# --- what it shows ---


def test_it_appears_with_what_makes_sense(tree: Path) -> None:
    with running("unshare", "-Urnu", "sh", "-c", "hostname made; exec sleep 1000") as process:
        found = found_in(tree, process.pid)
        assert sorted(os.listdir(found.path)) == ENTRIES
        rows = types(found)
        for kind in ("net", "user", "uts"):
            assert rows[kind] == (os.stat(f"/proc/{process.pid}/ns/{kind}").st_ino, "own")
        assert {rows[kind][1] for kind in ("cgroup", "ipc", "mnt", "pid", "time", "syslog")} == {
            ".."
        }
        assert sorted(os.listdir(found / "net")) == ["lo", "routes", "sysctl"]
        assert found.read("net/lo/mtu") == "65536\n"
        assert found.read("uts/hostname") == "made\n"
        assert found.read("user/uid_map").split() == ["0", "0", "1"]
        assert found.read("user/owner") == "0\n"
        assert os.listdir(found / "user/uids") == ["0"]
        # The others are those around it.
        assert found.read("mnt/mounts") == (tree / "mnt/mounts").read_text()
        assert found.read("pid/last").strip().isdigit()
        assert found.read("time/monotonic") == "0 0\n"
        assert os.listdir(found / "procs") == [str(process.pid)]
        assert "container .\n" in found.read(f"procs/{process.pid}")
        assert f"container {found.path.name}\n" in (tree / f"procs/{process.pid}").read_text()
        assert found.state() == {
            **{"populated": "1", "procs": "1", "containers": "0", "reason": "-"}
        }
        for kind in ("net", "user", "mnt"):
            link = os.stat(found / f"nsproxy/{kind}")
            assert link.st_ino == os.stat(f"/proc/{process.pid}/ns/{kind}").st_ino
        listed = subprocess.run(
            ["nsenter", f"--net={found / 'nsproxy/net'}", "ip", "-o", "link"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout
        assert len(listed.splitlines()) == 1


def test_what_is_not_there_or_not_allowed(tree: Path) -> None:
    with running("unshare", "-Urn", "sleep", "1000") as process:
        found = found_in(tree, process.pid)
        for name in ("kmsg", "console", "rootfs", "defaults", "exec", "freeze", "init", "cgroup"):
            with fails(errno.ENOENT):
                os.stat(found / name)
        for name in ("namespaces", "time/monotonic", "time/boottime"):
            assert os.stat(found / name).st_mode & 0o222 == 0
            with fails(errno.EACCES):
                found.write(name, "0")
        with fails(errno.EPERM):
            (found / "db").mkdir()
        with fails(errno.EPERM):
            os.chown(found.path, 1000, -1)
        with fails(errno.EPERM):
            os.chmod(found / "state", 0o600)
        with fails(errno.EOPNOTSUPP):
            os.link(tree / "procs/self", found / "procs/self")
        entered = subprocess.run(
            [*NSFS, "enter", str(found.path), "--", "true"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert entered.returncode == 125
        assert alive(process.pid)


def test_what_is_written_in_its_views_is_done_there(tree: Path) -> None:
    with running("unshare", "-Urniu", "sleep", "1000") as process:
        found = found_in(tree, process.pid)
        here = (tree / "uts/domainname").read_text()
        found.write("net/lo/mtu", "1400")
        found.write("net/lo/inet", "10.9.8.7/8")
        found.write("net/sysctl/ipv4/ip_forward", "1")
        found.write("uts/hostname", "there")
        found.write("uts/domainname", "example")
        found.write("ipc/sysctl/kernel/msgmni", "77")
        (found / "net/eth0").mkdir()

        def inside(command: str) -> str:
            words = ["nsenter", "-t", str(process.pid), "-U", "-n", "-i", "-u", "--", "sh", "-c"]
            return subprocess.run(
                [*words, command], check=True, capture_output=True, text=True, timeout=30
            ).stdout

        assert inside("hostname; domainname; cat /proc/sys/kernel/msgmni").split() == [
            *("there", "example", "77")
        ]
        assert "10.9.8.7" in inside("ip -4 address show lo")
        assert "mtu 1400" in inside("ip link show lo")
        assert "eth0" in inside("ip -o link")
        assert inside("cat /proc/sys/net/ipv4/ip_forward") == "1\n"
        (found / "net/eth0").rmdir()
        with fails(errno.EINVAL):
            found.write("net/lo/mtu", "-1")
        assert (tree / "uts/domainname").read_text() == here


def test_nested_ones_are_in_those_that_made_them(tree: Path) -> None:
    inner = "exec unshare -n sleep 1000"
    with running(
        *(
            "unshare",
            "-Urpf",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            f"{inner} & exec sleep 1000",
        ),
        name="unshare",
    ) as process:
        # The first process is in the new user namespace only.
        outermost = found_in(tree, process.pid)
        child = wait_until(
            lambda: Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split(),
            "it has a child",
        )[0]
        outer = found_in(outermost.path, int(child))
        last = wait_until(
            lambda: Path(f"/proc/{child}/task/{child}/children").read_text().split(), "another"
        )[0]
        wait_until(lambda: Path(f"/proc/{last}/comm").read_text() == "sleep\n", "it runs")
        deepest = found_in(outer.path, int(last))
        assert types(deepest)["net"][1] == "own"
        assert types(deepest)["pid"][1] == ".."
        assert types(outer)["pid"][1] == "own"
        assert sorted(os.listdir(outer / "procs")) == sorted([child, last])
        assert outermost.state()["containers"] == "2"
        assert outer.read("pid/tree").split()[::2] == [child, last]


def test_another_engines_container_is_found_and_left_alone(tree: Path, instance: Instance) -> None:
    with running(
        *("bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "sleep", "1000"),
        name="bwrap",
    ) as process:
        inner = wait_until(
            lambda: [
                int(line.split()[0])
                for line in subprocess.run(
                    ["pgrep", "-g", str(process.pid), "-x", "sleep"],
                    capture_output=True,
                    text=True,
                    timeout=30,
                ).stdout.splitlines()
            ],
            "its command runs",
        )[0]
        group = Path(f"/proc/{inner}/cgroup").read_text()
        found = found_in(tree, inner)
        os.rename(found.path, tree / "box")
        deep = next(path for path, _, _ in os.walk(tree / "box") if has(Path(path), inner))
        assert deep
        assert (tree / "box/net/lo/mtu").read_text() == "65536\n"
        assert Path(f"/proc/{inner}/cgroup").read_text() == group
        held = {os.readlink(each) for each in links(instance.daemon())}
        assert not [each for each in held if re.match(r"(net|mnt|pid|user|uts):", each)]
        subprocess.run(["rm", "-rf", str(tree / "box")], check=True, timeout=30)
        wait_until(lambda: not alive(inner), "it is dead")


def links(pid: int) -> list[str]:
    directory = f"/proc/{pid}/fd"
    return [p for n in os.listdir(directory) if os.path.islink(p := f"{directory}/{n}")]


def test_what_nsfs_does_is_not_found(tree: Path, instance: Instance) -> None:
    (tree / "web").mkdir()
    web = Container(tree / "web")
    web.start("sleep", "1000")
    session = subprocess.Popen(
        [*NSFS, "enter", "--only", "net", str(web.path), "--", "sleep", "1000"],
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: web.state()["procs"] == "2", "it has entered")
        # A process that is seen means that a look has come after.
        with running("unshare", "-u", "sleep", "1000") as process:
            found_in(tree, process.pid)
            seen = {pid for each in those_in(tree) for pid in os.listdir(each / "procs")}
            for pid in seen:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    assert "Kthread:\t1" not in status
                    assert f"PPid:\t{instance.daemon()}\n" not in status
            assert not seen.intersection([str(web.init), *os.listdir(web / "procs")])
            assert not seen.intersection(map(str, (instance.daemon(), os.getpid(), session.pid)))
        assert not those_in(web.path)
    finally:
        session.kill()
        session.wait()
        subprocess.run(["rm", "-rf", str(web.path)], check=True, timeout=30)


# --- vanishing ---


def test_it_vanishes_with_its_last_process(tree: Path) -> None:
    for _ in range(5):
        with running("unshare", "-Urn", "sleep", "1000") as process:
            found = found_in(tree, process.pid)
            assert found.read("net/lo/mtu") == "65536\n"
            directory_fd = os.open(found.path, os.O_RDONLY)
            fds = [
                os.open(found / name, os.O_RDONLY)
                for name in ("net/lo/mtu", "net/lo/inet", "user/uid_map", "state", "namespaces")
            ]
            for name in ("", "net", "net/lo", "net/lo/mtu", "state", "procs"):
                os.stat(found / name)
            os.stat("net/lo", dir_fd=directory_fd)
            process.end()
            with fails(errno.ENOENT):
                os.stat(found.path)
            for name in ("net", "net/lo", "net/lo/mtu", "state", "procs"):
                with fails(errno.ENOENT):
                    os.stat(found / name)
                with fails(errno.ENOENT):
                    os.stat(name, dir_fd=directory_fd)
            for fd in fds:
                with fails(errno.ENODEV):
                    os.read(fd, 100)
                os.close(fd)
            assert found.path not in those_in(tree)
            assert os.listdir(directory_fd) == []
            os.close(directory_fd)


def test_it_is_not_listed_after_its_last_process(tree: Path) -> None:
    for _ in range(5):
        with running("unshare", "-un", "sleep", "1000") as process:
            found = found_in(tree, process.pid)
            process.end()
            assert found.path not in those_in(tree)


def test_it_stays_while_a_child_of_the_last_known_process_is_in_it(
    tree: Path, tmp_path: Path
) -> None:
    script = f"until [ -e {tmp_path}/go ]; do sleep 0.05; done; sleep 1000 & exec true"
    with running("unshare", "-un", "sh", "-c", script, name="sh") as it:
        found = found_in(tree, it.pid)
        (tmp_path / "go").touch()
        it.process.wait()
        if namespaces_have_ids():
            assert found.state()["populated"] == "1"
        else:
            # It may be another one with the same inode numbers.
            with fails(errno.ENOENT):
                found.state()
            (found,) = (Container(path) for path in those_in(tree))
        (pid,) = os.listdir(found / "procs")
        os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not found.path.exists(), "it is gone")


def test_one_stays_while_another_is_nested_in_it(tree: Path) -> None:
    script = "unshare -n sleep 1000 & exec sleep 1000"
    with running("unshare", "-Ur", "sh", "-c", script) as process:
        outer = found_in(tree, process.pid)
        inner = wait_until(lambda: those_in(outer.path), "the other one is found")[0]
        process.end()
        assert outer.state()["containers"] == "1"
        assert Container(inner).state()["populated"] == "1"
        with fails(errno.ENODEV):
            outer.read("namespaces")
        (pid,) = os.listdir(inner / "procs")
        os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda: not outer.path.exists(), "both are gone")


def test_as_deep_as_the_kernel_nests_them(tree: Path) -> None:
    script = """
import ctypes, os, signal
libc = ctypes.CDLL(None)
for _ in range(20):
    if os.fork():
        signal.pause()
    if libc.unshare(0x10000000):
        os._exit(1)
    for name, value in (("uid_map", "0 0 1"), ("setgroups", "deny"), ("gid_map", "0 0 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(value)
signal.pause()
"""
    with running(sys.executable, "-c", script, name=Path(sys.executable).name) as process:

        def chain() -> list[Path]:
            found = []
            directory = next((p for p in those_in(tree) if len(deep(p)) == 20), None)
            while directory is not None:
                found.append(directory)
                directory = next(iter(those_in(directory)), None)
            return found

        def deep(path: Path) -> list[str]:
            with contextlib.suppress(FileNotFoundError):
                return [p for p in os.listdir(path / "procs") if in_session(p, process.pid)]
            return []

        paths = wait_until(lambda: chain() if len(chain()) == 20 else None, "all are found")
        os.killpg(process.pid, signal.SIGKILL)
        process.process.wait()
    for each in paths:
        wait_until(lambda each=each: not each.exists(), "it is gone")


def in_session(pid: str, session: int) -> bool:
    with contextlib.suppress(OSError):
        return os.getsid(int(pid)) == session
    return False


def test_inode_numbers_that_are_used_again_are_not_the_same_container(tree: Path) -> None:
    with running("unshare", "-n", "sleep", "1000") as process:
        found = found_in(tree, process.pid)
        os.rename(found.path, tree / "alice")
        ident = types(Container(tree / "alice"))["net"][0]
        process.end()
        for _ in range(20):
            with running("unshare", "-n", "sleep", "1000") as other:
                with fails(errno.ENOENT):
                    os.stat(tree / "alice")
                assert found_in(tree, other.pid).path.name != found.path.name
                if os.stat(f"/proc/{other.pid}/ns/net").st_ino == ident:
                    break


# --- in a container that nsfs made ---


@pytest.fixture
def web(tree: Path) -> Container:
    (tree / "web").mkdir()
    return Container(tree / "web")


def member_of(web: Container, name: str = "sleep") -> int:
    def look() -> int:
        for each in os.listdir(web / "procs"):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{each}/comm").read_text() == f"{name}\n":
                    return int(each)
        return 0

    pid: int = wait_until(look, f"{name} runs")
    return pid


def test_a_members_is_in_its_container_and_dies_with_it(tree: Path, web: Container) -> None:
    web.start("unshare", "-n", "sleep", "1000")
    pid = member_of(web)
    found = found_in(web.path, pid)
    assert all(not has(each, pid) for each in those_in(tree))
    name = found.path.name
    assert f"container {name}\n" in web.read(f"procs/{pid}")
    assert types(found)["user"][1] == ".."
    assert types(found)["syslog"][1] == ".."
    # As those see it who are inside.
    inside = f"/sys/namespaces/{name}"
    rows = web.run(f"cd {inside}; ls; cat procs/*; cat namespaces; readlink nsproxy/net").split(
        "\n"
    )
    assert rows[: len(ENTRIES)] == ENTRIES
    assert "container ." in rows
    assert "command sleep 1000" in rows
    assert re.fullmatch(r"/proc/\d+/ns/net", rows[-2])
    assert int(rows[-2].split("/")[2]) < 1000
    web.run(f"echo 1300 > {inside}/net/lo/mtu")
    assert found.read("net/lo/mtu") == "1300\n"
    with fails(errno.EBUSY):
        found.path.rmdir()
    done = subprocess.run(["rm", "-rf", str(web.path)], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    wait_until(lambda: not alive(pid), "it is dead")
    with fails(errno.ENOENT):
        os.stat(found.path)


def test_a_members_can_be_killed_alone(web: Container) -> None:
    web.start("sleep", "1001")
    web.start("unshare", "-n", "sh", "-c", "sleep 1000 & exec tail -f /dev/null")
    pid = member_of(web, "tail")
    found = found_in(web.path, pid)
    found.write("kill", "1")
    wait_until(lambda: not found.path.exists(), "it is gone")
    assert not alive(pid)
    assert web.state()["procs"] == "1"
    web.start("unshare", "-n", "tail", "-f", "/dev/null")
    found = found_in(web.path, member_of(web, "tail"))
    done = subprocess.run(["rm", "-rf", str(found.path)], capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not found.path.exists()
    wait_until(lambda: web.state()["procs"] == "1", "only that one was killed")


@pytest.mark.parametrize("remove", ["rm -rf {}", "busybox rm -rf {}", "find {} -delete"])
def test_removal_while_members_go_on_making_namespaces(web: Container, remove: str) -> None:
    web.start("sh", "-c", "while :; do unshare -u sleep 0.05 & unshare -u sleep 0.01; done")
    wait_until(lambda: those_in(web.path), "some are found")
    done = subprocess.run(
        remove.format(web.path).split(), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not web.path.exists()


# --- adoption, killing ---


def test_without_a_name_it_is_not_killed_at_the_root(tree: Path) -> None:
    with running("unshare", "-Urpf", "--kill-child", "sleep", "1000", name="unshare") as process:
        found = found_in(tree, process.pid)
        inner = wait_until(lambda: those_in(found.path), "what is nested in it is found")[0]
        for each in (found.path, inner):
            with fails(errno.EPERM):
                write(each / "kill", "1")
            with fails(errno.EPERM):
                each.rmdir()
            done = subprocess.run(["rm", "-rf", str(each)], capture_output=True, timeout=30)
            assert done.returncode == 1
            assert b"Operation not permitted" in done.stderr
        assert alive(process.pid)
        assert sorted(n for n in os.listdir(found.path) if n != inner.name) == ENTRIES


def test_adopted_it_keeps_its_name_and_is_killed(tree: Path, instance: Instance) -> None:
    script = "unshare -n sleep 1000 & exec sleep 1000"
    with running(
        "unshare", "-Urp", "--fork", "--kill-child", "sh", "-c", script, name="unshare"
    ) as it:
        found = found_in(tree, it.pid)
        with fails(errno.EEXIST):
            os.rename(found.path, tree / "unnamed99999")
        with fails(errno.EEXIST):
            os.rename(found.path, tree / "net")
        (tree / "web").mkdir()
        with fails(errno.EEXIST):
            os.rename(found.path, tree / "web")
        with fails(errno.EPERM):
            os.rename(found.path, tree / "web/alice")
        os.rename(found.path, tree / "alice")
        alice = Container(tree / "alice")
        assert has(alice.path, it.pid)
        assert not found.path.exists()
        with fails(errno.EEXIST):
            (tree / "alice").mkdir()
        nested = wait_until(lambda: those_in(alice.path), "what is nested in it is found")[0]
        inodes = [os.stat(each).st_ino for each in (alice.path, nested)]
        instance.kill_daemon()
        assert [os.stat(each).st_ino for each in (alice.path, nested)] == inodes
        pids = os.listdir(alice / "procs")
        assert str(it.pid) in pids
        instance.kill_daemon()
        done = subprocess.run(["rm", "-rf", str(alice.path)], capture_output=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, b"")
        assert not alice.path.exists()
        it.process.wait(30)
        wait_until(lambda: not any(alive(int(pid)) for pid in pids), "all are dead")
        assert all(not has(each, it.pid) for each in those_in(tree))
        (tree / "web").rmdir()


def test_signals_go_to_an_adopted_one(tree: Path) -> None:
    with running("unshare", "-Urn", "sleep", "1000") as process:
        found = found_in(tree, process.pid)
        os.rename(found.path, tree / "alice")
        with fails(errno.EINVAL):
            write(tree / "alice/kill", "NOTHING")
        assert alive(process.pid)
        write(tree / "alice/kill", "TERM")
        assert process.process.wait(30) == -signal.SIGTERM
        with fails(errno.ENOENT):
            os.stat(tree / "alice")


def test_one_that_forks_all_the_time_is_killed(tree: Path) -> None:
    script = "while :; do sh -c 'sleep 0.05; :' & sleep 0.02; done"
    with running("unshare", "-Ur", "sh", "-c", script, name="sh") as process:
        found = found_in(tree, process.pid)
        os.rename(found.path, tree / "alice")
        subprocess.run(["rm", "-rf", str(tree / "alice")], check=True, timeout=30)
        assert process.process.wait(30) == -signal.SIGKILL
        wait_until(
            lambda: (
                not subprocess.run(
                    ["pgrep", "-g", str(process.pid)], capture_output=True, timeout=30
                ).stdout
            ),
            "all are dead",
        )


# --- whose it is ---


def test_it_belongs_to_the_owner_of_its_user_namespace(tree: Path) -> None:
    with running(*USER, "unshare", "-Urnu", "sleep", "1000") as process:
        found = found_in(tree, process.pid)
        assert os.stat(found.path).st_uid == 1000
        assert os.stat(found / "net").st_mode & 0o777 == 0o700
        path = found.path
        assert run_as(USER, f"echo mine > {path}/uts/hostname; cat {path}/net/lo/mtu").stdout == (
            "65536\n"
        )
        assert found.read("uts/hostname") == "mine\n"
        for script in (f"cat {path}/uts/hostname", f"ls {path}/net", f"echo 1 > {path}/kill"):
            assert "Permission denied" in run_as(OTHER, script).stderr
        # Without a name it is nobody's to kill here, and naming it is for who owns the directory.
        assert "not permitted" in run_as(USER, f"echo 1 > {path}/kill").stderr
        assert "Permission denied" in run_as(USER, f"mv {path} {tree}/mine").stderr
        os.rename(path, tree / "alice")
        assert "Permission denied" in run_as(OTHER, f"echo 1 > {tree}/alice/kill").stderr
        assert "Permission denied" in run_as(OTHER, f"rm -rf {tree}/alice").stderr
        assert alive(process.pid)
        assert run_as(USER, f"echo 1 > {tree}/alice/kill").stderr == ""
        assert process.process.wait(30) == -signal.SIGKILL


def test_its_owner_changes_only_what_the_kernel_would_let_him(tree: Path) -> None:
    # The network namespace is the host's root's, the user namespace is not.
    with running("unshare", "-nu", *USER, "unshare", "-Ui", "sleep", "1000") as process:
        found = found_in(tree, process.pid)
        assert os.stat(found.path).st_uid == 1000
        path = found.path
        for script in (
            f"echo 1400 > {path}/net/lo/mtu",
            f"echo mine > {path}/uts/hostname",
            f"echo 1 > {path}/net/sysctl/ipv4/ip_forward",
            f"mkdir {path}/net/eth0",
        ):
            assert "not permitted" in run_as(USER, script).stderr, script
        assert run_as(USER, f"echo 77 > {path}/ipc/sysctl/kernel/msgmni").stderr == ""
        assert found.read("ipc/sysctl/kernel/msgmni") == "77\n"
        found.write("net/lo/mtu", "1400")
        assert found.read("net/lo/mtu") == "1400\n"


# --- many, and none ---


def test_hundreds_at_once(tree: Path, instance: Instance) -> None:
    script = "import ctypes; libc = ctypes.CDLL(None)\n" + MANY.format(count=300)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 300

        def found() -> dict[str, str]:
            result = {}
            for each in those_in(tree):
                with contextlib.suppress(OSError):
                    result.update(dict.fromkeys(os.listdir(each / "procs"), each.name))
            return result

        wait_until(lambda: set(children) <= found().keys(), "all are found")
        before = found()
        assert len({before[pid] for pid in children}) == 300
        instance.kill_daemon()
        after = found()
        assert {pid: after[pid] for pid in children} == {pid: before[pid] for pid in children}
        mine = before[children[0]]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    wait_until(lambda: not any(alive(int(pid)) for pid in children), "all are dead")
    assert not (tree / mine).exists()
    assert not set(children) & found().keys()
    wait_until(lambda: len(list((instance.run_dir / "found").iterdir())) < 100, "no record is left")


def test_status_tells(instance: Instance) -> None:
    assert instance.status()["discovery"]["enabled"] is True

    def agrees() -> bool:
        # What else is on this machine comes and goes.
        count: int = ask(str(instance.run_dir), {"do": "status"})["discovery"]["found"]
        return count == len(list((instance.run_dir / "found").iterdir()))

    wait_until(agrees, "as many as there are records")


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    with serving(tmp_path) as instance, running("unshare", "-n", "sleep", "1000"):
        assert instance.status()["discovery"]["enabled"] is False
        assert those_in(instance.tree) == []
