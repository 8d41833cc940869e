"""`console`: lines of a container's log are echoed into its parent's, or on a terminal."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import re
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, Container, Instance, readable, wait_until, write

SERIAL = Path("/dev/ttyS0")
"""Only in the virtual machine, where its other end is a file of the host's: elsewhere somebody may
be reading it."""


def texts(container: Container | Path) -> list[str]:
    """The texts of a log."""
    path = container / "kmsg"
    return [line.split(";", 1)[1] for line in path.read_text().splitlines()]


def stat(container: Container) -> dict[str, int]:
    """`stat`."""
    return {k: int(v) for k, v in (line.split() for line in container.read("stat").splitlines())}


def nested(parent: Container | Path, name: str) -> Container:
    """One more container."""
    path = parent / name
    path.mkdir()
    return Container(path)


class Screen:
    """A pseudoterminal, whose master we are."""

    def __init__(self) -> None:
        self.master_fd, slave_fd = pty.openpty()
        self.path = os.ttyname(slave_fd)
        # As a terminal is, but that nothing is echoed.
        tty.setcbreak(slave_fd)
        self.slave_fd = slave_fd
        self.text = ""

    def lines(self) -> list[str]:
        """What it has shown, without times."""
        while readable(self.master_fd, 0):
            self.text += os.read(self.master_fd, 65536).decode("latin-1")
        rows = self.text.replace("\r", "").splitlines()
        return [re.sub(r"^\[ *\d+\.\d{6}\] ", "", row) for row in rows]

    def close(self) -> None:
        """Hang up."""
        for fd in (self.slave_fd, self.master_fd):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.fixture
def screen() -> Iterator[Screen]:
    """A terminal."""
    found = Screen()
    yield found
    found.close()


def test_into_the_parents_log(web: Container) -> None:
    db = nested(web, "db")
    assert db.read("console") == "none\n"
    db.run("echo before > /dev/kmsg")
    db.write("console", "parent 6")
    assert db.read("console") == "parent 6\n"
    db.run(
        "echo '<5>five' > /dev/kmsg; echo '<6>six' > /dev/kmsg; printf '<4>two\\nlines' > /dev/kmsg"
    )
    web.run("echo its own > /dev/kmsg")
    assert texts(db) == ["before", "five", "six", r"two\x0alines"]
    assert texts(web) == ["[db] five", r"[db] two\x0a[db] lines", "its own"]
    # Priority and time are those of the line.
    inner, outer = (c.read("kmsg").splitlines() for c in (db, web))
    assert inner[1].split(",")[0::2] == outer[0].split(",")[0::2]
    db.write("console", "none")
    db.run("echo after > /dev/kmsg")
    assert texts(web)[-1] == "its own"


def test_tags_add_up_and_follow_the_name(web: Container, tree: Path) -> None:
    (tree / "kmsg").write_text("")
    db = nested(web, "db")
    deep = nested(db, "x] y")
    for each in (web, db, deep):
        each.write("console", "parent 8")
    deep.run("echo deep > /dev/kmsg")
    # What looks like a tag is none.
    db.run("echo '[deep] forged' > /dev/kmsg")
    (tree / "web").rename(tree / "shop")
    shop = Container(tree / "shop")
    (shop / "db").rename(shop / "sql")
    shop.run("echo own > /dev/kmsg")
    write(shop / "sql/x] y/kmsg", "again")
    assert texts(shop / "sql") == [
        r"[x]\x5c040y] deep",
        "[deep] forged",
        r"[x]\x5c040y] again",
    ]
    assert texts(shop) == [
        r"[db/x]\x5c040y] deep",
        "[db] [deep] forged",
        "own",
        r"[sql/x]\x5c040y] again",
    ]
    tagged = [text for text in texts(tree) if text.startswith(("[web", "[shop"))]
    assert tagged == [
        r"[web/db/x]\x5c040y] deep",
        "[web/db] [deep] forged",
        "[shop] own",
        r"[shop/sql/x]\x5c040y] again",
    ]
    # That log is the tree's: the host's own does not change.
    host = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    assert "[shop] own" not in host


def test_the_containers_own_level(instance: Instance, web: Container) -> None:
    """The smaller one counts: that which syslog(2) sets inside, 7 at first, and the parent's."""
    db = nested(web, "db")
    db.write("console", "parent 8")
    every = 'for i in 0 1 2 3 4 5 6 7; do echo "<$i>$i" > /dev/kmsg; done'
    shown = 0
    for action, level, below in ((0, 0, 7), (8, 4, 4), (6, 0, 1), (7, 0, 4), (8, 8, 8), (8, 1, 1)):
        call = f"import ctypes; assert ctypes.CDLL(None).klogctl({action}, 0, {level}) == 0"
        db.run(f'python3 -c "{call}"; {every}')
        assert texts(web)[shown:] == [f"[db] {level}" for level in range(below)]
        shown = len(texts(web))
        if action == 6:
            instance.kill_daemon()
    db.run("python3 -c 'import ctypes; ctypes.CDLL(None).klogctl(8, 0, 8)'")
    db.write("console", "parent 3")
    db.run(every)
    assert texts(web)[shown:] == [f"[db] {level}" for level in range(3)]


