"""The ring against a model, against crashes at each store, and its forms against the kernel's.

The lines marked "measured" were written to and read from the /dev/kmsg of a Linux 6.18 without
CONFIG_PRINTK_CALLER; the tests themselves touch no log of the machine.
"""

from __future__ import annotations

import errno
import mmap
import random
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsfs import logring
from nsfs.logring import (
    CONT,
    ECHO,
    FORMATTED_MAX,
    HEADER_BYTES,
    LOG_KERN,
    LOG_USER,
    MIN_BYTES,
    TEXT_MAX,
    Limit,
    LogRing,
    Overrun,
    Record,
    Written,
    format_kmsg,
    format_syslog,
    format_text,
    parse_write,
    syslog_length,
)

quick = settings(max_examples=40, deadline=None)


class Clock:
    """A clock in microseconds that only the test moves."""

    def __init__(self) -> None:
        self.usec = 5_123_456

    def __call__(self) -> int:
        return self.usec


def make(data_bytes: int = 4096, **options: Any) -> LogRing:
    options.setdefault("limit", None)
    options.setdefault("clock", Clock())
    return LogRing(bytearray(HEADER_BYTES + data_bytes), **options)


def records(ring: LogRing) -> list[Record]:
    found = [ring.read(seq) for seq in range(ring.first_seq, ring.next_seq)]
    assert all(isinstance(record, Record) for record in found)
    return [record for record in found if isinstance(record, Record)]


def record(text: bytes, **fields: Any) -> Record:
    values: dict[str, Any] = {"seq": 7, "usec": 5_123_456, "level": 6, "facility": 1, "flags": 0}
    values.update(fields)
    return Record(text=text, **values)


# The ring.


def test_a_new_ring_is_empty() -> None:
    ring = make()
    assert (ring.first_seq, ring.next_seq, ring.clear_seq, ring.console_seq) == (0, 0, 0, 0)
    assert ring.read(0) is None
    assert not ring.readable(0)
    assert ring.size == 4096
    assert ring.console_level == 7
    assert ring.counters == (0, 0, 0, 0, 0, 0)


def test_a_record_is_read_as_it_was_appended() -> None:
    ring = make()
    lines = (b"SUBSYSTEM=acpi", b"DEVICE=+acpi:PNP0A03:00")
    seq = ring.append(b"text", level=3, facility=30, flags=CONT, dictionary=lines, usec=42)
    assert seq == 0
    assert ring.read(0) == Record(0, 42, 3, 30, CONT, b"text", lines)
    assert ring.append(b"") == 1
    assert ring.read(1) == Record(1, 5_123_456, 4, LOG_KERN, 0, b"", ())
    assert ring.read(2) is None
    assert ring.readable(1)
    assert not ring.readable(2)


@pytest.mark.parametrize("priority", [0, 7, 8, 1013, 2038, 2047])
def test_every_level_and_facility_is_kept(priority: int) -> None:
    ring = make()
    ring.append(b"", level=priority & 7, facility=priority >> 3)
    assert records(ring)[0][2:4] == (priority & 7, priority >> 3)


def test_old_records_make_room() -> None:
    ring = make(256)  # each takes 40 bytes
    for n in range(100):
        ring.append(b"%08d" % n)
    assert [r.text for r in records(ring)] == [b"%08d" % n for n in range(94, 100)]
    assert ring.read(0) == Overrun(94)
    assert ring.read(93) == Overrun(94)
    assert ring.readable(0)
    counters = ring.counters
    assert counters == (100, 800, 94, 752, 0, 0)
    assert (counters.dropped_records, counters.dropped_bytes) == (94, 752)


def test_the_index_does_not_grow_with_the_number_of_records() -> None:
    ring = make(256)
    for _ in range(2000):
        ring.append(b"12345678")
    assert len(ring._positions) < 32


def test_a_text_longer_than_the_kernel_has_is_cut() -> None:
    ring = make(65536)
    ring.append(b"x" * 5000)
    assert records(ring)[0].text == b"x" * TEXT_MAX


