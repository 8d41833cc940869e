"""Network namespaces with the same addresses and interface names, LOG rules in them, and traffic.

Each gets two veth pairs whose other ends are in a namespace of its own, from which packets come and
to which they go, so nothing leaves.  Every rule's prefix names the namespace and the chain.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .conftest import SLOWNESS, Container, Instance, wait_until

DEADLINE_S = 30.0 * SLOWNESS

CHAINS = {
    # chain: (hook, priority).  INT_MIN is before any mark that is made at a hook.
    "premin": ("prerouting", -2147483648),
    "pre": ("prerouting", -150),
    "in": ("input", 0),
    "fwd": ("forward", 0),
    "outmin": ("output", -2147483648),
    "out": ("output", 0),
    "post": ("postrouting", 0),
}

SENDER = """
import socket, sys, time
to, port, count, pace_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
s = socket.socket(socket.AF_INET6 if ':' in to else socket.AF_INET, socket.SOCK_DGRAM)
for i in range(count):
    try:
        s.sendto(b'%d' % i, (to, port))
    except OSError:
        pass
    if pace_s:
        time.sleep(pace_s)
"""


def run(pid: int, script: str) -> None:
    """A shell script of the host in the network namespace of a process."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", "sh", "-ec", textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, f"{script}: {done.stderr}"


def sender(pid: int, to: str, port: int, count: int, pace_s: float) -> subprocess.Popen[bytes]:
    """Send datagrams from the network namespace of a process."""
    words = ["python3", "-c", SENDER, to, str(port), str(count), str(pace_s)]
    return subprocess.Popen(["nsenter", f"--net=/proc/{pid}/ns/net", *words])


@dataclass
class Net:
    """A namespace with rules; `pid` is of a process in it.  A container's sends by a member."""

    name: str
    pid: int
    container: Container | None = None
    sender_host: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.sender_host = subprocess.Popen(
            ["unshare", "-n", "sleep", "1000"], start_new_session=True
        )
        # unshare(1) has made it once it executes sleep(1).
        while True:
            with open(f"/proc/{self.sender_host.pid}/comm") as file:
                if file.read() == "sleep\n":
                    break
        for number in (0, 1):
            run(
                self.sender_host.pid,
                f"""
                ip link add h{number} type veth peer name eth{number}
                ip link set eth{number} netns {self.pid}
                ip addr add 10.9.{number}.2/24 dev h{number}
                ip -6 addr add fd09:{number}::2/64 dev h{number} nodad
                ip link set h{number} up
                """,
            )
            run(
                self.pid,
                f"""
                ip addr add 10.9.{number}.1/24 dev eth{number}
                ip -6 addr add fd09:{number}::1/64 dev eth{number} nodad
                ip link set eth{number} up
                ip neigh add 10.9.{number}.9 lladdr 02:00:00:00:00:09 dev eth{number}
                """,
            )
        run(self.pid, "sysctl -qw net.ipv4.ip_forward=1; ip link set lo up")
        run(self.sender_host.pid, "ip route add 10.9.1.9/32 via 10.9.0.1; ip link set lo up")

    def rules(self, chains: Iterable[str] = CHAINS, ports: str = "5000-5999") -> None:
        """Log what passes each of the chains."""
        lines = ["table inet t {"]
        for chain in chains:
            hook, priority = CHAINS[chain]
            lines += [
                f"chain c-{chain} {{ type filter hook {hook} priority {priority};",
                f'udp dport {ports} log prefix "{self.name}-{chain}: "; }}',
            ]
        text = "\n".join([*lines, "}"])
        run(self.pid, f"nft -f - <<'X'\n{text}\nX")

    def close(self) -> None:
        """Take the senders' host away, and with it the interfaces."""
        self.sender_host.kill()
        self.sender_host.wait()


