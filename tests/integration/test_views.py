"""Tagged views: what they show of a namespace, and what becomes of it when that dies."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.integration.conftest import DEADLINE_S, Container, Instance, wait_until, write


def shell(script: str) -> str:
    done = subprocess.run(
        ["sh", "-ec", script], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(number: int) -> object:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def test_net_is_the_kernels_own_of_that_namespace(web: Container) -> None:
    assert os.listdir(web / "net") == ["lo"]
    inside = web.run("cd /sys/class/net/lo; ls; cat mtu flags address statistics/rx_bytes")
    listed, _, values = inside.rpartition("uevent\n")
    shown = set(os.listdir(web / "net/lo"))
    hidden = set(f"{listed}uevent".split()) - shown
    assert hidden == {"subsystem"}
    assert values.split() == [
        web.read(f"net/lo/{name}").strip()
        for name in ("mtu", "flags", "address", "statistics/rx_bytes")
    ]
    web.write("net/lo/mtu", "1400")
    assert web.run("cat /sys/class/net/lo/mtu") == "1400\n"


def test_the_kernels_own_errors(web: Container) -> None:
    with fails(errno.EINVAL):
        web.write("net/lo/mtu", "nonsense")
    with fails(errno.EINVAL):
        web.read("net/lo/speed")
    # kernfs_fop_open(): root, too, opens nothing for what no store is for.
    with fails(errno.EINVAL):
        os.close(os.open(web / "net/lo/address", os.O_WRONLY))
    with fails(errno.ENOENT):
        web.read("net/eth7/mtu")
    with fails(errno.ENOENT):
        os.listdir(web / "net/lo/subsystem")
    assert (web / "net/lo/mtu").stat().st_mode & 0o777 == 0o644
    assert (web / "net/lo/address").stat().st_mode & 0o777 == 0o444


def test_interfaces_come_and_go_and_are_seen_at_once(web: Container) -> None:
    run = f"nsenter --net={web / 'nsproxy/net'} ip link"
    shell(f"{run} add br0 type bridge; {run} add d0 type veth peer e0; {run} set d0 master br0")
    assert sorted(os.listdir(web / "net")) == ["br0", "d0", "e0", "lo"]
    assert os.readlink(web / "net/d0/master") == "../br0"
    assert os.readlink(web / "net/br0/lower_d0") == "../d0"
    assert (web / "net/d0/master/bridge/stp_state").read_text() == "0\n"
    shell(f"{run} set d0 name d1")
    with fails(errno.ENOENT):
        os.stat(web / "net/d0")
    assert (web / "net/br0/lower_d1/mtu").read_text() == "1500\n"
    shell(f"{run} del br0")
    assert sorted(os.listdir(web / "net")) == ["d1", "e0", "lo"]


def test_the_same_from_inside(web: Container) -> None:
    script = "cd {}/net; ls -R | sort; cat lo/mtu lo/type; grep . lo/statistics/*"
    assert web.run(script.format("/sys/namespaces")) == shell(script.format(web.path))
    web.run("echo 1300 > /sys/namespaces/net/lo/mtu")
    assert web.read("net/lo/mtu") == "1300\n"


def test_rm_in_a_view_harms_nothing(web: Container) -> None:
    shell(f"nsenter --net={web / 'nsproxy/net'} ip link add d0 type veth peer e0")
    shell(f"rm -rf {web / 'net'} {web / 'uts'}; rm -rf {web / 'net/d0'}; rm {web / 'net/d0/mtu'}")
    assert sorted(os.listdir(web / "net")) == ["d0", "e0", "lo"]
    assert web.read("net/d0/mtu") == "1500\n"


def test_what_is_shared_is_the_holders(tree: Path, web: Container) -> None:
    write(web / "defaults/unshare", "user pid mnt uts syslog cgroup")
    (web / "db").mkdir()
    db = Container(web / "db")
    web.write("net/lo/mtu", "1234")
    assert db.read("net/lo/mtu") == "1234\n"
    # From outside, root may; from inside, nothing names an ancestor.
    db.write("net/lo/mtu", "1235")
    assert web.read("net/lo/mtu") == "1235\n"
    code, _ = db.run_code("echo 1236 > /sys/namespaces/net/lo/mtu")
    assert code != 0
    assert web.read("net/lo/mtu") == "1235\n"


@pytest.mark.parametrize("name", ["net/lo/mtu", "uts/hostname"])
def test_when_the_namespace_dies_its_entries_are_gone(web: Container, name: str) -> None:
    fd = os.open(web / name, os.O_RDWR)
    try:
        assert os.read(fd, 100)
        os.kill(web.init, 9)
        wait_until(lambda: not _is_there(web / name), "the entry is gone")
        with fails(errno.ENODEV):
            os.pread(fd, 100, 0)
        with fails(errno.ENODEV):
            os.pwrite(fd, b"1400", 0)
        assert os.listdir((web / name).parents[len(Path(name).parts) - 2]) == []
    finally:
        os.close(fd)


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def test_open_files_and_directories_survive_the_daemon(instance: Instance, web: Container) -> None:
    fd = os.open(web / "net/lo/mtu", os.O_RDWR)
    dir_fd = os.open(web / "net/lo/statistics", os.O_RDONLY | os.O_DIRECTORY)
    number = os.fstat(fd).st_ino
    try:
        web.write("net/lo/mtu", "1400")
        instance.kill_daemon()
        assert os.pread(fd, 100, 0) == b"1400\n"
        os.pwrite(fd, b"1401\n", 0)
        assert web.read("net/lo/mtu") == "1401\n"
        assert "rx_bytes" in os.listdir(dir_fd)
        assert os.stat(web / "net/lo/mtu").st_ino == number
    finally:
        os.close(fd)
        os.close(dir_fd)


def open_views(instance: Instance) -> int:
    """Detached mounts that the daemon holds."""
    folder = f"/proc/{instance.daemon()}/fd"
    found = 0
    for name in os.listdir(folder):
        try:
            found += os.readlink(f"{folder}/{name}") == "/"
        except FileNotFoundError:
            continue
    return found


def test_idle_views_hold_nothing(instance: Instance, web: Container) -> None:
    web.read("net/lo/mtu")
    assert open_views(instance)
    wait_until(lambda: not open_views(instance), "they are closed")
    assert web.read("net/lo/mtu") == "65536\n"
    assert open_views(instance) == 1


def test_a_view_does_not_keep_a_namespace(tree: Path) -> None:
    (tree / "web").mkdir()
    (tree / "web/net/lo/mtu").read_text()
    shell(f"rm -rf {tree / 'web'}")
    assert not (tree / "web").exists()


def test_the_roots_is_the_hosts(tree: Path) -> None:
    assert sorted(os.listdir(tree / "net")) == sorted(
        name for name in os.listdir("/sys/class/net") if Path("/sys/class/net", name).is_dir()
    )