def test_a_parent_without_a_log_of_its_own(web: Container) -> None:
    web.write("defaults/unshare", "cgroup ipc mnt net pid time user uts")
    shared = nested(web, "shared")
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        shared.write("console", "parent 7")
    shared.write("defaults/unshare", "cgroup ipc mnt net pid syslog time user uts")
    own = nested(shared, "own")
    own.write("console", "parent 7")
    own.run("echo text > /dev/kmsg")
    assert texts(own) == ["text"]
    assert texts(web) == texts(shared) == ["[shared/own] text"]


def test_in_a_pod(web: Container, tree: Path) -> None:
    """The parent has the log of one that it is not in; and a log that another one inherits."""
    pod, left, right = web, nested(web, "left"), nested(web, "right")
    right.write("namespaces", "syslog ../left")
    deep = nested(right, "deep")
    deep.write("console", "parent 8")
    deep.run("echo text > /dev/kmsg")
    assert texts(left) == texts(right) == ["[right/deep] text"]
    left.write("nsfs.log", "bytes 65536")
    left.write("console", "parent 8")
    deep.run("echo more > /dev/kmsg")
    # The tag is what it is where that log is: deep is nobody in left.
    assert texts(pod) == ["[left/right/deep] more"]
    subprocess.run(["rm", "-rf", str(left.path)], check=True)
    wait_until(lambda: " own" in syslog(right), "it is the heir's")
    deep.run("echo last > /dev/kmsg")
    assert texts(right) == [f"[right/deep] {x}" for x in ("text", "more")] + ["[deep] last"]
    assert right.read("nsfs.log").startswith("bytes 65536\n")
    assert texts(pod) == ["[left/right/deep] more"]
    right.write("console", "parent 8")
    deep.run("echo again > /dev/kmsg")
    assert texts(pod)[1:] == ["[right/deep] again"]


def syslog(container: Container) -> str:
    """The line of the log in `namespaces`."""
    (line,) = [x for x in container.read("namespaces").splitlines() if x.startswith("syslog ")]
    return line


def test_a_log_that_is_given_up_and_taken_again(instance: Instance, web: Container) -> None:
    db = nested(web, "db")
    db.write("console", "parent 7")
    every = db.read("unshare").strip()
    db.write("unshare", every.replace("syslog ", ""))
    db.run("echo shared > /dev/kmsg")
    assert texts(web) == ["shared"]
    assert db.read("console") == "parent 7\n"
    instance.kill_daemon()
    db.write("unshare", every)
    db.run("echo own > /dev/kmsg")
    assert texts(web) == ["shared", "[db] own"]
    db.write("unshare", every.replace("syslog ", ""))
    db.write("console", "none")
    db.write("unshare", every)
    db.run("echo not echoed > /dev/kmsg")
    assert texts(web) == ["shared", "[db] own"]
    assert texts(db)[-1] == "not echoed"


