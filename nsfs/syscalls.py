"""Typed wrappers for system calls that the os module lacks; each raises OSError with errno,
the call's name and what it was about.  Sources: mount(2), umount(2), inotify(7), openat2(2),
setns(2), pidfd_getfd(2), capget(2), seccomp_unotify(2), and
Documentation/filesystems/mount_api.rst for fsopen(2) and what follows it.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from nsfs import _syscalls  # type: ignore[attr-defined]

_lib: Any = _syscalls.lib
_ffi: Any = _syscalls.ffi

MS_BIND: int = _lib.MS_BIND
MS_REC: int = _lib.MS_REC
MS_PRIVATE: int = _lib.MS_PRIVATE
MS_SLAVE: int = _lib.MS_SLAVE
MS_UNBINDABLE: int = _lib.MS_UNBINDABLE
MS_RDONLY: int = _lib.MS_RDONLY
MS_REMOUNT: int = _lib.MS_REMOUNT
MS_NOSUID: int = _lib.MS_NOSUID
MS_NODEV: int = _lib.MS_NODEV
MS_NOEXEC: int = _lib.MS_NOEXEC
MNT_DETACH: int = _lib.MNT_DETACH
IN_MODIFY: int = _lib.IN_MODIFY
IN_IGNORED: int = _lib.IN_IGNORED
NS_GET_USERNS: int = _lib.NS_GET_USERNS
NS_GET_PARENT: int = _lib.NS_GET_PARENT
NS_GET_OWNER_UID: int = _lib.NS_GET_OWNER_UID
RESOLVE_IN_ROOT: int = _lib.RESOLVE_IN_ROOT

_INOTIFY_EVENT = struct.Struct("iIII")


def _check(result: int, call: str, about: str) -> int:
    if result < 0:
        raise OSError(-result, f"{call}: {os.strerror(-result)}", about)
    return result


def mount(
    source: str, target: str, fstype: str | None, flags: int, data: str | None = None
) -> None:
    """mount(2)."""
    _check(
        _lib.nsfs_mount(
            os.fsencode(source),
            os.fsencode(target),
            _ffi.NULL if fstype is None else fstype.encode(),
            flags,
            _ffi.NULL if data is None else data.encode(),
        ),
        "mount",
        target,
    )


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_lib.nsfs_umount(os.fsencode(target), flags), "umount", target)


def openat2(dir_fd: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2): a new descriptor, close-on-exec."""
    return _check(
        _lib.nsfs_openat2(dir_fd, os.fsencode(path), flags | os.O_CLOEXEC, resolve), "openat2", path
    )


def setns(fd: int, kind: int) -> None:
    """setns(2), of the calling thread."""
    _check(_lib.nsfs_setns(fd, kind), "setns", "")


def new_mount(fstype: str, options: Mapping[str, str] | None = None) -> int:
    """A new instance of a filesystem, mounted nowhere: a descriptor of its root directory.

    fsopen(2), fsconfig(2), fsmount(2); nosuid, nodev, noexec.
    """
    context_fd = _check(_lib.nsfs_fsopen(fstype.encode()), "fsopen", fstype)
    try:
        for key, value in (options or {}).items():
            _check(
                _lib.nsfs_fsconfig(
                    context_fd, _lib.FSCONFIG_SET_STRING, key.encode(), os.fsencode(value)
                ),
                "fsconfig",
                f"{key}={value}",
            )
        create = _lib.FSCONFIG_CMD_CREATE
        _check(_lib.nsfs_fsconfig(context_fd, create, _ffi.NULL, _ffi.NULL), "fsconfig", fstype)
        attributes = _lib.MOUNT_ATTR_NOSUID | _lib.MOUNT_ATTR_NODEV | _lib.MOUNT_ATTR_NOEXEC
        return _check(_lib.nsfs_fsmount(context_fd, attributes), "fsmount", fstype)
    finally:
        os.close(context_fd)


