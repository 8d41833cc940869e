"""Open files on a log: what each system call gives, and how the next daemon goes on.

"Measured" is what a Linux 6.18 did with its own /dev/kmsg and syslog(2); the tests themselves touch
no log of the machine.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from nsfs.logring import (
    HEADER_BYTES,
    Limit,
    LogRing,
    Record,
    format_syslog,
    format_text,
    syslog_length,
)
from nsfs.logstream import (
    SIZE,
    SYSLOG_ACTION_CLEAR,
    SYSLOG_ACTION_CLOSE,
    SYSLOG_ACTION_CONSOLE_LEVEL,
    SYSLOG_ACTION_CONSOLE_OFF,
    SYSLOG_ACTION_CONSOLE_ON,
    SYSLOG_ACTION_OPEN,
    SYSLOG_ACTION_READ,
    SYSLOG_ACTION_READ_ALL,
    SYSLOG_ACTION_READ_CLEAR,
    SYSLOG_ACTION_SIZE_BUFFER,
    SYSLOG_ACTION_SIZE_UNREAD,
    DeviceReader,
    Log,
    ProcReader,
    State,
    TextReader,
    needs_capability,
    syslog_action,
)

quick = settings(max_examples=40, deadline=None)

BIG = 8192
IN = select.EPOLLIN | select.EPOLLRDNORM


def make(data_bytes: int = 4096, limit: Limit | None = None) -> Log:
    return Log(LogRing(bytearray(HEADER_BYTES + data_bytes), clock=lambda: 5_123_456, limit=limit))


def fill(log: Log, *texts: bytes) -> None:
    for text in texts:
        log.append(text, level=6, facility=1)


def device(seq: int, text: bytes) -> bytes:
    return b"14,%d,5123456,-;%s\n" % (seq, text)


def proc(text: bytes) -> bytes:
    return b"<14>[    5.123456] %s\n" % text


def wrap(log: Log) -> int:
    """Overwrite all that is there; the oldest record left."""
    before = log.ring.next_seq
    while log.ring.first_seq < before:
        fill(log, b"x" * 50)
    return log.ring.first_seq


@contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        yield
    assert caught.value.errno == number


# Log.


async def test_a_record_wakes_every_waiter(autojump_clock: trio.testing.MockClock) -> None:
    log = make()
    woken = []

    async def wait(n: int) -> None:
        await log.wait_past(0)
        woken.append(n)

    async with trio.open_nursery() as nursery:
        for n in range(50):
            nursery.start_soon(wait, n)
        await wait_all_tasks_blocked()
        assert woken == []
        fill(log, b"x")
    assert sorted(woken) == list(range(50))


async def test_a_later_record_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    log = make()
    with trio.move_on_after(1) as scope:
        await log.wait_past(0)
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.wait_past, 1)
        await wait_all_tasks_blocked()
        fill(log, b"x")
        await wait_all_tasks_blocked()
        assert nursery.child_tasks
        fill(log, b"x")
    await log.wait_past(0)


def test_callbacks_are_called_once() -> None:
    log = make()
    called: list[str] = []
    log.notify_once("a", lambda: called.append("replaced"))
    log.notify_once("a", lambda: called.append("a"))
    log.notify_once("b", lambda: called.append("b"))
    log.notify_once("c", lambda: called.append("c"))
    log.forget("b")
    log.forget("b")
    fill(log, b"x", b"y")
    assert called == ["a", "c"]


def test_a_callback_may_ask_for_another() -> None:
    log = make()
    called: list[int] = []

    def again() -> None:
        called.append(1)
        log.notify_once("a", again)

    again()
    fill(log, b"x", b"y")
    assert len(called) == 3


def test_suppressed_records_wake_nobody_but_their_report_does() -> None:
    now = 1
    ring = LogRing(bytearray(4096), clock=lambda: now, limit=Limit(1, 1))
    log = Log(ring)
    called: list[int] = []
    assert log.write(b"one") == 3
    log.notify_once("a", lambda: called.append(1))
    assert log.write(b"two") == 3
    log.report_suppressed()
    assert called == []
    now += 1_000_001
    log.report_suppressed()
    assert called == [1]


def test_write() -> None:
    log = make()
    assert log.write(b"<30>text\n") == 9
    found = log.ring.read(0)
    assert isinstance(found, Record)
    assert found[2:6] == (6, 3, 0, b"text")
    with fails(errno.EINVAL):
        log.write(b"x" * 1025)
    assert log.ring.next_seq == 1


def test_a_write_asked_again_is_written_once() -> None:
    log = make()
    assert log.write(b"one", token=5) == 3
    assert log.write(b"one", token=5) == 3
    assert log.ring.next_seq == 1


# /dev/kmsg.


async def test_device_gives_a_record_a_read() -> None:
    log = make()
    fill(log, b"one", b"two\nlines")
    reader = DeviceReader(log)
    first = await reader.read(BIG, 0, nonblock=True)
    assert first == device(0, b"one")
    second = await reader.read(BIG, len(first), nonblock=True)
    assert second == device(1, b"two\\x0alines")
    end = len(first) + len(second)
    with fails(errno.EAGAIN):
        await reader.read(BIG, end, nonblock=True)
    fill(log, b"three")
    assert await reader.read(BIG, end, nonblock=True) == device(2, b"three")


async def test_device_readers_do_not_disturb_each_other() -> None:
    log = make()
    fill(log, b"one")
    for _ in range(3):
        assert await DeviceReader(log).read(BIG, 0, nonblock=True) == device(0, b"one")


async def test_device_begins_at_the_first_record_there_is() -> None:
    log = make(256)
    fill(log, b"gone")
    oldest = wrap(log)
    data = await DeviceReader(log).read(BIG, 0, nonblock=True)
    assert data == device(oldest, b"x" * 50)


async def test_device_waits(autojump_clock: trio.testing.MockClock) -> None:
    log = make()
    readers = [DeviceReader(log) for _ in range(3)]
    got: list[bytes] = []

    async def read(reader: DeviceReader) -> None:
        got.append(await reader.read(BIG, 0, nonblock=False))

    async with trio.open_nursery() as nursery:
        for reader in readers:
            nursery.start_soon(read, reader)
        await wait_all_tasks_blocked()
        fill(log, b"one")
    assert got == [device(0, b"one")] * 3


async def test_a_cancelled_read_leaves_everything(autojump_clock: trio.testing.MockClock) -> None:
    log = make()
    reader = DeviceReader(log)
    state = reader.state
    with trio.move_on_after(5):
        await reader.read(BIG, 0, nonblock=False)
    assert reader.state == state
    assert not log._parked
    fill(log, b"one")
    assert await reader.read(BIG, 0, nonblock=False) == device(0, b"one")


async def test_two_reads_of_one_open_file_get_two_records(
    autojump_clock: trio.testing.MockClock,
) -> None:
    log = make()
    reader = DeviceReader(log)
    got: list[bytes] = []

    async def read() -> None:
        got.append(await reader.read(BIG, 0, nonblock=False))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        fill(log, b"one")
        await wait_all_tasks_blocked()
        assert got == [device(0, b"one")]
        fill(log, b"two")
    assert got[1] == device(1, b"two")


async def test_a_small_buffer_loses_the_record_as_in_the_kernel() -> None:
    # Measured: a read of 5 bytes is EINVAL, and the next read gives the record after that one.
    log = make()
    fill(log, b"one", b"two", b"three")
    reader = DeviceReader(log)
    with fails(errno.EINVAL):
        await reader.read(5, 0, nonblock=True)
    exact = len(device(1, b"two"))
    assert await reader.read(exact, 0, nonblock=True) == device(1, b"two")
    with fails(errno.EINVAL):
        await reader.read(exact + 1, exact, nonblock=True)


async def test_an_overrun_is_told_once() -> None:
    log = make(256)
    fill(log, b"one", b"two")
    reader = DeviceReader(log)
    data = await reader.read(BIG, 0, nonblock=True)
    assert reader.poll() == IN
    oldest = wrap(log)
    assert reader.poll() == IN | select.EPOLLERR | select.EPOLLPRI
    with fails(errno.EPIPE):
        await reader.read(BIG, len(data), nonblock=True)
    assert reader.poll() == IN
    assert await reader.read(BIG, len(data), nonblock=True) == device(oldest, b"x" * 50)


async def test_an_overrun_while_it_waits(autojump_clock: trio.testing.MockClock) -> None:
    log = make(256)
    reader = DeviceReader(log)
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with fails(errno.EPIPE):
                await reader.read(BIG, 0, nonblock=False)

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        fill(log, b"one")
        wrap(log)
    assert reader.state[0] == log.ring.first_seq


async def test_poll_of_a_device() -> None:
    log = make()
    reader = DeviceReader(log)
    called: list[int] = []
    assert reader.poll(lambda: called.append(1)) == 0
    fill(log, b"one")
    assert called == [1]
    assert reader.poll(lambda: called.append(2)) == IN
    reader.close()
    fill(log, b"two")
    assert called == [1]


async def test_offsets_are_seeks() -> None:
    log = make()
    fill(log, b"one", b"two")
    reader = DeviceReader(log)
    first = await reader.read(BIG, 0, nonblock=True)
    second = await reader.read(BIG, len(first), nonblock=True)
    assert second == device(1, b"two")
    # SEEK_SET 0
    assert await reader.read(BIG, 0, nonblock=True) == first
    # SEEK_END 0
    with fails(errno.EAGAIN):
        await reader.read(BIG, SIZE, nonblock=True)
    fill(log, b"three")
    third = await reader.read(BIG, SIZE, nonblock=True)
    assert third == device(2, b"three")
    fill(log, b"four")
    assert await reader.read(BIG, SIZE + len(third), nonblock=True) == device(3, b"four")
    # SEEK_END 0 again
    fill(log, b"five")
    with fails(errno.EAGAIN):
        await reader.read(BIG, SIZE, nonblock=True)


async def test_an_offset_that_no_seek_gives_is_no_seek() -> None:
    # Measured: the kernel's pread at offset 7 gives the next record.
    log = make()
    fill(log, b"one", b"two")
    reader = DeviceReader(log)
    assert await reader.read(BIG, 7, nonblock=True) == device(0, b"one")
    assert await reader.read(BIG, 9, nonblock=True) == device(1, b"two")


async def test_seek() -> None:
    log = make()
    fill(log, b"one", b"two")
    log.ring.clear()
    fill(log, b"three")
    reader = DeviceReader(log)
    assert reader.seek(0, os.SEEK_DATA) == 0
    assert await reader.read(BIG, 0, nonblock=True) == device(2, b"three")
    assert reader.seek(0, os.SEEK_SET) == 0
    assert await reader.read(BIG, 0, nonblock=True) == device(0, b"one")
    assert reader.seek(0, os.SEEK_END) == 0
    with fails(errno.EAGAIN):
        await reader.read(BIG, 0, nonblock=True)


@pytest.mark.parametrize(
    ("offset", "whence", "number"),
    [  # measured, all of them
        (0, os.SEEK_CUR, errno.EINVAL),
        (0, os.SEEK_HOLE, errno.EINVAL),
        (0, 9, errno.EINVAL),
        (5, os.SEEK_CUR, errno.ESPIPE),
        (5, os.SEEK_SET, errno.ESPIPE),
        (1, os.SEEK_END, errno.ESPIPE),
        (1, os.SEEK_DATA, errno.ESPIPE),
    ],
)
def test_seek_errors(offset: int, whence: int, number: int) -> None:
    reader = DeviceReader(make())
    state = reader.state
    with fails(number):
        reader.seek(offset, whence)
    assert reader.state == state


async def test_seek_to_a_clear_that_was_overwritten() -> None:
    log = make(256)
    fill(log, b"one")
    log.ring.clear()
    fill(log, b"two")
    reader = DeviceReader(log)
    oldest = wrap(log)
    reader.seek(0, os.SEEK_DATA)
    with fails(errno.EPIPE):
        await reader.read(BIG, 0, nonblock=True)
    assert await reader.read(BIG, 0, nonblock=True) == device(oldest, b"x" * 50)


async def test_state_is_saved_before_a_read_waits(autojump_clock: trio.testing.MockClock) -> None:
    log = make()
    fill(log, b"one")
    saved: list[State] = []
    reader = DeviceReader(log, save=lambda *state: saved.append(state))
    with trio.move_on_after(1):
        await reader.read(BIG, SIZE, nonblock=False, token=3)
    assert saved == [(1, SIZE, 0)]
    # The next daemon does not go to an end that is further on by then.
    fill(log, b"two")
    again = DeviceReader(log, saved[-1])
    assert await again.read(BIG, SIZE, nonblock=False, token=3) == device(1, b"two")


@quick
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "overwrite", "read", "small", "rewind", "end", "data"]),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_a_daemon_that_dies_after_a_read_changes_nothing(todo: list[tuple[str, bool]]) -> None:
    """A daemon that dies before it answered, and one that never dies, give the same answers."""

    async def answer(reader: DeviceReader, size: int, offset: int, token: int) -> bytes | int:
        try:
            return await reader.read(size, offset, nonblock=True, token=token)
        except OSError as error:
            return error.errno or 0

    async def run() -> None:
        log = make(512)
        steady = DeviceReader(log)
        state = steady.state
        offset = 0
        for token, (what, dies) in enumerate(todo, 1):
            if what == "append":
                fill(log, b"text")
            elif what == "overwrite":
                fill(log, b"x")
                wrap(log)
            elif what == "rewind":
                offset = 0
            elif what == "end":
                offset = SIZE
            elif what == "data":
                steady.seek(0, os.SEEK_DATA)
                mortal = DeviceReader(log, state)
                offset = mortal.seek(0, os.SEEK_DATA)
                state = mortal.state
            else:
                size = 5 if what == "small" else BIG
                expected = await answer(steady, size, offset, 0)
                for _ in range(1 + 2 * dies):
                    kept = [state]
                    mortal = DeviceReader(log, state, lambda *new, kept=kept: kept.append(new))
                    assert await answer(mortal, size, offset, token) == expected
                    state = kept[-1]
                    assert state == mortal.state
                if isinstance(expected, bytes):
                    offset += len(expected)

    trio.run(run)


# /proc/kmsg.


async def test_proc_gives_whole_records() -> None:
    log = make()
    fill(log, b"one", b"two\nlines", b"three")
    reader = ProcReader(log)
    assert reader.poll() == IN
    both = proc(b"one") + proc(b"two") + proc(b"lines")
    assert await reader.read(len(both) + 5, nonblock=False) == both
    assert await reader.read(BIG, nonblock=False) == proc(b"three")
    assert reader.poll() == 0
    with fails(errno.EAGAIN):
        await reader.read(BIG, nonblock=True)
    assert await reader.read(0, nonblock=False) == b""


async def test_proc_goes_on_in_the_middle_of_a_record() -> None:
    log = make()
    fill(log, b"one", b"two")
    data = b""
    while len(data) < len(proc(b"one") + proc(b"two")):
        part = await ProcReader(log).read(5, nonblock=True)
        assert 0 < len(part) <= 5
        data += part
    assert data == proc(b"one") + proc(b"two")
    with fails(errno.EAGAIN):
        await ProcReader(log).read(5, nonblock=True)


async def test_all_proc_readers_and_syslog_share_the_position() -> None:
    log = make()
    fill(log, b"one", b"two", b"three")
    one = len(proc(b"one"))
    assert await ProcReader(log).read(one, nonblock=True) == proc(b"one")
    assert syslog_action(log.ring, SYSLOG_ACTION_READ, one) == (one, proc(b"two"))
    assert await ProcReader(log).read(BIG, nonblock=True) == proc(b"three")
    # and disturb nobody else
    assert await DeviceReader(log).read(BIG, 0, nonblock=True) == device(0, b"one")


async def test_of_waiting_proc_readers_one_gets_the_record(
    autojump_clock: trio.testing.MockClock,
) -> None:
    log = make()
    got: list[bytes] = []

    async def read() -> None:
        got.append(await ProcReader(log).read(BIG, nonblock=False))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read)
        await wait_all_tasks_blocked()
        fill(log, b"one")
        await wait_all_tasks_blocked()
        assert got == [proc(b"one")]
        fill(log, b"two")
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert got == [proc(b"one"), proc(b"two")]


async def test_proc_goes_on_after_an_overrun() -> None:
    log = make(256)
    fill(log, b"one")
    reader = ProcReader(log)
    await reader.read(5, nonblock=True)
    wrap(log)
    left = log.ring.next_seq - log.ring.first_seq
    assert await reader.read(BIG, nonblock=True) == proc(b"x" * 50) * left


async def test_proc_poll_notifies() -> None:
    log = make()
    reader = ProcReader(log)
    called: list[int] = []
    assert reader.poll(lambda: called.append(1)) == 0
    fill(log, b"one")
    assert called == [1]
    reader.poll(lambda: called.append(2))
    reader.close()
    fill(log, b"two")
    assert called == [1]


@quick
@given(st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=20))
def test_a_daemon_that_dies_loses_nothing_of_proc(reads: list[tuple[int, bool]]) -> None:
    log = make()
    fill(log, b"one", b"two\nlines", b"three", b"", b"five")
    everything = b"".join(map(proc, (b"one", b"two", b"lines", b"three", b"", b"five")))

    async def run() -> None:
        data = b""
        for token, (size, dies) in enumerate(reads, 1):
            if len(data) == len(everything):
                break
            part = await ProcReader(log).read(size, nonblock=True, token=token)
            if dies:
                assert await ProcReader(log).read(size, nonblock=True, token=token) == part
            data += part
        assert data == everything[: len(data)]

    trio.run(run)


# The outer file.


def lines(log: Log) -> bytes:
    found = [log.ring.read(seq) for seq in range(log.ring.first_seq, log.ring.next_seq)]
    return b"".join(format_text(one) for one in found if isinstance(one, Record))


def read_all(reader: TextReader, size: int = BIG, offset: int = 0) -> bytes:
    data = b""
    while part := reader.read(size, offset + len(data)):
        assert len(part) <= size
        data += part
    return data


@pytest.mark.parametrize("size", [1, 2, 7, 64, 4096, 131072])
def test_text_is_a_line_a_record(size: int) -> None:
    log = make()
    fill(log, b"one", b"two\nlines", b"")
    expected = device(0, b"one") + device(1, b"two\\x0alines") + device(2, b"")
    assert read_all(TextReader(log), size) == expected


def test_text_grows() -> None:
    log = make()
    reader = TextReader(log)
    assert reader.read(BIG, 0) == b""
    assert reader.poll() == 0
    called: list[int] = []
    reader.poll(lambda: called.append(1))
    fill(log, b"one")
    assert called == [1]
    assert reader.poll() == IN
    first = reader.read(BIG, 0)
    assert first == device(0, b"one")
    assert reader.poll() == 0
    assert reader.read(BIG, len(first)) == b""
    fill(log, b"two")
    assert reader.read(BIG, len(first)) == device(1, b"two")
    assert reader.read(BIG, 0) == first + device(1, b"two")
    reader.close()


def test_text_ends_at_once_for_who_seeks_to_the_end() -> None:
    log = make()
    fill(log, b"one")
    reader = TextReader(log)
    # lseek(2) to the end asks for the size; it is only told of when something is read.
    end = log.text_size()
    assert end == len(device(0, b"one"))
    fill(log, b"two")
    data = reader.read(BIG, end)
    assert data == device(1, b"two")
    assert reader.read(BIG, end + len(data)) == b""
    assert TextReader(log).read(BIG, end + len(data) + 1) == b""
    assert TextReader(log).read(3, end + 2) == data[2:5]


def test_the_size_of_text_grows_until_it_is_cleared() -> None:
    kept: list[tuple[int, int, int]] = []
    log = make(512)
    log = Log(log.ring, None, lambda *state: kept.append(state))
    total = 0
    for n in range(40):
        fill(log, b"record %d" % n)
        total += len(device(n, b"record %d" % n))
        assert log.text_size() == total
    # The next daemon goes on with it.
    again = Log(log.ring, kept[-1])
    assert again.text_size() == total
    assert TextReader(again).read(BIG, total - 4) == device(39, b"record 39")[-4:]
    log.ring.clear()
    assert log.text_size() == again.text_size() == 0
    fill(log, b"new")
    assert log.text_size() == again.text_size() == len(device(40, b"new"))


def test_text_without_what_was_cleared() -> None:
    log = make()
    fill(log, b"one", b"two")
    reader, halfway = TextReader(log), TextReader(log)
    assert reader.read(BIG, 0) == lines(log)
    halfway.read(3, 0)
    end = reader.state[0]
    log.ring.clear()
    assert reader.poll() == 0
    assert TextReader(log).poll() == 0
    assert TextReader(log).read(BIG, 0) == b""
    fill(log, b"three")
    assert reader.read(BIG, end) == device(2, b"three")
    assert halfway.read(BIG, 3) == b"\n" + device(2, b"three")


@pytest.mark.parametrize("begun", [0, 5])
def test_text_goes_on_at_the_oldest_line(begun: int) -> None:
    log = make(256)
    fill(log, b"one", b"two")
    reader = TextReader(log)
    first = reader.read(len(device(0, b"one")) + begun, 0)
    wrap(log)
    rest = read_all(reader, 7, len(first))
    assert rest == b"\n" * bool(begun) + lines(log)


def test_text_with_a_state_that_fits_no_line() -> None:
    log = make()
    fill(log, b"one", b"two")
    assert read_all(TextReader(log, (5, 0, 1000)), 7, 5) == device(1, b"two")
    assert TextReader(log, (5, 99, 1)).read(BIG, 5) == b""


def test_text_at_other_offsets() -> None:
    log = make()
    fill(log, *(b"%d" % n for n in range(40)))
    everything = lines(log)
    reader = TextReader(log)
    for offset in (100, 90, 1, 500, 499, 0, 3, 700, 20):
        assert reader.read(50, offset) == everything[offset : offset + 50]
    # Beyond the end there is nothing, and a read there changes nothing.
    state = reader.state
    assert reader.read(50, len(everything) + 1) == b""
    assert reader.state == state
    assert reader.read(50, 70) == everything[70:120]


@quick
@given(
    st.lists(st.one_of(st.binary(max_size=20), st.integers(1, 100)), max_size=30),
    st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_text_read_in_any_way_by_any_daemon(todo: list[bytes | int], dies: list[bool]) -> None:
    log = make()
    state: State = (0, 0, 0)
    data = b""

    def save(*new: int) -> None:
        nonlocal state
        state = new[0], new[1], new[2]

    for step, killed in zip(todo, dies, strict=False):
        if isinstance(step, bytes):
            fill(log, step)
            continue
        part = TextReader(log, state, save).read(step, len(data))
        if killed:
            # Answered by nobody: the next daemon is asked the same.
            part = TextReader(log, state, save).read(step, len(data))
        data += part
    assert data == lines(log)[: len(data)]
    assert data + read_all(TextReader(log, state), 9, len(data)) == lines(log)


# syslog(2).


async def test_read_all() -> None:
    log = make()
    fill(log, b"one", b"two\nlines", b"three")
    everything = proc(b"one") + proc(b"two") + proc(b"lines") + proc(b"three")
    assert syslog_action(log.ring, SYSLOG_ACTION_READ_ALL, BIG) == (len(everything), everything)
    exact = len(everything)
    assert syslog_action(log.ring, SYSLOG_ACTION_READ_ALL, exact) == (exact, everything)
    # Measured: the newest records that fit whole, and 0 when none does.
    newest = proc(b"three")
    assert syslog_action(log.ring, SYSLOG_ACTION_READ_ALL, 45) == (len(newest), newest)
    assert syslog_action(log.ring, SYSLOG_ACTION_READ_ALL, 10) == (0, b"")
    assert await ProcReader(log).read(BIG, nonblock=True) == everything


@pytest.mark.parametrize("length", [BIG, 10])
async def test_read_clear(length: int) -> None:
    log = make()
    fill(log, b"one", b"two")
    got, data = syslog_action(log.ring, SYSLOG_ACTION_READ_CLEAR, length)
    assert data == (proc(b"one") + proc(b"two") if length == BIG else b"")
    assert got == len(data)
    log.ring.clear()
    assert syslog_action(log.ring, SYSLOG_ACTION_READ_ALL, BIG) == (0, b"")
    fill(log, b"three")
    assert (syslog_action(log.ring, SYSLOG_ACTION_READ_ALL, BIG))[1] == proc(b"three")
    # Nothing is removed: /dev/kmsg and /proc/kmsg have it all.
    assert await DeviceReader(log).read(BIG, 0, nonblock=True) == device(0, b"one")
    assert (await ProcReader(log).read(BIG, nonblock=True)).count(b"\n") == 3


async def test_clear() -> None:
    log = make()
    fill(log, b"one")
    assert syslog_action(log.ring, SYSLOG_ACTION_CLEAR, has_buffer=False) == (0, b"")
    assert syslog_action(log.ring, SYSLOG_ACTION_READ_ALL, BIG) == (0, b"")


async def test_read_has_to_wait() -> None:
    log = make()
    assert syslog_action(log.ring, SYSLOG_ACTION_READ, BIG) is None
    fill(log, b"one")
    assert syslog_action(log.ring, SYSLOG_ACTION_READ, BIG) == (len(proc(b"one")), proc(b"one"))
    assert syslog_action(log.ring, SYSLOG_ACTION_READ, BIG) is None


async def test_without_time() -> None:
    log = make()
    fill(log, b"one")
    for action in (SYSLOG_ACTION_READ_ALL, SYSLOG_ACTION_READ):
        assert syslog_action(log.ring, action, BIG, time=False) == (8, b"<14>one\n")


async def test_what_was_not_taken_is_read_again() -> None:
    log = make()
    fill(log, b"one", b"two")
    first = syslog_action(log.ring, SYSLOG_ACTION_READ, 30, token=9)
    log.ring.undo_syslog_position(8)
    assert syslog_action(log.ring, SYSLOG_ACTION_SIZE_UNREAD) == (len(proc(b"two")), b"")
    log.ring.undo_syslog_position(9)
    assert syslog_action(log.ring, SYSLOG_ACTION_READ, 30, token=10) == first
    syslog_action(log.ring, SYSLOG_ACTION_READ, 30, token=11)
    # Somebody else has read since.
    log.ring.undo_syslog_position(10)
    assert syslog_action(log.ring, SYSLOG_ACTION_READ, 30) is None


async def test_read_asked_again() -> None:
    log = make()
    fill(log, b"one", b"two")
    first = syslog_action(log.ring, SYSLOG_ACTION_READ, 30, token=9)
    assert syslog_action(log.ring, SYSLOG_ACTION_READ, 30, token=9) == first
    assert first[1] == proc(b"one")
    assert (syslog_action(log.ring, SYSLOG_ACTION_READ, 30, token=10))[1] == proc(b"two")


async def test_size_unread() -> None:
    log = make(512)
    assert syslog_action(log.ring, SYSLOG_ACTION_SIZE_UNREAD) == (0, b"")
    fill(log, b"one", b"two\nlines")
    everything = proc(b"one") + proc(b"two") + proc(b"lines")
    assert syslog_action(log.ring, SYSLOG_ACTION_SIZE_UNREAD) == (len(everything), b"")
    await ProcReader(log).read(5, nonblock=True)
    assert syslog_action(log.ring, SYSLOG_ACTION_SIZE_UNREAD) == (len(everything) - 5, b"")
    wrap(log)
    left = log.ring.next_seq - log.ring.first_seq
    expected = len(proc(b"x" * 50)) * left
    assert syslog_action(log.ring, SYSLOG_ACTION_SIZE_UNREAD) == (expected, b"")
    assert log.ring.syslog_position() == (log.ring.first_seq, 0)


async def test_size_buffer() -> None:
    log = make(4096)
    assert syslog_action(log.ring, SYSLOG_ACTION_SIZE_BUFFER, has_buffer=False) == (4096, b"")


async def test_console_level() -> None:
    log = make()

    async def level(action: int, length: int = 0) -> int:
        assert syslog_action(log.ring, action, length, has_buffer=False) == (0, b"")
        return log.ring.console_level

    assert await level(SYSLOG_ACTION_CONSOLE_LEVEL, 8) == 8
    assert await level(SYSLOG_ACTION_CONSOLE_OFF) == 1
    assert await level(SYSLOG_ACTION_CONSOLE_OFF) == 1
    assert await level(SYSLOG_ACTION_CONSOLE_ON) == 8
    assert await level(SYSLOG_ACTION_CONSOLE_OFF) == 1
    assert await level(SYSLOG_ACTION_CONSOLE_LEVEL, 4) == 4
    assert await level(SYSLOG_ACTION_CONSOLE_ON) == 4


@pytest.mark.parametrize("action", [SYSLOG_ACTION_OPEN, SYSLOG_ACTION_CLOSE])
async def test_open_and_close_do_nothing(action: int) -> None:
    assert syslog_action(make().ring, action, -1, has_buffer=False) == (0, b"")


@pytest.mark.parametrize(
    "action", [SYSLOG_ACTION_READ, SYSLOG_ACTION_READ_ALL, SYSLOG_ACTION_READ_CLEAR]
)
async def test_read_arguments(action: int) -> None:
    log = make()  # measured for READ_ALL
    with fails(errno.EINVAL):
        syslog_action(log.ring, action, 5, has_buffer=False)
    with fails(errno.EINVAL):
        syslog_action(log.ring, action, 0, has_buffer=False)
    with fails(errno.EINVAL):
        syslog_action(log.ring, action, -1)
    fill(log, b"one")
    assert syslog_action(log.ring, action, 0) == (0, b"")
    assert log.ring.clear_seq == 0


@pytest.mark.parametrize(
    ("action", "length"),
    [  # measured: 8 with 0 and 9, and 11
        (SYSLOG_ACTION_CONSOLE_LEVEL, 0),
        (SYSLOG_ACTION_CONSOLE_LEVEL, 9),
        (SYSLOG_ACTION_CONSOLE_LEVEL, -1),
        (11, 0),
        (-1, 0),
        (1000, 0),
    ],
)
async def test_bad_actions(action: int, length: int) -> None:
    log = make()
    with fails(errno.EINVAL):
        syslog_action(log.ring, action, length)
    assert log.ring.console_level == 7


def test_who_is_asked_for_the_capability() -> None:
    free = [a for a in range(-1, 13) if not needs_capability(a, restricted=False)]
    assert free == [SYSLOG_ACTION_READ_ALL, SYSLOG_ACTION_SIZE_BUFFER]
    assert all(needs_capability(a, restricted=True) for a in range(-1, 13))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60), st.integers(0, 600)), max_size=30))
def test_sizes_are_those_of_each_record(steps: list[tuple[int, int, int]]) -> None:
    log = make(1024)
    for what, count, size in steps:
        if what == 0:
            log.ring.clear()
        elif what == 1 and count <= log.ring.next_seq:
            log.ring.set_syslog_position(count, 0)
        else:
            fill(log, *(b"x" * (n % 7) + b"\ny" * (n % 2) for n in range(count // what)))
        ring = log.ring
        records = [ring.read(seq) for seq in range(ring.first_seq, ring.next_seq)]
        sizes = [syslog_length(each) for each in records if isinstance(each, Record)]
        position = max(ring.syslog_position()[0], ring.first_seq) - ring.first_seq
        assert syslog_action(ring, SYSLOG_ACTION_SIZE_UNREAD) == (sum(sizes[position:]), b"")
        first = max(ring.clear_seq, ring.first_seq) - ring.first_seq
        while sum(sizes[first:]) > size:
            first += 1
        assert syslog_action(ring, SYSLOG_ACTION_READ_ALL, size) == (
            sum(sizes[first:]),
            b"".join(format_syslog(each) for each in records[first:] if isinstance(each, Record)),
        )
