"""syslog(2) inside: calls come by seccomp user notification and act on the container's log.

A container's init has installed a filter, which all that is in the container inherits, and keeps
its listener (csrc/init.c); we have a duplicate.  So nothing depends on us: while there is no daemon
calls wait, and the next daemon has a duplicate as well.  What it cannot have from the listener are
calls that were received and not answered.  Therefore a call is received into shared memory (the
landing), and what cannot be answered at once is put into `Slots` before the next call is received.

A call that waits (SYSLOG_ACTION_READ in an empty log) is ended by any signal, by the caller's death
and by the freezer, as the kernel's own would be; nobody tells us of that.  So a waiting call is
asked whether it still waits before anything is done for it, and now and then those that do not are
forgotten.

Callers' memory is written by nsfs-uaccess (csrc/uaccess.c), since a page fault there may take as
long as somebody likes, and at most one such process waits for each container.  The others' calls
are not held up by that: each container at the top has a `Lane` of its own, for all that is nested
in it, and another one for those in it who have once made the first wait.

A process that has entered in part, with `syslog`, has a filter of its own, and its session program
keeps the listener.

What the kernel does is do_syslog() of kernel/printk/printk.c in Linux 6.18, and ns_capable() where
that asks for capable(): the user namespace is the one that the container had when it got its log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import select
import struct
import time

import trio

from nsfs import leaf, namespaces
from nsfs.accounts import Account, Bound, top_of
from nsfs.container import Container
from nsfs.logstream import (
    SYSLOG_ACTION_CLEAR,
    SYSLOG_ACTION_READ,
    SYSLOG_ACTION_READ_ALL,
    SYSLOG_ACTION_READ_CLEAR,
    Log,
    needs_capability,
    syslog_action,
)
from nsfs.spawner import SYSLOG_FD
from nsfs.store import Slots, map_file
from nsfs.syscalls import Notifications, effective_capabilities, pidfd_getfd
from nsfs.uaccess import Call, Gift, Lane, Listener, Waiting, Writer
from nsfs.world import World

log = logging.getLogger(__name__)

READERS_MAX = 256
"""Calls that wait for records of one log; further ones fail with EAGAIN."""
CALLS_MAX = 1024
"""Calls of one container that wait for their turn to be answered; the same."""
RECORDS_MAX = 2048
"""Of both, those in one container at the top that the next daemon is told of; without that none
waits for records."""
AT_ONCE = 32
"""Calls received, each of another container, before others' requests have their turn."""
PROMPT_S = 0.25
"""How long it may take to write into a caller's memory without being called slow."""
PATIENT_S = 10.0
"""How long then; the call fails with EFAULT."""
SLOW_S = 60.0
"""How long a container is called slow."""
SESSION = 1 << 62
"""What tells a session's listener from a container's."""
USER_TOP = 1 << 56
"""Above is no user's address, on any architecture (access_ok())."""

_READS = (SYSLOG_ACTION_READ, SYSLOG_ACTION_READ_ALL, SYSLOG_ACTION_READ_CLEAR)
# struct seccomp_notif: id, pid, flags, nr, arch, instruction pointer, three of six arguments
_NOTIF = struct.Struct("=QIIiIQQQQ24x")
_NOTIF_AT = 8
_KEPT_FD = 255  # ENTRY_LISTENER_FD
_CAP_SYS_ADMIN, _CAP_SYSLOG = 21, 34
_INITIAL_USER_INO = 0xEFFFFFFD  # PROC_USER_INIT_INO
_NS_GET_PARENT, _NS_GET_OWNER_UID = 0xB702, 0xB704


