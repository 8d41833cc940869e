"""Lines of the kernel's log meet what tells whose they are.  Pure.

Records and events come by ways of their own: `Joiner` brings them together.  Whether a packet that
was marked and a text can be about the same one is `agrees`, and `Judge` decides whose each line is,
asking `Owners` for what only the kernel's bookkeeping knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from nsfs.klines import (
    BRIDGE,
    RECEIVE,
    Code,
    Event,
    Follower,
    Forks,
    Handled,
    Header,
    Killed,
    Mark,
    Oom,
    Packet,
    Record,
    Subject,
    Trap,
    classify,
)

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
