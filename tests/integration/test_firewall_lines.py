"""Lines printed while a packet is handled, by marks: every kind of rule, and what may deceive."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, Container, Instance, readable, serving, wait_until
from .firewall import (
    Net,
    attached,
    caught_up,
    in_net,
    kernel,
    prefixes,
    run,
    sender,
    status,
    tier,
    traffic,
)

pytestmark = pytest.mark.usefixtures("host_log")

NF_LOG = Path("/proc/sys/net/netfilter/nf_log_all_netns")
NOTE = Path("/run/nsfs.nf_log_all_netns")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """An instance in the best tier."""
    base = tmp_path_factory.mktemp("exact")
    config = base / "nsfs.conf"
    config.write_text("[log]\nfirewall_rate = max\nrate = max\n")
    with serving(base, ["--config", str(config)]) as found:
        # This kernel has what it takes (see conftest.EXACT), and scripts/setup installs the rest.
        assert wait_until(lambda: tier(found), "there is a tier") == "exact"
        yield found


@pytest.fixture
def pair(exact: Instance) -> Iterator[tuple[Container, Container]]:
    """Two containers of it, the root's `kmsg` cleared."""
    caught_up(exact)
    (exact.tree / "kmsg").write_text("")
    for name in ("a", "b"):
        (exact.tree / name).mkdir()
    attached(exact, 2)
    yield Container(exact.tree / "a"), Container(exact.tree / "b")
    for name in ("a", "b"):
        subprocess.run(["rm", "-rf", str(exact.tree / name)], check=False, timeout=DEADLINE_S)
    exact.settled()
    attached(exact, 0)


@contextlib.contextmanager
def wired(*containers: Container) -> Iterator[list[Net]]:
    """The containers' namespaces, wired up."""
    with contextlib.ExitStack() as stack:
        nets = []
        for name, each in zip("abcd", containers, strict=False):
            nets.append(Net(name, each.init))
            stack.callback(nets[-1].close)
        yield nets


def settle(instance: Instance, container: Container, count: int) -> Counter[str]:
    """The rules that a container has lines of, when there are so many and all have come."""

    def lines() -> int:
        return sum(prefixes(kernel(container)).values())

    wait_until(lambda: lines() >= count, f"{count} lines, not {lines()}")
    caught_up(instance)
    return prefixes(kernel(container))


@pytest.mark.parametrize("program", ["iptables-legacy", "iptables-nft"])
def test_the_variants_of_iptables(
    exact: Instance, pair: tuple[Container, Container], program: str
) -> None:
    with wired(*pair) as nets:
        for net in nets:
            rule = f"-p udp --dport 5001:5009 -j LOG --log-level info --log-prefix {net.name}-"
            script = "".join(
                f"{program} -t {table} -A {chain} {rule}{table}-{chain}:\\ \n"
                for table, chain in (
                    ("raw", "PREROUTING"),
                    ("mangle", "PREROUTING"),
                    ("filter", "INPUT"),
                    ("filter", "FORWARD"),
                    ("raw", "OUTPUT"),
                    ("filter", "OUTPUT"),
                    ("mangle", "POSTROUTING"),
                )
            )
            run(net.pid, script)
        traffic(nets, 5, 0.02)
        for net, each in zip(nets, pair, strict=True):
            assert settle(exact, each, 50) == {
                f"{net.name}-raw-PREROUTING": 10,
                f"{net.name}-mangle-PREROUTING": 10,
                f"{net.name}-filter-INPUT": 5,
                f"{net.name}-filter-FORWARD": 5,
                f"{net.name}-raw-OUTPUT": 5,
                f"{net.name}-filter-OUTPUT": 5,
                f"{net.name}-mangle-POSTROUTING": 10,
            }
            assert all(line.startswith("6,") for line in each.read("kmsg").splitlines())


