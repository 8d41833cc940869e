"""Open files on a kernel log: /dev/kmsg, /proc/kmsg and `C/kmsg`, and syslog(2), without FUSE.

A class for each kind of file holds the position of one open file.  Positions are three numbers
(`state`), which the caller keeps where the next daemon finds them; that of /proc/kmsg and syslog(2)
is the log's own and in the ring.

lseek(2) mostly does not reach a FUSE daemon, so a reader compares the offset of each read with the
one it expects: another is a seek.  The file's st_size must be SIZE for that.  What the kernel tells
of seeks (6.18, measured): SEEK_SET and SEEK_CUR nothing; SEEK_END a GETATTR, and the next read is
at st_size; SEEK_DATA and SEEK_HOLE a FUSE_LSEEK, until that was once answered ENOSYS, as pyfuse3
3.5 does, which has no such operation: from then on SEEK_DATA is a seek to 0 that cannot be told
from an open or a rewind.  Whoever sees a FUSE_LSEEK calls `DeviceReader.seek`.

`token` is a number that names a request and is never used again (FUSE's `unique`); 0 is none.  A
request that the previous daemon carried out without getting to answer it comes again with the same
token and has the same answer, so nothing is lost or doubled.

What the kernel does is that of kernel/printk/printk.c and fs/proc/kmsg.c in Linux 6.18.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterable
from typing import Protocol

import trio

from nsfs.logring import (
    LogRing,
    Overrun,
    Record,
    format_kmsg,
    format_syslog,
    format_text,
    parse_write,
)

SIZE = 4096
"""The st_size that these files must have."""

State = tuple[int, int, int]
Save = Callable[[int, int, int], object]

READABLE = select.EPOLLIN | select.EPOLLRDNORM
"""Poll mask of a file with something to read."""

OVERRUN = READABLE | select.EPOLLERR | select.EPOLLPRI
"""Poll mask of /dev/kmsg when the next record was overwritten."""

(
    SYSLOG_ACTION_CLOSE, SYSLOG_ACTION_OPEN, SYSLOG_ACTION_READ, SYSLOG_ACTION_READ_ALL,
    SYSLOG_ACTION_READ_CLEAR, SYSLOG_ACTION_CLEAR, SYSLOG_ACTION_CONSOLE_OFF,
    SYSLOG_ACTION_CONSOLE_ON, SYSLOG_ACTION_CONSOLE_LEVEL, SYSLOG_ACTION_SIZE_UNREAD,
    SYSLOG_ACTION_SIZE_BUFFER,
) = range(11)  # fmt: skip


def _error(number: int, what: str) -> OSError:
    return OSError(number, os.strerror(number), what)


class Echo(Protocol):
    """What echoes a log's records to a console."""

    def flush(self) -> None:
        """There is a new record; must not raise."""

    def close(self) -> None:
        """The log is no more."""


class Log:
    """A ring and those who wait for its next record."""

    def __init__(
        self, ring: LogRing, counted: State | None = None, keep: Save | None = None
    ) -> None:
        self.ring = ring
        self._counted, self._bytes, self._cleared = counted or (0, 0, 0)
        self._keep = keep
        self._parked = trio.lowlevel.ParkingLot()
        self._pollers: dict[object, Callable[[], None]] = {}
        self.echo: Echo | None = None
        """What echoes its records to a console."""

    def append(
        self,
        text: bytes,
        *,
        level: int,
        facility: int,
        flags: int = 0,
        dictionary: Iterable[bytes] = (),
        usec: int | None = None,
        token: int = 0,
        limited: bool = True,
    ) -> int | None:
        """Add a record as LogRing.append() does, and wake who waits."""
        before = self.ring.next_seq
        seq = self.ring.append(
            text,
            level=level,
            facility=facility,
            flags=flags,
            dictionary=dictionary,
            usec=usec,
            token=token,
            limited=limited,
        )
        if self.ring.next_seq != before:
            self._wake()
        return seq

    def write(self, data: bytes, token: int = 0) -> int:
        """A write(2) to /dev/kmsg or `C/kmsg`: one record.  Returns the bytes taken, which are all.

        A record that the limit suppresses counts as written, as devkmsg_write() has it.  OSError
        EINVAL: longer than 1,024 bytes.
        """
        level, facility, text = parse_write(data)
        self.append(text, level=level, facility=facility, token=token)
        return len(data)

    def report_suppressed(self) -> None:
        """Add the line about suppressed records if it is due."""
        if self.ring.report_suppressed() is not None:
            self._wake()

    def text_size(self) -> int:
        """Bytes of the lines (format_text()) of all records since the log was cleared.

        So it grows with each record, and is 0 again after a clear.  It is counted when it is asked
        for; records that were overwritten before that do not count.  `counted` and `keep` of the
        constructor carry it from daemon to daemon.
        """
        ring, before = self.ring, self._counted
        if ring.clear_seq != self._cleared:
            self._bytes, self._cleared = 0, ring.clear_seq
        seq = max(self._counted, ring.first_seq, ring.clear_seq)
        while isinstance(found := ring.read(seq), Record):
            self._bytes += len(format_text(found))
            seq += 1
        self._counted = seq
        if seq != before and self._keep:
            self._keep(self._counted, self._bytes, self._cleared)
        return self._bytes

    async def wait_past(self, seq: int) -> None:
        """Return when there is a record `seq` or a later one; may be cancelled."""
        while not self.ring.readable(seq):
            await self._parked.park()

    def notify_once(self, key: object, callback: Callable[[], None]) -> None:
        """Call back when the next record comes; the same key replaces.  It must not raise."""
        self._pollers[key] = callback

    def forget(self, key: object) -> None:
        """Take back notify_once()."""
        self._pollers.pop(key, None)

    def _wake(self) -> None:
        if self._parked:
            self._parked.unpark_all()
        if self._pollers:
            pollers, self._pollers = self._pollers, {}
            for callback in pollers.values():
                callback()
        if self.echo:
            self.echo.flush()


