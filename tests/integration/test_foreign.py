"""Descriptors that whoever asks to enter has made: none of them is kept, or keeps the daemon."""

from __future__ import annotations

import array
import errno
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nsfs.foreign import HELD_MAX

from .conftest import Container, Instance, wait_until
from .test_delegation import ALICE, ENTER, call_as, own

ATTRIBUTE = "user.nsfs.enter"


@pytest.fixture
def alice(tree: Path) -> Container:
    """A container at the top that was given to a user."""
    return own(tree, "alice")


def ask(container: Container, fd: int, types: str = "") -> int:
    """Ask to enter with a descriptor; 0 or an errno."""
    try:
        os.setxattr(container / "procs", ATTRIBUTE, f"{fd}{types}".encode())
    except OSError as error:
        return error.errno or -1
    return 0


def held(instance: Instance) -> int:
    """How many descriptors the daemon has."""
    return len(os.listdir(f"/proc/{instance.daemon()}/fd"))


def test_what_is_no_channel_is_not_kept(alice: Container, instance: Instance) -> None:
    def asks() -> None:
        file = os.open("/dev/null", os.O_RDONLY)
        for fd in (file, socket.socket().detach(), socket.socketpair()[0].detach(), *os.pipe()):
            for types in ("", ":user,mnt,net"):
                for _ in range(20):
                    assert ask(alice, fd, types) == errno.EINVAL
        os.close(file)
        for types in ("", ":net"):
            assert ask(alice, file, types) == errno.EBADF

    assert call_as(ALICE, asks) == ""
    before = held(instance)
    assert call_as(ALICE, asks) == ""
    wait_until(lambda: held(instance) <= before, "the daemon has as many as before")


def test_entries_that_do_not_proceed(tree: Path, alice: Container, instance: Instance) -> None:
    """Of one user there are so many at most; others enter."""
    before = held(instance)

    def asks() -> None:
        kept = []
        results = []
        for _ in range(HELD_MAX + 20):
            kept += socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            results.append(ask(alice, kept[-1].fileno(), ":net"))
        assert results == [0] * HELD_MAX + [errno.EBUSY] * 20

    assert call_as(ALICE, asks) == ""
    # Their ends are closed now.
    wait_until(lambda: held(instance) <= before + 10, "the daemon has as many as before")
    assert subprocess.run([ENTER, alice.path, "--", "true"], check=False).returncode == 0


def test_what_comes_in_a_channel_is_let_go_of(alice: Container, instance: Instance) -> None:
    before = held(instance)

    def sends() -> None:
        for _ in range(50):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            assert ask(alice, theirs.fileno(), ":net,syslog") == 0
            ours.recv(1000)
            fds = array.array("i", os.pipe())
            ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            for fd in fds:
                os.close(fd)
            assert int.from_bytes(ours.recv(1000)[:4], "little", signed=True) < 0

    assert call_as(ALICE, sends) == ""
    wait_until(lambda: held(instance) <= before + 10, "the daemon has as many as before")
    assert "failed" not in instance.log()


def test_a_connection_that_lingers_keeps_nobody(alice: Container, tree: Path) -> None:
    """The last close(2) of a TCP socket with SO_LINGER waits until the other end has it all."""

    def sends() -> None:
        listener, client = socket.socket(), socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        client.setblocking(False)
        try:
            while True:
                client.send(bytes(1 << 20))
        except BlockingIOError:
            pass
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, array.array("i", (1, 300)))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [client.fileno()]))]
        ours.sendmsg([b"x"], rights)
        os.close(client.detach())
        assert ask(alice, theirs.fileno(), ":net") == 0
        for _ in range(20):
            subprocess.run(
                ["cat", tree / "state"], stdout=subprocess.DEVNULL, timeout=5, check=True
            )
        listener.accept()[0].close()

    assert call_as(ALICE, sends) == ""


def test_who_has_a_listener_as_well_does_not_keep_us() -> None:
    """It has received the call that poll(2) told of."""
    # sched_get_priority_max(2), which nobody needs.
    text = """
        import ctypes, os, struct, sys
        from nsfs.syscalls import Notifications
        libc = ctypes.CDLL(None, use_errno=True)
        numbers = {"x86_64": (317, 146), "aarch64": (277, 125)}[os.uname().machine]
        code = [(0x20, 0, 0, 0), (0x15, 0, 1, numbers[1]), (6, 0, 0, 0x7fc00000), (6, 0, 0, 0x7fff0000)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
        header = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(program))
        fd = libc.syscall(numbers[0], 1, 8, header)
        assert fd >= 0, os.strerror(ctypes.get_errno())
        calls = Notifications(bytearray(80))
        print([calls.receive(fd) for _ in range(3)])
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stdout == "[False, False, False]\n", done.stderr
