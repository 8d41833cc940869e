"""Control groups: where containers are in the hierarchies, limits, kill, freeze and membership.

Membership, kill and freeze are always cgroup v2's (Documentation/admin-guide/cgroup-v2.rst); on a
hybrid host, whose controllers are on v1, limits and accounting are kept in parallel v1 groups.

    NAME/ID/           carries the limits, which are the parent's to set; also `cgroup.kill` for all
                       of it
    NAME/ID/payload    the members; root of the container's cgroup namespace, delegated to its root
    NAME/ID/init       the init
    NAME/ID/sub/ID2/   a container nested in it

IDs are opaque, since a v2 group cannot be renamed.  Nothing is ever migrated here: processes are
born in their group (CLONE_INTO_CGROUP), because writing to cgroup.procs takes the global
cgroup_threadgroup_rwsem, some 7 ms.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from signal import SIGKILL, Signals, pidfd_send_signal

import trio

CONTROLLERS = ("cpu", "memory", "pids", "io")
V1_CONTROLLERS = ("pids", "memory", "cpu")
"""The v1 hierarchies that each container has a group in; a limit of another is refused on such a
host."""

DELEGATED_MAX = 4096
"""How many groups members may make in theirs."""
DELEGATED_DEPTH = 12
"""How deep: with the longest names (255 bytes) such a path is one that open(2) takes."""

# What cgroup v2 calls it, and the v1 hierarchy and file that carry it on a hybrid host.
V1_FILES = {
    "pids.max": ("pids", "pids.max"),
    "pids.current": ("pids", "pids.current"),
    "memory.max": ("memory", "memory.limit_in_bytes"),
    "memory.current": ("memory", "memory.usage_in_bytes"),
    "memory.peak": ("memory", "memory.max_usage_in_bytes"),
}
SIGNAL_ROUNDS = 100
"""How often, each 2 ms, to look whether all members are suspended, or gone."""
V1_NO_LIMIT = 0x7FFFFFFFFFFFF000
"""What v1's memory.limit_in_bytes reads when there is no limit (PAGE_COUNTER_MAX in bytes)."""


def read_once(path: str) -> bytes:
    """At most 4096 bytes of a file of the kernel's, by one read(2)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def _read(path: str) -> str:
    # One system call fewer than open(): these are read in loops over containers.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while True:
            part = os.read(fd, 65536)
            parts.append(part)
            if len(part) < 4096:
                return b"".join(parts).decode()
    finally:
        os.close(fd)


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _unescape(path: str) -> str:
    return path.encode("latin-1").decode("unicode_escape") if "\\" in path else path


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Where this host's hierarchies are mounted."""

    v2: str
    v1: dict[str, str]
    controllers: frozenset[str]
    """The controllers of the v2 hierarchy; empty on a hybrid host."""

    @classmethod
    def detect(cls) -> Hierarchies:
        """Read them from this process's mount table.

        Raises FileNotFoundError when there is no cgroup2 mount.
        """
        v2, v1 = "", {}
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                fields, kind = before.split(), after.split()
                # A bind of some subdirectory (field 3 is not "/") is not the hierarchy.
                if kind[0] == "cgroup2" and fields[3] == "/":
                    v2 = _unescape(fields[4])
                elif kind[0] == "cgroup" and fields[3] == "/":
                    for name in kind[2].split(","):
                        if name in V1_CONTROLLERS:
                            v1[name] = _unescape(fields[4])
        if not v2:
            raise FileNotFoundError(
                errno.ENOENT,
                "no cgroup2 hierarchy is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup",
            )
        known = set(_read(f"{v2}/cgroup.controllers").split())
        return cls(v2, v1, frozenset(known.intersection(CONTROLLERS)))

    def can_limit(self, name: str) -> bool:
        """Whether a limit that cgroup v2 calls `name` can be set on this host."""
        carrier = V1_FILES.get(name, ("", ""))[0]
        return name.partition(".")[0] in self.controllers or carrier in self.v1


