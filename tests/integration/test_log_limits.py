"""Bounds of a container's kernel log: its bytes, the records that it takes, and what others see of a
flood."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from .conftest import DEADLINE_S, Container, Instance, wait_until, write

RECORD = 32
"""Bytes that a record takes beside its text."""
HEADER = 512
"""Bytes of a ring that are for no record."""


def texts(container: Container | Path) -> list[str]:
    """The texts of a log."""
    path = container / "kmsg"
    return [line.split(";", 1)[1] for line in path.read_text().splitlines()]


def stat(container: Container) -> dict[str, int]:
    """`stat`."""
    return {k: int(v) for k, v in (line.split() for line in container.read("stat").splitlines())}


def refused(path: Path, value: str) -> int:
    """The errno of a write."""
    with pytest.raises(OSError, match=r"\[Errno") as raised:
        write(path, value)
    return raised.value.errno or 0


def test_what_is_wrong(web: Container) -> None:
    shown = "bytes 262144\nrate 1000\nburst 5000\n"
    assert web.read("nsfs.log") == web.read("defaults/log") == shown
    for value, number in (
        ("", errno.EINVAL),
        ("bytes", errno.EINVAL),
        ("bytes max", errno.EINVAL),
        ("bytes 1T", errno.EINVAL),
        ("rate 1K", errno.EINVAL),
        ("bytes 8192\nbytes 8192", errno.EINVAL),
        ("size 8192", errno.EINVAL),
        ("8192", errno.EINVAL),
        ("rate -1", errno.ERANGE),
        ("bytes 4095", errno.ERANGE),
        ("bytes 3K", errno.ERANGE),
        ("bytes 1G", errno.ERANGE),
        ("rate 0", errno.ERANGE),
        ("burst 1000000001", errno.ERANGE),
        # bytes_max of the configuration.
        (f"bytes {16 * 1024 * 1024 + 1}", errno.ERANGE),
        ("bytes 8192\nrate 0", errno.ERANGE),
    ):
        assert refused(web / "nsfs.log", value) == number, value
        if value:
            assert web.path.joinpath("nsfs.log").read_text() == shown


def test_bytes_with_a_suffix(web: Container) -> None:
    for name in ("nsfs.log", "defaults/log"):
        for value, number in (("64K", 65536), ("8k", 8192), ("1M", 1 << 20)):
            web.write(name, "bytes 1M" if name == "nsfs.log" else "")
            web.write(name, f"bytes {value}")
            assert web.read(name).splitlines()[0] == f"bytes {number}"


def test_no_more_than_the_parent_has(web: Container) -> None:
    web.write("nsfs.log", "bytes 65536\nburst 300")
    assert web.read("nsfs.log") == "bytes 65536\nrate 1000\nburst 300\n"
    web.run("mkdir /sys/namespaces/db")
    db = Container(web / "db")
    assert db.read("nsfs.log") == web.read("nsfs.log")
    for value in ("bytes 65537", "rate 1001", "rate max", "burst 301", "burst max"):
        assert refused(db / "nsfs.log", value) == errno.ERANGE, value
        assert refused(web / "defaults/log", value) == errno.ERANGE, value
    db.write("nsfs.log", "bytes 4096\nrate 1\nburst 1")
    web.write("defaults/log", "bytes 8192")
    (web / "other").mkdir()
    assert (web / "other/nsfs.log").read_text() == "bytes 8192\nrate 1000\nburst 300\n"
    web.write("defaults/log", "")
    assert web.read("defaults/log") == "bytes 262144\nrate 1000\nburst 5000\n"


def test_it_is_the_parents_to_change(web: Container) -> None:
    code, out = web.run_code(
        "cat /sys/namespaces/nsfs.log; echo 'rate 5' > /sys/namespaces/nsfs.log"
    )
    assert code
    assert out.startswith("bytes 262144\n")
    assert "Permission denied" in out
    web.run("mkdir /sys/namespaces/db; echo 'rate 5' > /sys/namespaces/db/nsfs.log")
    assert (web / "db/nsfs.log").read_text() == "bytes 262144\nrate 5\nburst 5000\n"


def test_one_that_is_shared(web: Container) -> None:
    web.write("defaults/unshare", "cgroup ipc mnt net pid time user uts")
    (web / "db").mkdir()
    web.write("nsfs.log", "bytes 8192")
    assert (web / "db/nsfs.log").read_text() == web.read("nsfs.log")
    assert refused(web / "db/nsfs.log", "bytes 4096") == errno.EOPNOTSUPP


WAITING = """
import os
fd = os.open('/dev/kmsg', os.O_RDONLY)
os.lseek(fd, 0, os.SEEK_END)
print('waiting')
print(os.read(fd, 8192))
"""


def test_another_size_at_once(instance: Instance, web: Container) -> None:
    for number in range(1000):
        write(web / "kmsg", f"{number:08}")
    web.start("python3", "-u", "-c", WAITING)
    wait_until(lambda: "waiting" in web.read("output"), "it waits")
    opened = os.open(web / "kmsg", os.O_RDONLY)
    try:
        os.read(opened, 100)
        for size in (8192, 65536, 4096):
            before = texts(web)
            web.write("nsfs.log", f"bytes {size}")
            assert web.read("nsfs.log") == f"bytes {size}\nrate 1000\nburst 5000\n"
            fits = (size - HEADER) // (RECORD + 8)
            assert texts(web) == before[-fits:]
            assert stat(web)["log.dropped"] == 1000 - len(texts(web))
            instance.kill_daemon()
            assert texts(web) == before[-fits:]
            assert (instance.run_dir / f"c/{ident(web)}.log").stat().st_size == size
        write(web / "kmsg", "after")
        assert texts(web)[-1] == "after"
        # The reader in the midst goes on at what is left; the one that waits is woken.
        assert os.read(opened, 100).count(b"\n") > 0
        wait_until(lambda: "after" in web.read("output"), "it is woken")
    finally:
        os.close(opened)
    assert web.read("nsfs.log") == "bytes 4096\nrate 1000\nburst 5000\n"


def ident(container: Container) -> str:
    """The number of a container's own log."""
    (line,) = [x for x in container.read("namespaces").splitlines() if x.startswith("syslog ")]
    return line.split()[1]


