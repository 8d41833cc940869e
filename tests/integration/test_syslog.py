"""syslog(2) inside: every type, for every kind of caller, on the container's log alone."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import DEADLINE_S, NSFS, Container, Instance, holding, serving, wait_until, write

# What a caller inside begins with: native(), x32() and i386() are syslog(2), each giving what it
# returns or the name of the errno.
PRELUDE = r"""
import ctypes, errno, mmap, os, signal, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def name(got):
    return got if got >= 0 else errno.errorcode[-got]
def by(number):
    def call(kind, address=0, length=0):
        got = libc.syscall(*map(ctypes.c_long, (number, kind, address, length)))
        return name(got if got >= 0 else -ctypes.get_errno())
    return call
native, x32 = by(103), by(0x40000000 | 103)
# Below 4 GB, with a trap for what is too much.
low = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40,
                mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
buf = ctypes.addressof(ctypes.c_char.from_buffer(low))
# push rbx; mov eax, 103; mov ebx, edi; mov ecx, esi; int 0x80; pop rbx; ret
low[-64:-49] = bytes.fromhex('53b86700000089fb89f1cd805bc3').ljust(15, b'\xcc')
_i386 = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long, ctypes.c_long, ctypes.c_long)(buf + (1 << 20) - 64)
def i386(kind, address=0, length=0):
    return name(_i386(kind, address, length))
def text(length):
    return low[:length].decode()
"""


def python(web: Container, code: str) -> list[str]:
    """Run Python inside; the lines that it printed."""
    return web.run(f"python3 - <<'END'\n{PRELUDE}\n{code}\nEND").splitlines()


def start(web: Container, code: str, *words: str) -> None:
    """Start Python inside."""
    web.start(*words, "python3", "-c", PRELUDE + code)


def printed(web: Container, what: str, deadline_s: float = DEADLINE_S) -> str:
    """Wait until something was printed by a command that was started."""
    wait_until(lambda: what in web.read("output"), f"{what!r} is printed", deadline_s)
    return web.read("output")


def in_syslog(web: Container) -> int:
    """How many threads inside are in syslog(2) and stay there."""
    count = 0
    for entry in os.listdir(web / "procs"):
        for task in Path(f"/proc/{entry.partition(':')[0]}/task").glob("*/syscall"):
            try:
                # 103, or i386's, which is the same.
                count += task.read_text().startswith("103 ")
            except OSError:
                continue
    return count


def parked(web: Container, number: int) -> None:
    """Wait until so many threads wait in syslog(2)."""
    wait_until(lambda: in_syslog(web) == number, f"{number} wait in syslog(2)")


@pytest.fixture
def web(tree: Path) -> Iterator[Container]:
    """A container, whose hosts's log is what it was afterwards."""
    before = HostLog()
    path = tree / "web"
    path.mkdir()
    yield Container(path)
    before.check()


class HostLog:
    """What syslog(2) could change of the host's log.  Lines may come meanwhile."""

    def __init__(self) -> None:
        self.levels = Path("/proc/sys/kernel/printk").read_text()
        calls = (
            "import ctypes; c = ctypes.CDLL(None); print(c.klogctl(9, 0, 0), c.klogctl(10, 0, 0))"
        )
        words = subprocess.check_output(["python3", "-c", calls]).split()
        self.unread, self.size = map(int, words)
        self.oldest, self.cleared = self._record(os.SEEK_SET), self._record(os.SEEK_DATA)

    @staticmethod
    def _record(whence: int) -> str:
        """The number of the first record, or of the first after the last clear."""
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.lseek(fd, 0, whence)
            return os.read(fd, 8192).decode(errors="replace").split(",", 2)[1]
        except BlockingIOError:
            return "none"
        except BrokenPipeError:
            return "overwritten"
        finally:
            os.close(fd)

    def check(self) -> None:
        """It is what it was, but for new lines, which may have overwritten old ones."""
        now = HostLog()
        assert (now.levels, now.size) == (self.levels, self.size)
        if now.oldest == self.oldest:
            assert now.unread >= self.unread
            assert now.cleared == self.cleared or self.cleared == "none"


