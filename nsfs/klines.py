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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

WAIT_S = 0.05
"""How long a line waits for what tells whose it is."""
FOLLOW_S = 0.02
"""How long a line of the output hook waits for the mark that follows it."""
FOLLOW_NS = 2_000_000
"""How soon after a line that mark comes."""
OOM_S = 1.0
"""How soon after `oom-kill:` the line about the process that was killed comes."""
CODE_S = 0.1
"""How soon after a trap's line its `Code:` line comes."""
EVENTS_MAX = 20_000
"""Events that are kept for lines to come."""

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


# --- marks and texts ---------------------------------------------------------------------------

_EXTENSIONS = frozenset((0, 43, 44, 51, 60, 135))
"""Headers of IPv6 that may stand before the one that a LOG line names."""


def _names_agree(mark: Mark, packet: Packet) -> bool:
    if mark.kind == BRIDGE:
        # The hooks of the bridge name the port, the mark the bridge.
        return not packet.incoming
    incoming = packet.physical[0] if mark.incoming == packet.physical[0] else packet.incoming
    pairs = ((mark.incoming, incoming), (mark.outgoing, packet.outgoing))
    # A mark of an earlier hook does not know yet where the packet leaves; the last hooks name only
    # that.
    return all(a == b or not a or not b for a, b in pairs) and any(a == b and a for a, b in pairs)


def agrees(mark: Mark, packet: Packet) -> bool:
    """Whether a mark and a LOG line can be about the same packet.

    NAT between the two changes one end, never both.
    """
    if (mark.family, mark.ident, mark.length) != (packet.family, packet.ident, packet.length):
        return False
    if packet.protocol != mark.protocol and mark.protocol not in _EXTENSIONS:
        return False
    same = (
        (mark.source, mark.source_port) == (packet.source, packet.source_port),
        (
            mark.destination,
            mark.destination_port,
        )
        == (packet.destination, packet.destination_port),
    )
    whole = mark.kind in (RECEIVE, BRIDGE) or mark.protocol in _EXTENSIONS
    if mark.protocol in _EXTENSIONS:
        same = mark.source == packet.source, mark.destination == packet.destination
    return (all(same) if whole else any(same)) and _names_agree(mark, packet)


def about(mark: Mark, handled: Handled) -> bool:
    """The same for a line about a packet that is being handled."""
    return (
        (not handled.source or handled.source == mark.source)
        and (not handled.destination or handled.destination == mark.destination)
        and (not handled.incoming or handled.incoming == mark.incoming)
        and (not handled.destination_port or handled.destination_port == mark.destination_port)
    )


def newest(marks: Sequence[Mark], fits: Callable[[Mark], bool]) -> int | None:
    """The namespace (cookie) of the newest mark that fits, if no newer one is another's."""
    for mark in marks:
        if mark.net != marks[0].net:
            return None
        if fits(mark):
            return mark.net
    return None


# --- lines meet what tells whose they are ------------------------------------------------------


@dataclass(slots=True, eq=False)
class Waiting:
    """A record in the order of the log."""

    record: Record
    since_s: float
    subject: Subject | None
    event: Event | None = None
    net: int | None = None


