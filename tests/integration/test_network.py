"""Networks made with mkdir, mv, rmdir and echo: interfaces, addresses, routes, `network veth`.

The instance is in a network namespace of its own, which is the host's for it.
"""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsfs import network
from nsfs.rtnetlink import Link
from tests.integration.conftest import (
    DEADLINE_S,
    NSFS,
    Container,
    Instance,
    fails,
    wait_until,
    write,
)

PREFIX = "10.213.0.0/28"
"""Room for seven containers: the first pair is not given out."""
LONG = "the interface towards the rest of the world"


class OwnNetwork(Instance):
    """An instance that takes a new network namespace for the host's."""

    def command(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run nsfs(8)."""
        where = ["unshare", "--net"] if args[0] == "mount" else []
        return subprocess.run(
            [*where, *NSFS, *args],
            check=check,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S * 2,
        )


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    with tempfile.TemporaryDirectory(prefix="nsfs-", dir="/tmp") as base:
        os.chmod(base, 0o755)
        config = Path(base, "nsfs.conf")
        config.write_text(f"[network]\nprefix = {PREFIX}\n")
        instance = OwnNetwork(Path(base), ["--config", str(config)])
        instance.mount()
        try:
            yield instance
        finally:
            instance.umount()
        log = instance.log()
        assert " ERROR " not in log, log
        assert " WARNING " not in log, log


@pytest.fixture
def tree(instance: Instance) -> Iterator[Path]:
    """The mount point; the test is to leave no container in it."""
    yield instance.tree
    write(instance.tree / "defaults/network", "")
    left = [p for p in instance.tree.iterdir() if (p / "exec").exists()]
    if left:
        subprocess.run(["rm", "-rf", *left], check=False, timeout=DEADLINE_S)
    instance.settled()
    wait_until(lambda: interfaces(instance.tree) == {"lo"}, "no interface is left")


@pytest.fixture
def web(tree: Path) -> Container:
    return made(tree / "web")


def made(path: Path) -> Container:
    path.mkdir()
    return Container(path)


def interfaces(container: Path | Container) -> set[str]:
    """The interfaces that are listed."""
    path = container.path if isinstance(container, Container) else container
    return set(os.listdir(path / "net")) - {"routes", "sysctl"}


def ip(container: Container, *words: str) -> str:
    """ip(8) in the container's network namespace."""
    done = subprocess.run(
        ["nsenter", f"--net={container / 'nsproxy/net'}", "ip", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LIVE = tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) >= (6, 2)
"""Whether the kernel renames an interface that is up."""


def rename(old: Path, new: Path) -> None:
    """Give an interface another name, which is up before and afterwards."""
    if not LIVE:
        with fails(errno.EBUSY):
            old.rename(new)
        write(old / "flags", "0x1002")
    old.rename(new)
    write(new / "flags", "0x1003")


def own_lines(path: Path) -> list[str]:
    """What is not the kernel's."""
    return [line for line in path.read_text().splitlines() if " proto " not in line]


# --- mkdir, rmdir ------------------------------------------------------------------------------


def test_mkdir_makes_a_pair(tree: Path, web: Container) -> None:
    (web / "net/eth0").mkdir()
    assert interfaces(web) == {"lo", "eth0"}
    assert interfaces(tree) == {"lo", "web"}
    assert web.read("net/eth0/inet") == ""
    assert int(web.read("net/eth0/flags"), 16) & 1 == 0
    assert "veth" in ip(web, "-d", "link", "show", "eth0")
    (web / "net/eth1").mkdir()
    assert interfaces(tree) == {"lo", "web", "web~1"}
    (web / "net/eth0").rmdir()
    assert interfaces(web) == {"lo", "eth1"}
    assert interfaces(tree) == {"lo", "web~1"}
    (tree / "net/web~1").rmdir()
    assert interfaces(web) == {"lo"}


def test_the_other_end_goes_with_the_container_and_its_name_is_free_at_once(tree: Path) -> None:
    for _ in range(5):
        web = made(tree / "web")
        (web / "net/eth0").mkdir()
        assert interfaces(tree) == {"lo", "web"}
        subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    wait_until(lambda: interfaces(tree) == {"lo"}, "the other end is gone")


def test_nested_the_other_end_is_in_the_parent(tree: Path, web: Container) -> None:
    db = made(web / "db")
    (db / "net/eth0").mkdir()
    assert interfaces(web) == {"lo", "db"}
    assert interfaces(tree) == {"lo"}
    # From inside likewise, but not into what is outside.
    web.run("mkdir /sys/namespaces/db/net/eth1")
    assert interfaces(web) == {"lo", "db", "db~1"}
    code, said = web.run_code("mkdir /sys/namespaces/net/eth0")
    assert (code, "not permitted" in said) == (1, True), said
    web.run("rmdir '/sys/namespaces/net/db~1'")
    assert interfaces(db) == {"lo", "eth0"}


def test_names_that_cannot_be(web: Container) -> None:
    for name, number in (
        ("eth%d", errno.EINVAL),
        ("a b", errno.EINVAL),
        ("a:b", errno.EINVAL),
        ("à", errno.EINVAL),
        ("x" * 128, errno.ENAMETOOLONG),
        ("lo", errno.EEXIST),
        ("routes", errno.EEXIST),
        ("sysctl", errno.EEXIST),
    ):
        with fails(number):
            (web / "net" / name).mkdir()
    with fails(errno.EPERM):
        (web / "net/lo/eth0").mkdir()
    assert interfaces(web) == {"lo"}


def test_odd_names(tree: Path, web: Container) -> None:
    names = {"kmsg", "exec", "ä" * 7, "x" * 15, "-rf", "*", "'\"", "\\134", "a\u2003b", "\x01\x7f"}
    names |= {os.fsdecode(b"\xff\xfe")}
    for name in names:
        (web / "net" / name).mkdir()
        write(web / "net" / name / "inet", "10.0.0.1/24")
        assert own_lines(web / "net" / name / "inet") == ["10.0.0.1/24"]
        write(web / "net/routes", "")
    assert interfaces(web) == names | {"lo"}
    for number, name in enumerate(sorted(names)):
        rename(web / "net" / name, web / f"net/if{number}")
    assert interfaces(web) == {"lo", *(f"if{number}" for number in range(len(names)))}


def test_interfaces_that_are_called_as_files_are_not_shown_and_not_touched(web: Container) -> None:
    ip(web, "link", "add", "routes", "type", "veth", "peer", "sysctl")
    assert interfaces(web) == {"lo"}
    with fails(errno.EPERM):
        (web / "net/sysctl").rename(web / "net/eth0")
    with fails(errno.EPERM):
        (web / "net/sysctl").rmdir()
    with fails(errno.EPERM):
        (web / "net/routes").rename(web / "net/eth0")
    assert "routes" in ip(web, "link")


def test_what_is_no_interface_of_software(web: Container) -> None:
    with fails(errno.EOPNOTSUPP):
        (web / "net/lo").rmdir()
    assert "lo" in interfaces(web)


def has_vlans() -> bool:
    done = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "v5", "link", "lo", "type", "vlan", "id", "5"],
        check=False,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    return b"Unknown device type" not in done.stderr


def test_vlans(web: Container) -> None:
    (web / "net/eth0").mkdir()
    for number in ("0", "4095", "99999999999999999999"):
        with fails(errno.ERANGE):
            (web / f"net/eth0.{number}").mkdir()
    if not has_vlans():
        with fails(errno.EOPNOTSUPP):
            (web / "net/eth0.100").mkdir()
        assert interfaces(web) == {"lo", "eth0"}
    else:
        (web / "net/eth0.100").mkdir()
        assert interfaces(web) == {"lo", "eth0", "eth0.100"}
        assert "vlan protocol 802.1Q id 100" in ip(web, "-d", "link", "show", "eth0.100")
        with fails(errno.EEXIST):
            (web / "net/eth0.100").mkdir()
        (web / "net/eth0").rmdir()
        assert interfaces(web) == {"lo"}


def test_a_dot_makes_no_vlan_where_there_is_nothing_to_have_one(web: Container) -> None:
    (web / "net/eth7.100").mkdir()
    (web / "net/eth0.lan").mkdir()
    assert interfaces(web) == {"lo", "eth7.100", "eth0.lan"}


# --- mv ----------------------------------------------------------------------------------------


def test_mv_renames(tree: Path, web: Container) -> None:
    (web / "net/eth0").mkdir()
    write(web / "net/eth0/inet", "10.0.0.1/24")
    write(web / "net/routes", "default via 10.0.0.2 dev eth0")
    fd = os.open(web / "net/eth0/mtu", os.O_RDONLY)
    dir_fd = os.open(web / "net/eth0", os.O_RDONLY | os.O_DIRECTORY)
    try:
        rename(web / "net/eth0", web / "net/wan")
        assert interfaces(web) == {"lo", "wan"}
        assert own_lines(web / "net/wan/inet") == ["10.0.0.1/24"]
        if LIVE:
            assert own_lines(web / "net/routes") == ["default via 10.0.0.2 dev wan"]
        with fails(errno.ENODEV):
            os.pread(fd, 100, 0)
        with fails(errno.ENOENT):
            os.stat("mtu", dir_fd=dir_fd)
    finally:
        os.close(fd)
        os.close(dir_fd)
    (web / "net/eth0").mkdir()
    with fails(errno.EEXIST):
        (web / "net/eth0").rename(web / "net/wan")
    with fails(errno.EEXIST):
        (web / "net/eth0").rename(web / "net/sysctl")
    with fails(errno.ENOTDIR):
        (web / "net/eth0").rename(web / "net/routes")
    with fails(errno.EPERM):
        (web / "net/eth0").rename(web / "eth0")
    with fails(errno.ENOENT):
        (web / "net/eth7").rename(web / "net/eth8")
    assert interfaces(web) == {"lo", "wan", "eth0"}


def test_longer_names(tree: Path, web: Container) -> None:
    (web / "net/eth0").mkdir()
    (web / "net/eth0").rename(web / "net" / LONG)
    assert interfaces(web) == {"lo", LONG}
    assert web.read(f"net/{LONG}/mtu") == "1500\n"
    assert f"altname {LONG}" in ip(web, "link")
    assert "the_interface_t" in ip(web, "link")
    # A second one with the same beginning.
    (web / f"net/{LONG} 2").mkdir()
    (web / "net/eth1").mkdir()
    with fails(errno.EEXIST):
        (web / "net/eth1").rename(web / "net" / LONG)
    (web / "net/eth1").rename(web / f"net/{LONG}er")
    names = {"lo", LONG, f"{LONG} 2", f"{LONG}er"}
    assert interfaces(web) == names
    for name in names - {"lo"}:
        write(web / "net" / name / "inet", "10.0.0.1/24")
        write(web / "net" / name / "mtu", "1400")
        assert own_lines(web / "net" / name / "inet") == ["10.0.0.1/24"]
        assert "rx_bytes" in os.listdir(web / "net" / name / "statistics")
    # It keeps the name where it is moved.
    (web / "net" / LONG).rename(tree / "net" / LONG)
    assert LONG in interfaces(tree)
    (tree / "net" / LONG).rename(web / "net/eth0")
    assert "altname" not in ip(web, "link", "show", "eth0")
    (web / f"net/{LONG} 2").rmdir()
    assert interfaces(web) == {"lo", "eth0", f"{LONG}er"}


def test_a_container_with_a_long_name(tree: Path) -> None:
    name = "a container whose name is longer than that of an interface"
    web = made(tree / name)
    (web / "net/eth0").mkdir()
    (web / "net/eth1").mkdir()
    assert interfaces(tree) == {"lo", name, f"{name}~1"}
    assert (tree / f"net/{name}~1/mtu").read_text() == "1500\n"
    ip(web, "link", "del", "eth0")
    with fails(errno.ENOENT):
        os.stat(tree / "net" / name)


def test_mv_moves_to_another_container(tree: Path, web: Container) -> None:
    db = made(tree / "db")
    (web / "net/eth0").mkdir()
    write(web / "net/eth0/mtu", "1400")
    write(web / "net/eth0/inet", "10.0.0.1/24")
    fd = os.open(web / "net/eth0/mtu", os.O_RDWR)
    address_fd = os.open(web / "net/eth0/inet", os.O_RDWR)
    dir_fd = os.open(web / "net/eth0", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.pread(fd, 100, 0) == b"1400\n"
        (web / "net/eth0").rename(db / "net/wan")
        assert interfaces(web) == {"lo"}
        assert interfaces(db) == {"lo", "wan"}
        assert db.read("net/wan/mtu") == "1400\n"
        assert db.read("net/wan/inet") == ""
        # What is held of it never shows nor changes the other container's.
        (db / "net/wan").rename(db / "net/eth0")
        for each in (fd, address_fd):
            with fails(errno.ENODEV):
                os.pread(each, 100, 0)
        with fails(errno.ENODEV):
            os.pwrite(fd, b"1300\n", 0)
        with fails(errno.ENODEV):
            os.pwrite(address_fd, b"10.0.0.9/24\n", 0)
        with fails(errno.ENOENT):
            os.stat("mtu", dir_fd=dir_fd)
        assert db.read("net/eth0/mtu") == "1400\n"
        assert db.read("net/eth0/inet") == ""
        # Another one of that name here is this container's own.
        (web / "net/eth0").mkdir()
        assert os.pread(fd, 100, 0) == b"1500\n"
    finally:
        os.close(fd)
        os.close(address_fd)
        os.close(dir_fd)


def test_a_name_that_is_taken_there(tree: Path, web: Container) -> None:
    db = made(tree / "db")
    for each in (web, db):
        (each / "net/eth0").mkdir()
        (each / "net/eth1").mkdir()
        (each / "net/eth1").rename(each / "net" / LONG)
    for old, new in (("eth0", "eth0"), (LONG, LONG), ("eth0", LONG), (LONG, "eth0")):
        with fails(errno.EEXIST):
            (web / "net" / old).rename(db / "net" / new)
    # Its name now is taken there, the one to be is not.
    (web / "net/eth0").rename(db / "net/eth7")
    (web / "net" / LONG).rename(db / f"net/{LONG} too")
    assert interfaces(db) == {"lo", "eth0", "eth7", LONG, f"{LONG} too"}
    assert interfaces(web) == {"lo"}
    with fails(errno.EINVAL):
        (db / "net/lo").rename(web / "net/lo1")
    with fails(errno.EINVAL):
        (db / "net/eth0").rename(web / "net/a b")
    assert interfaces(db) == {"lo", "eth0", "eth7", LONG, f"{LONG} too"}


class Unaware(network.Space):
    """A namespace in which others take names just after they were looked at."""

    def taken(self) -> dict[str, Link]:
        return {}


@pytest.mark.parametrize("old", ["x", LONG])
@pytest.mark.parametrize("new", ["eth0", LONG])
def test_a_move_that_fails_half_way_is_undone(
    tree: Path, web: Container, old: str, new: str
) -> None:
    db = made(tree / "db")
    (db / "net/eth0").mkdir()
    (db / "net/eth1").mkdir()
    (db / "net/eth1").rename(db / "net" / LONG)
    (web / "net/x").mkdir()
    if old != "x":
        (web / "net/x").rename(web / "net" / old)
    with network.opened(web.init) as here, network.opened(db.init) as there:
        with fails(errno.EEXIST):
            network.move(here, Unaware(there.rtnl, there.fd), old, new)
        assert interfaces(web) == {"lo", old}
        assert interfaces(db) == {"lo", "eth0", LONG}
        with fails(errno.EEXIST):
            network.rename(Unaware(here.rtnl, here.fd), old, "lo")
        assert interfaces(web) == {"lo", old}


def test_moving_takes_authority_over_both(tree: Path, web: Container) -> None:
    alice = made(tree / "alice")
    os.chown(alice.path, 1000, 1000)
    os.chown(alice / "net", 1000, 1000)
    lab = made(alice / "lab")
    (lab / "net/eth0").mkdir()
    (web / "net/eth0").mkdir()

    def as_alice(*words: str) -> int:
        user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
        return subprocess.run(
            [*user, *words], check=False, capture_output=True, timeout=DEADLINE_S
        ).returncode

    assert as_alice("mv", str(web / "net/eth0"), str(alice / "net/")) != 0
    assert as_alice("mv", str(alice / "net/lab"), str(web / "net/")) != 0
    assert as_alice("mv", str(tree / "net/web"), str(alice / "net/")) != 0
    # The other end would be the host's.
    assert as_alice("mkdir", str(alice / "net/eth0")) != 0
    assert as_alice("mkdir", str(tree / "net/eth0")) != 0
    assert interfaces(web) == {"lo", "eth0"}
    assert interfaces(tree) == {"lo", "web"}
    assert as_alice("mv", str(alice / "net/lab"), str(alice / "net/down")) == 0
    assert interfaces(alice) == {"lo", "down"}


def test_from_inside_a_network_that_is_shared_is_not_changed(tree: Path, web: Container) -> None:
    write(web / "defaults/unshare", "user pid mnt uts syslog cgroup")
    db = made(web / "db")
    (web / "net/eth0").mkdir()
    assert interfaces(db) == {"lo", "eth0"}
    for command in (
        "mv net/eth0 net/eth1",
        "rmdir net/eth0",
        "mkdir net/eth1",
        "echo 10.0.0.1/24 > net/eth0/inet",
        "echo unreachable 10.0.0.0/8 > net/routes",
    ):
        code, said = db.run_code(f"cd /sys/namespaces; {command}")
        # dash says of any error of a write that it is one of I/O.
        assert code != 0, command
        assert "not permitted" in said or "I/O error" in said, said
    # rm -rf of one who shares it harms the other's nothing.
    write(web / "net/eth0/inet", "10.0.0.1/24")
    subprocess.run(["rm", "-rf", db.path], check=True, timeout=DEADLINE_S)
    assert interfaces(web) == {"lo", "eth0"}
    assert own_lines(web / "net/eth0/inet") == ["10.0.0.1/24"]


def test_a_pod_keeps_its_network_when_the_first_goes(instance: Instance, tree: Path) -> None:
    write(tree / "defaults/network", "veth")
    web = made(tree / "web")
    address = address_of(web)
    write(tree / "defaults/network", "none")
    db = made(tree / "db")
    db.write("namespaces", "net ../web")
    assert interfaces(db) == {"lo", "eth0"}
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    assert address_of(db) == address
    # Neither the name of the other end nor the address is free.
    write(tree / "defaults/network", "veth")
    again = made(tree / "web")
    assert address_of(again) != address
    assert interfaces(tree) == {"lo", "web", "web~1"}
    # (A port below 1024 would take privilege over the user namespace that is gone.)
    db.run("hostname > /srv/who; busybox httpd -p 8080 -h /srv")
    assert fetch(instance.daemon(), f"{address}:8080") == "db\n"
    rename(db / "net/eth0", db / "net/wan")
    assert own_lines(db / "net/wan/inet") == [f"{address}/31"]


def test_renames_that_race(tree: Path, web: Container) -> None:
    db = made(tree / "db")
    (web / "net/eth0").mkdir()
    (web / "net/eth1").mkdir()
    errors: list[int] = []

    def move(mine: str) -> None:
        places = itertools.cycle([web / "net/x", db / "net/x", web / f"net/{mine}"])
        here = web / f"net/{mine}"
        for _ in range(30):
            there = next(places)
            try:
                here.rename(there)
                here = there
            except OSError as error:
                errors.append(error.errno or 0)

    threads = [threading.Thread(target=move, args=(name,)) for name in ("eth0", "eth1")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert set(errors) <= {errno.EEXIST, errno.ENOENT, errno.ESTALE}
    found = (interfaces(web) | {f"db/{x}" for x in interfaces(db)}) - {"lo", "db/lo"}
    assert len(found) == 2, found


def test_a_thousand_interfaces(tree: Path, web: Container) -> None:
    with tempfile.NamedTemporaryFile("w") as batch:
        batch.writelines(
            f"link add i{number} type veth peer name j{number}\n" for number in range(500)
        )
        batch.flush()
        ip(web, "-batch", batch.name)
    found = interfaces(web)
    assert len(found) == 1001
    shown = subprocess.run(
        f"cat {web / 'net'}/*/mtu | wc -l", shell=True, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "1001"


# --- inet, routes ------------------------------------------------------------------------------


def test_addresses(tree: Path, web: Container) -> None:
    (web / "net/eth0").mkdir()
    inet = web / "net/eth0/inet"
    write(tree / "net/web/inet", "10.0.0.9/24")
    write(inet, "10.0.0.1/24\nfd00::1/64\n10.7.0.1 peer 10.7.0.2/32")
    assert int(web.read("net/eth0/flags"), 16) & 1 == 1
    assert set(own_lines(inet)) == {"10.0.0.1/24", "fd00::1/64", "10.7.0.1 peer 10.7.0.2/32"}
    shown = ip(web, "address", "show", "eth0")
    assert "inet 10.0.0.1/24" in shown
    assert "inet6 fd00::1/64" in shown
    # What the kernel gave it stays, and may stand there.
    kernels = wait_until(lambda: [x for x in inet.read_text().splitlines() if "kernel_ll" in x], "")
    write(inet, "\n".join(["10.0.0.2/24", "fd00::1/80", *kernels]))
    assert inet.read_text().splitlines() == ["10.0.0.2/24", "fd00::1/80", *kernels]
    write(inet, "")
    assert inet.read_text().splitlines() == kernels
    assert web.read("net/lo/inet").splitlines()[0] == "127.0.0.1/8 proto kernel_lo"
    write(web / "net/lo/inet", "")
    assert web.read("net/lo/inet").splitlines()[0] == "127.0.0.1/8 proto kernel_lo"


def test_the_second_address_of_a_network_stays_when_the_first_goes(web: Container) -> None:
    (web / "net/eth0").mkdir()
    inet = web / "net/eth0/inet"
    write(inet, "10.0.0.1/24\n10.0.0.2/24\n10.0.0.3/24")
    assert own_lines(inet) == ["10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24"]
    write(inet, "10.0.0.2/24\n10.0.0.3/24")
    assert own_lines(inet) == ["10.0.0.2/24", "10.0.0.3/24"]


@pytest.mark.parametrize("bad", ["10.0.0.5/33", "nonsense", "10.0.0.5/24 extra", "::/64"])
def test_no_address_is_changed_when_one_is_wrong(web: Container, bad: str) -> None:
    (web / "net/eth0").mkdir()
    inet = web / "net/eth0/inet"
    write(inet, "10.0.0.1/24")
    with pytest.raises(OSError, match="Errno"):
        write(inet, f"10.0.0.2/24\n10.0.0.3/24\n{bad}")
    assert own_lines(inet) == ["10.0.0.1/24"]


ROUTES = """\
default via 10.0.0.9 dev eth0
10.1.0.0/16 dev eth0 scope link metric 7
10.2.0.0/16 via 10.0.0.9 dev eth0 proto static src 10.0.0.1
10.3.0.0/16 nexthop via 10.0.0.8 dev eth0 weight 2 nexthop via 10.0.0.9 dev eth0 weight 1
10.4.4.4 via 10.9.9.9 dev eth0 onlink
10.5.0.0/16 via inet6 fd00::9 dev eth0
blackhole 10.6.0.0/16
fd01::/32 via fd00::9 dev eth0
unreachable fd02::/32
default via fd00::9 dev eth0
"""


def test_routes_are_read_as_they_were_written(web: Container) -> None:
    (web / "net/eth0").mkdir()
    write(web / "net/eth0/inet", "10.0.0.1/24\nfd00::1/64")
    routes = web / "net/routes"
    write(routes, ROUTES)
    expected = set(ROUTES.replace(" scope link", "").splitlines())
    found = [line for line in routes.read_text().splitlines() if " kernel" not in line]
    assert set(found) == expected
    assert "10.0.0.0/24 dev eth0 proto kernel scope link src 10.0.0.1" in routes.read_text()
    assert "default via 10.0.0.9 dev eth0" in ip(web, "route")
    assert "nexthop via 10.0.0.8 dev eth0 weight 2" in ip(web, "route")
    assert "unreachable fd02::/32" in ip(web, "-6", "route")
    text = routes.read_text()
    write(routes, text)
    assert routes.read_text() == text
    # One is another now, one is new, the others go.
    write(routes, "default via 10.0.0.8 dev eth0\n10.7.0.0/16 via 10.0.0.8")
    found = [line for line in routes.read_text().splitlines() if " kernel" not in line]
    assert found == ["default via 10.0.0.8 dev eth0", "10.7.0.0/16 via 10.0.0.8 dev eth0"]
    # What ip(8) can say and a line cannot stays.
    ip(web, "route", "add", "10.8.0.0/16", "dev", "eth0", "mtu", "1400")
    assert "# 10.8.0.0/16 dev eth0\n" in routes.read_text()
    write(routes, "")
    assert "# 10.8.0.0/16 dev eth0\n" in routes.read_text()
    assert "default" not in routes.read_text()


@pytest.mark.parametrize(
    ("bad", "number"),
    [
        ("nonsense", errno.EINVAL),
        ("10.0.0.1/24 dev eth0", errno.EINVAL),
        ("default via 10.0.0.8 dev eth0 metric 4294967296", errno.ERANGE),
        ("10.9.0.0/16 via 10.99.0.1 dev eth0", errno.ENETUNREACH),
        ("10.9.0.0/16 dev eth9", errno.ENODEV),
        ("10.9.0.0/16 dev down", errno.ENETDOWN),
    ],
)
def test_no_route_is_changed_when_one_is_wrong(web: Container, bad: str, number: int) -> None:
    (web / "net/eth0").mkdir()
    (web / "net/down").mkdir()
    write(web / "net/eth0/inet", "10.0.0.1/24")
    before = "default via 10.0.0.9 dev eth0\n10.1.0.0/16 dev eth0\n"
    write(web / "net/routes", before)
    with fails(number):
        write(web / "net/routes", f"default via 10.0.0.7 dev eth0\n10.2.0.0/16 dev eth0\n{bad}")
    assert (
        "".join(x for x in web.read("net/routes").splitlines(True) if "kernel" not in x) == before
    )
    assert web.state()["reason"].startswith("routes: ")


def test_lines_that_are_written_one_by_one_are_one_value(web: Container) -> None:
    (web / "net/eth0").mkdir()
    script = f"printf '%s\\n' 10.0.0.1/24 10.0.0.2/24 fd00::1/64 > {web / 'net/eth0/inet'}"
    subprocess.run(["bash", "-c", script], check=True, timeout=DEADLINE_S)
    assert set(own_lines(web / "net/eth0/inet")) == {"10.0.0.1/24", "10.0.0.2/24", "fd00::1/64"}
    write(web / "net/eth0/inet", "10.0.0.3/24")
    assert own_lines(web / "net/eth0/inet") == ["10.0.0.3/24"]
    script = f"printf '%s\\n' '/srv /etc ro' '/mnt /usr ro' > {web / 'binds'}"
    subprocess.run(["bash", "-c", script], check=True, timeout=DEADLINE_S)
    assert web.read("binds") == "/srv /etc ro\n/mnt /usr ro\n"


def test_the_same_from_inside(web: Container) -> None:
    (web / "net/eth0").mkdir()
    web.run("cd /sys/namespaces/net; mv eth0 wan; echo 10.0.0.1/24 > wan/inet")
    web.run("cd /sys/namespaces/net; echo default via 10.0.0.2 dev wan > routes")
    script = "cd {}/net; ls -R | sort; cat wan/inet wan/mtu routes"
    done = subprocess.run(
        ["sh", "-ec", script.format(web.path)], capture_output=True, text=True, check=True
    )
    assert web.run(script.format("/sys/namespaces")) == done.stdout


def sockets(instance: Instance) -> int:
    """Netlink sockets of the daemon's process."""
    folder = f"/proc/{instance.daemon()}/fd"
    found = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]
    return sum(each.startswith("socket:") for each in found)


def test_nothing_is_kept_open(instance: Instance, web: Container) -> None:
    before = sockets(instance)
    for _ in range(3):
        (web / "net/eth0").mkdir()
        write(web / "net/eth0/inet", "10.0.0.1/24")
        web.read("net/routes")
        (web / "net/eth0").rmdir()
        with fails(errno.EEXIST):
            (web / "net/lo").mkdir()
        with fails(errno.EINVAL):
            (web / "net/a b").mkdir()
    assert sockets(instance) <= before


def test_the_daemon_may_die_at_any_moment(instance: Instance, tree: Path, web: Container) -> None:
    """Each of a series of changes is made once, although daemons die meanwhile."""
    done = threading.Event()

    def change() -> None:
        try:
            for _ in range(20):
                (web / "net/eth0").mkdir()
                (web / "net/eth0").rename(web / "net/wan")
                write(web / "net/wan/inet", "10.0.0.1/24")
                assert own_lines(web / "net/wan/inet") == ["10.0.0.1/24"]
                (web / "net/wan").rmdir()
            completed.append(True)
        finally:
            done.set()

    completed: list[bool] = []
    thread = threading.Thread(target=change)
    thread.start()
    while not done.wait(0.1):
        instance.kill_daemon()
        # The next one serves.
        os.stat(tree / "state")
        web.read("net/lo/mtu")
    thread.join()
    assert completed
    assert interfaces(web) == {"lo"}


# --- a network of three ------------------------------------------------------------------------

FETCH = "import urllib.request as u; print(end=u.urlopen('http://%s/who', None, 2).read().decode())"


def fetch(pid: int, address: str) -> str:
    """What the web server there says to somebody in a process's network namespace; "" when nothing
    answers."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-Ic", FETCH % address],
        # Through no proxy.
        env={},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return done.stdout


def serve(container: Container) -> None:
    """A web server on port 80 that says whose it is; it listens when this returns."""
    container.run("hostname > /srv/who; busybox httpd -h /srv")


def test_two_networks_and_a_router(tree: Path) -> None:
    """With mkdir, mv and echo alone."""
    a, b, router = (made(tree / name) for name in ("a", "b", "router"))
    for each in (a, b):
        (each / "net/eth0").mkdir()
    (tree / "net/a").rename(router / "net/a")
    (tree / "net/b").rename(router / "net/b")
    write(a / "net/eth0/inet", "10.0.1.2/24\nfd00:1::2/64")
    write(router / "net/a/inet", "10.0.1.1/24\nfd00:1::1/64")
    write(b / "net/eth0/inet", "10.0.2.2/24\nfd00:2::2/64")
    write(router / "net/b/inet", "10.0.2.1/24\nfd00:2::1/64")
    write(a / "net/routes", "default via 10.0.1.1 dev eth0\ndefault via fd00:1::1 dev eth0")
    write(b / "net/routes", "default via 10.0.2.1 dev eth0\ndefault via fd00:2::1 dev eth0")
    for each in (a, b, router):
        serve(each)
    # All of them on the same port.
    for each, name in ((a, "a"), (b, "b"), (router, "router")):
        assert fetch(each.init, "127.0.0.1") == f"{name}\n"
    assert fetch(a.init, "10.0.1.1") == "router\n"
    assert fetch(a.init, "10.0.2.2") == ""
    write(router / "net/sysctl/ipv4/ip_forward", "1")
    write(router / "net/sysctl/ipv6/conf/all/forwarding", "1")
    assert fetch(a.init, "10.0.2.2") == "b\n"
    assert fetch(b.init, "10.0.1.2") == "a\n"
    # A new address of IPv6 is looked for on the link first.
    wait_until(lambda: fetch(a.init, "[fd00:2::2]") == "b\n", "IPv6 goes through, too")
    rename(router / "net/b", router / "net/to-b")
    assert fetch(a.init, "10.0.2.2") == "b\n"
    (router / "net/to-b").rename(tree / "net/b")
    assert fetch(a.init, "10.0.2.2") == ""


# --- network veth ------------------------------------------------------------------------------


def address_of(container: Container) -> str:
    (line,) = own_lines(container / "net/eth0/inet")
    address, length = line.split("/")
    assert length == "31"
    return address


def test_veth(instance: Instance, tree: Path) -> None:
    write(tree / "defaults/network", "veth")
    web, db = made(tree / "web"), made(tree / "db")
    assert web.read("network") == "veth\n"
    assert interfaces(web) == {"lo", "eth0"}
    assert interfaces(tree) == {"lo", "web", "db"}
    gateway = own_lines(tree / "net/web/inet")[0].split("/")[0]
    assert own_lines(web / "net/routes") == [f"default via {gateway} dev eth0"]
    assert address_of(web) != address_of(db)
    for each in (web, db):
        serve(each)
    host = instance.daemon()
    assert fetch(host, address_of(web)) == "web\n"
    assert fetch(host, address_of(db)) == "db\n"
    # nsfs forwards nothing.
    assert (tree / "net/sysctl/ipv4/ip_forward").read_text() == "0\n"
    write(tree / "net/sysctl/ipv4/ip_forward", "1")
    assert fetch(web.init, address_of(db)) == "db\n"
    assert fetch(db.init, address_of(web)) == "web\n"
    write(tree / "net/sysctl/ipv4/ip_forward", "0")


def test_veth_nested(tree: Path) -> None:
    web = made(tree / "web")
    write(web / "defaults/network", "veth")
    db = made(web / "db")
    assert interfaces(web) == {"lo", "db"}
    assert interfaces(tree) == {"lo"}
    serve(db)
    assert fetch(web.init, address_of(db)) == "db\n"


def test_network_of_an_idle_container(tree: Path, web: Container) -> None:
    assert web.read("network") == "none\n"
    with fails(errno.EINVAL):
        web.write("network", "wifi")
    for _ in range(3):
        web.write("network", "veth")
        assert interfaces(web) == {"lo", "eth0"}
        assert interfaces(tree) == {"lo", "web"}
    address = address_of(web)
    # Whatever else is built anew, it keeps its address.
    web.write("binds", "/srv /etc ro")
    assert address_of(web) == address
    assert interfaces(tree) == {"lo", "web"}
    web.write("network", "none")
    assert interfaces(web) == {"lo"}
    web.write("network", "host")
    assert web.read("namespaces").split("net ")[1].splitlines()[0].endswith(" ..")
    assert web.run_code("echo none > /sys/namespaces/network")[0] != 0


def test_addresses_are_freed_with_their_containers(instance: Instance, tree: Path) -> None:
    write(tree / "defaults/network", "veth")
    names = [f"c{number}" for number in range(7)]
    found = {address_of(made(tree / name)) for name in names}
    assert len(found) == 7
    with fails(errno.ENOSPC):
        made(tree / "one-too-many")
    assert not (tree / "one-too-many").exists()
    instance.kill_daemon()
    with fails(errno.ENOSPC):
        made(tree / "one-too-many")
    assert {address_of(Container(tree / name)) for name in names} == found
    (tree / "c3").rmdir()
    wait_until(lambda: not list((instance.run_dir / "c").glob("*.tmp")), "")

    def again() -> bool:
        try:
            made(tree / "another")
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return False
        return True

    wait_until(again, "an address is free")
    assert address_of(Container(tree / "another")) in found


def test_a_pair_is_connected_whole_or_not_at_all(tree: Path, web: Container) -> None:
    db = made(tree / "db")
    # So that its default route, which comes last, cannot be added.
    write(web / "net/routes", "unreachable default")
    with network.opened(web.init) as here, network.opened(db.init) as there:
        with fails(errno.EEXIST):
            network.connect(here, there, "web", "10.0.0.3", ())
        assert interfaces(web) == interfaces(db) == {"lo"}
        write(web / "net/routes", "")
        network.connect(here, there, "web", "10.0.0.3", ())
    assert own_lines(web / "net/routes") == ["default via 10.0.0.2 dev eth0"]
    assert own_lines(db / "net/web/inet") == ["10.0.0.2/31"]


def test_held_inside_while_it_is_moved_outside(tree: Path, web: Container) -> None:
    """Who is inside sees nothing of where an interface went, `..` included."""
    db = made(tree / "db")
    (db / "net/secret").mkdir()
    (web / "net/eth0").mkdir()
    web.start(
        "sh",
        "-c",
        "cd /sys/namespaces/net/eth0; exec 3< mtu; echo holds it;"
        "until ! test -e /sys/namespaces/net/eth0; do sleep 0.02; done;"
        "cat mtu <&3; cat <&3; ls; ls ..; cat ../../uts/hostname; ls ../../..; echo ended",
    )
    wait_until(lambda: "holds it" in web.read("output"), "")
    (web / "net/eth0").rename(db / "net/eth0")
    wait_until(lambda: "ended" in web.read("output"), "")
    said = web.read("output")
    assert "1500" not in said
    assert "secret" not in said
    assert "web\n" in said
    assert "db" not in said.split()
