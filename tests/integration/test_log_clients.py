"""Programs that read, write, clear and follow a kernel log, each as it is, inside."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsfs.logring import LogRing

from .conftest import Container, Instance, wait_until, write
from .test_syslog import HostLog, parked

TIME = r"\[ *\d+\.\d{6}\]"


@pytest.fixture
def web(tree: Path) -> Iterator[Container]:
    """A container; afterwards the host's log, read position and levels are what they were."""
    before = HostLog()
    path = tree / "web"
    path.mkdir()
    yield Container(path)
    before.check()


def console_level(instance: Instance) -> int:
    """The level of the only container's console, from where it is kept."""
    (path,) = [p for p in (instance.run_dir / "c").glob("*.log") if p.name != "0.log"]
    ring = LogRing(bytearray(path.read_bytes()))
    try:
        return ring.console_level
    finally:
        ring.close()


def has(web: Container, *texts: str) -> bool:
    """Whether what commands printed has all of this."""
    return all(text in web.read("output") for text in texts)


# --- dmesg of util-linux ---


@pytest.mark.parametrize("options", ["", "-S", "-x", "-T", "-r", "-k", "-u", "-c", "-J"])
def test_dmesg_of_an_empty_log(web: Container, options: str) -> None:
    out = web.run(f"dmesg {options}")
    assert out == "" or options == "-J"


def test_dmesg_in_its_forms(web: Container) -> None:
    write(web / "kmsg", "<4>one")
    write(web / "kmsg", "<30>two")
    for options in ("", "-S"):
        assert re.fullmatch(rf"{TIME} one\n{TIME} two\n", web.run(f"dmesg {options}")), options
        assert re.match(rf"user *:warn *: {TIME} one\n", web.run(f"dmesg {options} -x"))
        year = time.strftime("%Y")
        assert re.match(rf"\[\w+ \w+ .* {year}\] one\n", web.run(f"dmesg {options} -T"))
        assert re.match(rf"<\d+>{TIME} one\n", web.run(f"dmesg {options} -r"))
        assert "two" not in web.run(f"dmesg {options} -f user")
        assert "one" not in web.run(f"dmesg {options} -l info")
        assert web.run(f"dmesg {options} -t").startswith("one\n")


def test_dmesg_follows(web: Container) -> None:
    write(web / "kmsg", "before")
    web.start("dmesg", "-w")
    wait_until(lambda: has(web, "before"), "it shows what there was")
    write(web / "kmsg", "while")
    wait_until(lambda: has(web, "while"), "it follows")
    write(web / "kill", "TERM")
    wait_until(lambda: not os.listdir(web / "procs"), "it ends")


def test_dmesg_follows_what_is_new(web: Container) -> None:
    write(web / "kmsg", "before")
    web.start("sh", "-c", "echo ready; exec dmesg -W")
    wait_until(lambda: has(web, "ready"), "it runs")
    number = 0

    def seen() -> bool:
        nonlocal number
        number += 1
        write(web / "kmsg", f"while {number}")
        return has(web, "while")

    wait_until(seen, "it shows what is new")
    assert not has(web, "before")


def test_dmesg_clears(web: Container) -> None:
    web.run("echo one > /dev/kmsg")
    assert "one" in web.run("dmesg -c")
    assert web.run("dmesg") == web.run("dmesg -S") == web.read("kmsg") == ""
    web.run("echo two > /dev/kmsg")
    assert web.run("dmesg -C") == ""
    assert web.run("dmesg") == ""
    web.run("echo three > /dev/kmsg")
    for options in ("", "-S"):
        assert re.fullmatch(rf"{TIME} three\n", web.run(f"dmesg {options}"))
    assert "three" in web.run("dmesg -S -c")
    assert web.run("dmesg") == ""


def test_dmesg_sets_the_consoles_level(web: Container, instance: Instance) -> None:
    web.run("echo one > /dev/kmsg")
    assert console_level(instance) == 7
    for command, level in (
        ("dmesg -n 4", 4),
        ("dmesg -n debug", 8),
        ("dmesg -D", 1),
        ("dmesg -E", 8),
        ("busybox dmesg -n 5", 5),
    ):
        assert web.run(command) == ""
        assert console_level(instance) == level, command
    assert web.run_code("dmesg -n 9")[0] != 0
    instance.kill_daemon()
    web.run("dmesg -D; dmesg -E")
    assert console_level(instance) == 5


def test_dmesg_of_who_may_not(web: Container) -> None:
    web.run("echo one > /dev/kmsg")
    for command in ("dmesg -C", "dmesg -c", "dmesg -D", "dmesg -n 1", "busybox dmesg -c"):
        code, out = web.run_code(f"setpriv --reuid=1000 --clear-groups {command}")
        assert (code != 0, "not permitted" in out) == (True, True), (command, out)
    assert "one" in web.run("dmesg")


# --- busybox ---


def test_busybox_dmesg(web: Container) -> None:
    assert web.run("busybox dmesg") == ""
    web.run("printf '<3>one' > /dev/kmsg; echo two > /dev/kmsg")
    both = rf"<11>{TIME} one\n<12>{TIME} two\n"
    assert re.fullmatch(both, web.run("busybox dmesg -r"))
    assert re.fullmatch(rf"{TIME} one\n{TIME} two\n", web.run("busybox dmesg"))
    assert "two" in web.run("busybox dmesg -c")
    assert web.run("busybox dmesg") == ""