def size(*texts: str) -> int:
    """Bytes of records with these texts, as syslog(2) gives them."""
    return sum(len(f"<12>[{int(time.monotonic()):5d}.000000] {text}\n") for text in texts)


# --- the types ---


@pytest.mark.parametrize("call", ["native", "x32", "i386"])
def test_every_type(web: Container, call: str) -> None:
    size = 256 * 1024 - 512
    web.run("printf '<4>one' > /dev/kmsg; printf '<30>two' > /dev/kmsg")
    lines = python(
        web,
        f"call = {call}\n"
        + r"""
print(call(0), call(1), call(9), call(10))
got = call(3, buf, 4096); print(got, text(got).replace('\n', '|'))
got = call(3, buf, 40); print(got, text(got))
print(call(3, buf, 20), call(3, buf, 0))
got = call(2, buf, 20); print(got, text(got))
print(call(9))
got = call(2, buf, 4096); print(got, text(got).replace('\n', '|'))
print(call(9))
got = call(4, buf, 4096); print(got)
print(call(4, buf, 4096), call(3, buf, 4096))
print(call(5), call(6), call(7), call(8, 0, 3))
print(call(8, 0, 0), call(8, 0, 9), call(8, 0, -1), call(11), call(-1), call(1 << 20))
print(call(2, 0, 5), call(3, 0, 0), call(4, buf, -1), call(2, buf, 0))
""",
    )
    both = re.fullmatch(r"(\d+) (<12>\[ *\d+\.\d{6}\] one\|)(<30>\[ *\d+\.\d{6}\] two\|)", lines[1])
    assert both, lines
    length = len(both[2]) + len(both[3])
    assert lines[0] == f"0 0 {length} {size}"
    assert int(both[1]) == length
    assert lines[2] == f"{len(both[3])} {both[3][:-1]}"
    assert lines[4] == "0 0"
    assert lines[5] == f"20 {both[2][:20]}"
    assert lines[6] == str(length - 20)
    rest = both[2][20:] + both[3]
    assert lines[7] == f"{len(rest)} {rest}"
    assert lines[8:] == [
        "0",
        str(length),
        "0 0",
        "0 0 0 0",
        "EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL",
        "EINVAL EINVAL EINVAL 0",
    ]


def test_what_dmesg_shows_after_a_clear(web: Container) -> None:
    web.run("echo before > /dev/kmsg")
    assert python(web, "print(native(5))") == ["0"]
    web.run("echo after > /dev/kmsg")
    out = web.run("dmesg")
    assert "after" in out
    assert "before" not in out
    assert "before" not in web.read("kmsg")
    # Cleared is not read: there is one position for each.
    assert "before" in web.run("timeout 5 head -n 1 /proc/kmsg")


# --- who may ---

EVERYTHING = "print(native(3, buf, 4096), native(10), native(9), native(5), native(6), native(11))"


def test_the_capability_is_the_containers(web: Container) -> None:
    web.run("echo one > /dev/kmsg")
    restricted = Path("/proc/sys/kernel/dmesg_restrict").read_text().strip() != "0"
    read = ["EPERM", "EPERM"] if restricted else [str(size("one")), "261632"]
    denied = " ".join([*read, *["EPERM"] * 4])
    script = f"python3 - <<'END'\n{PRELUDE}\n{EVERYTHING}\nEND"
    web.write("exec", "true")
    run = web.run
    assert run(f"setpriv --reuid=1000 --clear-groups {script}").strip() == denied
    assert run(f"setpriv --bounding-set=-syslog {script}").strip() == denied
    # Root of a user namespace of its own making, with every capability there.
    assert run(f"unshare -Ur {script}").strip() == denied
    keeping = "setpriv --reuid=1000 --clear-groups --inh-caps=+syslog --ambient-caps=+syslog"
    assert run(f"{keeping} {script}").split()[1:] == [
        *("261632", str(size("one")), "0", "0", "EINVAL")
    ]