def test_what_would_take_half_of_a_tiny_ring_is_cut_to_a_quarter() -> None:
    ring = make(256)
    ring.append(b"before")
    ring.append(b"x" * 5000, dictionary=[b"KEY=VALUE"])
    assert [r.text for r in records(ring)] == [b"before", b"x" * 53 + b"<truncated>"]
    assert records(ring)[1].dictionary == ()


def test_a_huge_dictionary_is_left_out() -> None:
    ring = make(65536)
    ring.append(b"text", dictionary=[b"KEY=" + b"x" * 100_000])
    assert records(ring)[0] == (0, 5_123_456, 4, 0, 0, b"text", ())


def test_positions_and_levels_survive() -> None:
    buffer = bytearray(4096)
    ring = LogRing(buffer, clock=Clock())
    for _ in range(3):
        ring.append(b"x")
    ring.set_clear_seq(2)
    ring.set_console_seq(1)
    ring.set_syslog_position(1, 5)
    ring.console_off()
    again = LogRing(buffer)
    assert (again.clear_seq, again.console_seq, again.syslog_position()) == (2, 1, (1, 5))
    assert again.console_level == 1
    again.console_on()
    assert again.console_level == 7
    again.clear()
    assert again.clear_seq == 3
    assert [r.seq for r in records(again)] == [0, 1, 2]
    assert again.append(b"y") == 3


def test_console_level() -> None:
    ring = make()
    ring.console_off()
    ring.console_off()
    ring.console_on()
    assert ring.console_level == 7
    ring.console_on()
    assert ring.console_level == 7
    ring.console_off()
    ring.set_console_level(4)
    ring.console_on()
    assert ring.console_level == 4


def test_the_mapping_of_a_file_is_continued() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(8192)
        with mmap.mmap(file.fileno(), 8192) as first:
            ring = LogRing(first)
            ring.append(b"one")
            ring.close()
        with mmap.mmap(file.fileno(), 8192) as second:
            ring = LogRing(second)
            assert [r.text for r in records(ring)] == [b"one"]
            assert ring.append(b"two") == 1
            ring.close()


def test_a_size_that_is_no_multiple_of_eight() -> None:
    buffer = bytearray(MIN_BYTES + 5)
    ring = LogRing(buffer)
    assert ring.size == 256
    for n in range(20):
        ring.append(b"%d" % n)
    assert LogRing(buffer).next_seq == 20


@pytest.mark.parametrize("length", [0, 511, MIN_BYTES - 1])
def test_a_small_buffer_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="needs"):
        LogRing(bytearray(length))


def test_another_size_or_another_file_is_refused() -> None:
    buffer = bytearray(4096)
    LogRing(buffer)
    with pytest.raises(ValueError, match="size"):
        LogRing(buffer + bytes(8))
    with pytest.raises(ValueError, match="size"):
        LogRing(bytearray(b"#!/bin/sh" + bytes(4096)))


def test_a_state_without_sense_is_refused() -> None:
    buffer = bytearray(4096)
    LogRing(buffer)
    words = memoryview(buffer).cast("Q")
    words[36] = 1 << 40  # HEAD of generation 1
    with pytest.raises(ValueError, match="sense"):
        LogRing(buffer)


@pytest.mark.parametrize("damaged", range(0, 3 * 40, 8))
def test_damaged_records_are_dropped_and_the_numbers_go_on(damaged: int) -> None:
    buffer = bytearray(4096)
    ring = LogRing(buffer, clock=Clock())
    for _ in range(3):
        ring.append(b"12345678")
    buffer[HEADER_BYTES + damaged : HEADER_BYTES + damaged + 8] = b"\xff" * 8
    again = LogRing(buffer)
    if (damaged % 40) in (8, 16, 32):  # time, token and text cannot be wrong
        assert len(records(again)) == 3
        return
    assert records(again) == []
    assert again.read(2) is None
    assert again.counters[:3] == (3, 24, 3)
    assert again.append(b"new") == 3
    assert [r.text for r in records(LogRing(buffer))] == [b"new"]
    assert again.read(2) == Overrun(3)


def test_a_request_asked_again_adds_nothing() -> None:
    buffer = bytearray(4096)
    ring = LogRing(buffer)
    assert ring.append(b"one", token=77) == 0
    assert LogRing(buffer).append(b"one", token=77) == 0
    assert LogRing(buffer).append(b"one", token=78) == 1
    assert LogRing(buffer).append(b"one") == 2
    assert LogRing(buffer).append(b"one") == 3