def test_klogd(web: Container, instance: Instance) -> None:
    write(web / "kmsg", "before")
    web.run("busybox syslogd -O /tmp/messages; until [ -S /dev/log ]; do sleep 0.05; done")
    web.start("busybox", "klogd", "-n", "-c", "6")
    web.run("until grep -q before /tmp/messages; do sleep 0.05; done")
    assert console_level(instance) == 6
    parked(web, 1)
    write(web / "kmsg", "<3>while it runs")
    web.run("until grep -q 'user.err.* while it runs' /tmp/messages; do sleep 0.05; done")
    parked(web, 1)
    instance.kill_daemon()
    write(web / "kmsg", "<3>with another daemon")
    web.run("until grep -q 'with another daemon' /tmp/messages; do sleep 0.05; done")
    # A signal ends its wait, and so it ends as it should.
    (klogd,) = [
        int(pid)
        for pid in os.listdir(web / "procs")
        if b"klogd" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    parked(web, 1)
    os.kill(klogd, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{klogd}").exists(), "it ends")
    web.run("until grep -q 'klogd: exiting' /tmp/messages; do sleep 0.05; done")


# --- log daemons ---

RSYSLOG = """
module(load="imklog" permitnonkernelfacility="on")
global(workDirectory="/tmp")
*.* action(type="omfile" file="/tmp/all.log")
"""


def test_rsyslogd(web: Container) -> None:
    write(web / "kmsg", "before")
    web.run(f"cat > /tmp/conf <<'X'\n{RSYSLOG}\nX")
    web.start("rsyslogd", "-n", "-f", "/tmp/conf", "-i", "/tmp/pid")
    web.run("until grep -q ' before' /tmp/all.log; do sleep 0.05; done 2> /dev/null")
    for number in range(50):
        write(web / "kmsg", f"<3>line {number};")
    web.run("until grep -q 'line 49;' /tmp/all.log; do sleep 0.05; done")
    out = web.run("cat /tmp/all.log")
    assert re.findall(r"line (\d+);", out) == [str(number) for number in range(50)]
    web.run("kill $(cat /tmp/pid); while [ -e /tmp/pid ]; do sleep 0.05; done")


def test_journald(web: Container) -> None:
    write(web / "kmsg", "<3>before")
    out = web.run(
        """
        mount -t cgroup2 none /sys/fs/cgroup
        mkdir -p /run/systemd/journal /run/log/journal
        /lib/systemd/systemd-journald & pid=$!
        until [ -S /run/systemd/journal/socket ]; do sleep 0.05; done
        echo '<30>named[7]: while it runs' > /dev/kmsg
        until journalctl -k | grep -q while; do sleep 0.1; done
        journalctl -k -o export
        kill $pid
        wait $pid
        """
    )
    entries = [dict(x.split("=", 1) for x in e.split("\n") if "=" in x) for e in out.split("\n\n")]
    found = {e["MESSAGE"]: e for e in entries if "MESSAGE" in e}
    assert found["before"]["PRIORITY"] == "3"
    assert found["before"]["_TRANSPORT"] == "kernel"
    later = found["while it runs"]
    assert (later["PRIORITY"], later["SYSLOG_FACILITY"]) == ("6", "3")
    assert (later["SYSLOG_IDENTIFIER"], later["SYSLOG_PID"]) == ("named", "7")


# --- what writes and reads lines ---


def test_writers(web: Container) -> None:
    web.run("echo from echo > /dev/kmsg")
    web.run("echo from tee | tee /dev/kmsg")
    web.run(
        "logger --no-act --stderr --socket-errors=off -t nsfs -p user.err 'from logger' 2> /dev/kmsg"
    )
    web.run("echo from dd | dd of=/dev/kmsg 2> /dev/null")
    web.run("python3 -c \"print('from print', file=open('/dev/kmsg', 'w'))\"")
    web.run("python3 -c \"open('/dev/kmsg', 'wb', buffering=0).write(b'<2>from bytes')\"")
    texts = [line.split(";", 1) for line in web.read("kmsg").splitlines()]
    logged = texts.pop(2)
    assert logged[0].startswith("11,")
    assert re.fullmatch(r"\w+ +\d+ [0-9:]+ nsfs: from logger", logged[1])
    assert [text for _, text in texts] == [
        *("from echo", "from tee", "from dd", "from print", "from bytes")
    ]
    assert texts[-1][0].startswith("10,")


def test_logger(web: Container) -> None:
    """By way of syslogd, which has the lines of the log as well."""
    web.run("busybox syslogd -O /tmp/messages; until [ -S /dev/log ]; do sleep 0.05; done")
    web.start("busybox", "klogd", "-n")
    write(web / "kmsg", "<3>of the kernel's log")
    web.run("logger -t nsfs -p daemon.warning 'from logger'")
    for line in ("daemon.warn nsfs: from logger", "user.err .*of the kernel's log"):
        web.run(f"""until grep -q "{line}" /tmp/messages; do sleep 0.05; done""")
    # What goes to /dev/log is none of the kernel's log.
    assert "from logger" not in web.read("kmsg")


def test_readers(web: Container) -> None:
    for number in range(3):
        write(web / "kmsg", f"line {number}")
    assert "line 1" in web.run("grep -m1 'line 1' /dev/kmsg")
    assert web.run("timeout 1 cat /dev/kmsg; true").count(";line") == 3
    read = "open('/dev/kmsg', 'rb').readline()"
    assert web.run(f'python3 -c "print({read})"').endswith(";line 0\\n'\n")
    assert web.run("dd if=/dev/kmsg bs=8192 count=2 2> /dev/null").count(";line") == 2
    assert web.run("head -n 2 /proc/kmsg | grep -c 'line [01]'") == "2\n"
    lines = "import itertools; print(''.join(itertools.islice(open('/dev/kmsg'), 3)))"
    assert web.run(f'python3 -c "{lines}"').count(";line") == 3
