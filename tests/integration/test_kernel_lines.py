"""Lines of the real kernel reach the container that they belong to, and no other."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, Container, Instance, serving, wait_until

NF_LOG = Path("/proc/sys/net/netfilter/nf_log_all_netns")
TIERS = ("exact", "context", "own")


def kernel(container: Container) -> list[str]:
    """The texts of the kernel's own lines in a container's log."""
    return texts(container.read("kmsg"))


def texts(log: str) -> list[str]:
    """The texts of records of facility 0 in an outer `kmsg`."""
    return [line.split(";", 1)[1] for line in log.splitlines() if int(line.split(",")[0]) < 8]


def in_net(container: Container, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the host in a container's network namespace."""
    return subprocess.run(
        ["nsenter", f"--net=/proc/{container.init}/ns/net", *command],
        check=True,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.fixture(scope="module", params=TIERS)
def tiered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """An instance in each tier, the better ones switched off."""
    base = tmp_path_factory.mktemp("nsfs")
    config = base / "nsfs.conf"
    config.write_text(f"[log]\nkernel_lines = {request.param}\nfirewall_rate = max\nrate = max\n")
    before = NF_LOG.read_text()
    with serving(base, ["--config", str(config)]) as found:
        found.tier = request.param  # type: ignore[attr-defined]
        wait_until(lambda: status(found)["tier"] == request.param, "the router has its tier")
        yield found
    assert NF_LOG.read_text() == before


def status(instance: Instance) -> dict[str, object]:
    """What `nsfs status` says of kernel lines."""
    found: dict[str, object] = instance.status()["kernel_lines"]
    return found


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


SEGFAULT = "import ctypes; ctypes.string_at(0)"


def test_a_segfault(tiered: Instance, boxes: tuple[Container, Container]) -> None:
    a, b = boxes
    # The parent leaves it a zombie for a moment.
    a.run(f"python3 -c '{SEGFAULT}' & sleep 0.3; wait || true")
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
    wait_until(lambda: len(kernel(a)) >= 20, f"all come: {kernel(a)}")
    assert all(line.startswith("own rule: IN= OUT=lo SRC=127.0.0.1") for line in kernel(a))
    assert not kernel(b)
    assert "own rule" not in (tiered.tree / "kmsg").read_text()
    assert os.path.exists(a.path)
