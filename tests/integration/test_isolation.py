"""The default isolation, point by point, and hostile members who try to get round it.

What a test tries is what somebody would who is root in a container of the default kind.  Each ends
with a look at the rest of the tree: whatever a member does, the others are served.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsfs.spawner import LIBEXEC

from .conftest import DEADLINE_S, Container, Instance, group_of, holding, wait_until

PYTHON = "/usr/bin/python3"
IDS = 65536
FIRST_ID = 0x70000000
PRIVATE = ("var", "srv", "mnt", "home", "root", "tmp", "run")
# Of the file hierarchy standard: what programs take for granted.
WELL_KNOWN = {"cache", "lib", "log", "tmp", "run", "lock"}
# To begin with, in each program that is run inside.
PREAMBLE = """
import ctypes, errno, mmap, os, select, signal, socket, stat, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = {  # x86-64, aarch64
    "delete_module": (176, 106), "finit_module": (313, 273), "init_module": (175, 105),
    "io_setup": (206, 0), "io_submit": (209, 2), "kexec_file_load": (320, 294),
    "kexec_load": (246, 104), "open_by_handle_at": (304, 265), "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434), "process_vm_readv": (310, 270), "ptrace": (101, 117),
    "setns": (308, 268), "umount2": (166, 39),
}
def call(name, *args):
    number = NUMBERS[name][os.uname().machine == "aarch64"]
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *args)
    return -ctypes.get_errno() if result < 0 else result
