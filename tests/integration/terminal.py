"""A terminal with a program on it, as a user has one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator
from typing import Any

from .conftest import SLOWNESS

DEADLINE_S = 20.0 * SLOWNESS


class Terminal:
    """What runs on a new terminal, in a session of its own."""

    def __init__(self, argv: list[str], env: dict[str, str] | None = None) -> None:
        environment = {**os.environ, "TERM": "xterm", "PS1": "ready> ", **(env or {})}
        self.pid, self.fd = pty.fork()
        if not self.pid:
            try:
                os.execvpe(argv[0], argv, environment)
            finally:
                os._exit(127)
        self.text = self.found = ""
        self.seen = 0

    def send(self, text: str) -> None:
        """Type."""
        os.write(self.fd, text.encode())

    def expect(self, pattern: str, deadline_s: float = DEADLINE_S) -> re.Match[str]:
        """Wait until something is printed after what was expected last; returns the match."""
        end = time.monotonic() + deadline_s
        while True:
            found = re.compile(pattern).search(self.text, self.seen)
            if found:
                self.found = found.group()
                self.seen = found.end()
                return found
            left = end - time.monotonic()
            read = left > 0 and self._read(left)
            assert read, f"no {pattern!r} in {self.text[self.seen :]!r}"

    def _read(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return False
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def run(self, command: str, pattern: str) -> re.Match[str]:
        """Type a line and expect."""
        self.send(command + "\n")
        return self.expect(pattern)

    def resize(self, rows: int, columns: int) -> None:
        """Change the window's size."""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def mode(self) -> list[Any]:
        """The terminal's settings."""
        return termios.tcgetattr(self.fd)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """The exit status of the program, as os.waitstatus_to_exitcode() has it."""
        end = time.monotonic() + deadline_s
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < end, f"it does not end: {self.text[-500:]!r}"
            self._read(0.01)

    def close(self) -> None:
        """Hang up."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        os.close(self.fd)


@contextlib.contextmanager
def terminal(*argv: str, env: dict[str, str] | None = None) -> Iterator[Terminal]:
    """A terminal for the time of a `with`."""
    each = Terminal(list(argv), env)
    try:
        yield each
    finally:
        each.close()