@pytest.mark.parametrize("restrict", ["0", "1"])
def test_the_hosts_dmesg_restrict(tmp_path: Path, restrict: str) -> None:
    """A file over the sysctl, in our own mount namespace: the host's stays what it is."""
    fake = tmp_path / "restrict"
    fake.write_text(f"{restrict}\n")
    sysctl = "/proc/sys/kernel/dmesg_restrict"
    subprocess.run(["mount", "--bind", fake, sysctl], check=True)
    try:
        with serving(tmp_path) as instance:
            web = Container(instance.tree / "web")
            web.path.mkdir()
            write(web / "kmsg", "one")
            web.run(
                f"setpriv --reuid=1000 --clear-groups python3 - <<'END' > /tmp/out\n{PRELUDE}\n{EVERYTHING}\nEND"
            )
            out = web.run("cat /tmp/out").split()
            assert out[2:] == ["EPERM"] * 4
            assert out[:2] == ([str(size("one")), "261632"] if restrict == "0" else ["EPERM"] * 2)
            os.rmdir(web.path)
    finally:
        subprocess.run(["umount", sysctl], check=True)


def test_a_shared_log_is_its_owners(web: Container) -> None:
    web.run("echo one > /dev/kmsg")
    web.write("defaults/unshare", "cgroup ipc mnt net pid time user uts")
    (web / "db").mkdir()
    db = Container(web / "db")
    # Root there, but not of the user namespace that the log belongs to.
    assert python(db, "print(native(9), native(5), native(8, 0, 5))") == ["EPERM EPERM EPERM"]
    web.write("defaults/unshare", "cgroup ipc mnt net pid time uts")
    (web / "same").mkdir()
    same = Container(web / "same")
    assert python(same, "print(native(9), native(4, buf, 4096), native(4, buf, 4096))") == [
        f"{size('one')} {size('one')} 0"
    ]
    assert web.run("dmesg") == ""


def test_nested_containers_have_their_own(web: Container) -> None:
    (web / "db").mkdir()
    db = Container(web / "db")
    db.run("echo inner > /dev/kmsg")
    web.run("echo outer > /dev/kmsg")
    assert python(db, "print(native(4, buf, 4096), 'inner' in text(4096), native(9))") == [
        f"{size('inner')} True {size('inner')}"
    ]
    assert python(web, "print(native(4, buf, 4096), 'outer' in text(4096))") == [
        f"{size('outer')} True"
    ]


@pytest.fixture
def trusted(tree: Path) -> Container:
    """A container in the host's user namespace."""
    write(tree / "defaults/unshare", "cgroup ipc mnt net pid syslog time uts")
    try:
        (tree / "web").mkdir()
    finally:
        write(tree / "defaults/unshare", "cgroup ipc mnt net pid syslog time user uts")
    return Container(tree / "web")


def test_in_the_hosts_user_namespace(trusted: Container) -> None:
    before = HostLog()
    web = trusted
    web.run("echo one > /dev/kmsg")
    # Its root has not CAP_SYSLOG, which would be the host's; the log is its own all the same.
    assert python(web, "print(native(9), native(4, buf, 4096), native(4, buf, 4096))") == [
        f"{size('one')} {size('one')} 0"
    ]
    out = web.run("setpriv --bounding-set=-sys_admin sh -c 'dmesg -C || echo no'")
    assert "no" in out
    before.check()


def test_the_switch(web: Container) -> None:
    listener = r"""
class Prog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
allow = ctypes.create_string_buffer((6).to_bytes(8, "little") [:2] + bytes(2) + (0x7fff0000).to_bytes(4, "little"))
got = libc.syscall(317, 1, 8, ctypes.byref(Prog(1, ctypes.addressof(allow))))
print(native(9), got >= 0 or errno.errorcode[ctypes.get_errno()])
"""
    assert web.read("seccomp") == "notify\n"
    assert python(web, listener) == ["0 EBUSY"]
    wait_until(lambda: not os.listdir(web / "procs"), "it is idle")
    web.write("seccomp", "deny")
    assert web.read("seccomp") == "deny\n"
    assert python(web, listener) == ["EPERM True"]
    assert python(web, "print(x32(9), i386(10), native(2, buf, 10))") == ["EPERM EPERM EPERM"]
    with pytest.raises(OSError, match="Invalid"):
        web.write("seccomp", "off")
    web.write("defaults/seccomp", "deny")
    (web / "db").mkdir()
    assert python(Container(web / "db"), listener) == ["EPERM True"]
    web.write("defaults/seccomp", "")
    assert web.read("defaults/seccomp") == "notify\n"