def pidfd_getfd(pid: int, fd: int) -> int:
    """pidfd_getfd(2): a duplicate of a process's descriptor, close-on-exec; EBADF: it has none."""
    return _check(_lib.nsfs_pidfd_getfd(pid, fd), "pidfd_getfd", str(pid))


def effective_capabilities(tid: int) -> int:
    """The effective set of a thread (capget(2)); none of one that is gone."""
    words = _ffi.new("unsigned int[2]")
    if _lib.nsfs_effective(tid, words) < 0:
        return 0
    return int(words[1]) << 32 | int(words[0])


def namespace_numbers(pid: int) -> tuple[int, ...]:
    """The inode numbers of a process's namespaces, in the order of `namespaces.TYPES`.

    ProcessLookupError when it has none any more, as a zombie; PermissionError where ptrace(2)'s
    access check forbids to look.
    """
    words = _ffi.new("unsigned int[8]")
    error = _lib.nsfs_namespaces(pid, words)
    if error == -errno.ENOENT:
        error = -errno.ESRCH
    _check(error, "readlinkat", f"/proc/{pid}/ns")
    return tuple(words)


class Notifications:
    """Calls that wait at seccomp listeners (seccomp_unotify(2)).

    They are received into `buffer`, 80 bytes for struct seccomp_notif.
    """

    def __init__(self, buffer: Any) -> None:
        self._notif = _ffi.from_buffer(buffer, require_writable=True)

    def receive(self, listener_fd: int) -> bool:
        """Receive one when poll(2) says that there is one; False: it has gone meanwhile, or another
        has received it."""
        return bool(_lib.nsfs_notif_recv(listener_fd, self._notif) == 0)

    @staticmethod
    def is_valid(listener_fd: int, ident: int) -> bool:
        """Whether the call still waits: not answered, not interrupted, its caller alive."""
        return bool(_lib.nsfs_notif_valid(listener_fd, ident) == 0)

    @staticmethod
    def answer(listener_fd: int, ident: int, value: int, error: int = 0) -> bool:
        """Have the call return `value`, or fail with an errno; False: it does not wait."""
        return bool(_lib.nsfs_notif_send(listener_fd, ident, 0 if error else value, -error) == 0)


class Inotify:
    """An inotify(7) instance, non-blocking; `fd` is for whoever waits."""

    def __init__(self) -> None:
        self.fd: int = _check(_lib.nsfs_inotify_init(), "inotify_init1", "")

    def add(self, path: str, mask: int = IN_MODIFY) -> int:
        """Watch `path`; returns the watch descriptor."""
        return _check(
            _lib.nsfs_inotify_add(self.fd, os.fsencode(path), mask), "inotify_add_watch", path
        )

    def remove(self, watch: int) -> None:
        """End a watch; one that the kernel ended already (the file is gone) is no error."""
        _lib.nsfs_inotify_remove(self.fd, watch)

    def events(self) -> Iterator[tuple[int, int]]:
        """What has happened: (watch descriptor, mask).  Never blocks."""
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return
        offset = 0
        while offset < len(data):
            watch, mask, _cookie, length = _INOTIFY_EVENT.unpack_from(data, offset)
            offset += _INOTIFY_EVENT.size + length
            yield watch, mask

    def close(self) -> None:
        """Close the instance and with it every watch."""
        os.close(self.fd)


def keep_answer(unique: int, pid: int, dir_fd: int, path: str) -> None:
    """Have the interposer (csrc/interposer.c) repeat what a LOOKUP is about to be answered.

    For a second at most, as long as a process is there (0: none has to be) and, seen from a
    directory (-1: none), a symbolic link.  Without an interposer nothing is repeated.
    """
    _lib.nsfs_keep_answer(unique, pid, dir_fd, os.fsencode(path))


def forget_answers() -> None:
    """Have it repeat nothing that was answered before."""
    _lib.nsfs_forget_answers()