class Joiner:
    """Brings records and events together: by their texts, in their order.

    Equal texts are exchangeable but for their time, so the oldest event with the text is taken.
    """

    def __init__(self, has_events: bool = True) -> None:
        self.has_events = has_events
        self._records: deque[Waiting] = deque()
        # Events in their order, by a serial number; and the numbers of each text.
        self._events: dict[int, Event] = {}
        self._by_text: dict[bytes, deque[int]] = {}
        self._serial = 0
        self._followers: dict[tuple[bool, int], deque[Mark]] = {}

    def add_event(self, event: Event | Follower) -> None:
        """An event has come."""
        if isinstance(event, Follower):
            same = self._followers.pop(event.context, None) or deque(maxlen=256)
            same.append(event.mark)
            self._followers[event.context] = same
            if len(self._followers) > 1024:
                del self._followers[next(iter(self._followers))]
            return
        self._serial += 1
        self._events[self._serial] = event
        self._by_text.setdefault(event.text, deque()).append(self._serial)
        if len(self._events) > EVENTS_MAX:
            self._drop(next(iter(self._events)))

    def add_record(self, record: Record, now_s: float) -> None:
        """A record has come."""
        subject = None if record.facility else classify(record.text)
        self._records.append(Waiting(record, now_s, subject))

    def __len__(self) -> int:
        return len(self._records)

    def due_s(self) -> float | None:
        """When the oldest record is to be looked at again; None when there is none."""
        if not self._records:
            return None
        first = self._records[0]
        return first.since_s + (WAIT_S if first.event is None else FOLLOW_S)

    def ready(self, now_s: float) -> Iterator[Waiting]:
        """The records about which all is known that will be known, in order."""
        while self._records and self._complete(self._records[0], now_s):
            yield self._records.popleft()

    def _complete(self, each: Waiting, now_s: float) -> bool:
        if each.event is None:
            # LOG lines are printed at once, others piece by piece (pr_cont()).
            whole = each.subject is None or isinstance(each.subject, Packet)
            each.event = self._take(each.record.text, whole)
        if each.subject is None or not self.has_events:
            return True
        if each.event is None:
            return now_s >= each.since_s + WAIT_S
        if not isinstance(each.subject, Packet):
            return True
        return self._find_net(each, each.event, each.subject) or now_s >= each.since_s + FOLLOW_S

    def _find_net(self, each: Waiting, event: Event, packet: Packet) -> bool:
        """Whether it is known by now which namespace's packet it is, or that none will be known."""
        each.net = newest(event.marks, lambda mark: agrees(mark, packet))
        # A chain of the output hook at the lowest priority prints before the packet's first mark.
        if each.net is not None or packet.incoming or not packet.outgoing or not event.groups:
            return True
        later = (m for m in self._followers.get(event.context, ()) if m.time_ns >= event.time_ns)
        mark = next(later, None)
        if mark is None or mark.time_ns > event.time_ns + FOLLOW_NS:
            # A later one that is too late: it was not made for this line.
            return mark is not None
        if agrees(mark, packet):
            each.net = mark.net
        return True

    # Inside.

    def _drop(self, serial: int) -> None:
        text = self._events.pop(serial).text
        same = self._by_text[text]
        same.remove(serial)
        if not same:
            del self._by_text[text]

    def _take(self, text: bytes, whole: bool) -> Event | None:
        same = self._by_text.get(text)
        if not same:
            return None if whole else self._take_pieces(text)
        event = self._events[same[0]]
        self._drop(same[0])
        # What is a second older than one that has its record belongs to records that were lost.
        while self._events and self._oldest().time_ns < event.time_ns - 1_000_000_000:
            self._drop(next(iter(self._events)))
        return event

    def _oldest(self) -> Event:
        return next(iter(self._events.values()))

    def _take_pieces(self, text: bytes) -> Event | None:
        """The event of the first piece."""
        for begin, first in self._events.items():
            if not first.text or not text.startswith(first.text):
                continue
            rest, pieces = text, []
            for serial, event in self._events.items():
                if serial < begin or event.context != first.context:
                    continue
                if not rest.startswith(event.text):
                    break
                rest = rest[len(event.text) :]
                pieces.append(serial)
                if not rest:
                    break
            if not rest:
                for serial in pieces:
                    self._drop(serial)
                return first
        return None


# --- the decision ------------------------------------------------------------------------------

Owner = TypeVar("Owner")


class Owners(Protocol[Owner]):
    """What is known of containers; None for what is the host's, or nobody's."""

    def of_task(self, event: Event) -> Owner | None:
        """Whose member the task was that printed in its own context."""

    def of_net(self, cookie: int) -> Owner | None:
        """Whose network namespace that is."""

    def of_group(self, path: bytes) -> Owner | None:
        """In whose cgroup that path is."""

    def of_packet(self, event: Event, packet: Packet) -> Owner | None:
        """The only one who can be meant by a LOG line, where there are no marks."""

    def within(self, inner: Owner, outer: Owner) -> bool:
        """Whether the one is the other or nested in it."""


class Judge(Generic[Owner]):
    """Decides whose each line is, in the order of the log: some lines are only the sequel of
    another."""

    def __init__(self, owners: Owners[Owner]) -> None:
        self._owners = owners
        # A context's last line that may have a sequel: what kind of sequel, its time and owner.
        self._last: dict[tuple[bool, int], tuple[object, int, Owner]] = {}

    def owner(self, each: Waiting) -> Owner | None:
        """The container that a line belongs to; None: it stays with the host."""
        subject, event = each.subject, each.event
        if subject is None or event is None:
            return None
        if isinstance(subject, Packet):
            if each.net is not None:
                return self._owners.of_net(each.net)
            return None if event.groups else self._owners.of_packet(event, subject)
        if isinstance(subject, Code | Killed | Header):
            sequel: object = subject if isinstance(subject, Killed) else type(subject)
            return self._sequel(sequel, event, OOM_S if isinstance(subject, Killed) else CODE_S)
        found = self._first(subject, event)
        if found is not None:
            expected = {Trap: Code, Oom: None, Forks: None, Handled: Header}[type(subject)]
            after = Killed(subject.victim) if isinstance(subject, Oom) else expected
            self._last.pop(event.context, None)
            self._last[event.context] = (after, event.time_ns, found)
            if len(self._last) > 256:
                del self._last[next(iter(self._last))]
        return found

    def _first(self, subject: Trap | Oom | Forks | Handled, event: Event) -> Owner | None:
        owners = self._owners
        if isinstance(subject, Handled):
            net = newest(event.marks, lambda mark: about(mark, subject))
            return None if net is None else owners.of_net(net)
        if event.interrupt:
            return None
        task = owners.of_task(event)
        if task is None or isinstance(subject, Trap):
            return task if isinstance(subject, Trap) and subject.tid == event.tid else None
        group = owners.of_group(subject.path)
        return group if group is not None and owners.within(task, group) else None

    def _sequel(self, kind: object, event: Event, within_s: float) -> Owner | None:
        expected, time_ns, owner = self._last.get(event.context, (None, 0, None))
        if expected is None or expected != kind:
            return None
        return owner if 0 <= event.time_ns - time_ns <= within_s * 1e9 else None
