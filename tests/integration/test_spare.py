"""Containers made in advance: what claims them, that nobody can tell, and that none is left."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Container, Instance, serving, wait_until

NS_GET_OWNER_UID = 0xB704
"""ioctl_ns(2)"""
USER = 43210


@contextlib.contextmanager
def mounted(settings: str) -> Iterator[Instance]:
    with tempfile.TemporaryDirectory(prefix="nsfs-", dir="/tmp") as base:
        os.chmod(base, 0o755)
        file = Path(base, "conf")
        file.write_text(settings)
        with serving(Path(base), ["--config", str(file)]) as found:
            yield found


@pytest.fixture
def own() -> Iterator[Instance]:
    """An instance that nothing was made in yet."""
    with mounted("") as found:
        yield found


def make(instance: Instance, name: str) -> Container:
    path = instance.tree / name
    path.mkdir()
    return Container(path)


def number_of(instance: Instance, name: str) -> str:
    return next(n for n, record in instance.records().items() if record["name"] == name)


def group_dir(instance: Instance) -> Path:
    return Path(str(instance.status()["cgroup"]))


def pids(instance: Instance, part: str) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        text = (group_dir(instance) / part / "cgroup.procs").read_text()
        return [int(word) for word in text.split()]
    return []


def wait_removed(instance: Instance, number: str) -> None:
    group = group_dir(instance) / number
    wait_until(lambda: not group.exists(), "its group is removed")
    wait_until(lambda: number not in instance.records(), "and its record")


def test_there_is_none_before_the_first_mkdir_and_nobody_sees_it(own: Instance) -> None:
    time.sleep(0.1)
    assert own.status()["spare"] == 0
    assert not own.groups()
    names = set(os.listdir(own.tree))
    os.rmdir(make(own, "web").path)
    (spare,) = own.ready_spares()
    (init,) = pids(own, f"{spare}/init")
    assert own.status()["spare"] == 1
    assert own.status()["containers"] == 0
    assert set(os.listdir(own.tree)) == names
    assert "containers 0" in (own.tree / "state").read_text()
    assert str(init) not in os.listdir(own.tree / "procs")
    assert not (own.tree / spare).exists()
    # Not refused, and nothing is left (`serving` checks).
    assert own.command("umount", str(own.tree)).returncode == 0
    own.mount()


def test_the_next_mkdir_is_given_it_and_the_one_after_it_another(own: Instance) -> None:
    make(own, "first")
    (spare,) = own.ready_spares()
    (init,) = pids(own, f"{spare}/init")
    before = time.time()
    old = os.umask(0o027)
    try:
        web = make(own, "web")
    finally:
        os.umask(old)
    assert number_of(own, "web") == spare
    assert web.init == init
    assert web.run("hostname").strip() == "web"
    there = os.stat(web.path)
    assert (stat.S_IMODE(there.st_mode), there.st_uid, there.st_gid) == (0o750, 0, 0)
    assert there.st_mtime >= before - 0.1
    assert (own.tree / "state").read_text().splitlines()[3] == "containers 2"
    (other,) = own.ready_spares()
    assert int(other) > int(spare)
    make(own, "db")
    assert number_of(own, "db") == other
    # Renamed, killed and removed as any other.
    os.rename(web.path, own.tree / "shop")
    subprocess.run(["rm", "-rf", *map(str, (own.tree / n for n in ("first", "shop", "db")))])
    own.settled()


def seen_inside(instance: Instance, container: Container, number: str) -> list[str]:
    """All that could tell one container from another, but for what has to."""
    text = container.run(
        r"""
        sed -E 's/^[0-9]+ [0-9]+ [0-9]+:[0-9]+ //' /proc/self/mountinfo
        grep -E '^(Uid|Gid|Groups|Cap|Sig|Shd|NoNewPrivs|Seccomp|Cpus_allowed)' /proc/self/status
        cat /proc/self/limits /proc/self/oom_score_adj /proc/self/cgroup /proc/self/environ
        cat /proc/self/timens_offsets /proc/1/cgroup /proc/net/dev /proc/sys/kernel/domainname
        cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_forward /proc/self/setgroups
        awk '{ print $1, $3 }' /proc/self/uid_map /proc/self/gid_map
        stat -c '%n %a %u %g %F' / /* /dev/* /dev/.nsfs/* /var/* /run/* /sys/*
        stat -c '%n %a %u %g %F' /sys/namespaces/* ; id; pwd; ls -l /proc/self/fd | wc -l
        cat /sys/namespaces/state /sys/namespaces/binds /sys/namespaces/rootfs
        """
    )
    root = int(Path(f"/proc/{container.init}/uid_map").read_text().split()[1])
    for own, name in (
        (rf"(?m)^/\.f/{number}\b", "FACE"),
        (rf"/{instance.group}/{number}\b", "/GROUP"),
        (re.escape(str(instance.run_dir)), "RUN"),
        (rf"\b{root}\b", "ROOT"),
        (rf"\bgid={root + 5}\b", "gid=TTY"),
    ):
        text = re.sub(own, name, text)
    # In which order some of the mounts are made is a matter of luck.
    return sorted(text.splitlines())


def seen_outside(instance: Instance, container: Container, name: str) -> list[str]:
    """Groups with owners and limits, status of the init, files of the directory."""
    number, init = number_of(instance, name), container.init
    root = int(Path(f"/proc/{init}/uid_map").read_text().split()[1])
    found = []
    for top, _, files in os.walk(group_dir(instance) / number):
        for each in [Path(top), *(Path(top, file) for file in files)]:
            there = os.stat(each)
            owner = "ROOT" if there.st_uid == root else there.st_uid
            found.append(f"{str(each).partition(f'/{number}')[2]} {owner} {there.st_mode:o}")
            if each.name.endswith((".max", ".freeze", ".depth", ".descendants", ".weight")):
                found.append(each.read_text())
    for line in Path(f"/proc/{init}/cgroup").read_text().splitlines():
        found.append(line.replace(f"/{instance.group}/{number}", "/GROUP/N"))
    found += re.findall(r"^(?:Cap|Seccomp|Sig|NoNew|Threads).*$", status_of(init), re.MULTILINE)
    user_fd = os.open(f"/proc/{init}/ns/user", os.O_RDONLY)
    try:
        owner_uid = ctypes.c_uint32()
        fcntl.ioctl(user_fd, NS_GET_OWNER_UID, owner_uid)
    finally:
        os.close(user_fd)
    found.append(f"the user namespace's owner: {owner_uid.value}")
    for entry in sorted(os.listdir(container.path)):
        there = os.stat(container / entry)
        found.append(f"{entry} {there.st_mode:o} {there.st_uid} {there.st_gid}")
    found += [
        line.split()[0] + line.split()[2]
        for line in container.read("namespaces").split("\n")
        if line
    ]
    return found


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_it_is_what_mkdir_would_have_made() -> None:
    with mounted("[make]\nspare = 0\n") as plain, mounted("") as own:
        make(own, "first")
        (spare,) = own.ready_spares()
        web, other = make(own, "web"), make(plain, "web")
        assert number_of(own, "web") == spare
        assert seen_outside(own, web, "web") == seen_outside(plain, other, "web")
        wanted = seen_inside(plain, other, number_of(plain, "web"))
        assert seen_inside(own, web, spare) == wanted
        assert not plain.spares()
        # Accounting begins with it: an init that has done nothing but start.
        usage = [
            int(Path(group_dir(i) / number_of(i, "web") / "init/cpu.stat").read_text().split()[1])
            for i in (own, plain)
        ]
        assert usage[0] < usage[1] + 20_000


@pytest.mark.parametrize("who", ["another user", "nested", "inside", "other defaults"])
def test_it_is_not_for(own: Instance, who: str) -> None:
    first = make(own, "first")
    (spare,) = own.ready_spares()
    path = own.tree / "web"
    if who == "another user":
        os.chmod(own.tree, 0o777)
        done = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        subprocess.run([*done, "mkdir", str(path)], check=True)
        record = own.records()[number_of(own, "web")]
        assert record["owner"][:2] == [USER, USER]
    elif who == "nested":
        path = first.path / "web"
        path.mkdir()
    elif who == "inside":
        path = first.path / "web"
        first.run("mkdir /sys/namespaces/web")
    else:
        (own.tree / "defaults/limits").write_text("pids.max 77\n")
        path.mkdir()
        group = group_dir(own) / number_of(own, "web")
        limits = [group / "pids.max", *Path("/").glob(f"sys/fs/cgroup/pids/{own.group}/*/pids.max")]
        assert "77" in [file.read_text().strip() for file in limits if file.exists()]
    assert number_of(own, "web") != spare
    assert os.readlink(f"/proc/{Container(path).init}/exe").find("nsfs-init") >= 0
    if who == "other defaults":
        # That one is of no use any more; there shall be one that is.
        wait_until(lambda: own.ready_spares() != [spare], "another is made")
        number = own.ready_spares()[0]
        record = own.records()[number]
        assert record["build"]["limits"] == [["pids.max", "77"]]
        make(own, "db")
        assert number_of(own, "db") == number
    else:
        make(own, "db")
        assert number_of(own, "db") == spare


