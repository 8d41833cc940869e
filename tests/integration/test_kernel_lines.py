"""Lines of the real kernel reach the container that they belong to, and no other."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, Container, Instance, serving, wait_until
from .firewall import Net, in_net, kernel, prefixes, status, texts, traffic

# Long, or shares with the whole machine what only one at a time can have: scripts/test --long.
pytestmark = pytest.mark.slow

NF_LOG = Path("/proc/sys/net/netfilter/nf_log_all_netns")
NOTE = Path("/run/nsfs.nf_log_all_netns")
TIERS = ("exact", "context", "own")


@pytest.fixture(scope="module", params=TIERS)
def tiered(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """An instance in each tier, the better ones switched off."""
    base = tmp_path_factory.mktemp("nsfs")
    config = base / "nsfs.conf"
    config.write_text(f"[log]\nkernel_lines = {request.param}\nfirewall_rate = max\nrate = max\n")
    before = (NOTE if NOTE.exists() else NF_LOG).read_text().strip()
    with serving(base, ["--config", str(config)]) as found:
        found.tier = request.param  # type: ignore[attr-defined]
        wait_until(lambda: status(found)["tier"] == request.param, "the router has its tier")
        yield found
    # Another instance may be there.
    assert NOTE.exists() or NF_LOG.read_text().strip() == before


@pytest.fixture(autouse=True)
def fresh(tiered: Instance) -> None:
    """What the host has printed before is not shown any more; its own log keeps it."""
    (tiered.tree / "kmsg").write_text("")


@pytest.fixture
def boxes(tiered: Instance) -> Iterator[tuple[Container, Container]]:
    """Two containers."""
    made = []
    for name in ("a", "b"):
        (tiered.tree / name).mkdir()
        made.append(Container(tiered.tree / name))
    # Marks are attached after mkdir has returned.
    time.sleep(0.3)
    yield made[0], made[1]
    for each in made:
        subprocess.run(["rm", "-rf", str(each.path)], check=False, timeout=DEADLINE_S)
    tiered.settled()


def tier_of(instance: Instance) -> str:
    """The tier that an instance was started in."""
    return str(instance.tier)  # type: ignore[attr-defined]


# The parent leaves it a zombie for a moment: by context it is looked at when it has ended.
SEGFAULT = (
    "import ctypes, os, time; os.fork() and (time.sleep(0.5), os._exit(0)); ctypes.string_at(0)"
)


def test_a_segfault(tiered: Instance, boxes: tuple[Container, Container]) -> None:
    a, b = boxes
    a.run(f"python3 -c '{SEGFAULT}'")
    if tier_of(tiered) == "own":
        time.sleep(0.5)
        assert not kernel(a)
    else:
        found = wait_until(lambda: kernel(a), "the line comes")
        assert "segfault at 0" in found[0]
        assert "python3[" in found[0]
        assert all("segfault" in line or line.startswith("Code:") for line in found)
    assert not kernel(b)
    host = (tiered.tree / "kmsg").read_text()
    mine = kernel(a)[:1]
    assert not any(line in host for line in mine)
    # It is where it always was, too.
    dmesg = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    assert all(line in dmesg for line in mine)


def test_one_containers_log_rule(tiered: Instance, boxes: tuple[Container, Container]) -> None:
    a, b = boxes
    in_net(a, "ip", "link", "set", "lo", "up")
    in_net(a, "iptables", "-A", "OUTPUT", "-p", "icmp", "-j", "LOG", "--log-prefix", "own rule: ")
    in_net(a, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    a.run("true")
    send = "import socket; s=socket.socket(socket.AF_INET,socket.SOCK_RAW,1);" + "".join(
        [
            "[s.sendto(bytes((8,0,0xf7,0xff,0,0,0,i)),('127.0.0.1',0))",
            " for i in range(20)]",
        ]
    )
    a.run(f'python3 -c "{send}"')
    if tier_of(tiered) == "own":
        time.sleep(0.5)
        assert not kernel(a)
        return
    wait_until(lambda: sum("TYPE=8" in x for x in kernel(a)) >= 20, f"all come: {kernel(a)}")
    assert all(line.startswith("own rule: IN= OUT=lo SRC=127.0.0.1") for line in kernel(a))
    assert not kernel(b)
    time.sleep(0.2)
    host = (tiered.tree / "kmsg").read_text()
    # The answers are sent in interrupts: by context nobody can be meant by 127.0.0.1.
    assert "TYPE=8" not in host
    assert "own rule" not in host or tier_of(tiered) == "context"


@contextlib.contextmanager
def networks(tiered: Instance) -> Iterator[tuple[dict[str, Container], list[Net]]]:
    """Containers a, b and c (in a), and a namespace f that is nobody's; all with the same names."""
    paths = {"a": tiered.tree / "a", "b": tiered.tree / "b", "c": tiered.tree / "a" / "c"}
    with contextlib.ExitStack() as stack:
        containers = {}
        for name, path in paths.items():
            path.mkdir()
            containers[name] = Container(path)
        foreign = subprocess.Popen(["unshare", "-n", "sleep", "1000"])
        stack.callback(foreign.wait)
        stack.callback(foreign.kill)
        wait_until(
            lambda: Path(f"/proc/{foreign.pid}/comm").read_text() == "sleep\n", "it is unshared"
        )
        nets = []
        for name, pid in [*((n, c.init) for n, c in containers.items()), ("f", foreign.pid)]:
            nets.append(Net(name, pid))
            stack.callback(nets[-1].close)
        # Marks are attached after mkdir(2) has returned; by context names are read each second.
        time.sleep(2.5)
        yield containers, nets
    for name in ("a", "b"):
        subprocess.run(["rm", "-rf", str(paths[name])], check=False, timeout=DEADLINE_S)
    tiered.settled()


def test_log_rules_of_every_hook(tiered: Instance) -> None:
    with networks(tiered) as (containers, nets):
        for net in nets:
            net.rules()
        expected = traffic(nets, 5, 0.02)
        time.sleep(0.5)
        got = {name: prefixes(kernel(c)) for name, c in containers.items()}
        host = prefixes(texts((tiered.tree / "kmsg").read_text()))
    for name, found in got.items():
        wrong = [prefix for prefix in found if not prefix.startswith(f"{name}-")]
        assert not wrong, f"{name} has {wrong}"
        own = {p: n for p, n in expected.items() if p.startswith(f"{name}-")}
        print(tier_of(tiered), name, {p: f"{found[p]}/{n}" for p, n in own.items()})
        if tier_of(tiered) == "exact":
            assert found == own
            assert not [p for p in host if p.startswith(f"{name}-")]
        elif tier_of(tiered) == "own":
            assert not found
    if tier_of(tiered) != "own":
        assert {p: n for p, n in host.items() if p.startswith("f-")} == {
            p: n for p, n in expected.items() if p.startswith("f-")
        }