class DeviceReader:
    """One open of /dev/kmsg.  Without `state` it begins at the first record.

    `state` is (next record, expected offset, token of the last read).  `save` is called with it
    when it has changed, before a read waits, returns or raises.
    """

    def __init__(self, log: Log, state: State | None = None, save: Save | None = None) -> None:
        self.log = log
        self._seq, self._offset, self._token = state or (log.ring.first_seq, 0, 0)
        self._save = save

    @property
    def state(self) -> State:
        """What the next daemon needs to go on."""
        return self._seq, self._offset, self._token

    def _keep(self) -> None:
        if self._save:
            self._save(self._seq, self._offset, self._token)

    async def read(self, size: int, offset: int, *, nonblock: bool, token: int = 0) -> bytes:
        """One record, as devkmsg_read() has it.  Waits for one; may be cancelled.

        OSError EAGAIN: there is none and nonblock; EPIPE: it was overwritten, the next read gives
        the oldest; EINVAL: it is longer than `size`, and the kernel has consumed it all the same.
        """
        self._seek_to(offset, token)
        # The ring may become another one of another size meanwhile.
        while (found := self.log.ring.read(self._seq)) is None:
            if nonblock:
                raise _error(errno.EAGAIN, "kmsg")
            await self.log.wait_past(self._seq)
        self._token = token
        if isinstance(found, Overrun):
            self._seq = found.oldest
            self._keep()
            raise _error(errno.EPIPE, "kmsg")
        self._seq = found.seq + 1
        data = format_kmsg(found)
        if len(data) <= size:
            self._offset = offset + len(data)
        self._keep()
        if len(data) > size:
            raise _error(errno.EINVAL, "kmsg")
        return data

    def _seek_to(self, offset: int, token: int) -> None:
        if token and token == self._token:
            # It was carried out: the record was given, or skipped with an error.
            self._seq -= 1
        elif offset == self._offset:
            return
        elif offset == 0:
            self._seq = self.log.ring.first_seq
        elif offset >= SIZE:
            self._seq = self.log.ring.next_seq
        # Anything else: the kernel's lseek would have failed and left the position alone, pread
        # ignores the offset, and a reader killed while its read was answered has left its own
        # there.
        self._offset = offset
        self._token = 0
        self._keep()

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2), where the caller learns of one.  Returns 0, the offset of the next read.

        SEEK_SET: the first record; SEEK_DATA: the first after the last clear; SEEK_END: after the
        last. OSError ESPIPE: an offset; EINVAL: another whence (SEEK_CUR too, unlike the document's
        ESPIPE).
        """
        if offset:
            raise _error(errno.ESPIPE, "kmsg")
        ring = self.log.ring
        places = {
            os.SEEK_SET: ring.first_seq,
            os.SEEK_DATA: ring.clear_seq,
            os.SEEK_END: ring.next_seq,
        }
        if whence not in places:
            raise _error(errno.EINVAL, "kmsg")
        self._seq = places[whence]
        self._offset = self._token = 0
        self._keep()
        return 0

    def poll(self, notify: Callable[[], None] | None = None) -> int:
        """The poll mask, as devkmsg_poll() has it; `notify` is called once when that may change."""
        if notify:
            self.log.notify_once(self, notify)
        ring = self.log.ring
        if not ring.readable(self._seq):
            return 0
        return OVERRUN if self._seq < ring.first_seq else READABLE

    def close(self) -> None:
        """The file was closed."""
        self.log.forget(self)


class ProcReader:
    """One open of /proc/kmsg.

    All of them, and syslog(2), share the position: what one reads the others do not get.
    """

    def __init__(self, log: Log) -> None:
        self.log = log

    async def read(self, size: int, *, nonblock: bool, token: int = 0) -> bytes:
        """Whole records, or a part of one where `size` is smaller; the next read gives its rest.

        Waits for one; may be cancelled.  OSError EAGAIN: there is none and nonblock.
        """
        if nonblock and not self.log.ring.readable(self.log.ring.syslog_position(token)[0]):
            raise _error(errno.EAGAIN, "kmsg")
        while (data := _syslog_read(self.log.ring, size, token, time=True)) is None:
            # Another reader may have been quicker.
            await self.log.wait_past(self.log.ring.syslog_position(token)[0])
        return data

    def poll(self, notify: Callable[[], None] | None = None) -> int:
        """The poll mask, as kmsg_poll() has it; `notify` is called once when that may change."""
        if notify:
            self.log.notify_once(self, notify)
        return READABLE if self.log.ring.readable(self.log.ring.syslog_position()[0]) else 0

    def close(self) -> None:
        """The file was closed."""
        self.log.forget(self)


class TextReader:
    """One open of the outer `C/kmsg`: a text file that ends, and grows.

    It holds a line for each record that was neither cleared nor overwritten when it was read.
    Offset 0 is the oldest of them whenever it is read; a read where the last one ended goes on,
    also after that was the end of the file, and one before that goes back.  Other offsets count
    from the end, which is at `Log.text_size`, the st_size: so a seek to the end, and reads backward
    from there as of tail(1), find what they mean.  When lines not yet read are overwritten, the
    oldest one left follows.

    `state` is (expected offset, record, bytes of its line before that offset); `save` is called
    with it after each read.
    """

    def __init__(self, log: Log, state: State | None = None, save: Save | None = None) -> None:
        self.log = log
        self._offset, self._seq, self._partial = state or (0, 0, 0)
        self._save = save

    @property
    def state(self) -> State:
        """What the next daemon needs to go on."""
        return self._offset, self._seq, self._partial

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes from there; b"" at the end of the file.  Never waits."""
        if not self._move_to(offset):
            return b""
        data = self._lines(size)
        self._offset = offset + len(data)
        if self._save:
            self._save(self._offset, self._seq, self._partial)
        return data

    def _move_to(self, offset: int) -> bool:
        """Whether the file has that offset; moves nothing if not."""
        distance = offset - self._offset
        if offset == 0:
            self._seq = self._partial = 0
        elif distance < 0:
            self._back(-distance)
        elif distance > 0:
            beyond = self.log.text_size() - offset
            if beyond < 0:
                return False
            self._seq, self._partial = self.log.ring.next_seq, 0
            self._back(beyond)
        return True

    def _lines(self, size: int) -> bytes:
        """The next `size` bytes, or what there is; moves on by them."""
        ring = self.log.ring
        parts = []
        oldest = max(ring.first_seq, ring.clear_seq)
        seq, partial = self._seq, self._partial
        if seq < oldest:
            if partial:
                # The rest of a line that was begun is lost: end it.
                parts.append(b"\n")
                size -= 1
            seq, partial = oldest, 0
        while size:
            found = ring.read(seq)
            if not isinstance(found, Record):
                break
            line = format_text(found)[partial : partial + size]
            parts.append(line)
            size -= len(line)
            partial += len(line)
            # Nothing is left of the line only if the state given was of another.
            if not line or line.endswith(b"\n"):
                seq, partial = seq + 1, 0
        self._seq, self._partial = seq, partial
        return b"".join(parts)

    def _back(self, distance: int) -> None:
        """Move back by that many bytes, or to the oldest line."""
        ring = self.log.ring
        oldest = max(ring.first_seq, ring.clear_seq)
        seq, partial = self._seq, self._partial
        while partial < distance and seq > oldest:
            distance -= partial
            seq -= 1
            found = ring.read(seq)
            partial = len(format_text(found)) if isinstance(found, Record) else 0
        self._seq, self._partial = seq, max(partial - distance, 0)

    def poll(self, notify: Callable[[], None] | None = None) -> int:
        """The poll mask; `notify` is called once when that may change."""
        if notify:
            self.log.notify_once(self, notify)
        ring = self.log.ring
        return READABLE if ring.readable(max(self._seq, ring.clear_seq)) else 0

    def close(self) -> None:
        """The file was closed."""
        self.log.forget(self)


