"""The report that started it: reject logging on the host, and rsyslogd started in a container that
has reject logging too.  The host still sees its lines, the container its own, nothing is mixed.

The host's firewall is stood for by a network namespace that belongs to no container: the machine's
own is left alone.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, EXACT, Container, Instance, serving, wait_until
from .firewall import Net, attached, caught_up, foreign, looked, run, tier

pytestmark = pytest.mark.usefixtures("host_log")

COUNT = 200
REJECT = """
iptables -A INPUT -p udp --dport 9 -j LOG --log-prefix "{name} rejects: "
iptables -A INPUT -p udp --dport 9 -j REJECT
"""
# Each packet is a byte longer than the one before: its LEN says its place.
SEND = """
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for i in range({count}):
    try:
        s.sendto(bytes(i), ('10.9.0.1', 9))
    except OSError:
        pass
    time.sleep(0.005)
"""
RSYSLOG = """
module(load="imklog")
global(workDirectory="{directory}")
if $syslogfacility-text == "kern" then action(type="omfile" file="{directory}/kern.log")
"""


@pytest.fixture(scope="module", params=["exact", "context"] if EXACT else ["context"])
def instance(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """In both tiers that deliver anything."""
    base = tmp_path_factory.mktemp("case")
    (base / "conf").write_text(f"[log]\nkernel_lines = {request.param}\nfirewall_rate = max\n")
    with serving(base, ["--config", str(base / "conf")]) as found:
        assert wait_until(lambda: tier(found), "there is a tier") == request.param
        yield found


def places(text: str, name: str) -> list[int]:
    """The places of the packets that the lines of one firewall are about."""
    return [int(n) - 28 for n in re.findall(rf"{name} rejects: IN=eth0 .*? LEN=(\d+) ", text)]


def test_the_case_of_2010(instance: Instance, web: Container, tmp_path: Path) -> None:
    caught_up(instance)
    (instance.tree / "kmsg").write_text("")
    with contextlib.ExitStack() as stack:
        nets = [Net("host", foreign(stack)), Net("web", web.init)]
        for net in nets:
            stack.callback(net.close)
            run(net.pid, REJECT.format(name=net.name))
        (tmp_path / "conf").write_text(RSYSLOG.format(directory=tmp_path))
        words = ["rsyslogd", "-n", "-f", str(tmp_path / "conf"), "-i", str(tmp_path / "pid")]
        host = subprocess.Popen(words)
        stack.callback(host.wait)
        stack.callback(host.terminate)
        config = RSYSLOG.format(directory="/tmp")
        web.run(f"cat > /tmp/conf <<'X'\n{config}\nX\n")
        web.start("rsyslogd", "-n", "-f", "/tmp/conf", "-i", "/tmp/pid")
        web.run("until [ -e /tmp/pid ]; do sleep 0.05; done")
        attached(instance, 1)
        if tier(instance) == "context":
            looked(instance)
        running = []
        for net in nets:
            code = SEND.format(count=COUNT)
            enter = ["nsenter", f"--net=/proc/{net.sender_host.pid}/ns/net", "python3", "-c", code]
            running.append(subprocess.Popen(enter))
        for each in running:
            assert each.wait(DEADLINE_S) == 0
        expected = list(range(COUNT))
        log = tmp_path / "kern.log"
        wait_until(
            lambda: log.exists() and len(places(log.read_text(errors="replace"), "host")) >= COUNT,
            "the host's rsyslogd has its lines",
        )
        wait_until(lambda: len(places(web.read("kmsg"), "web")) >= COUNT, "web has its lines")
        caught_up(instance)
        wait_until(lambda: len(places(web.run("cat /tmp/kern.log"), "web")) >= COUNT, "rsyslogd")
        inside = web.run("cat /tmp/kern.log")
        assert places(log.read_text(errors="replace"), "host") == expected
        assert places(inside, "web") == expected
        assert places(web.read("kmsg"), "web") == expected
        assert "host rejects" not in inside + web.read("kmsg")
        root = (instance.tree / "kmsg").read_text()
        assert places(root, "host") == expected
        assert "web rejects" not in root