def traffic(nets: Iterable[Net], count: int, pace_s: float) -> Counter[str]:
    """Send `count` packets in, out and through each, all at once; what lines are to come."""
    nets = list(nets)
    members = [net.container for net in nets if net.container is not None]
    before = {each.path: each.read("output").count("sent") for each in members}
    running = []
    for net in nets:
        running += [
            sender(net.sender_host.pid, "10.9.0.1", 5001, count, pace_s),
            sender(net.sender_host.pid, "10.9.1.9", 5002, count, pace_s),
        ]
        if net.container is None:
            running.append(sender(net.pid, "10.9.0.9", 5003, count, pace_s))
        else:
            code = f"{SENDER}\nprint('sent', flush=True)"
            net.container.start("python3", "-c", code, "10.9.0.9", "5003", str(count), str(pace_s))
    for each in running:
        assert each.wait(DEADLINE_S) == 0
    for member in members:
        wait_until(lambda: member.read("output").count("sent") > before[member.path], "it has sent")
    expected: Counter[str] = Counter()
    for net in nets:
        for chain in ("premin", "pre"):
            expected[f"{net.name}-{chain}"] += 2 * count
        expected[f"{net.name}-in"] += count
        expected[f"{net.name}-fwd"] += count
        expected[f"{net.name}-outmin"] += count
        expected[f"{net.name}-out"] += count
        expected[f"{net.name}-post"] += 2 * count
    return expected


def prefixes(lines: Iterable[str]) -> Counter[str]:
    """How many lines of each rule there are."""
    return Counter(line.split(": ")[0] for line in lines if ": IN=" in line)


def kernel(container: Container) -> list[str]:
    """The texts of the kernel's own lines in a container's log."""
    return texts(container.read("kmsg"))


def texts(log: str) -> list[str]:
    """The texts of records of facility 0 in an outer `kmsg`."""
    return [line.split(";", 1)[1] for line in log.splitlines() if int(line.split(",")[0]) < 8]


def status(instance: Instance) -> dict[str, object]:
    """What `nsfs status` says of kernel lines; less where no daemon answers."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
            control.settimeout(DEADLINE_S)
            control.connect(f"{instance.run_dir}/control")
            control.send(b'{"do": "status"}')
            found: dict[str, object] = json.loads(control.recv(65536))["kernel_lines"]
            return found
    except (OSError, ValueError):
        return {"tier": "none", "networks": 0, "looks": 0}


def attached(instance: Instance, count: int) -> None:
    """Wait until lines of that many network namespaces of containers are known to be theirs: that
    is so a moment after mkdir has returned.  (Nothing is, in the tier `own`.)"""
    if tier(instance) != "own":
        wait_until(lambda: status(instance)["networks"] == count, f"{count} are attached")


def looked(instance: Instance) -> None:
    """Wait until names and addresses of interfaces, which are read now and then, are known."""
    before = int(str(status(instance)["looks"]))
    # The next one may have begun already.
    wait_until(lambda: int(str(status(instance)["looks"])) >= before + 2, "they are read")


def records() -> list[tuple[int, str]]:
    """(number, text) of each record of the host's log."""
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    found = []
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                with contextlib.suppress(BrokenPipeError):
                    head, _, text = os.read(fd, 8192).decode().partition(";")
                    found.append((int(head.split(",")[1]), text.splitlines()[0] if text else ""))
    finally:
        os.close(fd)
    return found


def last_seq() -> int:
    """The number of the last one; -1 if there is none."""
    return max((seq for seq, _ in records()), default=-1)


def caught_up(instance: Instance) -> None:
    """Wait until all that the host's log has now was delivered to whom it belongs."""
    last = last_seq()

    def position() -> int:
        with open(instance.run_dir / "kmsg", "rb") as file:
            (following,) = struct.unpack("Q", file.read(8))
        return int(following)

    wait_until(lambda: position() > last, f"line {last} is delivered: {position()}")


def in_net(container: Container, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the host in a container's network namespace."""
    return subprocess.run(
        ["nsenter", f"--net=/proc/{container.init}/ns/net", *command],
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def tier(instance: Instance) -> str:
    """The tier of an instance, as soon as it has one; "" before."""
    found = str(status(instance)["tier"])
    return "" if found == "none" else found


def foreign(stack: contextlib.ExitStack) -> int:
    """The PID of a process in a network namespace that is nobody's; until the stack ends."""
    process = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
    stack.callback(process.wait)
    stack.callback(process.kill)
    # unshare(1) has made it once it executes sleep(1).
    comm = Path(f"/proc/{process.pid}/comm")
    wait_until(lambda: comm.read_text() == "sleep\n", "it is unshared")
    return process.pid