def test_a_syslog_read_asked_again_starts_where_it_did() -> None:
    buffer = bytearray(4096)
    ring = LogRing(buffer)
    ring.set_syslog_position(3, 9, token=5)
    ring = LogRing(buffer)
    assert ring.syslog_position() == (3, 9)
    assert ring.syslog_position(6) == (3, 9)
    assert ring.syslog_position(5) == (0, 0)
    ring.set_syslog_position(2, 1, token=5)
    assert ring.syslog_position(5) == (0, 0)
    ring.set_syslog_position(4, 0, token=6)
    assert ring.syslog_position(6) == (2, 1)


# The limit.


def test_the_limit_is_a_burst_in_each_interval() -> None:
    clock = Clock()
    ring = make(clock=clock, limit=Limit(rate=2, burst=10))
    assert Limit(rate=2, burst=10).interval_usec == 5_000_000
    results = [ring.append(b"user", facility=LOG_USER) for _ in range(15)]
    assert results == [*range(10), *[None] * 5]
    assert ring.counters[4:] == (5, 20)
    clock.usec += 5_000_000
    assert ring.append(b"user", facility=LOG_USER) is None
    clock.usec += 1
    assert ring.append(b"after", facility=LOG_USER) == 11
    report = records(ring)[10]
    assert report.text == b"kmsg: 6 output lines suppressed due to ratelimiting"
    assert (report.level, report.facility) == (4, LOG_KERN)


def test_processes_cannot_crowd_out_the_kernel() -> None:
    ring = make(limit=Limit(rate=1, burst=1))
    assert ring.append(b"user", facility=LOG_USER) == 0
    assert ring.append(b"user", facility=LOG_USER) is None
    assert ring.append(b"oom", facility=LOG_KERN) == 1
    assert ring.append(b"oom", facility=LOG_KERN) is None


def test_suppressed_records_are_reported_without_another() -> None:
    clock = Clock()
    ring = make(clock=clock, limit=Limit(rate=1, burst=1))
    ring.append(b"x", facility=LOG_USER)
    ring.append(b"x", facility=LOG_USER)
    assert ring.report_suppressed() is None
    clock.usec += 1_000_001
    assert ring.report_suppressed() == 1
    assert ring.report_suppressed() is None
    assert records(ring)[1].text == b"kmsg: 1 output lines suppressed due to ratelimiting"


def test_the_limit_goes_on_in_the_next_process() -> None:
    clock = Clock()
    buffer = bytearray(4096)
    limit = Limit(rate=1, burst=2)
    results = [
        LogRing(buffer, clock=clock, limit=limit).append(b"x", facility=LOG_USER) for _ in range(4)
    ]
    assert results == [0, 1, None, None]
    clock.usec += 2_000_001
    assert LogRing(buffer, clock=clock, limit=limit).append(b"x", facility=LOG_USER) == 3


def test_the_default_limit() -> None:
    ring = make(65536, limit=logring.DEFAULT_LIMIT)
    assert sum(ring.append(b"", facility=LOG_USER) is not None for _ in range(11000)) == 10000


# A model.


def taken(text: bytes, dictionary: list[bytes]) -> int:
    return (32 + len(text) + len(b"\0".join(dictionary)) + 7) & ~7


texts = st.binary(max_size=60)
lines = st.lists(
    st.binary(min_size=1, max_size=8).map(lambda b: b.replace(b"\0", b"0")), max_size=2
)
steps: st.SearchStrategy[tuple[str, bytes, list[bytes]]] = st.one_of(
    st.tuples(st.just("append"), texts, lines),
    st.tuples(st.sampled_from(["clear", "reopen", "position"]), st.just(b""), st.just([])),
    st.tuples(st.sampled_from(["grow", "shrink"]), st.just(b""), st.just([])),
)