class Group:
    """One container's groups."""

    __slots__ = ("hierarchies", "path", "relative", "root", "v1")

    def __init__(
        self, hierarchies: Hierarchies, relative: str, v1_relative: str, root: bool
    ) -> None:
        self.hierarchies = hierarchies
        self.relative = relative
        self.path = f"{hierarchies.v2}/{relative}"
        self.v1 = {name: f"{top}/{v1_relative}" for name, top in hierarchies.v1.items()}
        self.root = root

    @classmethod
    def top(cls, hierarchies: Hierarchies, name: str) -> Group:
        """The group that everything of one instance of nsfs is below."""
        return cls(hierarchies, name, name, True)

    def child(self, ident: int) -> Group:
        """The group of a container nested in this one's; made by `create`."""
        middle = "" if self.root else "sub/"
        v1_relative = "" if not self.v1 else self._v1_relative()
        return Group(
            self.hierarchies, f"{self.relative}/{middle}{ident}", f"{v1_relative}/{ident}", False
        )

    def _v1_relative(self) -> str:
        name, path = next(iter(self.v1.items()))
        return path[len(self.hierarchies.v1[name]) + 1 :]

    # --- making and removing ---

    def create_top(self) -> None:
        """Make the instance's own group and hand the controllers down to it."""
        self._delegate(self.hierarchies.v2)
        for path in (self.path, *self.v1.values()):
            os.makedirs(path, exist_ok=True)
        self._delegate(self.path)

    def _delegate(self, path: str) -> None:
        if self.hierarchies.controllers:
            wanted = " ".join(f"+{name}" for name in sorted(self.hierarchies.controllers))
            _write(f"{path}/cgroup.subtree_control", wanted)

    def create(self, uid: int, gid: int) -> None:
        """Make the groups; `uid` and `gid` are the host's IDs of the container's root.

        The order matters: cgroup.kill goes through the children in the order of their making, and
        the members are to go before the init, which else would do it one by one.
        """
        for path in (self.path, *self.v1.values()):
            os.mkdir(path)
        self._delegate(self.path)
        payload = f"{self.path}/payload"
        os.mkdir(payload)
        # What a delegate makes is ours to walk and to remove.
        _write(f"{payload}/cgroup.max.descendants", str(DELEGATED_MAX))
        _write(f"{payload}/cgroup.max.depth", str(DELEGATED_DEPTH))
        os.mkdir(f"{self.path}/init")
        if uid or gid:
            os.chown(payload, uid, gid)
            for name in ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
                os.chown(f"{payload}/{name}", uid, gid)
            # Being born in a group asks for write access to the common ancestor's cgroup.procs too
            # (cgroup_procs_write_permission()).  Nobody inside can reach this file: their cgroup
            # namespace ends at the payload.
            os.chown(f"{self.path}/cgroup.procs", uid, gid)

    def create_sub(self) -> None:
        """Make the group that nested containers' groups are in, when the first comes."""
        path = f"{self.path}/sub"
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
            self._delegate(path)

    def remove(self) -> bool:
        """Remove the groups, and what delegates made below; False while processes are in them."""
        try:
            for path in (self.path, *self.v1.values()):
                _remove_tree(path)
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                return False
            raise
        return True

    # --- state ---

    @property
    def payload(self) -> str:
        """The members' group."""
        return f"{self.path}/payload"

    def events(self, part: str = "") -> dict[str, int]:
        """`cgroup.events` of the whole (or of `payload` or `init`): populated and frozen.

        All zero when the group is gone.
        """
        path = f"{self.path}/{part}/cgroup.events" if part else f"{self.path}/cgroup.events"
        try:
            text = _read(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return {"populated": 0, "frozen": 0}
            raise
        return {key: int(value) for key, value in (line.split() for line in text.splitlines())}

    def pids(self, part: str = "payload") -> list[int]:
        """Host PIDs of the processes of one part, those in groups that delegates made included."""
        result: list[int] = []
        for directory in self._walk(f"{self.path}/{part}"):
            try:
                text = _read(f"{directory}/cgroup.procs")
            except OSError as error:
                # EOPNOTSUPP: a threaded group; its processes are listed by the domain above it.
                if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                    continue
                raise
            # 0 is a process that this PID namespace cannot name.
            result += [pid for pid in map(int, text.split()) if pid]
        return result

    def _walk(self, path: str) -> Iterator[str]:
        yield path
        try:
            # st_nlink counts the subdirectories: no listing for the usual group, which has none.
            if os.stat(path).st_nlink <= 2:
                return
            with os.scandir(path) as found:
                below = [e.path for e in found if e.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return
        for each in below:
            yield from self._walk(each)

    # --- acting ---

    def hurry(self) -> None:
        """Let its processes, which are to be killed, have all the CPU time that their end takes.

        They die at their own expense: as one group of many, a thousand of them would take long.
        """
        for path, value in (
            (f"{self.path}/cpu.weight", "10000"),
            (f"{self.v1.get('cpu', '')}/cpu.shares", "262144"),
        ):
            with contextlib.suppress(OSError):
                _write(path, value)

    def kill(self, part: str = "") -> None:
        """SIGKILL to every process in it, also those being forked; a group that is gone is dead."""
        path = f"{self.path}/{part}/cgroup.kill" if part else f"{self.path}/cgroup.kill"
        try:
            _write(path, "1")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    async def signal(self, number: Signals) -> None:
        """A signal to every member, also to those that are just being forked.

        They are suspended meanwhile, so none forks away.  Not cgroup.kill for SIGKILL: a group that
        was once killed by it cannot be cloned into any more from a group that was not (what
        CLONE_INTO_CGROUP makes there is killed; seen on Linux 6.18), and the members are born so.
        """
        path = f"{self.payload}/cgroup.freeze"
        try:
            _write(path, "1")
            for _ in range(SIGNAL_ROUNDS):
                done = self.events("payload")["frozen"] or not self.events("payload")["populated"]
                if number == SIGKILL or done:
                    self._signal_all(number)
                if not self.events("payload")["populated"] or (done and number != SIGKILL):
                    return
                await trio.sleep(0.002)
            # A member that cannot be suspended waits in the kernel; it gets the signal as well.
            self._signal_all(number)
        except FileNotFoundError:
            return
        finally:
            self.thaw_payload()

    def thaw_payload(self) -> None:
        """End what `signal` began."""
        with contextlib.suppress(FileNotFoundError):
            _write(f"{self.payload}/cgroup.freeze", "0")

    def _signal_all(self, number: Signals) -> None:
        for pid in self.pids():
            # The PID may be another process's by now: check membership with the process held.
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                if membership(pid).startswith(f"/{self.relative}/payload"):
                    pidfd_send_signal(fd, number)
            except ProcessLookupError:
                continue
            finally:
                os.close(fd)

    def freeze(self, on: bool) -> None:
        """Suspend or resume all of it, descendants included."""
        _write(f"{self.path}/cgroup.freeze", "1" if on else "0")

    def frozen_by_itself(self) -> bool:
        """What was last written by `freeze`, whatever the ancestors are; a group that is gone is
        not."""
        try:
            return _read(f"{self.path}/cgroup.freeze").strip() == "1"
        except FileNotFoundError:
            return False

    # --- limits and accounting ---

    def file(self, name: str) -> str:
        """The file that carries a value which cgroup v2 calls `name`.

        EOPNOTSUPP when no hierarchy of this host has it.
        """
        controller = name.partition(".")[0]
        if controller in self.hierarchies.controllers:
            return f"{self.path}/{name}"
        v1 = V1_FILES.get(name)
        if v1 and v1[0] in self.v1:
            return f"{self.v1[v1[0]]}/{v1[1]}"
        raise OSError(errno.EOPNOTSUPP, "no controller of this host has it", name)

    def get(self, name: str) -> str:
        """Read a value, in v2's form."""
        text = _read(self.file(name)).strip()
        if name == "memory.max" and text.isdigit() and int(text) >= V1_NO_LIMIT:
            return "max"
        return text

    def set(self, name: str, value: str) -> None:
        """Set a limit, given in v2's form."""
        path = self.file(name)
        if value == "max" and path.endswith("memory.limit_in_bytes"):
            value = "-1"
        _write(path, value)

    def cpu_usec(self) -> dict[str, int]:
        """`cpu.stat`'s usage_usec, user_usec, system_usec (there without any controller)."""
        text = _read(f"{self.path}/cpu.stat")
        pairs = (line.split() for line in text.splitlines())
        return {k: int(v) for k, v in pairs if k in ("usage_usec", "user_usec", "system_usec")}


def _remove_tree(path: str) -> None:
    # Names and depth are the delegate's choice, so no path is put together, nothing recurses, and
    # one directory is open at a time.
    try:
        here = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    names: list[str] = []
    try:
        while True:
            with os.scandir(here) as found:
                below = next((e.name for e in found if e.is_dir(follow_symlinks=False)), None)
            if below is not None:
                names.append(below)
                step, name = below, None
            elif names:
                step, name = "..", names.pop()
            else:
                break
            there = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = there
            if name is not None:
                os.rmdir(name, dir_fd=here)
    finally:
        os.close(here)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)


def membership(pid: int) -> str:
    """The path of a process's v2 group within the hierarchy; ProcessLookupError when it has
    ended."""
    try:
        text = _read(f"/proc/{pid}/cgroup")
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid)) from error
    for line in text.splitlines():
        if line.startswith("0::"):
            return line[3:]
    raise ProcessLookupError(errno.ESRCH, "no such process", str(pid))
