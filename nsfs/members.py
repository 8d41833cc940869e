"""Members: which processes are in a container, and how a viewpoint numbers them.

Membership is the kernel's: the cgroup.  A process is in the container whose group it is in and in
all that this is nested in.  PIDs are the viewpoint's, read from `NSpid` (proc_pid_status(5)): one
PID for each PID namespace from the reader's down to the process's own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
from collections.abc import Iterator

import trio

from nsfs import cgroup, idmap
from nsfs.attribute import one_line
from nsfs.container import Container, Face
from nsfs.found import Found
from nsfs.kernfs import read_once
from nsfs.processes import start_time

COMMAND_WAIT_S = 0.2
"""How long a process may keep us from reading its command line."""
COMMANDS_AT_ONCE = 4
"""How many of those of one container at the top, or of one user, may be read at once."""
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
NS_GET_TGID_FROM_PIDNS, NS_GET_TGID_IN_PIDNS = 0x8004B707, 0x8004B709
"""ioctl_nsfs(2), Linux 6.11: a process of a PID namespace by our number, and of ours by its."""


def no_process(pid: object) -> FileNotFoundError:
    """ENOENT for a PID that is no member."""
    return FileNotFoundError(errno.ENOENT, "no such process in it", str(pid))


def host_pids(container: Container) -> Iterator[int]:
    """Host PIDs of the members, those of nested containers included, no init among them."""
    if container.parent is None:
        inits = {c.init_pid for c in container.world.containers.values()}
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) not in inits:
                yield int(name)
        return
    if isinstance(container, Found):
        yield from container.host_pids()
        return
    yield from container.group.pids()
    for each in container.descendants():
        yield from each.group.pids()
    for path in container.world.away(container):
        yield from cgroup.pids_of(path)


def count(container: Container) -> int:
    """How many members it has."""
    return sum(1 for _ in host_pids(container))


def level(viewpoint: Container) -> int:
    """How many PID namespaces the viewpoint is below the host's: its place in `NSpid`."""
    holder = viewpoint.holder("pid")
    return sum(1 for each in holder.lineage() if each.parent is not None and each.own("pid"))


