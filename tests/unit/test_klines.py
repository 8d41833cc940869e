"""Whose a line is, decided from texts and numbers alone."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

import pytest

from nsfs.klines import (
    BRIDGE,
    IPV4,
    IPV6,
    LOCAL_OUT,
    RECEIVE,
    Event,
    Follower,
    Killed,
    Mark,
    Oom,
    Packet,
    Record,
    Trap,
    classify,
    parse_event,
    parse_packet,
    parse_record,
    parse_trace,
)
from nsfs.linejoin import FOLLOW_S, WAIT_S, Joiner, Judge, agrees, newest

UDP = (
    b"in: IN=eth0 OUT= MAC=02:00:00:00:00:01:02:00:00:00:00:02:08:00 SRC=10.9.0.2 DST=10.9.0.1 "
    b"LEN=29 TOS=0x00 PREC=0x00 TTL=64 ID=4711 DF PROTO=UDP SPT=4000 DPT=5001 LEN=9 "
)
ICMP6 = (
    b"x IN= OUT=eth0 SRC=fd09:0000:0000:0000:0000:0000:0000:0001 "
    b"DST=fd09:0000:0000:0000:0000:0000:0000:0002 LEN=104 TC=0 HOPLIMIT=64 FLOWLBL=74565 "
    b"PROTO=ICMPv6 TYPE=128 CODE=0 ID=1 SEQ=1 "
)
SEGFAULT = (
    b"sh[77]: segfault at 0 ip 00007f00 sp 00007ffc error 4 in libc.so.6[1,2+3] likely on CPU 1"
)
OOM = (
    b"oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,"
    b"oom_memcg=/nsfs/3,task_memcg=/nsfs/3/payload,task=sh,pid=77,uid=0"
)
KILLED = b"Memory cgroup out of memory: Killed process 77 (sh) total-vm:1kB"
GROUPS = (1, 2, 3)


def mark(**changes: object) -> Mark:
    """The mark of UDP's packet, in the namespace 1."""
    made = Mark(
        time_ns=1000,
        net=1,
        source=socket.inet_aton("10.9.0.2"),
        destination=socket.inet_aton("10.9.0.1"),
        incoming=b"eth0",
        outgoing=b"",
        source_port=4000,
        destination_port=5001,
        ident=4711,
        length=29,
        family=IPV4,
        protocol=17,
        kind=1,
    )
    return made._replace(**changes)  # type: ignore[arg-type]


def event(text: bytes = UDP, *marks: Mark, **changes: object) -> Event:
    """A line in a softirq."""
    return Event(2000, 77, 0, True, GROUPS, marks, text)._replace(**changes)  # type: ignore[arg-type]


def record(text: bytes, seq: int = 1, facility: int = 0) -> Record:
    return Record(seq, 1, 4, facility, False, text)


def test_records() -> None:
    assert parse_record(b"4,12,345,-;a \\x41\\x5c\\x0a b\n SUBSYSTEM=x\n") == Record(
        12, 345, 4, 0, False, b"a A\\\n b"
    )
    assert parse_record(b"30,12,345,c,caller=T1;text\n") == Record(12, 345, 6, 3, True, b"text")
    assert parse_record(b"nonsense") is None


def test_events() -> None:
    head = struct.pack("=QIIIIII16Q", 5, 1, 77, 1, 1, 2, 3, *range(1, 17))
    made = struct.pack(
        "=QQQ16s16s16s16s4sIIBBBx",
        4, 9, 0, b"\x0a\x09\0\x02", b"\x0a\x09\0\x01", b"eth0", b"", b"\x0f\xa0\x13\x89",
        4711, 29, IPV4, 17, 1,
    )  # fmt: skip
    gone = struct.pack("=Q", 0) + made[8:]
    found = parse_event(head + made + gone + b"abc")
    assert isinstance(found, Event)
    assert found.marks == (mark(time_ns=4, net=9),)
    assert (found.text, found.interrupt, found.context) == (b"abc", True, (True, 1))
    follower = parse_event(struct.pack("=QIIIIII16Q", 5, 2, 7, 0, 0, 1, 0, *[0] * 16) + made)
    assert follower == Follower((False, 7), mark(time_ns=4, net=9))
    assert parse_event(b"short") is None


def test_trace() -> None:
    line = b"            bash-2797    [001] d.s..  5095.396900: console: a text"
    found = parse_trace(line)
    assert found is not None
    assert (found.tid, found.cpu, found.interrupt) == (2797, 1, True)
    assert (found.time_ns, found.text) == (5095_396900_000, b"a text")
    # A command's name and a text may look like the fields.
    tricky = b" x-1 [0] d.... 1-2797    [001] .....  1.000001: console: y-5 [001] d.... 1.000001: "
    found = parse_trace(tricky + b"console: z")
    assert found is not None
    assert (found.tid, found.interrupt) == (2797, False)
    assert parse_trace(b"CPU:0 [LOST 12 EVENTS]") is None


