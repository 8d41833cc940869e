"""Who asks: processes that are not mistaken for others, by PID and start time."""

from __future__ import annotations

import contextlib
import os
import time

from nsfs import kernfs

Process = tuple[int, int]
"""As `process_of` gives it."""


def thread_group(tid: int) -> int:
    """The PID of a thread's process; `tid` when it has ended."""
    # Of nobody but who leads one, and in a third of the time that `status` takes.
    with contextlib.suppress(OSError):
        os.close(os.pidfd_open(tid))
        return tid
    try:
        status = kernfs.read_once(f"/proc/{tid}/status")
        return int(status[status.index(b"\nTgid:") + 6 :].split(None, 1)[0])
    except (OSError, ValueError):
        return tid


def process_of(tid: int) -> Process:
    """A process that nobody is mistaken for: the PID (thread group) of a thread, and its start time
    in clock ticks since boot (proc_pid_stat(5), field 22).

    (tid, 0) when it has ended.
    """
    tgid = thread_group(tid)
    try:
        return tgid, start_time(tgid)
    except (OSError, ValueError):
        return tid, 0


class Processes:
    """`process_of` for callers, who make many requests in a row: remembered for a moment.

    Should the thread ID be another process's by then, that process's removals count for one that
    has ended: for nothing.
    """

    REMEMBERED_S = 0.1

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, Process]] = {}

    def of(self, tid: int) -> Process:
        """The process of a thread."""
        now = time.monotonic()
        found = self._known.get(tid)
        if found is None or now - found[0] > self.REMEMBERED_S:
            if len(self._known) > 64:
                self._known.clear()
            found = self._known[tid] = (now, process_of(tid))
        return found[1]


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot."""
    # The command may contain blanks and parentheses; nothing after it does.
    return int(kernfs.read_once(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19])


def process_lives(process: Process) -> bool:
    """Whether the process of `process_of` still is; a zombie has ended."""
    try:
        with open(f"/proc/{process[0]}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return int(fields[19]) == process[1] and fields[0] not in (b"Z", b"X")
