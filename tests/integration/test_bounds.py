"""What all share, and one container, or one user, could use up: it is told, and the others go on."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest

from nsfs.fs import FILES_MAX, READS_MAX

from .conftest import DEADLINE_S, Container, Instance, wait_until
from .test_delegation import ALICE, call_as
from .test_isolation import says, starts


@pytest.fixture
def other(tree: Path) -> Container:
    """Another container at the top."""
    (tree / "other").mkdir()
    return Container(tree / "other")


def test_open_files(web: Container, other: Container) -> None:
    program = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
        kept = []
        def each():
            paths = "state", "../../dev/kmsg", "."
            kept.append(os.open("/sys/namespaces/" + paths[len(kept) % 3], os.O_RDONLY | os.O_NONBLOCK))
        while len(kept) < {FILES_MAX + 10} and (last := tried(each)) == "done":
            pass
        print(len(kept), last)
        for fd in kept:
            os.close(fd)
        """
    assert says(web, program) == [f"{FILES_MAX} ENFILE"]
    assert "populated 1" in other.run("cat /sys/namespaces/state")
    # What was closed is closed when the kernel has told of it.
    wait_until(lambda: says(web, program) == [f"{FILES_MAX} ENFILE"], "it has all again")


def test_open_files_of_a_user(tree: Path) -> None:
    import resource

    def opens() -> None:
        fds = [os.open(tree / "state", os.O_RDONLY) for _ in range(FILES_MAX)]
        assert len(fds) == FILES_MAX
        os.open(tree / "state", os.O_RDONLY)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20000), hard))
    try:
        assert call_as(ALICE, opens) == errno.errorcode[errno.ENFILE]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (tree / "state").read_text()


def test_reads_that_wait(web: Container, other: Container) -> None:
    starts(
        web,
        f"""
        import threading
        results = []
        def each():
            fd = os.open("/dev/kmsg", os.O_RDONLY)
            os.lseek(fd, 0, os.SEEK_END)
            result = tried(os.read, fd, 8192)
            results.append(result)
        threads = [threading.Thread(target=each) for _ in range({READS_MAX + 20})]
        for thread in threads:
            thread.start()
        while len(results) < 20:
            time.sleep(0.01)
        time.sleep(0.2)
        print(sorted(set(results)), len(results))
        print("ready")
        for thread in threads:
            thread.join()
        print(len(results))
        print("ended")
        """,
        "ready",
    )
    assert "['EBUSY'] 20\n" in web.read("output")
    other.start("sh", "-c", "head -c1 /dev/kmsg; echo read")
    # What does not wait is served all the same.
    web.read("state")
    other.run("echo record > /dev/kmsg")
    wait_until(lambda: "read" in other.read("output"), "another container's is")
    web.run("echo record > /dev/kmsg")
    wait_until(lambda: f"{READS_MAX + 20}\nended\n" in web.read("output"), "they get it")
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=30)


# Its threads go on: whoever sends a signal to all does not get it.
STOPPER = """
import os, signal, threading
def limit(number):
    path = f"/sys/namespaces/n{number}/pid/max"
    while True:
        try:
            fd = os.open(path, os.O_WRONLY)
            try:
                os.write(fd, b"40000")
            finally:
                os.close(fd)
        except OSError:
            pass
for number in range(12):
    os.mkdir(f"/sys/namespaces/n{number}")
for number in range(48):
    threading.Thread(target=limit, args=(number % 12,)).start()
print("begun", flush=True)
while True:
    try:
        os.kill(-1, signal.SIGSTOP)
    except OSError:
        pass
"""


def stopped(instance: Instance) -> int:
    """How many processes that the spawner has started for sysctls are stopped."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            text = path.read_text()
            pid = int(path.parent.name)
            parents[pid] = int(text.split("\nPPid:\t", 1)[1].split("\n", 1)[0])
            if text.startswith("Name:\tnsfs-spawner\n") and "\nState:\tT" in text:
                found.append(pid)

    def is_ours(pid: int) -> bool:
        while pid > 1:
            if pid == instance.daemon():
                return True
            pid = parents.get(pid, 0)
        return False

    return sum(map(is_ours, found))


def own_limit(web: Container) -> bool:
    """Whether each PID namespace has a limit of its own (Linux 6.14)."""
    try:
        web.write("pid/max", "400000")
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        return False
    return True


def test_members_that_stop_what_sets_sysctls(
    web: Container, other: Container, instance: Instance, tmp_path: Path
) -> None:
    """Who writes one of a PID namespace is in it for a moment, as its root.  What others bind waits
    for as many places as there are for all that may take long."""
    # Otherwise nobody inside can write it.
    most = 4 if own_limit(web) else 0
    web.start("python3", "-c", STOPPER)
    wait_until(lambda: "begun" in web.read("output"), "they are made")
    wait_until(lambda: stopped(instance) == most, "as many as may are stopped")
    for _ in range(20):
        other.write("binds", f"/mnt {tmp_path} ro")
        other.write("binds", "")
        assert stopped(instance) <= most
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)


def test_many_members_do_not_make_a_look_long(web: Container, other: Container) -> None:
    """A name in procs/ is found without going through all of them."""
    starts(
        web,
        """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        for _ in range(300):
            if not os.fork():
                time.sleep(1000)
                os._exit(0)
        names = os.listdir("/sys/namespaces/procs")
        assert len(names) >= 300, names
        for name in names:
            if tried(os.stat, "/proc/" + name) == "done":
                assert open("/sys/namespaces/procs/" + name).read().startswith("container .")
        print(tried(os.stat, "/sys/namespaces/procs/999999"), tried(os.stat, "/sys/namespaces/procs/1"))
        print("ready")
        """,
        "ready",
    )
    assert "ENOENT ENOENT\n" in web.read("output")
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)


def test_removal_by_who_has_many_mounts(web: Container) -> None:
    """Whether the tree is mounted twice there is looked for in all of them."""
    starts(
        web,
        """
        os.mkdir("/sys/namespaces/db")
        os.mkdir("/tmp/a")
        while sum(1 for _ in open("/proc/self/mountinfo")) < 3000:
            assert not libc.mount(b"/tmp", b"/tmp/a", None, 4096 | 16384, None)
        os.rmdir("/sys/namespaces/db")
        print(os.path.exists("/sys/namespaces/db"))
        print("ready")
        """,
        "ready",
    )
    assert "False\n" in web.read("output")
