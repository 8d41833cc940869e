"""Lines of the real kernel reach the container that they belong to, and no other: in each tier, the
better ones switched off."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, EXACT, Container, Instance, serving, wait_until
from .firewall import (
    Net,
    attached,
    caught_up,
    foreign,
    in_net,
    kernel,
    last_seq,
    looked,
    prefixes,
    records,
    run,
    status,
    texts,
    tier,
    traffic,
)

pytestmark = pytest.mark.usefixtures("host_log")

NF_LOG = Path("/proc/sys/net/netfilter/nf_log_all_netns")
NOTE = Path("/run/nsfs.nf_log_all_netns")
SINCE = [0]
"""The number of the last record of the host's log before a test."""
TIERS = ("exact", "context", "own") if EXACT else ("context", "own")


@pytest.fixture(scope="module", params=TIERS)
def tiered(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """An instance in each tier, the better ones switched off."""
    base = tmp_path_factory.mktemp("nsfs")
    config = base / "nsfs.conf"
    config.write_text(f"[log]\nkernel_lines = {request.param}\nfirewall_rate = max\nrate = max\n")
    before = firewall_log_before()
    with serving(base, ["--config", str(config)]) as found:
        wait_until(lambda: status(found)["tier"] == request.param, "the router has its tier")
        yield found
    assert firewall_log_before() == before


def firewall_log_before() -> str:
    """The sysctl without nsfs: another instance may be there, and what it has found is in its
    note."""
    with contextlib.suppress(FileNotFoundError):
        if found := NOTE.read_text().split():
            return found[0]
    return NF_LOG.read_text().strip()


@pytest.fixture(autouse=True)
def fresh(tiered: Instance) -> None:
    """What the host has printed before is not shown any more; its own log keeps it."""
    caught_up(tiered)
    (tiered.tree / "kmsg").write_text("")
    SINCE[0] = last_seq()


@pytest.fixture
def boxes(tiered: Instance) -> Iterator[tuple[Container, Container]]:
    """Two containers."""
    made = []
    for name in ("a", "b"):
        (tiered.tree / name).mkdir()
        made.append(Container(tiered.tree / name))
    attached(tiered, 2)
    yield made[0], made[1]
    for each in made:
        subprocess.run(["rm", "-rf", str(each.path)], check=False, timeout=DEADLINE_S)
    tiered.settled()
    attached(tiered, 0)


def host(instance: Instance) -> list[str]:
    """The kernel's lines in the root's `kmsg`."""
    return texts((instance.tree / "kmsg").read_text())


def host_log_texts() -> list[str]:
    """What the host's kernel has printed since a test's beginning."""
    return [text for seq, text in records() if seq > SINCE[0]]


def has_come(instance: Instance, container: Container, word: str, count: int = 1) -> list[str]:
    """The kernel's lines of a container when so many with that word have come, and no more will;
    in the tier `own`, that none has."""
    if tier(instance) != "own":
        wait_until(lambda: sum(word in x for x in kernel(container)) >= count, f"{word} comes")
    caught_up(instance)
    return kernel(container)


# By context a process is looked at after it has printed: the parent leaves it a zombie.
STAY = "import time; print('sent', flush=True); time.sleep(1000)"
PARENT = "import ctypes, mmap, os, time; os.fork() and time.sleep(1000); "
FALLS = {"segfault at 0": f"{PARENT} ctypes.string_at(0)"}
if platform.machine() == "x86_64":
    FALLS["trap invalid opcode"] = (
        f"{PARENT} m = mmap.mmap(-1, 4096, prot=7); m.write(bytes((15, 11))); "
        "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()"
    )


@pytest.mark.parametrize("what", FALLS)
def test_a_process_that_falls(
    tiered: Instance, boxes: tuple[Container, Container], what: str
) -> None:
    a, b = boxes
    a.start("python3", "-c", FALLS[what])
    wait_until(lambda: any(what in line for line in host_log_texts()), "it has fallen")
    found = has_come(tiered, a, what)
    dmesg = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    if tier(tiered) == "own":
        assert not found
        assert any(what in line for line in host(tiered))
    else:
        assert what in found[0]
        assert "python3[" in found[0]
        assert all(what in line or line.startswith("Code:") for line in found)
        assert not set(found) & set(host(tiered))
    # It is where it always was, too.
    assert all(line in dmesg for line in found)
    assert what in dmesg
    assert not kernel(b)


def test_an_oom_kill(tiered: Instance, boxes: tuple[Container, Container]) -> None:
    a, b = boxes
    limit_memory(tiered, a)
    a.start("python3", "-c", f"{PARENT} x = bytearray(200 << 20)")
    wait_until(lambda: any("Killed process" in x for x in host_log_texts()), "it is killed")
    found = has_come(tiered, a, "Killed process")
    if tier(tiered) == "own":
        assert not found
    else:
        assert len(found) == 2
        assert found[0].startswith("oom-kill:constraint=CONSTRAINT_MEMCG")
        assert "Killed process" in found[1]
        # The dump of tasks and memory about it is the host's.
        assert any("invoked oom-killer" in line for line in host(tiered))
    assert not kernel(b)


def limit_memory(instance: Instance, container: Container) -> None:
    """30 MiB, in whichever hierarchy the controller is."""
    if (container / "cgroup").exists():
        container.write("cgroup/memory.max", str(30 << 20))
        return
    group = Path(f"/proc/{container.init}/cgroup").read_text()
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, directory, kind, options, _, _ = line.split()
        for row in group.splitlines():
            _, names, path = row.split(":", 2)
            top = Path(directory + path.removesuffix("/init"))
            if kind == "cgroup" and names and names in options and "memory" in names.split(","):
                (top / "memory.limit_in_bytes").write_text(str(30 << 20))
            elif kind == "cgroup2" and not names and (top / "memory.max").exists():
                (top / "memory.max").write_text(str(30 << 20))


def test_one_containers_log_rule(tiered: Instance, boxes: tuple[Container, Container]) -> None:
    a, b = boxes
    in_net(a, "ip", "link", "set", "lo", "up")
    in_net(a, "iptables", "-A", "OUTPUT", "-p", "icmp", "-j", "LOG", "--log-prefix", "own rule: ")
    in_net(a, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    send = "import socket; s=socket.socket(socket.AF_INET,socket.SOCK_RAW,1);" + "".join(
        [
            "[s.sendto(bytes((8,0,0xf7,0xff,0,0,0,i)),('127.0.0.1',0))",
            " for i in range(20)]",
        ]
    )
    if tier(tiered) == "context":
        looked(tiered)
    a.start("python3", "-c", f"{send}; {STAY}")
    wait_until(lambda: "sent" in a.read("output"), "all are sent")
    found = has_come(tiered, a, "TYPE=8", 20)
    if tier(tiered) == "own":
        assert not found
        return
    assert all(line.startswith("own rule: IN= OUT=lo SRC=127.0.0.1") for line in found)
    assert not kernel(b)
    rest = "\n".join(host(tiered))
    # The answers are sent in interrupts: by context nobody can be meant by 127.0.0.1.
    assert "TYPE=8" not in rest
    assert "own rule" not in rest or tier(tiered) == "context"


@contextlib.contextmanager
def networks(tiered: Instance) -> Iterator[tuple[dict[str, Container], list[Net]]]:
    """Containers a, b and c (in a), and a namespace f that is nobody's; all with the same names."""
    paths = {"a": tiered.tree / "a", "b": tiered.tree / "b", "c": tiered.tree / "a" / "c"}
    with contextlib.ExitStack() as stack:
        containers = {}
        for name, path in paths.items():
            path.mkdir()
            containers[name] = Container(path)
        nets = []
        for name, each in containers.items():
            nets.append(Net(name, each.init, each))
        nets.append(Net("f", foreign(stack)))
        for net in nets:
            stack.callback(net.close)
        attached(tiered, 3)
        if tier(tiered) == "context":
            looked(tiered)
        yield containers, nets
    for name in ("a", "b"):
        subprocess.run(["rm", "-rf", str(paths[name])], check=False, timeout=DEADLINE_S)
    tiered.settled()
    attached(tiered, 0)


def test_log_rules_of_every_hook(tiered: Instance) -> None:
    with networks(tiered) as (containers, nets):
        for net in nets:
            net.rules()
        expected = traffic(nets, 5, 0.01)
        caught_up(tiered)
        got = {name: prefixes(kernel(c)) for name, c in containers.items()}
        rest = prefixes(host(tiered))
    for name, found in got.items():
        wrong = [prefix for prefix in found if not prefix.startswith(f"{name}-")]
        assert not wrong, f"{name} has {wrong}"
        own = {p: n for p, n in expected.items() if p.startswith(f"{name}-")}
        print(tier(tiered), name, {p: f"{found[p]}/{n}" for p, n in own.items()})
        if tier(tiered) == "exact":
            assert found == own
        elif tier(tiered) == "own":
            assert not found
        else:
            assert found
        # Each line is somewhere, and only there.
        if tier(tiered) != "own":
            assert {p: rest[p] for p in own if rest[p]} == own_rest(own, found)
    if tier(tiered) != "own":
        assert {p: n for p, n in rest.items() if p.startswith("f-")} == {
            p: n for p, n in expected.items() if p.startswith("f-")
        }


def own_rest(expected: dict[str, int], found: dict[str, int]) -> dict[str, int]:
    """What stays with the host."""
    left = {p: n - found.get(p, 0) for p, n in expected.items()}
    return {p: n for p, n in left.items() if n}


SYNS = """
import socket, struct
def checksum(data):
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
to = socket.inet_aton('10.9.0.1')
for i in range(20):
    source = socket.inet_aton('10.9.0.%d' % (100 + i))
    head = struct.pack('!HHIIBBHHH', 1024 + i, 5050, 1, 0, 0x50, 2, 1024, 0, 0)
    pseudo = source + to + struct.pack('!BBH', 0, 6, len(head))
    head = head[:16] + struct.pack('!H', checksum(pseudo + head)) + head[18:]
    ip = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 20 + len(head), 1, 0, 64, 6, 0, source, to)
    s.sendto(ip + head, ('10.9.0.1', 0))
"""
LISTEN = """
import socket, time
s = socket.socket()
s.bind(('0.0.0.0', 5050))
s.listen(1)
print('listens', flush=True)
time.sleep(1000)
"""


def test_a_flood_of_syns(tiered: Instance, boxes: tuple[Container, Container]) -> None:
    a, b = boxes
    with contextlib.ExitStack() as stack:
        nets = [Net(name, each.init) for name, each in (("a", a), ("b", b))]
        for net in nets:
            stack.callback(net.close)
        run(a.init, "sysctl -qw net.ipv4.tcp_syncookies=1")
        a.start("python3", "-c", LISTEN)
        wait_until(lambda: "listens" in a.read("output"), "it listens")
        words = ["nsenter", f"--net=/proc/{nets[0].sender_host.pid}/ns/net", "python3", "-c", SYNS]
        subprocess.run(words, check=True, timeout=DEADLINE_S)
        caught_up(tiered)
        where = kernel(a) if tier(tiered) == "exact" else host(tiered)
        # Linux before 6.2 does not say the address.
        assert sum(bool(re.search(r"SYN flooding on port (0.0.0.0:)?5050", x)) for x in where) == 1
        assert not kernel(b)
        assert kernel(a) == [] or tier(tiered) == "exact"


SEND_FROM = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('10.77.0.1', 0))
s.sendto(b'x', ('10.9.0.1', 5))
"""


def test_a_martian(tiered: Instance, boxes: tuple[Container, Container]) -> None:
    a, b = boxes
    with contextlib.ExitStack() as stack:
        net = Net("a", a.init)
        stack.callback(net.close)
        run(a.init, "sysctl -qw net.ipv4.conf.all.log_martians=1 net.ipv4.conf.all.rp_filter=1")
        run(net.sender_host.pid, "ip addr add 10.77.0.1/32 dev h0")
        words = ["nsenter", f"--net=/proc/{net.sender_host.pid}/ns/net", "python3", "-c", SEND_FROM]
        subprocess.run(words, check=True, timeout=DEADLINE_S)
        caught_up(tiered)
        where = kernel(a) if tier(tiered) == "exact" else host(tiered)
        at = where.index("IPv4: martian source 10.9.0.1 from 10.77.0.1, on dev eth0")
        assert where[at + 1].startswith("ll header: ")
        assert kernel(a) == [] or tier(tiered) == "exact"
        assert not kernel(b)


def test_whose_network_it_is(tiered: Instance, boxes: tuple[Container, Container]) -> None:
    """A pod: lines of a network go to the container that owns it, whoever sends."""
    a, b = boxes
    a.write("defaults/unshare", "cgroup ipc mnt pid syslog time user uts")
    (a / "sharing").mkdir()
    sharing = Container(a / "sharing")
    in_net(a, "ip", "link", "set", "lo", "up")
    in_net(a, "ip", "addr", "add", "10.1.2.3/32", "dev", "lo")
    in_net(a, "iptables", "-A", "OUTPUT", "-p", "udp", "-j", "LOG", "--log-prefix", "pod: ")
    if tier(tiered) == "context":
        looked(tiered)
    send = (
        "import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('10.1.2.3',0)); "
        "[s.sendto(b'x',('10.1.2.3',9)) for i in range(5)]"
    )
    sharing.start("python3", "-c", f"{send}; {STAY}")
    wait_until(lambda: "sent" in sharing.read("output"), "all are sent")
    found = has_come(tiered, a, "pod: IN= OUT=lo", 5)
    if tier(tiered) == "own":
        assert not found
    else:
        assert sum("pod: IN= OUT=lo" in line for line in found) == 5
    assert not kernel(sharing)
    assert not kernel(b)
    # About a process, a line goes to the container that it is in.
    sharing.start("python3", "-c", FALLS["segfault at 0"])
    wait_until(lambda: any("segfault" in line for line in host_log_texts()), "it has fallen")
    assert bool(has_come(tiered, sharing, "segfault at 0")) == (tier(tiered) != "own")
    assert not any("segfault" in line for line in kernel(a))


def test_the_hosts_own(tiered: Instance, boxes: tuple[Container, Container]) -> None:
    """What is written to the host's /dev/kmsg is nobody else's, whatever it says."""
    forged = (
        "python3[1]: segfault at 0 ip 0 sp 0 error 4",
        "Memory cgroup out of memory: Killed process 1 (x)",
        "a-in: IN=eth0 OUT= MAC= SRC=10.9.0.2 DST=10.9.0.1 LEN=29 TOS=0x00 PREC=0x00 TTL=64 ID=1 ",
    )
    fd = os.open("/dev/kmsg", os.O_WRONLY)
    try:
        for text in forged:
            # Without a newline it would not be shown before the next one.
            os.write(fd, f"<6>{text}\n".encode())
    finally:
        os.close(fd)
    caught_up(tiered)
    a, b = boxes
    assert not kernel(a)
    assert not kernel(b)
    root = (tiered.tree / "kmsg").read_text()
    assert all(text in root for text in forged)