def test_none_of_a_construction_with_paths(own: Instance) -> None:
    (own.tree / "defaults/binds").write_text("/mnt /usr ro\n")
    make(own, "web")
    time.sleep(0.1)
    assert not own.spares()
    assert own.status()["spare"] == 0


def test_one_that_was_killed_is_not_given_away(own: Instance) -> None:
    make(own, "first")
    (spare,) = own.ready_spares()
    (init,) = pids(own, f"{spare}/init")
    os.kill(init, signal.SIGKILL)
    wait_until(lambda: not pids(own, f"{spare}/init"), "it is gone")
    web = make(own, "web")
    assert number_of(own, "web") != spare
    assert web.run("hostname").strip() == "web"
    assert own.ready_spares() != [spare]
    wait_removed(own, spare)


def test_the_next_daemon_removes_it(own: Instance) -> None:
    make(own, "first")
    (spare,) = own.ready_spares()
    own.kill_daemon()
    wait_removed(own, spare)
    assert own.status()["containers"] == 1
    web = make(own, "web")
    assert number_of(own, "web") != spare
    assert web.run("hostname").strip() == "web"


def test_the_daemon_dies_while_it_is_claimed(own: Instance) -> None:
    make(own, "first")
    (spare,) = own.ready_spares()
    (spawner,) = [
        int(pid)
        for pid in Path(f"/proc/{own.daemon()}/task/{own.daemon()}/children").read_text().split()
        if "spawner" in Path(f"/proc/{pid}/comm").read_text()
    ]
    failed: list[OSError] = []

    def mkdir() -> None:
        try:
            (own.tree / "web").mkdir()
        except OSError as error:
            failed.append(error)

    os.kill(spawner, signal.SIGSTOP)
    thread = threading.Thread(target=mkdir)
    thread.start()
    try:
        # The record is there, the hostname is not.
        wait_until(lambda: own.records()[spare]["name"] == "web", "it is claimed")
        assert own.records()[spare]["phase"] == "making"
        own.kill_daemon()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(spawner, signal.SIGCONT)
        thread.join(30)
    assert not failed
    # What was begun is removed; the next daemon has made another.
    wait_removed(own, spare)
    assert number_of(own, "web") != spare
    assert Container(own.tree / "web").run("hostname").strip() == "web"


