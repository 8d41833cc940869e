"""The shell sessions of README.rst and nsfs(5), run for real: what they show is what happens.

A session is a literal block in which lines begin with `$ ` (what is typed) or `> ` (its
continuation), and the others are what is printed.  In these `...` stands for anything within a
line, and a line of it for any lines.  What ls(1) prints is names, in whatever columns.  All
sessions of a document are run by one shell, one after another.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from docutils import nodes
from docutils.core import publish_doctree

TOP = Path(__file__).parents[2]
DOCUMENTS = ("README.rst", "man/nsfs.5.rst")
COMMAND_S = 10.0
"""How long a command may take."""
SETTLE_S = 10.0
"""How long it may take until what a program inside does can be read."""
READS = re.compile(r"(?:cat|grep|ls) [^|;&>]*")
"""Commands that change nothing: they are repeated until they print what is expected, as a user does
who was too quick."""
MARK = "the-command-has-ended"


class Example(NamedTuple):
    """A command and what it prints."""

    command: str
    expected: str


def examples(document: Path) -> list[Example]:
    """What the sessions of a document show."""
    found: list[tuple[str, list[str]]] = []
    for block in publish_doctree(document.read_text()).findall(nodes.literal_block):
        rows = block.astext().splitlines()
        if not rows[0].startswith("$ "):
            continue
        for row in rows:
            if row.startswith("$ "):
                found.append((row[2:], []))
            elif row.startswith("> "):
                found[-1] = (f"{found[-1][0]}\n{row[2:]}", [])
            else:
                found[-1][1].append(row)
    return [Example(command, "".join(f"{x}\n" for x in printed)) for command, printed in found]


def names(listing: str) -> list[str]:
    """What ls(1) has listed in columns, one a line."""
    return sorted(f"{word}\n" for word in listing.split())


def agrees(expected: str, printed: str, command: str = "") -> bool:
    """Whether something was printed as expected, `...` standing for anything."""
    if re.fullmatch(r"ls( [^- ][^ ]*)?", command):
        wanted, found = names(expected), names(printed)
        return set(wanted) - {"...\n"} <= set(found) if "...\n" in wanted else wanted == found
    pattern = ""
    for row in expected.splitlines():
        if row == "...":
            pattern += r"(?:.*\n)*"
        else:
            pattern += ".*".join(map(re.escape, row.split("..."))) + r"\n"
    return re.fullmatch(pattern, printed) is not None


class Shell:
    """A bash in a mount namespace of its own."""

    def __init__(self, directory: Path) -> None:
        environment = {
            "HOME": str(directory),
            "LC_ALL": "C.UTF-8",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            # By which the tests know their own processes, and others' sources if they are not
            # installed.
            **{k: v for k, v in os.environ.items() if k in ("NSFS_TEST_RUN", "PYTHONPATH")},
        }
        self.process = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "bash", "--norc", "--noprofile"],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=directory,
        )

    def run(self, command: str) -> tuple[int, str]:
        """Exit status and output of a command."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        script = f"{{ {command}\n}} < /dev/null; echo {MARK} $?\n"
        self.process.stdin.write(script.encode())
        printed = b""
        end_s = time.monotonic() + COMMAND_S
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while not (mark := re.search(rf"{MARK} (\d+)\n\Z", printed.decode(errors="replace"))):
            left_s = end_s - time.monotonic()
            assert left_s > 0, f"does not end: {command}: {printed!r}"
            if poll.poll(left_s * 1000):
                part = os.read(self.process.stdout.fileno(), 65536)
                assert part, f"the shell has ended: {command}: {printed!r}"
                printed += part
        text = printed.decode(errors="replace")[: mark.start()]
        # As an interactive shell says it.
        return int(mark[1]), re.sub(r"^bash: line \d+: ", "bash: ", text, flags=re.MULTILINE)

    def do(self, command: str) -> str:
        """The same for a command that must succeed."""
        status, printed = self.run(command)
        assert status == 0, f"{command}: exit status {status}: {printed}"
        return printed

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.communicate()


def stop(pid: int) -> None:
    """End a supervisor that `nsfs umount` has not ended."""
    try:
        pid_fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(pid_fd, select.POLLIN)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        signal.pidfd_send_signal(pid_fd, number)
        if poll.poll(5000):
            break
    os.close(pid_fd)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell that sees a tree of its own at /sys/namespaces, whatever else the host has there."""
    (tmp_path / "srv").mkdir()
    (tmp_path / "nsfs.conf").touch()
    nsfs = shlex.join([sys.executable, "-P", "-m", "nsfs.cli"])
    group = f"nsfs-test-{os.getpid()}-examples"
    shell = Shell(tmp_path)
    supervisor = 0
    try:
        # The state of another instance, and what examples make.
        shell.do("mount -t tmpfs -o mode=755 none /run && mount --bind srv /srv")
        shell.do("while mountpoint -q /sys/namespaces; do umount -l /sys/namespaces; done")
        shell.do(f'nsfs() {{ {nsfs} "$@"; }}')
        # As on a terminal, one as wide as what man(1) indents.
        shell.do('ls() { command ls -C -w 70 -T 0 "$@"; }')
        shell.do(
            f"nsfs mount --cgroup {group} --config nsfs.conf || {{ cat /run/nsfs/log; false; }}"
        )
        supervisor = int(shell.do("cat /run/nsfs/supervisor.pid"))
        yield shell
        shell.do("cd /")
        shell.do("nsfs umount --kill || { cat /run/nsfs/log; false; }")
    finally:
        shell.close()
        if supervisor:
            stop(supervisor)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_sessions(shell: Shell, document: str) -> None:
    sessions = examples(TOP / document)
    assert sessions
    for number, (command, expected) in enumerate(sessions):
        _, printed = shell.run(command)
        end_s = time.monotonic() + SETTLE_S
        while not agrees(expected, printed, command) and READS.fullmatch(command):
            if time.monotonic() > end_s:
                break
            time.sleep(0.05)
            _, printed = shell.run(command)
        if not agrees(expected, printed, command):
            before = "\n".join(f"$ {each.command}" for each in sessions[:number])
            log = shell.run("tail -n 20 /run/nsfs/log")[1]
            pytest.fail(
                f"{document}: $ {command}\n--- expected\n{expected}--- printed\n{printed}"
                f"--- log\n{log}--- before\n{before}",
                pytrace=False,
            )


@pytest.mark.parametrize(
    ("expected", "printed", "agree"),
    [
        ("a\n", "a\n", True),
        ("a\n", "a\nb\n", False),
        ("a ...\n", "a 1 2\n", True),
        ("a ...\n", "a 1\n2\n", False),
        ("a\n...\nb\n", "a\nb\n", True),
        ("a\n...\nb\n", "a\nx\ny\nb\n", True),
        ("a.c\n", "abc\n", False),
        ("", "a\n", False),
    ],
)
def test_agrees(expected: str, printed: str, agree: bool) -> None:
    assert agrees(expected, printed) is agree


@pytest.mark.parametrize(
    ("expected", "printed", "agree"),
    [
        ("a  b\nc\n", "a  c\nb\n", True),
        ("a  b\n", "a  b  c\n", False),
        ("a  b\n...\n", "a  b  c\n", True),
        ("a  d\n...\n", "a  b  c\n", False),
    ],
)
def test_names_agree_in_whatever_columns(expected: str, printed: str, agree: bool) -> None:
    assert agrees(expected, printed, "ls web") is agree