@quick
@given(st.lists(steps, max_size=60), st.integers(32, 64))
def test_the_ring_holds_the_newest_records_that_fit(
    todo: list[tuple[str, bytes, list[bytes]]], words: int
) -> None:
    buffer = bytearray(HEADER_BYTES + words * 8)
    ring = LogRing(buffer, clock=Clock(), limit=None)
    model: list[tuple[bytes, list[bytes]]] = []
    first = cleared = 0

    def fit() -> None:
        nonlocal first
        while sum(taken(*one) for one in model[first:]) > ring.size:
            first += 1

    for what, text, dictionary in todo:
        if what == "append":
            if taken(text, dictionary) > ring.size // 2:
                dictionary = []
            assert ring.append(text, dictionary=dictionary) == len(model)
            model.append((text, dictionary))
        elif what == "clear":
            ring.clear()
            cleared = len(model)
        elif what == "position":
            ring.set_syslog_position(len(model), 1)
        elif what == "reopen":
            ring = LogRing(buffer, clock=Clock(), limit=None)
        else:
            length = HEADER_BYTES + (512 if what == "grow" else 256)
            buffer = bytearray(length)
            ring = ring.copy_into(buffer)
        fit()
        assert ring.next_seq == len(model)
        assert ring.first_seq == first
        assert ring.clear_seq == cleared
        assert ring.counters[2] == first
    assert [(r.text, list(r.dictionary)) for r in records(ring)] == model[first:]
    assert [r.seq for r in records(ring)] == list(range(first, len(model)))
    assert records(LogRing(buffer)) == records(ring)


# Crashes.


class Crashing(LogRing):
    """Calls `crash` with what the buffer may hold if the process dies, at each store."""

    crash: Callable[[bytes], None]
    torn = random.Random(1)

    def _tear(self, start: int, data: bytes) -> None:
        # Killed in a memcpy: any bytes of it may be there, and garbage as well.
        for chance in (0.1, 0.5, 0.9):
            image = bytearray(self._buffer)
            for n, byte in enumerate(data):
                if self.torn.random() < chance:
                    image[start + n] = byte if chance != 0.5 else self.torn.randrange(256)
            self.crash(bytes(image))

    def _put(self, start: int, data: bytes) -> None:
        self._tear(start, data)
        super()._put(start, data)
        self.crash(bytes(self._buffer))

    def _put_state(self, start: int) -> None:
        self._tear(start * 8, self._state.tobytes())
        super()._put_state(start)
        self.crash(bytes(self._buffer))

    def _put_word(self, index: int, value: int) -> None:
        super()._put_word(index, value)
        self.crash(bytes(self._buffer))


def test_a_kill_while_a_ring_is_made_leaves_none_or_a_whole_one() -> None:
    images: list[bytes] = []
    made = type("Made", (Crashing,), {"crash": lambda self, image: images.append(image)})
    made(bytearray(MIN_BYTES))
    assert len(images) > 5
    for image in images:
        ring = LogRing(bytearray(image))
        assert (ring.first_seq, ring.next_seq, ring.console_level) == (0, 0, 7)
        assert ring.append(b"x") == 0


@settings(max_examples=12, deadline=None)
@given(st.lists(st.binary(max_size=80), min_size=1, max_size=10), st.integers(0, 2**32))
def test_a_kill_at_any_store_loses_nothing_but_the_record_under_way(
    todo: list[bytes], seed: int
) -> None:
    before: list[Record] = []
    wanted: tuple[bytes, ...] = ()
    next_seq = 0
    left: list[int] = []

    def crash(self: Crashing, image: bytes) -> None:
        ring = LogRing(bytearray(image), clock=Clock(), limit=None)
        found = records(ring)
        assert ring.next_seq in (next_seq, next_seq + 1)
        texts = [(r.seq, r.text) for r in found]
        if ring.next_seq == next_seq + 1:
            assert texts.pop()[0] == next_seq
            assert (found[-1].text,) == wanted
        # Of the old ones the oldest may be gone already, never one in the middle.
        assert texts == [(r.seq, r.text) for r in before][len(before) - len(texts) :]
        left.append(len(texts))
        assert ring.append(b"next") == ring.next_seq - 1
        assert records(ring)[-1].text == b"next"

    ring = LogRing(bytearray(MIN_BYTES), clock=Clock(), limit=None)
    for n in range(5):
        ring.append(b"%016d" % n)
    ring.__class__ = type("Killed", (Crashing,), {"crash": crash, "torn": random.Random(seed)})
    for text in todo:
        before = records(ring)
        left.clear()
        next_seq = ring.next_seq
        wanted = ring._fitting(text, b"")[:1]
        ring.append(text)
        # Nor are more gone than had to make room.
        assert min(left) == len(records(ring)) - 1