def _int(value: int) -> int:
    """The C int in an argument."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


class Syslog:
    """All calls of syslog(2) in all containers of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        directory = world.store.directory
        self._epoll = select.epoll()
        self._listeners: dict[int, Listener] = {}
        self._of: dict[int, list[Listener]] = {}
        """By the container's number."""
        self._landing = map_file(os.path.join(directory, "syslog.landing"), 4096)
        """The listener's key, then struct seccomp_notif."""
        self._landed = memoryview(self._landing).cast("Q")
        notif = memoryview(self._landing)[_NOTIF_AT : _NOTIF_AT + _NOTIF.size]
        self._notifications = Notifications(notif)
        self._slots = Slots(os.path.join(directory, "syslog"))
        self._records = Bound(RECORDS_MAX, errno.EAGAIN, "syslog")
        self._whose: dict[int, Account] = {}
        """On whose account the record of a call is."""
        self._waiting: dict[Log, Waiting] = {}
        self._reading: set[Log] = set()
        """Of which records are on their way to a caller."""
        self._due: set[Log] = set()
        self._bell = trio.Event()
        self._restrict_fd = _open_setting("/proc/sys/kernel/dmesg_restrict")
        self._time_fd = _open_setting("/sys/module/printk/parameters/time")
        self._lanes: dict[tuple[int, bool], Lane] = {}
        """By the number of the container at the top, and whether it is for those called slow."""
        self._left = self._take_up()
        self._resuming = True
        world.started.append(self._started)
        world.ended.append(self._ended)
        world.listen = self._listen

    # --- which listeners there are ---

    def _take_up(self) -> dict[int, list[Call]]:
        """What the last daemon had received and not answered, by the listener's key."""
        if self._landed[1]:
            self._record(self._landed[0], self._landed_call())
            self._landed[1] = 0
        left: dict[int, list[Call]] = {}
        for ident in self._slots.keys():  # noqa: SIM118 - no dict
            number, address, packed, length = self._slots.get(ident) or (0, 0, 0, 0)
            call = Call(ident, packed & 0xFFFFFFFF, _int(packed >> 32), _int(length), address)
            left.setdefault(number, []).append(call)
        return left

    def _record_of(self, listener: Listener, call: Call) -> bool:
        """Record a call that waits; False when there is no place, for those of its account."""
        if call.ident not in self._whose:
            account = Account(top_of(listener.container))
            try:
                self._records.take(account)
            except OSError:
                return False
            self._whose[call.ident] = account
        return self._record(listener.key, call)

    def _forget_record(self, ident: int) -> None:
        self._slots.drop(ident)
        account = self._whose.pop(ident, None)
        if account is not None:
            self._records.give_back(account)

    def _record(self, key: int, call: Call) -> bool:
        packed = call.tid | (call.action & 0xFFFFFFFF) << 32
        return self._slots.put(call.ident, key, call.address, packed, call.length & 0xFFFFFFFF)

    def _started(self, container: Container) -> None:
        """Take up a container's listener, if it has one."""
        if self._resuming:
            self._take_up_sessions(container)
        if container.build.seccomp != "notify":
            return
        try:
            fd = pidfd_getfd(container.init_pid, SYSLOG_FD)
        except OSError as error:
            if error.errno == errno.EBADF:
                log.info("%s: syslog(2) is denied: another has a listener", container.name)
            elif error.errno != errno.ESRCH:
                log.warning("%s: syslog(2) is not answered: %s", container.name, error)
            return
        self._take(container, container.number, fd)

    def _take_up_sessions(self, container: Container) -> None:
        for part, path in leaf.leaves(container):
            if namespaces.SYSLOG not in part.types.split(","):
                continue
            pid = int(os.path.basename(path).split(".", 3)[2])
            with contextlib.suppress(OSError, StopIteration):
                with open(f"/proc/{pid}/status", "rb") as file:
                    keeper = next(int(line[5:]) for line in file if line.startswith(b"PPid:"))
                fd = pidfd_getfd(keeper, _KEPT_FD)
                # Who is its parent now may be another.
                if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:seccomp notify":
                    self._take(container, SESSION | pid, fd)
                else:
                    os.close(fd)

    def _listen(self, container: Container, pid: int, fd: int) -> None:
        self._take(container, SESSION | pid, os.dup(fd))

    def _take(self, container: Container, key: int, fd: int) -> None:
        """Take up a listener."""
        try:
            user_ino = namespaces.identity(container.init_pid, "user")
        except OSError:
            os.close(fd)
            return
        listener = Listener(container, key, fd, user_ino)
        self._listeners[fd] = listener
        self._of.setdefault(container.number, []).append(listener)
        self._epoll.register(fd, select.EPOLLIN)
        for call in self._left.pop(key, ()):
            if listener.is_valid(call):
                self._serve(listener, call)
            else:
                self._forget_record(call.ident)

    def _ended(self, container: Container) -> None:
        for listener in list(self._of.get(container.number, ())):
            self._forget(listener)

    def _forget(self, listener: Listener) -> None:
        """Who could call has ended, and whoever waited with it."""
        self._epoll.unregister(listener.fd)
        del self._listeners[listener.fd]
        others = self._of[listener.container.number]
        others.remove(listener)
        if not others:
            del self._of[listener.container.number]
        os.close(listener.fd)
        listener.fd = -1
        self._drop(listener.calls.sweep())
        for owner, waiting in list(self._waiting.items()):
            if any(each is listener for each, _ in waiting):
                self._drop(waiting.sweep())
                self._ring(owner)

    def _drop(self, gone: list[Call]) -> None:
        for call in gone:
            self._forget_record(call.ident)

    # --- tasks ---

    async def run(self) -> None:
        """Answer; for ever."""
        # Of containers that are no more.
        for calls in self._left.values():
            self._drop(calls)
        self._left = {}
        self._resuming = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wake)
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for fd, events in self._epoll.poll(0, AT_ONCE):
                    listener = self._listeners.get(fd)
                    if listener is None:
                        continue
                    if events & select.EPOLLIN:
                        self._receive(listener)
                    else:
                        # Nobody who has the filter is left.
                        self._forget(listener)

    async def _wake(self) -> None:
        """Serve who waits at logs that have got records; for ever."""
        while True:
            await self._bell.wait()
            self._bell = trio.Event()
            due, self._due = self._due, set()
            for each in due:
                self._serve_waiting(each)

    def _ring(self, owner: Log) -> None:
        self._due.add(owner)
        self._bell.set()

    # --- a call ---

    def _landed_call(self) -> Call:
        ident, tid, _, _, _, _, action, address, length = _NOTIF.unpack_from(
            self._landing, _NOTIF_AT
        )
        return Call(ident, tid, _int(action), _int(length), address)

    def _receive(self, listener: Listener) -> None:
        self._landed[0] = listener.key
        if self._notifications.receive(listener.fd):
            try:
                self._serve(listener, self._landed_call())
            finally:
                self._landed[1] = 0

    def _serve(self, listener: Listener, call: Call) -> None:
        """Answer a call, or let it wait."""
        container = listener.container
        try:
            self._check(listener, call)
            if call.action in _READS and call.address and call.length > 0:
                if call.address + call.length > USER_TOP:
                    raise OSError(errno.EFAULT, "no user's address", "syslog")
                self._queue(listener, call)
                return
            owner = container.log
            answer = syslog_action(
                owner.ring,
                call.action,
                call.length,
                has_buffer=bool(call.address),
                time=self._with_time(),
            )
            assert answer is not None
            if call.action == SYSLOG_ACTION_CLEAR:
                _log_changed(container)
            self._answer(listener, call, answer[0])
        except OSError as error:
            self._answer(listener, call, 0, error.errno or errno.EIO)
        except Exception:
            # Nothing that a caller does is to leave it waiting.
            log.exception("syslog(%d) in %s failed", call.action, container.name)
            self._answer(listener, call, 0, errno.EIO)

    def _answer(self, listener: Listener, call: Call, value: int, error: int = 0) -> None:
        if listener.fd >= 0:
            Notifications.answer(listener.fd, call.ident, value, error)
        self._forget_record(call.ident)

    def _keep(self, waiting: Waiting, most: int, listener: Listener, call: Call) -> bool:
        """Record a call and let it wait there; False: it was refused."""
        recorded = self._record_of(listener, call)
        if len(waiting) >= most:
            self._drop(waiting.sweep())
        # One whose turn comes soon may go without record: should we die before that, it waits until
        # a signal comes.
        if len(waiting) >= most or (not recorded and waiting is not listener.calls):
            self._answer(listener, call, 0, errno.EAGAIN)
            return False
        self._drop(waiting.add(listener, call))
        return True

    def _queue(self, listener: Listener, call: Call) -> bool:
        """Have a call given what it asked for, in its turn; False: it was refused."""
        if not self._keep(listener.calls, CALLS_MAX, listener, call):
            return False
        self._join(listener)
        return True

    def _join(self, listener: Listener) -> None:
        if listener.lane is None and not listener.stuck and len(listener.calls):
            slow = listener.slow_until > time.monotonic()
            self._lane(top_of(listener.container), slow).join(listener)

    def _lane(self, top: int, slow: bool) -> Lane:
        found = self._lanes.get((top, slow))
        if found is None:
            found = self._lanes[top, slow] = Lane(self, PATIENT_S if slow else PROMPT_S)
            self.world.start(self._run, found, top, slow)
        return found

    async def _run(self, lane: Lane, top: int, slow: bool) -> None:
        try:
            await lane.run()
        finally:
            del self._lanes[top, slow]

    def prepare(self, listener: Listener, call: Call) -> Gift | None:
        """What a call whose turn has come is to be given; None when there is nothing to give."""
        owner = listener.container.log
        is_read = call.action == SYSLOG_ACTION_READ
        if not listener.is_valid(call):
            self._forget_record(call.ident)
            if is_read:
                # Another may have been waiting behind it.
                self._ring(owner)
            return None
        answer = None
        if not is_read or owner not in self._reading:
            answer = syslog_action(
                owner.ring, call.action, call.length, token=call.ident, time=self._with_time()
            )
        if answer is None:
            waiting = self._waiting.get(owner)
            if waiting is None:
                waiting = self._waiting[owner] = Waiting()
            if self._keep(waiting, READERS_MAX, listener, call):
                owner.notify_once(self, lambda: self._ring(owner))
            return None
        value, data = answer
        gift = Gift(listener, call, owner, value, data, owner.ring.next_seq)
        if not data:
            error = 0 if Notifications.answer(listener.fd, call.ident, value) else errno.ENOENT
            self.finished(gift, error)
            return None
        if is_read:
            self._reading.add(owner)
        return gift

    def finished(self, gift: Gift, error: int) -> None:
        """A call was answered, by us or by nsfs-uaccess, with an error or not; ENOENT: it was
        not."""
        self._forget_record(gift.call.ident)
        ring = gift.log.ring
        if gift.call.action == SYSLOG_ACTION_READ:
            self._reading.discard(gift.log)
            if error:
                ring.undo_syslog_position(gift.call.ident)
            self._serve_waiting(gift.log)
        elif gift.call.action == SYSLOG_ACTION_READ_CLEAR and not error:
            ring.set_clear_seq(gift.next_seq)
            _log_changed(gift.listener.container)
        self._join(gift.listener)

    def _serve_waiting(self, owner: Log) -> None:
        """Give records to who waits for them: to the first; when that is done, to the next."""
        waiting = self._waiting.get(owner)
        if waiting is None:
            return
        if owner not in self._reading and owner.ring.readable(owner.ring.syslog_position()[0]):
            while len(waiting):
                listener, call = waiting.take()
                if not listener.is_valid(call):
                    self._forget_record(call.ident)
                elif self._queue(listener, call):
                    break
        if len(waiting):
            owner.notify_once(self, lambda: self._ring(owner))
        elif self._waiting.get(owner) is waiting:
            del self._waiting[owner]

    # --- memory that does not answer ---

    def give_up(self, lane: Lane, gift: Gift, writer: Writer | None) -> None:
        """A process nsfs-uaccess has waited too long for a caller's memory, or was killed."""
        gift.listener.stuck = True
        self.world.start(self._see_out, lane, gift, writer)

    async def _see_out(self, lane: Lane, gift: Gift, writer: Writer | None) -> None:
        result = None if writer is None else await writer.end()
        listener = gift.listener
        listener.stuck = False
        if result is not None:
            self.finished(gift, result)
        elif lane.patience_s == PROMPT_S:
            listener.slow_until = time.monotonic() + SLOW_S
            self._undo(gift)
            listener.calls.add_first(listener, gift.call)
        else:
            self._undo(gift)
            self._answer(listener, gift.call, 0, errno.EFAULT)
        self._join(listener)

    def _undo(self, gift: Gift) -> None:
        if gift.call.action == SYSLOG_ACTION_READ:
            gift.log.ring.undo_syslog_position(gift.call.ident)
            self._reading.discard(gift.log)
            self._ring(gift.log)

    def bury(self, writer: Writer) -> None:
        """A process nsfs-uaccess has died."""
        self.world.start(self._end, writer)

    async def _end(self, writer: Writer) -> None:
        await writer.end()

    # --- who may ---

    def _with_time(self) -> bool:
        return _setting(self._time_fd, b"Y") in (b"Y", b"1")

    def _check(self, listener: Listener, call: Call) -> None:
        """check_syslog_permissions(): EPERM."""
        restricted = _setting(self._restrict_fd, b"1") != b"0"
        if not needs_capability(call.action, restricted=restricted):
            return
        if not self._is_capable(listener, call.tid) or not listener.is_valid(call):
            # What was seen may be another's with the same TID; then nobody gets this answer.
            raise PermissionError(errno.EPERM, "no CAP_SYSLOG", "syslog")

    def _is_capable(self, listener: Listener, tid: int) -> bool:
        """ns_capable(..., CAP_SYSLOG) of a thread towards the log's user namespace."""
        owner = listener.container.holder(namespaces.SYSLOG)
        try:
            found = namespaces.identity(tid, "user")
            if owner is listener.container:
                wanted = listener.user_ino
            else:
                wanted = namespaces.identity(owner.init_pid, "user")
            capability = _CAP_SYSLOG
            if wanted == _INITIAL_USER_INO and owner.parent is not None:
                # That capability is kept from who is root there, since it is the host's too.
                capability = _CAP_SYS_ADMIN
            if found in (wanted, _INITIAL_USER_INO):
                return bool(effective_capabilities(tid) >> capability & 1)
            return _is_above(found, owner.init_pid, tid)
        except OSError:
            return False


def _is_above(found: int, pid: int, tid: int) -> bool:
    """cap_capable() for a thread of another user namespace than the one in question, which is that
    of `pid`: it has to have the capability in one above that, or own one that is below its own."""
    fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            owner = bytearray(4)
            fcntl.ioctl(fd, _NS_GET_OWNER_UID, owner)
            # EPERM: there is none above.
            above_fd = fcntl.ioctl(fd, _NS_GET_PARENT)
            os.close(fd)
            fd = above_fd
            if os.fstat(fd).st_ino == found:
                with open(f"/proc/{tid}/status", "rb") as file:
                    line = next(each for each in file if each.startswith(b"Uid:"))
                owns = int(line.split()[2]) == int.from_bytes(owner, "little")
                return owns or bool(effective_capabilities(tid) >> _CAP_SYSLOG & 1)
    finally:
        os.close(fd)


def _log_changed(container: Container) -> None:
    for each in (container, container.holder(namespaces.SYSLOG)):
        each.log_changed_ns = time.time_ns()


def _open_setting(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _setting(fd: int, default: bytes) -> bytes:
    return os.pread(fd, 16, 0).strip() if fd >= 0 else default