def test_what_is_suppressed_is_counted_and_told(web: Container) -> None:
    web.write("nsfs.log", "rate 1\nburst 20")
    script = "import os\nfd = os.open('/dev/kmsg', 1)\nfor i in range(100): os.write(fd, b'%d' % i)"
    web.run(f'python3 -c "{script}"')
    assert texts(web) == [str(i) for i in range(20)]
    assert stat(web)["log.records"] == 20
    assert stat(web)["log.dropped"] == 80
    # As much as it likes from now on.
    web.write("nsfs.log", "rate 1000\nburst 5000")
    web.run(f'python3 -c "{script}"')
    told = "kmsg: 80 output lines suppressed due to ratelimiting"
    assert texts(web) == [*map(str, range(20)), told, *map(str, range(100))]
    # Echoes have a limit of their own: no container crowds out what its parent says.
    (web / "db").mkdir()
    db = Container(web / "db")
    db.write("console", "parent 8")
    web.write("nsfs.log", "rate 1\nburst 20")
    subprocess.run(["sh", "-c", f": > {web / 'kmsg'}"], check=True)
    db.run(f'python3 -c "{script}"')
    write(web / "kmsg", "its own")
    found = texts(web)
    assert [x for x in found if x.startswith("[db]")] == [f"[db] {i}" for i in range(20)]
    assert found[-1] == "its own"
    assert len(texts(db)) == 100
    assert stat(db)["log.console_dropped"] == 80


FLOOD = """
import os
for _ in range(7):
    if not os.fork():
        break
fd = os.open('/dev/kmsg', os.O_WRONLY)
while True:
    os.write(fd, b'flood ' * 20)
"""
READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
text = b''
while not text.endswith(b';last\\n'):
    import select
    select.select([fd], [], [])
    text += os.read(fd, 65536)
sys.stdout.buffer.write(text)
"""


def test_the_roots_log_is_limited_too(instance: Instance, web: Container) -> None:
    """For what containers at the top write that share it; what the host's kernel prints is not."""
    web.write("unshare", "cgroup ipc mnt net pid time uts")
    root = Container(instance.tree)
    before = stat(root)
    script = "import os\nfd = os.open('/dev/kmsg', 1)\nfor i in range(6000): os.write(fd, b'x')"
    start = time.monotonic()
    web.run(f'python3 -c "{script}"')
    after = stat(root)
    taken = texts(root).count("x")
    # In an interval of 5 s, and more in the next; lines of the kernel's come in between.
    assert taken == 5000 or time.monotonic() - start > 5
    for key, count in (("log.records", taken), ("log.dropped", 6000 - taken)):
        assert after[key] - before[key] >= count


COUNT = 300


def test_a_flood_takes_nothing_from_others(instance: Instance, web: Container) -> None:
    """Eight processes of a container write as fast as they can."""
    other = instance.tree / "other"
    other.mkdir()
    web.write("nsfs.log", "rate 100\nburst 500")
    web.start("python3", "-c", FLOOD)
    wait_until(lambda: stat(web)["log.dropped"] > 500, "it is flooding")
    read: list[str] = []

    def follow() -> None:
        words = [sys.executable, "-c", READER, str(other / "kmsg")]
        done = subprocess.run(
            words, check=True, capture_output=True, text=True, timeout=2 * DEADLINE_S
        )
        read.extend(line.split(";")[1] for line in done.stdout.splitlines())

    reader = threading.Thread(target=follow)
    reader.start()
    dropped = stat(web)["log.dropped"]
    for number in range(COUNT):
        write(other / "kmsg", f"line {number}")
        assert (other / "state").stat().st_size == 4096
    write(other / "kmsg", "last")
    reader.join(2 * DEADLINE_S)
    assert read == [*(f"line {n}" for n in range(COUNT)), "last"]
    # It went on all the while, and each of its records is accounted for.
    assert stat(web)["log.dropped"] > dropped
    web.write("kill", "1")
    counts = stat(web)
    found = [text for text in texts(web) if text.startswith("flood")]
    told = [text for text in texts(web) if "suppressed due to ratelimiting" in text]
    assert len(found) + len(told) <= counts["log.records"]
    lines = web.read("kmsg").splitlines()
    assert int(lines[-1].split(",")[1]) + 1 == counts["log.records"]
    # What is in the ring is all that was not dropped: no flood is longer than the ring.
    assert sum(len(text) + RECORD for text in texts(web)) <= 262144