def test_packets() -> None:
    packet = parse_packet(UDP)
    assert packet is not None
    assert packet.incoming == b"eth0"
    assert (packet.source_port, packet.destination_port, packet.ident) == (4000, 5001, 4711)
    packet = parse_packet(ICMP6)
    assert packet is not None
    assert (packet.outgoing, packet.ident, packet.family) == (b"eth0", 74565, IPV6)
    # What is in brackets is another packet, which an ICMP error is about.
    error = UDP.replace(
        b"UDP SPT=4000 DPT=5001 LEN=9 ", b"ICMP TYPE=3 CODE=3 [SRC=1.1.1.1 DST=2.2.2.2 "
    )
    packet = parse_packet(error + b"LEN=1 PROTO=UDP SPT=1 DPT=2 LEN=9 ] ")
    assert packet is not None
    assert (packet.protocol, packet.source_port) == (1, 0)
    assert parse_packet(b"IN=eth0 OUT=") is None


def test_a_prefix_cannot_stand_for_the_packet() -> None:
    packet = parse_packet(b"IN=eth9 OUT= SRC=1.1.1.1 DST=1.1.1.2 LEN=1 " + UDP)
    assert packet is not None
    assert packet.incoming == b"eth0"


@pytest.mark.parametrize(
    "text",
    [
        b"sh invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0",
        OOM.replace(b"CONSTRAINT_MEMCG", b"CONSTRAINT_NONE"),
        # A cgroup's name with commas in it.
        OOM.replace(b"cpuset=/", b"cpuset=x,mems_allowed=0,oom_memcg=/nsfs/9,task_memcg=/y"),
        b"Out of memory: Killed process 77 (sh) total-vm:1kB",
        b"oom_reaper: reaped process 77 (sh)",
        b"BUG: kernel NULL pointer dereference, address: 0",
        b"WARNING: CPU: 0 PID: 77 at net/core/dev.c:1 foo+0x1/0x2",
        b"CPU: 0 PID: 77 Comm: sh Not tainted",
        b" dump_stack+0x1/0x2",
        b"ata1: link is down",
        b"eth0: renamed from veth1",
    ],
)
def test_what_is_the_hosts_alone(text: bytes) -> None:
    assert classify(text) is None


def test_what_can_be_a_containers() -> None:
    assert isinstance(classify(UDP), Packet)
    assert classify(SEGFAULT) == Trap(77)
    assert classify(b"traps: a[1]: x[77] trap invalid opcode ip:1 sp:2 error:0 in x[1+1]") == Trap(
        77
    )
    assert classify(OOM) == Oom(b"/nsfs/3", 77)
    assert classify(KILLED) == Killed(77)


def test_marks_agree() -> None:
    packet = parse_packet(UDP)
    assert packet
    assert agrees(mark(), packet)
    for change in (
        {"ident": 1},
        {"length": 30},
        {"protocol": 6},
        {"incoming": b"eth1"},
        {"family": IPV6},
        {"source_port": 1, "destination_port": 1},
        {"source": b"aaaa", "destination": b"bbbb"},
    ):
        assert not agrees(mark(**change), packet), change
    # NAT has changed one end since.
    assert agrees(mark(destination=b"aaaa", destination_port=1), packet)
    assert not agrees(mark(destination=b"aaaa", kind=RECEIVE), packet)
    # A mark with no name in common says nothing of where the packet is.
    assert not agrees(mark(incoming=b""), packet)


def test_a_bridges_mark() -> None:
    packet = parse_packet(UDP.replace(b"IN=eth0 OUT=", b"IN= OUT=port1"))
    assert packet
    assert agrees(mark(incoming=b"br0", kind=BRIDGE), packet)


def test_the_newest_mark_counts() -> None:
    assert newest([], lambda _: True) is None
    assert newest([mark(kind=5), mark(kind=1)], lambda m: m.kind == 1) == 1
    # Of another namespace since: no older one is certain.
    assert newest([mark(net=2, kind=5), mark(kind=1)], lambda m: m.kind == 1) is None


def test_lines_meet_events_in_order() -> None:
    joiner = Joiner()
    joiner.add_record(record(UDP, 1), 0.0)
    joiner.add_record(record(b"x", 2, facility=1), 0.0)
    assert not list(joiner.ready(WAIT_S / 2))
    joiner.add_event(event(UDP, mark()))
    found = list(joiner.ready(WAIT_S / 2))
    assert [(each.record.seq, each.net) for each in found] == [(1, 1), (2, None)]


def test_a_line_without_event_is_given_out_after_a_while() -> None:
    joiner = Joiner()
    joiner.add_record(record(UDP), 0.0)
    assert joiner.due_s() == WAIT_S
    (found,) = joiner.ready(WAIT_S)
    assert found.event is None