# --- waiting ---


def test_a_read_waits_and_is_woken(web: Container) -> None:
    start(web, "print('waits', flush=True); print(native(2, buf, 4096), text(4096).strip('\\0'))")
    parked(web, 1)
    write(web / "kmsg", "<3>wake up")
    assert re.search(rf"{size('wake up')} <11>\[ *\d+\.\d+\] wake up", printed(web, "wake up"))


def test_a_signal_ends_a_read(web: Container) -> None:
    """As for the kernel's own: a handler's end is EINTR, or another try with SA_RESTART."""
    code = (
        "signal.signal(signal.SIGTERM, lambda *a: None)\n"
        "signal.siginterrupt(signal.SIGTERM, {})\n"
        "print('got', native(2, buf, 4096), flush=True)\n"
    )
    start(web, code.format(True))
    parked(web, 1)
    write(web / "kill", "TERM")
    printed(web, "got EINTR")
    start(web, code.format(False))
    parked(web, 1)
    for _ in range(5):
        write(web / "kill", "TERM")
        parked(web, 1)
    # Stopped and continued, it goes on as well.
    write(web / "kill", "STOP")
    write(web / "kill", "CONT")
    parked(web, 1)
    write(web / "kmsg", "text")
    printed(web, f"got {size('text')}\n")


def test_a_waiting_caller_can_be_killed(web: Container) -> None:
    start(web, "native(2, buf, 4096)")
    parked(web, 1)
    write(web / "kill", "KILL")
    wait_until(lambda: not os.listdir(web / "procs"), "it is gone")
    # What it did not get the next one gets.
    write(web / "kmsg", "text")
    assert python(web, "print(native(2, buf, 4096))") == [str(size("text"))]


THREADS = """
threading.stack_size(65536)
def read(number):
    mine = ctypes.create_string_buffer(200)
    # There is room for one record.
    got = native(2, ctypes.addressof(mine), 40)
    print('got', got, mine.value.decode().strip() if isinstance(got, int) else '', flush=True)
for number in range({}):
    threading.Thread(target=read, args=(number,)).start()
"""


def received(web: Container) -> list[str]:
    """The texts of what callers got."""
    return re.findall(r"^got \d+ <\d+>\[ *\d+\.\d+\] (.*)$", web.read("output"), re.MULTILINE)


def test_each_record_has_one_reader(web: Container) -> None:
    start(web, THREADS.format(200))
    parked(web, 200)
    for number in range(200):
        write(web / "kmsg", f"record {number}")
    wait_until(lambda: not os.listdir(web / "procs"), "all have got something")
    assert sorted(received(web)) == sorted(f"record {number}" for number in range(200))


def test_waiting_callers_survive_the_daemon(web: Container, instance: Instance) -> None:
    start(web, THREADS.format(100))
    parked(web, 100)
    instance.kill_daemon()
    for number in range(50):
        write(web / "kmsg", f"record {number}")
    wait_until(lambda: len(received(web)) == 50, "50 have got something")
    instance.kill_daemon()
    # Another that waits with them, who has come to this daemon first.
    start(web, THREADS.format(1))
    parked(web, 51)
    for number in range(50, 101):
        write(web / "kmsg", f"record {number}")
    wait_until(lambda: not os.listdir(web / "procs"), "all have got something")
    assert sorted(received(web)) == sorted(f"record {number}" for number in range(101))