def test_ipv6_nat_and_ingress(exact: Instance, pair: tuple[Container, Container]) -> None:
    with wired(*pair) as nets:
        for net in nets:
            run(
                net.pid,
                f"""
                nft -f - <<'X'
                table netdev n {{ chain i {{ type filter hook ingress device eth0 priority 0;
                  udp dport 5001 log prefix "{net.name}-ingress: "; }}
                }}
                table ip t {{
                  chain d {{ type nat hook prerouting priority -100;
                    udp dport 5001 dnat to 10.9.0.1:5007; }}
                  chain p {{ type filter hook prerouting priority 0;
                    udp dport 5007 log prefix "{net.name}-after-dnat: "; }}
                  chain i {{ type filter hook input priority 0;
                    udp dport 5007 log prefix "{net.name}-in-dnat: "; }}
                  chain o {{ type nat hook output priority -100;
                    udp dport 5003 dnat to 10.9.1.9:5008; }}
                  chain o2 {{ type filter hook output priority 0;
                    udp dport 5008 log prefix "{net.name}-out-dnat: "; }}
                  chain s {{ type nat hook postrouting priority 100; masquerade; }}
                  chain s2 {{ type filter hook postrouting priority 200;
                    udp dport 5008 log prefix "{net.name}-after-snat: "; }}
                }}
                table ip6 t {{
                  chain i {{ type filter hook input priority 0;
                    udp dport 5011 log prefix "{net.name}-in6: "; }}
                  chain o {{ type filter hook output priority 0;
                    udp dport 5012 log prefix "{net.name}-out6: "; }}
                }}
                X
                """,
            )
        traffic(nets, 5, 0.02)
        for net in nets:
            assert sender(net.sender_host.pid, "fd09:0::1", 5011, 5, 0.02).wait(DEADLINE_S) == 0
            assert sender(net.pid, "fd09:0::2", 5012, 5, 0.02).wait(DEADLINE_S) == 0
        for net, each in zip(nets, pair, strict=True):
            kinds = ("ingress", "after-dnat", "in-dnat", "out-dnat", "after-snat", "in6", "out6")
            assert settle(exact, each, 35) == {f"{net.name}-{kind}": 5 for kind in kinds}


def test_a_bridge(exact: Instance, pair: tuple[Container, Container]) -> None:
    with wired(*pair) as nets:
        for net in nets:
            script = "\n".join(
                f"chain {hook} {{ type filter hook {hook} priority 0; udp dport 5020-5029 "
                f'log prefix "{net.name}-{hook}: "; }}'
                for hook in ("prerouting", "input", "forward", "output", "postrouting")
            )
            run(
                net.pid,
                f"""
                ip link add br0 type bridge
                ip addr add 10.8.0.1/24 dev br0
                ip link add p0 type veth peer name q0 netns {net.sender_host.pid}
                ip link add p1 type veth peer name q1 netns {net.sender_host.pid}
                ip link set p0 master br0 up; ip link set p1 master br0 up; ip link set br0 up
                ip neigh add 10.8.0.9 lladdr 02:00:00:00:00:09 dev br0
                nft -f - <<'X'\ntable bridge t {{\n{script}\n}}\nX
                """,
            )
            run(
                net.sender_host.pid,
                """
                ip link set q0 up; ip link set q1 up; ip addr add 10.8.0.2/24 dev q0
                ip neigh add 10.8.0.9 lladdr 02:00:00:00:00:09 dev q0
                """,
            )
        for each in pair:
            wait_until(
                lambda: in_net(each, "bridge", "link").stdout.count("state forwarding") == 2,
                "the bridge forwards",
            )
        for net in nets:
            for pid, to, port in (
                (net.sender_host.pid, "10.8.0.9", 5020),
                (net.sender_host.pid, "10.8.0.1", 5021),
                (net.pid, "10.8.0.9", 5022),
            ):
                assert sender(pid, to, port, 5, 0.02).wait(DEADLINE_S) == 0
        for net, each in zip(nets, pair, strict=True):
            found = settle(exact, each, 25)
            assert all(prefix.startswith(f"{net.name}-") for prefix in found)
            assert found[f"{net.name}-prerouting"] == 10
            assert found[f"{net.name}-input"] == 5
            assert found[f"{net.name}-forward"] >= 5
            assert found[f"{net.name}-output"] >= 5


ALTERNATE = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None)
sockets = []
for pid in sys.argv[1:3]:
    fd = os.open(f'/proc/{pid}/ns/net', os.O_RDONLY)
    assert libc.setns(fd, 0) == 0
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(('10.9.0.1', 4000))
    sockets.append(s)