def test_a_kill_at_any_store_of_a_position() -> None:
    seen: set[tuple[tuple[int, int], tuple[int, int]]] = set()

    def crash(self: Crashing, image: bytes) -> None:
        ring = LogRing(bytearray(image))
        seen.add((ring.syslog_position(), ring.syslog_position(8)))

    ring = make(256)
    ring.set_syslog_position(1, 2, token=7)
    ring.__class__ = type("Killed", (Crashing,), {"crash": crash})
    ring.set_syslog_position(3, 4, token=8)
    assert seen == {((1, 2), (1, 2)), ((3, 4), (1, 2))}


# What is written.


@pytest.mark.parametrize(
    ("data", "level", "facility", "text"),
    [
        (b"plain\n", 4, 1, b"plain"),
        (b"plain", 4, 1, b"plain"),
        (b"", 4, 1, b""),
        (b"\n", 4, 1, b""),
        (b"<6>text", 6, 1, b"text"),
        (b"<12>text\n", 4, 1, b"text"),
        (b"<30>udevd[80]: starting version 181\n", 6, 3, b"udevd[80]: starting version 181"),
        (b"<3>nsfs facility 0\n", 3, 1, b"nsfs facility 0"),  # measured: 11
        (b"<>nsfs empty prefix\n", 0, 1, b"nsfs empty prefix"),  # measured: 8
        (b"<42949672959990>big\n", 6, 254, b"big"),  # measured: 2038
        (b"<2047>x", 7, 255, b"x"),
        (b"<2048>x", 0, 1, b"x"),
        (b"<4294967295>x", 7, 255, b"x"),
        (b"<4294967296>x", 0, 1, b"x"),
        (b"<4 nsfs malformed\n", 4, 1, b"<4 nsfs malformed"),  # measured
        (b"<-1>x", 4, 1, b"<-1>x"),
        (b"< 4>x", 4, 1, b"< 4>x"),
        (b"<0x4>x", 4, 1, b"<0x4>x"),
        (b" <4>x", 4, 1, b" <4>x"),
        (b"<4", 4, 1, b"<4"),
        (b"<4>", 4, 1, b""),
        (b"<4><5>x", 4, 1, b"<5>x"),
        (b"nsfs nul\0rest\n", 4, 1, b"nsfs nul"),  # measured
        (b"<4\0>x", 4, 1, b"<4"),
        (b"nsfs a\nb\n\n", 4, 1, b"nsfs a\nb\n"),  # measured
        (b"x" * 1023 + b"\n", 4, 1, b"x" * 1023),
        (b"x" * 1024, 4, 1, b"x" * 1023),
        (b"<30>" + b"Y" * 1020, 6, 3, b"Y" * 1020),  # measured
    ],
)
def test_parse_write(data: bytes, level: int, facility: int, text: bytes) -> None:
    assert parse_write(data) == Written(level, facility, text)


def test_a_long_write_is_refused() -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        parse_write(b"x" * 1025)  # measured
    assert caught.value.errno == errno.EINVAL


@quick
@given(st.binary(max_size=1024), st.integers(0, 7))
def test_a_write_never_makes_a_kernel_record(data: bytes, level: int) -> None:
    written = parse_write(data, level)
    assert 1 <= written.facility <= 255
    assert 0 <= written.level <= 7
    assert b"\0" not in written.text
    assert len(written.text) <= TEXT_MAX