def test_callers_without_a_daemon_wait(web: Container, instance: Instance) -> None:
    web.run("echo one > /dev/kmsg")
    loop = (
        "while True:\n"
        "    got = native(3, buf, 4096)\n"
        f"    if got != {size('one')}: print('wrong', got, flush=True)\n"
    )
    start(web, "print('loops', flush=True)\n" + loop)
    printed(web, "loops")
    for _ in range(5):
        time.sleep(0.1)
        instance.kill_daemon()
    wait_until(lambda: python(web, "print(native(9))") == [str(size("one"))], "it answers")
    assert "wrong" not in web.read("output")


def test_frozen_while_it_waits(web: Container) -> None:
    start(web, THREADS.format(20))
    parked(web, 20)
    web.write("freeze", "1")
    wait_until(lambda: web.state()["frozen"] == "1", "it is frozen")
    write(web / "kmsg", "for one of them")
    time.sleep(0.2)
    assert not received(web)
    web.write("freeze", "0")
    wait_until(lambda: received(web) == ["for one of them"], "one goes on")
    parked(web, 19)


def test_frozen_when_the_daemon_dies(web: Container, instance: Instance) -> None:
    start(web, THREADS.format(3))
    parked(web, 3)
    web.write("freeze", "1")
    instance.kill_daemon()
    wait_until(lambda: web.state()["frozen"] == "1", "it is frozen")
    web.write("freeze", "0")
    for number in range(3):
        write(web / "kmsg", f"record {number}")
    wait_until(lambda: len(received(web)) == 3, "all have got something")


def test_removal_while_they_wait(web: Container, instance: Instance) -> None:
    start(web, THREADS.format(200))
    parked(web, 200)
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    instance.settled()
    (instance.tree / "web").mkdir()
    assert python(web, "print(native(9))") == ["0"]


def test_more_than_may_wait(web: Container) -> None:
    """256 wait, others are refused; and all that are in a hurry are served meanwhile."""
    code = """
threading.stack_size(65536)
def read():
    print('got', native(2, buf, 200), flush=True)
for _ in range(266):
    threading.Thread(target=read).start()
"""
    start(web, code)
    wait_until(lambda: web.read("output").count("got EAGAIN\n") == 10, "ten are refused")
    parked(web, 256)
    assert python(web, "print(native(9), native(10))") == ["0 261632"]


def test_all_that_wait_in_one_container_at_the_top(web: Container, tree: Path) -> None:
    """They have a part of the places that there are for all."""
    code = """
threading.stack_size(65536)
def read():
    print('got', native(2, buf, 200), flush=True)
for _ in range(250):
    threading.Thread(target=read).start()
"""
    nested = [Container(web / f"n{number}") for number in range(9)]
    for each in nested:
        os.mkdir(each.path)
        start(each, code)
    wait_until(
        lambda: sum(each.read("output").count("got EAGAIN\n") for each in nested) == 9 * 250 - 2048,
        "all but 2048 are refused",
    )
    (tree / "other").mkdir()
    other = Container(tree / "other")
    start(other, "print('got', native(2, buf, 200), flush=True)")
    parked(other, 1)
    write(other / "kmsg", "text")
    printed(other, f"got {size('text')}\n")
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    web.path.mkdir()


def test_interrupted_again_and_again(web: Container) -> None:
    """What waits no more is forgotten: the run directory has room for the others."""
    code = """
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
signal.siginterrupt(signal.SIGALRM, True)
count = 0
while count < 3000:
    count += native(2, buf, 200) == 'EINTR'
signal.setitimer(signal.ITIMER_REAL, 0)
print('count', count, flush=True)
print('got', native(2, buf, 200), flush=True)
"""
    start(web, code)
    printed(web, "count 3000")
    parked(web, 1)
    write(web / "kmsg", "text")
    printed(web, f"got {size('text')}")


# --- the caller's memory ---


