"""Whose is a line of the kernel's log?  Pure: texts and numbers in, a decision out.

A line belongs to a container only if two things agree that do not depend on each other: what the
kernel's own bookkeeping says of the moment in which it was printed (an `Event`: the marks of
nsfs/csrc/mark.bpf.c, the task, its cgroup), and what the text says (`classify`).  Of the texts only
those on the list here can be a container's at all.  Text alone decides nothing: prefixes of LOG
rules, interface names, command names and cgroup names are chosen by those whom it is about.

Forms of text: net/netfilter/nf_log_syslog.c, mm/oom_kill.c, arch/x86/mm/fault.c,
arch/x86/kernel/traps.c, kernel/cgroup/pids.c, net/ipv4/{route,tcp_input,udp}.c of Linux 5.14 to
6.18; of records: Documentation/ABI/testing/dev-kmsg.
"""

from __future__ import annotations

import re
import socket
import struct
from typing import NamedTuple

LOCAL_OUT = 3
POST_ROUTING = 4
RECEIVE = 16
BRIDGE = 17

IPV4 = 2
IPV6 = 10


class Record(NamedTuple):
    """A record of /dev/kmsg; `usec` is the kernel's local_clock()."""

    seq: int
    usec: int
    level: int
    facility: int
    continued: bool
    text: bytes


class Mark(NamedTuple):
    """A packet that was about to be handled: struct mark of nsfs/csrc/mark.h."""

    time_ns: int
    net: int
    source: bytes
    destination: bytes
    incoming: bytes
    outgoing: bytes
    source_port: int
    destination_port: int
    ident: int
    length: int
    family: int
    protocol: int
    kind: int


class Event(NamedTuple):
    """A line at the moment in which it was printed.

    `tid` and `groups` are the task's (IDs of its v2 group and of those above); in an interrupt they
    say nothing.  `marks` are the newest first.
    """

    time_ns: int
    tid: int
    cpu: int
    interrupt: bool
    groups: tuple[int, ...]
    marks: tuple[Mark, ...]
    text: bytes

    @property
    def context(self) -> tuple[bool, int]:
        """What does one thing after the other: a CPU in interrupts, or a task."""
        return (True, self.cpu) if self.interrupt else (False, self.tid)


class Follower(NamedTuple):
    """The mark that the output hook made next in a context that had printed a line."""

    context: tuple[bool, int]
    mark: Mark


# --- records and events as they come -----------------------------------------------------------

_HEAD = re.compile(rb"(\d+),(\d+),(\d+),([^,;]*)[^;]*;")
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")


def parse_record(data: bytes) -> Record | None:
    """What one read of /dev/kmsg gave; None for what is no record."""
    head = _HEAD.match(data)
    if head is None:
        return None
    priority = int(head[1])
    text = data[head.end() :].partition(b"\n")[0]
    if b"\\" in text:
        text = _ESCAPE.sub(lambda found: bytes((int(found[1], 16),)), text)
    return Record(
        int(head[2]), int(head[3]), priority & 7, priority >> 3, head[4].startswith(b"c"), text
    )


_EVENT = struct.Struct("=QIIIIII16Q")
_MARK = struct.Struct("=QQQ16s16s16s16s4sIIBBBx")
_PORTS = struct.Struct(">HH")
_LINE, _FOLLOWER = 1, 2


def parse_event(data: bytes) -> Event | Follower | None:
    """A struct event of nsfs/csrc/mark.h, cut by the loader to what is used."""
    if len(data) < _EVENT.size:
        return None
    time_ns, kind, tid, cpu, softirq, count, length, *groups = _EVENT.unpack_from(data)
    marks = []
    at = _EVENT.size
    for _ in range(count):
        stamp, net, _skb, source, destination, incoming, outgoing, ports, *rest = _MARK.unpack_from(
            data, at
        )
        at += _MARK.size
        # Its packet is gone.
        if not stamp:
            continue
        used = 16 if rest[2] == IPV6 else 4
        marks.append(
            Mark(
                stamp,
                net,
                source[:used],
                destination[:used],
                incoming.partition(b"\0")[0],
                outgoing.partition(b"\0")[0],
                *_PORTS.unpack(ports),
                *rest,
            )
        )
    event = Event(
        time_ns,
        tid,
        cpu,
        bool(softirq),
        tuple(groups),
        tuple(marks),
        data[at : at + length].removesuffix(b"\n"),
    )
    if kind == _FOLLOWER and marks:
        return Follower(event.context, marks[0])
    return event if kind == _LINE else None


