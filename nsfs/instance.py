"""An instance as seen from outside: who of it lives, and what is left when nobody does.

The daemon starts another supervisor when its own is killed, unless that was somebody else's to
start (``--foreground``).  Then, or when both are gone, it is up to nsfs(8).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from signal import SIGKILL

from nsfs import graft
from nsfs.cgroup import Group, Hierarchies
from nsfs.store import Store

DIE_S = 30.0
"""How long processes that were killed may take to go."""
LOOK_S = 0.01


class Instance:
    """The instance of one run directory."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    # --- who lives ---

    def supervisor(self) -> int:
        """The supervisor's PID; 0 when there is none."""
        return self._pid("supervisor")

    def daemon(self) -> int:
        """The daemon's PID; 0 when there is none."""
        return self._pid("daemon")

    def lives(self) -> bool:
        """Whether anybody serves, or will soon."""
        return bool(self.supervisor() or self.daemon())

    def _pid(self, name: str) -> int:
        try:
            with open(f"{self.run_dir}/{name}.pid", encoding="ascii") as file:
                pid = int(file.read())
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except (OSError, ValueError):
            return 0
        # One that has ended has no words, and another that got its PID has others.
        return pid if os.fsencode(self.run_dir) in words else 0

    def kill_daemon(self) -> None:
        """kill -9 of a daemon that does not answer; a supervisor starts the next one."""
        pid = self.daemon()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, SIGKILL)

    # --- the supervisor's command ---

    def record(self, command: list[str]) -> None:
        """Keep the words that a supervisor was started with."""
        temporary = f"{self.run_dir}/.command"
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            json.dump(command, file)
        os.rename(temporary, f"{self.run_dir}/command")

    def command(self) -> list[str]:
        """The words that its supervisor was last started with."""
        with open(f"{self.run_dir}/command", encoding="utf-8") as file:
            words: list[str] = json.load(file)
        return words

    def adopting(self, *, foreground: bool) -> list[str]:
        """The words that start a supervisor in the place of one that was killed."""
        program, *rest = self.command()
        at = rest.index("--")
        options = [word for word in rest[:at] if word != "--foreground"]
        options += ["--foreground"] if foreground else []
        return [program, *options, "--adopt", str(self.daemon()), *rest[at:]]

    # --- when nobody lives ---

    def group(self) -> Group:
        """The cgroup that all its containers are in."""
        words = self.command()
        return Group.top(Hierarchies.detect(), words[words.index("--cgroup") + 1])

    def containers(self) -> int:
        """How many containers there are by the records."""
        store, count = Store(self.run_dir), 0
        for number in store.numbers():
            try:
                record = store.read(number)
                count += bool(number and record["name"] and record["phase"] != "gone")
            except (ValueError, KeyError):
                # What cannot be read may be one.
                count += 1
        return count

    def clear(self, directory: str) -> None:
        """Kill what is in the containers, and take down all that nobody looks after any more.

        TimeoutError when a process does not end.
        """
        with contextlib.suppress(FileNotFoundError):
            group = self.group()
            end_s = time.monotonic() + DIE_S
            group.kill()
            while not group.remove():
                if time.monotonic() > end_s:
                    raise TimeoutError(errno.ETIMEDOUT, "a process does not end", group.path)
                group.kill()
                time.sleep(LOOK_S)
        store = Store(self.run_dir)
        for number in store.numbers():
            store.drop(number)
        store.clear_found()
        self.take_down(directory)

    def take_down(self, directory: str) -> None:
        """Unmount the tree and the graft, as a supervisor does at its end."""
        graft.take_down(directory, self.run_dir)
        for name in ("supervisor", "daemon"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.run_dir}/{name}.pid")