def needs_capability(action: int, *, restricted: bool) -> bool:
    """Whether syslog(2) asks for CAP_SYSLOG (check_syslog_permissions()), before anything else.

    `restricted` is the sysctl kernel.dmesg_restrict.
    """
    return restricted or action not in (SYSLOG_ACTION_READ_ALL, SYSLOG_ACTION_SIZE_BUFFER)


def syslog_action(
    ring: LogRing,
    action: int,
    length: int = 0,
    *,
    has_buffer: bool = True,
    token: int = 0,
    time: bool = True,
) -> tuple[int, bytes] | None:
    """syslog(2) as do_syslog() has it: what it returns, and what it puts into the buffer.

    None: SYSLOG_ACTION_READ has to wait for a record.  `length` is the third argument,
    `has_buffer` whether the second is not NULL, `time` the parameter printk.time.  What
    SYSLOG_ACTION_READ_CLEAR gives is to be cleared when it has arrived.  OSError EINVAL: an unknown
    action, no buffer, a negative length, a console level not from 1 to 8.
    """
    if action in (SYSLOG_ACTION_READ, SYSLOG_ACTION_READ_ALL, SYSLOG_ACTION_READ_CLEAR):
        if not has_buffer or length < 0:
            raise _error(errno.EINVAL, "syslog")
        if action == SYSLOG_ACTION_READ:
            data = _syslog_read(ring, length, token, time)
            if data is None:
                return None
        else:
            data = _syslog_read_all(ring, length, time)
        return len(data), data
    if action == SYSLOG_ACTION_CLEAR:
        ring.clear()
    elif action == SYSLOG_ACTION_CONSOLE_OFF:
        ring.console_off()
    elif action == SYSLOG_ACTION_CONSOLE_ON:
        ring.console_on()
    elif action == SYSLOG_ACTION_CONSOLE_LEVEL:
        if not 1 <= length <= 8:
            raise _error(errno.EINVAL, "syslog")
        ring.set_console_level(length)
    elif action == SYSLOG_ACTION_SIZE_UNREAD:
        return _syslog_unread(ring, time), b""
    elif action == SYSLOG_ACTION_SIZE_BUFFER:
        return ring.size, b""
    elif action not in (SYSLOG_ACTION_CLOSE, SYSLOG_ACTION_OPEN):
        raise _error(errno.EINVAL, "syslog")
    return 0, b""