# "%16s-%-7d [%03d] %s%5lu.%06lu: console: TEXT"; the command's name may hold anything, so it is
# passed over by its width.  The third letter of the flags: s, h, H, z, Z in interrupts.
_TRACE = re.compile(
    rb".{16}-(\d+) +\[(\d+)\] (\S\S)(\S)\S{1,3} +(\d+)\.(\d{6}): console: (.*)", re.S
)


def parse_trace(line: bytes) -> Event | None:
    """A line of trace_pipe, with the clock `mono`."""
    found = _TRACE.fullmatch(line)
    if found is None:
        return None
    time_ns = (int(found[5]) * 1_000_000 + int(found[6])) * 1000
    return Event(time_ns, int(found[1]), int(found[2]), found[4] != b".", (), (), found[7])


# --- what a text says --------------------------------------------------------------------------


class Packet(NamedTuple):
    """A LOG line of netfilter: what it says of the packet.  0 and b"" where it says nothing."""

    incoming: bytes
    outgoing: bytes
    physical: tuple[bytes, bytes]
    mac: bytes
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    ident: int
    length: int
    family: int
    protocol: int


class Trap(NamedTuple):
    """A line about the task `tid`, printed by itself."""

    tid: int


class Code(NamedTuple):
    """The opcodes at a trap: the trap's line is just before it."""


class Oom(NamedTuple):
    """A memory cgroup's OOM kill: the cgroup's path, and the victim."""

    path: bytes
    victim: int


class Killed(NamedTuple):
    """What follows it."""

    victim: int


class Forks(NamedTuple):
    """A pids cgroup refused a fork."""

    path: bytes


class Handled(NamedTuple):
    """A line about a packet that is being handled; b"" and 0 are not said."""

    source: bytes
    destination: bytes
    incoming: bytes
    destination_port: int


class Header(NamedTuple):
    """The link layer's header of a packet: the line about the packet is just before it."""


Subject = Packet | Trap | Code | Oom | Killed | Forks | Handled | Header

# The prefix is the rule's author's, so the last thing of this form counts; no interface has a blank
# or a slash in its name.
_PACKET = re.compile(
    rb".*IN=([^\s/]{0,15}) OUT=([^\s/]{0,15}) ((?:[A-Z]+=\S* )*?)"
    rb"SRC=([0-9a-f.:]+) DST=([0-9a-f.:]+) LEN=(\d+) "
    rb"(?:TOS=0x\w\w PREC=0x\w\w TTL=\d+ ID=(\d+) |TC=\d+ HOPLIMIT=\d+ FLOWLBL=(\d+) )"
    rb"(.*)",
    re.S,
)
_PROTOCOL = re.compile(rb"PROTO=(\S+)(?: SPT=(\d+) DPT=(\d+))?(?: |$)")
_PROTOCOLS = {
    b"ICMP": 1, b"TCP": 6, b"UDP": 17, b"ESP": 50, b"AH": 51, b"ICMPv6": 58, b"UDPLITE": 136,
}  # fmt: skip
_TRAPS = re.compile(
    rb"(?:.*\[(\d+)\]: segfault at [0-9a-f]+ ip [0-9a-f]+ sp [0-9a-f]+ error [0-9a-f]+(?: .*)?"
    rb"|traps: .*\[(\d+)\] [^\[\]]* ip:[0-9a-f]+ sp:[0-9a-f]+ error:[0-9a-f]+(?: .*)?"
    rb"|.*\[(\d+)\] bad frame in \S+ frame:[0-9a-f]+ ip:[0-9a-f]+ sp:[0-9a-f]+ .*"
    rb"|.*\[(\d+)\]: unhandled exception: .*)",
    re.S,
)
_CODE = re.compile(rb"Code: (?:[0-9a-f<> ]+|(?:Unable to access|Bad) .*)")
_OOM = re.compile(
    rb"oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=[^,]*(?:,[0-9-]+)*,cpuset=[^,]*,"
    rb"mems_allowed=[0-9,-]*,oom_memcg=([^,]+),task_memcg=[^,]+,task=.*,pid=(\d+),uid=\d+",
    re.S,
)
_KILLED = re.compile(rb"Memory cgroup out of memory: Killed process (\d+) \(.*", re.S)
_FORKS = re.compile(rb"cgroup: fork rejected by pids controller in (/.*)", re.S)
_MARTIAN = re.compile(
    rb"IPv4: martian (?:source|destination) ([0-9.]+) from ([0-9.]+),(?: on)? dev (\S+)"
)
_FLOOD = re.compile(rb"TCP: \S+: Possible SYN flooding on port (?:(\[?[0-9a-f.:]+\]?):)?(\d+)\. .*")
_CHECKSUM = re.compile(
    rb"UDP(?:-Lite)?: (?:bad checksum|short packet)[.:] From ([0-9.]+):\d+(?: \d+/\d+)?"
    rb" to ([0-9.]+):(\d+)(?: .*)?"
)
_HEADER = re.compile(rb"ll header: [0-9a-f: ]+.*", re.S)


