"""LOG lines of containers at all: the sysctl nf_log_all_netns, and the breaker that switches it off
for a while when lines come too fast.

Several instances of nsfs may need the sysctl: each holds a shared lock on a note, in which the
first one writes down what there was before, and the last one puts that back.  A daemon that was
killed, with its supervisor even, leaves its note, and who comes next goes on with it.  Its lines:
what there was; the boot that it was in (a sysctl does not outlive one, a file may); and until when
a breaker keeps it off, in nanoseconds of CLOCK_MONOTONIC, which the others heed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections import deque

log = logging.getLogger(__name__)

ALL_NETNS = "/proc/sys/net/netfilter/nf_log_all_netns"
NOTE = "/run/nsfs.nf_log_all_netns"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
OLD_S = 5.0
"""Older LOG lines do not make the breaker act."""


def _boot_id() -> str:
    with open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()


class FirewallLog:
    """nf_log_all_netns, as long as somebody needs it on."""

    def __init__(self, wanted: bool, note: str = NOTE, sysctl: str = ALL_NETNS) -> None:
        self._note, self._sysctl = note, sysctl
        self._fd = self._note_fd = -1
        if not wanted:
            return
        try:
            self._fd = os.open(sysctl, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            log.info("LOG lines of containers cannot be switched on: %s", error)
            return
        while not self._hold():
            os.close(self._note_fd)
        if not self.paused:
            self._write("1")

    def _hold(self) -> bool:
        """Take a share in the note; False when it was taken away meanwhile."""
        self._note_fd = os.open(self._note, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._note_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._before() is None:
                value = os.pread(self._fd, 16, 0).decode().strip()
                self._write_note(value, 0)
        except BlockingIOError:
            pass
        fcntl.flock(self._note_fd, fcntl.LOCK_SH)
        try:
            same = os.path.samestat(os.stat(self._note), os.fstat(self._note_fd))
        except FileNotFoundError:
            return False
        return same

    def _read_note(self) -> list[str]:
        return os.pread(self._note_fd, 256, 0).decode("ascii", "replace").split()

    def _before(self) -> str | None:
        """What there was before; None where the note does not say so for this boot."""
        words = self._read_note()
        known = words[:1] in (["0"], ["1"]) and words[1:2] in ([], [_boot_id()])
        return words[0] if known else None

    def _write_note(self, before: str, until_ns: int) -> None:
        # Of one length, so that a reader never sees the end of another one.
        text = f"{before}\n{_boot_id()}\n{until_ns:020}\n"
        os.pwrite(self._note_fd, text.encode(), 0)
        os.ftruncate(self._note_fd, len(text))

    def _write(self, value: str) -> None:
        os.pwrite(self._fd, value.encode(), 0)

    @property
    def on(self) -> bool:
        """Whether LOG rules outside the host's own network namespace print."""
        try:
            with open(self._sysctl, encoding="ascii") as file:
                return file.read().strip() == "1"
        except OSError:
            return False

    @property
    def paused(self) -> float:
        """For how many seconds a breaker keeps it off: ours, another instance's or that of a daemon
        that has died."""
        words = self._read_note() if self._fd >= 0 else []
        if len(words) != 3 or not words[2].isdigit():
            return 0.0
        return max(int(words[2]) - time.monotonic_ns(), 0) / 1e9

    def pause(self, for_s: float) -> None:
        """Switch it off for a while."""
        before = self._before() if self._fd >= 0 else None
        if before is not None:
            self._write_note(before, time.monotonic_ns() + int(for_s * 1e9))
            self._write("0")

    def resume(self) -> None:
        """On again, unless another breaker has switched it off for longer."""
        if self._fd >= 0 and not self.paused:
            self._write("1")

    def close(self) -> None:
        """Put back what there was, if nobody else needs it."""
        if self._fd < 0:
            return
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._note_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = self._before()
            if before is not None:
                self._write(before)
            os.unlink(self._note)
        os.close(self._note_fd)
        os.close(self._fd)
        self._fd = -1


class Rate:
    """How many LOG lines there were in the last second, by their own time."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()

    def count(self, printed_s: float) -> bool:
        """One more, at CLOCK_MONOTONIC; False for an old one, which does not count."""
        # The log's own clock may be a little off; what was printed before we came is nothing new.
        if printed_s < time.monotonic() - OLD_S:
            return False
        self._recent.append(printed_s)
        while self._recent[0] < printed_s - 1.0:
            self._recent.popleft()
        return True

    def __len__(self) -> int:
        return len(self._recent)

    @property
    def quiet(self) -> bool:
        """Whether there was none for a while."""
        return not self._recent or self._recent[-1] < time.monotonic() - OLD_S

    def clear(self) -> None:
        """Begin anew."""
        self._recent.clear()
