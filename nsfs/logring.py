"""A kernel log: a ring of records in memory that outlives the process, and their forms.

The buffer (the mapping of a tmpfs file, or any writable memory) is the whole state.  A process that
is killed at any instruction leaves a ring in which each record is there as a whole or not at all,
and the next process that opens it goes on with the same sequence numbers.  There is one writer and
no lock.

Layout, in words of eight bytes, native order:

    0       MAGIC, written last when a buffer is made into a ring
    1       size of the data in bytes
    2       generation g
    3       records that the console did not take
    8..35   state (see `HEAD` and what follows), the valid one where g is even
    36..63  state, the valid one where g is odd
    64..    data: records back to back, running over the end to the beginning

Everything that changes together is in the state, so a change is: write the copy that is not valid,
then store g + 1.  That store is `memoryview.__setitem__` of format "Q", one aligned 8-byte move; it
must not be `struct.pack_into`, which writes zeros first.  A record's bytes go where no valid state
points: before they overwrite old records, a state without those is stored.
"""

from __future__ import annotations

import errno
import re
import struct
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mmap import mmap

CONT = 8
"""The flag of a record that is a fragment of a line (the kernel's LOG_CONT): `c` instead of `-`."""

ECHO = 16
"""The flag of a record that was echoed from a nested container's log: its text has a tag.

Ours, not the kernel's: members can write a text that looks like it, but not the flag.
"""

TEXT_MAX = 1023
"""Bytes of text in a record; the kernel formats into PRINTKRB_RECORD_MAX with a NUL at the end."""

WRITE_MAX = 1024
"""Bytes in one write to /dev/kmsg (PRINTKRB_RECORD_MAX)."""

FORMATTED_MAX = 2048
"""Bytes of a formatted record (PRINTK_MESSAGE_MAX since Linux 6.3; 8,192 for /dev/kmsg before)."""

DICTIONARY_MAX = 1024
"""Bytes of a record's dictionary; a longer one is left out."""

DEFAULT_LEVEL = 4
"""default_message_loglevel: what a write without a prefix gets."""

LOG_KERN = 0
LOG_USER = 1

MAGIC = int.from_bytes(b"nsfslog1", "little")
HEADER_BYTES = 512
MIN_BYTES = HEADER_BYTES + 256
"""The smallest buffer that can be a ring."""

_MAGIC, _SIZE, _GENERATION, _CONSOLE_DROPPED = range(4)
_COPIES = (8, 36)

# The state.  HEAD and TAIL count bytes since the ring was made: a full ring is not an empty one.
# BUCKETS begins three times three words of rate limiting: begin of the interval, left, missed.
(
    HEAD, TAIL, NEXT, FIRST, CLEAR, CONSOLE, SYSLOG, PARTIAL, WAS_SYSLOG, WAS_PARTIAL, SYSLOG_TOKEN,
    KEPT, KEPT_BYTES, OVERWRITTEN, OVERWRITTEN_BYTES, SUPPRESSED, SUPPRESSED_BYTES,
    CONSOLE_LEVEL, SAVED_LEVEL, BUCKETS,
) = range(20)  # fmt: skip
_BUCKET_KERN, _BUCKET_USER, _BUCKET_ECHO = (BUCKETS + 3 * n for n in range(3))
_WORDS = BUCKETS + 9

# seq, usec, token, bytes of text, bytes of dictionary, facility << 3 | level, flags
_RECORD = struct.Struct("QQQHHHH")
_LENGTHS = struct.Struct("HH")
_LENGTHS_AT = 24

_TRUNCATED = b"<truncated>"


def monotonic_usec() -> int:
    """CLOCK_MONOTONIC in microseconds."""
    return time.monotonic_ns() // 1000


class Record(NamedTuple):
    """One record.  `usec` is CLOCK_MONOTONIC, `level` 0-7, each of `dictionary` is b"KEY=VALUE"."""

    seq: int
    usec: int
    level: int
    facility: int
    flags: int
    text: bytes
    dictionary: tuple[bytes, ...] = ()


class Overrun(NamedTuple):
    """The record asked for was overwritten; the oldest one left is that."""

    oldest: int


