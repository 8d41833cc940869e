"""`stat`: what a container uses, flat-keyed, 0444, nested containers included.

cpu.usage_usec cpu.user_usec cpu.system_usec   CPU time, by the cgroup
memory.current                                 bytes in use
io.rbytes io.wbytes io.rios io.wios            bytes and operations of all block devices, by the
cgroup
procs                                          members
net.rx_bytes net.tx_bytes                      of all interfaces but loopback, where it or one that
is nested in it has a network of its own
log.records log.dropped log.console_dropped    records that its kernel log took, those that it
refused or overwrote, and those that its console did not take
firewall.lines firewall.paused firewall.pauses at the root: LOG lines that the host printed, whether
the breaker keeps them off now, and how often it did

A value that no controller of the host accounts is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from nsfs import members
from nsfs.attribute import Attribute, flat_keyed
from nsfs.cgroup import Group
from nsfs.container import Container, Face


def stat_show(face: Face) -> str:
    """All values, read from the kernel now, one after the other without a pause."""
    container = face.container
    top = container.parent is None
    group = Group.host(container.world.hierarchies) if top else container.group
    pairs: list[tuple[str, object]] = []
    with contextlib.suppress(FileNotFoundError):
        pairs += [(f"cpu.{key}", value) for key, value in group.cpu_usec().items()]
    with contextlib.suppress(OSError):
        pairs.append(("memory.current", group.get("memory.current")))
    with contextlib.suppress(OSError):
        rbytes, wbytes, rios, wios = io_totals(group)
        pairs += [("io.rbytes", rbytes), ("io.wbytes", wbytes)]
        pairs += [("io.rios", rios), ("io.wios", wios)]
    pairs.append(("procs", members.count(container)))
    found = [network_bytes(each) for each in networks(container)]
    if found:
        received, sent = (sum(column) for column in zip(*found, strict=True))
        pairs += [("net.rx_bytes", received), ("net.tx_bytes", sent)]
    ring = container.log.ring
    pairs.append(("log.records", ring.counters.kept_records))
    pairs.append(("log.dropped", ring.counters.dropped_records))
    if not top:
        pairs.append(("log.console_dropped", ring.console_dropped))
    else:
        lines, paused, pauses = container.world.firewall_stat()
        pairs += [("firewall.lines", lines), ("firewall.paused", paused)]
        pairs.append(("firewall.pauses", pauses))
    return flat_keyed(pairs)


def io_totals(group: Group) -> tuple[int, ...]:
    """Bytes read and written, operations of reading and writing, of all devices."""
    found = {"rbytes": 0, "wbytes": 0, "rios": 0, "wios": 0}
    for key, value in group.counters("io.stat").items():
        word = key.split()[1]
        if word in found:
            found[word] += value
    return tuple(found.values())


def networks(container: Container) -> Iterator[Container]:
    """Those of it and of the containers nested in it that have a network namespace of their
    own."""
    if container.parent is None:
        yield container
        return
    for each in (container, *container.descendants()):
        if each.own("net") and each.alive():
            yield each


def network_bytes(container: Container) -> tuple[int, int]:
    """Bytes received and sent by all interfaces of its network namespace but loopback
    (proc_pid_net(5))."""
    received = sent = 0
    with (
        contextlib.suppress(OSError),
        open(f"/proc/{container.init_pid}/net/dev", encoding="ascii") as file,
    ):
        for line in file:
            name, colon, rest = line.partition(":")
            if not colon or name.strip() == "lo":
                continue
            fields = rest.split()
            received += int(fields[0])
            sent += int(fields[8])
    return received, sent


FILES = (Attribute("stat", show=stat_show),)
