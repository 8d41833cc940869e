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

from nsfs import cgroup1
from nsfs.kernfs import pairs, read, walk, write
from nsfs.limits import Limits, find, merged, to_pages

CONTROLLERS = ("cpu", "memory", "pids", "io")
V1_CONTROLLERS = ("pids", "memory", "cpu", "blkio")
"""The v1 hierarchies that each container has a group in; a limit of another is refused on such a
host."""

DELEGATED_MAX = 4096
"""How many groups members may make in theirs."""
DELEGATED_DEPTH = 12
"""How deep: with the longest names (255 bytes) such a path is one that open(2) takes."""

SIGNAL_ROUNDS = 100
"""How often, each 2 ms, to look whether all members are suspended, or gone."""


def _unescape(path: str) -> str:
    return path.encode("latin-1").decode("unicode_escape") if "\\" in path else path


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Where this host's hierarchies are mounted."""

    v2: str
    v1: dict[str, str]
    controllers: frozenset[str]
    """The controllers of the v2 hierarchy; empty on a hybrid host."""
    delegates: bool = False
    """Mounted with `nsdelegate`: a container cannot share its parent's cgroup namespace, where that
    is a container as well."""

    @classmethod
    def detect(cls) -> Hierarchies:
        """Read them from this process's mount table.

        Raises FileNotFoundError when there is no cgroup2 mount.
        """
        v2, v1, delegates = "", {}, False
        with open("/proc/self/mountinfo", encoding="utf-8") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                fields, kind = before.split(), after.split()
                # A bind of some subdirectory (field 3 is not "/") is not the hierarchy.
                if kind[0] == "cgroup2" and fields[3] == "/":
                    v2 = _unescape(fields[4])
                    delegates = "nsdelegate" in kind[2].split(",")
                elif kind[0] == "cgroup" and fields[3] == "/":
                    for name in kind[2].split(","):
                        if name in V1_CONTROLLERS:
                            v1[name] = _unescape(fields[4])
        if not v2:
            raise FileNotFoundError(
                errno.ENOENT,
                "no cgroup2 hierarchy is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup",
            )
        known = set(read(f"{v2}/cgroup.controllers").split())
        return cls(v2, v1, frozenset(known.intersection(CONTROLLERS)), delegates)

    def has(self, name: str) -> bool:
        """Whether a controller of this host has what cgroup v2 calls `name`."""
        if name.partition(".")[0] in self.controllers:
            return True
        v1 = cgroup1.GET.get(name)
        return v1 is not None and v1[0] in self.v1


