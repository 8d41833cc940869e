"""`procs/`: the members of a container.

An entry for each member but the init, those of nested containers included, named by the PID as the
viewer's PID namespace knows it; it belongs to the process's user, 0644.  Reading one shows,
flat-keyed, `container` (the path to the one that it is in), `user`, `command` and `since` (seconds
since the Epoch).  `procs/self` is whoever looks: one file for all, 0666 (a link(2) of it has to be
allowed where protected_hardlinks is set, see proc_sys_fs(5)), which nobody can write.
"""

from __future__ import annotations

from collections.abc import Iterator

from nsfs import entry, leaf, members
from nsfs.attribute import FOUND, Attribute, Caller, Directory, flat_keyed
from nsfs.container import Face
from nsfs.processes import thread_group
from nsfs.tree import SELF


async def process_show(face: Face, key: int) -> str:
    """What is known of one member."""
    return flat_keyed(await members.describe(face, members.host_pid(face, key)))


def procs_names(face: Face) -> Iterator[tuple[str, int]]:
    """The PIDs, in the order in which the kernel gives them."""
    in_part = leaf.partial(face.container)
    for pid, seen in members.seen_pids(face):
        types = in_part.get(pid)
        yield f"{seen}:{types}" if types else str(seen), seen


def procs_find(face: Face, name: str, caller: Caller) -> int:
    """The PID of an entry; ENOENT when no such process is a member."""
    if name == "self":
        pid = thread_group(caller.tid)
        if members.container_of(face.container, pid) is None:
            raise members.no_process("self")
        return SELF
    base, _, types = name.partition(":")
    if not (base.isascii() and base.isdigit() and len(base) <= 7) or base != str(int(base)):
        raise members.no_process(name)
    pid = members.host_pid(face, int(base))
    if leaf.partial(face.container).get(pid, "") != types or (":" in name) != bool(types):
        raise members.no_process(name)
    return int(base)


PROCESS = Attribute("PID", show=process_show, mode=0o644, flags=FOUND)

FILES = (
    Directory(
        "procs",
        names=procs_names,
        find=procs_find,
        member=PROCESS,
        link=entry.link,
        mode=0o755,
        flags=FOUND,
    ),
)
