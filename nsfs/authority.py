"""Who may do what to what, where the modes of the tree cannot say it.

The permission model is the kernel's: plain owners and modes, checked by it (`default_permissions`).
Here is what concerns things outside of the tree: which IDs of the host somebody may come to run
with, which directory of the host may become a root filesystem, how much of the host one user may
have.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio

from nsfs import idmap
from nsfs.attribute import Caller, Entry
from nsfs.build import Build, Origin
from nsfs.container import Container, Face, Phase

if TYPE_CHECKING:
    from nsfs.world import World


def may_have_ids(container: Container, viewpoint: Container, uid: int, gid: int) -> bool:
    """Whether a user whom the modes let start something in a container may have its IDs.

    The container's own IDs come with it.  Those that it shares are another container's, so that
    one has to be the user's as well; and the host's are root's, or the user's who has just these.
    The IDs of a viewpoint's root go with all that is in it.
    """
    holder = container.holder_of_ids()
    if holder is container or uid == viewpoint.root_uid:
        return True
    if holder.parent is None:
        return all(each == (each[0], uid, 1) and uid == gid for each in container.map)
    return holder.owner_seen(viewpoint)[0] == uid


def check_ids(face: Face, caller: Caller) -> None:
    """EPERM when what a caller starts in a container would run with IDs that are not his.

    The kernel has seen that he may write to the file.
    """
    if not may_have_ids(face.container, face.viewpoint, caller.uid, caller.gid):
        raise PermissionError(
            errno.EPERM, "it has IDs that are not the caller's", face.container.name
        )


def check_mode(face: Face, entry: Entry | None, number: int, caller: Caller, wanted: int) -> None:
    """EACCES unless the modes as they are now let a caller do that (os.R_OK, os.W_OK).

    The kernel asks this of every request; but what it knows of modes may be older than a chown(2)
    that came in between, and a descriptor may have been opened before.
    """
    # The host's root, or that of whoever looks: CAP_DAC_OVERRIDE.
    if caller.uid in (0, face.viewpoint.root_uid):
        return
    uid, gid = face.owner(entry, number)
    mode = face.directory_mode() if entry is None else face.mode(entry, number)
    if caller.uid == uid:
        mode >>= 6
    elif gid == caller.gid or gid in _groups(caller):
        mode >>= 3
    if wanted & ~mode:
        name = face.container.name if entry is None else entry.name
        raise PermissionError(errno.EACCES, "it is not the caller's now", name)


def _groups(caller: Caller) -> set[int]:
    """The supplementary groups of a caller: the host's IDs."""
    try:
        with open(f"/proc/{caller.tid}/status", encoding="utf-8", errors="replace") as file:
            fields = dict(line.split(":\t", 1) for line in file if ":\t" in line)
    except OSError:
        return set()
    if int(fields["Uid"].split()[3]) != caller.uid:
        # Another one by now.
        return set()
    return {int(word) for word in fields["Groups"].split()}


def namespace_owner(container: Container) -> tuple[int, int]:
    """Whom the kernel is to take for the owner of a container's user namespace: (uid, gid).

    To that user it grants everything in it (user_namespaces(7)), so it is the directory's owner
    only where he may have the IDs; else the root of the container whose IDs they are.
    """
    parent = container.parent
    if parent is None or may_have_ids(container, parent, container.uid, container.gid):
        return container.uid, container.gid
    holder = container.holder_of_ids()
    return holder.root_uid, holder.root_gid


def check_number(parent: Container, caller: Caller) -> None:
    """ENOSPC when a user has as many containers as the configuration lets one have.

    The kernel answers so for its own limits of namespaces, which are a user's as well
    (/proc/sys/user, namespaces(7)).
    """
    uid, _ = parent.whose(caller.uid, caller.gid, parent.world.root)
    most = parent.world.config.limits.containers_per_user
    if uid and most is not None and sum(1 for _ in containers_of(parent.world, uid)) >= most:
        raise OSError(errno.ENOSPC, "the user's limit of containers", str(uid))