# What is read.


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (  # measured
            record(b"nsfs fmt \t\\ \xc3\xa9 \x7f~ [end]", seq=354, usec=1650027845, level=4),
            b"12,354,1650027845,-;nsfs fmt \\x09\\x5c \\xc3\\xa9 \\x7f~ [end]\n",
        ),
        (  # measured
            record(b"nsfs a\nb\n", seq=359, usec=1650028734, level=4),
            b"12,359,1650028734,-;nsfs a\\x0ab\\x0a\n",
        ),
        (  # Documentation/ABI/testing/dev-kmsg
            record(
                b"pci_root PNP0A03:00: host bridge window [io  0x0000-0x0cf7] (ignored)",
                seq=160,
                usec=424069,
                level=7,
                facility=0,
                dictionary=(b"SUBSYSTEM=acpi", b"DEVICE=+acpi:PNP0A03:00"),
            ),
            b"7,160,424069,-;pci_root PNP0A03:00: host bridge window [io  0x0000-0x0cf7]"
            b" (ignored)\n SUBSYSTEM=acpi\n DEVICE=+acpi:PNP0A03:00\n",
        ),
        (  # Documentation/ABI/testing/dev-kmsg
            record(b"udevd[80]: starting version 181", seq=340, usec=5690716, facility=3),
            b"30,340,5690716,-;udevd[80]: starting version 181\n",
        ),
        (record(b"", flags=CONT), b"14,7,5123456,c;\n"),
        (record(b"x", dictionary=(b"A=", b"B=\n\\", b"C")), b"14,7,5123456,-;x\n B=\\x0a\\x5c\n"),
    ],
)
def test_format_kmsg(one: Record, expected: bytes) -> None:
    assert format_kmsg(one) == expected


def test_format_kmsg_escapes_what_the_kernel_escapes() -> None:
    for c in range(256):
        expected = b"\\x%02x" % c if c < 32 or c >= 127 or c == 0x5C else bytes((c,))
        assert format_kmsg(record(bytes((c,)))) == b"14,7,5123456,-;" + expected + b"\n"


def test_format_kmsg_is_cut_as_the_kernel_cuts() -> None:
    # Measured: a 20-byte header, 8 plain bytes and 1,000 escapes gave 2,048 bytes that end so.
    one = record(b"nsfs esc" + b"\x01" * 1000, seq=363, usec=1650028788, level=4)
    data = format_kmsg(one)
    assert len(data) == FORMATTED_MAX
    assert data.endswith(b"\\x01\\x01\\x0\n")
    # A plain character takes the byte that is left, and then there is no newline.
    assert format_kmsg(record(one.text + b"yz")).endswith(b"y")
    exactly = record(b"x" * (FORMATTED_MAX - 16 - 1003) + b"x" * 1003)
    assert len(format_kmsg(exactly)) == FORMATTED_MAX
    assert format_kmsg(exactly).endswith(b"x\n")


@quick
@given(st.binary(max_size=TEXT_MAX), st.lists(st.binary(max_size=400), max_size=3))
def test_format_kmsg_is_printable_lines(text: bytes, dictionary: list[bytes]) -> None:
    data = format_kmsg(record(text, dictionary=tuple(dictionary)))
    assert len(data) <= FORMATTED_MAX
    assert all(32 <= c < 127 or c == 10 for c in data)
    one = format_text(record(text))
    assert one.endswith(b"\n")
    assert one.count(b"\n") == 1
    if len(one) < 2000 and not dictionary:
        assert data == one


def test_format_text_is_never_cut() -> None:
    assert format_text(record(b"\xff" * 1000)) == b"14,7,5123456,-;" + b"\\xff" * 1000 + b"\n"


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (record(b"text"), b"<14>[    5.123456] text\n"),
        (record(b"", usec=0, facility=0), b"<6>[    0.000000] \n"),
        (record(b"x", usec=123456789012345), b"<14>[123456789.012345] x\n"),
        (  # measured
            record(b"nsfs a\nb\n", usec=1650028734, level=4),
            b"<12>[ 1650.028734] nsfs a\n<12>[ 1650.028734] b\n<12>[ 1650.028734] \n",
        ),
        (record(b"raw \x01\\\xff"), b"<14>[    5.123456] raw \x01\\\xff\n"),
    ],
)
def test_format_syslog(one: Record, expected: bytes) -> None:
    assert format_syslog(one) == expected
    assert syslog_length(one) == len(expected)


