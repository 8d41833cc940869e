"""How containers are built: rootfs, idmap, unshare, binds, network, limits, defaults/.

Every errno of the manual, and that what fails leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import program

from .conftest import (
    DEADLINE_S,
    TYPES,
    Container,
    Instance,
    holding,
    namespaces_of,
    refused,
    wait_until,
    write,
)

# By way of a shell: what setpriv(1) executes itself it still looks up with its capabilities.
AS_NOBODY = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("sh", "-c", 'exec "$0" "$@"'),
]


def idle(container: Container) -> Container:
    wait_until(lambda: container.state()["populated"] == "0", "it is idle")
    return container


@pytest.fixture
def hidden() -> Iterator[Path]:
    """A directory on a real filesystem below one that others cannot search."""
    top = Path(tempfile.mkdtemp(prefix="nsfs-hidden-", dir="/var/tmp"))
    yield top
    shutil.rmtree(top)


def busybox_tree(path: Path) -> Path:
    """A root filesystem with nothing but busybox, of uid 0."""
    for name in ("bin", "etc", "tmp", "srv"):
        (path / name).mkdir(parents=True)
    shutil.copy(program("busybox"), path / "bin" / "busybox")
    subprocess.run([path / "bin/busybox", "--install", "-s", path / "bin"], check=True)
    for link in (path / "bin").iterdir():
        if link.is_symlink():
            link.unlink()
            link.symlink_to("busybox")
    (path / "etc" / "mark").write_text("the tree\n")
    return path


@pytest.fixture
def rootfs(hidden: Path) -> Path:
    return busybox_tree(hidden / "root")


# --- rootfs ---


def test_rootfs_is_the_tree_and_nothing_of_the_host(web: Container, rootfs: Path) -> None:
    web.write("rootfs", str(rootfs))
    assert web.read("rootfs") == f"{rootfs}\n"
    assert set(web.run("ls /").split()) == {"bin", "etc", "tmp", "srv", "dev", "proc", "sys"}
    assert web.run("cat /etc/mark; id -u; hostname") == "the tree\n0\nweb\n"
    assert web.run("ls /sys/namespaces/state; test -c /dev/null && echo null") == (
        "/sys/namespaces/state\nnull\n"
    )
    assert web.run("stat -c %u /etc/mark") == "0\n"


def test_what_is_made_inside_belongs_to_ids_of_the_host_on_disk(
    web: Container, rootfs: Path
) -> None:
    web.write("rootfs", str(rootfs))
    web.run("echo x > /srv/roots; echo x > /srv/users; chown 1000:1001 /srv/users")
    roots, users = os.stat(rootfs / "srv/roots"), os.stat(rootfs / "srv/users")
    assert (roots.st_uid, roots.st_gid) == (0, 0)
    assert (users.st_uid, users.st_gid) == (1000, 1001)
    # A process that makes them is somebody else all the same.
    web.start("sleep", "1000")
    (pid,) = wait_until(lambda: os.listdir(web / "procs"), "it sleeps")
    assert os.stat(f"/proc/{pid}").st_uid >= 0x70000000


def test_a_tree_that_cannot_be_idmapped(web: Container, hidden: Path) -> None:
    (hidden / "ram").mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", hidden / "ram"], check=True)
    try:
        tree = busybox_tree(hidden / "ram/root")
        (tree / "etc/mark").write_text("in memory\n")
        refused(errno.EINVAL, web.write, "rootfs", str(tree))
        assert web.state()["reason"].startswith("rootfs: idmapping the root filesystem")
        assert web.read("rootfs") == "host\n"
        web.write("unshare", "cgroup ipc mnt net pid syslog time uts")
        web.write("rootfs", str(tree))
        assert web.run("cat /etc/mark") == "in memory\n"
        web.write("rootfs", "host")
    finally:
        subprocess.run(["umount", hidden / "ram"], check=True)


def test_setuid_programs_left_in_a_tree_cannot_be_reached(web: Container, rootfs: Path) -> None:
    web.write("rootfs", str(rootfs))
    web.run("cp /bin/busybox /srv/su; chmod 4755 /srv/su")
    assert os.stat(rootfs / "srv/su").st_mode & 0o4000
    assert os.stat(rootfs / "srv/su").st_uid == 0
    done = subprocess.run(
        [*AS_NOBODY, rootfs / "srv/su", "id"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 126


def test_a_tree_that_others_can_reach_is_refused(web: Container, hidden: Path) -> None:
    tree = busybox_tree(hidden / "a" / "root")
    os.chmod(hidden, 0o755)
    refused(errno.EPERM, web.write, "rootfs", str(tree))
    assert web.read("rootfs") == "host\n"
    # What leads there is not what is above it.
    secret = hidden / "secret"
    secret.mkdir(0o700)
    (secret / "link").symlink_to(tree)
    refused(errno.EPERM, web.write, "rootfs", str(secret / "link"))
    os.chmod(tree, 0o700)
    web.write("rootfs", str(tree))
    assert web.run("cat /etc/mark") == "the tree\n"


def test_rootfs_errors(web: Container, hidden: Path) -> None:
    (hidden / "file").write_text("")
    init = web.init
    for value, number in (
        ("relative", errno.EINVAL),
        ("/a/../b", errno.EINVAL),
        (str(hidden / "none"), errno.ENOENT),
        (str(hidden / "file"), errno.ENOTDIR),
        (str(hidden / "file" / "x"), errno.ENOTDIR),
    ):
        refused(number, web.write, "rootfs", value)
        assert web.read("rootfs") == "host\n"
    assert web.init == init
    assert web.run("hostname") == "web\n"


def test_a_tree_that_cannot_be_started_leaves_the_old_one(web: Container, hidden: Path) -> None:
    (hidden / "dev").write_text("a file where a directory must be")
    with pytest.raises(OSError, match=r"."):
        web.write("rootfs", str(hidden))
    assert web.read("rootfs") == "host\n"
    assert web.state()["reason"] != "-"
    assert web.run("hostname") == "web\n"


# --- idmap ---


def test_idmap_auto_host_and_lines(web: Container) -> None:
    def maps() -> list[list[int]]:
        lines = Path(f"/proc/{web.init}/uid_map").read_text().splitlines()
        assert Path(f"/proc/{web.init}/gid_map").read_text().splitlines() == lines
        return [list(map(int, line.split())) for line in lines]

    automatic = maps()
    assert automatic[0][2] == 16 * 65536
    web.write("idmap", "host")
    assert maps() == [[0, 0, 4294967295]]
    lines = "0 1879048192 10\n100 1900000000 1000"
    web.write("idmap", lines)
    assert web.read("idmap") == f"{lines}\n"
    assert maps() == [[0, 1879048192, 10], [100, 1900000000, 1000]]
    assert web.run("id -u") == "0\n"
    web.write("idmap", "auto")
    assert maps()[0][2] == 16 * 65536
    for value, number in (
        ("0 0", errno.EINVAL),
        ("", errno.EINVAL),
        ("0 0 0", errno.ERANGE),
        ("0 4294967295 1", errno.ERANGE),
        ("0 1000 10\n5 5000 10", errno.EINVAL),
        ("\n".join(f"{n} {n} 1" for n in range(341)), errno.EINVAL),
    ):
        refused(number, web.write, "idmap", value)
    assert web.read("idmap") == "auto\n"


def test_a_map_beyond_the_parents_is_refused(web: Container) -> None:
    os.mkdir(web / "db")
    db = Container(web / "db")
    refused(errno.EPERM, db.write, "idmap", "0 99999999 1")
    db.write("idmap", "0 65536 1000")
    outer = int(Path(f"/proc/{web.init}/uid_map").read_text().split()[1])
    assert Path(f"/proc/{db.init}/uid_map").read_text().split() == ["0", str(outer + 65536), "1000"]


# --- unshare ---


@pytest.mark.parametrize("kind", [*TYPES, "syslog", ""])
def test_only_one_type(kind: str, web: Container) -> None:
    web.write("unshare", kind)
    assert web.read("unshare").split() == ([kind] if kind else [])
    ours, its = namespaces_of("self"), namespaces_of(web.init)
    assert {name for name in TYPES if ours[name] != its[name]} == {kind} & set(TYPES)
    rows = [line.split() for line in web.read("namespaces").splitlines()]
    assert {row[0] for row in rows if row[2] == "own"} == ({kind} if kind else set())
    web.write("exec", "true")
    idle(web)
    os.rmdir(web.path)


@pytest.mark.parametrize("kind", TYPES)
def test_all_but_one_type(kind: str, web: Container) -> None:
    rest = " ".join(name for name in TYPES if name != kind)
    web.write("unshare", rest)
    ours, its = namespaces_of("self"), namespaces_of(web.init)
    assert {name for name in TYPES if ours[name] == its[name]} == {kind}
    assert web.run("echo runs") == "runs\n"
    os.mkdir(web / "db")
    assert Container(web / "db").run("echo nested") == "nested\n"


def test_without_user_it_lacks_what_would_harm_the_host(web: Container) -> None:
    web.write("unshare", "cgroup ipc mnt net pid time uts")
    assert web.run("id -u; cat /proc/self/uid_map").split() == ["0", "0", "0", "4294967295"]
    assert web.run_code("mknod /tmp/sda b 8 0")[0] != 0
    assert web.run_code("date -s 2001-01-01")[0] != 0


def test_without_pid_it_stays_when_its_first_processes_end(web: Container) -> None:
    web.write("unshare", "ipc mnt net user uts")
    web.run("echo said > /dev/kmsg 2>/dev/null; true")
    web.start("sh", "-c", "sleep 1000 & exit 0")
    wait_until(lambda: web.state()["populated"] == "1", "it sleeps")

    def sleeper() -> str:
        """The only member, when that is the one."""
        pids = os.listdir(web / "procs")
        with contextlib.suppress(FileNotFoundError):
            if len(pids) == 1 and "command sleep" in web.read(f"procs/{pids[0]}"):
                return pids[0]
        return ""

    pid = wait_until(sleeper, "its first process has ended")
    os.kill(web.init, 9)

    def dead() -> bool:
        try:
            web.read("init")
        except OSError as error:
            return error.errno == errno.ENODEV
        return False

    wait_until(dead, "its init has ended")
    assert web.state()["populated"] == "1"
    assert os.listdir(web / "procs") == [pid]
    refused(errno.EBUSY, os.rmdir, web.path)
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "it is gone")


def test_without_pid_members_are_the_parents_processes(web: Container) -> None:
    os.mkdir(web / "db")
    db = Container(web / "db")
    db.write("unshare", "cgroup ipc mnt net user uts")
    db.start("sleep", "27182")
    wait_until(lambda: db.state()["populated"] == "1", "it sleeps")
    assert "27182" in web.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "sleep 27182" in web.run("cat /sys/namespaces/procs/*")


def test_unshare_errors(web: Container) -> None:
    for value in ("nut", "net net", "net,nut", "own"):
        refused(errno.EINVAL, web.write, "unshare", value)
    web.write("unshare", "net,uts,mnt,user,pid")
    assert web.read("unshare") == "mnt net pid user uts\n"


# --- binds ---


def test_binds_read_only_and_writable_with_blanks(web: Container, tmp_path: Path) -> None:
    one, two = tmp_path / "a directory", tmp_path / "file with\ttabs"
    one.mkdir()
    (one / "f").write_text("in it\n")
    two.write_text("a file\n")
    os.chmod(one, 0o777)

    def octal(path: Path | str) -> str:
        return str(path).replace(" ", "\\040").replace("\t", "\\011")

    lines = (
        f"/mnt/in\\040here {octal(one)} ro\n/tmp/writable {octal(one)} rw\n/tmp/f {octal(two)} ro"
    )
    web.write("binds", lines)
    assert web.read("binds") == f"{lines}\n"
    assert web.run("cat '/mnt/in here/f' /tmp/writable/f /tmp/f") == "in it\nin it\na file\n"
    code, out = web.run_code("touch '/mnt/in here/new'")
    assert code != 0
    assert "Read-only" in out
    web.run("touch /tmp/writable/new")
    assert os.stat(one / "new").st_uid >= 0x70000000
    # Its root cannot take that back.
    for flags in ("rw", "bind,rw"):
        assert web.run_code(f"mount -o remount,{flags} '/mnt/in here'")[0] != 0
    assert web.run_code("umount '/mnt/in here'; touch '/mnt/in here/x'")[0] in (0, 1)
    assert not (one / "x").exists()


def test_bind_errors(web: Container, tmp_path: Path) -> None:
    for value, number in (
        ("/a /b", errno.EINVAL),
        ("/a /b rx", errno.EINVAL),
        ("a /b ro", errno.EINVAL),
        ("/a b ro", errno.EINVAL),
        ("/ /b ro", errno.EINVAL),
        ("/a/../b /b ro", errno.EINVAL),
        (f"/tmp/x {tmp_path} ro\n/tmp/x {tmp_path} rw", errno.EINVAL),
        (f"/tmp/x {tmp_path}/none ro", errno.ENOENT),
        ("/a /\\777 ro", errno.EINVAL),
    ):
        refused(number, web.write, "binds", value)
        assert web.read("binds") in ("", "\n")
    assert web.run("hostname") == "web\n"


# --- network and limits ---


def test_network_of_the_host(tree: Path, web: Container) -> None:
    web.write("defaults/network", "host")
    os.mkdir(web / "db")
    assert namespaces_of(Container(web / "db").init)["net"] == namespaces_of(web.init)["net"]
    web.write("defaults/network", "none")
    os.mkdir(web / "dc")
    assert namespaces_of(Container(web / "dc").init)["net"] != namespaces_of(web.init)["net"]
    assert Container(web / "dc").run("cat /sys/class/net/lo/flags") == "0x9\n"


def test_a_limit_of_processes(web: Container) -> None:
    web.write("defaults/limits", "pids.max 20")
    os.mkdir(web / "db")
    code, out = Container(web / "db").run_code("for i in $(seq 40); do sleep 3 & done")
    assert code != 0 or "fork" in out.lower(), out
    assert web.run("for i in $(seq 40); do sleep 0.1 & done; wait; echo fine") == "fine\n"


def test_a_limit_of_memory(web: Container) -> None:
    web.write("defaults/limits", "pids.max 100\nmemory.max 67108864")
    os.mkdir(web / "db")
    db = Container(web / "db")
    code, _ = db.run_code("head -c 200000000 /dev/zero | tail -c 150000000 > /dev/null")
    assert code != 0
    assert db.run("echo lives") == "lives\n"


def test_limit_errors(web: Container) -> None:
    for value, number in (
        ("pids.max", errno.EINVAL),
        ("pids.max many", errno.EINVAL),
        ("pids.max 1 2", errno.EINVAL),
        ("pids.max 0", errno.ERANGE),
        ("pids.max 1\npids.max 2", errno.EINVAL),
        ("cgroup.procs 1", errno.EINVAL),
        ("../x 1", errno.EINVAL),
    ):
        refused(number, web.write, "defaults/limits", value)
    assert web.read("defaults/limits") == "pids.max 4096\n"


# --- defaults ---


def test_defaults_are_inherited_and_taken_back(web: Container, rootfs: Path) -> None:
    web.write("defaults/rootfs", str(rootfs))
    web.write("defaults/unshare", "cgroup mnt pid user uts")
    os.makedirs(web / "db" / "deep")
    db, deep = Container(web / "db"), Container(web / "db" / "deep")
    for each in (db, deep):
        assert each.read("rootfs") == f"{rootfs}\n"
        assert each.run("cat /etc/mark") == "the tree\n"
    web.write("defaults/rootfs", "")
    assert web.read("defaults/rootfs") == "host\n"
    os.mkdir(web / "dc")
    assert Container(web / "dc").run_code("cat /etc/mark")[0] != 0
    # What was made stays as it was made.
    assert db.run("cat /etc/mark") == "the tree\n"


def test_defaults_from_inside(web: Container) -> None:
    out = web.run(
        """
        cd /sys/namespaces
        mkdir -p /tmp/data; echo data > /tmp/data/f
        echo '/mnt/data /tmp/data ro' > defaults/binds
        echo 'cgroup mnt pid uts user' > defaults/unshare
        mkdir db
        cat db/binds db/unshare
        echo 'cat /mnt/data/f' > db/exec; sleep 0.3; cat db/output
        """
    )
    assert out.splitlines() == ["/mnt/data /tmp/data ro", "cgroup mnt pid user uts", "data"]


def test_made_and_removed_by_a_user_of_the_host(tree: Path, web: Container, hidden: Path) -> None:
    os.chown(web.path, 1000, 1000)

    def as_user(words: str) -> int:
        return subprocess.run(
            ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "sh", "-c", words],
            cwd="/",
            check=False,
            capture_output=True,
        ).returncode

    (hidden / "below").mkdir()
    assert as_user(f"test -w {web.path}") == 0
    assert as_user(f"mkdir {tree}/mine") != 0
    assert as_user(f"mkdir {web / 'mine'}") == 0
    assert os.stat(web / "mine").st_uid == 1000
    # In it and with it everything, above it nothing.
    assert as_user(f"echo 'cgroup mnt pid user uts' > {web / 'mine/unshare'}") == 0
    assert as_user(f"echo 'mnt pid user uts' > {web / 'unshare'}") != 0
    assert as_user(f"echo 1 > {web / 'freeze'}") != 0
    # A path that they could not name by themselves they cannot lend to a container.
    assert as_user(f"echo '/mnt {hidden}/below ro' > {web / 'mine/binds'}") != 0
    assert as_user(f"echo {hidden}/below > {web / 'mine/rootfs'}") != 0
    assert as_user(f"rm -rf {web / 'mine'}") == 0


# --- what fails leaves nothing ---


def test_failed_makes_leave_nothing(tree: Path, instance: Instance) -> None:
    def trace() -> tuple[object, ...]:
        children = Path(f"/proc/{instance.daemon()}/task/{instance.daemon()}/children").read_text()
        (spawner,) = [
            pid for pid in children.split() if "spawner" in Path(f"/proc/{pid}/comm").read_text()
        ]
        return (
            sorted(p.name for p in (instance.run_dir / "c").iterdir()),
            instance.groups(),
            Path(f"/proc/{spawner}/task/{spawner}/children").read_text(),
            len(os.listdir(f"/proc/{spawner}/fd")),
            Path(f"/proc/{spawner}/mountinfo").read_text().count("\n"),
            Path("/proc/self/mountinfo").read_text().count("\n"),
            sorted(os.listdir(tree)),
        )

    os.mkdir(tree / "web")
    web = Container(tree / "web")
    os.mkdir(web / "first")
    os.rmdir(web / "first")
    instance.ready_spares()
    wait_until(lambda: len(instance.groups()) == 1, "only one is left")
    web.write("defaults/unshare", "cgroup mnt pid user uts")
    before = trace()
    fds = len(os.listdir(f"/proc/{instance.daemon()}/fd"))
    for name, value in (
        ("rootfs", "/usr"),
        ("binds", "/usr/new-target /etc ro"),
        ("idmap", "0 99999999 1"),
    ):
        web.write(f"defaults/{name}", value)
        for _ in range(3):
            with pytest.raises(OSError, match=r"."):
                os.mkdir(web / "failed")
            assert not (web / "failed").exists()
        assert web.state()["reason"] != "-", name
        web.write(f"defaults/{name}", "")
    web.run("echo 0 > /proc/sys/user/max_uts_namespaces")
    refused(errno.ENOSPC, os.mkdir, web / "failed")
    web.run("echo 1000 > /proc/sys/user/max_uts_namespaces")
    wait_until(lambda: trace()[1:] == before[1:], f"nothing is left: {before} {trace()}")
    assert len(os.listdir(f"/proc/{instance.daemon()}/fd")) <= fds + 2
    os.mkdir(web / "works")
    assert Container(web / "works").run("hostname") == "works\n"


# --- who writes a path sees the same there, or it is refused ---


def test_a_writer_with_mounts_of_its_own(web: Container, hidden: Path) -> None:
    (hidden / "one").mkdir()
    (hidden / "one" / "mark").write_text("one\n")
    (hidden / "two").mkdir()

    def write_apart(setup: str, name: str, value: str) -> str:
        script = f"{setup}\necho '{value}' > {web / name}"
        done = subprocess.run(
            ["unshare", "-m", "--propagation", "private", "sh", "-ec", script],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
        )
        assert (done.returncode != 0) == bool(done.stderr)
        return web.state()["reason"] if done.stderr else ""

    bind = f"/mnt {hidden}/one ro"
    for name in ("binds", "defaults/binds"):
        # A mount namespace of one's own that has the same there is no matter.
        assert write_apart("", name, bind) == ""
        assert web.read(name) == f"{bind}\n"
        write(web / name, "")
        for setup in (
            f"mount -t tmpfs none {hidden}/one",
            f"mount --bind {hidden}/two {hidden}/one",
            f"mount --bind {hidden}/one {hidden}/one; mount -o remount,bind,ro {hidden}/one",
            f"mount -t tmpfs none {hidden}",
        ):
            assert "Invalid cross-device link" in write_apart(setup, name, bind), setup
            assert web.read(name).strip() == ""
        # Only there: nsfs does not see it.
        setup = f"mount -t tmpfs none {hidden}/two; mkdir {hidden}/two/new"
        message = write_apart(setup, name, f"/mnt {hidden}/two/new ro")
        assert "cross-device" in message or "No such file" in message
        assert web.read(name).strip() == ""
    setup = f"mount --bind {hidden}/two {hidden}/one"
    assert "cross-device" in write_apart(setup, "rootfs", f"{hidden}/one")
    assert web.read("rootfs") == "host\n"


def test_a_writer_with_a_root_of_its_own(web: Container, rootfs: Path, hidden: Path) -> None:
    """What it calls /srv is not what the host does; nor is its working directory looked at."""
    (rootfs / "etc" / "only-here").mkdir()
    os.mkdir("/var/tmp/nsfs-view")
    try:
        for path in ("/etc", "/etc/only-here", "/var/tmp/nsfs-view"):
            script = f'exec 3> {web / "binds"}; exec chroot {rootfs} /bin/sh -c "cd /srv; $0"'
            done = subprocess.run(
                ["sh", "-c", script, f"echo '/mnt {path} ro' >&3"],
                capture_output=True,
                text=True,
                check=False,
                timeout=DEADLINE_S,
            )
            assert done.stderr, path
            assert web.read("binds").strip() == ""
            reason = web.state()["reason"]
            assert "leads somewhere else" in reason or "No such file" in reason, reason
    finally:
        os.rmdir("/var/tmp/nsfs-view")


def test_a_member_with_mounts_of_its_own(web: Container) -> None:
    code, out = web.run_code(
        """
        mkdir -p /tmp/data /sys/namespaces/db
        cd /sys/namespaces
        echo '/mnt /tmp/data ro' > db/binds && echo written
        unshare -m sh -c 'mount -t tmpfs none /tmp/data; echo "/srv /tmp/data ro" > db/binds'
        cat db/binds
        """
    )
    assert "written\n" in out, out
    assert "error" in out
    assert out.endswith("/mnt /tmp/data ro\n")
    assert code == 0


# --- a root filesystem made by debootstrap ---


@pytest.fixture(scope="module")
def debian() -> Iterator[Path]:
    """Debian's smallest system, below a directory that others cannot search; made once."""
    base = Path(tempfile.mkdtemp(prefix="nsfs-debian-", dir="/var/tmp"))
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )["VERSION_CODENAME"]
    uris = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages",
         "Origin: Debian", f"Codename: {release}"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    words = ["debootstrap", "--variant=minbase", release, base / "root", *uris[:1]]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    yield base / "root"
    shutil.rmtree(base)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_debian_made_by_debootstrap(web: Container, debian: Path) -> None:
    web.write("rootfs", str(debian))
    assert web.run("id -un; hostname; cat /etc/debian_version").splitlines()[:2] == ["root", "web"]
    assert web.run("stat -c '%U %a' /usr/bin/passwd /etc/shadow").splitlines() == [
        "root 4755",
        "root 640",
    ]
    # It is a system that can be changed as one: what has set-user-ID bits works inside.
    web.run("useradd -m user; echo user:secret | chpasswd")
    assert web.run("su user -c 'id -un; id -u'") == "user\n1000\n"
    out = web.run("dpkg --audit; dpkg-query -W -f '${db:Status-Abbrev}\\n' | sort | uniq -c")
    assert out.split()[1:] == ["ii"]
    out = web.run("apt-get -qq check && apt-mark hold bash")
    assert "bash set on hold" in out
    # On disk it is root's and user's; to the host's users it is out of reach.
    assert (debian / "home/user").stat().st_uid == 1000
    assert (debian / "etc/shadow").stat().st_uid == 0
    done = subprocess.run([*AS_NOBODY, debian / "usr/bin/su"], capture_output=True, check=False)
    assert done.returncode == 126
    assert b"denied" in done.stderr
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=2 * DEADLINE_S)
    # The tree stays, and is as good for the next one.
    assert (debian / "etc/debian_version").exists()


def test_a_filesystem_that_does_not_answer_keeps_no_container_from_being_made(
    tree: Path, tmp_path: Path
) -> None:
    for number in range(80):
        (tree / f"w{number}").mkdir()
    with holding(tmp_path / "holding") as server:
        os.kill(server.pid, signal.SIGSTOP)
        script = 'for i in $(seq 0 79); do echo "/mnt $0/$i ro" > "$1/w$i/binds" & done; wait'
        with subprocess.Popen(
            ["sh", "-c", script, tmp_path / "holding", tree], stderr=subprocess.DEVNULL
        ) as writers:
            try:
                for number in range(5):
                    done = subprocess.run(
                        ["mkdir", tree / f"n{number}"], check=False, timeout=DEADLINE_S
                    )
                    assert done.returncode == 0
                    os.rmdir(tree / f"n{number}")
                assert writers.poll() is None
            finally:
                server.kill()
                writers.wait()
    assert all((tree / f"w{number}/binds").read_text() == "" for number in range(80))