def tried(function, *args):
    try:
        function(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
"""


def script(program: str) -> str:
    """A shell command that runs a Python program."""
    return f"{PYTHON} -u - <<'END'\n{PREAMBLE}{textwrap.dedent(program)}\nEND\n"


def says(container: Container, program: str) -> list[str]:
    """The lines that a Python program prints inside; fails when it does."""
    return container.run(script(program)).splitlines()


def starts(container: Container, program: str, until: str) -> None:
    """Start a Python program inside and wait until it has printed a line."""
    container.start("sh", "-c", script(program))
    output = container / "output"
    wait_until(lambda: f"{until}\n".encode() in output.read_bytes(), f"it prints {until}")


@pytest.fixture
def served(instance: Instance, tree: Path) -> Iterator[None]:
    """Afterwards the same daemon serves everything at once."""
    daemon = instance.daemon()
    yield
    began = time.monotonic()
    done = subprocess.run(
        ["sh", "-c", 'mkdir "$0/probe" && cat "$0/probe/state" && rmdir "$0/probe"', tree],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "populated 0" in done.stdout
    assert time.monotonic() - began < 10
    assert instance.daemon() == daemon, instance.log()[-4000:]


def uid_map(container: Container) -> list[int]:
    (line,) = Path(f"/proc/{container.init}/uid_map").read_text().splitlines()
    return list(map(int, line.split()))


# --- what the default is ---


def test_ids_of_its_own(tree: Path, web: Container) -> None:
    os.mkdir(tree / "other")
    spans = []
    for each in (web, Container(tree / "other")):
        inside, outside, count = uid_map(each)
        assert (inside, count) == (0, 16 * IDS)
        assert outside >= FIRST_ID
        assert Path(f"/proc/{each.init}/gid_map").read_text().split() == [
            str(inside),
            str(outside),
            str(count),
        ]
        spans.append((outside, outside + count))
    (_, end), (start, _) = sorted(spans)
    assert end <= start
    assert web.run("id -u; cat /proc/sys/kernel/overflowuid; stat -c %u /etc").split() == [
        "0",
        "65534",
        "65534",
    ]


def test_nested_ones_get_slices_while_they_last(web: Container) -> None:
    first = uid_map(web)[1]
    starts_at = []
    for number in range(17):
        os.mkdir(web / f"n{number}")
        inside, outside, count = uid_map(Container(web / f"n{number}"))
        assert (inside, count) == (0, IDS)
        starts_at.append((outside - first) // IDS)
    assert sorted(starts_at[:15]) == list(range(1, 16))
    assert starts_at[15:] == [0, 0]
    # What was given back is given out again.
    os.rmdir(web / "n3")
    wait_until(lambda: not (web / "n3").exists(), "it is gone")

    def again() -> bool:
        os.mkdir(web / "again")
        number = (uid_map(Container(web / "again"))[1] - first) // IDS
        os.rmdir(web / "again")
        return number == starts_at[3]

    wait_until(again, "the slice is used again")


def test_namespaces_of_its_own(web: Container) -> None:
    for kind in os.listdir("/proc/self/ns"):
        name = kind.removesuffix("_for_children")
        if name == kind:
            theirs = os.stat(f"/proc/{web.init}/ns/{name}").st_ino
            assert theirs != os.stat(f"/proc/self/ns/{name}").st_ino, name


def test_no_mount_but_ours(web: Container) -> None:
    def devices(pid: int | str) -> set[tuple[str, str]]:
        lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        return {(line.split()[2], line.split(" - ")[1].split()[0]) for line in lines}

    shared = devices(web.init) & devices("self")
    root = os.stat("/").st_dev
    # The root filesystem; the device nodes and the tree itself are bound, file by file.
    allowed = {f"{os.major(root)}:{os.minor(root)}"}
    assert {device for device, kind in shared if kind != "fuse.namespaces"} <= allowed
    lines = Path(f"/proc/{web.init}/mountinfo").read_text().splitlines()
    points = {line.split()[4] for line in lines}
    assert {"/proc", "/sys", "/sys/namespaces", "/dev", "/dev/kmsg"} <= points
    tops = {point.split("/")[1] for point in points}
    assert tops == {"", "dev", "proc", "sys", *PRIVATE}


def test_private_directories(web: Container) -> None:
    for name in PRIVATE:
        found = set(web.run(f"cd /{name} && find . -mindepth 1 | sed s,./,,").split())
        assert found <= WELL_KNOWN | {"lock"}, name
        assert web.run(f"touch /{name}/mine && stat -c %u /{name}/mine") == "0\n"
        assert not os.path.exists(f"/{name}/mine")
    code, out = web.run_code("touch /usr/mine || touch /etc/mine || touch /mine")
    assert code != 0
    assert "Read-only" in out


@pytest.mark.parametrize(
    "way",
    [
        "umount /var; umount -l /var; umount -l /home",
        "mount --bind / /mnt; mount --rbind / /mnt; cd /mnt",
        "mkdir -p /tmp/u /tmp/w /tmp/m; mount -t overlay -o "
        "lowerdir=/,upperdir=/tmp/u,workdir=/tmp/w none /tmp/m; cd /tmp/m",
        "unshare -m sh -c 'umount -l /var; umount -l /home; ls -A /var /home'",
        "unshare -Um sh -c 'umount -l /var; umount -l /home; ls -A /var /home'",
        "mount --move /var /mnt; mount --move /home /mnt",
        "cd / && pivot_root . . ; umount -l /; umount -l .",
    ],
)
def test_what_is_below_private_directories_stays_there(way: str, web: Container) -> None:
    """Of the host's /var everybody may read much, and so may nobody's container."""
    before = set(web.run("ls -A /var /home").split())
    hosts = {*os.listdir("/var"), *os.listdir("/home")} - before - {"var", "home"}
    assert hosts
    _, out = web.run_code(f"({way}; ls -A var home) 2>/dev/null; {way}; ls -A /var /home")
    assert not hosts & {
        word for line in out.splitlines() if ":" not in line for word in line.split()
    }


def test_the_root_cannot_be_made_writable(web: Container) -> None:
    for flags in ("rw", "ro,suid", "ro,dev"):
        code, _ = web.run_code(f"mount -o remount,bind,{flags} /")
        assert code != 0, flags
    assert web.run_code("unshare -Urm mount -o remount,bind,rw /")[0] != 0


def test_host_files_are_read_as_other(web: Container, on_root: Path) -> None:
    for mode in (0o644, 0o640, 0o600):
        (on_root / f"{mode:o}").write_text("text\n")
        (on_root / f"{mode:o}").chmod(mode)
    assert web.run(f"cat {on_root}/644") == "text\n"
    for name in ("640", "600"):
        code, out = web.run_code(f"cat {on_root}/{name}")
        assert code != 0, out
    # Neither as root, nor as anybody else that root can become.
    code, out = web.run_code(f"setpriv --reuid 1000 --regid 1000 --clear-groups cat {on_root}/640")
    assert "denied" in out
    assert web.run_code("cat /etc/shadow")[0] != 0


def test_setuid_programs_of_the_host_give_nothing(web: Container) -> None:
    # su belongs to nobody inside and the mount is nosuid.
    out = web.run("setpriv --reuid 1000 --regid 1000 --clear-groups su -c 'id -u' </dev/null; true")
    assert "0" not in out.split()


def test_no_socket_of_the_host_is_reachable(
    web: Container, instance: Instance, on_root: Path
) -> None:
    name = f"nsfs-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as by_path, socket.socket(socket.AF_UNIX) as abstract:
        by_path.bind(str(on_root / "socket"))
        abstract.bind(f"\0{name}")
        os.chmod(on_root / "socket", 0o777)
        os.mkfifo(on_root / "fifo")
        os.chmod(on_root / "fifo", 0o777)
        with socket.create_server(("127.0.0.1", 0)) as tcp:
            for each in (by_path, abstract):
                each.listen()
            out = says(
                web,
                f"""
                for kind, where in ((1, {str(on_root / "socket")!r}), (1, chr(0) + {name!r})):
                    print(tried(socket.socket(socket.AF_UNIX).connect, where))
                print(tried(os.open, {str(on_root / "fifo")!r}, os.O_WRONLY | os.O_NONBLOCK))
                print(tried(socket.socket().connect, ("127.0.0.1", {tcp.getsockname()[1]})))
                """,
            )
            mapped = instance.status()["features"]["idmapped_root"]
            assert out[0] == ("EACCES" if mapped else "done")
            assert out[1:] == ["ECONNREFUSED", "EACCES" if mapped else "ENXIO", "ECONNREFUSED"]
            reached = select.select([by_path, abstract, tcp], [], [], 0)[0]
            assert reached == ([] if mapped else [by_path])


def test_devices(web: Container) -> None:
    names = set(
        web.run("cd /dev; for i in *; do [ ! -L $i ] && [ -c $i ] && echo $i; done").split()
    )
    assert names == {"null", "zero", "full", "random", "urandom", "tty"}
    assert web.run_code("mknod /tmp/sda b 8 0")[0] != 0
    assert web.run_code("mknod /tmp/mem c 1 1")[0] != 0
    assert web.run_code("mount -t devtmpfs none /mnt")[0] != 0
    assert web.run("head -c 3 /dev/zero | od -An -tx1; echo x > /dev/null") == " 00 00 00\n"


def test_proc_and_sys(web: Container) -> None:
    assert str(os.getpid()) not in web.run("ls /proc").split()
    assert web.run("ls /sys/class/net") == "lo\n"
    for path in ("kernel/core_pattern", "kernel/panic", "vm/drop_caches", "kernel/modprobe"):
        assert web.run_code(f"echo 1 > /proc/sys/{path}")[0] != 0, path
    for path in ("/proc/sysrq-trigger", "/sys/kernel/uevent_helper", "/sys/power/state"):
        assert web.run_code(f"test -e {path} && echo h > {path}")[0] != 0, path
    # Nor when it mounts them anew.
    web.run("mkdir -p /tmp/p /tmp/s; mount -t proc none /tmp/p; mount -t sysfs none /tmp/s")
    assert web.run_code("echo h > /tmp/p/sysrq-trigger")[0] != 0
    assert web.run_code("head -c 1 /proc/kcore || dd if=/proc/kcore count=1 of=/dev/null")[0] != 0


def test_pids_max(web: Container) -> None:
    (count,) = says(
        web,
        """
        made = []
        while len(made) < 5000:
            try:
                pid = os.fork()
            except BlockingIOError:
                break
            if not pid:
                signal.pause()
            made.append(pid)
        print(len(made))
        for pid in made:
            os.kill(pid, signal.SIGKILL)
        """,
    )
    assert 4000 < int(count) < 4096


def test_denylist(web: Container) -> None:
    names = ("init_module", "finit_module", "delete_module")
    names += ("kexec_load", "kexec_file_load", "open_by_handle_at")
    out = says(web, f"for name in {names}: print(name, call(name, -1, 0, 0, 0, 0))")
    assert out == [f"{name} {-errno.EPERM}" for name in names]
    # These its root has no capability for either; what only the denylist refuses is MNT_FORCE (1).
    out = says(
        web, "print(*(call('umount2', ctypes.c_char_p(b'/nowhere'), flags) for flags in (1, 2)))"
    )
    assert out == [f"{-errno.EACCES} {-errno.ENOENT}"]


def test_its_init_can_be_neither_traced_nor_inspected(web: Container) -> None:
    out = says(
        web,
        """
        fd, none = call("pidfd_open", 1, 0), ctypes.c_char_p(bytes(16))
        print(*(-r for r in (
            call("ptrace", 16, 1, 0, 0),                                # PTRACE_ATTACH
            call("ptrace", 0x4206, 1, 0, 0),                            # PTRACE_SEIZE
            call("process_vm_readv", 1, none, 0, none, 0, 0) or -1,
            call("pidfd_getfd", fd, 3, 0),
            call("setns", fd, 0x10000000),
        )))
        for name in ("exe", "cwd", "root", "ns/net"):
            print(tried(os.readlink, "/proc/1/" + name))
        for name in ("fd", "fdinfo", "map_files", "task/1/fd"):
            print(tried(os.listdir, "/proc/1/" + name))
        for name in ("mem", "environ", "maps", "syscall", "stack", "auxv", "io"):
            print(tried(lambda: open("/proc/1/" + name, "rb").read(1)))
        print(tried(lambda: open("/proc/1/mem", "r+b")))
        print(tried(lambda: open("/proc/1/oom_score_adj", "w").write("1000")))
        for number in range(1, 65):
            tried(os.kill, 1, number)
        """,
    )
    assert set(map(int, out[0].split())) <= {errno.EPERM, 1, errno.EINVAL}
    assert out[0].split()[:2] == [str(errno.EPERM)] * 2
    assert out[0].split()[3] == str(errno.EPERM)
    assert set(out[1:]) <= {"EACCES", "EPERM"}, out
    assert web.run("echo lives") == "lives\n"


# --- the fences ---


def test_members_cannot_leave_their_group(web: Container) -> None:
    starts(
        web,
        """
        os.makedirs("/tmp/v2"); os.makedirs("/tmp/v1")
        os.system("mount -t cgroup2 none /tmp/v2; mount -t cgroup -o pids none /tmp/v1")
        for top in ("/tmp/v2", "/tmp/v1"):
            for way in ("..", "../init", "../..", "../../.."):
                for file in ("cgroup.procs", "tasks"):
                    tried(lambda: open(f"{top}/{way}/{file}", "w").write("0"))
        for file in ("pids.max", "cgroup.max.depth", "cgroup.freeze", "cgroup.kill", "memory.max"):
            for top in filter(os.path.ismount, ("/tmp/v2", "/tmp/v1")):
                assert tried(lambda: open(f"{top}/{file}", "w").write("1")) != "done", file
        # In a group of its own it stays below.
        os.mkdir("/tmp/v2/own")
        open("/tmp/v2/own/cgroup.procs", "w").write("0")
        # A cgroup namespace made now ends here, not higher.
        libc.unshare(0x02000000)
        print("ready")
        time.sleep(1000)
        """,
        "ready",
    )
    payload = group_of(web.init).removesuffix("/init") + "/payload"
    pids = [int(pid) for pid in os.listdir(web / "procs")]
    assert pids
    assert all(f"{group_of(pid)}/".startswith(f"{payload}/") for pid in pids)
    web.write("kill", "1")
    wait_until(
        lambda: web.state()["populated"] == "0", "all are killed, in groups of their own too"
    )


def test_its_init_in_another_group_is_removed_too(web: Container, instance: Instance) -> None:
    """Its root may do that, as it may end its processes: the container is none the less removed."""
    web.run_code(
        "mkdir /tmp/v2; mount -t cgroup2 none /tmp/v2; mkdir /tmp/v2/own; "
        "echo 1 > /tmp/v2/own/cgroup.procs; sleep 1000 >/dev/null 2>&1 &"
    )
    pids = [int(pid) for pid in os.listdir(web / "procs")]
    assert "populated" in web.read("state")
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    instance.settled()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_groups_of_members_have_bounds(web: Container, served: None) -> None:
    """Else a walk through them, or a path to the last, would end the daemon."""
    out = says(
        web,
        """
        os.mkdir("/tmp/cg"); os.system("mount -t cgroup2 none /tmp/cg"); os.chdir("/tmp/cg")
        def dig(name):
            for depth in range(2000):
                if tried(os.mkdir, name) != "done": return depth
                os.chdir(name)
        print(dig("d" * 255))
        os.chdir("/tmp/cg")
        for wide in range(20000):
            if tried(os.mkdir, f"w{wide}") != "done": break
        print(wide)
        """,
    )
    assert int(out[0]) < 20
    assert int(out[1]) < 20000
    assert web.state()["populated"] in ("0", "1")
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)


def test_nothing_of_other_containers_is_to_be_seen(tree: Path, web: Container) -> None:
    os.mkdir(tree / "secret-sibling")
    Container(tree / "secret-sibling").start("sleep", "31415926")
    # More than `output` holds.
    script = """
        cat /proc/self/mountinfo /proc/mounts /proc/self/cgroup /proc/1/cgroup
        grep -rs . /sys/namespaces
        ls -Ra /sys/namespaces /dev/.nsfs/ns 2>/dev/null
        ls -la /proc/self/fd/ /sys/namespaces/..
        ls /sys/namespaces/.f /sys/namespaces/../.f /proc/self/fd/1/.. 2>&1
        ps ax 2>/dev/null || cat /proc/[0-9]*/cmdline
        true
        """
    done = subprocess.run(
        [LIBEXEC / "nsfs-enter", web.path, "--", "sh", "-c", script], capture_output=True
    )
    assert done.returncode == 0
    out = done.stdout.decode(errors="replace")
    assert "populated" in out
    assert "secret-sibling" not in out
    assert "31415926" not in out
    for path in ("/sys/namespaces/.f", "/sys/namespaces/../.f", "/proc/self/fd/1/..", "/.f"):
        assert web.run_code(f"ls {path}")[0] != 0, path


def test_what_is_the_parents_stays_the_parents(web: Container) -> None:
    names = ("rootfs", "idmap", "unshare", "binds", "freeze", "console")
    names = tuple(name for name in names if (web / name).exists())
    before = {name: web.read(name) for name in names}
    modes = {name: os.stat(web / name) for name in names}
    out = says(
        web,
        f"""
        top = "/sys/namespaces/"
        os.makedirs("/tmp/bound"); os.system("mount --bind /sys/namespaces /tmp/bound")
        os.system("(mount -o remount,bind,rw /tmp/bound; mount -o remount,rw /sys/namespaces) 2>&-")
        for name in {names!r}:
            for base in (top, "/tmp/bound/"):
                path = base + name
                fd = os.open(path, os.O_RDONLY)
                print(name, tried(os.open, path, os.O_WRONLY), tried(os.open, path, os.O_RDWR),
                      tried(os.open, path, os.O_WRONLY | os.O_TRUNC),
                      tried(os.open, f"/proc/self/fd/{{fd}}", os.O_WRONLY),
                      tried(os.write, fd, b"1"), tried(os.truncate, path, 0),
                      tried(os.chmod, path, 0o666), tried(os.chown, path, 1000, 1000),
                      tried(os.fchmod, fd, 0o666), tried(os.setxattr, path, "user.x", b"x"),
                      tried(os.link, path, base + "another"), tried(os.rename, path, base + "old"),
                      tried(os.mkdir, path), tried(os.symlink, "/etc", base + "x"))
        import fcntl
        for request in (0x8004E500, 0x40086602, 0xC0205865):
            print("ioctl", tried(fcntl.ioctl, fd, request, bytes(64)))
        print("directory", tried(os.chmod, top, 0o777), tried(os.chown, top, 1000, 1000),
              tried(os.rename, top, "/sys/other"), tried(os.rmdir, top))
        """,
    )
    assert len(out) == 2 * len(names) + 4
    assert not [line for line in out if "done" in line], out
    assert {name: web.read(name) for name in names} == before
    for name in names:
        assert (os.stat(web / name).st_mode, os.stat(web / name).st_uid) == (
            modes[name].st_mode,
            modes[name].st_uid,
        )
    assert web.path.stat().st_mode & 0o777 == 0o755


def test_it_cannot_be_removed_or_renamed_from_inside(web: Container) -> None:
    _, out = web.run_code(
        "rm -rf /sys/namespaces; rm -rf /sys/namespaces/*; mv /sys/namespaces /sys/x; "
        "rmdir /sys/namespaces; cat /sys/namespaces/state"
    )
    assert "populated 1" in out
    assert web.run("hostname") == "web\n"
    # What was marked inside does not count outside.
    web.start("sleep", "1000")
    wait_until(lambda: web.state()["populated"] == "1", "it runs")
    with pytest.raises(OSError, match="busy"):
        os.rmdir(web.path)


def test_limits_of_children_are_within_its_own(web: Container) -> None:
    web.write("defaults/limits", "pids.max 64")
    os.mkdir(web / "db")
    db = Container(web / "db")
    # Itself it may give more to its children: the kernel counts in the group above all the same.
    db.run("echo 'pids.max max' > /sys/namespaces/defaults/limits; mkdir /sys/namespaces/in")
    deep = Container(web / "db" / "in")
    code, out = deep.run_code("i=0; while [ $i -lt 100 ]; do sleep 5 & i=$((i+1)); done")
    assert code != 0 or "fork" in out.lower(), out


def test_paths_that_members_name_are_their_own(
    web: Container, instance: Instance, tmp_path: Path
) -> None:
    """The host's root who makes a container in another is not to lend its members his eyes."""
    hosts = tmp_path / "hosts"
    hosts.mkdir()
    (hosts / "key").write_text("secret")
    os.chmod(tmp_path, 0o755)
    for value in (f"/mnt {hosts} rw", f"/mnt {hosts}/key ro", "/mnt /proc/1/root ro"):
        web.run(f"echo '{value}' > /sys/namespaces/defaults/binds")
        with contextlib.suppress(OSError):
            os.mkdir(web / "db")
            out = Container(web / "db").run_code("ls -A /mnt/; cat /mnt /mnt/key")[1]
            assert "key\n" not in out
            assert "secret" not in out
            os.rmdir(web / "db")
    web.run("echo > /sys/namespaces/defaults/binds")
    web.run(f"echo {hosts} > /sys/namespaces/defaults/rootfs")
    with pytest.raises(OSError, match=r"."):
        os.mkdir(web / "db")
    # And what they gave to one of theirs is not looked up again when the host rebuilds that.
    web.run(
        f"""
        echo host > /sys/namespaces/defaults/rootfs
        mkdir -p {hosts} 2>/dev/null; echo inside > {hosts}/key
        echo '/mnt {hosts} ro' > /sys/namespaces/defaults/binds
        mkdir /sys/namespaces/db
        """
    )
    db = Container(web / "db")
    assert db.run("cat /mnt/key") == "inside\n"
    wait_until(lambda: db.state()["populated"] == "0", "it is idle")
    # Where cgroups are mounted with `nsdelegate` the cgroup namespace has to be its own.
    db.write("unshare", "cgroup mnt net pid time user uts")
    assert db.run("cat /mnt/key") == "inside\n"


# --- what members may try against the daemon ---


HARM: dict[str, tuple[str, str]] = {
    "asynchronous reads that never end": (
        """
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_DIRECT)
        context, buffer = ctypes.c_ulong(), ctypes.create_string_buffer(8192)
        call("io_setup", 100, ctypes.byref(context))
        if not os.fork():
            # Where it is not asynchronous the first of them waits.
            call("io_setup", 100, ctypes.byref(context))
            for key in range(50):
                block = ctypes.create_string_buffer(struct.pack("<QIiHhIQQqQII", key, 0, 0, 0, 0,
                    fd, ctypes.addressof(buffer), 4096, 0, 0, 0, 0))
                blocks = (ctypes.c_void_p * 1)(ctypes.addressof(block))
                call("io_submit", context.value, 1, blocks)
            time.sleep(1000)
        time.sleep(0.3)
        print("ready")
        time.sleep(1000)
        """,
        "cat state",
    ),
    "a rootfs of our own files": (
        """
        os.mkdir("/sys/namespaces/db")
        for name in ("kmsg", "output", "procs/self", "state", "procs", "db", ".", "exec"):
            for file, value in (("rootfs", "{}"), ("binds", "/mnt/x {} rw")):
                try:
                    fd = os.open("/sys/namespaces/db/" + file, os.O_WRONLY)
                    os.write(fd, value.format("/sys/namespaces/" + name).encode())
                except OSError:
                    pass
                os.close(fd)
        print("ready")
        """,
        "cat db/state",
    ),
    "forking faster than it is signalled": (
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("ready")
        for each in range(3):
            os.fork()
        while True:
            if os.fork():
                os._exit(0)
        """,
        "echo TERM > kill; echo TERM > kill",
    ),
    "five thousand open files": (
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (6000, 6000))
        kept = [os.open("/sys/namespaces/state", os.O_RDONLY) for each in range(2500)]
        kept += [os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK) for each in range(2500)]
        for fd in kept[:2500]:
            os.pread(fd, 1, 0)
        print("ready")
        time.sleep(1000)
        """,
        "cat state",
    ),
    "reads of a byte and at odd offsets": (
        """
        for name in ("state", "kmsg", "output", "stat", "procs/self", "namespaces", "init"):
            fd = os.open("/sys/namespaces/" + name, os.O_RDONLY)
            whole = os.pread(fd, 65536, 0)
            for at in (0, 1, 4095, 4096, 1 << 40, (1 << 62)):
                for size in (0, 1, 2, 7, 65536):
                    tried(os.pread, fd, size, at)
            os.lseek(fd, 0, 0)
            while os.read(fd, 1):
                pass
        print("ready")
        """,
        "cat state",
    ),
    "writes of any size and bytes": (
        """
        names = os.listdir("/sys/namespaces") + ["defaults/" + n for n in
                                                 os.listdir("/sys/namespaces/defaults")]
        for name in names:
            if name in ("procs", "kill", "freeze"):
                continue
            for data in (b"", b"\\n", b"\\0", b"\\xff\\xfe", b"x" * 4096, b"x" * 4097, b"x" * 200000,
                         b"9" * 4000, b"\\\\400 \\\\777 rw", b"-1", b"pids.max 99999999999999999999",
                         b"0 0 99999999999", b"/ / rw", b"/../.. /../.. ro", b"'\\"", b"\\n" * 4000):
                try:
                    fd = os.open("/sys/namespaces/" + name, os.O_WRONLY | os.O_NONBLOCK)
                except OSError:
                    break
                tried(os.write, fd, data)
                os.close(fd)
        for name in os.listdir("/sys/namespaces/defaults"):
            tried(lambda: open("/sys/namespaces/defaults/" + name, "w").write("\\n"))
        print("ready")
        """,
        "cat state",
    ),
    "names of any bytes": (
        """
        top = b"/sys/namespaces/"
        for name in (b"\\xff", b"\\n", b"\\x7f", b"a" * 255, b"a" * 256, b" ", b"-rf", b"*", b"\\\\",
                     b"\\xe2\\x80\\xae", b"%s%n", b"unnamed1", b"nsfs.x", b".f", b"..", b"...",
                     b"9" * 255, b"\\xed\\xa0\\x80", "\\u2028".encode()):
            for base in (top, top + b"procs/", top + b"nsproxy/", top + b"defaults/"):
                tried(os.stat, base + name)
                tried(os.mkdir, base + name)
                tried(os.rename, base + name, base + name + b"2")
                tried(os.rename, base + name + b"2", base + name)
                tried(os.rmdir, base + name)
        print("ready")
        """,
        "ls; cat state",
    ),
    "removals of everything inside": (
        """
        def storm():
            for each in range(30):
                for path, names, files in os.walk("/sys/namespaces", topdown=False):
                    for name in files + names:
                        tried(os.unlink, path + "/" + name)
                        tried(os.rmdir, path + "/" + name)
        children = [os.fork() for each in range(2)]
        if 0 in children:
            storm()
            os._exit(0)
        storm()
        for child in children:
            os.waitpid(child, 0)
        print("ready")
        """,
        "cat state; ls",
    ),
    "polls without end": (
        """
        polls = select.poll()
        for name in ("state", "kmsg"):
            polls.register(os.open("/sys/namespaces/" + name, os.O_RDONLY), select.POLLPRI)
        for each in range(500):
            polls.poll(1)
        print("ready")
        """,
        "cat state",
    ),
    "containers whose init is killed": (
        """
        for each in range(20):
            os.mkdir(f"/sys/namespaces/n{each}")
            os.kill(int(open(f"/sys/namespaces/n{each}/init").read()), signal.SIGKILL)
        print("ready")
        """,
        "cat state",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm(harm: str, web: Container, instance: Instance, served: None) -> None:
    program, outside = HARM[harm]
    starts(web, program, "ready")
    began = time.monotonic()
    subprocess.run(
        ["sh", "-c", outside],
        cwd=web.path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
        timeout=DEADLINE_S,
    )
    assert time.monotonic() - began < 15
    # Whatever they are doing, they go.
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    instance.settled()


HOLDER = """
fd = os.open("/mnt/direct", os.O_RDONLY)
first = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
if not os.fork():
    first[0]
time.sleep(0.3)
"""
# It is looked at whether what links itself is an ln of busybox.
LINKS_ITSELF = f"""
import ctypes, errno, mmap, os, threading, time
{HOLDER}
# The lock of the interpreter is given up.
threading.Thread(target=ctypes.CDLL(None).mmap, args=(None, 4096, 1, 2, fd, 0)).start()
time.sleep(0.3)
try:
    os.link("/sys/namespaces/procs/self", "/sys/namespaces/db/procs/self")
except OSError as error:
    print("ready" if error.errno == errno.EBUSY else error)
"""
LOCKED = {
    "a member's": (
        f"""{HOLDER}
print("ready")
second = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
""",
        "cat procs/*; cat procs/*",
    ),
    "of who links himself": (
        f"""
import shutil
os.mkdir("/sys/namespaces/db")
shutil.copy("/usr/bin/python3", "/tmp/busybox")
if not os.fork():
    os.execv("/tmp/busybox", ["/tmp/busybox", "-u", "-c", {LINKS_ITSELF!r}])
time.sleep(1000)
""",
        "cat state",
    ),
}


@pytest.mark.parametrize("whose", LOCKED)
def test_a_command_line_that_is_locked(
    whose: str, web: Container, tmp_path: Path, instance: Instance, served: None
) -> None:
    """mmap(2) of a direct-I/O file waits for its locked pages with the process's mmap_lock held,
    which whoever reads its command line wants too."""
    program, outside = LOCKED[whose]
    with holding(tmp_path / "holding") as server:
        web.write("binds", f"/mnt {tmp_path}/holding ro")
        starts(web, program, "ready")
        subprocess.run(
            ["sh", "-c", outside], cwd=web.path, capture_output=True, check=False, timeout=15
        )
        # They wait as that filesystem has them wait, whatever kills them.
        server.kill()
        subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
        instance.settled()


def test_no_page_of_a_log_is_waited_for(web: Container) -> None:
    """It would keep whoever opens or maps the file waiting, whatever signals come."""
    assert says(
        web,
        """
        sent_fd = os.open("/tmp/sent", os.O_WRONLY | os.O_CREAT)
        for name in ("/dev/kmsg", "/proc/kmsg", "/sys/namespaces/state"):
            fd = os.open(name, os.O_RDONLY)
            print(tried(mmap.mmap, fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ))
            print(tried(os.sendfile, sent_fd, fd, 0, 100))
            for each in range(3):
                if not os.fork():
                    mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)[0]
                    os._exit(0)
            print(*{os.wait()[1] for each in range(3)})
            os.close(os.open(name, os.O_RDONLY))
        """,
    ) == [*["ENODEV", "EINVAL", str(signal.SIGBUS.value)] * 2, "ENODEV", "done", "0"]


def test_commands_without_number(web: Container, instance: Instance, served: None) -> None:
    """More of them at once than the daemon may have descriptors: some fail, and nothing else."""
    soft = int(
        next(
            line.split()[3]
            for line in Path(f"/proc/{instance.daemon()}/limits").read_text().splitlines()
            if line.startswith("Max open files")
        )
    )
    starts(
        web,
        f"""
        for each in range(min({soft} + 300, 1300)):
            try:
                if not os.fork():
                    for turn in range(4):
                        tried(lambda: open("/sys/namespaces/exec", "w").write("sleep 1"))
                    os._exit(0)
            except OSError:
                pass
        print("ready")
        """,
        "ready",
    )
    for _ in range(5):
        done = subprocess.run(
            ["cat", web / "state"], capture_output=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 0, done.stderr
        time.sleep(0.1)
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=2 * DEADLINE_S)
    instance.settled()


def test_files_of_a_dead_container_stay_open(tree: Path, instance: Instance, served: None) -> None:
    os.mkdir(tree / "dead")
    dead = Container(tree / "dead")
    dead.run("echo last > /dev/kmsg")
    names = ("state", "kmsg", "output", "init", "rootfs", "defaults/limits", "stat")
    files = [os.open(dead / name, os.O_RDONLY) for name in names]
    listing = os.open(dead.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        subprocess.run(["rm", "-rf", dead.path], check=True, timeout=DEADLINE_S)
        instance.settled()
        for fd in files:
            with contextlib.suppress(OSError):
                os.pread(fd, 4096, 0)
            os.fstat(fd)
        assert os.listdir(listing) is not None or True
    except OSError as error:
        assert error.errno in (errno.ENOENT, errno.ENODEV, errno.ESTALE)
    finally:
        for fd in (*files, listing):
            os.close(fd)


HOSTILE = (
    "umount -l /sys/namespaces; umount -l /dev/kmsg; umount -l /proc/kmsg",
    "umount -l /proc; umount -l /sys; umount -l /dev",
    "mount -t tmpfs none /dev; mount -t tmpfs none /sys; mount -t tmpfs none /proc",
    "mount -t tmpfs none /; mount --bind /tmp /",
    "mount -o remount,ro /dev; mount -o remount,bind,ro /dev/.nsfs; rm -rf /dev/* /dev/.nsfs",
    "rm -rf /dev/.nsfs/ns; ln -s /etc /dev/.nsfs/ns; mkdir -p /tmp/r && cd /tmp/r && "
    "mount --bind /usr . && mkdir -p old; pivot_root . old; chroot .",
    "echo 0 > /proc/sys/user/max_user_namespaces; echo 0 > /proc/sys/user/max_mnt_namespaces",
    "mount --make-rshared /; mount --make-rslave /; mount --make-runbindable /",
)


@pytest.mark.parametrize("done", HOSTILE)
def test_a_hostile_root_harms_only_itself(
    done: str, tree: Path, web: Container, instance: Instance, served: None
) -> None:
    web.run_code(f"({done}) 2>/dev/null")
    began = time.monotonic()
    try:
        os.mkdir(web / "db")
    except OSError as error:
        assert errno.errorcode[error.errno or 0] != "EIO"
        assert not (web / "db").exists()
    else:
        assert Container(web / "db").run("hostname; ls /sys/namespaces/state").split() == [
            "db",
            "/sys/namespaces/state",
        ]
    assert time.monotonic() - began < 15
    with contextlib.suppress(OSError):
        os.readlink(web / "nsproxy" / "net")
    assert "populated" in web.read("state")
    subprocess.run(["rm", "-rf", web.path], check=True, timeout=DEADLINE_S)
    instance.settled()


def test_nested_in_one_that_was_given_a_root(web: Container) -> None:
    """`host` is the root filesystem of the container above, whatever that has mounted over it."""
    os.mkdir(web / "db")
    os.mkdir(web / "db" / "in")
    for path in (web / "db", web / "db" / "in"):
        _, out = Container(path).run_code("umount -l /var /home; ls -A /var /home; ls -d /usr/bin")
        assert "/usr/bin" in out
        assert not set(os.listdir("/var")) - WELL_KNOWN & set(out.split())