def check_ranges(container: Container) -> None:
    """ENOSPC when the user on whose account a container is has as many ranges of IDs as one may
    have."""
    world = container.world
    uid, _ = container.owner_seen(world.root)
    most = world.config.limits.ranges_per_user
    if not uid or most is None:
        return
    others = (each for each in containers_of(world, uid) if each is not container)
    if sum(1 for each in others if each.range is not None) >= most:
        raise OSError(errno.ENOSPC, "the user's limit of ranges of IDs", str(uid))


def containers_of(world: World, uid: int) -> Iterator[Container]:
    """The containers on the account of a user of the host: those that show as his outside.

    Those that were removed do not count, although their last processes may be on their way out.
    """
    for each in world.containers.values():
        if (
            each.parent is not None
            and each.phase not in (Phase.GONE, Phase.SPARE)
            and each.owner_seen(world.root)[0] == uid
        ):
            yield each


async def check_rootfs(tree_fd: int, build: Build, container: Container) -> None:
    """Whether whoever named that tree may make it a container's root filesystem; EPERM when not."""
    mapped = "user" in build.types
    found = await check_tree(
        tree_fd, build.rootfs, build.rootfs_origin, container, mapped=mapped, hidden=mapped
    )
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "the root filesystem is no directory", build.rootfs)


async def check_tree(
    tree_fd: int, path: str, origin: Origin, container: Container, *, mapped: bool, hidden: bool
) -> os.stat_result:
    """Whether whoever named a tree may have a container use it as if it were its own; EPERM if not.
    Returns what stat(2) says of it.

    `mapped`: idmapped from uid 0, its files belong on disk to the host's users: a member that is
    root inside could leave a setuid program of the host's root there.  So the host's root may name
    such a tree only where other users of the host cannot reach it, if it is writable (`hidden`):
    below a directory that they cannot search.  Anybody else may name a tree of their own, of which
    `rootfs_map` says more.

    """
    found = await _stat(tree_fd)

    def check() -> None:
        if (os.major(found.st_dev), os.minor(found.st_dev)) == container.world.device_numbers:
            raise OSError(errno.EINVAL, "the tree is nsfs's own", path)
        if origin.uid != 0:
            if found.st_uid != origin.uid:
                raise PermissionError(errno.EPERM, "the tree belongs to somebody else", path)
            if mapped:
                rootfs_map(container, origin)
        elif hidden and not _hidden_from_others(path):
            raise PermissionError(
                errno.EPERM,
                "others can search every directory above it, and so run setuid programs left there",
                path,
            )

    # The thread may go on when nobody waits for it any more.
    await trio.to_thread.run_sync(check, abandon_on_cancel=True, limiter=_lookers)
    return found


async def _stat(tree_fd: int) -> os.stat_result:
    """fstat(2) in a thread, which may go on when nobody waits for it any more: the filesystem may
    be slow, broken, somebody's FUSE daemon or our own."""

    tree = _Kept(tree_fd)
    return await trio.to_thread.run_sync(tree.stat, abandon_on_cancel=True, limiter=_lookers)


