"""mkdir, rmdir, mv and the control files on the real kernel, and every errno of the manual."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import (
    DEADLINE_S,
    TYPES,
    Container,
    Instance,
    namespaces_of,
    refused,
    wait_until,
    write,
)


def test_mkdir_makes_a_container_that_is_ready(web: Container) -> None:
    ours, its = namespaces_of(os.getpid()), namespaces_of(web.init)
    assert all(ours[kind] != its[kind] for kind in TYPES)
    assert os.readlink(f"/proc/{web.init}/exe").find("nsfs-init") >= 0
    assert web.run("hostname").strip() == "web"
    assert web.run("echo $$-$PPID").strip().split("-")[1] != "0"
    assert web.state()["populated"] in ("0", "1")


def test_an_entry_for_each_namespace_and_none_else(web: Container) -> None:
    assert sorted(os.listdir(web / "nsproxy")) == list(TYPES)
    for kind in TYPES:
        assert os.stat(web / "nsproxy" / kind).st_ino == namespaces_of(web.init)[kind]
    rows = [line.split() for line in web.read("namespaces").splitlines()]
    assert [row[0] for row in rows] == sorted([*TYPES, "syslog"])
    assert {row[0]: int(row[1]) for row in rows if row[0] != "syslog"} == namespaces_of(web.init)
    assert {row[2] for row in rows} == {"own"}


def test_nsenter_takes_the_links(web: Container) -> None:
    done = subprocess.run(
        ["nsenter", f"--uts={web / 'nsproxy/uts'}", "hostname"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "web\n"


def test_names_that_cannot_be(tree: Path, web: Container) -> None:
    refused(errno.EEXIST, os.mkdir, web.path)
    for name in ("kmsg", "procs", "unnamed7", "nsfs.x", "defaults"):
        refused(errno.EEXIST, os.mkdir, web / name)
    for name in ("a\nb", "a\x7f", b"\xff"):
        refused(errno.EINVAL, os.mkdir, os.path.join(os.fsencode(tree), os.fsencode(name)))
    refused(errno.ENAMETOOLONG, os.mkdir, tree / ("x" * 256))
    os.mkdir(tree / "unnamed")
    os.mkdir(tree / "ünïcode 1")
    assert {"unnamed", "ünïcode 1", "web"} <= set(os.listdir(tree))


def test_the_hostname_is_the_name_cut(tree: Path) -> None:
    long = Container(tree / ("h" * 100))
    long.path.mkdir()
    assert long.run("hostname").strip() == "h" * 64


def test_no_file_can_be_made(web: Container) -> None:
    refused(errno.EPERM, os.open, web / "new", os.O_CREAT | os.O_WRONLY)
    refused(errno.EPERM, os.symlink, "x", web / "link")
    refused(errno.EPERM, os.mknod, web / "fifo", stat.S_IFIFO | 0o600)
    refused(errno.EPERM, os.mkdir, web / "procs" / "x")
    refused(errno.EPERM, os.link, web / "kmsg", web / "kmsg2")


def test_modes_and_what_they_mean(web: Container) -> None:
    def mode(name: str) -> int:
        return stat.S_IMODE(os.stat(web / name).st_mode)

    assert mode("state") == 0o444
    assert mode("kill") == 0o200
    assert mode("kmsg") == 0o640
    assert mode("output") == 0o440
    assert mode("rootfs") == 0o644
    assert os.stat(web / "state").st_size == 4096
    # What there is no show or store for cannot be opened for it, by root neither.
    refused(errno.EINVAL, os.open, web / "kill", os.O_RDONLY)
    refused(errno.EINVAL, os.open, web / "state", os.O_WRONLY)
    os.mkdir(web / "sub", 0o700)
    assert mode("sub") == 0o700


def test_values_that_are_refused_change_nothing(web: Container) -> None:
    for name, value, number in (
        ("freeze", "2", errno.ERANGE),
        ("freeze", "yes", errno.EINVAL),
        ("kill", "NOSUCH", errno.EINVAL),
        ("kill", "", errno.EINVAL),
        ("exec", "", errno.EINVAL),
        ("exec", "'unbalanced", errno.EINVAL),
        ("exec", "/no/such/program", errno.ENOENT),
        ("exec", "/etc/passwd", errno.EACCES),
        ("rootfs", "relative", errno.EINVAL),
        ("rootfs", "/no/such/directory", errno.ENOENT),
        ("rootfs", "/etc/passwd", errno.ENOTDIR),
        ("idmap", "0 0", errno.EINVAL),
        ("unshare", "net nut", errno.EINVAL),
        ("binds", "/a /b", errno.EINVAL),
        ("defaults/limits", "pids.max 0", errno.ERANGE),
        ("defaults/limits", "pids.most 1", errno.EINVAL),
        ("defaults/network", "carrier-pigeon", errno.EINVAL),
        ("uts/hostname", "two words", errno.EINVAL),
        ("uts/hostname", "x" * 65, errno.ERANGE),
    ):
        before = {n: web.read(n) for n in ("freeze", "rootfs", "idmap", "unshare", "binds")}
        # What could not be executed takes a moment to be gone.
        wait_until(lambda: web.state()["populated"] == "0", "it is idle")
        refused(number, web.write, name, value)
        assert {n: web.read(n) for n in before} == before, name
    refused(errno.E2BIG, web.write, "rootfs", "/" + "x" * 5000)
    refused(errno.EINVAL, web.write, "rootfs", "/a\0b")
    assert web.run("hostname").strip() == "web"


def test_hostname_is_read_and_written(web: Container) -> None:
    assert web.read("uts/hostname") == "web\n"
    web.write("uts/hostname", "other.example")
    assert web.read("uts/hostname") == "other.example\n"
    assert web.run("hostname").strip() == "other.example"
    assert os.uname().nodename != "other.example"


def test_exec_runs_as_root_with_nothing_of_the_host(web: Container) -> None:
    assert web.run("id -u; id -G; pwd; tty; env | sort").splitlines() == [
        "0",
        "0",
        "/",
        "not a tty",
        "HOME=/root",
        "LOGNAME=root",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PWD=/",
        "SHELL=/bin/sh",
        "USER=root",
        "container=nsfs",
    ]
    assert web.run("ls /proc/self/fd").split() == ["0", "1", "2", "3"]


def test_words_are_split_as_a_shell_splits_them(web: Container) -> None:
    web.write("exec", "printf '%s|' 'a b' \"c\\\"d\" e\\ f '$HOME' *")
    wait_until(lambda: web.read("output").endswith("*|"), "printf has printed")
    assert web.read("output") == 'a b|c"d|e f|$HOME|*|'


def test_members_are_listed(web: Container) -> None:
    web.start("sleep", "1000")
    pids = wait_until(lambda: [p for p in os.listdir(web / "procs") if p.isdigit()], "sleep runs")
    assert len(pids) == 1
    shown = dict(line.split(" ", 1) for line in (web / "procs" / pids[0]).read_text().splitlines())
    assert shown["container"] == "."
    assert shown["command"] == "sleep 1000"
    assert abs(float(shown["since"]) - time.time()) < 60
    uid = os.stat(web / "procs" / pids[0]).st_uid
    assert uid == os.stat(f"/proc/{pids[0]}").st_uid >= 0x70000000
    refused(errno.ENOENT, os.stat, web / "procs" / str(os.getpid()))
    refused(errno.ENOENT, os.stat, web / "procs" / str(web.init))
    assert web.state() == {
        "populated": "1",
        "frozen": "0",
        "procs": "1",
        "containers": "0",
        "oom_kill": "0",
        "reason": "-",
    }


def test_procs_self_is_the_viewer(tree: Path) -> None:
    own = tree / "procs/self"
    assert own.read_text() == (tree / "procs" / str(os.getpid())).read_text()
    assert "container .\n" in own.read_text()
    # One file for all, which anybody may link(2) and nobody write.
    assert stat.S_IMODE(own.stat().st_mode) == 0o666
    with pytest.raises(OSError, match="Invalid"):
        write(own, "1")
    done = subprocess.run(
        ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "cat", "procs/self"],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert "user 1234\n" in done.stdout
    assert "command cat procs/self\n" in done.stdout


def test_procs_self_of_others_is_not_there(tree: Path, web: Container) -> None:
    own = tree / "procs/self"
    assert own.exists()
    assert not (web / "procs/self").exists()
    assert web.run("cat /sys/namespaces/procs/self | grep command") == (
        "command cat /sys/namespaces/procs/self\n"
    )


def test_procs_self_stays_the_openers_with_the_next_daemon(instance: Instance, tree: Path) -> None:
    with open(tree / "procs/self") as file:
        before = file.read()
        instance.kill_daemon()
        file.seek(0)
        assert file.read() == before


def test_a_nested_containers_members_are_its_parents_too(web: Container) -> None:
    os.mkdir(web / "db")
    db = Container(web / "db")
    db.start("sleep", "1000")
    pid = wait_until(lambda: os.listdir(db / "procs"), "sleep runs")[0]
    assert pid in os.listdir(web / "procs")
    assert "container db\n" in (web / "procs" / pid).read_text()
    assert "container .\n" in (db / "procs" / pid).read_text()
    assert web.state()["containers"] == "1"
    assert web.state()["procs"] == "1"
    assert web.state()["populated"] == "1"


def test_freeze_stops_everything_and_resumes_it(web: Container) -> None:
    os.mkdir(web / "db")
    db = Container(web / "db")
    db.start("sh", "-c", "while :; do echo x; sleep 0.02; done")
    wait_until(lambda: db.read("output"), "it prints")
    web.write("freeze", "1")
    wait_until(lambda: web.state()["frozen"] == "1", "frozen")
    assert db.state()["frozen"] == "1"
    assert web.read("freeze") == "1\n"
    assert db.read("freeze") == "0\n"
    before = db.read("output")
    time.sleep(0.2)
    assert db.read("output") == before
    refused(errno.EBUSY, db.write, "exec", "true")
    web.write("freeze", "0")
    wait_until(lambda: db.read("output") != before, "it prints again")


def test_kill_by_name_and_by_force_leaves_the_container(web: Container) -> None:
    web.start(
        "sh", "-c", "trap 'echo got TERM; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    )
    wait_until(lambda: "ready" in web.read("output"), "it is ready")
    web.write("kill", "TERM")
    wait_until(lambda: "got TERM" in web.read("output"), "the trap ran")
    wait_until(lambda: web.state()["populated"] == "0", "it ended")
    web.start("sh", "-c", "trap '' TERM; echo second; while :; do sleep 0.05; done")
    wait_until(lambda: "second" in web.read("output"), "it is ready")
    init = web.init
    web.write("kill", "1")
    wait_until(lambda: web.state()["populated"] == "0", "it ended")
    assert web.init == init


def test_state_can_be_polled(web: Container) -> None:
    fd = os.open(web / "state", os.O_RDONLY)
    try:
        assert b"populated 0" in os.read(fd, 4096)
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        assert not poll.poll(100)
        started = threading.Timer(0.1, web.start, ("sleep", "1000"))
        started.start()
        assert poll.poll(10_000)[0][1] & select.POLLPRI
        started.join()
        wait_until(lambda: b"populated 1" in os.pread(fd, 4096, 0), "it is populated")
    finally:
        os.close(fd)


def test_a_change_and_back_is_told_to_who_read_in_between(web: Container) -> None:
    """The kernel tells of changes at most each 10 ms, of several at once."""
    fd = os.open(web / "state", os.O_RDONLY)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        seen = 0
        for _ in range(200):
            web.write("exec", "sleep 0.004")
            while b"populated 1" in os.pread(fd, 4096, 0):
                seen += 1
                assert poll.poll(5_000), "nobody is told that it has ended"
        assert seen
    finally:
        os.close(fd)


def test_rmdir_of_what_is_idle_busy_or_nested(web: Container, instance: Instance) -> None:
    os.mkdir(web / "db")
    refused(errno.ENOTEMPTY, os.rmdir, web.path)
    os.rmdir(web / "db")
    web.start("sleep", "1000")
    wait_until(lambda: web.state()["populated"] == "1", "sleep runs")
    refused(errno.EBUSY, os.rmdir, web.path)
    web.write("kill", "KILL")
    wait_until(lambda: web.state()["populated"] == "0", "it ended")
    init = web.init
    os.rmdir(web.path)
    refused(errno.ENOENT, os.stat, web.path)
    wait_until(lambda: not Path(f"/proc/{init}").exists(), "the init is gone")
    instance.settled()


def test_mv_renames_while_it_runs(tree: Path, web: Container) -> None:
    os.mkdir(tree / "other")
    web.start("sh", "-c", "while :; do echo tick; sleep 0.02; done")
    wait_until(lambda: web.read("output"), "it prints")
    init, number = web.init, os.stat(web.path).st_ino
    with (web / "state").open() as state:
        os.rename(web.path, tree / "shop")
        assert "populated 1" in state.read()
    shop = Container(tree / "shop")
    refused(errno.ENOENT, os.stat, web.path)
    assert shop.init == init
    assert os.stat(shop.path).st_ino == number
    assert shop.read("uts/hostname") == "web\n"
    refused(errno.EEXIST, os.rename, shop.path, tree / "other")
    refused(errno.EEXIST, os.rename, shop.path, tree / "procs")
    refused(errno.EPERM, os.rename, shop.path, tree / "other" / "shop")
    refused(errno.EPERM, os.rename, shop / "kmsg", shop / "log")
    refused(errno.EINVAL, os.rename, shop.path, tree / "a\nb")
    assert "tick" in shop.read("output")
    done = subprocess.run(["mv", shop.path, tree / "web"], check=False)
    assert done.returncode == 0


def test_mv_is_not_noticed_inside(tree: Path, web: Container, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("bound\n")
    os.chmod(tmp_path, 0o755)
    os.mkdir(web / "db")
    web.write("binds", f"/mnt {tmp_path} ro")
    look = (
        "cat /mnt/file; ls -d db; cat db/init /proc/self/mountinfo /proc/self/cgroup; "
        "stat -c '%i %u %a' . db kmsg; hostname"
    )
    web.run("mkdir -p /tmp/kept; echo kept > /tmp/kept/file")
    web.start("sh", "-c", "cd /sys/namespaces; exec < kmsg 3> kmsg; while ! [ -e /tmp/go ]; do "
              "sleep 0.02; done; echo '<5>after' >&3; cat; echo done")  # fmt: skip
    before = web.run(f"cd /sys/namespaces; {look}")
    kmsg = os.open(web / "kmsg", os.O_RDONLY)
    try:
        os.rename(web.path, tree / "shop")
        shop = Container(tree / "shop")
        assert shop.run(f"cd /sys/namespaces; {look}") == before
        shop.run(": > /tmp/go")
        wait_until(lambda: shop.read("output").endswith("done\n"), "it goes on")
        # What was open inside and outside is the same log.
        assert b";after\n" in os.read(kmsg, 4096)
        assert ";after\n" in shop.read("output")
        assert shop.run("cat /tmp/kept/file") == "kept\n"
    finally:
        os.close(kmsg)


def test_nested_from_inside(web: Container) -> None:
    out = web.run(
        """
        cd /sys/namespaces
        ls
        mkdir db
        echo "hostname" > db/exec
        sleep 0.2
        cat db/output
        cat db/init
        ls db/procs | wc -l
        cat db/state
        mv db sql
        rmdir sql
        """
    )
    assert "kmsg" in out.split()
    assert "\ndb\n" in out
    assert re.search(r"^populated 0$", out, re.MULTILINE)
    assert not any((web / name).is_dir() for name in ("db", "sql"))


def test_inside_the_tree_is_its_own_and_names_no_ancestor(tree: Path, web: Container) -> None:
    os.mkdir(tree / "secret")
    os.mkdir(web / "db")
    db = Container(web / "db")
    out = db.run("ls /sys/namespaces; cat /sys/namespaces/init; cat /sys/namespaces/procs/self")
    assert "secret" not in out
    assert "web" not in out
    assert "\n1\n" in out
    assert "container ." in out
    _, everything = db.run_code("cat /proc/self/mountinfo; grep -r . /sys/namespaces 2>/dev/null")
    assert "hostname:db" in everything
    assert "secret" not in everything


def test_what_contains_it_is_read_only_inside(web: Container) -> None:
    for name in ("rootfs", "idmap", "unshare", "binds", "freeze"):
        out = web.run(f"stat -c %a /sys/namespaces/{name}; echo x > /sys/namespaces/{name} || true")
        assert out.startswith("444\n")
        assert "Permission denied" in out
    for command in ("chmod 666 rootfs", "chown 1000 .", "rmdir ../namespaces", "mv . x"):
        code, _ = web.run_code(f"cd /sys/namespaces && {command}")
        assert code != 0
    # Its own: what it may do to itself.
    assert web.run("echo 'ipc mnt net pid user uts' > /sys/namespaces/defaults/unshare; echo ok")


def test_defaults_are_inherited(web: Container) -> None:
    assert web.read("defaults/unshare") == "cgroup ipc mnt net pid syslog time user uts\n"
    # (A cgroup namespace of its own: where cgroups are mounted with `nsdelegate` it has to have one.)
    web.write("defaults/unshare", "cgroup mnt pid user uts")
    os.mkdir(web / "db")
    db = Container(web / "db")
    assert db.read("unshare") == "cgroup mnt pid user uts\n"
    assert db.read("defaults/unshare") == "cgroup mnt pid user uts\n"
    rows = {row.split()[0]: row.split()[2] for row in db.read("namespaces").splitlines()}
    assert rows == {
        "cgroup": "own",
        "ipc": "..",
        "mnt": "own",
        "net": "..",
        "pid": "own",
        "syslog": "..",
        "time": "..",
        "user": "own",
        "uts": "own",
    }
    assert namespaces_of(db.init)["net"] == namespaces_of(web.init)["net"]
    assert namespaces_of(db.init)["pid"] != namespaces_of(web.init)["pid"]


def test_pids_max_is_there_by_default(web: Container) -> None:
    assert web.read("defaults/limits") == "pids.max 4096\n"
    web.write("defaults/limits", "pids.max 10")
    os.mkdir(web / "db")
    db = Container(web / "db")
    code, out = db.run_code("i=0; while [ $i -lt 30 ]; do sleep 1 & i=$((i+1)); done; wait")
    assert code != 0 or "retry" in out or "fork" in out, out


def test_rebuilt_while_idle(web: Container) -> None:
    init = web.init
    web.write("unshare", "ipc mnt pid user uts")
    assert web.read("unshare") == "ipc mnt pid user uts\n"
    assert web.init != init
    assert namespaces_of(web.init)["net"] == namespaces_of(os.getpid())["net"]
    assert web.run("hostname") == "web\n"
    web.start("sleep", "1000")
    wait_until(lambda: web.state()["populated"] == "1", "sleep runs")
    refused(errno.EBUSY, web.write, "unshare", "mnt pid user uts")
    web.write("kill", "1")
    wait_until(lambda: web.state()["populated"] == "0", "it ended")
    # A construction that fails leaves the old one, and says why.
    refused(errno.ENOENT, web.write, "rootfs", "/no/such/directory")
    assert web.read("rootfs") == "host\n"
    assert web.state()["reason"].startswith("rootfs: the path: No such file")
    assert web.run("hostname") == "web\n"
    assert web.state()["reason"] == "-"


def test_nested_to_the_depth_that_the_kernel_allows(tree: Path) -> None:
    path, depth = tree / "c", 0
    while True:
        number = _errno_of(path.mkdir)
        if number:
            break
        depth += 1
        path = path / "c"
    assert errno.errorcode[number] == "ENOSPC"
    assert 30 <= depth <= 32
    deep = Container(path.parent)
    assert deep.run("hostname") == "c\n"
    subprocess.run(["rm", "-rf", tree / "c"], check=True, timeout=2 * DEADLINE_S)
    assert not (tree / "c").exists()


def test_a_dead_container_says_enodev_and_can_be_removed(web: Container) -> None:
    web.run("echo last words > /dev/kmsg")
    os.kill(web.init, signal.SIGKILL)
    wait_until(lambda: _errno_of((web / "init").read_text) == errno.ENODEV, "it is dead")
    for name, value in (("exec", "true"), ("kill", "1"), ("freeze", "1")):
        refused(errno.ENODEV, web.write, name, value)
    refused(errno.ENODEV, os.readlink, web / "nsproxy/net")
    refused(errno.ENODEV, os.open, web / "nsproxy/net", os.O_RDONLY)
    # What a namespace had goes with it.
    refused(errno.ENOENT, web.write, "uts/hostname", "x")
    refused(errno.ENODEV, os.mkdir, web / "db")
    assert "last words" in web.read("kmsg")
    assert web.state()["populated"] == "0"
    os.rmdir(web.path)


def _errno_of(function: Callable[[], object]) -> int:
    try:
        function()
    except OSError as error:
        return error.errno or 0
    return 0


def test_no_read_of_the_tree_blocks(tree: Path, web: Container) -> None:
    os.mkdir(web / "db")
    web.start("sleep", "1000")
    for command in (
        ["grep", "-r", "nosuchtext", web.path],
        ["find", tree, "-type", "f", "-readable"],
        ["tar", "-cf", "/dev/null", "--warning=no-file-shrank", tree / "web"],
        ["ls", "-lR", tree / "web"],
    ):
        subprocess.run(
            command,
            check=False,
            # Some thousand sysctls, each opened in its namespace; an emulated machine takes long.
            timeout=DEADLINE_S,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def test_appending_writes_one_value(web: Container) -> None:
    subprocess.run(["sh", "-c", f"echo 1 >> {web / 'freeze'}"], check=True)
    assert web.read("freeze") == "1\n"
    write(web / "freeze", "0")


def test_links_to_namespaces_work_inside(web: Container) -> None:
    os.mkdir(web / "db")
    out = web.run(
        """
        cd /sys/namespaces
        for type in cgroup ipc mnt net pid time user uts; do
            readlink db/nsproxy/$type
            stat -L -c %i db/nsproxy/$type || echo 0
            stat -L -c %i nsproxy/$type
        done
        nsenter --uts=db/nsproxy/uts hostname
        nsenter --user=db/nsproxy/user --uts=db/nsproxy/uts --net=db/nsproxy/net id -u
        """
    )
    lines = [line for line in out.splitlines() if "Permission denied" not in line]
    its, webs = namespaces_of(Container(web / "db").init), namespaces_of(web.init)
    for kind, row in zip(TYPES, range(0, 24, 3), strict=True):
        # See nsproxy(): the kernel may refuse to have a mount namespace held.
        refused_by_kernel = kind == "mnt" and lines[row].startswith("/proc/")
        assert int(lines[row + 1]) == its[kind] or refused_by_kernel, kind
        assert int(lines[row + 2]) == webs[kind], kind
    assert lines[24:] == ["db", "0"]
    # What holds a namespace inside goes with the container.
    web.run("rmdir /sys/namespaces/db")
    wait_until(lambda: "/dev/.nsfs/ns" not in web.run("cat /proc/self/mountinfo"), "no pin is left")


def test_commands_run_after_a_kill(web: Container) -> None:
    web.start("sleep", "1000")
    wait_until(lambda: web.state()["populated"] == "1", "sleep runs")
    web.write("kill", "1")
    wait_until(lambda: web.state()["populated"] == "0", "it ended")
    assert web.run("echo alive") == "alive\n"
    # A chain of processes, each of which forks the next and ends, does not get away.
    web.start("sh", "-c", "f() { sleep 0.01; f & }; trap '' TERM; f")
    wait_until(lambda: web.state()["populated"] == "1", "it runs")
    web.write("kill", "TERM")
    web.write("kill", "KILL")
    wait_until(lambda: web.state()["populated"] == "0", "it ended")
    assert web.run("echo alive") == "alive\n"


def test_paths_are_resolved_with_the_rights_of_who_named_them(tree: Path) -> None:
    secret = tree.parent / "secret"
    (secret / "below").mkdir(parents=True)
    (secret / "below" / "file").write_text("the host's\n")
    secret.chmod(0o700)
    os.mkdir(tree / "alice")
    os.chown(tree / "alice", 1000, 1000)

    def as_alice(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", *words],
            check=False,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    assert as_alice("mkdir", str(tree / "alice/web")).returncode == 0
    value = f"/mnt {secret}/below ro"
    done = as_alice("bash", "-c", f"echo '{value}' > {tree}/alice/web/binds")
    assert "Permission denied" in done.stderr
    done = as_alice("bash", "-c", f"echo '{value}' > {tree}/alice/defaults/binds")
    assert done.returncode == 0
    # Not with the rights of whoever makes the container either.
    refused(errno.EACCES, os.mkdir, tree / "alice/db")
    done = as_alice("bash", "-c", f"echo {secret}/below > {tree}/alice/web/rootfs")
    assert "Permission denied" in done.stderr


def test_a_command_that_a_freeze_overtakes_is_refused(web: Container) -> None:
    """It is started, or it is not and the write says so; the write never waits for a thaw."""
    for turn in range(25):
        writers = [
            subprocess.Popen(
                ["sh", "-c", f"echo 'touch /tmp/{turn}-{n}' > {web / 'exec'}"],
                stderr=subprocess.DEVNULL,
            )
            for n in range(3)
        ]
        time.sleep(0.0002 * turn)
        web.write("freeze", "1")
        codes = [each.wait(DEADLINE_S) for each in writers]
        web.write("freeze", "0")
        wait_until(lambda: web.state()["populated"] == "0", "those that were started are done")
        made = web.run(f"ls /tmp | grep ^{turn}-; true").split()
        assert len(made) == codes.count(0)
        wait_until(lambda: web.state()["populated"] == "0", "it is idle")


def test_a_freeze_overtakes_no_mkdir(tree: Path, web: Container) -> None:
    """The container is made whole or not at all, and others are made meanwhile."""
    for turn in range(25):
        makers = [
            subprocess.Popen(["mkdir", web / f"{turn}-{n}"], stderr=subprocess.DEVNULL)
            for n in range(2)
        ]
        time.sleep(0.0003 * turn)
        web.write("freeze", "1")
        codes = [each.wait(DEADLINE_S) for each in makers]
        os.mkdir(tree / f"other-{turn}")
        os.rmdir(tree / f"other-{turn}")
        with pytest.raises(OSError, match=r".") as caught:
            os.mkdir(web / "late")
        assert caught.value.errno == errno.EBUSY
        web.write("freeze", "0")
        made = [(web / f"{turn}-{n}").exists() for n in range(2)]
        assert made == [not code for code in codes]
        for n in range(2):
            if made[n]:
                assert Container(web / f"{turn}-{n}").run("echo whole") == "whole\n"
                subprocess.run(["rm", "-rf", web / f"{turn}-{n}"], check=True, timeout=DEADLINE_S)
    web.write("freeze", "1")
    with pytest.raises(OSError, match=r".") as caught:
        web.write("unshare", "mnt pid user uts")
    assert caught.value.errno == errno.EBUSY
    web.write("freeze", "0")
