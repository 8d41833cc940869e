"""A container's own kernel log, outside as a file and inside as /dev/kmsg and /proc/kmsg."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from pathlib import Path

from .conftest import Container, Instance, wait_until, write

PYTHON_READER = """
import os
fd = os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)
try:
    while True:
        print(os.read(fd, 8192).decode(), end='')
except BlockingIOError:
    print('EAGAIN')
"""


def records(text: str) -> list[tuple[int, str]]:
    """(sequence number, text) of each line of the outer file."""
    return [(int(line.split(",")[1]), line.split(";", 1)[1]) for line in text.splitlines() if line]


def test_what_is_written_inside_is_read_outside(web: Container) -> None:
    web.run("echo one > /dev/kmsg; echo '<3>two' > /dev/kmsg; printf '<30>three' > /dev/kmsg")
    lines = web.read("kmsg").splitlines()
    assert [line.split(";")[1] for line in lines] == ["one", "two", "three"]
    assert [int(line.split(",")[0]) for line in lines] == [8 | 4, 8 | 3, 30]
    assert all(re.fullmatch(r"\d+,\d+,\d+,-;\w+", line) for line in lines)


def test_what_is_written_outside_is_read_inside(web: Container) -> None:
    write(web / "kmsg", "<5>from outside")
    assert "from outside" in web.run("timeout 5 head -n 1 /dev/kmsg")
    assert "<13>" in web.run("timeout 5 head -n 1 /proc/kmsg")


def test_the_hosts_log_is_another(web: Container, tree: Path) -> None:
    mark = f"nsfs-test-{os.getpid()}-{time.monotonic_ns()}"
    web.run(f"echo {mark} > /dev/kmsg")
    os.mkdir(tree / "other")
    assert mark in web.read("kmsg")
    assert mark not in (tree / "other" / "kmsg").read_text()
    host = subprocess.run(["dmesg"], check=False, capture_output=True, text=True)
    assert mark not in host.stdout


def test_dmesg_in_its_forms(web: Container) -> None:
    web.run("echo '<4>hello world' > /dev/kmsg")
    assert re.search(r"\[ *\d+\.\d+\] hello world", web.run("dmesg"))
    assert re.search(r"user *:warn *: \[ *\d+\.\d+\] hello world", web.run("dmesg -x"))
    assert "hello world" in web.run("timeout 1 dmesg -w || true")


def test_two_readers_each_get_everything(web: Container) -> None:
    for number in range(20):
        write(web / "kmsg", f"line {number}")
    script = "timeout 10 head -n 20 /dev/kmsg"
    out = web.run(
        f"{script} > /tmp/a & {script} > /tmp/b & wait; cmp /tmp/a /tmp/b && wc -l < /tmp/a"
    )
    assert out.strip() == "20"


def test_a_blocking_reader_is_woken(web: Container) -> None:
    web.start("sh", "-c", "head -n 1 /dev/kmsg; echo done")
    time.sleep(0.2)
    assert "done" not in web.read("output")
    write(web / "kmsg", "wake up")
    wait_until(lambda: "done" in web.read("output"), "the reader is woken")
    assert "wake up" in web.read("output")


def test_poll_inside_and_outside(web: Container) -> None:
    fd = os.open(web / "kmsg", os.O_RDONLY)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert not poll.poll(50)
        write(web / "kmsg", "something")
        assert poll.poll(5000)
        assert b"something" in os.read(fd, 4096)
        assert not poll.poll(50)
    finally:
        os.close(fd)
    web.start(
        "python3",
        "-c",
        "import os, select\n"
        "fd = os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)\n"
        "os.read(fd, 4096)\n"
        "p = select.poll(); p.register(fd, select.POLLIN)\n"
        "print('idle', p.poll(50), flush=True)\n"
        "print('woken', p.poll(10000) != [], os.read(fd, 4096))\n",
    )
    wait_until(lambda: "idle []" in web.read("output"), "it polls")
    write(web / "kmsg", "news")
    wait_until(lambda: "woken True" in web.read("output"), "it is woken")
    assert "news" in web.read("output")


def test_nonblocking_reads_end_with_eagain(web: Container) -> None:
    write(web / "kmsg", "a")
    write(web / "kmsg", "b")
    out = web.run(f'python3 -c "{PYTHON_READER}"')
    assert out.splitlines()[-1] == "EAGAIN"
    assert len(out.splitlines()) == 3


def test_truncating_clears(web: Container) -> None:
    write(web / "kmsg", "before")
    subprocess.run(["sh", "-c", f": > {web / 'kmsg'}"], check=True)
    assert web.read("kmsg") == ""
    write(web / "kmsg", "after")
    found = records(web.read("kmsg"))
    assert [text for _, text in found] == ["after"]
    # Sequence numbers go on.
    assert found[0][0] == 1


def test_an_overrun_keeps_the_newest(web: Container, instance: Instance) -> None:
    with (web / "kmsg").open("rb", buffering=0) as early:
        for number in range(3000):
            write(web / "kmsg", f"{number:04d} " + "x" * 200)
        text = early.read(1 << 20)
    assert text
    found = records(web.read("kmsg"))
    assert found[-1][1].startswith("2999 ")
    numbers = [number for number, _ in found]
    assert numbers == list(range(numbers[0], 3000))
    assert numbers[0] > 0
    out = web.run(f'python3 -c "{PYTHON_READER}" | tail -n 2').splitlines()
    assert out[0].split(";")[1].startswith("2999 ")
    assert out[1] == "EAGAIN"
    stat = dict(line.split() for line in web.read("stat").splitlines())
    assert int(stat["log.records"]) == 3000
    assert int(stat["log.dropped"]) >= numbers[0]


def test_a_shared_log(web: Container) -> None:
    web.write("defaults/unshare", "cgroup ipc mnt net pid time user uts")
    os.mkdir(web / "db")
    db = Container(web / "db")
    db.run("echo from db > /dev/kmsg")
    assert "from db" in web.read("kmsg")
    assert web.read("kmsg") == db.read("kmsg")


SHARED = "cgroup ipc mnt net pid time user uts"


def test_whose_log_it_is(web: Container, tree: Path) -> None:
    """`namespaces` tells, nested at any depth, and rebuilding changes it."""

    def syslog(container: Container) -> str:
        (line,) = [x for x in container.read("namespaces").splitlines() if x[:7] == "syslog "]
        return line

    web.run("mkdir /sys/namespaces/db")
    db = Container(web / "db")
    number = syslog(web).split()[1]
    assert syslog(web) == f"syslog {number} own"
    assert syslog(db).endswith(" own")
    assert syslog(db).split()[1] != number
    db.write("unshare", SHARED)
    assert syslog(db) == f"syslog {number} .."
    db.write("defaults/unshare", SHARED)
    db.run("mkdir /sys/namespaces/deep")
    deep = Container(db / "deep")
    assert syslog(deep) == f"syslog {number} ../.."
    deep.run("echo deep > /dev/kmsg; grep -qm1 deep /dev/kmsg")
    assert "deep" in web.read("kmsg")
    assert "syslog 0 own" in (tree / "namespaces").read_text()


def test_at_the_top_the_hosts_log_is_shared(web: Container, tree: Path) -> None:
    """As far as kernel.dmesg_restrict lets users of the host see it."""
    mark = f"nsfs-test-{os.getpid()}-{time.monotonic_ns()}"
    web.write("unshare", SHARED)
    web.run(f"echo {mark} > /dev/kmsg")
    assert mark in (tree / "kmsg").read_text()
    host = subprocess.run(["dmesg"], check=True, capture_output=True, text=True)
    assert mark not in host.stdout
    restricted = Path("/proc/sys/kernel/dmesg_restrict").read_text() != "0\n"
    for path in ("/dev/kmsg", "/sys/namespaces/kmsg"):
        code, out = web.run_code(f"timeout 20 grep -m1 {mark} {path}")
        if restricted:
            assert code
            assert "Operation not permitted" in out
        else:
            assert mark in out
    assert "Operation not permitted" in web.run_code("cat /proc/kmsg")[1]
    assert web.run_code(": > /sys/namespaces/kmsg")[0]
    assert mark in (tree / "kmsg").read_text()
    # One without a user namespace of its own is the host's root.
    web.write("unshare", "cgroup ipc mnt net pid time uts")
    assert mark in web.run(f"timeout 20 grep -m1 {mark} /dev/kmsg")


def test_tail_follows(web: Container) -> None:
    with subprocess.Popen(
        ["tail", "-n", "+1", "-s", "0.1", "-f", web / "kmsg"], stdout=subprocess.PIPE, text=True
    ) as tail:
        try:
            assert tail.stdout is not None
            write(web / "kmsg", "first")
            assert "first" in tail.stdout.readline()
            time.sleep(0.3)
            write(web / "kmsg", "second")
            assert "second" in tail.stdout.readline()
        finally:
            tail.kill()


def test_the_log_outlives_the_init(web: Container) -> None:
    web.run("echo remember > /dev/kmsg")
    os.kill(web.init, 9)
    wait_until(lambda: not Path(f"/proc/{os.getpid()}/nope").exists(), "")
    assert "remember" in web.read("kmsg")


def test_what_was_cleared_is_not_shown_by_dmesg(web: Container) -> None:
    web.run("echo before > /dev/kmsg")
    subprocess.run(["sh", "-c", f": > {web / 'kmsg'}"], check=True)
    web.run("echo after > /dev/kmsg")
    out = web.run("dmesg")
    assert "after" in out
    assert "before" not in out
    # Cleared is not gone: reading from the first record shows it.
    assert "before" in web.run("timeout 5 head -n 1 /dev/kmsg")


def test_seeking_as_the_document_says(web: Container) -> None:
    web.run("echo one > /dev/kmsg; echo two > /dev/kmsg")
    script = (
        "import os, errno\n"
        "fd = os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)\n"
        "def what(f, *a):\n"
        "    try: return f(*a)\n"
        "    except OSError as e: return errno.errorcode[e.errno]\n"
        "print(what(os.read, fd, 999)[-4:], what(os.lseek, fd, 0, os.SEEK_END))\n"
        "print(what(os.read, fd, 999))\n"
        "print(what(os.lseek, fd, 0, os.SEEK_SET), what(os.read, fd, 999)[-4:])\n"
        "print(what(os.lseek, fd, 0, os.SEEK_DATA), what(os.read, fd, 999)[-4:])\n"
        "print(what(os.lseek, fd, 5, os.SEEK_DATA), what(os.lseek, fd, 0, os.SEEK_HOLE))\n"
    )
    assert web.run(f'python3 -c "{script}"').splitlines() == [
        "b'one\\n' 4096",
        "EAGAIN",
        "0 b'one\\n'",
        "0 b'one\\n'",
        "ESPIPE EINVAL",
    ]


def test_seeking_after_a_clear(web: Container) -> None:
    """SEEK_DATA goes to the first record after the last SYSLOG_ACTION_CLEAR."""
    web.run("echo before > /dev/kmsg; dmesg -C; echo after > /dev/kmsg")
    script = (
        "import os\n"
        "fd = os.open('/dev/kmsg', os.O_RDONLY | os.O_NONBLOCK)\n"
        "for whence in (os.SEEK_DATA, os.SEEK_SET):\n"
        "    os.lseek(fd, 0, whence); print(os.read(fd, 999).split(b';')[1].decode(), end='')\n"
    )
    assert web.run(f'python3 -c "{script}"') == "after\nbefore\n"


def test_poll_of_proc_kmsg(web: Container) -> None:
    """It tells of what nobody has read yet; a reader takes it from all others."""
    write(web / "kmsg", "old")
    web.start(
        "python3",
        "-c",
        "import os, select\n"
        "fd = os.open('/proc/kmsg', os.O_RDONLY | os.O_NONBLOCK)\n"
        "other = os.open('/proc/kmsg', os.O_RDONLY | os.O_NONBLOCK)\n"
        "p = select.poll(); p.register(fd, select.POLLIN)\n"
        "print('at first', p.poll(10000) != [], os.read(other, 4096)[:4], flush=True)\n"
        "print('then', p.poll(50), flush=True)\n"
        "try: os.read(fd, 4096)\n"
        "except BlockingIOError: print('nothing', flush=True)\n"
        "print('woken', p.poll(10000) != [], os.read(fd, 4096))\n",
    )
    wait_until(lambda: "nothing" in web.read("output"), "it polls")
    assert "at first True b'<12>'\nthen []\nnothing\n" in web.read("output")
    write(web / "kmsg", "news")
    wait_until(lambda: "woken True" in web.read("output"), "it is woken")
    assert re.search(r"woken True b'<12>\[ *\d+\.\d+\] news", web.read("output"))