def _syslog_read(ring: LogRing, size: int, token: int, time: bool) -> bytes | None:
    """syslog_print(): take whole records, or a part of the first if it does not fit; None when
    there is none."""
    if size <= 0:
        return b""
    seq, partial = ring.syslog_position(token)
    if not ring.readable(seq):
        return None
    parts: list[bytes] = []
    while size and (found := ring.read(seq)) is not None:
        if isinstance(found, Overrun):
            seq, partial = found.oldest, 0
            continue
        rest = format_syslog(found, time)[partial:]
        if len(rest) <= size:
            seq, partial = seq + 1, 0
        elif not parts:
            rest = rest[:size]
            partial += size
        else:
            break
        parts.append(rest)
        size -= len(rest)
    ring.set_syslog_position(seq, partial, token)
    return b"".join(parts)


def _syslog_read_all(ring: LogRing, size: int, time: bool) -> bytes:
    """syslog_print_all(): the newest whole records since the last clear that fit."""
    parts: list[bytes] = []
    # find_first_fitting_seq() counts with a length from which record_print_text() may drop.
    for seq in range(ring.syslog_sizes(time).fitting(ring.clear_seq, size), ring.next_seq):
        found = ring.read(seq)
        assert isinstance(found, Record)
        parts.append(format_syslog(found, time))
    return b"".join(parts)


def _syslog_unread(ring: LogRing, time: bool) -> int:
    """Bytes that SYSLOG_ACTION_READ would give."""
    seq, partial = ring.syslog_position()
    found = ring.read(seq)
    if found is None:
        return 0
    if isinstance(found, Overrun):
        seq, partial = found.oldest, 0
        ring.set_syslog_position(seq, partial)
    return ring.syslog_sizes(time).since(seq) - partial