def test_format_syslog_without_time() -> None:
    assert format_syslog(record(b"a\nb"), time=False) == b"<14>a\n<14>b\n"
    assert syslog_length(record(b"a\nb"), time=False) == 12


def test_format_syslog_drops_lines_as_the_kernel_does() -> None:
    # Measured: of this record klogctl(3) gave 2,047 bytes, whole lines, the last one of one byte.
    one = record(b"nsfs lines" + b"x\n" * 299 + b"x", usec=1650028790, level=4)
    data = format_syslog(one)
    assert len(data) == 2047
    assert data.startswith(b"<12>[ 1650.028790] nsfs linesx\n<12>[ 1650.028790] x\n<12>")
    assert data.endswith(b"\n<12>[ 1650.028790] x\n")
    assert syslog_length(one) > FORMATTED_MAX


def kernels_print_text(text: bytes, prefix: bytes) -> bytes:
    """record_print_text() with its buffer, moved as it moves it."""
    buffer = bytearray(FORMATTED_MAX)
    buffer[: len(text)] = text
    at, text_len, length, truncated = 0, len(text), 0, False
    while True:
        next_at = buffer.find(b"\n", at, at + text_len)
        if next_at >= 0:
            line_len = next_at - at
        elif truncated:
            break
        else:
            line_len = text_len
        if length + len(prefix) + text_len + 2 > FORMATTED_MAX:
            if length + len(prefix) + line_len + 2 > FORMATTED_MAX:
                break
            text_len = FORMATTED_MAX - length - len(prefix) - 2
            truncated = True
        buffer[at + len(prefix) : at + len(prefix) + text_len] = buffer[at : at + text_len]
        buffer[at : at + len(prefix)] = prefix
        length += len(prefix) + line_len + 1
        if text_len == line_len:
            buffer[at + len(prefix) + line_len] = 10
            break
        at += len(prefix) + line_len + 1
        text_len -= line_len + 1
    return bytes(buffer[:length])


@quick
@given(st.lists(st.integers(0, 90), max_size=150), st.booleans())
def test_format_syslog_is_record_print_text(lengths: list[int], with_time: bool) -> None:
    text = b"\n".join(b"x" * n for n in lengths)[:TEXT_MAX]
    prefix = b"<14>[    5.123456] " if with_time else b"<14>"
    assert format_syslog(record(text), time=with_time) == kernels_print_text(text, prefix)


def test_what_is_echoed_has_a_limit_of_its_own() -> None:
    clock = Clock()
    log = LogRing(bytearray(16384), clock=clock, limit=Limit(1, 3))
    for number in range(5):
        log.append(b"%d" % number, facility=1)
        log.append(b"[a] %d" % number, facility=1, flags=ECHO)
        log.append(b"k%d" % number, facility=0)
    found = [log.read(seq) for seq in range(log.next_seq)]
    kept = [each.text for each in found if isinstance(each, Record)]
    assert kept == [b"0", b"[a] 0", b"k0", b"1", b"[a] 1", b"k1", b"2", b"[a] 2", b"k2"]
    assert log.counters.suppressed_records == 6
    # What does not count for the limit is let in all the same.
    assert log.append(b"free", facility=0, limited=False) == 9


def test_another_limit_at_once() -> None:
    log = LogRing(bytearray(16384), clock=Clock(), limit=Limit(1, 2))
    for number in range(5):
        log.append(b"%d" % number, facility=1)
    log.set_limit(None)
    log.append(b"many", facility=1)
    log.report_suppressed()
    log.set_limit(Limit(1, 1))
    assert log.append(b"one", facility=1) is not None
    assert log.append(b"two", facility=1) is None
    kept = [each.text for n in range(log.next_seq) if isinstance(each := log.read(n), Record)]
    told = b"kmsg: 3 output lines suppressed due to ratelimiting"
    assert kept == [b"0", b"1", b"many", told, b"one"]


def test_what_the_console_did_not_take_is_counted_for_ever() -> None:
    buffer = bytearray(8192)
    log = LogRing(buffer)
    log.count_console_dropped(3)
    log = LogRing(buffer)
    log.count_console_dropped(2)
    assert log.console_dropped == 5
    assert log.copy_into(bytearray(4096)).console_dropped == 5
