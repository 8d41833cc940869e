"""`stat`: what a container uses, flat-keyed, 0444, nested containers included.

cpu.usage_usec cpu.user_usec cpu.system_usec   CPU time, by the cgroup
memory.current                                 bytes in use
procs                                          members
net.rx_bytes net.tx_bytes                      of all interfaces but loopback, where it has a
network of its own
log.records log.dropped                        records that its kernel log took, and those that it
refused or overwrote
firewall.lines firewall.paused firewall.pauses at the root: LOG lines that the host printed, whether
the breaker keeps them off now, and how often it did

A value that no controller of the host accounts is left out.
"""

from __future__ import annotations

import contextlib

from nsfs import members
from nsfs.attribute import Attribute, flat_keyed
from nsfs.container import Container, Face


def stat_show(face: Face) -> str:
    """All values, read from the kernel now."""
    container = face.container
    pairs: list[tuple[str, object]] = []
    if container.parent is not None:
        with contextlib.suppress(FileNotFoundError):
            pairs += [(f"cpu.{key}", value) for key, value in container.group.cpu_usec().items()]
        with contextlib.suppress(OSError):
            pairs.append(("memory.current", container.group.get("memory.current")))
    pairs.append(("procs", members.count(container)))
    if container.own("net") and container.alive():
        received, sent = network_bytes(container)
        pairs += [("net.rx_bytes", received), ("net.tx_bytes", sent)]
    if container.parent is not None:
        counters = container.log.ring.counters
        pairs += [("log.records", counters.kept_records), ("log.dropped", counters.dropped_records)]
    else:
        lines, paused, pauses = container.world.firewall_stat()
        pairs += [("firewall.lines", lines), ("firewall.paused", paused)]
        pairs.append(("firewall.pauses", pauses))
    return flat_keyed(pairs)


def network_bytes(container: Container) -> tuple[int, int]:
    """Bytes received and sent by all interfaces of its network namespace but loopback
    (proc_pid_net(5))."""
    received = sent = 0
    with open(f"/proc/{container.init_pid}/net/dev", encoding="ascii") as file:
        for line in file:
            name, colon, rest = line.partition(":")
            if not colon or name.strip() == "lo":
                continue
            fields = rest.split()
            received += int(fields[0])
            sent += int(fields[8])
    return received, sent


FILES = (Attribute("stat", show=stat_show),)