def test_what_is_wrong(web: Container, tmp_path: Path, screen: Screen) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    link = tmp_path / "a b"
    link.symlink_to(screen.path)
    web.write("console", "parent 3")
    for value, number in (
        ("", errno.EINVAL),
        ("parent", errno.EINVAL),
        ("parent x", errno.EINVAL),
        ("none 1", errno.EINVAL),
        ("parent 7 7", errno.EINVAL),
        ("dev/tty 7", errno.EINVAL),
        ("/dev/../dev/tty0 7", errno.EINVAL),
        ("parent 0", errno.ERANGE),
        ("parent 9", errno.ERANGE),
        ("/dev/null 7", errno.ENOTTY),
        ("/dev/ptmx 7", errno.ENOTTY),
        (f"{plain} 7", errno.ENOTTY),
        (f"{fifo} 7", errno.ENOTTY),
        (f"{tmp_path}/nothing 7", errno.ENOENT),
        ("/dev/tty 7", errno.ENXIO),
    ):
        with pytest.raises(OSError, match=os.strerror(number)):
            web.write("console", value)
        assert web.read("console") == "parent 3\n"
    web.write("console", rf"{tmp_path}/a\040b 7")
    assert web.read("console") == rf"{tmp_path}/a\040b 7" + "\n"
    write(web / "kmsg", "by the link")
    wait_until(lambda: screen.lines() == ["by the link"], "it is shown")


def test_it_is_the_parents_to_change(web: Container) -> None:
    web.write("console", "parent 3")
    code, out = web.run_code("cat /sys/namespaces/console; echo none > /sys/namespaces/console")
    assert code
    assert out.startswith("parent 3\n")
    assert "Permission denied" in out
    # One that is made inside is its maker's.
    web.run("mkdir /sys/namespaces/db; echo parent 5 > /sys/namespaces/db/console")
    web.run("echo '<3>x' > /sys/namespaces/db/kmsg")
    assert texts(web) == ["[db] x"]


def test_on_a_terminal(web: Container, screen: Screen) -> None:
    db = nested(web, "db")
    db.write("console", "parent 8")
    web.write("console", f"{screen.path} 5")
    assert web.read("console") == f"{screen.path} 5\n"
    web.run("echo '<4>shown' > /dev/kmsg; echo '<5>not shown' > /dev/kmsg")
    db.run("printf '<3>from \\033[31mdb\\n' > /dev/kmsg")
    wait_until(lambda: len(screen.lines()) >= 2, "lines are shown")
    # Nothing in a line steers the terminal.
    assert screen.lines() == ["shown", r"[db] from \x1b[31mdb"]
    assert re.match(r"\[ *\d+\.\d{6}\] shown\r*\n", screen.text)
    assert stat(web)["log.console_dropped"] == 0


def test_a_terminal_that_takes_nothing(web: Container, screen: Screen) -> None:
    web.write("nsfs.log", "rate max\nbytes 65536")
    web.write("console", f"{screen.path} 8")
    count = 2000
    # ^S: nothing comes out any more.
    os.write(screen.master_fd, b"\x13")
    termios_set(screen.slave_fd)
    for number in range(count):
        write(web / "kmsg", f"line {number:04d} " + "x" * 60)
    # What it is to show waits in the log, and is overwritten there.
    kept = [int(text.split()[1]) for text in texts(web)]
    assert kept[-1] == count - 1
    os.write(screen.master_fd, b"\x11")
    wait_until(lambda: screen.lines() and f"line {count - 1}" in screen.lines()[-1], "it goes on")
    (told,) = [x for x in screen.lines() if x.startswith("**")]
    before, _, after = "\n".join(screen.lines()).partition(f"{told}\n")
    begun = [int(x.split()[1]) for x in before.splitlines()]
    assert begun == list(range(len(begun)))
    assert [int(x.split()[1]) for x in after.splitlines()] == kept
    dropped = kept[0] - len(begun)
    assert told == f"** {dropped} printk messages dropped **"
    assert stat(web)["log.console_dropped"] == dropped > 500


def termios_set(fd: int) -> None:
    """Let ^S and ^Q stop and start a terminal's output."""
    modes = termios.tcgetattr(fd)
    modes[0] |= termios.IXON
    termios.tcsetattr(fd, termios.TCSANOW, modes)