def test_bad_memory(web: Container) -> None:
    web.run(
        "for n in $(seq 300); do echo $n 34567890123456789012345678901234567890; done > /tmp/f; while read x; do echo $x > /dev/kmsg; done < /tmp/f"
    )
    out = python(
        web,
        r"""
page = mmap.PAGESIZE
gone = mmap.mmap(-1, page); where = ctypes.addressof(ctypes.c_char.from_buffer(gone))
print(native(9) > 9000, native(3, where, page) > 4000)
libc.munmap(ctypes.c_void_p(where), ctypes.c_size_t(page))
print(native(3, where, page), native(2, where, page), native(4, where, page))
print(native(3, 1, page), native(3, -page, page), native(3, 1 << 62, page))
print(i386(3, 1, page), i386(3, 0xfffff000, page))
# Read-only, private and shared.
with open('/tmp/f', 'rb') as file:
    before = file.read()
    for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
        for code in (native, i386):
            there = mmap.mmap(file.fileno(), 0, flags | 0x40, mmap.PROT_READ)
            libc.mmap.restype = ctypes.c_void_p
            at = libc.mmap(None, ctypes.c_size_t(page), 1, flags | 0x40, file.fileno(), ctypes.c_long(0))
            print(code(3, at, page), code(2, at, page), ctypes.string_at(at, page) == before[:page])
# The end of it is not mapped; the kernel, too, says so only where it gets there.
two = mmap.mmap(-1, 2 * page); at = ctypes.addressof(ctypes.c_char.from_buffer(two))
libc.munmap(ctypes.c_void_p(at + page), ctypes.c_size_t(page))
print(native(3, at, 2 * page), native(3, at, page) > 4000, native(2, at + page - 10, page))
# A huge length is no fault by itself.
print(native(3, buf, 0x7fffffff) == native(9) > 9000, native(2, buf, 1 << 19) > 9000)
""",
    )
    assert out == [
        "True True",
        "EFAULT EFAULT EFAULT",
        "EFAULT EFAULT EFAULT",
        "EFAULT EFAULT",
        *["EFAULT EFAULT True"] * 4,
        "EFAULT True EFAULT",
        "True True",
    ]


def test_a_stack_that_has_to_grow(web: Container) -> None:
    web.run("echo text > /dev/kmsg")
    # 100 pages below what is in use.
    code = """
import re
at = int(re.search(r'([0-9a-f]+)-[0-9a-f]+ .*\\[stack\\]', open('/proc/self/maps').read())[1], 16)
print(native(3, at - 100 * 4096, 4096))
"""
    assert python(web, code) == [str(size("text"))]


def test_callers_that_change_meanwhile(web: Container) -> None:
    """Unmap, exec in another thread, die: nobody is harmed, and the log stays whole."""
    web.run("echo text > /dev/kmsg")
    code = r"""
def caller():
    area = mmap.mmap(-1, 1 << 16)
    at = ctypes.addressof(ctypes.c_char.from_buffer(area))
    def spoil():
        while True:
            libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(1 << 16), 1)
            libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(1 << 16), 3)
            libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(1 << 16), 4)
    def call():
        while True:
            got = native(3, at, 1 << 16)
            if got not in (SIZE, 'EFAULT'):
                print('wrong', got, flush=True)
    for each in (call, call, spoil):
        threading.Thread(target=each, daemon=True).start()
    time.sleep(0.02)
    os.execv('/bin/true', ['true'])
for _ in range(30):
    pid = os.fork()
    if not pid:
        caller()
    if _ % 3 == 0:
        time.sleep(0.02)
        os.kill(pid, 9)
    os.waitpid(pid, 0)
print('done', native(3, buf, 4096))
"""
    assert python(web, f"SIZE = {size('text')}{code}") == [f"done {size('text')}"]