class Group:
    """One container's groups."""

    __slots__ = ("hierarchies", "past", "path", "relative", "root", "v1")

    def __init__(
        self, hierarchies: Hierarchies, relative: str, v1_relative: str, root: bool
    ) -> None:
        self.hierarchies = hierarchies
        self.relative = relative
        self.path = f"{hierarchies.v2}/{relative}"
        self.v1 = {name: f"{top}/{v1_relative}" for name, top in hierarchies.v1.items()}
        self.root = root
        self.past: dict[str, dict[str, int]] = {}
        """What nested containers that are gone have counted, by file; see `inherit`."""

    @property
    def v1_paths(self) -> tuple[str, ...]:
        """Its v1 groups; one hierarchy may have several controllers."""
        return tuple(dict.fromkeys(self.v1.values()))

    @classmethod
    def host(cls, hierarchies: Hierarchies) -> Group:
        """The roots of the hierarchies, which account the host."""
        return cls(hierarchies, "", "", True)

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
        for path in (self.path, *self.v1_paths):
            os.makedirs(path, exist_ok=True)
        self._delegate(self.path)

    def _delegate(self, path: str) -> None:
        if self.hierarchies.controllers:
            wanted = " ".join(f"+{name}" for name in sorted(self.hierarchies.controllers))
            write(f"{path}/cgroup.subtree_control", wanted)

    def create(self, uid: int, gid: int) -> None:
        """Make the groups; `uid` and `gid` are the host's IDs of the container's root.

        The order matters: cgroup.kill goes through the children in the order of their making, and
        the members are to go before the init, which else would do it one by one.
        """
        for path in (self.path, *self.v1_paths):
            os.mkdir(path)
        self._delegate(self.path)
        payload = f"{self.path}/payload"
        os.mkdir(payload)
        # What a delegate makes is ours to walk and to remove.
        write(f"{payload}/cgroup.max.descendants", str(DELEGATED_MAX))
        write(f"{payload}/cgroup.max.depth", str(DELEGATED_DEPTH))
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
            for path in (self.path, *self.v1_paths):
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
            text = read(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                return {"populated": 0, "frozen": 0}
            raise
        return pairs(text)

    def pids(self, part: str = "payload") -> list[int]:
        """Host PIDs of the processes of one part, those in groups that delegates made included."""
        result: list[int] = []
        for directory in walk(f"{self.path}/{part}"):
            try:
                text = read(f"{directory}/cgroup.procs")
            except OSError as error:
                # EOPNOTSUPP: a threaded group; its processes are listed by the domain above it.
                if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                    continue
                raise
            # 0 is a process that this PID namespace cannot name.
            result += [pid for pid in map(int, text.split()) if pid]
        return result

    # --- acting ---

    def give_way(self, on: bool) -> None:
        """Let its processes run only when nobody else wants to (SCHED_IDLE, of a group: cpu.idle),
        and preempt them at once.

        Whoever is removing it asks for much in turns with us; each turn would wait for the time
        slice of one of its processes, of which a fork bomb has many.
        """
        for path in (f"{self.path}/cpu.idle", f"{self.v1.get('cpu', '')}/cpu.idle"):
            with contextlib.suppress(OSError):
                write(path, str(int(on)))

    def hurry(self) -> None:
        """Let its processes, which are to be killed, have all the CPU time that their end takes.

        They die at their own expense: as one group of many, a thousand of them would take long.
        """
        self.give_way(False)
        v1 = self.v1.get("cpu", "")
        for path, value in ((f"{self.path}/cpu.weight", "10000"), (f"{v1}/cpu.shares", "262144")):
            with contextlib.suppress(OSError):
                write(path, value)

    def lift_quota(self) -> None:
        """Likewise: a cpu.max of its own holds no more."""
        v1 = self.v1.get("cpu", "")
        for path, value in ((f"{self.path}/cpu.max", "max"), (f"{v1}/cpu.cfs_quota_us", "-1")):
            with contextlib.suppress(OSError):
                write(path, value)

    def kill(self, part: str = "") -> None:
        """SIGKILL to every process in it, also those being forked; a group that is gone is dead."""
        path = f"{self.path}/{part}/cgroup.kill" if part else f"{self.path}/cgroup.kill"
        try:
            write(path, "1")
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
            write(path, "1")
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
            write(f"{self.payload}/cgroup.freeze", "0")

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
        write(f"{self.path}/cgroup.freeze", "1" if on else "0")

    def frozen_by_itself(self) -> bool:
        """What was last written by `freeze`, whatever the ancestors are; a group that is gone is
        not."""
        try:
            return read(f"{self.path}/cgroup.freeze").strip() == "1"
        except FileNotFoundError:
            return False

    # --- limits and accounting ---

    def get(self, name: str) -> str:
        """A value in v2's form; EOPNOTSUPP when no controller of this host has it."""
        with self._telling(name):
            controller, _, rest = name.partition(".")
            by_v2 = controller in self.hierarchies.controllers
            if rest == "pressure" or (by_v2 and name != "pids.events"):
                return read(f"{self.path}/{name}").strip()
            if name == "cpu.stat":
                # The usage is there without any controller.
                extra = cgroup1.cpu_stat(self.v1) if "cpu" in self.v1 and not self.root else ""
                return (read(f"{self.path}/{name}") + extra).strip()
            if name in cgroup1.COUNTERS:
                return self._format(name, self.counters(name))
            needs, show = cgroup1.GET.get(name, ("", None))
            if show is not None and needs in self.v1:
                return show(self.v1)
        raise _lacking(name)

    def set(self, name: str, value: str, limits: Limits = ()) -> None:
        """Set a limit, in the form that `limits.parse` gives; `limits` are the group's others.

        What the kernel says to it: ENODEV for a device that is not there, EBUSY for memory that
        cannot be reclaimed (v1).  EOPNOTSUPP when no controller of this host has it.
        """
        with self._telling(name):
            if name.partition(".")[0] in self.hierarchies.controllers:
                write(f"{self.path}/{name}", value)
            elif name == "io.max" and "blkio" in self.v1:
                cgroup1.set_io_max(self.v1, value)
            elif self.hierarchies.has(name) and name in cgroup1.SET:
                cgroup1.SET[name](self.v1, merged(limits, name, value))
            else:
                raise _lacking(name)

    def shown(self, name: str, limits: Limits) -> str:
        """A limit as it was written, if that is what is in force: the kernel keeps less of it."""
        now, written = self.get(name), find(limits, name)
        if not written or now == written:
            return now
        by_v1 = name.partition(".")[0] not in self.hierarchies.controllers
        if to_pages(written) == now or (by_v1 and cgroup1.same(name, written, now)):
            return written
        return now

    def counters(self, name: str) -> dict[str, int]:
        """The numbers of memory.events, pids.events and io.stat (by `DEVICE KEY`), those of nested
        containers included; EOPNOTSUPP when no controller of this host has them."""
        controller, count = cgroup1.COUNTERS[name]
        with self._telling(name):
            if name == "pids.events" and self._counts_forks_apart():
                found = count({"pids": self.path})
            elif name.partition(".")[0] in self.hierarchies.controllers:
                return _counters(name, read(f"{self.path}/{name}"))
            elif controller in self.v1:
                found = count(self.v1)
            else:
                raise _lacking(name)
            for key, value in self.past.get(name, {}).items():
                found[key] = found.get(key, 0) + value
            return found

    def _counts_forks_apart(self) -> bool:
        """Whether cgroup v2 counts rejected forks in the group of the process alone, as v1 does:
        before Linux 6.11."""
        events = f"{self.path}/pids.events"
        return "pids" in self.hierarchies.controllers and not os.path.exists(f"{events}.local")

    def notifying(self, name: str) -> tuple[str, ...]:
        """Where inotify(7) tells of changes of memory.events or pids.events of this group, nested
        ones aside on v1."""
        controller = name.partition(".")[0]
        if controller in self.hierarchies.controllers:
            apart = name == "pids.events" and self._counts_forks_apart()
            return (f"{self.payload}/{name}",) if apart else (f"{self.path}/{name}",)
        return (f"{self.v1['pids']}/{name}",) if controller == "pids" and "pids" in self.v1 else ()

    def inherit(self, name: str, counters: dict[str, int]) -> None:
        """Keep what a nested container has counted, whose groups go: the kernel forgets it."""
        past = self.past.setdefault(name, {})
        for key, value in counters.items():
            if value:
                past[key] = past.get(key, 0) + value

    def legacy(self) -> tuple[str, ...]:
        """The files whose counts go with nested containers' groups on this host."""
        found = [name for name, (of, _) in cgroup1.COUNTERS.items() if of in self.v1]
        return (*found, "pids.events") if self._counts_forks_apart() else tuple(found)

    @staticmethod
    def _format(name: str, counters: dict[str, int]) -> str:
        if name != "io.stat":
            return "\n".join(f"{key} {value}" for key, value in counters.items())
        devices: dict[str, list[str]] = {}
        for key, value in counters.items():
            device, word = key.split()
            devices.setdefault(device, []).append(f"{word}={value}")
        return "\n".join(f"{device} {' '.join(words)}" for device, words in devices.items())

    @contextlib.contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        """EOPNOTSUPP for a file that this kernel does not have, ENODEV when the group is gone."""
        try:
            yield
        except FileNotFoundError as error:
            if os.path.exists(self.path):
                raise _lacking(name) from error
            raise OSError(errno.ENODEV, "its group is gone", name) from error

    def cpu_usec(self) -> dict[str, int]:
        """`cpu.stat`'s usage_usec, user_usec, system_usec (there without any controller)."""
        found = pairs(read(f"{self.path}/cpu.stat"))
        return {key: found[key] for key in ("usage_usec", "user_usec", "system_usec")}


def _lacking(name: str) -> OSError:
    return OSError(errno.EOPNOTSUPP, "no controller of this host has it", name)


def _counters(name: str, text: str) -> dict[str, int]:
    if name != "io.stat":
        return pairs(text)
    found: dict[str, int] = {}
    for line in text.splitlines():
        device, *words = line.split()
        for word in words:
            key, equals, value = word.partition("=")
            # Policies of the kernel may add words of their own (cost.vrate=100.00).
            if equals and value.isdigit():
                found[f"{device} {key}"] = int(value)
    return found


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


def pids_of(path: str) -> list[int]:
    """The processes of one group, without those below; none when it is gone."""
    try:
        return [int(line) for line in read(f"{path}/cgroup.procs").splitlines()]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise


def kill_at(path: str) -> None:
    """SIGKILL to every process of a group; one that is gone is dead."""
    try:
        write(f"{path}/cgroup.kill", "1")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


def signal_at(path: str, number: Signals) -> None:
    """A signal to every process of one group."""
    for pid in pids_of(path):
        # The PID may be another process's by now: check membership with the process held.
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                if path.endswith(membership(pid)):
                    pidfd_send_signal(fd, number)
            finally:
                os.close(fd)


def membership(pid: int) -> str:
    """The path of a process's v2 group within the hierarchy; ProcessLookupError when it has
    ended."""
    try:
        text = read(f"/proc/{pid}/cgroup")
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid)) from error
    for line in text.splitlines():
        if line.startswith("0::"):
            return line[3:]
    raise ProcessLookupError(errno.ESRCH, "no such process", str(pid))


def memberships(pid: int) -> dict[str, str]:
    """The paths of a process's groups, by v1 controller, and by "" that of v2 (cgroups(7))."""
    try:
        text = read(f"/proc/{pid}/cgroup")
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid)) from error
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    if "" not in found:
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid))
    return found