for i in range(int(sys.argv[3])):
    for s in sockets:
        try:
            s.sendto(b'same', ('10.9.0.9', 5003))
        except OSError:
            pass
"""


@pytest.mark.parametrize("verdict", ["accept", "drop"])
def test_equal_packets_of_one_process(
    exact: Instance, pair: tuple[Container, Container], verdict: str
) -> None:
    """The hardest case: one task sends equal packets (ID 0) in two namespaces in turn, and one of
    these logs before any mark, or drops there."""
    with wired(*pair) as nets:
        run(
            nets[1].pid,
            f"""
            nft -f - <<'X'
            table ip t {{ chain o {{ type filter hook output priority -2147483648;
              udp dport 5003 log prefix "b-first: " {verdict}; }}
            }}
            X
            """,
        )
        for order in (nets, nets[::-1]):
            words = ["python3", "-c", ALTERNATE, str(order[0].pid), str(order[1].pid), "100"]
            subprocess.run(words, check=True, timeout=DEADLINE_S)
        found = settle(exact, pair[1], 200 if verdict == "accept" else 0)
        assert not kernel(pair[0])
        if verdict == "accept":
            assert found == {"b-first": 200}


def test_a_prefix_that_says_something_else(
    exact: Instance, pair: tuple[Container, Container]
) -> None:
    forged = "IN=eth0 OUT= SRC=10.9.0.2 DST=10.9.0.1 LEN=29 "
    with wired(*pair) as nets:
        run(
            nets[1].pid,
            f"""
            nft -f - <<'X'
            table ip t {{ chain i {{ type filter hook input priority 0;
              udp dport 5001 log prefix "{forged}"; }}
            }}
            X
            """,
        )
        traffic(nets, 5, 0.02)
        wait_until(lambda: len(kernel(pair[1])) >= 5, "its own lines come")
        assert not kernel(pair[0])


@pytest.mark.parametrize("how", ["-n", "-rn", "-r --fork unshare -rn"])
def test_a_namespace_that_a_member_made(
    exact: Instance, pair: tuple[Container, Container], how: str
) -> None:
    """Its own, or one of a user namespace nested in the container's."""
    a, b = pair
    a.start("unshare", *how.split(), "sleep", "300")
    own = Path(f"/proc/{a.init}/ns/net").stat().st_ino

    def made() -> int:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if (
                        (entry / "comm").read_text() == "sleep\n"
                        and "/payload" in (entry / "cgroup").read_text()
                        and (entry / "ns/net").stat().st_ino != own
                    ):
                        return int(entry.name)
        return 0

    pid = wait_until(made, "it is there")
    attached(exact, 3)
    run(pid, "ip link set lo up; iptables -A OUTPUT -p udp -j LOG --log-prefix made:\\ ")
    assert sender(pid, "127.0.0.1", 5000, 5, 0.01).wait(DEADLINE_S) == 0
    assert settle(exact, a, 5) == {"made": 5}
    assert not kernel(b)


# --- what may deceive ---

LO = "ip link set lo up; iptables -A OUTPUT -p udp -j LOG --log-prefix {}:\\ "
"""Equal addresses, equal names of interfaces."""


def sends(pid: int, count: int = 5) -> None:
    """Equal packets, whoever sends them."""
    assert sender(pid, "127.0.0.1", 5000, count, 0.0).wait(DEADLINE_S) == 0