MAPS = r"""
#define main uaccess_main
#include "uaccess.c"
#undef main
#include <sys/mman.h>

/* Both ways to ask whether something read-only is in a range agree, wherever it begins and ends. */
int main(void)
{
    const uint64_t page = 4096, pages = 40;
    char *area = mmap(NULL, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    for (uint64_t i = 0; i < pages; i++)
        if (i % 7 == 3)
            mprotect(area + i * page, page, PROT_READ);
        else if (i % 5 == 2)
            munmap(area + i * page, page);
    for (uint64_t from = 0; from < pages; from++)
        for (uint64_t to = from + 1; to <= pages; to++) {
            const uint64_t begin = (uint64_t)area + from * page + 7;
            const uint64_t end = (uint64_t)area + to * page - 5;
            const int fd = open_of((uint32_t)getpid(), "maps", O_RDONLY);
            bool expected = false;

            for (uint64_t i = from; i < to; i++)
                expected = expected || i % 7 == 3;
            if (has_read_only((uint32_t)getpid(), begin, end) != expected ||
                has_read_only_by_text(fd, begin, end) != expected)
                return 1;
            close(fd);
        }
    return 0;
}
"""


def test_what_is_read_only_is_known_on_older_kernels(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "nsfs/csrc"
    (tmp_path / "maps.c").write_text(MAPS)
    words = ["gcc", "-std=gnu11", f"-I{source}", "-o", tmp_path / "maps", tmp_path / "maps.c"]
    subprocess.run(words, check=True)
    subprocess.run([tmp_path / "maps"], check=True)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file whose contents do not come, and what makes its readers fail."""
    with holding(tmp_path / "holding") as server:
        yield tmp_path / "holding/held", server.kill


HELD = r"""
with open("/mnt/held", "r+b") as file:
    held = mmap.mmap(file.fileno(), 1 << 16, mmap.MAP_PRIVATE)
at = ctypes.addressof(ctypes.c_char.from_buffer(held))
# Processes: what a thread does with memory waits as well.
for _ in range(99):
    if not os.fork():
        break
print('got', native(3, at, 4096), flush=True)
"""


def writers(instance: Instance) -> list[str]:
    """The states of the processes that write to callers' memory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")
            if "(nsfs-uaccess" in fields[0] and int(fields[2].split()[1]) == instance.daemon():
                found.append(fields[2].split()[0])
    return found


def test_memory_that_does_not_come(
    web: Container, tree: Path, instance: Instance, held: tuple[Path, Callable[[], None]]
) -> None:
    """A caller whose memory takes for ever to be there waits for ever, and nobody else does."""
    path, release = held
    (tree / "other").mkdir()
    other = Container(tree / "other")
    web.write("binds", f"/mnt/held {path} rw")
    for each in (web, other):
        write(each / "kmsg", "text")
    start(web, HELD)
    parked(web, 100)
    for _ in range(20):
        assert python(other, "print(native(3, buf, 4096), native(9))") == [
            f"{size('text')} {size('text')}"
        ]
        # It is up to those in the same container alone to wait for it.
        assert python(web, "print(native(9))") == [str(size("text"))]
    # One waits, and one or two for those who do not wait for such.
    wait_until(lambda: 1 <= len(writers(instance)) <= 3, "they are few")
    release()
    wait_until(lambda: not os.listdir(web / "procs"), "all have failed")
    assert web.read("output").count("got EFAULT\n") == 100
    assert python(web, "print(native(3, buf, 4096))") == [str(size("text"))]


def test_who_waits_for_whom(tree: Path, instance: Instance) -> None:
    """Nobody waits for memory of a container that is not in the same one at the top."""
    wait_until(lambda: not writers(instance), "those of earlier tests have ended")
    for name in ("web", "other", "other/db"):
        (tree / name).mkdir()
        write(tree / name / "kmsg", "text")
    for name, count in (("web", 1), ("other", 2), ("other/db", 2)):
        found = python(Container(tree / name), "print(native(3, buf, 4096))")
        assert found == [str(size("text"))]
        assert len(writers(instance)) == count


def test_memory_that_does_not_come_of_a_container_that_goes(
    web: Container, instance: Instance, held: tuple[Path, Callable[[], None]]
) -> None:
    path, release = held
    web.write("binds", f"/mnt/held {path} rw")
    write(web / "kmsg", "text")
    start(web, HELD)
    parked(web, 100)
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    release()
    instance.settled()


# --- sessions in part ---


def only(web: Container, types: str, *command: str, **options: Any) -> subprocess.Popen[str]:
    """A session of the host's root in some of the namespaces."""
    words = [*NSFS, "enter", "--only", types, str(web.path), "--", *command]
    return subprocess.Popen(
        words, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, **options
    )


def says(web: Container, types: str, code: str) -> list[str]:
    """What Python prints in such a session."""
    with only(web, types, "python3", "-c", PRELUDE + code, stderr=subprocess.STDOUT) as session:
        out, _ = session.communicate(timeout=DEADLINE_S)
    assert session.returncode == 0, out
    return out.splitlines()


@pytest.mark.parametrize("types", ["syslog", "net,syslog", "mnt,syslog", "mnt,syslog,user"])
def test_a_session_with_the_containers_log(web: Container, types: str) -> None:
    write(web / "kmsg", "inside")
    out = says(
        web,
        types,
        "got = native(3, buf, 4096); print(got, 'inside' in text(4096), i386(9))\n"
        "print('from the session', file=open('/dev/kmsg', 'w'))\n"
        "print(open('/dev/kmsg').readline().split(';')[1], native(5), native(8, 0, 3))\n"
        "print(os.open('/proc/kmsg', os.O_RDONLY) > 0, native(10))\n",
    )
    assert out == [
        f"{size('inside')} True {size('inside')}",
        "inside",
        " 0 0",
        "True 261632",
    ]
    assert "from the session" not in web.read("kmsg")
    # It goes on; it was cleared.
    assert web.run("head -n 2 /dev/kmsg | grep -c session") == "1\n"


def test_an_ln_with_the_containers_log(web: Container, tree: Path) -> None:
    write(web / "kmsg", "inside")
    done = subprocess.run(
        ["ln", str(tree / "procs/self"), f"{web.path}/procs/self:net,syslog"],
        input=(
            "dmesg -t; dmesg -S -t; head -n 1 /dev/kmsg; head -n 1 /proc/kmsg\n"
            "echo from the ln > /dev/kmsg; dmesg -C; readlink /proc/self/ns/net\n"
        ),
        env={**os.environ, "SHELL": "/bin/sh"},
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    net = os.readlink(f"/proc/{web.init}/ns/net")
    found = re.sub(r"(?m)^\S*(;|\[ *\d+\.\d+\] )", "", done.stdout)
    assert (found, done.stderr) == ("inside\n" * 4 + f"{net}\n", "")
    assert web.read("kmsg") == ""
    assert web.run("head -n 2 /dev/kmsg | grep -c 'from the ln'") == "1\n"


def test_a_session_without_it_has_the_hosts(web: Container) -> None:
    before = HostLog()
    (out,) = says(web, "net", "print(native(10))")
    assert int(out) == before.size


def test_a_session_waits_and_survives_the_daemon(web: Container, instance: Instance) -> None:
    code = PRELUDE + "print(native(2, buf, 4096), text(4096).strip('\\0'), end='', flush=True)\n"
    with only(web, "net,syslog", "python3", "-c", code * 2) as session:
        parked(web, 1)
        assert [name.split(":")[1] for name in os.listdir(web / "procs")] == ["net,syslog"]
        instance.kill_daemon()
        write(web / "kmsg", "one")
        assert session.stdout is not None
        assert "one" in session.stdout.readline()
        instance.kill_daemon()
        parked(web, 1)
        write(web / "kmsg", "two")
        assert "two" in session.stdout.readline()
        assert session.wait(DEADLINE_S) == 0
    wait_until(lambda: not os.listdir(web / "procs"), "it has left")


def test_what_runs_is_not_given_another_log(web: Container, tree: Path) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            with pytest.raises(PermissionError):
                os.link(tree / f"procs/{process.pid}", web / f"procs/{process.pid}:syslog")
        finally:
            process.kill()


def test_a_session_ends_with_the_container(web: Container, instance: Instance) -> None:
    with only(web, "syslog", "python3", "-c", PRELUDE + "native(2, buf, 10)") as session:
        parked(web, 1)
        subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
        assert session.wait(DEADLINE_S) == 128 + 9
    instance.settled()
