"""`kmsg` and `output` are followed by the programs that follow files, and read by all others.

st_size is what grows, or GNU tail and busybox tail find nothing new, or begin again.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.programs import program

from .conftest import DEADLINE_S, Container, Instance, wait_until
from .terminal import Terminal

FOLLOWERS = {
    "tail -f": ["tail", "-s", "0.05", "-f"],
    "tail -n 0 -f": ["tail", "-n", "0", "-s", "0.05", "-f"],
    "tail -n 2 -f": ["tail", "-n", "2", "-s", "0.05", "-f"],
    "tail -F": ["tail", "-s", "0.05", "-F"],
    "tail -c 0 -f": ["tail", "-c", "0", "-s", "0.05", "-f"],
    "tail -n +1 -f": ["tail", "-n", "+1", "-s", "0.05", "-f"],
    "busybox tail -f": ["busybox", "tail", "-s", "1", "-f"],
    "busybox tail -n 0 -f": ["busybox", "tail", "-s", "1", "-n", "0", "-f"],
}
SHOWN_FIRST = {"tail -f": 10, "tail -F": 10, "tail -n 2 -f": 2, "tail -n +1 -f": 99}
SHOWN_FIRST |= {"busybox tail -f": 10}


class Log:
    """`kmsg` or `output`, and how a line gets into it."""

    def __init__(self, web: Container, name: str) -> None:
        self.web = web
        self.path = web / name
        self.name = name

    def add(self, *lines: str) -> None:
        for line in lines:
            if self.name == "kmsg":
                with open(self.path, "a") as file:
                    file.write(line)
            else:
                self.web.start("echo", line)
                # Commands are not in the order of their writes.
                wait_until(lambda line=line: line in self.text(), "it is printed")

    def text(self) -> str:
        return self.path.read_text()


@pytest.fixture(params=["kmsg", "output"])
def log(request: pytest.FixtureRequest, web: Container) -> Log:
    return Log(web, request.param)


@pytest.mark.parametrize(
    ("follower", "before"),
    [(name, 20) for name in FOLLOWERS] + [("tail -f", 0), ("tail -n 0 -f", 0)],
)
def test_every_line_that_comes_later_is_seen_once(
    follower: str, before: int, log: Log, instance: Instance, tmp_path: Path
) -> None:
    log.add(*(f"before-{n}" for n in range(before)))
    out = tmp_path / "out"
    with open(out, "wb") as file:
        process = subprocess.Popen([*FOLLOWERS[follower], log.path], stdout=file, stderr=file)

    def seen() -> str:
        return out.read_text()

    try:
        # It has gone to its place when it waits for a time.
        name = Path(f"/proc/{process.pid}/wchan")
        wait_until(lambda: "nanosleep" in name.read_text(), "it waits")
        shown = min(before, SHOWN_FIRST.get(follower, 0))
        assert (seen().count("before-") > 0) == (shown > 0), seen()
        for turn in range(3):
            log.add(f"later-{turn}-a", f"later-{turn}-b")
            wait_until(lambda n=turn: f"later-{n}-b" in seen(), "they are seen")
            if turn == 1:
                instance.kill_daemon()
        text = seen()
        for turn in range(3):
            assert text.count(f"later-{turn}-a") == text.count(f"later-{turn}-b") == 1, text
        assert "truncated" not in text
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def tail(log: Log, lines: int, out: Path, err: Path) -> Iterator[None]:
    """`tail -f` as long as that is entered."""
    words = ["tail", "-n", str(lines), "-s", "0.05", "-f", log.path]
    with open(out, "ab") as file, open(err, "ab") as errors:
        process = subprocess.Popen(words, stdout=file, stderr=errors)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_following_a_log_that_overflows(log: Log, tmp_path: Path) -> None:
    """More than is kept, and what was overwritten before it was read is all that is not seen."""
    big = "x" * 900

    def fill(turn: str) -> None:
        if log.name == "kmsg":
            for n in range(400):
                log.add(f"{turn}-{n}-{big}")
        else:
            script = f"for i in $(seq 100); do echo {turn}-$i-{big}; done; echo {turn}-end"
            log.web.start("sh", "-c", script)
            wait_until(lambda: f"\n{turn}-end\n" in log.text(), "all is printed")

    fill("first")
    out = tmp_path / "out"
    with tail(log, 3, out, out):
        wait_until(lambda: out.read_text().count("\n") >= 3, "the last three are seen")
        first = out.read_text()
        assert first.count("first-") == 3, first[:200]
        size = os.stat(log.path).st_size
        log.add("small")
        assert os.stat(log.path).st_size > size
        wait_until(lambda: "small" in out.read_text(), "it is seen")
        fill("second")
        log.add("last")
        wait_until(lambda: "last\n" in out.read_text(), "it is seen")
        assert out.read_text().count("small") == 1
        assert "truncated" not in out.read_text()
    assert log.text().splitlines()[-1].endswith("last")


def test_a_cleared_log_begins_anew(web: Container, tmp_path: Path) -> None:
    log = Log(web, "kmsg")
    log.add("one", "two")
    assert os.stat(log.path).st_size == len(log.path.read_bytes())
    out = tmp_path / "out"
    err = tmp_path / "err"
    with tail(log, 1, out, err):
        wait_until(lambda: "two" in out.read_text(), "the last is seen")
        os.truncate(log.path, 0)
        assert os.stat(log.path).st_size == 0
        wait_until(lambda: "truncated" in err.read_text(), "it is noticed")
        log.add("three")
        wait_until(lambda: "three" in out.read_text(), "it goes on")
        assert out.read_text().count("three") == 1
        assert "one" not in out.read_text()


READERS: dict[str, Callable[[Path], str]] = {
    "cat": lambda path: _run("cat", path),
    "busybox cat": lambda path: _run("busybox", "cat", path),
    "tail": lambda path: _run("tail", "-n", "+1", path),
    "tac": lambda path: "".join(reversed(_run("tac", path).splitlines(keepends=True))),
    "dd": lambda path: _run("dd", f"if={path}", "bs=7", "status=none"),
    "grep": lambda path: _run("grep", "-h", "", path),
    "sed": lambda path: _run("sed", "", path),
    "head": lambda path: _run("head", "-n", "1000", path),
    "python": lambda path: path.read_text(),
    "mapfile": lambda path: _run("bash", "-c", f'mapfile l < {path}; printf %s "${{l[@]}}"'),
}


def _run(*words: object) -> str:
    return subprocess.run(
        list(map(str, words)), check=False, capture_output=True, text=True, timeout=DEADLINE_S
    ).stdout


@pytest.mark.parametrize("lines", [0, 1, 40])
def test_all_read_the_same(lines: int, log: Log, instance: Instance, tmp_path: Path) -> None:
    log.add(*(f"line {n}" for n in range(lines)))
    for _ in range(2):
        with open(log.path) as file:
            expected = "".join(iter(lambda: file.read(11), ""))
        assert expected.count("line") == lines
        for name, read in READERS.items():
            assert read(log.path) == expected, name
        copy = tmp_path / "copy"
        subprocess.run(["cp", log.path, copy], check=True, timeout=DEADLINE_S)
        assert copy.read_text() == expected
        with open(log.path, "rb") as source, open(tmp_path / "sent", "w+b") as target:
            while os.sendfile(target.fileno(), source.fileno(), None, 100):
                pass
            target.seek(0)
            assert target.read().decode() == expected
        assert int(_run("stat", "-c", "%s", log.path)) == len(expected)
        assert _run("wc", "-c", log.path).split()[0] == str(len(expected))
        instance.kill_daemon()


def test_an_archive_has_all_of_it(log: Log, tmp_path: Path) -> None:
    log.add(*(f"line {n}" for n in range(30)))
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", log.path], check=True, capture_output=True)
    with tarfile.open(tmp_path / "a.tar") as archive:
        (member,) = archive.getmembers()
        file = archive.extractfile(member)
        assert file is not None
        assert file.read().decode() == log.text()


def test_less_follows(log: Log) -> None:
    log.add("before-0")
    terminal = Terminal([program("less"), "+F", str(log.path)])
    try:
        terminal.expect("before-0")
        for turn in range(2):
            log.add(f"later-{turn}")
            terminal.expect(f"later-{turn}")
    finally:
        terminal.close()
