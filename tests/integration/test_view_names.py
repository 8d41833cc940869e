"""Names in views: each is there, or not, from the moment on at which the kernel says so."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nsfs import namespaces
from nsfs.rtnetlink import Rtnetlink
from nsfs.view import RESERVE
from tests.integration.conftest import Container, Instance, fails, wait_until, write

ROUNDS = 50


def inside(web: Container, work: Callable[[Rtnetlink], object]) -> None:
    """Do something by rtnetlink(7) in the network namespace of a container; whoever asks for it
    goes on as soon as the kernel has done it."""

    def within() -> None:
        with Rtnetlink() as rtnl:
            work(rtnl)

    def run() -> None:
        try:
            namespaces.within(web.init, ("net",), within)
        except OSError as error:
            failed.append(error)

    failed: list[OSError] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed


def batch(web: Container, *lines: str) -> None:
    """Have ip(8) do several things in the network namespace of a container."""
    command = ["nsenter", f"--net={web / 'nsproxy/net'}", "ip", "-batch", "-"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)


def rename(web: Container, *pairs: tuple[str, str]) -> None:
    def work(rtnl: Rtnetlink) -> None:
        for old, new in pairs:
            rtnl.rename_link(rtnl.link(old).ifindex, new)

    inside(web, work)


def test_an_interface_that_is_renamed_has_its_new_name_and_no_other(web: Container) -> None:
    batch(web, "link add d0 type veth peer name e0")
    old, new = "d0", "d1"
    for _ in range(ROUNDS):
        assert (web / "net" / old / "mtu").read_text() == "1500\n"
        with fails(errno.ENOENT):
            os.stat(web / "net" / new)
        rename(web, (old, new))
        with fails(errno.ENOENT):
            os.stat(web / "net" / old)
        with fails(errno.ENOENT):
            os.stat(web / "net" / old / "mtu")
        assert (web / "net" / new / "mtu").read_text() == "1500\n"
        old, new = new, old


def test_two_interfaces_change_names(web: Container) -> None:
    batch(web, "link add d0 type veth peer name d1")
    web.write("net/d1/mtu", "1400")
    fd = os.open(web / "net/d0/mtu", os.O_RDONLY)
    try:
        for mtu in ("1500\n", "1400\n") * (ROUNDS // 2):
            assert (web / "net/d0/mtu").read_text() == mtu
            assert os.pread(fd, 100, 0) == mtu.encode()
            rename(web, ("d0", "x"), ("d1", "d0"), ("x", "d1"))
            assert (web / "net/d1/mtu").read_text() == mtu
    finally:
        os.close(fd)


def test_an_interface_that_is_removed_or_moved_is_gone(tree: Path, web: Container) -> None:
    (tree / "db").mkdir()
    db = Container(tree / "db")
    for _ in range(ROUNDS // 5):
        batch(web, "link add d0 type veth peer name e0")
        fd = os.open(web / "net/d0/mtu", os.O_RDONLY)
        dir_fd = os.open(web / "net/d0", os.O_PATH)
        ns_fd = os.open(db / "nsproxy/net", os.O_RDONLY)
        try:
            assert (web / "net/d0/mtu").read_text() == "1500\n"
            inside(web, lambda rtnl: rtnl.rename_link(rtnl.link("d0").ifindex, "d0", ns_fd))
            with fails(errno.ENOENT):
                os.stat(web / "net/d0")
            assert (db / "net/d0/mtu").read_text() == "1500\n"
            inside(db, lambda rtnl: rtnl.delete_link(rtnl.link("d0").ifindex))
            with fails(errno.ENOENT):
                os.stat(db / "net/d0")
            with fails(errno.ENODEV):
                os.pread(fd, 100, 0)
            with fails(errno.ENOENT):
                os.stat("operstate", dir_fd=dir_fd)
        finally:
            for each in (fd, dir_fd, ns_fd):
                os.close(each)


def test_a_thousand_are_renamed_while_somebody_lists(web: Container) -> None:
    pairs = range(0, 1000, 2)
    batch(web, *(f"link add a{n} type veth peer name a{n + 1}" for n in pairs))
    listed: list[list[str]] = []
    read: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            listed.append(os.listdir(web / "net"))
            for name in listed[-1][::97]:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError, OSError):
                    read.append((web / "net" / name / "mtu").read_text())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        batch(web, *(f"link set a{n} name b{n}" for n in range(1000)))
    finally:
        done.set()
        thread.join()
    for names in listed:
        assert len(set(names)) == len(names)
        assert {"lo", "routes", "sysctl"} <= set(names)
    assert set(read) <= {"1500\n", "65536\n"}
    left = set(os.listdir(web / "net")) - {"lo", "routes", "sysctl"}
    assert left == {f"b{n}" for n in range(1000)}
    with fails(errno.ENOENT):
        os.stat(web / "net/a999")


@pytest.mark.parametrize("name", ["net/lo", "net/routes", "uts/hostname", "user/uids"])
def test_no_lookup_finds_what_died(tree: Path, name: str) -> None:
    for _ in range(ROUNDS // 5):
        (tree / "web").mkdir()
        web = Container(tree / "web")
        for _ in range(3):
            os.stat(web / name)
        init = web.init
        os.kill(init, 9)
        wait_until(lambda: not os.path.exists(f"/proc/{init}"), "it was reaped")
        with fails(errno.ENOENT):
            os.stat(web / name)
        (tree / "web").rmdir()


def test_what_is_shared_goes_with_the_one_that_shares_it(tree: Path, web: Container) -> None:
    write(web / "defaults/unshare", "user pid mnt uts syslog cgroup")
    (web / "db").mkdir()
    dir_fd = os.open(web / "db/net", os.O_PATH)
    try:
        for _ in range(3):
            os.stat("lo", dir_fd=dir_fd)
        (web / "db").rmdir()
        with fails(errno.ENOENT):
            os.stat("lo", dir_fd=dir_fd)
        assert (web / "net/lo").is_dir()
    finally:
        os.close(dir_fd)


def test_owner_and_mode_are_those_of_now(web: Container) -> None:
    path = web / "uts/hostname"
    for mode in (0o600, 0o644, 0o640):
        for _ in range(3):
            os.stat(path)
        path.chmod(mode)
        assert path.stat().st_mode & 0o777 == mode
        os.chown(path, mode, mode)
        assert (path.stat().st_uid, path.stat().st_gid) == (mode, mode)


def open_views(daemon: int) -> int:
    """Detached mounts that the daemon holds."""
    return sum(_target(fd) == "/" for fd in Path(f"/proc/{daemon}/fd").iterdir())


@pytest.mark.parametrize(
    "count", [20, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
def test_more_views_than_the_daemon_may_open_files(
    instance: Instance, tree: Path, count: int
) -> None:
    names = [f"c{number}" for number in range(count)]
    for name in names:
        (tree / name).mkdir()
    instance.ready_spares()
    fd = os.open(tree / names[0] / "net/lo/mtu", os.O_RDONLY)
    daemon = instance.daemon()
    before = resource.prlimit(daemon, resource.RLIMIT_NOFILE)
    last = max(map(int, os.listdir(f"/proc/{daemon}/fd")))
    resource.prlimit(daemon, resource.RLIMIT_NOFILE, (last + RESERVE + 8, before[1]))
    try:
        for _ in range(2):
            assert {(tree / name / "net/lo/mtu").read_text() for name in names} == {"65536\n"}
            assert os.pread(fd, 100, 0) == b"65536\n"
        assert open_views(daemon) < 20
        # All else goes on.
        (tree / "web").mkdir()
        assert Container(tree / "web").run("echo yes") == "yes\n"
    finally:
        resource.prlimit(daemon, resource.RLIMIT_NOFILE, before)
        os.close(fd)
    assert instance.daemon() == daemon


def sysctl(web: Container, name: str, value: str) -> None:
    """Set one of a UTS namespace, as its own root may not."""
    script = f"echo {value} > /proc/sys/kernel/{name}"
    command = ["nsenter", f"--uts={web / 'nsproxy/uts'}", "sh", "-c", script]
    subprocess.run(command, check=True)


def test_a_hostname_is_the_one_that_was_set_last(tree: Path, web: Container) -> None:
    (tree / "db").mkdir()
    db = Container(tree / "db")
    assert web.read("uts/hostname") == "web\n"
    set_it = "python3 -c 'import socket, sys; [socket.sethostname(x) for x in sys.argv[1:]]' "
    for number in range(5):
        # From inside, by a system call; by the sysctl; and from outside.
        web.run(f"{set_it} x{number} a{number}")
        assert web.read("uts/hostname") == f"a{number}\n"
        sysctl(web, "hostname", f"b{number}")
        assert web.read("uts/hostname") == f"b{number}\n"
        web.write("uts/hostname", f"c{number}")
        assert web.read("uts/hostname") == f"c{number}\n"
        assert db.read("uts/hostname") == "db\n"
        sysctl(web, "domainname", f"d{number}")
        assert web.read("uts/domainname") == f"d{number}\n"
        assert db.read("uts/domainname") == "(none)\n"
    assert web.run("cat /sys/namespaces/uts/hostname") == "c4\n"


def test_sysctls_are_those_of_now_and_of_the_container(tree: Path, web: Container) -> None:
    (tree / "db").mkdir()
    db = Container(tree / "db")
    for name in ("net/sysctl/ipv4/ip_forward", "ipc/sysctl/kernel/msgmni"):
        here = db.read(name)
        for value in ("1\n", "0\n", "1\n"):
            web.write(name, value)
            for _ in range(3):
                assert web.read(name) == value
                assert db.read(name) == here
    fd = os.open(web / "net/sysctl/ipv4/ip_forward", os.O_RDONLY)
    try:
        web.run("echo 0 > /proc/sys/net/ipv4/ip_forward")
        assert os.pread(fd, 100, 0) == b"0\n"
        os.kill(web.init, 9)
        wait_until(lambda: not os.listdir(web / "net"), "the namespace is dead")
        with fails(errno.ENODEV):
            os.pread(fd, 100, 0)
    finally:
        os.close(fd)


def test_a_sysctl_of_an_interface_goes_with_its_name(web: Container) -> None:
    batch(web, "link add d0 type veth peer name d1")
    path = web / "net/sysctl/ipv4/conf/d0/forwarding"
    other = web / "net/sysctl/ipv4/conf/d1/forwarding"
    other.write_text("1")
    for value in ("0\n", "1\n", "0\n", "1\n"):
        assert path.read_text() == value
        rename(web, ("d0", "x"), ("d1", "d0"), ("x", "d1"))


def test_idle_views_keep_no_sysctl_open(instance: Instance, tree: Path, web: Container) -> None:
    def opened() -> int:
        fds = Path(f"/proc/{instance.daemon()}/fd")
        return sum(os.path.basename(_target(fd)) in names for fd in fds.iterdir())

    names = ("ip_default_ttl", "ip_no_pmtu_disc", "icmp_echo_ignore_all")
    for name in names:
        web.read(f"net/sysctl/ipv4/{name}")
    assert opened() == 3
    os.kill(web.init, 9)
    wait_until(lambda: not os.listdir(web / "net"), "the namespace is dead")
    wait_until(lambda: not opened(), "they are closed")


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""