def _status(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            pairs = (line.partition(":\t") for line in file)
            return {key: value.rstrip("\n") for key, _, value in pairs}
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_process(pid) from error


def seen_pid(pid: int, depth: int) -> int:
    """How a viewpoint at that level numbers a process of the host's PID; 0 when it cannot."""
    if not depth:
        return pid
    numbers = _status(pid).get("NSpid", "").split()
    return int(numbers[depth]) if depth < len(numbers) else 0


def has_name(viewpoint: Container, pid: int) -> bool:
    """Whether a member is in the viewpoint's PID namespace: one in part is in that of its home, or,
    born after that one was joined, in the other container's."""
    world = viewpoint.world
    if not world.parts:
        return True
    try:
        part = world.part(cgroup.membership(pid))
    except ProcessLookupError:
        return False
    if part is None:
        return True
    places = [part.home]
    joined = ((part.holder, part.types), *part.others)
    places += (number for number, types in joined if "pid" in types.split(","))
    holder = viewpoint.holder("pid")
    found = (world.containers.get(number) for number in places)
    return any(each is not None and holder in each.lineage() for each in found)


def seen_pids(face: Face) -> Iterator[tuple[int, int]]:
    """The members: the host's PID, and the one by which the face's viewpoint knows it."""
    depth = level(face.viewpoint)
    with _pid_namespace(face.viewpoint, depth) as namespace_fd:
        for pid in host_pids(face.container):
            if not depth:
                yield pid, pid
                continue
            try:
                seen = _translated(namespace_fd, NS_GET_TGID_IN_PIDNS, pid)
                if seen is None:
                    seen = seen_pid(pid, depth)
            except FileNotFoundError:
                continue
            if seen and has_name(face.viewpoint, pid):
                yield pid, seen


@contextlib.contextmanager
def _pid_namespace(viewpoint: Container, depth: int) -> Iterator[int]:
    """A descriptor of the viewpoint's PID namespace; -1 when that is the host's, or dead."""
    fd = -1
    if depth:
        with contextlib.suppress(OSError):
            init_pid = viewpoint.holder("pid").init_pid
            fd = os.open(f"/proc/{init_pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def _translated(namespace_fd: int, request: int, pid: int) -> int | None:
    """A PID in or from a PID namespace; FileNotFoundError when there is no such process, None when
    the kernel cannot say."""
    if namespace_fd < 0:
        return None
    try:
        return fcntl.ioctl(namespace_fd, request, pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise no_process(pid) from error
        return None


def host_pid(face: Face, seen: int) -> int:
    """The host's PID of a member that the viewpoint knows by `seen`; FileNotFoundError for
    another's."""
    depth = level(face.viewpoint)
    container = face.container
    if not depth:
        if container.parent is None:
            if seen == container.init_pid or not os.path.exists(f"/proc/{seen}"):
                raise no_process(seen)
            return seen
        if container_of(container, seen) is None:
            raise no_process(seen)
        return seen
    # To go through all members takes too long to be done for whoever asks as often as he likes.
    with _pid_namespace(face.viewpoint, depth) as namespace_fd:
        found = _translated(namespace_fd, NS_GET_TGID_FROM_PIDNS, seen)
    candidates = host_pids(container) if found is None else (found,)
    for pid in candidates:
        try:
            if (
                seen_pid(pid, depth) == seen
                and has_name(face.viewpoint, pid)
                and (found is None or container_of(container, pid) is not None)
            ):
                return pid
        except FileNotFoundError:
            continue
    raise no_process(seen)


def container_of(top: Container, pid: int) -> Container | None:
    """The container, `top` or one nested in it, that a process of the host's PID is a member of;
    None for an init and for a process that is not in `top`.  Of a found one, what is found."""
    if isinstance(top, Found):
        return top.member(pid)
    try:
        path = cgroup.membership(pid)
    except ProcessLookupError:
        return None
    world = top.world
    prefix = f"/{world.root.group.relative}/"
    if not path.startswith(prefix):
        return top if top.parent is None else None
    found: Container | None = None
    parts = path[len(prefix) :].split("/")
    # ID, then either "sub" and the next ID, or what kind of process it is.
    while parts and parts[0].isdigit():
        found = world.containers.get(int(parts[0]))
        if len(parts) > 1 and parts[1] == "sub":
            parts = parts[2:]
        else:
            break
    if found is None or len(parts) < 2 or parts[1] != "payload":
        return None
    part = world.part(path)
    places = [found] if part is None else world.containers_of(part)
    return next((each for each in places if top in each.lineage()), None)


def family(pid: int, depth: int) -> tuple[int, int, str]:
    """A process's parent by the host's PID, its own PID as a viewpoint at that level knows it (0:
    not at all), and its name (`comm`)."""
    status = _status(pid)
    numbers = status.get("NSpid", "").split()
    seen = int(numbers[depth]) if depth < len(numbers) else 0
    return int(status["PPid"]), seen, one_line(status.get("Name", ""))


def owner(pid: int) -> tuple[int, int]:
    """The host's real IDs of a process: (uid, gid)."""
    try:
        # All of it as text would take five times as long; what a name has of lines is escaped.
        status = read_once(f"/proc/{pid}/status")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_process(pid) from error
    uid, gid = (
        status[status.index(key) + 6 :].split(None, 1)[0] for key in (b"\nUid:\t", b"\nGid:\t")
    )
    return int(uid), int(gid)


async def describe(face: Face, pid: int) -> list[tuple[str, object]]:
    """What reading `procs/PID` shows of the process with that PID of the host."""
    status = _status(pid)
    uid = int(status["Uid"].split()[0])
    inside = idmap.to_inside(face.viewpoint.map, uid)
    home = container_of(face.container, pid) or face.container
    found = face.world.found_with(pid)
    if found is not None and face.container in found.lineage():
        home = found
    return [
        ("container", face.path_to(home)),
        ("user", 65534 if inside is None else _user_name(face, inside)),
        ("command", await command(face.world.root, pid) or f"[{status.get('Name', '')}]"),
        ("since", f"{started(pid):.2f}"),
    ]


def _user_name(face: Face, uid: int) -> str:
    # Names are the host's: another viewpoint has a user database of its own, which is not ours to
    # read.
    if face.viewpoint.parent is None:
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            pass
    return str(uid)


async def command(root: Container, pid: int) -> str:
    """The command line with what cannot be printed escaped; "" when it has none or hides it."""
    try:
        raw = await command_line(root, pid)
    except OSError:
        raw = b""
    words = raw.rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


async def command_line(root: Container, pid: int) -> bytes:
    """/proc/PID/cmdline, 4096 bytes of it at most; EBUSY when the process keeps us from it.

    Reading it takes the process's mmap_lock, which a process holds while its mmap(2) of a file
    waits for that file's filesystem: for us, it may be.  So a thread waits, and not for long.  Of
    the processes of one container at the top, or of one user, a few can be waited for at once.
    """
    account = account_of(root, pid)
    limiter = _readers.setdefault(account, trio.CapacityLimiter(COMMANDS_AT_ONCE))
    try:
        with trio.move_on_after(COMMAND_WAIT_S):
            return await trio.to_thread.run_sync(
                _read_command, pid, abandon_on_cancel=True, limiter=limiter
            )
    finally:
        for each in [each for each, used in _readers.items() if not used.borrowed_tokens]:
            del _readers[each]
    raise OSError(errno.EBUSY, "its command line is locked", str(pid))


_readers: dict[tuple[bool, int], trio.CapacityLimiter] = {}


def account_of(root: Container, pid: int) -> tuple[bool, int]:
    """On whose account it is what a process keeps for itself: (True, number of the container at the
    top that it is in) or (False, the host's user)."""
    home = container_of(root, pid)
    if home is None or home is root:
        return False, owner(pid)[0]
    return True, next(each.number for each in home.lineage() if each.parent is root)


def _read_command(pid: int) -> bytes:
    try:
        return read_once(f"/proc/{pid}/cmdline")
    except (FileNotFoundError, ProcessLookupError):
        return b""


def started(pid: int) -> float:
    """When a process started, in seconds since the Epoch."""
    try:
        ticks = start_time(pid)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise no_process(pid) from error
    return boot_time() + ticks / CLOCK_TICKS


def boot_time() -> float:
    """When the machine was booted, in seconds since the Epoch (`btime` of proc_stat(5))."""
    with open("/proc/stat", encoding="ascii") as file:
        return float(next(line.split()[1] for line in file if line.startswith("btime")))