class Limit(NamedTuple):
    """Not more than `burst` records in any interval of `burst / rate` seconds.

    As lib/ratelimit.c, whose own interval and burst (5 s, 10) are those of
    printk_devkmsg=ratelimit.
    """

    rate: int = 1000
    burst: int = 10000

    @property
    def interval_usec(self) -> int:
        """Length of the interval in microseconds."""
        return self.burst * 1_000_000 // self.rate


class Counters(NamedTuple):
    """Numbers since the ring was made; bytes are those of texts.

    What is in the ring now is kept - overwritten.
    """

    kept_records: int
    kept_bytes: int
    overwritten_records: int
    overwritten_bytes: int
    suppressed_records: int
    suppressed_bytes: int

    @property
    def dropped_records(self) -> int:
        """Records that were overwritten or never let in."""
        return self.overwritten_records + self.suppressed_records

    @property
    def dropped_bytes(self) -> int:
        """Bytes of the records that were overwritten or never let in."""
        return self.overwritten_bytes + self.suppressed_bytes


DEFAULT_LIMIT = Limit()


class LogRing:
    """The ring in `buffer`: zeroed memory becomes a new one, an old one is checked and continued.

    `clock` gives microseconds; `limit` None lets everything in.  Records of facility 0 have a limit
    of their own, so that no process can crowd out what the kernel says, and so have those that are
    echoed from nested containers (ECHO).

    ValueError: the buffer is too small, was made into a ring with another size, or is no ring.
    """

    def __init__(
        self,
        buffer: memoryview | bytearray | mmap,
        *,
        clock: Callable[[], int] = monotonic_usec,
        limit: Limit | None = DEFAULT_LIMIT,
    ) -> None:
        if len(buffer) < MIN_BYTES:
            raise ValueError(f"a log ring needs {MIN_BYTES} bytes")
        self._buffer = memoryview(buffer).cast("B")
        self._words = self._buffer[: len(buffer) & ~7].cast("Q")
        self._size = len(self._words) * 8 - HEADER_BYTES
        self._clock = clock
        self._limit = limit
        self._state = array("Q", bytes(_WORDS * 8))
        # Where each record begins in the data, the first of them that of record _base.
        self._positions = array("I")
        self._base = 0
        self._newest_token = 0
        self._syslog_sizes: dict[bool, SyslogSizes] = {}
        if self._words[_MAGIC] == 0:
            self._make()
        elif self._words[_MAGIC] != MAGIC or self._words[_SIZE] != self._size:
            raise ValueError("not a log ring of this size")
        else:
            self._open()

    def close(self) -> None:
        """Let go of the buffer, so that a mapping can be closed."""
        self._words.release()
        self._buffer.release()

    # What there is.

    @property
    def size(self) -> int:
        """Bytes that records and their headers (32 bytes each) can take."""
        return self._size

    @property
    def buffer_size(self) -> int:
        """Bytes of the whole buffer."""
        return len(self._buffer)

    @property
    def first_seq(self) -> int:
        """The oldest record's number; next_seq in an empty ring."""
        return self._state[FIRST]

    @property
    def next_seq(self) -> int:
        """The number that the next record will have."""
        return self._state[NEXT]

    @property
    def clear_seq(self) -> int:
        """The first record after the last clear; it may have been overwritten."""
        return self._state[CLEAR]

    @property
    def console_seq(self) -> int:
        """The next record to be echoed to the console."""
        return self._state[CONSOLE]

    @property
    def console_level(self) -> int:
        """console_loglevel: records of lower levels go to the console."""
        return self._state[CONSOLE_LEVEL]

    @property
    def counters(self) -> Counters:
        """What was kept and what was dropped."""
        return Counters(*self._state[KEPT : SUPPRESSED_BYTES + 1])

    @property
    def console_dropped(self) -> int:
        """Records that were to be echoed to the console, which did not take them."""
        return self._words[_CONSOLE_DROPPED]

    def readable(self, seq: int) -> bool:
        """Whether there is a record `seq` or a later one (prb_read_valid())."""
        state = self._state
        return seq < state[NEXT] and state[FIRST] < state[NEXT]

    def read(self, seq: int) -> Record | Overrun | None:
        """Record `seq`; an Overrun when it is gone and later ones exist; None if not yet there."""
        state = self._state
        first, following = state[FIRST], state[NEXT]
        if seq >= following or first == following:
            return None
        if seq < first:
            return Overrun(first)
        at = self._positions[seq - self._base]
        if at + _RECORD.size <= self._size:
            fields = _RECORD.unpack_from(self._buffer, HEADER_BYTES + at)
        else:
            fields = _RECORD.unpack(self._load(at, _RECORD.size))
        _, usec, _, text_bytes, dictionary_bytes, priority, flags = fields
        text = self._load(at + _RECORD.size, text_bytes)
        dictionary: tuple[bytes, ...] = ()
        if dictionary_bytes:
            lines = self._load(at + _RECORD.size + text_bytes, dictionary_bytes)
            dictionary = tuple(lines.split(b"\0"))
        return Record(seq, usec, priority & 7, priority >> 3, flags, text, dictionary)

    # What changes it.

    def append(
        self,
        text: bytes,
        *,
        level: int = DEFAULT_LEVEL,
        facility: int = LOG_KERN,
        flags: int = 0,
        dictionary: Iterable[bytes] = (),
        usec: int | None = None,
        token: int = 0,
        limited: bool = True,
    ) -> int | None:
        """Add a record and return its number, or None when the limit does not let it in.

        `text` is cut to TEXT_MAX.  Where `limited` is false the limit does not matter.  `token`
        names the request that wants it: the same token as the newest record's is the same request,
        asked again because its answer was lost, and adds nothing.
        """
        if token and token == self._newest_token:
            return self._state[NEXT] - 1
        now = self._clock()
        text = text[:TEXT_MAX]
        if limited and self._limit:
            bucket = _BUCKET_USER if facility else _BUCKET_KERN
            if not self._let_in(_BUCKET_ECHO if flags & ECHO else bucket, now, len(text)):
                return None
        return self._add(
            text,
            (facility & 0xFF) << 3 | level & 7,
            flags,
            b"\0".join(dictionary),
            now if usec is None else usec,
            token,
        )

    def report_suppressed(self) -> int | None:
        """Add the line about suppressed records if it is due; its number or None.

        append() does so too, but nobody may come after a flood.  It is due when the interval is
        over.
        """
        now = self._clock()
        before = self._state[NEXT]
        for bucket in (_BUCKET_KERN, _BUCKET_USER, _BUCKET_ECHO):
            self._renew(bucket, now)
        return self._state[NEXT] - 1 if self._state[NEXT] > before else None

    def clear(self) -> None:
        """Set clear_seq after the newest record (SYSLOG_ACTION_CLEAR); nothing is removed."""
        self.set_clear_seq(self._state[NEXT])

    def set_clear_seq(self, seq: int) -> None:
        """Set clear_seq (SYSLOG_ACTION_READ_CLEAR)."""
        self._state[CLEAR] = seq
        self._commit()

    def set_console_seq(self, seq: int) -> None:
        """Remember that the records before `seq` were echoed."""
        self._state[CONSOLE] = seq
        self._commit()

    def count_console_dropped(self, count: int) -> None:
        """Records were to be echoed to the console, which did not take them."""
        self._put_word(_CONSOLE_DROPPED, self._words[_CONSOLE_DROPPED] + count)

    def set_limit(self, limit: Limit | None) -> None:
        """Let in as much as that from now on: another interval begins."""
        self._limit = limit
        for bucket in (_BUCKET_KERN, _BUCKET_USER, _BUCKET_ECHO):
            self._state[bucket] = 0
        self._commit()

    def set_console_level(self, level: int) -> None:
        """Set console_loglevel; forgets what console_off() saved."""
        self._state[CONSOLE_LEVEL] = level
        self._state[SAVED_LEVEL] = 0
        self._commit()

    def console_off(self) -> None:
        """Set console_loglevel to 1 and save what it was (SYSLOG_ACTION_CONSOLE_OFF)."""
        if not self._state[SAVED_LEVEL]:
            self._state[SAVED_LEVEL] = self._state[CONSOLE_LEVEL]
        self._state[CONSOLE_LEVEL] = 1
        self._commit()

    def console_on(self) -> None:
        """Set console_loglevel to what console_off() saved (SYSLOG_ACTION_CONSOLE_ON)."""
        if self._state[SAVED_LEVEL]:
            self.set_console_level(self._state[SAVED_LEVEL])

    def syslog_position(self, token: int = 0) -> tuple[int, int]:
        """syslog_seq and syslog_partial: where the one reader of /proc/kmsg and syslog(2) is.

        With the token of the last set_syslog_position(): where it was before, since that request is
        being asked again.
        """
        state = self._state
        if token and token == state[SYSLOG_TOKEN]:
            return state[WAS_SYSLOG], state[WAS_PARTIAL]
        return state[SYSLOG], state[PARTIAL]

    def set_syslog_position(self, seq: int, partial: int, token: int = 0) -> None:
        """Set the reader's position, done for the request `token`."""
        state = self._state
        if not (token and token == state[SYSLOG_TOKEN]):
            state[WAS_SYSLOG], state[WAS_PARTIAL] = state[SYSLOG], state[PARTIAL]
        state[SYSLOG], state[PARTIAL], state[SYSLOG_TOKEN] = seq, partial, token
        self._commit()

    def undo_syslog_position(self, token: int) -> None:
        """What was read for the request `token` was not taken: unless somebody else has read since,
        it is there for the next reader."""
        state = self._state
        if token and token == state[SYSLOG_TOKEN]:
            state[SYSLOG], state[PARTIAL] = state[WAS_SYSLOG], state[WAS_PARTIAL]
            state[SYSLOG_TOKEN] = 0
            self._commit()

    def syslog_sizes(self, time: bool) -> SyslogSizes:
        """What its records have in the form of syslog(2), with or without the time."""
        found = self._syslog_sizes.get(time)
        if found is None:
            found = self._syslog_sizes[time] = SyslogSizes(self, time)
        return found

    def copy_into(self, buffer: memoryview | bytearray | mmap) -> LogRing:
        """Make zeroed memory of another size a ring with this one's newest records and numbers.

        Not atomic: map a new file, and rename it over the old one afterwards.  ValueError as for a
        ring.
        """
        ring = LogRing(buffer, clock=self._clock, limit=self._limit)
        state = ring._state
        state[:] = self._state
        state[HEAD] = state[TAIL] = 0
        first = following = self.next_seq
        room = ring.size
        while first > self.first_seq and (room := room - self._length(first - 1)[0]) >= 0:
            first -= 1
        for seq in range(self.first_seq, first):
            state[OVERWRITTEN] += 1
            state[OVERWRITTEN_BYTES] += self._length(seq)[1]
        state[FIRST] = ring._base = first
        for seq in range(first, following):
            length = self._length(seq)[0]
            ring._positions.append(state[HEAD])
            ring._store(state[HEAD], self._load(self._positions[seq - self._base], length))
            state[HEAD] += length
        ring._newest_token = self._newest_token
        ring._put_word(_CONSOLE_DROPPED, self.console_dropped)
        ring._commit()
        return ring

    # Inside.

    def _put(self, start: int, data: bytes) -> None:
        """Store bytes; may be torn."""
        self._buffer[start : start + len(data)] = data

    def _put_state(self, start: int) -> None:
        """Store a copy of the state at that word; may be torn."""
        self._words[start : start + _WORDS] = self._state

    def _put_word(self, index: int, value: int) -> None:
        """Store a word; never torn."""
        self._words[index] = value

    def _commit(self) -> None:
        generation = self._words[_GENERATION] + 1
        self._put_state(_COPIES[generation & 1])
        self._put_word(_GENERATION, generation)

    def _make(self) -> None:
        self._state[CONSOLE_LEVEL] = 7
        self._put_word(_SIZE, self._size)
        self._commit()
        self._put_word(_MAGIC, MAGIC)

    def _open(self) -> None:
        start = _COPIES[self._words[_GENERATION] & 1]
        self._state[:] = array("Q", self._words[start : start + _WORDS])
        state = self._state
        if not (state[TAIL] <= state[HEAD] <= state[TAIL] + self._size and not state[HEAD] & 7):
            raise ValueError("the state of the log ring makes no sense")
        if self._find_records():
            return
        # No crash of a writer leaves that; the numbers at least go on.
        state[OVERWRITTEN] += max(state[NEXT] - state[FIRST], 0)
        state[FIRST] = self._base = state[NEXT]
        state[TAIL] = state[HEAD]
        del self._positions[:]
        self._newest_token = 0
        self._commit()

    def _find_records(self) -> bool:
        """Fill in _positions; whether the records are as many and as long as the state says."""
        state = self._state
        self._base = state[FIRST]
        at, seq = state[TAIL], state[FIRST]
        while at < state[HEAD] and seq < state[NEXT]:
            start = at % self._size
            number, _, token, text, dictionary, _, _ = _RECORD.unpack(
                self._load(start, _RECORD.size)
            )
            if number != seq:
                return False
            self._positions.append(start)
            self._newest_token = token
            at += _padded(_RECORD.size + text + dictionary)
            seq += 1
        return at == state[HEAD] and seq == state[NEXT]

    def _load(self, at: int, length: int) -> bytes:
        if at >= self._size:
            at -= self._size
        end = at + length
        if end <= self._size:
            return self._buffer[HEADER_BYTES + at : HEADER_BYTES + end].tobytes()
        return (
            self._buffer[HEADER_BYTES + at : HEADER_BYTES + self._size].tobytes()
            + self._buffer[HEADER_BYTES : HEADER_BYTES + end - self._size].tobytes()
        )

    def _store(self, at: int, data: bytes) -> None:
        room = self._size - at
        self._put(HEADER_BYTES + at, data[:room])
        if len(data) > room:
            self._put(HEADER_BYTES, data[room:])

    def _length(self, seq: int) -> tuple[int, int]:
        """Bytes that a record takes and bytes of its text."""
        # The field never runs over the end, records being multiples of 8.
        at = (self._positions[seq - self._base] + _LENGTHS_AT) % self._size
        text, dictionary = _LENGTHS.unpack_from(self._buffer, HEADER_BYTES + at)
        return _padded(_RECORD.size + text + dictionary), text

    def _let_in(self, at: int, now: int, length: int) -> bool:
        state = self._state
        self._renew(at, now)
        if state[at + 1]:
            state[at + 1] -= 1
            return True
        state[at + 2] += 1
        state[SUPPRESSED] += 1
        state[SUPPRESSED_BYTES] += length
        self._commit()
        return False

    def _renew(self, at: int, now: int) -> None:
        """Begin another interval if it is time to, and say what the last one suppressed.

        In the words of ratelimit_state_exit() for /dev/kmsg, once an interval as ___ratelimit().
        """
        state = self._state
        interval_usec = self._limit.interval_usec if self._limit else 0
        if 0 < state[at] <= now <= state[at] + interval_usec:
            return
        state[at], state[at + 1] = now, self._limit.burst if self._limit else 0
        missed, state[at + 2] = state[at + 2], 0
        if missed:
            line = b"kmsg: %d output lines suppressed due to ratelimiting" % missed
            self._add(line, DEFAULT_LEVEL, 0, b"", now, 0)

    def _add(
        self, text: bytes, priority: int, flags: int, dictionary: bytes, usec: int, token: int
    ) -> int:
        text, dictionary = self._fitting(text, dictionary)
        state = self._state
        seq = state[NEXT]
        data = _RECORD.pack(seq, usec, token, len(text), len(dictionary), priority, flags)
        data += text + dictionary
        data += bytes(-len(data) & 7)
        if len(data) > self._size - (state[HEAD] - state[TAIL]):
            self._make_room(len(data))
        at = state[HEAD] % self._size
        self._store(at, data)
        self._positions.append(at)
        self._newest_token = token
        state[HEAD] += len(data)
        state[NEXT] = seq + 1
        state[KEPT] += 1
        state[KEPT_BYTES] += len(text)
        self._commit()
        return seq

    def _fitting(self, text: bytes, dictionary: bytes) -> tuple[bytes, bytes]:
        """Cut what would take more than half of the ring, as truncate_msg() does: to a quarter."""
        if len(dictionary) > DICTIONARY_MAX:
            dictionary = b""
        if _padded(_RECORD.size + len(text) + len(dictionary)) <= self._size // 2:
            return text, dictionary
        if len(text) > self._size // 4:
            text = text[: self._size // 4 - len(_TRUNCATED)] + _TRUNCATED
        return text, b""

    def _make_room(self, length: int) -> None:
        state = self._state
        while length > self._size - (state[HEAD] - state[TAIL]):
            taken, text = self._length(state[FIRST])
            state[TAIL] += taken
            state[FIRST] += 1
            state[OVERWRITTEN] += 1
            state[OVERWRITTEN_BYTES] += text
        stale = state[FIRST] - self._base
        if stale > len(self._positions) // 2:
            del self._positions[:stale]
            self._base += stale
        self._commit()


def _padded(length: int) -> int:
    return (length + 7) & ~7


# The forms: those of kernel/printk/printk.c in Linux 6.18, with whose output they were compared.

_PREFIX = re.compile(rb"<([0-9]*)>")
_UNPRINTABLE = re.compile(rb"[^ -\[\]-~]")
_ESCAPES = {bytes((c,)): b"\\x%02x" % c for c in range(256)}
_PIECE = re.compile(rb"\\x[0-9a-f]{2}|.", re.DOTALL)


class Written(NamedTuple):
    """What a write to /dev/kmsg asks for."""

    level: int
    facility: int
    text: bytes


def parse_write(data: bytes, default_level: int = DEFAULT_LEVEL) -> Written:
    """Take a write apart as devkmsg_write() and printk_sprint() do.

    Documentation/ABI/testing/dev-kmsg: "The logged line can be prefixed with a <N> syslog prefix
    [...] the 3 lowest bits being the syslog priority and the next 8 bits the syslog facility
    number"; without one "the priority number is the default kernel log priority and the facility
    number is set to LOG_USER (1). It is not possible to inject messages from userspace with the
    facility number LOG_KERN (0)". N is an unsigned 32-bit number that wraps, and may be empty; a
    malformed prefix is text.  The text ends at a NUL byte; one newline at its end is removed.

    OSError EINVAL: longer than WRITE_MAX.
    """
    if len(data) > WRITE_MAX:
        raise OSError(errno.EINVAL, "a record longer than 1024 bytes", "kmsg")
    level, facility = default_level, LOG_USER
    prefix = _PREFIX.match(data)
    if prefix:
        number = int(prefix[1] or b"0") & 0xFFFFFFFF
        level = number & 7
        facility = number >> 3 & 0xFF or LOG_USER
        data = data[prefix.end() :]
    text = data.partition(b"\0")[0][:TEXT_MAX]
    return Written(level, facility, text.removesuffix(b"\n"))


def escape(text: bytes) -> bytes:
    """As msg_add_ext_text() does: what is not printable ASCII, and backslashes, as \\xHH."""
    if not _UNPRINTABLE.search(text):
        return text
    return _UNPRINTABLE.sub(lambda found: _ESCAPES[found[0]], text)


def _first_line(record: Record) -> bytes:
    return b"%d,%d,%d,%c;%s\n" % (
        record.facility << 3 | record.level,
        record.seq,
        record.usec,
        b"c" if record.flags & CONT else b"-",
        escape(record.text),
    )


def format_text(record: Record) -> bytes:
    """The line of the outer `C/kmsg`: format_kmsg() without dictionary, never cut."""
    return _first_line(record)


def format_kmsg(record: Record) -> bytes:
    r"""What one read of /dev/kmsg gives (info_print_ext_header(), msg_print_ext_body()).

    Documentation/ABI/testing/dev-kmsg: "a prefix carrying the syslog prefix including priority and
    facility, the 64 bit message sequence number and the monotonic timestamp in microseconds, and a
    flag field. All fields are separated by a ','. [...] The human readable text string starts
    directly after the ';' and is terminated by a '\n'. [...] all non-printable characters and '\'
    itself in the log message are escaped by "\x00" C-style hex encoding. A line starting with ' ',
    is a continuation line, adding key/value pairs".  Escaped is what msg_add_ext_text() escapes:
    below ' ', from 127 up, and the backslash; a key without a value is left out
    (msg_add_dict_text()).

    Not longer than FORMATTED_MAX: an escape that does not fit is cut, and one byte is left for the
    next plain character, which therefore mostly is the newline.
    """
    data = _first_line(record)
    for line in record.dictionary:
        if line.partition(b"=")[2]:
            data += b" %s\n" % escape(line)
    if len(data) <= FORMATTED_MAX:
        return data
    # scnprintf() keeps a byte for its NUL, append_char() does not.
    cut = b""
    for piece in _PIECE.findall(data):
        room = FORMATTED_MAX - len(cut)
        cut += piece[: max(room - 1, 0)] if len(piece) > 1 else piece[:room]
    return cut


def _prefix(record: Record, with_time: bool) -> bytes:
    """info_print_prefix(): `<N>` and the time as "[%5lu.%06lu] "."""
    prefix = b"<%d>" % (record.facility << 3 | record.level)
    if with_time:
        prefix += b"[%5d.%06d] " % divmod(record.usec, 1_000_000)
    return prefix


def format_syslog(record: Record, time: bool = True) -> bytes:
    """What syslog(2) and /proc/kmsg give (record_print_text()).

    kernel/printk/printk.c: "Add prefix for each line. Drop truncated lines that no longer fit into
    the buffer. Add the trailing newline that has been removed in vprintk_store()."  The buffer has
    FORMATTED_MAX bytes, one of them for a NUL.
    """
    prefix = _prefix(record, time)
    text = record.text
    if syslog_length(record, time) < FORMATTED_MAX:
        return prefix + text.replace(b"\n", b"\n" + prefix) + b"\n"
    data = b""
    truncated = False
    while True:
        line, newline, following = text.partition(b"\n")
        if truncated and not newline:
            break
        room = FORMATTED_MAX - 2 - len(data) - len(prefix)
        if len(text) > room:
            if len(line) > room:
                break
            text = text[:room]
            following = text[len(line) + 1 :]
            truncated = True
        data += prefix + line + b"\n"
        if len(text) == len(line):
            break
        text = following
    return data


def syslog_length(record: Record, time: bool = True) -> int:
    """Bytes of format_syslog() were nothing dropped (get_record_print_text_size())."""
    lines = record.text.count(b"\n") + 1
    return len(_prefix(record, time)) * lines + len(record.text) + 1


class SyslogSizes:
    """Bytes of a ring's records as syslog_length() counts them; each is counted once.

    The kernel counts all of them for each call.
    """

    def __init__(self, ring: LogRing, time: bool) -> None:
        self._ring, self._time = ring, time
        self._base = ring.first_seq
        # Of the records from _base on, how many bytes there are before each.
        self._before = array("Q", (0,))

    def _count(self) -> None:
        ring, before = self._ring, self._before
        gone = ring.first_seq - self._base
        if gone >= len(before):
            self._base = ring.first_seq
            before[:] = array("Q", (0,))
        elif gone > len(before) // 2:
            self._base = ring.first_seq
            del before[:gone]
        for seq in range(self._base + len(before) - 1, ring.next_seq):
            found = ring.read(seq)
            assert isinstance(found, Record)
            before.append(before[-1] + syslog_length(found, self._time))

    def since(self, seq: int) -> int:
        """Bytes of record `seq`, which must be there, and all later ones."""
        self._count()
        return self._before[-1] - self._before[seq - self._base]

    def fitting(self, first: int, size: int) -> int:
        """The first record, but none before `first`, that fits with all later ones into so much."""
        self._count()
        low = max(first, self._ring.first_seq) - self._base
        return self._base + bisect_left(self._before, self._before[-1] - size, low)