def links(instance: Instance) -> int:
    """To how many hooks the kernel has programs of this instance attached."""
    (marker,) = [
        entry
        for entry in Path(f"/proc/{instance.daemon()}/task").glob("*/children")
        for entry in entry.read_text().split()
        if Path(f"/proc/{entry}/comm").read_text() == "nsfs-marker\n"
    ]
    found = 0
    for entry in Path(f"/proc/{marker}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += "hooknum:" in entry.read_text()
    return found


def test_where_marks_are_made(exact: Instance, pair: tuple[Container, Container]) -> None:
    """Five hooks of two families of each namespace of a container, once; nowhere else."""
    a, b = pair
    assert links(exact) == 20
    (a / "nested").mkdir()
    attached(exact, 3)
    assert links(exact) == 30
    Container(a / "nested").write("unshare", "user pid mnt uts syslog cgroup ipc time")
    attached(exact, 2)
    assert links(exact) == 20
    b.write("namespaces", "net ../a")
    attached(exact, 1)
    assert links(exact) == 10
    # A dead one has no network namespace that packets could be in.
    os.kill(a.init, signal.SIGKILL)
    wait_until(lambda: " ../a" not in b.read("namespaces"), "b holds it")
    wait_until(lambda: links(exact) == 10, "its heir's")
    os.kill(b.init, signal.SIGKILL)
    wait_until(lambda: links(exact) == 0, "it is let go of")
    attached(exact, 0)


def test_none_are_made_where_no_rule_prints(tmp_path: Path) -> None:
    """With the sysctl off a LOG rule of a container prints nothing."""
    config = tmp_path / "nsfs.conf"
    config.write_text("[log]\nfirewall_log = off\n")
    with serving(tmp_path, ["--config", str(config)]) as instance:
        wait_until(lambda: tier(instance) == "exact", "there is a tier")
        before = NF_LOG.read_text()
        (instance.tree / "a").mkdir()
        attached(instance, 1)
        if before == NF_LOG.read_text():
            # Another instance may be there that has switched it on.
            assert links(instance) == (10 if before == "1\n" else 0)


@pytest.mark.parametrize("end", ["removed", "killed"])
def test_a_pod_whose_holder_ends(
    exact: Instance, pair: tuple[Container, Container], end: str
) -> None:
    a, b = pair
    b.write("namespaces", "net ../a")
    attached(exact, 1)
    run(b.init, LO.format("pod"))
    sends(b.init)
    assert settle(exact, a, 5) == {"pod": 5}
    assert not kernel(b)
    if end == "killed":
        os.kill(a.init, signal.SIGKILL)
        wait_until(lambda: " ../a" not in b.read("namespaces"), "it holds it now")
        inherits(exact, b)
        before = prefixes(kernel(a))
        inherits(exact, b)
        assert prefixes(kernel(a)) == before
    subprocess.run(["rm", "-rf", str(a.path)], check=True, timeout=DEADLINE_S)
    inherits(exact, b)


def inherits(instance: Instance, heir: Container) -> None:
    """The lines of the rule go to who holds the namespace now: all, from a moment later on."""

    def lines() -> int:
        return prefixes(kernel(heir))["pod"]

    def one_comes() -> bool:
        before = lines()
        sends(heir.init, 1)
        caught_up(instance)
        return lines() > before

    wait_until(lambda: one_comes() and one_comes(), "lines come")
    before = lines()
    sends(heir.init, 20)
    assert settle(instance, heir, before + 20) == {"pod": before + 20}
    assert links(instance) == 10


def test_an_interface_that_moves(exact: Instance, pair: tuple[Container, Container]) -> None:
    """Lines go with the namespace that the packet is in, not with the name, the address or the
    MAC address."""
    a, b = pair
    with contextlib.ExitStack() as stack:
        net = Net("a", a.init)
        stack.callback(net.close)
        for name, each in (("a", a), ("b", b)):
            rule = f"iptables -A INPUT -p udp --dport 5001 -j LOG --log-prefix {name}-in:\\ "
            run(each.init, rule)
        assert sender(net.sender_host.pid, "10.9.0.1", 5001, 5, 0.01).wait(DEADLINE_S) == 0
        assert settle(exact, a, 5) == {"a-in": 5}
        run(
            a.init,
            f"""
            ip link set eth0 netns {b.init}
            nsenter --net=/proc/{b.init}/ns/net sh -ec '
                ip addr add 10.9.0.1/24 dev eth0; ip link set eth0 up'
            """,
        )
        assert sender(net.sender_host.pid, "10.9.0.1", 5001, 5, 0.01).wait(DEADLINE_S) == 0
        assert settle(exact, b, 5) == {"b-in": 5}
        assert prefixes(kernel(a)) == {"a-in": 5}


def test_containers_that_come_and_go(exact: Instance, pair: tuple[Container, Container]) -> None:
    """The kernel uses the memory, the IDs and the names of what has gone again."""
    a, _ = pair
    run(a.init, LO.format("stays"))
    for number in range(12):
        path = exact.tree / "comes"
        path.mkdir()
        comes = Container(path)
        attached(exact, 3)
        assert not kernel(comes)
        run(comes.init, LO.format(f"comes-{number}"))
        sends(comes.init)
        sends(a.init)
        if number % 2:
            assert settle(exact, comes, 5) == {f"comes-{number}": 5}
        subprocess.run(["rm", "-rf", str(path)], check=True, timeout=DEADLINE_S)
        attached(exact, 2)
    assert settle(exact, a, 60) == {"stays": 60}


def test_what_members_write(exact: Instance, pair: tuple[Container, Container]) -> None:
    """Text that looks like the kernel's is its writer's, whatever it says: nobody else's log has
    it, and where it is it is not of facility 0."""
    a, b = pair
    tag = f"forged-{os.getpid()}"
    lines = (
        f"{tag}: IN= OUT=lo SRC=127.0.0.1 DST=127.0.0.1 LEN=29 TOS=0x00 PREC=0x00 TTL=64 ID=1 ",
        f"{tag}[1]: segfault at 0 ip 0 sp 0 error 4",
        f"Memory cgroup out of memory: Killed process {a.init} ({tag})",
    )
    for line in lines:
        a.run(f"echo '<0>{line}' > /dev/kmsg")
        # A process may call itself so.
        a.run(f"python3 -c \"open('/proc/self/comm', 'w').write('x[{b.init}]: seg')\"")
    caught_up(exact)
    found = a.read("kmsg")
    assert all(line in found for line in lines)
    assert not kernel(a)
    assert not b.read("kmsg")
    host = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    assert tag not in host + (exact.tree / "kmsg").read_text()


@contextlib.contextmanager
def breaking(base: Path) -> Iterator[tuple[Instance, Container]]:
    """An instance with a low rate and a short pause, which warns of it; a container with a rule."""
    config = base / "nsfs.conf"
    config.write_text("[log]\nfirewall_rate = 100\nfirewall_pause_s = 1.5\n")
    instance = Instance(base, ["--config", str(config)])
    instance.mount()
    try:
        wait_until(lambda: status(instance)["tier"] == "exact", "marks are made")
        (instance.tree / "a").mkdir()
        a = Container(instance.tree / "a")
        attached(instance, 1)
        in_net(a, "ip", "link", "set", "lo", "up")
        in_net(a, "iptables", "-A", "OUTPUT", "-p", "udp", "-j", "LOG", "--log-prefix", "many: ")
        assert sender(a.init, "127.0.0.1", 5000, 300, 0.0).wait(DEADLINE_S) == 0
        wait_until(lambda: status(instance)["pauses"] == 1, "the breaker acts")
        assert status(instance)["paused"] is True
        assert NF_LOG.read_text() == "0\n"
        yield instance, a
    finally:
        instance.umount()


def on_again(instance: Instance, a: Container) -> None:
    """Lines come again when the pause is over."""
    wait_until(lambda: status(instance).get("paused") is False, "it is over")
    wait_until(lambda: NF_LOG.read_text() == "1\n", "it is on again")
    before = len(kernel(a))
    assert sender(a.init, "127.0.0.1", 5000, 1, 0.0).wait(DEADLINE_S) == 0
    wait_until(lambda: len(kernel(a)) > before, "lines come again")
    assert kernel(a)[-1].startswith("many: ")


def test_the_breaker(tmp_path: Path) -> None:
    with breaking(tmp_path) as (instance, a):
        # Rules go on, they only do not print.
        before = len(kernel(a))
        assert sender(a.init, "127.0.0.1", 5000, 50, 0.0).wait(DEADLINE_S) == 0
        caught_up(instance)
        assert len(kernel(a)) == before
        told = "nsfs: more than 100 LOG lines a second: off for 1.5 s"
        for path in (a / "kmsg", instance.tree / "kmsg"):
            assert told in path.read_text()
        assert "firewall.paused 1\nfirewall.pauses 1\n" in (instance.tree / "stat").read_text()
        on_again(instance, a)
        assert "nsfs: LOG lines are on again" in a.read("kmsg")
        assert "firewall.paused 0\nfirewall.pauses 1\n" in (instance.tree / "stat").read_text()


def test_a_daemon_that_dies_in_a_pause(tmp_path: Path) -> None:
    with breaking(tmp_path) as (instance, a):
        instance.kill_daemon()
        assert NF_LOG.read_text() == "0\n"
        wait_until(lambda: status(instance)["tier"] == "exact", "the next one routes")
        attached(instance, 1)
        on_again(instance, a)


def test_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """Nobody is left to put the sysctl back; who comes next does, by the note."""
    found = NOTE.read_text().split()[0] if NOTE.exists() else NF_LOG.read_text().strip()
    instance = Instance(tmp_path)
    instance.mount()
    wait_until(lambda: status(instance)["tier"] == "exact", "it is on")
    assert NF_LOG.read_text() == "1\n"
    supervisor = int((instance.run_dir / "supervisor.pid").read_text())
    daemon = instance.daemon()
    for pid in (supervisor, daemon):
        fd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert readable(fd, DEADLINE_S)
        os.close(fd)
    assert NF_LOG.read_text() == "1\n"
    assert NOTE.read_text().split()[0] == found
    subprocess.run(["umount", "-l", str(instance.tree)], check=True)
    instance.mount()
    instance.umount()
    # Unless another instance is there.
    with contextlib.suppress(FileNotFoundError):
        assert NOTE.read_text().split()[0] == found
        return
    assert NF_LOG.read_text().strip() == found


def test_nflog(exact: Instance, pair: tuple[Container, Container]) -> None:
    a, b = pair
    assert a.read("nflog") == ""
    a.write("nflog", "5 7")
    b.write("nflog", "6")
    assert a.read("nflog") == "5 7\n"
    for value, name in (("x", "EINVAL"), ("65536", "ERANGE")):
        with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
            a.write("nflog", value)
    with wired(*pair) as nets:
        for net in nets:
            run(
                net.pid,
                f"""
                iptables -A INPUT -p udp --dport 5001 -j NFLOG --nflog-group 5 \
                    --nflog-prefix "{net.name}-nflog: "
                iptables -A INPUT -p udp --dport 5001 -j LOG --log-prefix "{net.name}-nflog: "
                nft -f - <<'X'
                table ip t {{ chain o {{ type filter hook output priority 0;
                  udp dport 5003 log prefix "{net.name}-group: " group 6; }}
                }}
                X
                """,
            )
        traffic(nets, 5, 0.02)
        assert settle(exact, a, 10) == {"a-nflog": 10}
        assert settle(exact, b, 10) == {"b-nflog": 5, "b-group": 5}
        # Of each packet there are two lines, one by each way: in the same form.
        assert set(Counter(kernel(a)).values()) == {2}
        host = (exact.tree / "kmsg").read_text()
        assert "-nflog" not in host
        a.write("nflog", "")
        assert a.read("nflog") == ""
        a.write("nflog", "5")
        traffic(nets, 1, 0)
        assert settle(exact, a, 12) == {"a-nflog": 12}


def test_the_next_daemon_goes_on(exact: Instance, pair: tuple[Container, Container]) -> None:
    a, _ = pair
    in_net(a, "ip", "link", "set", "lo", "up")
    in_net(a, "iptables", "-A", "OUTPUT", "-p", "udp", "-j", "LOG", "--log-prefix", "next: ")
    assert sender(a.init, "127.0.0.1", 5000, 20, 0).wait(DEADLINE_S) == 0
    wait_until(lambda: len(kernel(a)) == 20, "all come")
    host = (exact.tree / "kmsg").read_text()
    exact.kill_daemon()
    wait_until(lambda: tier(exact) == "exact", "there is a tier again")
    attached(exact, 2)
    assert NF_LOG.read_text() == "1\n"
    assert sender(a.init, "127.0.0.1", 5000, 20, 0).wait(DEADLINE_S) == 0
    wait_until(lambda: len(kernel(a)) >= 40, "all come")
    caught_up(exact)
    assert len(kernel(a)) == 40
    # Nothing of the host's log was taken twice.
    assert (exact.tree / "kmsg").read_text() == host