def test_pieces() -> None:
    joiner = Joiner()
    pieces = [OOM[:40], b"/nsfs/3", OOM[40:]]
    text = b"".join(pieces)
    joiner.add_event(event(b"/nsfs/3", time_ns=1))
    for at, piece in enumerate(pieces):
        joiner.add_event(event(b"other", tid=5, interrupt=False))
        joiner.add_event(event(piece, time_ns=10 + at))
    joiner.add_record(record(SEGFAULT[:0] + text), 0.0)
    joiner._records[0].subject = Oom(b"/nsfs/3", 77)
    (found,) = joiner.ready(0.0)
    assert found.event is not None
    assert found.event.time_ns == 10


OUTPUT = UDP.replace(b"IN=eth0 OUT=", b"IN= OUT=eth0")


def test_the_mark_that_follows() -> None:
    sent = mark(incoming=b"", outgoing=b"eth0", kind=LOCAL_OUT, time_ns=3000)
    late = sent._replace(time_ns=3000 + 10_000_000)
    other = sent._replace(ident=5)
    for follower, net in ((sent, 1), (late, None), (other, None)):
        joiner = Joiner()
        joiner.add_record(record(OUTPUT), 0.0)
        joiner.add_event(event(OUTPUT))
        assert not list(joiner.ready(0.0))
        joiner.add_event(Follower((True, 1), sent))
        assert not list(joiner.ready(0.0))
        joiner.add_event(Follower((True, 0), follower))
        (found,) = joiner.ready(0.0)
        assert found.net == net
    joiner.add_record(record(OUTPUT), 0.0)
    joiner.add_event(event(OUTPUT, time_ns=10**9))
    assert not list(joiner.ready(0.0))
    (found,) = joiner.ready(FOLLOW_S)
    assert found.net is None


@dataclass
class Everybody:
    """Owners for tests: a is the namespace 1, the task 77, the group /nsfs/3; b is in a."""

    tasks: dict[int, str] = field(default_factory=lambda: {77: "a", 78: "b"})

    def of_task(self, event: Event) -> str | None:
        return self.tasks.get(event.tid)

    def of_net(self, cookie: int) -> str | None:
        return {1: "a", 2: "b"}.get(cookie)

    def of_group(self, path: bytes) -> str | None:
        return "a" if path.startswith(b"/nsfs/3") else None

    def of_packet(self, event: Event, packet: Packet) -> str | None:
        return "by context"

    def within(self, inner: str, outer: str) -> bool:
        return inner == outer or (inner, outer) == ("b", "a")


def owners(*lines: Event) -> list[str | None]:
    """Whose lines with these events are."""
    joiner, judge = Joiner(), Judge(Everybody())
    for seq, each in enumerate(lines):
        joiner.add_event(each)
        joiner.add_record(record(each.text, seq), 0.0)
    return [judge.owner(each) for each in joiner.ready(1.0)]


def task(text: bytes, tid: int = 77, **changes: object) -> Event:
    """A line that a task prints itself."""
    return event(text, tid=tid, interrupt=False, **changes)


def test_whose_lines_are() -> None:
    assert owners(event(UDP, mark())) == ["a"]
    assert owners(event(UDP)) == [None]
    assert owners(event(UDP, mark(net=99))) == [None]
    assert owners(event(UDP, groups=())) == ["by context"]
    assert owners(task(SEGFAULT)) == ["a"]
    # The text names another task, or an interrupt printed it.
    assert owners(task(SEGFAULT, tid=78)) == [None]
    assert owners(event(SEGFAULT)) == [None]


def test_sequels() -> None:
    code = b"Code: 00 01 <02> 03"
    assert owners(task(SEGFAULT), task(code)) == ["a", "a"]
    assert owners(task(code)) == [None]
    assert owners(task(SEGFAULT), task(code, tid=78)) == ["a", None]
    assert owners(task(SEGFAULT), task(code, time_ns=10**9)) == ["a", None]
    assert owners(task(OOM), task(KILLED)) == ["a", "a"]
    # In a's group, by a process of b, which is nested in a.
    assert owners(task(OOM, tid=78), task(KILLED, tid=78)) == ["a", "a"]
    # By a process of the host.
    assert owners(task(OOM, tid=1), task(KILLED, tid=1)) == [None, None]
    assert owners(task(KILLED)) == [None]


def test_lines_about_packets() -> None:
    text = b"IPv4: martian source 10.9.0.1 from 10.9.0.2, on dev eth0"
    assert owners(event(text, mark())) == ["a"]
    assert owners(event(text, mark(incoming=b"eth1"))) == [None]
    assert owners(event(text, mark()), event(b"ll header: 00000000: 01 02")) == ["a", "a"]
    flood = b"TCP: request_sock_TCP: Possible SYN flooding on port 0.0.0.0:5001. Sending cookies."
    assert owners(event(flood, mark(protocol=6))) == ["a"]
    assert owners(event(flood, mark(destination_port=1))) == [None]