def test_several_at_once_are_each_another(own: Instance) -> None:
    make(own, "first")
    own.ready_spares()
    threads = [threading.Thread(target=make, args=(own, f"c{i}")) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    inits = {Container(own.tree / f"c{i}").init for i in range(6)}
    assert len(inits) == 6
    assert [Container(own.tree / f"c{i}").run("hostname").strip() for i in range(6)] == [
        f"c{i}" for i in range(6)
    ]


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_as_the_configuration_says(count: int) -> None:
    with mounted(f"[make]\nspare = {count}\n") as own:
        make(own, "first")
        if count:
            numbers = own.ready_spares(count)
            for i in range(count):
                make(own, f"c{i}")
            assert {number_of(own, f"c{i}") for i in range(count)} == set(numbers)
            own.ready_spares(count)
        else:
            time.sleep(0.1)
        assert own.status()["spare"] == count
        assert len(own.spares()) == count


def test_the_last_ranges_of_ids_are_for_containers() -> None:
    ranges = 18
    last = 0x70000000 + ranges * 65536 - 1
    with mounted(f"[ids]\nfirst = 0x70000000\nlast = {last}\nper_container = 65536\n") as own:
        make(own, "c0")
        own.ready_spares()
        # Of these it could be none; its range is needed by the last.
        (own.tree / "defaults/limits").write_text("pids.max 77\n")
        for i in range(1, ranges):
            make(own, f"c{i}")
        with pytest.raises(OSError, match=r".") as caught:
            make(own, "one-too-many")
        assert caught.value.errno == errno.ENOSPC
        assert not own.spares()
