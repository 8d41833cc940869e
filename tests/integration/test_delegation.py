"""Users who manage their own containers: what they can do below a directory that was given to them,
and that nothing of it gives them an ID, a process or a file of anybody else.

Everything is done by real processes with the credentials of users that have no privilege.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nsfs.spawner import LIBEXEC
from tests.programs import program

from .conftest import DEADLINE_S, Container, Instance, serving, wait_until, write

ALICE, BOB, STAFF = 4001, 4002, 4100
ENTER = str(LIBEXEC / "nsfs-enter")
NS_GET_OWNER_UID = 0xB704


def run_as(
    uid: int, *words: str | Path, cwd: Path | None = None, groups: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a program as a user without privilege."""
    return subprocess.run(
        words,
        cwd=cwd,
        user=uid,
        group=uid,
        extra_groups=groups,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def call_as(uid: int, function: Callable[..., object], *args: object) -> str:
    """Call a function in a child that is that user; returns the name of its errno, or ""."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        code = 0
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            function(*args)
        except OSError as error:
            code = error.errno or errno.EIO
        except BaseException:
            code = 255
        os.write(theirs, bytes([code]))
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    assert data != b"\xff"
    return errno.errorcode[data[0]] if data[0] else ""


def enter(uid: int, container: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return run_as(uid, ENTER, str(container), "--", *command)


def own(tree: Path, name: str, uid: int = ALICE, before: dict[str, str] | None = None) -> Container:
    """A container at the top that root has made, and given away."""
    (tree / name).mkdir()
    for file, value in (before or {}).items():
        write(tree / name / file, value)
    os.chown(tree / name, uid, uid)
    return Container(tree / name)


def uids_of(container: Container) -> set[int]:
    """The host's IDs of all processes in a container."""
    return {os.stat(path).st_uid for path in container.path.glob("procs/*")}


@pytest.fixture
def alice(tree: Path) -> Container:
    return own(tree, "alice")


# --- what they can ---


def test_make_name_enter_freeze_kill_and_remove(tree: Path, alice: Container) -> None:
    def sh(text: str) -> str:
        done = run_as(ALICE, "sh", "-ec", text, cwd=alice.path)
        assert done.returncode == 0, done
        return done.stdout

    sh("mkdir web web/db; mv web shop")
    db = Container(alice / "shop/db")
    sh("echo 'sleep 1000' > shop/db/exec")
    assert uids_of(db) == {int(Path(f"/proc/{db.init}/uid_map").read_text().split()[1])}
    assert sh("echo 1 > shop/freeze; cat shop/freeze; echo 0 > shop/freeze") == "1\n"
    assert sh("echo TERM > shop/kill; sleep 0.1; grep procs shop/state") == "procs 0\n"
    assert sh("cd shop && echo 'pids.max 20' > defaults/limits && cat defaults/limits")
    assert sh("echo host > shop/db/idmap; echo renamed > shop/uts/hostname") == ""
    sh("rm -rf shop")
    assert not (alice / "shop").exists()


@pytest.mark.parametrize("place", [".", "web", "web/db"])
def test_enter_by_every_way(tree: Path, alice: Container, place: str) -> None:
    assert run_as(ALICE, "mkdir", "-p", "web/db", cwd=alice.path).returncode == 0
    target = alice.path / place
    done = enter(ALICE, target, "sh", "-c", "id -u; cat /proc/self/uid_map | wc -l; exit 33")
    assert (done.returncode, done.stdout) == (33, "0\n1\n"), done
    done = subprocess.run(
        ["ln", tree / "procs/self", f"{target}/procs/"],
        input="id -u; exit 7",
        user=ALICE,
        group=ALICE,
        extra_groups=[],
        env={"SHELL": "/bin/sh", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (7, "0\n"), done
    done = run_as(ALICE, "sh", "-c", f"echo 'sh -c \"id -u\"' > {target}/exec")
    assert done.returncode == 0, done
    wait_until(lambda: (target / "output").read_text() == "0\n", "it has run")


def test_what_root_made_and_gave_away(tree: Path, alice: Container) -> None:
    web = alice / "web"
    web.mkdir()
    assert enter(ALICE, web, "true").returncode == 125
    os.chown(web, ALICE, ALICE)
    assert enter(ALICE, web, "true").returncode == 0
    # A running one as well.
    Container(web).start("sleep", "1000")
    os.chown(web, BOB, BOB)
    assert enter(BOB, web, "true").returncode == 0
    assert enter(ALICE, web, "true").returncode == 125


def test_what_was_made_inside_is_the_owners_outside(tree: Path, alice: Container) -> None:
    done = enter(ALICE, alice.path, "sh", "-ec", "mkdir -p /sys/namespaces/x/y; echo made")
    assert done.stdout == "made\n", done
    root = int(Path(f"/proc/{alice.init}/uid_map").read_text().split()[1])
    inside = f"/proc/{alice.init}/root/sys/namespaces/x"
    assert os.stat(inside).st_uid == root
    for name in ("x", "x/y", "x/exec", "x/y/freeze"):
        assert os.stat(alice / name).st_uid == ALICE
    assert enter(ALICE, alice / "x/y", "id", "-u").stdout == "0\n"
    assert enter(BOB, alice / "x/y", "id", "-u").returncode == 125
    assert run_as(ALICE, "rm", "-rf", alice / "x").stderr == ""
    assert not (alice / "x").exists()


def test_a_group_with_write_permission(tree: Path, alice: Container) -> None:
    def as_bob(*words: str | Path) -> int:
        return run_as(BOB, *words, groups=(STAFF,)).returncode

    assert as_bob("mkdir", alice / "web") != 0
    # Owners give to groups that they are in; what is no permission is not kept.
    done = run_as(ALICE, "chgrp", str(STAFF), alice.path, groups=(STAFF,))
    assert done.returncode == 0, done
    assert run_as(ALICE, "chgrp", "4999", alice.path).returncode != 0
    assert run_as(ALICE, "chmod", "7775", alice.path).returncode == 0
    found = os.stat(alice.path)
    assert (oct(found.st_mode & 0o7777), found.st_gid, found.st_uid) == ("0o775", STAFF, ALICE)
    assert as_bob("mkdir", alice / "web") == 0
    assert os.stat(alice / "web").st_uid == BOB
    # To make, name and remove is one thing, to enter another: that is procs/.
    assert as_bob(ENTER, alice.path, "--", "true") == 125
    assert run_as(ALICE, "chmod", "775", alice / "procs").returncode == 0
    assert as_bob(ENTER, alice.path, "--", "true") == 0
    # chmod has not fixed whose it is.
    os.chown(alice.path, BOB, STAFF)
    assert os.stat(alice / "procs").st_uid == BOB
    assert as_bob("rmdir", alice / "web") == 0


# --- what they cannot ---


LIMITED = {
    "host": {"idmap": "host"},
    "shared": {"unshare": "cgroup ipc mnt net pid syslog time uts"},
    "bobs": {"idmap": f"0 {BOB} 1"},
    "some": {"idmap": f"0 {ALICE} 1\n1 {BOB} 1"},
    "hosts": {"idmap": "0 100000 65536"},
}


@pytest.mark.parametrize("how", LIMITED)
def test_ids_that_are_not_the_users(tree: Path, how: str) -> None:
    given = own(tree, "given", ALICE, LIMITED[how])
    done = enter(ALICE, given.path, "touch", "/tmp/x")
    assert done.returncode == 125
    assert "not permitted" in done.stderr
    assert call_as(ALICE, write, given / "exec", "sleep 1000") == "EPERM"
    assert "caller's" in given.state()["reason"]
    done = run_as(ALICE, "ln", tree / "procs/self", f"{given.path}/procs/")
    assert done.returncode != 0
    # Nor by the kernel's own doors, nor for what is made in it, but with IDs of its own.
    for kind in ("user", "mnt"):
        link = f"/proc/{given.init}/ns/{kind}"
        assert call_as(ALICE, os.open, link, os.O_RDONLY) == "EACCES"
    write(given / "defaults/idmap", "host")
    assert call_as(ALICE, os.mkdir, given / "web") == ""
    assert call_as(ALICE, write, given / "web/exec", "sleep 1000") == "EPERM"
    assert enter(ALICE, given / "web", "true").returncode == 125
    assert uids_of(given) == set()
    done = run_as(ALICE, ENTER, "--only", "user,mnt", given.path, "--", "true")
    assert done.returncode == 125
    # Root may.
    given.start("sleep", "1000")
    done = subprocess.run([ENTER, given.path, "--", "id", "-u"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0\n"), done


def test_the_hosts_ids_by_the_defaults(tree: Path) -> None:
    """Where everybody makes containers at the top, and root wants them with the host's IDs."""
    write(tree / "defaults/idmap", "host")
    os.chmod(tree, 0o777)
    try:
        assert call_as(ALICE, os.mkdir, tree / "mine") == ""
        assert namespace_owner(Container(tree / "mine").init) == 0
        assert enter(ALICE, tree / "mine", "true").returncode == 125
        assert call_as(ALICE, write, tree / "mine/exec", "true") == "EPERM"
        assert call_as(ALICE, write, tree / "mine/idmap", "auto") == "EACCES"
        assert call_as(ALICE, os.rmdir, tree / "mine") == ""
    finally:
        os.chmod(tree, 0o755)
        write(tree / "defaults/idmap", "")


def test_ids_below_one_with_the_hosts_are_of_the_pool(tree: Path) -> None:
    given = own(tree, "given", ALICE, {"idmap": "host"})
    assert call_as(ALICE, os.mkdir, given / "web") == ""
    web = Container(given / "web")
    fields = Path(f"/proc/{web.init}/uid_map").read_text().split()
    assert int(fields[1]) >= 0x70000000
    assert enter(ALICE, web.path, "id", "-u").stdout == "0\n"


def test_just_the_users_own_ids(tree: Path) -> None:
    given = own(tree, "given", ALICE, {"idmap": f"0 {ALICE} 1"})
    assert enter(ALICE, given.path, "id", "-u").stdout == "0\n"
    assert call_as(ALICE, write, given / "exec", "sleep 1000") == ""
    assert uids_of(given) == {ALICE}
    os.chown(given.path, BOB, BOB)
    assert enter(BOB, given.path, "true").returncode == 125


def test_another_users_slice(tree: Path, alice: Container) -> None:
    assert call_as(ALICE, os.mkdir, alice / "web") == ""
    # All IDs of alice's, so those of every other that is nested there.
    assert call_as(ALICE, write, alice / "web/idmap", "host") == ""
    assert enter(ALICE, alice / "web", "true").returncode == 0
    os.chown(alice / "web", BOB, BOB)
    assert enter(BOB, alice / "web", "true").returncode == 125
    assert call_as(BOB, write, alice / "web/exec", "true") == "EPERM"
    # What bob makes there gets IDs of its own, and they are nobody else's.
    assert call_as(ALICE, os.mkdir, alice / "other") == ""
    assert call_as(BOB, os.mkdir, alice / "web/db") == ""
    assert enter(BOB, alice / "web/db", "true").returncode == 0
    starts = {
        Path(f"/proc/{(alice / name / 'init').read_text().strip()}/uid_map").read_text().split()[1]
        for name in ("other", "web/db")
    }
    assert len(starts) == 2


def test_inside_a_user_is_not_given_its_root(alice: Container) -> None:
    # Container root gives two to an ordinary user inside, one of them with its own IDs.
    script = """
        cd /sys/namespaces
        mkdir db same
        echo host > same/idmap
        chown 1000:1000 db same
        echo $(stat -c %u db same)
        as() { setpriv --reuid=1000 --regid=1000 --clear-groups "$@"; }
        as sh -c 'echo "sleep 1000" > db/exec' && echo started
        as sh -c 'echo "sleep 1000" > same/exec' || echo refused
        as mkdir same/below && echo made
        as sh -c 'echo host > same/below/idmap'
        as sh -c 'echo "sleep 1000" > same/below/exec' || echo refused
        as nsenter --user=/proc/$(cat same/below/init)/ns/user true || echo refused
        as mkdir db/x && echo made
        as mkdir x || echo refused
        cat same/procs/* || echo nobody
        chown 5 . || echo refused
    """
    done = enter(ALICE, alice.path, "sh", "-c", script)
    lines = done.stdout.splitlines()
    assert lines == [
        "1000 1000",
        "started",
        "refused",
        "made",
        "refused",
        "refused",
        "made",
        "refused",
        "nobody",
        "refused",
    ], done


# --- root filesystems ---


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of alice's that everybody can search, on a real filesystem."""
    top = Path(tempfile.mkdtemp(prefix="nsfs-home-", dir="/var/tmp"))
    os.chmod(top, 0o755)
    os.chown(top, ALICE, ALICE)
    yield top
    shutil.rmtree(top)


def small_tree(path: Path, uid: int) -> Path:
    (path / "bin").mkdir(parents=True)
    shutil.copy(program("busybox"), path / "bin/sh")
    for each in (path, path / "bin", path / "bin/sh"):
        os.chown(each, uid, uid)
    return path


LEAVE = """
    busybox() { /bin/sh "$@"; }
    echo > /mine
    chmod 4755 /mine
    chown 1000 /mine 2> /dev/null && echo another
    exit 0
"""


def test_a_users_tree_holds_no_file_of_another(tree: Path, alice: Container, home: Path) -> None:
    root = small_tree(home / "root", ALICE)
    assert call_as(ALICE, os.mkdir, alice / "web") == ""
    assert call_as(ALICE, write, alice / "web/rootfs", str(root)) == ""
    done = enter(ALICE, alice / "web", "/bin/sh", "-c", LEAVE)
    assert (done.returncode, done.stdout) == (0, ""), done
    found = os.stat(root / "mine")
    assert (found.st_uid, found.st_gid) == (ALICE, ALICE)
    assert {os.stat(p).st_uid for p in root.rglob("*")} == {ALICE}
    # A tree of root's, or of bob's, however it is named.
    for each in ("/usr", str(small_tree(home / "bobs", BOB))):
        assert call_as(ALICE, write, alice / "web/rootfs", each) == "EPERM"
    assert call_as(ALICE, write, alice / "defaults/rootfs", "/usr") == ""
    assert call_as(ALICE, os.mkdir, alice / "db") == "EPERM"


def test_other_ids_own_nothing_in_a_users_tree(tree: Path, alice: Container, home: Path) -> None:
    root = small_tree(home / "root", ALICE)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    assert call_as(ALICE, os.mkdir, alice / "web") == ""
    assert call_as(ALICE, write, alice / "web/rootfs", str(root)) == ""
    init = Container(alice / "web").init
    inside = ["nsenter", "-t", str(init), "-U", "-m", "--setuid", "1000", "--setgid", "1000"]
    done = subprocess.run(
        [*inside, "/bin/sh", "-c", ": > /tmp/mine"], capture_output=True, text=True, timeout=30
    )
    assert os.strerror(errno.EOVERFLOW) in done.stderr, done
    assert not list((root / "tmp").iterdir())


def test_a_tree_named_inside_is_not_the_hosts(tree: Path, alice: Container, home: Path) -> None:
    """What root has bound into a container, writable and the container root's on disk, is no tree
    of a nested container whose root could leave files of the host's root there."""
    shared = home / "shared"
    root = int(Path(f"/proc/{alice.init}/uid_map").read_text().split()[1])
    small_tree(shared / "root", root)
    web = Container(alice.path)
    web.write("binds", f"/mnt {shared} rw")
    root = int(Path(f"/proc/{web.init}/uid_map").read_text().split()[1])
    for each in (shared, *shared.rglob("*")):
        os.chown(each, root, root)
    done = enter(
        ALICE,
        alice.path,
        "sh",
        "-c",
        "cd /sys/namespaces; mkdir db; echo /mnt/root > db/rootfs || echo refused",
    )
    assert done.stdout == "refused\n", done
    assert {os.stat(p).st_uid for p in shared.rglob("*")} == {root}


# --- the kernel's owner, and taking back ---


def namespace_owner(pid: int) -> int:
    with open(f"/proc/{pid}/ns/user", "rb") as file:
        return int.from_bytes(fcntl.ioctl(file, NS_GET_OWNER_UID, bytes(4)), "little")


def test_the_user_namespace_goes_with_an_idle_container(tree: Path) -> None:
    web = own(tree, "web")
    assert namespace_owner(web.init) == ALICE
    first = web.init
    os.chown(web.path, BOB, BOB)
    assert namespace_owner(web.init) == BOB
    assert web.init != first
    before = web.init
    os.chmod(web.path, 0o700)
    os.chown(web.path, BOB, STAFF)
    assert web.init == before
    web.start("sleep", "1000")
    os.chown(web.path, 0, 0)
    assert (web.init, namespace_owner(web.init)) == (before, BOB)
    # With the host's IDs it was never anybody's but root's.
    write(tree / "web/kill", "KILL")
    wait_until(lambda: web.state()["populated"] == "0", "it is idle")
    web.write("idmap", "host")
    os.chown(web.path, ALICE, ALICE)
    assert namespace_owner(web.init) == 0


@pytest.mark.parametrize("restart", [False, True])
def test_descriptors_do_not_outlast_authority(
    instance: Instance, tree: Path, alice: Container, restart: bool
) -> None:
    alice.start("sleep", "1000")

    def hold(told: int, go: int) -> None:
        files = {
            name: os.open(alice / name, os.O_WRONLY)
            for name in ("exec", "kill", "uts/hostname", "defaults/limits")
        }
        directory = os.open(alice.path, os.O_RDONLY | os.O_DIRECTORY)
        os.write(told, b".")
        os.read(go, 1)
        for name, fd in files.items():
            try:
                os.write(fd, b"x")
            except PermissionError as error:
                assert error.errno == errno.EACCES, name
            else:
                raise AssertionError(name)
        for attempt in (
            lambda: os.mkdir("web", dir_fd=directory),
            lambda: os.open("exec", os.O_WRONLY, dir_fd=directory),
            lambda: os.open("../alice/kill", os.O_WRONLY, dir_fd=directory),
            lambda: os.rename("procs", "web", src_dir_fd=directory, dst_dir_fd=directory),
        ):
            try:
                attempt()
            except PermissionError as error:
                assert error.errno == errno.EACCES
            else:
                raise AssertionError("still allowed")

    told, go = os.pipe(), os.pipe()
    result = []

    thread = threading.Thread(target=lambda: result.append(call_as(ALICE, hold, told[1], go[0])))
    thread.start()
    os.read(told[0], 1)
    if restart:
        instance.kill_daemon()
    os.chown(alice.path, 0, 0)
    os.write(go[1], b".")
    thread.join(DEADLINE_S)
    assert result == [""]
    assert alice.state()["procs"] == "1"
    for fd in (*told, *go):
        os.close(fd)


def offered(container: Path) -> list[int]:
    """Ask as the session program does; returns the descriptors that were given."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.setxattr(container / "procs", "user.nsfs.enter", str(theirs.fileno()).encode())
    return socket.recv_fds(ours, 4096, 8)[1]


def test_what_was_handed_over_is_taken_back(tree: Path, alice: Container) -> None:
    from nsfs.init import _EXEC, _INIT_REQUEST  # type: ignore[attr-defined]

    alice.start("sleep", "1000")
    request = _INIT_REQUEST.pack(_EXEC, 0, 1, 0, 0, 0, 2, 0, 0) + b"/\0sleep\0001000\0"

    def attempt(told: int, go: int) -> None:
        fds = offered(alice.path)
        first, second = (socket.socket(fileno=fd) for fd in offered(alice.path)[1:])
        first.send(request)
        assert len(first.recv(100)) > 0
        os.write(told, b".")
        os.read(go, 1)
        for each in (second, *(socket.socket(fileno=fd) for fd in fds[1:])):
            try:
                each.send(request)
                assert each.recv(100) == b""
            except ConnectionError:
                pass

    told, go = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(ALICE, ALICE, ALICE)
            os.setresuid(ALICE, ALICE, ALICE)
            attempt(told[1], go[0])
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    os.read(told[0], 1)
    wait_until(lambda: alice.state()["procs"] == "2", "the first was started")
    os.chown(alice.path, BOB, BOB)
    os.write(go[1], b".")
    assert os.waitpid(pid, 0)[1] == 0
    assert alice.state()["procs"] == "2"
    for fd in (*told, *go):
        os.close(fd)


def test_whoever_holds_all_connections_cannot_keep_it(tree: Path, alice: Container) -> None:
    alice.start("sleep", "1000")

    def hold(told: int, go: int) -> None:
        held = []
        for _ in range(300):
            first, *connections = offered(alice.path)
            os.close(first)  # Most have no more than 1024 descriptors.
            held += connections
        os.write(told, b".")
        os.read(go, 1)
        for fd in held:
            with contextlib.suppress(ConnectionError):
                assert os.read(fd, 1) == b""

    told, go = os.pipe(), os.pipe()
    result: list[str] = []
    thread = threading.Thread(target=lambda: result.append(call_as(ALICE, hold, told[1], go[0])))
    thread.start()
    os.read(told[0], 1)
    alice.run("hostname")
    os.chown(alice.path, 0, 0)
    alice.run("hostname")
    assert subprocess.run([ENTER, alice.path, "--", "true"], check=False).returncode == 0
    os.write(go[1], b".")
    thread.join(DEADLINE_S)
    assert result == [""]
    for fd in (*told, *go):
        os.close(fd)


def test_chown_back_and_forth_while_it_is_used(tree: Path) -> None:
    """From the moment when chown(2) returns nothing works for whom it does not belong to."""
    alice = own(tree, "alice")
    alice.start("sleep", "1000")
    stop = time.monotonic() + 1.5

    def hammer() -> None:
        while time.monotonic() < stop:
            for attempt in (
                lambda: write(alice / "exec", "true"),
                lambda: os.mkdir(alice / "web"),
                lambda: os.rmdir(alice / "web"),
            ):
                try:
                    attempt()
                except OSError as error:
                    if error.errno not in (
                        errno.EACCES,
                        errno.EPERM,
                        errno.ENOENT,
                        errno.EEXIST,
                        errno.EBUSY,
                    ):
                        raise

    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(ALICE, ALICE, ALICE)
            os.setresuid(ALICE, ALICE, ALICE)
            hammer()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    while time.monotonic() < stop:
        os.chown(alice.path, 0, 0)
        assert call_as(ALICE, write, alice / "exec", "true") == "EACCES"
        assert call_as(ALICE, os.mkdir, alice / "mine") == "EACCES"
        assert enter(ALICE, alice.path, "true").returncode == 125
        os.chown(alice.path, ALICE, ALICE)
    assert os.waitpid(pid, 0)[1] == 0
    os.chown(alice.path, 0, 0)
    subprocess.run(["rm", "-rf", alice.path], check=True)


# --- out of the subtree ---


def test_above_and_beside_is_out_of_reach(tree: Path, alice: Container) -> None:
    bobs = own(tree, "bob", BOB)
    bobs.start("sleep", "1000")
    assert call_as(ALICE, os.mkdir, alice / "web") == ""
    assert call_as(ALICE, write, alice / "web/exec", "sleep 1000") == ""
    (member,) = (int(p.name) for p in (alice / "web/procs").iterdir())
    (other,) = (int(p.name) for p in (bobs / "procs").iterdir())
    up = alice / "web/../.."

    def attribute() -> None:
        os.setxattr(bobs / "procs", "user.nsfs.enter", b"0")

    attempts: list[tuple[str, Callable[..., object], tuple[object, ...]]] = [
        ("EACCES", os.mkdir, (up / "x",)),
        ("EACCES", write, (up / "bob/exec", "true")),
        ("EACCES", write, (up / "bob/kill", "1")),
        ("EACCES", write, (up / "alice/freeze", "1")),
        ("EACCES", write, (up / "alice/binds", "")),
        ("EACCES", os.rename, (alice / "web", up / "web")),
        ("EACCES", os.rename, (bobs.path, alice / "mine")),
        ("EACCES", os.rename, (alice.path, tree / "alicia")),
        ("EACCES", os.rmdir, (alice.path,)),
        ("EPERM", os.link, (tree / f"procs/{member}", bobs / f"procs/{member}")),
        ("EPERM", os.link, (tree / f"procs/{other}", alice / f"procs/{other}:net")),
        ("EPERM", os.link, (alice / "exec", alice / "kill2")),
        ("EACCES", attribute, ()),
        ("EPERM", os.chown, (alice / "web", BOB, BOB)),
        ("EPERM", os.chown, (alice.path, 0, 0)),
        ("EPERM", os.chmod, (alice / "rootfs", 0o666)),
        ("EACCES", os.open, (bobs / "nsproxy/net", os.O_RDONLY)),
        ("EACCES", os.open, (tree / "init", os.O_WRONLY)),
        ("EACCES", os.listdir, (tree / ".f",)),
        ("EACCES", os.listdir, (f"/proc/{other}/root",)),
        ("EACCES", os.open, (bobs / "output", os.O_RDONLY)),
        ("EACCES", os.open, (bobs / "kmsg", os.O_RDONLY)),
        ("EACCES", os.truncate, (tree / "kmsg", 0)),
        ("EPERM", os.kill, (other, signal.SIGKILL)),
    ]
    for wanted, function, args in attempts:
        assert call_as(ALICE, function, *args) == wanted, (function, args)
    # By the members' own view of the tree: theirs is what is in theirs.
    inner = Path(f"/proc/{member}/root/sys/namespaces")
    for attempt in (
        lambda: os.mkdir(inner / "x"),
        lambda: write(inner / "exec", "true"),
        lambda: os.rmdir(inner / "uts"),
    ):
        assert call_as(ALICE, attempt) == "EACCES"
    assert call_as(ALICE, os.mkdir, alice / "db") == ""
    assert bobs.state()["procs"] == "1"


def test_nobody_is_moved_in_place_without_the_kernels_leave(tree: Path, alice: Container) -> None:
    with subprocess.Popen(["sleep", "1000"], user=ALICE, group=ALICE, extra_groups=[]) as process:
        try:
            for types in (":net", ":uts,ipc", ":user,mnt", ""):
                name = alice / f"procs/{process.pid}{types}"
                assert call_as(ALICE, os.link, tree / f"procs/{process.pid}", name) == "EPERM"
            assert alice.state()["procs"] == "0"
        finally:
            process.kill()


# --- how many ---


@pytest.fixture(scope="module")
def limited() -> Iterator[Instance]:
    """An instance where a user may have four containers, and two ranges."""
    with tempfile.TemporaryDirectory(prefix="nsfs-", dir="/tmp") as name:
        base = Path(name)
        base.chmod(0o755)
        (base / "conf").write_text("[limits]\ncontainers_per_user = 4\nranges_per_user = 2\n")
        with serving(base, ["--config", str(base / "conf")]) as found:
            yield found


@pytest.fixture
def counted(limited: Instance) -> Iterator[Path]:
    yield limited.tree
    os.chmod(limited.tree, 0o755)
    for path in limited.tree.iterdir():
        if (path / "exec").exists():
            subprocess.run(["rm", "-rf", path], check=True, timeout=DEADLINE_S)
    limited.settled()


def test_the_number_of_a_users_containers(limited: Instance, counted: Path) -> None:
    alice = own(counted, "alice")
    for name in ("a", "b", "b/c"):
        assert call_as(ALICE, os.mkdir, alice / name) == ""
    # alice itself is the fourth.
    assert call_as(ALICE, os.mkdir, alice / "d") == "ENOSPC"
    assert alice.state()["reason"] == f"d: the user's limit of containers: {ALICE}"
    # From inside it is on the same account, whoever makes it there.
    script = "mkdir /sys/namespaces/x || setpriv --reuid=7 mkdir /sys/namespaces/x"
    done = enter(ALICE, alice.path, "sh", "-c", script)
    assert done.stderr.count("No space left on device") == 1, done
    assert "setpriv" in done.stderr or "Permission denied" in done.stderr
    limited.kill_daemon()
    assert call_as(ALICE, os.mkdir, alice / "d") == "ENOSPC"
    # Root has no limit; another user one of his own.
    (alice / "roots").mkdir()
    bobs = own(counted, "bob", BOB)
    assert call_as(BOB, os.mkdir, bobs / "a") == ""
    # What was removed, or given to somebody else, does not count; what one was given does.
    assert call_as(ALICE, os.rmdir, alice / "b/c") == ""
    assert call_as(ALICE, os.mkdir, alice / "d") == ""
    assert call_as(ALICE, os.mkdir, alice / "e") == "ENOSPC"
    os.chown(alice / "a", BOB, BOB)
    assert call_as(ALICE, os.mkdir, alice / "e") == ""
    os.chown(alice / "roots", ALICE, ALICE)
    assert call_as(ALICE, os.rmdir, alice / "e") == ""
    assert call_as(ALICE, os.mkdir, alice / "e") == "ENOSPC"


def test_what_was_made_inside_counts(counted: Path) -> None:
    alice = own(counted, "alice")
    done = enter(ALICE, alice.path, "sh", "-c", "cd /sys/namespaces; mkdir a b c d; ls -d ?")
    assert done.stdout == "a\nb\nc\n", done
    assert call_as(ALICE, os.mkdir, alice / "d") == "ENOSPC"


def test_the_number_of_a_users_ranges(counted: Path) -> None:
    os.chmod(counted, 0o777)
    for name, wanted in (("a", ""), ("b", ""), ("c", "ENOSPC")):
        assert call_as(ALICE, os.mkdir, counted / name) == wanted
    assert "ranges" in Container(counted).state()["reason"]
    # Those nested there have slices.
    assert call_as(ALICE, os.mkdir, counted / "a/x") == ""
    assert call_as(ALICE, os.rmdir, counted / "b") == ""
    assert call_as(ALICE, os.mkdir, counted / "c") == ""
    assert call_as(BOB, os.mkdir, counted / "d") == ""


@pytest.mark.parametrize("place", [".", "web", "web/db"])
def test_enter_in_part(alice: Container, place: str) -> None:
    """Who owns the user namespace may join it, and with it all that it owns."""
    assert run_as(ALICE, "mkdir", "-p", "web/db", cwd=alice.path).returncode == 0
    target = Container(alice.path / place)

    def part(uid: int, types: str, script: str) -> subprocess.CompletedProcess[str]:
        return run_as(uid, ENTER, "--only", types, target.path, "--", "sh", "-c", script)

    done = part(ALICE, "user,mnt,net,uts,pid", "id -u; readlink /proc/self/ns/net; hostname")
    net = os.readlink(f"/proc/{target.init}/ns/net")
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == ["0", net, target.path.name]
    # Without it, that takes privilege where the caller is.
    for types in ("net", "uts,ipc", "mnt"):
        assert part(ALICE, types, "true").returncode == 125
    assert part(BOB, "user,mnt", "true").returncode == 125
    assert target.state()["procs"] == "0"