def test_a_terminal_that_hangs_up(web: Container, screen: Screen) -> None:
    web.write("console", f"{screen.path} 8")
    write(web / "kmsg", "one")
    wait_until(lambda: screen.lines() == ["one"], "it is shown")
    screen.close()
    write(web / "kmsg", "two")
    write(web / "kmsg", "three")
    assert texts(web) == ["one", "two", "three"]
    # Its name will be another's.
    assert web.read("console") == "none\n"


def test_with_the_writers_authority(instance: Instance, tree: Path, screen: Screen) -> None:
    (tree / "web").mkdir()
    os.chown(tree / "web", 1000, 1000)
    script = f"cd {tree}/web; mkdir -p db; printf '%s 7' {screen.path} | dd of=db/console"
    words = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "sh", "-c", script]
    os.chmod(screen.path, 0o600)
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert "Permission denied" in done.stderr
    os.chown(screen.path, 1000, -1)
    subprocess.run(words, check=True, capture_output=True, timeout=DEADLINE_S)
    write(tree / "web/db/kmsg", "hello")
    wait_until(lambda: screen.lines() == ["hello"], "it is shown")


def test_a_terminal_inside(web: Container) -> None:
    """A path is as the writer sees it: this terminal is of the container's own devpts."""
    web.run("mkdir /sys/namespaces/db")
    code = (
        "import os, pty\n"
        "m, s = pty.openpty()\n"
        "path = os.ttyname(s)\n"
        "open('/sys/namespaces/db/console', 'w').write(path + ' 8')\n"
        "open('/sys/namespaces/db/kmsg', 'a').write('inside')\n"
        "print(path, os.read(m, 4096).split(b'] ')[1].split())\n"
    )
    assert web.run(f'python3 -c "{code}"') == "/dev/pts/0 [b'inside']\n"


def test_the_next_daemon_goes_on(
    instance: Instance, web: Container, screen: Screen, tree: Path
) -> None:
    db = nested(web, "db")
    db.write("console", "parent 8")
    web.write("console", f"{screen.path} 8")
    writer = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n"
        "for i in range(1500):\n"
        "    os.write(fd, b'line %d' % i)\n"
    )
    words = [sys.executable, "-c", writer, str(db / "kmsg")]
    with subprocess.Popen(words) as process:
        for _ in range(3):
            wait_until(lambda: texts(db), "it has begun")
            instance.kill_daemon()
            assert web.read("console") == f"{screen.path} 8\n"
        assert process.wait(DEADLINE_S) == 0
    expected = [f"line {i}" for i in range(1500)]
    assert texts(db) == expected
    assert texts(web) == [f"[db] {x}" for x in expected]
    wait_until(lambda: screen.lines()[-1:] == ["[db] line 1499"], "all are shown")
    # The line that a daemon died of may have been begun, and then comes again.
    shown = [x.rpartition("[db] ")[2] for x in screen.lines()]
    assert list(dict.fromkeys(x for x in shown if x in expected)) == expected
    assert len(shown) <= len(expected) + 3
    assert stat(web)["log.console_dropped"] == 0


def test_what_comes_after_a_terminal_is_not_it(
    instance: Instance, web: Container, screen: Screen
) -> None:
    """Its number was given to another user's while there was no daemon."""
    web.write("console", f"{screen.path} 8")
    os.chown(screen.path, 1000, -1)
    instance.kill_daemon()
    wait_until(lambda: web.read("console") == "none\n", "it is another's")
    write(web / "kmsg", "secret")
    assert texts(web) == ["secret"]
    assert not screen.lines()


def test_removal_lets_go_of_the_terminal(instance: Instance, tree: Path, screen: Screen) -> None:
    (tree / "web").mkdir()
    write(tree / "web/console", f"{screen.path} 8")

    def held() -> list[str]:
        found = []
        for each in Path(f"/proc/{instance.daemon()}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(each))
        return [x for x in found if x == screen.path]

    assert held()
    (tree / "web").rmdir()
    wait_until(lambda: not held(), "it is closed")


if os.environ.get("NSFS_VM") == "1":

    def test_on_a_serial_line(web: Container) -> None:
        web.write("console", f"{SERIAL} 8")
        for number in range(100):
            write(web / "kmsg", f"line {number}")
        assert web.read("console") == f"{SERIAL} 8\n"
        assert len(texts(web)) == 100
        assert stat(web)["log.console_dropped"] == 0