class _Kept:
    """A descriptor that is open for as long as anybody, the thread included, has this."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)

    def stat(self) -> os.stat_result:
        return os.fstat(self.fd)

    def __del__(self) -> None:
        os.close(self.fd)


_lookers = trio.CapacityLimiter(16)


def rootfs_map(container: Container, origin: Origin) -> idmap.Map | None:
    """How the tree that somebody named is idmapped: (on disk, the host's ID, count); None for the
    container's own map.

    By that members get to leave files on disk that belong to others, so it is for the host's root
    to say.  Another user's own ID is all that is mapped, to the container's root.  The root of a
    container has its IDs on disk as well, if it was given a tree that is idmapped so: whether this
    is one is seen when it is mapped (`check_mapped`).  EPERM for its other users, of whose IDs on
    disk nothing is known.
    """
    if origin.uid == 0:
        return None
    if origin.viewpoint == 0:
        return ((origin.uid, container.root_uid, 1),)
    viewpoint = container.world.containers.get(origin.viewpoint)
    if viewpoint is None or origin.uid != viewpoint.root_uid:
        raise PermissionError(errno.EPERM, "only root names a tree inside", str(origin.uid))
    if any(idmap.to_outside(viewpoint.map, i) is None for i in _ends(container.map)):
        raise PermissionError(errno.EPERM, "its IDs on disk are not its parent's", container.name)
    return container.map


def _ends(table: idmap.Map) -> Iterator[int]:
    for inside, _, count in table:
        yield from (inside, inside + count - 1)


async def check_mapped(tree_fd: int, container: Container) -> None:
    """EPERM when what belonged to whoever named a tree is not the container's root's, now that it
    is idmapped: then he has another ID on disk, where it was mounted with an idmap."""
    if (await _stat(tree_fd)).st_uid != container.root_uid:
        raise PermissionError(errno.EPERM, "the tree belongs to somebody else on disk", "rootfs")


def _hidden_from_others(path: str) -> bool:
    """Whether the host's tree or a directory above it lets no `other` pass."""
    real = os.path.realpath(path)
    while True:
        if not os.stat(real).st_mode & stat.S_IXOTH:
            return True
        if real == "/":
            return False
        real = os.path.dirname(real)


def check_namespace(face: Face, kind: str, caller: Caller) -> None:
    """Whether a caller may change the namespace of a type that a container is in; EPERM if not.

    The container may be sharing it with one that it is in: then it is that one's to change, and
    from inside, where nothing names an ancestor, nobody's.
    """
    holder = face.container.holder(kind)
    if holder is not face.container:
        check_holder(face, holder, kind, caller)


def check_holder(face: Face, holder: Container, kind: str, caller: Caller) -> None:
    """Whether a caller who looks by a face may change another container's namespace: that one's
    owner may, and root, where it is to be seen; EPERM if not."""
    inside = face.viewpoint in holder.lineage()
    may = {face.viewpoint.root_uid}
    if face.viewpoint.parent is None:
        may.add(holder.owner_seen(face.viewpoint)[0])
    if not inside or caller.uid not in may:
        raise PermissionError(errno.EPERM, f"its {kind} namespace is another's", holder.name)


def check_host_log(container: Container, viewpoint: Container, *, takes: bool) -> None:
    """Whether who looks from there may read the log of a container where that is the host's, which
    one at the top without `syslog` shares; EPERM when not.

    As check_syslog_permissions() has it: it takes CAP_SYSLOG in the initial user namespace where
    kernel.dmesg_restrict is set, and for /proc/kmsg (`takes`) always.
    """
    if container.holder("syslog").parent is not None or viewpoint.holder("user").parent is None:
        return
    if takes or dmesg_restricted():
        raise PermissionError(errno.EPERM, "it is the host's kernel log", container.name)


def dmesg_restricted() -> bool:
    """The sysctl kernel.dmesg_restrict."""
    with open("/proc/sys/kernel/dmesg_restrict", encoding="ascii") as file:
        return file.read().strip() != "0"


def mounts_of(tid: int, most: int) -> bytes:
    """/proc/TID/mountinfo, nothing of a thread that has ended; EFBIG when it is longer than `most`
    bytes."""
    text = bytearray()
    try:
        fd = os.open(f"/proc/{tid}/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while part := os.read(fd, 65536):
                text += part
                if len(text) > most:
                    raise OSError(errno.EFBIG, "too many mounts to look through", str(tid))
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return bytes(text)


def check_seen_once(mounts: bytes, device: tuple[int, int], viewpoint: int) -> None:
    """EPERM when the mount namespace with that mountinfo has the tree at more than one place.

    The mount is unbindable, so that `mount --rbind /sys chroot/sys` does not carry it along into a
    tree that somebody will `rm -rf`.  But a copy of the mount namespace is bindable again
    (clone_mnt() keeps no such flag).  There a removal may be meant for the copy, and what that
    would kill is the same.  Which of the two places a request came by cannot be seen.
    """
    root = "/" if not viewpoint else f"/.f/{viewpoint}"
    # Blanks in a path are escaped there, so this can be at one place of a line only.
    places = mounts.count(f" {device[0]}:{device[1]} {root} ".encode())
    if places > 1:
        raise PermissionError(
            errno.EPERM,
            f"the tree is mounted at {places} places there: which is meant is not clear",
        )
