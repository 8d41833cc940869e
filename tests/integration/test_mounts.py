"""Binds in a running container, and what the host mounts later."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import Container, Instance, fails, wait_until


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory of the host with a file."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    path = tmp_path / "data"
    path.mkdir(mode=0o777)
    path.chmod(0o777)
    (path / "file").write_text("of the host\n")
    return path


def test_binds_come_and_go_while_it_runs(web: Container, data: Path) -> None:
    web.start("sleep", "1000")
    wait_until(lambda: web.state()["populated"] == "1", "it runs")
    init = web.init
    web.write("binds", f"/srv/data {data} rw")
    assert web.run("cat /srv/data/file; echo inside > /srv/data/new") == "of the host\n"
    assert (data / "new").read_text() == "inside\n"
    web.write("binds", f"/srv/data {data} rw\n/mnt/file {data}/file ro")
    assert web.run("cat /mnt/file") == "of the host\n"
    # From writable to read-only: another mount.
    web.write("binds", f"/srv/data {data} ro")
    code, printed = web.run_code("touch /srv/data/x")
    assert (code, "Read-only" in printed) == (1, True)
    assert web.run_code("cat /mnt/file")[1] == ""
    # Its root cannot make it writable.
    assert web.run_code("mount -o remount,rw,bind /srv/data")[0] != 0
    web.write("binds", "")
    assert web.run("ls -A /srv/data") == ""
    assert (web.init, web.state()["populated"]) == (init, "1")
    assert str(data) not in Path(f"/proc/{init}/mountinfo").read_text()


def test_a_bind_that_fails_changes_nothing(web: Container, data: Path) -> None:
    web.start("sleep", "1000")
    web.write("binds", f"/srv/data {data} ro")
    before = web.read("binds"), web.read("mnt/mounts")
    for value, number in (
        (f"/srv/data {data} rw\n/srv/other {data}/nowhere rw", errno.ENOENT),
        # The target cannot be made.
        (f"/mnt/new {data} rw\n/usr/nowhere {data} rw", errno.EROFS),
        (f"/srv/data {data} rx", errno.EINVAL),
    ):
        with fails(number):
            web.write("binds", value)
        assert (web.read("binds"), web.read("mnt/mounts")) == before
        assert web.run("cat /srv/data/file") == "of the host\n"
        assert web.run_code("touch /srv/data/x")[0] == 1


def test_what_a_bind_is_mounted_on_is_made_with_the_rights_of_the_members(
    web: Container, data: Path
) -> None:
    """Whose /dev is there says nothing of whose rights these are."""
    os.mkdir(data / "hosts")
    web.write("binds", f"/srv {data}/hosts rw")
    web.run("mount --bind /srv /dev")
    for target in ("/dev/made", "/srv/made/in"):
        with fails(errno.EACCES):
            web.write("binds", f"/srv {data}/hosts rw\n{target} {data} ro")
    assert os.listdir(data / "hosts") == []
    web.write("binds", f"/srv {data}/hosts rw\n/mnt/made/in {data} ro")
    assert web.run("ls /mnt/made/in") == web.run("ls -d /mnt/made/in/*").replace(
        "/mnt/made/in/", ""
    )


def test_binds_of_a_container_that_shares_its_mounts(web: Container, data: Path) -> None:
    web.write("unshare", "net uts syslog")
    with fails(errno.EOPNOTSUPP):
        web.write("binds", f"/srv/data {data} ro")
    assert web.read("binds") == ""


def test_what_its_root_unmounted_is_no_hindrance(web: Container, data: Path) -> None:
    web.write("binds", f"/srv/a {data} rw\n/srv/b {data} rw")
    web.run("umount /srv/a")
    web.write("binds", f"/srv/b {data} rw")
    web.write("binds", f"/srv/a {data} rw")
    assert web.run("cat /srv/a/file") == "of the host\n"


def test_binds_survive_the_daemon(instance: Instance, web: Container, data: Path) -> None:
    web.write("binds", f"/srv/data {data} ro")
    instance.kill_daemon()
    web.write("binds", f"/srv/data {data} ro\n/srv/b {data} rw")
    assert web.run("cat /srv/data/file /srv/b/file") == "of the host\n" * 2
    web.write("binds", "")
    assert web.run("ls -A /srv/data /srv/b") == "/srv/b:\n\n/srv/data:\n"


@pytest.fixture
def shared(data: Path) -> Iterator[Path]:
    """A directory of the host, mounted so that mounts in it propagate (as systemd does with /)."""
    subprocess.run(["mount", "--bind", data, data], check=True)
    subprocess.run(["mount", "--make-shared", data], check=True)
    (data / "disk").mkdir()
    yield data
    subprocess.run(["umount", "-R", data], check=True)


def mount_disk(shared: Path) -> str:
    """Mount something; returns its device."""
    subprocess.run(["mount", "-t", "tmpfs", "disk", shared / "disk"], check=True)
    (shared / "disk/on").write_text("disk\n")
    found = os.stat(shared / "disk").st_dev
    return f"{os.major(found)}:{os.minor(found)}"


@pytest.mark.parametrize("built", [True, False], ids=["rebuilt", "running"])
@pytest.mark.parametrize("mode", ["ro", "rw"])
@pytest.mark.parametrize("how", ["private", "slave"])
def test_propagation_from_the_host(
    web: Container, shared: Path, how: str, mode: str, built: bool
) -> None:
    web.write("mnt/propagation", how)
    assert web.read("mnt/propagation") == f"{how}\n"
    web.write("binds", f"/srv/data {shared} {mode}")
    if built:
        web.write("idmap", "host")
    seen = "disk\n" if how == "slave" else ""
    mount_disk(shared)
    assert web.run("cat /srv/data/disk/on 2>/dev/null || :") == seen
    # Nothing goes the other way.
    web.run("mkdir -p /tmp/x; mount -t tmpfs x /srv/data/disk || :")
    assert (shared / "disk/on").exists()
    web.run("umount /srv/data/disk || :")
    subprocess.run(["umount", shared / "disk"], check=True)
    assert web.run("cat /srv/data/disk/on 2>/dev/null || :") == ""


def test_propagation_errors(tree: Path, web: Container) -> None:
    with fails(errno.EINVAL):
        web.write("mnt/propagation", "shared")
    web.start("sleep", "1000")
    wait_until(lambda: web.state()["populated"] == "1", "it runs")
    with fails(errno.EBUSY):
        web.write("mnt/propagation", "slave")
    assert not (tree / "mnt/propagation").exists()


def test_a_disk_of_the_host_can_be_ejected(
    tree: Path, web: Container, shared: Path, instance: Instance
) -> None:
    device = mount_disk(shared)
    (tree / "db").mkdir()
    web.run("true")
    subprocess.run(["umount", shared / "disk"], check=True)
    # The device is free when no mount namespace has it any more.
    daemon = instance.daemon()
    children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    pids = [daemon, *children, web.init, Container(tree / "db").init]
    assert len(pids) > 3
    for pid in pids:
        assert f" {device} " not in Path(f"/proc/{pid}/mountinfo").read_text()


def test_an_idmapped_bind_has_the_containers_ids(web: Container, data: Path) -> None:
    data.parent.chmod(0o700)
    for name, mode in (("roots", 0o600), ("other", 0o644)):
        (data / name).write_text(f"{name}\n")
        (data / name).chmod(mode)
    os.chown(data / "other", 1000, 1000)
    web.write("binds", f"/srv/data {data} rw,idmap\n/srv/file {data}/roots ro,idmap")
    assert web.run("cat /srv/data/roots /srv/file") == "roots\n" * 2
    assert web.run("stat -c %u /srv/data/roots /srv/data/other").split() == ["0", "1000"]
    web.run("touch /srv/data/new; chown 7:8 /srv/data/new")
    found = os.stat(data / "new")
    assert (found.st_uid, found.st_gid) == (7, 8)
    # Without it they are nobody's.
    web.write("binds", f"/srv/data {data} rw")
    assert web.run("stat -c %u /srv/data/roots").strip() == "65534"
    assert web.run_code("cat /srv/data/roots")[0]
    # And so it is built again.
    web.write("binds", f"/srv/data {data} ro,idmap")
    web.write("mnt/propagation", "slave")
    assert web.run("cat /srv/data/roots") == "roots\n"
    assert web.run_code("touch /srv/data/x")[0]


def test_an_idmapped_bind_leaves_no_setuid_programs_for_others(web: Container, data: Path) -> None:
    with fails(errno.EPERM):
        web.write("binds", f"/srv/data {data} rw,idmap")
    assert web.read("binds") == ""
    web.write("binds", f"/srv/data {data} ro,idmap")
    assert web.run("stat -c %u /srv/data").strip() == "0"


def test_a_users_idmapped_bind_is_of_his_own(tree: Path, web: Container, data: Path) -> None:
    alice = 4001
    os.chown(web.path, alice, alice)
    (web / "db").mkdir()
    os.chown(web / "db", alice, alice)
    db = Container(web / "db")
    mine = data / "mine"
    mine.mkdir()
    os.chown(mine, alice, alice)

    def write_as_alice(value: str) -> str:
        program = "import os,sys; os.write(os.open(sys.argv[1], os.O_WRONLY), sys.argv[2].encode())"
        done = subprocess.run(
            ["python3", "-c", program, db / "binds", value],
            user=alice, group=alice, extra_groups=[], capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stderr.strip().splitlines()[-1] if done.returncode else ""

    assert write_as_alice(f"/srv/data {mine} rw,idmap") == ""
    db.run("touch /srv/data/new; chmod 4755 /srv/data/new; chown 5 /srv/data/new 2>/dev/null || :")
    found = os.stat(mine / "new")
    assert (found.st_uid, found.st_gid) == (alice, alice)
    assert "PermissionError" in write_as_alice(f"/srv/data {data} rw,idmap")
    assert "PermissionError" in write_as_alice(f"/srv/data {data} ro,idmap")
    # What she cannot search she cannot bind.
    data.chmod(0o700)
    assert "PermissionError" in write_as_alice(f"/srv/x {mine} ro")
    assert db.run("ls /srv/data") == "new\n"