def address(word: str) -> bytes:
    """An IPv4 or IPv6 address as the packet has it; b"" for what is none."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in word else socket.AF_INET, word)
    except OSError:
        return b""


def _address(text: bytes) -> bytes:
    return address(text.decode("ascii", "replace").strip("[]"))


def parse_packet(text: bytes) -> Packet | None:
    """A LOG line taken apart; None for another line."""
    found = _PACKET.fullmatch(text)
    if found is None:
        return None
    between = dict(word.split(b"=", 1) for word in found[3].split())
    source, destination = _address(found[4]), _address(found[5])
    if not source or len(source) != len(destination):
        return None
    protocol = _PROTOCOL.search(found[9])
    name = protocol[1] if protocol else b""
    number = _PROTOCOLS.get(name, int(name) if name.isdigit() else 0)
    ports = (int(protocol[2] or 0), int(protocol[3] or 0)) if protocol else (0, 0)
    return Packet(
        found[1],
        found[2],
        (between.get(b"PHYSIN", b""), between.get(b"PHYSOUT", b"")),
        between.get(b"MAC", b""),
        source,
        destination,
        *ports,
        int(found[7] if found[7] is not None else found[8]),
        int(found[6]),
        IPV4 if len(source) == 4 else IPV6,
        number,
    )


def _handled(text: bytes) -> Handled | None:
    found = _MARTIAN.fullmatch(text)
    if found:
        return Handled(_address(found[2]), _address(found[1]), found[3], 0)
    found = _FLOOD.fullmatch(text)
    if found:
        to = _address(found[1] or b"")
        # What the socket listens on, which may be any address.
        return Handled(b"", to if any(to) else b"", b"", int(found[2]))
    found = _CHECKSUM.fullmatch(text)
    if found:
        return Handled(_address(found[1]), _address(found[2]), b"", int(found[3]))
    return None


def classify(text: bytes) -> Subject | None:
    """What a line is about, if it is one that can be a container's."""
    packet = parse_packet(text)
    if packet:
        return packet
    found = _TRAPS.fullmatch(text)
    if found:
        return Trap(int(found[found.lastindex or 0]))
    if _CODE.fullmatch(text):
        return Code()
    found = _OOM.fullmatch(text)
    # Whoever names a cgroup may write these words into it.
    if found and text.count(b"oom_memcg=") == 1 and text.count(b"mems_allowed=") == 1:
        return Oom(found[1], int(found[2]))
    found = _KILLED.fullmatch(text)
    if found:
        return Killed(int(found[1]))
    found = _FORKS.fullmatch(text)
    if found:
        return Forks(found[1])
    if _HEADER.fullmatch(text):
        return Header()
    return _handled(text)
