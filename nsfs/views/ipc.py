"""`ipc/`: an IPC namespace as a tagged view (ipc_namespaces(7)).

shm sem msg   0444: the kernel's tables of System V shared memory, semaphores and message queues
              (proc_sysvipc(5)); PIDs and IDs are the viewer's
mqueue/       POSIX message queues (mq_overview(7)): a file each, 0444
sysctl/       what the kernel has of /proc/sys/kernel and /proc/sys/fs/mqueue for each IPC
              namespace, with its own modes, values and errors
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from nsfs import idmap, members
from nsfs.attribute import FOUND, Answer, Attribute, Contents, Directory, Entry, TagType
from nsfs.container import Container, Face
from nsfs.syscalls import new_mount
from nsfs.sysctl import Sysctls
from nsfs.view import PROC, in_thread, inside, tag

KIND = ("ipc",)
SYSCTLS = (
    *(("kernel", name) for name in ("msgmax", "msgmnb", "msgmni", "auto_msgmni", "msg_next_id")),
    *(("kernel", name) for name in ("sem", "sem_next_id", "shm_rmid_forced", "shm_next_id")),
    *(("kernel", name) for name in ("shmall", "shmmax", "shmmni")),
    ("fs", "mqueue"),
)
PID_COLUMNS = {"cpid", "lpid", "lspid", "lrpid"}
UID_COLUMNS = {"uid", "cuid"}
GID_COLUMNS = {"gid", "cgid"}


def _table(name: str) -> Attribute:
    async def show(face: Face) -> str:
        container = tag(face, VIEW)
        text = await inside(container, KIND, lambda: _read(f"/proc/sysvipc/{name}"))
        if face.viewpoint.parent is None:
            return text
        # It may have 32,768 rows, and the PIDs of each are looked up.
        return await in_thread(lambda: translated(face, text), PROC, container)

    return Attribute(name, show=show, flags=FOUND)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def translated(face: Face, text: str) -> str:
    """A table as the viewpoint is to see it: its PIDs and IDs, 0 and 65534 for those that it has
    no number for."""
    viewpoint = face.viewpoint
    head, *rows = text.splitlines()
    names = head.split()
    depth = members.level(viewpoint)
    found = [head]
    for row in rows:
        words = row.split()
        for at, name in enumerate(names):
            number = int(words[at], 16 if name == "key" else 10) if name != "perms" else 0
            if name in PID_COLUMNS:
                words[at] = str(_seen(number, depth))
            elif name in UID_COLUMNS | GID_COLUMNS:
                inside_id = idmap.to_inside(viewpoint.map, number)
                words[at] = str(65534 if inside_id is None else inside_id)
        found.append(" ".join(f"{word:>10}" for word in words))
    return "\n".join(found) + "\n"


def _seen(pid: int, depth: int) -> int:
    try:
        return members.seen_pid(pid, depth) if pid else 0
    except FileNotFoundError:
        return 0


class Queues(Contents):
    """The rest of the view: queues, by a detached mqueue filesystem, and sysctls."""

    def __init__(self, container: Container, mqueue_fd: int) -> None:
        self._fd = mqueue_fd
        self._sysctls = Sysctls(container, KIND, SYSCTLS)

    def close(self) -> None:
        """The mount goes with its last descriptor."""
        fd, self._fd = self._fd, -1
        os.close(fd)
        self._sysctls.close()

    def names(self, path: tuple[str, ...]) -> Answer[Iterable[str]]:
        """Two directories, the queues, sysctls."""
        if not path:
            return ("mqueue", "sysctl")
        if path[0] == "sysctl":
            return self._sysctls.names(path[1:])
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def depends_on(self, path: tuple[str, ...]) -> tuple[int, str]:
        """Both directories are always there."""
        return -1, ""

    def entry(self, path: tuple[str, ...]) -> Answer[Entry]:
        """A directory, a queue or a sysctl."""
        if path[0] == "sysctl":
            return self._sysctls.entry(path[1:])
        if path == ("mqueue",):
            return Directory("mqueue")
        if path[0] != "mqueue" or len(path) > 2:
            raise FileNotFoundError(errno.ENOENT, "no such file", path[-1])
        name = path[1]
        os.stat(name, dir_fd=self._fd, follow_symlinks=False)

        def show(face: Face) -> bytes:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._fd)
            try:
                return os.read(fd, 4096)
            finally:
                os.close(fd)

        return Attribute(name, show=show)


async def queues(container: Container) -> Queues:
    """What an IPC namespace has besides the tables."""
    return Queues(container, await inside(container, KIND, lambda: new_mount("mqueue")))


VIEW = TagType(
    "ipc", entries=tuple(map(_table, ("msg", "sem", "shm"))), contents=queues, flags=FOUND
)
FILES = (VIEW,)
